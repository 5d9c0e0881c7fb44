//! Which changes are told of as one (N4).
#![forbid(unsafe_code)]

use crate::event::Event;
use crate::range::AddressRange;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// What an event names.
pub(super) type Changed = (AddressRange, Event, Seen);

/// Whether a change has happened when its invalidation starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Seen {
    Happened,
    /// It is about to: the pages are marked.
    ToCome,
}

/// Changes that are told of as one.
#[derive(Debug, PartialEq)]
pub(super) struct Batch {
    pub(super) event: Event,
    pub(super) seen: Seen,
    pub(super) ranges: Vec<AddressRange>,
}

/// Puts those together that are of one kind and concern the same notifiers, in the order in which
/// the first of each came. `concerned` says what tells one set of notifiers from another.
///
/// A reader waits for all changes that concern its notifier, so it waits for no more than if each
/// was told of alone: a device that hangs holds up nobody to whom its ranges are nothing. What is
/// told of together is flushed once.
pub(super) fn batches(
    changes: Vec<Changed>,
    concerned: impl Fn(AddressRange) -> Vec<u64>,
) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    if let [(range, event, seen)] = changes[..] {
        batches.push(Batch { event, seen, ranges: alloc::vec![range] });
        return batches;
    }
    // Few kinds, but perhaps many sets of notifiers.
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
        // Pages below 4 concern one notifier, those from 8 on another one, those in between both.
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
