//! The address space: where invalidations start and notifiers register.
#![forbid(unsafe_code)]

use crate::engine::guard::{Handle, InvalidationGuard};
use crate::engine::invalidate::{Invalidate, try_invalidate};
use crate::engine::wait::Drain;
use crate::engine::{Budget, Clock, Report, Reporter, Shared};
use crate::entry::{EntryBox, EntryRef};
use crate::event::Event;
use crate::notifier::{IntervalNotifier, Request, Sequence, WouldBlock};
use crate::range::AddressRange;
use crate::subscription::Subscription;
use crate::sync::{Arc, Ordering};
use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use core::time::Duration;

/// The memory of one process as its devices see it: the kernel's `mm_struct` with its notifier subscriptions.
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
pub struct Builder {
    sequence: Option<u64>,
    budget: Option<usize>,
    reporter: Option<Reporter>,
    clock: Option<Clock>,
}

impl Builder {
    /// At most `passes` passes may be pending at once in the whole space (B4); by default there is no bound.
    ///
    /// When they are used up, an invalidation awaits each further pass before it calls the next first pass. A budget of 0 is
    /// the kernel before the multi-pass patch: one device after the other.
    pub fn pass_budget(mut self, passes: usize) -> Self {
        self.budget = Some(passes);
        self
    }

    /// Calls `reporter` when a driver breaks its contract in a way that no caller is told of. Outside of all locks; a panic of it is ignored.
    pub fn on_report(mut self, reporter: impl Fn(&Report<'_>) + Send + Sync + 'static) -> Self {
        self.reporter = Some(Box::new(reporter));
        self
    }

    /// Takes the time from `clock` (the time since some fixed moment) and notes it at the start of *every* invalidation.
    ///
    /// By default the library asks the operating system, and only once an invalidation turns out to last, because
    /// asking takes longer than a short invalidation: see [`ActiveInvalidation::age`]. Virtual time and `no_std` need this.
    pub fn clock(mut self, clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        self.clock = Some(Box::new(clock));
        self
    }

    /// The sequence that the space starts with, rounded down to an even one; 2 by default (S1). For tests of wrap-around.
    pub fn first_sequence(mut self, sequence: u64) -> Self {
        self.sequence = Some(sequence & !1);
        self
    }

    /// Makes the space.
    pub fn build(self) -> AddressSpace {
        let shared = Shared::new(self.sequence.unwrap_or(2), self.budget.map(Budget::new), self.reporter, self.clock);
        AddressSpace { shared: Arc::new(shared) }
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("first_sequence", &self.sequence)
            .field("pass_budget", &self.budget)
            .finish_non_exhaustive()
    }
}

/// The space was released: no notifier can be inserted any more (L4). Holds the notifier, so that it is not lost.
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

/// How far an active invalidation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Its first passes run at this moment.
    FirstPasses,
    /// Passes are pending; see [`ActiveInvalidation::pending`].
    Passes,
    /// All its passes are done and its future has to be polled to take the guard.
    Unclaimed,
    /// Somebody holds its guard.
    Held,
}

/// One active invalidation, as [`AddressSpace::active`] lists it (C6).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ActiveInvalidation {
    /// What is under invalidation.
    pub range: AddressRange,
    /// Why.
    pub event: Event,
    /// Whether it may wait.
    pub blockable: bool,
    /// The sequence of its passes.
    pub sequence: Sequence,
    /// How far it is.
    pub phase: Phase,
    /// The future that started it is gone; it ends by itself when its passes are done.
    pub abandoned: bool,
    /// How long it has been active. Exact in a space with a [clock](Builder::clock). Otherwise the time since its passes became pending, or for an
    /// invalidation that never had to wait, since it was first listed here: a lower bound. `None` without `std` and clock.
    pub age: Option<Duration>,
    /// Names of the notifiers whose passes are pending.
    pub pending: Vec<Cow<'static, str>>,
}

