//! Counters.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters of an IOTLB. [`Iotlb::stats`](crate::Iotlb::stats) returns them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IotlbStats {
    /// Translations that the front-end has sent.
    pub updates: u64,
    /// Translations requested from the front-end.
    pub misses: u64,
    /// Requests that the front-end has refused.
    pub refused: u64,
    /// INVALIDATE messages.
    pub invalidates: u64,
    /// INVALIDATE messages that met a mapping in flight.
    pub met_in_flight: u64,
    /// Mappings that all of these messages met.
    pub mappings_met: u64,
    /// Longest time from an INVALIDATE to its answer.
    pub longest_answer: Duration,
    /// How often everything was forgotten because there were too many translations.
    pub overflows: u64,
}

/// The counters while they change.
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
    /// Counts the answer to an INVALIDATE, its time, and the mappings that it met.
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
