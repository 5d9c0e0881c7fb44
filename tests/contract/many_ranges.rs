//! N: one invalidation of many ranges.
use crate::support::*;
use futures::future::{Either, select};
use shootdown::{AddressRange, AddressSpace, Event, PassFuture, Phase, RangeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Single pages.
fn set(numbers: impl IntoIterator<Item = u64>) -> RangeSet {
    RangeSet::new(numbers.into_iter().map(|number| pages(number, 1))).unwrap()
}

#[test]
fn n1_each_notifier_is_called_once_in_order_with_the_ranges_that_concern_it() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let all = space.insert(pages(0, 100), Device::new("all", &log)).unwrap();
    let right = space.insert(pages(20, 20), Device::new("right", &log)).unwrap();
    let left = space.insert(pages(0, 11), Device::new("left", &log)).unwrap();
    let gap = space.insert(pages(11, 9), Device::new("gap", &log)).unwrap();
    let guard = now(space.invalidate_all(set([30, 2, 10, 50, 20, 3]), Event::Unmap));
    assert_eq!((guard.hits(), guard.range()), (3, pages(2, 49)));
    let calls = log.lock().unwrap().clone();
    let of = |numbers: &[(u64, u64)]| {
        numbers.iter().map(|(first, count)| pages(*first, *count)).collect::<Vec<_>>()
    };
    let calls: Vec<_> =
        calls.iter().map(|(name, info)| (*name, info.range, info.ranges().to_vec())).collect();
    assert_eq!(
        calls,
        [
            ("all", pages(2, 49), of(&[(2, 2), (10, 1), (20, 1), (30, 1), (50, 1)])),
            ("left", pages(2, 9), of(&[(2, 2), (10, 1)])),
            ("right", pages(20, 11), of(&[(20, 1), (30, 1)])),
        ]
    );
    assert_eq!([&all, &left, &right].map(|device| device.sequence()), [guard.sequence(); 3]);
    assert_ne!(gap.sequence(), guard.sequence());
    drop(guard);
    assert_eq!(space.sequence().get(), 4);
}

#[test]
fn n1_a_first_pass_is_told_the_ranges_without_the_gaps() {
    let (space, device, _log) = one_device();
    let told = Arc::new(Mutex::new(Vec::new()));
    let whole = space.insert(pages(0, 9), Device::new("whole", &Log::default())).unwrap();
    for device in [&device, &whole] {
        for _ in 0..2 {
            let told = told.clone();
            device.next(Act::Run(Box::new(move |invalidation| {
                told.lock().unwrap().push(invalidation.ranges().to_vec());
            })));
        }
    }
    drop(now(space.invalidate(pages(0, 2), Event::Unmap)));
    drop(now(space.invalidate_all(set([0, 7]), Event::Unmap)));
    let [one, zero, seven] = [pages(0, 2), pages(0, 1), pages(7, 1)];
    assert_eq!(*told.lock().unwrap(), [&[one][..], &[one], &[zero], &[zero, seven]]);
}

#[test]
fn n1_a_set_of_one_range_is_an_invalidation_of_it() {
    let (space, device, log) = one_device();
    drop(now(space.invalidate_all(pages(0, 3).into(), Event::Unmap)));
    drop(now(
        space.invalidate_all(RangeSet::new([pages(1, 2), pages(0, 1)]).unwrap(), Event::Unmap)
    ));
    let log = log.lock().unwrap();
    assert!(
        log.iter().all(|(_, info)| info.range == pages(0, 3) && info.ranges() == [pages(0, 3)])
    );
    assert_eq!((log.len(), device.calls()), (2, 2));
}

#[test]
fn n1_who_is_concerned_by_one_range_is_told_what_an_invalidation_of_it_tells() {
    let infos =
        [pages(0, 1).into(), RangeSet::new([pages(0, 1), pages(8, 1)]).unwrap()].map(|of| {
            let (space, _device, log) = one_device();
            drop(now(space.invalidate_all(of, Event::Unmap)));
            log.lock().unwrap()[0].1.clone()
        });
    assert_eq!(infos[0], infos[1]);
}

#[test]
fn n1_a_delivery_has_the_ranges_that_concern_its_inbox() {
    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 6), ()).unwrap();
    let of = RangeSet::new([pages(1, 1), pages(4, 1), pages(8, 1)]).unwrap();
    let mut invalidate = Task::new(space.invalidate_all(of, Event::Unmap));
    invalidate.expect_pending();
    let delivery = now(inbox.recv()).unwrap();
    assert_eq!(delivery.ranges(), [pages(1, 1), pages(4, 1)]);
    delivery.done();
    drop(invalidate.finish());
}

