//! G, where it is hard: waits in between, and passes that wait for what was prepared.
use crate::support::*;
use shootdown::{
    AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture, RetryBudget,
    Timeline, WouldBlock,
};
use std::borrow::Cow;
use std::cell::Cell;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake};

/// Buffers under one lock.
#[derive(Clone, Default)]
struct Gpu(Arc<DriverLock<Vec<usize>>>);

impl IntervalNotifier for Gpu {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.0.lock_for(invalidation).clear();
        Ok(None)
    }

    fn name(&self) -> Cow<'static, str> {
        "gpu".into()
    }
}

#[test]
fn g2_a_set_ends_if_no_invalidation_hits_it_while_it_is_prepared() {
    let (space, gpu) = (AddressSpace::new(), Gpu::default());
    let buffers = [0, 2].map(|page| space.insert(pages(page, 1), gpu.clone()).unwrap());
    let guard = now(space.invalidate(pages(2, 1), Event::Unmap));
    let preparations = Cell::new(0);
    let prepare = |at, _| {
        preparations.set(preparations.get() + 1);
        async move { Ok::<usize, Infallible>(at) }
    };
    let buffers = buffers.each_ref();
    let mut set = Task::new(gpu.0.mirror_all(
        &buffers,
        RetryBudget { retries: 0, ..RetryBudget::default() },
        prepare,
        |table, found| {
            *table = found;
        },
    ));
    set.expect_pending();
    assert_eq!(preparations.get(), 0, "it waits for the second buffer");
    // The first one is hit before anything is prepared.
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    drop(guard);
    assert!(
        set.finish().is_ok(),
        "prepared {} times, for nothing: nothing was hit meanwhile",
        preparations.get()
    );
}

/// Counts references to pages, as the pins of a device or the registrations of a cache do; a pass
/// waits until there are none.
#[derive(Clone, Default)]
struct Pinned(Arc<DriverLock<()>>, Arc<AtomicUsize>, Arc<futures::task::AtomicWaker>);

struct Pin1(Pinned);

impl Drop for Pin1 {
    fn drop(&mut self) {
        self.0.1.fetch_sub(1, Ordering::SeqCst);
        self.0.2.wake();
    }
}

impl IntervalNotifier for Pinned {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        drop(self.0.lock_for(invalidation));
        let pinned = self.clone();
        Ok(Some(PassFuture::new(std::future::poll_fn(move |cx| {
            pinned.2.register(cx.waker());
            if pinned.1.load(Ordering::SeqCst) == 0 { Poll::Ready(()) } else { Poll::Pending }
        }))))
    }
}

#[test]
fn g2_what_is_prepared_for_one_range_does_not_hold_up_the_invalidation_that_another_one_waits_for()
{
    let (space, lock) = (AddressSpace::new(), Arc::new(DriverLock::new(())));
    let driver = || Pinned(lock.clone(), Arc::default(), Arc::default());
    let buffers = [0, 2].map(|page| space.insert(pages(page, 1), driver()).unwrap());
    let subscriptions = buffers.each_ref();
    let step = Gate::default();
    let prepare = |at: usize, _| {
        let (pinned, step): (Pinned, _) = (buffers[at].clone(), step.clone());
        async move {
            if at == 1 {
                step.await;
            }
            pinned.1.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Infallible>(Pin1(pinned))
        }
    };
    let mut set =
        Task::new(
            lock.mirror_all(&subscriptions, RetryBudget::default(), prepare, |(), pins| drop(pins)),
        );
    set.expect_pending();
    // The second one is hit while it is prepared, and stays under invalidation.
    let guard = now(space.invalidate(pages(2, 1), Event::Unmap));
    step.open();
    set.expect_pending();
    // Then both are hit.
    let mut both = Task::new(space.invalidate(pages(0, 3), Event::Unmap));
    let _ = both.poll();
    drop(guard);
    for _ in 0..100 {
        set.poll_again();
        both.poll_again();
    }
    assert!(both.is_done() && set.is_done(), "they wait for each other: {:?}", space.active());
}

/// Says whether it was woken.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn g2_what_is_prepared_is_woken_by_invalidations_of_its_range_and_leaves_no_waker_behind() {
    let space = AddressSpace::new();
    let lock = Arc::new(DriverLock::new(()));
    let driver = || Pinned(lock.clone(), Arc::default(), Arc::default());
    let buffers = [0, 2].map(|page| space.insert(pages(page, 1), driver()).unwrap());
    let elsewhere = space.insert(pages(9, 1), driver()).unwrap();
    let subscriptions = buffers.each_ref();
    // The second one takes for ever.
    let prepare = |at: usize, _| async move {
        if at == 1 {
            std::future::pending::<()>().await;
        }
        Ok::<_, Infallible>(())
    };
    let woken = Arc::new(Woken::default());
    let waker = woken.clone().into();
    let mut cx = Context::from_waker(&waker);
    for (of, wakes) in [(&elsewhere, false), (&buffers[0], true)] {
        let set = lock.mirror_all(&subscriptions, RetryBudget::default(), prepare, |(), _| ());
        let mut set = Box::pin(set);
        assert!(set.as_mut().poll(&mut cx).is_pending());
        of.1.store(1, Ordering::SeqCst);
        let mut invalidate = Task::new(space.invalidate(of.range(), Event::Unmap));
        invalidate.expect_pending();
        assert_eq!(woken.0.load(Ordering::SeqCst), wakes);
        assert!(set.as_mut().poll(&mut cx).is_pending());
        drop((set, Pin1(Pinned::clone(of))));
        drop(invalidate.finish());
        assert_eq!(Arc::strong_count(&woken), 2, "the test's own");
    }
}

#[test]
fn g1_a_buffer_that_is_named_twice_is_mirrored_twice() {
    let (space, gpu) = (AddressSpace::new(), Gpu::default());
    let buffer = space.insert(pages(0, 1), gpu.clone()).unwrap();
    let twice = [&buffer, &buffer];
    let prepare = |at, _| async move { Ok::<usize, Infallible>(at) };
    now(gpu.0.mirror_all(&twice, RetryBudget::default(), prepare, |table, found| *table = found))
        .unwrap();
    assert_eq!(*gpu.0.lock(), [0, 1]);
}

#[test]
fn x2_the_future_of_a_set_may_be_sent() {
    fn is_send<T: Send>(it: T) -> T {
        it
    }
    let (space, gpu) = (AddressSpace::new(), Gpu::default());
    let buffer = space.insert(pages(0, 1), gpu.clone()).unwrap();
    let buffers = [&buffer];
    let prepare = |at, _| async move { Ok::<usize, Infallible>(at) };
    now(is_send(
        gpu.0.mirror_all(&buffers, RetryBudget::default(), prepare, |table, found| *table = found),
    ))
    .unwrap();
    let inbox = space.inbox(pages(0, 1), ()).unwrap();
    drop(is_send(inbox.recv()));
    drop(is_send(space.invalidate_all(pages(0, 1).into(), Event::Unmap)));
    drop(is_send(Timeline::new().reached(1)));
}
