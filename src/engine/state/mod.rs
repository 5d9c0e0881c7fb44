//! All that changes in a space, under its one lock.
//!
//! Nothing here calls foreign code or sees the [`Shared`](super::Shared) of the space: what is to
//! be done outside of the lock is put into an [`Outbox`], the time comes in as a value, and work
//! leaves only into the hands of a [`Lease`](super::lease::Lease) or a
//! [`Running`](super::running::Running), which bring it back.
#![forbid(unsafe_code)]

mod patience;
mod record;
mod stage;
mod waiters;

use crate::engine::outbox::Outbox;
use crate::engine::wakers::Bell;
use crate::engine::work::{Progress, Unpolled, Work};
use crate::entry::EntryRef;
use crate::foreign::TaskWaker;
use crate::index::{IntervalIndex, Ranged};
use crate::notifier::Request;
use crate::protocol::{Active, Id, Kept, Protocol};
use crate::sync::{Arc, Ordering};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::task::Waker;
use core::time::Duration;
pub(crate) use patience::{Patience, Watch};
pub(crate) use record::{Parking, Record, Ticket};
use slab::Slab;
pub(crate) use stage::{Claim, Load, Next, Stage};
use waiters::uncovered;
pub(crate) use waiters::{WaitFor, Waiter};

pub(crate) struct State {
    pub(crate) protocol: Protocol<EntryRef, Record>,
    /// Active invalidations that are parked, by range, so that those who wait find what they can
    /// help with.
    pub(crate) parked: IntervalIndex<Ranged<Ticket>>,
    /// As many as were parked at once since there were none.
    most_parked: usize,
    /// Bells of futures that wait for parked invalidations of the whole space, and are in no
    /// notifier's list.
    pub(crate) drains: Slab<Arc<Bell>>,
    pub(crate) waiters: Slab<Waiter>,
    pub(crate) patience: Patience,
    /// Readers that wait for the gate.
    #[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
    pub(crate) gated: Vec<Arc<TaskWaker>>,
    next_order: u64,
    pub(crate) released: bool,
    /// How many notifiers were fenced (L5).
    pub(crate) fences: u64,
    pub(crate) counts: Counts,
}

/// The memory of as many parked invalidations stays when none is left.
const MOST_IDLE: usize = 256;

/// What happened in a space.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) lapses: u64,
    /// The longest that an invalidation was active, of those that were timed.
    pub(crate) longest: Option<Duration>,
    pub(crate) abandoned: u64,
}

/// An invalidation that was handed to the space.
pub(crate) struct Parked {
    pub(crate) ticket: Ticket,
    /// There is something for the caller to do at once: the passes are done, or can go on.
    pub(crate) ready: bool,
    /// Without its ranges, if there are many: for whom the quick way has brought here.
    pub(crate) request: Request<'static>,
}

/// What the caller of a parked invalidation finds when it looks.
pub(crate) enum Look {
    /// The passes are done: the id, with what is known of its place, the work, from which hit the
    /// first passes go on, and the sequence.
    Claimed(Id, Box<Work>, Option<u32>, u64),
    /// The passes, to be polled.
    Leased(Box<Work>),
    /// Somebody polls them.
    Busy,
    /// It was ended on behalf of the caller (C4).
    Lapsed,
}

/// What a waiting future finds of an invalidation that may hold it up.
pub(crate) enum Help {
    /// Nothing: it is over, or does not matter.
    Gone,
    /// Its passes are done, and its future has to claim it.
    Unclaimed,
    /// Its passes, to be polled.
    Leased(Box<Work>),
    /// Somebody polls them.
    Busy,
}

impl State {
    pub(crate) fn new(sequence: u64, patience: Patience) -> Self {
        Self {
            protocol: Protocol::new(sequence),
            parked: IntervalIndex::new(),
            most_parked: 0,
            drains: Slab::new(),
            waiters: Slab::new(),
            patience,
            #[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
            gated: Vec::new(),
            next_order: 0,
            released: false,
            fences: 0,
            counts: Counts::default(),
        }
    }

