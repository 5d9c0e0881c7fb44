//! `close` and `remove`: how a notifier leaves the space for good (L1).
#![forbid(unsafe_code)]

use super::wait::{Goal, Verdict, Wait};
use crate::engine::Shared;
use crate::engine::nesting::passes::note_wait;
use crate::engine::nesting::{Waits, forbid_waiting};
use crate::engine::registration::{Quiet, Registered};
use crate::engine::state::{Parking, State, WaitFor};
use crate::entry::EntryRef;
use crate::notifier::IntervalNotifier;
use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::marker::PhantomData;
use core::pin::Pin;
use core::task::{Context, Poll};

/// A wait until a closed notifier is quiet.
#[derive(Default)]
struct QuietWait {
    wait: Wait,
    has_waited: bool,
}

/// The goal that the notifier is quiet (L1).
struct UntilQuiet<'a>(&'a Shared, EntryRef);

impl Goal for UntilQuiet<'_> {
    fn queue(&self) -> Option<(EntryRef, WaitFor)> {
        Some((self.1, WaitFor::Quiet))
    }

    fn look(&mut self, state: &State, _: bool, _: bool) -> Verdict {
        match self.0.quiet(state, self.1) {
            Quiet::Yes => Verdict::Over,
            Quiet::Soon => Verdict::Soon,
            Quiet::No => Verdict::Wait,
        }
    }

    fn wants(&self, parking: &Parking, _: u64) -> bool {
        parking.pending.iter().any(|of| of == self.1)
    }
}

impl QuietWait {
    fn poll(&mut self, space: &Shared, entry: EntryRef, cx: &mut Context<'_>) -> Poll<()> {
        let first = !core::mem::replace(&mut self.has_waited, true);
        let polled = self.wait.poll(space, &mut UntilQuiet(space, entry), cx);
        if polled.is_pending() {
            let waits = Waits { what: "remove", first, waker: cx.waker() };
            forbid_waiting(&space.host, &waits, |of| of.invalidates.overlaps(entry.range));
            note_wait(&space.host, "remove or close", entry, cx.waker());
        }
        polled
    }

    fn leave(&mut self, space: &Shared) {
        self.wait.give_up(space);
    }
}

/// The future of [`Subscription::close`](crate::Subscription::close).
///
/// # Cancel safety
/// May be dropped at any moment, or never be polled. The notifier is out of the space since the
/// call of `close`.
///
/// # Panics
/// In debug builds, if it would wait inside a first pass of the same space (C7).
#[must_use = "the notifier may still be called, and its passes run, until the future has resolved"]
pub struct Close<'a> {
    space: &'a Shared,
    entry: EntryRef,
    wait: QuietWait,
    /// Borrows the subscription, which keeps the entry alive.
    subscription: PhantomData<&'a ()>,
}

impl<'a> Close<'a> {
    pub(crate) fn new(space: &'a Shared, entry: EntryRef) -> Self {
        space.with(|state, _| state.close(entry));
        Self { space, entry, wait: QuietWait::default(), subscription: PhantomData }
    }

    /// Blocks the thread until the notifier is quiet (W1).
    #[cfg(feature = "std")]
    pub fn wait(self) {
        crate::block::wait(self);
    }
}

impl Future for Close<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { space, entry, wait, .. } = &mut *self;
        wait.poll(space, *entry, cx)
    }
}

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.wait.leave(self.space);
    }
}

impl fmt::Debug for Close<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Close").field("range", &self.entry.range).finish_non_exhaustive()
    }
}

/// The future of [`Subscription::remove`](crate::Subscription::remove). Resolves to the notifier.
///
/// The removal begins with the call, not with the first poll: new invalidations do not call the
/// notifier any more.
///
/// # Cancel safety
/// If it is dropped early, the notifier stays removed. It is dropped as soon as no call and no
/// invalidation needs it any more.
///
/// # Panics
/// In debug builds, if it would wait inside a first pass of the same space (C7).
#[must_use = "the notifier may still be called, and its passes run, until the future has resolved"]
pub struct Remove<N: IntervalNotifier> {
    step: RemoveStep<N>,
}

enum RemoveStep<N: IntervalNotifier> {
    /// The notifier was quiet already. It stays in its entry until it is taken, because a move
    /// takes longer than the rest of a removal.
    Removed(Registered<N>),
    Wait(Box<Waiting<N>>),
    Done,
}

/// A removal that has to wait. Its drop takes it out of the list of waiters and ends the
/// registration.
struct Waiting<N: IntervalNotifier> {
    wait: QuietWait,
    registered: Registered<N>,
}

impl<N: IntervalNotifier> Drop for Waiting<N> {
    fn drop(&mut self) {
        self.wait.leave(&self.registered.space);
    }
}

impl<N: IntervalNotifier> Remove<N> {
    #[inline]
    pub(crate) fn new(mut registered: Registered<N>) -> Self {
        let step = if registered.detach() {
            RemoveStep::Removed(registered)
        } else {
            RemoveStep::Wait(Box::new(Waiting { wait: QuietWait::default(), registered }))
        };
        Self { step }
    }

    /// Blocks the thread until the notifier is quiet, and returns it (W1).
    #[cfg(feature = "std")]
    pub fn wait(self) -> N {
        crate::block::wait(self)
    }
}

impl<N: IntervalNotifier> Future for Remove<N> {
    type Output = N;

    #[inline(never)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<N> {
        match &mut self.step {
            // Moved once, straight into the caller's place.
            RemoveStep::Removed(registered) if !registered.entry.is_taken() => {
                Poll::Ready(registered.entry.take())
            }
            RemoveStep::Wait(waiting) => {
                let polled = waiting.poll(cx);
                if polled.is_ready() {
                    self.step = RemoveStep::Done;
                }
                polled
            }
            RemoveStep::Removed(_) | RemoveStep::Done => {
                panic!("`Remove` polled after it has resolved")
            }
        }
    }
}

impl<N: IntervalNotifier> Waiting<N> {
    #[cold]
    #[inline(never)]
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<N> {
        let Self { wait, registered } = self;
        if wait.poll(&registered.space, registered.entry.erase(), cx).is_pending() {
            return Poll::Pending;
        }
        match registered.try_take() {
            Some(notifier) => Poll::Ready(notifier),
            None => {
                // It is asked for its name at this moment (C6), which wakes the waiters when it is
                // over. Look again.
                wait.wait.look_again();
                Poll::Pending
            }
        }
    }
}

// A subscription never pins its notifier.
impl<N: IntervalNotifier> Unpin for Remove<N> {}

impl<N: IntervalNotifier> fmt::Debug for Remove<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = match &self.step {
            RemoveStep::Removed(registered) if !registered.entry.is_taken() => "removed",
            RemoveStep::Wait(_) => "waiting",
            RemoveStep::Removed(_) | RemoveStep::Done => "resolved",
        };
        f.debug_struct("Remove").field("step", &step).finish_non_exhaustive()
    }
}
