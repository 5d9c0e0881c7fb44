//! [`Tally`]: the counters of one notifier, for collisions, retries, waits and lapses.
//!
//! Only slow paths count. A reader that neither waits nor collides accesses no counter.
#![forbid(unsafe_code)]

use crate::sync::{AtomicU32, Ordering};
use core::time::Duration;

/// The counters of one notifier. Each stops at [`u32::MAX`].
#[derive(Debug)]
pub(crate) struct Tally {
    collisions: AtomicU32,
    retries: AtomicU32,
    waits: AtomicU32,
    lapses: AtomicU32,
}

/// Counts what has happened to one notifier so far.
///
/// [`Subscription::stats`](crate::Subscription::stats) returns it. [`Stats`](crate::Stats) has the
/// counters of a whole space. Each counter stops at [`u32::MAX`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NotifierStats {
    /// Number of checks ([`read_retry`](crate::Subscription::read_retry)) that returned that the
    /// notifier was invalidated.
    pub collisions: u32,
    /// Number of times that [`DriverLock::mirror`](crate::DriverLock::mirror) started over.
    pub retries: u32,
    /// Number of times that a reader had to wait for an invalidation.
    pub waits: u32,
    /// Number of invalidations of the notifier that lapsed (rule [C4](crate::docs::contract)).
    pub lapses: u32,
    /// The longest time that an invalidation which hit the notifier was active, in whole
    /// microseconds. [`Stats::longest`](crate::Stats::longest) says which invalidations are timed.
    pub longest: Duration,
}

/// Adds one to a counter, unless it is at its greatest value.
fn add_one(counter: &AtomicU32) {
    // `checked_add` ends the update at the greatest value, so that no counter wraps.
    let _ =
        counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_add(1));
}

impl Tally {
    /// Makes counters that are 0.
    pub(crate) fn new() -> Self {
        let zero = || AtomicU32::new(0);
        Self { collisions: zero(), retries: zero(), waits: zero(), lapses: zero() }
    }

    /// Counts a collision.
    #[cold]
    pub(crate) fn collided(&self) {
        add_one(&self.collisions);
    }

    /// Counts a retry.
    #[cold]
    pub(crate) fn retried(&self) {
        add_one(&self.retries);
    }

    /// Counts a wait.
    #[cold]
    pub(crate) fn waited(&self) {
        add_one(&self.waits);
    }

    /// Counts a lapse.
    #[cold]
    pub(crate) fn lapsed(&self) {
        add_one(&self.lapses);
    }

    /// Returns the counters, with `longest`, which is kept elsewhere.
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
