//! K8: a greatest registration, and ranges that take several.

use crate::device::{Act, Card, Refused, State};
use crate::support::{Gate, PAGE, Task, now, pages};
use futures::FutureExt;
use shootdown::cache::{Device, GetError, Overlap, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace, Event};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

fn cache(change: impl FnOnce(&mut State)) -> (AddressSpace, Card, RegistrationCache<Card>) {
    let (space, card) = (AddressSpace::new(), Card::default());
    change(&mut card.state.lock().unwrap());
    let cache =
        RegistrationCache::builder().max_registration(4 * PAGE + 1).build(&space, card.clone());
    (space, card, cache)
}

#[test]
fn k8_a_get_of_more_than_one_registration_names_get_all() {
    let (_space, card, cache) = cache(|_| ());
    drop(now(cache.get(pages(0, 4))).unwrap());
    // Five pages, once rounded.
    let refused = now(cache.get(AddressRange::new(1, 4 * PAGE).unwrap())).unwrap_err();
    assert!(matches!(refused, GetError::TooLarge { max } if max == 4 * PAGE), "{refused:?}");
    assert!(refused.to_string().contains("`get_all`"), "{refused}");
    assert_eq!(card.mapped(), [0]);
}

#[test]
fn k8_a_registration_is_not_a_byte_larger_than_it_may_be() {
    let (space, bytes) = (AddressSpace::new(), |len| AddressRange::new(5, len).unwrap());
    let builder = RegistrationCache::builder().page(1).max_registration(10);
    let cache = builder.build(&space, Card::default());
    assert_eq!(now(cache.get(bytes(10))).unwrap().range(), bytes(10));
    let refused = now(cache.get(bytes(11))).unwrap_err();
    assert!(matches!(refused, GetError::TooLarge { max: 10 }), "{refused:?}");
}

#[test]
fn k8_pieces_come_in_order_and_cover_the_range_and_are_found_again() {
    let (_space, card, cache) = cache(|state| state.largest = Some(4));
    let asked = AddressRange::new(PAGE + 5, 9 * PAGE).unwrap();
    let all = now(cache.get_all(asked)).unwrap();
    let ranges: Vec<_> = all.iter().map(|one| one.range()).collect();
    assert_eq!(ranges, [pages(1, 4), pages(5, 4), pages(9, 2)]);
    let again = now(cache.get_all(asked)).unwrap();
    assert!(all.iter().zip(&again).all(|(one, two)| one.handle() == two.handle()));
    assert_eq!((card.state.lock().unwrap().registered, cache.stats().hits), (3, 3));
    let one = now(cache.get_all(pages(1, 4))).unwrap();
    assert_eq!((one.len(), one[0].handle()), (1, all[0].handle()));
}

#[test]
fn k8_all_or_none_an_error_of_one_piece_leaves_none_in_use() {
    for act in [Act::Refuse, Act::Panic] {
        let (space, card, cache) = cache(|_| ());
        // The device refuses once more after idle ones were given up.
        card.next_register(&[Act::Succeed, Act::Succeed, act, act]);
        let error = now(cache.get_all(pages(0, 12))).unwrap_err();
        assert!(matches!(error, GetError::Register(_) | GetError::Panicked { .. }), "{error:?}");
        drop(now(space.invalidate(pages(0, 12), Event::Unmap)));
        assert_eq!((card.mapped().len(), cache.stats().pinned_bytes), (0, 0));
        card.state.lock().unwrap().register.clear();
        assert_eq!(now(cache.get_all(pages(0, 12))).unwrap().len(), 3);
    }
}

#[test]
fn k8_an_invalidation_does_not_wait_for_pieces_that_a_caller_has_not_been_given() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::builder()
        .max_registration(4 * PAGE)
        .max_registrations(1)
        .build(&space, card.clone());
    // The second piece waits for an invalidation, which is under way; the first one is kept.
    let held = now(space.invalidate(pages(4, 1), Event::Clear));
    let mut all = Task::new(cache.get_all(pages(0, 8)));
    all.expect_pending();
    // Limits leave it alone: it is one of two.
    drop(now(cache.get(pages(100, 1))).unwrap());
    assert!(card.mapped().contains(&0));
    // An invalidation of it does not wait, although the caller is not polled.
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert!(!card.mapped().contains(&0));
    drop(held);
    let all = all.finish().unwrap();
    let ranges: Vec<_> = all.iter().map(|one| one.range()).collect();
    assert_eq!(ranges, [pages(0, 4), pages(4, 4)], "what was invalidated was registered again");
    assert_eq!(cache.stats().collisions, 1);
}

#[test]
fn k8_more_pieces_than_a_limit_allows_are_all_in_use() {
    let (space, card) = (AddressSpace::new(), Card::default());
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        let builder = RegistrationCache::builder()
            .max_registration(PAGE)
            .max_registrations(2)
            .overlap(overlap);
        let cache = builder.build(&space, card.clone());
        let all = now(cache.get_all(pages(0, 10))).unwrap();
        assert_eq!((all.len(), card.mapped().len()), (10, 10));
        drop(all);
        drop(now(cache.get(pages(50, 1))).unwrap());
        assert_eq!(card.mapped().len(), 2);
        now(cache.flush());
    }
}

