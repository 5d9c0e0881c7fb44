//! The guest's own driver: every word that was written is read, by the guest and by the host.

use crate::rig::{Seen, Setup, number};
use std::time::Duration;

crate::list![
    all_words_are_right_in_strict_mode,
    all_words_are_right_in_lazy_mode,
    the_answer_to_a_flush_waits_only_for_what_is_in_flight,
    a_guest_that_is_stopped_and_goes_on_loses_no_request,
    a_front_end_that_is_killed_under_load_is_followed_by_another,
];

/// No word is wrong, the sums of the guest and the host agree, and the device has discarded.
pub fn check_words(seen: &Seen, devices: usize) {
    assert_eq!(seen.results.len(), devices);
    for result in &seen.results {
        let disk = number(result, "disk") as usize;
        let (wrong, sum) = seen.host_view(disk);
        assert_eq!((number(result, "wrong"), wrong), (0, 0), "{result}");
        assert_eq!(result["sum"], format!("{sum:016x}"), "{result}");
        assert_eq!(result["discard"], true, "{result}");
    }
}

/// Half of them, so that each pair is met in one mode or the other; all with
/// `SHOOTDOWN_GUESTS=all`.
fn all_words_are_right(strict: bool) {
    let all = std::env::var("SHOOTDOWN_GUESTS").is_ok_and(|guests| guests == "all");
    for (devices, queues) in [(1, 1), (1, 4), (2, 1), (2, 4)] {
        let mixed = (devices == 1) != (queues == 1);
        if !all && mixed != strict {
            continue;
        }
        // A guest uses no more queues than it has processors.
        let seen =
            Setup { devices, queues, cpus: queues, strict, ..Setup::default() }.boot().whole();
        let mode = if strict { "strict" } else { "lazy" };
        seen.print(&format!("{mode}, {devices} device(s), {queues} queue(s)"));
        check_words(&seen, devices);
        assert_eq!(seen.each("queues"), vec![u64::from(queues); devices]);
        assert!(seen.stat("invalidates").iter().all(|count| *count > 0), "{:?}", seen.stats);
        assert!(seen.stat("misses").iter().all(|count| *count > 0), "{:?}", seen.stats);
        // One answer for each MISS; and the rings' entries, which nobody has asked for.
        let updates = seen.stat("updates").into_iter().zip(seen.stat("misses"));
        assert!(updates.into_iter().all(|(updates, misses)| updates >= misses), "{:?}", seen.stats);
    }
}

fn all_words_are_right_in_strict_mode() {
    all_words_are_right(true);
}

fn all_words_are_right_in_lazy_mode() {
    all_words_are_right(false);
}

fn the_answer_to_a_flush_waits_only_for_what_is_in_flight() {
    let latency = Duration::from_millis(5);
    let seen = Setup { latency, ..Setup::default() }.boot().whole();
    seen.print(&format!("lazy, {latency:?} of latency"));
    check_words(&seen, 1);
    assert!(
        seen.stat("met_in_flight")[0] > 0,
        "a flush of everything meets reads and writes: {:?}",
        seen.stats
    );
    let longest = Duration::from_micros(seen.stat("longest_answer_us")[0]);
    // There is always something in flight: an answer that waits for what begins later, too, takes
    // as long as the job.
    let job = Duration::from_millis(seen.sum("ms"));
    println!("the longest answer took {longest:?}, the job {job:?}");
    assert!(longest < 20 * latency && longest < job / 4, "{longest:?} of {job:?}");
}

/// QEMU stops the rings, with requests in flight, and starts them again where they were.
fn a_guest_that_is_stopped_and_goes_on_loses_no_request() {
    let latency = Duration::from_millis(5);
    for (queues, stops) in [(1, 20), (4, 10)] {
        let seen =
            Setup { queues, cpus: queues, stops, latency, ..Setup::default() }.boot().whole();
        seen.print(&format!("lazy, {queues} queue(s), stopped {stops} times"));
        check_words(&seen, 1);
    }
}

fn a_front_end_that_is_killed_under_load_is_followed_by_another() {
    let latency = Duration::from_millis(5);
    let seen = Setup { devices: 2, kill_one_before: true, mib: 16, latency, ..Setup::default() }
        .boot()
        .whole();
    seen.print("after another guest");
    check_words(&seen, 2);
}
