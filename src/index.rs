//! The interval index: finds the intervals that overlap a range, in order of their start.
//!
//! [`IntervalIndex`] is a B-tree in an arena. Its keys are `(start, order)`, so intervals with the
//! same start stay in order of insertion (O1). A node stores for each child how far it reaches, so
//! a query skips whole subtrees. The kernel has an augmented red-black tree instead
//! (`lib/interval_tree.c`). A query there loads a cache line for each of its `2 log2 n` levels.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `index.rs` | [`IntervalIndex`]: search, insertion, splits |
//! | `remove.rs` | removal, and the merges that follow it |
//! | `node.rs` | the inner nodes, and the search for a start within one node |
//! | `leaf.rs` | the leaves: intervals in slots, with gaps between them |
//! | `hints.rs` | the leaf where a search is likely to end, and the prefetch of that leaf |
//! | `value.rs` | what can be stored, and the position of a stored value |
//!
//! The module does not depend on sequences, locks or notifiers. `DESIGN.md`, "The interval index",
//! has the decisions. What the attributes and the hand-made layouts are worth is in
//! `docs/measurements.md`, "Attributes".
#![forbid(unsafe_code)]

mod hints;
mod leaf;
mod node;
mod remove;
mod value;

use crate::range::AddressRange;
use alloc::vec::Vec;
use core::ops::Range;
use hints::Hints;
use leaf::Leaf;
use node::{CAP, Child, InnerNode, Mergeable};
pub(crate) use value::{Indexed, Numbered, Ordered, Position, Ranged};

/// The span of an index without intervals.
const NOWHERE: (u64, u64) = (u64::MAX, 0);
/// Height of the tallest tree: nodes with [`node::LOW`] children over `u32::MAX` leaves.
const HEIGHT: usize = 12;

/// Number of a node in its [`Arena`].
type Node = u32;

/// The path from the root to a leaf. For each level, the lowest first, it holds the node and the
/// number of the child that comes next. The elements are small because the array is zeroed first.
type Path = [(Node, u32); HEIGHT];

/// The nodes of one kind.
struct Arena<T> {
    nodes: Vec<T>,
    /// The nodes that are not in use.
    free: Vec<Node>,
}

/// Values with their intervals, ordered by `(start, order)`.
pub(crate) struct IntervalIndex<V> {
    leaves: Arena<Leaf<V>>,
    inners: Arena<InnerNode>,
    root: Node,
    /// Number of levels above the leaves. 0 if the root is a leaf.
    height: usize,
    len: usize,
    /// The least start and the greatest `last` of all intervals since the index was empty. Most
    /// invalidations of a process concern memory that no device has mapped. Their search ends here.
    span: (u64, u64),
    /// Upper bound, in bytes, on how far any interval extends past the end of its leaf. It is never
    /// lowered while the index is non-empty, so it may stem from a removed interval.
    reach: u64,
    hints: Hints,
}

impl<T> Arena<T> {
    /// Stores `node` and returns its number.
    fn add(&mut self, node: T) -> Node {
        if let Some(at) = self.free.pop() {
            self.nodes[at as usize] = node;
            return at;
        }
        let at = Node::try_from(self.nodes.len()).expect("an index holds fewer than 2^32 nodes");
        if self.nodes.len() == self.nodes.capacity() {
            // Grows by an eighth and not twofold: the memory per notifier is promised. A large
            // block is moved by its page table, so growing costs little.
            self.nodes.reserve_exact(self.nodes.len() / 8 + 1);
        }
        self.nodes.push(node);
        at
    }

    /// Returns a node.
    #[inline]
    fn at(&self, node: Node) -> &T {
        &self.nodes[node as usize]
    }

    /// Returns a node, mutably.
    #[inline]
    fn at_mut(&mut self, node: Node) -> &mut T {
        &mut self.nodes[node as usize]
    }
}

impl<V: Indexed> IntervalIndex<V> {
    /// Creates an index without intervals. It allocates nothing.
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

    /// Returns the number of intervals.
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

    /// Returns whether an interval may overlap `range`. Compares the range with the span only.
    #[inline]
    pub(crate) fn may_overlap(&self, range: AddressRange) -> bool {
        let (first, last) = self.span;
        range.start() <= last && range.last() >= first
    }

