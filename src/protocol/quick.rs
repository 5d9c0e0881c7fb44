//! Forms of the protocol's functions that exist for speed only.
//!
//! Each quick form has a plain function as its specification. It does the same in the common case.
//! In every other case it changes nothing and says so, and the caller falls back to the plain
//! function. [`quick_end`](Protocol::quick_end) differs: it is the first half of an end, and
//! [`tell`](Protocol::tell) is the second.
//!
//! | quick form | specification | common case |
//! | --- | --- | --- |
//! | [`cover`] | [`super::cover`] | all hits are in one leaf of the index |
//! | [`Protocol::quick_end`], then [`Protocol::tell`] | [`Protocol::end`] | in a place |
//! | [`Protocol::quick_end_one`] | [`Protocol::end`] | in a place, one hit, nothing to notify |
//! | [`Protocol::quick_end_none`] | [`Protocol::end`] | in a place, no hit, nothing to notify |
//! | [`Own::quick_close`] | [`Own::close`] and [`Own::mark`] | not covered, no mark |
//! | [`Own::quick_uncover`] | [`Own::uncover`] | no mark |
//!
//! `protocol/tests.rs` runs the same random schedules with the quick forms and without them, and
//! compares both with a model of the contract.
#![forbid(unsafe_code)]

use super::active::{ActiveSet, release};
use super::own::{CLOSED, COVER, UNCOVERED};
use super::{Id, Member, Own, Protocol, WATCHED, cover_one, make_even_if_idle, report_uncovered};
use crate::index::IntervalIndex;
use crate::range::AddressRange;
use crate::sync::Ordering;
use alloc::vec::Vec;

/// Quick form of [`super::cover`], inlined into the start: covers the hits of `range` if they are
/// all in one leaf. Otherwise it calls the plain function.
#[inline(always)]
pub(super) fn cover<M: Member>(
    index: &IntervalIndex<M>,
    current: u64,
    range: AddressRange,
    hits: &mut Vec<M>,
) -> u64 {
    let Some((leaf, candidates)) = index.only_leaf(range) else {
        return super::cover(index, current, range, hits);
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

impl<M: Member, X: Default> Protocol<M, X> {
    /// Prefetches what a search of `range` is likely to need. An invalidation of `range` starts
    /// soon.
    ///
    /// Call it before the start stores anything. The processor reaches this prefetch early only if
    /// few stores stand between the hit of one invalidation and the next one (`DESIGN.md`, "The
    /// interval index").
    #[inline]
    pub(crate) fn expect(&self, range: AddressRange) {
        self.index.expect(range.last());
    }

    /// Ends invalidation `id`, up to the notification (S3). Returns `None`, without an effect, if
    /// `id` is not in a place.
    ///
    /// Otherwise it returns `(notify, extra)`. If `notify`, call [`tell`](Self::tell) before any
    /// other method. `extra` is the owner's data, which stays for the next invalidation in this
    /// place.
    #[inline(always)]
    pub(crate) fn quick_end(&mut self, id: Id, hits: &[M]) -> Option<(bool, &mut X)> {
        let ActiveSet { places, occupancy, .. } = &mut self.active;
        let active = places.get_mut(id.place()).filter(|active| active.is(id))?;
        let live = release(active, occupancy, id);
        let marks = hits.iter().fold(0, |marks, member| marks | member.own().uncover());
        make_even_if_idle(&mut self.sequence, live);
        Some((marks & WATCHED != 0 || !active.newcomers.is_empty(), &mut active.extra))
    }

    /// Completes [`quick_end`](Self::quick_end): calls `uncovered` with each [`WATCHED`] notifier
    /// that no active invalidation covers any more (R1). Returns the owner's data.
    pub(crate) fn tell(&mut self, id: Id, hits: &[M], uncovered: impl FnMut(M)) -> Option<&mut X> {
        let active = self.active.places.get_mut(id.place())?;
        report_uncovered(hits, &mut active.newcomers, uncovered);
        Some(&mut active.extra)
    }

    /// Ends invalidation `id`, which hit only `hit`, if it is in a place and there is nothing to
    /// notify: `hit` has no mark, and no notifier was inserted meanwhile. Otherwise it does nothing
    /// and returns `None`.
    #[inline(always)]
    pub(crate) fn quick_end_one(&mut self, id: Id, hit: M) -> Option<&mut X> {
        let ActiveSet { places, occupancy, .. } = &mut self.active;
        let active = places
            .get_mut(id.place())
            .filter(|active| active.is(id) && active.newcomers.is_empty())?;
        if !hit.own().quick_uncover() {
            return None;
        }
        make_even_if_idle(&mut self.sequence, release(active, occupancy, id));
        Some(&mut active.extra)
    }

    /// Ends invalidation `id`, which hit no notifier, if it is in a place and no notifier was
    /// inserted meanwhile. Otherwise it does nothing and returns `false`.
    #[inline]
    pub(crate) fn quick_end_none(&mut self, id: Id) -> bool {
        let ActiveSet { places, occupancy, .. } = &mut self.active;
        let Some(active) = places
            .get_mut(id.place())
            .filter(|active| active.is(id) && active.newcomers.is_empty())
        else {
            return false;
        };
        make_even_if_idle(&mut self.sequence, release(active, occupancy, id));
        true
    }
}

impl Own {
    /// Closes the notifier and sets `marks`, if no active invalidation covers it and it has no
    /// mark. Otherwise it does nothing and returns `false`.
    #[inline]
    pub(crate) fn quick_close(&self, marks: u32) -> bool {
        let plain = self.covering.load(Ordering::Relaxed) == 0;
        if plain {
            self.covering.store(CLOSED | marks, Ordering::Relaxed);
            self.word.store(self.word.load(Ordering::Relaxed) & !UNCOVERED, Ordering::Relaxed);
        }
        plain
    }

    /// Removes one cover if the notifier has no mark. Otherwise it does nothing and returns
    /// `false`.
    #[inline]
    pub(super) fn quick_uncover(&self) -> bool {
        let covering = self.covering.load(Ordering::Relaxed) - COVER;
        if !covering.is_multiple_of(COVER) {
            return false;
        }
        self.covering.store(covering, Ordering::Relaxed);
        if covering == 0 {
            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);
        }
        true
    }
}
