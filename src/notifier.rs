//! [`IntervalNotifier`], which a driver implements, and [`Invalidation`], which it receives.
#![forbid(unsafe_code)]

use crate::event::{Event, Owner, Terms};
use crate::pass::PassFuture;
use crate::protocol::Own;
use crate::range::{AddressRange, Parts, RangeSet};
use alloc::borrow::Cow;
use core::fmt;

/// Lets a driver take part in the invalidations of a range that it mirrors: the kernel's
/// `mmu_interval_notifier_ops`.
///
/// [`AddressSpace::insert`](crate::AddressSpace::insert) registers a notifier for a range. A driver
/// whose invalidation is one `async fn` implements
/// [`AsyncIntervalNotifier`](crate::AsyncIntervalNotifier) instead. A driver that is a task has an
/// [`Inbox`](crate::Inbox). The guide compares them: [`docs::notifiers`](crate::docs::notifiers).
///
/// ```
/// use shootdown::{DriverLock, IntervalNotifier};
/// use shootdown::{Invalidation, PassFuture, WouldBlock};
///
/// #[derive(Default)]
/// struct Gpu {
///     page_table: DriverLock<Vec<u64>>,
/// }
///
/// impl IntervalNotifier for Gpu {
///     fn invalidate(
///         &self,
///         invalidation: &Invalidation<'_>,
///     ) -> Result<Option<PassFuture>, WouldBlock> {
///         // `lock_for` also sets the sequence:
///         // readers that began before this invalidation will retry.
///         self.page_table.lock_for(invalidation).clear();
///         // The engine awaits the flushes of all devices together.
///         Ok(Some(PassFuture::new(submit_tlb_flush())))
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
    /// Starts the work on the device without waiting for it: the first pass.
    ///
    /// The driver does this, in order:
    ///
    /// 1. It takes its lock and calls [`set_seq`](Invalidation::set_seq).
    ///    [`DriverLock::lock_for`](crate::DriverLock::lock_for) does both.
    /// 2. It zaps its mappings of [`range`](Invalidation::range).
    /// 3. It returns a [`PassFuture`] for the work that remains, or `Ok(None)`.
    ///
    /// A first pass that leaves the device alone sets no sequence (rule
    /// [S4](crate::docs::contract)) and returns `Ok(None)`. A first pass that returns a pass must
    /// have set the sequence. Debug builds panic otherwise.
    ///
    /// The first pass runs on the thread that polls the invalidation. The library holds no lock
    /// meanwhile (rule [C8](crate::docs::contract)), so it may call almost everything. It must not
    /// *wait* for `read_begin`, `remove` or an invalidation of the same space (rule
    /// [C7](crate::docs::contract)). Debug builds panic if it does.
    ///
    /// The pass waits for the device and for nothing of the space. A pass that awaits `read_begin`,
    /// `mirror` or `remove` of its own notifier waits for itself. Debug builds panic if it does.
    /// Any thread that waits may poll the pass, so it must not need a timer or a socket of a
    /// runtime. The guide has more: [`docs::driver`](crate::docs::driver).
    ///
    /// The engine may call a notifier for another invalidation while a pass of it is pending (rule
    /// [O6](crate::docs::contract)). Each call answers for itself. A call that finds nothing left
    /// to zap, because an earlier call zapped it, still has to wait until the device is done.
    ///
    /// # Errors
    /// [`WouldBlock`] if the invalidation is not [`blockable`](Invalidation::blockable) and the
    /// driver cannot start without waiting. It must have changed nothing then. Refusing a blockable
    /// invalidation is a bug of the driver (rule [B1](crate::docs::contract)). The space reports
    /// and counts it, and the invalidation goes on.
    ///
    /// # Panics
    /// A panic stops neither the other notifiers nor the space. It resumes in the caller of the
    /// invalidation (rule [C5](crate::docs::contract)).
    fn invalidate(&self, invalidation: &Invalidation<'_>)
    -> Result<Option<PassFuture>, WouldBlock>;

    /// Returns the name of this notifier, for lists of pending passes (rule
    /// [C6](crate::docs::contract)) and for messages.
    ///
    /// The library calls it without a lock, when such a list or message is made. By default it is
    /// the name of the type.
    fn name(&self) -> Cow<'static, str> {
        Cow::Borrowed(core::any::type_name::<Self>())
    }
}

/// Says that a first pass cannot start, or an invalidation cannot end, without waiting: the
/// kernel's `-EAGAIN`.
///
/// A first pass returns it only if the invalidation is not [`blockable`](Invalidation::blockable).
/// In a blockable one it has no effect but a [count](crate::Stats::refused_blockable) and a
/// [report](crate::Report::RefusedBlockable). The memory then changes under the device (rule
/// [B1](crate::docs::contract)).
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

