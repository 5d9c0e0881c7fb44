//! The interval index: which intervals overlap a range, in order of their start.
//!
//! A B-tree in an arena. Keys are `(start, order)`, so that intervals with one start stay in order of insertion (rule O1); a
//! node knows for each child the greatest `last` below it, so that a query leaves out whole subtrees. It takes the place of
//! the kernel's augmented red-black tree (`lib/interval_tree.c`), whose query visits a cache line for each of its
//! `2 log2 n` levels. What was measured against it, and why leaves have the size they have, is in `DESIGN.md`.
//!
//! Nothing here knows of sequences, locks or notifiers.
#![forbid(unsafe_code)]

use crate::range::AddressRange;
use alloc::vec::Vec;
use core::ops::Range;

/// Children of an inner node, or intervals of a leaf, at most.
const CAP: usize = 32;
/// Below this a node looks for a neighbour to merge with.
const LOW: usize = CAP / 4;
/// A merged node holds no more than this, so that the next insertion does not split it again.
const MERGED: usize = CAP * 3 / 4;
/// The span of an index without intervals.
const NOWHERE: (u64, u64) = (u64::MAX, 0);
/// A start that is not in use: sorts behind all others. (An interval may start there, too; a node knows its `len`.)
const UNUSED: u64 = u64::MAX;
/// Height of the tallest tree: `LOW`-full nodes over `u32::MAX` leaves.
const HEIGHT: usize = 12;

/// What the index stores: small, comparable, and able to name its place among equals.
pub(crate) trait Indexed: Copy + PartialEq {
    /// Rises with each insertion; the order of intervals with one start.
    fn order(self) -> u64;
}

type Node = u32;

#[derive(Clone)]
struct Leaf<V> {
    len: usize,
    /// No interval but the last one ends further than this beyond the start of the next one.
    slack: u64,
    starts: [u64; CAP],
    lasts: [u64; CAP],
    values: [Option<V>; CAP],
}

#[derive(Clone)]
struct Inner {
    len: usize,
    /// As in a leaf: no child but the last one reaches further than this beyond the lower bound of the next one.
    slack: u64,
    /// Lower bounds: every key in `children[i]` is `>= (starts[i], orders[i])` and below the next bound. The first is not looked at.
    starts: [u64; CAP],
    orders: [u64; CAP],
    /// The greatest `last` in `children[i]`.
    max_lasts: [u64; CAP],
    children: [Node; CAP],
}

/// Nodes of one kind, and those that are free.
struct Arena<T> {
    nodes: Vec<T>,
    free: Vec<Node>,
}

/// What a split or a merge tells the parent of a child: its lower bound and greatest `last`.
#[derive(Clone, Copy)]
struct Child {
    start: u64,
    order: u64,
    max_last: u64,
    node: Node,
}

/// Intervals with values, ordered by `(start, order)`.
pub(crate) struct IntervalIndex<V> {
    leaves: Arena<Leaf<V>>,
    inners: Arena<Inner>,
    root: Node,
    /// 0 when the root is a leaf.
    height: usize,
    len: usize,
    /// From the least start to the greatest `last` that any interval had since the index was empty: most invalidations of a process
    /// are of memory that no device has mapped, and end here.
    span: (u64, u64),
}

/// What merging and balancing need of either kind of node.
trait Part: Sized {
    fn len(&self) -> usize;
    /// Replaces the lower bound of the first child, which a node does not keep right itself.
    fn set_bound(&mut self, start: u64, order: u64);
    /// The upper part from `at` on, cut off into a node of its own.
    fn split_off(&mut self, at: usize) -> Self;
    fn append(&mut self, upper: &mut Self);
    fn child(&self, node: Node) -> Child;
}

