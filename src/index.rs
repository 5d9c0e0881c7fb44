//! The interval index: which intervals overlap a range, in order of their start.
//!
//! A B-tree in an arena. Keys are `(start, order)`, so that intervals with one start stay in order
//! of insertion (rule O1); a node knows for each child how far it reaches, so that a query leaves
//! out whole subtrees. It takes the place of the kernel's augmented red-black tree
//! (`lib/interval_tree.c`), whose query visits a cache line for each of its `2 log2 n` levels. What
//! was measured against it, and why leaves have the size they have, is in `DESIGN.md`.
//!
//! Nothing here knows of sequences, locks or notifiers.
#![forbid(unsafe_code)]

mod hints;
mod leaf;
mod node;
mod value;

use crate::range::AddressRange;
use alloc::vec::Vec;
use core::ops::Range;
use hints::Hints;
use leaf::Leaf;
use node::{CAP, Child, Inner, LOW, MERGED, Part};
pub(crate) use value::{Indexed, Ordered, Place, Ranged};

/// The span of an index without intervals.
const NOWHERE: (u64, u64) = (u64::MAX, 0);
/// Height of the tallest tree: `LOW`-full nodes over `u32::MAX` leaves.
const HEIGHT: usize = 12;

type Node = u32;

/// The way down to a leaf: for each level from the bottom the node and which of its children comes
/// next. Small, because it is filled with zeros first.
type Path = [(Node, u32); HEIGHT];

/// Nodes of one kind, and those that are free.
struct Arena<T> {
    nodes: Vec<T>,
    free: Vec<Node>,
}

/// Intervals with values, ordered by `(start, order)`.
pub(crate) struct IntervalIndex<V> {
    leaves: Arena<Leaf<V>>,
    inners: Arena<Inner>,
    root: Node,
    /// 0 when the root is a leaf.
    height: usize,
    len: usize,
    /// From the least start to the greatest `last` that any interval had since the index was empty:
    /// most invalidations of a process are of memory that no device has mapped, and end here.
    span: (u64, u64),
    /// No interval reaches further than this many bytes beyond the end of its leaf. It may be one
    /// that has gone, unless the index was empty since.
    reach: u64,
    hints: Hints,
}

