//! The registration cache on a device that is watched closely: each test is a failure that caches
//! of this kind have had.
#![cfg(not(any(loom, shuttle)))]
#![allow(missing_docs, unreachable_pub)]

mod changes;
mod details;
mod device;
mod exact;
mod growth;
mod idle;
mod model;
mod outlives;
mod overlap;
mod panics;
mod pieces;
mod room;
mod settings;
mod strict;
#[path = "../support/mod.rs"]
mod support;
mod sweep;
mod turns;
mod union;
mod vouched;

use futures::FutureExt;
use futures::executor::block_on;
use shootdown::cache::{
    CacheStats, Device, Failure, GetError, Merge, Operation, RegistrationCache, StillRegistered,
    Unwatched,
};
use shootdown::{AddressRange, AddressSpace, Event};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

const PAGE: u64 = 4096;

fn pages(first: u64, count: u64) -> AddressRange {
    AddressRange::new(first * PAGE, count * PAGE).unwrap()
}

/// What the device has mapped: key to range and the generation of the memory at that moment.
#[derive(Default)]
struct State {
    mapped: BTreeMap<u64, (AddressRange, u64)>,
    next: u64,
    registrations: u64,
    /// Refusals to come.
    fail_register: u32,
    fail_deregister: u32,
    room: Option<usize>,
}

#[derive(Clone, Default)]
struct Nic {
    state: Arc<Mutex<State>>,
    /// The memory's generation: rises with each unmap and map at the same address.
    memory: Arc<AtomicU64>,
    /// Registrations wait until it is `true`.
    slow: Option<Arc<AtomicBool>>,
}

