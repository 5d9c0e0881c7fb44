//! The soak itself.
#![allow(unreachable_pub)]

use futures::FutureExt;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture,
    RetryBudget, Subscription, WouldBlock,
};
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(crate) const PAGE: u64 = 4096;
const PAGES: u64 = 64;

/// The counts of the last line.
#[derive(Default)]
pub(crate) struct Counts {
    operations: AtomicU64,
    invalidations: AtomicU64,
    would_block: AtomicU64,
    cancellations: AtomicU64,
    panics_survived: AtomicU64,
    inserts: AtomicU64,
    removes: AtomicU64,
    mirrored: AtomicU64,
    collisions_given_up: AtomicU64,
    accesses: AtomicU64,
    stale_uses: AtomicU64,
    calls_after_remove: AtomicU64,
    /// Through the registration cache, and refused by its device.
    pub(crate) transfers: AtomicU64,
    pub(crate) registrations_refused: AtomicU64,
    /// Notifiers that exist.
    alive: AtomicI64,
}

#[derive(Serialize)]
struct Report {
    seconds: f64,
    seed: u64,
    threads: usize,
    operations: u64,
    invalidations: u64,
    would_block: u64,
    cancellations: u64,
    panics_survived: u64,
    inserts: u64,
    removes: u64,
    mirrored: u64,
    collisions_given_up: u64,
    transfers: u64,
    registrations_refused: u64,
    registrations_left: i64,
    lapses: u64,
    accesses: u64,
    stale_uses: u64,
    calls_after_remove: u64,
    leaked_notifiers: i64,
    lost_wakeups: u64,
}

/// A page's generation rises when the guard of an invalidation that covers it is handed out, or
/// when one was lost with a panic.
pub(crate) struct Oracle {
    generations: Vec<AtomicU64>,
    pub(crate) counts: Counts,
}

