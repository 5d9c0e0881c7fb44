use crate::support::*;
use shootdown::{AddressSpace, Event, Phase};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::task::Context;
use std::time::Duration;

#[test]
fn c1_a_future_that_is_dropped_before_its_first_poll_did_nothing() {
    let (space, device, _log) = one_device();
    drop(space.invalidate(pages(0, 1), Event::Unmap));
    drop(space.release());
    assert_eq!((device.calls(), space.active().len(), space.sequence().get()), (0, 0, 2));
    assert!(!space.is_released());
}

#[test]
fn c2_dropped_after_its_first_passes_the_passes_complete_and_only_then_the_range_ends() {
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    drop(invalidate);
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    assert_eq!((space.active().len(), space.stats().abandoned), (1, 1));
    gate.open();
    let sequence = reader.finish();
    assert_eq!((sequence.get(), space.sequence().get()), (3, 4));
}

#[test]
fn c2_drain_finishes_what_was_abandoned() {
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    drop(invalidate);
    let mut drain = Task::new(space.drain());
    drain.expect_pending();
    gate.open();
    drain.finish();
    assert_eq!(space.active().len(), 0);
    now(space.drain());
}

#[test]
fn c3_whoever_waits_drives_the_passes() {
    let (space, device, _log) = one_device();
    device.next(Act::pass(Yields(100)));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(invalidate.poll().is_pending());
    // From here on the invalidation's own future is never polled again.
    let mut remove = Task::new(device.remove());
    assert!(remove.run().is_ready());
    invalidate.forget();
}

#[test]
fn c3_a_reader_that_slept_before_the_passes_were_pending_is_woken_to_help() {
    // The reader begins to wait inside the first pass, as one on another thread would.
    let (space, log) = (AddressSpace::new(), Log::default());
    let device = Arc::new(space.insert(pages(0, 1), Device::new("device", &log)).unwrap());
    let held = now(space.invalidate(pages(0, 1), Event::Clear));
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    device.next(Act::pass(Yields(50)));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(invalidate.poll().is_pending());
    assert!(reader.is_woken(), "there is something to help with");
    drop(held);
    invalidate.forget();
    reader.finish();
}

/// Polls a reader every 50 µs until it goes on; says when. It may yield, but not sleep.
#[track_caller]
fn patience(reader: &mut Task<impl Future>, micros: &AtomicU64) -> Duration {
    let began = micros.load(Ordering::SeqCst);
    while reader.poll().is_pending() {
        assert!(reader.is_woken(), "the reader sleeps");
        let now = micros.fetch_add(50, Ordering::SeqCst);
        assert!(now - began < 10_000_000, "the reader waits for ever");
    }
    Duration::from_micros(micros.load(Ordering::SeqCst) - began)
}

#[test]
fn c4_a_future_that_is_alive_but_not_polled_lapses_and_starts_over() {
    let (space, device, micros) = with_clock(None);
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    let waited = patience(&mut Task::new(device.read_begin()), &micros);
    assert!((20..22).contains(&waited.as_millis()), "{waited:?}");
    assert_eq!((space.stats().lapses, space.active().len(), device.calls()), (1, 0, 1));
    let guard = invalidate.poll();
    assert!(guard.is_ready() && device.calls() == 2, "it starts over with new first passes");
}

#[test]
fn c4_patience_counts_from_when_the_passes_were_done_and_gives_everybody_a_turn_all_the_same() {
    let (space, device, micros) = with_clock(None);
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    // Somebody drives the passes to their end and goes away.
    let mut early = Task::new(device.read_begin());
    assert!(early.poll().is_pending());
    drop(early);
    micros.fetch_add(500_000, Ordering::SeqCst);
    let waited = patience(&mut Task::new(device.read_begin()), &micros);
    assert!((Duration::from_micros(500)..Duration::from_millis(2)).contains(&waited), "{waited:?}");
    assert_eq!(space.stats().lapses, 1);
    drop(invalidate);
}

