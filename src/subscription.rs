//! The driver's handle of a registered notifier.
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

/// Keeps a notifier registered for a range of an address space: the kernel's
/// `struct mmu_interval_notifier`.
///
/// [`AddressSpace::insert`](crate::AddressSpace::insert) makes it, and it dereferences to the
/// notifier. Readers call [`read_begin`](Self::read_begin) and [`read_retry`](Self::read_retry), or
/// pass it to [`DriverLock::mirror`](crate::DriverLock::mirror).
///
/// # Dropping
/// The drop removes the notifier and does not wait. No call begins any more. A call on another
/// thread may still run, and pending passes still complete. [`remove`](Self::remove) waits for both
/// and returns the notifier.
///
/// ```
/// # use shootdown::*;
/// # struct Gpu;
/// # impl IntervalNotifier for Gpu {
/// #     fn invalidate(&self, i: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
/// #         i.set_seq();
/// #         Ok(None)
/// #     }
/// # }
/// # futures::executor::block_on(async {
/// # let space = AddressSpace::new();
/// let range = AddressRange::new(0x1000, 0x1000)?;
/// let gpu: Subscription<Gpu> = space.insert(range, Gpu)?;
///
/// let sequence = gpu.read_begin().await;
/// drop(space.invalidate(range, Event::Clear).await);
/// assert!(gpu.read_retry(sequence)); // invalidated since
///
/// let _gpu: Gpu = gpu.remove().await;
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
#[must_use = "dropping a subscription removes the notifier at once: keep it as long as the device may use the range"]
pub struct Subscription<N: IntervalNotifier> {
    registered: Registered<N>,
}

impl<N: IntervalNotifier> Subscription<N> {
    pub(crate) fn new(space: Arc<Shared>, entry: EntryBox<N>) -> Self {
        Self { registered: Registered::new(space, entry) }
    }

    /// Returns the range that the notifier watches.
    pub fn range(&self) -> AddressRange {
        self.registered.entry.range
    }

    /// Returns the id of this subscription, which no other subscription of the space has.
    ///
    /// [Lists of pending passes](crate::ActiveInvalidation::pending_ids) have it, and
    /// [`AddressSpace::fence`](crate::AddressSpace::fence) takes it.
    pub fn id(&self) -> NotifierId {
        NotifierId(self.registered.entry.order.load(Ordering::Relaxed))
    }

    /// Returns the notifier's own sequence at this moment, for diagnostics.
    ///
    /// It does not wait. Readers use [`read_begin`](Self::read_begin).
    pub fn sequence(&self) -> Sequence {
        Sequence(self.registered.entry.own.sequence())
    }