impl<T: Part> Arena<T> {
    /// Merges the neighbours `a` and `b`, or shares out evenly what they hold if that is too much
    /// for one node. `start` and `order` are the parent's bound for `b`. Returns what the parent
    /// has to know; no upper child after a merge.
    fn balance(&mut self, a: Node, b: Node, (start, order): (u64, u64)) -> (Child, Option<Child>) {
        let [lower, upper] = self
            .nodes
            .get_disjoint_mut([a as usize, b as usize])
            .expect("two children of one parent are different nodes");
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
            // By an eighth, not twofold: memory per notifier is promised, and a large block is
            // moved by its page table.
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

impl<V: Indexed> IntervalIndex<V> {
    pub(crate) fn new() -> Self {
        Self {
            leaves: Arena { nodes: Vec::new(), free: Vec::new() },
            inners: Arena { nodes: Vec::new(), free: Vec::new() },
            root: 0,
            height: 0,
            len: 0,
            span: NOWHERE,
            reach: 0,
            hints: Hints::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Calls `hit` with each value whose interval overlaps `range`, in order of start, then of
    /// insertion.
    #[inline]
    pub(crate) fn overlapping(&self, range: AddressRange, mut hit: impl FnMut(V)) {
        if self.may_overlap(range) {
            self.search(range, (), |(), value| hit(value));
        }
    }

    /// Whether an interval can overlap `range` at all, as far as two comparisons say.
    #[inline]
    pub(crate) fn may_overlap(&self, range: AddressRange) -> bool {
        let (first, last) = self.span;
        range.start() <= last && range.last() >= first
    }

    /// [`overlapping`](Self::overlapping) when [`may_overlap`](Self::may_overlap) is known, as a
    /// fold: what changes from hit to hit is handed on by value, so that it stays in registers.
    pub(crate) fn search<A>(
        &self,
        range: AddressRange,
        first: A,
        mut hit: impl FnMut(A, V) -> A,
    ) -> A {
        self.descend(self.root, self.height, range, first, &mut hit)
    }

    fn descend<A>(
        &self,
        mut node: Node,
        mut height: usize,
        range: AddressRange,
        mut so_far: A,
        hit: &mut impl FnMut(A, V) -> A,
    ) -> A {
        while height > 0 {
            let inner = self.inners.at(node);
            height -= 1;
            let children = inner.candidates(range);
            let last = children.end;
            if !children.is_empty() {
                so_far = self.branch(inner, children, height, range, so_far, hit);
            }
            if inner.max_lasts[last] < range.start() {
                return so_far;
            }
            node = inner.children[last];
            if height == 0 {
                self.fetch(node);
            }
        }
        // There is none before the first insertion; when all intervals were removed there are only
        // gaps in it.
        match self.leaves.nodes.get(node as usize) {
            Some(leaf) => Self::visit(leaf, leaf.candidates(range), range, so_far, hit),
            None => so_far,
        }
    }

    /// Goes through places of a leaf.
    #[inline(always)]
    fn visit<A>(
        leaf: &Leaf<V>,
        places: Range<usize>,
        range: AddressRange,
        mut so_far: A,
        hit: &mut impl FnMut(A, V) -> A,
    ) -> A {
        for at in places {
            if let Some(value) = leaf.overlapping(at, range) {
                so_far = hit(so_far, value);
            }
        }
        so_far
    }

    /// Several children may overlap. Said to be cold, so that the way down to one child need not
    /// save what this uses.
    #[cold]
    #[inline(never)]
    fn branch<A>(
        &self,
        inner: &Inner,
        children: Range<usize>,
        height: usize,
        range: AddressRange,
        mut so_far: A,
        hit: &mut impl FnMut(A, V) -> A,
    ) -> A {
        for at in children {
            if inner.max_lasts[at] < range.start() {
                continue;
            }
            if height == 0 {
                // There is a child behind it in which something starts early enough, so all of this
                // does.
                let leaf = self.leaves.at(inner.children[at]);
                so_far = Self::visit(leaf, leaf.first_candidate(range)..CAP, range, so_far, hit);
            } else {
                so_far = self.descend(inner.children[at], height, range, so_far, hit);
            }
        }
        so_far
    }

    /// Adds an interval. `value.order()` must be greater than that of every interval with the same
    /// start.
    pub(crate) fn insert(&mut self, value: V) {
        let range = value.range();
        self.len += 1;
        let (first, last) = self.span;
        // Mostly it does not grow; what is not stored need not be waited for.
        if range.start() < first || range.last() > last {
            self.span = (first.min(range.start()), last.max(range.last()));
        }
        if self.leaves.nodes.is_empty() {
            self.root = self.leaves.add(Leaf::EMPTY);
        }
        self.expect(range.start());
        let mut node = self.likely_leaf(range.start());
        if self.height > 0 && !self.leaves.at(node).takes(range) {
            node = self.way_for(range);
        }
        let leaf = self.leaves.at_mut(node);
        if leaf.is_full() {
            self.split(value);
        } else {
            value.set_place(Place::new(node, leaf.add(value)));
            if range.last() >= leaf.bound {
                self.reach = self.reach.max(leaf.reach());
            }
        }
    }

    /// The leaf for a new interval. Every node on the way there learns of its `last`.
    fn way_for(&mut self, range: AddressRange) -> Node {
        let mut node = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at_mut(node);
            let at = inner.place(range.start(), u64::MAX);
            if inner.max_lasts[at] < range.last() {
                inner.max_lasts[at] = range.last();
                inner.stretch(at);
            }
            node = inner.children[at];
        }
        self.hints.set(range.start(), node);
        node
    }

    /// The way down to the leaf for the key `(start, order)`, and that leaf.
    fn path(&self, start: u64, order: u64) -> (Path, Node) {
        let mut path = [(0, 0); HEIGHT];
        let mut node = self.root;
        for level in (0..self.height).rev() {
            let inner = self.inners.at(node);
            let at = inner.place(start, order);
            path[level] = (node, at as u32);
            node = inner.children[at];
        }
        (path, node)
    }

    /// Adds an interval to the leaf where it belongs, which is full.
    #[inline(never)]
    fn split(&mut self, value: V) {
        let start = value.range().start();
        let (path, node) = self.path(start, u64::MAX);
        let rightmost = path[..self.height]
            .iter()
            .all(|&(parent, at)| at as usize + 1 == self.inners.at(parent).len);
        let leaf = self.leaves.at_mut(node);
        let at = leaf.rank(start);
        // In ascending insertion the new leaf begins empty, so that the ones behind stay full.
        let cut = if rightmost && at == CAP { CAP } else { CAP / 2 };
        let mut upper = leaf.split_off(cut);
        if at > cut || cut == CAP {
            upper.add(value);
        } else {
            leaf.add(value);
        }
        leaf.bound = upper.starts[0];
        let (lower_max, reach) = (leaf.max_last, leaf.reach());
        let upper_node = self.leaves.add(upper);
        let upper = self.leaves.at(upper_node);
        self.reach = self.reach.max(reach).max(upper.reach());
        let upper = upper.child(upper_node);
        self.grow(&path, node, lower_max, upper);
        let leaves = self.leaves.nodes.len();
        if self.hints.are_few_for(leaves) {
            self.hints.make_room(leaves, |at| self.leaves.nodes[at].extent());
        } else if let Some(extent) = self.leaves.at(upper_node).extent() {
            self.hints.set_all(extent, upper_node);
        }
    }

    /// Puts `upper`, split off from `lower`, behind it in the parents along `path`.
    fn grow(&mut self, path: &Path, mut lower: Node, mut lower_max: u64, mut upper: Child) {
        for &(parent, at) in &path[..self.height] {
            let (inner, at) = (self.inners.at_mut(parent), at as usize);
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

    /// Removes a value; says whether it was there.
    #[inline]
    pub(crate) fn remove(&mut self, value: V) -> bool {
        let (leaf, at) = value.place().get();
        match self.leaves.nodes.get_mut(leaf) {
            // It is still where it was put.
            Some(known)
                if known.values[at] == Some(value) && known.is_plain(value.range().last()) =>
            {
                known.clear(at);
                self.len -= 1;
                true
            }
            _ => self.remove_slowly(value),
        }
    }

    /// The same for a value that was moved, or that something else depends on.
    #[inline(never)]
    fn remove_slowly(&mut self, value: V) -> bool {
        let (leaf, at) = value.place().get();
        if self.leaves.nodes.get(leaf).is_some_and(|known| known.values[at] == Some(value)) {
            self.take(leaf, at, value);
            return true;
        }
        let mut leaf = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at(leaf);
            leaf = inner.children[inner.place(value.range().start(), value.order())];
        }
        let leaf = leaf as usize;
        let Some(at) = self.leaves.nodes.get(leaf).and_then(|leaf| leaf.find(value)) else {
            return false;
        };
        self.take(leaf, at, value);
        true
    }

    fn take(&mut self, leaf: usize, at: usize, value: V) {
        let changes = self.leaves.nodes[leaf].take(at);
        self.len -= 1;
        if self.len == 0 {
            // The root is a leaf, which stays.
            (self.span, self.reach) = (NOWHERE, 0);
        } else if changes && self.height > 0 {
            self.shrink(value);
        }
    }

    /// After an interval left its leaf, which has another greatest `last` now or has become small:
    /// corrects the greatest `last`s above and merges what has become small.
    #[inline(never)]
    fn shrink(&mut self, value: V) {
        let range = value.range();
        let (path, _) = self.path(range.start(), value.order());
        for (level, &(parent, at)) in path[..self.height].iter().enumerate() {
            let (inner, at) = (self.inners.at(parent), at as usize);
            let child = inner.children[at];
            let len = if level == 0 {
                self.leaves.at(child).len as usize
            } else {
                self.inners.at(child).len
            };
            let was_greatest = inner.max_lasts[at] == range.last();
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
    }

    fn max_last(&self, level: usize, child: Node) -> u64 {
        if level == 0 { self.leaves.at(child).max_last } else { self.inners.at(child).max_last() }
    }

    /// Joins child `at` of `parent`, which has become small, with a neighbour.
    #[inline(never)]
    fn merge(&mut self, level: usize, parent: Node, at: usize) {
        let inner = self.inners.at(parent);
        // With the left neighbour where there is one, else with the right one; every inner node has
        // two children at least.
        let left = at.saturating_sub(1);
        let (a, b) = (inner.children[left], inner.children[left + 1]);
        let bound = (inner.starts[left + 1], inner.orders[left + 1]);
        let (lower, upper) = if level == 0 {
            self.leaves.balance(a, b, bound)
        } else {
            self.inners.balance(a, b, bound)
        };
        if level == 0 {
            self.reach = self.reach.max(self.leaves.at(a).reach());
        }
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
        self.leaves.nodes.capacity() * size_of::<Leaf<V>>()
            + self.inners.nodes.capacity() * size_of::<Inner>()
    }
}

#[cfg(test)]
mod tests;