#[test]
fn c4_a_task_that_is_slow_to_be_scheduled_does_not_lapse() {
    let (space, device, micros) = with_clock(None);
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    let mut reader = Task::new(device.read_begin());
    // However often the reader is polled: it is the time that counts.
    for _ in 0..1000 {
        assert!(reader.poll().is_pending());
        micros.fetch_add(19, Ordering::SeqCst);
    }
    assert!(invalidate.is_woken(), "the future was told once");
    drop(invalidate.finish());
    assert_eq!(space.stats().lapses, 0);
    reader.finish();
}

#[test]
fn c4_a_reader_in_the_task_of_the_future_needs_no_time() {
    let (space, device, _micros) = with_clock(None);
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let flag = futures::task::waker(Arc::new(Ignore));
    let mut cx = Context::from_waker(&flag);
    let mut invalidate = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(invalidate.as_mut().poll(&mut cx).is_pending());
    let mut reader = Box::pin(device.read_begin());
    // However often it was polled while the passes were pending.
    assert!((0..50).all(|_| reader.as_mut().poll(&mut cx).is_pending()));
    gate.open();
    assert_eq!(invalidate.lapses(), 0);
    // The clock stands still. The task is polled again and again, and does not poll the future.
    let polls = (1..100).find(|_| reader.as_mut().poll(&mut cx).is_ready());
    assert!(polls.is_some_and(|polls| (4..10).contains(&polls)), "{polls:?}");
    assert_eq!(space.stats().lapses, 1);
    // One that is polled with the task has no such fate.
    device.next(Act::pass(Gate::default()));
    assert!(invalidate.as_mut().poll(&mut cx).is_pending());
    assert_eq!(invalidate.lapses(), 1);
}

/// A waker that wakes nobody, and is nobody else's.
struct Ignore;

impl futures::task::ArcWake for Ignore {
    fn wake_by_ref(_: &Arc<Self>) {}
}

#[test]
fn c4_a_clock_that_stands_still_or_fails_wedges_nobody() {
    // Without `std` there is nothing to catch its panic with.
    for fails in [false, cfg!(feature = "std")] {
        let clock = move || if fails { panic!("the clock fails") } else { Duration::from_secs(7) };
        let space = AddressSpace::builder().clock(clock).build();
        let gate = Gate::default();
        let device = space
            .insert(
                pages(0, 1),
                Device::new("device", &Log::default()).then(Act::pass(gate.clone())),
            )
            .unwrap();
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        gate.open();
        let mut reader = Task::new(device.read_begin());
        assert!((0..10_000).any(|_| reader.poll().is_ready()), "fails: {fails}");
        assert_eq!(space.stats().lapses, 1);
    }
}

#[test]
fn c4_one_waiter_looks_at_the_clock_and_another_one_takes_over_when_it_is_not_polled_any_more() {
    let (asked, micros) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (count, clock) = (asked.clone(), micros.clone());
    let clock = move || {
        count.fetch_add(1, Ordering::SeqCst);
        Duration::from_micros(clock.load(Ordering::SeqCst))
    };
    let space = AddressSpace::builder().clock(clock).build();
    let gate = Gate::default();
    let device = space
        .insert(pages(0, 1), Device::new("device", &Log::default()).then(Act::pass(gate.clone())))
        .unwrap();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    let mut readers: Vec<_> = (0..8).map(|_| Task::new(device.read_begin())).collect();
    let round = |readers: &mut [Task<_>], polls: usize| {
        let before = asked.load(Ordering::SeqCst);
        for _ in 0..polls {
            readers.iter_mut().for_each(|reader| assert!(reader.poll().is_pending()));
            micros.fetch_add(1, Ordering::SeqCst);
        }
        asked.load(Ordering::SeqCst) - before
    };
    round(&mut readers, 2);
    assert_eq!(round(&mut readers, 100), 100, "one look at the clock for each round of all eight");
    // The first one is alive, and nobody polls it any more.
    assert!(
        (100..140).contains(&round(&mut readers[1..], 200)),
        "somebody looks again, after a while"
    );
    for reader in &mut readers[1..] {
        patience(reader, &micros);
    }
    assert_eq!(space.stats().lapses, 1);
}

