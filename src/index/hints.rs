//! Where a search is likely to end, said before the way there is gone.
#![forbid(unsafe_code)]

use super::leaf::Leaf;
use super::{Indexed, IntervalIndex, Node};
use crate::range::AddressRange;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering};

/// Places for each leaf, at least.
const PER_LEAF: usize = 8;
/// So many leaves are asked how wide they are.
const ASKED: usize = 64;
/// So many parts of the address space have places that lie together, in a cache line. What is
/// further apart is scattered.
const TOGETHER: u64 = 16;
/// 2^64 divided by the golden ratio: what is multiplied by it differs in its upper bits (Knuth, The
/// Art of Computer Programming, volume 3, section 6.4). Far apart, memory lies at multiples of
/// great powers of two, and would share few places by its lower bits.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The leaf in which a search of each part of the address space ended the last time: it mostly ends
/// there again.
///
/// The hint only says where to look first. It may name a leaf that holds other intervals by now, or
/// none; whoever follows it has to see from the leaf whether it is the right one. So nothing has to
/// be kept right when leaves are split, merged and used again, and parts may share a place.
pub(super) struct Hints {
    /// Their number is a power of two, or 0. Atomics, so that a search can note where it ended;
    /// what one thread notes another may miss.
    leaves: Vec<AtomicU32>,
    /// 64 less the logarithm of the number of groups of `TOGETHER` places. With fewer than two
    /// groups it does not matter.
    fold: u32,
    /// Addresses are told apart in units of `2^unit` bytes.
    unit: u32,
    /// There were so many leaves when that was decided.
    fits: usize,
}

impl Hints {
    pub(super) const fn new() -> Self {
        Self { leaves: Vec::new(), fold: 0, unit: 0, fits: 0 }
    }

    #[inline(always)]
    fn place(&self, address: u64) -> Option<&AtomicU32> {
        let unit = address >> self.unit;
        let group = (unit / TOGETHER).wrapping_mul(GOLDEN) >> self.fold;
        let at = (group * TOGETHER + unit % TOGETHER) as usize;
        self.leaves.get(at & self.leaves.len().wrapping_sub(1))
    }

    /// Where a search of `address` is likely to end; the first leaf when nothing is known.
    #[inline(always)]
    pub(super) fn get(&self, address: u64) -> Node {
        self.place(address).map_or(0, |leaf| leaf.load(Ordering::Relaxed))
    }

    /// A search of `address` has ended in `leaf`.
    #[inline]
    pub(super) fn set(&self, address: u64, leaf: Node) {
        if let Some(place) = self.place(address) {
            place.store(leaf, Ordering::Relaxed);
        }
    }

    /// Searches from `first` to `last` will end in `leaf`. Of one that is much wider than others,
    /// the first part is noted.
    pub(super) fn set_all(&self, (first, last): (u64, u64), leaf: Node) {
        for part in (first >> self.unit..=last >> self.unit).take(PER_LEAF) {
            self.set(part << self.unit, leaf);
        }
    }

    /// Whether so many leaves are too many, and narrower than they were.
    #[inline]
    pub(super) fn are_few_for(&self, leaves: usize) -> bool {
        leaves > self.fits + self.fits / 2
    }

    /// Makes room for so many leaves. `extent` says from where to where one extends, if it is in
    /// use: a quarter of a leaf is told apart.
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
        // Of leaves of different widths, the narrow ones.
        let narrow = widths.get(widths.len() / 4).copied().unwrap_or(0);
        self.unit = narrow.checked_ilog2().map_or(0, |bits| bits.saturating_sub(2));
        self.fits = leaves;
        let places = (leaves * PER_LEAF).next_power_of_two();
        if places != self.leaves.len() {
            self.leaves = (0..places).map(|_| AtomicU32::new(0)).collect();
            self.fold = 64 - (places as u64 / TOGETHER).max(2).ilog2();
        }
        for leaf in 0..leaves {
            if let Some(extent) = extent(leaf) {
                self.set_all(extent, leaf as Node);
            }
        }
    }
}

impl<V: Indexed> IntervalIndex<V> {
    /// Has the leaf fetched that a search of `address` is likely to need soon. The earlier, the
    /// better: invalidations in a row wait for their leaves together if the processor comes to this
    /// place of the next one while it waits for a notifier of the one before (`DESIGN.md`, "The
    /// interval index").
    #[inline(always)]
    pub(crate) fn expect(&self, address: u64) {
        if self.is_large() {
            self.fetch(self.hints.get(address));
        }
    }

    /// Leaves of smaller trees are in the caches as they are.
    #[inline(always)]
    fn is_large(&self) -> bool {
        self.height > 2
    }

    /// The leaf in which a search for `address` is likely to end.
    #[inline(always)]
    pub(super) fn likely_leaf(&self, address: u64) -> Node {
        if self.height == 0 { self.root } else { self.hints.get(address) }
    }

    /// Has the cache lines of a leaf fetched, all at once.
    #[inline(always)]
    pub(super) fn fetch(&self, leaf: Node) {
        let leaf = self.leaves.at(leaf);
        if self.is_large() && !V::prefetch(leaf) {
            leaf.touch();
        }
    }

    /// The one leaf that holds what overlaps `range`, and the places in it that are to be looked at
    /// with [`Leaf::overlapping`]; `None` when there may be several leaves, and it takes a
    /// [`search`](Self::search).
    ///
    /// Mostly there is one, and mostly it is the likely one: to be built into the caller.
    #[inline(always)]
    pub(crate) fn only_leaf(&self, range: AddressRange) -> Option<(&Leaf<V>, Range<usize>)> {
        let mut leaf = self.leaves.nodes.get(self.likely_leaf(range.last()) as usize)?;
        if self.height > 0 && !leaf.is_only(range, self.reach) {
            leaf = self.find_only_leaf(range)?;
        }
        Some((leaf, leaf.candidates(range)))
    }

    /// [`only_leaf`](Self::only_leaf) without a hint that was right; the next one will be.
    #[inline(never)]
    fn find_only_leaf(&self, range: AddressRange) -> Option<&Leaf<V>> {
        let mut node = self.root;
        for _ in 0..self.height {
            let inner = self.inners.at(node);
            let children = inner.candidates(range);
            if children.start < children.end {
                return None;
            }
            // A leaf that does not reach so far has no places to be looked at.
            node = inner.children[children.end];
        }
        self.fetch(node);
        self.hints.set(range.last(), node);
        Some(self.leaves.at(node))
    }
}
