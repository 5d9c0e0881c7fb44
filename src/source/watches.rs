//! Which ranges are watched, and how often: what one user no longer watches another may still watch.
#![forbid(unsafe_code)]

use crate::index::{Indexed, IntervalIndex, Ordered};
use crate::range::AddressRange;
use alloc::vec::Vec;

/// A registration of interest in a range.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Watched {
    pub(super) range: AddressRange,
    /// Tells it from others of the same range.
    serial: u64,
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

pub(super) struct Watches {
    index: IntervalIndex<Watched>,
    /// The serial of the last one.
    last: u64,
}

impl Watches {
    pub(super) fn new() -> Self {
        Self { index: IntervalIndex::new(), last: 0 }
    }

    pub(super) fn add(&mut self, range: AddressRange) -> Watched {
        self.last += 1;
        let watch = Watched { range, serial: self.last };
        self.index.insert(watch);
        watch
    }

    /// Returns what nobody watches any more, as ranges that do not touch.
    pub(super) fn remove(&mut self, watch: Watched) -> Vec<AddressRange> {
        if self.index.remove(watch) { self.unwatched(watch.range) } else { Vec::new() }
    }

    /// The parts of `range` that nobody watches.
    pub(super) fn unwatched(&self, range: AddressRange) -> Vec<AddressRange> {
        let mut free = Vec::new();
        // Where the next free part would begin; `None` behind the last address.
        let mut from = Some(range.start());
        let mut gap = |from: u64, end: u64| free.extend((from < end).then(|| AddressRange::new(from, end - from).ok()).flatten());
        // In order of their start.
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

    /// Calls `each` with all that is watched, in order of start. Allocates nothing.
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
    fn only_what_nobody_else_watches_is_given_up() {
        let mut watches = Watches::new();
        let old = watches.add(range(0x1000, 0x4000));
        let same = watches.add(range(0x1000, 0x4000));
        assert_eq!(watches.remove(old), []);
        let inside = watches.add(range(0x2000, 0x1000));
        let behind = watches.add(range(0x4000, 0x4000));
        assert_eq!(watches.remove(same), [range(0x1000, 0x1000), range(0x3000, 0x1000)]);
        assert_eq!(watches.remove(same), [], "a second time");
        let mut all = Vec::new();
        watches.for_each(|range| all.push(range));
        assert_eq!(all, [range(0x2000, 0x1000), range(0x4000, 0x4000)]);
        assert_eq!(watches.unwatched(range(0x1000, 0x2000)), [range(0x1000, 0x1000)]);
        assert_eq!(watches.remove(behind), [range(0x4000, 0x4000)]);
        assert_eq!(watches.remove(inside), [range(0x2000, 0x1000)]);
    }
}