#[test]
fn c4_only_a_future_lapses_for_whose_range_somebody_waits_still() {
    let (space, device, micros) = with_clock(None);
    let other = space.insert(pages(9, 1), Device::new("other", &Log::default())).unwrap();
    let gate = Gate::default();
    let mut futures = [(&device, 0), (&other, 9)].map(|(device, page)| {
        device.next(Act::pass(gate.clone()));
        let mut future = Task::new(space.invalidate(pages(page, 1), Event::Unmap));
        future.expect_pending();
        future
    });
    gate.open();
    // Somebody waits for the first one and goes away.
    let mut left = Task::new(device.read_begin());
    assert!((0..10).all(|_| left.poll().is_pending()));
    drop(left);
    patience(&mut Task::new(other.read_begin()), &micros);
    assert_eq!(space.stats().lapses, 1);
    drop(futures.each_mut().map(|future| future.poll()));
    assert_eq!((device.calls(), other.calls()), (1, 2), "only the other one starts over");
}

#[test]
fn c4_a_leaked_future_wedges_nobody() {
    let (space, device, log) = one_device();
    device.next(Act::pass(Yields(100)));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(invalidate.poll().is_pending());
    invalidate.forget();
    now(device.read_begin());
    device.next(Act::pass(Yields(100)));
    let mut second = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(second.poll().is_pending());
    second.forget();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    drop(now(device.remove()));
    assert_eq!(called(&log).len(), 3);
}

#[test]
fn c4_patience_grows_with_each_lapse_of_the_same_future_up_to_a_cap() {
    let (space, device, micros) = with_clock(None);
    let mut waited = Vec::new();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    for _ in 0..8 {
        let gate = Gate::default();
        device.next(Act::pass(gate.clone()));
        invalidate.expect_pending();
        gate.open();
        waited.push(patience(&mut Task::new(device.read_begin()), &micros).as_millis());
    }
    assert_eq!(waited, [20, 40, 80, 160, 320, 640, 1000, 1000]);
}

#[test]
fn c4_only_a_held_guard_keeps_its_range_under_invalidation() {
    let (space, device, _log) = one_device();
    let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
    let mut reader = Task::new(device.read_begin());
    for _ in 0..10_000 {
        assert!(reader.poll().is_pending());
    }
    assert!(!reader.is_woken());
    drop(guard);
    reader.finish();
}

#[test]
fn c6_stalls_can_be_seen() {
    let log = Log::default();
    let time = Arc::new(Mutex::new(Duration::ZERO));
    let clock = time.clone();
    let space = AddressSpace::builder().clock(move || *clock.lock().unwrap()).build();
    let gate = Gate::default();
    let _stuck = space
        .insert(pages(0, 1), Device::new("stuck GPU", &log).then(Act::pass(gate.clone())))
        .unwrap();
    let _fine = space.insert(pages(0, 1), Device::new("fine GPU", &log)).unwrap();
    let mut invalidate = Task::new(space.invalidate(pages(0, 2), Event::Unmap));
    invalidate.expect_pending();
    *time.lock().unwrap() += Duration::from_secs(3);
    let held = now(space.invalidate(pages(7, 1), Event::Clear));
    let active = space.active();
    assert_eq!(active.len(), 2);
    assert_eq!(
        (active[0].range, active[0].event, active[0].sequence.get()),
        (pages(0, 2), Event::Unmap, 3)
    );
    assert_eq!(
        (active[0].phase, active[0].age, &active[0].pending[..]),
        (Phase::Passes, Some(Duration::from_secs(3)), &["stuck GPU".into()][..])
    );
    assert_eq!(
        (active[1].phase, active[1].age, active[1].pending.len()),
        (Phase::Held, Some(Duration::ZERO), 0)
    );
    let debug = format!("{space:?}");
    for part in ["stuck GPU", "Unmap", "0x0..=0x1fff", "sequence", "3s"] {
        assert!(debug.contains(part), "{part} is missing in {debug}");
    }
    gate.open();
    drop((invalidate.finish(), held));
}

