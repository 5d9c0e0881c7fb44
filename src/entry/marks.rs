//! The marks of an entry in [`Entry::own`], and what keeps an entry alive.
#![forbid(unsafe_code)]

use super::Entry;
use crate::protocol::{MARKS, WATCHED};

/// Mark: the subscription does not exist any more.
pub(super) const DETACHED: u32 = MARKS[0];
/// Mark: the notifier was moved out.
pub(super) const TAKEN: u32 = MARKS[1];
/// Mark: the entry is held, so that its name can be asked for.
pub(super) const HELD: u32 = MARKS[2];

impl Entry {
    /// Records that the subscription does not exist any more. Under the space's lock.
    #[inline]
    pub(crate) fn detach(&self) {
        self.own.mark(DETACHED | WATCHED, true);
    }

    /// Closes and detaches the notifier, if no invalidation covers it and it has no mark. Otherwise
    /// it does nothing and returns `false`. Under the space's lock.
    #[inline(always)]
    pub(crate) fn retire(&self) -> bool {
        self.own.quick_close(DETACHED | WATCHED)
    }

    /// Returns whether the entry is held.
    pub(crate) fn is_held(&self) -> bool {
        self.own.is_marked(HELD)
    }

    /// Returns whether the notifier was moved out.
    #[inline]
    pub(crate) fn is_taken(&self) -> bool {
        self.own.is_marked(TAKEN)
    }

    /// Returns whether nothing keeps the entry alive. Under the space's lock.
    pub(crate) fn unused(&self) -> bool {
        self.own.is_marked(DETACHED) && !self.own.is_covered() && !self.is_held()
    }
}
