//! The futures that wait for invalidations that others started: readers and `drain`; removers are in `remove`.
//!
//! All of them help: they drive the passes that they wait for (C3), and let an invalidation lapse whose future is not polled (C4).
#![forbid(unsafe_code)]

use crate::engine::first_pass::forbid_waiting;
use crate::engine::pending::{Help, Pending, TaskWaker};
use crate::engine::{After, Shared, State, Unclaimed, WaitFor};
use crate::entry::EntryRef;
use crate::index::Ranged;
use crate::notifier::Sequence;
use crate::observe;
use crate::range::AddressRange;
use crate::sync::{Arc, spin_hint};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::marker::PhantomData;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

/// A wait that could not be answered at once.
#[derive(Default)]
pub(super) struct Wait {
    /// Our place among those that wait for the notifier.
    pub(super) waiter: Option<usize>,
    help: Help,
    /// Unclaimed invalidations that hold us up, and how often we have yielded to each.
    patience: Vec<(Unclaimed, u32)>,
}

/// What one look at the state says to a waiting future.
pub(super) enum Look {
    Ready,
    /// Something runs on another thread at this moment and will not wake us.
    Soon,
    Wait,
}

impl Wait {
    /// Looks, helps, and looks again until there is nothing left to help with.
    ///
    /// `queue` is the notifier among whose waiters we queue, and for what; without it the whole space is looked at. `look` decides under the lock whether the wait is over; `wanted` says whose passes hold it up.
    pub(super) fn poll(
        &mut self,
        space: &Shared,
        queue: Option<(EntryRef, WaitFor)>,
        cx: &mut Context<'_>,
        mut look: impl FnMut(&mut State, bool) -> Look,
        wanted: impl Fn(&Pending, u64) -> bool,
    ) -> Poll<()> {
        let waker = Arc::new(TaskWaker(cx.waker().clone()));
        loop {
            let (seen, jobs) = space.with(|state, after| {
                let fired = self.waiter.is_some_and(|key| state.waiters[key].fired);
                let seen = look(state, fired);
                if let Look::Ready = seen {
                    self.leave(state, after);
                    return (seen, Vec::new());
                }
                let ours = Waker::from(waker.clone());
                match (self.waiter, queue) {
                    (Some(key), _) => after.work().unused.extend(state.waiters[key].waker.replace(ours)),
                    (None, Some((entry, wait_for))) => self.waiter = Some(state.add_waiter(entry, wait_for, ours)),
                    (None, None) => {}
                }
                let range = queue.map_or(AddressRange::ALL, |(entry, _)| entry.range);
                let jobs = state.jobs(range, &waker, &mut self.help, &wanted, after);
                (seen, jobs)
            });
            if let Look::Ready = seen {
                return Poll::Ready(());
            }
            let mut progress = false;
            for job in jobs {
                progress |= space.work(job, true);
            }
            if progress || self.lose_patience(space) {
                continue;
            }
            if !self.help.idle.is_empty() || matches!(seen, Look::Soon) {
                cx.waker().wake_by_ref();
                spin_hint();
            }
            return Poll::Pending;
        }
    }

    /// Counts one more yield to each invalidation that is done and not claimed; lets those lapse to which we have yielded enough (C4).
    fn lose_patience(&mut self, space: &Shared) -> bool {
        let Self { help, patience, .. } = self;
        patience.retain(|(unclaimed, _)| help.idle.contains(unclaimed));
        if help.idle.is_empty() {
            return false;
        }
        for &unclaimed in &help.idle {
            match patience.iter_mut().find(|(known, _)| *known == unclaimed) {
                Some((_, yields)) => *yields += 1,
                None => patience.push((unclaimed, 1)),
            }
        }
        let (now, mut lapses) = (space.now(), 0);
        let look_again = space.with(|state, after| {
            let mut lapsed = false;
            patience.retain(|&(unclaimed, yields)| {
                let Some(pending) = state.pending_mut(unclaimed) else {
                    // It was claimed or ended meanwhile: look again.
                    lapsed = true;
                    return false;
                };
                let over = pending.done && !pending.abandoned && yields > pending.patience;
                if over {
                    state.lapse(unclaimed, now, after);
                    lapses += 1;
                    lapsed = true;
                }
                !over
            });
            lapsed
        });
        (0..lapses).for_each(|_| observe::lapsed());
        look_again
    }

    pub(super) fn leave(&mut self, state: &mut State, after: &mut After) {
        if let Some(key) = self.waiter.take() {
            state.remove_waiter(key, after);
        }
    }
}

