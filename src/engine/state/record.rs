//! The engine's part of an active invalidation.
#![forbid(unsafe_code)]

use crate::engine::quick::fill_empty;
use crate::engine::state::stage::Stage;
use crate::engine::wakers::WakerSet;
use crate::engine::work::{PendingNotifiers, Work};
use crate::entry::EntryRef;
use crate::event::{Event, Owner, Terms};
use crate::notifier::Request;
use crate::protocol::{Active, Id};
use crate::sync::Arc;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::time::Duration;

/// Names a parked invalidation.
pub(crate) type Ticket = Id;

/// The engine's part of an active invalidation. It lies in the place of the invalidation, and the
/// next one there uses it again.
pub(crate) struct Record {
    pub(crate) owner: Option<Owner>,
    pub(crate) terms: Terms,
    /// Made when an invalidation in this place first parks, and kept for later ones.
    pub(crate) parking: Option<Box<Parking>>,
    /// Time stamp, with the serial of the invalidation that it belongs to. Set at the start if the
    /// space has a clock, otherwise when passes are first found pending or `active()` first lists
    /// the invalidation. With another serial it belongs to an earlier invalidation in this place.
    /// It is not cleared, because most invalidations never set one.
    since: Option<(u64, Duration)>,
    /// Memory of an earlier invalidation in this place, for the next one that hits a notifier.
    idle_work: Option<Box<Work>>,
    /// First passes may still be called. Only for an invalidation without a flag (see
    /// [`calls`](crate::engine::calls)).
    pub(crate) calls: bool,
}

/// The state of a parked invalidation: its guard is not handed out, and its passes belong to the
/// space (C2). First passes may be left (B4).
pub(crate) struct Parking {
    pub(crate) stage: Stage<Box<Work>>,
    /// Woken when its passes can go on. The work has the same.
    pub(crate) wakers: Arc<WakerSet>,
    /// Notifiers whose passes are pending.
    pub(crate) pending: PendingNotifiers,
    /// Its number among those that were parked, which is its order in the index of these. Not its
    /// serial: a younger invalidation may be parked first.
    pub(crate) number: u64,
    /// When its passes were done, if there is a clock. Valid while it is unclaimed.
    pub(crate) done_at: Option<Duration>,
    pub(crate) awaited: Awaited,
}

/// The futures that wait for an unclaimed invalidation to be claimed.
#[derive(Clone, Copy, Default)]
pub(crate) struct Awaited {
    pub(crate) count: u32,
    /// Rises each time that the invalidation becomes unclaimed. Futures that waited before do not
    /// count any more.
    pub(crate) episode: u32,
}

impl Parking {
    pub(crate) fn new(wakers: Arc<WakerSet>) -> Self {
        let pending = PendingNotifiers::default();
        Self {
            stage: Stage::WithCaller,
            wakers,
            pending,
            number: 0,
            done_at: None,
            awaited: Awaited::default(),
        }
    }

    /// Returns whether the invalidation is unclaimed, and notes since when. To be called when the
    /// work has come to the space.
    pub(super) fn note_done(&mut self, now: Option<Duration>) -> bool {
        let unclaimed = self.stage.unclaimed().is_some();
        if unclaimed {
            self.done_at = now;
            self.awaited.count = 0;
            self.awaited.episode = self.awaited.episode.wrapping_add(1);
        }
        unclaimed
    }

    /// Forgets the futures that wait for a claim. Returns whether there were any.
    pub(super) fn forget_awaited(&mut self) -> bool {
        core::mem::take(&mut self.awaited.count) != 0
    }
}

impl Default for Record {
    fn default() -> Self {
        let terms = Terms::new(Event::Unmap, true);
        Self { owner: None, terms, parking: None, since: None, idle_work: None, calls: false }
    }
}

impl Record {
    /// Notes the request, and when the invalidation began if it is timed.
    pub(crate) fn fill(&mut self, request: &Request<'_>, id: Id, since: Option<Duration>) {
        (self.owner, self.terms) = (request.owner, request.terms);
        if let Some(since) = since {
            self.since = Some((id.serial(), since));
        }
    }

    /// Returns the list in which the start of an invalidation collects its hits.
    pub(crate) fn hits(&mut self) -> &mut Vec<EntryRef> {
        if self.idle_work.is_none() {
            self.make_work();
        }
        let Some(work) = &mut self.idle_work else { unreachable!("there is one now") };
        &mut work.hits
    }

    #[cold]
    #[inline(never)]
    fn make_work(&mut self) {
        self.idle_work = Some(Box::default());
    }

    pub(crate) fn take_work(&mut self) -> Option<Box<Work>> {
        self.idle_work.take()
    }

    /// Keeps the memory of an invalidation that has ended for the next one in this place.
    pub(crate) fn recycle(&mut self, mut work: Box<Work>) {
        work.hits.clear();
        // It took the memory from here when it started.
        fill_empty(&mut self.idle_work, work);
    }

    /// Returns the parking if the invalidation is parked.
    pub(crate) fn parked(&self) -> Option<&Parking> {
        self.parking.as_deref().filter(|parking| parking.stage.is_parked())
    }

    pub(crate) fn parked_mut(&mut self) -> Option<&mut Parking> {
        self.parking.as_deref_mut().filter(|parking| parking.stage.is_parked())
    }
}

impl Active<EntryRef, Record> {
    /// Returns the time stamp of the invalidation, if it has one.
    pub(crate) fn since(&self) -> Option<Duration> {
        self.extra.since.and_then(|(serial, since)| (serial == self.serial()).then_some(since))
    }

    /// Returns the time stamp of the invalidation. Sets it to `now` if there was none.
    pub(crate) fn since_or(&mut self, now: Option<Duration>) -> Option<Duration> {
        let since = self.since().or(now)?;
        self.extra.since = Some((self.serial(), since));
        Some(since)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::AddressRange;
    use crate::index::{IntervalIndex, Numbered, Ranged};

    #[test]
    fn parked_invalidations_of_one_range_are_found_again_in_any_order() {
        let mut parked = IntervalIndex::new();
        // Parked in another order than started: 11 and 1000 have no common factor.
        let of = |number: u64| {
            let value = Numbered { number, value: Ticket::from_raw((number * 11 % 1000) << 6) };
            Ranged { range: AddressRange::ALL, value }
        };
        (0..1000).for_each(|number| parked.insert(of(number)));
        let mut found = Vec::new();
        parked.overlapping(AddressRange::ALL, |parked| found.push(parked.value.number));
        assert!(found.is_sorted());
        // 7 and 1000 have no common factor.
        assert!((0..1000).all(|at| parked.remove(of(at * 7 % 1000))));
        assert_eq!(parked.len(), 0);
    }
}
