//! The settings of a space, and counters that need no lock.
#![forbid(unsafe_code)]

use crate::engine::calls::FirstPassFlags;
use crate::foreign::{Callback, Losses};
use crate::sync::{Arc, AtomicU64, AtomicUsize, Ordering};
use alloc::boxed::Box;
use core::time::Duration;

/// Returns the time since some fixed moment.
pub(crate) type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// Returns whether a lease that holds memory is still valid (R4).
pub(crate) type Valid = Box<dyn Fn() -> bool + Send + Sync>;

/// The settings of a space.
#[derive(Default)]
pub(crate) struct Settings {
    pub(crate) sequence: Option<u64>,
    pub(crate) budget: Option<usize>,
    pub(crate) reporter: Option<crate::foreign::Reporter>,
    pub(crate) clock: Option<Clock>,
    pub(crate) patience: Option<Duration>,
    pub(crate) valid: Option<Valid>,
    #[cfg(feature = "test-util")]
    pub(crate) plain_only: bool,
}

/// The part of a space that needs no lock.
pub(crate) struct Host {
    /// Which active invalidations are in their first passes.
    pub(crate) flags: FirstPassFlags,
    pub(crate) budget: Option<PassBudget>,
    pub(crate) clock: Option<Clock>,
    pub(crate) losses: Arc<Losses>,
    pub(crate) counters: Counters,
    /// How many waiting futures are about to take the lock. Each wakes the futures that rest.
    pub(crate) coming: AtomicUsize,
    /// How many notifiers were fenced (L5). Changes under the lock.
    pub(crate) fences: AtomicU64,
    #[cfg(feature = "test-util")]
    plain_only: bool,
}

/// Counts of events; only slow paths count.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) collisions: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) refused_blockable: AtomicU64,
}

impl Host {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            flags: FirstPassFlags::new(),
            budget: settings.budget.map(PassBudget::new),
            clock: settings.clock,
            losses: Arc::new(Losses::new(settings.reporter)),
            counters: Counters::default(),
            coming: AtomicUsize::new(0),
            fences: AtomicU64::new(0),
            #[cfg(feature = "test-util")]
            plain_only: settings.plain_only,
        }
    }

    /// Returns whether the forms in [`quick`](crate::engine::quick) are not to be taken. Always
    /// `false` without the feature `test-util`.
    #[inline]
    pub(crate) fn is_plain_only(&self) -> bool {
        #[cfg(feature = "test-util")]
        return self.plain_only;
        #[cfg(not(feature = "test-util"))]
        false
    }

    /// Returns the time since some fixed moment; `None` if there is no clock, or if the user's
    /// panics.
    pub(crate) fn now(&self) -> Option<Duration> {
        if let Some(clock) = &self.clock {
            return self.losses.run(Callback::Clock, |_| clock());
        }
        // A model checker controls no real time.
        #[cfg(all(feature = "std", not(any(loom, shuttle))))]
        {
            static EPOCH: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
            Some(EPOCH.get_or_init(std::time::Instant::now).elapsed())
        }
        #[cfg(not(all(feature = "std", not(any(loom, shuttle)))))]
        None
    }

    /// Returns a number that no other space has.
    pub(crate) fn address(&self) -> usize {
        core::ptr::from_ref(self).addr()
    }

    #[inline]
    pub(crate) fn give_permit_back(&self) {
        if let Some(budget) = &self.budget {
            budget.give_back();
        }
    }
}

/// How many passes may be pending at once (B4).
pub(crate) struct PassBudget {
    limit: usize,
    used: AtomicUsize,
}

impl PassBudget {
    fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0) }
    }

    fn reserve(&self) -> bool {
        let take = |used| (used < self.limit).then_some(used + 1);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn give_back(&self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place in the pass budget (B4), if one was left. Given back when dropped, unless a pass keeps
/// it.
pub(crate) struct Permit<'a> {
    budget: &'a PassBudget,
    pub(crate) granted: bool,
}

impl<'a> Permit<'a> {
    pub(crate) fn new(budget: &'a PassBudget) -> Self {
        Self { budget, granted: budget.reserve() }
    }

    /// Returns whether there is a place. The pass keeps it.
    pub(crate) fn keep(mut self) -> bool {
        core::mem::take(&mut self.granted)
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.granted {
            self.budget.give_back();
        }
    }
}
