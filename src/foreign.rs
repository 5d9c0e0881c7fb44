//! The one room in which code runs that is not the library's (F1, F2).
//!
//! Drivers, executors and observers bring code of their own. Each call of it goes through this
//! module, which says what kind of call it is ([`Callback`]), keeps its panic, and in debug builds
//! checks that the thread holds no lock of the library (C8). The kinds, and where a panic of each
//! goes:
//!
//! | call | a panic of it |
//! | --- | --- |
//! | first pass of a notifier; poll and drop of a pass | the caller of the invalidation (C5), or lost |
//! | drop of a notifier by its own subscription or `remove` | who drops it |
//! | drop of a notifier that outlived its subscription | lost |
//! | `name` of a notifier | lost; the notifier is listed without a name |
//! | clone of a waker | the executor that polls with it |
//! | wake and drop of a waker | lost |
//! | the reporter, the clock of a space | lost |
//! | subscriber of `tracing`, recorder of `metrics` | lost |
//! | the device of a cache, its futures and handles, `on_failure` | who asked for the range, or lost (K2) |
//!
//! A *lost* panic has no caller that could be told: it is counted
//! ([`Stats::lost_panics`](crate::Stats::lost_panics)) and reported ([`Report::Panicked`]), and
//! nothing else changes. So is one whose caller is unwinding already: the library never turns a
//! second panic into an abort.
//!
//! What makes this the only room: [`EntryRef`](crate::entry::EntryRef) and
//! [`PassFuture`](crate::PassFuture) are called with an [`Inside`], which only this module makes;
//! the library keeps wakers only as [`TaskWaker`]s; `tests/source_rules.rs` looks for the rest.
//!
//! Code that a caller hands to one call (`prepare` and `install` of a mirror, the closure of
//! `Inbox::with`) is not here: its panics go to that caller, through locks that give themselves
//! back.
#![forbid(unsafe_code)]

use crate::event::Event;
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicU64, Ordering, assert_no_lock};
use alloc::boxed::Box;
use alloc::task::Wake;
use core::any::Any;
use core::fmt;
use core::mem::ManuallyDrop;
use core::task::Waker;
use core::time::Duration;

/// A kind of code that is not the library's: what panicked in a [`Report::Panicked`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Callback {
    /// [`IntervalNotifier::invalidate`](crate::IntervalNotifier::invalidate).
    FirstPass,
    /// The poll or the drop of a [`PassFuture`](crate::PassFuture).
    Pass,
    /// The drop of a notifier.
    NotifierDrop,
    /// [`IntervalNotifier::name`](crate::IntervalNotifier::name).
    Name,
    /// The wake or the drop of a waker.
    Waker,
    /// What [`Builder::on_report`](crate::Builder::on_report) was given.
    Reporter,
    /// What [`Builder::clock`](crate::Builder::clock) was given.
    Clock,
    /// What a space asks whether its lease is valid (feature `lease`).
    Lease,
    /// A subscriber of `tracing` or a recorder of `metrics`.
    Observer,
    /// The device of a registration cache: its methods, their futures, the drop of a handle or of
    /// the device; and what the cache was given to report failures to.
    Device,
}

impl fmt::Display for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FirstPass => "a first pass",
            Self::Pass => "a pass",
            Self::NotifierDrop => "the drop of a notifier",
            Self::Name => "a notifier's name()",
            Self::Waker => "a waker",
            Self::Reporter => "the reporter",
            Self::Clock => "the clock",
            Self::Lease => "the lease",
            Self::Observer => "a tracing subscriber or metrics recorder",
            Self::Device => "the device of a registration cache",
        })
    }
}

