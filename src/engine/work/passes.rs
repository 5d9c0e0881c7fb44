//! What the first passes left to be waited for: first polls in order, then the join.
#![forbid(unsafe_code)]

mod cut;

pub(crate) use cut::Unpolled;

use super::{PendingNotifiers, UNLISTED};
use crate::engine::host::Host;
use crate::engine::nesting::passes::Suspicion;
use crate::engine::wakers::WakerSet;
use crate::entry::EntryRef;
use crate::foreign::{Callback, FirstPanic, Losses, Panic, keep};
use crate::observe::{self, Moment, Trace};
use crate::pass::PassFuture;
use crate::sync::{Arc, Ordering};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use futures::stream::{FuturesUnordered, StreamExt};

/// How often passes that wake themselves are polled before the executor gets its turn again.
const ROUNDS: usize = 4;
/// Passes that may finish in one poll before the executor gets its turn again.
const FINISHED_AT_ONCE: usize = 256;

/// Where a pass future lies from its first poll to its end. Boxed so that it need not move when it
/// goes from the first poll to the join, and used again, so that a pass that is ready at its first
/// poll allocates nothing.
pub(crate) struct Slot(Pin<Box<Option<PassFuture>>>);

impl Slot {
    fn empty() -> Self {
        Self(Box::pin(None))
    }

    #[inline(always)]
    pub(super) fn as_mut(&mut self) -> Pin<&mut Option<PassFuture>> {
        self.0.as_mut()
    }

    fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// Drops what is there. After a panic of that the slot must not be used again.
    fn clear(&mut self) -> Result<(), Panic> {
        keep(|_| self.0.as_mut().set(None))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Mostly empty. Otherwise the pass goes unfinished, with the space; `Passes::discard` has
        // told of its panic.
        if self.is_some() {
            let _ = self.clear();
        }
    }
}

/// What the first passes left to be waited for.
pub(crate) struct Passes {
    /// `slots[..started]` are passes that no one has polled yet, in order of their first passes;
    /// those behind are records of earlier passes, whose memory is used again.
    slots: Vec<Pass>,
    started: usize,
    /// Where the next first pass puts what it leaves.
    pub(super) next: Slot,
    /// Passes that are done and of which nobody has been told yet.
    finished: Vec<Finished>,
    /// The first panic of a first pass or of a pass (C5).
    pub(crate) panic: FirstPanic,
    pub(crate) trace: Trace,
    spare_slots: Vec<Slot>,
    join: Option<Join>,
    /// Passes in the join of which no recorder of metrics has been told.
    untold: usize,
    /// As many notifiers had been fenced when these passes were looked at for that (L5).
    fences: u64,
}

impl Default for Passes {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            started: 0,
            next: Slot::empty(),
            finished: Vec::new(),
            panic: FirstPanic::default(),
            trace: Default::default(),
            spare_slots: Vec::new(),
            join: None,
            untold: 0,
            fences: 0,
        }
    }
}

/// The passes that stayed pending at their first poll.
struct Join {
    running: FuturesUnordered<Pass>,
    /// As many of them are over and only still there (L5).
    shells: usize,
    wakers: Arc<WakerSet>,
    /// `wakers` as a waker.
    waker: Waker,
}

/// A pass, its notifier, and what is given back when it is done.
struct Pass {
    future: Option<Slot>,
    entry: EntryRef,
    /// Its key among those that are listed as pending, or [`UNLISTED`].
    listed: usize,
    /// It counts against the pass budget (B4).
    budgeted: bool,
    /// Its first pass was called then.
    began: Moment,
    /// C7.
    suspicion: Suspicion,
}

impl Pass {
    /// The pass itself; what stays is a record without a slot, that nobody lists.
    fn move_out(&mut self) -> Self {
        let listed = core::mem::replace(&mut self.listed, UNLISTED);
        Self { future: self.future.take(), listed, suspicion: Suspicion::none(), ..*self }
    }
}

/// A pass that is done.
struct Finished {
    entry: EntryRef,
    listed: usize,
    budgeted: bool,
}

