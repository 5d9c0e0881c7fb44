use crate::support::*;
use futures::FutureExt;
use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, RangeSet,
    WouldBlock,
};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

#[test]
fn l1_remove_waits_for_the_notifiers_own_pass_drives_it_and_returns_the_notifier() {
    let (space, device, log) = one_device();
    let other = Gate::default();
    let _other = space
        .insert(pages(0, 1), Device::new("other", &log).then(Act::pass(other.clone())))
        .unwrap();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let drops = device.drops();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    let mut remove = Task::new(device.remove());
    remove.expect_pending();
    gate.open();
    let device = remove.finish();
    assert_eq!((device.name, drops.load(Ordering::SeqCst)), ("device", 0));
    invalidate.expect_pending();
    other.open();
    drop(invalidate.finish());
}

#[test]
fn l1_remove_sleeps_while_passes_go_on_that_are_not_the_notifiers_own() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let [own, others] = [Gate::default(), Gate::default()];
    let device = space
        .insert(pages(0, 2), Device::new("device", &log).then(Act::pass(own.clone())))
        .unwrap();
    let _other = space
        .insert(pages(1, 1), Device::new("other", &log).then(Act::pass(others.clone())))
        .unwrap();
    // The device has a pass in the first one only.
    let mut invalidations =
        [0, 1].map(|page| Task::new(space.invalidate(pages(page, 1), Event::Unmap)));
    invalidations.iter_mut().for_each(Task::expect_pending);
    let mut remove = Task::new(device.remove());
    remove.expect_pending();
    others.nudge();
    assert!(!remove.is_woken(), "it has nothing to do with that pass");
    own.open();
    remove.finish();
}

#[test]
fn l1_a_guard_that_somebody_holds_does_not_keep_remove_waiting() {
    let (space, device, _log) = one_device();
    let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
    let drops = device.drops();
    drop(now(device.remove()));
    assert_eq!(
        drops.load(Ordering::SeqCst),
        1,
        "and the notifier is free while the range is under invalidation"
    );
    drop(guard);
    assert_eq!((space.active().len(), space.len()), (0, 0));
}

#[test]
fn l1_after_the_drop_of_the_subscription_calls_that_had_not_begun_do_not_begin() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let victim = std::sync::Arc::new(std::sync::Mutex::new(None));
    let inside = victim.clone();
    let killer = Device::new("killer", &log)
        .then(Act::Run(Box::new(move |_| drop(inside.lock().unwrap().take()))));
    let _killer = space.insert(pages(0, 1), killer).unwrap();
    let subscription = space.insert(pages(0, 1), Device::new("victim", &log)).unwrap();
    let drops = subscription.drops();
    *victim.lock().unwrap() = Some(subscription);
    let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
    assert_eq!(called(&log), ["killer"]);
    drop(guard);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

