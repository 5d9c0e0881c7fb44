//! Moments on the clock of one host.

use core::fmt;
use core::ops::Add;
use core::time::Duration;

/// A moment on the clock of one host, in nanoseconds since a fixed moment of that host.
///
/// The clock must continue while the host is suspended: `CLOCK_BOOTTIME` on Linux.
/// `CLOCK_MONOTONIC`, and with it `std::time::Instant`, stops then, and a lease would outlive its
/// end. Moments of different hosts are never compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    /// Returns the moment `nanos` nanoseconds after the fixed one.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Returns the nanoseconds since the fixed moment.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Returns the time from `earlier` to this moment, or zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Saturates at the last representable moment, 584 years after the fixed one.
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
