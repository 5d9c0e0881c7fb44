//! Tests of internal state: the queues, and a forked process.

use super::core::{Begun, Found};
use super::task::Task;
use super::watch::Watched;
use super::*;
use crate::event::Event;
use crate::foreign::Losses;
use ::core::cell::Cell;
use ::core::future::{pending, poll_fn};
use ::core::pin::pin;
use ::core::task::{Context, Poll};
use futures::FutureExt;
use futures::executor::block_on;
use futures::task::{ArcWake, waker};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::vec::Vec;

#[derive(Default)]
struct Null {
    deregistered: Arc<AtomicUsize>,
}

impl Device for Null {
    type Handle = ();
    type Error = ::core::convert::Infallible;

    async fn register(&self, _: AddressRange) -> Result<(), Self::Error> {
        Ok(())
    }

    async fn deregister(
        &self,
        _: AddressRange,
        (): (),
    ) -> Result<(), StillRegistered<(), Self::Error>> {
        self.deregistered.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

fn page(page: u64) -> AddressRange {
    AddressRange::new(page * 4096, 4096).unwrap()
}

#[test]
fn what_invalidations_end_does_not_stay_queued() {
    let space = AddressSpace::new();
    for limit in [usize::MAX, 10] {
        let cache = RegistrationCache::<Null>::builder()
            .max_registrations(limit)
            .build(&space, Null::default());
        for at in 0..1000 {
            drop(block_on(cache.get(page(at))).unwrap());
            drop(block_on(space.invalidate(page(at), Event::Unmap)));
        }
        let queued = cache.core.queued();
        assert!(queued <= 1, "{queued} are queued, none is live");
        assert!(cache.core.write(|table| table.is_empty()));
        assert_eq!(space.len(), 0);
    }
}

#[test]
fn what_was_in_use_when_a_limit_looked_does_not_stay_queued() {
    let space = AddressSpace::new();
    let cache =
        RegistrationCache::<Null>::builder().max_registrations(1).build(&space, Null::default());
    for at in 0..1000 {
        // Over the limit, and both are in use.
        let held = [at, at + 1].map(|at| block_on(cache.get(page(at))).unwrap());
        drop(held);
        drop(block_on(space.invalidate(page(at), Event::Unmap)));
        drop(block_on(space.invalidate(page(at + 1), Event::Unmap)));
    }
    let queued = cache.core.queued();
    assert!(queued <= 1, "{queued} are queued, none is live");
    assert!(cache.core.write(|table| table.is_empty()));
}

#[test]
fn registrations_of_one_start_leave_the_table_in_any_order() {
    use super::table::{Found, Table};
    use crate::sync::AtomicU64;
    struct Used(AtomicU64);
    impl Found for Used {
        fn used(&self) -> &AtomicU64 {
            &self.0
        }
    }
    let mut table = Table::<(), Used>::new(true, true, false);
    let keys: Vec<_> = (0..1000).map(|_| table.begin(page(1), Arc::new(()))).collect();
    // 7, 11 and 1000 have no common factor.
    for at in 0..500 {
        let live = Arc::new(Used(AtomicU64::new(at as u64)));
        assert!(table.publish(keys[at * 7 % 1000], live).is_ok());
    }
    for at in 0..1000 {
        drop(table.forget(keys[at * 11 % 1000]));
    }
    assert!(table.is_empty());
}

#[test]
fn what_gets_that_give_up_leave_does_not_stay_queued() {
    struct Slow;
    impl Device for Slow {
        type Handle = ();
        type Error = ::core::convert::Infallible;

        async fn register(&self, _: AddressRange) -> Result<(), Self::Error> {
            super::life::yield_now().await;
            Ok(())
        }

        async fn deregister(
            &self,
            _: AddressRange,
            (): (),
        ) -> Result<(), StillRegistered<(), Self::Error>> {
            Ok(())
        }
    }
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        let space = AddressSpace::new();
        let cache = RegistrationCache::builder().overlap(overlap).build(&space, Slow);
        for _ in 0..100 {
            assert!(cache.get(page(0)).now_or_never().is_none());
            drop(block_on(space.invalidate(page(0), Event::Unmap)));
        }
        let queued = cache.core.queued();
        assert!(queued <= 2, "{queued} are queued, none is registered");
    }
}

/// Between the moment at which a union is known and the one at which it is watched.
#[test]
fn k7_a_union_is_made_anew_if_the_memory_of_a_part_changes_before_it_is_watched() {
    let space = AddressSpace::new();
    let range = |first: u64, count: u64| AddressRange::new(first * 4096, count * 4096).unwrap();
    let cache = RegistrationCache::builder().overlap(Overlap::Merge).build(&space, Null::default());
    drop(block_on(cache.get(range(0, 2))).unwrap());
    let place = super::way::Place { number: 1, range: range(1, 2), thefts: 0 };
    let mut way = super::way::Way::new(&cache.core, range(1, 2), place);
    assert_eq!(block_on(way.make(false)).unwrap(), range(0, 3));
    assert!(!way.has_changed(range(0, 3)), "it may be registered");
    drop(block_on(space.invalidate(page(0), Event::Unmap)));
    assert!(way.has_changed(range(0, 3)));
    assert!(!way.has_changed(range(0, 3)), "each change is told once");
    assert_eq!(block_on(way.make(false)).unwrap(), range(1, 2));
}

#[test]
fn m4_in_a_child_of_fork_every_handle_is_inert() {
    let (space, deregistered) = (AddressSpace::new(), Arc::<AtomicUsize>::default());
    let cache = RegistrationCache::new(&space, Null { deregistered: deregistered.clone() });
    let held: Vec<_> = (0..4).map(|at| block_on(cache.get(page(at))).unwrap()).collect();
    drop(block_on(cache.get(page(9))).unwrap());
    // Look-ups no longer find this one: its user holds the last reference.
    assert!(space.invalidate(page(3), Event::Unmap).now_or_never().is_none());
    cache.core.device.source.forked.store(true, Ordering::SeqCst);
    let refused = block_on(cache.get(page(9))).unwrap_err();
    assert!(matches!(&refused, GetError::Unwatched(Unwatched::Forked)), "{refused}");
    // A thread of the parent held these locks when it forked, so taking one would hang.
    space.shared().with(|_, _| {
        let shelf = cache.clone();
        shelf.core.write(|_| {
            block_on(cache.flush());
            assert_eq!(
                (cache.stats().registrations, cache.stats().misses),
                (0, 5),
                "what needs a lock is not counted"
            );
            let text = std::format!("{cache:?} {:?}", held[0]);
            assert!(!text.contains("hits"), "{text}");
            let mut held = held;
            let last = held.pop();
            drop(held);
            drop(cache);
            // One that outlives the cache.
            drop(last);
        });
        assert_eq!(shelf.core.queued(), 0, "nothing is to be given up");
        drop(shelf);
    });
    assert_eq!(
        (deregistered.load(Ordering::SeqCst), space.len()),
        (0, 5),
        "all of it is the parent's"
    );
}

#[test]
fn m4_in_a_child_of_fork_the_device_of_a_cache_that_has_nothing_is_not_dropped() {
    let deregistered = Arc::<AtomicUsize>::default();
    let device = Null { deregistered: deregistered.clone() };
    let cache = RegistrationCache::new(&AddressSpace::new(), device);
    cache.core.device.source.forked.store(true, Ordering::SeqCst);
    drop(cache.clone());
    drop(cache);
    assert_eq!(Arc::strong_count(&deregistered), 2, "it is the parent's");
}

/// Both have looked before either begins.
#[test]
fn k4_of_two_that_miss_one_range_at_once_one_registers() {
    let cache = RegistrationCache::new(&AddressSpace::new(), Null::default());
    let [first, second] = [1, 2].map(|_| cache.core.subscribe(page(0)).unwrap());
    assert_eq!(cache.core.begin(&first, page(0), 1), Begun::Free);
    assert_eq!(cache.core.begin(&second, page(0), 1), Begun::Late, "it is under way");
    let attempt = super::life::attempt(first.entry(), 1, || Ok(Watched::default()));
    assert!(block_on(attempt).is_ok());
    assert_eq!(cache.core.begin(&second, page(0), 1), Begun::Late, "it is registered");
}

#[test]
fn m1_a_caller_that_waits_for_a_change_watches_before_it_and_after_it_and_any_other_once() {
    let (space, watches) = (AddressSpace::new(), Cell::new(0));
    let cache = RegistrationCache::new(&space, Null::default());
    let watch = || {
        watches.set(watches.get() + 1);
        Ok(Watched::default())
    };
    for waits in [false, true] {
        let change = waits.then(|| block_on(space.invalidate(page(1), Event::Clear)));
        let range = page(u64::from(waits));
        let Ok(Found::Attempt(claim, now)) = cache.core.find_or_begin(range, None) else {
            panic!("nothing is there")
        };
        let mut attempt = pin!(super::life::attempt(claim.entry(), now, watch));
        if waits {
            assert!(attempt.as_mut().now_or_never().is_none());
            assert!(attempt.as_mut().now_or_never().is_none());
            assert_eq!(watches.get(), 1);
        }
        drop(change);
        assert!(attempt.now_or_never().is_some());
        assert_eq!(watches.take(), 1 + usize::from(waits));
    }
}

#[test]
fn k3_only_a_cache_with_a_limit_keeps_an_order_of_use() {
    let builder = RegistrationCache::<Null>::builder;
    let limited = [builder().max_bytes(4096), builder().max_registrations(1)];
    assert!(limited.iter().all(|builder| builder.checked().are_set()));
    // That one gives nothing up.
    let others = [builder(), builder().max_registration(4096)];
    assert!(!others.iter().any(|builder| builder.checked().are_set()));
}

/// Threads that write to one counter wait for each other.
#[test]
fn the_hits_of_a_thread_are_counted_in_one_place() {
    assert_eq!(super::core::counter(), super::core::counter());
}

#[derive(Default)]
struct Woken(AtomicBool);

impl ArcWake for Woken {
    fn wake_by_ref(this: &Arc<Self>) {
        this.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_task_has_the_wakers_of_those_who_wait_and_no_others() {
    let (losses, woken) = (Arc::new(Losses::new(None)), Arc::<Woken>::default());
    let waker = waker(woken.clone());
    let mut cx = Context::from_waker(&waker);
    let mut ended = Task::new(&losses, async {}).wait();
    assert!(ended.poll_unpin(&mut cx).is_ready());
    assert_eq!(Arc::strong_count(&woken), 2, "it did not have to wait");
    let task = Task::new(&losses, pending::<()>());
    let mut waits = task.wait();
    assert!(waits.poll_unpin(&mut cx).is_pending());
    assert!(Arc::strong_count(&woken) > 2);
    drop(waits);
    assert_eq!(Arc::strong_count(&woken), 2, "it has gone");
}

/// Only a defect of the library panics there.
#[test]
fn a_task_whose_poll_panics_is_over_for_all_who_wait() {
    let (losses, woken) = (Arc::new(Losses::new(None)), Arc::<Woken>::default());
    let mut polled = false;
    let task = Task::new(
        &losses,
        poll_fn(move |_| {
            if ::core::mem::replace(&mut polled, true) {
                resume_unwind(Box::new("a defect"));
            }
            Poll::<()>::Pending
        }),
    );
    let mut waits = task.wait();
    assert!(waits.poll_unpin(&mut Context::from_waker(&waker(woken.clone()))).is_pending());
    assert!(catch_unwind(AssertUnwindSafe(|| task.poke(1))).is_err());
    assert!(woken.0.load(Ordering::SeqCst));
    assert_eq!(waits.now_or_never(), Some(()));
}

#[test]
fn f1_what_a_task_has_when_it_is_dropped_may_panic() {
    #[derive(Clone, Default)]
    struct Fails;
    impl Drop for Fails {
        fn drop(&mut self) {
            resume_unwind(Box::new("it fails when it is dropped"));
        }
    }
    let losses = Arc::new(Losses::new(None));
    let over = Task::new(&losses, async { Fails });
    assert!(over.poke(1));
    drop(over);
    assert_eq!(losses.count(), 1, "what it has ended with");
    let held = Fails;
    drop(Task::new(&losses, async move {
        pending::<()>().await;
        held
    }));
    assert_eq!(losses.count(), 2, "what it has not ended with");
}
