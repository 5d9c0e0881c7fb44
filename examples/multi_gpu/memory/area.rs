//! The mappings of an address space, as Linux keeps them: areas that do not overlap, each of one
//! kind. Neighbours that are alike are one area.

use super::{Access, PAGE};
use crate::recording::Prot;
use shootdown::AddressRange;
use std::collections::BTreeMap;

/// What a child of `fork` gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Inherit {
    #[default]
    Copy,
    /// `MADV_DONTFORK`
    Nothing,
    /// `MADV_WIPEONFORK`
    Empty,
}

/// What kind of mapping it is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Area {
    pub(super) prot: Prot,
    pub(super) private: bool,
    pub(super) anonymous: bool,
    /// `MAP_HUGETLB`
    pub(super) huge: bool,
    /// Protection key.
    pub(super) key: u8,
    pub(super) inherit: Inherit,
    /// What else tells it apart.
    pub(super) marks: u8,
    /// The address that `shmat` returned for it; 0 if it did not.
    pub(super) attached: u64,
    /// Tells files apart. Anonymous memory that did not move has 0.
    pub(super) origin: u32,
    /// It is taken as written: it has pages of its own (`anon_vma`), or dirty ones of a file.
    pub(super) written: bool,
    /// It is taken as resident: it could be accessed at some time.
    pub(super) resident: bool,
}

impl Area {
    pub(super) fn access(&self) -> Access {
        self.prot.into()
    }

    /// Whether two neighbours are one area. Whether they were written makes no difference.
    fn like(&self, other: &Self) -> bool {
        Self { written: other.written, resident: other.resident, ..*self } == *other
    }
}

/// By start, each with its last address.
#[derive(Clone, Debug, Default)]
pub(super) struct Areas(BTreeMap<u64, (u64, Area)>);

/// The range from `start` to `last`, both included. Areas are never empty.
fn range(start: u64, last: u64) -> AddressRange {
    AddressRange::try_from(start..=last.max(start)).unwrap_or(AddressRange::ALL)
}

impl Areas {
    pub(super) fn iter(&self) -> impl Iterator<Item = (AddressRange, &Area)> {
        self.0.iter().map(|(start, (last, area))| (range(*start, *last), area))
    }

    /// The parts of areas that lie in `within`, in order.
    pub(super) fn within(
        &self,
        within: AddressRange,
    ) -> impl Iterator<Item = (AddressRange, Area)> {
        let first =
            self.0.range(..=within.start()).next_back().map_or(within.start(), |(start, _)| *start);
        let overlapping = self.0.range(first..=within.last());
        overlapping.filter_map(move |(start, (last, area))| {
            Some((range(*start, *last).intersection(within)?, *area))
        })
    }

    /// Cuts `within` out; returns what was there.
    pub(super) fn cut(&mut self, within: AddressRange) -> Vec<AddressRange> {
        self.split(within);
        let parts: Vec<AddressRange> = self.within(within).map(|(part, _)| part).collect();
        for part in &parts {
            self.0.remove(&part.start());
        }
        parts
    }

    /// Puts an area where none is, and makes one of it and its neighbours if they are alike.
    pub(super) fn insert(&mut self, at: AddressRange, area: Area) {
        let (mut start, mut last, mut area) = (at.start(), at.last(), area);
        if let Some((before, (its_last, its))) = self.0.range(..start).next_back()
            && its_last.checked_add(1) == Some(start)
            && its.like(&area)
        {
            (area.written, area.resident) =
                (area.written || its.written, area.resident || its.resident);
            start = *before;
        }
        if let Some(next) = last.checked_add(1)
            && let Some((its_last, its)) = self.0.get(&next).copied()
            && its.like(&area)
        {
            (area.written, area.resident) =
                (area.written || its.written, area.resident || its.resident);
            last = its_last;
            self.0.remove(&next);
        }
        self.0.insert(start, (last, area));
    }

    /// Changes what lies in `within`, area by area.
    pub(super) fn change(&mut self, within: AddressRange, mut change: impl FnMut(&mut Area)) {
        self.split(within);
        let parts: Vec<(AddressRange, Area)> = self.within(within).collect();
        for (part, mut area) in parts {
            self.0.remove(&part.start());
            change(&mut area);
            self.insert(part, area);
        }
    }

    /// Changes the whole area that an address lies in.
    pub(super) fn change_whole(&mut self, address: u64, change: impl FnOnce(&mut Area)) {
        if let Some((_, (_, area))) =
            self.0.range_mut(..=address).next_back().filter(|(_, (last, _))| *last >= address)
        {
            change(area);
        }
    }

    /// What lies in `within` and in no area.
    pub(super) fn holes(&self, within: AddressRange) -> Vec<AddressRange> {
        let (mut holes, mut next) = (Vec::new(), Some(within.start()));
        for (part, _) in self.within(within) {
            if let Some(from) = next.filter(|from| *from < part.start()) {
                holes.push(range(from, part.start() - 1));
            }
            next = part.last().checked_add(1);
        }
        holes.extend(
            next.filter(|from| *from <= within.last()).map(|from| range(from, within.last())),
        );
        holes
    }

    /// Makes areas begin and end where `within` does.
    fn split(&mut self, within: AddressRange) {
        for address in [Some(within.start()), within.last().checked_add(1)].into_iter().flatten() {
            let Some((_, (last, area))) = self.0.range_mut(..address).next_back() else { continue };
            if *last >= address {
                let upper = (*last, *area);
                *last = address - 1;
                self.0.insert(address, upper);
            }
        }
    }
}

/// The whole pages that `len` bytes at `start` lie in, as the kernel rounds them; none if there are
/// no bytes or they lie beyond the last address.
pub(super) fn pages(start: u64, len: u64) -> Option<AddressRange> {
    let last = start.checked_add(len.checked_sub(1)?)?;
    Some(range(start - start % PAGE, last | (PAGE - 1)))
}
