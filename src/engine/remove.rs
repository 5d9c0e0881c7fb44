//! How a notifier enters and leaves the space: the registration, `close` and `remove` (L1).
#![forbid(unsafe_code)]

use crate::engine::first_pass::forbid_waiting;
use crate::engine::pending::Pending;
use crate::engine::wait::{Look, Wait};
use crate::engine::{Shared, State, WaitFor};
use crate::entry::{EntryBox, EntryRef, Room};
use crate::notifier::IntervalNotifier;
use crate::protocol::{Active, Id};
use crate::range::AddressRange;
use crate::sync::{Arc, Ordering};
use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::marker::PhantomData;
use core::pin::Pin;
use core::task::{Context, Poll};

/// A registered notifier and the space that it is registered with. Dropping it ends the registration without waiting.
pub(crate) struct Registered<N: IntervalNotifier> {
    pub(crate) space: Arc<Shared>,
    pub(crate) entry: EntryBox<N>,
    hold: Hold,
}

/// What a registration has of its entry. As wide as the words beside it: a narrow store would be waited for when they are moved.
#[derive(Clone, Copy, PartialEq)]
#[repr(usize)]
enum Hold {
    /// It is one of those who keep it alive.
    Shared,
    /// It is the only one who has it.
    Alone,
    /// The same, and the memory goes to [`Shared::spare`].
    Spare,
    /// The entry may be gone.
    Nothing,
}

impl<N: IntervalNotifier> Registered<N> {
    pub(crate) fn new(space: Arc<Shared>, entry: EntryBox<N>) -> Self {
        Self { space, entry, hold: Hold::Shared }
    }

    /// Closes the notifier; moves it out and ends the registration if nothing can call it any more (L1).
    fn try_take(&mut self) -> Option<N> {
        let Self { space, entry, hold } = self;
        let erased = entry.erase();
        let (notifier, unused) = space.with(|state, _| {
            state.close(erased);
            let Look::Ready = state.is_quiet(space, erased) else { return None };
            // Quiet and closed: nothing will call it again, also if an invalidation still covers it.
            let notifier = entry.take();
            *hold = Hold::Nothing;
            erased.detach();
            Some((notifier, erased.unused()))
        })?;
        if unused {
            erased.free();
        }
        Some(notifier)
    }

    /// Closes the notifier; if nobody else has any business with its entry, which is mostly so, ends the registration and says so.
    #[inline]
    fn detach(&mut self) -> bool {
        self.hold = self.space.detach(self.entry.erase());
        self.hold != Hold::Shared
    }
}

impl<N: IntervalNotifier> Drop for Registered<N> {
    #[inline]
    fn drop(&mut self) {
        let entry = self.entry.erase();
        match self.hold {
            Hold::Nothing => {}
            Hold::Shared => self.space.leave(entry),
            Hold::Alone => entry.free(),
            Hold::Spare if entry.is_taken() => self.space.spare.put(entry),
            Hold::Spare => {
                // The drop of the notifier may panic.
                self.space.spare.cancel();
                entry.free();
            }
        }
    }
}

impl Shared {
    /// Puts a notifier into the index, behind all others with its start; gives it back in a space that was released (L4).
    #[inline(always)]
    pub(crate) fn register<N: IntervalNotifier>(&self, range: AddressRange, notifier: N) -> Result<EntryBox<N>, N> {
        if !self.spare.is_filled() {
            return self.register_anew(range, notifier);
        }
        let mut state = self.state.lock();
        let (false, Some(room)) = (state.released, self.spare.take()) else {
            drop(state);
            return self.register_anew(range, notifier);
        };
        // What is written goes on while the index waits for its own loads; before the lock it would be waited for.
        let entry = EntryBox::new(room, range, notifier);
        state.attach(entry.erase());
        Ok(entry)
    }

    /// The same in new memory; what was spare and does not fit makes room for what is used now.
    #[inline(never)]
    fn register_anew<N: IntervalNotifier>(&self, range: AddressRange, notifier: N) -> Result<EntryBox<N>, N> {
        let room = Room::new();
        // The lock is free before that is.
        let _unfit;
        let mut state = self.state.lock();
        _unfit = self.spare.clear();
        if state.released {
            return Err(notifier);
        }
        let entry = EntryBox::new(room, range, notifier);
        state.attach(entry.erase());
        Ok(entry)
    }

    /// Ends a registration without waiting.
    #[inline(never)]
    fn leave(&self, entry: EntryRef) {
        self.with(|state, after| {
            state.close(entry);
            entry.detach();
            state.reap(entry, after);
        });
    }