    /// Folds `hit` over the values whose intervals overlap `range`, in the order of
    /// [`overlapping`](Self::overlapping). [`may_overlap`](Self::may_overlap) must hold.
    ///
    /// A fold passes the accumulator by value, so that it stays in registers.
    pub(crate) fn search<A>(
        &self,
        range: AddressRange,
        first: A,
        mut hit: impl FnMut(A, V) -> A,
    ) -> A {
        self.descend(self.root, self.height, range, first, &mut hit)
    }

    /// Searches the subtree of `node`, which is `height` levels above the leaves.
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
        // Before the first insertion there is no leaf. After the last removal the leaf has only
        // gaps.
        match self.leaves.nodes.get(node as usize) {
            Some(leaf) => Self::visit(leaf, leaf.candidates(range), range, so_far, hit),
            None => so_far,
        }
    }

    /// Searches some slots of a leaf.
    #[inline]
    fn visit<A>(
        leaf: &Leaf<V>,
        slots: Range<usize>,
        range: AddressRange,
        mut so_far: A,
        hit: &mut impl FnMut(A, V) -> A,
    ) -> A {
        for at in slots {
            if let Some(value) = leaf.overlapping(at, range) {
                so_far = hit(so_far, value);
            }
        }
        so_far
    }

    /// Searches several `children` of `inner`, all but the last candidate. Most searches have only
    /// that one.
    fn branch<A>(
        &self,
        inner: &InnerNode,
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
                // A later child has an interval that starts early enough, so all intervals of this
                // leaf start early enough.
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
        // The span seldom grows. Without the store, no later load has to wait for it.
        if range.start() < first || last < range.last() {
            self.span = (first.min(range.start()), last.max(range.last()));
        }
        if self.leaves.nodes.is_empty() {
            self.root = self.leaves.add(Leaf::EMPTY);
        }
        self.expect(range.start());
        let mut node = self.likely_leaf(range.start());
        if self.height > 0 && !self.leaves.at(node).takes(range) {
            node = self.leaf_for(range);
        }
        let leaf = self.leaves.at_mut(node);
        if leaf.is_full() {
            self.split(value);
        } else {
            value.set_position(Position::new(node, leaf.add(value)));
            if range.last() >= leaf.bound {
                self.reach = self.reach.max(leaf.reach());
            }
        }
    }

    /// Returns the leaf for a new interval, and updates the greatest `last` of each node on the
    /// path.
    fn leaf_for(&mut self, range: AddressRange) -> Node {
        let mut node = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at_mut(node);
            let at = inner.child_for(range.start(), u64::MAX);
            if inner.max_lasts[at] < range.last() {
                inner.max_lasts[at] = range.last();
                inner.stretch(at);
            }
            node = inner.children[at];
        }
        self.hints.set(range.start(), node);
        node
    }

    /// Returns the path to the leaf for the key `(start, order)`, and that leaf.
    fn path(&self, start: u64, order: u64) -> (Path, Node) {
        let mut path = [(0, 0); HEIGHT];
        let mut node = self.root;
        for level in (0..self.height).rev() {
            let inner = self.inners.at(node);
            let at = inner.child_for(start, order);
            path[level] = (node, at as u32);
            node = inner.children[at];
        }
        (path, node)
    }

    /// Splits the leaf where `value` belongs, which is full, and adds the value.
    fn split(&mut self, value: V) {
        let start = value.range().start();
        let (path, node) = self.path(start, u64::MAX);
        let rightmost = path[..self.height]
            .iter()
            .all(|&(parent, at)| at as usize + 1 == self.inners.at(parent).len);
        let leaf = self.leaves.at_mut(node);
        let at = leaf.rank(start);
        // Ascending insertion: the new leaf gets only the new value, so that all earlier leaves
        // stay full.
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

    /// Inserts `upper`, which was split off from `lower`, after it into the parents along `path`.
    /// Splits parents that are full.
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
            if at >= cut {
                split.add(at + 1 - cut, upper);
            } else {
                inner.add(at + 1, upper);
            }
            (lower, lower_max) = (parent, inner.max_last());
            let node = self.inners.add(split);
            upper = self.inners.at(node).child(node);
        }
        let mut root = InnerNode::EMPTY;
        root.add(0, Child { start: 0, order: 0, max_last: lower_max, node: lower });
        root.add(1, upper);
        self.root = self.inners.add(root);
        self.height += 1;
    }

    /// Returns how many bytes of heap the index occupies.
    #[cfg(test)]
    fn heap_bytes(&self) -> usize {
        self.leaves.nodes.capacity() * size_of::<Leaf<V>>()
            + self.inners.nodes.capacity() * size_of::<InnerNode>()
    }
}

#[cfg(test)]
mod tests;