impl Oracle {
    fn handed_out(&self, range: AddressRange) {
        for page in range.start() / PAGE..=range.last() / PAGE {
            self.generations[page as usize].fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn generation(&self, page: u64) -> u64 {
        self.generations[page as usize].load(Ordering::SeqCst)
    }

    /// A device uses a page through a mapping of `generation`; `still` says afterwards whether it
    /// was allowed to all the while.
    pub(crate) fn access(&self, page: u64, generation: u64) {
        self.counts.accesses.fetch_add(1, Ordering::Relaxed);
        if self.generation(page) != generation {
            self.counts.stale_uses.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What the driver lock protects: the page table, and what is zapped but may still be used by the
/// device.
#[derive(Default)]
struct Table {
    mapped: BTreeMap<u64, u64>,
    /// Page, its generation, and the command that was submitted when it was zapped.
    in_flight: Vec<(u64, u64, u64)>,
    /// Commands that were submitted.
    commands: u64,
    /// The device was stopped: it uses nothing and gets no new mapping.
    stopped: bool,
}

struct Device {
    table: Arc<DriverLock<Table>>,
    oracle: Arc<Oracle>,
    random: Mutex<StdRng>,
    removed: Arc<AtomicBool>,
}

impl Drop for Device {
    fn drop(&mut self) {
        self.oracle.counts.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl IntervalNotifier for Device {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        if self.removed.load(Ordering::SeqCst) {
            self.oracle.counts.calls_after_remove.fetch_add(1, Ordering::SeqCst);
        }
        let mut random = StdRng::seed_from_u64(self.random.lock().unwrap().random());
        if !invalidation.blockable() && random.random_bool(0.1) {
            return Err(WouldBlock);
        }
        let pages = invalidation.range().start() / PAGE..=invalidation.range().last() / PAGE;
        let command = {
            let mut table = self.table.lock_for(invalidation);
            let zapped: Vec<(u64, u64)> = table
                .mapped
                .range(pages.clone())
                .map(|(page, generation)| (*page, *generation))
                .collect();
            table.commands += 1;
            let command = table.commands;
            for (page, generation) in zapped {
                table.mapped.remove(&page);
                table.in_flight.push((page, generation, command));
            }
            // Also for what an earlier call has zapped (O6).
            table.in_flight.iter().any(|(page, ..)| pages.contains(page)).then_some(command)
        };
        if random.random_bool(0.01) {
            complete(&self.table, &pages, command.unwrap_or(0));
            panic!("soak: a first pass fails");
        }
        let Some(command) = command else { return Ok(None) };
        let (stalls, fails, kind) =
            (random.random_bool(0.02), random.random_bool(0.01), random.random_range(0..4));
        let (table, oracle, removed) =
            (self.table.clone(), self.oracle.clone(), self.removed.clone());
        Ok(Some(PassFuture::new(async move {
            match kind {
                0 => {}
                1 => tokio::task::yield_now().await,
                2 => {
                    tokio::time::sleep(Duration::from_micros(if stalls { 20_000 } else { 200 }))
                        .await
                }
                _ => {
                    for _ in 0..8 {
                        tokio::task::yield_now().await;
                    }
                }
            }
            // Transfers under way used the old mappings until this moment.
            for (page, generation, _) in &table.lock().in_flight {
                oracle.access(*page, *generation);
            }
            if removed.load(Ordering::SeqCst) {
                oracle.counts.calls_after_remove.fetch_add(1, Ordering::SeqCst);
            }
            complete(&table, &pages, command);
            assert!(!fails, "soak: a pass fails");
        })))
    }
}

/// The device has completed a command: it uses nothing of those pages any more that was zapped
/// before the command.
fn complete(table: &DriverLock<Table>, pages: &std::ops::RangeInclusive<u64>, command: u64) {
    table.lock().in_flight.retain(|(page, _, of)| !pages.contains(page) || *of > command);
}

pub(crate) struct Soak {
    space: AddressSpace,
    #[cfg(feature = "cache")]
    pub(crate) cache: shootdown::cache::RegistrationCache<crate::cache::Nic>,
    pub(crate) oracle: Arc<Oracle>,
    devices: Mutex<Vec<Arc<Subscription<Device>>>>,
    /// `None` on one thread, where the number of operations ends it, so that a run can be repeated.
    until: Option<Instant>,
    most: u64,
}

impl Soak {
    pub(crate) fn range(random: &mut StdRng) -> AddressRange {
        let first = random.random_range(0..PAGES);
        let count = random.random_range(1..=(PAGES - first).min(12));
        AddressRange::new(first * PAGE, count * PAGE).unwrap()
    }

    fn event(random: &mut StdRng) -> Event {
        let owner = None;
        let events = [
            Event::Unmap,
            Event::Clear,
            Event::ProtectionVma,
            Event::ProtectionPage,
            Event::SoftDirty,
            Event::Migrate { owner },
            Event::Exclusive { owner },
        ];
        events[random.random_range(0..events.len())]
    }

    fn insert(&self, random: &mut StdRng) {
        let device = Device {
            table: Arc::default(),
            oracle: self.oracle.clone(),
            random: Mutex::new(StdRng::seed_from_u64(random.random())),
            removed: Arc::default(),
        };
        self.oracle.counts.alive.fetch_add(1, Ordering::SeqCst);
        self.oracle.counts.inserts.fetch_add(1, Ordering::Relaxed);
        let subscription = self.space.insert(Self::range(random), device).unwrap();
        self.devices.lock().unwrap().push(Arc::new(subscription));
    }

    fn device(&self, random: &mut StdRng) -> Option<Arc<Subscription<Device>>> {
        let devices = self.devices.lock().unwrap();
        (!devices.is_empty()).then(|| devices[random.random_range(0..devices.len())].clone())
    }

    async fn invalidate(&self, random: &mut StdRng) {
        let counts = &self.oracle.counts;
        let (range, event) = (Self::range(random), Self::event(random));
        counts.invalidations.fetch_add(1, Ordering::Relaxed);
        match random.random_range(0..10) {
            0 | 1 => {
                // A driver's panic comes out here; the range was completed and ended before.
                match std::panic::catch_unwind(AssertUnwindSafe(|| {
                    self.space.try_invalidate(range, event)
                })) {
                    Ok(Ok(guard)) => {
                        self.oracle.handed_out(range);
                        drop(guard);
                    }
                    Ok(Err(WouldBlock)) => drop(counts.would_block.fetch_add(1, Ordering::Relaxed)),
                    Err(_) => drop(counts.panics_survived.fetch_add(1, Ordering::Relaxed)),
                }
            }
            2 => {
                let mut invalidate =
                    Box::pin(AssertUnwindSafe(self.space.invalidate(range, event)).catch_unwind());
                let polls = random.random_range(1..4);
                for _ in 0..polls {
                    if futures::future::poll_immediate(&mut invalidate).await.is_some() {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
                counts.cancellations.fetch_add(1, Ordering::Relaxed);
                if random.random_bool(0.2) {
                    std::mem::forget(invalidate);
                }
            }
            3 => {
                // Alive, and not polled while this task reads.
                let mut invalidate =
                    AssertUnwindSafe(self.space.invalidate(range, event)).catch_unwind();
                let first = futures::future::poll_immediate(&mut invalidate).await;
                if let Some(outcome) = first {
                    drop(
                        outcome.map_err(|_| counts.panics_survived.fetch_add(1, Ordering::Relaxed)),
                    );
                    return;
                }
                if let Some(device) = self.device(random) {
                    device.read_begin().await;
                }
                match invalidate.await {
                    Ok(guard) => {
                        self.oracle.handed_out(range);
                        drop(guard);
                    }
                    Err(_) => drop(counts.panics_survived.fetch_add(1, Ordering::Relaxed)),
                }
            }
            _ => match AssertUnwindSafe(self.space.invalidate(range, event)).catch_unwind().await {
                Ok(guard) => {
                    self.oracle.handed_out(range);
                    if random.random_bool(0.3) {
                        tokio::task::yield_now().await;
                    }
                    drop(guard);
                }
                Err(_) => drop(counts.panics_survived.fetch_add(1, Ordering::Relaxed)),
            },
        }
    }

    async fn mirror(&self, random: &mut StdRng) {
        let counts = &self.oracle.counts;
        let Some(device) = self.device(random) else { return };
        let page =
            random.random_range(device.range().start() / PAGE..=device.range().last() / PAGE);
        let oracle = &self.oracle;
        let pause = random.random_bool(0.5);
        let look = |_| async move {
            let generation = oracle.generation(page);
            if pause {
                tokio::task::yield_now().await;
            }
            Ok::<u64, std::convert::Infallible>(generation)
        };
        let budget = RetryBudget::retries(20);
        let mirrored = device.table.mirror(&device, budget, look, |table, generation| {
            // Checked and under the driver lock: the device may use this until the next first pass
            // has zapped it.
            if !table.stopped {
                oracle.access(page, generation);
                table.mapped.insert(page, generation);
            }
        });
        match mirrored.await {
            Ok(()) => counts.mirrored.fetch_add(1, Ordering::Relaxed),
            Err(_) => counts.collisions_given_up.fetch_add(1, Ordering::Relaxed),
        };
    }

    async fn remove(&self, random: &mut StdRng) {
        let device = {
            let mut devices = self.devices.lock().unwrap();
            if devices.len() < 8 {
                return;
            }
            let at = random.random_range(0..devices.len());
            devices.swap_remove(at)
        };
        self.oracle.counts.removes.fetch_add(1, Ordering::Relaxed);
        {
            let mut table = device.table.lock();
            table.stopped = true;
            table.mapped.clear();
            table.in_flight.clear();
        }
        if random.random_bool(0.2) {
            // Dropped without waiting, once its last reader has let go.
            return;
        }
        let (closed, removed) = (device.close(), device.removed.clone());
        closed.await;
        removed.store(true, Ordering::SeqCst);
    }

    async fn task(self: Arc<Self>, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        while self.until.is_none_or(|until| Instant::now() < until)
            && self.oracle.counts.operations.load(Ordering::Relaxed) < self.most
        {
            self.oracle.counts.operations.fetch_add(1, Ordering::Relaxed);
            match random.random_range(0..20) {
                0 => self.insert(&mut random),
                1 => self.remove(&mut random).await,
                #[cfg(feature = "cache")]
                2..=5 => self.transfer(&mut random).await,
                2..=11 => self.mirror(&mut random).await,
                _ => self.invalidate(&mut random).await,
            }
            if random.random_bool(0.1) {
                tokio::task::yield_now().await;
            }
        }
    }
}

fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

pub fn soak() {
    let seconds: f64 = setting("SOAK_SECONDS", 4.0);
    let threads: usize = setting("SOAK_THREADS", 4);
    let clock =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos()
            as u64;
    let seed: u64 = setting("SOAK_SEED", clock);
    println!(
        "seed {seed}: SOAK_SEED={seed} SOAK_THREADS=1 runs its operations on one thread, the same way each time"
    );
    // The panics of the drivers are part of the plan.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let planned = panic
            .payload()
            .downcast_ref::<&str>()
            .is_some_and(|message| message.starts_with("soak:"));
        if !planned {
            hook(panic);
        }
    }));
    let tokio = if threads == 1 {
        // Time that does not pass by itself: timers fire in their order as soon as nothing else can
        // be done.
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
    } else {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_time()
            .build()
            .unwrap()
    };
    let began = Instant::now();
    let oracle = Arc::new(Oracle {
        generations: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
        counts: Counts::default(),
    });
    let space = AddressSpace::new();
    let soak = Arc::new(Soak {
        #[cfg(feature = "cache")]
        cache: crate::cache::cache(&space, &oracle, seed),
        space,
        oracle: oracle.clone(),
        devices: Mutex::default(),
        until: (threads > 1).then(|| began + Duration::from_secs_f64(seconds)),
        most: setting(
            "SOAK_OPERATIONS",
            if threads > 1 { u64::MAX } else { (seconds * 20_000.0) as u64 },
        ),
    });
    let (lost_wakeups, registrations_left) = tokio.block_on(async {
        let mut random = StdRng::seed_from_u64(seed);
        (0..16).for_each(|_| soak.insert(&mut random));
        let tasks: Vec<_> =
            (0..24).map(|_| tokio::spawn(soak.clone().task(random.random()))).collect();
        // Whoever still waits half a minute after the end waits for something that has happened.
        let mut lost = 0;
        let limit = tokio::time::Instant::now() + Duration::from_secs_f64(seconds + 30.0);
        for task in tasks {
            match tokio::time::timeout_at(limit, task).await {
                Ok(finished) => finished.unwrap(),
                Err(_) => lost += 1,
            }
        }
        lost += u64::from(
            tokio::time::timeout(Duration::from_secs(30), soak.space.drain()).await.is_err(),
        );
        // What was leaked lapses when somebody needs the range.
        let devices = std::mem::take(&mut *soak.devices.lock().unwrap());
        for device in devices {
            lost += u64::from(
                tokio::time::timeout(Duration::from_secs(30), device.read_begin()).await.is_err(),
            );
        }
        #[cfg(feature = "cache")]
        let registrations_left = soak.registrations_left().await;
        #[cfg(not(feature = "cache"))]
        let registrations_left = 0;
        let everything = tokio::time::timeout(Duration::from_secs(30), soak.space.release()).await;
        (lost + u64::from(everything.is_err()), registrations_left)
    });
    // Leaked invalidations that no reader needed still hold what they hit.
    let lapses = {
        let log = soak.space.insert(AddressRange::ALL, Nothing);
        assert!(log.is_err(), "the space was released");
        soak.space.stats().lapses
    };
    let active = soak.space.active();
    assert!(active.iter().all(|active| active.phase == shootdown::Phase::Unclaimed), "{active:#?}");
    drop(soak);
    let counts = &oracle.counts;
    let get = |count: &AtomicU64| count.load(Ordering::SeqCst);
    let report = Report {
        seconds: began.elapsed().as_secs_f64(),
        seed,
        threads,
        operations: get(&counts.operations),
        invalidations: get(&counts.invalidations),
        would_block: get(&counts.would_block),
        cancellations: get(&counts.cancellations),
        panics_survived: get(&counts.panics_survived),
        inserts: get(&counts.inserts),
        removes: get(&counts.removes),
        mirrored: get(&counts.mirrored),
        collisions_given_up: get(&counts.collisions_given_up),
        transfers: get(&counts.transfers),
        registrations_refused: get(&counts.registrations_refused),
        registrations_left,
        lapses,
        accesses: get(&counts.accesses),
        stale_uses: get(&counts.stale_uses),
        calls_after_remove: get(&counts.calls_after_remove),
        leaked_notifiers: counts.alive.load(Ordering::SeqCst),
        lost_wakeups,
    };
    println!("{}", serde_json::to_string(&report).unwrap());
    assert_eq!(
        (
            report.stale_uses,
            report.calls_after_remove,
            report.lost_wakeups,
            report.leaked_notifiers
        ),
        (0, 0, 0, 0)
    );
    assert_eq!(report.registrations_left, 0);
    assert!(cfg!(not(feature = "cache")) || report.transfers > 100);
    assert!(
        report.invalidations > 100
            && report.mirrored > 100
            && report.accesses > 100
            && report.cancellations > 0
    );
    assert!(report.panics_survived > 0 || report.operations < 5_000, "the plan has panics in it");
}

struct Nothing;

impl IntervalNotifier for Nothing {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        Ok(None)
    }
}
