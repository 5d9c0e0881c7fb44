use crate::support::*;
use shootdown::{AddressSpace, Event, Report, WouldBlock};
use std::sync::{Arc, Mutex};
use std::task::Poll;

#[test]
fn b1_a_refusal_in_a_blockable_invalidation_is_reported_and_the_others_go_on() {
    let (reports, log) = (Arc::new(Mutex::new(Vec::new())), Log::default());
    let reported = reports.clone();
    let space = AddressSpace::builder()
        .on_report(move |report| match report {
            Report::RefusedBlockable { notifier, range, event } => {
                reported.lock().unwrap().push((String::from(*notifier), *range, *event));
            }
            _ => panic!("no such report is expected"),
        })
        .build();
    let _bad = space.insert(pages(0, 1), Device::new("bad", &log).then(Act::Refuse)).unwrap();
    let _good = space.insert(pages(0, 1), Device::new("good", &log)).unwrap();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(called(&log), ["bad", "good"]);
    assert_eq!(*reports.lock().unwrap(), [("bad".into(), pages(0, 1), Event::Unmap)]);
    assert_eq!(space.stats().refused_blockable, 1);
}

#[test]
fn b2_a_refusal_stops_further_first_passes_and_what_was_started_runs_to_its_end() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let polls = Arc::new(Mutex::new(0));
    let counted = polls.clone();
    let pass = async move {
        Yields(3).await;
        *counted.lock().unwrap() += 1;
    };
    let first =
        space.insert(pages(0, 1), Device::new("first", &log).then(Act::pass(pass))).unwrap();
    let second = space.insert(pages(0, 1), Device::new("second", &log).then(Act::Refuse)).unwrap();
    let third = space.insert(pages(0, 1), Device::new("third", &log)).unwrap();
    let before = now(second.read_begin());
    assert_eq!(space.try_invalidate(pages(0, 1), Event::Unmap).map(drop), Err(WouldBlock));
    assert_eq!(called(&log), ["first", "second"]);
    assert_eq!((*polls.lock().unwrap(), space.active().len(), space.sequence().get()), (1, 0, 4));
    assert!(!second.read_retry(before), "the one that refused was left alone");
    assert_eq!(numbers([first.sequence(), third.sequence()]), [3, 1]);
    drop(space.try_invalidate(pages(0, 1), Event::Unmap).unwrap());
}

#[test]
fn b3_a_pass_that_stays_pending_goes_to_the_space_and_the_range_stays_under_invalidation() {
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    assert_eq!(space.try_invalidate(pages(0, 1), Event::Unmap).map(drop), Err(WouldBlock));
    let active = space.active();
    assert!(active.len() == 1 && active[0].abandoned && !active[0].blockable);
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    gate.open();
    reader.finish();
    assert_eq!(space.active().len(), 0);
}

#[test]
fn b3_a_pass_that_wakes_itself_for_ever_does_not_hold_the_caller() {
    let (space, device, _log) = one_device();
    device.next(Act::pass(Yields(u32::MAX)));
    assert_eq!(space.try_invalidate(pages(0, 1), Event::Unmap).map(drop), Err(WouldBlock));
    device.next(Act::pass(Yields(20)));
    assert!(
        space.try_invalidate(pages(0, 1), Event::Unmap).is_ok(),
        "one that needs 20 turns gets them"
    );
}

#[test]
fn b4_a_budget_of_zero_is_the_kernel_before_the_patch() {
    let log = Log::default();
    let space = AddressSpace::builder().pass_budget(0).build();
    let gates = [Gate::default(), Gate::default(), Gate::default()];
    let names = ["0", "1", "2"];
    let device = |id: usize| Device::new(names[id], &log).then(Act::pass(gates[id].clone()));
    let devices: Vec<_> = (0..3).map(|id| space.insert(pages(0, 1), device(id)).unwrap()).collect();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    for (id, gate) in gates.iter().enumerate() {
        invalidate.expect_pending();
        assert_eq!(called(&log), [names[id]], "one after the other");
        gate.open();
    }
    let guard = invalidate.finish();
    assert_eq!(guard.sequence().get(), 3);
    assert!(
        devices.iter().all(|device| device.sequence().get() == 3),
        "the same values as with many passes"
    );
}

