//! The sequence protocol: the space's sequence, each notifier's own, and the set of active invalidations.
//!
//! A plain state machine: `&mut self` in, decisions out. It holds no lock, wakes nobody and never calls a driver; whoever
//! owns a [`Protocol`] does that. Rules S1 to S6, O1, O5 and the counting behind R1 and L2 live here and nowhere else.
#![forbid(unsafe_code)]

mod own;

pub(crate) use own::{MARKS, Own, WATCHED};

use crate::index::{Indexed, IntervalIndex};
use crate::range::AddressRange;
use alloc::vec::Vec;

/// A notifier as the protocol sees it.
pub(crate) trait Member: Indexed {
    fn own(&self) -> &Own;
}

/// An active invalidation, with whatever its owner keeps beside it.
pub(crate) struct Active<M, X> {
    pub(crate) range: AddressRange,
    /// The sequence that all its passes get; odd if it hit a notifier, meaningless otherwise.
    pub(crate) sequence: u64,
    /// While it is active its serial and [`LIVE`], otherwise the next free place.
    mark: u64,
    /// Notifiers inserted since it started, which it covers but does not call (S5).
    late: Vec<M>,
    pub(crate) extra: X,
}

impl<M, X> Active<M, X> {
    /// Tells this invalidation from an earlier one with the same id; rises with each start.
    pub(crate) fn serial(&self) -> u64 {
        self.mark & !LIVE
    }

    fn is_live(&self) -> bool {
        self.mark & LIVE != 0
    }
}

impl<M: Copy, X> Active<M, X> {
    pub(crate) fn late(&self) -> impl Iterator<Item = M> {
        self.late.iter().copied()
    }
}

/// Names an active invalidation; used again once it has ended.
pub(crate) type Id = u32;

pub(crate) struct Protocol<M, X> {
    /// S1.
    sequence: u64,
    index: IntervalIndex<M>,
    active: ActiveSet<M, X>,
    started: u64,
}

/// The active invalidations, each in a place that is filled and used again where it lies.
///
/// `slab` would move each one in and out; those copies stall on the stores just made and took a quarter of a short invalidation.
pub(crate) struct ActiveSet<M, X> {
    places: Vec<Active<M, X>>,
    heads: Heads,
}

/// The free place to be used next, each of which names the one after it, and how many are live.
struct Heads {
    free: Id,
    live: u32,
}

/// In [`Active::mark`]: it is active.
const LIVE: u64 = 1 << 63;
/// There is no free place.
const NONE: Id = Id::MAX;

impl<M, X> ActiveSet<M, X> {
    pub(crate) fn len(&self) -> usize {
        self.heads.live as usize
    }

    pub(crate) fn get(&self, id: Id) -> Option<&Active<M, X>> {
        self.places.get(id as usize).filter(|active| active.is_live())
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut Active<M, X>> {
        self.places.get_mut(id as usize).filter(|active| active.is_live())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Id, &Active<M, X>)> {
        (0..).zip(&self.places).filter(|(_, active)| active.is_live())
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (Id, &mut Active<M, X>)> {
        (0..).zip(&mut self.places).filter(|(_, active)| active.is_live())
    }

    /// A place that was free and is live now with this serial, made if there was none.
    #[inline]
    fn take(&mut self, serial: u64) -> (Id, &mut Active<M, X>)
    where
        X: Default,
    {
        if self.heads.free == NONE {
            self.grow();
        }
        let id = self.heads.free;
        let active = &mut self.places[id as usize];
        let next = core::mem::replace(&mut active.mark, LIVE | serial);
        self.heads.free = next as Id;
        self.heads.live += 1;
        (id, active)
    }

    #[cold]
    fn grow(&mut self)
    where
        X: Default,
    {
        let id =
            Id::try_from(self.places.len()).ok().filter(|id| *id < NONE).expect("fewer than 2^32 - 1 invalidations are active");
        self.places.push(Active {
            range: AddressRange::ALL,
            sequence: 0,
            mark: NONE.into(),
            late: Vec::new(),
            extra: X::default(),
        });
        self.heads.free = id;
    }

    /// The place is free again; what is in it stays for now. Says, too, how many remain active.
    #[inline(always)]
    fn release(&mut self, id: Id) -> (&mut Active<M, X>, u32) {
        let active = &mut self.places[id as usize];
        let live = release(active, &mut self.heads, id);
        (active, live)
    }
}

/// The place `id` of an invalidation is free again. Says how many remain active.
#[inline(always)]
fn release<M, X>(active: &mut Active<M, X>, heads: &mut Heads, id: Id) -> u32 {
    debug_assert!(active.is_live(), "an invalidation ends once");
    active.mark = heads.free.into();
    heads.free = id;
    heads.live -= 1;
    heads.live
}

/// What the start of an invalidation decided.
pub(crate) struct Started<'a, X> {
    pub(crate) id: Id,
    pub(crate) sequence: u64,
    /// It hit a notifier.
    pub(crate) hit: bool,
    /// What its owner keeps beside it, as the last invalidation in this place left it.
    pub(crate) extra: &'a mut X,
}

impl<M: Member, X: Default> Protocol<M, X> {
    /// A space whose sequence starts at `sequence`, which must be even (S1: 2).
    pub(crate) fn new(sequence: u64) -> Self {
        debug_assert!(sequence.is_multiple_of(2), "the sequence of an idle space is even");
        Self {
            sequence,
            index: IntervalIndex::new(),
            active: ActiveSet { places: Vec::new(), heads: Heads { free: NONE, live: 0 } },
            started: 0,
        }
    }

