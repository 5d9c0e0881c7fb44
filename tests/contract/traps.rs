//! S4, C7, F3: what a driver can do wrong by itself fails in debug builds, with its name, and what
//! only looks like it does not.
use crate::support::*;
use shootdown::{
    AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture, Report,
    RetryBudget, Subscription, WouldBlock,
};
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};

/// What a panic says that goes on in the caller of an invalidation.
fn message_of(run: impl FnOnce()) -> String {
    *catch_unwind(AssertUnwindSafe(run))
        .expect_err("it panics")
        .downcast::<String>()
        .expect("a panic with arguments")
}

/// Polls as long as it is woken, and what it says if it panics.
fn invalidated(space: &AddressSpace) -> Result<(), String> {
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    match catch_unwind(AssertUnwindSafe(|| invalidate.run().is_ready())) {
        Ok(true) => Ok(()),
        Ok(false) => Err("it waits for ever".into()),
        Err(panic) => Err(*panic.downcast::<String>().expect("a panic with arguments")),
    }
}

type Waits = fn(Arc<Subscription<Device>>) -> Pin<Box<dyn Future<Output = ()> + Send>>;

const OWN_WAITS: [Waits; 3] = [
    |own| Box::pin(async move { _ = own.read_begin().await }),
    |own| Box::pin(async move { own.close().await }),
    |own| {
        let mappings = DriverLock::new(());
        Box::pin(async move {
            let mirrored = mappings.mirror(
                &own,
                RetryBudget::retries(0),
                |_| async { Ok::<_, Infallible>(()) },
                |(), ()| (),
            );
            _ = mirrored.await;
        })
    },
];

#[test]
#[cfg(debug_assertions)]
fn c7_a_pass_that_waits_for_itself_fails_with_the_notifiers_name() {
    for waits in OWN_WAITS {
        let (space, device, log) = one_device();
        let device = Arc::new(device);
        let other = space
            .insert(pages(0, 1), Device::new("other", &log).then(Act::pass(Yields(20))))
            .unwrap();
        device.next(Act::Pass(PassFuture::new(waits(device.clone()))));
        let message = invalidated(&space).unwrap_err();
        assert!(message.contains("a pass of device waits for itself"), "{message}");
        assert_eq!(
            (other.calls(), space.active().len()),
            (1, 0),
            "the others went on, and it is over"
        );
        assert_eq!(invalidated(&space), Ok(()), "the space is as usable as before");
    }
}

