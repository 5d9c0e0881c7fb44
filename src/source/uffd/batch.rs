//! Batches of changes that are delivered as one invalidation (N4).
#![forbid(unsafe_code)]

use crate::event::Event;
use crate::range::AddressRange;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// A change that an event names: its range, its kind, and whether it has happened.
pub(super) type Changed = (AddressRange, Event, Seen);

/// State of a change when its invalidation starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Seen {
    /// The change has happened.
    Happened,
    /// The change is about to happen. Its pages are marked.
    ToCome,
}

/// Changes that are delivered as one invalidation.
#[derive(Debug, PartialEq)]
pub(super) struct Batch {
    pub(super) event: Event,
    pub(super) seen: Seen,
    pub(super) ranges: Vec<AddressRange>,
}

/// Groups changes of one kind that concern the same notifiers (N4). Batches are in the order in
/// which the first change of each came. `concerned` returns the set of notifiers of a range.
///
/// A reader waits for every change that concerns its notifier. So a batch makes no reader wait for
/// more than separate invalidations would, and a device that hangs does not hold up readers of
/// ranges that it does not map. Each batch is flushed once.
pub(super) fn batches(
    changes: Vec<Changed>,
    concerned: impl Fn(AddressRange) -> Vec<u64>,
) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    if let [(range, event, seen)] = changes[..] {
        batches.push(Batch { event, seen, ranges: alloc::vec![range] });
        return batches;
    }
    // There are few kinds, but possibly many sets of notifiers.
    let mut known: BTreeMap<Vec<u64>, Vec<usize>> = BTreeMap::new();
    for (range, event, seen) in changes {
        let of_these = known.entry(concerned(range)).or_default();
        match of_these.iter().find(|at| (batches[**at].event, batches[**at].seen) == (event, seen))
        {
            Some(at) => batches[*at].ranges.push(range),
            None => {
                of_these.push(batches.len());
                batches.push(Batch { event, seen, ranges: alloc::vec![range] });
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n4_changes_of_one_kind_that_concern_the_same_notifiers_are_one_batch() {
        let at = |page: u64| AddressRange::new(page << 12, 4096).unwrap();
        // Pages below 4 concern one notifier, pages from 8 on another one, and pages in between
        // both.
        let concerned = |range: AddressRange| match range.start() >> 12 {
            0..4 => alloc::vec![1],
            4..8 => alloc::vec![1, 2],
            _ => alloc::vec![2],
        };
        let gone = |page| (at(page), Event::Unmap, Seen::Happened);
        let discarded = |page| (at(page), Event::Clear, Seen::ToCome);
        let changes = [
            gone(1),
            gone(9),
            discarded(2),
            gone(0),
            gone(5),
            discarded(3),
            (at(1), Event::Clear, Seen::Happened),
            gone(8),
        ];
        let batch = |event, seen, pages: &[u64]| Batch {
            event,
            seen,
            ranges: pages.iter().map(|page| at(*page)).collect(),
        };
        assert_eq!(
            batches(changes.to_vec(), concerned),
            [
                batch(Event::Unmap, Seen::Happened, &[1, 0]),
                batch(Event::Unmap, Seen::Happened, &[9, 8]),
                batch(Event::Clear, Seen::ToCome, &[2, 3]),
                batch(Event::Unmap, Seen::Happened, &[5]),
                batch(Event::Clear, Seen::Happened, &[1]),
            ]
        );
        assert_eq!(batches(alloc::vec![gone(5)], |_| unreachable!("one is one")).len(), 1);
        assert!(batches(alloc::vec![], concerned).is_empty());
    }
}
