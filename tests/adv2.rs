//! Attacks on the registration cache: K1, K3, K4, K7 to K9.
#![cfg(all(feature = "cache", not(any(loom, shuttle))))]
#![allow(missing_docs, unreachable_pub, dead_code)]

#[path = "cache/device.rs"]
mod device;
mod support;

use device::{Act, Card, Refused};
use futures::FutureExt;
use futures::executor::block_on;
use shootdown::cache::{Device, GetError, Match, Merge, Overlap, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace, Event};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};
use support::{Gate, PAGE, Task, now, pages};

mod counted {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;
    std::thread_local!(static LIVE: Cell<isize> = const { Cell::new(0) });
    pub struct Counted;
    unsafe impl GlobalAlloc for Counted {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            let _ = LIVE.try_with(|live| live.set(live.get() + layout.size() as isize));
            unsafe { System.alloc(layout) }
        }
        unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
            let _ = LIVE.try_with(|live| live.set(live.get() - layout.size() as isize));
            unsafe { System.dealloc(at, layout) }
        }
    }
    pub fn live() -> isize {
        LIVE.with(Cell::get)
    }
}

#[global_allocator]
static COUNTED: counted::Counted = counted::Counted;

fn exclusive(overlap: Overlap) -> (AddressSpace, Card, RegistrationCache<Card>) {
    let (space, card) = (AddressSpace::new(), Card::default());
    card.state.lock().unwrap().exclusive = true;
    let cache = RegistrationCache::builder().overlap(overlap).build(&space, card.clone());
    (space, card, cache)
}

// ---- 1 two in the device at once ----------------------------------------------------------

#[derive(Default)]
struct Inside {
    mapped: BTreeMap<u64, AddressRange>,
    next: u64,
    violations: Vec<(AddressRange, AddressRange)>,
}

#[derive(Clone, Default)]
struct Racy {
    inside: Arc<Mutex<Inside>>,
    go: Arc<AtomicBool>,
}

impl Device for Racy {
    type Handle = u64;
    type Error = Refused;

    async fn register(&self, range: AddressRange) -> Result<u64, Refused> {
        let key = {
            let mut inside = self.inside.lock().unwrap();
            if let Some(other) = inside.mapped.values().find(|other| other.overlaps(range)).copied() {
                inside.violations.push((range, other));
            }
            inside.next += 1;
            let key = inside.next;
            inside.mapped.insert(key, range);
            key
        };
        while range == pages(0, 4) && !self.go.load(Ordering::Acquire) {
            support::Yields(1).await;
        }
        Ok(key)
    }

    async fn deregister(&self, _: AddressRange, key: u64) -> Result<(), StillRegistered<u64, Refused>> {
        support::Yields(100).await;
        self.inside.lock().unwrap().mapped.remove(&key);
        Ok(())
    }
}

/// An abandoned registration of 0..4 is ended by an invalidation of page 0 on another thread while
/// a get of 2..4 looks whether anything is in its way.
#[test]
fn k7_a_registration_that_leaves_between_two_looks_does_not_overlap_the_next() {
    let (space, racy) = (AddressSpace::new(), Racy::default());
    let cache = RegistrationCache::builder().overlap(Overlap::Wait).build(&space, racy.clone());
    let (turn, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let until = |value: u64| {
        let mut spins = 0_u32;
        while turn.load(Ordering::Acquire) != value {
            spins += 1;
            if spins.is_multiple_of(1000) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    };
    let ends = Instant::now() + Duration::from_secs(40);
    let mut rounds = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0_u64;
            loop {
                until(4 * round + 1);
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
                assert!(unmap.poll().is_pending());
                turn.store(4 * round + 2, Ordering::Release);
                until(4 * round + 3);
                for _ in 0..(round * 7 % 400) {
                    std::hint::spin_loop();
                }
                racy.go.store(true, Ordering::Release);
                loop {
                    if let Poll::Ready(guard) = unmap.poll() {
                        drop(guard);
                        break;
                    }
                }
                turn.store(4 * round + 4, Ordering::Release);
                round += 1;
            }
        });
        let mut round = 0_u64;
        while Instant::now() < ends && racy.inside.lock().unwrap().violations.is_empty() {
            racy.go.store(false, Ordering::Release);
            assert!(cache.get(pages(0, 4)).now_or_never().is_none());
            turn.store(4 * round + 1, Ordering::Release);
            until(4 * round + 2);
            turn.store(4 * round + 3, Ordering::Release);
            drop(block_on(cache.get(pages(2, 2))).unwrap());
            until(4 * round + 4);
            block_on(cache.flush());
            assert_eq!(racy.inside.lock().unwrap().mapped.len(), 0);
            round += 1;
        }
        rounds = round;
        stop.store(true, Ordering::Release);
        turn.store(4 * round + 1, Ordering::Release);
    });
    let violations = &racy.inside.lock().unwrap().violations;
    assert!(violations.is_empty(), "after {rounds} rounds: {violations:?}");
}

