//! K4: what a look-up and a miss cost beside many others; and ranges as large as they come.

use crate::device::Card;
use crate::support::{Gate, Task, now, pages};
use shootdown::cache::{Match, Merge, Overlap, RegistrationCache};
use shootdown::{AddressRange, AddressSpace, Event};
use std::time::{Duration, Instant};

/// The least of some times: what else runs on the machine only adds.
fn least(mut time: impl FnMut() -> Duration) -> Duration {
    (0..5).map(|_| time()).min().unwrap()
}

/// A device that takes its time, and whose futures know nothing of each other.
struct Never;

impl shootdown::cache::Device for Never {
    type Handle = ();
    type Error = std::io::Error;

    async fn register(&self, range: AddressRange) -> std::io::Result<()> {
        if range.start() < 1 << 40 { std::future::pending().await } else { Ok(()) }
    }

    async fn deregister(
        &self,
        _: AddressRange,
        (): (),
    ) -> Result<(), shootdown::cache::StillRegistered<(), std::io::Error>> {
        Ok(())
    }
}

#[test]
fn k4_a_miss_does_not_look_at_others_that_register() {
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        miss_beside_others_that_register(overlap);
    }
}

fn miss_beside_others_that_register(overlap: Overlap) {
    let beside = |others: u64| {
        let cache =
            RegistrationCache::builder().overlap(overlap).build(&AddressSpace::new(), Never);
        let mut gets: Vec<_> =
            (0..others).map(|page| Task::new(cache.get(pages(2 * page, 1)))).collect();
        gets.iter_mut().for_each(Task::expect_pending);
        let mut page = 1 << 30;
        least(|| {
            let began = Instant::now();
            for _ in 0..200 {
                page += 2;
                drop(now(cache.get(pages(page, 1))).unwrap());
            }
            began.elapsed()
        })
    };
    let (few, many) = (beside(16), beside(8_000));
    assert!(many < few * 8, "{few:?} beside 16 that register, {many:?} beside 8,000");
}

#[test]
fn k4_a_miss_does_not_look_at_others_that_leave() {
    let beside = |others: u64| {
        let (space, card) = (AddressSpace::new(), Card::default());
        let cache = RegistrationCache::new(&space, card);
        let held: Vec<_> =
            (0..others).map(|page| now(cache.get(pages(2 * page, 1))).unwrap()).collect();
        let mut unmap = Task::new(space.invalidate(pages(0, 2 * others), Event::Unmap));
        unmap.expect_pending();
        let mut page = 1 << 30;
        let took = least(|| {
            let began = Instant::now();
            for _ in 0..200 {
                page += 2;
                drop(now(cache.get(pages(page, 1))).unwrap());
            }
            began.elapsed()
        });
        drop(held);
        took
    };
    let (few, many) = (beside(16), beside(4_000));
    assert!(many < few * 8, "{few:?} beside 16 that leave, {many:?} beside 4,000");
}

#[test]
fn k4_the_whole_address_space_can_be_registered_beside_a_page() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::<Card>::builder().max_bytes(1 << 40).build(&space, card.clone());
    let page = now(cache.get(pages(1, 1))).unwrap();
    let all = now(cache.get(AddressRange::ALL)).unwrap();
    assert_eq!((all.range(), cache.stats().pinned_bytes), (AddressRange::ALL, u64::MAX));
    let top = AddressRange::try_from(u64::MAX - 5..=u64::MAX).unwrap();
    assert_eq!(now(cache.get(top)).unwrap().range(), AddressRange::ALL);
    drop((page, all));
    now(cache.flush());
    assert_eq!((card.mapped().len(), cache.stats().pinned_bytes), (0, 0));
    assert_eq!(
        now(cache.get(top)).unwrap().range(),
        AddressRange::try_from(u64::MAX - 4095..=u64::MAX).unwrap()
    );
}

#[test]
fn k4_a_merge_to_the_whole_address_space_ends() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::<Card>::builder().merge(Merge::Touching).build(&space, card);
    let half = 1u64 << 63;
    let range = |start, last| AddressRange::try_from(start..=last).unwrap();
    let low = now(cache.get(range(0, half - 1 - 8192))).unwrap();
    let high = now(cache.get(range(half, u64::MAX))).unwrap();
    let all = now(cache.get(range(half - 8192, half))).unwrap();
    assert_eq!((all.range(), cache.stats().merges), (AddressRange::ALL, 2));
    drop((low, high));
}

/// One start, many lengths, published in another order than they began: each is found and removed.
#[test]
fn k4_registrations_of_one_start_that_are_published_in_any_order_are_all_found() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::new(&space, card.clone());
    // The longer later, so that nobody finds what covers him.
    let mut gets: Vec<_> = (1..=200).map(|count| Task::new(cache.get(pages(7, count)))).collect();
    gets.iter_mut().for_each(Task::expect_pending);
    gate.open();
    for get in gets.iter_mut().rev() {
        drop(get.finish().unwrap());
    }
    drop(now(space.invalidate(pages(7, 1), Event::Unmap)));
    assert_eq!((cache.stats().registrations, card.mapped().len(), space.len()), (0, 0, 0));
    // Their places are others' now: nobody finds those under a range that has gone.
    let others: Vec<_> =
        (0..200).map(|page| now(cache.get(pages(1000 + 2 * page, 1))).unwrap()).collect();
    for count in 1..=200 {
        let found = now(cache.get(pages(7, count))).unwrap();
        assert!(found.range().covers(pages(7, count)), "{:?} for {count} pages", found.range());
    }
    drop(others);
}

#[test]
fn k4_a_look_up_does_not_look_at_what_lies_within_its_range() {
    for matching in [Match::Covering, Match::Exact] {
        let among = |count: u64| {
            let cache = RegistrationCache::builder()
                .matching(matching)
                .build(&AddressSpace::new(), Card::default());
            // Messages within a buffer, and the buffer.
            for at in 0..count {
                drop(now(cache.get(pages(at, 1))).unwrap());
            }
            drop(now(cache.get(pages(0, count))).unwrap());
            least(|| {
                let began = Instant::now();
                (0..100).for_each(|_| drop(now(cache.get(pages(0, count))).unwrap()));
                began.elapsed()
            })
        };
        let (few, many) = (among(16), among(8_000));
        assert!(many < few * 8, "{matching:?}: {few:?} for a hit over 16, {many:?} over 8,000");
    }
}

#[test]
fn k4_a_flush_of_a_range_does_not_look_at_what_is_registered_elsewhere() {
    let beside = |count: u64| {
        let cache = RegistrationCache::new(&AddressSpace::new(), Card::default());
        for at in 1..=count {
            drop(now(cache.get(pages(10 * at, 1))).unwrap());
        }
        least(|| {
            let began = Instant::now();
            (0..100).for_each(|_| now(cache.flush_range(pages(0, 1))));
            began.elapsed()
        })
    };
    let (few, many) = (beside(16), beside(8_000));
    assert!(many < few * 8, "{few:?} beside 16, {many:?} beside 8,000");
}