    /// Closes a notifier and, if nobody but its subscription has any business with it, leaves its entry to that.
    #[inline(never)]
    fn detach(&self, entry: EntryRef) -> Hold {
        let Some(mut state) = self.state.try_lock() else { return self.detach_slowly(entry) };
        // Without an invalidation that covers it there is neither a call nor a pass.
        let alone = entry.retire();
        if !alone {
            drop(state);
            return self.detach_slowly(entry);
        }
        let spare = self.spare.reserve();
        state.protocol.remove(entry);
        if spare { Hold::Spare } else { Hold::Alone }
    }

    /// The same for one that somebody has to do with or that is closed already, or with the lock taken.
    #[cold]
    #[inline(never)]
    fn detach_slowly(&self, entry: EntryRef) -> Hold {
        let mut state = self.state.lock();
        state.close(entry);
        let alone = !entry.own.is_covered() && !entry.is_held();
        if !alone {
            return Hold::Shared;
        }
        entry.detach();
        Hold::Alone
    }
}

impl State {
    /// Puts a new entry into the index. Not built in: what drivers build in should be short.
    #[inline(never)]
    fn attach(&mut self, entry: EntryRef) {
        self.next_order += 1;
        entry.order.store(self.next_order, Ordering::Relaxed);
        self.protocol.insert(entry);
    }

    /// Takes a notifier out of the index and keeps calls that have not begun from beginning (L1). May be called again.
    pub(crate) fn close(&mut self, entry: EntryRef) {
        if !entry.own.is_closed() {
            entry.own.close();
            self.protocol.remove(entry);
        }
    }

    /// L1: whether no call of the notifier and no pass of it is under way. The guards that others hold do not matter.
    fn is_quiet(&self, space: &Shared, entry: EntryRef) -> Look {
        if entry.pending.load(Ordering::Relaxed) != 0 || entry.is_held() {
            return Look::Wait;
        }
        if !entry.own.is_covered() {
            return Look::Ready;
        }
        let calls = |(id, active): (Id, &Active<EntryRef, _>)| active.range.overlaps(entry.range) && space.calls.under_way(id);
        if self.protocol.active().iter().any(calls) { Look::Soon } else { Look::Ready }
    }
}

/// A wait until a notifier that was closed is quiet.
#[derive(Default)]
struct QuietWait(Wait);

impl QuietWait {
    fn poll(&mut self, space: &Shared, entry: EntryRef, cx: &mut Context<'_>) -> Poll<()> {
        let look = |state: &mut State, _| state.is_quiet(space, entry);
        let ours = |pending: &Pending, _| pending.waiting.iter().any(|(_, of)| *of == entry);
        let polled = self.0.poll(space, Some((entry, WaitFor::Quiet)), cx, look, ours);
        if polled.is_pending() {
            forbid_waiting(space, "remove");
        }
        polled
    }

    fn leave(&mut self, space: &Shared) {
        if self.0.waiter.is_some() {
            space.with(|state, after| self.0.leave(state, after));
        }
    }
}

/// The future of [`Subscription::close`](crate::Subscription::close).
///
/// # Cancel safety
/// May be dropped at any moment, or never be polled: the notifier is out of the space since the call of `close`.
///
/// # Panics
/// In debug builds when it would have to wait inside a first pass of the same space (C7).
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

/// The future of [`Subscription::remove`](crate::Subscription::remove); resolves to the notifier.
///
/// The removal begins with the call, not with the first poll: new invalidations do not call the notifier any more.
///
/// # Cancel safety
/// When it is dropped early the notifier stays removed, and is dropped as soon as no call and no invalidation needs it any more.
///
/// # Panics
/// In debug builds when it would have to wait inside a first pass of the same space (C7).
#[must_use = "the notifier may still be called, and its passes run, until the future has resolved"]
pub struct Remove<N: IntervalNotifier> {
    step: RemoveStep<N>,
}

enum RemoveStep<N: IntervalNotifier> {
    /// It was quiet already. The notifier stays where it is until it is asked for: each move of one takes longer than the rest of a removal.
    Removed(Registered<N>),
    Wait(Box<Waiting<N>>),
    Done,
}

/// A removal that has to wait; leaves the list of those that do when it is dropped, and then ends the registration.
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
}

impl<N: IntervalNotifier> Future for Remove<N> {
    type Output = N;

    #[inline(never)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<N> {
        match &mut self.step {
            // Straight to where the caller wants it.
            RemoveStep::Removed(registered) if !registered.entry.is_taken() => Poll::Ready(registered.entry.take()),
            RemoveStep::Wait(waiting) => {
                let polled = waiting.poll(cx);
                if polled.is_ready() {
                    self.step = RemoveStep::Done;
                }
                polled
            }
            RemoveStep::Removed(_) | RemoveStep::Done => panic!("`Remove` polled after it has resolved"),
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
                // Somebody asks for its name at this moment (C6), and wakes whoever waits afterwards; look again.
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }
}

// The notifier is never pinned by its subscription.
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
