//! The address space: drivers register here, and programs invalidate here.
#![forbid(unsafe_code)]

mod builder;
mod listed;

pub use builder::Builder;
pub use listed::{ActiveInvalidation, Phase, Stats};

use crate::engine::Shared;
use crate::engine::futures::drain::Drain;
use crate::engine::futures::guard::{Handle, InvalidationGuard};
use crate::engine::futures::invalidate::{Invalidate, try_invalidate};
#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
use crate::engine::gate::Closings;
use crate::event::{Event, Terms};
use crate::notifier::{IntervalNotifier, NotifierId, Request, Sequence, WouldBlock};
use crate::range::{AddressRange, RangeSet};
use crate::subscription::Subscription;
use crate::sync::Arc;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};

/// Joins the drivers that mirror the memory of one process or guest with the program that changes
/// it.
///
/// It is the kernel's `mm_struct` with its notifier subscriptions. Drivers
/// [insert](Self::insert) notifiers, and the program [invalidates](Self::invalidate) ranges. The
/// type is a handle: clones are cheap and are the same space. Make one space for each address
/// space, not for each device.
///
/// ```
/// # use shootdown::*;
/// # #[derive(Default)]
/// # struct Gpu { page_table: DriverLock<Vec<u64>> }
/// # impl IntervalNotifier for Gpu {
/// #     fn invalidate(&self, i: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
/// #         self.page_table.lock_for(i).clear();
/// #         Ok(None)
/// #     }
/// # }
/// # futures::executor::block_on(async {
/// let space = AddressSpace::new();
/// let range = AddressRange::new(0x10000, 0x4000)?;
/// let gpu = space.insert(range, Gpu::default())?;
///
/// let guard = space.invalidate(range, Event::Unmap).await;
/// // … no device uses the range now: change the memory …
/// drop(guard); // readers may look at it again
///
/// gpu.remove().await;
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
#[derive(Clone)]
pub struct AddressSpace {
    shared: Arc<Shared>,
}

/// Tells that a notifier was not inserted, because the space was released ([L4]).
///
/// Returned by [`AddressSpace::insert`] and [`AddressSpace::inbox`]. It holds the notifier, or the
/// mappings of the inbox.
///
/// [L4]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
pub struct InsertError<N> {
    notifier: N,
}

impl<N> InsertError<N> {
    pub(crate) fn new(notifier: N) -> Self {
        Self { notifier }
    }

    /// Returns the notifier that was not inserted.
    pub fn into_notifier(self) -> N {
        self.notifier
    }
}

impl<N> fmt::Debug for InsertError<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InsertError(Released)")
    }
}

impl<N> fmt::Display for InsertError<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the address space has been released: insert the notifier into the address space of a live process")
    }
}

impl<N> core::error::Error for InsertError<N> {}

impl AddressSpace {
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Makes a space without notifiers.
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Returns the settings for a new space.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Registers `notifier` for `range`.
    ///
    /// It never waits, and the notifier may be called before this returns ([L3]). An invalidation
    /// of the range that is active already does not call the notifier. Its readers wait for that
    /// invalidation ([S5]). For a driver that is a task, see [`inbox`](Self::inbox).
    ///
    /// # Errors
    /// Returns [`InsertError`], with the notifier in it, after [`release`](Self::release).
    ///
    /// [L3]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
    /// [S5]: crate::docs::contract#s-sequence
    #[inline(always)]
    pub fn insert<N: IntervalNotifier>(
        &self,
        range: AddressRange,
        notifier: N,
    ) -> Result<Subscription<N>, InsertError<N>> {
        // Cloned before the registration, so that a registered notifier always has a handle.
        let shared = self.shared.clone();
        match shared.register(range, notifier) {
            Ok(entry) => Ok(Subscription::new(shared, entry)),
            Err(notifier) => Err(InsertError::new(notifier)),
        }
    }

