//! The wait for invalidations that other tasks started. Readers, removers and `drain` share it.
//!
//! A waiting future helps: it polls the passes that it waits for (C3), and lets an invalidation
//! lapse whose future is not polled (C4). The cost of a poll depends on what has changed since the
//! last one, not on how many invalidations are waited for: the future's [`Bell`] says at which of
//! them it has to look again.
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

/// At most this many invalidations lapse under one lock.
const AT_ONCE: usize = 64;

/// The state of a waiting future.
#[derive(Default)]
pub(super) struct Wait {
    /// Our key in the list of those that wait for the notifier.
    waiter: Option<usize>,
    /// Our key among those that wait for the whole space.
    drain: Option<usize>,
    bell: Arc<Bell>,
    task: Option<Arc<TaskWaker>>,
    /// All parked invalidations have been looked at once. The bell says at which to look again.
    scanned: bool,
    /// Invalidations at which to look.
    backlog: Vec<Ticket>,
    /// Invalidations whose passes hold us up. The registration wakes us when a pass can go on.
    pending: BTreeMap<Ticket, Registration>,
    /// Invalidations whose passes are done and that their futures have not claimed, with the
    /// episode that is waited for.
    unclaimed: BTreeMap<Ticket, u32>,
    /// Invalidations to lapse, [`AT_ONCE`] under each lock. Other tasks may wait for them, too.
    over: Vec<Ticket>,
    /// The time at our last look at the clock.
    shown: Option<Duration>,
    /// The invalidations of `unclaimed` whose future was last polled with the same waker as this
    /// one, oldest first, each with the value of `polls` when it was found.
    ours: VecDeque<(Ticket, u64)>,
    polls: u64,
    watch: Watch,
    is_watchman: bool,
}

/// Whether a wait is over.
pub(super) enum Verdict {
    /// It is over.
    Over,
    /// A first pass runs on another thread. It wakes no one when it returns.
    Soon,
    /// It goes on, and the future will be woken.
    Wait,
}

/// The thing that a future waits for.
pub(super) trait Goal {
    /// Returns the notifier among whose waiters the future queues, and for what. `None` if it waits
    /// for the whole space.
    fn queue(&self) -> Option<(EntryRef, WaitFor)>;
    /// Decides under the lock whether the wait is over. `fired`: the moment has come that the
    /// future is queued for. `held_up`: there are invalidations that it wants to help with.
    fn look(&mut self, state: &State, fired: bool, held_up: bool) -> Verdict;
    /// Returns whether the future waits for the passes of an invalidation.
    fn wants(&self, parking: &Parking, serial: u64) -> bool;
}

/// The result of a look under the lock: what the future does next.
enum Step<'s> {
    /// The wait is over.
    Over,
    /// It polls passes that hold it up.
    Drive(Ticket, Lease<'s>),
    /// It looks again, because an invalidation has lapsed.
    Again,
    /// It waits.
    Wait(WaitMode),
}

/// How a future waits.
enum WaitMode {
    /// It will be woken.
    Sleep,
    /// It wakes itself.
    Yield,
    /// It lets other futures that yield go first. The next of them wakes it.
    Rest,
}