/// What happened in a space so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Invalidations that were started.
    pub invalidations: u64,
    /// Times that a reader's check said that its notifier was invalidated.
    pub collisions: u64,
    /// Times that [`DriverLock::mirror`](crate::DriverLock::mirror) started over.
    pub retries: u64,
    /// Times that a reader had to wait for an invalidation (a pause is not counted).
    pub waits: u64,
    /// The longest that an invalidation was active, of those that were timed: all in a space with a [clock](Builder::clock); otherwise those
    /// whose passes were pending, from then on, and those that [`AddressSpace::active`] listed. `None` before the first.
    pub longest: Option<Duration>,
    /// Invalidations that were ended on behalf of a future that was not polled, and started over if it was polled again (C4).
    pub lapses: u64,
    /// Invalidations whose future was dropped, or that could not wait, while passes were pending (C2, B3).
    pub abandoned: u64,
    /// First passes that answered `WouldBlock` in a blockable invalidation: a driver's bug (B1).
    pub refused_blockable: u64,
    /// Panics of passes that had no caller left to be resumed in.
    pub lost_panics: u64,
}

impl AddressSpace {
    #[cfg(any(feature = "cache", feature = "userfaultfd"))]
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

    /// Registers `notifier` for `range`. Never waits; the notifier may be called before this returns (L3).
    ///
    /// Inserted while an invalidation of the range is active, the notifier is not called for it, and its readers wait for it (S5).
    ///
    /// # Errors
    /// [`InsertError`], with the notifier in it, after [`release`](Self::release).
    pub fn insert<N: IntervalNotifier>(&self, range: AddressRange, notifier: N) -> Result<Subscription<N>, InsertError<N>> {
        let mut entry = EntryBox::new(range, notifier);
        let inserted = self.shared.with(|state, _| {
            if state.released {
                return false;
            }
            state.next_order += 1;
            entry.set_order(state.next_order);
            state.protocol.insert(range, entry.erase());
            true
        });
        if inserted { Ok(Subscription::new(self.shared.clone(), entry)) } else { Err(InsertError::new(entry.into_notifier())) }
    }

