//! The whole engine under a randomised scheduler: `ci/shuttle.sh`. Larger than what loom can
//! explore, every schedule repeatable.
//!
//! `SHUTTLE_ITERATIONS` sets how many schedules of each kind are tried. A failure prints the
//! schedule that `shuttle::replay` takes.
#![cfg(shuttle)]
#![allow(missing_docs, clippy::print_stdout)]

use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture,
    Phase, Subscription, Timeline, WouldBlock,
};
use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::Mutex;
use shuttle::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Context;

const PAGES: u64 = 6;

fn pages(first: u64, count: u64) -> AddressRange {
    AddressRange::new(first * 4096, count * 4096).unwrap()
}

/// What a device may use: a page's generation rises when a guard that covers it is handed out.
type Oracle = Arc<Mutex<[u64; PAGES as usize]>>;

/// One for each command: of another one's at the same device it is told apart by its address.
type Fence = Arc<Timeline>;

/// A device that maps pages; what it has zapped stays in flight until the hardware has completed a
/// command.
struct Device {
    table: Arc<DriverLock<Table>>,
    queue: Arc<Mutex<Vec<Command>>>,
    removed: Arc<std::sync::atomic::AtomicBool>,
}

#[derive(Default)]
struct Table {
    pages: [Option<u64>; PAGES as usize],
    /// Pages that the device may still use, with their generation and the command after which it
    /// does not.
    in_flight: Vec<(u64, u64, Fence)>,
}

struct Command {
    table: Arc<DriverLock<Table>>,
    fence: Fence,
}

impl Command {
    fn complete(self) {
        self.table.lock().in_flight.retain(|(_, _, fence)| !Arc::ptr_eq(fence, &self.fence));
        self.fence.signal(1);
    }
}

impl IntervalNotifier for Device {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        assert!(!self.removed.load(Ordering::SeqCst), "called after remove");
        let range = invalidation.range();
        let fence = Fence::default();
        let mut waits_for = Vec::new();
        {
            let mut table = self.table.lock_for(invalidation);
            // What an earlier invalidation has zapped may still be in flight (O6).
            let earlier = table.in_flight.iter().filter(|(page, ..)| range.contains(page * 4096));
            waits_for.extend(earlier.map(|(.., fence)| fence.clone()));
            let mut zapped = false;
            for page in (0..PAGES).filter(|page| range.contains(page * 4096)) {
                if let Some(generation) = table.pages[page as usize].take() {
                    table.in_flight.push((page, generation, fence.clone()));
                    zapped = true;
                }
            }
            if zapped {
                self.queue
                    .lock()
                    .unwrap()
                    .push(Command { table: self.table.clone(), fence: fence.clone() });
                waits_for.push(fence);
            }
        }
        if waits_for.is_empty() && thread_rng().gen_bool(0.5) {
            return Ok(None);
        }
        let removed = self.removed.clone();
        Ok(Some(PassFuture::new(async move {
            for fence in waits_for {
                fence.reached(1).await;
            }
            assert!(!removed.load(Ordering::SeqCst), "a pass ran after remove");
        })))
    }
}

fn check_guard(oracle: &Oracle, devices: &[Arc<DriverLock<Table>>], range: AddressRange) {
    let in_flight: Vec<(u64, u64)> = devices
        .iter()
        .flat_map(|device| {
            device
                .lock()
                .in_flight
                .iter()
                .map(|(page, generation, _)| (*page, *generation))
                .collect::<Vec<_>>()
        })
        .collect();
    let mut generations = oracle.lock().unwrap();
    for (page, generation) in in_flight {
        let old = generations[page as usize] == generation;
        assert!(
            !(range.contains(page * 4096) && old),
            "a device uses the old mapping of page {page}"
        );
    }
    for page in 0..PAGES {
        if range.contains(page * 4096) {
            generations[page as usize] += 1;
        }
    }
}

async fn mirror(device: &Subscription<Device>, oracle: &Oracle, page: u64) {
    let sequence = device.read_begin().await;
    let generation = oracle.lock().unwrap()[page as usize];
    let oracle = oracle.clone();
    let _ = device.table.install(device, sequence, move |table| {
        // Under the driver lock and checked: no guard that covers the page can have been handed out
        // since.
        assert_eq!(
            oracle.lock().unwrap()[page as usize],
            generation,
            "a stale mapping is installed"
        );
        table.pages[page as usize] = Some(generation);
    });
}

