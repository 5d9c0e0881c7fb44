use crate::support::*;
use shootdown::{
    Collision, DriverLock, Event, IntervalNotifier, Invalidation, MirrorError, PassFuture,
    RetryBudget, WouldBlock,
};
use std::cell::Cell;
use std::time::Duration;

#[test]
fn r1_read_begin_waits_for_a_moment_without_a_covering_invalidation() {
    let (space, device, _log) = one_device();
    let first = now(space.invalidate(pages(0, 1), Event::Clear));
    let second = now(space.invalidate(pages(0, 9), Event::Clear));
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    drop(first);
    reader.expect_pending();
    drop(second);
    assert_eq!(reader.finish().get(), 3);
}

#[test]
fn r1_back_to_back_invalidations_do_not_hold_a_reader_up_for_ever() {
    let (space, device, _log) = one_device();
    let first = now(space.invalidate(pages(0, 1), Event::Clear));
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    drop(first); // the moment
    let _second = now(space.invalidate(pages(0, 1), Event::Clear));
    let sequence = reader.finish();
    assert_eq!(sequence.get(), 3, "the sequence on entry, although it is stale already");
    assert!(device.read_retry(sequence));
}

#[test]
fn r2_read_retry_is_true_exactly_when_the_sequence_has_changed() {
    let (space, device, _log) = one_device();
    let sequence = now(device.read_begin());
    assert!(!device.read_retry(sequence));
    drop(now(space.invalidate(pages(1, 1), Event::Clear)));
    assert!(!device.read_retry(sequence), "it was not hit");
    drop(now(space.invalidate(pages(0, 1), Event::Clear)));
    assert!(device.read_retry(sequence));
    assert!(!device.read_retry(now(device.read_begin())));
}

#[test]
fn r3_an_uncontended_reader_is_answered_at_its_first_poll() {
    let (_space, device, _log) = one_device();
    let mut reader = Task::new(device.read_begin());
    assert!(reader.poll().is_ready() && !reader.is_woken());
}

#[derive(Default)]
struct Mirror {
    pages: DriverLock<Vec<u64>>,
}

impl IntervalNotifier for Mirror {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.pages.lock_for(invalidation).clear();
        Ok(None)
    }
}

#[test]
fn r2_a_driver_lock_installs_nothing_that_is_stale() {
    let space = shootdown::AddressSpace::new();
    let gpu = space.insert(pages(0, 1), Mirror::default()).unwrap();
    let sequence = now(gpu.read_begin());
    assert_eq!(gpu.pages.install(&gpu, sequence, |pages| pages.push(1)), Ok(()));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(gpu.pages.install(&gpu, sequence, |pages| pages.push(2)), Err(Collision));
    assert!(gpu.pages.lock().is_empty());
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "under another lock than its first pass takes")]
fn r2_the_check_under_a_wrong_lock_is_caught() {
    let space = shootdown::AddressSpace::new();
    let gpu = space.insert(pages(0, 1), Mirror::default()).unwrap();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    let wrong = DriverLock::new(());
    let _ = wrong.install(&gpu, gpu.sequence(), |()| ());
}

#[test]
fn r2_a_first_pass_may_take_several_driver_locks_and_readers_any_of_them() {
    #[derive(Default)]
    struct Two([DriverLock<Vec<u64>>; 2]);
    impl IntervalNotifier for Two {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            self.0.iter().for_each(|lock| lock.lock_for(invalidation).clear());
            Ok(None)
        }
    }
    let space = shootdown::AddressSpace::new();
    let two = space.insert(pages(0, 1), Two::default()).unwrap();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    let sequence = now(two.read_begin());
    for lock in &two.0 {
        assert_eq!(lock.install(&two, sequence, |pages| pages.push(1)), Ok(()));
    }
}

#[test]
fn the_retry_loop_starts_over_after_a_collision_and_is_bounded() {
    let space = shootdown::AddressSpace::new();
    let gpu = space.insert(pages(0, 1), Mirror::default()).unwrap();
    let collisions = Cell::new(3);
    let prepare = |_| {
        if collisions.get() > 0 {
            collisions.set(collisions.get() - 1);
            drop(now(space.invalidate(pages(0, 1), Event::Clear)));
        }
        std::future::ready(Ok::<u64, std::fmt::Error>(7))
    };
    let mirror =
        gpu.pages.mirror(&gpu, RetryBudget::retries(3), prepare, |pages, page| pages.push(page));
    assert_eq!(now(mirror), Ok(()));
    assert_eq!(*gpu.pages.lock(), [7]);

    collisions.set(4);
    let mirror =
        gpu.pages.mirror(&gpu, RetryBudget::retries(3), prepare, |pages, page| pages.push(page));
    let error = now(mirror).unwrap_err();
    assert!(matches!(error, MirrorError::RetriesExhausted { retries: 3, .. }));
    assert_eq!(
        error.to_string(),
        "the range was invalidated during each of 4 attempts to mirror it: mirror a smaller range, or allow more retries"
    );
}

