//! The leaves of the index: what is stored of an interval, and how it is found, added and removed
//! within a leaf.
#![forbid(unsafe_code)]

use super::node::{
    CAP, Child, LOW, Mergeable, UNUSED, count_at_most, first_candidate, into_next, overhang, slack,
};
use super::{Indexed, Node};
use crate::range::AddressRange;
use core::ops::Range;

/// [`Leaf::live`] of a leaf in which each slot holds an interval.
const FULL: u32 = u32::MAX;
/// Number of steps that an insertion makes towards the nearest gap without a branch.
const EASY_STEPS: usize = 2;

/// Intervals in order, in [`CAP`] slots, with gaps between them.
///
/// Memory latency dominates a search among many intervals. So a leaf stores little of an interval:
/// its start, and its value, which has the rest. Often a search does not need the value. An
/// interval that starts within the range is a hit. An interval that starts further before the range
/// than the longest interval is long is no hit.
///
/// A removal leaves a gap: a slot without a value, whose start is that of the next slot. So the
/// starts stay sorted, and a search skips the gap. An insertion uses the nearest gap, so it moves
/// the few intervals up to there and not half of the leaf.
///
/// `repr(C)` fixes the order of the fields: the fields that a search loads first come first.
#[derive(Clone)]
#[repr(C)]
pub(crate) struct Leaf<V> {
    // A leaf of one-word values has 552 bytes, so it may cover ten cache lines. A prefetch loads
    // nine. The last values, which are needed least, may be in the tenth.
    /// Upper bound, in bytes, on how far any interval extends into the next slot.
    pub(super) slack: u64,
    /// Upper bound on the length of any interval, less one byte. It may stem from a removed
    /// interval.
    pub(super) longest: u64,
    /// Where the next leaf begins, or an address before that. An interval that ends before `bound`
    /// does not concern other leaves.
    pub(super) bound: u64,
    /// The greatest `last`. It may stem from a removed interval if that ended before `bound`. 0 in
    /// a new leaf.
    pub(super) max_last: u64,
    /// One bit for each slot that holds an interval.
    pub(super) live: u32,
    /// Number of intervals.
    pub(super) len: u32,
    /// The start of each slot, sorted. A gap has the start of the next slot.
    pub(super) starts: [u64; CAP],
    /// The value of each slot; `None` in a gap.
    pub(super) values: [Option<V>; CAP],
}

impl<V: Indexed> Leaf<V> {
    /// A leaf without intervals.
    pub(super) const EMPTY: Self = Self {
        slack: 0,
        longest: 0,
        bound: UNUSED,
        max_last: 0,
        live: 0,
        len: 0,
        starts: [UNUSED; CAP],
        values: [None; CAP],
    };

    /// Returns whether there is no gap.
    pub(super) fn is_full(&self) -> bool {
        self.live == FULL
    }

    /// Returns whether only the first eight slots hold intervals.
    #[inline]
    fn is_short(&self) -> bool {
        self.live < 1 << 8
    }

    /// Loads one word of each cache line that a search of the leaf may need late: the values, and
    /// the starts that its first step does not look at.
    pub(super) fn touch(&self) {
        core::hint::black_box(self.starts[0] ^ self.starts[CAP - 1]);
        for values in self.values.chunks(CAP / 4) {
            core::hint::black_box(values[0].is_some());
        }
    }

    /// Returns whether no interval of another leaf can overlap `range`, if no interval extends more
    /// than `reach` bytes past the end of its leaf.
    #[inline]
    pub(super) fn is_only(&self, range: AddressRange, reach: u64) -> bool {
        // Earlier leaves end at or before the first start of this one. Later leaves begin at its
        // bound or after it.
        range.last() < self.bound
            && range.start() >= self.starts[0]
            && range.start() - self.starts[0] >= reach
    }

    /// Returns how far any interval extends past the end of the leaf, in bytes.
    pub(super) fn reach(&self) -> u64 {
        into_next(self.max_last, self.bound)
    }

    /// Returns whether an interval belongs into this leaf and changes nothing in the nodes above.
    #[inline]
    pub(super) fn takes(&self, range: AddressRange) -> bool {
        range.start() >= self.starts[0]
            && range.start() < self.bound
            && range.last() <= self.max_last
    }

    /// Returns the first start and the last address before the next leaf, if there are both.
    pub(super) fn extent(&self) -> Option<(u64, u64)> {
        (self.starts[0] < self.bound && self.bound != UNUSED)
            .then(|| (self.starts[0], self.bound - 1))
    }