impl<T: Part> Arena<T> {
    /// Merges the neighbours `a` and `b`, or shares out evenly what they hold if that is too much for one node.
    /// `start` and `order` are the parent's bound for `b`. Returns what the parent has to know; no upper child after a merge.
    fn balance(&mut self, a: Node, b: Node, (start, order): (u64, u64)) -> (Child, Option<Child>) {
        let [lower, upper] =
            self.nodes.get_disjoint_mut([a as usize, b as usize]).expect("two children of one parent are different nodes");
        upper.set_bound(start, order);
        let total = lower.len() + upper.len();
        if total <= MERGED {
            lower.append(upper);
            let lower = lower.child(a);
            self.free.push(b);
            return (lower, None);
        }
        let half = total / 2;
        if lower.len() > half {
            let mut moved = lower.split_off(half);
            moved.append(upper);
            *upper = moved;
        } else {
            let rest = upper.split_off(half - lower.len());
            lower.append(upper);
            *upper = rest;
        }
        (lower.child(a), Some(upper.child(b)))
    }
}

impl<T> Arena<T> {
    fn add(&mut self, node: T) -> Node {
        if let Some(at) = self.free.pop() {
            self.nodes[at as usize] = node;
            return at;
        }
        let at = Node::try_from(self.nodes.len()).expect("an index holds fewer than 2^32 nodes");
        if self.nodes.len() == self.nodes.capacity() {
            // By an eighth, not twofold: memory per notifier is promised, and a large block is moved by its page table.
            self.nodes.reserve_exact(self.nodes.len() / 8 + 1);
        }
        self.nodes.push(node);
        at
    }

    #[inline]
    fn at(&self, node: Node) -> &T {
        &self.nodes[node as usize]
    }

    #[inline]
    fn at_mut(&mut self, node: Node) -> &mut T {
        &mut self.nodes[node as usize]
    }
}

/// Moves `array[at..len]` up by one and puts `value` at `at`.
#[inline]
fn open<T: Copy, const N: usize>(array: &mut [T; N], len: usize, at: usize, value: T) {
    array.copy_within(at..len, at + 1);
    array[at] = value;
}

/// Moves `array[at + 1..len]` down by one.
#[inline]
fn close<T: Copy, const N: usize>(array: &mut [T; N], len: usize, at: usize) {
    array.copy_within(at + 1..len, at);
}

/// How far part `at` of a node reaches beyond the start of the next one, or the one before it beyond its own, if that is further.
#[inline]
fn overhang(starts: &[u64; CAP], lasts: &[u64; CAP], len: usize, at: usize) -> u64 {
    let own = if at + 1 < len { lasts[at].saturating_sub(starts[at + 1]) } else { 0 };
    let before = if at > 0 { lasts[at - 1].saturating_sub(starts[at]) } else { 0 };
    own.max(before)
}

