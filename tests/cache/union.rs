//! K7: what a `get` registers together with what is in its way.

use crate::device::{Act, Card};
use crate::support::{Gate, PAGE, Task, now, pages};
use crate::turns::exclusive;
use crate::vouched::Gpu;
use shootdown::cache::{Merge, Overlap, RegistrationCache};
use shootdown::{AddressSpace, Event};
use std::sync::atomic::Ordering;

#[test]
fn k7_a_merge_registers_the_union_with_what_an_earlier_turn_has_registered() {
    let (_space, _card, cache) = exclusive(Overlap::Merge);
    let held = now(cache.get(pages(0, 2))).unwrap();
    let mut first = Task::new(cache.get(pages(1, 3)));
    first.expect_pending();
    let mut second = Task::new(cache.get(pages(3, 3)));
    second.expect_pending();
    drop(held);
    let first = first.finish().unwrap();
    assert_eq!(first.range(), pages(0, 4));
    second.expect_pending();
    drop(first);
    // The docs of `Overlap::Merge`: the union with all that overlaps, also those in use.
    assert_eq!(second.finish().unwrap().range(), pages(0, 6));
}

/// What a union was made of has been unmapped while its caller waited.
#[test]
fn k7_a_merge_does_not_register_what_has_gone_while_it_waited() {
    let (space, card, cache) = exclusive(Overlap::Merge);
    for at in 0..5 {
        drop(now(cache.get(pages(100 + 2 * at, 1))).unwrap());
    }
    let held = now(cache.get(pages(0, 2))).unwrap();
    let mut waits = Task::new(cache.get(pages(1, 3)));
    waits.expect_pending();
    let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    unmap.expect_pending();
    drop(held);
    drop(unmap.finish()); // page 0 is no memory from here on
    // A device that is asked for it refuses.
    card.state.lock().unwrap().largest = Some(3);
    assert_eq!(waits.finish().unwrap().range(), pages(1, 3));
    let stats = cache.stats();
    assert_eq!(
        (stats.register_failures, stats.registrations),
        (0, 6),
        "all that was idle elsewhere was given up"
    );
}

#[test]
fn k7_one_that_is_lost_beside_a_get_does_not_refuse_it() {
    let (space, card) = (AddressSpace::new(), Card::default());
    card.state.lock().unwrap().exclusive = true;
    card.state.lock().unwrap().never_resets = true;
    let builder = RegistrationCache::builder().overlap(Overlap::Merge).merge(Merge::Touching);
    let cache = builder.build(&space, card.clone());
    drop(now(cache.get(pages(4, 1))).unwrap());
    drop(now(cache.get(pages(0, 2))).unwrap());
    card.next_deregister(&[Act::Panic]);
    // It touches only.
    let got = now(cache.get(pages(2, 2))).unwrap();
    assert_eq!((card.mapped(), got.range()), (vec![0, 2], pages(2, 3)), "with what is not lost");
}

/// What is lost overlaps only what was deregistered for the union.
#[cfg(feature = "lease")]
#[test]
fn k7_one_that_is_lost_in_the_way_of_a_union_does_not_refuse_the_range_alone() {
    let [registers, deregisters] = [Gate::default(), Gate::default()];
    let card = Card {
        register_gate: Some(registers.clone()),
        deregister_gate: Some(deregisters.clone()),
        ..Card::default()
    };
    card.state.lock().unwrap().exclusive = true;
    card.state.lock().unwrap().never_resets = true;
    card.next_register(&[Act::Refuse]);
    let space = AddressSpace::new();
    let cache = RegistrationCache::builder().overlap(Overlap::Merge).build(&space, card.clone());
    let [mut refused, mut middle, mut left, mut right] =
        [(2, 1), (1, 4), (0, 2), (4, 2)].map(|(at, count)| Task::new(cache.get(pages(at, count))));
    refused.expect_pending();
    middle.expect_pending();
    left.expect_pending();
    right.expect_pending();
    registers.open();
    assert!(refused.finish().is_err());
    drop(middle.finish().unwrap());
    // The turns of both begin before either knows of a union.
    let pause = space.pause();
    left.expect_pending();
    right.expect_pending();
    drop(pause);
    // Now both wait for the middle to be deregistered.
    left.expect_pending();
    right.expect_pending();
    deregisters.open();
    drop(right.finish().unwrap());
    card.next_deregister(&[Act::Panic]);
    assert_eq!(left.finish().unwrap().range(), pages(0, 2));
    assert_eq!(card.mapped(), [4, 0], "one is lost");
}

#[test]
fn k3_a_union_does_not_exceed_a_limit_that_the_range_alone_keeps() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::builder()
        .overlap(Overlap::Merge)
        .max_bytes(10 * PAGE)
        .build(&space, card.clone());
    drop(now(cache.get(pages(100, 1))).unwrap());
    drop(now(cache.get(pages(0, 8))).unwrap());
    let got = now(cache.get(pages(7, 8))).unwrap();
    let pinned = cache.stats().pinned_bytes / PAGE;
    assert!(pinned <= 10, "{pinned} pages for {}, mapped {:?}", got.range(), card.mapped());
}

/// It is not found, and it is deregistered whatever the device says.
#[test]
fn k9_what_lies_within_a_range_is_not_asked_about_when_it_gives_way() {
    let (_space, card, cache) = exclusive(Overlap::Merge);
    drop(now(cache.get(pages(1, 1))).unwrap());
    assert_eq!(now(cache.get(pages(0, 3))).unwrap().range(), pages(0, 3));
    assert_eq!(card.state.lock().unwrap().asked, 0);
}

/// What a union takes in is not asked about.
#[test]
fn k9_a_merge_does_not_take_in_what_the_device_does_not_vouch_for() {
    let (space, gpu) = (AddressSpace::new(), Gpu::default());
    let cache = RegistrationCache::builder().overlap(Overlap::Merge).build(&space, gpu.clone());
    drop(now(cache.get(pages(0, 3))).unwrap());
    gpu.buffer.store(1, Ordering::Release);
    assert_eq!(
        now(cache.get(pages(2, 2))).unwrap().range(),
        pages(2, 2),
        "0 and 1 are of a buffer that has gone"
    );
}

#[test]
fn k9_a_merge_does_not_wait_for_users_of_a_neighbour_that_the_device_does_not_vouch_for() {
    let (space, gpu) = (AddressSpace::new(), Gpu::default());
    let builder = RegistrationCache::builder().overlap(Overlap::Merge).merge(Merge::Touching);
    let cache = builder.build(&space, gpu.clone());
    let held = now(cache.get(pages(0, 2))).unwrap();
    gpu.buffer.store(1, Ordering::Release);
    assert_eq!(now(cache.get(pages(2, 2))).unwrap().range(), pages(2, 2), "it only touches");
    assert_eq!((held.range(), cache.stats().outdated), (pages(0, 2), 1));
}
