//! Which active invalidations are in their first passes.
//!
//! `remove` must not wait for a guard (L1), so it has to know whether an invalidation may still
//! call its notifier. The invalidation lowers a flag once, with a plain store and without the lock.
//! After that its guard may be held for ever. A `remove` that finds a call under way on another
//! thread yields to its executor and looks again. A sleeping wait would need a read-modify-write in
//! every invalidation that hits a notifier (`docs/engine.md`, "When are the first passes
//! over?").
//!
//! Each place has a flag, and an invalidation uses that of the place in which it was started. It
//! may be moved to another place when its first passes are over (see [`PLACES`]). An invalidation
//! without a place, in the crowd, changes [`Record::calls`](crate::engine::state::Record) under the
//! lock instead.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::protocol::{Id, PLACES};
use crate::sync::{AtomicBool, Ordering};

/// A flag for each place. Its address does not change, so it is reached without the lock.
pub(crate) struct FirstPassFlags([AtomicBool; PLACES]);

impl FirstPassFlags {
    pub(crate) fn new() -> Self {
        Self(core::array::from_fn(|_| AtomicBool::new(false)))
    }

    /// Notes that the invalidation begins to call notifiers. Under the space's lock. Returns
    /// `false` if it has no place.
    pub(crate) fn raise(&self, id: Id) -> bool {
        let flag = self.0.get(id.place());
        if let Some(flag) = flag {
            flag.store(true, Ordering::Relaxed);
        }
        flag.is_some()
    }

    /// Notes that the invalidation calls no notifier any more. A thread that reads the lowered flag
    /// sees all that the first passes wrote. Returns `false` if the invalidation has no place.
    pub(crate) fn lower(&self, id: Id) -> bool {
        let flag = self.0.get(id.place());
        if let Some(flag) = flag {
            flag.store(false, Ordering::Release);
        }
        flag.is_some()
    }

    /// Returns whether the invalidation may still call notifiers; `None` if it has no place. Under
    /// the space's lock.
    pub(crate) fn is_up(&self, id: Id) -> Option<bool> {
        Some(self.0.get(id.place())?.load(Ordering::Acquire))
    }
}

impl Shared {
    /// Notes that the invalidation calls no further first pass (L1).
    pub(crate) fn first_passes_over(&self, id: Id) {
        if !self.host.flags.lower(id) {
            self.first_passes_over_in_crowd(id);
        }
    }

    #[cold]
    #[inline(never)]
    fn first_passes_over_in_crowd(&self, id: Id) {
        self.with(|state, _| {
            if let Some(active) = state.protocol.active_mut().get_mut(id) {
                active.extra.calls = false;
            }
        });
    }

    /// Returns whether an invalidation may still call first passes. Under the lock.
    pub(crate) fn calls(&self, id: Id, in_crowd: bool) -> bool {
        self.host.flags.is_up(id).unwrap_or(in_crowd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_under_way_from_raise_to_lower_and_the_crowd_has_no_flag() {
        let flags = FirstPassFlags::new();
        for place in [0, PLACES as u64 - 1] {
            let id = Id::from_raw(7 << 6 | place);
            assert_eq!(flags.is_up(id), Some(false));
            assert!(flags.raise(id));
            assert_eq!(flags.is_up(id), Some(true));
            assert!(flags.lower(id));
            assert_eq!(flags.is_up(id), Some(false));
        }
        let id = Id::from_raw(7 << 6 | PLACES as u64);
        assert!(!flags.raise(id) && !flags.lower(id) && flags.is_up(id).is_none());
    }
}
