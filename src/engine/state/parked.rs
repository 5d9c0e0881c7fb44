//! Parked invalidations: their passes are pending and belong to the space (C2).
#![forbid(unsafe_code)]

use super::{Claim, Next, Parking, Stage, State, Ticket};
use crate::engine::outbox::Outbox;
use crate::engine::work::{Progress, Unpolled, Work};
use crate::entry::EntryRef;
use crate::foreign::TaskWaker;
use crate::index::{IntervalIndex, Numbered, Ranged};
use crate::notifier::Request;
use crate::protocol::Id;
use crate::sync::Arc;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::time::Duration;

/// The index of parked invalidations keeps its memory if it never held more than this many.
const MOST_IDLE: usize = 256;

/// An invalidation that was handed to the space.
pub(crate) struct Parked {
    pub(crate) ticket: Ticket,
    /// The caller has to look at once: the passes are done, or one of them was woken.
    pub(crate) ready: bool,
    /// The request, without its ranges if there are many. A first poll that took the quick way has
    /// not kept its own.
    pub(crate) request: Request<'static>,
}

/// What a future finds of the invalidation that it parked. The state gives the work out as a
/// [`Claimed`] or a box; the future's own look puts each into the hands of a guard.
pub(crate) enum Look<C, L> {
    /// The joined passes are done. The work is the caller's again.
    Claimed(C),
    /// Passes are pending. The work is out of the state, to be polled.
    Leased(L),
    /// Another future polls the passes at this moment.
    Busy,
    /// The invalidation was ended because its future was not polled (C4).
    Lapsed,
}

/// The work of an invalidation that its caller has claimed.
pub(crate) struct Claimed {
    /// The id in its present place.
    pub(crate) id: Id,
    pub(crate) work: Box<Work>,
    /// The hit whose first pass is called next, if the budget interrupted the first passes (B4).
    pub(crate) resume_at: Option<u32>,
    pub(crate) sequence: u64,
}

/// What a waiting future finds of an invalidation that may hold it up.
pub(crate) enum Help {
    /// The invalidation is over, or the future does not wait for it.
    Gone,
    /// The passes are done, and the invalidation's own future has to claim it.
    Unclaimed,
    /// Passes are pending. The work is out of the state, to be polled.
    Leased(Box<Work>),
    /// Another future polls the passes at this moment.
    Busy,
}

impl State {
    /// Returns the parking of an invalidation that is parked.
    pub(crate) fn parking(&self, ticket: Ticket) -> Option<&Parking> {
        self.protocol.get(ticket)?.extra.parked()
    }

    pub(super) fn parking_mut(&mut self, ticket: Ticket) -> Option<&mut Parking> {
        self.protocol.get_mut(ticket)?.extra.parked_mut()
    }

    /// Hands an invalidation whose passes are pending to the space. Its caller waits as `task`, if
    /// there is one.
    pub(crate) fn park(
        &mut self,
        id: Id,
        mut work: Box<Work>,
        lapses: u32,
        task: Option<Arc<TaskWaker>>,
        now: Option<Duration>,
        outbox: &mut Outbox,
    ) -> Parked {
        let Some(active) = self.protocol.active_mut().get_mut(id) else {
            unreachable!("an invalidation in its first passes is active");
        };
        active.since_or(now);
        work.timed = true;
        let (range, ticket) = (active.range, id);
        let request =
            Request { range, owner: active.extra.owner, terms: active.extra.terms, parts: None };
        // A future that sleeps because of this invalidation can now help with it (C3).
        let sleeps = |entry: &EntryRef| entry.first_waiter().is_some();
        let asleep: Vec<EntryRef> =
            work.hits.iter().copied().chain(active.newcomers()).filter(sleeps).collect();
        active.extra.calls = false;
        let wakers = work.passes().wakers().clone();
        let parking = match &mut active.extra.parking {
            Some(parking) => {
                // Drops no last reference under the lock: `work` has the old set, too.
                parking.wakers = wakers;
                parking
            }
            none => none.insert(Box::new(Parking::new(wakers))),
        };
        work.passes().list(&mut parking.pending);
        let claim = Claim { resume_at: work.deferred_at.take(), lapses };
        let behind = work.passes().is_behind(self.fences);
        parking.stage.park(work, claim);
        // If a notifier was fenced since, some of the passes may be over.
        let mut ready = parking.note_done(now) || behind;
        if let Some(task) = task {
            let (old, woken) = parking.wakers.await_as_owner(task);
            ready |= woken;
            outbox.contents().unused.extend(old);
        }
        self.parked_ever += 1;
        parking.number = self.parked_ever;
        let numbered = Numbered { number: parking.number, value: ticket };
        self.parked.insert(Ranged { range, value: numbered });
        self.most_parked = self.most_parked.max(self.parked.len());
        for entry in asleep {
            self.nudge(entry, Some(ticket), outbox);
        }
        self.nudge_drains(ticket, outbox);
        Parked { ticket, ready, request }
    }

