//! The right to poll the passes of one parked invalidation (C8).
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::state::Ticket;
use crate::engine::work::{Progress, Work};
use crate::sync::Ordering;
use alloc::boxed::Box;

/// The work of a parked invalidation, taken out of the state to be polled.
///
/// An invalidation has at most one lease at a time. The drop of the lease is the only way back:
/// also when a panic unwinds, the work is in the state again and the waiting futures are woken.
pub(crate) struct Lease<'s> {
    shared: &'s Shared,
    ticket: Ticket,
    work: Option<Box<Work>>,
    progress: Progress,
    /// All joined passes are done. Valid once the work was given back.
    done: bool,
}

impl<'s> Lease<'s> {
    pub(crate) fn new(shared: &'s Shared, ticket: Ticket, work: Box<Work>) -> Self {
        Self { shared, ticket, work: Some(work), progress: Progress::Interrupted, done: false }
    }

    /// Polls the passes and gives them back. Returns whether all joined ones are done.
    pub(crate) fn drive(mut self) -> bool {
        if let Some(work) = &mut self.work {
            let (passes, host) = (work.passes(), &self.shared.host);
            self.progress = passes.drive(host);
            // A pass that was polled may have fenced a notifier.
            while passes.is_behind(host.fences.load(Ordering::Relaxed)) {
                self.progress = passes.drive(host);
            }
        }
        self.give_back();
        self.done
    }

    /// Drops the passes of notifiers that were fenced, and gives the others back (L5).
    pub(crate) fn cut(mut self) {
        if let Some(work) = &mut self.work {
            work.passes().cut(&self.shared.host);
        }
    }

    fn give_back(&mut self) {
        let Some(mut work) = self.work.take() else { return };
        // If no pass is left, the invalidation is unclaimed from now on, or over.
        let now = if work.passes().running() == 0 { self.shared.host.now() } else { None };
        let (done, behind) = self
            .shared
            .with(|state, outbox| state.give_back(self.ticket, work, self.progress, now, outbox));
        self.done = done;
        if behind {
            self.shared.cut(self.ticket);
        }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::engine::state::Help;
    use crate::{
        AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
    };
    use core::task::{Context, Waker};

    struct Yields;

    impl IntervalNotifier for Yields {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            Ok(Some(PassFuture::new(async {
                for _ in 0..100 {
                    futures::pending!();
                }
            })))
        }
    }

    #[test]
    fn c8_passes_that_were_not_polled_are_there_again() {
        let space = AddressSpace::new();
        let _subscription = space.insert(AddressRange::ALL, Yields).unwrap();
        let mut invalidate =
            alloc::boxed::Box::pin(space.invalidate(AddressRange::ALL, Event::Unmap));
        assert!(invalidate.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let shared: &Shared = space.shared();
        let mut parked = None;
        shared.with(|state, _| {
            state.parked.overlapping(AddressRange::ALL, |found| parked = Some(found.value.value))
        });
        let ticket = parked.expect("it is parked");
        let help = || shared.with(|state, _| state.help(ticket, |_, _| true));
        for _ in 0..3 {
            let Help::Leased(work) = help() else { panic!("they are not there") };
            assert!(matches!(help(), Help::Busy));
            drop(Lease::new(shared, ticket, work));
        }
    }
}