    /// Puts a new entry into the index. Not built in: what drivers build in should be short.
    #[inline(never)]
    pub(crate) fn attach(&mut self, entry: EntryRef) {
        self.next_order += 1;
        entry.order.store(self.next_order, Ordering::Relaxed);
        self.protocol.insert(entry);
    }

    /// Takes a notifier out of the index and keeps calls that have not begun from beginning (L1).
    /// May be called again.
    pub(crate) fn close(&mut self, entry: EntryRef) {
        if !entry.own.is_closed() {
            entry.own.close();
            self.protocol.remove(entry);
        }
    }

    /// Notes that `entry` may have nothing that keeps it alive any more.
    pub(crate) fn reap(&mut self, entry: EntryRef, outbox: &mut Outbox) {
        if entry.unused() {
            outbox.contents().dead.push(entry);
        }
    }

    /// Ends an active invalidation (S3, C2) and wakes whoever waited for that. `now` if it was
    /// timed.
    pub(crate) fn end(
        &mut self,
        id: Id,
        mut work: Option<Box<Work>>,
        now: Option<Duration>,
        outbox: &mut Outbox,
    ) {
        if let Some(work) = &mut work {
            work.timed = false;
        }
        let hits = work.as_ref().map_or(&[][..], |work| &work.hits);
        if let Some(now) = now {
            self.lasted(id, hits, now);
        }
        let Self { protocol, waiters, .. } = self;
        match (protocol.end(id, hits, |entry| uncovered(waiters, entry, outbox)), work) {
            (Some(Kept::InPlace(record)), Some(work)) => record.recycle(work),
            (Some(Kept::InPlace(_)) | None, None) => {}
            (None, Some(work)) => outbox.contents().works.push(*work),
            (Some(Kept::Gone(record, set)), work) => {
                outbox.contents().ranges.extend(set);
                outbox.contents().records.push(record);
                outbox.contents().works.extend(work.map(|work| *work));
            }
        }
    }

    /// Second half of the quick end of an invalidation that has a place: wakes whoever waited, and
    /// keeps the memory.
    #[cold]
    pub(crate) fn tell(&mut self, id: Id, work: Box<Work>, outbox: &mut Outbox) {
        let Self { protocol, waiters, .. } = self;
        match protocol.tell(id, &work.hits, |entry| uncovered(waiters, entry, outbox)) {
            Some(record) => record.recycle(work),
            None => outbox.contents().works.push(*work),
        }
    }

    /// Notes how long an invalidation has been active.
    #[cold]
    fn lasted(&mut self, id: Id, hits: &[EntryRef], now: Duration) {
        if let Some(since) = self.protocol.active().get(id).and_then(Active::since) {
            let age = now.saturating_sub(since);
            self.counts.longest = self.counts.longest.max(Some(age));
            let micros = u32::try_from(age.as_micros()).unwrap_or(u32::MAX);
            hits.iter().for_each(|entry| entry.lasted(micros));
        }
    }

    /// The parking of a parked invalidation, with its range.
    pub(crate) fn parking(&self, ticket: Ticket) -> Option<&Parking> {
        self.protocol.get(ticket)?.extra.parked()
    }

    fn parking_mut(&mut self, ticket: Ticket) -> Option<&mut Parking> {
        self.protocol.get_mut(ticket)?.extra.parked_mut()
    }