/// What no caller can be told: mistakes and panics of drivers and other foreign code, and what
/// became of watched memory.
///
/// Reported on whatever thread polls an invalidation or delivers, never on the thread of a
/// `source::Reader`. A reporter must not wait for the space: let it send to a channel.
#[derive(Debug)]
#[non_exhaustive]
pub enum Report<'a> {
    /// A first pass answered `WouldBlock` in a blockable invalidation (B1). The others went on;
    /// this driver's device may still use the old mapping.
    RefusedBlockable {
        /// [`IntervalNotifier::name`](crate::IntervalNotifier::name) of the driver at fault.
        notifier: &'a str,
        /// What was invalidated.
        range: AddressRange,
        /// Why.
        event: Event,
    },
    /// A device was cut off from the memory ([`Subscription::fence`](crate::Subscription::fence),
    /// L5).
    Fenced {
        /// [`IntervalNotifier::name`](crate::IntervalNotifier::name) of its driver.
        notifier: &'a str,
        /// What it watched.
        range: AddressRange,
        /// Passes of it that were pending, and are over.
        passes: usize,
    },
    /// Pages that a `madvise` was about to drop had not been seen to go when the source's time for
    /// that was used up (M5). Readers of the range went on; it is invalidated again when the pages
    /// do go.
    Unsettled {
        /// What was to be dropped.
        range: AddressRange,
        /// How long it was under invalidation; zero where its pages could not be looked at.
        waited: Duration,
    },
    /// The memory of a watch is gone, as a whole or in part, or its source has ended (M2). New
    /// memory at its addresses is not watched until the watch is renewed. Not reported for a watch
    /// that its driver has dropped by then, nor for those of a cache.
    WatchEnded {
        /// What was watched.
        range: AddressRange,
    },
    /// Code that is not the library's panicked where no caller can be told (C5). Everything else
    /// went on.
    Panicked {
        /// What was called.
        callback: Callback,
        /// The panic's message, if it was a string.
        message: Option<&'a str>,
    },
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RefusedBlockable { notifier, range, event } => write!(
                f,
                "{notifier} refused a blockable invalidation of {range} ({event:?}): its device may still use the old mapping"
            ),
            Self::Fenced { notifier, range, passes } => {
                write!(
                    f,
                    "{notifier} was fenced off from {range}: {passes} of its passes were pending, and nobody waits for them any more"
                )
            }
            Self::Unsettled { range, waited } => {
                write!(
                    f,
                    "pages of {range} that a madvise drops were not seen to go in {waited:?}: a device may have the old ones for a while"
                )
            }
            Self::WatchEnded { range } => {
                write!(
                    f,
                    "memory of the watch of {range} has gone, some or all: drop the watch when no mapping of the range is left, and make a new one for what is mapped there now"
                )
            }
            Self::Panicked { callback, message: Some(message) } => {
                write!(f, "{callback} panicked: {message}")
            }
            Self::Panicked { callback, message: None } => write!(f, "{callback} panicked"),
        }
    }
}

/// Is told what has no caller to be returned to.
pub(crate) type Reporter = Box<dyn Fn(&Report<'_>) + Send + Sync>;

/// Proof that the code runs in this room: [`keep`] is above it on the stack.
#[derive(Clone, Copy)]
pub(crate) struct Inside(());

/// What a panic carried. Its drop never panics, whatever the payload's does (F2).
pub(crate) struct Panic(ManuallyDrop<Box<dyn Any + Send>>);

impl Panic {
    #[cfg(feature = "std")]
    fn into_payload(self) -> Box<dyn Any + Send> {
        let mut this = ManuallyDrop::new(self);
        core::mem::replace(&mut *this.0, Box::new(()))
    }

    pub(crate) fn message(&self) -> Option<&str> {
        let payload = &**self.0;
        payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<alloc::string::String>().map(|text| &**text))
    }
}

impl Drop for Panic {
    fn drop(&mut self) {
        let payload = core::mem::replace(&mut *self.0, Box::new(()));
        if let Err(second) = keep(|_| drop(payload)) {
            // A payload whose drop panics may leave another such: this one is leaked, so that there
            // is an end.
            core::mem::forget(second);
        }
    }
}

/// Runs foreign code and keeps its panic. Without `std` there is nothing to catch a panic with: it
/// unwinds through the caller.
#[inline(always)]
pub(crate) fn keep<R>(code: impl FnOnce(Inside) -> R) -> Result<R, Panic> {
    assert_no_lock();
    #[cfg(feature = "std")]
    {
        std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| code(Inside(()))))
            .map_err(|payload| Panic(ManuallyDrop::new(payload)))
    }
    #[cfg(not(feature = "std"))]
    {
        Ok(code(Inside(())))
    }
}

/// Whether the thread is unwinding: then no panic can go on in its caller.
pub(crate) fn unwinding() -> bool {
    #[cfg(feature = "std")]
    return std::thread::panicking();
    #[cfg(not(feature = "std"))]
    false
}

/// The first panic of several calls, which goes on in the caller of an invalidation (C5).
#[derive(Default)]
pub(crate) struct FirstPanic(Option<(Callback, Panic)>);

impl FirstPanic {
    pub(crate) fn new(callback: Callback, panic: Panic) -> Self {
        Self(Some((callback, panic)))
    }

    /// Notes `panic` if it is the first; a further one is lost, since one only can go on.
    #[cold]
    pub(crate) fn note(&mut self, losses: &Losses, callback: Callback, panic: Panic) {
        if self.0.is_some() {
            losses.lose(callback, panic);
        } else {
            self.0 = Some((callback, panic));
        }
    }

    #[inline]
    pub(crate) fn is_some(&self) -> bool {
        self.0.is_some()
    }

    pub(crate) fn take(&mut self) -> Self {
        Self(self.0.take())
    }
}

/// The panics that no caller is told of.
pub(crate) struct Losses {
    count: AtomicU64,
    reporter: Option<Reporter>,
}

