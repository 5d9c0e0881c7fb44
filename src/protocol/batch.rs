//! The start of an invalidation of many ranges at once (N1 to N4).
#![forbid(unsafe_code)]

use super::{Id, Member, PLACE_BITS, PLACES, Protocol, Started, cover_one};
use crate::range::RangeSet;
use alloc::vec::Vec;

impl<M: Member, X: Default> Protocol<M, X> {
    /// Starts an invalidation of all ranges of `set`; `fill` and `hits` are those of
    /// [`start`](Self::start). With `is_past` it does not cover notifiers that are inserted from
    /// now on (N4).
    ///
    /// The invalidation is in the crowd from the beginning. A place has no room for gaps.
    pub(crate) fn start_set(
        &mut self,
        set: &RangeSet,
        is_past: bool,
        fill: impl FnOnce(&mut X, Id),
        hits: impl FnOnce(&mut X) -> &mut Vec<M>,
    ) -> Started<'_, X> {
        let Self { sequence: current, index, active, started } = self;
        active.assert_room();
        *started += 1 << PLACE_BITS;
        let (id, active) = active.take_set_in_crowd(Id(*started).serial(), set, is_past);
        debug_assert!(id.place() == PLACES, "it has no place");
        fill(&mut active.extra, id);
        let hits = hits(&mut active.extra);
        debug_assert!(hits.is_empty(), "an invalidation that has ended left its hits");
        let mut sequence = *current | 1;
        if index.len() < set.len() {
            // There are fewer notifiers than ranges: one search, which skips those in gaps.
            sequence = index.search(set.hull(), sequence, |sequence, member| {
                if !set.overlaps(member.range()) {
                    return sequence;
                }
                hits.push(member);
                cover_one(member, *current, sequence)
            });
        } else {
            // One search for each range. A notifier that overlaps this range and begins at or
            // before the end of the previous one overlaps that one, too. It was found there.
            let mut found_to = None;
            for range in set.iter() {
                sequence = index.search(*range, sequence, |sequence, member| {
                    if found_to.is_some_and(|last| member.range().start() <= last) {
                        return sequence;
                    }
                    hits.push(member);
                    cover_one(member, *current, sequence)
                });
                found_to = Some(range.last());
            }
        }
        let hit = !hits.is_empty();
        if hit {
            *current = sequence;
        }
        active.sequence = *current;
        Started { id, sequence: *current, hit, extra: &mut active.extra }
    }
}
