//! K3: all that is idle can be given up, the least recently used first, whenever it was used.

use crate::device::{Card, Refused};
use crate::support::{Gate, Task, Yields, now, pages};
use shootdown::cache::{Device, GetError, Merge, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace, Event};
use std::task::Poll;

fn card(change: impl FnOnce(&mut crate::device::State)) -> Card {
    let card = Card::default();
    change(&mut card.state.lock().unwrap());
    card
}

/// Registers pages, or finds them again.
fn touch(cache: &RegistrationCache<Card>, pages_of: impl IntoIterator<Item = u64>) {
    for page in pages_of {
        drop(now(cache.get(pages(page, 1))).unwrap());
    }
}

#[test]
fn k3_a_flush_gives_up_what_was_hit_again() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::new(&space, card.clone());
    touch(&cache, [1, 2, 3, 1, 2, 3]);
    now(cache.flush());
    assert_eq!(
        (cache.stats().registrations, card.mapped().len(), cache.stats().evictions),
        (0, 0, 3)
    );
}

#[test]
fn k3_a_flush_of_a_range_leaves_the_rest() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::new(&space, card.clone());
    touch(&cache, 1..=5);
    let held = now(cache.get(pages(3, 1))).unwrap();
    now(cache.flush_range(pages(2, 3)));
    assert_eq!(card.mapped(), [1, 3, 5]);
    drop(held);
    now(cache.flush_range(pages(100, 1)));
    assert_eq!(card.mapped(), [1, 3, 5]);
}

#[test]
fn k3_a_full_device_gets_room_by_what_was_used_since_it_was_made() {
    let (space, card) = (AddressSpace::new(), card(|card| card.room = Some(2)));
    // A refusal is no change of the memory.
    let cache = RegistrationCache::<Card>::builder().tries(1).build(&space, card.clone());
    let held = [now(cache.get(pages(1, 1))).unwrap(), now(cache.get(pages(2, 1))).unwrap()];
    assert!(matches!(now(cache.get(pages(3, 1))), Err(GetError::Register(_))), "full and in use");
    drop(held);
    touch(&cache, [1, 2, 3]);
    assert_eq!(card.mapped(), [3]);
}

#[test]
fn k3_a_limit_finds_all_that_has_become_idle_least_recently_used_first() {
    for many in [3, 100] {
        let (space, card) = (AddressSpace::new(), Card::default());
        let cache =
            RegistrationCache::<Card>::builder().max_registrations(2).build(&space, card.clone());
        let held: Vec<_> = (1..=many).map(|page| now(cache.get(pages(page, 1))).unwrap()).collect();
        assert_eq!(cache.stats().registrations, many, "nothing in use is given up");
        drop(held);
        touch(&cache, 1..=many);
        touch(&cache, [1000]);
        assert_eq!(card.mapped(), [many, 1000], "of {many} the one used last, and the new one");
        touch(&cache, [2000]);
        assert_eq!(card.mapped(), [1000, 2000]);
    }
}

#[test]
fn k3_what_a_dropped_caller_was_giving_up_is_given_up_by_the_next() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { deregister_gate: Some(gate.clone()), ..Card::default() });
    let cache =
        RegistrationCache::<Card>::builder().max_registrations(1).build(&space, card.clone());
    touch(&cache, [1]);
    let mut get = crate::support::Task::new(cache.get(pages(2, 1)));
    get.expect_pending();
    drop(get);
    gate.open();
    for page in [3, 4, 5] {
        touch(&cache, [page]);
    }
    assert_eq!(card.mapped(), [5]);
}

