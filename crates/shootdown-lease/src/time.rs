//! Moments on one host's clock.

use core::fmt;
use core::ops::Add;
use core::time::Duration;

/// A moment on the clock of one host, in nanoseconds since some fixed moment of that host.
///
/// The clock has to go on while the host is suspended: `CLOCK_BOOTTIME` on Linux.
/// `CLOCK_MONOTONIC`, and with it `std::time::Instant`, stands still then, and a lease would
/// outlive its end. Moments of different hosts are never compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    /// The moment so many nanoseconds after the fixed one.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the fixed moment.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The time from `earlier` to this moment; zero if that is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Longer than 584 years after the fixed moment is the last moment there is.
impl Add<Duration> for Time {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", Duration::from_nanos(self.0))
    }
}