    /// Begins a read-side section: returns the sequence that [`read_retry`](Self::read_retry)
    /// checks.
    ///
    /// The result is the notifier's own sequence as it was on entry. The future resolves once there
    /// has been a moment since entry at which no active invalidation covered the notifier ([R1]).
    /// It takes no lock unless it has to wait ([R3]). It waits only for invalidations that cover
    /// this notifier ([L2]), and for the space's gate, which a memory source, `AddressSpace::pause`
    /// or an ended lease closes. Back-to-back invalidations of the range do not hold it up for
    /// ever.
    ///
    /// Afterwards, look at the memory and prepare the mapping. Then check the sequence *under the
    /// driver's lock* and install the mapping.
    /// [`DriverLock::install`](crate::DriverLock::install) checks and installs;
    /// [`DriverLock::mirror`](crate::DriverLock::mirror) is the whole loop. The guide's page
    /// [`retry_loop`](crate::docs::retry_loop) explains it.
    ///
    /// [L2]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
    /// [R1]: crate::docs::contract#r-readers
    /// [R3]: crate::docs::contract#r-readers
    #[inline]
    pub fn read_begin(&self) -> ReadBegin<'_> {
        ReadBegin::new(&self.registered.space, self.registered.entry.erase())
    }

    /// Returns whether the notifier was invalidated since `read_begin` returned `sequence` ([R2]).
    ///
    /// If `true`, the memory that was read may be stale, and the reader starts over. Call it under
    /// the lock that the first pass takes, in the same critical section that installs the mapping.
    /// It is always `true` after [`close`](Self::close).
    ///
    /// [R2]: crate::docs::contract#r-readers
    #[inline]
    pub fn read_retry(&self, sequence: Sequence) -> bool {
        #[cfg(feature = "test-util")]
        if self.forced_collision() {
            self.registered.space.collided(&self.registered.entry);
            return true;
        }
        // The gate first: a reader that finds it open sees every invalidation from the time in
        // which it was closed.
        let Registered { space, entry, .. } = &self.registered;
        let open = !space.gate.is_closed_now();
        if open && entry.own.is_stable_at(sequence.0) {
            return false;
        }
        space.collides(entry, sequence, open)
    }

    /// Returns whether [`close`](Self::close) or [`fence`](Self::fence) was called.
    ///
    /// The driver is not told of invalidations any more then, so no check succeeds.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.registered.entry.own.is_closed()
    }

    /// Returns the counts of what happened to the notifier so far.
    ///
    /// Only waits and failures are counted, so a reader without them pays nothing. The first count
    /// of each notifier allocates its counters, 24 bytes.
    /// [`AddressSpace::stats`](crate::AddressSpace::stats) has the counts of the whole space.
    pub fn stats(&self) -> NotifierStats {
        self.registered.entry.stats()
    }

    /// Makes the `n`-th [`read_retry`](Self::read_retry) from now on return `true`.
    ///
    /// `n` counts from 1; 0 cancels it. Every reader must expect this answer, so the call needs no
    /// lock. For other faults see [`test_util`](crate::test_util).
    ///
    /// Needs feature `test-util`.
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

    /// Takes the notifier out of the space, in the call itself, and keeps the subscription.
    ///
    /// **Stop the device before.** From now on it is not told that memory goes away, and no
    /// invalidation waits for it. No mapping can be installed any more, because every
    /// [`read_retry`](Self::read_retry) is true.
    ///
    /// Invalidations that start from now on do not call the notifier, and calls that have not begun
    /// do not begin. The returned future waits until no call and no pass of it is running ([L1]).
    /// Use it for a subscription that is shared with readers; otherwise use
    /// [`remove`](Self::remove). It may be called again.
    ///
    /// [L1]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
    pub fn close(&self) -> Close<'_> {
        Close::new(&self.registered.space, self.registered.entry.erase())
    }

    /// Ends the notifier's passes, because its device is cut off from the memory ([L5]).
    ///
    /// **Nothing of the device may reach the memory any more**: it was reset, lost its bus
    /// mastering or its IOMMU domain, or is gone. To fence a device that still runs corrupts
    /// memory. The driver or an operator calls this for a device that never answers.
    ///
    /// The call [closes](Self::close) the notifier and drops its pending passes unfinished. All
    /// that waited for them goes on. Two passes end later:
    /// - A pass that another thread polls at this moment is dropped when that poll returns. If the
    ///   poll never returns, the pass cannot be ended.
    /// - A pass of a first pass that runs at this moment is dropped after one more poll at most.
    ///
    /// Passes of other notifiers are not polled here. It may be called from anywhere, also from a
    /// pass of the notifier itself, and again. It returns how many passes were pending.
    ///
    /// A fence is counted ([`Stats::fences`](crate::Stats::fences)) and reported
    /// ([`Report::Fenced`](crate::Report::Fenced)). Afterwards [`remove`](Self::remove) returns the
    /// notifier. Insert a device that works again anew.
    /// [`AddressSpace::fence`](crate::AddressSpace::fence) does the same by ids.
    ///
    /// # Panics
    /// A panic in the drop of a pass is resumed in the caller of its invalidation ([C5]), not here.
    ///
    /// [C5]: crate::docs::contract#c-cancellation-panics-stalls
    /// [L5]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
    pub fn fence(&self) -> usize {
        self.registered.space.fence(self.registered.entry.erase())
    }

    /// Ends the subscription, waits until the notifier is quiet, and returns it ([L1]).
    ///
    /// **Stop the device before.** The removal happens in the call: invalidations that start
    /// afterwards do not call the notifier. The future waits for this notifier's own calls and
    /// passes, and drives the passes. A held [`InvalidationGuard`](crate::InvalidationGuard) does
    /// not keep it waiting.
    ///
    /// [L1]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
    pub fn remove(self) -> Remove<N> {
        Remove::new(self.registered)
    }

    /// Returns the notifier's name. A panic of `name` is counted and not resumed (F1).
    pub(crate) fn notifier_name(&self) -> Cow<'static, str> {
        self.registered.entry.erase().name(&self.registered.space.host.losses)
    }

    /// Waits until the notifier was invalidated or closed since it had this sequence.
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
