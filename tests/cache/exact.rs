//! K6, K9: what a `get` may be given, and what a device says of what was found.

use crate::device::{Act, Card};
use crate::support::{PAGE, now, pages};
use futures::FutureExt;
use shootdown::cache::{Match, Merge, Overlap, RegistrationCache};
use shootdown::{AddressRange, AddressSpace, Event};

fn bytes(start: u64, len: u64) -> AddressRange {
    AddressRange::new(start, len).unwrap()
}

#[test]
fn k6_an_exact_get_is_given_its_range_and_neither_a_larger_nor_a_smaller_one() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::builder().matching(Match::Exact).build(&space, card.clone());
    let asked =
        [bytes(0, 3 * PAGE), bytes(PAGE, PAGE), bytes(PAGE + 1, 10), bytes(0, PAGE), bytes(100, 1)];
    let held: Vec<_> = asked.iter().map(|range| now(cache.get(*range)).unwrap()).collect();
    for (range, held) in asked.into_iter().zip(&held) {
        assert_eq!(
            (held.range(), *now(cache.get(range)).unwrap().handle()),
            (range, *held.handle())
        );
    }
    let device: Vec<_> = card.state.lock().unwrap().mapped.values().copied().collect();
    assert_eq!((device, cache.stats().misses, cache.stats().hits), (asked.to_vec(), 5, 5));
    // All of them overlap one byte of the invalidation's.
    drop(held);
    drop(now(space.invalidate(bytes(0, 2 * PAGE), Event::Unmap)));
    assert!(card.mapped().is_empty());
}

#[test]
fn k6_exact_ranges_are_rounded_to_pages_only_if_the_caller_sets_one() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::builder().matching(Match::Exact).page(PAGE).build(&space, card);
    let first = now(cache.get(bytes(PAGE + 7, 100))).unwrap();
    let same = now(cache.get(bytes(PAGE + 900, 1))).unwrap();
    assert_eq!((first.range(), same.handle()), (pages(1, 1), first.handle()), "the same pages");
    let more = now(cache.get(bytes(PAGE + 7, PAGE))).unwrap();
    assert_eq!((more.range(), cache.stats().registrations), (pages(1, 2), 2));
    assert_eq!(
        *now(cache.get(bytes(PAGE + 7, 100))).unwrap().handle(),
        *first.handle(),
        "not the larger one"
    );
}

#[test]
fn k6_an_exact_get_does_not_join_what_registers_a_larger_range() {
    let gate = crate::support::Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::builder().matching(Match::Exact).build(&space, card.clone());
    let mut larger = crate::support::Task::new(cache.get(pages(0, 4)));
    let mut smaller = crate::support::Task::new(cache.get(pages(1, 1)));
    let mut same = crate::support::Task::new(cache.get(pages(0, 4)));
    larger.expect_pending();
    smaller.expect_pending();
    same.expect_pending();
    gate.open();
    let (larger, smaller, same) =
        (larger.finish().unwrap(), smaller.finish().unwrap(), same.finish().unwrap());
    assert_eq!(
        (larger.range(), smaller.range(), same.handle()),
        (pages(0, 4), pages(1, 1), larger.handle())
    );
    assert_eq!(card.state.lock().unwrap().registered, 2);
}

#[test]
fn k6_settings_that_contradict_each_other_are_refused() {
    type Change = fn(shootdown::cache::Builder<Card>) -> shootdown::cache::Builder<Card>;
    let refused: [(Change, &str); 4] = [
        (|builder| builder.matching(Match::Exact).merge(Merge::Touching), "Match::Exact"),
        (|builder| builder.matching(Match::Exact).overlap(Overlap::Merge), "Match::Exact"),
        (|builder| builder.merge(Merge::Touching).overlap(Overlap::Wait), "Overlap::Wait"),
        (|builder| builder.max_registration(PAGE - 1), "one page"),
    ];
    for (change, text) in refused {
        let build =
            || change(RegistrationCache::builder()).build(&AddressSpace::new(), Card::default());
        let panic = std::panic::catch_unwind(build).unwrap_err();
        let message = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).into()));
        assert!(message.as_ref().is_some_and(|message| message.contains(text)), "{message:?}");
    }
}

