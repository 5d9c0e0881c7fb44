//! L5: a device that is cut off holds up nobody.
use crate::support::*;
use shootdown::{
    AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, Subscription, WouldBlock,
};
use std::borrow::Cow;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::Poll;

/// Three devices on page 0, the second of which hangs. The others' devices take until their gates
/// are opened.
fn three(space: &AddressSpace) -> ([Subscription<Device>; 3], [Gate; 3]) {
    let gates = [Gate::default(), Gate::default(), Gate::default()];
    let log = Log::default();
    let device = |at: usize, name| {
        space
            .insert(pages(0, 1), Device::new(name, &log).then(Act::pass(gates[at].clone())))
            .unwrap()
    };
    ([device(0, "left"), device(1, "dead"), device(2, "right")], gates)
}

#[test]
fn l5_everybody_goes_on_when_a_dead_device_is_fenced_and_it_is_counted_and_reported() {
    let reports = Arc::new(Mutex::new(Vec::new()));
    let told = reports.clone();
    let space = AddressSpace::builder()
        .on_report(move |report| told.lock().unwrap().push(report.to_string()))
        .build();
    let ([left, dead, right], gates) = three(&space);
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gates[0].open();
    gates[2].open();
    invalidate.expect_pending();
    let active = &space.active()[0];
    assert_eq!(
        (&active.pending[..], &active.pending_ids[..]),
        (&["dead".into()][..], &[dead.id()][..])
    );
    assert_ne!(left.id(), right.id());
    let mut reader = Task::new(left.read_begin());
    reader.expect_pending();
    assert_eq!(dead.fence(), 1);
    assert!(invalidate.is_woken(), "the fence polls nobody else's passes, and wakes who waits");
    drop(invalidate.finish());
    reader.finish();
    assert!(space.active().is_empty() && dead.is_closed());
    assert!(dead.read_retry(dead.sequence()), "nothing can be installed any more");
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!([left.calls(), dead.calls(), right.calls()], [2, 1, 2]);
    assert_eq!((dead.fence(), space.stats().fences), (0, 1), "again is nothing");
    let reports = reports.lock().unwrap();
    assert_eq!(reports.len(), 1);
    assert!(
        reports[0].contains("dead was fenced off") && reports[0].contains("1 of its passes"),
        "{reports:?}"
    );
    assert_eq!(now(dead.remove()).name, "dead");
}

#[test]
fn l5_a_fence_by_id_closes_devices_that_have_nothing_pending_too() {
    let (space, device, log) = one_device();
    let other = space.insert(pages(0, 1), Device::new("other", &log)).unwrap();
    assert_eq!(space.fence([device.id(), device.id()]), 0);
    assert!(device.is_closed() && device.read_retry(device.sequence()) && !other.is_closed());
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!((called(&log), space.stats().fences), (vec!["other"], 1));
}

#[test]
fn l5_devices_are_fenced_by_their_ids_and_each_once() {
    let space = AddressSpace::new();
    let ([left, dead, right], gates) = three(&space);
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    assert_eq!(left.fence(), 1);
    assert_eq!(space.fence([left.id(), dead.id()]), 1, "passes that were pending still");
    assert_eq!([left.is_closed(), dead.is_closed(), right.is_closed()], [true, true, false]);
    assert_eq!((space.fence([dead.id()]), space.stats().fences), (0, 2), "again is nothing");
    invalidate.expect_pending();
    gates[2].open();
    drop(invalidate.finish());
    let [left, dead] = [left, dead].map(Subscription::remove).map(now);
    assert_eq!([left.name, dead.name], ["left", "dead"]);
}

#[test]
fn l5_passes_of_other_devices_are_still_woken_when_one_is_cut_out_from_among_them() {
    for order in [[0, 2], [2, 0]] {
        let space = AddressSpace::new();
        let ([_left, dead, _right], gates) = three(&space);
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        dead.fence();
        invalidate.expect_pending();
        for gate in order {
            invalidate.expect_pending();
            gates[gate].open();
        }
        drop(invalidate.finish());
    }
}

#[test]
fn l5_what_was_abandoned_ends_and_a_removal_goes_on() {
    let space = AddressSpace::new();
    let ([left, dead, _right], gates) = three(&space);
    assert!(space.try_invalidate(pages(0, 1), Event::Unmap).is_err());
    gates[0].open();
    gates[2].open();
    let mut drain = Task::new(space.drain());
    drain.expect_pending();
    dead.fence();
    drain.finish();
    assert!(space.active().is_empty());
    now(left.read_begin());
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    drop(invalidate.finish());
    now(dead.remove());
}

#[test]
fn l5_a_removal_that_waits_for_a_dead_device_goes_on() {
    let space = AddressSpace::new();
    let ([_left, dead, _right], _gates) = three(&space);
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    let mut close = Task::new(dead.close());
    close.expect_pending();
    dead.fence();
    close.finish();
    invalidate.expect_pending();
}

#[test]
fn l5_a_space_fences_those_that_are_named_and_says_how_many_passes_were_pending() {
    let space = AddressSpace::new();
    let ([left, dead, right], gates) = three(&space);
    let gone = space.insert(pages(0, 1), Device::new("gone", &Log::default())).unwrap().id();
    assert_eq!(space.fence([gone]), 0, "nobody has this id any more");
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    assert_eq!(space.fence([right.id(), gone, dead.id()]), 2);
    invalidate.expect_pending();
    gates[0].open();
    drop(invalidate.finish());
    assert_eq!([&left, &dead, &right].map(Subscription::is_closed), [false, true, true]);
    assert_eq!(space.fence([right.id(), dead.id()]), 0, "again is nothing");
}