    /// Returns the slots whose intervals may overlap `range`. Check each with
    /// [`overlapping`](Self::overlapping).
    #[inline(always)]
    pub(super) fn candidates(&self, range: AddressRange) -> Range<usize> {
        // A single interval in the first slot needs no count.
        if self.live == 1 {
            return 0..usize::from(self.starts[0] <= range.last());
        }
        let end = count_at_most(&self.starts, self.is_short(), range.last());
        first_candidate(&self.starts, self.slack, range.start(), end)..end
    }

    /// Returns the first slot whose interval may overlap `range`, if all intervals start early
    /// enough.
    pub(super) fn first_candidate(&self, range: AddressRange) -> usize {
        first_candidate(&self.starts, self.slack, range.start(), CAP)
    }

    /// Returns the value in slot `at`, one of the [`candidates`](Self::candidates), if its interval
    /// overlaps `range`.
    #[inline]
    pub(crate) fn overlapping(&self, at: usize, range: AddressRange) -> Option<V> {
        let own = self.starts[at % CAP];
        let value = self.values[at % CAP];
        if own >= range.start() {
            return value;
        }
        // If even the longest interval would end before the range, the value is not loaded.
        if self.ends_before(own, range.start()) {
            return None;
        }
        value.filter(|value| value.range().last() >= range.start())
    }

    /// Returns whether an interval that starts at `own` certainly ends before `start`, which is not
    /// below `own`.
    #[inline]
    fn ends_before(&self, own: u64, start: u64) -> bool {
        start - own > self.longest
    }

    /// Returns how many slots start at or before `start`.
    pub(super) fn rank(&self, start: u64) -> usize {
        count_at_most(&self.starts, false, start)
    }

    /// Adds an interval after all that start at or before it, and returns its slot. The leaf must
    /// not be full.
    #[inline(always)]
    pub(super) fn add(&mut self, value: V) -> usize {
        let range = value.range();
        let (start, last) = (range.start(), range.last());
        debug_assert!(
            self.values
                .iter()
                .flatten()
                .all(|other| { other.range().start() != start || other.order() < value.order() }),
            "the order of values with one start rises with each insertion"
        );
        let at = self.make_gap(self.rank(start)) % CAP;
        self.starts[at] = start;
        self.values[at] = Some(value);
        self.len += 1;
        if last > self.max_last {
            self.max_last = last;
        }
        if last - start > self.longest {
            self.longest = last - start;
        }
        // The interval may extend into the next slot, and the previous one into it.
        let next = if at + 1 < CAP { self.starts[at + 1] } else { UNUSED };
        if last >= next || at > 0 && !self.ends_before(self.starts[at - 1], start) {
            self.stretch(at);
        }
        at
    }

    /// Raises the slack for an interval that was added in slot `at`.
    fn stretch(&mut self, at: usize) {
        self.slack = self.slack.max(self.overhang(at));
    }

    /// Copies slot `from` to slot `at`. Returns `from`, which is the gap now.
    #[inline]
    fn fill(&mut self, at: usize, from: usize) -> usize {
        self.starts[at] = self.starts[from];
        self.values[at] = self.values[from];
        from
    }

    /// Moves the nearest gap to the boundary between the first `rank` slots and the others, marks
    /// it as live, and returns its slot.
    #[inline(always)]
    fn make_gap(&mut self, rank: usize) -> usize {
        let gaps = u64::from(!self.live);
        // Number of intervals between the boundary and the nearest gap: in the slots from `rank`
        // on, and in those before it.
        let above = (gaps >> rank).trailing_zeros() as usize;
        let below = ((gaps << 1) << (63 - rank)).leading_zeros() as usize;
        // One loop serves both directions. A branch on the direction would be mispredicted.
        let up = above <= below;
        let (gap, step) =
            if up { (rank + above, CAP - 1) } else { (rank.wrapping_sub(1 + below), 1) };
        let (mut at, steps) = (gap % CAP, above.min(below));
        // The gap is mostly no further than this. A slot that need not move is copied onto itself:
        // that is faster than a branch that is mispredicted.
        for taken in 0..EASY_STEPS {
            at = self.fill(at, if taken < steps { (at + step) % CAP } else { at });
        }
        for _ in EASY_STEPS..steps {
            at = self.fill(at, (at + step) % CAP);
        }
        self.live |= 1 << (gap % CAP);
        at
    }

    /// Returns the slot of a value.
    #[inline(always)]
    pub(super) fn find(&self, value: V) -> Option<usize> {
        let mut at = self.rank(value.range().start());
        loop {
            at = at.checked_sub(1)?;
            if self.values[at % CAP] == Some(value) {
                return Some(at % CAP);
            }
        }
    }