/// How many of the sorted `starts` are at most `start`; places that are not in use hold [`UNUSED`].
///
/// Looks at three of them at a time: no step has a branch, and the loads of the first do not depend on each other, so that the cache lines of a
/// node are fetched at the same time, which a search by halves does not allow.
#[inline]
fn count_at_most(starts: &[u64; CAP], len: usize, start: u64) -> usize {
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
fn candidates(starts: &[u64; CAP], len: usize, slack: u64, range: AddressRange) -> Range<usize> {
    let end = count_at_most(starts, len, range.last());
    let bound = range.start().saturating_sub(slack);
    let mut from = end;
    while from > 0 && (from == end || starts[from] >= bound) {
        from -= 1;
    }
    from..end
}

/// The smallest slack of a node whose parts start and end there.
fn slack(starts: &[u64], lasts: &[u64]) -> u64 {
    lasts.iter().zip(starts.iter().skip(1)).map(|(last, next)| last.saturating_sub(*next)).max().unwrap_or(0)
}

impl<V: Indexed> Leaf<V> {
    const EMPTY: Self = Self { len: 0, slack: 0, starts: [UNUSED; CAP], lasts: [0; CAP], values: [None; CAP] };

    fn add(&mut self, at: usize, range: AddressRange, value: V) {
        open(&mut self.starts, self.len, at, range.start());
        open(&mut self.lasts, self.len, at, range.last());
        open(&mut self.values, self.len, at, Some(value));
        self.len += 1;
        self.stretch(at);
    }

    /// Interval `at` is new: it may reach beyond the start of the next, and the one before beyond its own.
    #[inline]
    fn stretch(&mut self, at: usize) {
        self.slack = self.slack.max(overhang(&self.starts, &self.lasts, self.len, at));
    }

    fn take(&mut self, at: usize) {
        let tighter = self.slack != 0 && overhang(&self.starts, &self.lasts, self.len, at) == self.slack;
        close(&mut self.starts, self.len, at);
        close(&mut self.lasts, self.len, at);
        close(&mut self.values, self.len, at);
        self.len -= 1;
        self.starts[self.len] = UNUSED;
        self.values[self.len] = None;
        if tighter {
            self.tighten();
        }
    }

    fn tighten(&mut self) {
        self.slack = slack(&self.starts[..self.len], &self.lasts[..self.len]);
    }

    fn max_last(&self) -> u64 {
        self.lasts[..self.len].iter().copied().max().unwrap_or(0)
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
        upper.lasts[..upper.len].copy_from_slice(&self.lasts[at..self.len]);
        upper.values[..upper.len].copy_from_slice(&self.values[at..self.len]);
        self.starts[at..self.len].fill(UNUSED);
        self.values[at..self.len].fill(None);
        self.len = at;
        self.tighten();
        upper.tighten();
        upper
    }

    fn append(&mut self, upper: &mut Self) {
        let (at, end) = (self.len, self.len + upper.len);
        self.starts[at..end].copy_from_slice(&upper.starts[..upper.len]);
        self.lasts[at..end].copy_from_slice(&upper.lasts[..upper.len]);
        self.values[at..end].copy_from_slice(&upper.values[..upper.len]);
        self.len = end;
        self.tighten();
        *upper = Self::EMPTY;
    }

    fn child(&self, node: Node) -> Child {
        let order = self.values[0].map_or(0, V::order);
        Child { start: self.starts[0], order, max_last: self.max_last(), node }
    }
}

impl Inner {
    const EMPTY: Self =
        Self { len: 0, slack: 0, starts: [UNUSED; CAP], orders: [0; CAP], max_lasts: [0; CAP], children: [0; CAP] };

    fn add(&mut self, at: usize, child: Child) {
        open(&mut self.starts, self.len, at, child.start);
        open(&mut self.orders, self.len, at, child.order);
        open(&mut self.max_lasts, self.len, at, child.max_last);
        open(&mut self.children, self.len, at, child.node);
        self.len += 1;
        self.stretch(at);
    }

    /// The greatest `last` below child `at` has risen, or the child is new.
    #[inline]
    fn stretch(&mut self, at: usize) {
        self.slack = self.slack.max(overhang(&self.starts, &self.max_lasts, self.len, at));
    }

    fn tighten(&mut self) {
        self.slack = slack(&self.starts[..self.len], &self.max_lasts[..self.len]);
    }

    fn take(&mut self, at: usize) {
        close(&mut self.starts, self.len, at);
        close(&mut self.orders, self.len, at);
        close(&mut self.max_lasts, self.len, at);
        close(&mut self.children, self.len, at);
        self.len -= 1;
        self.starts[self.len] = UNUSED;
    }

    fn get(&self, at: usize) -> Child {
        Child { start: self.starts[at], order: self.orders[at], max_last: self.max_lasts[at], node: self.children[at] }
    }

    fn max_last(&self) -> u64 {
        self.max_lasts[..self.len].iter().copied().max().unwrap_or(0)
    }

    /// The child in whose part of the order `(start, order)` lies.
    #[inline]
    fn place(&self, start: u64, order: u64) -> usize {
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

impl<V: Indexed> IntervalIndex<V> {
    pub(crate) fn new() -> Self {
        Self {
            leaves: Arena { nodes: Vec::new(), free: Vec::new() },
            inners: Arena { nodes: Vec::new(), free: Vec::new() },
            root: 0,
            height: 0,
            len: 0,
            span: NOWHERE,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Calls `hit` with each value whose interval overlaps `range`, in order of start, then of insertion.
    #[inline]
    pub(crate) fn overlapping(&self, range: AddressRange, mut hit: impl FnMut(V)) {
        self.overlapping_or_covering(range, |value, _| hit(value));
    }

    /// The same; `hit` is also told whether the interval covers all of `range`.
    #[inline]
    pub(crate) fn overlapping_or_covering(&self, range: AddressRange, mut hit: impl FnMut(V, bool)) {
        let (first, last) = self.span;
        if range.start() <= last && range.last() >= first && self.len != 0 {
            self.descend(self.root, self.height, range, &mut hit);
        }
    }

    /// Mostly one child of a node can overlap: the way down to it is a loop, to be built into the caller.
    #[inline]
    fn descend(&self, mut node: Node, mut height: usize, range: AddressRange, hit: &mut impl FnMut(V, bool)) {
        while height > 0 {
            let inner = self.inners.at(node);
            height -= 1;
            let candidates = candidates(&inner.starts, inner.len, inner.slack, range);
            // What starts before the first bound is in the first child, too.
            let last = candidates.end.saturating_sub(1);
            if candidates.start < last {
                self.branch(inner, candidates.start..last, height, range, hit);
            }
            if inner.max_lasts[last] < range.start() {
                return;
            }
            node = inner.children[last];
        }
        let leaf = self.leaves.at(node);
        for at in candidates(&leaf.starts, leaf.len, leaf.slack, range) {
            if leaf.lasts[at] >= range.start()
                && let Some(value) = leaf.values[at]
            {
                hit(value, leaf.starts[at] <= range.start() && range.last() <= leaf.lasts[at]);
            }
        }
    }

    /// Several children may overlap.
    #[inline(never)]
    fn branch(&self, inner: &Inner, children: Range<usize>, height: usize, range: AddressRange, hit: &mut impl FnMut(V, bool)) {
        for at in children {
            if inner.max_lasts[at] >= range.start() {
                self.descend(inner.children[at], height, range, hit);
            }
        }
    }

    /// Adds an interval. `value.order()` must be greater than that of every interval with the same start.
    pub(crate) fn insert(&mut self, range: AddressRange, value: V) {
        self.len += 1;
        self.span = (self.span.0.min(range.start()), self.span.1.max(range.last()));
        if self.len == 1 {
            self.height = 0;
            self.root = self.leaves.add(Leaf::EMPTY);
        }
        // Down to the leaf; every node on the way learns of the new `last`.
        let mut path = [(0, 0); HEIGHT];
        let mut node = self.root;
        let mut rightmost = true;
        for level in (0..self.height).rev() {
            let inner = self.inners.at_mut(node);
            let at = inner.place(range.start(), u64::MAX);
            inner.max_lasts[at] = inner.max_lasts[at].max(range.last());
            inner.stretch(at);
            rightmost &= at + 1 == inner.len;
            path[level] = (node, at);
            node = inner.children[at];
        }
        let leaf = self.leaves.at_mut(node);
        let at = count_at_most(&leaf.starts, leaf.len, range.start());
        if leaf.len < CAP {
            leaf.add(at, range, value);
            return;
        }
        // In ascending insertion the new leaf begins empty, so that the ones behind stay full.
        let cut = if rightmost && at == CAP { CAP } else { CAP / 2 };
        let mut upper = leaf.split_off(cut);
        if at > cut || cut == CAP {
            upper.add(at - cut, range, value);
        } else {
            leaf.add(at, range, value);
        }
        let lower_max = leaf.max_last();
        let upper_node = self.leaves.add(upper);
        let upper = self.leaves.at(upper_node).child(upper_node);
        self.grow(&path, node, lower_max, upper);
    }

    /// Puts `upper`, split off from `lower`, behind it in the parents along `path`.
    fn grow(&mut self, path: &[(Node, usize); HEIGHT], mut lower: Node, mut lower_max: u64, mut upper: Child) {
        for &(parent, at) in &path[..self.height] {
            let inner = self.inners.at_mut(parent);
            inner.max_lasts[at] = lower_max;
            if inner.len < CAP {
                inner.add(at + 1, upper);
                return;
            }
            let cut = if at + 1 == CAP { CAP - 1 } else { CAP / 2 };
            let mut split = inner.split_off(cut);
            if at + 1 > cut {
                split.add(at + 1 - cut, upper);
            } else {
                inner.add(at + 1, upper);
            }
            (lower, lower_max) = (parent, inner.max_last());
            let node = self.inners.add(split);
            upper = self.inners.at(node).child(node);
        }
        let mut root = Inner::EMPTY;
        root.add(0, Child { start: 0, order: 0, max_last: lower_max, node: lower });
        root.add(1, upper);
        self.root = self.inners.add(root);
        self.height += 1;
    }

    /// Removes the interval that was inserted with this range and value; says whether it was there.
    pub(crate) fn remove(&mut self, range: AddressRange, value: V) -> bool {
        if self.len == 0 {
            return false;
        }
        let mut path = [(0, 0); HEIGHT];
        let mut node = self.root;
        for level in (0..self.height).rev() {
            let inner = self.inners.at(node);
            let at = inner.place(range.start(), value.order());
            path[level] = (node, at);
            node = inner.children[at];
        }
        let leaf = self.leaves.at_mut(node);
        let end = count_at_most(&leaf.starts, leaf.len, range.start());
        let found = leaf.values[..end].iter().rposition(|candidate| *candidate == Some(value));
        let Some(at) = found else {
            return false;
        };
        leaf.take(at);
        self.len -= 1;
        self.shrink(&path, range.last());
        true
    }

    /// After an interval that ended at `last` left the leaf at the end of `path`: corrects the greatest `last`s and merges what has become small.
    fn shrink(&mut self, path: &[(Node, usize); HEIGHT], last: u64) {
        for (level, &(parent, at)) in path[..self.height].iter().enumerate() {
            let inner = self.inners.at(parent);
            let child = inner.children[at];
            let len = if level == 0 { self.leaves.at(child).len } else { self.inners.at(child).len };
            let was_greatest = inner.max_lasts[at] == last;
            if len < LOW {
                self.merge(level, parent, at);
            } else if was_greatest {
                let max_last = self.max_last(level, child);
                let inner = self.inners.at_mut(parent);
                inner.max_lasts[at] = max_last;
                if inner.slack != 0 {
                    inner.tighten();
                }
            } else {
                // Neither size nor greatest `last` of this child changed: nothing changes above.
                return;
            }
        }
        while self.height > 0 && self.inners.at(self.root).len == 1 {
            let child = self.inners.at(self.root).children[0];
            self.inners.free.push(self.root);
            self.root = child;
            self.height -= 1;
        }
        if self.len == 0 {
            self.leaves.free.push(self.root);
            self.span = NOWHERE;
        }
    }

    fn max_last(&self, level: usize, child: Node) -> u64 {
        if level == 0 { self.leaves.at(child).max_last() } else { self.inners.at(child).max_last() }
    }

    /// Joins child `at` of `parent`, which has become small, with a neighbour.
    fn merge(&mut self, level: usize, parent: Node, at: usize) {
        let inner = self.inners.at(parent);
        // With the left neighbour where there is one, else with the right one; every inner node has two children at least.
        let left = at.saturating_sub(1);
        let (a, b) = (inner.children[left], inner.children[left + 1]);
        let bound = (inner.starts[left + 1], inner.orders[left + 1]);
        let (lower, upper) = if level == 0 { self.leaves.balance(a, b, bound) } else { self.inners.balance(a, b, bound) };
        let inner = self.inners.at_mut(parent);
        inner.max_lasts[left] = lower.max_last;
        inner.take(left + 1);
        if let Some(upper) = upper {
            inner.add(left + 1, upper);
        }
        inner.tighten();
    }

    /// Bytes of heap that the index occupies.
    #[cfg(test)]
    fn heap_bytes(&self) -> usize {
        self.leaves.nodes.capacity() * size_of::<Leaf<V>>() + self.inners.nodes.capacity() * size_of::<Inner>()
    }
}

#[cfg(test)]
mod tests;
