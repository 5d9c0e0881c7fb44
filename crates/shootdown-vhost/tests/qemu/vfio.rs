//! A driver in user space of the guest unmaps memory while the device reads into it.

use crate::rig::{Seen, Served, Setup, number};
use std::time::Duration;

crate::list![
    an_unmap_takes_as_long_as_the_read_it_meets_and_nothing_is_overwritten,
    an_answer_that_comes_too_early_overwrites_memory,
    a_used_entry_that_comes_too_early_is_noticed,
    a_translation_that_is_kept_is_noticed,
    one_unmap_waits_for_both_devices_of_a_group,
];

/// The device's: long beside what a guest takes to begin a read without an accelerator.
pub const LATENCY: Duration = Duration::from_millis(100);
const ROUNDS: u64 = 5;
/// Words of one read.
const WORDS: u64 = (64 << 10) / 8;

fn setup() -> Setup {
    Setup {
        job: "vfio",
        set: vec![("rounds", ROUNDS)],
        latency: LATENCY,
        filled: true,
        mib: 4,
        ..Setup::default()
    }
}

fn print_rounds(title: &str, seen: &Seen) {
    seen.stats.iter().for_each(|stats| println!("{title}: {stats}"));
    for result in &seen.results {
        let number = |name| number(result, name);
        println!(
            "{title}: a read takes {} us; unmap of another page {} us, of its own {} us, until {} us after it began; {} foreign words",
            number("read_us"),
            number("apart_us"),
            number("unmap_us"),
            number("held_us"),
            number("foreign")
        );
    }
}

/// Every read was right and came back, and most were in flight at the unmap; those rounds' times
/// from the read's beginning to the unmap's end.
fn held(seen: &Seen) -> Vec<Duration> {
    assert_eq!(seen.results.len() as u64, ROUNDS);
    assert_eq!(seen.sum("wrong"), 0, "{:?}", seen.results);
    let failed = |name: &str, result: &serde_json::Value| {
        result[name].as_array().unwrap().iter().any(|status| *status != 0)
    };
    assert!(!seen.results.iter().any(|result| failed("statuses", result)), "{:?}", seen.results);
    // On a busy machine the request may not have got to the device, or the read may be over: it
    // fails, or has ended.
    let in_flight = seen
        .results
        .iter()
        .filter(|result| !failed("statuses_later", result) && number(result, "ended_before") == 0);
    let held: Vec<_> =
        in_flight.map(|result| Duration::from_micros(number(result, "held_us"))).collect();
    assert!(held.len() as u64 * 2 > ROUNDS, "{:?}", seen.results);
    held
}

/// A machine that is busy with something else lengthens some rounds, and not most.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// An unmap of what no read goes to waits for none.
fn check_apart(seen: &Seen) {
    let apart = median(seen.each("apart_us").into_iter().map(Duration::from_micros).collect());
    assert!(apart < LATENCY / 2, "{apart:?}: the unmap has waited for a read elsewhere");
}

fn an_unmap_takes_as_long_as_the_read_it_meets_and_nothing_is_overwritten() {
    for strict in [false, true] {
        let seen = Setup { strict, ..setup() }.boot().whole();
        print_rounds(if strict { "strict" } else { "lazy" }, &seen);
        assert_eq!(seen.sum("foreign"), 0, "{:?}", seen.results);
        check_apart(&seen);
        let held = held(&seen);
        assert!(
            held.iter().all(|held| *held >= LATENCY),
            "the unmap has not waited for the read: {held:?}"
        );
        assert!(
            median(held.clone()) < 2 * LATENCY,
            "the unmap has waited for something else: {held:?}"
        );
        assert!(seen.stat("met_in_flight")[0] > 0, "{:?}", seen.stats);
    }
}

fn an_answer_that_comes_too_early_overwrites_memory() {
    let seen = Setup { fault: Some("answer-early"), ..setup() }.boot().whole();
    print_rounds("answer-early", &seen);
    let held = held(&seen);
    assert!(held.iter().all(|held| *held < LATENCY), "nothing is waited for: {held:?}");
    assert!(
        seen.sum("foreign") >= held.len() as u64 * WORDS,
        "the whole read is in memory of another use: {:?}",
        seen.results
    );
}

fn a_used_entry_that_comes_too_early_is_noticed() {
    let seen = Setup { fault: Some("early-used"), ..setup() }.boot();
    seen.print("early-used");
    assert!(
        seen.sum("wrong") > 0,
        "the driver looks before the words are there: {:?}",
        seen.results
    );
}

fn a_translation_that_is_kept_is_noticed() {
    let seen = Setup { fault: Some("keep-translations"), ..setup() }.boot();
    seen.print("keep-translations");
    // Each round ends with a read into other pages at the same address.
    assert!(seen.sum("wrong") >= ROUNDS * WORDS, "the read has gone elsewhere: {:?}", seen.results);
    assert!(
        seen.sum("foreign") >= ROUNDS * WORDS,
        "it has gone where the address was before: {:?}",
        seen.results
    );
}

fn one_unmap_waits_for_both_devices_of_a_group() {
    let cases = [
        ("two processes", Served::Processes),
        ("one process", Served::OneProcess { domain: false }),
        ("one process, one domain", Served::OneProcess { domain: true }),
    ];
    for (title, served) in cases {
        let seen = Setup { served, job: "vfio-pair", devices: 2, shared_slot: true, ..setup() }
            .boot()
            .whole();
        print_rounds(title, &seen);
        assert_eq!(seen.sum("foreign"), 0, "{:?}", seen.results);
        check_apart(&seen);
        check_apart(&seen);
        let held = held(&seen);
        assert!(held.iter().all(|held| *held >= LATENCY), "{title}: {held:?}");
        // The reads were begun together: the second wait finds its read done.
        assert!(median(held.clone()) < 2 * LATENCY, "{title}: one read after the other: {held:?}");
        let both = |name| seen.stat(name).iter().all(|count| *count >= ROUNDS);
        assert!(both("invalidates"), "an unmap invalidates both: {:?}", seen.stats);
    }
}
