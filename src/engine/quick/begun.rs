//! An invalidation on its way from its start to its guard, in two registers.
#![forbid(unsafe_code)]

use crate::engine::work::Work;
use crate::protocol::Id;
use alloc::boxed::Box;

/// An invalidation that has started, and its work if it hit a notifier.
///
/// Two words, so that functions return it in registers. A third field would be written to memory
/// and read again before its store has finished (a store forwarding stall). So the id carries a
/// mark that says whether passes are pending. [`into_held`](Self::into_held) and
/// [`into_pending`](Self::into_pending) are the ways out, one for each case.
pub(in crate::engine) struct Begun {
    id: Id,
    work: Option<Box<Work>>,
}

/// The mark in an id: passes are pending. Ids stay below it.
const PENDS: u64 = 1 << 63;

impl Begun {
    /// All first passes have returned and all passes are done: a guard can take over.
    #[inline]
    pub(in crate::engine) fn held(id: Id, work: Option<Box<Work>>) -> Self {
        debug_assert!(id.raw() & PENDS == 0, "ids stay below the mark");
        Self { id, work }
    }

    /// Passes are pending.
    pub(in crate::engine) fn pending(id: Id, work: Option<Box<Work>>) -> Self {
        Self { id: Id::from_raw(id.raw() | PENDS), work }
    }

    /// Returns whether passes are pending.
    #[inline]
    pub(in crate::engine) fn pends(&self) -> bool {
        self.id.raw() & PENDS != 0
    }

    /// Returns what a guard takes over. To be called if no pass is pending.
    #[inline]
    pub(in crate::engine) fn into_held(self) -> (Id, Option<Box<Work>>) {
        debug_assert!(!self.pends(), "a guard is handed out when all passes are done");
        (self.id, self.work)
    }

    /// Returns the id without the mark, and the work whose passes are pending.
    pub(in crate::engine) fn into_pending(self) -> (Id, Option<Box<Work>>) {
        debug_assert!(self.pends(), "a guard takes over");
        (Id::from_raw(self.id.raw() & !PENDS), self.work)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn the_mark_is_in_no_id_that_comes_out() {
        let id = Id::from_raw(u64::MAX >> 1);
        let (pending, held) = (Begun::pending(id, None), Begun::held(id, None));
        assert!(pending.pends() && !held.pends());
        assert_eq!(
            (pending.into_pending().0.raw(), held.into_held().0.raw()),
            (id.raw(), id.raw())
        );
    }

    #[test]
    fn it_is_two_words() {
        assert_eq!(size_of::<Begun>(), 2 * size_of::<usize>().max(size_of::<u64>()));
    }
}
