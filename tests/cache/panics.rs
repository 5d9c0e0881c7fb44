//! K2: a panic or an error of the device concerns the registration that it was asked for.

use crate::device::{Act, Card, throw};
use crate::support::{now, pages};
use shootdown::cache::{Device, Failure, GetError, Operation, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace, Callback, Event, Report};
use std::sync::{Arc, Mutex};

#[test]
fn k2_a_panic_in_deregister_is_a_failure_and_other_ranges_go_on() {
    for act in [Act::Panic, Act::PanicLater] {
        let (space, card) = (AddressSpace::new(), Card::default());
        let cache = RegistrationCache::new(&space, card.clone());
        drop(now(cache.get(pages(1, 1))).unwrap());
        card.next_deregister(&[act]);
        drop(now(space.invalidate(pages(1, 1), Event::Unmap)));
        for page in 10..15 {
            drop(now(cache.get(pages(page, 1))).unwrap());
        }
        now(cache.flush());
        assert_eq!((card.mapped().len(), cache.stats().deregister_failures), (0, 1));
    }
}

#[test]
fn k2_a_panic_in_register_is_told_to_all_who_asked_and_the_next_call_starts_anew() {
    for (act, text) in
        [(Act::Panic, "the card fails at once"), (Act::PanicLater, "the card fails later")]
    {
        let (space, card) = (AddressSpace::new(), Card::default());
        let cache = RegistrationCache::new(&space, card.clone());
        card.next_register(&[act]);
        let both = now(futures::future::join(cache.get(pages(1, 1)), cache.get(pages(1, 1))));
        let GetError::Panicked { message: Some(message) } = both.0.unwrap_err() else {
            panic!("another error")
        };
        assert_eq!(&*message, text);
        // Called at once, it has failed before the second asks.
        assert!(matches!(both.1, Ok(_) | Err(GetError::Panicked { .. })));
        drop(both.1);
        drop(now(space.invalidate(pages(1, 1), Event::Unmap)));
        drop(now(cache.get(pages(1, 1))).unwrap());
        assert_eq!(
            (cache.stats().register_failures, space.stats().lost_panics),
            (1, 0),
            "the callers were told"
        );
    }
}

#[test]
fn k2_a_panic_that_no_caller_is_told_of_is_counted_and_reported() {
    let reports = Arc::new(Mutex::new(Vec::new()));
    let log = reports.clone();
    let space = AddressSpace::builder()
        .on_report(move |report| {
            if let Report::Panicked { callback: Callback::Device, message } = report {
                log.lock().unwrap().push((message.map(str::to_owned), report.to_string()));
            }
        })
        .build();
    let card = Card { register_gate: Some(crate::support::Gate::default()), ..Card::default() };
    let cache = RegistrationCache::new(&space, card.clone());
    card.next_register(&[Act::PanicLater]);
    let mut get = crate::support::Task::new(cache.get(pages(1, 1)));
    get.expect_pending();
    drop(get);
    card.register_gate.as_ref().unwrap().open();
    drop(now(space.invalidate(pages(1, 1), Event::Unmap)));
    let expected = (
        "the card fails later",
        "the device of a registration cache panicked: the card fails later",
    );
    let expected = (Some(expected.0.to_owned()), expected.1.to_owned());
    assert_eq!(
        (space.stats().lost_panics, reports.lock().unwrap().as_slice()),
        (1, &[expected][..])
    );
    assert_eq!((cache.stats().pinned_bytes, space.len()), (0, 0));
}

#[test]
fn k2_a_reporter_is_told_of_panics_and_may_panic() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let told = log.clone();
    let (space, card) = (AddressSpace::new(), Card::default());
    let on_failure = move |failure: &Failure<'_>| {
        told.lock().unwrap().push((failure.operation, failure.panicked, failure.error.to_string()));
        crate::device::throw("the reporter fails");
    };
    let cache =
        RegistrationCache::<Card>::builder().on_failure(on_failure).build(&space, card.clone());
    card.next_register(&[Act::Refuse, Act::Panic]);
    assert!(matches!(now(cache.get(pages(1, 1))), Err(GetError::Register(_))));
    let panicked = now(cache.get(pages(1, 1))).unwrap_err();
    assert_eq!(
        panicked.to_string(),
        "the memory is not registered, because the device panicked: the card fails at once"
    );
    drop(now(cache.get(pages(1, 1))).unwrap());
    card.next_deregister(&[Act::PanicLater]);
    drop(now(space.invalidate(pages(1, 1), Event::Unmap)));
    let expected = [
        (Operation::Register, false, "refused".into()),
        (Operation::Register, true, "the device panicked: the card fails at once".into()),
        (Operation::Deregister, true, "the device panicked: the card fails later".into()),
    ];
    assert_eq!(*log.lock().unwrap(), expected);
    assert_eq!(card.mapped().len(), 0);
}

#[test]
fn k2_a_device_may_be_shared_or_static() {
    let (space, card) = (AddressSpace::new(), Arc::new(Card::default()));
    let cache = RegistrationCache::new(&space, card.clone());
    drop(now(cache.get(pages(1, 1))).unwrap());
    assert_eq!(card.mapped(), [1]);
    let card: &'static Card = Box::leak(Box::new(Card::default()));
    let cache = RegistrationCache::new(&space, card);
    drop(now(cache.get(pages(1, 1))).unwrap());
    now(cache.flush());
    assert_eq!((card.mapped().len(), card.state.lock().unwrap().registered), (0, 1));
}

/// A task's waker is foreign code as well: the future that all share does not run it under a lock.
#[test]
fn k2_a_waker_that_panics_keeps_nobody_else_asleep() {
    struct Bad;
    impl futures::task::ArcWake for Bad {
        fn wake_by_ref(_: &Arc<Self>) {
            crate::device::throw("a waker fails");
        }
    }
    let gate = crate::support::Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::new(&space, card);
    let mut bad = Box::pin(cache.get(pages(1, 1)));
    let mut good = crate::support::Task::new(cache.get(pages(1, 1)));
    let waker = futures::task::waker(Arc::new(Bad));
    assert!(bad.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending());
    good.expect_pending();
    gate.open();
    drop(good.finish().unwrap());
    assert!(space.stats().lost_panics > 0);
}

/// An error that panics when it is dropped, of a device that has room once something was given up.
#[test]
fn k2_an_error_whose_drop_panics_concerns_nobody() {
    #[derive(Debug)]
    struct Bomb;
    impl std::fmt::Display for Bomb {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("full")
        }
    }
    impl std::error::Error for Bomb {}
    impl Drop for Bomb {
        fn drop(&mut self) {
            throw("the drop of an error fails");
        }
    }
    struct Full(std::sync::atomic::AtomicU64);
    impl Device for Full {
        type Handle = ();
        type Error = Bomb;
        async fn register(&self, _: AddressRange) -> Result<(), Bomb> {
            if self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1 {
                Err(Bomb)
            } else {
                Ok(())
            }
        }
        async fn deregister(
            &self,
            _: AddressRange,
            (): (),
        ) -> Result<(), StillRegistered<(), Bomb>> {
            Ok(())
        }
    }
    let space = AddressSpace::new();
    let cache = RegistrationCache::new(&space, Full(Default::default()));
    drop(now(cache.get(pages(1, 1))).unwrap());
    drop(now(cache.get(pages(2, 1))).unwrap());
    assert_eq!(space.stats().lost_panics, 1);
}
