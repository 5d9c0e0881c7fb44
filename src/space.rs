//! The address space: where invalidations start and notifiers register.
#![forbid(unsafe_code)]

mod listed;

pub use listed::{ActiveInvalidation, Phase, Stats};

use crate::engine::Shared;
use crate::engine::futures::drain::Drain;
use crate::engine::futures::guard::{Handle, InvalidationGuard};
use crate::engine::futures::invalidate::{Invalidate, try_invalidate};
#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
use crate::engine::gate::Closings;
use crate::engine::host::Settings;
use crate::event::{Event, Terms};
use crate::foreign::Report;
use crate::notifier::{IntervalNotifier, NotifierId, Request, Sequence, WouldBlock};
use crate::range::{AddressRange, RangeSet};
use crate::subscription::Subscription;
use crate::sync::Arc;
use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use core::time::Duration;

/// The memory of one process as its devices see it: the kernel's `mm_struct` with its notifier
/// subscriptions.
///
/// A handle; cheap to clone, all clones are the same space.
///
/// ```
/// # use shootdown::{AddressSpace, AddressRange, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
/// # #[derive(Default)]
/// # struct Gpu { page_table: DriverLock<Vec<u64>> }
/// # impl IntervalNotifier for Gpu {
/// #     fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
/// #         self.page_table.lock_for(invalidation).clear();
/// #         Ok(None)
/// #     }
/// # }
/// # futures::executor::block_on(async {
/// let space = AddressSpace::new();
/// let range = AddressRange::new(0x10000, 0x4000)?;
/// let gpu = space.insert(range, Gpu::default())?;
///
/// let guard = space.invalidate(range, Event::Unmap).await; // no device uses the range any more
/// // … change the memory …
/// drop(guard); // and readers may look at it again
///
/// gpu.remove().await;
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
#[derive(Clone)]
pub struct AddressSpace {
    shared: Arc<Shared>,
}

/// Settings of a new [`AddressSpace`].
#[derive(Default)]
#[must_use = "a builder makes no space until `build` is called"]
pub struct Builder {
    settings: Settings,
}

impl Builder {
    /// At most `passes` passes may be pending at once in the whole space (B4); by default there is
    /// no bound.
    ///
    /// When they are used up, an invalidation awaits each further pass before it calls the next
    /// first pass. A budget of 0 is the kernel before the multi-pass patch: one device after the
    /// other.
    pub fn pass_budget(mut self, passes: usize) -> Self {
        self.settings.budget = Some(passes);
        self
    }

    /// Calls `reporter` when foreign code goes wrong in a way that no caller is told of: see
    /// [`Report`]. Outside of all locks; a panic of it is [counted](crate::Stats::lost_panics).
    pub fn on_report(mut self, reporter: impl Fn(&Report<'_>) + Send + Sync + 'static) -> Self {
        self.settings.reporter = Some(Box::new(reporter));
        self
    }

    /// Takes the time from `clock` (the time since some fixed moment) and notes it at the start of
    /// *every* invalidation.
    ///
    /// By default the library asks the operating system, and only once an invalidation turns out to
    /// last, because asking takes longer than a short invalidation: see
    /// [`ActiveInvalidation::age`]. Virtual time and `no_std` need this. Called outside of all
    /// locks; a panic of it is [counted](crate::Stats::lost_panics), and what it was asked for has
    /// no time then.
    pub fn clock(mut self, clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        self.settings.clock = Some(Box::new(clock));
        self
    }

    /// How long those who wait for a range are patient with a future that could end its
    /// invalidation and is not polled (C4): the time since its passes were done, 20 ms by default.
    /// Twice as long after each lapse of the same future, up to one second, or up to `patience` if
    /// that is longer. Where there is no clock, or one that stands still, turns of whoever waits
    /// are counted instead.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.settings.patience = Some(patience);
        self
    }