#[test]
fn b4_a_budget_of_two_lets_two_passes_be_pending_and_says_so_beforehand() {
    let log = Log::default();
    let space = AddressSpace::builder().pass_budget(2).build();
    let may_defer = Arc::new(Mutex::new(Vec::new()));
    let gates = [Gate::default(), Gate::default(), Gate::default(), Gate::default()];
    let devices: Vec<_> = gates
        .iter()
        .map(|gate| {
            let (may_defer, gate) = (may_defer.clone(), gate.clone());
            space.insert(pages(0, 1), Ask { may_defer, gate, log: log.clone() }).unwrap()
        })
        .collect();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    assert_eq!(*may_defer.lock().unwrap(), [true, true, false]);
    assert!(
        !gates[0].is_waited_for() && gates[2].is_waited_for(),
        "O2: only the third is awaited before the fourth is called"
    );
    gates[2].open();
    invalidate.expect_pending();
    assert_eq!(*may_defer.lock().unwrap(), [true, true, false, false]);
    gates[3].open();
    invalidate.expect_pending();
    gates[0].open();
    gates[1].open();
    drop(invalidate.finish());
    may_defer.lock().unwrap().clear();
    gates.iter().for_each(Gate::open);
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(*may_defer.lock().unwrap(), [true, true, false, false], "the budget was given back");
    drop(devices);
}

struct Ask {
    may_defer: Arc<Mutex<Vec<bool>>>,
    gate: Gate,
    log: Log,
}

impl shootdown::IntervalNotifier for Ask {
    fn invalidate(
        &self,
        invalidation: &shootdown::Invalidation<'_>,
    ) -> Result<Option<shootdown::PassFuture>, WouldBlock> {
        self.log.lock().unwrap().push(("ask", invalidation.info()));
        self.may_defer.lock().unwrap().push(invalidation.may_defer());
        invalidation.set_seq();
        Ok(Some(shootdown::PassFuture::new(self.gate.clone())))
    }
}

#[test]
fn b4_dropped_between_two_first_passes_the_started_passes_still_complete() {
    let log = Log::default();
    let space = AddressSpace::builder().pass_budget(1).build();
    let gates = [Gate::default(), Gate::default()];
    let deferred = space
        .insert(pages(0, 1), Device::new("deferred", &log).then(Act::pass(gates[0].clone())))
        .unwrap();
    let awaited = space
        .insert(pages(0, 1), Device::new("awaited", &log).then(Act::pass(gates[1].clone())))
        .unwrap();
    let never = space.insert(pages(0, 1), Device::new("never", &log)).unwrap();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    drop(invalidate);
    let mut reader = Task::new(never.read_begin());
    reader.expect_pending();
    gates[1].open();
    reader.expect_pending();
    assert!(gates[0].is_waited_for(), "no further first pass comes, so it is polled now");
    gates[0].open();
    reader.finish();
    assert_eq!((deferred.calls(), awaited.calls(), never.calls()), (1, 1, 0));
}

#[test]
fn b4_dropped_while_a_reader_waits_for_its_claim_the_reader_polls_what_nobody_has_polled() {
    let log = Log::default();
    let space = AddressSpace::builder().pass_budget(1).build();
    let gates = [Gate::default(), Gate::default()];
    let device = |gate: &Gate| {
        space
            .insert(pages(0, 1), Device::new("device", &log).then(Act::pass(gate.clone())))
            .unwrap()
    };
    let [deferred, _awaited] = gates.each_ref().map(device);
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gates[1].open();
    // Drives the second pass to its end, and from then on waits for the future to go on.
    let mut reader = Task::new(deferred.read_begin());
    for _ in 0..3 {
        assert!(reader.poll().is_pending() && reader.is_woken());
    }
    drop(invalidate);
    reader.expect_pending();
    assert!(gates[0].is_waited_for());
    gates[0].open();
    reader.finish();
    assert_eq!((space.active().len(), space.stats().lapses), (0, 0));
}

#[test]
fn b4_l1_remove_under_the_guard_waits_for_no_pass_that_is_done_after_the_budget_made_first_passes_stop()
 {
    let log = Log::default();
    let space = AddressSpace::builder().pass_budget(1).build();
    let gates = [Gate::default(), Gate::default()];
    let device = |gate: &Gate| {
        space
            .insert(pages(0, 1), Device::new("device", &log).then(Act::pass(gate.clone())))
            .unwrap()
    };
    // The first one's pass is listed as pending before anybody has polled it.
    let devices = gates.each_ref().map(device);
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gates.iter().for_each(Gate::open);
    let guard = invalidate.finish();
    for device in devices {
        now(device.remove());
    }
    drop(guard);
}

