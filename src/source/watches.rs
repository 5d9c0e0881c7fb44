//! The watched ranges. Several watches may overlap: memory is watched until the last of them is
//! removed.
#![forbid(unsafe_code)]

use crate::index::{Indexed, IntervalIndex, Ordered};
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicBool, Ordering};
use alloc::vec::Vec;
use slab::Slab;

/// One watch of a range, as the index stores it.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Watched {
    pub(super) range: AddressRange,
    /// Distinguishes watches of the same range.
    serial: u64,
    /// Index of its state in `Watches::states`.
    slot: usize,
}

impl Ordered for Watched {
    fn order(self) -> u64 {
        self.serial
    }
}

impl Indexed for Watched {
    fn range(self) -> AddressRange {
        self.range
    }
}

/// State that a watch shares with its source.
pub(super) struct WatchState {
    /// The memory is gone, at least in part, or the source has ended (M2).
    ended: AtomicBool,
    /// The end is not reported, because the invalidation tells the holder.
    quiet: bool,
}

impl WatchState {
    pub(super) fn is_armed(&self) -> bool {
        !self.ended.load(Ordering::Acquire)
    }
}

/// All watches of a source. Under the lock of its table.
pub(super) struct Watches {
    index: IntervalIndex<Watched>,
    states: Slab<Arc<WatchState>>,
    /// Serial of the newest watch.
    last: u64,
}

impl Watches {
    pub(super) fn new() -> Self {
        Self { index: IntervalIndex::new(), states: Slab::new(), last: 0 }
    }

    pub(super) fn add(&mut self, range: AddressRange, quiet: bool) -> (Watched, Arc<WatchState>) {
        self.last += 1;
        let state = Arc::new(WatchState { ended: AtomicBool::new(false), quiet });
        let watched = Watched { range, serial: self.last, slot: self.states.insert(state.clone()) };
        self.index.insert(watched);
        (watched, state)
    }

    pub(super) fn remove(&mut self, watched: Watched) {
        if self.index.remove(watched) {
            self.states.remove(watched.slot);
        }
    }

    /// Marks a watch as armed again.
    pub(super) fn renew(&mut self, watched: Watched) {
        if let Some(state) = self.states.get(watched.slot) {
            state.ended.store(false, Ordering::Release);
        }
    }

    /// Returns the parts of `range` that are not watched, as ranges that do not touch.
    pub(super) fn unwatched(&self, range: AddressRange) -> Vec<AddressRange> {
        let mut free = Vec::new();
        // Start of the next gap; `None` behind the last address.
        let mut from = Some(range.start());
        let mut gap = |from: u64, end: u64| {
            // Nothing is a range that is empty, or that ends before it starts.
            free.extend(end.checked_sub(from).and_then(|len| AddressRange::new(from, len).ok()))
        };
        // The index calls back in the order of the starts.
        self.index.overlapping(range, |Watched { range: watched, .. }| {
            let Some(at) = from else { return };
            gap(at, watched.start());
            from = watched.last().checked_add(1).map(|next| next.max(at));
        });
        if let (Some(at), Some(end)) = (from, range.last().checked_add(1)) {
            gap(at, end);
        }
        free
    }

    /// Returns `true` if the watch still exists.
    pub(super) fn has(&self, watched: Watched) -> bool {
        let mut has = false;
        self.index.overlapping(watched.range, |other| has |= other == watched);
        has
    }

    /// Ends every watch that overlaps `range`. Calls `lost` with each one that was armed and is not
    /// quiet.
    pub(super) fn end(&self, range: AddressRange, mut lost: impl FnMut(Watched)) {
        self.index.overlapping(range, |watched| {
            let Some(state) = self.states.get(watched.slot) else { return };
            if !state.ended.swap(true, Ordering::AcqRel) && !state.quiet {
                lost(watched);
            }
        });
    }

    /// Calls `each` with every watched range, in the order of the starts. Does not allocate.
    pub(super) fn for_each(&self, mut each: impl FnMut(AddressRange)) {
        self.index.overlapping(AddressRange::ALL, |watched| each(watched.range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> AddressRange {
        AddressRange::new(start, len).unwrap()
    }

    #[test]
    fn only_what_nobody_else_watches_is_free() {
        let mut watches = Watches::new();
        let (old, _) = watches.add(range(0x1000, 0x4000), false);
        let (same, _) = watches.add(range(0x1000, 0x4000), false);
        watches.remove(old);
        assert_eq!(watches.unwatched(old.range), []);
        let (inside, _) = watches.add(range(0x2000, 0x1000), false);
        let (behind, _) = watches.add(range(0x4000, 0x4000), false);
        watches.remove(same);
        assert_eq!(watches.unwatched(same.range), [range(0x1000, 0x1000), range(0x3000, 0x1000)]);
        watches.remove(same);
        let mut all = Vec::new();
        watches.for_each(|range| all.push(range));
        assert_eq!(all, [range(0x2000, 0x1000), range(0x4000, 0x4000)]);
        watches.remove(behind);
        watches.remove(inside);
        assert!(watches.states.is_empty());
    }

    #[test]
    fn m2_a_watch_whose_memory_is_gone_says_so_once() {
        let mut watches = Watches::new();
        let (loud, state) = watches.add(range(0x1000, 0x2000), false);
        let (_, quiet) = watches.add(range(0x2000, 0x1000), true);
        let (_, other) = watches.add(range(0x4000, 0x1000), false);
        let mut lost = Vec::new();
        watches.end(range(0x2000, 0x1000), |watched| lost.push(watched.range));
        watches.end(range(0x2000, 0x1000), |watched| lost.push(watched.range));
        assert_eq!(lost, [loud.range]);
        assert!(watches.has(loud));
        assert!(!state.is_armed() && !quiet.is_armed() && other.is_armed());
        watches.renew(loud);
        assert!(state.is_armed());
    }
}
