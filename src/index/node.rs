//! The inner nodes of the index: what they say of their children, and what merging needs of either
//! kind of node.
#![forbid(unsafe_code)]

use super::Node;
use crate::range::AddressRange;
use core::hint::select_unpredictable;
use core::ops::Range;

/// Children of an inner node, or intervals of a leaf, at most.
pub(super) const CAP: usize = 32;
/// Below this a node looks for a neighbour to merge with.
pub(super) const LOW: usize = CAP / 4;
/// A merged node holds no more than this, so that the next insertion does not split it again.
pub(super) const MERGED: usize = CAP * 3 / 4;
/// A start that is not in use: sorts behind all others. (An interval may start there, too; a node
/// knows its `len`.)
pub(super) const UNUSED: u64 = u64::MAX;

#[derive(Clone)]
pub(super) struct Inner {
    pub(super) len: usize,
    /// As in a leaf: no child reaches further than this many bytes beyond the lower bound of the
    /// next one.
    pub(super) slack: u64,
    /// Lower bounds: every key in `children[i]` is `>= (starts[i], orders[i])` and below the next
    /// bound. The first is not looked at.
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

/// How far part `at` of a node reaches into the next one, or the one before it into it, if that is
/// further.
#[inline]
pub(super) fn overhang(
    starts: &[u64; CAP],
    last: impl Fn(usize) -> u64,
    len: usize,
    at: usize,
) -> u64 {
    let own = if at + 1 < len { into_next(last(at), starts[at + 1]) } else { 0 };
    let before = if at > 0 { into_next(last(at - 1), starts[at]) } else { 0 };
    own.max(before)
}

/// How many of the sorted `starts` are at most `start`.
///
/// Looks at some of them at a time: no step has a branch, and the loads of the first do not depend
/// on each other, so that the cache lines of a node are fetched at the same time, which a search by
/// halves does not allow. The first step is left out where only `few` places matter, the first
/// eight. Of a sum of eight answers the compiler makes a chain of eight additions; of starts that
/// are sorted the middle one says which half needs adding.
#[inline(always)]
pub(super) fn count_at_most(starts: &[u64; CAP], few: bool, start: u64) -> usize {
    let below = |candidate: u64| usize::from(candidate <= start);
    let (eights, _) = starts.as_chunks::<{ CAP / 4 }>();
    let eight = if few {
        0
    } else {
        select_unpredictable(eights[1][7] <= start, 2 + below(eights[2][7]), below(eights[0][7]))
    };
    let [a, b, c, d, e, f, g, h] = eights[eight];
    let lower = select_unpredictable(b <= start, 2 + below(c), below(a));
    let upper = select_unpredictable(f <= start, 6 + below(g) + below(h), 4 + below(e));
    8 * eight + select_unpredictable(d <= start, upper, lower)
}

/// The first part of a node that may reach as far as `start`, of those before `end`, the count of
/// those that start early enough: the last of them, and those before it that may reach so far.
#[inline(always)]
pub(super) fn first_candidate(starts: &[u64; CAP], slack: u64, start: u64, end: usize) -> usize {
    // Where the next part must start, at least. A slack that is too great for a number is one less,
    // so is the start.
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
pub(super) fn into_next(last: u64, next: u64) -> u64 {
    last.checked_sub(next).map_or(0, |beyond| beyond.saturating_add(1))
}

/// The smallest slack of a node whose parts start and end there.
pub(super) fn slack(starts: &[u64], lasts: impl Iterator<Item = u64>) -> u64 {
    lasts.zip(starts.iter().skip(1)).map(|(last, next)| into_next(last, *next)).max().unwrap_or(0)
}

impl Inner {
    pub(super) const EMPTY: Self = Self {
        len: 0,
        slack: 0,
        starts: [UNUSED; CAP],
        orders: [0; CAP],
        max_lasts: [0; CAP],
        children: [0; CAP],
    };

    /// The children that may overlap `range`, without the last of them, which is the one where the
    /// range ends.
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
        Child {
            start: self.starts[at],
            order: self.orders[at],
            max_last: self.max_lasts[at],
            node: self.children[at],
        }
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
