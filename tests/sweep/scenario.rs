//! One scenario that uses everything.

use crate::actors::{Act, Driver, Executor, Role};
use crate::chaos::{self, BAG, Kind, Misbehaviour, point};
use crate::support::{Gate, pages};
use futures::StreamExt;
use shootdown::{AddressSpace, Event, Inbox, Subscription};
use std::cell::{Cell, RefCell};
use std::mem::ManuallyDrop;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

type Sub = Arc<Subscription<Driver>>;

/// What a misbehaving call can call back with.
#[derive(Clone)]
pub(crate) struct Bag {
    space: AddressSpace,
    read: Sub,
    spare: Rc<RefCell<Vec<Subscription<Driver>>>>,
    inserted: Rc<RefCell<Vec<Subscription<Driver>>>>,
    /// Another space, with a pass that is pending and abandoned; this is its last handle.
    other: Rc<RefCell<Option<AddressSpace>>>,
    executor: Executor,
    created: Rc<Cell<usize>>,
    drops: Arc<AtomicUsize>,
}

impl Bag {
    pub(crate) fn clone_of(bag: &Option<Self>) -> Option<Self> {
        bag.clone()
    }

    pub(crate) fn call_back(&self, what: Misbehaviour) {
        let mut cx = Context::from_waker(Waker::noop());
        match what {
            Misbehaviour::Panic | Misbehaviour::PanicWithBomb => {
                unreachable!("they do not call back")
            }
            Misbehaviour::Insert => {
                if let Ok(inserted) =
                    self.space.insert(pages(0, 3), self.driver("inserted in a callback"))
                {
                    self.inserted.borrow_mut().push(inserted);
                }
            }
            Misbehaviour::Invalidate => {
                let invalidate = pin!(self.space.invalidate(pages(0, 5), Event::Clear));
                let polled = invalidate.poll(&mut cx);
                drop(polled);
            }
            Misbehaviour::TryInvalidate => {
                drop(self.space.try_invalidate(pages(0, 5), Event::Clear))
            }
            Misbehaviour::ReadBegin => {
                let read = pin!(self.read.read_begin());
                let _ = read.poll(&mut cx);
            }
            Misbehaviour::DropLastHandle => drop(self.other.borrow_mut().take()),
            Misbehaviour::DropSubscription => {
                let spare = self.spare.borrow_mut().pop();
                drop(spare);
            }
            Misbehaviour::PollAnotherTask => {
                self.executor.run_one();
            }
        }
    }

    fn driver(&self, name: &'static str) -> Driver {
        self.created.set(self.created.get() + 1);
        Driver::new(name, &self.drops, [])
    }
}

/// A space with a pass that is pending and abandoned.
fn other_space(bag_drops: &Arc<AtomicUsize>, created: &Cell<usize>) -> AddressSpace {
    let space = AddressSpace::new();
    created.set(created.get() + 1);
    let driver = Driver::new("other", bag_drops, [Act::Wait(Gate::default())]);
    let subscription = space.insert(pages(0, 1), driver).unwrap();
    let mut cx = Context::from_waker(Waker::noop());
    assert!(pin!(space.invalidate(pages(0, 1), Event::Unmap)).poll(&mut cx).is_pending());
    drop(subscription);
    space
}

/// Waits for each delivery, lets the first go back once, and handles it.
async fn handle(inbox: Arc<Inbox<Vec<u64>>>) {
    let mut stream = &*inbox;
    let mut first = true;
    while let Some(delivery) = stream.next().await {
        if std::mem::take(&mut first) {
            drop(delivery);
            continue;
        }
        inbox.with(|pages| pages.clear());
        delivery.done();
    }
}

async fn read(subscription: Sub) {
    let sequence = subscription.read_begin().await;
    let _ = subscription.read_retry(sequence);
}

