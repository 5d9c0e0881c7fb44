//! Translations by I/O virtual address, as a plain data structure.
#![forbid(unsafe_code)]

use crate::memory::Place;
use crate::parts::Parts;
use shootdown::AddressRange;
use std::collections::BTreeMap;
use vm_memory::Permissions;

/// Maximum number of translations.
pub(super) const MOST: usize = 65_536;

#[derive(Clone, Debug)]
struct Translation {
    last: u64,
    place: Place,
    access: Permissions,
}

impl Translation {
    /// Returns the rest of the translation from `by` bytes on.
    fn after(&self, by: u64) -> Self {
        let offset = self.place.offset + usize::try_from(by).expect("it is inside of the region");
        Self { place: Place { region: self.place.region.clone(), offset }, ..self.clone() }
    }
}

/// Translations that do not overlap.
#[derive(Debug, Default)]
pub(super) struct Table {
    by_start: BTreeMap<u64, Translation>,
    /// The table maps the guest's memory as it is, and nothing of it is ever invalidated.
    identity: bool,
}

impl Table {
    /// Finds the memory of all of `range`. Otherwise returns the first address that does not permit
    /// the access.
    pub(super) fn look_up(
        &self,
        range: AddressRange,
        access: Permissions,
        parts: &mut Parts,
    ) -> Result<(), u64> {
        let mut at = range.start();
        parts.clear();
        loop {
            let found = self.by_start.range(..=at).next_back();
            let (start, translation) = found
                .filter(|(_, found)| found.last >= at && found.access.allow(access))
                .ok_or(at)?;
            let (skip, last) = (at - start, translation.last.min(range.last()));
            let offset = translation.place.offset + usize::try_from(skip).map_err(|_| at)?;
            let len =
                usize::try_from(last - at).ok().and_then(|len| len.checked_add(1)).ok_or(at)?;
            parts.push(&translation.place.region, offset, len);
            if last == range.last() {
                return Ok(());
            }
            at = last + 1;
        }
    }

    /// Returns `true` if all of `ranges` are known. `parts` then has their memory.
    pub(super) fn has_all<'p>(
        &self,
        ranges: &[(AddressRange, Permissions)],
        parts: impl IntoIterator<Item = &'p mut Parts>,
    ) -> bool {
        ranges
            .iter()
            .zip(parts)
            .all(|((range, access), parts)| self.look_up(*range, *access, parts).is_ok())
    }

    /// Returns the first address after `at` and up to `last` that does not permit the access.
    pub(super) fn next_gap(&self, at: u64, last: u64, access: Permissions) -> Option<u64> {
        let range = AddressRange::new(at, (last - at).checked_add(1)?).ok()?;
        self.look_up(range, access, &mut Parts::default()).err()
    }

    /// Maps `range` to `place`, and replaces what was there. Returns `true` if there were too many
    /// translations, so that all others were removed.
    pub(super) fn insert(
        &mut self,
        range: AddressRange,
        place: Place,
        access: Permissions,
    ) -> bool {
        self.remove(range);
        let full = self.by_start.len() >= MOST;
        if full {
            self.by_start.clear();
        }
        self.by_start.insert(range.start(), Translation { last: range.last(), place, access });
        full
    }

    /// Removes exactly `range`.
    pub(super) fn remove(&mut self, range: AddressRange) {
        if let Some((start, before)) = self.by_start.range_mut(..range.start()).next_back()
            && before.last >= range.start()
        {
            let rest = (before.last > range.last()).then(|| before.after(range.last() - start + 1));
            before.last = range.start() - 1;
            if let Some(rest) = rest {
                // Without room, the rest is asked for again.
                if self.by_start.len() < MOST {
                    self.by_start.insert(range.last() + 1, rest);
                }
                return;
            }
        }
        while let Some((&start, _)) = self.by_start.range(range.start()..=range.last()).next() {
            let Some(translation) = self.by_start.remove(&start) else { return };
            if translation.last > range.last() {
                self.by_start.insert(range.last() + 1, translation.after(range.last() - start + 1));
            }
        }
    }

    /// Handles INVALIDATE: removes `range`, if there is an IOMMU.
    pub(super) fn invalidate(&mut self, range: AddressRange) {
        if !self.identity {
            self.remove(range);
        }
    }

    /// Removes every translation of an IOMMU.
    pub(super) fn forget_all(&mut self) {
        if !self.identity {
            self.by_start.clear();
        }
    }

    /// Empties the table, for a device with an IOMMU or without.
    pub(super) fn clear(&mut self, identity: bool) {
        self.by_start.clear();
        self.identity = identity;
    }

    pub(super) fn len(&self) -> usize {
        self.by_start.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests_support::region;

    const PAGE: u64 = 0x1000;

    fn pages(first: u64, count: u64) -> AddressRange {
        AddressRange::new(first * PAGE, count * PAGE).unwrap()
    }

    /// Compares with a map from pages to pages.
    #[test]
    fn a_table_is_a_map_of_pages() {
        let region = region(64);
        let (mut table, mut model) = (Table::default(), BTreeMap::<u64, (u64, Permissions)>::new());
        let mut random = 1u64;
        let mut next = |below: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        for _ in 0..20_000 {
            let (first, count) = (next(16), 1 + next(4));
            let range = pages(first, count);
            match next(3) {
                0 => {
                    let (to, access) = (
                        next(60),
                        if next(2) == 0 { Permissions::Read } else { Permissions::ReadWrite },
                    );
                    let place = Place { region: region.clone(), offset: (to * PAGE) as usize };
                    assert!(!table.insert(range, place, access));
                    model.extend((0..count).map(|page| (first + page, (to + page, access))));
                }
                1 => {
                    table.remove(range);
                    model.retain(|page, _| !(first..first + count).contains(page));
                }
                _ => {
                    let access = if next(2) == 0 { Permissions::Read } else { Permissions::Write };
                    let mut pieces = Parts::default();
                    let found = table.look_up(range, access, &mut pieces);
                    let gap = (first..first + count)
                        .find(|page| !model.get(page).is_some_and(|(_, has)| has.allow(access)));
                    assert_eq!(found.err(), gap.map(|page| page * PAGE));
                    if gap.is_none() {
                        let places: Vec<_> = pieces
                            .pieces()
                            .iter()
                            .flat_map(|piece| {
                                (0..piece.len)
                                    .step_by(PAGE as usize)
                                    .map(move |at| piece.offset + at)
                            })
                            .collect();
                        let expected: Vec<_> = (first..first + count)
                            .map(|page| (model[&page].0 * PAGE) as usize)
                            .collect();
                        assert_eq!(places, expected);
                    }
                }
            }
        }
    }

    #[test]
    fn the_last_byte_of_the_address_space_can_be_translated() {
        let (region, mut table) = (region(2), Table::default());
        let range = AddressRange::new(u64::MAX - 0xfff, 0x1000).unwrap();
        table.insert(range, Place { region: region.clone(), offset: 0 }, Permissions::ReadWrite);
        let mut pieces = Parts::default();
        assert_eq!(table.look_up(range, Permissions::Write, &mut pieces), Ok(()));
        assert_eq!((pieces.pieces().len(), pieces.len()), (1, 0x1000));
        table.remove(AddressRange::ALL);
        assert_eq!(
            table.look_up(range, Permissions::Read, &mut Parts::default()),
            Err(range.start())
        );
    }
}