#[test]
fn n2_who_overlaps_only_gaps_neither_collides_nor_waits() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let gap = space.insert(pages(5, 1), Device::new("gap", &log)).unwrap();
    let gate = Gate::default();
    let hit =
        space.insert(pages(0, 3), Device::new("hit", &log).then(Act::pass(gate.clone()))).unwrap();
    let began = now(gap.read_begin());
    let mut invalidate = Task::new(space.invalidate_all(set([0, 2, 8]), Event::Unmap));
    invalidate.expect_pending();
    assert_eq!(now(gap.read_begin()), began);
    assert!(!gap.read_retry(began));
    // Also not whoever comes meanwhile, or goes.
    let late = space.insert(pages(3, 5), Device::new("late", &log)).unwrap();
    let ends = space.insert(pages(6, 3), Device::new("ends", &log)).unwrap();
    let read = now(late.read_begin());
    assert!(!late.read_retry(read));
    assert_eq!(now(late.remove()).calls(), 0);
    assert_eq!(now(gap.remove()).calls(), 0);
    let mut waits = [Task::new(hit.read_begin()), Task::new(ends.read_begin())];
    waits.iter_mut().for_each(Task::expect_pending);
    gate.open();
    let guard = invalidate.finish();
    waits.iter_mut().for_each(Task::expect_pending);
    drop(guard);
    waits.iter_mut().for_each(|reader| _ = reader.finish());
    assert_eq!(called(&log), ["hit"]);
}

#[test]
fn n2_a_reader_that_waits_for_another_invalidation_leaves_one_alone_in_whose_gap_it_is() {
    // The batch's future is not polled. Whoever waited for it would let it lapse.
    let (space, micros) = {
        let (space, device, micros) = with_clock(None);
        drop(device);
        (space, micros)
    };
    let log = Log::default();
    let gates = [Gate::default(), Gate::default()];
    let in_gap = space
        .insert(pages(5, 1), Device::new("in the gap", &log).then(Act::pass(gates[0].clone())))
        .unwrap();
    let hit = space
        .insert(pages(0, 1), Device::new("hit", &log).then(Act::pass(gates[1].clone())))
        .unwrap();
    let mut batch = Task::new(space.invalidate_all(set([0, 9]), Event::Unmap));
    batch.expect_pending();
    gates[1].open();
    let mut other = Task::new(space.invalidate(pages(5, 1), Event::Unmap));
    other.expect_pending();
    let mut reader = Task::new(in_gap.read_begin());
    reader.expect_pending();
    micros
        .fetch_add(Duration::from_secs(9).as_micros() as u64, std::sync::atomic::Ordering::SeqCst);
    reader.expect_pending();
    assert_eq!(space.stats().lapses, 0);
    gates[0].open();
    drop(other.finish());
    reader.finish();
    drop((batch.finish(), hit));
    assert_eq!(space.stats().lapses, 0);
}

#[test]
fn n3_passes_are_joined_and_what_is_dropped_is_the_spaces() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let gates = [Gate::default(), Gate::default()];
    let device = |at: usize| Device::new("device", &log).then(Act::pass(gates[at].clone()));
    let devices =
        [0, 7].map(|page| space.insert(pages(page, 1), device(usize::from(page == 7))).unwrap());
    let mut invalidate = Task::new(space.invalidate_all(set([0, 7]), Event::Unmap));
    invalidate.expect_pending();
    assert!(gates.iter().all(Gate::is_waited_for));
    let active = space.active();
    assert_eq!((active.len(), active[0].phase, active[0].pending.len()), (1, Phase::Passes, 2));
    assert_eq!((active[0].range, &active[0].ranges), (pages(0, 8), &set([0, 7])));
    drop(invalidate);
    gates[0].open();
    let mut readers = [0, 1].map(|at: usize| Task::new(devices[at].read_begin()));
    readers.iter_mut().for_each(Task::expect_pending);
    gates[1].open();
    readers.iter_mut().for_each(|reader| _ = reader.finish());
    assert!(space.active().is_empty());
}

