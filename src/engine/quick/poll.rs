//! The first poll of an invalidation's future.
#![forbid(unsafe_code)]

use super::{Begun, ByHand, begin};
use crate::engine::Shared;
use crate::engine::futures::guard::Handle;
use crate::engine::futures::invalidate::{Invalidate, Step};

impl<'a> Invalidate<'a> {
    /// Starts the invalidation if this is the first poll and the handle is borrowed. Returns `None`
    /// otherwise, and has changed nothing then.
    ///
    /// The plain form is [`Invalidate::go_on`]. If no pass is pending, no function gets the address
    /// of the future or of its guard, so the compiler keeps both in registers.
    #[inline(always)]
    pub(in crate::engine) fn begin_quickly(&mut self) -> Option<(&'a Shared, Begun)> {
        let (Some(Step::Start), Some(Handle::Borrowed(space))) =
            (self.step.get(), self.space.get())
        else {
            return None;
        };
        let space: &'a Shared = space;
        if space.host.is_plain_only() {
            return None;
        }
        // Neither has anything to drop. Before the start, which may panic.
        (self.space, self.step) = (ByHand::empty(), ByHand::empty());
        Some((space, begin(space, self.range, self.owner, self.terms)))
    }
}
