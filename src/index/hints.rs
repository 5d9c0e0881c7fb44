//! [`Hints`]: the leaf where a search is likely to end, known before the descent. With it come the
//! quick forms of a search.
//!
//! [`IntervalIndex::only_leaf`] is the quick form of [`IntervalIndex::search`], for the case that
//! all hits are in one leaf. [`IntervalIndex::expect`] prefetches that leaf and changes no result.
//! The tests of the index compare `only_leaf` with `search` for each query of a random schedule.
#![forbid(unsafe_code)]

use super::leaf::Leaf;
use super::{Indexed, IntervalIndex, Node};
use crate::range::AddressRange;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering};

/// Least number of slots in the table for each leaf.
const PER_LEAF: usize = 8;
/// Number of leaves whose widths decide the unit.
const ASKED: usize = 64;
/// Number of adjacent units of the address space whose slots are adjacent, in one cache line.
/// Units that are further apart are scattered.
const TOGETHER: u64 = 16;
/// 2^64 divided by the golden ratio. Products with it differ in their upper bits (Knuth, The Art of
/// Computer Programming, volume 3, section 6.4). Regions that are far apart often begin at
/// multiples of large powers of two. Their lower bits would map them to few slots.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A hash table from units of the address space to the leaf where the last search of that unit
/// ended. The next search of the unit mostly ends there again.
///
/// A hint says only where to look first. The leaf may hold other intervals by now, or none. The
/// caller checks the leaf itself. So splits and merges need not update the table, and several units
/// may share a slot.
pub(super) struct Hints {
    /// The slots. Their number is a power of two, or 0. They are atomics so that a search (`&self`)
    /// can store where it ended. A lost update costs only time.
    leaves: Vec<AtomicU32>,
    /// 64 less the binary logarithm of the number of groups of [`TOGETHER`] slots. Without effect
    /// if there are fewer than two groups.
    fold: u32,
    /// A unit has `2^unit` bytes.
    unit: u32,
    /// Number of leaves for which the table was made.
    fits: usize,
}

impl Hints {
    /// Creates a table without slots.
    pub(super) const fn new() -> Self {
        Self { leaves: Vec::new(), fold: 0, unit: 0, fits: 0 }
    }

    /// Returns the slot of an address.
    #[inline(always)]
    fn slot(&self, address: u64) -> Option<&AtomicU32> {
        let unit = address >> self.unit;
        let group = (unit / TOGETHER).wrapping_mul(GOLDEN) >> self.fold;
        let at = (group * TOGETHER + unit % TOGETHER) as usize;
        self.leaves.get(at & self.leaves.len().wrapping_sub(1))
    }

    /// Returns the leaf where a search of `address` is likely to end. Returns leaf 0 if there is no
    /// hint.
    #[inline(always)]
    pub(super) fn get(&self, address: u64) -> Node {
        self.slot(address).map_or(0, |leaf| leaf.load(Ordering::Relaxed))
    }

    /// Stores that a search of `address` has ended in `leaf`.
    #[inline]
    pub(super) fn set(&self, address: u64, leaf: Node) {
        if let Some(slot) = self.slot(address) {
            slot.store(leaf, Ordering::Relaxed);
        }
    }

    /// Stores that searches from `first` to `last` will end in `leaf`. If the leaf is much wider
    /// than others, it stores this for its first [`PER_LEAF`] units only.
    pub(super) fn set_all(&self, (first, last): (u64, u64), leaf: Node) {
        for part in (first >> self.unit..=last >> self.unit).take(PER_LEAF) {
            self.set(part << self.unit, leaf);
        }
    }

    /// Returns whether the table is too small for so many leaves.
    #[inline]
    pub(super) fn are_few_for(&self, leaves: usize) -> bool {
        leaves > self.fits + self.fits / 2
    }

