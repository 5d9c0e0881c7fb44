//! Fixed storage between the step that reads events and the step that calls drivers: one producer,
//! one consumer, no lock and no memory.
#![forbid(unsafe_code)]

use crate::sync::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Events that are kept. When more arrive before they are delivered, the rest becomes "everything
/// that is watched".
const PLACES: usize = 1024;

/// A change of the process's memory, as userfaultfd tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// `start`, end exclusive.
    Unmap(u64, u64),
    /// `start`, end exclusive; the pages that are there are marked, and about to go.
    Remove(u64, u64),
    /// The same where they could not be marked.
    Unseen(u64, u64),
    /// From, to, bytes.
    Remap(u64, u64, u64),
    Fork,
}

#[derive(Default)]
struct Place([AtomicU64; 4]);

pub(super) struct Ring {
    places: [Place; PLACES],
    /// Changes that were ever put in.
    put: AtomicUsize,
    /// Changes that were ever taken out.
    taken: AtomicUsize,
    overflowed: AtomicBool,
}

impl Ring {
    pub(super) fn new() -> Self {
        Self {
            places: core::array::from_fn(|_| Place::default()),
            put: AtomicUsize::new(0),
            taken: AtomicUsize::new(0),
            overflowed: AtomicBool::new(false),
        }
    }

    /// Notes that anything may have changed: what is taken from now on is everything that is
    /// watched.
    pub(super) fn overflow(&self) {
        self.overflowed.store(true, Ordering::Release);
    }

    /// To be called by one thread at a time.
    pub(super) fn put(&self, change: Change) {
        let at = self.put.load(Ordering::Relaxed);
        if at.wrapping_sub(self.taken.load(Ordering::Acquire)) == PLACES {
            self.overflow();
            return;
        }
        let words = match change {
            Change::Unmap(start, end) => [0, start, end, 0],
            Change::Remove(start, end) => [1, start, end, 0],
            Change::Remap(from, to, len) => [2, from, to, len],
            Change::Fork => [3, 0, 0, 0],
            Change::Unseen(start, end) => [4, start, end, 0],
        };
        for (place, word) in self.places[at % PLACES].0.iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
        self.put.store(at.wrapping_add(1), Ordering::Release);
    }

    /// To be called by one thread at a time.
    pub(super) fn take(&self) -> Option<Change> {
        let at = self.taken.load(Ordering::Relaxed);
        if at == self.put.load(Ordering::Acquire) {
            return None;
        }
        let [kind, a, b, c] =
            self.places[at % PLACES].0.each_ref().map(|word| word.load(Ordering::Relaxed));
        self.taken.store(at.wrapping_add(1), Ordering::Release);
        Some(match kind {
            0 => Change::Unmap(a, b),
            1 => Change::Remove(a, b),
            2 => Change::Remap(a, b, c),
            4 => Change::Unseen(a, b),
            _ => Change::Fork,
        })
    }

    /// Whether changes were lost since the last question: to be asked before the rest is taken.
    pub(super) fn take_overflow(&self) -> bool {
        self.overflowed.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_changes_in_order_and_says_when_it_could_not() {
        let ring = Ring::new();
        for round in 0..3u64 {
            for at in 0..PLACES as u64 {
                ring.put(Change::Remap(round, at, 4096));
            }
            assert!(!ring.take_overflow());
            ring.put(Change::Fork);
            assert!(ring.take_overflow());
            assert!(!ring.take_overflow());
            for at in 0..PLACES as u64 {
                assert_eq!(ring.take(), Some(Change::Remap(round, at, 4096)));
            }
            assert_eq!(ring.take(), None);
        }
        for change in
            [Change::Unmap(1, 2), Change::Remove(3, 4), Change::Unseen(5, 6), Change::Fork]
        {
            ring.put(change);
            assert_eq!(ring.take(), Some(change));
        }
    }
}
