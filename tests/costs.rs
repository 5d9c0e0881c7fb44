//! Costs that must not depend on what else there is, has been, or is waited for.
//!
//! In a short form and with wide bounds; `cargo bench --bench table -- costs` measures curves.
#![cfg(not(any(loom, shuttle)))]
#![allow(missing_docs, clippy::print_stdout)]

mod support;
#[path = "support/costs.rs"]
mod workload;

use shootdown::{AddressSpace, Event};
use std::time::Duration;
use support::processor::of_thread;
use support::{now, pages};
use workload::{Cost, guards, insert_and_remove, removals};

const RUNS: usize = 5;

/// The medians of two that are measured in turns, and how many times the first the second takes.
fn ratio(what: &str, first: impl Fn() -> Duration, second: impl Fn() -> Duration) -> f64 {
    let mut took: Vec<_> = (0..RUNS).map(|_| (first(), second())).collect();
    took.sort_by_key(|took| took.0);
    let first = took[RUNS / 2].0;
    took.sort_by_key(|took| took.1);
    let second = took[RUNS / 2].1;
    let ratio = second.as_secs_f64() / first.as_secs_f64();
    println!("{what}: {first:?} and {second:?}, {ratio:.2} times as long");
    ratio
}

#[test]
fn insertions_after_a_burst_of_active_invalidations_cost_what_they_cost_in_a_new_space() {
    const TIMES: u64 = 2000;
    let after = |burst| {
        move || {
            let space = AddressSpace::new();
            drop(guards(&space, burst));
            let _one = now(space.invalidate(pages(9, 1), Event::Unmap));
            insert_and_remove(&space, TIMES);
            let began = of_thread();
            insert_and_remove(&space, TIMES);
            of_thread() - began
        }
    };
    // Without an end of the burst it would be thousands of times.
    let ratio = ratio(
        "insert + remove, without a burst and after one of 100,000",
        after(0),
        after(100_000),
    );
    assert!(ratio <= 8.0, "{ratio} times as long");
}

#[test]
fn removals_under_a_guard_do_not_look_at_the_guards_of_other_ranges() {
    const COUNT: u64 = 500;
    let beside = |others| move || removals(COUNT, others);
    // One that looked at them all would take thousands of times as long.
    let ratio = ratio(
        "remove under a guard, alone and beside 100,000 other ones",
        beside(0),
        beside(100_000),
    );
    assert!(ratio <= 16.0, "{ratio} times as long");
}

/// Four times as many take at most ten times as long. A square would be sixteen times.
#[track_caller]
fn grows_in_proportion(what: &str, cost: impl Fn(usize) -> Cost) {
    let [few, many] = [500, 2000];
    let ratio = ratio(&format!("{what}, {few} and {many}"), || cost(few).took, || cost(many).took);
    assert!(ratio <= 10.0, "{what}: {ratio} times as long");
}

#[test]
fn one_reader_before_many_invalidations_that_are_not_polled() {
    for n in [1, 100, 1000] {
        let polls = workload::one_reader(n).polls;
        println!("one reader before {n} that are done and not polled: {polls} polls");
        assert!(polls <= 100, "{polls} polls before {n}");
    }
    grows_in_proportion(
        "one reader before invalidations that are not polled",
        workload::one_reader,
    );
}

#[test]
fn drain_of_many_invalidations_that_finish_one_by_one() {
    for n in [1, 100, 1000] {
        let polls = workload::drain(n).polls;
        println!("drain of {n}: {polls} polls");
        assert!(polls <= 2 * n as u64, "{polls} polls for {n}");
    }
    grows_in_proportion("drain of invalidations that finish one by one", workload::drain);
}

#[test]
fn many_readers_each_waiting_for_one_of_many_invalidations() {
    for n in [1, 100, 1000] {
        let polls = workload::readers(n).polls;
        println!("{n} readers, each waiting for one of {n}: {polls} polls");
        assert!(polls <= 3 * n as u64, "{polls} polls of {n} readers");
    }
    grows_in_proportion("readers each waiting for one of as many invalidations", workload::readers);
}