    /// Wakes all futures that an invalidation holds up: there is something to help with.
    fn nudge_all(&mut self, ticket: Ticket, outbox: &mut Outbox) {
        let Some(active) = self.protocol.get(ticket) else { return };
        let Some(parking) = active.extra.parked() else { return };
        let hits = parking.stage.work().map_or(&[][..], |work| &work.hits);
        let sleeps = |entry: &EntryRef| entry.first_waiter().is_some();
        let asleep: Vec<EntryRef> =
            hits.iter().copied().chain(active.newcomers()).filter(sleeps).collect();
        outbox.contents().sets.push(parking.wakers.clone());
        for entry in asleep {
            self.nudge(entry, Some(ticket), outbox);
        }
        self.nudge_drains(ticket, outbox);
    }

    fn nudge_drains(&self, ticket: Ticket, outbox: &mut Outbox) {
        for (_, bell) in &self.drains {
            outbox.contents().tasks.extend(bell.ring(Some(ticket)));
        }
    }

    /// Takes an invalidation out of the parked ones, so that no waiting future finds it.
    fn unpark(&mut self, ticket: Ticket, outbox: &mut Outbox) {
        let Some(active) = self.protocol.get_mut(ticket) else { return };
        let number = active.extra.parking.as_ref().map_or(0, |parking| parking.number);
        let numbered = Numbered { number, value: ticket };
        let found = self.parked.remove(Ranged { range: active.range, value: numbered });
        debug_assert!(found, "the index has each parked invalidation");
        if self.parked.len() == 0 && core::mem::take(&mut self.most_parked) > MOST_IDLE {
            self.parked = IntervalIndex::new();
        }
        let Some(parking) = active.extra.parking.as_deref_mut() else { return };
        parking.pending.clear();
        if let Some(owner) = parking.wakers.disown() {
            outbox.contents().unused.push(owner);
        }
        if parking.forget_awaited() {
            self.patience.end(ticket);
        }
    }

    /// Answers the caller of a parked invalidation. If the caller has to wait, it waits as `task`.
    pub(crate) fn look(
        &mut self,
        ticket: Ticket,
        task: &Arc<TaskWaker>,
        outbox: &mut Outbox,
    ) -> Look<Claimed, Box<Work>> {
        let Some(parking) =
            self.parking_mut(ticket).filter(|parking| !parking.stage.is_abandoned())
        else {
            return Look::Lapsed;
        };
        if let Some((mut work, claim)) = parking.stage.claim() {
            // Passes that wait for their first poll are the caller's again, too.
            work.passes().unlist();
            self.unpark(ticket, outbox);
            let id = self.protocol.active().located(ticket);
            let Some(active) = self.protocol.get_mut(id) else { unreachable!("it was parked") };
            // Its first passes may go on, and `remove` has to know. An invalidation that has a
            // place has a flag for that.
            active.extra.calls = !id.has_place() && claim.resume_at.is_some();
            let (resume_at, sequence) = (claim.resume_at, active.sequence);
            return Look::Claimed(Claimed { id, work, resume_at, sequence });
        }
        let (old, _) = parking.wakers.await_as_owner(task.clone());
        let leased = parking.stage.lease();
        outbox.contents().unused.extend(old);
        leased.map_or(Look::Busy, Look::Leased)
    }