#[test]
fn the_retry_loop_is_bounded_in_time_and_lets_a_step_finish() {
    let clock = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let (ours, theirs) = (clock.clone(), clock);
    let time = move || Duration::from_millis(theirs.load(std::sync::atomic::Ordering::SeqCst));
    let space = shootdown::AddressSpace::builder().clock(time).build();
    let gpu = space.insert(pages(0, 1), Mirror::default()).unwrap();
    let attempts = Cell::new(0);
    let prepare = |_| {
        attempts.set(attempts.get() + 1);
        ours.fetch_add(40, std::sync::atomic::Ordering::SeqCst);
        drop(now(space.invalidate(pages(0, 1), Event::Clear)));
        std::future::ready(Ok::<(), std::fmt::Error>(()))
    };
    let budget = RetryBudget { retries: 1000, time: Some(Duration::from_millis(100)) };
    let error = now(gpu.pages.mirror(&gpu, budget, prepare, |_, ()| ())).unwrap_err();
    assert_eq!(attempts.get(), 3, "after 40, 80 and 120 ms");
    let elapsed = Some(Duration::from_millis(120));
    assert_eq!(error, MirrorError::RetriesExhausted { retries: 2, elapsed });
}

#[test]
fn the_retry_loop_passes_a_failed_step_on() {
    let space = shootdown::AddressSpace::new();
    let gpu = space.insert(pages(0, 1), Mirror::default()).unwrap();
    let prepare = |_| std::future::ready(Err::<(), _>("no such page"));
    let error = now(gpu.pages.mirror(&gpu, RetryBudget::default(), prepare, |_, ()| ()));
    assert_eq!(error, Err(MirrorError::Prepare("no such page")));
}

/// An error that is printed as far as it goes, by who walks from source to source.
#[cfg(feature = "std")]
fn printed(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect()
}

#[test]
#[cfg(feature = "std")]
fn an_error_of_the_retry_loop_is_printed_once() {
    #[derive(Debug)]
    struct Pin(std::num::ParseIntError);
    impl std::fmt::Display for Pin {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("the page cannot be pinned")
        }
    }
    impl std::error::Error for Pin {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }
    let error = shootdown::MirrorError::Prepare(Pin("page".parse::<u64>().unwrap_err()));
    let printed = printed(&error);
    assert_eq!(
        printed,
        [
            "the mapping could not be prepared: the page cannot be pinned",
            "invalid digit found in string"
        ]
    );
}

/// Memory that no lock and no atomic protects: only the order of the end and the fast reader.
#[derive(Default)]
struct Plain(std::cell::UnsafeCell<u64>);

// SAFETY: the test writes under a guard, and reads after a `read_begin` that has seen its end.
unsafe impl Sync for Plain {}

impl Plain {
    fn pointer(&self) -> *mut u64 {
        self.0.get()
    }
}

/// ThreadSanitizer (`ci/tsan.sh`) and Miri (`ci/miri.sh`) see a data race where the end publishes
/// nothing; a processor mostly does not show it.
#[test]
fn r1_a_fast_reader_sees_what_was_written_before_the_end_watched_or_not() {
    for (hits, watched) in [(1, false), (2, false), (1, true), (2, true)] {
        let (space, device, log) = one_device();
        let _other = (hits == 2).then(|| space.insert(pages(0, 1), Device::new("other", &log)));
        let (memory, ended) = (Plain::default(), std::sync::atomic::AtomicBool::new(false));
        let guard = now(space.invalidate(pages(0, 1), Event::Unmap)).into_owned();
        let mut waits = Task::new(device.read_begin());
        if watched {
            waits.expect_pending();
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Relaxed: what orders the two threads is the library's business.
                while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                while futures::FutureExt::now_or_never(device.read_begin()).is_none() {
                    std::thread::yield_now();
                }
                // SAFETY: the end has been seen.
                assert_eq!(unsafe { *memory.pointer() }, 1);
            });
            // SAFETY: under the guard, and no reader reads before its end.
            unsafe { *memory.pointer() = 1 };
            drop(guard);
            ended.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
