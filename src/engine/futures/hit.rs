//! Waiting for the next invalidation of a notifier.
#![forbid(unsafe_code)]

use super::wait::{Goal, Verdict, Wait};
use crate::engine::Shared;
use crate::engine::state::{Parking, State, WaitFor};
use crate::entry::EntryRef;
use crate::notifier::Sequence;
use core::marker::PhantomData;
use core::task::{Context, Poll};

/// Resolves when the notifier's sequence changes, or when the notifier is covered or closed. Lets a
/// driver release what a pass of the notifier may wait for.
///
/// It is woken when an invalidation has passes pending. Only then can a pass wait.
pub(crate) struct Hit<'a> {
    space: &'a Shared,
    entry: EntryRef,
    sequence: Sequence,
    wait: Wait,
    /// Borrows the subscription, which keeps the entry alive.
    subscription: PhantomData<&'a ()>,
}

/// The goal that the sequence is not what it was.
struct Changed(EntryRef, Sequence);

impl Goal for Changed {
    fn queue(&self) -> Option<(EntryRef, WaitFor)> {
        // Such a waiter is woken at each change of the notifier and stays in the list until it
        // goes.
        Some((self.0, WaitFor::Quiet))
    }

    fn look(&mut self, _: &State, _: bool, _: bool) -> Verdict {
        if self.0.own.is_stable_at(self.1.0) { Verdict::Wait } else { Verdict::Over }
    }

    fn wants(&self, _: &Parking, _: u64) -> bool {
        false
    }
}

impl<'a> Hit<'a> {
    /// Makes the future. The entry lives as long as `'a`.
    pub(crate) fn new(space: &'a Shared, entry: EntryRef, sequence: Sequence) -> Self {
        Self { space, entry, sequence, wait: Wait::default(), subscription: PhantomData }
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.wait.poll(self.space, &mut Changed(self.entry, self.sequence), cx)
    }
}

impl Drop for Hit<'_> {
    fn drop(&mut self) {
        self.wait.give_up(self.space);
    }
}

#[cfg(all(test, feature = "userfaultfd", target_os = "linux", not(any(loom, shuttle))))]
mod tests {
    use crate::{
        AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
    };
    use alloc::boxed::Box;
    use core::task::{Context, Poll, Waker};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Its passes are never done, always ready to go on, and count their polls.
    struct Busy(Arc<AtomicUsize>);

    impl IntervalNotifier for Busy {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            let polls = self.0.clone();
            Ok(Some(PassFuture::new(core::future::poll_fn(move |cx| {
                polls.fetch_add(1, Ordering::Relaxed);
                cx.waker().wake_by_ref();
                Poll::Pending
            }))))
        }
    }

    #[test]
    fn n4_who_waits_for_a_hit_polls_no_pass_of_changes_from_before_the_notifier_was_inserted() {
        let (space, polls) = (AddressSpace::new(), Arc::new(AtomicUsize::new(0)));
        let mut cx = Context::from_waker(Waker::noop());
        let _busy = space.insert(AddressRange::ALL, Busy(polls.clone())).unwrap();
        let mut past = Box::pin(space.invalidate(AddressRange::ALL, Event::Unmap).past());
        assert!(past.as_mut().poll(&mut cx).is_pending());
        let late = space.insert(AddressRange::ALL, Busy(polls.clone())).unwrap();
        let Poll::Ready(sequence) = core::pin::pin!(late.read_begin()).poll(&mut cx) else {
            panic!("they do not cover it")
        };
        let before = polls.load(Ordering::Relaxed);
        let mut hit = late.hit(sequence);
        assert!(hit.poll(&mut cx).is_pending());
        assert_eq!(polls.load(Ordering::Relaxed), before);
        drop(space.try_invalidate(AddressRange::ALL, Event::Unmap));
        assert!(hit.poll(&mut cx).is_ready());
    }
}