#[derive(Debug)]
struct Refused(&'static str);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Refused {}

async fn yields(times: u32) {
    for _ in 0..times {
        let mut first = true;
        std::future::poll_fn(|cx| {
            cx.waker().wake_by_ref();
            if std::mem::take(&mut first) {
                std::task::Poll::Pending
            } else {
                std::task::Poll::Ready(())
            }
        })
        .await;
    }
}

impl Device for Nic {
    type Handle = u64;
    type Error = Refused;

    async fn register(&self, range: AddressRange) -> Result<u64, Refused> {
        let generation = self.memory.load(Ordering::Acquire);
        yields(2).await;
        while self.slow.as_ref().is_some_and(|go| !go.load(Ordering::Acquire)) {
            yields(1).await;
        }
        let mut state = self.state.lock().unwrap();
        if state.fail_register > 0 {
            state.fail_register -= 1;
            return Err(Refused("no"));
        }
        if state.room.is_some_and(|room| state.mapped.len() >= room) {
            return Err(Refused("no room"));
        }
        state.next += 1;
        state.registrations += 1;
        let key = state.next;
        state.mapped.insert(key, (range, generation));
        Ok(key)
    }

    async fn deregister(
        &self,
        range: AddressRange,
        key: u64,
    ) -> Result<(), StillRegistered<u64, Refused>> {
        yields(1).await;
        let mut state = self.state.lock().unwrap();
        if state.fail_deregister > 0 {
            state.fail_deregister -= 1;
            return Err(StillRegistered { handle: key, error: Refused("busy") });
        }
        assert_eq!(
            state.mapped.remove(&key).map(|mapped| mapped.0),
            Some(range),
            "deregistered twice, or with another range"
        );
        Ok(())
    }
}

impl Nic {
    fn mapped(&self) -> usize {
        self.state.lock().unwrap().mapped.len()
    }

    /// The generation that the device sees through a key: what a transfer would read.
    fn transfer(&self, key: u64) -> u64 {
        self.state.lock().unwrap().mapped[&key].1
    }

    fn registrations(&self) -> u64 {
        self.state.lock().unwrap().registrations
    }
}

fn cache() -> (AddressSpace, Nic, RegistrationCache<Nic>) {
    let (space, nic) = (AddressSpace::new(), Nic::default());
    let cache = RegistrationCache::new(&space, nic.clone());
    (space, nic, cache)
}

/// Unmap and map again at the same address.
async fn remap(space: &AddressSpace, nic: &Nic, range: AddressRange) {
    let guard = space.invalidate(range, Event::Unmap).await;
    let state = nic.state.lock().unwrap();
    assert!(
        !state.mapped.values().any(|(mapped, _)| mapped.overlaps(range)),
        "the device maps what is being unmapped"
    );
    nic.memory.fetch_add(1, Ordering::Release);
    drop(guard);
}

/// ofi-cray/libfabric-cray#1350, #1000.
#[test]
fn memory_that_was_mapped_again_at_the_same_address_is_registered_again() {
    let (space, nic, cache) = cache();
    block_on(async {
        for generation in 0..10 {
            for _ in 0..3 {
                let registration = cache.get(pages(5, 2)).await.unwrap();
                assert_eq!(nic.transfer(*registration.handle()), generation, "stale data");
            }
            remap(&space, &nic, pages(6, 1)).await;
            assert_eq!((nic.mapped(), cache.stats().registrations), (0, 0));
        }
    });
    let stats = cache.stats();
    assert_eq!(
        (stats.hits, stats.misses, stats.invalidations, stats.pinned_bytes),
        (20, 10, 10, 0)
    );
}

#[test]
fn a_part_of_a_registration_is_a_hit_and_more_than_it_is_a_miss() {
    let (_space, nic, cache) = cache();
    block_on(async {
        let whole = cache.get(AddressRange::new(5 * PAGE + 100, 2 * PAGE).unwrap()).await.unwrap();
        assert_eq!(whole.range(), pages(5, 3), "whole pages");
        let part = cache.get(AddressRange::new(6 * PAGE + 1, 10).unwrap()).await.unwrap();
        assert_eq!(part.handle(), whole.handle());
        let more = cache.get(pages(7, 2)).await.unwrap();
        assert_ne!(more.handle(), whole.handle());
        assert_eq!(nic.mapped(), 2);
    });
}

#[test]
fn misses_of_one_range_at_the_same_time_register_once() {
    let (_space, nic, cache) = cache();
    let all: Vec<_> = block_on(futures::future::join_all((0..20).map(|_| cache.get(pages(1, 1)))));
    let keys: Vec<_> = all.iter().map(|one| *one.as_ref().unwrap().handle()).collect();
    assert_eq!((nic.registrations(), keys), (1, vec![1; 20]));
    assert_eq!(cache.stats().misses + cache.stats().hits, 20);
}

#[test]
fn a_caller_that_goes_away_does_not_lose_the_registration_it_began() {
    let (_space, nic, cache) = cache();
    let mut gone = Box::pin(cache.get(pages(1, 1)));
    assert!((&mut gone).now_or_never().is_none());
    let waiting = cache.get(pages(1, 1));
    drop(gone);
    let registration = block_on(waiting).unwrap();
    assert_eq!((nic.registrations(), nic.transfer(*registration.handle())), (1, 0));
    // One that nobody waits for any more is ended by an invalidation.
    let (space, nic, cache) = self::cache();
    let mut gone = Box::pin(cache.get(pages(1, 1)));
    assert!((&mut gone).now_or_never().is_none());
    drop(gone);
    block_on(remap(&space, &nic, pages(0, 9)));
    assert_eq!(nic.mapped(), 0);
}

#[test]
fn unmap_while_a_transfer_is_in_flight_waits_for_it() {
    let (space, nic, cache) = cache();
    block_on(async {
        let transfer = cache.get(pages(1, 4)).await.unwrap();
        let mut unmap = Box::pin(remap(&space, &nic, pages(2, 1)));
        assert!((&mut unmap).now_or_never().is_none());
        // The look-up does not find it any more, although it is in use.
        let mut again = Box::pin(cache.get(pages(1, 4)));
        assert!(
            (&mut again).now_or_never().is_none(),
            "waits for the unmap, which waits for the transfer"
        );
        assert_eq!(nic.transfer(*transfer.handle()), 0);
        drop(transfer);
        unmap.await;
        assert_eq!(nic.transfer(*again.await.unwrap().handle()), 1);
    });
}

#[test]
fn memory_that_is_unmapped_while_it_is_registered_is_registered_again() {
    let go = Arc::new(AtomicBool::new(false));
    let (space, nic) = (AddressSpace::new(), Nic { slow: Some(go.clone()), ..Nic::default() });
    let cache = RegistrationCache::new(&space, nic.clone());
    let mut get = Box::pin(cache.get(pages(1, 1)));
    assert!((&mut get).now_or_never().is_none());
    let mut unmap = Box::pin(remap(&space, &nic, pages(1, 1)));
    assert!((&mut unmap).now_or_never().is_none(), "the device may have the old pages already");
    go.store(true, Ordering::Release);
    // The invalidation drives the registration that it waits for.
    block_on(unmap);
    let registration = block_on(get).unwrap();
    assert_eq!(nic.transfer(*registration.handle()), 1);
    assert_eq!((cache.stats().collisions, nic.mapped()), (1, 1));
}

#[test]
fn a_merged_region_that_is_unmapped_in_part_is_gone_as_a_whole() {
    let (space, nic) = (AddressSpace::new(), Nic::default());
    let cache =
        RegistrationCache::<Nic>::builder().merge(Merge::Touching).build(&space, nic.clone());
    block_on(async {
        let left = cache.get(pages(1, 1)).await.unwrap();
        drop(cache.get(pages(4, 1)).await.unwrap());
        // Touches one, overlaps the other.
        let merged = cache.get(pages(2, 3)).await.unwrap();
        assert_eq!(merged.range(), pages(1, 4));
        assert_eq!(cache.get(pages(1, 1)).await.unwrap().handle(), merged.handle());
        assert_eq!((cache.stats().merges, cache.stats().registrations), (2, 1));
        // Who has the old one keeps it.
        assert_eq!((left.range(), nic.transfer(*left.handle())), (pages(1, 1), 0));
        assert_eq!(nic.mapped(), 2, "the merged one, and the one in use");
        drop((left, merged));
        remap(&space, &nic, pages(3, 1)).await;
        assert_eq!(cache.stats().registrations, 0);
        assert_eq!(nic.transfer(*cache.get(pages(1, 1)).await.unwrap().handle()), 1);
        cache.flush().await;
        assert_eq!((nic.mapped(), cache.stats().pinned_bytes), (0, 0));
    });
}

#[test]
fn limits_give_up_what_was_used_longest_ago_and_nothing_in_use() {
    let (space, nic) = (AddressSpace::new(), Nic::default());
    let cache = RegistrationCache::<Nic>::builder()
        .max_registrations(3)
        .max_bytes(100 * PAGE)
        .build(&space, nic.clone());
    block_on(async {
        let held = cache.get(pages(0, 1)).await.unwrap();
        for at in [10, 20, 10, 30] {
            drop(cache.get(pages(at, 1)).await.unwrap());
        }
        // 0 is in use, 10 was used after 20.
        assert_eq!((nic.mapped(), cache.stats().evictions), (3, 1));
        let before = nic.registrations();
        drop(cache.get(pages(10, 1)).await.unwrap());
        drop(cache.get(pages(0, 1)).await.unwrap());
        assert_eq!(nic.registrations(), before);
        drop(cache.get(pages(20, 1)).await.unwrap());
        assert_eq!(nic.registrations(), before + 1, "20 had been given up");
        // By bytes: everything idle has to go, and more than the limit allows may be in use.
        drop(cache.get(pages(1000, 100)).await.unwrap());
        drop(held);
        drop(cache.get(pages(2000, 1)).await.unwrap());
        assert!(cache.stats().pinned_bytes <= 100 * PAGE, "{:?}", cache.stats());
    });
}

#[test]
fn a_registration_that_fails_looks_like_none() {
    let (_space, nic, cache) = cache();
    nic.state.lock().unwrap().fail_register = 1;
    block_on(async {
        let refused = cache.get(pages(1, 1)).await.unwrap_err();
        assert!(matches!(&refused, GetError::Register(why) if why.0 == "no"));
        assert!(refused.to_string().contains("refused to register"), "{refused}");
        assert_eq!(
            (
                cache.stats().registrations,
                cache.stats().pinned_bytes,
                cache.stats().register_failures
            ),
            (0, 0, 1)
        );
        drop(cache.get(pages(1, 1)).await.unwrap());
    });
    // A failure of many callers' registration: each learns of it or tries again; nobody gets a
    // registration that is none.
    nic.state.lock().unwrap().fail_register = 3;
    let all = block_on(futures::future::join_all((0..5).map(|_| cache.get(pages(7, 1)))));
    for registration in all.into_iter().flatten() {
        nic.transfer(*registration.handle());
    }
}

#[test]
fn when_the_device_has_no_room_idle_registrations_make_it() {
    let (_space, nic, cache) = cache();
    nic.state.lock().unwrap().room = Some(2);
    block_on(async {
        let held = cache.get(pages(1, 1)).await.unwrap();
        drop(cache.get(pages(2, 1)).await.unwrap());
        let third = cache.get(pages(3, 1)).await.unwrap();
        assert_eq!((nic.mapped(), cache.stats().evictions), (2, 1));
        assert!(
            matches!(cache.get(pages(4, 1)).await, Err(GetError::Register(_))),
            "nothing is idle"
        );
        drop((held, third));
    });
}

#[test]
fn a_deregistration_that_fails_is_tried_again_and_the_unmap_waits() {
    let (space, nic, cache) = cache();
    block_on(async {
        drop(cache.get(pages(1, 1)).await.unwrap());
        nic.state.lock().unwrap().fail_deregister = 2;
        remap(&space, &nic, pages(1, 1)).await;
        assert_eq!((nic.mapped(), cache.stats().deregister_failures), (0, 2));
        // More often than is tried at once: the device may use the memory, so nobody says
        // otherwise.
        drop(cache.get(pages(1, 1)).await.unwrap());
        nic.state.lock().unwrap().fail_deregister = 30;
        let mut unmap = Box::pin(remap(&space, &nic, pages(1, 1)));
        assert!((&mut unmap).now_or_never().is_none());
        let failures = cache.stats().deregister_failures;
        assert!(nic.mapped() == 1 && failures < 30, "it is not tried for ever");
        // Each use of the cache tries again.
        while nic.state.lock().unwrap().fail_deregister > 0 {
            assert!((&mut unmap).now_or_never().is_none());
            drop(cache.get(pages(9, 1)).await.unwrap());
            drop(cache.get(pages(19, 1)).await.unwrap());
            drop(space.invalidate(pages(9, 11), Event::Clear).await);
        }
        cache.flush().await;
        unmap.await;
        assert_eq!(nic.mapped(), 0);
        assert!(cache.stats().deregister_failures == 32);
    });
}

#[test]
fn each_failure_of_the_device_is_reported_also_when_no_caller_is_told() {
    let (space, nic, reports) =
        (AddressSpace::new(), Nic::default(), Arc::new(Mutex::new(Vec::new())));
    let log = reports.clone();
    let on_failure = move |failure: &Failure<'_>| {
        log.lock().unwrap().push((failure.operation, failure.range, failure.error.to_string()));
    };
    let cache =
        RegistrationCache::<Nic>::builder().on_failure(on_failure).build(&space, nic.clone());
    block_on(async {
        nic.state.lock().unwrap().fail_register = 1;
        assert!(cache.get(pages(1, 1)).await.is_err());
        drop(cache.get(pages(1, 2)).await.unwrap());
        nic.state.lock().unwrap().fail_deregister = 1;
        remap(&space, &nic, pages(1, 1)).await;
    });
    let reports = reports.lock().unwrap();
    let expected = [
        (Operation::Register, pages(1, 1), "no".into()),
        (Operation::Deregister, pages(1, 2), "busy".into()),
    ];
    assert_eq!(*reports, expected);
}

