//! What all futures have in common that wait for invalidations that others started: readers,
//! removers and `drain`.
//!
//! All of them help: they poll the passes that they wait for (C3), and let an invalidation lapse
//! whose future is not polled (C4). What a poll costs depends on what has changed since the last
//! one, not on how many invalidations are waited for: a future's [`Bell`] says at which of them it
//! has to look again.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::lease::Lease;
use crate::engine::outbox::Outbox;
use crate::engine::state::{Help, Parking, State, Ticket, WaitFor, Watch};
use crate::engine::wakers::{Bell, Registration};
use crate::entry::EntryRef;
use crate::foreign::TaskWaker;
use crate::observe;
use crate::range::AddressRange;
use crate::sync::{Arc, Ordering, give_turn};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::task::{Context, Poll};
use core::time::Duration;

/// As many invalidations lapse under one lock.
const AT_ONCE: usize = 64;

/// A wait that could not be answered at once.
#[derive(Default)]
pub(super) struct Wait {
    /// Our place among those that wait for the notifier.
    waiter: Option<usize>,
    /// Our place among those that wait for the whole space.
    drain: Option<usize>,
    bell: Arc<Bell>,
    task: Option<Arc<TaskWaker>>,
    /// The parked invalidations have been looked at, and the bell says which are to be looked at
    /// again.
    scanned: bool,
    /// Those that are to be looked at.
    backlog: Vec<Ticket>,
    /// Those whose passes hold us up, with what wakes us when they can go on.
    pending: BTreeMap<Ticket, Registration>,
    /// Those whose passes are done and whose futures have not claimed them, with the episode that
    /// is waited for.
    unclaimed: BTreeMap<Ticket, u32>,
    /// Those that have had their time, ours or others'. Few lapse under one lock.
    over: Vec<Ticket>,
    /// What the clock showed at our last look.
    shown: Option<Duration>,
    /// The same as `unclaimed` in the order in which they were found, with the count of polls then,
    /// as far as they were left by our own waker.
    ours: VecDeque<(Ticket, u64)>,
    polls: u64,
    watch: Watch,
    is_watchman: bool,
}

/// What one look at the state says to a waiting future.
pub(super) enum Verdict {
    Over,
    /// Something runs on another thread at this moment and will not wake us.
    Soon,
    Wait,
}

/// What a future waits for.
pub(super) trait Goal {
    /// The notifier among whose waiters it queues, and for what. Without it the whole space is
    /// looked at.
    fn queue(&self) -> Option<(EntryRef, WaitFor)>;
    /// Decides under the lock whether the wait is over. `fired`: the moment has come that it is
    /// queued for. `held_up`: there are invalidations that it wants to help with.
    fn look(&mut self, state: &State, fired: bool, held_up: bool) -> Verdict;
    /// Whether it waits for the passes of an invalidation.
    fn wants(&self, parking: &Parking, serial: u64) -> bool;
}

/// What a look under the lock has found to do.
enum Step<'s> {
    Over,
    /// Passes that hold us up, to be polled.
    Drive(Ticket, Lease<'s>),
    /// Something has lapsed: look again.
    Again,
    /// Nothing but to wait.
    Wait(Pause),
}

/// How a future waits.
enum Pause {
    /// Somebody will wake it.
    Sleep,
    /// It wakes itself.
    Yield,
    /// Others who yield go first; the next one wakes it.
    Rest,
}