impl Wait {
    /// Polls a wait: checks whether it is over, queues the future, and polls the passes that hold
    /// it up.
    pub(super) fn poll(
        &mut self,
        shared: &Shared,
        goal: &mut impl Goal,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        // Before the lock, because the clone of a waker and a clock are foreign code.
        let task = TaskWaker::renew(&mut self.task, cx.waker(), &shared.host.losses);
        let mut look = self.is_watchman.then(|| shared.host.now());
        self.polls += 1;
        let mut first = true;
        // A future that sees this count above 0 may rest: we are about to lock, and wake it then.
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
                        // The invalidation is unclaimed now, or over.
                        self.backlog.push(ticket);
                    }
                }
                Step::Again => {}
                Step::Wait(mode) => {
                    match mode {
                        WaitMode::Sleep => {}
                        WaitMode::Rest => give_turn(),
                        WaitMode::Yield => {
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

    /// Takes from the bell at which invalidations to look.
    fn hear(&mut self, state: &State, goal: &impl Goal) {
        let rung = self.bell.take_rung();
        if let (true, Some(rung)) = (self.scanned, rung) {
            self.backlog.extend(rung);
            return;
        }
        self.scanned = true;
        self.scan(state, goal);
        // Also at those that are not parked any more: they are over.
        self.backlog.extend(self.pending.keys().chain(self.unclaimed.keys()));
    }

    /// Notes all parked invalidations that overlap.
    fn scan(&mut self, state: &State, goal: &impl Goal) {
        let range = goal.queue().map_or(AddressRange::ALL, |(entry, _)| entry.range);
        let backlog = &mut self.backlog;
        backlog.clear();
        state.parked.overlapping(range, |parked| {
            // Not if the range lies in a gap of theirs (L2).
            let ticket = parked.value.value;
            if state.protocol.active().overlaps(ticket, range) {
                backlog.push(ticket);
            }
        });
    }

    /// Looks once, under the lock.
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
                Verdict::Over => {
                    // All that the bell has told of is over. There may be others by now. Who waits
                    // for a notifier gets here if a first pass, which holds no lock, has set its
                    // sequence or ended since the look above.
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
            return Step::Wait(WaitMode::Yield);
        }
        if self.unclaimed.is_empty() {
            return Step::Wait(WaitMode::Sleep);
        }
        let others = shared.host.coming.load(Ordering::Acquire) > 0;
        let wakes_itself = state.patience.wakes_itself(&mut self.watch, others, &self.bell);
        Step::Wait(if wakes_itself { WaitMode::Yield } else { WaitMode::Rest })
    }

    /// Looks at the invalidations of the backlog, up to the first whose passes are to be polled.
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

    /// Notes that we wait until an invalidation is claimed.
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

    /// Lets the invalidations lapse whose time is over (C4). Returns whether there were any.
    fn lose_patience(
        &mut self,
        state: &mut State,
        cx: &Context<'_>,
        clock: &mut Option<Option<Duration>>,
        outbox: &mut Outbox,
        lapses: &mut u64,
    ) -> bool {
        // Invalidations that were claimed meanwhile.
        while let Some((ticket, episode)) = self.unclaimed.first_key_value()
            && !state.is_awaited(*ticket, *episode)
        {
            self.unclaimed.pop_first();
        }
        if self.unclaimed.is_empty() && self.over.is_empty() {
            state.patience.give_watch_up(&self.watch);
            self.is_watchman = false;
            return false;
        }
        // Invalidations of our own task.
        while let Some((ticket, since)) = self.ours.front() {
            let (awaited, polls) = (self.unclaimed.get(ticket), self.polls - since);
            if awaited.is_some_and(|episode| state.is_awaited(*ticket, *episode)) {
                if !state.is_certain(*ticket, cx.waker(), u64::MAX) {
                    // The future moved to another task, and time decides.
                } else if state.is_certain(*ticket, cx.waker(), polls) {
                    self.over.push(*ticket);
                } else {
                    break;
                }
            }
            self.ours.pop_front();
        }
        // Invalidations whose time is over, if we are the watchman. Once in a poll, so that other
        // tasks have a turn in between.
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
                // It may have passes that were never polled.
                self.backlog.push(ticket);
            }
        }
        any
    }

    /// Takes the future out of all lists. Under the lock.
    pub(super) fn leave(&mut self, state: &mut State, outbox: &mut Outbox) {
        if let Some(key) = self.waiter.take() {
            state.remove_waiter(key);
        }
        if let Some(key) = self.drain.take() {
            // We have the bell, too, so this does not drop the last reference.
            state.drains.remove(key);
        }
        for (ticket, episode) in core::mem::take(&mut self.unclaimed) {
            state.await_claim_no_more(ticket, episode);
        }
        state.patience.give_watch_up(&self.watch);
        self.is_watchman = false;
        wake_resting(state, outbox);
    }

    /// Takes a future that is dropped out of all lists.
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

/// Wakes the futures that rest.
fn wake_resting(state: &mut State, outbox: &mut Outbox) {
    for bell in state.patience.take_resting() {
        outbox.contents().tasks.extend(bell.ring(None));
        // Dropped outside of the lock, because it may be the last reference.
        outbox.contents().bells.push(bell);
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

    /// The wakers of passes that wait; `None` once the passes are done.
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
