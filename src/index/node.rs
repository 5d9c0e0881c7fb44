//! The nodes of the index: what is stored, how a node is searched, split and merged.
#![forbid(unsafe_code)]

use super::{Indexed, Node};
use crate::range::AddressRange;
use core::hint::select_unpredictable;
use core::ops::Range;

/// Children of an inner node, or intervals of a leaf, at most.
pub(super) const CAP: usize = 32;
/// Below this a node looks for a neighbour to merge with.
pub(super) const LOW: usize = CAP / 4;
/// A merged node holds no more than this, so that the next insertion does not split it again.
pub(super) const MERGED: usize = CAP * 3 / 4;
/// An insertion goes this many steps to the nearest gap without asking whether it must.
const EASY_STEPS: usize = 2;
/// A start that is not in use: sorts behind all others. (An interval may start there, too; a node knows its `len`.)
pub(super) const UNUSED: u64 = u64::MAX;

/// Intervals in order, with gaps between them.
///
/// A removal leaves a gap: a place that starts where the next one does, so that the starts remain sorted and a search passes it by, and whose `last` no
/// range reaches. An insertion takes the nearest gap, so that it moves the few intervals up to there and not half of the leaf.
#[derive(Clone)]
#[repr(C)]
pub(crate) struct Leaf<V> {
    pub(super) starts: [u64; CAP],
    /// The rest of each interval. Together, so that a hit touches one more cache line and not two, and a change moves two arrays and not three.
    pub(super) rests: [Rest<V>; CAP],
    /// No interval reaches further than this many bytes into the next place.
    pub(super) slack: u64,
    /// Where the next leaf begins, or before that: what ends before it is of no account to other leaves.
    pub(super) bound: u64,
    /// The greatest `last`, or that of an interval that has gone and ended before `bound`; 0 in a new leaf.
    pub(super) max_last: u64,
    /// Places that hold an interval, a bit each.
    pub(super) live: u32,
    /// How many they are.
    pub(super) len: u32,
}

/// What a leaf knows of an interval beside its start.
#[derive(Clone, Copy)]
pub(crate) struct Rest<V> {
    pub(super) last: u64,
    pub(super) value: Option<V>,
}

#[derive(Clone)]
pub(super) struct Inner {
    pub(super) len: usize,
    /// As in a leaf: no child reaches further than this many bytes beyond the lower bound of the next one.
    pub(super) slack: u64,
    /// Lower bounds: every key in `children[i]` is `>= (starts[i], orders[i])` and below the next bound. The first is not looked at.
    pub(super) starts: [u64; CAP],
    pub(super) orders: [u64; CAP],
    /// The greatest `last` in `children[i]`; as in a leaf, it may be that of one that has gone.
    pub(super) max_lasts: [u64; CAP],
    pub(super) children: [Node; CAP],
}

/// What a split or a merge tells the parent of a child: its lower bound and greatest `last`.
#[derive(Clone, Copy)]
pub(super) struct Child {
    pub(super) start: u64,
    pub(super) order: u64,
    pub(super) max_last: u64,
    pub(super) node: Node,
}

/// What merging and balancing need of either kind of node.
pub(super) trait Part: Sized {
    fn len(&self) -> usize;
    /// Replaces the lower bound of the first child, which a node does not keep right itself.
    fn set_bound(&mut self, start: u64, order: u64);
    /// The upper part from `at` on, cut off into a node of its own.
    fn split_off(&mut self, at: usize) -> Self;
    fn append(&mut self, upper: &mut Self);
    fn child(&self, node: Node) -> Child;
}

/// Moves `array[at..len]` up by one and puts `value` at `at`.
#[inline]
pub(super) fn open<T: Copy, const N: usize>(array: &mut [T; N], len: usize, at: usize, value: T) {
    array.copy_within(at..len, at + 1);
    array[at] = value;
}

/// Moves `array[at + 1..len]` down by one.
#[inline]
pub(super) fn close<T: Copy, const N: usize>(array: &mut [T; N], len: usize, at: usize) {
    array.copy_within(at + 1..len, at);
}

/// How far part `at` of a node reaches into the next one, or the one before it into it, if that is further.
#[inline]
pub(super) fn overhang(starts: &[u64; CAP], last: impl Fn(usize) -> u64, len: usize, at: usize) -> u64 {
    let own = if at + 1 < len { into_next(last(at), starts[at + 1]) } else { 0 };
    let before = if at > 0 { into_next(last(at - 1), starts[at]) } else { 0 };
    own.max(before)
}

