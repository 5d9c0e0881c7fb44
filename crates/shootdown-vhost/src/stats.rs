//! What has happened.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What an IOTLB has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IotlbStats {
    /// Translations that the front-end has told of.
    pub updates: u64,
    /// Translations that were asked for.
    pub misses: u64,
    /// Those of them that the front-end has refused.
    pub refused: u64,
    /// Translations that had to be forgotten, in messages.
    pub invalidates: u64,
    /// Those of them that met something in flight.
    pub met_in_flight: u64,
    /// Mappings that all of them together met.
    pub mappings_met: u64,
    /// The longest time from an INVALIDATE to its answer.
    pub longest_answer: Duration,
    /// How often all was forgotten because there were too many translations.
    pub overflows: u64,
}

/// The same, while it happens.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) updates: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) invalidates: AtomicU64,
    pub(crate) met: AtomicU64,
    pub(crate) in_flight: AtomicU64,
    pub(crate) longest: AtomicU64,
    pub(crate) overflows: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Counters {
    /// An INVALIDATE was answered after so long, and met so many.
    pub(crate) fn answered(&self, took: Duration, met: u64) {
        count(&self.met, u64::from(met > 0));
        count(&self.in_flight, met);
        self.longest
            .fetch_max(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> IotlbStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        IotlbStats {
            updates: read(&self.updates),
            misses: read(&self.misses),
            refused: read(&self.refused),
            invalidates: read(&self.invalidates),
            met_in_flight: read(&self.met),
            mappings_met: read(&self.in_flight),
            longest_answer: Duration::from_nanos(read(&self.longest)),
            overflows: read(&self.overflows),
        }
    }
}
