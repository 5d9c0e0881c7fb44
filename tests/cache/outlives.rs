//! K1: an invalidation is over when the last user has let go and the device has deregistered,
//! whatever became of the cache.

use crate::device::{Act, Card};
use crate::support::{Device, Gate, Log, Task, now, pages};
use futures::executor::block_on;
use shootdown::cache::{Merge, RegistrationCache};
use shootdown::{AddressSpace, Event};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Context, Wake};

#[test]
fn k1_an_invalidation_waits_for_a_registration_whose_cache_was_dropped() {
    for yields in [false, true] {
        let gate = yields.then(Gate::default);
        let (space, card) =
            (AddressSpace::new(), Card { deregister_gate: gate.clone(), ..Card::default() });
        let cache = RegistrationCache::new(&space, card.clone());
        let registration = now(cache.get(pages(1, 1))).unwrap();
        drop(cache);
        assert_eq!(card.mapped(), [1], "it is in use");
        let mut unmap = Task::new(space.invalidate(pages(1, 1), Event::Unmap));
        unmap.expect_pending();
        drop(registration);
        if let Some(gate) = gate {
            unmap.expect_pending();
            gate.open();
        }
        drop(unmap.finish());
        assert_eq!((card.mapped().len(), space.len()), (0, 0));
        assert_eq!(Arc::strong_count(&card.state), 1, "the device went with its last registration");
    }
}

#[test]
fn k1_the_last_handle_has_what_is_idle_deregistered_and_leaves_what_takes_time_to_invalidations() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { deregister_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::new(&space, card.clone());
    drop(now(cache.get(pages(1, 1))).unwrap());
    drop(cache);
    assert!(gate.is_waited_for(), "the device was asked, and nobody waits for it");
    gate.open();
    assert_eq!(space.len(), 1, "it can still be invalidated");
    drop(now(space.invalidate(pages(1, 1), Event::Unmap)));
    assert_eq!((card.mapped().len(), space.len(), Arc::strong_count(&card.state)), (0, 0, 1));
    // A device that needs no time.
    let card = Card::default();
    let cache = RegistrationCache::new(&space, card.clone());
    drop(now(cache.get(pages(1, 1))).unwrap());
    drop(cache);
    assert_eq!((card.mapped().len(), space.len(), Arc::strong_count(&card.state)), (0, 0, 1));
}

#[test]
fn k1_a_registration_that_outlives_cache_and_space_leaves_nothing_behind() {
    let card = Card::default();
    for order in 0..2 {
        let space = AddressSpace::new();
        let cache = RegistrationCache::new(&space, card.clone());
        let registration = now(cache.get(pages(1, 1))).unwrap();
        if order == 0 {
            drop(cache);
            drop(space);
        } else {
            drop(space);
            drop(cache);
        }
        assert_eq!(card.mapped(), [1]);
        drop(registration);
        assert_eq!((card.mapped().len(), Arc::strong_count(&card.state)), (0, 1));
    }
    // One that takes time: nobody can wait for it, so its future goes with what would wake it.
    let gate = Gate::default();
    let card = Card { deregister_gate: Some(gate.clone()), ..Card::default() };
    let space = AddressSpace::new();
    let cache = RegistrationCache::new(&space, card.clone());
    let registration = now(cache.get(pages(1, 1))).unwrap();
    drop((cache, space));
    drop(registration);
    gate.nudge();
    assert_eq!(Arc::strong_count(&card.state), 1, "neither the space nor the device is leaked");
}

/// A registration whose cache is gone, and whose device takes until the gate is open.
fn left_behind(space: &AddressSpace, gate: &Gate) {
    let cache = RegistrationCache::new(
        space,
        Card { deregister_gate: Some(gate.clone()), ..Card::default() },
    );
    let registration = block_on(cache.get(pages(1, 1))).unwrap();
    drop(cache);
    drop(registration);
}

/// Whether anybody can reach the space is asked beside a thread whose notifiers enter and leave.
#[test]
fn k1_nothing_is_given_up_while_the_space_can_be_reached() {
    let (space, stop, log) = (AddressSpace::new(), AtomicBool::new(false), Log::default());
    let given_up = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                drop([2, 3, 4, 5].map(|page| {
                    space.insert(pages(page, 1), Device::new("another", &log)).unwrap()
                }));
            }
        });
        let given_up = (0..5000).filter(|_| {
            let gate = Gate::default();
            left_behind(&space, &gate);
            let mut unmap = Task::new(space.invalidate(pages(1, 1), Event::Unmap));
            let given_up = unmap.run().is_ready();
            gate.open();
            if !given_up {
                drop(unmap.finish());
            }
            given_up
        });
        let given_up = given_up.take(1).count();
        stop.store(true, Ordering::Relaxed);
        given_up
    });
    assert_eq!(given_up, 0, "an invalidation was over while the device had the memory");
}