#[test]
fn k6_an_address_has_its_offset_in_the_registration_and_not_in_what_was_asked_for() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::new(&space, card);
    let registration = now(cache.get(bytes(PAGE + 100, 2 * PAGE))).unwrap();
    let offsets = [PAGE - 1, PAGE, PAGE + 100, 4 * PAGE - 1, 4 * PAGE]
        .map(|address| registration.offset_of(address));
    assert_eq!(offsets, [None, Some(0), Some(100), Some(3 * PAGE - 1), None]);
}

#[test]
fn k9_what_the_device_does_not_vouch_for_is_not_found_again_and_leaves_with_its_users() {
    for act in [Act::Refuse, Act::Panic] {
        let (space, card) = (AddressSpace::new(), Card::default());
        let cache = RegistrationCache::new(&space, card.clone());
        let (old, other) =
            (now(cache.get(pages(1, 1))).unwrap(), now(cache.get(pages(9, 1))).unwrap());
        assert_eq!(card.state.lock().unwrap().asked, 0, "what was just registered is valid");
        card.state.lock().unwrap().valid.push_back(act);
        let new = now(cache.get(pages(1, 1))).unwrap();
        assert_ne!(new.handle(), old.handle());
        assert_eq!(
            (card.mapped(), cache.stats().outdated, cache.stats().hits),
            (vec![1, 9, 1], 1, 0)
        );
        assert_eq!(now(cache.get(pages(1, 1))).unwrap().handle(), new.handle());
        // K1: the one that is not found any more is waited for as before.
        let mut unmap = crate::support::Task::new(space.invalidate(pages(1, 1), Event::Unmap));
        drop(new);
        unmap.expect_pending();
        drop(old);
        drop(unmap.finish());
        // K2: only that one.
        assert_eq!((card.mapped(), other.range()), (vec![9], pages(9, 1)));
        assert_eq!(space.stats().lost_panics, u64::from(act == Act::Panic));
    }
}

#[test]
fn k9_a_device_that_vouches_for_nothing_still_registers() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::new(&space, card.clone());
    card.state.lock().unwrap().valid.extend([Act::Refuse; 100]);
    for at in 1..=20 {
        drop(now(cache.get(pages(1, 1))).unwrap());
        assert_eq!(card.state.lock().unwrap().registered, at);
    }
    assert_eq!(cache.stats().outdated, 19);
    now(cache.flush());
    assert!(card.mapped().is_empty());
}

#[test]
fn k3_a_flush_of_a_range_lets_nothing_of_it_be_found_and_waits_for_what_nobody_uses() {
    let gate = crate::support::Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { deregister_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::new(&space, card.clone());
    let used = now(cache.get(pages(1, 1))).unwrap();
    drop(now(cache.get(pages(2, 1))).unwrap());
    drop(now(cache.get(pages(3, 1))).unwrap());
    let mut flush = crate::support::Task::new(cache.flush_range(pages(1, 2)));
    flush.expect_pending();
    gate.open();
    flush.finish();
    assert_eq!(card.mapped(), [1, 3], "1 is in use, and not waited for");
    let again = now(cache.get(pages(1, 1))).unwrap();
    assert_ne!(again.handle(), used.handle());
    assert_eq!(now(cache.get(pages(1, 1))).unwrap().handle(), again.handle());
    drop(used);
    now(cache.flush_range(pages(1, 1)));
    assert_eq!(card.mapped(), [3, 1], "the old one went once it was let go");
    assert!(cache.get(pages(3, 1)).now_or_never().is_some(), "another range");
}
