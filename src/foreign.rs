//! The one module that calls foreign code (F1, F2).
//!
//! Drivers, executors and observers bring code of their own. Each call of it goes through this
//! module. The module names the kind of the call ([`Callback`]), keeps its panic, and in debug
//! builds checks that the thread holds no lock of the library (C8). A panic goes:
//!
//! | call | a panic of it goes to |
//! | --- | --- |
//! | first pass of a notifier; poll and drop of a pass | the caller of the invalidation (C5), or lost |
//! | drop of a notifier by its own subscription or `remove` | the caller of that drop |
//! | drop of a notifier that outlived its subscription | lost |
//! | `name` of a notifier | lost; the notifier is listed without a name |
//! | clone of a waker | the executor that polls with it |
//! | wake and drop of a waker | lost |
//! | the reporter, the clock of a space | lost |
//! | subscriber of `tracing`, recorder of `metrics` | lost |
//! | the device of a cache, its futures and handles, `on_failure` | the caller that asked for the range, or lost (K2) |
//!
//! A *lost* panic has no caller that could be told. It is counted
//! ([`Stats::lost_panics`](crate::Stats::lost_panics)) and reported ([`Report::Panicked`]), and
//! nothing else changes. A panic whose caller is unwinding already is lost, too: the library never
//! turns a second panic into an abort.
//!
//! Three things make this the only such module. [`EntryRef`](crate::entry::EntryRef) and
//! [`PassFuture`](crate::PassFuture) are called with an [`Inside`], which only this module makes.
//! The library keeps wakers only as [`TaskWaker`]s. `tests/source_rules.rs` searches for the rest.
//!
//! Code that a caller hands to one call (`prepare` and `install` of a mirror, the closure of
//! `Inbox::with`) is not called here. Its panics go to that caller, through locks that release
//! themselves.
#![forbid(unsafe_code)]

use crate::event::Event;
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicU64, Ordering, assert_no_lock};
use alloc::boxed::Box;
use alloc::task::Wake;
use core::any::Any;
use core::fmt;
use core::task::Waker;
use core::time::Duration;

/// A kind of foreign code: the one that panicked, in a [`Report::Panicked`].
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
    /// The closure given to [`Builder::on_report`](crate::Builder::on_report).
    Reporter,
    /// The closure given to [`Builder::clock`](crate::Builder::clock).
    Clock,
    /// The closure that says whether a space's lease is valid (feature `lease`).
    Lease,
    /// A subscriber of `tracing` or a recorder of `metrics`.
    Observer,
    /// The device of a registration cache: its methods, their futures, and the drop of a handle or
    /// of the device. Also the closure to which the cache reports failures.
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

/// An event that no caller can be told of: a mistake or panic of a driver or other foreign code, or
/// the end of watched memory.
///
/// Reported on the thread that polls an invalidation or delivers, never on the thread of a
/// `source::Reader`. A reporter must not wait for the space. Let it send to a channel.
#[derive(Debug)]
#[non_exhaustive]
pub enum Report<'a> {
    /// A first pass answered `WouldBlock` in a blockable invalidation (B1). The other notifiers
    /// went on. This driver's device may still use the old mapping.
    RefusedBlockable {
        /// [`IntervalNotifier::name`](crate::IntervalNotifier::name) of the driver at fault.
        notifier: &'a str,
        /// The range of the invalidation.
        range: AddressRange,
        /// The reason of the invalidation.
        event: Event,
    },
    /// A device was cut off from the memory ([`Subscription::fence`](crate::Subscription::fence),
    /// L5).
    Fenced {
        /// [`IntervalNotifier::name`](crate::IntervalNotifier::name) of its driver.
        notifier: &'a str,
        /// The range of the notifier.
        range: AddressRange,
        /// How many of its passes were pending. They are over.
        passes: usize,
    },
    /// Pages that a `madvise` was about to drop were still there when the source's time for that
    /// was used up (M5). Readers of the range went on. The range is invalidated again when the
    /// pages go.
    Unsettled {
        /// The range that was to be dropped.
        range: AddressRange,
        /// How long it was under invalidation; zero where its pages could not be looked at.
        waited: Duration,
    },
    /// The memory of a watch is gone, as a whole or in part, or its source has ended (M2). New
    /// memory at its addresses is not watched until the watch is renewed. Not reported for a watch
    /// that its driver has dropped by then, nor for a watch of a cache.
    WatchEnded {
        /// The range that was watched.
        range: AddressRange,
    },
    /// Foreign code panicked where no caller can be told (C5). Everything else went on.
    Panicked {
        /// The kind of code that was called.
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

/// Gets each [`Report`] of a space.
pub(crate) type Reporter = Box<dyn Fn(&Report<'_>) + Send + Sync>;

/// Proof that [`keep`] is above the code on the stack.
#[derive(Clone, Copy)]
pub(crate) struct Inside(());

/// The payload of a panic. Its drop never panics, also if the payload's does (F2).
pub(crate) struct Panic(Box<dyn Any + Send>);

impl Panic {
    #[cfg(feature = "std")]
    fn into_payload(mut self) -> Box<dyn Any + Send> {
        core::mem::replace(&mut self.0, Box::new(()))
    }

    pub(crate) fn message(&self) -> Option<&str> {
        let payload = &*self.0;
        payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<alloc::string::String>().map(|text| &**text))
    }
}

impl Drop for Panic {
    fn drop(&mut self) {
        // The box of a `()` allocates nothing, and its own drop does nothing.
        let payload = core::mem::replace(&mut self.0, Box::new(()));
        if let Err(second) = keep(|_| drop(payload)) {
            // The second payload's drop may panic again, and so on. Leaking it ends that.
            core::mem::forget(second);
        }
    }
}

/// Runs foreign code and keeps its panic. Without `std`, a panic cannot be caught and unwinds
/// through the caller.
#[inline(always)]
pub(crate) fn keep<R>(code: impl FnOnce(Inside) -> R) -> Result<R, Panic> {
    assert_no_lock();
    #[cfg(feature = "std")]
    {
        std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| code(Inside(())))).map_err(Panic)
    }
    #[cfg(not(feature = "std"))]
    {
        Ok(code(Inside(())))
    }
}