#[test]
fn a_cache_that_is_dropped_while_it_registers_leaves_nothing_behind() {
    let (space, nic) = (AddressSpace::new(), Nic { slow: Some(Arc::default()), ..Nic::default() });
    let cache = RegistrationCache::new(&space, nic.clone());
    let again = cache.clone();
    assert!(cache.get(pages(1, 1)).now_or_never().is_none());
    assert!(again.get(pages(5, 1)).now_or_never().is_none());
    assert_eq!(space.len(), 2);
    drop(cache);
    assert_eq!(space.len(), 2, "another handle goes on");
    drop(again);
    assert_eq!(
        (space.len(), Arc::strong_count(&nic.state)),
        (0, 1),
        "its notifiers and its device are gone"
    );
}

#[test]
fn in_a_released_space_nothing_is_registered() {
    let (space, nic, cache) = cache();
    block_on(async {
        drop(cache.get(pages(1, 1)).await.unwrap());
        space.release().await;
        assert_eq!(nic.mapped(), 0);
        assert!(matches!(
            cache.get(pages(1, 1)).await,
            Err(GetError::Unwatched(Unwatched::Released))
        ));
    });
}

/// Eviction against look-up against invalidation, on threads.
#[test]
fn under_load_no_transfer_is_stale_and_nothing_is_left() {
    let (space, nic) = (AddressSpace::new(), Nic::default());
    let cache = RegistrationCache::<Nic>::builder()
        .max_registrations(2)
        .merge(Merge::Touching)
        .build(&space, nic.clone());
    // A generation for each page, which changes only under the guard.
    let memory: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
    let random = |seed: u64| {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 33
        }
    };
    thread::scope(|scope| {
        for seed in 0..2 {
            let (cache, memory, mut next) = (&cache, &memory, random(seed));
            scope.spawn(move || {
                for _ in 0..1500 {
                    let (first, count) = (next() % 60, 1 + next() % 4);
                    let registration = block_on(cache.get(pages(first, count))).unwrap();
                    let before: Vec<_> =
                        memory.iter().map(|page| page.load(Ordering::Acquire)).collect();
                    thread::yield_now();
                    for page in first..first + count {
                        let now = memory[page as usize].load(Ordering::Acquire);
                        assert_eq!(
                            now, before[page as usize],
                            "page {page} changed while it was registered and in use"
                        );
                    }
                    drop(registration);
                }
            });
        }
        let (space, nic, memory, mut next) = (&space, &nic, &memory, random(77));
        scope.spawn(move || {
            for _ in 0..1500 {
                let (first, count) = (next() % 60, 1 + next() % 4);
                let range = pages(first, count);
                let guard = block_on(space.invalidate(range, Event::Unmap));
                let mapped = nic
                    .state
                    .lock()
                    .unwrap()
                    .mapped
                    .values()
                    .any(|(mapped, _)| mapped.overlaps(range));
                assert!(!mapped, "the device maps what is being unmapped");
                for page in first..first + count {
                    memory[page as usize].fetch_add(1, Ordering::AcqRel);
                }
                drop(guard);
            }
        });
    });
    block_on(cache.flush());
    let CacheStats { registrations, pinned_bytes, hits, invalidations, evictions, .. } =
        cache.stats();
    assert_eq!((registrations, pinned_bytes, nic.mapped()), (0, 0, 0));
    assert!(hits > 0 && invalidations > 0 && evictions > 0, "{:?}", cache.stats());
}
