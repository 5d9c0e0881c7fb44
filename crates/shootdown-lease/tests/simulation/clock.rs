//! Each host's own clock.

use shootdown_lease::Time;

/// Millionths of the rate that a clock is off at most.
pub const DRIFT: u64 = 100_000;

/// Nanoseconds of real time in a microsecond and a millisecond.
pub const US: u64 = 1_000;
pub const MS: u64 = 1_000 * US;

/// An offset and a rate. A clock that stands still while its host is paused breaks the bound.
#[derive(Clone, Debug)]
pub struct Clock {
    pub offset: u64,
    /// Nanoseconds of this clock in a millisecond of real time.
    pub rate: u64,
    /// How long it has stood still.
    pub stood: u64,
}

impl Clock {
    /// What it shows.
    pub fn read(&self, real: u64) -> Time {
        Time::from_nanos(self.offset + real.saturating_sub(self.stood) * self.rate / 1_000_000)
    }

    /// When it shows a time at the latest.
    pub fn real_at(&self, time: Time) -> u64 {
        let shown = time.as_nanos().saturating_sub(self.offset);
        (u128::from(shown) * 1_000_000)
            .div_ceil(u128::from(self.rate))
            .min(u128::from(u64::MAX / 4)) as u64
            + self.stood
    }
}
