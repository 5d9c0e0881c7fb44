//! A set of addresses, stored as ranges.
#![forbid(unsafe_code)]

use crate::range::AddressRange;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Disjoint ranges that do not touch: last address by start.
#[derive(Debug, Default)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Returns the number of ranges.
    pub(super) fn pieces(&self) -> usize {
        self.0.len()
    }

    /// Adds `range`. Ranges that touch are merged, as the kernel does with mappings.
    pub(super) fn insert(&mut self, range: AddressRange) {
        let (mut start, mut last) = (range.start(), range.last());
        // Goes backwards from the last range that can touch it.
        let highest = last.saturating_add(1);
        while let Some((&from, &to)) = self.0.range(..=highest).next_back() {
            if to.saturating_add(1) < start {
                break;
            }
            (start, last) = (start.min(from), last.max(to));
            self.0.remove(&from);
        }
        self.0.insert(start, last);
    }

    /// Removes `range`.
    pub(super) fn remove(&mut self, range: AddressRange) {
        while let Some((&from, &to)) = self.0.range(..=range.last()).next_back() {
            if to < range.start() {
                break;
            }
            self.0.remove(&from);
            if to > range.last() {
                self.0.insert(range.last() + 1, to);
            }
            if from < range.start() {
                self.0.insert(from, range.start() - 1);
                break;
            }
        }
    }

    /// Returns the parts of `range` that are in the set, highest first.
    pub(super) fn within(&self, range: AddressRange) -> Vec<AddressRange> {
        let overlapping =
            self.0.range(..=range.last()).rev().take_while(|(_, last)| **last >= range.start());
        let part = |(&from, &to): (&u64, &u64)| {
            let (start, last) = (from.max(range.start()), to.min(range.last()));
            AddressRange::try_from(start..=last).ok()
        };
        overlapping.filter_map(part).collect()
    }

    /// Returns `true` if a part of `range` is in the set.
    pub(super) fn touches(&self, range: AddressRange) -> bool {
        self.first_in(range).is_some()
    }

    /// Returns the first address of `range` that is in the set. Does not allocate.
    pub(super) fn first_in(&self, range: AddressRange) -> Option<u64> {
        let before = self.0.range(..=range.start()).next_back();
        if before.is_some_and(|(_, last)| *last >= range.start()) {
            return Some(range.start());
        }
        self.0.range(range.start()..=range.last()).next().map(|(start, _)| *start)
    }

    /// Calls `each` with every range, in order. Does not allocate.
    pub(super) fn for_each(&self, mut each: impl FnMut(AddressRange)) {
        self.0
            .iter()
            .filter_map(|(&start, &last)| AddressRange::try_from(start..=last).ok())
            .for_each(&mut each);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares with a set of single addresses.
    #[test]
    fn is_the_set_of_what_was_inserted_and_not_removed() {
        let (mut ranges, mut model) = (Ranges::default(), [false; 64]);
        let mut random = 1_u64;
        for step in 0..20_000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let (start, len) = ((random >> 33) % 64, (random >> 43) % 9 + 1);
            let last = (start + len - 1).min(63);
            let range = AddressRange::try_from(start..=last).unwrap();
            let insert = (random >> 53) & 1 == 0;
            if insert {
                ranges.insert(range)
            } else {
                ranges.remove(range)
            }
            model[start as usize..=last as usize].fill(insert);
            let mut seen = [false; 64];
            let mut previous = None;
            ranges.for_each(|range| {
                assert!(
                    previous.is_none_or(|last: u64| last + 1 < range.start()),
                    "step {step}: they touch"
                );
                previous = Some(range.last());
                seen[range.start() as usize..=range.last() as usize].fill(true);
            });
            assert_eq!(seen, model, "step {step}");
            let first = model[start as usize..=last as usize].iter().position(|set| *set);
            assert_eq!(ranges.first_in(range), first.map(|at| start + at as u64), "step {step}");
            let probe = AddressRange::try_from(start..=63).unwrap();
            let inside: u64 = ranges.within(probe).iter().filter_map(|part| part.len()).sum();
            assert_eq!(
                inside,
                model[start as usize..].iter().filter(|set| **set).count() as u64,
                "step {step}"
            );
        }
    }

    #[test]
    fn reaches_to_both_ends_of_the_address_space() {
        let mut ranges = Ranges::default();
        ranges.insert(AddressRange::try_from(u64::MAX - 9..=u64::MAX).unwrap());
        ranges.insert(AddressRange::try_from(0..=9).unwrap());
        assert_eq!(ranges.pieces(), 2);
        ranges.insert(AddressRange::ALL);
        assert_eq!(ranges.pieces(), 1);
        ranges.remove(AddressRange::try_from(u64::MAX..=u64::MAX).unwrap());
        ranges.remove(AddressRange::try_from(0..=0).unwrap());
        assert_eq!(
            ranges.within(AddressRange::ALL),
            [AddressRange::try_from(1..=u64::MAX - 1).unwrap()]
        );
    }
}
