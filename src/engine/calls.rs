//! Which active invalidations are in their first passes.
//!
//! `remove` must not wait for a guard that somebody holds (L1), so it has to know whether an
//! invalidation may still call its notifier. The invalidation says so once, with a plain store and
//! without the lock: after that its guard may be held for ever. Who removes and finds a call under
//! way on another thread yields to its executor and looks again; a sleeping wait would need a
//! read-modify-write in every invalidation that hits something (`DESIGN.md`, "When are the first
//! passes over?").
//!
//! The flag is that of the place in which the invalidation was started. It may be moved from there
//! when its first passes are over (see [`PLACES`]); one that calls first passes in the crowd says
//! so under the lock.
#![forbid(unsafe_code)]

use crate::protocol::{Id, PLACES};
use crate::sync::{AtomicBool, Ordering};

/// A flag for each place, at an address that does not change, so that it is reached without the
/// lock.
pub(crate) struct FirstPassFlags([AtomicBool; PLACES]);

impl FirstPassFlags {
    pub(crate) fn new() -> Self {
        Self(core::array::from_fn(|_| AtomicBool::new(false)))
    }

    /// The invalidation begins to call notifiers. Under the space's lock. Returns `false` if it has
    /// no place.
    #[inline(always)]
    pub(crate) fn raise(&self, id: Id) -> bool {
        let flag = self.0.get(id.place());
        if let Some(flag) = flag {
            flag.store(true, Ordering::Relaxed);
        }
        flag.is_some()
    }

    /// It will call none any more: what its first passes did happened before whoever learns of it.
    /// Returns `false` if it has no place.
    #[inline(always)]
    pub(crate) fn lower(&self, id: Id) -> bool {
        let flag = self.0.get(id.place());
        if let Some(flag) = flag {
            flag.store(false, Ordering::Release);
        }
        flag.is_some()
    }

    /// Whether it may still call notifiers; `None` if it has no place. Under the space's lock.
    pub(crate) fn is_up(&self, id: Id) -> Option<bool> {
        Some(self.0.get(id.place())?.load(Ordering::Acquire))
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