#[test]
fn l1_a_dropped_remove_leaves_the_notifier_removed_and_drops_it_once() {
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let drops = device.drops();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    let mut remove = Task::new(device.remove());
    remove.expect_pending();
    drop(remove);
    assert_eq!((space.len(), drops.load(Ordering::SeqCst)), (0, 0));
    gate.open();
    drop(invalidate.finish());
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

/// Polls a future once, with a waker of this flag.
fn poll_with<F: Future>(flag: &Arc<Flag>, future: std::pin::Pin<&mut F>) -> bool {
    let waker = futures::task::waker(flag.clone());
    future.poll(&mut std::task::Context::from_waker(&waker)).is_ready()
}

struct Flag;

impl futures::task::ArcWake for Flag {
    fn wake_by_ref(_: &Arc<Self>) {}
}

#[test]
fn c3_a_future_that_is_dropped_while_it_waits_leaves_no_waker_behind() {
    let (space, device, log) = one_device();
    let device = Arc::new(device);
    let [gate, other] = [Gate::default(), Gate::default()];
    device.next(Act::pass(gate.clone()));
    let removed = space
        .insert(pages(0, 1), Device::new("removed", &log).then(Act::pass(other.clone())))
        .unwrap();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    let flag = Arc::new(Flag);
    let mut reader = Box::pin(device.read_begin());
    assert!(!poll_with(&flag, reader.as_mut()));
    drop(reader);
    assert_eq!(Arc::strong_count(&flag), 1, "a reader");
    let mut drain = Box::pin(space.drain());
    assert!(!poll_with(&flag, drain.as_mut()));
    drop(drain);
    assert_eq!(Arc::strong_count(&flag), 1, "drain");
    let mut close = Box::pin(device.close());
    assert!(!poll_with(&flag, close.as_mut()));
    drop(close);
    assert_eq!(Arc::strong_count(&flag), 1, "close");
    let mut remove = Box::pin(removed.remove());
    assert!(!poll_with(&flag, remove.as_mut()));
    drop(remove);
    assert_eq!(Arc::strong_count(&flag), 1, "remove");
    let mut second = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(poll_with(&flag, second.as_mut()), "nothing is left to be called");
    drop((second, invalidate));
    gate.open();
    other.open();
    now(space.drain());
    assert_eq!(Arc::strong_count(&flag), 1);
}

#[test]
fn l1_remove_waits_for_first_passes_and_not_for_the_guard_however_many_are_active() {
    // Those beyond 32 are kept elsewhere.
    for (active, meanwhile) in [(0, 0), (40, 0), (0, 40)] {
        let (space, device, log) = one_device();
        let begin = |space: &AddressSpace, count| -> Vec<_> {
            (0..count)
                .map(|_| now(space.invalidate(pages(9, 1), Event::Clear).into_owned()).into_owned())
                .collect()
        };
        let elsewhere = begin(&space, active);
        let other = Arc::new(space.insert(pages(0, 1), Device::new("other", &log)).unwrap());
        let (inside, closes) = (space.clone(), other.clone());
        device.next(Act::Run(Box::new(move |_| {
            let _elsewhere = begin(&inside, meanwhile);
            // Nobody blocks who polls with this waker, so debug builds do not take it for a mistake
            // (C7).
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(
                std::pin::pin!(closes.close()).poll(&mut context).is_pending(),
                "it may still be called"
            );
        })));
        let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
        assert_eq!(called(&log), ["device"]);
        let mut close = Task::new(other.close());
        assert!(
            close.poll().is_ready(),
            "{active} and {meanwhile} others: it cannot be called any more"
        );
        drop((close, guard, elsewhere));
    }
}

#[test]
fn l1_remove_waits_for_first_passes_also_of_many_ranges_and_beyond_the_budget() {
    for (many, deferred) in [(false, false), (false, true), (true, false), (true, true)] {
        let (builder, log) = (AddressSpace::builder(), Log::default());
        let space = if deferred { builder.pass_budget(0) } else { builder }.build();
        let [first, second, other] = ["first", "second", "other"]
            .map(|name| Arc::new(space.insert(pages(0, 1), Device::new(name, &log)).unwrap()));
        let (gate, closes) = (Gate::default(), other.clone());
        if deferred {
            first.next(Act::pass(gate.clone()));
        }
        second.next(Act::Run(Box::new(move |_| {
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(
                std::pin::pin!(closes.close()).poll(&mut context).is_pending(),
                "it may still be called"
            );
        })));
        let mut invalidate = Task::new(if many {
            space
                .invalidate_all(RangeSet::new([0, 7].map(|at| pages(at, 1))).unwrap(), Event::Unmap)
        } else {
            space.invalidate(pages(0, 1), Event::Unmap)
        });
        if deferred {
            invalidate.expect_pending();
            gate.open();
        }
        let guard = invalidate.finish();
        assert_eq!(called(&log), ["first", "second"]);
        // They take its place, so it is kept elsewhere.
        let elsewhere: Vec<_> =
            (0..40).map(|_| now(space.invalidate(pages(9, 1), Event::Clear))).collect();
        let mut close = Task::new(other.close());
        assert!(close.poll().is_ready(), "{many}, {deferred}: it cannot be called any more");
        drop((close, guard, elsewhere));
    }
}

#[test]
fn l2_reader_and_remover_wait_only_for_overlapping_invalidations() {
    let (space, device, log) = one_device();
    let busy = Gate::default();
    let _busy =
        space.insert(pages(9, 1), Device::new("busy", &log).then(Act::pass(busy.clone()))).unwrap();
    let mut elsewhere = Task::new(space.invalidate(pages(9, 1), Event::Unmap));
    elsewhere.expect_pending();
    now(device.read_begin());
    drop(now(device.remove()));
    busy.open();
    drop(elsewhere.finish());
}

#[test]
fn l3_insert_never_waits_and_the_next_invalidation_may_call() {
    let (space, device, log) = one_device();
    device.next(Act::pass(Gate::default()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    let late = space.insert(pages(0, 1), Device::new("late", &log)).unwrap();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!((late.calls(), device.calls()), (1, 2));
}

#[test]
fn o5_a_space_counts_its_notifiers_from_insert_to_remove() {
    let (space, log) = (AddressSpace::new(), Log::default());
    assert!(space.is_empty());
    let device = |name| space.insert(pages(0, 1), Device::new(name, &log)).unwrap();
    let (one, two) = (device("one"), device("two"));
    assert_eq!((space.len(), space.is_empty()), (2, false));
    now(two.remove());
    assert_eq!((space.len(), space.is_empty()), (1, false));
    drop(one);
    assert_eq!((space.len(), space.is_empty()), (0, true));
}

#[test]
fn l3_an_insertion_takes_the_memory_of_a_notifier_that_has_gone() {
    let (space, device, log) = one_device();
    let place = |device: &Device| std::ptr::from_ref(device).addr();
    let before = place(&device);
    drop(now(device.remove()));
    let next = space.insert(pages(1, 1), Device::new("next", &log)).unwrap();
    assert_eq!(place(&next), before);
}

#[test]
fn l4_release_calls_every_notifier_waits_for_passes_and_then_insert_fails() {
    let (space, device, log) = one_device();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let top = AddressRange::try_from(u64::MAX - 5..=u64::MAX).unwrap();
    let _top = space.insert(top, Device::new("top", &log)).unwrap();
    let release = space.release();
    assert!(
        space.insert(pages(1, 1), Device::new("before", &log)).is_ok(),
        "C1: nothing happens before the first poll"
    );
    let mut release = Task::new(release);
    release.expect_pending();
    let refused = space.insert(pages(1, 1), Device::new("after", &log)).unwrap_err();
    assert!(refused.to_string().contains("has been released"));
    assert_eq!(refused.into_notifier().name, "after", "nothing is lost");
    gate.open();
    release.finish();
    let events: Vec<_> =
        log.lock().unwrap().iter().map(|(name, info)| (*name, info.event, info.range)).collect();
    assert_eq!(events, ["device", "top"].map(|name| (name, Event::Release, AddressRange::ALL)));
    assert_eq!((space.is_released(), space.active().len()), (true, 0));
    drop(now(device.remove()));
}

#[test]
fn after_close_nothing_can_be_installed_any_more() {
    let (_space, device, _log) = one_device();
    let table = shootdown::DriverLock::new(0);
    let sequence = now(device.read_begin());
    drop(device.close());
    assert_eq!(table.install(&device, sequence, |table| *table = 1), Err(shootdown::Collision));
    let look = |_| std::future::ready(Ok::<(), std::fmt::Error>(()));
    let mirrored =
        now(table.mirror(&device, shootdown::RetryBudget::default(), look, |table, ()| *table = 1));
    assert_eq!(mirrored, Err(shootdown::MirrorError::Closed));
    assert_eq!(*table.lock(), 0);
}

type Script = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// Runs a script when it is asked for its name.
struct Asked {
    script: Script,
    gate: Gate,
}

impl IntervalNotifier for Asked {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(Some(PassFuture::new(self.gate.clone())))
    }

    fn name(&self) -> std::borrow::Cow<'static, str> {
        let script = self.script.lock().unwrap().take();
        if let Some(script) = script {
            script();
        }
        // Still there, whatever the script did.
        assert!(self.script.lock().unwrap().is_none());
        "asked".into()
    }
}

#[test]
fn l1_remove_waits_for_whoever_asks_for_the_name_even_when_no_invalidation_is_left() {
    let space = AddressSpace::new();
    let (script, gate) = (Script::default(), Gate::default());
    let asked =
        space.insert(pages(0, 1), Asked { script: script.clone(), gate: gate.clone() }).unwrap();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap).into_owned());
    invalidate.expect_pending();
    let removal = Arc::new(Mutex::new(None));
    let kept = removal.clone();
    *script.lock().unwrap() = Some(Box::new(move || {
        gate.open();
        assert!(invalidate.run().is_ready());
        let mut remove = Task::new(asked.remove());
        remove.expect_pending();
        *kept.lock().unwrap() = Some(remove);
    }));
    assert_eq!(space.active()[0].pending, ["asked"]);
    let mut remove = removal.lock().unwrap().take().unwrap();
    assert!(remove.run().is_ready());
    assert_eq!(Arc::strong_count(&script), 1, "the notifier came back and was dropped");
}