impl Losses {
    pub(crate) fn new(reporter: Option<Reporter>) -> Self {
        Self { count: AtomicU64::new(0), reporter }
    }

    /// How many there were.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Runs foreign code that has no caller to be told of its panic.
    #[inline]
    pub(crate) fn run<R>(&self, callback: Callback, code: impl FnOnce(Inside) -> R) -> Option<R> {
        match keep(code) {
            Ok(result) => Some(result),
            Err(panic) => {
                self.lose(callback, panic);
                None
            }
        }
    }

    /// Counts and reports a panic.
    #[cold]
    #[inline(never)]
    pub(crate) fn lose(&self, callback: Callback, panic: Panic) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if callback != Callback::Reporter {
            self.report(&Report::Panicked { callback, message: panic.message() });
        }
    }

    /// The same for the panic that an invalidation kept, where nobody is left to claim it.
    pub(crate) fn lose_first(&self, panic: FirstPanic) {
        if let Some((callback, panic)) = panic.0 {
            self.lose(callback, panic);
        }
    }

    /// Continues a panic that was kept in its caller, unless there was none. Returns if the thread
    /// is unwinding already: then it is lost.
    pub(crate) fn resume(&self, panic: FirstPanic) {
        let Some((callback, panic)) = panic.0 else { return };
        #[cfg(feature = "std")]
        if !unwinding() {
            std::panic::resume_unwind(panic.into_payload());
        }
        self.lose(callback, panic);
    }

    /// Runs foreign code whose panic concerns the caller: it goes on there, unless the thread is
    /// unwinding already.
    #[inline]
    pub(crate) fn run_for_caller<R>(
        &self,
        callback: Callback,
        code: impl FnOnce(Inside) -> R,
    ) -> Option<R> {
        match keep(code) {
            Ok(result) => Some(result),
            Err(panic) => {
                self.resume(FirstPanic::new(callback, panic));
                None
            }
        }
    }

    pub(crate) fn report(&self, report: &Report<'_>) {
        if let Some(reporter) = &self.reporter {
            self.run(Callback::Reporter, |_| reporter(report));
        }
    }
}

/// A task's waker: cloned, woken and dropped without a panic, and cloned without foreign code. Its
/// drop may run foreign code, so the last one must not go under a lock.
pub(crate) struct TaskWaker {
    waker: ManuallyDrop<Waker>,
    losses: Arc<Losses>,
}

impl TaskWaker {
    /// Clones `waker`. A panic of that goes to the executor that polls with it: nothing may have
    /// been taken from the state.
    pub(crate) fn new(waker: &Waker, losses: &Arc<Losses>) -> Arc<Self> {
        assert_no_lock();
        Arc::new(Self { waker: ManuallyDrop::new(waker.clone()), losses: losses.clone() })
    }

    /// Keeps `known` if it wakes the same task as `waker`.
    pub(crate) fn renew(
        known: &mut Option<Arc<Self>>,
        waker: &Waker,
        losses: &Arc<Losses>,
    ) -> Arc<Self> {
        if let Some(known) = known
            && known.wakes(waker)
        {
            return known.clone();
        }
        let new = Self::new(waker, losses);
        *known = Some(new.clone());
        new
    }

    /// Whether it wakes the same task as `waker`.
    pub(crate) fn wakes(&self, waker: &Waker) -> bool {
        self.waker.will_wake(waker)
    }

    /// Wakes the task. What polls a task inline here is not the code that called the waker (F3).
    pub(crate) fn rouse(&self) {
        let _inline = Inline::enter();
        self.losses.run(Callback::Waker, |_| self.waker.wake_by_ref());
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.rouse();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rouse();
    }
}

impl Drop for TaskWaker {
    fn drop(&mut self) {
        let _inline = Inline::enter();
        let waker = core::mem::replace(&mut *self.waker, Waker::noop().clone());
        self.losses.run(Callback::Waker, |_| drop(waker));
    }
}

/// What runs on this thread while this exists is polled by somebody who does not block until it is
/// ready: a task that a waker polls inline, or a future that becomes a pass. Debug builds count how
/// many there are, for the check of C7.
pub(crate) struct Inline(());

#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
std::thread_local!(static INLINE: core::cell::Cell<u32> = const { core::cell::Cell::new(0) });

impl Inline {
    #[inline]
    pub(crate) fn enter() -> Self {
        #[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
        INLINE.set(INLINE.get() + 1);
        Self(())
    }

    /// How many there are on this thread.
    #[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
    pub(crate) fn depth() -> u32 {
        INLINE.get()
    }
}

impl Drop for Inline {
    #[inline]
    fn drop(&mut self) {
        #[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
        INLINE.set(INLINE.get() - 1);
    }
}