    /// Makes the table large enough for so many leaves, and fills it. `extent` returns the first
    /// and the last address of a leaf, if the leaf is in use. The unit becomes about a quarter of a
    /// narrow leaf.
    #[cold]
    #[inline(never)]
    pub(super) fn make_room(
        &mut self,
        leaves: usize,
        extent: impl Fn(usize) -> Option<(u64, u64)>,
    ) {
        let mut widths: Vec<u64> = (0..leaves)
            .step_by(leaves.div_ceil(ASKED))
            .filter_map(&extent)
            .map(|(first, last)| last - first)
            .collect();
        widths.sort_unstable();
        // If the widths differ, the narrow leaves decide.
        let narrow = widths.get(widths.len() / 4).copied().unwrap_or(0);
        self.unit = narrow.checked_ilog2().map_or(0, |bits| bits.saturating_sub(2));
        self.fits = leaves;
        let slots = (leaves * PER_LEAF).next_power_of_two();
        if slots != self.leaves.len() {
            self.leaves = (0..slots).map(|_| AtomicU32::new(0)).collect();
            self.fold = 64 - (slots as u64 / TOGETHER).max(2).ilog2();
        }
        for leaf in 0..leaves {
            if let Some(extent) = extent(leaf) {
                self.set_all(extent, leaf as Node);
            }
        }
    }
}

impl<V: Indexed> IntervalIndex<V> {
    /// Prefetches the leaf that a search of `address` is likely to need soon.
    ///
    /// Call it as early as possible. The processor may reach this prefetch while it still waits for
    /// a notifier of the previous invalidation. Both then arrive together (`DESIGN.md`, "The
    /// interval index").
    #[inline(always)]
    pub(crate) fn expect(&self, address: u64) {
        if self.is_large() {
            self.fetch(self.hints.get(address));
        }
    }

    /// Returns whether the tree has so many leaves that a prefetch pays. The leaves of smaller
    /// trees stay in the caches.
    #[inline(always)]
    fn is_large(&self) -> bool {
        self.height > 2
    }

    /// Returns the leaf in which a search for `address` is likely to end.
    #[inline(always)]
    pub(super) fn likely_leaf(&self, address: u64) -> Node {
        if self.height == 0 { self.root } else { self.hints.get(address) }
    }

    /// Prefetches all cache lines of a leaf at once, if the tree is large.
    #[inline(always)]
    pub(super) fn fetch(&self, leaf: Node) {
        let leaf = self.leaves.at(leaf);
        if self.is_large() && !V::prefetch(leaf) {
            leaf.touch();
        }
    }

    /// Returns the one leaf that holds all intervals that overlap `range`, and the candidate slots
    /// in it. Check each slot with [`Leaf::overlapping`]. Returns `None` if several leaves may have
    /// hits: then use [`search`](Self::search).
    ///
    /// Most searches have one leaf, and the hint names it. This case is inlined into the caller.
    #[inline(always)]
    pub(crate) fn only_leaf(&self, range: AddressRange) -> Option<(&Leaf<V>, Range<usize>)> {
        let mut leaf = self.leaves.nodes.get(self.likely_leaf(range.last()) as usize)?;
        if self.height > 0 && !leaf.is_only(range, self.reach) {
            leaf = self.find_only_leaf(range)?;
        }
        Some((leaf, leaf.candidates(range)))
    }

    /// Finds the leaf of [`only_leaf`](Self::only_leaf) by a descent, after a wrong hint. Corrects
    /// the hint.
    #[inline(never)]
    fn find_only_leaf(&self, range: AddressRange) -> Option<&Leaf<V>> {
        let mut node = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at(node);
            let children = inner.candidates(range);
            if children.start < children.end {
                return None;
            }
            // If the child does not extend to the range, its leaf has no candidates.
            node = inner.children[children.end];
        }
        self.fetch(node);
        self.hints.set(range.last(), node);
        Some(self.leaves.at(node))
    }
}

#[cfg(test)]
mod tests;