/// Knows its own number, in memory of its own and in place.
struct Numbered<const WORDS: usize>(Box<u64>, [u64; WORDS]);

impl<const WORDS: usize> Numbered<WORDS> {
    fn new(number: u64) -> Self {
        Self(Box::new(number), [number; WORDS])
    }

    fn check(&self, number: u64) {
        assert_eq!((*self.0, self.1), (number, [number; WORDS]));
    }
}

impl<const WORDS: usize> IntervalNotifier for Numbered<WORDS> {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        self.check(*self.0);
        Ok(None)
    }
}

#[test]
fn l1_notifiers_that_come_and_go_on_several_threads_get_their_own_back() {
    let rounds = if cfg!(miri) { 20 } else { 2000 };
    let space = AddressSpace::new();
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let space = &space;
            scope.spawn(move || {
                for round in 0..rounds {
                    let number = 3 * round + thread;
                    // Where one was, one of the same size comes now and one of another size then.
                    let small = space.insert(pages(thread, 1), Numbered::<1>::new(number)).unwrap();
                    small.check(number);
                    if round % 5 == 0 {
                        drop(now(space.invalidate(pages(0, 3), Event::Unmap)));
                    }
                    if round % 3 == 0 {
                        let large =
                            space.insert(pages(thread, 1), Numbered::<9>::new(number)).unwrap();
                        futures::executor::block_on(large.remove()).check(number);
                    }
                    if round % 4 != 0 {
                        futures::executor::block_on(small.remove()).check(number);
                    } else {
                        drop(small.remove());
                    }
                }
            });
        }
    });
    assert_eq!(space.len(), 0);
}