// ---- 2 starvation ---------------------------------------------------------------------------

/// A caller that is polled each time it is woken, only not within 64 polls of the next one.
#[test]
fn k7_a_caller_whose_thread_is_slow_has_its_turn_in_the_end() {
    let (_space, card, cache) = exclusive(Overlap::Wait);
    let mut held = Some(now(cache.get(pages(1, 1))).unwrap());
    let mut slow = Task::new(cache.get(pages(0, 2)));
    slow.expect_pending();
    for at in 0..70 {
        let mut next = Task::new(cache.get(pages(1, 2 + at)));
        next.expect_pending();
        drop(held.take());
        // Its turn comes, it was registered, and this one takes it away before it is polled.
        held = Some(next.finish().unwrap());
        if let Poll::Ready(slow) = slow.poll() {
            let error = slow.map(|got| got.range()).unwrap_err();
            panic!(
                "nothing was invalidated, but: {error} (after {} others; {:?})",
                at + 1,
                card.state.lock().unwrap().registered
            );
        }
    }
    drop(held);
    assert_eq!(slow.finish().unwrap().range(), pages(0, 2));
}

#[test]
fn k7_threads_that_ask_for_overlapping_ranges_are_all_served_without_an_error() {
    let (_space, _card, cache) = exclusive(Overlap::Wait);
    let ends = Instant::now() + Duration::from_secs(5);
    let results: Vec<_> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..4)
            .map(|at| {
                let cache = &cache;
                scope.spawn(move || {
                    let (mut served, mut refused, mut longest) = (0_u64, 0_u64, Duration::ZERO);
                    while Instant::now() < ends {
                        let began = Instant::now();
                        match cache.get(pages(at, 2)).wait() {
                            Ok(got) => {
                                served += 1;
                                drop(got);
                            }
                            Err(GetError::Invalidated { .. }) => refused += 1,
                            Err(error) => panic!("{error}"),
                        }
                        longest = longest.max(began.elapsed());
                    }
                    (served, refused, longest)
                })
            })
            .collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let stats = cache.stats();
    println!("{results:?} {stats:?}");
    assert!(results.iter().all(|(_, refused, _)| *refused == 0), "{results:?}");
    assert!(stats.collisions == 0, "nothing was invalidated: {} collisions, {} misses", stats.collisions, stats.misses);
}

// ---- 3 Merge ----------------------------------------------------------------------------------

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
    assert_eq!((stats.register_failures, stats.registrations), (0, 6), "all that was idle elsewhere was given up");
}

#[test]
fn k7_one_that_is_lost_beside_a_get_does_not_refuse_it() {
    let (space, card) = (AddressSpace::new(), Card::default());
    card.state.lock().unwrap().exclusive = true;
    card.state.lock().unwrap().never_resets = true;
    let builder = RegistrationCache::builder().overlap(Overlap::Merge).merge(Merge::Touching);
    let cache = builder.build(&space, card.clone());
    drop(now(cache.get(pages(0, 2))).unwrap());
    card.next_deregister(&[Act::Panic]);
    // It touches only.
    let got = now(cache.get(pages(2, 2)));
    assert!(got.is_ok(), "{:?}", got.err());
}

// ---- 4 still_valid ------------------------------------------------------------------------------

/// A device whose memory has numbers: the handle keeps the one of its time.
#[derive(Clone, Default)]
struct Gpu {
    buffer: Arc<AtomicU64>,
    gate: Option<Gate>,
    calls: Arc<AtomicUsize>,
}

impl Device for Gpu {
    type Handle = u64;
    type Error = Refused;

    async fn register(&self, range: AddressRange) -> Result<u64, Refused> {
        if let Some(gate) = &self.gate
            && range.start() >= PAGE
        {
            gate.clone().await;
        }
        Ok(self.buffer.load(Ordering::Acquire))
    }

    async fn deregister(&self, _: AddressRange, _: u64) -> Result<(), StillRegistered<u64, Refused>> {
        Ok(())
    }

    fn still_valid(&self, _: AddressRange, handle: &u64) -> bool {
        self.calls.fetch_add(1, Ordering::AcqRel);
        *handle == self.buffer.load(Ordering::Acquire)
    }
}

#[test]
fn k9_many_outdated_registrations_are_no_reason_to_refuse() {
    for (tries, count) in [(1, 2), (64, 70)] {
        let (space, gpu) = (AddressSpace::new(), Gpu::default());
        let cache = RegistrationCache::builder().tries(tries).build(&space, gpu.clone());
        for at in 1..=count {
            drop(now(cache.get(pages(0, at))).unwrap());
        }
        gpu.buffer.store(1, Ordering::Release);
        let got = now(cache.get(pages(0, 1))).map(|got| *got.handle());
        assert!(matches!(got, Ok(1)), "tries({tries}), {count} outdated: {got:?}");
    }
}