    /// Invalidates `range`: resolves when no device uses it any more.
    ///
    /// The future calls the first pass of every notifier that overlaps the range, then joins their
    /// passes, and resolves to an [`InvalidationGuard`]. Change the memory while you hold the
    /// guard. [`Invalidate`] has the rules of cancellation and panics.
    ///
    /// ```
    /// # use shootdown::{AddressRange, AddressSpace, Event};
    /// # futures::executor::block_on(async {
    /// # let space = AddressSpace::new();
    /// # let range = AddressRange::new(0x1000, 0x1000)?;
    /// let guard = space.invalidate(range, Event::Unmap).await;
    /// // … munmap …
    /// drop(guard);
    /// # Ok::<(), shootdown::RangeError>(()) }).unwrap();
    /// ```
    #[inline]
    pub fn invalidate(&self, range: AddressRange, event: Event) -> Invalidate<'_> {
        Invalidate::new(Handle::Borrowed(&self.shared), range, event)
    }

    /// Invalidates several ranges as one invalidation ([N1]).
    ///
    /// Each notifier that overlaps any of them gets one first pass, with the [ranges that concern
    /// it](crate::Invalidation::ranges), in the order of rule O1. Then all passes are joined, and
    /// one guard holds all the ranges. So a device is flushed once for a thousand pages.
    ///
    /// A notifier that watches only the gaps between the ranges is not called, and its readers do
    /// not wait ([L2]).
    ///
    /// ```
    /// # use shootdown::{AddressRange, AddressSpace, Event, RangeSet};
    /// # futures::executor::block_on(async {
    /// let space = AddressSpace::new();
    /// let pages =
    ///     (0..1000).map(|page| AddressRange::new(page * 0x4000, 0x1000));
    /// let pages = RangeSet::new(pages.collect::<Result<Vec<_>, _>>()?)?;
    /// let guard = space.invalidate_all(pages, Event::Unmap).await;
    /// // … unmap the pages …
    /// drop(guard);
    /// # Ok::<(), shootdown::RangeError>(()) }).unwrap();
    /// ```
    ///
    /// [L2]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
    /// [N1]: crate::docs::contract#n-many-ranges-at-once
    pub fn invalidate_all(&self, ranges: RangeSet, event: Event) -> Invalidate<'_> {
        Invalidate::of_set(Handle::Borrowed(&self.shared), ranges, event)
    }

    /// Invalidates `range` without waiting: the kernel's non-blockable form ([B2], [B3]).
    ///
    /// It polls the passes as long as one of them is ready to go on. It gives up after 32 polls of
    /// all ready passes in which none finishes, so that a pass that wakes itself for ever does not
    /// hold the caller.
    ///
    /// ```
    /// # use shootdown::{AddressRange, AddressSpace, Event};
    /// # let space = AddressSpace::new();
    /// # let range = AddressRange::new(0x1000, 0x1000)?;
    /// if let Ok(guard) = space.try_invalidate(range, Event::Clear) {
    ///     // … discard the pages …
    ///     drop(guard);
    /// }
    /// # Ok::<(), shootdown::RangeError>(())
    /// ```
    ///
    /// # Errors
    /// Returns [`WouldBlock`] when a first pass refuses or a pass stays pending. There is nothing
    /// to end then. Pending passes belong to the space, and the range stays under invalidation
    /// until they are done.
    ///
    /// # Panics
    /// Resumes a panic of a first pass or pass ([C5]). If the thread is unwinding already, it
    /// returns [`WouldBlock`] instead.
    ///
    /// [B2]: crate::docs::contract#b-blocking-and-non-blocking
    /// [B3]: crate::docs::contract#b-blocking-and-non-blocking
    /// [C5]: crate::docs::contract#c-cancellation-panics-stalls
    pub fn try_invalidate(
        &self,
        range: AddressRange,
        event: Event,
    ) -> Result<InvalidationGuard<'_>, WouldBlock> {
        try_invalidate(
            Handle::Borrowed(&self.shared),
            Request { range, owner: event.owner(), terms: Terms::new(event, false), parts: None },
        )
    }

    /// Ends the address space: calls every notifier with [`Event::Release`], and waits for all
    /// passes ([L4]).
    ///
    /// [`insert`](Self::insert) fails from the first poll on.
    /// [`remove`](crate::Subscription::remove) still works.
    ///
    /// [L4]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
    pub fn release(&self) -> Release<'_> {
        Release {
            invalidate: Invalidate::new(
                Handle::Borrowed(&self.shared),
                AddressRange::ALL,
                Event::Release,
            ),
        }
    }

    /// Holds up all readers that begin from now on, until the returned [`Pause`] is dropped.
    ///
    /// It closes the space's gate: `read_begin` of any notifier waits for the end of the pause. No
    /// driver is called. It takes no lock and no memory, so it may be called while another thread
    /// waits for the caller.
    ///
    /// Memory sources that hear of a change *after* it has happened use it in this order:
    /// 1. Pause the space.
    /// 2. Let the thread go on that has changed the memory.
    /// 3. [Start the invalidation](Self::invalidate): poll it once.
    /// 4. Drop the pause.
    ///
    /// Keep the pause short. It holds up readers of ranges that are unrelated to the change, which
    /// rule L2 allows in no other case.
    ///
    /// Needs feature `lease` or `userfaultfd`.
    #[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
    pub fn pause(&self) -> Pause<'_> {
        Pause { shared: &self.shared, closings: self.shared.close_gate() }
    }

    /// Drives the passes of abandoned invalidations to their end.
    ///
    /// An invalidation is abandoned if its future was dropped, or if it could not wait
    /// ([`try_invalidate`](Self::try_invalidate)). Invalidations that start after the first poll
    /// are not waited for.
    pub fn drain(&self) -> Drain<'_> {
        Drain::new(&self.shared)
    }

    /// Ends the passes of these notifiers, because their devices are cut off from the memory
    /// ([L5]).
    ///
    /// It does for each notifier what [`Subscription::fence`] does, without access to the
    /// subscription; the same warning holds. It serves
    /// - an operator who has only the [list of pending
    ///   passes](crate::ActiveInvalidation::pending_ids),
    /// - a device with many subscriptions that is reset,
    /// - a driver that waits in [`remove`](Subscription::remove) for its dead device.
    ///
    /// It goes once through all registered notifiers and pending passes, and ignores unknown ids.
    /// It returns how many passes were pending.
    ///
    /// [L5]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
    pub fn fence(&self, ids: impl IntoIterator<Item = NotifierId>) -> usize {
        self.shared.fence_all(ids.into_iter().map(NotifierId::get))
    }

    /// Returns the space's sequence ([S1]).
    ///
    /// It is even when no invalidation that hit a notifier is active, and odd otherwise.
    ///
    /// [S1]: crate::docs::contract#s-sequence
    pub fn sequence(&self) -> Sequence {
        self.shared.with(|state, _| Sequence(state.protocol.sequence()))
    }

    /// Returns how many notifiers are registered.
    pub fn len(&self) -> usize {
        self.shared.with(|state, _| state.protocol.registered())
    }

    /// Returns whether no notifier is registered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether [`release`](Self::release) has begun.
    pub fn is_released(&self) -> bool {
        self.shared.with(|state, _| state.released)
    }
}