#[test]
#[cfg(debug_assertions)]
fn c7_a_pass_that_blocks_its_thread_in_a_wait_for_itself_fails_too() {
    for (waits, later) in
        OWN_WAITS.into_iter().flat_map(|waits| [(waits, 0), (waits, 1), (waits, 3)])
    {
        let (space, device, _log) = one_device();
        let (device, mut polls) = (Arc::new(device), 0);
        let own = device.clone();
        device.next(Act::pass(async move {
            std::future::poll_fn(|cx| {
                polls += 1;
                cx.waker().wake_by_ref();
                if polls <= later { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
            })
            .await;
            PassFuture::new(waits(own)).wait();
        }));
        let message = invalidated(&space).unwrap_err();
        assert!(message.contains("a pass of device waits for itself"), "{message}");
        assert_eq!(invalidated(&space), Ok(()), "the space is as usable as before");
    }
}

#[test]
#[cfg(debug_assertions)]
fn c7_a_pass_that_first_waits_for_its_device_and_then_for_itself_fails_too() {
    let (space, device, _log) = one_device();
    let (device, gate) = (Arc::new(device), Gate::default());
    let (own, flushed) = (device.clone(), gate.clone());
    device.next(Act::pass(async move {
        flushed.await;
        _ = own.read_begin().await;
    }));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    let message = message_of(|| drop(invalidate.run()));
    assert!(message.contains("a pass of device waits for itself"), "{message}");
}

#[test]
#[cfg(debug_assertions)]
fn c7_a_pass_that_waits_for_itself_where_a_reader_drives_it_is_counted_and_the_reader_goes_on() {
    let (space, device, _log) = one_device();
    let device = Arc::new(device);
    let (gate, own) = (Gate::default(), device.clone());
    let flushed = gate.clone();
    device.next(Act::pass(async move {
        flushed.await;
        _ = own.read_begin().await;
    }));
    let mut abandoned = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    abandoned.expect_pending();
    drop(abandoned);
    gate.open();
    now(device.read_begin());
    assert_eq!(space.stats().lost_panics, 1);
}

#[test]
fn f3_a_pass_may_poll_a_wait_for_itself_beside_what_ends_it() {
    for waits in OWN_WAITS {
        for again in [0, 1, 5] {
            let (space, device, _log) = one_device();
            let (device, gate) = (Arc::new(device), Gate::default());
            device.next(Act::Pass(PassFuture::new(
                futures::future::select(waits(device.clone()), gate.clone()).map_to_unit(),
            )));
            let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
            invalidate.expect_pending();
            for _ in 0..again {
                gate.nudge();
                invalidate.expect_pending();
            }
            gate.open();
            drop(invalidate.finish());
        }
    }
}

#[test]
fn f3_a_pass_that_has_fenced_its_own_device_may_wait_for_itself() {
    for (waits, later) in OWN_WAITS.into_iter().flat_map(|waits| [(waits, 0), (waits, 1)]) {
        let (space, device, _log) = one_device();
        let device = Arc::new(device);
        let own = device.clone();
        device.next(Act::pass(async move {
            Yields(later).await;
            own.fence();
            waits(own.clone()).await;
        }));
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        drop(invalidate.finish());
        assert_eq!((device.is_closed(), space.stats().fences), (true, 1));
    }
}

#[test]
fn f3_a_first_pass_may_wait_for_another_space() {
    let (space, device, _log) = one_device();
    let (another, other, _log) = one_device();
    let gate = Gate::default();
    other.next(Act::pass(gate.clone()));
    device.next(Act::Run(Box::new(move |_| {
        let mut invalidate = Task::new(another.invalidate(pages(0, 1), Event::Unmap));
        for _ in 0..3 {
            assert!(invalidate.poll().is_pending());
        }
        gate.open();
        drop(invalidate.finish());
    })));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!((device.calls(), other.calls()), (1, 1));
}

#[test]
fn f3_a_pass_may_begin_a_wait_for_itself_and_leave_it() {
    for waits in OWN_WAITS {
        let (space, device, _log) = one_device();
        let (device, gate) = (Arc::new(device), Gate::default());
        let (own, flushed) = (device.clone(), gate.clone());
        let mut polls = 0;
        // Also with a wait that it keeps, and never polls again.
        let mut kept = Vec::new();
        device.next(Act::pass(async move {
            std::future::poll_fn(|cx| {
                let mut wait = waits(own.clone());
                assert!(wait.as_mut().poll(cx).is_pending());
                polls += 1;
                if polls % 2 == 0 {
                    kept.push(wait);
                }
                cx.waker().wake_by_ref();
                if polls < 6 { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
            })
            .await;
            flushed.await;
        }));
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        gate.open();
        drop(invalidate.finish());
    }
}

#[test]
fn f3_a_first_pass_may_poll_waits_and_leave_them() {
    let (space, device, log) = one_device();
    let other = Arc::new(space.insert(pages(0, 1), Device::new("other", &log)).unwrap());
    let wait = || {
        let other = other.clone();
        Arc::new(Mutex::new(Task::new(async move { _ = other.read_begin().await })))
    };
    let held = now(space.invalidate(pages(0, 1), Event::Clear));
    let (before, inside) = (wait(), wait());
    before.lock().unwrap().expect_pending();
    for _ in 0..2 {
        let (before, inside, other) = (before.clone(), inside.clone(), other.clone());
        device.next(Act::Run(Box::new(move |_| {
            // One that begins there, once in each first pass.
            assert!(inside.lock().unwrap().poll().is_pending());
            // One of another task, and one of no task, as by who looks whether it is over.
            let mut looked = Box::pin(other.read_begin());
            for _ in 0..3 {
                assert!(before.lock().unwrap().poll().is_pending());
                let mut cx = Context::from_waker(Waker::noop());
                assert!(looked.as_mut().poll(&mut cx).is_pending());
            }
        })));
        drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    }
    drop(held);
    [before, inside].iter().for_each(|wait| wait.lock().unwrap().finish());
}

/// Invalidates what it watches in its first pass, so many times.
struct Recurs {
    space: AddressSpace,
    left: AtomicUsize,
}

impl IntervalNotifier for Recurs {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        if self.left.load(Ordering::SeqCst) > 0 {
            self.left.fetch_sub(1, Ordering::SeqCst);
            drop(self.space.invalidate(invalidation.range(), Event::Clear).wait());
        }
        Ok(None)
    }

    fn name(&self) -> std::borrow::Cow<'static, str> {
        "recurs".into()
    }
}