#[test]
fn b4_l1_remove_waits_for_first_passes_that_go_on_and_not_for_the_guard_however_many_are_active() {
    // Those beyond 32 are kept elsewhere. This one is moved there while it waits, or afterwards.
    for (meanwhile, later) in [(0, 0), (40, 0), (0, 40)] {
        let (log, gate) = (Log::default(), Gate::default());
        let space = AddressSpace::builder().pass_budget(0).build();
        let device = |name| space.insert(pages(0, 1), Device::new(name, &log)).unwrap();
        let (slow, looks, other) = (device("slow"), device("looks"), Arc::new(device("other")));
        slow.next(Act::pass(gate.clone()));
        let closes = other.clone();
        looks.next(Act::Run(Box::new(move |_| {
            // Nobody blocks who polls with this waker, so debug builds do not take it for a mistake
            // (C7).
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(
                std::pin::pin!(closes.close()).poll(&mut context).is_pending(),
                "it may still be called"
            );
        })));
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        let elsewhere = |count: usize| -> Vec<_> {
            (0..count).map(|_| now(space.invalidate(pages(9, 1), Event::Clear))).collect()
        };
        let meanwhile = elsewhere(meanwhile);
        assert_eq!(called(&log), ["slow"]);
        gate.open();
        let guard = invalidate.finish();
        assert_eq!(called(&log), ["looks"]);
        let later = elsewhere(later);
        let mut close = Task::new(other.close());
        assert!(close.poll().is_ready(), "it cannot be called any more");
        drop((close, guard, meanwhile, later));
    }
}

#[test]
fn b4_l1_remove_waits_for_its_own_pass_only_when_an_interrupted_invalidation_was_dropped() {
    let log = Log::default();
    let space = AddressSpace::builder().pass_budget(2).build();
    let gates = [Gate::default(), Gate::default(), Gate::default()];
    let device = |gate: &Gate| {
        space
            .insert(pages(0, 1), Device::new("device", &log).then(Act::pass(gate.clone())))
            .unwrap()
    };
    let [first, second, beyond] = gates.each_ref().map(device);
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    drop(invalidate);
    let mut drain = Task::new(space.drain());
    drain.expect_pending();
    gates[2].open();
    // The other two are polled from now on.
    drain.expect_pending();
    gates[0].open();
    drain.expect_pending();
    now(first.remove());
    now(beyond.remove());
    let mut remove = Task::new(second.remove());
    remove.expect_pending();
    gates[1].open();
    remove.finish();
    drain.finish();
}

#[test]
fn b4_a_first_pass_that_leaves_no_pass_takes_no_place_whether_it_panics_or_not() {
    let log = Log::default();
    let space = AddressSpace::builder().pass_budget(1).build();
    let (may_defer, gate) = (Arc::new(Mutex::new(Vec::new())), Gate::default());
    gate.open();
    let before = space.insert(pages(0, 1), Device::new("before", &log)).unwrap();
    let _ask = space.insert(pages(0, 1), Ask { may_defer: may_defer.clone(), gate, log }).unwrap();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    if cfg!(feature = "std") {
        before.next(Act::Panic);
        let panicked =
            std::panic::AssertUnwindSafe(|| drop(now(space.invalidate(pages(0, 1), Event::Unmap))));
        assert!(std::panic::catch_unwind(panicked).is_err());
    }
    assert!(may_defer.lock().unwrap().iter().all(|may| *may));
}

