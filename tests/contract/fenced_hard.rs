//! L5, where it is hard: passes that nobody has polled, fences inside of fences, many
//! subscriptions, everything at once.
use crate::support::*;
use shootdown::{
    AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, RangeSet, Subscription,
    Timeline, WouldBlock,
};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Instant;

/// A pass that never ends, and notes its polls and its drop.
#[derive(Clone, Default)]
struct Seen {
    polls: Arc<AtomicUsize>,
    drops: Arc<AtomicUsize>,
}

impl Seen {
    fn pass(&self, on_drop: impl FnOnce() + Send + 'static) -> PassFuture {
        struct Hangs<F: FnOnce()>(Seen, Option<F>);
        impl<F: FnOnce()> Drop for Hangs<F> {
            fn drop(&mut self) {
                self.0.drops.fetch_add(1, Ordering::SeqCst);
                self.1.take().unwrap()();
            }
        }
        let held = Hangs(self.clone(), Some(on_drop));
        PassFuture::new(std::future::poll_fn(move |_| {
            held.0.polls.fetch_add(1, Ordering::SeqCst);
            Poll::Pending
        }))
    }

    fn counts(&self) -> (usize, usize) {
        (self.polls.load(Ordering::SeqCst), self.drops.load(Ordering::SeqCst))
    }
}

fn device(space: &AddressSpace, name: &'static str, act: Act) -> Subscription<Device> {
    space.insert(pages(0, 1), Device::new(name, &Log::default()).then(act)).unwrap()
}

/// A budget of one: the pass of `dead` waits for its first poll, and that of another device is
/// awaited alone.
fn deferred(act: Act) -> (AddressSpace, Subscription<Device>, Subscription<Device>, Gate) {
    let (space, gate) = (AddressSpace::builder().pass_budget(1).build(), Gate::default());
    let dead = device(&space, "dead", act);
    let other = device(&space, "other", Act::pass(gate.clone()));
    (space, dead, other, gate)
}

#[test]
fn l5_who_removes_a_dead_device_does_not_wait_for_another_one() {
    let seen = Seen::default();
    let (space, dead, _other, _gate) = deferred(Act::Pass(seen.pass(|| {})));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    assert_eq!(dead.fence(), 1);
    assert_eq!(seen.counts(), (0, 1), "it is dropped");
    let pending = space.active()[0].pending.clone();
    let mut removal = Task::new(dead.remove());
    assert!(
        removal.run().is_ready(),
        "the removal of a dead device waits for another one; listed as pending: {pending:?}"
    );
}

#[test]
fn l5_a_pass_that_was_not_polled_is_not_polled_after_the_fence() {
    let seen = Seen::default();
    let (space, dead, other, gate) = deferred(Act::Pass(seen.pass(|| {})));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    // A reader drives the other pass: then the invalidation waits for its caller.
    let mut reader = Task::new(other.read_begin());
    let _ = reader.poll();
    dead.fence();
    drop(invalidate.finish());
    assert_eq!(seen.counts(), (0, 1), "polls and drops");
}

#[test]
fn l5_a_pass_that_was_not_polled_is_dropped_although_nobody_claims_its_invalidation() {
    let seen = Seen::default();
    let (space, dead, other, gate) = deferred(Act::Pass(seen.pass(|| {})));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    let mut reader = Task::new(other.read_begin());
    let _ = reader.poll();
    dead.fence();
    assert_eq!(seen.counts(), (0, 1), "polls and drops");
    let mut removal = Task::new(dead.remove());
    assert!(removal.poll().is_ready(), "nobody waits for a dead device");
}

#[test]
fn l5_a_pass_of_a_device_that_is_fenced_in_its_first_pass_is_polled_once_at_most() {
    struct Fenced(Arc<OnceLock<Subscription<Fenced>>>, Seen);
    impl IntervalNotifier for Fenced {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            self.0.get().unwrap().fence();
            Ok(Some(self.1.pass(|| {})))
        }
    }
    let (space, itself, seen) = (AddressSpace::new(), Arc::new(OnceLock::new()), Seen::default());
    let driver = Fenced(itself.clone(), seen.clone());
    assert!(itself.set(space.insert(pages(0, 1), driver).unwrap()).is_ok());
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(seen.counts(), (1, 1), "it is polled once at most, and dropped");
}

#[test]
fn f1_the_drop_of_an_unpolled_pass_that_panics_at_a_fence_hits_no_reader() {
    let seen = Seen::default();
    let (space, dead, other, gate) = deferred(Act::Pass(seen.pass(|| panic!("the drop fails"))));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    // Abandoned: its passes are the space's.
    drop(invalidate);
    dead.fence();
    assert_eq!(seen.counts(), (0, 1));
    gate.open();
    let read = catch_unwind(AssertUnwindSafe(|| now(other.read_begin())));
    // What the budget had for the dead device is there again.
    let gate = Gate::default();
    let first = device(&space, "first", Act::pass(gate.clone()));
    let second = device(&space, "second", Act::Finish);
    drop(dead);
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    let called = [first.calls(), second.calls()];
    assert!(
        read.is_ok() && called == [1, 1],
        "in a reader: {:?}; calls with a budget of one: {called:?}",
        read.err().and_then(|panic| panic.downcast_ref::<&str>().copied())
    );
    assert_eq!(space.stats().lost_panics, 1);
}