#[test]
fn n3_one_that_lapsed_starts_over_with_all_its_ranges() {
    let (space, device, micros) = with_clock(None);
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate_all(set([0, 4, 9]), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    let mut reader = Task::new(device.read_begin());
    let _ = reader.poll();
    while space.stats().lapses == 0 {
        micros.fetch_add(100_000, std::sync::atomic::Ordering::SeqCst);
        let _ = reader.poll();
    }
    let last = space.insert(pages(9, 1), Device::new("last", &Log::default())).unwrap();
    let guard = invalidate.finish();
    assert_eq!((guard.hits(), device.calls(), last.calls()), (2, 2, 1));
}

#[test]
fn n3_one_beyond_the_pass_budget_tells_each_notifier_its_own_ranges() {
    let (space, log) = (AddressSpace::builder().pass_budget(0).build(), Log::default());
    let gates = [Gate::default(), Gate::default()];
    let device = |at: usize| Device::new("device", &log).then(Act::pass(gates[at].clone()));
    let _devices =
        [0, 7].map(|page| space.insert(pages(page, 2), device(usize::from(page == 7))).unwrap());
    let mut invalidate = Task::new(space.invalidate_all(set([0, 7, 30]), Event::Unmap));
    invalidate.expect_pending();
    assert_eq!(log.lock().unwrap().len(), 1, "the second one waits for the first one's pass");
    gates[0].open();
    invalidate.expect_pending();
    gates[1].open();
    assert_eq!(invalidate.finish().hits(), 2);
    let log = log.lock().unwrap();
    assert_eq!([log[0].1.ranges(), log[1].1.ranges()], [[pages(0, 1)], [pages(7, 1)]]);
}

#[test]
fn n3_a_late_one_tells_everybody_in_its_first_poll() {
    let (space, device, log) = one_device();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate =
        Task::new(space.invalidate_all(set([0, 7]), Event::Clear).late().into_owned());
    assert!(invalidate.poll().is_pending());
    assert!(log.lock().unwrap()[0].1.late);
    gate.open();
    drop(invalidate.finish());
}

#[test]
fn n3_as_many_notifiers_as_there_are_and_as_many_ranges() {
    // Fewer notifiers than ranges, and more: the search is another one.
    for (ranges, notifiers) in [(100, 3), (3, 100)] {
        let (space, log) = (AddressSpace::new(), Log::default());
        let devices: Vec<_> = (0..notifiers)
            .map(|at| space.insert(pages(at * 2, 4), Device::new("device", &log)).unwrap())
            .collect();
        let of = set((0..ranges).map(|at| at * 3));
        let guard = now(space.invalidate_all(of.clone(), Event::Unmap));
        let expected = devices.iter().filter(|device| of.overlaps(device.range()));
        assert_eq!(guard.hits(), expected.count());
        assert!(
            devices.iter().all(|device| device.calls() == usize::from(of.overlaps(device.range())))
        );
    }
}

#[test]
fn n3_the_ends_of_the_address_space_may_belong_to_one() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let _all = space.insert(AddressRange::ALL, Device::new("all", &log)).unwrap();
    let ends = [
        AddressRange::try_from(0..=0).unwrap(),
        AddressRange::try_from(u64::MAX..=u64::MAX).unwrap(),
    ];
    drop(now(space.invalidate_all(RangeSet::new(ends).unwrap(), Event::Unmap)));
    let log = log.lock().unwrap();
    assert_eq!((log[0].1.range, log[0].1.ranges()), (AddressRange::ALL, &ends[..]));
}

#[cfg(feature = "std")]
#[test]
fn c7_an_invalidation_of_many_ranges_that_waits_in_a_first_pass_fails_too() {
    if cfg!(not(debug_assertions)) {
        return;
    }
    for many in [false, true] {
        let (space, device, log) = one_device();
        let reader = Arc::new(space.insert(pages(0, 1), Device::new("reader", &log)).unwrap());
        reader.next(Act::pass(Gate::default()));
        let inside = space.clone();
        device.next(Act::Run(Box::new(move |_| {
            let set = if many {
                RangeSet::new([pages(0, 1), pages(8, 1)]).unwrap()
            } else {
                pages(0, 1).into()
            };
            // What `wait` does, without its sleep: it would hang.
            let mut waits = Task::new(inside.invalidate_all(set, Event::Clear));
            let _ = waits.run();
            waits.forget();
        })));
        let panic = catch_unwind(AssertUnwindSafe(|| {
            let mut outer = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
            let _ = outer.run();
            outer.forget();
        }));
        assert!(panic.is_err(), "many ranges: {many}: a wait that never ends is not noticed");
    }
}

#[cfg(feature = "std")]
#[test]
fn f3_two_waits_in_one_first_pass_that_block_nobody_are_not_one_that_does() {
    let (space, device, log) = one_device();
    let reader = Arc::new(space.insert(pages(0, 1), Device::new("reader", &log)).unwrap());
    let inside = reader.clone();
    device.next(Act::Run(Box::new(move |_| {
        for _ in 0..2 {
            let reader = inside.clone();
            // Looks whether it would wait, and goes on.
            PassFuture::new(async move {
                let ready = pin!(std::future::ready(()));
                if let Either::Left(_) = select(pin!(reader.read_begin()), ready).await {
                    unreachable!("it is under invalidation");
                }
            })
            .wait();
        }
    })));
    let done =
        catch_unwind(AssertUnwindSafe(|| drop(now(space.invalidate(pages(0, 1), Event::Unmap)))));
    assert!(done.is_ok(), "{:?}", done.unwrap_err().downcast_ref::<String>());
}

#[test]
fn n1_many_ranges_and_many_notifiers_cost_no_product() {
    let time = |notifiers: u64| {
        let space = AddressSpace::new();
        let device = |_| space.insert(pages(0, 1), Device::new("device", &Log::default())).unwrap();
        let _devices: Vec<_> = (0..notifiers).map(device).collect();
        let set = RangeSet::new((0..200_000).map(|at| pages(at * 2, 1))).unwrap();
        let began = Instant::now();
        drop(now(space.invalidate_all(set, Event::Unmap)));
        began.elapsed()
    };
    let (few, many) = (time(1), time(2000));
    assert!(
        many < few * 4 + std::time::Duration::from_millis(200),
        "each first pass looks at all ranges: {few:?}, {many:?}"
    );
}
