//! The sequence protocol: the space's sequence, each notifier's own, and the set of active
//! invalidations.
//!
//! A plain state machine: `&mut self` in, decisions out. It holds no lock, wakes nobody and never
//! calls a driver; whoever owns a [`Protocol`] does that. Rules S1 to S6, O1, O5 and the counting
//! behind R1 and L2 live here and nowhere else.
#![forbid(unsafe_code)]

mod active;
mod batch;
mod own;

pub(crate) use active::{Active, Id, Kept, PLACES};
use active::{ActiveSet, PLACE_BITS, release};
pub(crate) use own::{MARKS, Own, WATCHED};

use crate::index::{Indexed, IntervalIndex};
use crate::range::AddressRange;
use alloc::vec::Vec;

/// A notifier as the protocol sees it.
pub(crate) trait Member: Indexed {
    fn own(&self) -> &Own;
}

pub(crate) struct Protocol<M, X> {
    /// S1.
    sequence: u64,
    index: IntervalIndex<M>,
    active: ActiveSet<M, X>,
    /// The id of the invalidation that started last, with place 0.
    started: u64,
}

/// Room for this many notifiers that were inserted under an invalidation stays for the next one in
/// its place.
const MOST_LATE: usize = 64;
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
        Self { sequence, index: IntervalIndex::new(), active: ActiveSet::new(), started: 0 }
    }

    /// The space's sequence (S1 to S3).
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Notifiers that new invalidations are checked against.
    pub(crate) fn registered(&self) -> usize {
        self.index.len()
    }

    /// Those that an invalidation of `range` would hit now.
    pub(crate) fn overlapping(&self, range: AddressRange, member: impl FnMut(M)) {
        self.index.overlapping(range, member);
    }

    pub(crate) fn active(&self) -> &ActiveSet<M, X> {
        &self.active
    }

    pub(crate) fn active_mut(&mut self) -> &mut ActiveSet<M, X> {
        &mut self.active
    }

    pub(crate) fn get(&self, id: Id) -> Option<&Active<M, X>> {
        self.active.get(id)
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut Active<M, X>> {
        self.active.get_mut(id)
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

    /// Notes `member` with the active invalidations that cover it; returns whether there are any.
    #[cold]
    #[inline(never)]
    fn insert_covered(&mut self, member: M) -> bool {
        let mut covered = false;
        self.active.for_overlapping(member.range(), |active| {
            active.late.push(member);
            member.own().cover();
            covered = true;
        });
        covered
    }

    /// O5, L1: no invalidation that starts from now on hits `member`.
    pub(crate) fn remove(&mut self, member: M) -> bool {
        self.index.remove(member)
    }

    /// An invalidation of `range` starts soon: what its search is likely to need is on its way from
    /// memory from now on. To be called before all else is written down: the processor gets here
    /// early only if there are few stores between the hit of one invalidation and the next
    /// (`DESIGN.md`, "The interval index").
    #[inline(always)]
    pub(crate) fn expect(&self, range: AddressRange) {
        self.index.expect(range.last());
    }

    /// S2, S6: starts an invalidation. `fill` gets what its owner keeps beside it, as the last
    /// invalidation in this place left it, and its id. What `hits` finds there, which is empty,
    /// gets every notifier that overlaps `range`, in the order of their first passes (O1); it is
    /// not asked for when there can be none. `is_movable` says, if there is no place left, of which
    /// active invalidations nobody believes the place in their id any more.
    #[inline(always)]
    pub(crate) fn start(
        &mut self,
        range: AddressRange,
        is_movable: impl Fn(Id) -> bool,
        fill: impl FnOnce(&mut X, Id),
        hits: impl FnOnce(&mut X) -> &mut Vec<M>,
    ) -> Started<'_, X> {
        self.started += 1 << PLACE_BITS;
        let (id, active) = self.active.take(self.started, range, is_movable);
        fill(&mut active.extra, id);
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
        Id(self.started).serial()
    }

    /// S3: ends an invalidation. `hits` are the notifiers that its start named. `uncovered` gets
    /// the notifiers that are [`WATCHED`] and that no active invalidation covers any more. Returns
    /// what its owner keeps beside it.
    pub(crate) fn end(
        &mut self,
        id: Id,
        hits: &[M],
        uncovered: impl FnMut(M),
    ) -> Option<Kept<'_, X>> {
        if self.quick_end(id, hits).is_some() {
            return self.tell(id, hits, uncovered).map(Kept::InPlace);
        }
        let mut active = self.active.leave_crowd(id)?;
        let set = self.active.take_set(id);
        hits.iter().for_each(|member| _ = member.own().uncover());
        settle(&mut self.sequence, self.active.heads.live);
        tell(hits, &mut active.late, uncovered);
        Some(Kept::Gone(active.extra, set))
    }

    /// First half of [`end`](Self::end) for an invalidation that has a place: `true` if somebody
    /// may have to be told, by [`tell`](Self::tell), which then has to come before anything else.
    /// Does nothing for one that has none.
    #[inline(always)]
    pub(crate) fn quick_end(&mut self, id: Id, hits: &[M]) -> Option<(bool, &mut X)> {
        let ActiveSet { places, heads, .. } = &mut self.active;
        let active = places.get_mut(id.place()).filter(|active| active.is(id))?;
        let live = release(active, heads, id);
        let marks = hits.iter().fold(0, |marks, member| marks | member.own().uncover());
        settle(&mut self.sequence, live);
        Some((marks & WATCHED != 0 || !active.late.is_empty(), &mut active.extra))
    }

    /// Quick form of [`end`](Self::end) for an invalidation that has a place and hit one notifier,
    /// if that has no mark and nobody may have to be told. Otherwise does nothing and returns
    /// `None`.
    #[inline(always)]
    pub(crate) fn quick_end_one(&mut self, id: Id, hit: M) -> Option<&mut X> {
        let ActiveSet { places, heads, .. } = &mut self.active;
        let active =
            places.get_mut(id.place()).filter(|active| active.is(id) && active.late.is_empty())?;
        if !hit.own().quick_uncover() {
            return None;
        }
        settle(&mut self.sequence, release(active, heads, id));
        Some(&mut active.extra)
    }

    /// Second half of [`end`](Self::end), after [`quick_end`](Self::quick_end).
    pub(crate) fn tell(&mut self, id: Id, hits: &[M], uncovered: impl FnMut(M)) -> Option<&mut X> {
        let active = self.active.places.get_mut(id.place())?;
        tell(hits, &mut active.late, uncovered);
        Some(&mut active.extra)
    }

    /// Quick form of [`end`](Self::end) for an invalidation that has a place and hit nothing. Does
    /// nothing and returns `false` if notifiers were inserted under it: somebody may have to be
    /// told.
    #[inline]
    pub(crate) fn quick_end_none(&mut self, id: Id) -> bool {
        let ActiveSet { places, heads, .. } = &mut self.active;
        let Some(active) =
            places.get_mut(id.place()).filter(|active| active.is(id) && active.late.is_empty())
        else {
            return false;
        };
        settle(&mut self.sequence, release(active, heads, id));
        true
    }
}