#[test]
fn k9_no_piece_that_the_device_does_not_vouch_for_is_given_to_the_caller() {
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        let gate = Gate::default();
        let (space, gpu) = (AddressSpace::new(), Gpu { gate: Some(gate.clone()), ..Gpu::default() });
        let cache = RegistrationCache::builder().max_registration(PAGE).overlap(overlap).build(&space, gpu.clone());
        drop(now(cache.get(pages(0, 1))).unwrap());
        let mut all = Task::new(cache.get_all(pages(0, 2)));
        all.expect_pending();
        gpu.buffer.store(1, Ordering::Release);
        gate.open();
        let handles: Vec<_> = all.finish().unwrap().iter().map(|one| *one.handle()).collect();
        assert_eq!(handles, [1, 1], "{overlap:?}: the first is of a buffer that is gone");
    }
}

#[test]
fn k9_a_get_that_waited_is_not_given_what_is_outdated_by_then() {
    let gate = Gate::default();
    let (space, gpu) = (AddressSpace::new(), Gpu { gate: Some(gate.clone()), ..Gpu::default() });
    let cache = RegistrationCache::new(&space, gpu.clone());
    let mut waits = Task::new(cache.get(pages(1, 1)));
    waits.expect_pending();
    gate.open();
    drop(now(cache.get(pages(1, 1))).unwrap());
    gpu.buffer.store(1, Ordering::Release);
    let asked = gpu.calls.load(Ordering::Acquire);
    let got = waits.finish().unwrap();
    assert_eq!((*got.handle(), gpu.calls.load(Ordering::Acquire) > asked), (1, true));
}

// ---- 5 deadlocks that the docs exclude --------------------------------------------------------------

/// The docs of `Overlap`: do not await a get while you hold one that overlaps *without covering*.
#[test]
fn k7_a_get_of_what_a_held_registration_covers_does_not_wait_for_it() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::builder().matching(Match::Exact).overlap(Overlap::Wait).build(&space, card);
    let _held = now(cache.get(pages(0, 2))).unwrap();
    assert!(cache.get(pages(0, 1)).now_or_never().is_some(), "Exact: it waits for its own caller, for ever");
}

#[test]
fn k7_a_flush_does_not_make_a_get_wait_for_its_own_caller() {
    let (_space, _card, cache) = exclusive(Overlap::Wait);
    let _held = now(cache.get(pages(0, 2))).unwrap();
    now(cache.flush_range(pages(0, 1)));
    assert!(now(async { cache.get(pages(0, 2)).now_or_never().is_some() }), "it waits for its own caller, for ever");
}

// ---- 6 kept ---------------------------------------------------------------------------------------------