#[test]
fn l1_a_notifier_that_panics_when_its_remove_is_dropped_leaves_the_space_as_it_should_be() {
    struct Bomb(Arc<Mutex<u32>>);

    impl IntervalNotifier for Bomb {
        fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
            Ok(None)
        }
    }

    impl Drop for Bomb {
        fn drop(&mut self) {
            *self.0.lock().unwrap() += 1;
            if !std::thread::panicking() {
                std::panic::panic_any("dropped");
            }
        }
    }

    let (space, drops) = (AddressSpace::new(), Arc::new(Mutex::new(0)));
    for dropped in 1..4 {
        let remove = space.insert(pages(0, 1), Bomb(drops.clone())).unwrap().remove();
        let panic =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(remove))).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"dropped"));
        drops.clear_poison();
        assert_eq!((*drops.lock().unwrap(), space.len()), (dropped, 0));
        now(space.insert(pages(0, 1), Numbered::<1>::new(7)).unwrap().remove()).check(7);
    }
}

#[test]
fn l1_a_remove_that_has_resolved_says_so() {
    let (_space, device, _log) = one_device();
    let mut remove = device.remove();
    drop(now(&mut remove));
    let again = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| now(&mut remove).calls()))
        .unwrap_err();
    assert_eq!(again.downcast_ref(), Some(&"`Remove` polled after it has resolved"));
}

