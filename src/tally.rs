//! Event counters of one notifier: collisions, retries, waits, lapses.
//!
//! Only slow paths count: a reader that neither waits nor collides touches nothing here.
#![forbid(unsafe_code)]

use crate::sync::{AtomicU32, Ordering};
use core::time::Duration;

/// Counters that stop at their greatest value.
#[derive(Debug)]
pub(crate) struct Tally {
    collisions: AtomicU32,
    retries: AtomicU32,
    waits: AtomicU32,
    lapses: AtomicU32,
}

/// What happened to one notifier so far: [`Subscription::stats`](crate::Subscription::stats).
/// Counters stop at [`u32::MAX`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NotifierStats {
    /// Times that a check ([`read_retry`](crate::Subscription::read_retry)) said that the notifier
    /// was invalidated.
    pub collisions: u32,
    /// Times that [`DriverLock::mirror`](crate::DriverLock::mirror) started over.
    pub retries: u32,
    /// Times that a reader had to wait for an invalidation.
    pub waits: u32,
    /// Invalidations of the notifier that lapsed (C4).
    pub lapses: u32,
    /// The longest that an invalidation which hit the notifier was active, in whole microseconds;
    /// see [`Stats::longest`](crate::Stats::longest) for which are timed.
    pub longest: Duration,
}

fn add_one(counter: &AtomicU32) {
    // A lost race is an event of many; a wrapped counter would be a lie.
    let _ =
        counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_add(1));
}

impl Tally {
    pub(crate) fn new() -> Self {
        let zero = || AtomicU32::new(0);
        Self { collisions: zero(), retries: zero(), waits: zero(), lapses: zero() }
    }

    #[cold]
    pub(crate) fn collided(&self) {
        add_one(&self.collisions);
    }

    #[cold]
    pub(crate) fn retried(&self) {
        add_one(&self.retries);
    }

    #[cold]
    pub(crate) fn waited(&self) {
        add_one(&self.waits);
    }

    #[cold]
    pub(crate) fn lapsed(&self) {
        add_one(&self.lapses);
    }

    pub(crate) fn stats(&self, longest: Duration) -> NotifierStats {
        let get = |counter: &AtomicU32| counter.load(Ordering::Relaxed);
        NotifierStats {
            collisions: get(&self.collisions),
            retries: get(&self.retries),
            waits: get(&self.waits),
            lapses: get(&self.lapses),
            longest,
        }
    }
}
