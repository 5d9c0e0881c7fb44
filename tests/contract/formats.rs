//! What the public types say of themselves: one table each of `Debug`, `Display` and `source`.
//! Texts may change; what they name may not be left out.

use crate::support::formats::{debug, display, expect};
use crate::support::*;
use shootdown::*;
use std::error::Error;
use std::fmt::Display;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

#[derive(Debug)]
struct Broken;

impl Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the ring is broken")
    }
}

impl Error for Broken {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&WouldBlock)
    }
}

struct Quiet;

impl AsyncIntervalNotifier for Quiet {
    async fn invalidate(self: Arc<Self>, _: InvalidationInfo) {}
}

const PAGE_1: &str = "0x1000..=0x1fff";

#[test]
fn debug_names_the_type_and_what_it_is_of() {
    let (space, log) = (AddressSpace::builder().pass_budget(7).build(), Log::default());
    let gate = Gate::default();
    let device = space.insert(pages(1, 1), Device::new("card", &log)).unwrap();
    let builder = AddressSpace::builder().pass_budget(7).patience(Duration::from_millis(5));
    debug(&builder, &["Builder", "pass_budget", "7", "patience", "5ms"]);
    debug(&space, &["AddressSpace", "sequence: Sequence(2)", "notifiers: 1", "released: false"]);
    debug(&space, &["active: []"]);
    debug(&device, &["Subscription", PAGE_1, "Sequence(1)", "card"]);
    debug(&device.id(), &["NotifierId("]);
    debug(&Owner::new(), &["Owner("]);
    debug(&Event::Unmap, &["Unmap"]);
    debug(&pages(1, 1), &[PAGE_1]);
    debug(&RangeSet::new([pages(1, 1), pages(3, 1)]).unwrap(), &["{", PAGE_1, "0x3000..=0x3fff"]);
    debug(&AddressRange::new(0x10, 0).unwrap_err(), &["Empty", "16"]);
    debug(&WouldBlock, &["WouldBlock"]);
    debug(&space.stats(), &["Stats", "invalidations: 0", "lost_panics: 0"]);
    debug(&device.stats(), &["NotifierStats", "collisions: 0"]);

    let seen = Arc::new(Mutex::new(String::new()));
    let noted = seen.clone();
    device.next(Act::Run(Box::new(move |invalidation| {
        *noted.lock().unwrap() = format!("{invalidation:?} and {:?}", invalidation.info());
    })));
    let mut invalidate = space.invalidate(pages(1, 1), Event::Clear);
    debug(&invalidate, &["Invalidate", PAGE_1, "Clear", "not started", "lapses: 0"]);
    let Poll::Ready(guard) = poll_once(&mut invalidate) else {
        panic!("nothing is to be waited for")
    };
    debug(&invalidate, &["Invalidate", "resolved"]);
    let told = ["Invalidation", PAGE_1, "Clear", "Sequence(3)", "blockable: true"];
    expect(&seen.lock().unwrap(), &told);
    let further = ["may_defer: true", "late: false", "InvalidationInfo", PAGE_1, "Clear"];
    expect(&seen.lock().unwrap(), &further);
    debug(&guard, &["InvalidationGuard", PAGE_1, "Sequence(3)", "hits: 1"]);
    debug(&space.active(), &["ActiveInvalidation", PAGE_1, "Clear", "Held", "abandoned: false"]);
    debug(&device.read_begin(), &["ReadBegin", PAGE_1]);
    drop(guard);

    device.next(Act::pass(gate.clone()));
    let mut pending = space.invalidate(pages(1, 1), Event::Unmap);
    assert!(poll_once(&mut pending).is_pending());
    debug(&pending, &["Invalidate", "passes pending"]);
    debug(&space.active(), &["Passes", "card", "NotifierId("]);
    debug(&space.drain(), &["Drain"]);
    debug(&device.close(), &["Close", PAGE_1]);
    let mut remove = device.remove();
    debug(&remove, &["Remove", "waiting"]);
    gate.open();
    drop(poll_once(&mut pending));
    assert!(poll_once(&mut remove).is_ready());
    debug(&remove, &["Remove", "resolved"]);
    let quiet = space.insert(pages(1, 1), Device::new("quiet", &log)).unwrap();
    let mut removed = quiet.remove();
    debug(&removed, &["Remove", "removed"]);
    assert!(poll_once(&mut removed).is_ready());
    debug(&removed, &["Remove", "resolved"]);
    debug(&PassFuture::new(gate), &["PassFuture"]);

    debug(&AsyncNotifier::new(Quiet), &["AsyncNotifier"]);
    let lock = DriverLock::new(5);
    debug(&lock, &["DriverLock"]);
    debug(&lock.lock(), &["5"]);
    debug(&Collision, &["Collision"]);
    let budget = RetryBudget { retries: 9, time: None };
    debug(&budget, &["RetryBudget", "retries: 9", "time: None"]);
    debug(&MirrorError::<Broken>::Closed, &["Closed"]);
    let inbox = space.inbox(pages(1, 1), ()).unwrap();
    debug(&inbox, &["Inbox", PAGE_1, "queued: 0"]);
    debug(&inbox.recv(), &["Recv", "Inbox", PAGE_1]);
    let waitable = inbox.mirror(budget, |_| async { Ok::<_, Broken>(()) }, |_, ()| ());
    debug(&waitable, &["Waitable"]);
    drop(waitable);
    let mut told = space.invalidate(pages(1, 1), Event::Unmap);
    assert!(poll_once(&mut told).is_pending());
    debug(&inbox, &["queued: 1"]);
    let delivery = now(inbox.recv()).unwrap();
    debug(&delivery, &["Delivery", PAGE_1, "Unmap", "deliveries: 1"]);
    delivery.done();

    let timeline = Timeline::new();
    timeline.signal(4);
    debug(&timeline, &["Timeline", "value: 4"]);
    debug(&timeline.reached(4), &["Reached", "value: 4", "reached: true"]);
    debug(&timeline.reached(5), &["Reached", "value: 5", "reached: false"]);
    debug(&Callback::FirstPass, &["FirstPass"]);
    let panicked = Report::Panicked { callback: Callback::Clock, message: Some("late") };
    debug(&panicked, &["Panicked", "Clock", "late"]);
    #[cfg(feature = "lease")]
    debug(&space.pause(), &["Pause"]);
    #[cfg(feature = "test-util")]
    {
        let faulty = test_util::Faulty::new(Device::new("faulty", &log));
        faulty.refuse_next();
        debug(&faulty, &["Faulty", "faults: 1"]);
        debug(&faulty.delay_next(), &["Delay"]);
    }
    debug(&space.release(), &["Release", "Invalidate", "not started"]);
    drop((pending, told, inbox));
    now(space.release());
    debug(&space, &["released: true"]);
    let refused = space.insert(pages(1, 1), Device::new("late", &log)).unwrap_err();
    debug(&refused, &["InsertError", "Released"]);
}