#[test]
fn k8_a_dropped_call_leaves_none_in_use() {
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        let gate = Gate::default();
        let (space, card) =
            (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
        let cache = RegistrationCache::builder()
            .max_registration(PAGE)
            .overlap(overlap)
            .build(&space, card.clone());
        let mut all = Task::new(cache.get_all(pages(0, 3)));
        all.expect_pending();
        drop(all);
        gate.open();
        drop(now(space.invalidate(pages(0, 3), Event::Unmap)));
        assert!(card.mapped().is_empty());
        assert_eq!(now(cache.get_all(pages(0, 3))).unwrap().len(), 3);
    }
}

#[test]
fn k8_at_the_ends_of_the_address_space() {
    let top = AddressRange::try_from(u64::MAX - 3 * PAGE + 1..=u64::MAX).unwrap();
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        for most in [PAGE, 2 * PAGE, 3 * PAGE, u64::MAX - 1, u64::MAX] {
            let space = AddressSpace::new();
            let cache = RegistrationCache::builder()
                .overlap(overlap)
                .max_registration(most)
                .build(&space, Card::default());
            let all = now(cache.get_all(top)).unwrap();
            assert_eq!(
                (all[0].range().start(), all.last().unwrap().range().last()),
                (top.start(), u64::MAX)
            );
            drop(all);
            if most > 3 * PAGE && most < u64::MAX {
                let whole = now(cache.get_all(AddressRange::ALL)).unwrap();
                assert_eq!(whole.len(), 2);
                assert!(matches!(
                    cache.get(AddressRange::ALL).now_or_never(),
                    Some(Err(GetError::TooLarge { .. }))
                ));
            }
        }
    }
}

#[test]
fn k8_what_is_registered_is_found_while_another_call_waits_for_a_piece_beside_it() {
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        let space = AddressSpace::new();
        let builder = RegistrationCache::builder().max_registration(2 * PAGE).overlap(overlap);
        let cache = builder.build(&space, Card::default());
        let held = now(space.invalidate(pages(3, 1), Event::Clear));
        let mut waits = Task::new(cache.get_all(pages(0, 4)));
        waits.expect_pending();
        let found = now(cache.get_all(pages(0, 2))).unwrap();
        assert_eq!((found[0].range(), cache.stats().hits), (pages(0, 2), 1), "{overlap:?}");
        if overlap == Overlap::Allowed {
            // There are no turns to wait for.
            assert_eq!(now(cache.get_all(pages(1, 2))).unwrap()[0].range(), pages(1, 2));
        }
        drop((held, found));
        assert_eq!(waits.finish().unwrap().len(), 2);
    }
}

#[test]
fn k8_pieces_that_take_each_other_away_are_tried_as_often_as_the_cache_is_told() {
    /// Registering one of the two first pages changes the other one, so many times.
    struct Seesaw(AddressSpace, AtomicU64, u64);
    impl Device for Seesaw {
        type Handle = ();
        type Error = Refused;

        async fn register(&self, range: AddressRange) -> Result<(), Refused> {
            if self.1.fetch_add(1, Ordering::SeqCst) < self.2 {
                let other = pages(1 - range.start() / PAGE, 1);
                let _ = self.0.invalidate(other, Event::Clear).now_or_never();
            }
            Ok(())
        }

        async fn deregister(
            &self,
            _: AddressRange,
            (): (),
        ) -> Result<(), StillRegistered<(), Refused>> {
            Ok(())
        }
    }
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        for tries in [1, 3] {
            let space = AddressSpace::new();
            let device = Arc::new(Seesaw(space.clone(), AtomicU64::new(0), 50));
            let builder = RegistrationCache::builder().max_registration(PAGE).tries(tries);
            let cache = builder.overlap(overlap).build(&space, device.clone());
            let refused = now(cache.get_all(pages(0, 2))).map(drop).unwrap_err();
            let told = matches!(refused, GetError::Invalidated { tries: told } if told == tries);
            assert!(told, "{overlap:?}: {refused:?}");
            let (asked, tries) = (device.1.load(Ordering::SeqCst), u64::from(tries));
            assert_eq!((asked, cache.stats().collisions), (2 * tries, tries));
        }
    }
}

#[test]
fn k9_pieces_that_are_outdated_each_time_are_tried_as_often_as_the_cache_is_told() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let builder = RegistrationCache::builder().max_registration(PAGE).tries(3);
    let cache = builder.build(&space, card.clone());
    // The first piece is old when the second one is registered.
    card.state.lock().unwrap().valid.extend([Act::Refuse; 100]);
    let refused = now(cache.get_all(pages(0, 2))).map(drop).unwrap_err();
    assert!(matches!(refused, GetError::Invalidated { tries: 3 }), "{refused:?}");
    assert_eq!(cache.stats().collisions, 0, "nothing has changed");
}
