//! Which active invalidations are in their first passes.
//!
//! `remove` must not wait for a guard that somebody holds (L1), so it has to know whether an invalidation may still call its
//! notifier. The invalidation says so once, with a plain store and without the lock: after that its guard may be held for ever. Who
//! removes and finds a call under way on another thread yields to its executor and looks again; a sleeping wait would need a
//! read-modify-write in every invalidation that hits something (`DESIGN.md`, "When are the first passes over?").

use crate::protocol::Id;
use crate::sync::{AtomicBool, Ordering};
use alloc::boxed::Box;
use spin::Once;

/// Ids in the first chunk; each further chunk has twice as many as the one before.
const FIRST: usize = 32;
const CHUNKS: usize = 28;

/// A flag for each id, at an address that does not change, so that it is reached without the lock.
pub(crate) struct CallTable {
    /// Those of the first ids, which are used most, in place.
    first: [AtomicBool; FIRST],
    chunks: [Once<Box<[AtomicBool]>>; CHUNKS],
}

/// Chunk and place in it.
#[inline]
fn place(id: Id) -> (usize, usize) {
    let from_first = id as usize + FIRST;
    let chunk = (from_first.ilog2() - FIRST.ilog2()) as usize;
    (chunk, from_first - (FIRST << chunk))
}

impl CallTable {
    pub(crate) fn new() -> Self {
        Self { first: core::array::from_fn(|_| AtomicBool::new(false)), chunks: [const { Once::new() }; CHUNKS] }
    }

    /// The invalidation begins to call notifiers. Under the space's lock.
    #[inline]
    pub(crate) fn begin(&self, id: Id) {
        match self.first.get(id as usize) {
            Some(flag) => flag.store(true, Ordering::Relaxed),
            None => {
                let (chunk, at) = place(id);
                let flags = self.chunks[chunk].call_once(|| (0..FIRST << chunk).map(|_| AtomicBool::new(false)).collect());
                flags[at].store(true, Ordering::Relaxed);
            }
        }
    }

    /// It will call none any more: what its first passes did happened before whoever learns of it.
    #[inline]
    pub(crate) fn end(&self, id: Id) {
        if let Some(flag) = self.flag(id) {
            flag.store(false, Ordering::Release);
        }
    }

    /// Whether it may still call notifiers. Under the space's lock.
    pub(crate) fn under_way(&self, id: Id) -> bool {
        self.flag(id).is_some_and(|flag| flag.load(Ordering::Acquire))
    }

    #[inline]
    fn flag(&self, id: Id) -> Option<&AtomicBool> {
        self.first.get(id as usize).or_else(|| {
            let (chunk, at) = place(id);
            Some(&self.chunks[chunk].get()?[at])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_has_a_place_of_its_own() {
        let mut next = (0, 0);
        for id in 0..10_000 {
            assert_eq!(place(id), next);
            next.1 += 1;
            if next.1 == FIRST << next.0 {
                next = (next.0 + 1, 0);
            }
        }
        assert!(place(Id::MAX).0 < CHUNKS);
    }

    #[test]
    fn a_call_is_under_way_from_begin_to_end() {
        let calls = CallTable::new();
        for id in [0, 31, 32, 95, 96, 5000] {
            assert!(!calls.under_way(id));
            calls.begin(id);
            assert!(calls.under_way(id));
            calls.end(id);
            assert!(!calls.under_way(id));
        }
    }
}
