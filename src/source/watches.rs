//! Which ranges are watched, and how often: what one user no longer watches another may still watch.
#![forbid(unsafe_code)]

use crate::index::{IntervalIndex, Ordered, Ranged};
use crate::range::AddressRange;
use alloc::vec::Vec;

/// A registration of interest in a range.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct WatchId(u64);

impl Ordered for WatchId {
    fn order(self) -> u64 {
        self.0
    }
}

pub(super) struct Watches {
    index: IntervalIndex<Ranged<WatchId>>,
    /// The range of each watch that exists.
    ranges: alloc::collections::BTreeMap<u64, AddressRange>,
    next: u64,
}

impl Watches {
    pub(super) fn new() -> Self {
        Self { index: IntervalIndex::new(), ranges: alloc::collections::BTreeMap::new(), next: 0 }
    }

    pub(super) fn add(&mut self, range: AddressRange) -> WatchId {
        self.next += 1;
        let id = WatchId(self.next);
        self.index.insert(Ranged { range, value: id });
        self.ranges.insert(id.0, range);
        id
    }

    /// Returns what nobody watches any more, as ranges that do not touch.
    pub(super) fn remove(&mut self, id: WatchId) -> Vec<AddressRange> {
        let Some(range) = self.ranges.remove(&id.0) else { return Vec::new() };
        self.index.remove(Ranged { range, value: id });
        self.unwatched(range)
    }

    /// The parts of `range` that nobody watches.
    pub(super) fn unwatched(&self, range: AddressRange) -> Vec<AddressRange> {
        let mut free = Vec::new();
        // Where the next free part would begin; `None` behind the last address.
        let mut from = Some(range.start());
        let mut gap = |from: u64, end: u64| free.extend((from < end).then(|| AddressRange::new(from, end - from).ok()).flatten());
        // In order of their start.
        self.index.overlapping(range, |Ranged { range: watched, .. }| {
            let Some(at) = from else { return };
            gap(at, watched.start());
            from = watched.last().checked_add(1).map(|next| next.max(at));
        });
        if let (Some(at), Some(end)) = (from, range.last().checked_add(1)) {
            gap(at, end);
        }
        free
    }

    /// All that is watched.
    pub(super) fn all(&self) -> impl Iterator<Item = AddressRange> {
        self.ranges.values().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> AddressRange {
        AddressRange::new(start, len).unwrap()
    }

    #[test]
    fn only_what_nobody_else_watches_is_given_up() {
        let mut watches = Watches::new();
        let old = watches.add(range(0x1000, 0x4000));
        let same = watches.add(range(0x1000, 0x4000));
        assert_eq!(watches.remove(old), []);
        let inside = watches.add(range(0x2000, 0x1000));
        let behind = watches.add(range(0x4000, 0x4000));
        assert_eq!(watches.remove(same), [range(0x1000, 0x1000), range(0x3000, 0x1000)]);
        assert_eq!(watches.remove(same), [], "a second time");
        assert!(watches.all().eq([range(0x2000, 0x1000), range(0x4000, 0x4000)]));
        assert_eq!(watches.unwatched(range(0x1000, 0x2000)), [range(0x1000, 0x1000)]);
        assert_eq!(watches.remove(behind), [range(0x4000, 0x4000)]);
        assert_eq!(watches.remove(inside), [range(0x2000, 0x1000)]);
    }
}
