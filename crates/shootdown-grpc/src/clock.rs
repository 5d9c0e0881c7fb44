//! The clock of leases.
#![forbid(unsafe_code)]

use rustix::time::{ClockId, clock_gettime};
use shootdown_lease::Time;
use shootdown_lease::engine::Clock;

/// `CLOCK_BOOTTIME`. It continues while the host is suspended, as leases require.
///
/// It stops in a virtual machine that is paused: see the README.
#[derive(Clone, Copy, Debug, Default)]
pub struct BootClock;

impl BootClock {
    /// Returns the time since the host was started.
    pub fn now(self) -> Time {
        let time = clock_gettime(ClockId::Boottime);
        let (seconds, nanos) =
            (u64::try_from(time.tv_sec).unwrap_or(0), u64::try_from(time.tv_nsec).unwrap_or(0));
        Time::from_nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
    }
}

impl Clock for BootClock {
    fn now(&self) -> Time {
        (*self).now()
    }
}
