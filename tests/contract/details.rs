//! Details of rules that no other test looks at: a change of one line in the library goes unnoticed
//! without them.
use crate::support::*;
use shootdown::{
    AddressSpace, AsyncIntervalNotifier, AsyncNotifier, Event, IntervalNotifier, Invalidation,
    InvalidationInfo, PassFuture, Subscription, WouldBlock,
};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Its invalidation waits for ever, under a name of its own or under the one of its type.
struct Stuck<const NAMED: bool>;

impl AsyncIntervalNotifier for Stuck<true> {
    async fn invalidate(self: Arc<Self>, _: InvalidationInfo) {
        std::future::pending().await
    }

    fn name(&self) -> std::borrow::Cow<'static, str> {
        "ring 7".into()
    }
}

impl AsyncIntervalNotifier for Stuck<false> {
    async fn invalidate(self: Arc<Self>, _: InvalidationInfo) {
        std::future::pending().await
    }
}

#[test]
fn c6_a_driver_that_is_one_async_fn_is_listed_by_its_name_or_by_that_of_its_type() {
    let space = AddressSpace::new();
    let _named = space.insert(pages(0, 1), AsyncNotifier::new(Stuck::<true>)).unwrap();
    let _plain = space.insert(pages(1, 1), AsyncNotifier::new(Stuck::<false>)).unwrap();
    let mut unmap = Task::new(space.invalidate(pages(0, 2), Event::Unmap));
    unmap.expect_pending();
    let pending = &space.active()[0].pending;
    assert!(pending.iter().any(|name| name == "ring 7"), "{pending:?}");
    assert!(pending.iter().any(|name| name.contains("Stuck<false>")), "{pending:?}");
}

#[test]
fn m7_a_delivery_says_whether_the_memory_may_have_changed_already() {
    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 1), ()).unwrap();
    for late in [false, true] {
        let invalidate = space.invalidate(pages(0, 1), Event::Unmap);
        let mut invalidate = Task::new(if late { invalidate.late() } else { invalidate });
        invalidate.expect_pending();
        let delivery = now(inbox.recv()).unwrap();
        assert_eq!((delivery.is_late(), delivery.info().late), (late, late));
        delivery.done();
        drop(invalidate.finish());
    }
}

type Script = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// Does something when it is asked for its name.
struct Asked(Script, Gate, #[expect(dead_code, reason = "counted by the test")] Arc<()>);

impl IntervalNotifier for Asked {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(Some(PassFuture::new(self.1.clone())))
    }

    fn name(&self) -> std::borrow::Cow<'static, str> {
        let script = self.0.lock().unwrap().take();
        if let Some(script) = script {
            script();
        }
        "asked".into()
    }
}

#[test]
fn l1_a_notifier_whose_subscription_goes_while_it_is_asked_for_its_name_is_dropped_afterwards() {
    let space = AddressSpace::new();
    let (script, gate, notifiers) = (Script::default(), Gate::default(), Arc::new(()));
    let asked = Asked(script.clone(), gate.clone(), notifiers.clone());
    let asked = space.insert(pages(0, 1), asked).unwrap();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap).into_owned());
    invalidate.expect_pending();
    let kept = notifiers.clone();
    *script.lock().unwrap() = Some(Box::new(move || {
        gate.open();
        drop(invalidate.finish());
        drop(asked);
        assert_eq!(Arc::strong_count(&kept), 3, "it is being called");
    }));
    assert_eq!(space.active()[0].pending, ["asked"]);
    assert!(script.lock().unwrap().is_none(), "it was asked");
    assert_eq!((Arc::strong_count(&notifiers), space.len()), (1, 0));
}

/// The clock is code of the program: what it does happens at any moment at which the library looks
/// at the time.
#[test]
fn l5_a_fence_at_any_look_at_the_clock_ends_what_nobody_waits_for() {
    let mut fenced = 0;
    for look in 0..20 {
        let looks = Arc::new(AtomicUsize::new(usize::MAX));
        let dead = Arc::new(Mutex::new(None::<Arc<Subscription<Device>>>));
        let (counted, inner) = (looks.clone(), dead.clone());
        let clock = move || {
            let left = counted.load(Ordering::SeqCst);
            if left != usize::MAX {
                counted.store(left.wrapping_sub(1), Ordering::SeqCst);
            }
            if left == 0 {
                let dead = inner.lock().unwrap().clone();
                dead.unwrap().fence();
            }
            Duration::ZERO
        };
        let space = AddressSpace::builder().clock(clock).build();
        let device = Device::new("dead", &Log::default());
        device.next(Act::pass(std::future::pending()));
        *dead.lock().unwrap() = Some(Arc::new(space.insert(pages(0, 1), device).unwrap()));
        looks.store(look, Ordering::SeqCst);
        let _ = space.try_invalidate(pages(0, 1), Event::Unmap);
        if space.stats().fences == 1 {
            fenced += 1;
            assert!(space.active().is_empty(), "look {look}: {:?}", space.active());
        }
        looks.store(usize::MAX, Ordering::SeqCst);
        // The space has the clock, which has the subscription.
        drop(dead.lock().unwrap().take());
    }
    assert!(fenced > 0, "the clock was never looked at");
}

/// Without `std` threads cannot be told apart.
#[cfg(feature = "std")]
mod on_two_threads {
    use super::*;
    use shootdown::DriverLock;

    #[test]
    fn a1_done_may_be_called_while_another_thread_holds_the_inbox() {
        let space = AddressSpace::new();
        let inbox = space.inbox(pages(0, 1), ()).unwrap();
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        let delivery = now(inbox.recv()).unwrap();
        inbox.with(|()| std::thread::spawn(|| delivery.done()).join()).unwrap();
        drop(invalidate.finish());
    }

    #[test]
    fn a_driver_lock_that_another_thread_holds_is_waited_for() {
        let lock = Arc::new(DriverLock::new(0));
        let (begins, begun) = std::sync::mpsc::channel();
        let guard = lock.lock();
        let other = std::thread::spawn({
            let lock = lock.clone();
            move || {
                begins.send(()).unwrap();
                *lock.lock() += 1;
            }
        });
        begun.recv().unwrap();
        // It waits, or is about to: either way it does not take this thread's hold for its own.
        std::thread::yield_now();
        drop(guard);
        other.join().unwrap();
        assert_eq!(*lock.lock(), 1);
    }
}
