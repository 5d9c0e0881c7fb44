//! The sequence protocol: the space's sequence, each notifier's own sequence, and the set of
//! active invalidations.
//!
//! [`Protocol`] is a plain state machine: `&mut self` in, decisions out. It holds no lock, wakes no
//! task and never calls a driver. Its owner (`engine::state`) does all of that. Rules S1 to S6, O1,
//! O5 and the counting behind R1 and L2 are implemented here and nowhere else.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `protocol.rs` | [`Protocol`]: insert, remove, start, end |
//! | `own.rs` | [`Own`]: what the protocol keeps of one notifier |
//! | `active.rs` | `ActiveSet`: the active invalidations, in places and in the crowd |
//! | `batch.rs` | the start of an invalidation of many ranges |
//! | `quick.rs` | forms of the above that exist for speed only |
//!
//! What the attributes and the hand-made layouts of this module are worth is in
//! `docs/measurements.md`, "Attributes".
#![forbid(unsafe_code)]

mod active;
mod batch;
mod own;
mod quick;

pub(crate) use active::{Active, Id, Kept, PLACES};
use active::{ActiveSet, PLACE_BITS, release};
pub(crate) use own::{MARKS, Own, WATCHED};

use crate::index::{Indexed, IntervalIndex};
use crate::range::AddressRange;
use alloc::vec::Vec;

/// A notifier as the protocol sees it.
pub(crate) trait Member: Indexed {
    /// Returns what the protocol keeps of this notifier.
    fn own(&self) -> &Own;
}

/// The state of a space. `M` names a notifier. `X` is what the owner of the protocol keeps beside
/// each invalidation.
pub(crate) struct Protocol<M, X> {
    /// The space's sequence (S1): odd while an invalidation that hit a notifier is active.
    sequence: u64,
    /// The notifiers that new invalidations are checked against.
    index: IntervalIndex<M>,
    active: ActiveSet<M, X>,
    /// The id of the invalidation that started last, with its place replaced by 0.
    started: u64,
}

/// Largest capacity of [`Active::newcomers`] that is kept for the next invalidation in the same
/// place.
const MOST_NEWCOMERS: usize = 64;

/// What the start of an invalidation decided.
pub(crate) struct Started<'a, X> {
    pub(crate) id: Id,
    pub(crate) sequence: u64,
    /// The invalidation hit at least one notifier.
    pub(crate) hit: bool,
    /// The owner's data of this invalidation. In a place it is as the last invalidation in that
    /// place left it.
    pub(crate) extra: &'a mut X,
}

impl<M: Member, X: Default> Protocol<M, X> {
    /// Creates a space whose sequence starts at `sequence`, which must be even (S1: 2).
    pub(crate) fn new(sequence: u64) -> Self {
        debug_assert!(sequence.is_multiple_of(2), "the sequence of an idle space is even");
        Self { sequence, index: IntervalIndex::new(), active: ActiveSet::new(), started: 0 }
    }

    /// Returns the space's sequence (S1 to S3).
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Returns how many notifiers new invalidations are checked against.
    pub(crate) fn registered(&self) -> usize {
        self.index.len()
    }

    /// Calls `member` with each notifier that an invalidation of `range` would hit now.
    pub(crate) fn overlapping(&self, range: AddressRange, member: impl FnMut(M)) {
        self.index.overlapping(range, member);
    }

    /// Returns the active invalidations.
    pub(crate) fn active(&self) -> &ActiveSet<M, X> {
        &self.active
    }

    /// Returns the active invalidations, mutably.
    pub(crate) fn active_mut(&mut self) -> &mut ActiveSet<M, X> {
        &mut self.active
    }

    /// Returns the invalidation `id`, if it is active.
    pub(crate) fn get(&self, id: Id) -> Option<&Active<M, X>> {
        self.active.get(id)
    }

    /// Returns the invalidation `id`, mutably, if it is active.
    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut Active<M, X>> {
        self.active.get_mut(id)
    }

    /// Adds `member`, whose [`Own`] must be new (S5, L3). Later invalidations hit it. Active
    /// invalidations of its range cover it.
    #[inline]
    pub(crate) fn insert(&mut self, member: M) {
        if self.active.len() != 0 && self.insert_covered(member) {
            self.sequence |= 1;
            member.own().begin(self.sequence & !1);
        } else {
            // Odd, and not the sequence in use (S5), so that no invalidation has to skip that (S6).
            let other = if self.sequence.is_multiple_of(2) { 1 } else { 2 };
            member.own().begin(self.sequence.wrapping_sub(other));
        }
        self.index.insert(member);
    }