/// How many of the sorted `starts` are at most `start`.
///
/// Looks at some of them at a time: no step has a branch, and the loads of the first do not depend on each other, so that the cache lines of a
/// node are fetched at the same time, which a search by halves does not allow. The first step is left out where only `few` places matter, the first eight.
/// Of a sum of eight answers the compiler makes a chain of eight additions; of starts that are sorted the middle one says which half needs adding.
#[inline(always)]
pub(super) fn count_at_most(starts: &[u64; CAP], few: bool, start: u64) -> usize {
    let below = |candidate: u64| usize::from(candidate <= start);
    let (eights, _) = starts.as_chunks::<{ CAP / 4 }>();
    let eight = if few { 0 } else { select_unpredictable(eights[1][7] <= start, 2 + below(eights[2][7]), below(eights[0][7])) };
    let [a, b, c, d, e, f, g, h] = eights[eight];
    let lower = select_unpredictable(b <= start, 2 + below(c), below(a));
    let upper = select_unpredictable(f <= start, 6 + below(g) + below(h), 4 + below(e));
    8 * eight + select_unpredictable(d <= start, upper, lower)
}

/// The first part of a node that may reach as far as `start`, of those before `end`, the count of those that start early enough: the last of them, and
/// those before it that may reach so far.
#[inline(always)]
fn first_candidate(starts: &[u64; CAP], slack: u64, start: u64, end: usize) -> usize {
    // Where the next part must start, at least. A slack that is too great for a number is one less, so is the start.
    let bound = start.min(u64::MAX - 1).checked_sub(slack).map_or(0, |bound| bound + 1);
    // All of them, or few.
    if starts[0] >= bound {
        return 0;
    }
    let mut from = end.saturating_sub(1);
    while from > 0 && starts[from % CAP] >= bound {
        from -= 1;
    }
    from
}

/// How far what ends at `last`, inclusive, reaches into what starts at `next`, in bytes.
#[inline(always)]
fn into_next(last: u64, next: u64) -> u64 {
    last.checked_sub(next).map_or(0, |beyond| beyond.saturating_add(1))
}

/// The smallest slack of a node whose parts start and end there.
pub(super) fn slack(starts: &[u64], lasts: impl Iterator<Item = u64>) -> u64 {
    lasts.zip(starts.iter().skip(1)).map(|(last, next)| into_next(last, *next)).max().unwrap_or(0)
}

impl<V: Indexed> Leaf<V> {
    const NOTHING: Rest<V> = Rest { last: 0, value: None };
    pub(super) const EMPTY: Self =
        Self { slack: 0, bound: UNUSED, max_last: 0, live: 0, len: 0, starts: [UNUSED; CAP], rests: [Self::NOTHING; CAP] };

    pub(super) fn is_full(&self) -> bool {
        self.live == u32::MAX
    }

    /// Whether there are intervals in the first eight places only.
    #[inline(always)]
    pub(super) fn is_short(&self) -> bool {
        self.live < 1 << 8
    }

    /// Has the lines of the leaf fetched that a search will need when it knows which: each interval's rest, and the starts that its first step does not look at.
    #[cold]
    #[inline(never)]
    pub(super) fn touch(&self) {
        let sum = (0..CAP / 4).fold(self.starts[0] ^ self.starts[CAP - 1], |sum, at| sum.wrapping_add(self.rests[at * 4].last));
        core::hint::black_box(sum);
    }