/// Returns whether the thread is unwinding. If so, no panic can go on in its caller.
pub(crate) fn unwinding() -> bool {
    #[cfg(feature = "std")]
    return std::thread::panicking();
    #[cfg(not(feature = "std"))]
    false
}

/// The first panic of several calls. It goes on in the caller of an invalidation (C5).
#[derive(Default)]
pub(crate) struct FirstPanic(Option<(Callback, Panic)>);

impl FirstPanic {
    pub(crate) fn new(callback: Callback, panic: Panic) -> Self {
        Self(Some((callback, panic)))
    }

    /// Notes `panic` if it is the first. A further one is lost, because only one can go on.
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

/// The count of lost panics, and the reporter.
pub(crate) struct Losses {
    count: AtomicU64,
    reporter: Option<Reporter>,
}

impl Losses {
    pub(crate) fn new(reporter: Option<Reporter>) -> Self {
        Self { count: AtomicU64::new(0), reporter }
    }

    /// Returns how many panics were lost.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Runs foreign code. A panic of it is lost.
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

    /// Counts and reports a lost panic.
    #[cold]
    #[inline(never)]
    pub(crate) fn lose(&self, callback: Callback, panic: Panic) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if callback != Callback::Reporter {
            self.report(&Report::Panicked { callback, message: panic.message() });
        }
    }

    /// Counts and reports the panic that an invalidation kept, if it kept one.
    pub(crate) fn lose_first(&self, panic: FirstPanic) {
        if let Some((callback, panic)) = panic.0 {
            self.lose(callback, panic);
        }
    }

    /// Resumes a panic that was kept, in the caller. If the thread is unwinding already, the panic
    /// is lost. Returns then, and if there was no panic.
    pub(crate) fn resume(&self, panic: FirstPanic) {
        let Some((callback, panic)) = panic.0 else { return };
        #[cfg(feature = "std")]
        if !unwinding() {
            std::panic::resume_unwind(panic.into_payload());
        }
        self.lose(callback, panic);
    }

    /// Runs foreign code whose panic goes on in the caller, unless the thread is unwinding already.
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

/// The waker of a task. A wake and a drop of it never panic, and a clone of its `Arc` runs no
/// foreign code. The drop may run foreign code, so the last reference must not go under a lock.
pub(crate) struct TaskWaker {
    /// `None` in the drop only.
    waker: Option<Waker>,
    losses: Arc<Losses>,
}

impl TaskWaker {
    /// Clones `waker`. A panic of that goes to the executor that polls with it, so nothing may have
    /// been taken from the state before.
    pub(crate) fn new(waker: &Waker, losses: &Arc<Losses>) -> Arc<Self> {
        assert_no_lock();
        Arc::new(Self { waker: Some(waker.clone()), losses: losses.clone() })
    }

    /// Returns `known` if it wakes the same task as `waker`. Otherwise replaces it.
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

    /// Returns whether it wakes the same task as `waker`.
    pub(crate) fn wakes(&self, waker: &Waker) -> bool {
        self.waker.as_ref().is_some_and(|own| own.will_wake(waker))
    }

    /// Wakes the task. A waker may poll the task inline, which does not block the code that wakes
    /// (F3).
    pub(crate) fn rouse(&self) {
        let _inline = Inline::enter();
        if let Some(waker) = &self.waker {
            self.losses.run(Callback::Waker, |_| waker.wake_by_ref());
        }
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
        let waker = self.waker.take();
        self.losses.run(Callback::Waker, |_| drop(waker));
    }
}

/// Exists while this thread polls a future without blocking until it is ready: a task that a waker
/// polls inline, or a future that becomes a pass. Debug builds count these, for the check of C7.
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

    /// Returns how many exist on this thread.
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicUsize;

    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_waker_that_keeps_panics_wakes_its_task_by_value_and_by_reference() {
        let wakes = Arc::new(Wakes(AtomicUsize::new(0)));
        let task = TaskWaker::new(&wakes.clone().into(), &Arc::new(Losses::new(None)));
        let waker = Waker::from(task);
        waker.wake_by_ref();
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        waker.wake();
        assert_eq!(wakes.0.load(Ordering::Relaxed), 2);
    }
}
