//! A mirror's process.

use crate::world::{PAGES, page, runtime, version};
use anyhow::Result;
use clap::Args;
use shootdown::{
    DriverLock, IntervalNotifier, Invalidation, PassFuture, Sequence, Subscription, WouldBlock,
};
use shootdown_grpc::{BootClock, Client, ClientTls};
use shootdown_lease::engine::Leased;
use shootdown_lease::{Incarnation, Mirror, MirrorSettings, Rule};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Who the mirror is and what it does.
#[derive(Args)]
pub(crate) struct Mirroring {
    #[arg(long)]
    number: u64,
    #[arg(long)]
    owner: String,
    #[arg(long)]
    folder: PathBuf,
    /// Reads all the time, and checks what it accepts.
    #[arg(long)]
    reads: bool,
    /// Goes on when its lease has ended.
    #[arg(long)]
    lease_off: bool,
}

/// A page, as it was when its version was valid.
#[derive(Default)]
struct Copy(DriverLock<Option<(Sequence, u64)>>);

impl IntervalNotifier for Copy {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        *self.0.lock_for(invalidation) = None;
        Ok(None)
    }
}

async fn refill(copy: &Subscription<Copy>, leased: &Leased) -> Result<()> {
    loop {
        let sequence = copy.read_begin().await;
        let contents = leased.fetch(copy.range()).await?;
        let mut installed = copy.0.lock();
        if !copy.read_retry(sequence) {
            *installed = Some((sequence, u64::from_le_bytes(contents[..8].try_into()?)));
            return Ok(());
        }
    }
}

pub(crate) fn run(mirroring: Mirroring) -> Result<()> {
    let read = |name: String| std::fs::read(mirroring.folder.join(name));
    let number = mirroring.number;
    let certificate =
        (read(format!("mirror-{number}.pem"))?, read(format!("mirror-{number}.key"))?);
    let tls = ClientTls::from_pem(&certificate.0, &certificate.1, &read("roots.pem".to_owned())?)?;
    let life = Incarnation(BootClock.now().as_nanos());
    let mut mirror = Mirror::new(life, MirrorSettings::default(), BootClock.now());
    if mirroring.lease_off {
        mirror.leave_out(Rule::StopsByItself);
    }
    let leased = Leased::new(mirror, BootClock);
    let client =
        Client::builder("memory").tls(tls).owner(&mirroring.owner).server_name("owner.example");
    let client = client.backoff(Duration::from_millis(5), Duration::from_millis(20)).build()?;
    runtime()?.block_on(async {
        let keeps = leased.clone();
        tokio::spawn(async move { keeps.run(tokio::time::sleep).await });
        let _connection = client.connect(leased.clone());
        let copies = (0..PAGES).map(|number| leased.space().insert(page(number), Copy::default()));
        let copies: Arc<[Subscription<Copy>]> = copies.collect::<Result<_, _>>()?;
        for copy in copies.iter() {
            refill(copy, &leased).await?;
        }
        say("ready");
        if !mirroring.reads {
            return keep_up(&copies, &leased).await;
        }
        // Readers are another thread: what they do not wait for, they do not notice.
        let (reads, stale) = <(Arc<AtomicU64>, Arc<AtomicU64>)>::default();
        let (missing, mut misses) = tokio::sync::mpsc::channel(1);
        let memory = File::open(mirroring.folder.join("memory"))?;
        let counts = (reads.clone(), stale.clone());
        let read_by = copies.clone();
        std::thread::spawn(move || read_on(&read_by, &memory, &missing, &counts));
        let tell = async {
            loop {
                tokio::time::sleep(Duration::from_millis(20)).await;
                say(&format!(
                    "reads {} {}",
                    reads.load(Ordering::Relaxed),
                    stale.load(Ordering::Relaxed)
                ));
            }
        };
        let refills = async {
            while let Some((number, filled)) = misses.recv().await {
                let number: usize = number;
                let filled: mpsc::SyncSender<()> = filled;
                refill(&copies[number], &leased).await?;
                let _ = filled.send(());
            }
            Ok(())
        };
        tokio::select! { never = tell => never, refilled = refills => refilled }
    })
}

/// Fetches again what was invalidated.
async fn keep_up(copies: &[Subscription<Copy>], leased: &Leased) -> Result<()> {
    loop {
        for copy in copies {
            if copy.0.lock().is_none() {
                refill(copy, leased).await?;
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Reads the copies as fast as it can, and compares with what the memory had before each read.
fn read_on(
    copies: &[Subscription<Copy>],
    memory: &File,
    missing: &tokio::sync::mpsc::Sender<(usize, mpsc::SyncSender<()>)>,
    counts: &(Arc<AtomicU64>, Arc<AtomicU64>),
) {
    for number in (0..copies.len()).cycle() {
        let copy = &copies[number];
        for _ in 0..64 {
            let Ok(truth) = version(memory, number as u64) else { return };
            let found = *copy.0.lock();
            // After the use (rule 4 of the leases): whoever was stopped in between finds out here.
            let good = found.filter(|(sequence, _)| !copy.read_retry(*sequence));
            let Some((_, value)) = good else {
                let (filled, wait) = mpsc::sync_channel(1);
                if missing.blocking_send((number, filled)).is_err() || wait.recv().is_err() {
                    return;
                }
                continue;
            };
            counts.0.fetch_add(1, Ordering::Relaxed);
            counts.1.fetch_add(u64::from(value < truth), Ordering::Relaxed);
        }
    }
}

fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    // Nobody listens any more: the process is about to be killed.
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}