/// lattice/quda PR #1639: a device that refuses ranges that overlap.
#[test]
fn k3_report_8_a_device_that_refuses_overlaps_gets_idle_ones_out_of_its_way() {
    let (space, card) = (AddressSpace::new(), card(|card| card.exclusive = true));
    let cache = RegistrationCache::new(&space, card.clone());
    touch(&cache, [0]);
    let larger = now(cache.get(pages(0, 2))).unwrap();
    assert_eq!((larger.range(), cache.stats().register_failures), (pages(0, 2), 1));
    // One in use stays, and the caller gets the device's own error.
    assert!(matches!(now(cache.get(pages(1, 2))), Err(GetError::Register(_))));
    drop(larger);
    drop(now(cache.get(pages(1, 2))).unwrap());
    // Mapped again at the address, without a call of the program's.
    drop(now(space.invalidate(pages(0, 9), Event::Unmap)));
    touch(&cache, [1]);
    assert_eq!(card.mapped(), [1]);
}

/// The `get` is kept and not polled, as the losing arm of a `select!` is.
#[test]
fn k1_a_look_up_that_waits_for_room_holds_no_registration() {
    let (space, mut card) = (AddressSpace::new(), Card::default());
    let gate = Gate::default();
    card.deregister_gate = Some(gate.clone());
    let cache =
        RegistrationCache::<Card>::builder().max_registrations(1).build(&space, card.clone());
    touch(&cache, [1]);
    let mut get = Task::new(cache.get(pages(5, 1)));
    get.expect_pending();
    gate.open();
    // Nobody has a `Registration`.
    drop(now(space.invalidate(pages(5, 1), Event::Unmap)));
    assert_eq!(get.finish().unwrap().range(), pages(5, 1), "it begins again");
}

#[test]
fn k2_a_neighbour_that_makes_a_registration_too_large_does_not_fail_it() {
    let (space, card) = (AddressSpace::new(), card(|card| card.largest = Some(1)));
    let cache =
        RegistrationCache::<Card>::builder().merge(Merge::Touching).build(&space, card.clone());
    let held = now(cache.get(pages(1, 1))).unwrap();
    assert_eq!(now(cache.get(pages(2, 1))).unwrap().range(), pages(2, 1));
    drop(held);
    assert!(matches!(now(cache.get(pages(5, 2))), Err(GetError::Register(_))));
}

/// Takes some turns to register, and more to deregister.
struct Slow;

impl Device for Slow {
    type Handle = ();
    type Error = Refused;

    async fn register(&self, _: AddressRange) -> Result<(), Refused> {
        Yields(2).await;
        Ok(())
    }

    async fn deregister(
        &self,
        range: AddressRange,
        (): (),
    ) -> Result<(), StillRegistered<(), Refused>> {
        Yields(if range == pages(1, 1) { 5 } else { 10 }).await;
        Ok(())
    }
}

#[test]
fn k3_two_look_ups_that_give_up_each_others_registration_both_succeed() {
    for tries in [1, 64] {
        give_up_each_others(tries);
    }
}

fn give_up_each_others(tries: u32) {
    let space = AddressSpace::new();
    let cache =
        RegistrationCache::<Slow>::builder().max_registrations(1).tries(tries).build(&space, Slow);
    drop(now(cache.get(pages(1, 1))).unwrap());
    let mut both = [2, 3].map(|page| Task::new(cache.get(pages(page, 1))));
    let mut waiting: Vec<_> = both.iter_mut().collect();
    for _ in 0..1000 {
        waiting.retain_mut(|get| match get.poll() {
            Poll::Ready(registration) => registration
                .map(drop)
                .is_err_and(|error| panic!("nothing was invalidated: {error}")),
            Poll::Pending => true,
        });
    }
    assert_eq!(waiting.len(), 0, "they give up each other's registration again and again");
    now(cache.flush());
    let stats = cache.stats();
    assert_eq!((stats.pinned_bytes, stats.collisions, stats.invalidations), (0, 0, 0));
}

#[test]
fn k3_what_get_all_has_found_was_used_last() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache =
        RegistrationCache::<Card>::builder().max_registrations(2).build(&space, card.clone());
    touch(&cache, [1, 2]);
    drop(now(cache.get_all(pages(1, 1))).unwrap());
    touch(&cache, [3]);
    assert_eq!(card.mapped(), [1, 3]);
}