#[test]
fn c6_an_invalidation_that_need_not_be_listed_looks_at_the_clock_when_it_starts_and_when_it_ends() {
    // A pass that yields, and without a budget one that is done at once.
    for (budget, yields) in [(usize::MAX, 0), (usize::MAX, 1), (0, 0)] {
        let looks = Arc::new(AtomicU64::new(0));
        let counted = looks.clone();
        let clock = move || Duration::from_micros(counted.fetch_add(1, Ordering::SeqCst));
        let space = AddressSpace::builder().clock(clock).pass_budget(budget).build();
        let device = Device::new("device", &Log::default()).then(Act::pass(Yields(yields)));
        let device = space.insert(pages(0, 1), device).unwrap();
        drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
        assert_eq!((device.calls(), looks.load(Ordering::SeqCst)), (1, 2), "{budget}, {yields}");
    }
}

#[test]
#[cfg(feature = "std")]
fn c6_without_a_clock_a_pending_invalidation_has_an_age_too() {
    let (space, device, _log) = one_device();
    device.next(Act::pass(Gate::default()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    let age = |space: &AddressSpace| space.active()[0].age;
    let first = age(&space);
    let later = std::iter::repeat_with(|| age(&space)).find(|later| *later > first);
    assert!(later.is_some());
}

#[test]
#[cfg(feature = "std")]
fn c6_an_invalidation_does_not_take_over_the_age_of_an_earlier_one() {
    let (space, _device, _log) = one_device();
    for page in [0, 7] {
        // The same place, with and without a hit.
        let earlier = now(space.invalidate(pages(page, 1), Event::Unmap));
        assert_eq!(space.active()[0].age, Some(Duration::ZERO));
        while space.active()[0].age == Some(Duration::ZERO) {}
        drop(earlier);
        let _later = now(space.invalidate(pages(page, 1), Event::Unmap));
        assert_eq!(space.active()[0].age, Some(Duration::ZERO), "it is timed from now on");
    }
}

#[test]
#[cfg(all(feature = "std", debug_assertions))]
fn c7_waiting_inside_a_first_pass_fails_with_the_notifiers_name() {
    let (space, device, log) = one_device();
    let reader = Arc::new(space.insert(pages(0, 1), Device::new("reader", &log)).unwrap());
    let inside = reader.clone();
    // As `block_on` does: polled again when it is woken.
    device.next(Act::Run(Box::new(move |_| _ = now(inside.read_begin()))));
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        drop(now(space.invalidate(pages(0, 1), Event::Unmap)))
    }));
    let message = *panic.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("read_begin waits inside the first pass of device"), "{message}");
    assert_eq!(space.active().len(), 0, "and the space is as usable as before");
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
}

#[test]
fn c7_c8_driver_code_may_call_back_in_a_first_pass() {
    let (space, device, log) = one_device();
    let (inner, log_of) = (space.clone(), log.clone());
    let own = space.insert(pages(0, 1), Device::new("own", &log)).unwrap();
    let drops = own.drops();
    let guard = now(space.invalidate(pages(5, 1), Event::Clear)).into_owned();
    device.next(Act::Run(Box::new(move |_| {
        let added = inner.insert(pages(0, 1), Device::new("added", &log_of)).unwrap();
        let sequence = added.sequence();
        assert!(!added.read_retry(sequence));
        assert_eq!(inner.active().len(), 2);
        drop(added.remove()); // not awaited
        drop(own); // a subscription
        drop(guard); // a guard
        let nested = Task::new(inner.invalidate(pages(30, 1), Event::Clear)).finish(); // needs no wait
        drop(nested);
        drop(inner); // and a handle
    })));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!((drops.load(Ordering::SeqCst), space.len(), space.active().len()), (1, 1, 0));
}

#[test]
fn c8_a_waker_may_call_back() {
    struct Wakes(Arc<CallsBack>);
    impl futures::task::ArcWake for Wakes {
        fn wake_by_ref(this: &Arc<Self>) {
            this.0.call();
        }
    }
    // Woken by the end of an invalidation, and by a pass.
    let (space, device, log) = one_device();
    let (calls_back, drops) = CallsBack::new(&space, &log);
    let waker = futures::task::waker(Arc::new(Wakes(calls_back)));
    let mut cx = std::task::Context::from_waker(&waker);
    let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
    let mut reader = Box::pin(device.read_begin());
    assert!(reader.as_mut().poll(&mut cx).is_pending());
    drop(guard);
    assert!(reader.as_mut().poll(&mut cx).is_ready());
    assert_eq!(drops.load(Ordering::SeqCst), 1);

    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(invalidate.as_mut().poll(&mut cx).is_pending());
    gate.open();
    assert!(invalidate.as_mut().poll(&mut cx).is_ready());
}