#[test]
fn l5_a_fence_in_a_drop_at_a_fence_ends_passes_too() {
    let (space, second_dead) =
        (AddressSpace::new(), Arc::new(OnceLock::<Subscription<Device>>::new()));
    let (seen, other_seen) = (Seen::default(), Seen::default());
    let inner = second_dead.clone();
    assert!(second_dead.set(device(&space, "second", Act::Pass(other_seen.pass(|| {})))).is_ok());
    let first =
        device(&space, "first", Act::Pass(seen.pass(move || _ = inner.get().unwrap().fence())));
    assert!(space.try_invalidate(pages(0, 1), Event::Unmap).is_err());
    first.fence();
    assert_eq!(seen.counts().1, 1);
    assert_eq!(
        other_seen.counts().1,
        1,
        "the second is dropped as soon as the fence of the first gives the passes back"
    );
    assert!(space.active().is_empty(), "{:?}", space.active());
}

#[test]
fn l5_a_pass_that_fences_its_device_in_a_later_poll_makes_a_non_blockable_invalidation_go_on() {
    let (space, itself) = (AddressSpace::new(), Arc::new(OnceLock::<Subscription<Device>>::new()));
    let inner = itself.clone();
    let mut polls = 0;
    let pass = PassFuture::new(std::future::poll_fn(move |cx| {
        polls += 1;
        if polls == 2 {
            inner.get().unwrap().fence();
        } else {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }));
    assert!(itself.set(device(&space, "dead", Act::Pass(pass))).is_ok());
    assert!(space.try_invalidate(pages(0, 1), Event::Unmap).is_ok(), "{:?}", space.active());
}

/// Many subscriptions of one device that is reset.
#[test]
fn l5_the_fence_of_a_device_with_many_subscriptions_takes_time_in_proportion() {
    let time = |count: usize| {
        let space = AddressSpace::new();
        let dead: Vec<_> =
            (0..count).map(|_| device(&space, "dead", Act::pass(std::future::pending()))).collect();
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        let began = Instant::now();
        assert_eq!(space.fence(dead.iter().map(Subscription::id)), count);
        let took = began.elapsed();
        drop(invalidate.finish());
        took
    };
    // With a search for each, 8 times as many take 64 times as long in each try. One try may meet
    // other work of the machine.
    let tries: Vec<_> = (0..5).map(|_| (time(500), time(4000))).collect();
    assert!(tries.iter().any(|(few, many)| *many < *few * 24), "8 times as many: {tries:?}");
}

/// Threads that invalidate, read, fence, insert and remove at once: nobody waits for ever.
#[test]
fn l5_w4_nobody_waits_for_ever_whoever_is_fenced_meanwhile() {
    struct Gpu(Timeline, AtomicUsize, usize);
    impl IntervalNotifier for Gpu {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            let call = self.1.fetch_add(1, Ordering::Relaxed);
            Ok(match (call + self.2) % 4 {
                0 => None,
                1 => Some(PassFuture::new(Yields(3))),
                2 => Some(PassFuture::new(self.0.reached(self.0.value() + 1))),
                _ if self.2 % 2 == 1 => Some(PassFuture::new(std::future::pending())),
                _ => Some(PassFuture::new(self.0.reached(self.0.value() + 2))),
            })
        }
    }
    for budget in [None, Some(0), Some(2)] {
        let builder = AddressSpace::builder();
        let space =
            if let Some(budget) = budget { builder.pass_budget(budget) } else { builder }.build();
        let (timeline, stop) =
            (Timeline::new(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let until = Instant::now() + std::time::Duration::from_millis(300);
        let rounds = AtomicUsize::new(0);
        std::thread::scope(|threads| {
            let device = threads.spawn({
                let (timeline, stop) = (timeline.clone(), stop.clone());
                move || {
                    let mut number = 0;
                    while !stop.load(Ordering::SeqCst) {
                        number += 1;
                        timeline.signal(number);
                        std::thread::yield_now();
                    }
                    timeline.signal(u64::MAX);
                }
            });
            let mut workers = Vec::new();
            // Drivers of devices that die.
            for driver in 0..3 {
                let (space, timeline, rounds) = (&space, &timeline, &rounds);
                workers.push(threads.spawn(move || {
                    while Instant::now() < until {
                        let gpu = space
                            .insert(
                                pages(driver as u64 * 2, 3),
                                Gpu(timeline.clone(), AtomicUsize::new(0), driver),
                            )
                            .unwrap();
                        for _ in 0..50 {
                            std::thread::yield_now();
                        }
                        gpu.fence();
                        gpu.read_begin().wait();
                        gpu.remove().wait();
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                }));
            }
            for kind in 0..4 {
                let (space, rounds) = (&space, &rounds);
                workers.push(threads.spawn(move || {
                    let set = RangeSet::new([pages(0, 1), pages(3, 1), pages(6, 2)]).unwrap();
                    while Instant::now() < until {
                        match kind {
                            0 => drop(space.invalidate(pages(1, 4), Event::Unmap).wait()),
                            1 => drop(space.invalidate_all(set.clone(), Event::Unmap).wait()),
                            2 => drop(space.try_invalidate(pages(0, 8), Event::Unmap)),
                            _ => {
                                let mut given_up =
                                    Task::new(space.invalidate_all(set.clone(), Event::Unmap));
                                let _ = given_up.poll();
                                drop(given_up);
                                space.drain().wait();
                            }
                        }
                        rounds.fetch_add(1, Ordering::Relaxed);
                        // Else what is abandoned piles up, and few are fenced.
                        let began = Instant::now();
                        while began.elapsed() < std::time::Duration::from_micros(300) {
                            std::thread::yield_now();
                        }
                    }
                }));
            }
            let end = until + std::time::Duration::from_secs(8);
            while workers.iter().any(|worker| !worker.is_finished()) {
                if Instant::now() > end {
                    // The threads that hang could not be joined.
                    let _ = writeln!(
                        std::io::stderr(),
                        "with a budget of {budget:?} somebody waits for ever: {:?}",
                        space.active()
                    );
                    std::process::exit(99);
                }
                std::thread::yield_now();
            }
            stop.store(true, Ordering::SeqCst);
            device.join().unwrap();
        });
        assert!(rounds.load(Ordering::SeqCst) > 0);
        space.drain().wait();
        assert!(space.active().is_empty() && space.stats().lost_panics == 0);
    }
}

/// Whatever is started, fenced, given up and polled in whatever order: all of it ends, and the
/// budget is whole again.
#[test]
fn l5_everything_ends_in_any_order() {
    for seed in 1..=1000_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let budget = random(4) as usize;
        let builder = AddressSpace::builder();
        let space = if budget == 3 { builder } else { builder.pass_budget(budget) }.build();
        let log = Log::default();
        let mut gates = Vec::new();
        let mut devices = Vec::new();
        let mut invalidations = Vec::new();
        let mut removals = Vec::new();
        for _ in 0..40 {
            match random(10) {
                0 | 1 => {
                    let device = Device::new("device", &log);
                    for _ in 0..random(4) {
                        let gate = Gate::default();
                        device.next(if random(4) == 0 {
                            Act::pass(Yields(random(4) as u32))
                        } else {
                            Act::pass(gate.clone())
                        });
                        gates.push(gate);
                    }
                    devices.push(space.insert(pages(random(6), 1 + random(3)), device).unwrap());
                }
                2 | 3 => {
                    let set =
                        RangeSet::new((0..1 + random(3)).map(|_| pages(random(8), 1))).unwrap();
                    let invalidate = space.invalidate_all(set, Event::Unmap);
                    let mut task =
                        Task::new(if random(4) == 0 { invalidate.late() } else { invalidate });
                    match task.poll() {
                        Poll::Ready(guard) => drop(guard),
                        Poll::Pending => invalidations.push(task),
                    }
                }
                4 => drop(space.try_invalidate(pages(random(6), 2), Event::Unmap)),
                5 if !gates.is_empty() => {
                    gates.swap_remove(random(gates.len() as u64) as usize).open()
                }
                6 if !devices.is_empty() => {
                    let device = devices.swap_remove(random(devices.len() as u64) as usize);
                    device.fence();
                    removals.push(Task::new(device.remove()));
                }
                7 if !invalidations.is_empty() => {
                    drop(invalidations.swap_remove(random(invalidations.len() as u64) as usize))
                }
                8 if !invalidations.is_empty() => {
                    let at = random(invalidations.len() as u64) as usize;
                    if let Poll::Ready(guard) = invalidations[at].poll() {
                        drop(guard);
                        invalidations.swap_remove(at);
                    }
                }
                9 if !devices.is_empty() => {
                    let at = random(devices.len() as u64) as usize;
                    let _ = Task::new(devices[at].read_begin()).poll();
                }
                _ => {}
            }
        }
        gates.iter().for_each(Gate::open);
        let mut left = true;
        while std::mem::take(&mut left) {
            for task in &mut invalidations {
                if task.is_woken() {
                    left = true;
                    let _ = task.run();
                }
            }
            invalidations.retain(|task| !task.is_done());
        }
        assert!(invalidations.is_empty(), "seed {seed}: {:?}", space.active());
        removals.iter_mut().for_each(|removal| drop(removal.finish()));
        now(space.drain());
        assert!(space.active().is_empty(), "seed {seed}: {:?}", space.active());
        devices.clear();
        if budget == 3 {
            continue;
        }
        let fresh: Vec<_> = (0..budget).map(|_| Gate::default()).collect();
        let slow = |gate: &Gate| device(&space, "slow", Act::pass(gate.clone()));
        let _slow: Vec<_> = fresh.iter().map(slow).collect();
        let _ = Task::new(space.invalidate(pages(0, 1), Event::Unmap)).run();
        assert!(
            fresh.iter().all(Gate::is_waited_for),
            "seed {seed}: the budget of {budget} has lost some"
        );
        fresh.iter().for_each(Gate::open);
    }
}