    /// Readers are checked against a lease: while `valid` says no, no `read_begin` begins, every
    /// [`read_retry`](crate::Subscription::read_retry) is true, and a registration cache finds
    /// nothing (R4). For memory that another host owns, such as `shootdown-lease` mirrors: a
    /// process that was stopped goes on where it was, after its lease has ended, and nobody could
    /// invalidate anything meanwhile. So `valid` reads the time by itself, on a clock that goes on
    /// in suspend.
    ///
    /// Called with each check, on the thread that checks, also under the driver's lock; never under
    /// a lock of the library. A panic of it is counted and means no. Whoever makes it say yes again
    /// [pauses](AddressSpace::pause) the space and ends the pause afterwards, which wakes readers.
    /// Passes and invalidations go on as ever. Costs other spaces nothing.
    #[cfg(any(feature = "lease", loom))]
    pub fn valid_while(mut self, valid: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.settings.valid = Some(Box::new(valid));
        self
    }

    /// Takes none of the library's quick ways, which must make no difference: for tests that
    /// compare.
    #[cfg(feature = "test-util")]
    pub fn plain_only(mut self) -> Self {
        self.settings.plain_only = true;
        self
    }

    /// The sequence that the space starts with, rounded down to an even one; 2 by default (S1). For
    /// tests of wrap-around.
    pub fn first_sequence(mut self, sequence: u64) -> Self {
        self.settings.sequence = Some(sequence & !1);
        self
    }

    /// Makes the space.
    pub fn build(self) -> AddressSpace {
        AddressSpace { shared: Shared::new(self.settings) }
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("first_sequence", &self.settings.sequence)
            .field("pass_budget", &self.settings.budget)
            .field("patience", &self.settings.patience)
            .finish_non_exhaustive()
    }
}

/// The space was released: no notifier can be inserted any more (L4). Holds the notifier, so that
/// it is not lost.
pub struct InsertError<N> {
    notifier: N,
}

impl<N> InsertError<N> {
    pub(crate) fn new(notifier: N) -> Self {
        Self { notifier }
    }

    /// The notifier that was not inserted.
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

    /// A new space with no notifier.
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Settings for a new space.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Registers `notifier` for `range`. Never waits; the notifier may be called before this
    /// returns (L3).
    ///
    /// Inserted while an invalidation of the range is active, the notifier is not called for it,
    /// and its readers wait for it (S5).
    ///
    /// # Errors
    /// [`InsertError`], with the notifier in it, after [`release`](Self::release).
    #[inline(always)]
    pub fn insert<N: IntervalNotifier>(
        &self,
        range: AddressRange,
        notifier: N,
    ) -> Result<Subscription<N>, InsertError<N>> {
        // Before it registers: there is never a notifier more than there are handles.
        let shared = self.shared.clone();
        match shared.register(range, notifier) {
            Ok(entry) => Ok(Subscription::new(shared, entry)),
            Err(notifier) => Err(InsertError::new(notifier)),
        }
    }

