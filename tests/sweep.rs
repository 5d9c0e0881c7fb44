//! F1 to F3, C5, C8: foreign code that misbehaves at each point where it is called.
//!
//! One scenario uses everything at once. It is run once to count its calls of foreign code, and
//! then again for each call and each way to misbehave there: a panic, or a call back into the
//! library; both also while the thread unwinds already. After each run everybody who waits has
//! resolved, nothing is under invalidation, every notifier was dropped once, the sequence is even,
//! and only those saw the failure whom it concerns.
#![cfg(all(feature = "std", not(any(loom, shuttle))))]
#![allow(missing_docs, clippy::print_stdout)]

#[path = "sweep/actors.rs"]
mod actors;
#[path = "sweep/chaos.rs"]
mod chaos;
#[path = "sweep/observers.rs"]
mod observers;
#[path = "sweep/scenario.rs"]
mod scenario;
mod support;

use chaos::{Kind, Misbehaviour};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// As many calls of foreign code the scenario makes, at least: fewer means that it has become a
/// smaller one.
const FLOOR: u64 = if cfg!(feature = "tracing") { 600 } else { 250 };

/// Runs the scenario, perhaps in a destructor that runs while the thread unwinds. Returns how many
/// calls of foreign code it made and which kind the misbehaviour hit.
fn run(at: u64, what: Misbehaviour, unwinding: bool) -> (u64, Option<Kind>) {
    struct InDrop<'a>(&'a mut dyn FnMut());
    impl Drop for InDrop<'_> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    let mut result = None;
    let mut body = || {
        // A failed assertion must not leave a destructor.
        result =
            Some(catch_unwind(AssertUnwindSafe(|| observers::with(|| scenario::run(at, what)))));
    };
    if unwinding {
        let unwound = catch_unwind(AssertUnwindSafe(|| {
            let _in_drop = InDrop(&mut body);
            chaos::throw("the thread unwinds");
        }));
        assert!(unwound.is_err());
    } else {
        body();
    }
    match result.expect("the scenario ran") {
        Ok(counts) => counts,
        Err(panic) => {
            let message = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            panic!("call {at}, {what:?}, unwinding: {unwinding}: {}", message.unwrap_or_default());
        }
    }
}

/// Which ways to misbehave are tried at call `at`: a panic at each, the others in turn. All at each
/// with `SHOOTDOWN_SWEEP=all`.
fn ways(at: u64) -> Vec<Misbehaviour> {
    if std::env::var_os("SHOOTDOWN_SWEEP").is_some_and(|sweep| sweep == "all") {
        return Misbehaviour::ALL.to_vec();
    }
    let others = &Misbehaviour::ALL[1..];
    let mut ways = vec![Misbehaviour::Panic];
    if !cfg!(miri) {
        ways.extend((0..2).map(|other| others[(2 * at as usize + other) % others.len()]));
    }
    ways
}

#[test]
fn f1_whatever_foreign_code_does_at_any_point_nothing_of_others_is_lost() {
    let (mut hit, mut runs, mut calls) = (std::collections::BTreeMap::new(), 0, [0; 2]);
    for (unwinding, calls) in [false, true].into_iter().zip(&mut calls) {
        // Subscribers are asked once for each place that tells them something, when that is first
        // reached.
        run(u64::MAX, Misbehaviour::Panic, unwinding);
        *calls = run(u64::MAX, Misbehaviour::Panic, unwinding).0;
        assert!(
            *calls >= FLOOR,
            "the scenario calls foreign code {calls} times, and it should be {FLOOR} at least"
        );
        // Miri takes a second for each run: some of the points, spread evenly.
        let stride = if cfg!(miri) { *calls as usize / 12 } else { 1 };
        for at in (1..=*calls).step_by(stride) {
            for what in ways(at) {
                let (_, kind) = run(at, what, unwinding);
                *hit.entry(
                    kind.expect("the scenario does the same each time until something misbehaves"),
                )
                .or_insert(0) += 1;
                runs += 1;
            }
        }
    }
    println!(
        "{calls:?} calls of foreign code (also while the thread unwinds), {runs} runs: {hit:?}"
    );
    let kinds = if cfg!(feature = "tracing") { Kind::COUNT } else { Kind::COUNT - 1 };
    assert!(cfg!(miri) || hit.len() == kinds, "{hit:?}");
}