#[test]
fn k8_a_dropped_get_all_leaves_none_in_use_although_another_get_is_not_polled() {
    let gate = Gate::default();
    let (space, card) = (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::builder().max_registration(PAGE).max_registrations(1).build(&space, card.clone());
    let mut other = Task::new(cache.get(pages(0, 1)));
    other.expect_pending();
    let unmap = now(space.invalidate(pages(1, 1), Event::Clear));
    let mut all = Task::new(cache.get_all(pages(0, 2)));
    all.expect_pending();
    gate.open();
    all.expect_pending();
    assert_eq!(card.mapped(), [0]);
    drop(all);
    drop(unmap);
    drop(now(cache.get(pages(50, 1))).unwrap());
    assert_eq!(card.mapped(), [50], "nobody has it, and the limit is one");
    drop(other);
}

#[test]
fn k3_a_full_device_gets_room_although_another_get_is_not_polled() {
    let gate = Gate::default();
    let (space, card) = (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    card.state.lock().unwrap().room = Some(1);
    let cache = RegistrationCache::builder().max_registration(PAGE).build(&space, card.clone());
    let mut other = Task::new(cache.get(pages(0, 1)));
    other.expect_pending();
    let unmap = now(space.invalidate(pages(1, 1), Event::Clear));
    let mut all = Task::new(cache.get_all(pages(0, 2)));
    all.expect_pending();
    gate.open();
    all.expect_pending();
    drop(all);
    drop(unmap);
    let got = now(cache.get(pages(50, 1)));
    assert!(got.is_ok(), "{:?}", got.err());
    drop(other);
}

// ---- 7 flush --------------------------------------------------------------------------------------------

#[test]
fn k3_what_was_asked_of_the_device_before_a_flush_is_not_found_after_it() {
    let gate = Gate::default();
    let (space, card) = (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::new(&space, card);
    let mut under_way = Task::new(cache.get(pages(0, 1)));
    under_way.expect_pending();
    now(cache.flush_range(pages(0, 1)));
    gate.open();
    let before = under_way.finish().unwrap();
    let after = now(cache.get(pages(0, 1))).unwrap();
    assert_ne!(before.handle(), after.handle(), "registered before the flush, found after it");
}

// ---- 8 growth and costs ---------------------------------------------------------------------------------

#[test]
fn growth_of_gets_that_give_up_and_are_invalidated() {
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        let (space, card, cache) = exclusive(overlap);
        let cycle = || {
            assert!(cache.get(pages(0, 1)).now_or_never().is_none());
            drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
        };
        (0..100).for_each(|_| cycle());
        let before = counted::live();
        (0..20_000).for_each(|_| cycle());
        let grown = counted::live() - before;
        assert_eq!(card.mapped().len(), 0);
        assert!(grown < 10_000, "{overlap:?}: {grown} bytes more after 20000 cycles, with nothing registered");
    }
}

#[derive(Clone)]
struct Quick;
impl Device for Quick {
    type Handle = ();
    type Error = Refused;
    async fn register(&self, _: AddressRange) -> Result<(), Refused> {
        Ok(())
    }
    async fn deregister(&self, _: AddressRange, (): ()) -> Result<(), StillRegistered<(), Refused>> {
        Ok(())
    }
}

fn time(times: u32, mut work: impl FnMut()) -> Duration {
    let began = Instant::now();
    (0..times).for_each(|_| work());
    began.elapsed() / times
}

#[test]
fn k4_a_hit_costs_the_logarithm_of_what_is_registered() {
    for (name, exact) in [("covering", Match::Covering), ("exact", Match::Exact)] {
        let mut took = Vec::new();
        for count in [100_u64, 20_000] {
            let space = AddressSpace::new();
            let cache = RegistrationCache::builder().matching(exact).build(&space, Quick);
            // Messages within a buffer, and the buffer.
            for at in 0..count {
                drop(now(cache.get(pages(at, 1))).unwrap());
            }
            drop(now(cache.get(pages(0, count))).unwrap());
            took.push(time(200, || drop(now(cache.get(pages(0, count))).unwrap())));
        }
        println!("{name}: {took:?}");
        assert!(took[1] < took[0] * 10, "{name}: a hit takes {took:?} with 100 and 20000 registrations");
    }
}

/// Disjoint ranges have nothing to do with each other.
#[test]
fn k4_a_miss_does_not_depend_on_how_many_others_register() {
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        let mut took = Vec::new();
        for count in [100_u64, 5_000] {
            let gate = Gate::default();
            let (space, gpu) = (AddressSpace::new(), Gpu { gate: Some(gate.clone()), ..Gpu::default() });
            let cache = RegistrationCache::builder().overlap(overlap).build(&space, gpu);
            let mut others: Vec<_> = (1..=count).map(|at| Task::new(cache.get(pages(10 * at, 1)))).collect();
            others.iter_mut().for_each(Task::expect_pending);
            // Page 0 does not wait for the gate.
            took.push(time(50, || {
                drop(now(cache.get(pages(0, 1))).unwrap());
                drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
            }));
        }
        println!("{overlap:?}: {took:?}");
        assert!(took[1] < took[0] * 4, "{overlap:?}: a miss takes {took:?} beside 100 and 5000 others");
    }
}

/// Those who wait for one range: each that leaves wakes all.
#[test]
fn k4_a_queue_of_waiters_takes_time_in_proportion_to_it() {
    let mut took = Vec::new();
    for count in [200_u64, 1_600] {
        let space = AddressSpace::new();
        let cache = RegistrationCache::builder().overlap(Overlap::Wait).build(&space, Quick);
        let held = now(cache.get(pages(0, 1))).unwrap();
        let mut waiting: Vec<_> = (0..count).map(|at| Task::new(cache.get(pages(0, 2 + at % 2)))).collect();
        waiting.iter_mut().for_each(Task::expect_pending);
        let began = Instant::now();
        drop(held);
        let mut polls = 0_u64;
        while !waiting.is_empty() {
            waiting.retain_mut(|one| {
                if !one.is_woken() {
                    return true;
                }
                polls += 1;
                one.poll().is_pending()
            });
        }
        took.push((began.elapsed(), polls));
    }
    println!("{took:?}");
    assert!(took[1].0 < took[0].0 * 8 * 3, "8 times the waiters: {took:?} (time, polls)");
}

// ---- 9 held ---------------------------------------------------------------------------------------------

#[test]
fn k8_at_the_ends_of_the_address_space() {
    let top = AddressRange::try_from(u64::MAX - 3 * PAGE + 1..=u64::MAX).unwrap();
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        for most in [PAGE, 2 * PAGE, 3 * PAGE, u64::MAX - 1, u64::MAX] {
            let space = AddressSpace::new();
            let cache = RegistrationCache::builder().overlap(overlap).max_registration(most).build(&space, Quick);
            let all = now(cache.get_all(top)).unwrap();
            assert_eq!((all[0].range().start(), all.last().unwrap().range().last()), (top.start(), u64::MAX));
            drop(all);
            if most > 3 * PAGE && most < u64::MAX {
                let whole = now(cache.get_all(AddressRange::ALL)).unwrap();
                assert_eq!(whole.len(), 2);
                assert!(matches!(cache.get(AddressRange::ALL).now_or_never(), Some(Err(GetError::TooLarge { .. }))));
            }
        }
    }
}

