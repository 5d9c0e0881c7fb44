//! [`Rare`]: the data of an entry that few notifiers need. It is allocated when it is needed first.
#![forbid(unsafe_code)]

use super::Entry;
use super::marks::{DETACHED, HELD};
use crate::protocol::WATCHED;
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::tally::{NotifierStats, Tally};
use alloc::boxed::Box;
use core::time::Duration;

/// The value of [`Rare::first_waiter`] if no future waits.
const NO_WAITER: u32 = u32::MAX;

/// The data that a notifier needs only when a reader collides or waits, an invalidation lapses, its
/// name is asked for, or its device is fenced.
///
/// All but the counters and `fenced` is read and written under the space's lock.
pub(super) struct Rare {
    tally: Tally,
    /// Number of holds of the entry.
    holds: AtomicU32,
    /// Head of the list of futures that wait for this notifier: a key of the space's waiters, or
    /// [`NO_WAITER`].
    first_waiter: AtomicU32,
    /// The device is cut off from the memory. Its passes are over (L5).
    fenced: AtomicBool,
}

impl Entry {
    /// Returns the rare data, and allocates it first if needed.
    fn rare(&self) -> &Rare {
        self.rare.get_or_init(|| {
            Box::new(Rare {
                tally: Tally::new(),
                holds: AtomicU32::new(0),
                first_waiter: AtomicU32::new(NO_WAITER),
                fenced: AtomicBool::new(false),
            })
        })
    }

    /// Returns the counters of slow paths. The first call allocates them.
    pub(crate) fn tally(&self) -> &Tally {
        &self.rare().tally
    }

    /// Returns what the counters say, for [`Subscription::stats`](crate::Subscription::stats).
    pub(crate) fn stats(&self) -> NotifierStats {
        let longest = Duration::from_micros(self.longest.load(Ordering::Relaxed).into());
        self.rare.get().map_or(NotifierStats { longest, ..NotifierStats::default() }, |rare| {
            rare.tally.stats(longest)
        })
    }

    /// Returns the first future that waits for this notifier. Under the space's lock.
    pub(crate) fn first_waiter(&self) -> Option<u32> {
        let first = self.rare.get()?.first_waiter.load(Ordering::Relaxed);
        (first != NO_WAITER).then_some(first)
    }

    /// Sets the first future that waits for this notifier. Under the space's lock.
    pub(crate) fn set_first_waiter(&self, waiter: Option<u32>) {
        self.rare().first_waiter.store(waiter.unwrap_or(NO_WAITER), Ordering::Relaxed);
        self.own.mark(WATCHED, waiter.is_some() || self.own.is_marked(DETACHED));
    }

    /// Adds a hold, which keeps the entry alive. Under the space's lock.
    pub(crate) fn hold(&self) {
        let holds = self
            .rare()
            .holds
            .load(Ordering::Relaxed)
            .checked_add(1)
            .expect("fewer than 2^32 lists name one notifier at once");
        self.set_holds(holds);
    }

    /// Removes a hold. Under the space's lock.
    pub(crate) fn unhold(&self) {
        self.set_holds(self.rare().holds.load(Ordering::Relaxed) - 1);
    }

    fn set_holds(&self, holds: u32) {
        self.rare().holds.store(holds, Ordering::Relaxed);
        self.own.mark(HELD, holds != 0);
    }

    /// Marks the device as cut off (L5). Returns whether it was marked before. Under the space's
    /// lock.
    ///
    /// Relaxed: a thread that looks for the mark without the lock has seen the number of fences
    /// rise (`Passes::cut`), which is published after the mark.
    pub(crate) fn fence(&self) -> bool {
        self.rare().fenced.swap(true, Ordering::Relaxed)
    }

    /// Returns whether the device is cut off (L5).
    pub(crate) fn is_fenced(&self) -> bool {
        self.rare.get().is_some_and(|rare| rare.fenced.load(Ordering::Relaxed))
    }
}
