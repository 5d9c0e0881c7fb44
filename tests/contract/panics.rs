use crate::support::*;
use shootdown::Event;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Context;

/// Runs `code`, expects the panic that says `what`.
#[track_caller]
fn panics_with(what: &str, code: impl FnOnce()) {
    let panic = catch_unwind(AssertUnwindSafe(code)).expect_err("it should have panicked");
    let message = panic
        .downcast_ref::<&str>()
        .map(|message| (*message).to_owned())
        .or(panic.downcast_ref::<String>().cloned());
    assert!(message.as_deref().unwrap_or_default().contains(what), "{message:?}");
}

struct PanicsOnDrop;

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        panic!("the drop of a pass fails");
    }
}

#[test]
fn c5_a_panic_in_a_first_pass_is_resumed_after_everything_has_been_completed_and_ended() {
    let (space, device, log) = one_device();
    let gate = Gate::default();
    let other = space
        .insert(pages(0, 1), Device::new("other", &log).then(Act::pass(gate.clone())))
        .unwrap();
    device.next(Act::Panic);
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    panics_with("device fails in its first pass", || drop(invalidate.run()));
    assert_eq!((other.calls(), space.active().len(), space.sequence().get()), (1, 0, 4));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(numbers([device.sequence(), other.sequence()]), [5, 5]);
}

/// A future that has panicked has resolved: it does not start another invalidation when somebody
/// polls it once more.
#[test]
fn c5_a_future_that_has_panicked_starts_no_other_invalidation() {
    let (space, device, _log) = one_device();
    for owned in [false, true] {
        let future = space.invalidate(pages(0, 1), Event::Unmap);
        let mut future = std::pin::pin!(if owned { future.into_owned() } else { future });
        device.next(Act::Panic);
        let calls = device.calls();
        let mut poll = || {
            drop(future.as_mut().poll(&mut Context::from_waker(futures::task::noop_waker_ref())))
        };
        panics_with("device fails in its first pass", &mut poll);
        panics_with("polled after it has resolved", &mut poll);
        assert_eq!((device.calls() - calls, space.active().len()), (1, 0), "owned: {owned}");
    }
}

#[test]
fn c5_a_panic_in_a_pass_at_its_first_poll_or_later_or_in_its_drop() {
    let (space, device, log) = one_device();
    let other = space.insert(pages(0, 1), Device::new("other", &log)).unwrap();
    type Pass = fn() -> Act;
    let passes: [(&str, Pass); 3] = [
        ("at the first poll", || Act::pass(async { panic!("a pass fails at the first poll") })),
        ("at a later poll", || {
            Act::pass(async {
                Yields(3).await;
                panic!("a pass fails at a later poll")
            })
        }),
        ("the drop of a pass fails", || {
            let bomb = PanicsOnDrop;
            Act::pass(std::future::poll_fn(move |_| {
                let _ = &bomb;
                std::task::Poll::Ready(())
            }))
        }),
    ];
    for (what, pass) in passes {
        device.next(pass());
        other.next(Act::pass(Yields(5)));
        panics_with(what, || drop(now(space.invalidate(pages(0, 1), Event::Unmap))));
        assert_eq!((space.active().len(), space.sequence().get() % 2), (0, 0), "{what}");
        now(device.read_begin());
        drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    }
    assert_eq!(device.calls(), 6);
}