/// Cancelled at each of its polls, the ones behind go on and nothing is left.
#[test]
fn k7_cancelled_at_each_poll_nobody_hangs() {
    for overlap in [Overlap::Wait, Overlap::Merge] {
        for polls in 0..90 {
            for pieces in [false, true] {
                let (space, card) = (AddressSpace::new(), Card::default());
                card.state.lock().unwrap().exclusive = true;
                let most = if pieces { 2 * PAGE } else { u64::MAX };
                let cache = RegistrationCache::builder().overlap(overlap).max_registration(most).build(&space, card.clone());
                drop(now(cache.get(pages(0, 2))).unwrap());
                let kept = Task::new(cache.get(pages(1, 2)));
                let (mut kept, mut gone) = (kept, Task::new(cache.get_all(pages(1, 4))));
                let _ = kept.poll();
                for _ in 0..polls {
                    if gone.is_woken() && gone.poll().is_ready() {
                        break;
                    }
                }
                let mut behind = Task::new(cache.get_all(pages(2, 4)));
                let _ = behind.poll();
                if let Poll::Ready(unmap) = Task::new(space.invalidate(pages(2, 1), Event::Unmap)).run() {
                    drop(unmap);
                }
                drop(gone);
                let behind = behind.finish().unwrap();
                assert!(!behind.is_empty());
                drop(behind);
                drop(kept.finish().unwrap());
                drop(kept);
                now(cache.flush());
                assert_eq!((card.mapped().len(), cache.stats().register_failures), (0, 0));
            }
        }
    }
}

/// Each overlaps its neighbours only: to know whom to wait for, each goes along the whole chain.
#[test]
fn k4_a_chain_of_waiters_takes_time_in_proportion_to_it() {
    let mut took = Vec::new();
    for count in [50_u64, 400] {
        let space = AddressSpace::new();
        let cache = RegistrationCache::builder().matching(Match::Exact).overlap(Overlap::Wait).build(&space, Quick);
        let held = now(cache.get(pages(0, 1))).unwrap();
        let began = Instant::now();
        let mut waiting: Vec<_> = (0..count).map(|at| Task::new(cache.get(pages(at, 2)))).collect();
        waiting.iter_mut().for_each(|one| assert!(one.poll().is_pending()));
        let queued = began.elapsed();
        drop(held);
        while !waiting.is_empty() {
            waiting.retain_mut(|one| !one.is_woken() || one.poll().is_pending());
        }
        took.push((queued, began.elapsed()));
    }
    println!("{took:?}");
    assert!(took[1].1 < took[0].1 * 8 * 4, "8 times the waiters: {took:?} (queued, done)");
}

/// A single `get` that is not polled: another one has driven it.
#[test]
fn k3_k7_what_was_registered_for_a_get_that_is_not_polled_is_idle() {
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        for limit in [usize::MAX, 1] {
            let gate = Gate::default();
            let (space, card) = (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
            if limit > 1 {
                card.state.lock().unwrap().room = Some(1);
            }
            let builder = RegistrationCache::builder().overlap(overlap).max_registrations(limit);
            let cache = builder.build(&space, card.clone());
            let mut unpolled = Task::new(cache.get(pages(0, 2)));
            unpolled.expect_pending();
            let mut behind = Task::new(cache.get(pages(1, 1)));
            behind.expect_pending();
            gate.open();
            for _ in 0..5 {
                if behind.poll().is_ready() {
                    break;
                }
            }
            drop(behind);
            assert_eq!(card.mapped(), [0]);
            let got = now(cache.get(pages(50, 1)));
            assert!(got.is_ok(), "{overlap:?}: {:?}", got.err());
            drop(got);
            assert_eq!(card.mapped(), [50], "{overlap:?}, limit {limit}");
            drop(unpolled);
        }
    }
}

/// As `flush` scans all registrations under the lock that keeps look-ups out.
#[test]
fn k4_a_flush_of_a_range_does_not_depend_on_what_is_registered_elsewhere() {
    let mut took = Vec::new();
    for count in [100_u64, 20_000] {
        let space = AddressSpace::new();
        let cache = RegistrationCache::new(&space, Quick);
        for at in 1..=count {
            drop(now(cache.get(pages(10 * at, 1))).unwrap());
        }
        took.push(time(50, || now(cache.flush_range(pages(0, 1)))));
    }
    println!("{took:?}");
    assert!(took[1] < took[0] * 10, "{took:?} with 100 and 20000 registrations elsewhere");
}

