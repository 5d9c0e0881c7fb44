//! K7: turns of callers whose ranges overlap, and how long each has to take what it waited for.

use crate::device::{Card, Refused};
use crate::support::{Gate, PAGE, Task, now, pages};
use crate::vouched::Gpu;
use shootdown::cache::{Device, Match, Overlap, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace, Event};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::task::Poll;
use std::time::Duration;

/// A card that answers as CUDA does, with error 712.
pub fn exclusive(overlap: Overlap) -> (AddressSpace, Card, RegistrationCache<Card>) {
    let (space, card) = (AddressSpace::new(), Card::default());
    card.state.lock().unwrap().exclusive = true;
    let cache = RegistrationCache::builder().overlap(overlap).build(&space, card.clone());
    (space, card, cache)
}

/// The same with a clock that shows so many microseconds more each time that somebody looks.
fn with_clock(step: u64) -> (AddressSpace, RegistrationCache<Card>) {
    let (shown, card) = (AtomicU64::new(0), Card::default());
    card.state.lock().unwrap().exclusive = true;
    let clock = move || Duration::from_micros(shown.fetch_add(step, Ordering::Relaxed));
    let space = AddressSpace::builder().clock(clock).build();
    let cache = RegistrationCache::builder().overlap(Overlap::Wait).build(&space, card);
    (space, cache)
}

/// A caller that is polled each time it is woken, only not within 64 polls of the next one.
#[test]
fn k7_a_caller_whose_thread_is_slow_has_its_turn_in_the_end() {
    let (_space, cache) = with_clock(1000);
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
            panic!("nothing was invalidated, but: {error} (after {} others)", at + 1);
        }
    }
    assert_eq!(cache.stats().collisions, 0, "nothing was invalidated");
    drop(held);
    assert_eq!(slow.finish().unwrap().range(), pages(0, 2));
}

/// However often others look: a time slice of a busy machine is longer than many looks.
#[test]
fn k7_what_was_registered_for_a_caller_is_its_own_for_a_time_and_not_for_a_number_of_looks() {
    for (step, has_it) in [(10, true), (500, false)] {
        let (_space, cache) = with_clock(step);
        let held = now(cache.get(pages(1, 1))).unwrap();
        let mut first = Task::new(cache.get(pages(0, 2)));
        first.expect_pending();
        let mut next = Task::new(cache.get(pages(1, 2)));
        next.expect_pending();
        drop(held);
        // Each poll is a look; 20 milliseconds are C4's.
        let mut taken = (0..500).map(|_| next.poll()).find(Poll::is_ready);
        assert_eq!(taken.is_some(), !has_it, "{step} microseconds from look to look");
        assert_eq!(first.run().is_ready(), has_it);
        drop(taken.take());
    }
}

/// Who comes too late is before those who came later: also before the one that waits already.
#[test]
fn k7_a_caller_that_comes_too_late_keeps_its_place() {
    let (_space, cache) = with_clock(1000);
    let held = now(cache.get(pages(1, 1))).unwrap();
    let mut first = Task::new(cache.get(pages(0, 2)));
    first.expect_pending();
    let (mut next, mut last) =
        (Task::new(cache.get(pages(1, 2))), Task::new(cache.get(pages(1, 3))));
    next.expect_pending();
    last.expect_pending();
    drop(held);
    let held = next.finish().unwrap();
    first.expect_pending();
    last.expect_pending();
    drop(held);
    // The last one drives the turn before its own.
    (0..10).for_each(|_| assert!(last.poll().is_pending()));
    let Poll::Ready(held) = first.poll() else { panic!("it was registered for the first one") };
    last.expect_pending();
    drop(held);
    assert_eq!(last.finish().unwrap().range(), pages(1, 3));
    assert_eq!(cache.stats().collisions, 0);
}

