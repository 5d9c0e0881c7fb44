//! The leaves of the index: what is stored of an interval, and how it is found, added and removed.
#![forbid(unsafe_code)]

use super::node::{
    CAP, Child, LOW, Part, UNUSED, count_at_most, first_candidate, into_next, overhang, slack,
};
use super::{Indexed, Node};
use crate::range::AddressRange;
use core::ops::Range;

/// All places of a leaf hold an interval.
const FULL: u32 = u32::MAX;
/// An insertion goes this many steps to the nearest gap without asking whether it must.
const EASY_STEPS: usize = 2;

/// Intervals in order, with gaps between them.
///
/// What a search among many waits for is memory, so a leaf says little of an interval: where it
/// starts, and the value, which knows the rest. Often that need not be asked: what starts in the
/// range that is searched for is a hit, and what starts further before it than the longest interval
/// goes on is none.
///
/// A removal leaves a gap: a place that starts where the next one does, so that the starts remain
/// sorted and a search passes it by. An insertion takes the nearest gap, so that it moves the few
/// intervals up to there and not half of the leaf.
#[derive(Clone)]
#[repr(C)]
pub(crate) struct Leaf<V> {
    // What is asked first stands first, and what is asked least, the last values, where a fetch of
    // nine lines may end.
    /// No interval reaches further than this many bytes into the next place.
    pub(super) slack: u64,
    /// No interval goes on for more than this many bytes after its first. It may be one that has
    /// gone.
    pub(super) longest: u64,
    /// Where the next leaf begins, or before that: what ends before it is of no account to other
    /// leaves.
    pub(super) bound: u64,
    /// The greatest `last`, or that of an interval that has gone and ended before `bound`; 0 in a
    /// new leaf.
    pub(super) max_last: u64,
    /// Places that hold an interval, a bit each.
    pub(super) live: u32,
    /// How many they are.
    pub(super) len: u32,
    pub(super) starts: [u64; CAP],
    pub(super) values: [Option<V>; CAP],
}

impl<V: Indexed> Leaf<V> {
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

    pub(super) fn is_full(&self) -> bool {
        self.live == FULL
    }

    /// Whether there are intervals in the first eight places only.
    #[inline(always)]
    fn is_short(&self) -> bool {
        self.live < 1 << 8
    }

    /// Has the lines of the leaf fetched that a search will need when it knows which: each
    /// interval's value, and the starts that its first step does not look at.
    #[cold]
    #[inline(never)]
    pub(super) fn touch(&self) {
        core::hint::black_box(self.starts[0] ^ self.starts[CAP - 1]);
        for values in self.values.chunks(CAP / 4) {
            core::hint::black_box(values[0].is_some());
        }
    }

    /// Whether nothing in other leaves can overlap `range`, when no interval reaches further than
    /// `reach` bytes beyond the end of its leaf.
    #[inline(always)]
    pub(super) fn is_only(&self, range: AddressRange, reach: u64) -> bool {
        // Leaves before this one end at or before its first place, and those behind it begin at its
        // bound or behind it.
        range.last() < self.bound
            && range.start() >= self.starts[0]
            && range.start() - self.starts[0] >= reach
    }

    /// How far beyond its end an interval reaches, in bytes.
    pub(super) fn reach(&self) -> u64 {
        into_next(self.max_last, self.bound)
    }

    /// Whether an interval belongs here, and those above need not learn of it.
    #[inline(always)]
    pub(super) fn takes(&self, range: AddressRange) -> bool {
        range.start() >= self.starts[0]
            && range.start() < self.bound
            && range.last() <= self.max_last
    }

    /// From its first interval to where the next leaf begins, if there are both.
    pub(super) fn extent(&self) -> Option<(u64, u64)> {
        (self.starts[0] < self.bound && self.bound != UNUSED)
            .then(|| (self.starts[0], self.bound - 1))
    }

    /// The places whose intervals may overlap `range`: of these, those do that
    /// [`overlapping`](Self::overlapping) says.
    #[inline(always)]
    pub(super) fn candidates(&self, range: AddressRange) -> Range<usize> {
        // With a single interval nothing is to be counted, and its place is not waited for.
        if self.live == 1 {
            return 0..usize::from(self.starts[0] <= range.last());
        }
        let end = count_at_most(&self.starts, self.is_short(), range.last());
        first_candidate(&self.starts, self.slack, range.start(), end)..end
    }

    /// The first of the places whose intervals may overlap `range`, when all start early enough.
    pub(super) fn first_candidate(&self, range: AddressRange) -> usize {
        first_candidate(&self.starts, self.slack, range.start(), CAP)
    }

    /// What lies at `at`, one of the [`candidates`](Self::candidates), if it does overlap `range`.
    #[inline(always)]
    pub(crate) fn overlapping(&self, at: usize, range: AddressRange) -> Option<V> {
        let own = self.starts[at % CAP];
        let value = self.values[at % CAP];
        if own >= range.start() {
            return value;
        }
        // What even the longest would not reach need not be asked, and its value not be fetched.
        if self.ends_before(own, range.start()) {
            return None;
        }
        value.filter(|value| value.range().last() >= range.start())
    }