/// An executor whose other tasks take 200 microseconds between two polls, beside two busy threads.
#[test]
fn k7_a_get_on_a_busy_executor_is_not_told_of_invalidations_that_never_were() {
    let (space, card) = (AddressSpace::new(), Card::default());
    card.state.lock().unwrap().exclusive = true;
    let cache = RegistrationCache::builder().matching(Match::Exact).overlap(Overlap::Wait).build(&space, card);
    let stop = AtomicBool::new(false);
    let (mut polls, mut error) = (0_u64, None);
    std::thread::scope(|scope| {
        for at in 1..3_u64 {
            let (cache, stop) = (&cache, &stop);
            scope.spawn(move || {
                let mut count = 0;
                while !stop.load(Ordering::Acquire) {
                    count += 1;
                    drop(cache.get(pages(1, at + 2 * (count % 2))).wait().unwrap());
                }
            });
        }
        let ends = Instant::now() + Duration::from_secs(5);
        let mut served = 0;
        while Instant::now() < ends && error.is_none() {
            let mut slow = Task::new(cache.get(pages(0, 2)));
            error = loop {
                let busy = Instant::now() + Duration::from_micros(200);
                while Instant::now() < busy {
                    std::hint::spin_loop();
                }
                if slow.is_woken() {
                    polls += 1;
                    match slow.poll() {
                        Poll::Ready(Ok(_)) => {
                            served += 1;
                            break None;
                        }
                        Poll::Ready(Err(error)) => break Some(error),
                        Poll::Pending => {}
                    }
                }
            };
        }
        println!("{served} served in {polls} polls, {:?}", cache.stats());
        stop.store(true, Ordering::Release);
    });
    assert!(error.is_none(), "{error:?} after {polls} polls");
}

/// A device that must not have two that overlap, with random callers that give up, on threads.
#[derive(Clone, Default)]
struct Strict(Arc<Mutex<Inside>>);

impl Device for Strict {
    type Handle = u64;
    type Error = Refused;

    async fn register(&self, range: AddressRange) -> Result<u64, Refused> {
        let key = {
            let mut inside = self.0.lock().unwrap();
            if let Some(other) = inside.mapped.values().find(|other| other.overlaps(range)).copied() {
                inside.violations.push((range, other));
            }
            inside.next += 1;
            let key = inside.next;
            inside.mapped.insert(key, range);
            key
        };
        support::Yields((key % 4) as u32).await;
        if key % 11 == 0 {
            self.0.lock().unwrap().mapped.remove(&key);
            return Err(Refused);
        }
        Ok(key)
    }

    async fn deregister(&self, _: AddressRange, key: u64) -> Result<(), StillRegistered<u64, Refused>> {
        support::Yields((key % 3) as u32).await;
        let mut inside = self.0.lock().unwrap();
        inside.next += 1;
        if inside.next % 7 == 0 {
            return Err(StillRegistered { handle: key, error: Refused });
        }
        inside.mapped.remove(&key).expect("deregistered once");
        Ok(())
    }
}

#[test]
fn k7_on_threads_nobody_hangs_and_nothing_is_left() {
    for overlap in [Overlap::Wait, Overlap::Merge] {
        let (space, strict) = (AddressSpace::new(), Strict::default());
        let cache = RegistrationCache::builder().overlap(overlap).max_registration(8 * PAGE).build(&space, strict.clone());
        let ends = Instant::now() + Duration::from_secs(8);
        let (progress, done) = ([const { AtomicU64::new(0) }; 5], AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for at in 0..5_u64 {
                let (cache, space, progress, done) = (&cache, &space, &progress, &done);
                scope.spawn(move || {
                    let mut state = at + 1;
                    let mut random = move || {
                        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        state >> 33
                    };
                    while Instant::now() < ends {
                        let range = pages(random() % 12, 1 + random() % 6);
                        match (at, random() % 4) {
                            (4, 0) => cache.flush_range(range).wait(),
                            (4, _) => drop(space.invalidate(range, Event::Unmap).wait()),
                            (_, 0) => {
                                let mut given_up = Task::new(cache.get_all(range));
                                for _ in 0..random() % 20 {
                                    if given_up.poll().is_ready() {
                                        break;
                                    }
                                }
                            }
                            (_, 1) => drop(cache.get_all(range).wait()),
                            _ => drop(cache.get(range).wait()),
                        }
                        progress[at as usize].fetch_add(1, Ordering::Relaxed);
                    }
                    done.fetch_add(1, Ordering::Release);
                });
            }
            let mut last = Vec::new();
            while done.load(Ordering::Acquire) < 5 {
                std::thread::sleep(Duration::from_secs(5));
                let now: Vec<_> = progress.iter().map(|one| one.load(Ordering::Relaxed)).collect();
                let stuck = last == now && done.load(Ordering::Acquire) < 5;
                if stuck {
                    println!("{overlap:?}: nobody goes on: {now:?}, {} over, {:?}", done.load(Ordering::Acquire), space.active());
                    std::process::exit(77);
                }
                last = now;
            }
            println!("{overlap:?}: {last:?}");
        });
        cache.flush().wait();
        let inside = strict.0.lock().unwrap();
        assert_eq!((inside.mapped.len(), cache.stats().pinned_bytes), (0, 0));
        assert!(
            inside.violations.is_empty(),
            "{overlap:?}: {} of {}: {:?}",
            inside.violations.len(),
            inside.next,
            inside.violations[0]
        );
    }
}

