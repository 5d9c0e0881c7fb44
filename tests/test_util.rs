//! Faults on demand do what they say, and nothing else.
#![cfg(all(feature = "test-util", feature = "std", not(any(loom, shuttle))))]
#![allow(missing_docs)]

mod support;

use shootdown::test_util::Faulty;
use shootdown::{
    AddressSpace, Collision, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture,
    RetryBudget, WouldBlock,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use support::{Task, now, pages};

#[derive(Default)]
struct Gpu(DriverLock<u32>);

impl IntervalNotifier for Gpu {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        *self.0.lock_for(invalidation) += 1;
        Ok(None)
    }
}

fn faulty() -> (AddressSpace, shootdown::Subscription<Faulty<Gpu>>) {
    let space = AddressSpace::new();
    let gpu = space.insert(pages(0, 1), Faulty::new(Gpu::default())).unwrap();
    (space, gpu)
}

#[test]
fn the_nth_check_collides_and_no_other() {
    let (_space, gpu) = faulty();
    let sequence = now(gpu.read_begin());
    gpu.collide_on(3);
    let collided: Vec<bool> =
        (0..6).map(|_| gpu.0.install(&gpu, sequence, |_| ()) == Err(Collision)).collect();
    assert_eq!(collided, [false, false, true, false, false, false]);
    gpu.collide_on(1);
    gpu.collide_on(0);
    assert!(!gpu.read_retry(sequence));
}

#[test]
fn the_retry_loop_survives_a_forced_collision() {
    let (_space, gpu) = faulty();
    gpu.collide_on(1);
    let mut prepared = 0;
    let prepare = |_| {
        prepared += 1;
        std::future::ready(Ok::<_, WouldBlock>(()))
    };
    now(gpu.0.mirror(&gpu, RetryBudget::retries(1), prepare, |_, ()| ())).unwrap();
    assert_eq!(prepared, 2);
}

#[test]
fn a_refusal_waits_for_a_non_blockable_invalidation() {
    let (space, gpu) = faulty();
    gpu.refuse_next();
    drop(now(space.invalidate(pages(0, 1), Event::Clear)));
    assert_eq!(space.try_invalidate(pages(0, 1), Event::Clear).map(drop), Err(WouldBlock));
    assert!(space.try_invalidate(pages(0, 1), Event::Clear).is_ok());
    assert_eq!((*gpu.0.lock(), space.stats().refused_blockable), (2, 0));
}

#[test]
fn a_delayed_pass_holds_the_guard_back_until_the_delay_ends() {
    let (space, gpu) = faulty();
    let delay = gpu.delay_next();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Clear));
    invalidate.expect_pending();
    assert_eq!(*gpu.0.lock(), 1, "the driver's first pass ran");
    delay.end();
    drop(invalidate.finish());
}

/// Returns a pass and forgets to set the sequence.
struct Forgets;

impl IntervalNotifier for Forgets {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        Ok(Some(PassFuture::new(async {})))
    }
}

#[test]
#[cfg(debug_assertions)]
fn a_driver_that_forgets_its_sequence_fails_with_a_fault_and_without() {
    let space = AddressSpace::new();
    let forgets = space.insert(pages(0, 1), Faulty::new(Forgets)).unwrap();
    for delays in [false, true] {
        if delays {
            forgets.delay_next().end();
        }
        let panic = catch_unwind(AssertUnwindSafe(|| {
            drop(now(space.invalidate(pages(0, 1), Event::Clear)));
        }))
        .unwrap_err();
        assert!(panic.downcast::<String>().unwrap().contains("set_seq"));
    }
}

#[test]
fn injected_panics_reach_the_caller_and_name_the_driver() {
    let (space, gpu) = faulty();
    for inject in [Faulty::<Gpu>::panic_next_first_pass, Faulty::<Gpu>::panic_next_pass] {
        inject(&gpu);
        let panic = catch_unwind(AssertUnwindSafe(|| {
            drop(now(space.invalidate(pages(0, 1), Event::Clear)))
        }))
        .unwrap_err();
        assert!(panic.downcast::<String>().unwrap().contains("Gpu"));
        assert!(space.active().is_empty());
    }
}