    /// Whether what starts at `own`, at or before `start`, certainly ends before that.
    #[inline(always)]
    fn ends_before(&self, own: u64, start: u64) -> bool {
        start - own > self.longest
    }

    /// How many places start at or before `start`. Not built in: mixed with what uses it, its sum
    /// is computed several times over.
    #[inline(never)]
    pub(super) fn rank(&self, start: u64) -> usize {
        count_at_most(&self.starts, false, start)
    }

    /// Adds an interval behind all that start at or before it, to a leaf that is not full; says
    /// where.
    #[inline(always)]
    pub(super) fn add(&mut self, value: V) -> usize {
        let range = value.range();
        let (start, last) = (range.start(), range.last());
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
        // It may reach into the next, and the one before into it.
        let next = if at + 1 < CAP { self.starts[at + 1] } else { UNUSED };
        if last >= next || at > 0 && !self.ends_before(self.starts[at - 1], start) {
            self.stretch(at);
        }
        at
    }

    #[cold]
    #[inline(never)]
    fn stretch(&mut self, at: usize) {
        self.slack = self.slack.max(self.overhang(at));
    }

    /// Copies what lies at `from` to `at`, and says where there is a gap then.
    #[inline(always)]
    fn fill(&mut self, at: usize, from: usize) -> usize {
        self.starts[at] = self.starts[from];
        self.values[at] = self.values[from];
        from
    }

    /// Moves the nearest gap to between the first `rank` places and the others, fills it, and says
    /// where it is.
    #[inline(always)]
    fn make_gap(&mut self, rank: usize) -> usize {
        let gaps = u64::from(!self.live);
        // How many intervals are between here and there: in the places from `rank` on, and in those
        // before it.
        let above = (gaps >> rank).trailing_zeros() as usize;
        let below = ((gaps << 1) << (63 - rank)).leading_zeros() as usize;
        // One loop for both directions: a jump that nobody can predict takes longer than all of it.
        let up = above <= below;
        let (gap, step) =
            if up { (rank + above, CAP - 1) } else { (rank.wrapping_sub(1 + below), 1) };
        let (mut at, steps) = (gap % CAP, above.min(below));
        // Mostly it is no further than this. What need not be moved is copied onto itself: that,
        // too, is quicker than a jump that nobody can predict.
        for taken in 0..EASY_STEPS {
            at = self.fill(at, if taken < steps { (at + step) % CAP } else { at });
        }
        for _ in EASY_STEPS..steps {
            at = self.fill(at, (at + step) % CAP);
        }
        self.live |= 1 << (gap % CAP);
        at
    }

    /// Where this interval is.
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

    /// The last address of what lies at `at`. A gap has none that counts.
    #[inline]
    pub(super) fn last(&self, at: usize) -> u64 {
        self.values[at].map_or(0, |value| value.range().last())
    }

    /// How far the interval at `at` reaches into the next place, or the one before it into it, if
    /// that is further.
    #[inline]
    fn overhang(&self, at: usize) -> u64 {
        overhang(&self.starts, |at| self.last(at), CAP, at)
    }

    /// Whether nothing but its place has to change when the interval up to `last`, inclusive, goes:
    /// the slack stays, the leaf does not become small, and if it had the greatest `last`, that may
    /// stay.
    #[inline(always)]
    pub(super) fn is_plain(&self, last: u64) -> bool {
        self.slack == 0 && last < self.bound && self.len as usize > LOW
    }

    /// Makes a gap of the interval at `at`. If it is not [plain](Self::is_plain), more has to
    /// change.
    #[inline(always)]
    pub(super) fn clear(&mut self, at: usize) {
        self.starts[at] = if at + 1 < CAP { self.starts[at + 1] } else { UNUSED };
        self.values[at] = None;
        self.live &= !(1 << at);
        self.len -= 1;
    }

    /// The same, and what else has to change in the leaf. Says whether those above have to know:
    /// the leaf has become small, or has another greatest `last`.
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

    /// What depends on all intervals, anew.
    fn tighten(&mut self) {
        self.slack = slack(&self.starts, (0..CAP).map(|at| self.last(at)));
        self.longest =
            (0..CAP).map(|at| self.last(at).saturating_sub(self.starts[at])).max().unwrap_or(0);
    }

    #[inline(never)]
    fn find_max_last(&mut self) {
        // Without overlaps they end in the order in which they start.
        let from =
            if self.slack == 0 { self.live.checked_ilog2().unwrap_or(0) as usize } else { 0 };
        self.max_last = (from..CAP).map(|at| self.last(at)).max().unwrap_or(0);
    }

    /// Moves the intervals together, to the front.
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

    /// Leaves only the first `len` places, which have no gaps.
    fn truncate(&mut self, len: usize) {
        self.starts[len..].fill(UNUSED);
        self.values[len..].fill(None);
        self.len = len as u32;
        self.live = ((1u64 << len) - 1) as u32;
    }

    /// After others have come or gone: what is known of those that there are. There are no gaps.
    fn refit(&mut self) {
        if self.slack != 0 {
            self.tighten();
        }
        self.find_max_last();
    }
}

impl<V: Indexed> Part for Leaf<V> {
    fn len(&self) -> usize {
        self.len as usize
    }

    fn set_bound(&mut self, _start: u64, _order: u64) {}

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
