//! The plain end of an invalidation.
#![forbid(unsafe_code)]

use super::Shared;
use super::quick::{Begun, end};
use super::work::Work;
use crate::protocol::Id;
use alloc::boxed::Box;

impl Shared {
    /// Ends an invalidation for which no guard is handed out.
    pub(super) fn end_begun(&self, begun: Begun) {
        let (id, work) = begun.into_held();
        end(self, id, work);
    }

    /// Ends an invalidation (S3, C2), whatever is true of it: it may be timed, traced or in the
    /// crowd, notifiers may have been inserted under it, and the lock may be taken.
    pub(super) fn end_plainly(&self, id: Id, mut work: Option<Box<Work>>) {
        let timed = self.host.clock.is_some() || work.as_ref().is_some_and(|work| work.timed);
        let now = if timed { self.host.now() } else { None };
        // The span is closed when the lock is free.
        let _trace = work.as_mut().map(|work| core::mem::take(&mut work.passes().trace));
        self.with(|state, outbox| state.end(id, work, now, outbox));
    }
}