#[test]
fn c8_the_right_to_poll_is_tried_for_and_never_waited_for() {
    // The pass itself polls a reader of its range: it must register and return, not deadlock.
    let (space, log) = (AddressSpace::new(), Log::default());
    let device = Arc::new(space.insert(pages(0, 1), Device::new("device", &log)).unwrap());
    let inside = device.clone();
    let mut polls = 0;
    let pass = std::future::poll_fn(move |cx| {
        polls += 1;
        assert!(Task::new(inside.read_begin()).poll().is_pending());
        cx.waker().wake_by_ref();
        if polls < 5 { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    });
    device.next(Act::pass(pass));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    now(device.read_begin());
}

#[test]
fn c3_hundreds_of_abandoned_invalidations_are_found_when_one_of_them_has_ended() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let gates: Vec<_> = (0..300).map(|_| Gate::default()).collect();
    let _devices: Vec<_> = (0..)
        .zip(&gates)
        .map(|(page, gate)| {
            let device = Device::new("one of many", &log).then(Act::pass(gate.clone()));
            let device = space.insert(pages(page, 1), device).unwrap();
            Task::new(space.invalidate(pages(page, 1), Event::Unmap)).expect_pending();
            device
        })
        .collect();
    gates[0].open();
    Task::new(space.drain()).expect_pending();
    assert_eq!(space.active().len(), 299);
    gates.iter().for_each(Gate::open);
    now(space.drain());
    assert_eq!(space.active().len(), 0);
}

/// The invalidation has begun before `drain`, and its passes come to the space while `drain` polls
/// the one that it knows.
#[test]
fn c3_drain_drives_passes_that_come_to_the_space_while_it_is_polled() {
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let (known, [(begins, begun), (polls, polled), (parks, parked)]) =
        (Gate::default(), std::array::from_fn(|_| channel()));
    let insert =
        |page, act| space.insert(pages(page, 1), Device::new("device", &log).then(act)).unwrap();
    let opened = known.clone();
    let _known = insert(
        0,
        Act::pass(async move {
            opened.await;
            polls.send(()).unwrap();
            parked.recv().unwrap();
        }),
    );
    let _begins = insert(
        1,
        Act::Run(Box::new(move |_| {
            begins.send(()).unwrap();
            polled.recv().unwrap();
        })),
    );
    let _comes = insert(1, Act::pass(gate.clone()));
    Task::new(space.invalidate(pages(0, 1), Event::Unmap)).expect_pending();
    let inside = space.clone();
    let other = std::thread::spawn(move || {
        Task::new(inside.invalidate(pages(1, 1), Event::Unmap)).expect_pending();
        parks.send(()).unwrap();
    });
    begun.recv().unwrap();
    known.open();
    let mut drain = Task::new(space.drain());
    drain.expect_pending();
    other.join().unwrap();
    gate.open();
    drain.finish();
    assert_eq!(space.active().len(), 0);
}

#[test]
fn the_last_handles_may_go_in_any_order() {
    let (space, device, _log) = one_device();
    let (gate, drops) = (Gate::default(), device.drops());
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap).into_owned());
    invalidate.expect_pending();
    drop((space, device));
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    drop(invalidate);
    assert_eq!(drops.load(Ordering::SeqCst), 1, "abandoned passes go with the space");
}

/// Calls everything that needs no wait, as driver code may from anywhere (C8).
struct CallsBack {
    space: AddressSpace,
    log: Log,
    subscription: Mutex<Option<shootdown::Subscription<Device>>>,
    guard: Mutex<Option<shootdown::InvalidationGuard<'static>>>,
}

impl CallsBack {
    fn new(space: &AddressSpace, log: &Log) -> (Arc<Self>, Arc<std::sync::atomic::AtomicUsize>) {
        let subscription = space.insert(pages(0, 1), Device::new("goes away", log)).unwrap();
        let drops = subscription.drops();
        let guard = now(space.invalidate(pages(50, 1), Event::Clear)).into_owned();
        let (subscription, guard) = (Mutex::new(Some(subscription)), Mutex::new(Some(guard)));
        (Arc::new(Self { space: space.clone(), log: log.clone(), subscription, guard }), drops)
    }