    /// The places whose intervals may overlap `range`: of these, those do that [`overlapping`](Self::overlapping) says.
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
        let rest = &self.rests[at % CAP];
        if rest.last >= range.start() { rest.value } else { None }
    }

    /// How many places start at or before `start`. Not built in: mixed with what uses it, its sum is computed several times over.
    #[inline(never)]
    fn rank(&self, start: u64) -> usize {
        count_at_most(&self.starts, false, start)
    }

    /// Adds an interval behind all that start at or before it, to a leaf that is not full; says where.
    #[inline(always)]
    pub(super) fn add(&mut self, range: AddressRange, value: V) -> usize {
        let at = self.make_gap(self.rank(range.start())) % CAP;
        self.starts[at] = range.start();
        self.rests[at] = Rest { last: range.last(), value: Some(value) };
        self.len += 1;
        if range.last() > self.max_last {
            self.max_last = range.last();
        }
        // It may reach into the next, and the one before into it.
        let next = if at + 1 < CAP { self.starts[at + 1] } else { UNUSED };
        let last_before = if at > 0 { self.rests[at - 1].last } else { 0 };
        if range.last() >= next || last_before >= range.start() {
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
        self.rests[at] = self.rests[from];
        from
    }

    /// Moves the nearest gap to between the first `rank` places and the others, fills it, and says where it is.
    #[inline(always)]
    fn make_gap(&mut self, rank: usize) -> usize {
        let gaps = u64::from(!self.live);
        // How many intervals are between here and there: in the places from `rank` on, and in those before it.
        let above = (gaps >> rank).trailing_zeros() as usize;
        let below = ((gaps << 1) << (63 - rank)).leading_zeros() as usize;
        // One loop for both directions: a jump that nobody can predict takes longer than all of it.
        let up = above <= below;
        let (gap, step) = if up { (rank + above, CAP - 1) } else { (rank.wrapping_sub(1 + below), 1) };
        let (mut at, steps) = (gap % CAP, above.min(below));
        // Mostly it is no further than this. What need not be moved is copied onto itself: that, too, is quicker than a jump that nobody can predict.
        for taken in 0..EASY_STEPS {
            at = self.fill(at, if taken < steps { (at + step) % CAP } else { at });
        }
        for _ in EASY_STEPS..steps {
            at = self.fill(at, (at + step) % CAP);
        }
        self.live |= 1 << (gap % CAP);
        at
    }

    /// Where the interval is that starts at `start` and has this value.
    #[inline(always)]
    pub(super) fn find(&self, start: u64, value: V) -> Option<usize> {
        let mut at = self.rank(start);
        loop {
            at = at.checked_sub(1)?;
            if self.rests[at % CAP].value == Some(value) {
                return Some(at % CAP);
            }
        }
    }

    #[inline]
    fn overhang(&self, at: usize) -> u64 {
        overhang(&self.starts, |at| self.rests[at].last, CAP, at)
    }

    /// Whether nothing but its place has to change when the interval at `at` goes: the slack stays, the leaf does not become small, and if it had the greatest
    /// `last`, that may stay.
    #[inline(always)]
    pub(super) fn is_plain(&self, at: usize) -> bool {
        self.slack == 0 && self.rests[at].last < self.bound && self.len as usize > LOW
    }

    /// Makes a gap of the interval at `at`. If it is not [plain](Self::is_plain), more has to change.
    #[inline(always)]
    pub(super) fn clear(&mut self, at: usize) {
        self.starts[at] = if at + 1 < CAP { self.starts[at + 1] } else { UNUSED };
        self.rests[at] = Self::NOTHING;
        self.live &= !(1 << at);
        self.len -= 1;
    }

    /// The same, and what else has to change in the leaf. Says whether those above have to know: the leaf has become small, or has another greatest `last`.
    pub(super) fn take(&mut self, at: usize) -> bool {
        let last = self.rests[at].last;
        if self.slack != 0 {
            self.loosen(at);
        }
        self.clear(at);
        if last == self.max_last {
            self.find_max_last();
            return true;
        }
        (self.len as usize) < LOW
    }

    /// Before the interval at `at` goes: corrects the slack if it is the one with the greatest overhang.
    #[cold]
    #[inline(never)]
    fn loosen(&mut self, at: usize) {
        if self.overhang(at) == self.slack {
            let rest = core::mem::replace(&mut self.rests[at], Self::NOTHING);
            self.tighten();
            self.rests[at] = rest;
        }
    }

    fn tighten(&mut self) {
        self.slack = slack(&self.starts, self.lasts());
    }

    #[inline(never)]
    fn find_max_last(&mut self) {
        // Four at a time: one after the other, each would wait for the one before. A gap has none that counts.
        let (fours, _) = self.rests.as_chunks::<4>();
        let [a, b, c, d] = fours.iter().fold([0; 4], |greatest, four| core::array::from_fn(|at| four[at].last.max(greatest[at])));
        self.max_last = a.max(b).max(c.max(d));
    }

    /// A gap has none that counts.
    fn lasts(&self) -> impl Iterator<Item = u64> {
        self.rests.iter().map(|rest| rest.last)
    }

    /// Moves the intervals together, to the front.
    fn close_gaps(&mut self) {
        let mut to = 0;
        for at in 0..CAP {
            if self.live & (1 << at) != 0 {
                (self.starts[to], self.rests[to]) = (self.starts[at], self.rests[at]);
                to += 1;
            }
        }
        self.truncate(to);
    }

    /// Leaves only the first `len` places, which have no gaps.
    fn truncate(&mut self, len: usize) {
        self.starts[len..].fill(UNUSED);
        self.rests[len..].fill(Self::NOTHING);
        self.len = len as u32;
        self.live = ((1u64 << len) - 1) as u32;
        self.find_max_last();
        self.tighten();
    }
}

impl<V: Indexed> Part for Leaf<V> {
    fn len(&self) -> usize {
        self.len as usize
    }

    fn set_bound(&mut self, _start: u64, _order: u64) {}