/// F1: it must not, but nothing of another one is lost.
#[derive(Default)]
struct Calls(Mutex<Option<RegistrationCache<Arc<Calls>>>>, AtomicUsize);

impl Device for Calls {
    type Handle = ();
    type Error = Refused;
    async fn register(&self, _: AddressRange) -> Result<(), Refused> {
        Ok(())
    }
    async fn deregister(&self, _: AddressRange, (): ()) -> Result<(), StillRegistered<(), Refused>> {
        Ok(())
    }
    fn still_valid(&self, _: AddressRange, (): &()) -> bool {
        let cache = self.0.lock().unwrap().take();
        if let Some(cache) = cache {
            let _ = cache.get(pages(5, 1)).now_or_never();
            let _ = cache.flush().now_or_never();
            drop(cache);
        }
        self.1.fetch_add(1, Ordering::Relaxed) % 2 == 0
    }
}

#[test]
fn f1_a_device_that_calls_the_cache_when_it_is_asked_hangs_nobody() {
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        let (space, device) = (AddressSpace::new(), Arc::new(Calls::default()));
        let cache = RegistrationCache::builder().overlap(overlap).build(&space, device.clone());
        for _ in 0..4 {
            drop(now(cache.get(pages(0, 1))).unwrap());
            *device.0.lock().unwrap() = Some(cache.clone());
            drop(now(cache.get(pages(0, 1))).unwrap());
        }
        now(cache.flush());
        assert_eq!((cache.stats().registrations, cache.stats().pinned_bytes, space.len()), (0, 0, 0));
    }
}

#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
#[path = "source/memory.rs"]
mod memory;

/// The union is watched as a whole, also what has been unmapped since the caller asked.
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
#[test]
fn k7_m1_a_merge_is_not_refused_because_a_neighbour_was_unmapped() {
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = shootdown::source::Uffd::builder().open(&space).unwrap();
    std::thread::spawn(move || reader.run());
    std::thread::spawn(move || deliveries.run());
    while !uffd.is_reading() {
        std::thread::yield_now();
    }
    let cache = RegistrationCache::builder().overlap(Overlap::Merge).watch(uffd.clone()).build(&space, Quick);
    // A hole of one page between others, which no other thread's memory fits in.
    let memory = memory::Raw::map(5);
    memory.write(1);
    let held = cache.get(memory.part(1, 2).range()).wait().unwrap();
    let mut waits = Task::new(cache.get(memory.part(2, 3).range()));
    waits.expect_pending();
    memory.part(1, 1).unmap();
    drop(held);
    let got = block_on(std::future::poll_fn(|cx| {
        cx.waker().wake_by_ref();
        waits.poll()
    }));
    let got = got.expect("its own pages are mapped");
    // New memory in the hole is not what the device was given.
    drop(got);
    assert!(memory.part(1, 1).map_again());
    let before = cache.stats().misses;
    let new = cache.get(memory.part(1, 1).range()).wait().unwrap();
    assert_eq!(cache.stats().misses, before + 1, "{} was registered before this page was mapped", new.range());
}

#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
#[test]
fn k6_m1_exact_bytes_are_watched_by_their_pages() {
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = shootdown::source::Uffd::builder().open(&space).unwrap();
    std::thread::spawn(move || reader.run());
    std::thread::spawn(move || deliveries.run());
    while !uffd.is_reading() {
        std::thread::yield_now();
    }
    let cache = RegistrationCache::builder().matching(Match::Exact).watch(uffd.clone()).build(&space, Quick);
    let memory = memory::Raw::map(2);
    memory.write(1);
    let start = memory.range().start();
    let (one, two) = (AddressRange::new(start + 10, 20).unwrap(), AddressRange::new(start + 100, 4096).unwrap());
    for _ in 0..20 {
        for range in [one, two] {
            let got = cache.get(range).wait().unwrap();
            assert_eq!(got.range(), range);
            drop(got);
        }
        let before = cache.stats().misses;
        memory.map_over();
        drop(cache.get(one).wait().unwrap());
        drop(cache.get(two).wait().unwrap());
        assert_eq!(cache.stats().misses, before + 2, "both were of memory that is gone");
    }
}

// ---- 10 the device's error is the device's code ----------------------------------------------------------

#[derive(Debug)]
struct Bomb;
impl std::fmt::Display for Bomb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("bomb")
    }
}
impl std::error::Error for Bomb {}
impl Drop for Bomb {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            device::throw("the error fails when it is dropped");
        }
    }
}

struct Bombs(Gate);
impl Device for Bombs {
    type Handle = ();
    type Error = Bomb;
    async fn register(&self, range: AddressRange) -> Result<(), Bomb> {
        if range.start() == 0 {
            self.0.clone().await;
            return Err(Bomb);
        }
        Ok(())
    }
    async fn deregister(&self, _: AddressRange, (): ()) -> Result<(), StillRegistered<(), Bomb>> {
        Ok(())
    }
}

