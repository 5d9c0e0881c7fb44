//! What few notifiers ever need: made when the first of it is needed.
#![forbid(unsafe_code)]

use super::{DETACHED, Entry, HELD};
use crate::protocol::WATCHED;
use crate::sync::{AtomicBool, AtomicU32, Ordering};
use crate::tally::{NotifierStats, Tally};
use alloc::boxed::Box;
use core::time::Duration;

/// No waiter: see [`Entry::first_waiter`].
const NO_WAITER: u32 = u32::MAX;

/// What is needed of a notifier only when a reader collides or waits, when an invalidation of it
/// lapses, or while it is asked for its name.
pub(super) struct Rare {
    tally: Tally,
    /// How many hold the entry.
    holds: AtomicU32,
    /// Head of the list of futures that wait for this notifier, a key of the space's waiters.
    first_waiter: AtomicU32,
    /// Its device is cut off from the memory: its passes are over (L5).
    fenced: AtomicBool,
}

impl Entry {
    #[cold]
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

    /// The counters of what waits or fails. The first count allocates them.
    pub(crate) fn tally(&self) -> &Tally {
        &self.rare().tally
    }

    pub(crate) fn stats(&self) -> NotifierStats {
        let longest = Duration::from_micros(self.longest.load(Ordering::Relaxed).into());
        self.rare.get().map_or(NotifierStats { longest, ..NotifierStats::default() }, |rare| {
            rare.tally.stats(longest)
        })
    }

    /// The first of the futures that wait for this notifier.
    pub(crate) fn first_waiter(&self) -> Option<u32> {
        let first = self.rare.get()?.first_waiter.load(Ordering::Relaxed);
        (first != NO_WAITER).then_some(first)
    }

    pub(crate) fn set_first_waiter(&self, waiter: Option<u32>) {
        self.rare().first_waiter.store(waiter.unwrap_or(NO_WAITER), Ordering::Relaxed);
        self.own.mark(WATCHED, waiter.is_some() || self.own.is_marked(DETACHED));
    }

    pub(crate) fn hold(&self) {
        let holds = self
            .rare()
            .holds
            .load(Ordering::Relaxed)
            .checked_add(1)
            .expect("fewer than 2^32 lists name one notifier at once");
        self.set_holds(holds);
    }

    pub(crate) fn unhold(&self) {
        self.set_holds(self.rare().holds.load(Ordering::Relaxed) - 1);
    }

    fn set_holds(&self, holds: u32) {
        self.rare().holds.store(holds, Ordering::Relaxed);
        self.own.mark(HELD, holds != 0);
    }

    /// The device is cut off. Under the lock. Returns whether it was before.
    ///
    /// Relaxed: a thread that looks for it outside of the lock has seen the number of fences rise
    /// (`Passes::cut`), which is published after this.
    pub(crate) fn fence(&self) -> bool {
        self.rare().fenced.swap(true, Ordering::Relaxed)
    }

    #[cold]
    pub(crate) fn is_fenced(&self) -> bool {
        self.rare.get().is_some_and(|rare| rare.fenced.load(Ordering::Relaxed))
    }
}