#[test]
fn display_says_what_happened_and_what_to_do() {
    let (range, log) = (pages(1, 1), Log::default());
    display(&range, &[PAGE_1]);
    display(&AddressRange::new(0x10, 0).unwrap_err(), &["0x10", "empty"]);
    display(&AddressRange::new(u64::MAX, 2).unwrap_err(), &["0x2", "0xffffffffffffffff", "beyond"]);
    display(&RangeSet::new([]).unwrap_err(), &["at least one"]);
    display(&WouldBlock, &["wait", "invalidate"]);
    display(&Collision, &["read_begin", "is_closed"]);
    let space = AddressSpace::new();
    now(space.release());
    let refused = space.insert(range, Device::new("late", &log)).unwrap_err();
    display(&refused, &["released", "live process"]);
    let elapsed = Some(Duration::from_millis(5));
    let exhausted = MirrorError::<Broken>::RetriesExhausted { retries: 3, elapsed };
    display(&exhausted, &["4 attempts", "5ms", "retries"]);
    let exhausted = MirrorError::<Broken>::RetriesExhausted { retries: 3, elapsed: None };
    display(&exhausted, &["4 attempts", "retries"]);
    assert!(!exhausted.to_string().contains(" in "), "it names no time: {exhausted}");
    display(&MirrorError::<Broken>::Closed, &["closed"]);
    display(&MirrorError::Prepare(Broken), &["prepared", "the ring is broken"]);

    let callbacks = [
        (Callback::FirstPass, "first pass"),
        (Callback::Pass, "a pass"),
        (Callback::NotifierDrop, "drop of a notifier"),
        (Callback::Name, "name"),
        (Callback::Waker, "waker"),
        (Callback::Reporter, "reporter"),
        (Callback::Clock, "clock"),
        (Callback::Lease, "lease"),
        (Callback::Observer, "metrics"),
        (Callback::Device, "device"),
    ];
    for (callback, text) in callbacks {
        display(&callback, &[text]);
        display(&Report::Panicked { callback, message: Some("why") }, &[text, "panicked", "why"]);
        display(&Report::Panicked { callback, message: None }, &[text, "panicked"]);
    }
    let refused = Report::RefusedBlockable { notifier: "card", range, event: Event::Clear };
    display(&refused, &["card", "refused", PAGE_1, "Clear"]);
    display(
        &Report::Fenced { notifier: "card", range, passes: 2 },
        &["card", "fenced", PAGE_1, "2"],
    );
    let waited = Duration::from_millis(20);
    display(&Report::Unsettled { range, waited }, &[PAGE_1, "madvise", "20ms"]);
    display(&Report::WatchEnded { range }, &[PAGE_1, "drop the watch"]);
}

/// An error whose text holds that of its cause names as its source what lies behind the cause.
#[test]
fn source_is_what_lies_behind_the_text() {
    let source = |error: &dyn Error| error.source().map(ToString::to_string);
    let exhausted = MirrorError::<Broken>::RetriesExhausted { retries: 3, elapsed: None };
    let none: [&dyn Error; 7] = [
        &AddressRange::new(0x10, 0).unwrap_err(),
        &AddressRange::new(u64::MAX, 2).unwrap_err(),
        &RangeSet::new([]).unwrap_err(),
        &WouldBlock,
        &Collision,
        &exhausted,
        &MirrorError::<Broken>::Closed,
    ];
    for error in none {
        assert_eq!(source(error), None, "{error}");
    }
    assert_eq!(source(&MirrorError::Prepare(Broken)), Some(WouldBlock.to_string()));
    let space = AddressSpace::new();
    now(space.release());
    let refused = space.insert(pages(1, 1), Device::new("late", &Log::default())).unwrap_err();
    assert_eq!(source(&refused), None);
}