/// The future of [`Subscription::read_begin`](crate::Subscription::read_begin); resolves to the notifier's own sequence.
///
/// # Cancel safety
/// May be dropped at any moment; nothing is lost. While it waits it drives the passes that it waits for (C3).
///
/// # Panics
/// In debug builds when it would have to wait inside a first pass of the same space (C7).
#[must_use = "the wait begins when the future is polled"]
pub struct ReadBegin<'a> {
    /// Followed only when it has to wait.
    space: &'a Arc<Shared>,
    entry: EntryRef,
    /// There is one when it has had to wait.
    slow: Option<Box<SlowRead<'a>>>,
    /// Borrows the subscription, which keeps the entry alive.
    subscription: PhantomData<&'a ()>,
}

/// A reader that has to wait; leaves the list of those that do when it is dropped.
struct SlowRead<'a> {
    space: &'a Shared,
    wait: Wait,
    /// The own sequence on entry (R1).
    sequence: u64,
}

impl Drop for SlowRead<'_> {
    #[cold]
    fn drop(&mut self) {
        if self.wait.waiter.is_some() {
            self.space.with(|state, after| self.wait.leave(state, after));
        }
    }
}

impl<'a> ReadBegin<'a> {
    #[inline]
    pub(crate) fn new(space: &'a Arc<Shared>, entry: EntryRef) -> Self {
        Self { space, entry, slow: None, subscription: PhantomData }
    }
}

/// What is left to do for a reader that may have to wait, and whether it waits.
///
/// Takes and returns `slow` by value: the address of a future that need not wait is given to nobody, so it is never put into memory.
#[cold]
fn wait_for_sequence<'a>(
    space: &'a Shared,
    entry: EntryRef,
    slow: Option<Box<SlowRead<'a>>>,
    cx: &mut Context<'_>,
) -> (Option<Box<SlowRead<'a>>>, Poll<Sequence>) {
    let first = slow.is_none();
    if first {
        if space.poll_gate(cx).is_pending() {
            return (None, Poll::Pending);
        }
        if let Some(sequence) = entry.own.stable_sequence() {
            return (None, Poll::Ready(Sequence(sequence)));
        }
    }
    let mut slow = slow.unwrap_or_else(|| Box::new(SlowRead { space, wait: Wait::default(), sequence: entry.own.sequence() }));
    let look = |_: &mut State, fired: bool| {
        if fired || !entry.own.is_covered() { Look::Ready } else { Look::Wait }
    };
    let polled = slow.wait.poll(space, Some((entry, WaitFor::Uncovered)), cx, look, |_, _| true);
    if polled.is_pending() && first {
        space.waited(&entry);
    }
    let sequence = Sequence(slow.sequence);
    (Some(slow), polled.map(|()| sequence))
}

impl Future for ReadBegin<'_> {
    type Output = Sequence;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Sequence> {
        // The gate first, then the word: whoever finds the gate open sees what was covered while it was closed.
        if self.slow.is_none()
            && !self.space.gate.is_closed()
            && let Some(sequence) = self.entry.own.stable_sequence()
        {
            return Poll::Ready(Sequence(sequence));
        }
        let (slow, polled) = wait_for_sequence(self.space, self.entry, self.slow.take(), cx);
        self.slow = slow;
        if polled.is_pending() {
            forbid_waiting(self.space, "read_begin");
        }
        polled
    }
}

impl fmt::Debug for ReadBegin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadBegin").field("range", &self.entry.range).finish_non_exhaustive()
    }
}

/// The future of [`AddressSpace::drain`](crate::AddressSpace::drain).
///
/// # Cancel safety
/// May be dropped at any moment; what it has driven so far stays done.
///
/// # Panics
/// In debug builds when it would have to wait inside a first pass of the same space (C7).
#[must_use = "nothing is driven before the future is polled"]
pub struct Drain<'a> {
    space: &'a Shared,
    wait: Wait,
    /// Invalidations that started later are not waited for.
    until: Option<u64>,
}

impl<'a> Drain<'a> {
    pub(crate) fn new(space: &'a Shared) -> Self {
        Self { space, wait: Wait::default(), until: None }
    }
}

impl Future for Drain<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { space, wait, until } = &mut *self;
        let until = *until.get_or_insert_with(|| space.with(|state, _| state.protocol.last_serial()));
        let ours = |pending: &Pending, serial| serial <= until && (pending.abandoned || !pending.done);
        let look = |state: &mut State, _| {
            let mut any = false;
            state.unclaimed.overlapping(AddressRange::ALL, |Ranged { value: unclaimed, .. }| {
                let active = state.protocol.get(unclaimed.id, unclaimed.serial);
                let pending = active.and_then(|active| active.extra.pending.as_deref());
                any |= pending.is_some_and(|pending| ours(pending, unclaimed.serial));
            });
            if any { Look::Wait } else { Look::Ready }
        };
        let polled = wait.poll(space, None, cx, look, ours);
        if polled.is_pending() {
            forbid_waiting(space, "drain");
        }
        polled
    }
}

impl fmt::Debug for Drain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drain").finish_non_exhaustive()
    }
}
