//! Measures what must not depend on how much there is, or has been, of everything else.
//!
//! Shared by `tests/costs.rs` and the section "costs" of `cargo bench --bench table`.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each of the two uses a part of it")]

use crate::support::processor::of_thread;
use crate::support::{Gate, Task, now, pages};
use futures::FutureExt;
use shootdown::{
    AddressSpace, Event, IntervalNotifier, Invalidation, InvalidationGuard, PassFuture,
    Subscription, WouldBlock,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub struct Plain;

impl IntervalNotifier for Plain {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(None)
    }
}

/// A device whose passes have a fence each.
#[derive(Default)]
struct Fences(Mutex<Vec<Gate>>);

impl IntervalNotifier for Fences {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let fence = Gate::default();
        self.0.lock().unwrap().push(fence.clone());
        Ok(Some(PassFuture::new(fence)))
    }
}

/// What something took, in processor time of its thread.
#[derive(Clone, Copy)]
pub struct Cost {
    pub took: Duration,
    /// How often the waiting futures were polled.
    pub polls: u64,
}

/// Held guards of `count` ranges that no notifier watches.
pub fn guards(space: &AddressSpace, count: u64) -> Vec<InvalidationGuard<'_>> {
    (0..count).map(|at| now(space.invalidate(pages(1_000_000 + 2 * at, 1), Event::Clear))).collect()
}

/// Inserts and removes a notifier, `times` times.
pub fn insert_and_remove(space: &AddressSpace, times: u64) {
    for _ in 0..times {
        let Ok(subscription) = space.insert(pages(0, 1), Plain) else {
            unreachable!("the space is not released")
        };
        now(subscription.remove());
    }
}

/// Returns the processor time that it takes to remove `count` notifiers under a guard that covers
/// them, beside `others` that are held and cover none of them.
pub fn removals(count: u64, others: u64) -> Duration {
    let space = AddressSpace::new();
    let _others = guards(&space, others);
    let insert = |page| {
        space
            .insert(pages(page, 1), Plain)
            .unwrap_or_else(|_| unreachable!("the space is not released"))
    };
    let subscriptions: Vec<_> = (0..count).map(insert).collect();
    let _covers = now(space.invalidate(pages(0, count), Event::Unmap));
    let began = of_thread();
    for subscription in subscriptions {
        now(subscription.remove());
    }
    of_thread() - began
}

/// Polls `task` as long as it is woken; adds to `polls`, and returns whether it has finished.
fn run<F: Future>(task: &mut Task<F>, polls: &mut u64) -> bool {
    while task.is_woken() {
        *polls += 1;
        if task.poll().is_ready() {
            return true;
        }
    }
    false
}

/// One reader before `n` invalidations whose passes are done and whose futures are alive and not
/// polled.
///
/// The reader's patience with them is a constant: the space has a clock of its own, which advances
/// by a millisecond before each poll. So patience is 20 polls and some, in next to no time, and the
/// rest of what is measured is work.
pub fn one_reader(n: usize) -> Cost {
    let millis = Arc::new(AtomicU64::new(0));
    let shown = millis.clone();
    let space = AddressSpace::builder()
        .clock(move || Duration::from_millis(shown.load(Ordering::Relaxed)))
        .build();
    let device = space.insert(pages(0, 1), Fences::default()).unwrap();
    let mut unpolled: Vec<_> =
        (0..n).map(|_| Box::pin(space.invalidate(pages(0, 1), Event::Unmap))).collect();
    for invalidate in &mut unpolled {
        assert!(invalidate.as_mut().now_or_never().is_none(), "its pass waits for its fence");
    }
    device.0.lock().unwrap().iter().for_each(Gate::open);
    let mut reader = Task::new(device.read_begin());
    let (began, mut polls) = (of_thread(), 0);
    loop {
        assert!(reader.is_woken() && polls < 100_000, "the reader is kept waiting");
        millis.fetch_add(1, Ordering::Relaxed);
        polls += 1;
        if reader.poll().is_ready() {
            break;
        }
    }
    let took = of_thread() - began;
    assert_eq!(space.stats().lapses, n as u64);
    Cost { took, polls }
}

/// One `drain` before `n` abandoned invalidations whose passes finish one after the other.
pub fn drain(n: usize) -> Cost {
    let space = AddressSpace::new();
    let device = space.insert(pages(0, 1), Fences::default()).unwrap();
    for _ in 0..n {
        assert!(
            space.invalidate(pages(0, 1), Event::Unmap).now_or_never().is_none(),
            "its pass waits for its fence"
        );
    }
    let fences = std::mem::take(&mut *device.0.lock().unwrap());
    let mut drain = Task::new(space.drain());
    drain.expect_pending();
    let (began, mut polls, mut finished) = (of_thread(), 0, false);
    for fence in fences {
        assert!(!finished, "it has not waited for all");
        fence.open();
        finished = run(&mut drain, &mut polls);
    }
    assert!(finished, "nothing is left to wait for");
    Cost { took: of_thread() - began, polls }
}

/// `n` readers, each of a notifier and a page of its own, and `n` invalidations of one page each
/// whose passes finish one after the other. All futures are polled as they are woken.
pub fn readers(n: usize) -> Cost {
    let space = AddressSpace::new();
    let insert = |page| space.insert(pages(2 * page as u64, 1), Fences::default()).unwrap();
    let devices: Vec<Subscription<Fences>> = (0..n).map(insert).collect();
    let mut invalidations: Vec<_> = devices
        .iter()
        .map(|device| Task::new(space.invalidate(device.range(), Event::Unmap)))
        .collect();
    invalidations.iter_mut().for_each(Task::expect_pending);
    let mut readers: Vec<_> = devices.iter().map(|device| Task::new(device.read_begin())).collect();
    readers.iter_mut().for_each(Task::expect_pending);
    let (began, mut polls) = (of_thread(), 0);
    for ((device, invalidation), reader) in devices.iter().zip(&mut invalidations).zip(&mut readers)
    {
        for fence in std::mem::take(&mut *device.0.lock().unwrap()) {
            fence.open();
        }
        // The guard is dropped at once.
        drop(invalidation.finish());
        assert!(run(reader, &mut polls), "nothing holds it up any more");
    }
    let took = of_thread() - began;
    assert!(space.active().is_empty());
    Cost { took, polls }
}
