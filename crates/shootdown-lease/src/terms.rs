//! How long, how many.

use core::fmt;
use core::time::Duration;
use shootdown::AddressRange;

/// What an owner grants and how long it waits. One set for a space; a mirror is told the term with
/// its welcome, so the two cannot disagree about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Terms {
    /// How long a mirror may hold on from when it asked, on its own clock (`T_m`). What a dead
    /// mirror costs an invalidation, and five times the time between two renewals.
    pub term: Duration,
    /// How far a clock may be from real time, in parts per million, either way (ρ). Quartz keeps
    /// 100, a clock that is slewed 500; 1,000 unless changed. Below 1,000,000.
    pub drift_ppm: u32,
    /// How long an invalidation waits for a mirror before that one's lease is renewed no more. An
    /// invalidation takes this and the owner's own term at most, and what the host takes to fence.
    pub patience: Duration,
    /// After how long an `Inv` that is not acknowledged is sent again. A transport that loses
    /// nothing needs it only when it connects anew.
    pub resend: Duration,
    /// How many `Inv` are on their way to a mirror at most; further ones wait. At least 1.
    pub window: usize,
    /// How many epochs are in the books at most; a join beyond that is refused. At least 1.
    pub members: usize,
    /// How many of them one host may have: itself, and incarnations from before a restart whose
    /// leases have not ended. 4 unless changed, at least 1.
    pub members_of_a_host: usize,
    /// How many fetches of one mirror wait for the end of an invalidation at most; further ones are
    /// refused. 1,024 unless changed, at least 1.
    pub fetches: usize,
    /// How many bytes one fetch may ask for; longer ones are refused. 64 MiB unless changed.
    pub fetch_bytes: u64,
    /// What is mirrored: fetches of anything else are refused, because nobody would invalidate it.
    /// All addresses unless changed. `engine::Hub::insert` watches exactly this.
    pub shared: AddressRange,
    /// Whether something reaches the memory by itself, so that an epoch has to be fenced before it
    /// is closed by time ([`Decision::Fence`](crate::Decision::Fence)). Not needed where mirrors
    /// have copies and check after each use. `false` unless changed.
    pub fences: bool,
}

impl Terms {
    /// With a term, a patience of half of it, resending after a tenth, and room for 64 `Inv` on
    /// their way to each of 1,024 members.
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

    /// How long the owner waits from its last grant before it takes a lease for ended: the term
    /// times (1 + ρ) / (1 - ρ), rounded up (`T_o`).
    pub fn owner_term(&self) -> Duration {
        self.waits_for(self.term)
    }

    /// The same for another term.
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

/// Why terms cannot be granted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TermsError {
    /// A number that must not be zero is.
    Zero(&'static str),
    /// A clock that is wrong by all of the time bounds nothing.
    Drift(u32),
    /// Longer than 136 years.
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

/// What a mirror knows of itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MirrorSettings {
    /// How long its devices take to stop, at most: it begins to stop them so long before its lease
    /// ends. Zero, which it is unless changed, for copies that are checked after each use.
    pub time_to_stop: Duration,
    /// After how long it asks to join again while nobody answers. 20 ms unless changed; what is
    /// below 1 ms counts as that, what is above an hour as an hour.
    pub retry: Duration,
    /// How many fetches are under way at most. 1,024 unless changed; 0 counts as 1.
    pub fetches: usize,
    /// How many invalidations are under way at most; further ones are left to be sent again. At
    /// least the owner's window; 1,024 unless changed; 0 counts as 1.
    pub invalidations: usize,
}

impl MirrorSettings {
    /// Numbers that a mirror can live by.
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