/// How a poll of the joined passes ended.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Progress {
    /// It has not: something unwound.
    Interrupted,
    AllFinished,
    /// None of the rest is ready to go on.
    Waiting,
    /// Some of the rest are ready to go on; the caller stopped to let others run.
    Yielded,
}

/// What the poll of a pass that is done leaves.
struct Outcome {
    /// `None` for one that was over before (L5).
    finished: Option<Finished>,
    began: Moment,
    slot: Option<Slot>,
    panic: Option<Panic>,
}

impl Future for Pass {
    type Output = Outcome;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let this = &mut *self;
        let Some(slot) = &mut this.future else {
            return Poll::Ready(Outcome {
                finished: None,
                began: this.began,
                slot: None,
                panic: None,
            });
        };
        let polled = this.suspicion.poll(this.entry, cx, |cx| {
            keep(|_| match slot.as_mut().as_pin_mut() {
                Some(future) => future.poll(cx),
                None => Poll::Ready(()),
            })
        });
        let mut panic = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(())) => None,
            Err(panic) => Some(panic),
        };
        if let Err(in_drop) = slot.clear() {
            panic = panic.or(Some(in_drop));
        }
        let slot = this.future.take().filter(|_| panic.is_none());
        let finished = Finished { entry: this.entry, listed: this.listed, budgeted: this.budgeted };
        Poll::Ready(Outcome { finished: Some(finished), began: this.began, slot, panic })
    }
}

/// Polls passes from `at` on, once each, and empties the slots of those that are done. `at` moves
/// behind a pass before it is polled. `pend` counts the others.
#[inline]
fn poll_from(
    started: &mut [Pass],
    at: &mut usize,
    pend: &mut usize,
    trace: &Trace,
    losses: &Losses,
    cx: &mut Context<'_>,
) {
    while let Some(pass) = started.get_mut(*at) {
        *at += 1;
        if let Some(slot) = &mut pass.future
            && let Some(future) = slot.as_mut().as_pin_mut()
        {
            if Suspicion::first_poll(pass.entry, cx, |cx| future.poll(cx)).is_ready() {
                slot.as_mut().set(None);
                trace.pass(losses, pass.entry, pass.began, false);
            } else {
                *pend += 1;
            }
        }
    }
}

impl Passes {
    /// Keeps what a first pass left in `next`, until all first passes have been called (O2).
    /// `BUDGET`: there may be a pass budget.
    #[inline(always)]
    pub(super) fn start_pass<const BUDGET: bool>(
        &mut self,
        entry: EntryRef,
        budgeted: bool,
        began: Moment,
    ) {
        if let Some(record) = self.slots.get_mut(self.started)
            && let Some(spare) = &mut record.future
        {
            core::mem::swap(spare, &mut self.next);
            (record.entry, record.began) = (entry, began);
            if BUDGET {
                record.budgeted = budgeted;
            }
            self.started += 1;
        } else {
            self.start_in_new_slot(entry, budgeted, began);
        }
    }

    /// Slow form of [`start_pass`](Self::start_pass), for a pass that finds no record with a slot.
    #[cold]
    #[inline(never)]
    fn start_in_new_slot(&mut self, entry: EntryRef, budgeted: bool, began: Moment) {
        let spare = self.spare_slots.pop().unwrap_or_else(Slot::empty);
        let slot = core::mem::replace(&mut self.next, spare);
        let pass = Pass {
            future: Some(slot),
            entry,
            listed: UNLISTED,
            budgeted,
            began,
            suspicion: Suspicion::none(),
        };
        match self.slots.get_mut(self.started) {
            Some(record) => *record = pass,
            None => self.slots.push(pass),
        }
        self.started += 1;
    }

    /// How many passes no one has polled yet.
    #[inline]
    pub(crate) fn started(&self) -> usize {
        self.started
    }

    #[inline(always)]
    fn join(&mut self) -> &mut Join {
        if self.join.is_none() {
            self.make_join();
        }
        let Some(join) = &mut self.join else { unreachable!("there is one now") };
        join
    }

    #[cold]
    #[inline(never)]
    fn make_join(&mut self) {
        let wakers = Arc::new(WakerSet::default());
        self.join = Some(Join {
            running: FuturesUnordered::new(),
            shells: 0,
            waker: Waker::from(wakers.clone()),
            wakers,
        });
    }