#[test]
fn c5_a_panic_in_a_non_blockable_invalidation_is_resumed_too() {
    let (space, device, _log) = one_device();
    device.next(Act::Panic);
    panics_with("first pass", || drop(space.try_invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(space.active().len(), 0);
}

#[test]
fn c5_the_first_panic_goes_on_and_further_ones_are_counted() {
    let (space, device, log) = one_device();
    let others = ["b", "c"].map(|name| space.insert(pages(0, 1), Device::new(name, &log)).unwrap());
    device.next(Act::Panic);
    others[0].next(Act::Panic);
    others[1].next(Act::pass(async { panic!("a pass fails, too") }));
    panics_with("device fails in its first pass", || {
        drop(now(space.invalidate(pages(0, 1), Event::Unmap)))
    });
    assert_eq!((space.stats().lost_panics, space.active().len()), (2, 0));
}

#[test]
fn c5_a_panic_of_an_abandoned_pass_is_counted() {
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    let fence = gate.clone();
    device.next(Act::pass(async move {
        fence.await;
        panic!("nobody is left to hear of it");
    }));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    drop(invalidate);
    gate.open();
    now(space.drain());
    assert_eq!((space.stats().lost_panics, space.active().len()), (1, 0));
}

#[test]
fn c5_a_panic_in_a_waker_does_not_keep_the_others_asleep() {
    struct Bomb;
    impl futures::task::ArcWake for Bomb {
        fn wake_by_ref(_: &Arc<Self>) {
            panic!("a waker fails");
        }
    }
    let (space, device, _log) = one_device();
    let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
    let mut before = Task::new(device.read_begin());
    before.expect_pending();
    let bomb = futures::task::waker(Arc::new(Bomb));
    let mut bombed = Box::pin(device.read_begin());
    assert!(bombed.as_mut().poll(&mut std::task::Context::from_waker(&bomb)).is_pending());
    let mut after = Task::new(device.read_begin());
    after.expect_pending();
    // Nobody but the one whose waker it is has anything to do with it.
    drop(guard);
    assert_eq!(space.stats().lost_panics, 1);
    assert!(before.is_woken() && after.is_woken());
    before.finish();
    after.finish();
    assert_eq!((space.active().len(), space.sequence().get()), (0, 4));
}

#[test]
fn a_clock_that_panics_holds_nobody_up() {
    let asked = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let count = asked.clone();
    let clock = move || {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        panic!("the clock fails")
    };
    let space = shootdown::AddressSpace::builder().clock(clock).build();
    let device = space.insert(pages(0, 1), Device::new("device", &Log::default())).unwrap();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    assert_eq!(space.active()[0].age, None);
    gate.open();
    let guard = invalidate.run();
    assert!(guard.is_ready());
    drop(guard);
    assert!(reader.run().is_ready());
    assert_eq!((space.active().len(), space.stats().longest), (0, None));
    assert!(asked.load(std::sync::atomic::Ordering::Relaxed) > 2);
}

/// A waker whose clone panics.
fn uncloneable() -> std::task::Waker {
    use std::task::{RawWakerVTable, Waker};
    static VTABLE: RawWakerVTable =
        RawWakerVTable::new(|_| panic!("the clone of a waker fails"), |_| {}, |_| {}, |_| {});
    // SAFETY: nothing is behind the pointer, and none of the functions looks there.
    unsafe { Waker::new(std::ptr::null(), &VTABLE) }
}

#[test]
fn c5_an_invalidation_whose_waker_cannot_be_cloned_is_given_up_and_ends_with_its_passes() {
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    let waker = uncloneable();
    panics_with("the clone of a waker fails", || {
        drop(invalidate.as_mut().poll(&mut Context::from_waker(&waker)))
    });
    drop(invalidate);
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    gate.open();
    reader.finish();
    assert_eq!((space.active().len(), space.sequence().get(), space.stats().abandoned), (0, 4, 1));
}

#[test]
fn f2_a_panic_that_panics_when_it_is_dropped_is_counted_and_no_more() {
    struct Payload;
    impl Drop for Payload {
        fn drop(&mut self) {
            std::panic::panic_any(Self);
        }
    }
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    let fence = gate.clone();
    device.next(Act::pass(async move {
        fence.await;
        std::panic::panic_any(Payload);
    }));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    drop(invalidate);
    gate.open();
    now(space.drain());
    assert_eq!((space.stats().lost_panics, space.active().len()), (1, 0));
}