#[test]
#[cfg(debug_assertions)]
fn c7_an_invalidation_of_its_own_range_in_each_first_pass_fails_before_the_stack_is_used_up() {
    let space = AddressSpace::new();
    let recurs = space
        .insert(pages(0, 1), Recurs { space: space.clone(), left: AtomicUsize::new(usize::MAX) })
        .unwrap();
    let message = message_of(|| drop(space.invalidate(pages(0, 1), Event::Unmap).wait()));
    assert!(
        message.contains("the first pass of recurs invalidates what it watches itself"),
        "{message}"
    );
    assert_eq!(space.active().len(), 0);
    recurs.left.store(0, Ordering::SeqCst);
    drop(space.invalidate(pages(0, 1), Event::Unmap).wait());
}

#[test]
fn f3_a_first_pass_may_invalidate_its_own_range_if_there_is_an_end() {
    let space = AddressSpace::new();
    let recurs = space
        .insert(pages(0, 1), Recurs { space: space.clone(), left: AtomicUsize::new(20) })
        .unwrap();
    drop(space.invalidate(pages(0, 1), Event::Unmap).wait());
    assert_eq!((recurs.left.load(Ordering::SeqCst), space.stats().invalidations), (0, 21));
}

/// Leaves a pass and forgets the sequence.
struct Forgets(Gate);

impl IntervalNotifier for Forgets {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        if invalidation.event() == Event::Clear {
            invalidation.set_seq();
        }
        Ok(Some(PassFuture::new(self.0.clone())))
    }

    fn name(&self) -> std::borrow::Cow<'static, str> {
        "forgets".into()
    }
}

#[test]
#[cfg(debug_assertions)]
fn s4_a_pass_without_the_sequence_fails_with_the_notifiers_name() {
    let reports = Arc::new(Mutex::new(Vec::new()));
    let seen = reports.clone();
    for budget in [None, Some(0)] {
        let seen = seen.clone();
        let builder = AddressSpace::builder()
            .on_report(move |report: &Report<'_>| seen.lock().unwrap().push(report.to_string()));
        let space = match budget {
            Some(passes) => builder.pass_budget(passes).build(),
            None => builder.build(),
        };
        let (gate, log) = (Gate::default(), Log::default());
        let _forgets = space.insert(pages(0, 1), Forgets(gate.clone())).unwrap();
        let other = space.insert(pages(0, 1), Device::new("other", &log)).unwrap();
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        assert_eq!(space.active()[0].pending, ["forgets"], "its pass is waited for all the same");
        gate.open();
        let message = message_of(|| drop(invalidate.run()));
        assert!(
            message.contains(
                "the first pass of forgets returned a pass without having set the sequence"
            ),
            "{message}"
        );
        assert_eq!(other.calls(), 1, "the others are told");
        // With it there is nothing to say, and when a later one has set it neither.
        drop(now(space.invalidate(pages(0, 1), Event::Clear)));
    }
    assert_eq!(*reports.lock().unwrap(), [] as [String; 0], "its caller was told");
}

#[test]
fn s4_a_first_pass_that_leaves_the_device_alone_needs_no_sequence() {
    let (space, device, _log) = one_device();
    let sequence = now(device.read_begin());
    device.next(Act::Ignore);
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert!(!device.read_retry(sequence));
}

#[test]
#[cfg(feature = "test-util")]
fn s4_a_fault_on_demand_is_no_fault_of_the_driver() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let device = space
        .insert(pages(0, 1), shootdown::test_util::Faulty::new(Device::new("device", &log)))
        .unwrap();
    device.next(Act::Ignore);
    let delay = device.delay_next();
    let sequence = now(device.read_begin());
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    drop(delay);
    drop(invalidate.finish());
    assert!(!device.read_retry(sequence), "it has left the device alone");
}

trait MapToUnit: Future + Sized {
    fn map_to_unit(self) -> impl Future<Output = ()> + Send
    where
        Self: Send,
    {
        async { _ = self.await }
    }
}

impl<F: Future> MapToUnit for F {}
