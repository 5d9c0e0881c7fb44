//! Tests of the gate.

use super::Closings;
use crate::{AddressRange, AddressSpace, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
use alloc::boxed::Box;
use alloc::task::Wake;
use core::task::Context;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Nothing;

impl IntervalNotifier for Nothing {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        Ok(None)
    }
}

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_reader_sleeps_until_all_closings_from_before_it_are_undone() {
    let space = AddressSpace::new();
    let (shared, gate) = (space.shared(), &space.shared().gate);
    let subscription = space.insert(AddressRange::ALL, Nothing).unwrap();
    let wakes = Arc::new(Wakes::default());
    let waker = wakes.clone().into();
    let mut cx = Context::from_waker(&waker);
    assert_eq!(gate.closings(), 0);
    let before = [shared.close_gate(), shared.close_gate()];
    let mut reader = Box::pin(subscription.read_begin());
    assert!(reader.as_mut().poll(&mut cx).is_pending());
    // These are counted on the other side.
    let later = [(); 3].map(|()| shared.close_gate());
    assert_eq!((gate.closings(), gate.has_closings_now()), (5, true));
    let mut woken = 0;
    let mut open = |closing: Closings, wakes_it| {
        shared.open_gate(closing);
        woken += usize::from(wakes_it);
        assert_eq!(wakes.0.load(Ordering::Relaxed), woken);
    };
    open(before[0], false);
    assert_eq!(gate.closings(), 4);
    open(before[1], true);
    assert!(reader.as_mut().poll(&mut cx).is_ready());
    later.into_iter().for_each(|closing| open(closing, false));
    assert_eq!((gate.closings(), gate.has_closings_now()), (0, false));
}
