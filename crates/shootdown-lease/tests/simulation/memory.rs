//! The memory that is mirrored: it outlives its owners.

use shootdown::{AddressRange, RangeSet};
use shootdown_lease::{Boot, Epoch, Fenced};
use std::collections::BTreeSet;

pub const PAGES: usize = 6;
const PAGE: u64 = 0x1000;

#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// How often each page has changed.
    pub versions: [u64; PAGES],
    /// The newest boot that has taken it over: the fencing token of writes.
    pub boot: u64,
    fenced: BTreeSet<Epoch>,
    fenced_before: u64,
}

impl Memory {
    /// Changes pages, unless a newer owner has taken the memory over.
    pub fn write(&mut self, pages: &[usize], boot: Boot, refuses: bool) -> bool {
        if refuses && boot.0 < self.boot {
            return false;
        }
        for page in pages {
            self.versions[*page] += 1;
        }
        true
    }

    pub fn fence(&mut self, what: Fenced) {
        match what {
            Fenced::Epoch(_, epoch) => {
                self.fenced.insert(epoch);
            }
            Fenced::Before(boot) => self.fenced_before = self.fenced_before.max(boot.0),
        }
    }

    /// Whether devices reach it under that epoch.
    pub fn is_open_to(&self, epoch: Epoch) -> bool {
        epoch.boot.0 >= self.fenced_before && !self.fenced.contains(&epoch)
    }
}

pub fn range(page: usize) -> AddressRange {
    AddressRange::new(PAGE * page as u64, PAGE).unwrap()
}

pub fn ranges(pages: &[usize]) -> RangeSet {
    RangeSet::new(pages.iter().map(|page| range(*page))).unwrap()
}

/// The pages of ranges.
pub fn pages(ranges: &[AddressRange]) -> Vec<usize> {
    ranges
        .iter()
        .flat_map(|range| (range.start() / PAGE) as usize..=(range.last() / PAGE) as usize)
        .collect()
}
