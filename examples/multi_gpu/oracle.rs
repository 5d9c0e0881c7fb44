//! What is true: the memory. A device's access is stale if the memory has changed since the device
//! looked at it, whatever the library, a driver or a guard says.

use crate::memory::{Access, Change};
use shootdown::AddressRange;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub const PAGE: u64 = 4096;

/// A page of one of the program's address spaces.
pub type Page = (usize, u64);

/// The pages of a range.
pub fn pages(space: usize, range: AddressRange) -> RangeInclusive<Page> {
    (space, range.start() / PAGE)..=(space, range.last() / PAGE)
}

/// The pages of an invalidation: ranges of them, sorted and without overlaps.
#[derive(Clone)]
pub struct Pages(Arc<[RangeInclusive<Page>]>);

impl Pages {
    /// Of ranges that are sorted, do not overlap and begin and end with a page.
    pub fn new(space: usize, ranges: &[AddressRange]) -> Self {
        Self(ranges.iter().map(|range| pages(space, *range)).collect())
    }

    /// The first range that does not end before `page`.
    fn from(&self, page: &Page) -> Option<&RangeInclusive<Page>> {
        self.0.get(self.0.partition_point(|range| range.end() < page))
    }

    pub fn overlap(&self, others: &Self) -> bool {
        self.0.iter().any(|range| {
            others.from(range.start()).is_some_and(|other| other.start() <= range.end())
        })
    }

    /// Whether each range of `others` lies in one of these.
    pub fn cover(&self, others: &Self) -> bool {
        let covers = |range: &RangeInclusive<Page>, other: &RangeInclusive<Page>| {
            range.start() <= other.start() && other.end() <= range.end()
        };
        others
            .0
            .iter()
            .all(|other| self.from(other.start()).is_some_and(|range| covers(range, other)))
    }

    /// What is known of them, in order.
    pub fn of<T: Copy>(&self, map: &BTreeMap<Page, T>) -> impl Iterator<Item = (Page, T)> {
        self.0
            .iter()
            .flat_map(|range| map.range(range.clone()))
            .map(|(page, known)| (*page, *known))
    }
}

/// The program's memory: what is mapped, and the generation of each page that a device has looked
/// at, which rises when the page changes.
#[derive(Default)]
pub struct Oracle {
    state: Mutex<State>,
    accesses: AtomicU64,
    stale: AtomicU64,
}

#[derive(Default)]
struct State {
    generations: BTreeMap<Page, u64>,
    /// What is mapped, by space and start: the last address, and what may be done there.
    mapped: BTreeMap<Page, (u64, Access)>,
}

impl State {
    fn access_to(&self, page: Page) -> Access {
        let address = page.1 * PAGE;
        match self.mapped.range((page.0, 0)..=(page.0, address)).next_back() {
            Some((_, (last, access))) if *last >= address => *access,
            _ => Access::None,
        }
    }

    /// Takes `range` out of what is mapped; returns the parts of it that were.
    fn take(&mut self, space: usize, range: AddressRange) -> Vec<(u64, u64)> {
        let first = self
            .mapped
            .range((space, 0)..=(space, range.start()))
            .next_back()
            .map_or((space, range.start()), |(at, _)| *at);
        let overlapping: Vec<(Page, (u64, Access))> = self
            .mapped
            .range(first..=(space, range.last()))
            .filter(|(_, (last, _))| *last >= range.start())
            .map(|(at, area)| (*at, *area))
            .collect();
        let mut taken = Vec::new();
        for ((_, start), (last, access)) in overlapping {
            self.mapped.remove(&(space, start));
            if start < range.start() {
                self.mapped.insert((space, start), (range.start() - 1, access));
            }
            if last > range.last() {
                self.mapped.insert((space, range.last() + 1), (last, access));
            }
            taken.push((start.max(range.start()), last.min(range.last())));
        }
        taken
    }
}

impl Oracle {
    pub fn map(&self, space: usize, range: AddressRange, access: Access) {
        let mut state = self.state.lock().unwrap();
        state.take(space, range);
        state.mapped.insert((space, range.start()), (range.last(), access));
    }

    /// The memory changes.
    pub fn change(&self, space: usize, range: AddressRange, change: &Change) {
        let mut state = self.state.lock().unwrap();
        state
            .generations
            .range_mut(pages(space, range))
            .for_each(|(_, generation)| *generation += 1);
        match change {
            Change::Discarded => {}
            Change::Unmapped(parts) => parts.iter().for_each(|part| drop(state.take(space, *part))),
            Change::Protected(access) => {
                for (start, last) in state.take(space, range) {
                    state.mapped.insert((space, start), (last, *access));
                }
            }
        }
    }

    /// What a page fault of a device finds: the generation of the page, unless it may not be read.
    pub fn look(&self, page: Page) -> Option<u64> {
        let mut state = self.state.lock().unwrap();
        if state.access_to(page) == Access::None {
            return None;
        }
        Some(*state.generations.entry(page).or_insert(0))
    }

    /// A device reads a page through a translation that it got in `generation`.
    pub fn access(&self, page: Page, generation: u64) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        let state = self.state.lock().unwrap();
        let current = state.generations.get(&page).is_some_and(|current| *current == generation);
        if !current || state.access_to(page) == Access::None {
            self.stale.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::Relaxed)
    }

    pub fn stale(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }
}
