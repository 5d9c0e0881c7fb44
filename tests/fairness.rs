//! C4 with wide bounds: those who wait for an invalidation leave it its time.
//!
//! `cargo bench --bench table -- fairness` measures the same with narrow ones.
#![cfg(not(any(loom, shuttle)))]
#![allow(missing_docs, clippy::print_stdout)]

mod support;
#[path = "support/fairness.rs"]
mod workload;

use std::time::Duration;
use support::processor::of_process;
use workload::{Abandoned, Host, Waiters, abandoned, beside_readers, waited_for};

#[test]
fn c4_invalidations_beside_readers_that_read_all_the_time_practically_never_lapse() {
    const INVALIDATIONS: usize = 200;
    for (host, readers) in [
        (Host::Threads, 1),
        (Host::Threads, 8),
        (Host::Threads, 64),
        (Host::Pool, 8),
        (Host::TokioOneThread, 8),
        (Host::Tokio, 8),
        (Host::Smol, 8),
    ] {
        let run = beside_readers(host, readers, INVALIDATIONS);
        println!(
            "{} of {} lapsed beside {readers} readers, {host:?}",
            run.lapses,
            run.invalidations()
        );
        assert_eq!(run.invalidations(), INVALIDATIONS as u64);
        // 2 %; more beside so many threads that the invalidating one waits for its turn, and in a
        // pool that polls a task that wakes itself again before it polls others.
        let wide = readers > 8 || host == Host::Pool;
        let most = run.invalidations() / if wide { 5 } else { 50 };
        assert!(
            run.lapses <= most,
            "{} of {INVALIDATIONS} lapsed beside {readers} readers, {host:?}",
            run.lapses
        );
    }
}

#[test]
fn c4_readers_that_wait_for_every_invalidation_let_it_end_and_are_polled_a_few_times() {
    const INVALIDATIONS: u64 = 300;
    for (waiters, readers) in [
        (Waiters::Threads(0), 0),
        (Waiters::Threads(8), 8),
        (Waiters::Tasks(8), 8),
        (Waiters::Woken(8), 0),
    ] {
        let before = of_process();
        let run = waited_for(waiters, INVALIDATIONS as usize);
        let processor = of_process().zip(before).map(|(after, before)| after - before);
        assert!(run.processor <= processor, "{:?} of {processor:?}", run.processor);
        let mut polls = run.polls;
        polls.sort_unstable();
        let median = polls.get(polls.len() / 2).copied().unwrap_or(0);
        println!(
            "{waiters:?}: {:?}, {} waits, {median} polls of one, {} lapses",
            run.processor, run.waits, run.lapses
        );
        assert!(
            run.lapses <= INVALIDATIONS / 50,
            "{} of {INVALIDATIONS} lapsed, {waiters:?}",
            run.lapses
        );
        // Each misses some if it is not scheduled in time.
        let most = readers * INVALIDATIONS;
        assert!(
            (most / 20..=most + readers).contains(&run.waits),
            "{} waits, {waiters:?}",
            run.waits
        );
        assert!(median <= 100, "the median wait took {median} polls, {waiters:?}");
    }
}

#[test]
fn c4_a_future_of_the_same_task_is_in_the_way_for_a_few_polls_only() {
    let took = middle(|| abandoned(Abandoned::BySameTask));
    println!(
        "behind a future that its own task does not poll, a reader is kept waiting for {took:?}"
    );
    // Not for its patience, if the machine lets it run.
    assert!(took <= Duration::from_millis(50), "{took:?}");
}

#[test]
fn c4_a_future_of_another_task_is_in_the_way_for_the_patience() {
    let least = Duration::from_millis(15);
    let took = middle(|| {
        let took = abandoned(Abandoned::ByAnotherTask);
        assert!(took >= least, "after {took:?} the future had not had its time");
        took
    });
    println!(
        "behind a future that another task does not poll, a reader is kept waiting for {took:?}"
    );
    assert!(took <= Duration::from_millis(500), "{took:?}");
}

/// The median of several.
fn middle(time: impl Fn() -> Duration) -> Duration {
    let mut times: Vec<_> = (0..9).map(|_| time()).collect();
    times.sort();
    times[times.len() / 2]
}