/// Holds the value of a notifier's own sequence at some moment.
///
/// [`read_begin`](crate::Subscription::read_begin) returns it, and
/// [`read_retry`](crate::Subscription::read_retry) checks it. It is valid for that notifier alone.
/// It does not name an invalidation: two that overlap may share one (rule
/// [O6](crate::docs::contract)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sequence(pub(crate) u64);

impl Sequence {
    /// Returns the number, for logs and tests. A notifier's own sequence is odd.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Names a subscription among all subscriptions that its space has had.
///
/// [`Subscription::id`](crate::Subscription::id) returns it. No other subscription of the space
/// gets the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NotifierId(pub(crate) u64);

impl NotifierId {
    /// Returns the number, for logs. The first subscription of a space has 1, and later ones have
    /// greater numbers.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// What to invalidate, and how.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    /// The range. With `parts`, from the first address to the last one.
    pub(crate) range: AddressRange,
    pub(crate) owner: Option<Owner>,
    pub(crate) terms: Terms,
    /// The ranges of an invalidation of many ranges: sorted, with gaps.
    pub(crate) parts: Option<Parts<'a>>,
}

impl Request<'_> {
    /// Returns why memory is invalidated.
    #[inline]
    pub(crate) fn event(&self) -> Event {
        self.terms.event(self.owner)
    }
}

/// Describes one call of a first pass: what is invalidated, why, and how the driver may answer.
///
/// [`IntervalNotifier::invalidate`] receives it. [`info`](Self::info) makes a copy that outlives
/// the call.
///
/// ```
/// use shootdown::Invalidation;
/// use std::collections::BTreeMap;
///
/// /// Zaps the invalidated pages in a page table by address.
/// fn zap(
///     page_table: &mut BTreeMap<u64, u64>,
///     invalidation: &Invalidation<'_>,
/// ) {
///     for range in invalidation.ranges() {
///         for page in range.pages(0x1000) {
///             page_table.remove(&page.start());
///         }
///     }
/// }
/// ```
#[derive(Clone, Copy)]
pub struct Invalidation<'a> {
    pub(crate) request: &'a Request<'a>,
    pub(crate) sequence: u64,
    pub(crate) own: &'a Own,
}

impl Invalidation<'_> {
    /// Returns the range that is invalidated: all of it, not only the part that the notifier
    /// watches.
    ///
    /// With [several ranges](Self::ranges) it extends from the first address to the last one of
    /// those that concern the notifier. The gaps are not invalidated, but the driver may zap them,
    /// too.
    #[inline]
    pub fn range(&self) -> AddressRange {
        self.request.range
    }

    /// Returns the ranges that are invalidated, without the gaps.
    ///
    /// They are sorted and neither overlap nor touch. Each is whole and shares a byte with the
    /// range that the notifier watches. There is more than one only if the invalidation was started
    /// with [`invalidate_all`](crate::AddressSpace::invalidate_all): by the program, or by a source
    /// that has received several changes.
    ///
    /// A driver zaps all of them and flushes its device once.
    #[inline]
    pub fn ranges(&self) -> &[AddressRange] {
        self.request.parts.map_or(core::slice::from_ref(&self.request.range), Parts::as_slice)
    }

    /// Returns why the memory is invalidated.
    #[inline]
    pub fn event(&self) -> Event {
        self.request.event()
    }

    /// Returns on whose behalf the memory is invalidated, for [`Event::Migrate`] and
    /// [`Event::Exclusive`].
    #[inline]
    pub fn owner(&self) -> Option<Owner> {
        self.event().owner()
    }

    /// Returns whether the invalidation was [tagged](crate::Invalidate::tagged) with `owner`.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn is_tagged(&self, owner: Owner) -> bool {
        self.request.owner == Some(owner)
    }

    /// Declares that the pass which this call returns does not wait for the device, so that the
    /// call need not set the sequence.
    #[cfg(any(feature = "test-util", all(feature = "userfaultfd", target_os = "linux")))]
    pub(crate) fn is_not_the_devices(&self) {
        #[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
        let _ = NO_SEQUENCE_IS_DUE.try_with(|due| due.set(true));
    }

    /// Returns whether the driver may leave work to a further pass that takes time. In a
    /// non-blockable invalidation it may return [`WouldBlock`] instead.
    #[inline]
    pub fn blockable(&self) -> bool {
        self.request.terms.blockable()
    }

    /// Returns the odd sequence that every pass of this invalidation gets (rule
    /// [S2](crate::docs::contract)).
    #[inline]
    pub fn sequence(&self) -> Sequence {
        Sequence(self.sequence)
    }

    /// Returns whether a pass of this call may stay pending while other notifiers are called.
    ///
    /// It is `false` if the space's pass budget is used up. The engine then awaits the pass at once
    /// (rule [B4](crate::docs::contract)), and a driver may choose a cheaper way to wait.
    #[inline]
    pub fn may_defer(&self) -> bool {
        self.request.terms.may_defer()
    }

    /// Returns whether the change may have been made already (rule [M7](crate::docs::contract)):
    /// the invalidation comes from a source that receives changes after they were made. Every
    /// invalidation of a `source::Uffd` is late, also those of a fork and of the end of the source.
    ///
    /// If it is late, do not write dirty data back. The write would go into the memory that is
    /// mapped there by now, which may belong to other code. The data that the device has not
    /// written back yet is lost.
    ///
    /// `false` says only that *this* change has not been made yet. No other code unmaps the memory
    /// of an `OwnedMapping`, so a driver may write back there before its pass is done. Other memory
    /// may have been unmapped by a change that is not delivered yet, or may be unmapped at this
    /// moment. Write back there only if the program excludes that by a lock of its own.
    #[inline]
    pub fn is_late(&self) -> bool {
        self.request.terms.is_late()
    }

    /// Returns a copy of this description that may be kept after the first pass.
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
    /// (rules [S4 and R2](crate::docs::contract)).
    ///
    /// Call it in the first pass, under the lock under which readers check and install.
    /// [`DriverLock::lock_for`](crate::DriverLock::lock_for) calls it.
    #[inline]
    pub fn set_seq(&self) {
        self.own.set(self.sequence);
    }
}