    /// Invalidates `range`: calls the first pass of every notifier that overlaps it, then joins all
    /// their passes. Change the memory while you hold the guard.
    #[inline]
    pub fn invalidate(&self, range: AddressRange, event: Event) -> Invalidate<'_> {
        Invalidate::new(Handle::Borrowed(&self.shared), range, event)
    }

    /// Invalidates several ranges as one (N1): one first pass for each notifier that overlaps any
    /// of them, in the order of O1, with the [ranges that concern it](crate::Invalidation::ranges);
    /// then all passes are joined, and one guard holds all the ranges. For whoever unmaps a
    /// thousand pages and has a device that is flushed once.
    ///
    /// Those who watch or read only what lies in the gaps are neither called nor held up (L2).
    ///
    /// ```
    /// # use shootdown::{AddressRange, AddressSpace, Event, RangeSet};
    /// # futures::executor::block_on(async {
    /// let space = AddressSpace::new();
    /// let pages = (0..1000).map(|page| AddressRange::new(page * 0x4000, 0x1000));
    /// let pages = RangeSet::new(pages.collect::<Result<Vec<_>, _>>()?)?;
    /// let guard = space.invalidate_all(pages, Event::Unmap).await;
    /// // … unmap the pages …
    /// drop(guard);
    /// # Ok::<(), shootdown::RangeError>(()) }).unwrap();
    /// ```
    pub fn invalidate_all(&self, ranges: RangeSet, event: Event) -> Invalidate<'_> {
        Invalidate::of_set(Handle::Borrowed(&self.shared), ranges, event)
    }

    /// Invalidates `range` without waiting (B2, B3): the kernel's non-blockable form.
    ///
    /// Passes are polled as long as one of them is ready to go on and some finish: after 32 polls
    /// of all that are ready in which none finishes it gives up, so that a pass that wakes itself
    /// for ever does not hold the caller.
    ///
    /// # Errors
    /// [`WouldBlock`] when a first pass refuses or a pass stays pending. Nothing has to be ended
    /// then; passes that are still pending belong to the space, and the range stays under
    /// invalidation until they are done.
    ///
    /// # Panics
    /// Resumes a panic of a first pass or pass (C5), or returns [`WouldBlock`] if the thread is
    /// unwinding already.
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

    /// The end of the address space: calls every notifier with [`Event::Release`] and waits for all
    /// passes. From the first poll on `insert` fails; `remove` still works (L4).
    pub fn release(&self) -> Release<'_> {
        Release {
            invalidate: Invalidate::new(
                Handle::Borrowed(&self.shared),
                AddressRange::ALL,
                Event::Release,
            ),
        }
    }

    /// Closes the space's gate: a `read_begin` of any notifier that begins from now on waits for
    /// the end of this pause, and no driver is called. It takes no lock and no memory, so that it
    /// may be called wherever somebody else waits for the caller.
    ///
    /// For sources of invalidations that hear of a change *after* it has happened: close the gate,
    /// let whoever changed the memory go on, [start the invalidation](Self::invalidate) (poll it
    /// once), and drop the pause. Keep it short: it holds up readers of ranges that have nothing to
    /// do with the change, which L2 allows nobody else to do.
    #[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
    pub fn pause(&self) -> Pause<'_> {
        Pause { shared: &self.shared, closings: self.shared.close_gate() }
    }

    /// Drives what was abandoned to its end: passes of invalidations whose future was dropped, or
    /// that could not wait. Invalidations that start after the first poll are not waited for.
    pub fn drain(&self) -> Drain<'_> {
        Drain::new(&self.shared)
    }

    /// Says that the devices of these notifiers are cut off from the memory, whoever has their
    /// subscriptions: what [`Subscription::fence`] says of one, for an operator who has the [list
    /// of what is pending](crate::ActiveInvalidation::pending_ids) only, for a device with many
    /// subscriptions that is reset, and for a driver that waits in [`remove`](Subscription::remove)
    /// for its dead device. Looks once at all that is registered and pending. Ids of nobody are
    /// ignored. Returns how many passes were pending.
    pub fn fence(&self, ids: impl IntoIterator<Item = NotifierId>) -> usize {
        self.shared.fence_all(ids.into_iter().map(NotifierId::get))
    }

    /// The space's sequence: even when no invalidation that hit a notifier is active, odd otherwise
    /// (S1).
    pub fn sequence(&self) -> Sequence {
        self.shared.with(|state, _| Sequence(state.protocol.sequence()))
    }

    /// How many notifiers are registered.
    pub fn len(&self) -> usize {
        self.shared.with(|state, _| state.protocol.registered())
    }

    /// Whether no notifier is registered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether [`release`](Self::release) has begun.
    pub fn is_released(&self) -> bool {
        self.shared.with(|state, _| state.released)
    }
}

/// No reader of the space begins while this exists: see [`AddressSpace::pause`].
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

/// The future of [`AddressSpace::release`].
///
/// # Cancel safety and panics
/// As for [`Invalidate`]. The space counts as released from the first poll on.
#[must_use = "nothing is released before the future is awaited"]
#[derive(Debug)]
pub struct Release<'a> {
    invalidate: Invalidate<'a>,
}

impl Release<'_> {
    /// The same future with a handle of the space of its own.
    pub fn into_owned(self) -> Release<'static> {
        Release { invalidate: self.invalidate.into_owned() }
    }

    /// Blocks the thread until all drivers have released (W1).
    #[cfg(feature = "std")]
    pub fn wait(self) {
        crate::block::wait(self);
    }
}

impl Future for Release<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Before it starts: what was inserted until then is hit.
        self.invalidate.release();
        Pin::new(&mut self.invalidate).poll(cx).map(drop)
    }
}
