//! The passes of an invalidation: each is polled once, in order, and joins the others if it stays
//! pending.
//!
//! `pass` has one pass, `join` polls those that stayed pending, `cut` drops those of fenced
//! notifiers.
#![forbid(unsafe_code)]

mod cut;
mod join;
mod pass;

pub(crate) use cut::Unpolled;
use join::Join;
pub(crate) use join::Progress;
use pass::{Finished, Pass, Slot};

use super::PendingNotifiers;
use crate::engine::host::Host;
use crate::engine::nesting::passes::Suspicion;
use crate::entry::EntryRef;
use crate::foreign::{Callback, FirstPanic, Losses, Panic, keep};
use crate::observe::{self, Moment, Trace};
use alloc::vec::Vec;
use core::task::Context;

/// The passes that the first passes returned, and the memory of earlier ones.
pub(crate) struct Passes {
    /// `slots[..started]` are passes that wait for their first poll, in order of their first
    /// passes. The others are records of earlier passes, whose memory is used again.
    slots: Vec<Pass>,
    started: usize,
    /// Empty slot into which the next first pass puts its pass.
    pub(super) next: Slot,
    /// Passes that are done and still listed as pending.
    finished: Vec<Finished>,
    /// The first panic of a first pass or of a pass (C5).
    pub(crate) panic: FirstPanic,
    pub(crate) trace: Trace,
    spare_slots: Vec<Slot>,
    join: Option<Join>,
    /// Number of joined passes that the gauge of the metrics does not count yet.
    untold: usize,
    /// How many notifiers had been fenced when these passes were last searched for theirs (L5).
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

/// Polls each pass from `at` on once, and empties the slots of those that are done. Counts the
/// others in `pend`. `at` moves behind a pass before it is polled, so it is right after a panic.
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
    /// Keeps the pass in `next` until all first passes have been called (O2). With `BUDGET`, there
    /// may be a pass budget.
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

    /// Keeps the pass in `next` if no record with an empty slot is left.
    #[cold]
    #[inline(never)]
    fn start_in_new_slot(&mut self, entry: EntryRef, budgeted: bool, began: Moment) {
        let spare = self.spare_slots.pop().unwrap_or_else(Slot::empty);
        let slot = core::mem::replace(&mut self.next, spare);
        let pass = Pass {
            future: Some(slot),
            entry,
            listed: None,
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

    /// Returns how many passes wait for their first poll.
    #[inline]
    pub(crate) fn started(&self) -> usize {
        self.started
    }

    /// Polls each started pass from `from` on once, in order (O3). A pass that stays pending goes
    /// into the join. Returns whether none does and none panicked.
    #[inline(never)]
    pub(crate) fn first_polls(&mut self, host: &Host, from: usize) -> bool {
        self.first_polls_of(host, from, self.started)
    }

    /// Polls the only started pass once: [`first_polls`](Self::first_polls) without a loop.
    #[inline(never)]
    pub(crate) fn first_poll(&mut self, host: &Host) -> bool {
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

    /// Finishes the first polls. Those before `at` were `polled`, and one of them is pending,
    /// panicked, or has a place in the budget.
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
            // The pass is still there if its poll panicked. Its slot is not used again, because its
            // drop may have panicked.
            let mut slot = to_poll.get_mut(at - 1).and_then(|pass| pass.future.take());
            if let Some(Err(in_drop)) = slot.as_mut().map(Slot::clear) {
                first.note(&host.losses, Callback::Pass, in_drop);
            }
            let _entered = trace.enter();
            polled = keep(|_| poll_from(to_poll, &mut at, &mut 0, trace, &host.losses, &mut cx));
        }
        // A wake-up before this push is not lost: the join polls a new pass in any case.
        for record in &mut slots[from..*started] {
            if record.future.as_ref().is_some_and(Slot::is_some) {
                join.running.push(record.move_out());
                observe::pass_pends(&host.losses);
            } else if record.budgeted {
                host.give_permit_back();
            }
        }
    }

    /// Lists each pass that is in the join or waits for its first poll as pending.
    pub(crate) fn list(&mut self, pending: &mut PendingNotifiers) {
        let running = self.join.iter_mut().flat_map(|join| join.running.iter_mut());
        for pass in self.slots[..self.started].iter_mut().chain(running) {
            if pass.listed.is_none() && pass.future.is_some() {
                pass.listed = Some(pending.add(pass.entry));
            }
        }
    }

    /// Forgets the keys of the passes that wait for their first poll.
    pub(crate) fn unlist(&mut self) {
        for pass in &mut self.slots[..self.started] {
            pass.listed = None;
        }
    }

    /// Takes the passes that are done off the list. `quiet` gets each notifier that has no other
    /// pass there.
    pub(crate) fn unlist_finished(
        &mut self,
        pending: &mut PendingNotifiers,
        mut quiet: impl FnMut(EntryRef),
    ) {
        for done in self.finished.drain(..) {
            if let Some(key) = done.listed
                && let Some(entry) = pending.remove(key)
            {
                debug_assert!(entry == done.entry);
                quiet(entry);
            }
        }
    }

    /// Drops all passes that are not done. `panicked` gets each panic of that. For the drop of the
    /// space.
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