#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
std::thread_local! {
    /// The first pass that runs on this thread has declared that it need not set the sequence.
    static NO_SEQUENCE_IS_DUE: core::cell::Cell<bool> = const { core::cell::Cell::new(false) };
}

/// Returns whether the first pass that has just returned a pass on this thread has declared that it
/// need not set the sequence. Clears the declaration.
#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
pub(crate) fn take_no_sequence_is_due() -> bool {
    NO_SEQUENCE_IS_DUE.try_with(core::cell::Cell::take).unwrap_or(false)
}

/// Describes an invalidation as an [`Invalidation`] does, and may be kept after the first pass.
///
/// [`Invalidation::info`] makes it.
/// [`AsyncIntervalNotifier::invalidate`](crate::AsyncIntervalNotifier::invalidate) receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InvalidationInfo {
    /// The range that is invalidated: [`Invalidation::range`].
    pub range: AddressRange,
    /// The reason: [`Invalidation::event`].
    pub event: Event,
    /// The odd sequence that every pass of the invalidation gets (rule
    /// [S2](crate::docs::contract)): [`Invalidation::sequence`].
    pub sequence: Sequence,
    /// The invalidation may wait: [`Invalidation::blockable`].
    pub blockable: bool,
    /// The memory may have changed already (rule [M7](crate::docs::contract)), so nothing may be
    /// written back to it: [`Invalidation::is_late`].
    pub late: bool,
    /// The ranges, if there is more than one.
    parts: Option<RangeSet>,
}

impl InvalidationInfo {
    /// Returns the ranges that are invalidated, without the gaps: [`Invalidation::ranges`].
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

#[cfg(all(test, feature = "userfaultfd", target_os = "linux", not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::AddressSpace;
    use core::task::{Context, Waker};
    use std::sync::{Arc, Mutex};
    use std::vec::Vec;

    /// Notes which of two owners each invalidation is tagged with.
    struct Asks([Owner; 2], Arc<Mutex<Vec<[bool; 2]>>>);

    impl IntervalNotifier for Asks {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            self.1.lock().unwrap().push(self.0.map(|owner| invalidation.is_tagged(owner)));
            Ok(None)
        }
    }

    #[test]
    fn m5_an_invalidation_is_known_by_its_tag_and_by_no_other() {
        let (space, said, owners) =
            (AddressSpace::new(), Arc::default(), [Owner::new(), Owner::new()]);
        let _asks = space.insert(AddressRange::ALL, Asks(owners, Arc::clone(&said))).unwrap();
        let invalidate = || space.invalidate(AddressRange::ALL, Event::Clear);
        for invalidation in [invalidate(), invalidate().tagged(owners[0])] {
            let polled =
                core::pin::pin!(invalidation).poll(&mut Context::from_waker(Waker::noop()));
            assert!(polled.is_ready());
        }
        assert_eq!(*said.lock().unwrap(), [[false, false], [true, false]]);
    }
}