/// Of a registration whose caller has gone: `make_way`, `flush` and an invalidation wait for it.
#[test]
fn f1_an_error_that_panics_when_it_is_dropped_does_not_reach_callers_of_other_ranges() {
    let mut reached = Vec::new();
    for what in ["get", "flush", "invalidate"] {
        let gate = Gate::default();
        let space = AddressSpace::new();
        let cache = RegistrationCache::builder().overlap(Overlap::Wait).build(&space, Bombs(gate.clone()));
        assert!(cache.get(pages(0, 2)).now_or_never().is_none());
        gate.open();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match what {
            "get" => drop(now(cache.get(pages(1, 2))).map_err(std::mem::forget)),
            "flush" => now(cache.flush()),
            _ => drop(now(space.invalidate(pages(0, 1), Event::Unmap))),
        }));
        if ended.is_err() {
            reached.push(what);
        }
    }
    assert!(reached.is_empty(), "{reached:?} panic");
}

// ---- 11 a guard of other memory ------------------------------------------------------------------------------

/// Whoever holds it asks for memory that is not being invalidated, behind a get that waits for the guard.
#[test]
fn k7_a_get_of_stable_memory_does_not_wait_for_an_invalidation_of_other_memory() {
    let mut waits = Vec::new();
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        // Covered by what the other one asks for, and not.
        for range in [pages(0, 1), pages(7, 2)] {
            let (space, card) = (AddressSpace::new(), Card::default());
            let cache = RegistrationCache::builder().overlap(overlap).build(&space, card);
            let guard = now(space.invalidate(pages(4, 1), Event::Clear));
            let mut wide = Task::new(cache.get(pages(0, 8)));
            wide.expect_pending();
            let mut small = Task::new(cache.get(range));
            if small.run().is_pending() {
                waits.push((overlap, range));
            }
            drop(guard);
        }
    }
    assert!(waits.is_empty(), "each waits for its own caller's guard: {waits:?}");
}

// ---- 12 limits and unions ------------------------------------------------------------------------------------

#[test]
fn k3_a_union_does_not_exceed_a_limit_that_the_range_alone_keeps() {
    let (space, card) = (AddressSpace::new(), Card::default());
    let cache = RegistrationCache::builder().overlap(Overlap::Merge).max_bytes(10 * PAGE).build(&space, card.clone());
    drop(now(cache.get(pages(100, 1))).unwrap());
    drop(now(cache.get(pages(0, 8))).unwrap());
    let got = now(cache.get(pages(7, 8))).unwrap();
    let pinned = cache.stats().pinned_bytes / PAGE;
    assert!(pinned <= 10, "{pinned} pages for {}, mapped {:?}", got.range(), card.mapped());
}

/// A window that moves along a buffer.
#[test]
fn k7_a_merge_of_a_moving_window_does_not_register_ever_more() {
    let (_space, card, cache) = exclusive(Overlap::Merge);
    for at in 0..100 {
        drop(now(cache.get(pages(at, 2))).unwrap());
    }
    let (pinned, registered) = (cache.stats().pinned_bytes / PAGE, card.state.lock().unwrap().registered);
    assert!(pinned <= 4, "{pinned} pages are pinned for two, after {registered} registrations");
}

/// What a union takes in is not asked about.
#[test]
fn k9_a_merge_does_not_take_in_what_the_device_does_not_vouch_for() {
    let (space, gpu) = (AddressSpace::new(), Gpu::default());
    let cache = RegistrationCache::builder().overlap(Overlap::Merge).build(&space, gpu.clone());
    drop(now(cache.get(pages(0, 3))).unwrap());
    gpu.buffer.store(1, Ordering::Release);
    assert_eq!(now(cache.get(pages(2, 2))).unwrap().range(), pages(2, 2), "0 and 1 are of a buffer that has gone");
}

#[test]
fn k8_a_piece_that_fails_late_leaves_all_others_idle() {
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        for (fails, pieces) in [(2, 3), (4, 5), (0, 2)] {
            let (space, card) = (AddressSpace::new(), Card::default());
            let builder = RegistrationCache::builder().max_registration(PAGE).max_registrations(2).overlap(overlap);
            let cache = builder.build(&space, card.clone());
            let mut acts = vec![Act::Succeed; fails];
            acts.extend([Act::Refuse; 4]);
            card.next_register(&acts);
            let error = now(cache.get_all(pages(0, pieces))).unwrap_err();
            assert!(matches!(error, GetError::Register(_)), "{error:?}");
            card.state.lock().unwrap().register.clear();
            drop(now(cache.get(pages(50, 1))).unwrap());
            assert!(card.mapped().len() <= 2, "{overlap:?} {:?}", card.mapped());
            drop(now(space.invalidate(pages(0, 60), Event::Unmap)));
            assert_eq!((card.mapped().len(), cache.stats().pinned_bytes, space.len()), (0, 0, 0));
        }
    }
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
