//! What a driver implements, and what it is told.
#![forbid(unsafe_code)]

use crate::event::{Event, Owner, Terms};
use crate::pass::PassFuture;
use crate::protocol::Own;
use crate::range::{AddressRange, Parts, RangeSet};
use alloc::borrow::Cow;
use core::fmt;

/// A driver's side of a mirrored range: the kernel's `mmu_interval_notifier_ops`.
///
/// ```
/// use shootdown::{DriverLock, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
///
/// #[derive(Default)]
/// struct Gpu {
///     page_table: DriverLock<Vec<u64>>,
/// }
///
/// impl IntervalNotifier for Gpu {
///     fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
///         // Locking through the invalidation sets the sequence: readers that began before it will retry.
///         self.page_table.lock_for(invalidation).clear();
///         let flushed = submit_tlb_flush();
///         Ok(Some(PassFuture::new(flushed))) // waited for together with those of all other devices
///     }
/// }
/// # fn submit_tlb_flush() -> impl Future<Output = ()> { async {} }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no `IntervalNotifier`",
    label = "it cannot be inserted into an address space",
    note = "a driver that implements `AsyncIntervalNotifier` is wrapped: `AsyncNotifier::new(driver)`",
    note = "a driver that is a task has an inbox: `AddressSpace::inbox`"
)]
pub trait IntervalNotifier: Send + Sync + 'static {
    /// First pass: start the work on the device, do not wait for it.
    ///
    /// Runs on whatever thread polls the invalidation. The library holds no lock meanwhile (C8), so
    /// almost everything may be called from here; *waiting* for `read_begin`, `remove` or an
    /// invalidation of the same space may not (C7), and panics in debug builds.
    ///
    /// The driver takes its lock, calls [`set_seq`](Invalidation::set_seq) (or does both with
    /// [`DriverLock::lock_for`](crate::DriverLock::lock_for)), zaps its mappings of
    /// [`range`](Invalidation::range) and returns what remains to be waited for. A first pass that
    /// leaves the device alone sets no sequence (S4) and returns `Ok(None)`; one that returns a
    /// pass has set it, or panics in debug builds.
    ///
    /// The pass waits for the device and for nothing of the space: one that awaits its own
    /// notifier's `read_begin`, `mirror` or `remove` waits for itself, and panics in debug builds.
    /// It is polled on any thread that waits, so it needs no timer or socket of a runtime: see the
    /// guide, `driver`.
    ///
    /// A notifier may be called again for another invalidation while a pass of it is pending (O6).
    /// Each call has to answer for itself: one that finds nothing left to zap, because an earlier
    /// call zapped it, still has to wait for the device to be done with it.
    ///
    /// # Errors
    /// [`WouldBlock`] when the invalidation is not [`blockable`](Invalidation::blockable) and the
    /// driver cannot start without waiting; it must have changed nothing then. To refuse a
    /// blockable invalidation is a driver's bug (B1): it is reported and counted, and the
    /// invalidation goes on.
    ///
    /// # Panics
    /// A panic stops neither the other notifiers nor the space; it is resumed in the caller of the
    /// invalidation (C5).
    fn invalidate(&self, invalidation: &Invalidation<'_>)
    -> Result<Option<PassFuture>, WouldBlock>;

    /// What to call this notifier in lists of what is pending (C6) and in messages. Called outside
    /// of all locks, when asked for.
    fn name(&self) -> Cow<'static, str> {
        Cow::Borrowed(core::any::type_name::<Self>())
    }
}

/// A first pass cannot start, or an invalidation cannot end, without waiting: the kernel's
/// `-EAGAIN`.
///
/// To be answered only where the invalidation is not [`blockable`](Invalidation::blockable). In a
/// blockable one it changes nothing but a [count](crate::Stats::refused_blockable) and a
/// [report](crate::Report::RefusedBlockable): the memory changes under the device (B1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WouldBlock;

impl fmt::Display for WouldBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a non-blockable invalidation would have to wait for a device: use the blockable `invalidate`, or try again later",
        )
    }
}

impl core::error::Error for WouldBlock {}

/// The value of a notifier's own sequence at some moment; what `read_begin` returns and
/// `read_retry` checks.
///
/// Good for that notifier alone. It does not name an invalidation: two that overlap may share one
/// (O6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sequence(pub(crate) u64);

impl Sequence {
    /// The number behind it, for logs and tests. Odd for a notifier's own sequence.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Names a subscription among all that its space has had
/// ([`Subscription::id`](crate::Subscription::id)); it is given to no other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NotifierId(pub(crate) u64);

impl NotifierId {
    /// The number behind it, for logs: 1 for the first subscription of a space, then upwards.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// What to invalidate and how.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) range: AddressRange,
    pub(crate) owner: Option<Owner>,
    pub(crate) terms: Terms,
    /// The ranges, if it is of many: sorted, with gaps. `range` is from the first address to the
    /// last one.
    pub(crate) parts: Option<Parts<'a>>,
}

impl Request<'_> {
    #[inline]
    pub(crate) fn event(&self) -> Event {
        self.terms.event(self.owner)
    }
}

/// One call of a first pass: what is invalidated, why, and how the driver may answer.
#[derive(Clone, Copy)]
pub struct Invalidation<'a> {
    pub(crate) request: &'a Request<'a>,
    pub(crate) sequence: u64,
    pub(crate) own: &'a Own,
}

