//! Several owners of one memory, with a real etcd: one of them owns it, and mirrors are never
//! stale. Counts as ignored where there is no `etcd` (Debian: `apt-get install etcd-server`).
#![allow(missing_docs)]

mod support;

use bytes::Bytes;
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::{Pid, Signal, kill_process};
use shootdown::{AddressRange, AddressSpace, Event};
use shootdown_grpc::etcd::Campaign;
use shootdown_grpc::{BootClock, Checked, Client, Server, ServerTls, Space, Unreadable};
use shootdown_lease::engine::Hub;
use shootdown_lease::{Host, Memory, Owner, Standing, Terms};
use std::fs::File;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::certificates::{Authority, Identity};
use support::{BASE, LONG, Mirroring, TERM, page, soon, until};

/// Where an owner's process reads what it is.
const ROLE: &str = "SHOOTDOWN_OWNER";
/// The shortest that etcd takes with the election below.
const TIME_TO_LIVE: Duration = Duration::from_secs(1);

/// Longer than an owner's key lives: mirrors still hold on when the next owner begins.
fn long_terms() -> Terms {
    Terms::new(TIME_TO_LIVE + TIME_TO_LIVE / 2)
}

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(ROLE) {
        return runtime().block_on(own(&role));
    }
    let there = Command::new("etcd")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    let trial = |name: &str, test: fn()| {
        let test = move || {
            test();
            Ok::<_, Failed>(())
        };
        Trial::test(name, test).with_ignored_flag(!there).with_kind(if there {
            ""
        } else {
            "no etcd here"
        })
    };
    let trials = vec![
        trial(
            "owners_take_over_and_mirrors_are_never_stale",
            owners_take_over_and_mirrors_are_never_stale,
        ),
        trial(
            "an_owner_that_resigns_is_followed_at_once",
            an_owner_that_resigns_is_followed_at_once,
        ),
        trial(
            "an_owner_that_does_not_hear_of_etcd_is_none",
            an_owner_that_does_not_hear_of_etcd_is_none,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A process of the test, killed with it.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn exit_code(&mut self) -> Option<i32> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(began.elapsed() < LONG, "it goes on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

struct Etcd {
    process: Process,
    url: String,
    _data: tempfile::TempDir,
}

impl Etcd {
    fn begin() -> Self {
        let data = tempfile::tempdir().unwrap();
        let (url, peers) =
            (format!("http://127.0.0.1:{}", port()), format!("http://127.0.0.1:{}", port()));
        let process = Command::new("etcd")
            .args([
                "--name",
                "test",
                "--heartbeat-interval",
                "50",
                "--election-timeout",
                "500",
                "--data-dir",
            ])
            .arg(data.path())
            .args([
                "--listen-client-urls",
                &url,
                "--advertise-client-urls",
                &url,
                "--listen-peer-urls",
                &peers,
            ])
            .args([
                "--initial-advertise-peer-urls",
                &peers,
                "--initial-cluster",
                &format!("test={peers}"),
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { process: Process(process), url, _data: data }
    }

    fn campaign(&self) -> Campaign {
        Campaign::new([self.url.as_str()], "memory").time_to_live(TIME_TO_LIVE)
    }

    /// Wins, as soon as etcd is there.
    async fn win(&self) -> shootdown_grpc::etcd::Ownership {
        let began = Instant::now();
        loop {
            match tokio::time::timeout(LONG, self.campaign().win()).await {
                Ok(Ok(ownership)) => return ownership,
                _ if began.elapsed() < LONG => tokio::time::sleep(Duration::from_millis(50)).await,
                lost => panic!("{lost:?}"),
            }
        }
    }
}

fn an_owner_that_resigns_is_followed_at_once() {
    let etcd = Etcd::begin();
    runtime().block_on(async {
        let first = etcd.win().await;
        let second = etcd.campaign();
        let second = tokio::spawn(async move { second.win().await });
        tokio::time::sleep(TIME_TO_LIVE * 2).await;
        assert!(first.is_held(BootClock.now()) && !second.is_finished(), "there is one");
        let (boot, held) = (first.boot(), first.held());
        let began = Instant::now();
        soon("resigning", first.resign()).await.unwrap();
        assert!(!held.is_held(BootClock.now()));
        let second = soon("the second", second).await.unwrap().unwrap();
        assert!(began.elapsed() < TIME_TO_LIVE, "{:?}", began.elapsed());
        assert!(second.boot() > boot && second.is_held(BootClock.now()));
    });
}

fn an_owner_that_does_not_hear_of_etcd_is_none() {
    let etcd = Etcd::begin();
    runtime().block_on(async {
        let owner = etcd.win().await;
        let held = owner.held();
        let waits = tokio::spawn({
            let held = held.clone();
            async move { held.lost().await }
        });
        tokio::time::sleep(TIME_TO_LIVE * 2).await;
        assert!(held.is_held(BootClock.now()) && !waits.is_finished(), "it is kept");
        let began = Instant::now();
        etcd.process.signal(Signal::STOP);
        soon("the end", waits).await.unwrap();
        assert!(!held.is_held(BootClock.now()));
        assert!(began.elapsed() < TIME_TO_LIVE + TIME_TO_LIVE / 4, "{:?}", began.elapsed());
        // Once lost, lost: also if etcd did not give it to anybody.
        etcd.process.signal(Signal::CONT);
        tokio::time::sleep(TIME_TO_LIVE / 2).await;
        assert!(!held.is_held(BootClock.now()));
    });
}

/// What owners share: a memory that outlives them, and certificates.
struct World {
    folder: tempfile::TempDir,
    etcd: Etcd,
    authority: Authority,
    ports: [u16; 3],
}

impl World {
    fn begin() -> Self {
        let (folder, authority) = (tempfile::tempdir().unwrap(), Authority::default());
        let own = authority.issue("owner.example");
        for (name, text) in
            [("certificate", &own.certificate), ("key", &own.key), ("roots", &own.root)]
        {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        std::fs::write(folder.path().join("memory"), [0; 0x2000]).unwrap();
        Self { folder, etcd: Etcd::begin(), authority, ports: [port(), port(), port()] }
    }

    fn owner(&self, number: usize) -> Process {
        let role =
            format!("{}|{}|{}", self.etcd.url, self.ports[number], self.folder.path().display());
        let process = Command::new(std::env::current_exe().unwrap()).env(ROLE, role).spawn();
        Process(process.unwrap())
    }

    /// A mirror that knows some of the owners.
    fn mirror(&self, identity: &Identity, ports: &[u16]) -> Mirroring {
        let client = ports.iter().fold(Client::builder("memory"), |client, port| {
            client.owner(format!("127.0.0.1:{port}"))
        });
        let client =
            client.server_name("owner.example").backoff(Duration::from_millis(10), TERM / 8);
        Mirroring::with(client.tls(identity.client()))
    }
}

/// The version of a page: what it begins with.
fn version(memory: &File, page: u64) -> u64 {
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, page * 0x1000).unwrap();
    u64::from_le_bytes(bytes)
}

/// The page that each owner changes once, as its first deed.
const ONCE: u64 = 1;
/// The page that an owner changes all the time.
const OFTEN: u64 = 0;

fn shared() -> AddressRange {
    AddressRange::new(BASE, 0x2000).unwrap()
}

/// A process that wants to own the memory, and changes it as long as it does.
async fn own(role: &str) -> ExitCode {
    let [url, port, folder] = role.split('|').collect::<Vec<_>>().try_into().unwrap();
    let folder = PathBuf::from(folder);
    let campaign = Campaign::new([url], "memory").time_to_live(TIME_TO_LIVE);
    let ownership = loop {
        match campaign.win().await {
            Ok(ownership) => break ownership,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let held = ownership.held();
    let owner =
        Owner::new(ownership.boot(), long_terms(), Memory::Survived, BootClock.now()).unwrap();
    let asks = held.clone();
    let hub = Hub::while_held(owner, BootClock, move || asks.is_held(BootClock.now()));
    let space = AddressSpace::new();
    let _mirrors = space.insert(shared(), hub.mirrors()).unwrap();
    let memory =
        Arc::new(File::options().read(true).write(true).open(folder.join("memory")).unwrap());
    let reads = memory.clone();
    let contents = Checked::new(space.clone(), shared(), move |range: AddressRange| {
        let mut bytes = vec![0; range.len_usize().unwrap()];
        reads.read_exact_at(&mut bytes, range.start() - BASE).map_err(Unreadable::new)?;
        Ok(Bytes::from(bytes))
    });
    let mut offered = Space::new(hub.clone(), contents);
    for number in 1..=3 {
        offered = offered.admit(format!("mirror-{number}.example").as_str(), Host(number));
    }
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let tls = ServerTls::from_pem(&read("certificate"), &read("key"), &read("roots")).unwrap();
    let server = Server::builder().tls(tls).space("memory", offered);
    let server = server.bind(("127.0.0.1", port.parse().unwrap())).await.unwrap();
    tokio::spawn(async move { hub.run(tokio::time::sleep).await });
    tokio::spawn(async move { match server.run().await {} });
    for number in [ONCE].into_iter().chain(std::iter::repeat(OFTEN)) {
        let guard = space.invalidate(page(number), Event::Clear).await;
        let next = version(&memory, number) + 1;
        if !held.is_held(BootClock.now()) {
            return ExitCode::from(3);
        }
        memory.write_all_at(&next.to_le_bytes(), number * 0x1000).unwrap();
        drop(guard);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    unreachable!("it changes the memory for ever")
}

/// Reads by a mirror, as fast as it can.
#[derive(Default)]
struct Reads {
    accepted: AtomicU64,
    stale: AtomicU64,
    newest: AtomicU64,
    stop: AtomicBool,
}

async fn read_on(mirror: Arc<Mirroring>, memory: PathBuf, number: u64, reads: Arc<Reads>) {
    let memory = File::open(memory).unwrap();
    let held = mirror.copy(page(number)).await;
    while !reads.stop.load(Ordering::Relaxed) {
        for _ in 0..100 {
            let before = version(&memory, number);
            let sequence = held.copy.sequence();
            let value = held
                .copy
                .lock()
                .as_ref()
                .map(|copy| u64::from_le_bytes(copy[..8].try_into().unwrap()));
            // After the use: a stopped owner or mirror shows here.
            let Some(value) = value.filter(|_| !held.copy.read_retry(sequence)) else { break };
            reads.accepted.fetch_add(1, Ordering::Relaxed);
            reads.stale.fetch_add(u64::from(value < before), Ordering::Relaxed);
            reads.newest.fetch_max(value, Ordering::Relaxed);
        }
        if held.copy.lock().is_none() {
            held.refill(&mirror.leased).await;
        }
        tokio::task::yield_now().await;
    }
}

fn owners_take_over_and_mirrors_are_never_stale() {
    let world = World::begin();
    let first = world.owner(0);
    runtime().block_on(async {
        let memory = world.folder.path().join("memory");
        let truth = File::open(&memory).unwrap();
        let reads = Arc::<Reads>::default();
        let mirrors =
            [1, 2].map(|number| {
                Arc::new(world.mirror(
                    &world.authority.issue(&format!("mirror-{number}.example")),
                    &world.ports,
                ))
            });
        // It never hears of another owner than the first, and holds on until its lease ends.
        let behind =
            Arc::new(world.mirror(&world.authority.issue("mirror-3.example"), &world.ports[..1]));
        let behind_reads = Arc::<Reads>::default();
        let behind_task =
            tokio::spawn(read_on(behind.clone(), memory.clone(), ONCE, behind_reads.clone()));
        let tasks = mirrors
            .clone()
            .map(|mirror| tokio::spawn(read_on(mirror, memory.clone(), OFTEN, reads.clone())));
        goes_on("with the first owner", &truth, &reads, &mirrors).await;
        let second = world.owner(1);
        let third = world.owner(2);
        tokio::time::sleep(TIME_TO_LIVE).await;
        let boot = boot_of(&mirrors[0]);

        // Killed.
        until("it has a copy of its own", || behind_reads.newest.load(Ordering::Relaxed) == 1)
            .await;
        let read_before = behind_reads.accepted.load(Ordering::Relaxed);
        first.signal(Signal::KILL);
        until("a new owner", || boot_of(&mirrors[0]) > boot && boot_of(&mirrors[1]) > boot).await;
        goes_on("with the next owner", &truth, &reads, &mirrors).await;
        assert!(
            behind_reads.accepted.load(Ordering::Relaxed) > read_before,
            "it has read on after the first owner was dead"
        );
        assert!(!behind.leased.has_lease() && behind.leased.counts().joined == 1);

        // Stopped, whichever it is, for longer than its key lives; then it goes on, and finds out.
        let boot = boot_of(&mirrors[0]);
        let mut standing = [second, third];
        let owning = if is_owner(&world, 1).await { 0 } else { 1 };
        standing[owning].signal(Signal::STOP);
        until("a third owner", || boot_of(&mirrors[0]) > boot && boot_of(&mirrors[1]) > boot).await;
        goes_on("with the third owner", &truth, &reads, &mirrors).await;
        standing[owning].signal(Signal::CONT);
        assert_eq!(standing[owning].exit_code(), Some(3), "it owns the memory no more");
        goes_on("with the third owner", &truth, &reads, &mirrors).await;

        reads.stop.store(true, Ordering::Relaxed);
        for task in tasks {
            soon("the readers", task).await.unwrap();
        }
        behind_task.abort();
        for (who, reads) in [("all owners", reads), ("the first owner only", behind_reads)] {
            let (stale, accepted) =
                (reads.stale.load(Ordering::Relaxed), reads.accepted.load(Ordering::Relaxed));
            assert_eq!(stale, 0, "of {accepted} reads by those who know {who}");
        }
    });
}

fn boot_of(mirror: &Mirroring) -> u64 {
    match mirror.leased.standing() {
        Standing::Live(epoch, _) => epoch.boot.0,
        _ => 0,
    }
}

/// Whether the owner of that number listens.
async fn is_owner(world: &World, number: usize) -> bool {
    tokio::net::TcpStream::connect(("127.0.0.1", world.ports[number])).await.is_ok()
}

/// The memory changes, and mirrors see it.
async fn goes_on(what: &str, truth: &File, reads: &Reads, mirrors: &[Arc<Mirroring>; 2]) {
    let (from, accepted) = (version(truth, OFTEN), reads.accepted.load(Ordering::Relaxed));
    until(what, || {
        version(truth, OFTEN) > from + 50 && reads.newest.load(Ordering::Relaxed) > from + 20
    })
    .await;
    until(what, || reads.accepted.load(Ordering::Relaxed) > accepted + 100).await;
    assert!(mirrors.iter().all(|mirror| mirror.leased.counts().invalidated > 0), "{what}");
}