/// Names the notifiers that are [`WATCHED`] and that no active invalidation covers any more since
/// the one that has just ended.
fn tell<M: Member>(hits: &[M], late: &mut Vec<M>, mut uncovered: impl FnMut(M)) {
    // A hit was covered until the end, so one that is not was uncovered by it.
    hits.iter()
        .copied()
        .filter(|member| !member.own().is_covered() && member.own().is_marked(WATCHED))
        .for_each(&mut uncovered);
    late.drain(..).filter(|member| member.own().uncover() & WATCHED != 0).for_each(uncovered);
    if late.capacity() > MOST_LATE {
        *late = Vec::new();
    }
}

/// S3: the sequence is even when no invalidation is active.
#[inline(always)]
fn settle(sequence: &mut u64, live: u32) {
    if live == 0 && *sequence % 2 == 1 {
        *sequence = sequence.wrapping_add(1);
    }
}

/// The notifiers that overlap `range` are covered by one more invalidation, which gets the sequence
/// that is returned if there is one.
#[inline(always)]
fn cover<M: Member>(
    index: &IntervalIndex<M>,
    current: u64,
    range: AddressRange,
    hits: &mut Vec<M>,
) -> u64 {
    let Some((leaf, candidates)) = index.only_leaf(range) else {
        return cover_many(index, current, range, hits);
    };
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
fn cover_many<M: Member>(
    index: &IntervalIndex<M>,
    current: u64,
    range: AddressRange,
    hits: &mut Vec<M>,
) -> u64 {
    index.search(range, current | 1, |sequence, member| {
        hits.push(member);
        cover_one(member, current, sequence)
    })
}

/// Covers a hit. Returns the sequence that the invalidation gets, as far as is known: `sequence`,
/// unless the hit has the `current` one of the space already.
#[inline(always)]
fn cover_one<M: Member>(member: M, current: u64, sequence: u64) -> u64 {
    // An own sequence is odd, so it can equal the space's only while that is odd.
    if member.own().cover() == Some(current) { after_clash(current) } else { sequence }
}

/// S6: the sequence that follows when a notifier has the current one already, without being
/// covered.
#[cold]
#[inline(never)]
fn after_clash(current: u64) -> u64 {
    current.wrapping_add(2)
}

#[cfg(test)]
mod tests;
