//! What `stats` counts, for the space and for each notifier.
#![cfg(not(any(loom, shuttle)))]
#![allow(missing_docs)]

mod support;

use shootdown::{
    AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture, RetryBudget,
    WouldBlock,
};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use support::{Act, Device, Gate, Log, Task, now, pages};

#[test]
fn a_notifier_that_nobody_waited_for_and_nobody_invalidated_has_no_stats() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let quiet = space.insert(pages(10, 1), Device::new("quiet", &log)).unwrap();
    let device = space.insert(pages(0, 1), Device::new("device", &log)).unwrap();
    let began = now(device.read_begin());
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert!(device.read_retry(began));
    assert!(!quiet.read_retry(now(quiet.read_begin())));
    assert_eq!(quiet.stats(), Default::default());
    assert_eq!((device.stats().collisions, device.stats().waits), (1, 0));
    assert_eq!(
        (space.stats().invalidations, space.stats().collisions, space.stats().waits),
        (1, 1, 0)
    );
}

#[test]
fn waits_are_counted_once_a_reader_and_lapses_for_each_notifier_that_was_hit() {
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let device = space
        .insert(pages(0, 1), Device::new("device", &log).then(Act::pass(gate.clone())))
        .unwrap();
    let other = space.insert(pages(0, 2), Device::new("other", &log)).unwrap();
    let mut abandoned = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    abandoned.expect_pending();
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    reader.poll().is_pending();
    assert_eq!((device.stats().waits, space.stats().waits), (1, 1), "however often it was polled");
    gate.open();
    // Nobody polls the invalidation: it lapses.
    reader.finish();
    assert_eq!((device.stats().lapses, other.stats().lapses, space.stats().lapses), (1, 1, 1));
    assert_eq!(other.stats().waits, 0);
    drop(abandoned);
}

struct Driver(DriverLock<()>);

impl IntervalNotifier for Driver {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        drop(self.0.lock_for(invalidation));
        Ok(None)
    }
}

#[test]
fn retries_are_those_of_the_librarys_loop() {
    let space = AddressSpace::new();
    let driver = space.insert(pages(0, 1), Driver(DriverLock::new(()))).unwrap();
    let looks = Cell::new(0);
    let look = |_| {
        looks.set(looks.get() + 1);
        if looks.get() < 4 {
            drop(now(space.invalidate(pages(0, 1), Event::Clear)));
        }
        std::future::ready(Ok::<(), ()>(()))
    };
    now(driver.0.mirror(&driver, RetryBudget::default(), look, |(), ()| ())).unwrap();
    assert_eq!((driver.stats().retries, driver.stats().collisions), (3, 3));
    assert_eq!(
        (space.stats().retries, space.stats().collisions, space.stats().invalidations),
        (3, 3, 3)
    );
}

#[test]
fn the_longest_invalidation_is_that_of_the_space_and_of_each_notifier_that_it_hit() {
    let (time, log) = (Arc::new(AtomicU64::new(0)), Log::default());
    let clock = time.clone();
    let space = AddressSpace::builder()
        .clock(move || Duration::from_micros(clock.load(Ordering::Relaxed)))
        .build();
    assert_eq!(space.stats().longest, None);
    let first = space.insert(pages(0, 2), Device::new("first", &log)).unwrap();
    let second = space.insert(pages(1, 2), Device::new("second", &log)).unwrap();
    let invalidate = |page, lasts| {
        let guard = now(space.invalidate(pages(page, 1), Event::Unmap));
        time.fetch_add(lasts, Ordering::Relaxed);
        drop(guard);
    };
    invalidate(0, 50);
    invalidate(1, 20);
    invalidate(1, 10);
    invalidate(9, 70);
    let micros = |micros| Duration::from_micros(micros);
    assert_eq!(space.stats().longest, Some(micros(70)), "one that hit nobody counts as well");
    assert_eq!((first.stats().longest, second.stats().longest), (micros(50), micros(20)));
}

#[test]
#[cfg(feature = "std")]
fn without_a_clock_those_are_timed_whose_passes_were_pending_or_that_were_listed() {
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let device = space.insert(pages(0, 1), Device::new("device", &log)).unwrap();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(space.stats().longest, None);
    let held = now(space.invalidate(pages(0, 1), Event::Unmap));
    drop(space.active());
    std::thread::sleep(Duration::from_millis(2));
    drop(space.active());
    assert!(
        space.stats().longest >= Some(Duration::from_millis(2)),
        "a watchdog that lists what is active times it"
    );
    drop(held);
    device.next(Act::pass(gate.clone()));
    let mut pending = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    pending.expect_pending();
    std::thread::sleep(Duration::from_millis(5));
    gate.open();
    drop(pending.finish());
    assert!(space.stats().longest >= Some(Duration::from_millis(5)));
    assert!(device.stats().longest >= Duration::from_millis(5));
}
