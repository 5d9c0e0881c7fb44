//! Removal from the index, and the merges of nodes that have become small.
#![forbid(unsafe_code)]

use super::node::{Child, LOW, MERGED, Mergeable};
use super::{Arena, Indexed, IntervalIndex, NOWHERE, Node};

impl<T: Mergeable> Arena<T> {
    /// Merges the neighbours `a` and `b`. If one node cannot hold the parts of both, it distributes
    /// them evenly instead. Returns the parent's new data of the lower and the upper node. There is
    /// no upper node after a merge.
    fn balance(&mut self, a: Node, b: Node) -> (Child, Option<Child>) {
        let [lower, upper] = self
            .nodes
            .get_disjoint_mut([a as usize, b as usize])
            .expect("two children of one parent are different nodes");
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

impl<V: Indexed> IntervalIndex<V> {
    /// Removes a value. Returns whether it was there.
    #[inline]
    pub(crate) fn remove(&mut self, value: V) -> bool {
        let (leaf, at) = value.position().get();
        match self.leaves.nodes.get_mut(leaf) {
            // The value is still where it was put, and nothing depends on its interval.
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

    /// Removes a value that has moved, or whose interval the bounds of its nodes depend on.
    #[inline(never)]
    fn remove_slowly(&mut self, value: V) -> bool {
        let (leaf, at) = value.position().get();
        if self.leaves.nodes.get(leaf).is_some_and(|known| known.values[at] == Some(value)) {
            self.take(leaf, at, value);
            return true;
        }
        let mut leaf = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at(leaf);
            leaf = inner.children[inner.child_for(value.range().start(), value.order())];
        }
        let leaf = leaf as usize;
        let Some(at) = self.leaves.nodes.get(leaf).and_then(|leaf| leaf.find(value)) else {
            return false;
        };
        self.take(leaf, at, value);
        true
    }

    /// Removes `value` from slot `at` of a leaf and updates what depends on its interval.
    fn take(&mut self, leaf: usize, at: usize, value: V) {
        let changes = self.leaves.nodes[leaf].take(at);
        self.len -= 1;
        if self.len == 0 {
            // The root is a leaf now. It is kept.
            (self.span, self.reach) = (NOWHERE, 0);
        } else if changes && self.height > 0 {
            self.shrink(value);
        }
    }

    /// Updates the tree after `value` has left its leaf and the leaf has another greatest `last` or
    /// has become small. Corrects the greatest `last`s in the nodes above, and merges small nodes.
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
                // Neither the size nor the greatest `last` of this child has changed, so nothing
                // changes above it.
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

    /// Returns the greatest `last` below a child.
    pub(super) fn max_last(&self, level: usize, child: Node) -> u64 {
        if level == 0 { self.leaves.at(child).max_last } else { self.inners.at(child).max_last() }
    }

    /// Merges child `at` of `parent`, which has become small, with a neighbour.
    fn merge(&mut self, level: usize, parent: Node, at: usize) {
        let inner = self.inners.at(parent);
        // The left neighbour if there is one, else the right one. Each inner node has at least two
        // children.
        let left = at.saturating_sub(1);
        let (a, b) = (inner.children[left], inner.children[left + 1]);
        let (lower, upper) =
            if level == 0 { self.leaves.balance(a, b) } else { self.inners.balance(a, b) };
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
}