    fn call(&self) {
        let added = self.space.insert(pages(0, 1), Device::new("added", &self.log)).unwrap();
        assert!(!added.read_retry(added.sequence()));
        drop(added.remove());
        assert!(!format!("{:?}", self.space).is_empty());
        drop(self.subscription.lock().unwrap().take());
        drop(self.guard.lock().unwrap().take());
        drop(now(self.space.invalidate(pages(60, 1), Event::Clear)));
        drop(self.space.try_invalidate(pages(61, 1), Event::Clear));
    }
}

impl Drop for CallsBack {
    fn drop(&mut self) {
        self.call();
    }
}

#[test]
fn c8_a_pass_may_call_back_when_it_is_polled_and_when_it_is_dropped() {
    for polls in [0, 3] {
        let (space, device, log) = one_device();
        let (calls_back, drops) = CallsBack::new(&space, &log);
        device.next(Act::pass(async move {
            calls_back.call();
            Yields(polls).await;
            calls_back.call();
            // And once more in its drop.
        }));
        drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
        assert_eq!((drops.load(Ordering::SeqCst), space.len(), space.active().len()), (1, 1, 0));
    }
}

#[test]
fn c8_a_notifier_may_call_back_when_it_is_dropped() {
    struct Last(Arc<CallsBack>);
    impl shootdown::IntervalNotifier for Last {
        fn invalidate(
            &self,
            invalidation: &shootdown::Invalidation<'_>,
        ) -> Result<Option<shootdown::PassFuture>, shootdown::WouldBlock> {
            invalidation.set_seq();
            Ok(None)
        }
    }
    impl Drop for Last {
        fn drop(&mut self) {
            self.0.call();
        }
    }
    let (space, _device, log) = one_device();
    let (calls_back, drops) = CallsBack::new(&space, &log);
    let subscription = space.insert(pages(0, 1), Last(calls_back)).unwrap();
    let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
    drop(subscription);
    assert_eq!(drops.load(Ordering::SeqCst), 0, "the invalidation still covers it");
    drop(guard);
    assert_eq!((drops.load(Ordering::SeqCst), space.len(), space.active().len()), (1, 1, 0));
}

#[test]
fn c8_the_last_handle_of_a_space_may_go_inside_a_callback() {
    // In a first pass, in a pass, and in the drop of a pass; of another space, since the caller's
    // future borrows its own.
    for place in 0..3 {
        let (space, device, _log) = one_device();
        let (other, others_device, _log) = one_device();
        let mut abandoned = Task::new(other.invalidate(pages(0, 1), Event::Unmap).into_owned());
        others_device.next(Act::pass(Gate::default()));
        abandoned.expect_pending();
        let last = (abandoned, others_device, other);
        match place {
            0 => device.next(Act::Run(Box::new(move |_| drop(last)))),
            1 => device.next(Act::pass(async move {
                Yields(2).await;
                drop(last);
            })),
            _ => device.next(Act::pass(async move {
                let _last = last;
                Yields(2).await;
            })),
        }
        drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
        assert_eq!(space.active().len(), 0);
    }
}

/// asomers/futures-locks #1, #2, #3: effects before the first poll; made in one order, awaited in
/// another.
#[test]
fn c1_report_18_invalidations_take_effect_in_the_order_in_which_they_are_polled() {
    let (space, device, log) = one_device();
    let sequence = || space.sequence().get();
    let before = sequence();
    let (a, b) =
        (space.invalidate(pages(0, 1), Event::Clear), space.invalidate(pages(0, 1), Event::Unmap));
    drop(now(b));
    drop(now(a));
    let events: Vec<_> = log.lock().unwrap().iter().map(|(_, info)| info.event).collect();
    assert_eq!((events, sequence()), (vec![Event::Unmap, Event::Clear], before + 4));
    // Never polled, it has never been.
    let a = space.invalidate(pages(0, 1), Event::Clear);
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    drop(a);
    assert_eq!((device.calls(), sequence(), space.stats().invalidations), (3, before + 6, 3));
}
