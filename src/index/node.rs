//! The inner nodes of the index, the search for a start within one node, and [`Mergeable`]: what
//! merging needs of an inner node and of a leaf.
#![forbid(unsafe_code)]

use super::Node;
use crate::range::AddressRange;
use core::hint::select_unpredictable;
use core::ops::Range;

/// Capacity of a node: children of an inner node, or intervals of a leaf.
pub(super) const CAP: usize = 32;
/// A node with fewer parts than this is merged with a neighbour.
pub(super) const LOW: usize = CAP / 4;
/// Two nodes are merged only if they have at most this many parts together. The next insertion then
/// does not split the node again.
pub(super) const MERGED: usize = CAP * 3 / 4;
const _: () = assert!(2 * LOW <= MERGED && MERGED < CAP, "a merged node has room");
/// The start of an unused slot. It sorts after all others. An interval may have this start, too;
/// a node tells them apart by its `len`.
pub(super) const UNUSED: u64 = u64::MAX;

/// An inner node. The parts of it are its children, in order.
#[derive(Clone)]
pub(super) struct InnerNode {
    /// Number of children.
    pub(super) len: usize,
    /// Upper bound, in bytes, on how far any child extends past the lower bound of the next one.
    pub(super) slack: u64,
    /// Starts of the lower bounds. Every key in `children[i]` is at least `(starts[i], orders[i])`
    /// and below the next bound. A search does not look at the first bound.
    pub(super) starts: [u64; CAP],
    /// Orders of the lower bounds.
    pub(super) orders: [u64; CAP],
    /// The greatest `last` in `children[i]`. It may stem from a removed interval.
    pub(super) max_lasts: [u64; CAP],
    pub(super) children: [Node; CAP],
}

/// What a parent stores of a child: its lower bound and greatest `last`.
#[derive(Clone, Copy)]
pub(super) struct Child {
    pub(super) start: u64,
    pub(super) order: u64,
    pub(super) max_last: u64,
    pub(super) node: Node,
}

/// The operations of a node, inner or leaf, that merging and balancing use.
pub(super) trait Mergeable: Sized {
    /// Returns the number of parts: children or intervals.
    fn len(&self) -> usize;
    /// Moves the parts from `at` on into a new node, and returns it.
    fn split_off(&mut self, at: usize) -> Self;
    /// Moves all parts of `upper` to the end of this node.
    fn append(&mut self, upper: &mut Self);
    /// Returns what the parent stores of this node, whose number is `node`.
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

/// Returns how far part `at` of a node extends into the next one, or the previous one into part
/// `at`, whichever is more. `last` gives the last address of a part.
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

/// Returns how many of the sorted `starts` are at most `start`.
///
/// The first step selects eight starts, the second counts within them. No step has a branch. The
/// loads of the first step do not depend on each other, so the cache lines of a node arrive at the
/// same time. A binary search would load them one after the other. With `few`, only the first eight
/// starts are in use, and the first step is skipped.
///
/// A sum of eight comparisons would compile to a chain of eight additions. The starts are sorted,
/// so the middle one selects the half that needs adding.
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

/// Returns the index of the first of `starts[..end]` whose interval may extend to `start`.
///
/// `end` is the number of intervals that start early enough. The last of them is always a
/// candidate. Earlier ones are candidates only within `slack`.
#[inline(always)]
pub(super) fn first_candidate(starts: &[u64; CAP], slack: u64, start: u64, end: usize) -> usize {
    // A part is a candidate if the next one starts at `bound` or later. A slack of 2^64 is stored
    // as one less. The start is lowered by one to match.
    let bound = start.min(u64::MAX - 1).checked_sub(slack).map_or(0, |bound| bound + 1);
    // Either all parts are candidates, or few.
    if starts[0] >= bound {
        return 0;
    }
    let mut from = end.saturating_sub(1);
    while from > 0 && starts[from % CAP] >= bound {
        from -= 1;
    }
    from
}

/// Returns how many bytes an interval that ends at `last`, inclusive, extends into one that starts
/// at `next`.
#[inline]
pub(super) fn into_next(last: u64, next: u64) -> u64 {
    last.checked_sub(next).map_or(0, |beyond| beyond.saturating_add(1))
}

/// Returns the smallest slack of a node whose parts have these starts and last addresses.
pub(super) fn slack(starts: &[u64], lasts: impl Iterator<Item = u64>) -> u64 {
    lasts.zip(starts.iter().skip(1)).map(|(last, next)| into_next(last, *next)).max().unwrap_or(0)
}

impl InnerNode {
    /// A node without children.
    pub(super) const EMPTY: Self = Self {
        len: 0,
        slack: 0,
        starts: [UNUSED; CAP],
        orders: [0; CAP],
        max_lasts: [0; CAP],
        children: [0; CAP],
    };

    /// Returns the children that may overlap `range`, except the last one. The last one is the
    /// `end` of the result: the child where the range ends.
    #[inline(always)]
    pub(super) fn candidates(&self, range: AddressRange) -> Range<usize> {
        let end = count_at_most(&self.starts, self.is_short(), range.last()).min(self.len);
        let from = first_candidate(&self.starts, self.slack, range.start(), end);
        // The first child also has the intervals that start before the first bound.
        let last = end.saturating_sub(1);
        from.min(last)..last
    }

    /// Returns whether there are at most eight children.
    #[inline]
    pub(super) fn is_short(&self) -> bool {
        self.len <= 8
    }

    /// Inserts a child at `at`. The node must not be full.
    pub(super) fn add(&mut self, at: usize, child: Child) {
        open(&mut self.starts, self.len, at, child.start);
        open(&mut self.orders, self.len, at, child.order);
        open(&mut self.max_lasts, self.len, at, child.max_last);
        open(&mut self.children, self.len, at, child.node);
        self.len += 1;
        self.stretch(at);
    }

    /// Raises the slack after the greatest `last` below child `at` has risen, or the child was
    /// added.
    #[inline]
    pub(super) fn stretch(&mut self, at: usize) {
        self.slack = self.slack.max(overhang(&self.starts, |at| self.max_lasts[at], self.len, at));
    }

    /// Computes the slack anew.
    pub(super) fn tighten(&mut self) {
        self.slack = slack(&self.starts[..self.len], self.max_lasts[..self.len].iter().copied());
    }

    /// Removes child `at`.
    pub(super) fn take(&mut self, at: usize) {
        close(&mut self.starts, self.len, at);
        close(&mut self.orders, self.len, at);
        close(&mut self.max_lasts, self.len, at);
        close(&mut self.children, self.len, at);
        self.len -= 1;
        self.starts[self.len] = UNUSED;
    }

    /// Returns child `at`.
    pub(super) fn get(&self, at: usize) -> Child {
        Child {
            start: self.starts[at],
            order: self.orders[at],
            max_last: self.max_lasts[at],
            node: self.children[at],
        }
    }

    /// Returns the greatest `last` below the node.
    pub(super) fn max_last(&self) -> u64 {
        self.max_lasts[..self.len].iter().copied().max().unwrap_or(0)
    }

    /// Returns the child to which the key `(start, order)` belongs.
    #[inline(always)]
    pub(super) fn child_for(&self, start: u64, order: u64) -> usize {
        let mut at = count_at_most(&self.starts, self.is_short(), start).clamp(1, self.len) - 1;
        // Only a bound with the same start can still be above the key.
        while at > 0 && self.starts[at] == start && self.orders[at] > order {
            at -= 1;
        }
        at
    }
}

impl Mergeable for InnerNode {
    fn len(&self) -> usize {
        self.len
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