/// Holds up the readers of a space until it is dropped: made by [`AddressSpace::pause`].
///
/// Needs feature `lease` or `userfaultfd`.
#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
#[must_use = "dropping it lets the readers go on"]
pub struct Pause<'a> {
    shared: &'a Shared,
    closings: Closings,
}

#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
impl fmt::Debug for Pause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pause").finish_non_exhaustive()
    }
}

#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.shared.open_gate(self.closings);
    }
}

impl Default for AddressSpace {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("sequence", &self.sequence())
            .field("notifiers", &self.len())
            .field("released", &self.is_released())
            .field("active", &self.active())
            .finish()
    }
}

/// Waits until all drivers have released: the future of [`AddressSpace::release`].
///
/// The space counts as released from the first poll on.
///
/// # Cancel safety
/// May be dropped at any moment, as [`Invalidate`]: passes that have begun still complete.
///
/// # Panics
/// Resumes a panic of a driver, and panics for the same misuses as [`Invalidate`].
#[must_use = "nothing is released before the future is awaited"]
#[derive(Debug)]
pub struct Release<'a> {
    invalidate: Invalidate<'a>,
}

impl Release<'_> {
    /// Gives the future its own handle of the space, so that it borrows nothing.
    pub fn into_owned(self) -> Release<'static> {
        Release { invalidate: self.invalidate.into_owned() }
    }

    /// Blocks the thread until all drivers have released ([W1]). Needs feature `std`.
    ///
    /// [W1]: crate::docs::contract#w-threads-that-wait
    #[cfg(feature = "std")]
    pub fn wait(self) {
        crate::block::wait(self);
    }
}

impl Future for Release<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Before the start, so that every notifier that was inserted until now is hit.
        self.invalidate.release();
        Pin::new(&mut self.invalidate).poll(cx).map(drop)
    }
}
