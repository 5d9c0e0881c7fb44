use super::*;

/// Returns the number of looks after which a patience of 20 ms is over. `clock` says what the clock
/// shows at each look.
fn looks(clock: impl Fn(u32) -> Option<Duration>) -> Option<u32> {
    let mut patience = Patience {
        whole: Duration::from_millis(20),
        passed: Duration::ZERO,
        shown: clock(0),
        still: 0,
    };
    (1..100_000).find(|look| patience.look(clock(*look)))
}

fn ms(ms: u32) -> Option<Duration> {
    Some(Duration::from_millis(ms.into()))
}

#[test]
fn k7_time_counts_and_a_long_gap_counts_as_one_look() {
    assert_eq!(looks(ms), Some(20));
    assert_eq!(looks(|look| ms(1000 * look)), Some(LOOKS), "others were held up, too");
}

#[test]
fn k7_without_a_clock_and_with_one_that_stands_still_looks_count() {
    assert_eq!(looks(|_| None), Some(TICKS));
    assert_eq!(looks(|_| ms(5)), Some(STILL + TICKS));
    assert_eq!(looks(|look| ms(100_000 - look)), Some(STILL + TICKS), "it goes back");
    assert_eq!(looks(|look| ms(look / STILL)), Some(20 * STILL), "it is coarse");
}
