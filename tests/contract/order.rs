use crate::support::*;
use shootdown::{AddressSpace, Event};
use std::sync::{Arc, Mutex};

/// Devices that log their polls; `starts` are their first pages, in order of insertion.
fn polled(starts: &[u64], yields: &[u32]) -> (Vec<usize>, Vec<(usize, u32)>) {
    let (space, log) = (AddressSpace::new(), Log::default());
    let names = ["0", "1", "2", "3", "4", "5"];
    let polls = Arc::new(Mutex::new(Vec::new()));
    let devices: Vec<_> = (0..starts.len())
        .map(|id| {
            let (polls, log_of, yields) = (polls.clone(), log.clone(), yields[id]);
            let count = starts.len();
            let mut polled = 0;
            let pass = std::future::poll_fn(move |cx| {
                assert_eq!(
                    log_of.lock().unwrap().len(),
                    count,
                    "O2: polled before every first pass was called"
                );
                polled += 1;
                polls.lock().unwrap().push((id, polled));
                if polled > yields {
                    return std::task::Poll::Ready(());
                }
                cx.waker().wake_by_ref();
                std::task::Poll::Pending
            });
            space
                .insert(pages(starts[id], 9), Device::new(names[id], &log).then(Act::pass(pass)))
                .unwrap()
        })
        .collect();
    drop(now(space.invalidate(pages(0, 100), Event::Unmap)));
    drop(devices);
    let calls = called(&log).iter().map(|name| name.parse().unwrap()).collect();
    let polls = polls.lock().unwrap().clone();
    (calls, polls)
}

#[test]
fn o1_first_passes_run_in_order_of_start_then_of_insertion() {
    let (calls, _) = polled(&[4, 2, 4, 0, 2], &[0; 5]);
    assert_eq!(calls, [3, 1, 4, 0, 2]);
}

#[test]
fn o2_o3_passes_are_polled_in_order_after_all_first_passes_and_then_in_turns() {
    let (calls, polls) = polled(&[1, 0, 2, 3], &[1, 3, 0, 2]);
    assert_eq!(calls, [1, 0, 2, 3]);
    assert_eq!(
        polls,
        [(1, 1), (0, 1), (2, 1), (3, 1), (1, 2), (0, 2), (3, 2), (1, 3), (3, 3), (1, 4)]
    );
}

#[test]
fn o4_passes_of_different_notifiers_are_concurrent() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let gates: Vec<_> = (0..4).map(|_| Gate::default()).collect();
    let device = |gate: &Gate| Device::new("device", &log).then(Act::pass(gate.clone()));
    let _devices: Vec<_> =
        gates.iter().map(|gate| space.insert(pages(0, 1), device(gate)).unwrap()).collect();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    assert!(gates.iter().all(Gate::is_waited_for), "all devices work at once");
    for gate in gates.iter().rev() {
        invalidate.expect_pending();
        gate.open();
    }
    drop(invalidate.finish());
}

#[test]
fn o4_hundreds_of_passes_that_end_at_once_all_end() {
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let devices: Vec<_> = (0..300)
        .map(|_| space.insert(pages(0, 1), Device::new("one of many", &log)).unwrap())
        .collect();
    devices.iter().for_each(|device| device.next(Act::pass(Yields(1))));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    devices.iter().for_each(|device| device.next(Act::pass(gate.clone())));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    drop(invalidate.finish());
}

#[test]
fn o5_adjacency_is_no_overlap_and_a_removed_notifier_is_not_called() {
    let (space, device, log) = one_device();
    drop(now(space.invalidate(pages(1, 1), Event::Unmap)));
    assert_eq!(device.calls(), 0);
    let second = space.insert(pages(0, 1), Device::new("second", &log)).unwrap();
    drop(second.close()); // not awaited: out since the call
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!((device.calls(), second.calls()), (1, 0));
}

#[test]
fn o6_a_second_invalidation_does_not_wait_for_the_first_ones_pass() {
    let (space, device, _log) = one_device();
    let (slow, quick) = (Gate::default(), Gate::default());
    device.next(Act::pass(slow.clone()));
    device.next(Act::pass(quick.clone()));
    let mut first = Task::new(space.invalidate(pages(0, 1), Event::Clear));
    let mut second = Task::new(space.invalidate(pages(0, 2), Event::Unmap));
    first.expect_pending();
    second.expect_pending();
    quick.open();
    let second = second.finish();
    first.expect_pending();
    slow.open();
    assert_eq!(
        first.finish().sequence(),
        second.sequence(),
        "the sequence does not identify a call"
    );
}
