//! An owner and mirrors in one process, over real sockets.
#![allow(dead_code, reason = "each test uses a part of it")]

pub(crate) mod certificates;
pub(crate) mod raw;
pub(crate) mod relay;

use bytes::Bytes;
use certificates::{Authority, Identity};
use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, Subscription,
    WouldBlock,
};
use shootdown_grpc::{
    BootClock, Checked, Client, ClientBuilder, Connection, Limits, Server, ServerBuilder,
    ServerTls, Space, Tally, Unreadable,
};
use shootdown_lease::engine::{Hub, Leased, Mirrors};
use shootdown_lease::{Boot, Host, Incarnation, Memory, Mirror, MirrorSettings, Owner, Terms};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// The memory that is shared, in bytes.
pub(crate) const SHARED: u64 = 4 << 20;
pub(crate) const TERM: Duration = Duration::from_millis(400);
/// A scheduler that is late is no failure.
pub(crate) const LONG: Duration = Duration::from_secs(20);

pub(crate) fn terms() -> Terms {
    Terms::new(TERM)
}

pub(crate) fn shared() -> AddressRange {
    AddressRange::new(BASE, SHARED).unwrap()
}

pub(crate) const BASE: u64 = 0x1000_0000;

/// The page of that number.
pub(crate) fn page(number: u64) -> AddressRange {
    AddressRange::new(BASE + number * 0x1000, 0x1000).unwrap()
}

/// An owner of some memory, with a server.
pub(crate) struct Owned {
    pub(crate) space: AddressSpace,
    pub(crate) mirrors: Subscription<Mirrors>,
    pub(crate) memory: Arc<Mutex<Vec<u8>>>,
    pub(crate) hub: Hub,
    pub(crate) tally: Tally,
    /// Whether it owns the memory.
    pub(crate) held: Arc<AtomicBool>,
    pub(crate) address: SocketAddr,
    builder: Box<dyn Fn() -> ServerBuilder + Send>,
    tasks: Vec<JoinHandle<()>>,
}

/// How an owner lets mirrors in.
pub(crate) enum Way {
    Tls(ServerTls),
    Plaintext,
}

impl Owned {
    /// Whose certificate and mirrors are of that authority. `mirror-1` … `mirror-8` may join.
    pub(crate) async fn begin(authority: &Authority) -> Self {
        let tls = authority.server("owner.example");
        Self::with(Way::Tls(tls), Limits::default(), terms(), "127.0.0.1:0").await
    }

    pub(crate) async fn with(way: Way, limits: Limits, terms: Terms, at: &str) -> Self {
        let owner = Owner::new(Boot(1), terms, Memory::New, BootClock.now()).unwrap();
        let held = Arc::new(AtomicBool::new(true));
        let asks = held.clone();
        let hub = Hub::while_held(owner, BootClock, move || asks.load(Ordering::Relaxed));
        let space = AddressSpace::new();
        let mirrors = space.insert(shared(), hub.mirrors()).unwrap();
        let memory = Arc::new(Mutex::new(vec![0; SHARED as usize]));
        let read = memory.clone();
        let contents = Checked::new(space.clone(), shared(), move |range: AddressRange| {
            let start = (range.start() - BASE) as usize;
            let bytes = read.lock().unwrap()[start..start + range.len_usize().unwrap()].to_vec();
            Ok::<_, Unreadable>(Bytes::from(bytes))
        });
        let mut offered = Space::new(hub.clone(), contents);
        for number in 1..=8 {
            offered = offered.admit(format!("mirror-{number}.example").as_str(), Host(number));
        }
        let builder = move || {
            let server = Server::builder().limits(limits.clone()).space("memory", offered.clone());
            match &way {
                Way::Tls(tls) => server.tls(tls.clone()),
                Way::Plaintext => server.insecure_plaintext(),
            }
        };
        let server = builder().bind(at).await.unwrap();
        let (tally, address) = (server.tally(), server.local_addr());
        let keeps = hub.clone();
        let tasks = vec![
            tokio::spawn(async move { keeps.run(tokio::time::sleep).await }),
            tokio::spawn(async move { match server.run().await {} }),
        ];
        let builder = Box::new(builder);
        Self { space, mirrors, memory, hub, tally, held, address, builder, tasks }
    }

    /// Changes a page as an owner has to. Returns how long the mirrors took to let go.
    pub(crate) async fn change(&self, range: AddressRange, value: u8) -> Duration {
        let began = Instant::now();
        let guard = self.space.invalidate(range, Event::Clear).await;
        let took = began.elapsed();
        let start = (range.start() - BASE) as usize;
        self.memory.lock().unwrap()[start..start + range.len_usize().unwrap()].fill(value);
        drop(guard);
        took
    }

