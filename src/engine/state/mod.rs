//! All that changes in a space, under its one lock.
//!
//! Nothing here calls foreign code or sees the [`Shared`](super::Shared) of the space. Work for
//! after the lock goes into an [`Outbox`]. The time comes in as a value. The work of an
//! invalidation leaves only into the hands of a [`Lease`](super::lease::Lease) or a
//! [`Running`](super::running::Running), which bring it back.
//!
//! | file | question |
//! | --- | --- |
//! | `stage` | who has the work of an active invalidation? |
//! | `record` | what does the engine keep beside each active invalidation? |
//! | `parked` | how do pending passes become the space's, and who polls them? |
//! | `claims` | who waits until a future claims its invalidation? |
//! | `patience` | how long do they wait before it lapses? |
//! | `waiters` | which futures wait for which notifier? |
#![forbid(unsafe_code)]

mod claims;
mod parked;
mod patience;
mod record;
mod stage;
mod waiters;

use crate::engine::outbox::Outbox;
use crate::engine::wakers::Bell;
use crate::engine::work::Work;
use crate::entry::EntryRef;
#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
use crate::foreign::TaskWaker;
use crate::index::{IntervalIndex, Numbered, Ranged};
use crate::protocol::{Active, Id, Kept, Protocol};
use crate::sync::{Arc, Ordering};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::time::Duration;
pub(crate) use parked::{Claimed, Help, Look, Parked};
pub(crate) use patience::{Patience, Watch};
pub(crate) use record::{Parking, Record, Ticket};
use slab::Slab;
pub(crate) use stage::{Claim, Load, Next, Stage};
use waiters::uncovered;
pub(crate) use waiters::{WaitFor, Waiter};

pub(crate) struct State {
    pub(crate) protocol: Protocol<EntryRef, Record>,
    /// Parked invalidations by range: waiting futures find here what they can help with.
    pub(crate) parked: IntervalIndex<Ranged<Numbered<Ticket>>>,
    /// How many invalidations were parked.
    parked_ever: u64,
    /// The most that were parked at once since none was.
    most_parked: usize,
    /// Bells of futures that wait for parked invalidations of the whole space. They are in no
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

/// What happened in a space.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) lapses: u64,
    /// The longest time that a timed invalidation was active.
    pub(crate) longest: Option<Duration>,
    pub(crate) abandoned: u64,
}

impl State {
    pub(crate) fn new(sequence: u64, patience: Patience) -> Self {
        Self {
            protocol: Protocol::new(sequence),
            parked: IntervalIndex::new(),
            parked_ever: 0,
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

    /// Puts a new entry into the index. Not inlined, because its callers are inlined into drivers.
    #[inline(never)]
    pub(crate) fn attach(&mut self, entry: EntryRef) {
        self.next_order += 1;
        entry.order.store(self.next_order, Ordering::Relaxed);
        self.protocol.insert(entry);
    }

    /// Takes a notifier out of the index. Its first pass is not called any more, except where the
    /// call has begun (L1). May be called again.
    pub(crate) fn close(&mut self, entry: EntryRef) {
        if !entry.own.is_closed() {
            entry.own.close();
            self.protocol.remove(entry);
        }
    }

    /// Frees `entry`, outside of the lock, if nothing keeps it alive any more.
    pub(crate) fn reap(&mut self, entry: EntryRef, outbox: &mut Outbox) {
        if entry.unused() {
            outbox.contents().dead.push(entry);
        }
    }

    /// Ends an active invalidation (S3, C2) and wakes the futures that waited for that. `now` is
    /// the time if the invalidation was timed.
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

    /// Second half of the quick end of an invalidation that has a place: wakes the futures that
    /// waited, and keeps the memory.
    #[cold]
    pub(crate) fn tell(&mut self, id: Id, work: Box<Work>, outbox: &mut Outbox) {
        let Self { protocol, waiters, .. } = self;
        match protocol.tell(id, &work.hits, |entry| uncovered(waiters, entry, outbox)) {
            Some(record) => record.recycle(work),
            None => outbox.contents().works.push(*work),
        }
    }

    /// Counts how long a timed invalidation was active.
    #[cold]
    fn lasted(&mut self, id: Id, hits: &[EntryRef], now: Duration) {
        if let Some(since) = self.protocol.active().get(id).and_then(Active::since) {
            let age = now.saturating_sub(since);
            self.counts.longest = self.counts.longest.max(Some(age));
            let micros = u32::try_from(age.as_micros()).unwrap_or(u32::MAX);
            hits.iter().for_each(|entry| entry.lasted(micros));
        }
    }

    /// Takes the work of every active invalidation out, with the unfinished passes in it. For the
    /// drop of the space.
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
