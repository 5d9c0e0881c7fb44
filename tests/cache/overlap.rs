//! K7: a device that may have no two registrations that overlap.

use crate::device::{Act, Card};
use crate::support::{Gate, Task, now, pages};
use crate::turns::exclusive;
use futures::FutureExt;
use shootdown::cache::{GetError, Merge, Overlap, RegistrationCache};
use shootdown::{AddressSpace, Event};

#[test]
fn k7_idle_registrations_that_overlap_are_deregistered_first() {
    for (overlap, expected) in [(Overlap::Wait, pages(1, 2)), (Overlap::Merge, pages(0, 5))] {
        let (_space, card, cache) = exclusive(overlap);
        for (page, count) in [(0, 2), (2, 3), (5, 1)] {
            drop(now(cache.get(pages(page, count))).unwrap());
        }
        let got = now(cache.get(pages(1, 2))).unwrap();
        assert_eq!((got.range(), cache.stats().register_failures), (expected, 0));
        assert_eq!(card.mapped(), [5, expected.start() / 4096]);
        // What is covered is a hit, as ever.
        assert_eq!(now(cache.get(pages(2, 1))).unwrap().handle(), got.handle());
        let counted = (cache.stats().evictions, cache.stats().merges);
        assert_eq!(counted, if overlap == Overlap::Wait { (2, 0) } else { (0, 2) });
    }
}

#[test]
fn k7_a_merge_takes_what_touches_only_if_that_was_asked_for() {
    let (space, card) = (AddressSpace::new(), Card::default());
    card.state.lock().unwrap().exclusive = true;
    let cache = RegistrationCache::builder()
        .overlap(Overlap::Merge)
        .merge(Merge::Touching)
        .build(&space, card);
    drop(now(cache.get(pages(0, 2))).unwrap());
    drop(now(cache.get(pages(4, 2))).unwrap());
    assert_eq!(now(cache.get(pages(1, 3))).unwrap().range(), pages(0, 6));
}

#[test]
fn k7_one_in_use_is_waited_for_and_its_users_come_after_the_one_that_waits() {
    for (overlap, expected) in [(Overlap::Wait, pages(1, 2)), (Overlap::Merge, pages(0, 3))] {
        let (_space, card, cache) = exclusive(overlap);
        let held = now(cache.get(pages(0, 2))).unwrap();
        let mut waits = Task::new(cache.get(pages(1, 2)));
        waits.expect_pending();
        // A stream of users would keep it in use for ever.
        let mut later = Task::new(cache.get(pages(0, 2)));
        later.expect_pending();
        assert!(now(cache.get(pages(9, 1))).is_ok(), "nobody else waits");
        drop(held);
        let got = waits.finish().unwrap();
        assert_eq!(got.range(), expected);
        if overlap == Overlap::Merge {
            assert_eq!(
                later.finish().unwrap().handle(),
                got.handle(),
                "what was merged is found by all"
            );
        } else {
            later.expect_pending();
            drop(got);
            assert_eq!(later.finish().unwrap().range(), pages(0, 2));
        }
        assert_eq!(
            (cache.stats().register_failures, card.state.lock().unwrap().registered),
            (0, 4 - u64::from(expected == pages(0, 3)))
        );
    }
}

#[test]
fn k7_those_who_wait_have_their_turns_in_order() {
    let (_space, _card, cache) = exclusive(Overlap::Wait);
    let mut held = Some(now(cache.get(pages(2, 1))).unwrap());
    let mut waiting: Vec<_> = (0..6).map(|at| Task::new(cache.get(pages(at, 3)))).collect();
    waiting.iter_mut().for_each(Task::expect_pending);
    for at in 0..waiting.len() {
        drop(held.take());
        // Those behind are polled first.
        for later in (at + 1..waiting.len()).rev() {
            assert!(waiting[later].poll().is_pending());
        }
        held = Some(waiting[at].finish().unwrap());
        assert_eq!(held.as_ref().unwrap().range(), pages(at as u64, 3));
    }
}

#[test]
fn k7_a_caller_that_is_not_polled_holds_nobody_up() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    card.state.lock().unwrap().exclusive = true;
    let cache = RegistrationCache::builder().overlap(Overlap::Wait).build(&space, card.clone());
    // The losing arm of a `select!`: in each state that it may be in.
    let mut kept = Task::new(cache.get(pages(0, 2)));
    kept.expect_pending();
    let mut behind = Task::new(cache.get(pages(1, 2)));
    behind.expect_pending();
    gate.open();
    let second = behind.finish().unwrap();
    assert_eq!((second.range(), card.mapped()), (pages(1, 2), vec![1]));
    let mut waits = Task::new(cache.get(pages(2, 2)));
    waits.expect_pending();
    let mut last = Task::new(cache.get(pages(3, 2)));
    last.expect_pending();
    drop(second);
    assert_eq!(last.finish().unwrap().range(), pages(3, 2), "it drives the one before it");
    assert_eq!(kept.finish().unwrap().range(), pages(0, 2));
    drop(waits.finish().unwrap());
    assert_eq!(cache.stats().register_failures, 0);
}