    /// Cuts all connections and stops listening. The hub goes on.
    pub(crate) async fn close(&mut self) {
        if let Some(server) = self.tasks.pop() {
            server.abort();
            let _ = server.await;
        }
    }

    /// Listens again where it has listened.
    pub(crate) async fn open(&mut self) {
        let server = (self.builder)().bind(self.address).await.unwrap();
        self.tally = server.tally();
        self.tasks.push(tokio::spawn(async move { match server.run().await {} }));
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// A copy of memory, as a device of the mirror.
#[derive(Default)]
pub(crate) struct Copy(Mutex<Option<Vec<u8>>>);

impl IntervalNotifier for Copy {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let mut copy = self.0.lock().unwrap();
        invalidation.set_seq();
        *copy = None;
        Ok(None)
    }
}

impl Copy {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.0.lock().unwrap()
    }
}

/// A mirror, with its link.
pub(crate) struct Mirroring {
    pub(crate) leased: Leased,
    pub(crate) connection: Connection,
    run: JoinHandle<()>,
}

pub(crate) fn client(address: impl ToString) -> ClientBuilder {
    let backoff = (Duration::from_millis(10), TERM / 8);
    Client::builder("memory")
        .owner(address.to_string())
        .server_name("owner.example")
        .backoff(backoff.0, backoff.1)
}

impl Mirroring {
    pub(crate) fn begin(address: impl ToString, identity: &Identity) -> Self {
        Self::with(client(address).tls(identity.client()))
    }

    pub(crate) fn with(client: ClientBuilder) -> Self {
        let mirror =
            Mirror::new(Incarnation(fastrand::u64(..)), MirrorSettings::default(), BootClock.now());
        let leased = Leased::new(mirror, BootClock);
        let keeps = leased.clone();
        let run = tokio::spawn(async move { keeps.run(tokio::time::sleep).await });
        let connection = client.build().unwrap().connect(leased.clone());
        Self { leased, connection, run }
    }

    /// Fetches a range and keeps it until it is invalidated.
    pub(crate) async fn copy(&self, range: AddressRange) -> Held {
        let copy = self.leased.space().insert(range, Copy::default()).unwrap();
        let held = Held { copy };
        held.refill(&self.leased).await;
        held
    }

    /// Leaves, and waits until the owner knows.
    pub(crate) async fn leave(mut self) {
        self.leased.leave().await;
        self.connection.ended().await;
    }
}

impl Drop for Mirroring {
    fn drop(&mut self) {
        self.run.abort();
    }
}

/// A range that a mirror has a copy of.
pub(crate) struct Held {
    pub(crate) copy: Subscription<Copy>,
}

impl Held {
    /// Installs what the owner has now.
    pub(crate) async fn refill(&self, leased: &Leased) {
        loop {
            let sequence = self.copy.read_begin().await;
            let contents = leased.fetch(self.copy.range()).await.unwrap();
            let mut copy = self.copy.lock();
            if !self.copy.read_retry(sequence) {
                *copy = Some(contents);
                return;
            }
        }
    }

    /// What a reader accepts: the first byte, if it was good until after it was read.
    pub(crate) async fn read(&self) -> Option<u8> {
        let sequence = self.copy.read_begin().await;
        let value = self.copy.lock().as_ref().map(|copy| copy[0]);
        if self.copy.read_retry(sequence) { None } else { value }
    }
}

/// Waits for something to become true.
pub(crate) async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < LONG, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Waits for something that must come.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LONG, future).await {
        Ok(result) => result,
        Err(_) => panic!("not in time: {what}"),
    }
}

/// Changes memory again and again while something else goes on, and tells the longest wait.
pub(crate) struct Changing {
    task: JoinHandle<Duration>,
    stop: Arc<AtomicBool>,
}

impl Changing {
    /// Of a space whose mirrors are all healthy.
    pub(crate) fn begin(space: &AddressSpace) -> Self {
        let (space, stop) = (space.clone(), Arc::<AtomicBool>::default());
        let stops = stop.clone();
        let task = tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            while !stops.load(Ordering::Relaxed) {
                let began = Instant::now();
                drop(space.invalidate(page(1), Event::Clear).await);
                longest = longest.max(began.elapsed());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            longest
        });
        Self { task, stop }
    }

    /// The longest wait.
    pub(crate) async fn end(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        soon("the changes", self.task).await.unwrap()
    }
}