#[test]
fn l5_a_fence_takes_from_the_queue_of_an_inbox_what_it_ends() {
    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 1), ()).unwrap();
    let other = space.inbox(pages(0, 1), ()).unwrap();
    let mut invalidates = [0; 2].map(|_| Task::new(space.invalidate(pages(0, 1), Event::Unmap)));
    invalidates.iter_mut().for_each(Task::expect_pending);
    let taken = now(inbox.recv()).unwrap();
    assert_eq!((inbox.queued(), space.fence([inbox.id()])), (1, 2));
    assert_eq!((inbox.queued(), other.queued()), (0, 2));
    drop(taken); // too late to be delivered again
    assert_eq!(inbox.queued(), 0);
    let mut next = Task::new(inbox.recv());
    next.expect_pending();
    for _ in 0..2 {
        now(other.recv()).unwrap().done();
    }
    invalidates.iter_mut().for_each(|invalidate| drop(invalidate.finish()));
    now(inbox.close());
    assert!(next.finish().is_none(), "the stream ends");
}

/// Fences itself where it is told to.
struct Suicidal {
    itself: Arc<OnceLock<Subscription<Suicidal>>>,
    in_first_pass: bool,
}

impl IntervalNotifier for Suicidal {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let itself = self.itself.clone();
        if self.in_first_pass {
            itself.get().unwrap().fence();
        }
        Ok(Some(PassFuture::new(std::future::poll_fn(move |_| {
            itself.get().unwrap().fence();
            Poll::Pending
        }))))
    }

    fn name(&self) -> Cow<'static, str> {
        "suicidal".into()
    }
}

#[test]
fn l5_a_driver_may_fence_itself_in_its_first_pass_and_in_its_pass() {
    for in_first_pass in [false, true] {
        for blockable in [false, true] {
            let space = AddressSpace::new();
            let itself = Arc::new(OnceLock::new());
            let driver = Suicidal { itself: itself.clone(), in_first_pass };
            assert!(itself.set(space.insert(pages(0, 1), driver).unwrap()).is_ok());
            if blockable {
                drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
            } else {
                drop(space.try_invalidate(pages(0, 1), Event::Unmap).unwrap());
            }
            assert_eq!((space.stats().fences, space.active().len()), (1, 0));
        }
    }
}

#[test]
fn l5_in_a_late_invalidation_too() {
    let space = AddressSpace::new();
    let ([_left, dead, _right], gates) = three(&space);
    dead.fence();
    gates.iter().for_each(Gate::open);
    drop(now(space.invalidate(pages(0, 1), Event::Unmap).late()));
    let space = AddressSpace::new();
    let ([_left, dead, _right], gates) = three(&space);
    let mut late = Task::new(space.invalidate(pages(0, 1), Event::Unmap).late());
    late.expect_pending();
    gates[0].open();
    gates[2].open();
    dead.fence();
    drop(late.finish());
}

#[test]
fn l5_the_pass_budget_gets_back_what_a_dead_device_had_of_it() {
    for budget in [0, 1, 2] {
        let space = AddressSpace::builder().pass_budget(budget).build();
        let ([_left, dead, _right], gates) = three(&space);
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        gates[0].open();
        invalidate.expect_pending();
        dead.fence();
        invalidate.expect_pending();
        gates[2].open();
        drop(invalidate.finish());
        // As many may be pending as before.
        let log = Log::default();
        let gates: Vec<_> = (0..budget).map(|_| Gate::default()).collect();
        let slow = |gate: &Gate| {
            space
                .insert(pages(0, 1), Device::new("slow", &log).then(Act::pass(gate.clone())))
                .unwrap()
        };
        let _slow: Vec<_> = gates.iter().map(slow).collect();
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        let _ = invalidate.run();
        assert!(gates.iter().all(Gate::is_waited_for), "with a budget of {budget}");
    }
}

#[cfg(feature = "std")]
#[test]
fn l5_a_panic_in_the_drop_of_a_pass_is_the_callers_of_the_invalidation() {
    struct Fails(Gate);
    impl Drop for Fails {
        fn drop(&mut self) {
            assert!(self.0.is_open(), "the drop fails");
        }
    }
    let (space, log) = (AddressSpace::new(), Log::default());
    let fails = Fails(Gate::default());
    let pass = async move {
        let fails = fails;
        std::future::pending::<()>().await;
        drop(fails);
    };
    let dead = space.insert(pages(0, 1), Device::new("dead", &log).then(Act::pass(pass))).unwrap();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    assert_eq!(dead.fence(), 1);
    let polled =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(invalidate.finish())));
    let panic = polled.unwrap_err();
    assert!(panic.downcast_ref::<&str>().is_some_and(|panic| panic.contains("the drop fails")));
    assert!(space.active().is_empty());
    assert_eq!(space.stats().lost_panics, 0);
}

#[test]
fn l5_of_many_ranges_only_the_dead_device_is_cut() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let gates = [Gate::default(), Gate::default()];
    let dead = space
        .insert(pages(0, 1), Device::new("dead", &log).then(Act::pass(gates[0].clone())))
        .unwrap();
    let well = space
        .insert(pages(9, 1), Device::new("well", &log).then(Act::pass(gates[1].clone())))
        .unwrap();
    let set = shootdown::RangeSet::new([pages(0, 1), pages(9, 1)]).unwrap();
    let mut invalidate = Task::new(space.invalidate_all(set, Event::Unmap));
    invalidate.expect_pending();
    dead.fence();
    invalidate.expect_pending();
    gates[1].open();
    drop(invalidate.finish());
    assert!(!well.is_closed());
}
