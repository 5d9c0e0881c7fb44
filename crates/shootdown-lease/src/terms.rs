//! Terms of an owner and settings of a mirror.

use core::fmt;
use core::time::Duration;
use shootdown::AddressRange;

/// What an owner grants and how long it waits. An owner has one set. It sends the term with each
/// welcome, so that both sides use the same one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Terms {
    /// How long a mirror may hold on from when it asked, on its own clock (`T_m`). An invalidation
    /// waits this long for a dead mirror. Mirrors renew five times in a term.
    pub term: Duration,
    /// Largest deviation of a clock from real time, in parts per million, in either direction (ρ).
    /// Quartz keeps 100, a slewed clock 500. The default is 1,000. Must be below 1,000,000.
    pub drift_ppm: u32,
    /// How long an invalidation waits for a mirror before the mirror's lease is no longer renewed.
    /// An invalidation takes at most this, the owner's term, and the time for fencing.
    pub patience: Duration,
    /// Time after which an `Inv` without acknowledgement is sent again. A transport without losses
    /// needs it only after a reconnect.
    pub resend: Duration,
    /// Maximum number of `Inv` in flight to one mirror; further ones wait. At least 1.
    pub window: usize,
    /// Maximum number of epochs in the books; a further join is refused. At least 1.
    pub members: usize,
    /// Maximum number of epochs of one host: the current incarnation, and those from before a
    /// restart whose leases have not ended. The default is 4. At least 1.
    pub members_of_a_host: usize,
    /// Maximum number of fetches of one mirror that wait for the end of an invalidation; further
    /// ones are refused. The default is 1,024. At least 1.
    pub fetches: usize,
    /// Maximum number of bytes of one fetch; longer ones are refused. The default is 64 MiB.
    pub fetch_bytes: u64,
    /// The mirrored range. The default is all addresses. Fetches of other memory are refused,
    /// because it would not be invalidated. `engine::Hub::insert` watches exactly this range.
    pub shared: AddressRange,
    /// Something reaches the memory by itself, so an epoch must be fenced before it is closed by
    /// time ([`Decision::Fence`](crate::Decision::Fence)). Not needed if mirrors have copies and
    /// check after each use. The default is `false`.
    pub fences: bool,
}

impl Terms {
    /// Makes terms with this term. The patience is half of it, and resending happens after a tenth.
    /// There is room for 1,024 members with 64 `Inv` in flight to each.
    pub const fn new(term: Duration) -> Self {
        let nanos = term.as_nanos() as u64;
        Self {
            term,
            drift_ppm: 1_000,
            patience: Duration::from_nanos(nanos / 2),
            resend: Duration::from_nanos(nanos / 10),
            window: 64,
            members: 1_024,
            members_of_a_host: 4,
            fetches: 1_024,
            fetch_bytes: 64 << 20,
            shared: AddressRange::ALL,
            fences: false,
        }
    }

    /// Returns how long the owner waits after its last grant until it considers a lease ended: the
    /// term times (1 + ρ) / (1 - ρ), rounded up (`T_o`).
    pub fn owner_term(&self) -> Duration {
        self.waits_for(self.term)
    }

    /// Returns how long the owner waits for a lease with this term.
    pub(crate) fn waits_for(&self, term: Duration) -> Duration {
        let (whole, drift) = (1_000_000_u128, u128::from(self.drift_ppm));
        let nanos = term
            .as_nanos()
            .saturating_mul(whole + drift)
            .div_ceil(whole.saturating_sub(drift).max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    pub(crate) fn check(&self) -> Result<(), TermsError> {
        let zero = [
            ("term", self.term.is_zero()),
            ("patience", self.patience.is_zero()),
            ("resend", self.resend.is_zero()),
            ("window", self.window == 0),
            ("members", self.members == 0),
            ("members_of_a_host", self.members_of_a_host == 0),
            ("fetches", self.fetches == 0),
        ];
        if let Some((name, _)) = zero.iter().find(|(_, zero)| *zero) {
            return Err(TermsError::Zero(name));
        }
        if self.drift_ppm >= 1_000_000 {
            return Err(TermsError::Drift(self.drift_ppm));
        }
        if self.term > Duration::from_secs(u32::MAX.into()) {
            return Err(TermsError::Long(self.term));
        }
        Ok(())
    }
}

/// Reason why terms cannot be granted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TermsError {
    /// This number must not be zero.
    Zero(&'static str),
    /// A clock with such a deviation bounds nothing.
    Drift(u32),
    /// The term is longer than 136 years.
    Long(Duration),
}

impl fmt::Display for TermsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero(name) => write!(f, "`{name}` is zero: give it at least 1"),
            Self::Drift(ppm) => {
                write!(
                    f,
                    "`drift_ppm` is {ppm}: clocks that are off by all of the time bound nothing, so stay below 1,000,000"
                )
            }
            Self::Long(term) => write!(f, "a term of {term:?} never ends: give seconds or less"),
        }
    }
}

impl core::error::Error for TermsError {}

/// Settings of a mirror.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MirrorSettings {
    /// Longest time that the devices take to stop. The mirror begins to stop them this long before
    /// its lease ends. The default is zero, which is right for copies that are checked after each
    /// use.
    pub time_to_stop: Duration,
    /// Time after which an unanswered join is repeated, between 1 ms and an hour. The default is 20
    /// ms.
    pub retry: Duration,
    /// Maximum number of fetches under way. The default is 1,024; 0 counts as 1.
    pub fetches: usize,
    /// Maximum number of invalidations under way. Further ones are ignored, and the owner sends
    /// them again. Use at least the owner's window. The default is 1,024; 0 counts as 1.
    pub invalidations: usize,
}

impl MirrorSettings {
    /// Returns the settings with each number in its valid range.
    pub(crate) fn usable(mut self) -> Self {
        self.retry = self.retry.clamp(Duration::from_millis(1), Duration::from_secs(3_600));
        (self.fetches, self.invalidations) = (self.fetches.max(1), self.invalidations.max(1));
        self
    }
}

impl Default for MirrorSettings {
    fn default() -> Self {
        Self {
            time_to_stop: Duration::ZERO,
            retry: Duration::from_millis(20),
            fetches: 1_024,
            invalidations: 1_024,
        }
    }
}