    fn split_off(&mut self, at: usize) -> Self {
        self.close_gaps();
        let (mut upper, len) = (Self::EMPTY, self.len as usize - at);
        upper.starts[..len].copy_from_slice(&self.starts[at..at + len]);
        upper.rests[..len].copy_from_slice(&self.rests[at..at + len]);
        upper.truncate(len);
        self.truncate(at);
        (self.bound, upper.bound) = (upper.starts[0], self.bound);
        upper
    }

    fn append(&mut self, upper: &mut Self) {
        self.close_gaps();
        self.bound = upper.bound;
        upper.close_gaps();
        let (at, end) = (self.len as usize, self.len as usize + upper.len as usize);
        self.starts[at..end].copy_from_slice(&upper.starts[..end - at]);
        self.rests[at..end].copy_from_slice(&upper.rests[..end - at]);
        self.truncate(end);
        *upper = Self::EMPTY;
    }

    fn child(&self, node: Node) -> Child {
        let first = self.rests.iter().zip(&self.starts).find_map(|(rest, start)| Some((*start, rest.value?.order())));
        let (start, order) = first.unwrap_or((UNUSED, 0));
        Child { start, order, max_last: self.max_last, node }
    }
}

impl Inner {
    pub(super) const EMPTY: Self =
        Self { len: 0, slack: 0, starts: [UNUSED; CAP], orders: [0; CAP], max_lasts: [0; CAP], children: [0; CAP] };

    /// The children that may overlap `range`, without the last of them, which is the one where the range ends.
    #[inline(always)]
    pub(super) fn candidates(&self, range: AddressRange) -> Range<usize> {
        let end = count_at_most(&self.starts, self.is_short(), range.last()).min(self.len);
        let from = first_candidate(&self.starts, self.slack, range.start(), end);
        // What starts before the first bound is in the first child, too.
        let last = end.saturating_sub(1);
        from.min(last)..last
    }

    /// Whether there are no more than eight children.
    #[inline(always)]
    pub(super) fn is_short(&self) -> bool {
        self.len <= 8
    }

    pub(super) fn add(&mut self, at: usize, child: Child) {
        open(&mut self.starts, self.len, at, child.start);
        open(&mut self.orders, self.len, at, child.order);
        open(&mut self.max_lasts, self.len, at, child.max_last);
        open(&mut self.children, self.len, at, child.node);
        self.len += 1;
        self.stretch(at);
    }

    /// The greatest `last` below child `at` has risen, or the child is new.
    #[inline]
    pub(super) fn stretch(&mut self, at: usize) {
        self.slack = self.slack.max(overhang(&self.starts, |at| self.max_lasts[at], self.len, at));
    }

    pub(super) fn tighten(&mut self) {
        self.slack = slack(&self.starts[..self.len], self.max_lasts[..self.len].iter().copied());
    }

    pub(super) fn take(&mut self, at: usize) {
        close(&mut self.starts, self.len, at);
        close(&mut self.orders, self.len, at);
        close(&mut self.max_lasts, self.len, at);
        close(&mut self.children, self.len, at);
        self.len -= 1;
        self.starts[self.len] = UNUSED;
    }

    pub(super) fn get(&self, at: usize) -> Child {
        Child { start: self.starts[at], order: self.orders[at], max_last: self.max_lasts[at], node: self.children[at] }
    }

    pub(super) fn max_last(&self) -> u64 {
        self.max_lasts[..self.len].iter().copied().max().unwrap_or(0)
    }

    /// The child in whose part of the order `(start, order)` lies.
    #[inline(always)]
    pub(super) fn place(&self, start: u64, order: u64) -> usize {
        let mut at = count_at_most(&self.starts, self.is_short(), start).clamp(1, self.len) - 1;
        // Only bounds with this very start can still be above the key.
        while at > 0 && self.starts[at] == start && self.orders[at] > order {
            at -= 1;
        }
        at
    }
}

impl Part for Inner {
    fn len(&self) -> usize {
        self.len
    }

    fn set_bound(&mut self, start: u64, order: u64) {
        (self.starts[0], self.orders[0]) = (start, order);
    }

    fn split_off(&mut self, at: usize) -> Self {
        let mut upper = Self::EMPTY;
        for from in at..self.len {
            upper.add(from - at, self.get(from));
        }
        self.starts[at..self.len].fill(UNUSED);
        self.len = at;
        self.tighten();
        upper
    }

    fn append(&mut self, upper: &mut Self) {
        for from in 0..upper.len {
            self.add(self.len, upper.get(from));
        }
        *upper = Self::EMPTY;
    }

    fn child(&self, node: Node) -> Child {
        Child { start: self.starts[0], order: self.orders[0], max_last: self.max_last(), node }
    }
}