    /// The space's sequence (S1 to S3).
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Notifiers that new invalidations are checked against.
    pub(crate) fn registered(&self) -> usize {
        self.index.len()
    }

    pub(crate) fn active(&self) -> &ActiveSet<M, X> {
        &self.active
    }

    pub(crate) fn active_mut(&mut self) -> &mut ActiveSet<M, X> {
        &mut self.active
    }

    pub(crate) fn get(&self, id: Id, serial: u64) -> Option<&Active<M, X>> {
        self.active.get(id).filter(|active| active.serial() == serial)
    }

    pub(crate) fn get_mut(&mut self, id: Id, serial: u64) -> Option<&mut Active<M, X>> {
        self.active.get_mut(id).filter(|active| active.serial() == serial)
    }

    /// S5, L3: `member` takes part from now on. Its [`Own`] must be new.
    #[inline]
    pub(crate) fn insert(&mut self, member: M) {
        if self.active.len() != 0 && self.insert_covered(member) {
            self.sequence |= 1;
            member.own().begin(self.sequence & !1);
        } else {
            // Odd, and not the current one, so that its readers do not wait.
            let other = if self.sequence.is_multiple_of(2) { 1 } else { 2 };
            member.own().begin(self.sequence.wrapping_sub(other));
        }
        self.index.insert(member);
    }

    /// Notes `member` with the active invalidations that cover it; says whether there are any.
    ///
    /// Linear in the active invalidations, and only here: start and end are not (`DESIGN.md`, "Insert under invalidation").
    #[cold]
    #[inline(never)]
    fn insert_covered(&mut self, member: M) -> bool {
        let mut covered = false;
        for (_, active) in self.active.iter_mut() {
            if active.range.overlaps(member.range()) {
                active.late.push(member);
                member.own().cover();
                covered = true;
            }
        }
        covered
    }

    /// O5, L1: no invalidation that starts from now on hits `member`.
    pub(crate) fn remove(&mut self, member: M) -> bool {
        self.index.remove(member)
    }

    /// An invalidation of `range` starts soon: what its search is likely to need is on its way from memory from now on. To be called before all else is written down: the processor
    /// gets here early only if there are few stores between the hit of one invalidation and the next (`DESIGN.md`, "The interval index").
    #[inline(always)]
    pub(crate) fn expect(&self, range: AddressRange) {
        self.index.expect(range.last());
    }

    /// S2, S6: starts an invalidation. `fill` gets what its owner keeps beside it, as the last invalidation in this place left it, and its serial. What `hits` finds there,
    /// which is empty, gets every notifier that overlaps `range`, in the order of their first passes (O1); it is not asked for when there can be none.
    #[inline(always)]
    pub(crate) fn start(
        &mut self,
        range: AddressRange,
        fill: impl FnOnce(&mut X, u64),
        hits: impl FnOnce(&mut X) -> &mut Vec<M>,
    ) -> Started<'_, X> {
        self.started += 1;
        let (id, active) = self.active.take(self.started);
        active.range = range;
        fill(&mut active.extra, self.started);
        if self.index.may_overlap(range) {
            let hits = hits(&mut active.extra);
            debug_assert!(hits.is_empty(), "an invalidation that has ended left its hits");
            let sequence = cover(&self.index, self.sequence, range, hits);
            if !hits.is_empty() {
                self.sequence = sequence;
                active.sequence = sequence;
                return Started { id, sequence, hit: true, extra: &mut active.extra };
            }
        }
        active.sequence = self.sequence;
        Started { id, sequence: self.sequence, hit: false, extra: &mut active.extra }
    }