    /// Returns the last address of the interval in slot `at`; 0 for a gap.
    #[inline]
    pub(super) fn last(&self, at: usize) -> u64 {
        self.values[at].map_or(0, |value| value.range().last())
    }

    /// Returns how far the interval in slot `at` extends into the next slot, or the previous one
    /// into slot `at`, whichever is more.
    #[inline]
    fn overhang(&self, at: usize) -> u64 {
        overhang(&self.starts, |at| self.last(at), CAP, at)
    }

    /// Returns whether the removal of an interval that ends at `last` changes only its slot. This
    /// is so if the slack is 0, the leaf does not become small, and the greatest `last` may stay
    /// even if it is `last`.
    #[inline]
    pub(super) fn is_plain(&self, last: u64) -> bool {
        self.slack == 0 && last < self.bound && self.len as usize > LOW
    }

    /// Makes slot `at` a gap. Sufficient only if the removal is [plain](Self::is_plain).
    #[inline]
    pub(super) fn clear(&mut self, at: usize) {
        self.starts[at] = if at + 1 < CAP { self.starts[at + 1] } else { UNUSED };
        self.values[at] = None;
        self.live &= !(1 << at);
        self.len -= 1;
    }

    /// Makes slot `at` a gap and updates the bounds of the leaf. Returns whether the nodes above
    /// have to change: the leaf has become small, or may have another greatest `last`.
    pub(super) fn take(&mut self, at: usize) -> bool {
        let last = self.last(at);
        let loosens = self.slack != 0 && self.overhang(at) == self.slack;
        self.clear(at);
        if loosens {
            self.tighten();
        }
        if last == self.max_last {
            self.find_max_last();
            return true;
        }
        (self.len as usize) < LOW
    }

    /// Computes `slack` and `longest` anew.
    fn tighten(&mut self) {
        self.slack = slack(&self.starts, (0..CAP).map(|at| self.last(at)));
        self.longest =
            (0..CAP).map(|at| self.last(at).saturating_sub(self.starts[at])).max().unwrap_or(0);
    }

    /// Computes `max_last` anew.
    fn find_max_last(&mut self) {
        // Without overlaps, intervals end in the order in which they start.
        let from =
            if self.slack == 0 { self.live.checked_ilog2().unwrap_or(0) as usize } else { 0 };
        self.max_last = (from..CAP).map(|at| self.last(at)).max().unwrap_or(0);
    }

    /// Moves all gaps to the end.
    fn close_gaps(&mut self) {
        let mut to = 0;
        for at in 0..CAP {
            if self.live & (1 << at) != 0 {
                to += 1;
                self.fill(to - 1, at);
            }
        }
        self.truncate(to);
    }

    /// Removes all but the first `len` slots, which must have no gaps.
    fn truncate(&mut self, len: usize) {
        self.starts[len..].fill(UNUSED);
        self.values[len..].fill(None);
        self.len = len as u32;
        self.live = ((1u64 << len) - 1) as u32;
    }

    /// Computes the bounds anew after intervals were moved in or out. There must be no gaps.
    fn refit(&mut self) {
        if self.slack != 0 {
            self.tighten();
        }
        self.find_max_last();
    }
}

impl<V: Indexed> Mergeable for Leaf<V> {
    fn len(&self) -> usize {
        self.len as usize
    }

    fn split_off(&mut self, at: usize) -> Self {
        self.close_gaps();
        let (mut upper, len) = (self.clone(), self.len as usize - at);
        upper.starts.copy_within(at..at + len, 0);
        upper.values.copy_within(at..at + len, 0);
        upper.truncate(len);
        self.truncate(at);
        self.bound = upper.starts[0];
        self.refit();
        upper.refit();
        upper
    }

    fn append(&mut self, upper: &mut Self) {
        self.close_gaps();
        upper.close_gaps();
        let (at, end) = (self.len as usize, self.len as usize + upper.len as usize);
        let reach = into_next(self.max_last, upper.starts[0]);
        self.starts[at..end].copy_from_slice(&upper.starts[..end - at]);
        self.values[at..end].copy_from_slice(&upper.values[..end - at]);
        self.truncate(end);
        self.bound = upper.bound;
        self.longest = self.longest.max(upper.longest);
        self.slack = self.slack.max(upper.slack).max(reach);
        self.refit();
        *upper = Self::EMPTY;
    }

    fn child(&self, node: Node) -> Child {
        let first = self.values.iter().flatten().next();
        let (start, order) =
            first.map_or((UNUSED, 0), |first| (first.range().start(), first.order()));
        Child { start, order, max_last: self.max_last, node }
    }
}

#[cfg(test)]
mod tests;
