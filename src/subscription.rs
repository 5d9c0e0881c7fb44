//! A registered notifier, as its driver holds it.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::futures::hit::Hit;
use crate::engine::futures::read::ReadBegin;
use crate::engine::futures::remove::{Close, Remove};
use crate::engine::registration::Registered;
use crate::entry::EntryBox;
use crate::notifier::{IntervalNotifier, NotifierId, Sequence};
use crate::range::AddressRange;
use crate::sync::Arc;
use crate::sync::Ordering;
use crate::tally::NotifierStats;
use alloc::borrow::Cow;
use core::fmt;
use core::ops::Deref;

/// A notifier that watches a range of an address space: the kernel's
/// `struct mmu_interval_notifier`.
///
/// Made by [`AddressSpace::insert`](crate::AddressSpace::insert); dereferences to the notifier.
/// Dropping it ends the subscription without waiting: no call begins any more, but one that runs on
/// another thread may still be running, and passes that are pending still complete. To wait for
/// both, and to get the notifier back, use [`remove`](Self::remove).
#[must_use = "dropping a subscription removes the notifier at once: keep it as long as the device may use the range"]
pub struct Subscription<N: IntervalNotifier> {
    registered: Registered<N>,
}

impl<N: IntervalNotifier> Subscription<N> {
    pub(crate) fn new(space: Arc<Shared>, entry: EntryBox<N>) -> Self {
        Self { registered: Registered::new(space, entry) }
    }

    /// What the notifier watches.
    pub fn range(&self) -> AddressRange {
        self.registered.entry.range
    }

    /// What tells this subscription from all others of the space, also in
    /// [lists of what is pending](crate::ActiveInvalidation::pending_ids).
    pub fn id(&self) -> NotifierId {
        NotifierId(self.registered.entry.order.load(Ordering::Relaxed))
    }

    /// The notifier's own sequence at this moment, without waiting. For diagnostics: readers use
    /// [`read_begin`](Self::read_begin).
    pub fn sequence(&self) -> Sequence {
        Sequence(self.registered.entry.own.sequence())
    }