#[test]
fn k7_one_that_goes_away_lets_those_behind_it_go_on() {
    let (space, card, cache) = exclusive(Overlap::Wait);
    let held = now(cache.get(pages(0, 2))).unwrap();
    let mut between = Task::new(cache.get(pages(1, 3)));
    between.expect_pending();
    // It overlaps only the one that waits.
    let mut behind = Task::new(cache.get(pages(3, 2)));
    behind.expect_pending();
    drop(between);
    assert!(behind.is_woken());
    assert_eq!(behind.finish().unwrap().range(), pages(3, 2));
    drop(held);
    drop(behind);
    drop(cache);
    assert_eq!((space.len(), card.mapped().len()), (0, 0), "nothing is left");
}

/// What the last one polls is the work of the first, and that goes on waiting.
#[test]
fn k7_one_that_goes_away_wakes_those_behind_it_also_if_the_one_before_it_stays() {
    let (_space, _card, cache) = exclusive(Overlap::Wait);
    let _held = now(cache.get(pages(0, 2))).unwrap();
    let mut first = Task::new(cache.get(pages(1, 2)));
    first.expect_pending();
    let mut between = Task::new(cache.get(pages(2, 2)));
    between.expect_pending();
    let mut behind = Task::new(cache.get(pages(3, 2)));
    behind.expect_pending();
    drop(between);
    assert!(behind.is_woken());
    assert_eq!(behind.finish().unwrap().range(), pages(3, 2));
    first.expect_pending();
}

#[test]
fn k7_a_registration_whose_caller_has_gone_is_finished_and_then_gives_way() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    card.state.lock().unwrap().exclusive = true;
    let cache = RegistrationCache::builder().overlap(Overlap::Wait).build(&space, card.clone());
    let mut gone = Task::new(cache.get(pages(0, 2)));
    gone.expect_pending();
    drop(gone);
    let mut next = Task::new(cache.get(pages(1, 2)));
    next.expect_pending();
    gate.open();
    assert_eq!((next.finish().unwrap().range(), card.mapped()), (pages(1, 2), vec![1]));
    assert_eq!(cache.stats().register_failures, 0);
}

#[test]
fn k7_an_invalidation_does_not_wait_for_those_who_wait() {
    let (space, card, cache) = exclusive(Overlap::Wait);
    let held = now(cache.get(pages(0, 2))).unwrap();
    let mut waits = Task::new(cache.get(pages(1, 3)));
    waits.expect_pending();
    drop(now(space.invalidate(pages(2, 2), Event::Unmap)));
    // One that takes the other away meanwhile: it waits for the user only.
    let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    unmap.expect_pending();
    drop(held);
    drop(unmap.finish());
    assert_eq!(waits.finish().unwrap().range(), pages(1, 3));
    assert_eq!(card.mapped(), [1]);
}

#[test]
fn k7_a_failing_deregistration_is_waited_for_and_a_full_device_gets_room() {
    let (_space, card, cache) = exclusive(Overlap::Merge);
    card.state.lock().unwrap().room = Some(2);
    drop(now(cache.get(pages(0, 2))).unwrap());
    drop(now(cache.get(pages(50, 2))).unwrap());
    card.next_deregister(&[Act::Refuse; 20]);
    let got = now(cache.get(pages(1, 2))).unwrap();
    assert_eq!((got.range(), cache.stats().deregister_failures), (pages(0, 3), 20));
    assert_eq!(now(cache.get(pages(60, 1))).unwrap().range(), pages(60, 1), "50 made room");
    let mut mapped = card.mapped();
    mapped.sort_unstable();
    assert_eq!(mapped, [0, 60]);
}

#[test]
fn k7_a_union_that_the_device_refuses_or_that_is_too_large_is_not_registered() {
    let (_space, card, cache) = exclusive(Overlap::Merge);
    card.state.lock().unwrap().largest = Some(3);
    drop(now(cache.get(pages(0, 3))).unwrap());
    assert_eq!(now(cache.get(pages(2, 2))).unwrap().range(), pages(2, 2));
    assert_eq!(cache.stats().register_failures, 1);
    let (space, card) = (AddressSpace::new(), Card::default());
    card.state.lock().unwrap().largest = Some(3);
    let cache = RegistrationCache::builder()
        .overlap(Overlap::Merge)
        .max_registration(3 * 4096)
        .build(&space, card);
    drop(now(cache.get(pages(0, 3))).unwrap());
    assert_eq!(now(cache.get(pages(2, 2))).unwrap().range(), pages(2, 2));
    assert_eq!(cache.stats().register_failures, 0);
}