    /// The serial of the invalidation that started last.
    pub(crate) fn last_serial(&self) -> u64 {
        self.started
    }

    /// S3: ends an invalidation. `hits` are the notifiers that its start named. Says whether somebody may have to be told, with [`tell`](Self::tell),
    /// before anything else is done with the protocol, and returns what its owner keeps beside it for the next one in this place.
    #[inline(always)]
    pub(crate) fn end(&mut self, id: Id, hits: &[M]) -> (bool, &mut X) {
        let (active, live) = self.active.release(id);
        let marks = hits.iter().fold(0, |marks, member| marks | member.own().uncover());
        settle(&mut self.sequence, live);
        (marks & WATCHED != 0 || !active.late.is_empty(), &mut active.extra)
    }

    /// The same for an invalidation with one hit, if that is not marked and nobody may have to be told. Otherwise does nothing and returns nothing.
    #[inline(always)]
    pub(crate) fn end_plainly(&mut self, id: Id, hit: M) -> Option<&mut X> {
        let ActiveSet { places, heads } = &mut self.active;
        let active = places.get_mut(id as usize).filter(|active| active.late.is_empty())?;
        if !hit.own().uncover_plainly() {
            return None;
        }
        settle(&mut self.sequence, release(active, heads, id));
        Some(&mut active.extra)
    }

    /// Names the notifiers that are [`WATCHED`] and that no active invalidation covers any more since the one that has just ended. Returns what
    /// [`end`](Self::end) returned.
    pub(crate) fn tell(&mut self, id: Id, hits: &[M], mut uncovered: impl FnMut(M)) -> &mut X {
        // A hit was covered until the end, so one that is not was uncovered by it.
        hits.iter()
            .copied()
            .filter(|member| !member.own().is_covered() && member.own().is_marked(WATCHED))
            .for_each(&mut uncovered);
        let active = &mut self.active.places[id as usize];
        active.late.drain(..).filter(|member| member.own().uncover() & WATCHED != 0).for_each(uncovered);
        &mut active.extra
    }

    /// S3: ends an invalidation that hit nothing. Says no, and does nothing, if notifiers were inserted under it: there may be somebody to be told.
    #[inline]
    pub(crate) fn end_without_hits(&mut self, id: Id) -> bool {
        let ActiveSet { places, heads } = &mut self.active;
        let Some(active) = places.get_mut(id as usize).filter(|active| active.late.is_empty()) else { return false };
        settle(&mut self.sequence, release(active, heads, id));
        true
    }
}

/// S3: the sequence is even when no invalidation is active.
#[inline(always)]
fn settle(sequence: &mut u64, live: u32) {
    if live == 0 && *sequence % 2 == 1 {
        *sequence = sequence.wrapping_add(1);
    }
}

/// The notifiers that overlap `range` are covered by one more invalidation, which gets the sequence that is returned if there is one.
#[inline(always)]
fn cover<M: Member>(index: &IntervalIndex<M>, current: u64, range: AddressRange, hits: &mut Vec<M>) -> u64 {
    let Some((leaf, candidates)) = index.only_leaf(range) else { return cover_many(index, current, range, hits) };
    let mut sequence = current | 1;
    for at in candidates {
        if let Some(member) = leaf.overlapping(at, range) {
            hits.push(member);
            sequence = cover_one(member, current, sequence);
        }
    }
    sequence
}

/// The same when they may be in several leaves.
#[cold]
#[inline(never)]
fn cover_many<M: Member>(index: &IntervalIndex<M>, current: u64, range: AddressRange, hits: &mut Vec<M>) -> u64 {
    index.search(range, current | 1, |sequence, member| {
        hits.push(member);
        cover_one(member, current, sequence)
    })
}

/// Covers a hit. Returns the sequence that the invalidation gets, as far as is known: `sequence`, unless the hit has the `current` one of the space already.
#[inline(always)]
fn cover_one<M: Member>(member: M, current: u64, sequence: u64) -> u64 {
    // An own sequence is odd, so it can equal the space's only while that is odd.
    if member.own().cover() == Some(current) { after_clash(current) } else { sequence }
}

/// S6: the sequence that follows when a notifier has the current one already, without being covered.
#[cold]
#[inline(never)]
fn after_clash(current: u64) -> u64 {
    current.wrapping_add(2)
}

#[cfg(test)]
mod tests;
