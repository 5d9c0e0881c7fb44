//! The begin of a reader, which may have to wait.
#![forbid(unsafe_code)]

use super::wait::{Goal, Verdict, Wait};
use crate::engine::Shared;
use crate::engine::gate::Since;
use crate::engine::nesting::passes::note_wait;
use crate::engine::nesting::{Waits, forbid_waiting};
use crate::engine::state::{Parking, State, WaitFor};
use crate::entry::EntryRef;
use crate::notifier::Sequence;
use crate::sync::Arc;
use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::marker::PhantomData;
use core::pin::Pin;
use core::task::{Context, Poll};

/// The future of [`Subscription::read_begin`](crate::Subscription::read_begin). Resolves to the
/// notifier's own sequence.
///
/// # Cancel safety
/// May be dropped at any moment. Nothing is lost. While it waits, it polls the passes that it waits
/// for (C3).
///
/// # Panics
/// In debug builds, if it would wait inside a first pass for that first pass's own invalidation
/// (C7).
#[must_use = "the wait begins when the future is polled"]
pub struct ReadBegin<'a> {
    /// Followed only when it has to wait.
    space: &'a Arc<Shared>,
    entry: EntryRef,
    /// `None` before it has had to wait.
    slow: Option<Box<SlowRead<'a>>>,
    /// Borrows the subscription, which keeps the entry alive.
    subscription: PhantomData<&'a ()>,
}

/// A reader that has to wait. Its drop takes it out of all lists of waiters.
struct SlowRead<'a> {
    space: &'a Shared,
    /// When it began to wait for the gate; `None` once it has passed the gate.
    gate: Option<Since>,
    wait: Wait,
    /// The own sequence on entry (R1).
    sequence: u64,
}

impl Drop for SlowRead<'_> {
    #[cold]
    fn drop(&mut self) {
        self.wait.give_up(self.space);
    }
}

/// The goal of a moment at which no active invalidation covers the notifier (R1).
struct Uncovered(EntryRef);

impl Goal for Uncovered {
    fn queue(&self) -> Option<(EntryRef, WaitFor)> {
        Some((self.0, WaitFor::Uncovered))
    }

    fn look(&mut self, _: &State, fired: bool, _: bool) -> Verdict {
        if fired || !self.0.own.is_covered() { Verdict::Over } else { Verdict::Wait }
    }

    fn wants(&self, _: &Parking, _: u64) -> bool {
        true
    }
}

impl<'a> ReadBegin<'a> {
    #[inline]
    pub(crate) fn new(space: &'a Arc<Shared>, entry: EntryRef) -> Self {
        Self { space, entry, slow: None, subscription: PhantomData }
    }

    /// Blocks the thread until no invalidation covers the notifier (W1).
    #[cfg(feature = "std")]
    pub fn wait(self) -> Sequence {
        crate::block::wait(self)
    }
}

/// Polls a reader that may have to wait: the plain form of [`ReadBegin::poll`].
///
/// Takes and returns `slow` by value. So a future that need not wait gives its address to no
/// function, and is never written to memory.
#[cold]
fn wait_for_sequence<'a>(
    space: &'a Shared,
    entry: EntryRef,
    slow: Option<Box<SlowRead<'a>>>,
    cx: &mut Context<'_>,
) -> (Option<Box<SlowRead<'a>>>, Poll<Sequence>) {
    let mut gate = slow.as_ref().map_or(Some(Since::default()), |slow| slow.gate);
    let entering = gate.is_some();
    if let Some(since) = &mut gate {
        let polled = space.poll_gate(since, cx);
        if polled.is_ready() {
            if let Some(sequence) = entry.own.stable_sequence() {
                return (slow, Poll::Ready(Sequence(sequence)));
            }
            gate = None;
        }
    }
    let mut slow = slow
        .unwrap_or_else(|| Box::new(SlowRead { space, gate, wait: Wait::default(), sequence: 0 }));
    slow.gate = gate;
    if gate.is_some() {
        return (Some(slow), Poll::Pending);
    }
    if entering {
        slow.sequence = entry.own.sequence();
    }
    let polled = slow.wait.poll(space, &mut Uncovered(entry), cx);
    if polled.is_pending() && entering {
        space.waited(&entry);
    }
    let sequence = Sequence(slow.sequence);
    (Some(slow), polled.map(|()| sequence))
}

impl Future for ReadBegin<'_> {
    type Output = Sequence;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Sequence> {
        // The gate before the word: a reader that finds the gate open sees what was covered while
        // the gate was closed.
        if self.slow.is_none()
            && !self.space.host.is_plain_only()
            && !self.space.is_shut()
            && let Some(sequence) = self.entry.own.stable_sequence()
        {
            return Poll::Ready(Sequence(sequence));
        }
        let first = self.slow.is_none();
        let (slow, polled) = wait_for_sequence(self.space, self.entry, self.slow.take(), cx);
        self.slow = slow;
        if polled.is_pending() {
            let waits = Waits { what: "read_begin", first, waker: cx.waker() };
            forbid_waiting(&self.space.host, &waits, |of| {
                of.invalidates.overlaps(self.entry.range)
            });
            note_wait(&self.space.host, "read_begin", self.entry, cx.waker());
        }
        polled
    }
}

impl fmt::Debug for ReadBegin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadBegin").field("range", &self.entry.range).finish_non_exhaustive()
    }
}