    /// Hands an invalidation whose passes are pending to the space; its caller waits as `task`, if
    /// it has one.
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
        active.seen_to_last(now);
        work.timed = true;
        let (range, ticket) = (active.range, id);
        let request =
            Request { range, owner: active.extra.owner, terms: active.extra.terms, parts: None };
        // Whoever sleeps because of this invalidation can now help with it (C3).
        let sleeps = |entry: &EntryRef| entry.first_waiter().is_some();
        let asleep: Vec<EntryRef> =
            work.hits.iter().copied().chain(active.late()).filter(sleeps).collect();
        active.extra.calls = false;
        let wakers = work.passes().wakers().clone();
        let parking = match &mut active.extra.parking {
            Some(parking) => {
                // Not the last one: its work has it.
                parking.wakers = wakers;
                parking
            }
            none => none.insert(Box::new(Parking::new(wakers))),
        };
        work.passes().list(&mut parking.pending);
        let claim = Claim { resume_at: work.deferred_at.take(), lapses };
        let behind = work.passes().is_behind(self.fences);
        parking.stage.park(work, claim);
        // Then some of them may be over.
        let mut ready = parking.note_done(now) || behind;
        if let Some(task) = task {
            let (old, woken) = parking.wakers.await_as_owner(task);
            ready |= woken;
            outbox.contents().unused.extend(old);
        }
        self.parked.insert(Ranged { range, value: ticket });
        self.most_parked = self.most_parked.max(self.parked.len());
        for entry in asleep {
            self.nudge(entry, Some(ticket), outbox);
        }
        self.nudge_drains(ticket, outbox);
        Parked { ticket, ready, request }
    }

    /// Tells all whom an invalidation holds up that there is something to help with.
    fn nudge_all(&mut self, ticket: Ticket, outbox: &mut Outbox) {
        let Some(active) = self.protocol.get(ticket) else { return };
        let Some(parking) = active.extra.parked() else { return };
        let hits = parking.stage.work().map_or(&[][..], |work| &work.hits);
        let sleeps = |entry: &EntryRef| entry.first_waiter().is_some();
        let asleep: Vec<EntryRef> =
            hits.iter().copied().chain(active.late()).filter(sleeps).collect();
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

    /// The invalidation is not the space's any more: nobody who waits can find it.
    fn unpark(&mut self, ticket: Ticket, outbox: &mut Outbox) {
        let Some(active) = self.protocol.get_mut(ticket) else { return };
        self.parked.remove(Ranged { range: active.range, value: ticket });
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

    /// The caller looks at its invalidation. If it is to wait, it waits as `task`.
    pub(crate) fn look(
        &mut self,
        ticket: Ticket,
        task: &Arc<TaskWaker>,
        outbox: &mut Outbox,
    ) -> Look {
        let Some(parking) =
            self.parking_mut(ticket).filter(|parking| !parking.stage.is_abandoned())
        else {
            return Look::Lapsed;
        };
        if let Some((mut work, claim)) = parking.stage.claim() {
            // Passes that wait for their first poll are no longer the space's.
            work.passes().unlist();
            self.unpark(ticket, outbox);
            let id = self.protocol.active().located(ticket);
            let Some(active) = self.protocol.get_mut(id) else { unreachable!("it was parked") };
            // Its first passes may go on; `remove` has to know. One that has a place has a flag for
            // that.
            active.extra.calls = !id.has_place() && claim.resume_at.is_some();
            return Look::Claimed(id, work, claim.resume_at, active.sequence);
        }
        let (old, _) = parking.wakers.await_as_owner(task.clone());
        let leased = parking.stage.lease();
        outbox.contents().unused.extend(old);
        leased.map_or(Look::Busy, Look::Leased)
    }

    /// A waiting future looks at an invalidation that holds it up if it is `wanted`.
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

    /// The end of a lease: the work comes back. Returns whether the joined passes are all done, and
    /// whether some of them may be over since (L5). `now` if they are done.
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
        work.passes().settle(&mut parking.pending, |entry| {
            if entry.first_waiter().is_some() {
                quiet.push(entry);
            }
        });
        let behind = work.passes().is_behind(fences);
        let next = parking.stage.give_back(work);
        let done = parking.note_done(now) || matches!(next, Next::End(_));
        // Only now, when others can take the passes again.
        let woken = parking.wakers.end();
        // Then something is to be done for those who wait: to claim, to poll on, or to wait for
        // something else.
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

    /// L5: what waits for its first poll of fenced notifiers, in an invalidation that waits for its
    /// caller.
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

    /// Nobody will claim this invalidation: it ends as soon as its passes are done, now if they
    /// are.
    fn abandon(&mut self, ticket: Ticket, now: Option<Duration>, outbox: &mut Outbox) {
        let Some(parking) = self.parking_mut(ticket) else { return };
        let next = parking.stage.abandon();
        outbox.contents().unused.extend(parking.wakers.disown());
        if parking.forget_awaited() {
            self.patience.end(ticket);
        }
        if matches!(next, Next::Drive) {
            // Those who waited for it to be claimed are not registered with its wakers.
            self.nudge_all(ticket, outbox);
        }
        if let Next::End(work) = next {
            self.end_abandoned(ticket, work, now, outbox);
        }
    }

    /// C2, B3: the caller gives its invalidation up.
    pub(crate) fn leave(&mut self, ticket: Ticket, now: Option<Duration>, outbox: &mut Outbox) {
        if self.parking(ticket).is_some_and(|parking| !parking.stage.is_abandoned()) {
            self.counts.abandoned += 1;
            self.abandon(ticket, now, outbox);
        }
    }

    /// C4: ends the range on behalf of a future that is not polled; it starts over if it ever is.
    /// Returns whether it did.
    pub(crate) fn lapse(
        &mut self,
        ticket: Ticket,
        now: Option<Duration>,
        outbox: &mut Outbox,
    ) -> bool {
        let Some(parking) = self.parking(ticket) else { return false };
        let Stage::Unclaimed { work, .. } = &parking.stage else { return false };
        work.hits.iter().for_each(|entry| entry.tally().lapsed());
        self.counts.lapses += 1;
        self.abandon(ticket, now, outbox);
        true
    }

    /// One more future waits for an unclaimed invalidation to be claimed. Returns the episode that
    /// it waits for.
    pub(crate) fn await_claim(&mut self, ticket: Ticket) -> Option<u32> {
        let Self { protocol, patience, .. } = self;
        let parking = protocol.get_mut(ticket)?.extra.parked_mut()?;
        let claim = parking.stage.unclaimed()?;
        if parking.awaited.count == 0 {
            patience.begin(ticket, parking.done_at, claim.lapses);
        }
        parking.awaited.count += 1;
        Some(parking.awaited.episode)
    }

    /// Whether the episode that a future waits for goes on.
    pub(crate) fn is_awaited(&self, ticket: Ticket, episode: u32) -> bool {
        self.parking(ticket).is_some_and(|parking| {
            parking.stage.unclaimed().is_some() && parking.awaited.episode == episode
        })
    }

    /// A future that waited goes.
    pub(crate) fn await_claim_no_more(&mut self, ticket: Ticket, episode: u32) {
        if !self.is_awaited(ticket, episode) {
            return;
        }
        let Some(parking) = self.parking_mut(ticket) else { return };
        parking.awaited.count -= 1;
        if parking.awaited.count == 0 {
            self.patience.end(ticket);
        }
    }

    /// Whether it is certain that the task of the future that started `ticket` was polled and did
    /// not poll the future: the waiter has been polled `polls` times with the very waker that
    /// the future left (C4).
    pub(crate) fn is_certain(&self, ticket: Ticket, waker: &Waker, polls: u64) -> bool {
        self.parking(ticket).is_some_and(|parking| {
            let claim = parking.stage.unclaimed();
            claim.is_some_and(|claim| polls >= Patience::certain_after(claim.lapses))
                && parking.wakers.is_owned_by(waker)
        })
    }

    /// The space goes: takes the work of every active invalidation out, with unfinished passes in
    /// it.
    pub(crate) fn dismantle(&mut self, outbox: &mut Outbox) -> Vec<Work> {
        let ids: Vec<Id> = self.protocol.active().iter().map(|(id, _)| id).collect();
        let mut works = Vec::new();
        for id in ids {
            let parking = self
                .protocol
                .active_mut()
                .get_mut(id)
                .and_then(|active| active.extra.parking.take());
            let work = parking.and_then(|parking| match parking.stage {
                Stage::Parked { work, .. } | Stage::Unclaimed { work, .. } => Some(work),
                Stage::WithCaller | Stage::Leased { .. } => None,
            });
            let hits = work.as_ref().map_or(&[][..], |work| &work.hits);
            let kept = self.protocol.end(id, hits, |entry| {
                if entry.unused() {
                    outbox.contents().dead.push(entry);
                }
            });
            if let Some(Kept::Gone(record, _)) = kept {
                outbox.contents().records.push(record);
            }
            works.extend(work.map(|work| *work));
        }
        works
    }
}
