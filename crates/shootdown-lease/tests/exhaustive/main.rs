//! Everything that can happen between an owner and two mirrors of one range, up to bounds.
//! `SHOOTDOWN_EXHAUSTIVE=1` widens them.
#![forbid(unsafe_code)]
#![allow(missing_docs, unreachable_pub, reason = "a test")]
#![allow(clippy::print_stdout, reason = "how many states there are is to be read")]

mod model;

use model::{Bounds, Found, explore};
use shootdown_lease::Rule;
use std::time::Instant;

fn wide() -> bool {
    std::env::var_os("SHOOTDOWN_EXHAUSTIVE").is_some()
}

/// One invalidation of what all hold, and neither losses nor doubles: what is on its way may be
/// delayed for ever.
fn bounds(mirrors: usize, horizon: u64, in_flight: usize) -> Bounds {
    let (joined, invalidations, fetches, lost, doubled, restarts) = (true, 1, 0, 0, 0, 0);
    let (tried, without) = (if wide() { 1 } else { 16 }, None);
    Bounds {
        mirrors,
        joined,
        horizon,
        in_flight,
        invalidations,
        fetches,
        lost,
        doubled,
        restarts,
        tried,
        without,
    }
}

fn check(name: &str, bounds: &Bounds) -> Found {
    let began = Instant::now();
    let found = explore(bounds);
    println!("{name}: {found:?} in {:.1?}", began.elapsed());
    assert_eq!(found.wrong, None);
    assert!(found.ended > 0 && found.tried > 0, "nothing has happened");
    found
}

#[test]
fn two_mirrors_let_go_or_their_leases_end() {
    let found = check(
        "two mirrors, to the end of their leases",
        &Bounds { doubled: u8::from(wide()), ..bounds(2, 2, 1) },
    );
    assert!(found.outlived > 0, "nobody was waited for to the end of its lease");
}

#[test]
fn two_mirrors_fetch_while_the_memory_changes() {
    let found = check(
        "two mirrors that fetch",
        &Bounds { fetches: 1, doubled: u8::from(wide()), ..bounds(2, 1, 2) },
    );
    assert!(found.fetched > 0, "nobody has what has changed");
}

#[test]
fn a_mirror_renews_leaves_and_joins_anew() {
    let found = check("a lease renewed", &bounds(1, if wide() { 4 } else { 3 }, 2));
    assert!(found.outlived > 0);
}

#[test]
fn an_owner_restarts_over_memory_that_survived() {
    let more = Bounds { fetches: 1, restarts: 1, doubled: u8::from(wide()), ..bounds(1, 2, 1) };
    let found = check("an owner that restarts", &more);
    assert!(found.fetched > 0);
}

#[test]
fn two_invalidations_meet_fetches() {
    let in_flight = if wide() { 2 } else { 1 };
    let more =
        Bounds { invalidations: 2, fetches: 2, lost: 1, doubled: 1, ..bounds(1, 1, in_flight) };
    let found = check("two invalidations", &more);
    assert!(found.fetched > 0);
}

#[test]
fn nobody_has_joined_yet() {
    let found = check(
        "nobody has joined",
        &Bounds { joined: false, fetches: 1, doubled: 1, ..bounds(1, 2, 1) },
    );
    assert!(found.fetched > 0 && found.outlived > 0);
}

#[test]
fn a_rule_that_is_left_out_is_missed() {
    let (one, joins) = (bounds(1, 2, 1), Bounds { joined: false, fetches: 1, ..bounds(1, 2, 2) });
    let twice = Bounds { invalidations: 2, fetches: 2, ..bounds(1, 1, 2) };
    let restarts = Bounds { restarts: 1, ..bounds(1, 2, 1) };
    let left_out = [
        (Rule::StopsByItself, &one),
        (Rule::CountedFromAsking, &joins),
        (Rule::AcknowledgedAfterFlush, &one),
        (Rule::LeftAfterStop, &one),
        (Rule::ParkedFetches, &twice),
        (Rule::CollidedFetches, &twice),
        (Rule::Quarantine, &restarts),
        (Rule::BookedBeforeWelcome, &joins),
    ];
    for (rule, bounds) in left_out {
        let began = Instant::now();
        let found = explore(&Bounds { without: Some(rule), tried: usize::MAX, ..bounds.clone() });
        let way =
            found.wrong.as_ref().map(|(wrong, way)| format!("{wrong} after {} steps", way.len()));
        println!("{rule:?}: {way:?}, {} states, {:.1?}", found.states, began.elapsed());
        assert!(
            found.wrong.is_some(),
            "{rule:?} left out, and nothing is wrong in {} states",
            found.states
        );
    }
}