/// Returns how many calls of foreign code there were, and which kind misbehaved.
#[allow(clippy::too_many_lines, reason = "one story")]
pub(crate) fn run(at: u64, what: Misbehaviour) -> (u64, Option<Kind>) {
    let executor = Executor::default();
    let (drops, created) = (Arc::new(AtomicUsize::new(0)), Rc::new(Cell::new(0)));
    let micros = Arc::new(AtomicU64::new(0));
    let time = micros.clone();
    let space = AddressSpace::builder()
        .pass_budget(2)
        .on_report(|_| point(Kind::Reporter))
        .clock(move || {
            point(Kind::Clock);
            Duration::from_micros(time.load(Ordering::SeqCst))
        })
        .build();
    let gates: Vec<Gate> = (0..8).map(|_| Gate::default()).collect();
    let wait = |gate: usize| Act::Wait(gates[gate].clone());
    let new = |name, script: Vec<Act>| {
        created.set(created.get() + 1);
        Driver::new(name, &drops, script)
    };
    let insert =
        |first, count, driver| space.insert(pages(first, count), driver).map_err(drop).unwrap();
    let a = Arc::new(insert(0, 2, new("a", vec![wait(0), Act::Yield(2), wait(1), wait(2)])));
    let b = insert(1, 2, new("b", vec![Act::Yield(3), wait(3), Act::Yield(1), wait(3)]));
    let c = Arc::new(insert(0, 4, new("c", vec![Act::Finish, Act::Yield(1), wait(4)])));
    let refusing = insert(2, 1, new("refuses", vec![Act::Refuse, Act::Refuse]));
    let far = Arc::new(insert(9, 1, new("far", vec![])));
    let inbox = Arc::new(space.inbox(pages(2, 2), Vec::new()).map_err(drop).unwrap());
    let bag = Bag {
        space: space.clone(),
        read: c.clone(),
        spare: Rc::new(RefCell::new((0..2).map(|_| insert(1, 1, new("spare", vec![]))).collect())),
        inserted: Rc::default(),
        other: Rc::new(RefCell::new(Some(other_space(&drops, &created)))),
        executor: executor.clone(),
        created: created.clone(),
        drops: drops.clone(),
    };
    BAG.set(Some(bag.clone()));
    chaos::arm(at, what);

    let invalidate = |name, first, count, event| {
        let future = space.invalidate(pages(first, count), event).into_owned();
        executor.spawn(name, Role::Invalidates, async move { drop(future.await) });
    };
    executor.spawn("inbox", Role::Waits, handle(inbox.clone()));
    executor.run();
    invalidate("first", 0, 3, Event::Unmap);
    executor.run();
    executor.spawn("reader of a", Role::Waits, read(a.clone()));
    executor.spawn("reader of c", Role::Waits, read(c.clone()));
    executor.run();
    invalidate("second", 1, 1, Event::Clear);
    executor.run();
    let late = executor
        .step("late insert", Role::Bystander, || Arc::new(insert(0, 1, new("late", vec![]))));
    if let Some(late) = &late {
        executor.spawn("reader of late", Role::Waits, read(late.clone()));
    }
    executor.run();
    // Non-blockable: a pass stays pending; somebody refuses; nobody is hit.
    executor.step("try, pending", Role::Invalidates, || {
        drop(space.try_invalidate(pages(0, 2), Event::Clear))
    });
    executor.step("try, refused", Role::Invalidates, || {
        drop(space.try_invalidate(pages(2, 1), Event::Clear))
    });
    executor.step("try, nobody", Role::Bystander, || {
        drop(space.try_invalidate(pages(20, 1), Event::Clear))
    });
    executor.run();
    // Abandoned after its first poll, and leaked after its first poll.
    executor.step("abandoned", Role::Invalidates, || {
        let mut abandoned = pin!(space.invalidate(pages(0, 4), Event::Unmap));
        let mut cx = Context::from_waker(Waker::noop());
        drop(abandoned.as_mut().poll(&mut cx));
        micros.fetch_add(7, Ordering::SeqCst);
        drop(abandoned.as_mut().poll(&mut cx));
    });
    a.next(wait(5));
    executor.step("leaked", Role::Invalidates, || {
        let mut leaked = ManuallyDrop::new(Box::pin(space.invalidate(pages(0, 1), Event::Unmap)));
        let polled = leaked.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        let pending = polled.is_pending();
        drop(polled);
        // Miri counts what is leaked.
        if !pending || cfg!(miri) {
            drop(ManuallyDrop::into_inner(leaked));
        }
    });
    executor.step("lists", Role::Bystander, || {
        assert!(!format!("{space:?} {:?}", space.stats()).is_empty());
        drop(space.active());
    });
    // A guard that is held across all that follows, and a reader that waits for it.
    let held = executor.step("held", Role::Invalidates, || {
        let polled = pin!(space.invalidate(pages(9, 1), Event::Clear))
            .poll(&mut Context::from_waker(Waker::noop()));
        match polled {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    });
    executor.spawn("reader of far", Role::Waits, read(far.clone()));
    executor.spawn("remover", Role::DropsNotifier, async move { drop(b.remove().await) });
    executor.step("dropped subscription", Role::DropsNotifier, || drop(refusing));
    executor.run();
    for gate in &gates[..4] {
        executor.step("device", Role::Bystander, || gate.open());
        micros.fetch_add(100, Ordering::SeqCst);
        executor.run();
    }
    let of_drain = space.clone();
    executor.spawn("drain", Role::Waits, async move { of_drain.drain().await });
    executor.run();
    executor.step("end", Role::Bystander, || drop(held));
    for gate in &gates[4..] {
        executor.step("device", Role::Bystander, || gate.open());
        executor.run();
    }
    // What was leaked lapses.
    for _ in 0..2 {
        micros.fetch_add(30_000, Ordering::SeqCst);
        executor.run();
    }
    let of_release = space.clone();
    executor.spawn("release", Role::Invalidates, async move { of_release.release().await });
    executor.run();
    executor.step("insert after release", Role::DropsNotifier, || {
        assert!(
            space.insert(pages(0, 1), new("too late", vec![])).map(drop).is_err()
                || !space.is_released()
        );
    });

    // From here on everybody behaves.
    let counts = chaos::disarm();
    BAG.set(None);
    // A panic in its own code may have ended the inbox's task, or the invalidation that releases.
    executor.spawn("inbox again", Role::Waits, handle(inbox.clone()));
    let of_release = space.clone();
    executor.spawn("release again", Role::Invalidates, async move { of_release.release().await });
    // What was leaked lapses only if somebody waits for its range.
    executor.spawn("last reader of a", Role::Waits, read(a.clone()));
    executor.spawn("last reader of c", Role::Waits, read(c.clone()));
    gates.iter().for_each(Gate::open);
    for _ in 0..200 {
        executor.run();
        if executor.waiting().is_empty() {
            break;
        }
        micros.fetch_add(30_000, Ordering::SeqCst);
    }
    assert_eq!(executor.waiting(), Vec::<&str>::new(), "they wait for ever: {:?}", space.active());
    let last = space.clone();
    executor.spawn("last drain", Role::Waits, async move { last.drain().await });
    executor.run();
    assert_eq!(executor.waiting(), Vec::<&str>::new(), "{:?}", space.active());
    assert!(space.active().is_empty(), "under invalidation for ever: {:?}", space.active());
    assert_eq!(space.sequence().get() % 2, 0);
    let complaints = executor.complaints();
    assert!(complaints.is_empty(), "{complaints:?}");
    if what.panics()
        && let (_, Some(kind)) = counts
        && !matches!(
            kind,
            Kind::FirstPass
                | Kind::PassPoll
                | Kind::PassDrop
                | Kind::NotifierDrop
                | Kind::WakerClone
        )
    {
        assert_eq!(space.stats().lost_panics, 1, "a panic of {kind:?} is counted");
    }
    executor.clear();
    drop((bag, a, c, far, late, inbox));
    drop(space);
    assert_eq!(drops.load(Ordering::SeqCst), created.get(), "every notifier is dropped once");
    counts
}
