//! The nodes of the index: what is stored, how a node is searched, split and merged.
#![forbid(unsafe_code)]

use super::{Indexed, Node};
use crate::range::AddressRange;
use core::ops::Range;

/// Children of an inner node, or intervals of a leaf, at most.
pub(super) const CAP: usize = 32;
/// Below this a node looks for a neighbour to merge with.
pub(super) const LOW: usize = CAP / 4;
/// A merged node holds no more than this, so that the next insertion does not split it again.
pub(super) const MERGED: usize = CAP * 3 / 4;
/// A start that is not in use: sorts behind all others. (An interval may start there, too; a node knows its `len`.)
pub(super) const UNUSED: u64 = u64::MAX;
#[derive(Clone)]
pub(super) struct Leaf<V> {
    pub(super) len: usize,
    /// No interval but the last one ends further than this beyond the start of the next one.
    pub(super) slack: u64,
    pub(super) starts: [u64; CAP],
    /// The rest of each interval. Together, so that a hit touches one more cache line and not two, and a change moves two arrays and not three.
    pub(super) rests: [Rest<V>; CAP],
}

/// What a leaf knows of an interval beside its start.
#[derive(Clone, Copy)]
pub(super) struct Rest<V> {
    pub(super) last: u64,
    pub(super) value: Option<V>,
}

#[derive(Clone)]
pub(super) struct Inner {
    pub(super) len: usize,
    /// As in a leaf: no child but the last one reaches further than this beyond the lower bound of the next one.
    pub(super) slack: u64,
    /// Lower bounds: every key in `children[i]` is `>= (starts[i], orders[i])` and below the next bound. The first is not looked at.
    pub(super) starts: [u64; CAP],
    pub(super) orders: [u64; CAP],
    /// The greatest `last` in `children[i]`.
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

/// How far part `at` of a node reaches beyond the start of the next one, or the one before it beyond its own, if that is further.
#[inline]
pub(super) fn overhang(starts: &[u64; CAP], last: impl Fn(usize) -> u64, len: usize, at: usize) -> u64 {
    let own = if at + 1 < len { last(at).saturating_sub(starts[at + 1]) } else { 0 };
    let before = if at > 0 { last(at - 1).saturating_sub(starts[at]) } else { 0 };
    own.max(before)
}

/// How many of the sorted `starts` are at most `start`; places that are not in use hold [`UNUSED`].
///
/// Looks at three of them at a time: no step has a branch, and the loads of the first do not depend on each other, so that the cache lines of a
/// node are fetched at the same time, which a search by halves does not allow.
#[inline]
pub(super) fn count_at_most(starts: &[u64; CAP], len: usize, start: u64) -> usize {
    let below = |candidate: u64| usize::from(candidate <= start);
    let (eights, _) = starts.as_chunks::<{ CAP / 4 }>();
    let eight = if len <= 8 { 0 } else { below(eights[0][7]) + below(eights[1][7]) + below(eights[2][7]) };
    let [a, b, c, d, e, f, g, h] = eights[eight];
    let lower = (below(a) + below(b)) + (below(c) + below(d));
    let upper = (below(e) + below(f)) + (below(g) + below(h));
    (8 * eight + lower + upper).min(len)
}

/// Which of the first `len` parts of a node may overlap `range`: the one that starts last among those that start at or before its end, and
/// those before it that may reach so far.
#[inline]
pub(super) fn candidates(starts: &[u64; CAP], len: usize, slack: u64, range: AddressRange) -> Range<usize> {
    let end = count_at_most(starts, len, range.last());
    let bound = range.start().saturating_sub(slack);
    let mut from = end;
    while from > 0 && (from == end || starts[from] >= bound) {
        from -= 1;
    }
    from..end
}

/// The smallest slack of a node whose parts start and end there.
pub(super) fn slack(starts: &[u64], lasts: impl Iterator<Item = u64>) -> u64 {
    lasts.zip(starts.iter().skip(1)).map(|(last, next)| last.saturating_sub(*next)).max().unwrap_or(0)
}

impl<V: Indexed> Leaf<V> {
    const NOTHING: Rest<V> = Rest { last: 0, value: None };
    pub(super) const EMPTY: Self = Self { len: 0, slack: 0, starts: [UNUSED; CAP], rests: [Self::NOTHING; CAP] };

    pub(super) fn add(&mut self, at: usize, range: AddressRange, value: V) {
        open(&mut self.starts, self.len, at, range.start());
        open(&mut self.rests, self.len, at, Rest { last: range.last(), value: Some(value) });
        self.len += 1;
        // It may reach beyond the start of the next, and the one before beyond its own.
        self.slack = self.slack.max(self.overhang(at));
    }

    #[inline]
    fn overhang(&self, at: usize) -> u64 {
        overhang(&self.starts, |at| self.rests[at].last, self.len, at)
    }

    pub(super) fn take(&mut self, at: usize) {
        let tighter = self.slack != 0 && self.overhang(at) == self.slack;
        close(&mut self.starts, self.len, at);
        close(&mut self.rests, self.len, at);
        self.len -= 1;
        self.starts[self.len] = UNUSED;
        self.rests[self.len] = Self::NOTHING;
        if tighter {
            self.tighten();
        }
    }

    pub(super) fn tighten(&mut self) {
        self.slack = slack(&self.starts[..self.len], self.lasts());
    }

    fn lasts(&self) -> impl Iterator<Item = u64> {
        self.rests[..self.len].iter().map(|rest| rest.last)
    }

    pub(super) fn max_last(&self) -> u64 {
        self.lasts().max().unwrap_or(0)
    }
}

impl<V: Indexed> Part for Leaf<V> {
    fn len(&self) -> usize {
        self.len
    }

    fn set_bound(&mut self, _start: u64, _order: u64) {}

    fn split_off(&mut self, at: usize) -> Self {
        let mut upper = Self::EMPTY;
        upper.len = self.len - at;
        upper.starts[..upper.len].copy_from_slice(&self.starts[at..self.len]);
        upper.rests[..upper.len].copy_from_slice(&self.rests[at..self.len]);
        self.starts[at..self.len].fill(UNUSED);
        self.rests[at..self.len].fill(Self::NOTHING);
        self.len = at;
        self.tighten();
        upper.tighten();
        upper
    }

    fn append(&mut self, upper: &mut Self) {
        let (at, end) = (self.len, self.len + upper.len);
        self.starts[at..end].copy_from_slice(&upper.starts[..upper.len]);
        self.rests[at..end].copy_from_slice(&upper.rests[..upper.len]);
        self.len = end;
        self.tighten();
        *upper = Self::EMPTY;
    }

    fn child(&self, node: Node) -> Child {
        let order = self.rests[0].value.map_or(0, V::order);
        Child { start: self.starts[0], order, max_last: self.max_last(), node }
    }
}

impl Inner {
    pub(super) const EMPTY: Self =
        Self { len: 0, slack: 0, starts: [UNUSED; CAP], orders: [0; CAP], max_lasts: [0; CAP], children: [0; CAP] };

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
    #[inline]
    pub(super) fn place(&self, start: u64, order: u64) -> usize {
        let mut at = count_at_most(&self.starts, self.len, start).max(1) - 1;
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