#[test]
fn k7_threads_that_ask_for_overlapping_ranges_are_all_served_without_an_error() {
    let (_space, _card, cache) = exclusive(Overlap::Wait);
    std::thread::scope(|scope| {
        for at in 0..4 {
            let cache = &cache;
            scope.spawn(move || {
                (0..200).for_each(|_| drop(cache.get(pages(at, 2)).wait().unwrap()))
            });
        }
    });
    assert_eq!(cache.stats().collisions, 0, "nothing was invalidated");
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
                let cache = RegistrationCache::builder()
                    .overlap(overlap)
                    .max_registration(most)
                    .build(&space, card.clone());
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
                if let Poll::Ready(unmap) =
                    Task::new(space.invalidate(pages(2, 1), Event::Unmap)).run()
                {
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

/// The first that is polled drives those before it. (Where the device takes its time, each wake-up
/// of the one whose turn it is wakes all: any of them may be one that nobody polls.)
#[test]
fn k7_those_in_a_queue_are_polled_in_proportion_to_it() {
    for chain in [false, true] {
        let space = AddressSpace::new();
        let builder = RegistrationCache::builder().matching(Match::Exact).overlap(Overlap::Wait);
        let cache = builder.build(&space, Gpu::default());
        let held = now(cache.get(pages(0, 1))).unwrap();
        let range = |at: u64| if chain { pages(at, 2) } else { pages(0, 2 + at) };
        let mut waiting: Vec<_> = (0..300).map(|at| Task::new(cache.get(range(at)))).collect();
        waiting.iter_mut().for_each(Task::expect_pending);
        drop(held);
        let mut polls = 0;
        while !waiting.is_empty() {
            assert!(
                waiting.iter().any(Task::is_woken),
                "{} wait and nobody is woken",
                waiting.len()
            );
            waiting.retain_mut(|one| {
                polls += u32::from(one.is_woken());
                !one.is_woken() || one.poll().is_pending()
            });
        }
        assert!(polls <= 600, "{polls} polls of 300");
    }
}

/// Never deregisters. The next poll waits for the test twice if the flag is set.
struct Never(AtomicBool, Barrier);

impl Device for Never {
    type Handle = ();
    type Error = Refused;

    async fn register(&self, _: AddressRange) -> Result<(), Refused> {
        Ok(())
    }

    async fn deregister(
        &self,
        _: AddressRange,
        (): (),
    ) -> Result<(), StillRegistered<(), Refused>> {
        std::future::poll_fn(|_| {
            if self.0.swap(false, Ordering::SeqCst) {
                self.1.wait();
                self.1.wait();
            }
            Poll::Pending
        })
        .await
    }
}

#[test]
fn k7_one_that_goes_away_while_another_thread_polls_its_work_holds_that_one_up_no_longer() {
    let (space, device) =
        (AddressSpace::new(), Arc::new(Never(AtomicBool::new(false), Barrier::new(2))));
    let builder = RegistrationCache::builder().overlap(Overlap::Wait);
    let cache = builder.build(&space, device.clone());
    drop(now(cache.get(pages(0, 2))).unwrap());
    let mut first = Task::new(cache.get(pages(1, 2)));
    first.expect_pending();
    let mut behind = Task::new(cache.get(pages(2, 2)));
    device.0.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let polling = scope.spawn(|| behind.poll().is_pending());
        let barrier = &device.1;
        barrier.wait();
        drop(first);
        barrier.wait();
        assert!(polling.join().unwrap());
    });
    assert_eq!(behind.finish().unwrap().range(), pages(2, 2));
}

/// Another caller has driven the first one's turn. The gate closes again before the first looks.
#[test]
fn k7_a_gate_that_closes_again_at_once_takes_nothing_from_a_caller_whose_turn_is_over() {
    let gate = Gate::default();
    let space = AddressSpace::new();
    let card = Card { register_gate: Some(gate.clone()), ..Card::default() };
    let cache = RegistrationCache::builder().overlap(Overlap::Wait).build(&space, card.clone());
    let mut first = Task::new(cache.get(pages(0, 2)));
    first.expect_pending();
    let mut behind = Task::new(cache.get(pages(1, 2)));
    behind.expect_pending();
    gate.open();
    while card.mapped().is_empty() {
        assert!(behind.poll().is_pending());
    }
    drop(behind);
    let (pause, misses) = (space.pause(), cache.stats().misses);
    first.expect_pending();
    drop(pause);
    let pause = space.pause();
    first.expect_pending();
    drop(pause);
    assert_eq!(first.finish().unwrap().range(), pages(0, 2));
    assert_eq!(cache.stats().misses, misses, "it is found, not looked for anew");
}

#[test]
fn k7_what_is_registered_for_a_caller_is_its_own_twice_as_long_each_time_it_comes_too_late() {
    let (_space, cache) = with_clock(1000);
    let mut held = Some(now(cache.get(pages(1, 1))).unwrap());
    let mut late = Task::new(cache.get(pages(0, 2)));
    late.expect_pending();
    let polls: Vec<u32> = (0..5)
        .map(|at| {
            let mut next = Task::new(cache.get(pages(1, 2 + at)));
            next.expect_pending();
            drop(held.take());
            let mut polls = 0;
            held = loop {
                polls += 1;
                if let Poll::Ready(got) = next.poll() {
                    break Some(got.unwrap());
                }
            };
            assert!(late.poll().is_pending());
            polls
        })
        .collect();
    assert!(polls.windows(2).all(|two| 2 * two[1] > 3 * two[0]), "{polls:?}");
}
