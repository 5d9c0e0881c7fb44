//! A GPU hangs; a watchdog finds out whose passes are pending, resets it, and everybody goes on.
//!
//! `AddressSpace::active` lists what is under invalidation, for how long, and who is waited for.
//! Here a thread of the program looks at it now and then. When a GPU has not answered for too long,
//! the thread resets it, so that nothing of it can reach the memory, says so with
//! `Subscription::fence`, and registers it anew.
#![allow(missing_docs, clippy::print_stdout)]

use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture,
    Phase, Subscription, Timeline, WouldBlock,
};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::thread;
use std::time::Duration;

/// The device: a thread that carries out one TLB flush after the other, and signals the number of
/// each.
#[derive(Clone)]
struct Hardware {
    flushes: Sender<u64>,
    done: Timeline,
}

impl Hardware {
    /// A device whose flushes take so long, and which hangs at this one.
    fn start(takes: Duration, hangs_at: Option<u64>) -> Self {
        let (flushes, queue) = channel();
        let done = Timeline::new();
        let signals = done.clone();
        thread::spawn(move || {
            for flush in queue {
                if Some(flush) == hangs_at {
                    return;
                }
                thread::sleep(takes);
                signals.signal(flush);
            }
        });
        Self { flushes, done }
    }
}

/// The driver.
struct Gpu {
    name: &'static str,
    page_table: DriverLock<BTreeMap<u64, u64>>,
    hardware: Hardware,
    submitted: AtomicU64,
}

impl Gpu {
    fn new(name: &'static str, hardware: Hardware) -> Self {
        Self { name, page_table: DriverLock::default(), hardware, submitted: AtomicU64::new(0) }
    }
}

impl IntervalNotifier for Gpu {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.page_table.lock_for(invalidation).clear();
        let flush = self.submitted.fetch_add(1, Ordering::Relaxed) + 1;
        let _ = self.hardware.flushes.send(flush); // a device that is gone does not hear it
        Ok(Some(PassFuture::new(self.hardware.done.reached(flush))))
    }

    fn name(&self) -> Cow<'static, str> {
        self.name.into()
    }
}

/// All GPUs that are registered.
type Gpus = Arc<Mutex<Vec<Subscription<Gpu>>>>;

/// Looks once. A GPU that has been waited for for longer than `limit` is reset and replaced.
fn look(space: &AddressSpace, gpus: &Gpus, limit: Duration) {
    // What has been answered and nobody has polled is not pending any more afterwards.
    let _ = pin!(space.drain()).poll(&mut Context::from_waker(Waker::noop()));
    for stuck in space.active().iter().filter(|active| active.age.is_some_and(|age| age >= limit)) {
        let (range, event) = (stuck.range, stuck.event.name());
        if stuck.phase != Phase::Passes {
            println!("{event} of {range}: {:?} for more than {limit:.0?}", stuck.phase);
            continue;
        }
        println!(
            "{event} of {range} has been waiting for {} for more than {limit:.0?}",
            stuck.pending.join(", ")
        );
        let mut gpus = gpus.lock().unwrap();
        for id in &stuck.pending_ids {
            let Some(at) = gpus.iter().position(|gpu| gpu.id() == *id) else { continue };
            let dead = gpus.swap_remove(at);
            // A function-level reset. Only when it is done can nothing of the old state reach the
            // memory any more …
            let hardware = Hardware::start(Duration::from_millis(2), None);
            // … and only then this may be said.
            println!("{} has been reset: {} of its passes were pending", dead.name, dead.fence());
            let (name, range) = (dead.name, dead.range());
            drop(dead.remove().wait());
            gpus.extend(space.insert(range, Gpu::new(name, hardware)));
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let space = AddressSpace::builder().on_report(|report| println!("report: {report}")).build();
    let range = AddressRange::new(0x7f00_0000_0000, 0x20_0000)?;
    let gpus = Gpus::default();
    for (name, hangs_at) in [("gpu0", None), ("gpu1", Some(3)), ("gpu2", None)] {
        let gpu = Gpu::new(name, Hardware::start(Duration::from_millis(2), hangs_at));
        gpus.lock().unwrap().push(space.insert(range, gpu)?);
    }

    let unmaps = {
        let space = space.clone();
        thread::spawn(move || {
            for _ in 0..5 {
                drop(space.invalidate(range, Event::Unmap).wait());
            }
        })
    };
    while !unmaps.is_finished() {
        thread::sleep(Duration::from_millis(20));
        look(&space, &gpus, Duration::from_millis(200));
    }
    unmaps.join().expect("nothing panics");

    let stats = space.stats();
    println!(
        "{} invalidations, {} GPU fenced off, {} registered",
        stats.invalidations,
        stats.fences,
        space.len()
    );
    Ok(())
}
