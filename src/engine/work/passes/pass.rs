//! One pass, from its first pass to its end.
#![forbid(unsafe_code)]

use crate::engine::nesting::passes::Suspicion;
use crate::engine::work::Listed;
use crate::entry::EntryRef;
use crate::foreign::{Panic, keep};
use crate::observe::Moment;
use crate::pass::PassFuture;
use alloc::boxed::Box;
use core::pin::Pin;
use core::task::{Context, Poll};

/// The place of a pass future from its first pass to its end.
///
/// Boxed, so that the future need not move when it goes into the join. Used again, so that a pass
/// that is ready at its first poll allocates nothing.
pub(crate) struct Slot(Pin<Box<Option<PassFuture>>>);

impl Slot {
    pub(super) fn empty() -> Self {
        Self(Box::pin(None))
    }

    pub(in crate::engine) fn as_mut(&mut self) -> Pin<&mut Option<PassFuture>> {
        self.0.as_mut()
    }

    pub(super) fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// Drops the future. If that panics, the slot must not be used again.
    pub(super) fn clear(&mut self) -> Result<(), Panic> {
        keep(|_| self.0.as_mut().set(None))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Mostly empty. A pass that is left goes with the space, unfinished. `Passes::discard` has
        // noted a panic of its drop.
        if self.is_some() {
            let _ = self.clear();
        }
    }
}

/// A pass, its notifier, and what is given back when it is done.
pub(super) struct Pass {
    /// `None` if the pass is over, or in a record whose pass has moved into the join.
    pub(super) future: Option<Slot>,
    pub(super) entry: EntryRef,
    /// Its key in [`PendingNotifiers`](super::PendingNotifiers), if it is listed there.
    pub(super) listed: Option<Listed>,
    /// It counts against the pass budget (B4).
    pub(super) budgeted: bool,
    /// When its first pass was called.
    pub(super) began: Moment,
    /// C7.
    pub(super) suspicion: Suspicion,
}

impl Pass {
    /// Moves the pass out. A record without a slot stays.
    pub(super) fn move_out(&mut self) -> Self {
        let Self { entry, budgeted, began, .. } = *self;
        let (future, listed) = (self.future.take(), self.listed.take());
        Self { entry, future, listed, budgeted, began, suspicion: Suspicion::none() }
    }
}

/// A pass that is done.
pub(super) struct Finished {
    pub(super) entry: EntryRef,
    pub(super) listed: Option<Listed>,
    pub(super) budgeted: bool,
}

/// The result of the last poll of a pass.
pub(super) struct Outcome {
    /// `None` if the pass was over before (L5).
    pub(super) finished: Option<Finished>,
    pub(super) began: Moment,
    /// The empty slot, if it can be used again.
    pub(super) slot: Option<Slot>,
    /// The panic of the poll, or of the drop behind it.
    pub(super) panic: Option<Panic>,
}

impl Future for Pass {
    type Output = Outcome;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let this = &mut *self;
        let Some(slot) = &mut this.future else {
            return Poll::Ready(Outcome {
                finished: None,
                began: this.began,
                slot: None,
                panic: None,
            });
        };
        let polled = this.suspicion.poll(this.entry, cx, |cx| {
            keep(|_| match slot.as_mut().as_pin_mut() {
                Some(future) => future.poll(cx),
                None => Poll::Ready(()),
            })
        });
        let mut panic = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(())) => None,
            Err(panic) => Some(panic),
        };
        if let Err(in_drop) = slot.clear() {
            panic = panic.or(Some(in_drop));
        }
        let slot = this.future.take().filter(|_| panic.is_none());
        let finished = Finished { entry: this.entry, listed: this.listed, budgeted: this.budgeted };
        Poll::Ready(Outcome { finished: Some(finished), began: this.began, slot, panic })
    }
}