#[test]
fn k1_the_last_two_registrations_of_a_space_that_go_at_once_leave_nothing_behind() {
    let leaked = (0..2000).filter(|_| {
        let card = Card { deregister_gate: Some(Gate::default()), ..Card::default() };
        let space = AddressSpace::new();
        let cache = RegistrationCache::new(&space, card.clone());
        let [one, two] = [1, 2].map(|page| now(cache.get(pages(page, 1))).unwrap());
        drop((cache, space));
        let together = Barrier::new(2);
        let go = |registration| {
            together.wait();
            drop(registration);
        };
        std::thread::scope(|scope| {
            scope.spawn(|| go(one));
            go(two);
        });
        Arc::strong_count(&card.state) > 1
    });
    assert_eq!(leaked.count(), 0, "spaces and devices that nobody can reach");
}

/// Nobody can reach the space any more: one of the two asks the device before both are gone, and
/// the other does not take its question back.
#[test]
fn k1_a_user_and_the_last_handle_of_the_cache_that_go_at_once_leave_nothing_registered() {
    let left = (0..500).filter(|_| {
        let (space, card) = (AddressSpace::new(), Card::default());
        let cache = RegistrationCache::new(&space, card.clone());
        let held = now(cache.get(pages(1, 1))).unwrap();
        // Look-ups do not find it any more, so its user has the last reference.
        now(cache.flush());
        drop(space);
        let together = Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                together.wait();
                drop(held);
            });
            together.wait();
            drop(cache);
        });
        !card.mapped().is_empty()
    });
    assert_eq!(left.count(), 0, "the device has it still");
}

#[test]
fn k1_what_registers_when_the_last_handle_goes_is_given_up_also_under_an_invalidation() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::new(&space, card.clone());
    let mut get = Box::pin(cache.get(pages(1, 1)));
    assert!(futures::FutureExt::now_or_never(get.as_mut()).is_none());
    let mut unmap = Task::new(space.invalidate(pages(1, 1), Event::Unmap));
    unmap.expect_pending();
    drop(get);
    drop(cache);
    drop(unmap.finish());
    assert_eq!((card.mapped().len(), space.len(), Arc::strong_count(&card.state)), (0, 0, 1));
}

/// openucx/ucx PR #9616: what an event has invalidated was let go only when the cache was used
/// next.
#[test]
fn k1_report_6_what_is_invalidated_is_deregistered_without_a_further_call_of_the_cache() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::new(&space, card.clone());
    let held = now(cache.get(pages(1, 1))).unwrap();
    drop(now(cache.get(pages(5, 1))).unwrap());
    std::thread::scope(|scope| {
        let unmapping = scope.spawn(|| {
            drop(futures::executor::block_on(space.invalidate(pages(0, 9), Event::Unmap)))
        });
        // Dropped by a thread that does nothing else.
        scope.spawn(move || drop(held)).join().unwrap();
        unmapping.join().unwrap();
    });
    assert_eq!(card.mapped().len(), 0);
    assert_eq!(cache.stats().pinned_bytes, 0);
}

/// LMCache/LMCache PR #5177: a failed deregistration was taken for a success.
#[test]
fn k2_report_7_an_invalidation_drives_further_tries_and_gives_others_their_turn() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::new(&space, card.clone());
    drop(now(cache.get(pages(1, 1))).unwrap());
    card.next_deregister(&[Act::Refuse, Act::Panic, Act::PanicLater, Act::Refuse, Act::Panic]);
    // Nobody calls the cache.
    drop(now(space.invalidate(pages(1, 1), Event::Unmap)));
    assert_eq!((card.mapped().len(), cache.stats().deregister_failures), (0, 5));
    assert_eq!(space.stats().lost_panics, 3, "they have no caller");
    // One that fails for ever: each poll of the invalidation comes back, and others go on.
    drop(now(cache.get(pages(1, 1))).unwrap());
    card.next_deregister(&[Act::Refuse; 100_000]);
    let mut unmap = Task::new(space.invalidate(pages(1, 1), Event::Unmap));
    for _ in 0..1000 {
        assert!(unmap.poll().is_pending() && unmap.is_woken(), "it comes back, and wants to go on");
    }
    drop(now(cache.get(pages(3, 1))).unwrap());
    let tries = card.state.lock().unwrap().calls_of_deregister;
    assert!((10..2000).contains(&tries), "{tries} tries in 1,000 polls");
    card.state.lock().unwrap().deregister.clear();
    drop(unmap.finish());
    assert_eq!(card.mapped(), [3]);
}