    /// Adds `member` to the newcomers of each active invalidation that covers it. Returns
    /// whether there is one.
    #[cold]
    #[inline(never)]
    fn insert_covered(&mut self, member: M) -> bool {
        let mut covered = false;
        self.active.for_overlapping(member.range(), |active| {
            active.newcomers.push(member);
            member.own().cover();
            covered = true;
        });
        covered
    }

    /// Removes `member`: no invalidation that starts from now on hits it (O5, L1). Returns whether
    /// it was there.
    pub(crate) fn remove(&mut self, member: M) -> bool {
        self.index.remove(member)
    }

    /// Starts an invalidation of `range` (S2, S6).
    ///
    /// - `is_movable` is asked only if no place is free. It says of which active invalidations no
    ///   code relies on the place in their [`Id`] any more. One of these moves to the crowd.
    /// - `fill` gets the owner's data of the new invalidation, and its id.
    /// - `hits` returns a list in the owner's data, which must be empty. The list receives each
    ///   notifier that overlaps `range`, in the order of the first passes (O1). `hits` is not
    ///   called if no notifier can overlap `range`.
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
            let sequence = quick::cover(&self.index, self.sequence, range, hits);
            if !hits.is_empty() {
                self.sequence = sequence;
                active.sequence = sequence;
                return Started { id, sequence, hit: true, extra: &mut active.extra };
            }
        }
        active.sequence = self.sequence;
        Started { id, sequence: self.sequence, hit: false, extra: &mut active.extra }
    }

    /// Returns the serial of the invalidation that started last.
    pub(crate) fn last_serial(&self) -> u64 {
        Id(self.started).serial()
    }

    /// Ends invalidation `id` (S3) and returns the owner's data, or `None` if `id` is not active.
    ///
    /// `hits` are the notifiers that the start named. `uncovered` gets each notifier that is
    /// [`WATCHED`] and that no active invalidation covers any more (R1).
    pub(crate) fn end(
        &mut self,
        id: Id,
        hits: &[M],
        uncovered: impl FnMut(M),
    ) -> Option<Kept<'_, X>> {
        if let Some(mut active) = self.active.leave_crowd(id) {
            let set = self.active.take_set(id);
            hits.iter().for_each(|member| _ = member.own().uncover());
            make_even_if_idle(&mut self.sequence, self.active.occupancy.live);
            report_uncovered(hits, &mut active.newcomers, uncovered);
            return Some(Kept::Gone(active.extra, set));
        }
        let ActiveSet { places, occupancy, .. } = &mut self.active;
        let active = places.get_mut(id.place()).filter(|active| active.is(id))?;
        let live = release(active, occupancy, id);
        hits.iter().for_each(|member| _ = member.own().uncover());
        make_even_if_idle(&mut self.sequence, live);
        report_uncovered(hits, &mut active.newcomers, uncovered);
        Some(Kept::InPlace(&mut active.extra))
    }
}

/// Calls `uncovered` with each notifier of an invalidation that has just ended that is [`WATCHED`]
/// and that no active invalidation covers any more.
///
/// The end has uncovered `hits` already. This function uncovers the notifiers in `newcomers`.
fn report_uncovered<M: Member>(hits: &[M], newcomers: &mut Vec<M>, mut uncovered: impl FnMut(M)) {
    // A hit was covered until the end. If it is not covered now, this end uncovered it.
    hits.iter()
        .copied()
        .filter(|member| !member.own().is_covered() && member.own().is_marked(WATCHED))
        .for_each(&mut uncovered);
    newcomers.drain(..).filter(|member| member.own().uncover() & WATCHED != 0).for_each(uncovered);
    if newcomers.capacity() > MOST_NEWCOMERS {
        *newcomers = Vec::new();
    }
}

/// Makes the space's sequence even if no invalidation is active (S3).
#[inline]
fn make_even_if_idle(sequence: &mut u64, live: u32) {
    if live == 0 && *sequence % 2 == 1 {
        *sequence = sequence.wrapping_add(1);
    }
}

/// Adds the notifiers that overlap `range` to `hits` and covers each of them with one more
/// invalidation. `current` is the space's sequence. Returns the sequence of that invalidation if
/// there is a hit.
#[cold]
#[inline(never)]
fn cover<M: Member>(
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

/// Covers one hit. Returns the sequence of the invalidation as far as it is known: `sequence`,
/// unless the hit already has the space's `current` sequence without being covered (S6).
#[inline(always)]
fn cover_one<M: Member>(member: M, current: u64, sequence: u64) -> u64 {
    // An own sequence is odd. It can equal the space's sequence only while that is odd.
    if member.own().cover() == Some(current) { after_clash(current) } else { sequence }
}

/// Returns the sequence of an invalidation that hit an uncovered notifier whose own sequence is the
/// `current` one (S6).
#[cold]
#[inline(never)]
fn after_clash(current: u64) -> u64 {
    current.wrapping_add(2)
}

#[cfg(test)]
mod tests;