fn scenario() {
    let space = if thread_rng().gen_bool(0.3) {
        AddressSpace::builder().pass_budget(thread_rng().gen_range(0..3)).build()
    } else {
        AddressSpace::new()
    };
    let oracle = Oracle::default();
    let queue = Arc::new(Mutex::new(Vec::<Command>::new()));
    let insert = {
        let (space, queue) = (space.clone(), queue.clone());
        move || {
            let first = thread_rng().gen_range(0..PAGES);
            let range = pages(first, thread_rng().gen_range(1..=PAGES - first));
            let device =
                Device { table: Arc::default(), queue: queue.clone(), removed: Arc::default() };
            Arc::new(space.insert(range, device).unwrap())
        }
    };
    let devices: Vec<_> = (0..2).map(|_| insert()).collect();
    let tables: Vec<_> = devices.iter().map(|device| device.table.clone()).collect();
    let stop = Arc::new(shuttle::sync::atomic::AtomicBool::new(false));
    let hardware = {
        let (queue, stop) = (queue, stop.clone());
        thread::spawn(move || {
            loop {
                let last = stop.load(Ordering::SeqCst);
                let command = {
                    let mut queue = queue.lock().unwrap();
                    let at = if queue.is_empty() {
                        None
                    } else {
                        Some(thread_rng().gen_range(0..queue.len()))
                    };
                    at.map(|at| queue.swap_remove(at))
                };
                match command {
                    Some(command) => command.complete(),
                    None if last => return,
                    None => thread::yield_now(),
                }
            }
        })
    };
    let mut threads = Vec::new();
    for _ in 0..2 {
        let (space, oracle, tables) = (space.clone(), oracle.clone(), tables.clone());
        threads.push(thread::spawn(move || {
            for _ in 0..3 {
                let first = thread_rng().gen_range(0..PAGES);
                let range = pages(first, thread_rng().gen_range(1..=PAGES - first));
                match thread_rng().gen_range(0..5) {
                    0 => {
                        if let Ok(guard) = space.try_invalidate(range, Event::Clear) {
                            check_guard(&oracle, &tables, range);
                            drop(guard);
                        }
                    }
                    1 => {
                        // Abandoned, or forgotten, after a poll.
                        let mut invalidate = Box::pin(space.invalidate(range, Event::Clear));
                        let waker = futures::task::noop_waker();
                        drop(invalidate.as_mut().poll(&mut Context::from_waker(&waker)));
                        if thread_rng().gen_bool(0.3) {
                            std::mem::forget(invalidate);
                        }
                    }
                    _ => {
                        let guard = block_on(space.invalidate(range, Event::Unmap));
                        check_guard(&oracle, &tables, range);
                        drop(guard);
                    }
                }
            }
        }));
    }
    for device in &devices {
        let (device, oracle) = (device.clone(), oracle.clone());
        threads.push(thread::spawn(move || {
            for _ in 0..3 {
                let range = device.range();
                let first = range.start() / 4096;
                let page = thread_rng().gen_range(first..=range.last() / 4096);
                block_on(mirror(&device, &oracle, page));
            }
        }));
    }
    let late = insert();
    let removed = late.removed.clone();
    block_on(mirror(&late, &oracle, late.range().start() / 4096));
    drop(block_on(Arc::try_unwrap(late).ok().unwrap().remove()));
    removed.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().unwrap();
    }
    block_on(space.drain());
    stop.store(true, Ordering::SeqCst);
    hardware.join().unwrap();
    // Whatever was forgotten lapses as soon as somebody needs the range; where nobody does, it
    // stays.
    for device in &devices {
        block_on(device.read_begin());
    }
    for active in space.active() {
        assert_eq!(active.phase, Phase::Unclaimed, "{space:?}");
        assert!(devices.iter().all(|device| !device.range().overlaps(active.range)), "{space:?}");
    }
}

fn iterations() -> usize {
    std::env::var("SHUTTLE_ITERATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(20_000)
}

#[test]
fn random_schedules() {
    let executions = Arc::new(AtomicUsize::new(0));
    let count = executions.clone();
    shuttle::check_random(
        move || {
            count.fetch_add(1, Ordering::Relaxed);
            scenario();
        },
        iterations(),
    );
    println!("random: {} executions", executions.load(Ordering::Relaxed));
}

#[test]
fn schedules_with_few_preemptions() {
    let executions = Arc::new(AtomicUsize::new(0));
    let count = executions.clone();
    shuttle::check_pct(
        move || {
            count.fetch_add(1, Ordering::Relaxed);
            scenario();
        },
        iterations(),
        3,
    );
    println!("pct: {} executions", executions.load(Ordering::Relaxed));
}