/// ROCm/rocm-systems PR #10628: a pin that an invalidation took away while the engine read.
#[test]
fn k1_report_23_a_registration_in_use_is_mapped_until_it_is_dropped_and_a_new_one_waits() {
    for merge in [Merge::Never, Merge::Touching] {
        let (space, card) = (AddressSpace::new(), Card::default());
        let cache = RegistrationCache::<Card>::builder().merge(merge).build(&space, card.clone());
        let transfer = now(cache.get(pages(1, 2))).unwrap();
        let mut discard = Task::new(space.invalidate(pages(2, 1), Event::Clear));
        discard.expect_pending();
        let mut again = Task::new(cache.get(pages(1, 2)));
        again.expect_pending();
        assert_eq!((card.mapped(), card.state.lock().unwrap().registered), (vec![1], 1));
        drop(transfer);
        drop(discard.finish());
        drop(again.finish().unwrap());
        assert_eq!(card.state.lock().unwrap().registered, 2);
    }
}

#[test]
fn k1_a_caller_that_goes_away_before_the_device_was_asked_leaves_nothing() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::new(&space, card.clone());
    let guard = now(space.invalidate(pages(1, 1), Event::Unmap));
    let (mut one, mut two) = (Task::new(cache.get(pages(1, 1))), Task::new(cache.get(pages(1, 1))));
    one.expect_pending();
    two.expect_pending();
    assert_eq!(space.len(), 1, "both wait for one");
    drop(one);
    assert_eq!(space.len(), 1);
    drop(two);
    assert_eq!(space.len(), 0);
    drop(guard);
    drop(now(cache.get(pages(1, 1))).unwrap());
    assert_eq!(card.state.lock().unwrap().registered, 1);
}

/// Caches come and go beside threads that look up, hold, flush and invalidate, on a device that
/// fails now and then.
#[test]
fn k1_caches_that_are_dropped_under_load_leave_nothing_and_hang_nobody() {
    let (space, card) = (AddressSpace::new(), Card::default());
    for round in 0..300u64 {
        if round % 3 == 0 {
            card.next_register(&[Act::Succeed, Act::PanicLater, Act::Succeed, Act::Refuse]);
            card.next_deregister(&[
                Act::Refuse,
                Act::Succeed,
                Act::Panic,
                Act::Refuse,
                Act::Refuse,
                Act::Refuse,
            ]);
        }
        let merge = if round % 2 == 0 { Merge::Never } else { Merge::Touching };
        let builder = RegistrationCache::<Card>::builder().merge(merge).max_registrations(3);
        let cache = builder.build(&space, card.clone());
        std::thread::scope(|scope| {
            for seed in 0..2 {
                let cache = cache.clone();
                scope.spawn(move || {
                    let mut held = Vec::new();
                    for step in 0..12 {
                        let first = (round + 5 * seed + 3 * step) % 8;
                        let mut get = Box::pin(cache.get(pages(first, 1 + step % 2)));
                        if step % 4 == 3 {
                            // Goes away while it waits.
                            drop(futures::FutureExt::now_or_never(get.as_mut()));
                        } else {
                            // Nobody may hold one while he waits for another: that could be a
                            // circle.
                            held.clear();
                            held.extend(futures::executor::block_on(get));
                        }
                    }
                    // The other one's handle may be gone already, and this registration outlives
                    // both.
                    drop(cache);
                    drop(held);
                });
            }
            let (space, flushing) = (&space, cache.clone());
            scope.spawn(move || {
                for step in 0..12 {
                    drop(futures::executor::block_on(
                        space.invalidate(pages((round + step) % 8, 2), Event::Unmap),
                    ));
                }
                futures::executor::block_on(flushing.flush());
            });
            drop(cache);
        });
    }
    card.state.lock().unwrap().deregister.clear();
    drop(futures::executor::block_on(space.invalidate(pages(0, 100), Event::Unmap)));
    assert_eq!((card.mapped(), space.len(), Arc::strong_count(&card.state)), (vec![], 0, 1));
}

/// A waker that runs code once.
struct Runs(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Wake for Runs {
    fn wake(self: Arc<Self>) {
        let run = self.0.lock().unwrap().take();
        if let Some(run) = run {
            run();
        }
    }
}

#[test]
fn k1_the_last_handle_asks_the_device_although_the_last_user_wakes_a_task_still() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::new(&space, card.clone());
    let held = now(cache.get(pages(1, 1))).unwrap();
    let [(wakes, is_woken), (goes_on, may_go_on)] = std::array::from_fn(|_| channel());
    let waker = Arc::new(Runs(Mutex::new(Some(Box::new(move || {
        wakes.send(()).unwrap();
        may_go_on.recv().unwrap();
    })))));
    let mut unmap = Box::pin(space.invalidate(pages(1, 1), Event::Unmap));
    assert!(unmap.as_mut().poll(&mut Context::from_waker(&waker.into())).is_pending());
    std::thread::scope(|scope| {
        scope.spawn(|| drop(held));
        is_woken.recv().unwrap();
        drop(cache);
        let mapped = card.mapped();
        goes_on.send(()).unwrap();
        assert_eq!(mapped, [], "the waker may take any time");
    });
    drop(now(unmap));
}