impl Wait {
    /// Polls a wait: looks whether it is over, queues this future, and polls the passes that hold
    /// it up as far as they go.
    pub(super) fn poll(
        &mut self,
        shared: &Shared,
        goal: &mut impl Goal,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        // Before the lock: the clone of a waker is foreign code, and so is a clock.
        let task = TaskWaker::renew(&mut self.task, cx.waker(), &shared.host.losses);
        let mut look = self.is_watchman.then(|| shared.host.now());
        self.polls += 1;
        let mut first = true;
        // Whoever sees that may rest, and is woken as soon as we have the lock.
        let comes = !self.unclaimed.is_empty();
        if comes {
            shared.host.coming.fetch_add(1, Ordering::AcqRel);
        }
        loop {
            let mut dropped = Vec::new();
            let mut lapses = 0;
            let step = shared.with(|state, outbox| {
                if core::mem::take(&mut first) {
                    if comes {
                        shared.host.coming.fetch_sub(1, Ordering::AcqRel);
                    }
                    outbox.contents().unused.extend(self.bell.arm(task.clone()));
                    wake_resting(state, outbox);
                    self.hear(state, goal);
                }
                self.step(shared, state, goal, cx, &mut look, outbox, &mut dropped, &mut lapses)
            });
            drop(dropped);
            (0..lapses).for_each(|_| observe::lapsed(&shared.host.losses));
            match step {
                Step::Over => {
                    self.pending.clear();
                    return Poll::Ready(());
                }
                Step::Drive(ticket, lease) => {
                    if lease.drive() {
                        // It is unclaimed now, or over.
                        self.backlog.push(ticket);
                    }
                }
                Step::Again => {}
                Step::Wait(pause) => {
                    match pause {
                        Pause::Sleep => {}
                        Pause::Rest => give_turn(),
                        Pause::Yield => {
                            task.rouse();
                            give_turn();
                        }
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Wakes the task that was polled last.
    pub(super) fn look_again(&self) {
        if let Some(task) = &self.task {
            task.rouse();
        }
    }

    /// Notes at which invalidations to look.
    fn hear(&mut self, state: &State, goal: &impl Goal) {
        let rung = self.bell.take_rung();
        if let (true, Some(rung)) = (self.scanned, rung) {
            self.backlog.extend(rung);
            return;
        }
        self.scanned = true;
        self.scan(state, goal);
        // Those that are not parked any more are over.
        self.backlog.extend(self.pending.keys().chain(self.unclaimed.keys()));
    }

    /// Looks at all.
    fn scan(&mut self, state: &State, goal: &impl Goal) {
        let range = goal.queue().map_or(AddressRange::ALL, |(entry, _)| entry.range);
        let backlog = &mut self.backlog;
        backlog.clear();
        state.parked.overlapping(range, |parked| {
            // Not those with a gap there (L2).
            if state.protocol.active().overlaps(parked.value, range) {
                backlog.push(parked.value);
            }
        });
    }

    #[allow(clippy::too_many_arguments, reason = "what a poll knows")]
    fn step<'s>(
        &mut self,
        shared: &'s Shared,
        state: &mut State,
        goal: &mut impl Goal,
        cx: &Context<'_>,
        clock: &mut Option<Option<Duration>>,
        outbox: &mut Outbox,
        dropped: &mut Vec<Registration>,
        lapses: &mut u64,
    ) -> Step<'s> {
        let verdict = loop {
            let fired = self.waiter.is_some_and(|key| state.waiters[key].fired);
            if goal.queue().is_some()
                && let Verdict::Over = goal.look(state, fired, true)
            {
                self.leave(state, outbox);
                return Step::Over;
            }
            if let (None, Some((entry, wait_for))) = (self.waiter, goal.queue()) {
                self.waiter = Some(state.add_waiter(entry, wait_for, self.bell.clone()));
            }
            if self.drain.is_none() && goal.queue().is_none() {
                self.drain = Some(state.drains.insert(self.bell.clone()));
            }
            if let Some((ticket, lease)) = self.work_off(shared, state, goal, cx, dropped) {
                return Step::Drive(ticket, lease);
            }
            let held_up = !self.pending.is_empty() || !self.unclaimed.is_empty();
            match goal.look(state, fired, held_up) {
                Verdict::Over if goal.queue().is_some() => {
                    // The last first pass has ended since the look above, which needs no lock.
                    self.leave(state, outbox);
                    return Step::Over;
                }
                Verdict::Over => {
                    // Nothing is left of what it has heard of. There may be others by now.
                    self.scan(state, goal);
                    self.backlog.retain(|ticket| {
                        state
                            .parking(*ticket)
                            .is_some_and(|parking| goal.wants(parking, ticket.serial()))
                    });
                    if self.backlog.is_empty() {
                        self.leave(state, outbox);
                        return Step::Over;
                    }
                }
                verdict => break verdict,
            }
        };
        if self.lose_patience(state, cx, clock, outbox, lapses) {
            return Step::Again;
        }
        if matches!(verdict, Verdict::Soon) {
            return Step::Wait(Pause::Yield);
        }
        if self.unclaimed.is_empty() {
            return Step::Wait(Pause::Sleep);
        }
        let others = shared.host.coming.load(Ordering::Acquire) > 0;
        let wakes_itself = state.patience.wakes_itself(&mut self.watch, others, &self.bell);
        Step::Wait(if wakes_itself { Pause::Yield } else { Pause::Rest })
    }

    /// Looks at the invalidations of the backlog, until there is one whose passes are to be polled.
    fn work_off<'s>(
        &mut self,
        shared: &'s Shared,
        state: &mut State,
        goal: &impl Goal,
        cx: &Context<'_>,
        dropped: &mut Vec<Registration>,
    ) -> Option<(Ticket, Lease<'s>)> {
        while let Some(ticket) = self.backlog.pop() {
            let help = state.help(ticket, |parking, serial| goal.wants(parking, serial));
            if let Help::Leased(_) | Help::Busy = help
                && let Some(parking) = state.parking(ticket)
            {
                dropped.push(self.pending.entry(ticket).or_default().renew(
                    &parking.wakers,
                    &self.bell,
                    ticket,
                ));
            } else {
                dropped.extend(self.pending.remove(&ticket));
            }
            if !matches!(help, Help::Unclaimed) {
                self.unclaimed.remove(&ticket);
            }
            match help {
                Help::Leased(work) => return Some((ticket, Lease::new(shared, ticket, work))),
                Help::Unclaimed => self.await_claim(state, ticket, cx),
                Help::Busy | Help::Gone => {}
            }
        }
        None
    }

    fn await_claim(&mut self, state: &mut State, ticket: Ticket, cx: &Context<'_>) {
        let known =
            self.unclaimed.get(&ticket).is_some_and(|episode| state.is_awaited(ticket, *episode));
        if !known && let Some(episode) = state.await_claim(ticket) {
            self.unclaimed.insert(ticket, episode);
            if state.is_certain(ticket, cx.waker(), u64::MAX) {
                self.ours.push_back((ticket, self.polls));
            }
        }
    }

    /// Lets those lapse that had their time (C4). Returns whether there were any.
    fn lose_patience(
        &mut self,
        state: &mut State,
        cx: &Context<'_>,
        clock: &mut Option<Option<Duration>>,
        outbox: &mut Outbox,
        lapses: &mut u64,
    ) -> bool {
        // Those that were claimed meanwhile.
        while let Some((ticket, episode)) = self.unclaimed.first_key_value()
            && !state.is_awaited(*ticket, *episode)
        {
            self.unclaimed.pop_first();
        }
        if self.unclaimed.is_empty() && self.over.is_empty() {
            state.patience.leave(&self.watch);
            self.is_watchman = false;
            return false;
        }
        // Those of our own task.
        while let Some((ticket, since)) = self.ours.front() {
            let (awaited, polls) = (self.unclaimed.get(ticket), self.polls - since);
            if awaited.is_some_and(|episode| state.is_awaited(*ticket, *episode)) {
                if !state.is_certain(*ticket, cx.waker(), u64::MAX) {
                    // It moved to another task, and has its time.
                } else if state.is_certain(*ticket, cx.waker(), polls) {
                    self.over.push(*ticket);
                } else {
                    break;
                }
            }
            self.ours.pop_front();
        }
        // And those that had their time, if it is for us to look. Once in a poll, so that others
        // have a turn in between.
        let shown = clock.take();
        self.is_watchman = state.patience.is_watchman(&mut self.watch);
        if let (Some(now), true) = (shown, self.is_watchman) {
            self.over.extend(state.patience.look(now));
            self.shown = now;
        }
        let any = !self.over.is_empty();
        for ticket in self.over.drain(self.over.len().saturating_sub(AT_ONCE)..) {
            if state.lapse(ticket, self.shown, outbox) {
                *lapses += 1;
                // Passes that were never polled may be left.
                self.backlog.push(ticket);
            }
        }
        any
    }

    /// Takes the future out of everything that knows it. Under the lock.
    pub(super) fn leave(&mut self, state: &mut State, outbox: &mut Outbox) {
        if let Some(key) = self.waiter.take() {
            state.remove_waiter(key);
        }
        if let Some(key) = self.drain.take() {
            // We have the bell, too: this is not its last.
            state.drains.remove(key);
        }
        for (ticket, episode) in core::mem::take(&mut self.unclaimed) {
            state.await_claim_no_more(ticket, episode);
        }
        state.patience.leave(&self.watch);
        self.is_watchman = false;
        wake_resting(state, outbox);
    }

    /// The same for a future that is dropped.
    pub(super) fn give_up(&mut self, shared: &Shared) {
        if self.waiter.is_some()
            || self.drain.is_some()
            || !self.unclaimed.is_empty()
            || self.is_watchman
        {
            shared.with(|state, outbox| self.leave(state, outbox));
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use crate::{
        AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
    };
    use alloc::boxed::Box;
    use core::task::{Context, Poll, Waker};
    use std::sync::{Arc, Mutex};
    use std::vec::Vec;

    /// Passes that wait: `None` once they are done.
    #[derive(Clone)]
    struct Fence(Arc<Mutex<Option<Vec<Waker>>>>);

    impl IntervalNotifier for Fence {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            let fence = self.clone();
            Ok(Some(PassFuture::new(core::future::poll_fn(move |cx| {
                match &mut *fence.0.lock().unwrap() {
                    Some(waiting) => {
                        waiting.push(cx.waker().clone());
                        Poll::Pending
                    }
                    None => Poll::Ready(()),
                }
            }))))
        }
    }

    #[test]
    fn c3_a_reader_that_was_told_of_more_than_it_can_note_looks_at_all() {
        let (space, fence) = (AddressSpace::new(), Fence(Arc::default()));
        let subscription = space.insert(AddressRange::ALL, fence.clone()).unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let start = || Box::pin(space.invalidate(AddressRange::ALL, Event::Unmap));
        let Poll::Ready(guard) = start().as_mut().poll(&mut cx) else {
            panic!("its pass is done at once")
        };
        let mut reader = Box::pin(subscription.read_begin());
        assert!(reader.as_mut().poll(&mut cx).is_pending());
        *fence.0.lock().unwrap() = Some(Vec::new());
        for _ in 0..100 {
            assert!(start().as_mut().poll(&mut cx).is_pending());
        }
        let waiting = fence.0.lock().unwrap().take();
        waiting.into_iter().flatten().for_each(Waker::wake);
        drop(guard);
        assert!(reader.as_mut().poll(&mut cx).is_ready(), "it has driven all of them");
    }
}

/// Wakes those who let us go first.
fn wake_resting(state: &mut State, outbox: &mut Outbox) {
    for bell in state.patience.take_resting() {
        outbox.contents().tasks.extend(bell.ring(None));
        // Outside of the lock, should it be the last one.
        outbox.contents().bells.push(bell);
    }
}