    /// Begins a read-side section: returns the notifier's own sequence as it was on entry, once
    /// there has been a moment since then at which no active invalidation covered the notifier
    /// (R1). Takes no lock unless it has to wait (R3).
    ///
    /// Look at the memory, prepare the mapping, then check the sequence with
    /// [`read_retry`](Self::read_retry) *under the driver's lock* and install:
    /// [`DriverLock::install`](crate::DriverLock::install) does the second half,
    /// [`DriverLock::mirror`](crate::DriverLock::mirror) the whole loop.
    ///
    /// It waits for invalidations that cover this notifier only (L2), and back-to-back
    /// invalidations of its range do not hold it up for ever.
    #[inline]
    pub fn read_begin(&self) -> ReadBegin<'_> {
        ReadBegin::new(&self.registered.space, self.registered.entry.erase())
    }

    /// Whether the notifier was invalidated since `read_begin` returned `sequence` (R2): then what
    /// was read may be stale, and the reader starts over. Call it under the lock that the first
    /// pass takes, together with installing the mapping.
    #[inline]
    pub fn read_retry(&self, sequence: Sequence) -> bool {
        #[cfg(feature = "test-util")]
        if self.forced_collision() {
            self.registered.space.collided(&self.registered.entry);
            return true;
        }
        // The gate first: whoever finds it open sees what was invalidated while it was closed.
        let Registered { space, entry, .. } = &self.registered;
        let open = !space.gate.is_closed_now();
        if open && entry.own.is_stable_at(sequence.0) {
            return false;
        }
        space.collides(entry, sequence, open)
    }

    /// Whether [`close`](Self::close) was called: nothing tells the driver of invalidations any
    /// more, so no check succeeds.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.registered.entry.own.is_closed()
    }

    /// What happened to the notifier so far. Only what waits or fails is counted, so a reader that
    /// does neither pays nothing for it; the first count of each notifier allocates its counters,
    /// 24 bytes.
    pub fn stats(&self) -> NotifierStats {
        self.registered.entry.stats()
    }

    /// Makes the `n`-th check from now on, counted from 1, say that the notifier was invalidated,
    /// whether it was or not; 0 takes that back. It is an answer that every reader must expect, so
    /// it needs no lock.
    #[cfg(feature = "test-util")]
    pub fn collide_on(&self, n: u32) {
        self.registered.entry.own.collide_on.store(n, Ordering::Relaxed);
    }

    #[cfg(feature = "test-util")]
    fn forced_collision(&self) -> bool {
        let count_down = |left: u32| left.checked_sub(1);
        let left = &self.registered.entry.own.collide_on;
        left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count_down) == Ok(1)
    }

    /// Takes the notifier out of the space, in the call. Stop the device before: from now on nobody
    /// tells it that memory goes away, and nobody waits for it. No mapping can be installed any
    /// more, because every [`read_retry`](Self::read_retry) is true.
    ///
    /// In detail: invalidations that start from now on do not call it, and calls that have not
    /// begun do not begin. The returned future waits until no call and no pass of it is under way
    /// (L1), as [`remove`](Self::remove) does, but leaves the subscription in place: for drivers
    /// that share it with readers. May be called again.
    pub fn close(&self) -> Close<'_> {
        Close::new(&self.registered.space, self.registered.entry.erase())
    }

    /// Says that the device is cut off from the memory: it was reset, lost its bus mastering or its
    /// IOMMU domain, or is gone, so that **nothing of it can reach the memory any more**. The way
    /// out for a device that never answers (L5). To be called by its driver or by an operator; who
    /// says so of a device that still runs corrupts memory.
    ///
    /// In the call the notifier is [closed](Self::close), and its passes that are pending are over:
    /// they are dropped unfinished, and whoever waited for them goes on. A pass that another thread
    /// polls at this moment is dropped as soon as that returns, and one that a first pass leaves
    /// that runs at this moment after one more poll at most; one whose poll never returns cannot be
    /// ended. Passes of other notifiers are not polled here. May be called from anywhere, also from
    /// a pass of the notifier itself, and again.
    ///
    /// Counted ([`Stats::fences`](crate::Stats::fences)) and reported
    /// ([`Report::Fenced`](crate::Report::Fenced)). [`remove`](Self::remove) gives the notifier
    /// back afterwards; a device that works again is registered anew. Returns how many passes were
    /// pending.
    ///
    /// # Panics
    /// A panic in the drop of a pass goes on in the caller of its invalidation (C5), not here.
    pub fn fence(&self) -> usize {
        self.registered.space.fence(self.registered.entry.erase())
    }

    /// Ends the subscription (stop the device before) and waits until the notifier is neither
    /// called nor has a pass pending; returns it (L1).
    ///
    /// The removal itself happens in the call: invalidations that start afterwards do not call the
    /// notifier. The future waits for this notifier's own calls and passes, and drives the latter;
    /// guards that somebody holds do not keep it waiting.
    pub fn remove(self) -> Remove<N> {
        Remove::new(self.registered)
    }

    /// What the notifier calls itself; without a panic of that (F1).
    pub(crate) fn notifier_name(&self) -> Cow<'static, str> {
        self.registered.entry.erase().name(&self.registered.space.host.losses)
    }

    /// Waits until something has happened since the notifier had this sequence.
    pub(crate) fn hit(&self, sequence: Sequence) -> Hit<'_> {
        Hit::new(&self.registered.space, self.registered.entry.erase(), sequence)
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.registered.space
    }

    pub(crate) fn entry(&self) -> &EntryBox<N> {
        &self.registered.entry
    }
}

impl<N: IntervalNotifier> Deref for Subscription<N> {
    type Target = N;

    #[inline]
    fn deref(&self) -> &N {
        self.registered.entry.notifier()
    }
}

impl<N: IntervalNotifier> fmt::Debug for Subscription<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("range", &self.range())
            .field("sequence", &self.sequence())
            .field("notifier", &self.notifier_name())
            .finish()
    }
}