    /// Who is woken when a pass can go on.
    pub(crate) fn wakers(&mut self) -> &Arc<WakerSet> {
        &self.join().wakers
    }

    /// Passes that were polled and are not done.
    pub(crate) fn running(&self) -> usize {
        self.join.as_ref().map_or(0, |join| join.running.len() - join.shells)
    }

    /// Polls each started pass from `from` on once, in order (O3). What stays pending goes into the
    /// join; most passes of fast devices never get there. Returns whether none does, and none
    /// panicked.
    #[inline(never)]
    pub(super) fn first_polls(&mut self, host: &Host, from: usize) -> bool {
        self.first_polls_of(host, from, self.started)
    }

    /// The first poll of the only pass: without a loop.
    #[inline(never)]
    pub(super) fn first_poll(&mut self, host: &Host) -> bool {
        self.first_polls_of(host, 0, 1)
    }

    #[inline(always)]
    fn first_polls_of(&mut self, host: &Host, from: usize, end: usize) -> bool {
        self.join();
        let Self { slots, join: Some(join), trace, .. } = self else { return false };
        let mut cx = Context::from_waker(&join.waker);
        let (mut at, mut pend) = (from, 0);
        let to_poll = &mut slots[..end];
        let polled = {
            let _entered = trace.enter();
            keep(|_| poll_from(to_poll, &mut at, &mut pend, trace, &host.losses, &mut cx))
        };
        let plain = polled.is_ok() && pend == 0;
        if !plain || host.budget.is_some() {
            self.more_first_polls(host, from, at, polled);
        }
        self.started = from;
        plain
    }

    /// The rest of the first polls, when those before `at` were `polled` and something is left to
    /// do.
    #[cold]
    #[inline(never)]
    fn more_first_polls(
        &mut self,
        host: &Host,
        from: usize,
        mut at: usize,
        mut polled: Result<(), Panic>,
    ) {
        let Self { slots, started, join: Some(join), panic: first, trace, .. } = self else {
            return;
        };
        let mut cx = Context::from_waker(&join.waker);
        let to_poll = &mut slots[..*started];
        // After a panic the polls go on behind the pass that panicked (C5).
        while let Err(panic) = polled {
            first.note(&host.losses, Callback::Pass, panic);
            // It need not be empty: its poll panicked. And its slot is not used again: its drop may
            // have.
            let mut slot = to_poll.get_mut(at - 1).and_then(|pass| pass.future.take());
            if let Some(Err(in_drop)) = slot.as_mut().map(Slot::clear) {
                first.note(&host.losses, Callback::Pass, in_drop);
            }
            let _entered = trace.enter();
            polled = keep(|_| poll_from(to_poll, &mut at, &mut 0, trace, &host.losses, &mut cx));
        }
        // A wake-up meanwhile is not lost: the join polls what it has just been given in any case.
        for record in &mut slots[from..*started] {
            if record.future.as_ref().is_some_and(Slot::is_some) {
                join.running.push(record.move_out());
                observe::pass_pends(&host.losses);
            } else if record.budgeted {
                host.give_permit_back();
            }
        }
    }

    /// Puts all passes that wait for their first poll into the join: nobody will call further first
    /// passes. Under the lock.
    pub(super) fn join_started(&mut self) {
        self.join();
        let Self { slots, started, join: Some(join), untold, .. } = self else { return };
        *untold += *started;
        for record in &mut slots[..core::mem::take(started)] {
            join.running.push(record.move_out());
        }
    }

    /// Lists each pass that is in the join, and each one that is not polled yet, as pending.
    pub(crate) fn list(&mut self, pending: &mut PendingNotifiers) {
        let running = self.join.iter_mut().flat_map(|join| join.running.iter_mut());
        for pass in self.slots[..self.started].iter_mut().chain(running) {
            if pass.listed == UNLISTED && pass.future.is_some() {
                pass.listed = pending.add(pass.entry);
            }
        }
    }

    /// The passes that wait for their first poll are listed no more.
    pub(crate) fn unlist(&mut self) {
        for pass in &mut self.slots[..self.started] {
            pass.listed = UNLISTED;
        }
    }

