//! Fixed storage between the reader of events and the delivery that calls drivers. One producer,
//! one consumer, no lock, no allocation.
#![forbid(unsafe_code)]

use crate::sync::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Capacity. If more changes arrive before a delivery, the excess becomes "everything that is
/// watched".
const PLACES: usize = 1024;

/// A change of the process's memory, as userfaultfd reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Unmapped: start, end (exclusive).
    Unmap(u64, u64),
    /// About to be discarded: start, end (exclusive). The present pages are marked.
    Remove(u64, u64),
    /// About to be discarded: start, end (exclusive). The pages could not be marked.
    Unseen(u64, u64),
    /// Moved: old start, new start, length in bytes.
    Remap(u64, u64, u64),
    /// The process has forked.
    Fork,
}

#[derive(Default)]
struct Place([AtomicU64; 4]);

/// A ring of changes. The reader puts, a delivery takes.
pub(super) struct Ring {
    places: [Place; PLACES],
    /// Number of changes ever put.
    put: AtomicUsize,
    /// Number of changes ever taken.
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

    /// Records that any watched memory may have changed.
    pub(super) fn overflow(&self) {
        self.overflowed.store(true, Ordering::Release);
    }

    /// Adds a change. Only one thread may call it at a time.
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

    /// Removes the oldest change. Only one thread may call it at a time.
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

    /// Returns `true` if changes were lost since the last call. Call it before taking the rest.
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