impl Invalidation<'_> {
    /// What is invalidated: all of it, not only the part that the notifier watches. If it is of
    /// [several ranges](Self::ranges), from the first address to the last one of those that concern
    /// the notifier; what lies in the gaps is not invalidated, and may be zapped all the same.
    #[inline]
    pub fn range(&self) -> AddressRange {
        self.request.range
    }

    /// What is invalidated, without the gaps: sorted ranges that neither overlap nor touch, all
    /// that share a byte with what the notifier watches, each of them whole. More than one only if
    /// the invalidation was started with [`invalidate_all`](crate::AddressSpace::invalidate_all),
    /// by hand or by a source that has heard of several changes.
    ///
    /// A device is told of all of them and flushed once.
    #[inline]
    pub fn ranges(&self) -> &[AddressRange] {
        self.request.parts.map_or(core::slice::from_ref(&self.request.range), Parts::as_slice)
    }

    /// Why.
    #[inline]
    pub fn event(&self) -> Event {
        self.request.event()
    }

    /// On whose behalf, for [`Event::Migrate`] and [`Event::Exclusive`].
    #[inline]
    pub fn owner(&self) -> Option<Owner> {
        self.event().owner()
    }

    /// Whether it was [tagged](crate::Invalidate::tagged) so.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn is_tagged(&self, owner: Owner) -> bool {
        self.request.owner == Some(owner)
    }

    /// Says that the pass which this call leaves is not the device's, so that no sequence is due.
    #[cfg(any(feature = "test-util", all(feature = "userfaultfd", target_os = "linux")))]
    pub(crate) fn is_not_the_devices(&self) {
        #[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
        let _ = NO_SEQUENCE_IS_DUE.try_with(|due| due.set(true));
    }

    /// Whether the driver may leave work to a further pass that takes time. In a non-blockable
    /// invalidation it may answer [`WouldBlock`] instead.
    #[inline]
    pub fn blockable(&self) -> bool {
        self.request.terms.blockable()
    }

    /// The odd sequence that every pass of this invalidation gets (S2).
    #[inline]
    pub fn sequence(&self) -> Sequence {
        Sequence(self.sequence)
    }

    /// Whether a pass of this call may stay pending while other notifiers are called. `false` when
    /// the space's pass budget is used up: the pass is then awaited at once (B4), and a driver that
    /// has a cheaper way to wait may choose it.
    #[inline]
    pub fn may_defer(&self) -> bool {
        self.request.terms.may_defer()
    }

    /// Returns whether the change may have been made already (M7): the invalidation comes from a
    /// source that hears of changes afterwards. Every invalidation of a
    /// `source::Uffd` is late, also those of a fork and of the end of the source.
    ///
    /// A driver that wrote dirty data back now would write into whatever is mapped there by now,
    /// which may be somebody else's. So what the device has not written back yet is lost.
    ///
    /// `false` says only that *this* change has not been made yet. In memory of an `OwnedMapping`,
    /// which nobody else unmaps, that is a permission to write back before the pass is done. Memory
    /// that others unmap may have gone by a change that has not been delivered, or be going at this
    /// moment: write back there only if the program excludes that by a lock of its own.
    #[inline]
    pub fn is_late(&self) -> bool {
        self.request.terms.is_late()
    }

    /// The same without what can be done in the first pass only.
    pub fn info(&self) -> InvalidationInfo {
        InvalidationInfo {
            range: self.range(),
            event: self.event(),
            sequence: self.sequence(),
            blockable: self.blockable(),
            late: self.is_late(),
            parts: self.request.parts.filter(|parts| parts.as_slice().len() > 1).map(Parts::to_set),
        }
    }

    /// Sets the notifier's own sequence, so that readers that began before this invalidation retry
    /// (S4, R2).
    ///
    /// To be called in the first pass, under the lock under which readers check and install.
    /// Drivers that use [`DriverLock`](crate::DriverLock) need not call it.
    #[inline]
    pub fn set_seq(&self) {
        self.own.set(self.sequence);
    }
}

#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
std::thread_local!(static NO_SEQUENCE_IS_DUE: core::cell::Cell<bool> = const { core::cell::Cell::new(false) });

/// Whether the first pass that has just left a pass on this thread has said that no sequence is
/// due.
#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
pub(crate) fn take_no_sequence_is_due() -> bool {
    NO_SEQUENCE_IS_DUE.try_with(core::cell::Cell::take).unwrap_or(false)
}

/// What an [`Invalidation`] says, to be kept beyond the first pass.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InvalidationInfo {
    /// What is invalidated, as [`Invalidation::range`] says it.
    pub range: AddressRange,
    /// Why.
    pub event: Event,
    /// The odd sequence that every pass of it gets (S2).
    pub sequence: Sequence,
    /// Whether it may wait.
    pub blockable: bool,
    /// Whether the memory may have changed already (M7): then nothing may be written back to it.
    /// See [`Invalidation::is_late`].
    pub late: bool,
    /// The ranges, if there is more than one.
    parts: Option<RangeSet>,
}

impl InvalidationInfo {
    /// What is invalidated, without the gaps: see [`Invalidation::ranges`].
    pub fn ranges(&self) -> &[AddressRange] {
        self.parts.as_deref().unwrap_or(core::slice::from_ref(&self.range))
    }
}

impl fmt::Debug for Invalidation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidation")
            .field("ranges", &self.ranges())
            .field("event", &self.event())
            .field("sequence", &self.sequence)
            .field("blockable", &self.blockable())
            .field("may_defer", &self.may_defer())
            .field("late", &self.is_late())
            .finish()
    }
}