    /// Answers a future that waits for an invalidation, if that is parked and `wanted`.
    pub(crate) fn help(&mut self, ticket: Ticket, wanted: impl Fn(&Parking, u64) -> bool) -> Help {
        let Some(parking) =
            self.parking_mut(ticket).filter(|parking| wanted(parking, ticket.serial()))
        else {
            return Help::Gone;
        };
        if parking.stage.unclaimed().is_some() {
            return Help::Unclaimed;
        }
        parking.stage.lease().map_or(Help::Busy, Help::Leased)
    }

    /// Takes the work back at the end of a lease. `now` is the time if the joined passes are done.
    /// Returns whether they are, and whether a notifier was fenced since they were looked at (L5).
    pub(crate) fn give_back(
        &mut self,
        ticket: Ticket,
        mut work: Box<Work>,
        progress: Progress,
        now: Option<Duration>,
        outbox: &mut Outbox,
    ) -> (bool, bool) {
        let mut quiet = Vec::new();
        let fences = self.fences;
        let Some(parking) = self.parking_mut(ticket) else {
            unreachable!(
                "an invalidation whose passes are being polled is neither claimed nor ended"
            );
        };
        work.passes().unlist_finished(&mut parking.pending, |entry| {
            if entry.first_waiter().is_some() {
                quiet.push(entry);
            }
        });
        let behind = work.passes().is_behind(fences);
        let next = parking.stage.give_back(work);
        let done = parking.note_done(now) || matches!(next, Next::End(_));
        // Not before others can take the passes again: see `WakerSet::end`.
        let woken = parking.wakers.end();
        // The waiting futures have something to do: claim, poll on, or wait for something else.
        if woken || progress != Progress::Waiting || matches!(next, Next::Drive) {
            outbox.contents().sets.push(parking.wakers.clone());
        }
        for entry in quiet {
            self.nudge(entry, None, outbox);
        }
        if let Next::End(work) = next {
            self.end_abandoned(ticket, work, now, outbox);
        }
        (done, behind)
    }

    /// Takes the passes of some notifiers that wait for their first poll out of an unclaimed
    /// invalidation (L5).
    pub(crate) fn cut_unclaimed(
        &mut self,
        ticket: Ticket,
        of: impl Fn(EntryRef) -> bool,
        outbox: &mut Outbox,
    ) -> Option<Unpolled> {
        let parking = self.parking_mut(ticket)?;
        let Stage::Unclaimed { work, .. } = &mut parking.stage else { return None };
        let (mut quiet, pending) = (Vec::new(), &mut parking.pending);
        let unpolled =
            work.passes().take_unpolled_of(of, |listed| quiet.extend(pending.remove(listed)));
        for entry in quiet {
            self.nudge(entry, None, outbox);
        }
        Some(unpolled)
    }

    /// Ends an abandoned invalidation all of whose passes are done.
    fn end_abandoned(
        &mut self,
        ticket: Ticket,
        mut work: Box<Work>,
        now: Option<Duration>,
        outbox: &mut Outbox,
    ) {
        self.unpark(ticket, outbox);
        let passes = work.passes();
        let (panic, trace) = (passes.panic.take(), core::mem::take(&mut passes.trace));
        outbox.contents().panics.push(panic);
        outbox.contents().traces.push(trace);
        self.end(ticket, Some(work), now, outbox);
    }

    /// Makes an invalidation end as soon as its passes are done, at once if they are. Nothing
    /// claims it any more.
    pub(super) fn end_when_done(
        &mut self,
        ticket: Ticket,
        now: Option<Duration>,
        outbox: &mut Outbox,
    ) {
        let Some(parking) = self.parking_mut(ticket) else { return };
        let next = parking.stage.abandon();
        outbox.contents().unused.extend(parking.wakers.disown());
        if parking.forget_awaited() {
            self.patience.end(ticket);
        }
        if matches!(next, Next::Drive) {
            // Futures that waited for the claim are not registered with its wakers.
            self.nudge_all(ticket, outbox);
        }
        if let Next::End(work) = next {
            self.end_abandoned(ticket, work, now, outbox);
        }
    }

    /// Abandons an invalidation for its caller (C2, B3), and counts that.
    pub(crate) fn abandon(&mut self, ticket: Ticket, now: Option<Duration>, outbox: &mut Outbox) {
        if self.parking(ticket).is_some_and(|parking| !parking.stage.is_abandoned()) {
            self.counts.abandoned += 1;
            self.end_when_done(ticket, now, outbox);
        }
    }
}
