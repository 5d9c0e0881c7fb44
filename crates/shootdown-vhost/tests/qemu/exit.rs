//! A process of the guest is killed while a device reads into its memory. No INVALIDATE comes then:
//! the device is stopped.

use crate::rig::{Seen, Setup, number};
use crate::vfio::LATENCY;
use std::time::Duration;

crate::list![
    nobody_gets_the_memory_of_a_killed_process_before_its_read_has_ended,
    somebody_crashes_if_the_device_stops_before_the_read_has_ended,
];

const ROUNDS: u64 = 3;
/// For a guest that may crash or hang.
const SHORT: Duration = Duration::from_secs(30);

fn setup() -> Setup {
    let set = vec![("rounds", ROUNDS), ("watch_ms", 1000)];
    // The neighbour takes all its memory within the latency, which is several times as long as that
    // of an unmap.
    Setup { job: "vfio-exit", set, latency: 5 * LATENCY, filled: true, mib: 4, ..Setup::default() }
}

/// Words changed, a process or the whole guest has crashed.
fn damage(seen: &Seen) -> bool {
    let damaged = |result: &serde_json::Value| {
        result["crashed"] == true || result["changed"].as_u64().is_none_or(|words| words > 0)
    };
    seen.error.is_some() || seen.results.iter().any(damaged)
}

fn nobody_gets_the_memory_of_a_killed_process_before_its_read_has_ended() {
    let setup = setup();
    let seen = setup.boot().whole();
    seen.print("exit");
    assert!(!damage(&seen), "{:?}", seen.results);
    assert_eq!(
        seen.sum("wrong"),
        0,
        "the device is in order in the next round: {:?}",
        seen.results
    );
    assert_eq!(seen.sum("ended_before"), 0, "the reads were in flight: {:?}", seen.results);
    for result in &seen.results {
        // The read had begun 20 ms before.
        let exit = Duration::from_micros(number(result, "exit_us"));
        assert!(exit >= setup.latency / 2, "{exit:?}: the exit has not waited for the read");
    }
}

fn somebody_crashes_if_the_device_stops_before_the_read_has_ended() {
    let seen = Setup { fault: Some("answer-early"), patience: SHORT, ..setup() }.boot();
    seen.print("exit, answer-early");
    assert!(damage(&seen), "{:?}", seen.results);
}