/// A place that is lost is lost for ever: the device would be waited for before each next one.
#[cfg(feature = "std")]
#[test]
fn b4_after_a_panic_anywhere_the_whole_budget_is_free() {
    type Fault = fn() -> Act;
    let faults: [(&str, Fault); 4] = [
        ("a first pass", || Act::Panic),
        ("a pass at its first poll", || Act::pass(async { panic!("a pass fails") })),
        ("a pass at a later poll", || {
            Act::pass(async {
                Yields(50).await;
                panic!("a pass fails late")
            })
        }),
        ("the drop of a pass", || {
            struct Bomb;
            impl Drop for Bomb {
                fn drop(&mut self) {
                    panic!("the drop of a pass fails");
                }
            }
            let bomb = Bomb;
            Act::pass(std::future::poll_fn(move |_| {
                let _ = &bomb;
                Poll::Ready(())
            }))
        }),
    ];
    for (what, fault) in faults {
        for abandoned in [false, true] {
            let log = Log::default();
            let space = AddressSpace::builder().pass_budget(2).build();
            let fails = space.insert(pages(0, 1), Device::new("fails", &log)).unwrap();
            let gate = Gate::default();
            let may_defer = Arc::new(Mutex::new(Vec::new()));
            let asks: Vec<_> = (0..3)
                .map(|_| {
                    let (may_defer, gate) = (may_defer.clone(), gate.clone());
                    space.insert(pages(1, 1), Ask { may_defer, gate, log: log.clone() }).unwrap()
                })
                .collect();
            fails.next(fault());
            let invalidation = std::panic::AssertUnwindSafe(|| {
                let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
                if abandoned { drop(invalidate.poll()) } else { drop(invalidate.finish()) }
            });
            let caught = std::panic::catch_unwind(invalidation);
            assert!(abandoned || caught.is_err(), "{what} panics");
            now(space.drain());
            let mut invalidate = Task::new(space.invalidate(pages(1, 1), Event::Unmap));
            invalidate.expect_pending();
            let asked = std::mem::take(&mut *may_defer.lock().unwrap());
            assert_eq!(asked, [true, true, false], "{what} panics, abandoned: {abandoned}");
            gate.open();
            drop(invalidate.finish());
            drop(asks);
        }
    }
}

/// Pends once and wakes itself.
fn yields() -> impl Future<Output = ()> + Send + 'static {
    let mut polls = 0;
    std::future::poll_fn(move |cx| {
        polls += 1;
        if polls == 2 {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}

#[test]
fn b4_passes_that_only_yield_are_done_in_the_first_poll_whatever_the_budget() {
    for budget in [Some(0), Some(1), Some(2), Some(3), None] {
        let log = Log::default();
        let space = budget.map_or_else(AddressSpace::new, |budget| {
            AddressSpace::builder().pass_budget(budget).build()
        });
        let devices: Vec<_> = ["0", "1", "2"]
            .map(|name| space.insert(pages(0, 1), Device::new(name, &log)).unwrap())
            .into();
        for round in 1..4 {
            devices.iter().for_each(|device| device.next(Act::pass(yields())));
            let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
            assert!(devices.iter().all(|device| device.calls() == round), "budget {budget:?}");
            let listed = space.active();
            assert!(listed.iter().all(|active| active.pending.is_empty()), "{listed:?}");
            drop(guard);
        }
        assert_eq!((space.active().len(), called(&log)), (0, ["0", "1", "2"].repeat(3)));
    }
}

#[test]
fn b3_b4_a_non_blockable_invalidation_without_budget_does_not_wait_between_first_passes() {
    let log = Log::default();
    let space = AddressSpace::builder().pass_budget(0).build();
    let gate = Gate::default();
    let first = space
        .insert(pages(0, 1), Device::new("first", &log).then(Act::pass(gate.clone())))
        .unwrap();
    let second = space.insert(pages(0, 1), Device::new("second", &log)).unwrap();
    assert_eq!(space.try_invalidate(pages(0, 1), Event::Unmap).map(drop), Err(WouldBlock));
    assert_eq!((first.calls(), second.calls()), (1, 0));
    gate.open();
    now(space.drain());
    assert_eq!(space.active().len(), 0);
}

#[test]
fn m7_a_late_invalidation_says_so_and_tells_everybody_at_once_whatever_the_budget() {
    let log = Log::default();
    let space = AddressSpace::builder().pass_budget(0).build();
    let gates = [Gate::default(), Gate::default()];
    let device = |gate: &Gate| {
        space
            .insert(pages(0, 1), Device::new("device", &log).then(Act::pass(gate.clone())))
            .unwrap()
    };
    let [first, second] = gates.each_ref().map(device);
    let before = now(second.read_begin());
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap).late());
    invalidate.expect_pending();
    assert!(log.lock().unwrap().iter().all(|(_, info)| info.late));
    assert_eq!(
        (first.calls(), second.calls()),
        (1, 1),
        "the second does not wait for the first one's pass"
    );
    // Nobody is left who could go on calling first passes, and nobody has to.
    drop(invalidate);
    assert!(second.read_retry(before));
    gates.iter().for_each(Gate::open);
    now(space.drain());
    // The budget was not touched.
    first.next(Act::pass(Yields(1)));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert!(log.lock().unwrap()[2..].iter().all(|(_, info)| !info.late));
}
