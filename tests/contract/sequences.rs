use crate::support::*;
use shootdown::{AddressSpace, Event, Owner};

#[test]
fn s1_an_idle_space_is_even_and_starts_at_2() {
    let (space, _device, _log) = one_device();
    assert_eq!(space.sequence().get(), 2);
    let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
    assert_eq!(space.sequence().get(), 3);
    drop(guard);
    assert_eq!(space.sequence().get(), 4);
}

#[test]
fn s2_only_an_invalidation_that_hits_makes_the_sequence_odd_and_all_its_passes_get_it() {
    let (space, device, log) = one_device();
    let other = space.insert(pages(0, 2), Device::new("other", &log)).unwrap();
    let miss = now(space.invalidate(pages(7, 1), Event::Clear));
    assert_eq!((space.sequence().get(), miss.hits()), (2, 0));
    let hit = now(space.invalidate(pages(0, 2), Event::Clear));
    assert_eq!((space.sequence().get(), hit.hits(), hit.sequence().get()), (3, 2, 3));
    assert!(log.lock().unwrap().iter().all(|(_, info)| info.sequence.get() == 3));
    assert_eq!(numbers([device.sequence(), other.sequence()]), [3, 3]);
}

#[test]
fn s3_the_last_end_makes_it_even_whether_that_invalidation_hit_or_not() {
    let (space, _device, _log) = one_device();
    let miss = now(space.invalidate(pages(7, 1), Event::Clear));
    let hit = now(space.invalidate(pages(0, 1), Event::Clear));
    drop(hit);
    assert_eq!(space.sequence().get(), 3, "one is still active");
    drop(miss);
    assert_eq!(space.sequence().get(), 4);
}

#[test]
fn s4_a_first_pass_that_leaves_the_device_alone_does_not_make_readers_collide() {
    let (space, device, _log) = one_device();
    let sequence = now(device.read_begin());
    device.next(Act::Ignore);
    let own = Some(Owner::new());
    drop(now(space.invalidate(pages(0, 1), Event::Migrate { owner: own })));
    assert!(!device.read_retry(sequence));
    drop(now(space.invalidate(pages(0, 1), Event::Migrate { owner: own })));
    assert!(device.read_retry(sequence));
}

#[test]
fn s4_a_first_pass_knows_its_own_migration_by_the_owner() {
    let (space, device, _log) = one_device();
    let own = Some(Owner::new());
    let events = [
        (Event::Migrate { owner: own }, own),
        (Event::Exclusive { owner: own }, own),
        (Event::Migrate { owner: None }, None),
        (Event::Unmap, None),
    ];
    for (event, owner) in events {
        device.next(Act::Run(Box::new(move |told| assert_eq!(told.owner(), owner))));
        drop(now(space.invalidate(pages(0, 1), event)));
    }
    assert_eq!(device.calls(), 4);
}

#[test]
fn s5_a_new_notifier_has_an_odd_sequence_that_is_not_the_current_one() {
    let (space, device, log) = one_device();
    assert_eq!(device.sequence().get(), 1, "even space: one less");
    let _active = now(space.invalidate(pages(0, 1), Event::Clear));
    let apart = space.insert(pages(9, 1), Device::new("apart", &log)).unwrap();
    assert_eq!((space.sequence().get(), apart.sequence().get()), (3, 1), "odd space: two less");
    assert!(Task::new(apart.read_begin()).poll().is_ready(), "and its readers do not wait");
}

#[test]
fn s5_inserted_under_an_invalidation_it_starts_with_the_current_one_and_readers_wait() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let active = now(space.invalidate(pages(0, 4), Event::Clear));
    assert_eq!(space.sequence().get(), 2, "it hit nothing");
    let device = space.insert(pages(3, 1), Device::new("late", &log)).unwrap();
    assert_eq!((space.sequence().get(), device.sequence().get()), (3, 3));
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    drop(active);
    assert_eq!(reader.finish().get(), 3);
    assert_eq!((space.sequence().get(), device.calls()), (4, 0));
}

#[test]
fn s6_two_separate_invalidations_never_give_one_notifier_the_same_sequence() {
    let (space, device, log) = one_device();
    let _elsewhere = space.insert(pages(9, 1), Device::new("elsewhere", &log)).unwrap();
    let _keeps_it_odd = now(space.invalidate(pages(9, 1), Event::Clear));
    drop(now(space.invalidate(pages(0, 1), Event::Clear)));
    let sequence = now(device.read_begin());
    assert_eq!(sequence.get(), 3);
    // Under the kernel's rule this one would give out 3 again, and the reader would install a stale
    // mapping.
    drop(now(space.invalidate(pages(0, 1), Event::Clear)));
    assert!(device.read_retry(sequence));
    assert_eq!(device.sequence().get(), 5);
}

#[test]
fn s6_overlapping_invalidations_of_a_notifier_share_a_sequence() {
    let (space, device, _log) = one_device();
    let first = now(space.invalidate(pages(0, 1), Event::Clear));
    let second = now(space.invalidate(pages(0, 1), Event::Clear));
    assert_eq!(numbers([first.sequence(), second.sequence(), device.sequence()]), [3, 3, 3]);
}

#[test]
fn sequences_go_on_through_the_end_of_the_numbers() {
    let log = Log::default();
    let space = AddressSpace::builder().first_sequence(u64::MAX).build();
    let device = space.insert(pages(0, 1), Device::new("device", &log)).unwrap();
    assert_eq!(numbers([space.sequence(), device.sequence()]), [u64::MAX - 1, u64::MAX - 2]);
    for expected in [u64::MAX, 1, 3] {
        let sequence = now(device.read_begin());
        let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
        assert_eq!(guard.sequence().get(), expected);
        assert!(device.read_retry(sequence));
        drop(guard);
    }
    assert_eq!(space.sequence().get(), 4);
}