/// A waiting removal has a place among those who wait, and a waker there.
#[test]
fn l1_a_waiting_removal_or_close_that_is_dropped_leaves_no_waker_behind() {
    struct Kept;
    impl futures::task::ArcWake for Kept {
        fn wake_by_ref(_: &Arc<Self>) {}
    }
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    let kept = Arc::new(Kept);
    let waker = futures::task::waker(kept.clone());
    let mut cx = std::task::Context::from_waker(&waker);
    let before = Arc::strong_count(&kept);
    let mut close = Box::pin(device.close());
    assert!(close.as_mut().poll(&mut cx).is_pending());
    assert!(Arc::strong_count(&kept) > before, "it is to be woken");
    drop(close);
    assert_eq!(Arc::strong_count(&kept), before, "after a close that was dropped");
    let mut remove = Box::pin(device.remove());
    assert!(remove.as_mut().poll(&mut cx).is_pending());
    assert!(Arc::strong_count(&kept) > before, "it is to be woken");
    drop(remove);
    assert_eq!(Arc::strong_count(&kept), before, "after a removal that was dropped");
    gate.open();
    drop(invalidate.finish());
}

/// More than a leaf of an index holds, and more than there are places for invalidations.
#[test]
fn l3_hundreds_of_notifiers_and_invalidations_of_one_start_are_all_found_and_all_leave() {
    const MANY: usize = if cfg!(miri) { 40 } else { 100 };
    // 7 and these have no common factor: what leaves comes in no order.
    let mixed = || (0..MANY).map(|at| at * 7 % MANY);
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let mut notifiers: Vec<_> = (0..MANY)
        .map(|_| Some(space.insert(pages(0, 1), Device::new("one of many", &log)).unwrap()))
        .collect();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(called(&log).len(), MANY);
    let device = space.insert(pages(0, 1), Device::new("device", &log)).unwrap();
    // They all wait for one device, in the space.
    let mut waiting: Vec<_> = (0..MANY)
        .map(|_| {
            device.next(Act::pass(gate.clone()));
            let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
            invalidate.expect_pending();
            Some(invalidate)
        })
        .collect();
    assert_eq!(space.active().len(), MANY);
    for at in mixed().take(MANY / 2) {
        waiting[at] = None;
    }
    let mut drain = Task::new(space.drain());
    drain.expect_pending();
    gate.open();
    // The abandoned ones end in the drain, the others when they are polled. Their guards cover who
    // is inserted.
    let mut guards: Vec<_> = waiting.iter_mut().map(|task| Some(task.as_mut()?.finish())).collect();
    drain.finish();
    assert_eq!(space.active().len(), MANY / 2);
    let late = space.insert(pages(0, 1), Device::new("late", &log)).unwrap();
    for at in mixed() {
        assert!(guards.iter().all(Option::is_none) || late.read_begin().now_or_never().is_none());
        guards[at] = None;
    }
    now(late.read_begin());
    assert_eq!((space.active().len(), space.sequence().get() % 2), (0, 0));
    for at in mixed() {
        now(notifiers[at].take().unwrap().remove());
    }
    assert_eq!(space.len(), 2, "the device and the late one");
    called(&log);
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(called(&log), ["device", "late"]);
}