    /// Invalidates `range`: calls the first pass of every notifier that overlaps it, then joins all their passes. Change the memory while
    /// you hold the guard.
    #[inline]
    pub fn invalidate(&self, range: AddressRange, event: Event) -> Invalidate<'_> {
        Invalidate::new(Handle::Borrowed(&self.shared), Request { range, reason: event.into(), blockable: true, release: false })
    }

    /// Invalidates `range` without waiting (B2, B3): the kernel's non-blockable form.
    ///
    /// Passes are polled as long as one of them is ready to go on and some finish: after 32 polls of all that are ready in which none
    /// finishes it gives up, so that a pass that wakes itself for ever does not hold the caller.
    ///
    /// # Errors
    /// [`WouldBlock`] when a first pass refuses or a pass stays pending. Nothing has to be ended then; passes that are still pending
    /// belong to the space, and the range stays under invalidation until they are done.
    ///
    /// # Panics
    /// Resumes a panic of a first pass or pass (C5).
    pub fn try_invalidate(&self, range: AddressRange, event: Event) -> Result<InvalidationGuard<'_>, WouldBlock> {
        let request = Request { range, reason: event.into(), blockable: false, release: false };
        try_invalidate(Handle::Borrowed(&self.shared), &request)
    }

    /// The end of the address space: calls every notifier with [`Event::Release`] and waits for all passes. From the first poll on
    /// `insert` fails; `remove` still works (L4).
    pub fn release(&self) -> Release<'_> {
        let request = Request { range: AddressRange::ALL, reason: Event::Release.into(), blockable: true, release: true };
        Release { invalidate: Invalidate::new(Handle::Borrowed(&self.shared), request) }
    }

    /// Closes the space's gate: `read_begin` of every notifier waits from now on, and no driver is called. It takes no lock and no memory, so that it may
    /// be called wherever somebody else waits for the caller.
    ///
    /// For sources of invalidations that hear of a change *after* it has happened: close the gate, let whoever changed the memory go
    /// on, [start the invalidation](Self::invalidate) (poll it once), and drop the pause. Keep it short: it holds up readers of ranges that have nothing to do with the
    /// change, which L2 allows nobody else to do.
    #[cfg(any(feature = "userfaultfd", loom))]
    pub fn pause(&self) -> Pause<'_> {
        self.shared.close_gate();
        Pause { shared: &self.shared }
    }

    /// Drives what was abandoned to its end: passes of invalidations whose future was dropped, or that could not wait. Invalidations that
    /// start after the first poll are not waited for.
    pub fn drain(&self) -> Drain<'_> {
        Drain::new(&self.shared)
    }

    /// The space's sequence: even when no invalidation that hit a notifier is active, odd otherwise (S1).
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

    /// What happened so far.
    pub fn stats(&self) -> Stats {
        let (counts, invalidations) = self.shared.with(|state, _| (state.counts, state.protocol.last_serial()));
        let reads = &self.shared.reads;
        Stats {
            invalidations,
            collisions: reads.collisions.load(Ordering::Relaxed),
            retries: reads.retries.load(Ordering::Relaxed),
            waits: reads.waits.load(Ordering::Relaxed),
            longest: counts.longest,
            lapses: counts.lapses,
            abandoned: counts.abandoned,
            refused_blockable: counts.refused_blockable,
            lost_panics: counts.lost_panics,
        }
    }

    /// The invalidations that are active at this moment, in the order in which they started (C6). Asks the notifiers with pending passes for
    /// their [names](IntervalNotifier::name), so it allocates, and is meant for people and watchdogs.
    pub fn active(&self) -> Vec<ActiveInvalidation> {
        let now = self.shared.now();
        let mut held: Vec<EntryRef> = Vec::new();
        let mut listed = self.shared.with(|state, _| {
            let mut listed = Vec::with_capacity(state.protocol.active().len());
            let mut longest = state.counts.longest;
            for (id, active) in state.protocol.active_mut().iter_mut() {
                let since = match (active.extra.since, now) {
                    (None, Some(now)) => *active.extra.since.insert(now),
                    (since, _) => since.unwrap_or_default(),
                };
                if let Some(now) = now {
                    longest = longest.max(Some(now.saturating_sub(since)));
                }
                let from = held.len();
                let phase = match active.extra.pending.as_deref() {
                    Some(pending) => {
                        held.extend(pending.waiting.iter().map(|(_, entry)| *entry));
                        if pending.done { Phase::Unclaimed } else { Phase::Passes }
                    }
                    None if self.shared.calls.under_way(id) => Phase::FirstPasses,
                    None => Phase::Held,
                };
                let invalidation = ActiveInvalidation {
                    range: active.range,
                    event: active.extra.event(),
                    blockable: active.extra.blockable,
                    sequence: Sequence(active.sequence),
                    phase,
                    abandoned: active.extra.pending.as_deref().is_some_and(|pending| pending.abandoned),
                    age: now.map(|now| now.saturating_sub(since)),
                    pending: Vec::new(),
                };
                listed.push((active.serial, from..held.len(), invalidation));
            }
            state.counts.longest = longest;
            held.iter().for_each(|entry| entry.hold());
            listed
        });
        // Names are driver code: asked for without the lock, while the holds keep the notifiers alive.
        let names = Names { shared: &self.shared, held };
        for (_, of, invalidation) in &mut listed {
            invalidation.pending = names.held[of.clone()].iter().map(|entry| entry.notifier().name()).collect();
        }
        drop(names);
        listed.sort_by_key(|(serial, ..)| *serial);
        listed.into_iter().map(|(_, _, invalidation)| invalidation).collect()
    }
}

/// No reader of the space begins while this exists: see [`AddressSpace::pause`].
#[cfg(any(feature = "userfaultfd", loom))]
#[must_use = "dropping it lets the readers go on"]
pub struct Pause<'a> {
    shared: &'a Shared,
}

#[cfg(any(feature = "userfaultfd", loom))]
impl fmt::Debug for Pause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pause").finish_non_exhaustive()
    }
}

#[cfg(any(feature = "userfaultfd", loom))]
impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.shared.open_gate(1);
    }
}

/// Notifiers that are kept alive to be asked for their names.
struct Names<'a> {
    shared: &'a Shared,
    held: Vec<EntryRef>,
}

impl Drop for Names<'_> {
    fn drop(&mut self) {
        if self.held.is_empty() {
            return;
        }
        self.shared.with(|state, after| {
            for &entry in &self.held {
                entry.unhold();
                if !entry.is_held() {
                    // Somebody may wait in `remove` for just that.
                    state.nudge(entry, after);
                    state.reap(entry, after);
                }
            }
        });
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
}

impl Future for Release<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.invalidate).poll(cx).map(drop)
    }
}