#[test]
fn k7_pieces_of_several_callers_do_not_wait_for_each_other_for_ever() {
    let (space, card) = (AddressSpace::new(), Card::default());
    card.state.lock().unwrap().exclusive = true;
    let builder = RegistrationCache::builder().overlap(Overlap::Wait).max_registration(4 * 4096);
    let cache = builder.build(&space, card.clone());
    // Each cuts the memory at other pages.
    let mut all: Vec<_> = (0..4).map(|at| Task::new(cache.get_all(pages(at, 16)))).collect();
    all.iter_mut().rev().for_each(|one| _ = one.poll().map(|done| drop(done.unwrap())));
    for one in &mut all {
        if let std::task::Poll::Ready(done) = one.run() {
            assert_eq!(done.unwrap().len(), 4);
        }
    }
    assert_eq!(cache.stats().register_failures, 0);
}

#[test]
fn k2_k7_a_handle_that_a_panic_has_taken_is_for_ever_and_nobody_waits_in_silence() {
    let (space, card, cache) = exclusive(Overlap::Wait);
    card.state.lock().unwrap().never_resets = true;
    drop(now(cache.get(pages(0, 2))).unwrap());
    card.next_deregister(&[Act::PanicLater]);
    let lost = now(cache.get(pages(1, 2))).unwrap_err();
    assert!(matches!(lost, GetError::Lost { range } if range == pages(0, 2)), "{lost:?}");
    now(cache.flush());
    assert_eq!((card.mapped(), cache.stats().deregister_failures), (vec![0], 1));
    drop(now(cache.get(pages(2, 1))).unwrap());
    // K1: the device may use it.
    let mut unmap = space.invalidate(pages(0, 1), Event::Unmap);
    assert!((&mut unmap).now_or_never().is_none());
    assert!(format!("{:?}", space.active()).contains("registration with"));
}

/// A deregistration that panics while somebody waits for its place, and the reset fails at first.
#[test]
fn k2_k7_a_lost_handle_is_reset_before_the_next_registers() {
    for overlap in [Overlap::Wait, Overlap::Merge] {
        for acts in [
            vec![Act::Panic],
            vec![Act::PanicLater],
            vec![Act::Panic; 5],
            vec![Act::Panic, Act::Refuse, Act::PanicLater, Act::Refuse],
        ] {
            let (_space, card, cache) = exclusive(overlap);
            drop(now(cache.get(pages(0, 2))).unwrap());
            card.next_deregister(&acts);
            let got = now(cache.get(pages(1, 2))).unwrap();
            assert_eq!((card.mapped().len(), cache.stats().register_failures), (1, 0));
            assert_eq!(cache.stats().deregister_failures, acts.len() as u64);
            drop(got);
            now(cache.flush());
            assert_eq!((card.mapped().len(), cache.stats().pinned_bytes), (0, 0));
        }
    }
}

#[test]
fn k7_a_caller_whose_turn_has_come_takes_what_serves_its_range() {
    for overlap in [Overlap::Wait, Overlap::Merge] {
        // What was found again when the gate was open.
        let (space, card, cache) = exclusive(overlap);
        let first = *now(cache.get(pages(0, 4))).unwrap().handle();
        let pause = space.pause();
        let mut waits = Task::new(cache.get(pages(1, 2)));
        waits.expect_pending();
        drop(pause);
        let got = waits.finish().unwrap();
        assert_eq!((*got.handle(), card.state.lock().unwrap().registered), (first, 1));
        // What a caller had begun that has gone.
        let gate = Gate::default();
        let card = Card { register_gate: Some(gate.clone()), ..Card::default() };
        let cache = RegistrationCache::builder().overlap(overlap).build(&space, card.clone());
        let mut gone = Task::new(cache.get(pages(10, 4)));
        gone.expect_pending();
        drop(gone);
        let mut next = Task::new(cache.get(pages(11, 2)));
        next.expect_pending();
        gate.open();
        assert_eq!(next.finish().unwrap().range(), pages(10, 4));
        assert_eq!(card.state.lock().unwrap().registered, 1);
    }
}

#[test]
fn k7_a_caller_does_not_wait_for_one_that_only_has_the_same_in_its_way() {
    let (space, _card, cache) = exclusive(Overlap::Wait);
    let held = now(cache.get(pages(0, 2))).unwrap();
    let clear = now(space.invalidate(pages(2, 1), Event::Clear));
    let mut first = Task::new(cache.get(pages(1, 2)));
    first.expect_pending();
    let mut second = Task::new(cache.get(pages(0, 1)));
    second.expect_pending();
    drop(held);
    first.expect_pending();
    assert_eq!(second.finish().unwrap().range(), pages(0, 1));
    drop(clear);
    assert_eq!(first.finish().unwrap().range(), pages(1, 2));
}