    /// Takes what is done off the list. `quiet` gets each notifier that waits for no other pass.
    pub(crate) fn settle(
        &mut self,
        pending: &mut PendingNotifiers,
        mut quiet: impl FnMut(EntryRef),
    ) {
        for done in self.finished.drain(..) {
            if done.listed != UNLISTED
                && let Some(entry) = pending.remove(done.listed)
            {
                debug_assert!(entry == done.entry);
                quiet(entry);
            }
        }
    }

    /// Polls the joined passes of an invalidation that is not parked, as long as one of them is
    /// ready to go on, but no more than `idle` times without one that finishes. If some of the
    /// rest could go on, [`WakerSet::await_as_owner`] says so.
    pub(crate) fn drive_alone(&mut self, host: &Host, idle: usize) {
        let mut left = idle;
        loop {
            let progress = self.drive(host);
            let woken = self.wakers().end();
            if !self.finished.is_empty() {
                left = idle;
            }
            self.finished.clear();
            left -= 1;
            let behind = self.is_behind(host.fences.load(Ordering::Relaxed));
            let goes_on =
                progress == Progress::Yielded || (woken && progress == Progress::Waiting) || behind;
            if !goes_on || left == 0 {
                return;
            }
        }
    }

    /// Polls the joined passes as far as they go, within bounds.
    ///
    /// From here until [`WakerSet::end`], wake-ups are only noted. Call that when the passes are
    /// where others can take them: a waiter that was woken earlier would find nothing to poll,
    /// and the wake-up would be lost.
    pub(crate) fn drive(&mut self, host: &Host) -> Progress {
        self.cut(host);
        let progress = self.drive_joined(host);
        self.tidy();
        // Also if those that were left have been cut.
        if self.running() == 0 { Progress::AllFinished } else { progress }
    }

    fn drive_joined(&mut self, host: &Host) -> Progress {
        let Some(join) = &mut self.join else {
            return Progress::AllFinished;
        };
        let mut cx = Context::from_waker(&join.waker);
        let mut rounds = 0;
        let mut count = 0;
        join.wakers.begin();
        (0..core::mem::take(&mut self.untold)).for_each(|_| observe::pass_pends(&host.losses));
        let _entered = self.trace.enter();
        loop {
            match join.running.poll_next_unpin(&mut cx) {
                Poll::Ready(Some(Outcome { finished: None, .. })) => join.shells -= 1,
                Poll::Ready(Some(Outcome { finished: Some(finished), began, slot, panic })) => {
                    let (entry, panicked) = (finished.entry, panic.is_some());
                    if finished.budgeted {
                        host.give_permit_back();
                    }
                    // Before anybody is told.
                    self.finished.push(finished);
                    self.spare_slots.extend(slot);
                    if let Some(panic) = panic {
                        self.panic.note(&host.losses, Callback::Pass, panic);
                    }
                    observe::pass_pends_no_more(&host.losses);
                    self.trace.pass(&host.losses, entry, began, panicked);
                    count += 1;
                    if count < FINISHED_AT_ONCE {
                        continue;
                    }
                    if join.running.len() == join.shells {
                        return Progress::AllFinished;
                    }
                    // The join wakes nobody for what it has found ready already.
                    join.wakers.note_woken();
                    return Progress::Yielded;
                }
                Poll::Ready(None) => return Progress::AllFinished,
                Poll::Pending => {
                    rounds += 1;
                    if rounds == ROUNDS || !join.wakers.take_woken() {
                        return Progress::Waiting;
                    }
                }
            }
        }
    }

    /// The space goes: drops all passes that are not done, whatever that does. `panicked` gets each
    /// panic.
    pub(crate) fn discard(&mut self, losses: &Losses, mut panicked: impl FnMut(Panic)) {
        (self.untold..self.running()).for_each(|_| observe::pass_pends_no_more(losses));
        let running = self.join.iter_mut().flat_map(|join| join.running.iter_mut());
        let slots = self.slots.iter_mut().chain(running).filter_map(|pass| pass.future.as_mut());
        for slot in slots.filter(|slot| slot.is_some()) {
            if let Err(panic) = slot.clear() {
                panicked(panic);
            }
        }
    }
}
