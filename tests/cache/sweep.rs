//! F1, F2, K2: a device that panics at its n-th call, for each n, in whatever is called: its
//! methods, the polls and drops of their futures, the drop of a handle, the reporter, its own drop.
//!
//! One scenario uses everything; it is run once to count the calls, then again for each of them,
//! also while the thread unwinds. After each run nothing of the others was lost: every invalidation
//! has ended, nothing is mapped, nothing is pinned, no notifier is left.

use crate::device::throw;
use crate::support::{Task, Yields, now, pages};
use shootdown::cache::{Device, GetError, Merge, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace, Event};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Register,
    RegisterPoll,
    RegisterDrop,
    Deregister,
    DeregisterPoll,
    DeregisterDrop,
    HandleDrop,
    Reporter,
    DeviceDrop,
}

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
    static AT: Cell<u64> = const { Cell::new(0) };
    static FIRED: Cell<Option<Kind>> = const { Cell::new(None) };
}

fn point(kind: Kind) {
    CALLS.set(CALLS.get() + 1);
    if CALLS.get() == AT.get() {
        FIRED.set(Some(kind));
        throw("the device fails");
    }
}

/// What is mapped is known by the handles that exist.
#[derive(Clone, Default)]
struct Bad {
    handles: Arc<AtomicI64>,
    /// Refusals to come.
    refuse: Arc<AtomicI64>,
    _dropped: Option<Arc<Dropped>>,
    mapped: Arc<Mutex<BTreeMap<u64, AddressRange>>>,
}

struct Dropped;

impl Drop for Dropped {
    fn drop(&mut self) {
        point(Kind::DeviceDrop);
    }
}

struct Handle(u64, Arc<AtomicI64>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
        point(Kind::HandleDrop);
    }
}

#[derive(Debug)]
struct Refused;

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("refused")
    }
}

impl std::error::Error for Refused {}

/// A future whose polls and drop are points.
struct Pointed<F> {
    future: Pin<Box<F>>,
    poll: Kind,
    drop: Kind,
}

impl<F: Future> Future for Pointed<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        point(self.poll);
        self.future.as_mut().poll(cx)
    }
}

impl<F> Drop for Pointed<F> {
    fn drop(&mut self) {
        point(self.drop);
    }
}

impl Bad {
    fn refuses(&self) -> bool {
        let take = |left: i64| (left > 0).then_some(left - 1);
        self.refuse.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }
}

impl Device for Bad {
    type Handle = Handle;
    type Error = Refused;

    fn register(
        &self,
        range: AddressRange,
    ) -> impl Future<Output = Result<Handle, Refused>> + Send {
        point(Kind::Register);
        let future = async move {
            Yields(1).await;
            if self.refuses() {
                return Err(Refused);
            }
            let key = u64::try_from(self.handles.fetch_add(1, Ordering::SeqCst)).unwrap() << 48
                | range.start();
            self.mapped.lock().unwrap().insert(key, range);
            Ok(Handle(key, self.handles.clone()))
        };
        Pointed { future: Box::pin(future), poll: Kind::RegisterPoll, drop: Kind::RegisterDrop }
    }

    fn deregister(
        &self,
        _: AddressRange,
        handle: Handle,
    ) -> impl Future<Output = Result<(), StillRegistered<Handle, Refused>>> + Send {
        point(Kind::Deregister);
        let future = async move {
            Yields(1).await;
            if self.refuses() {
                return Err(StillRegistered { handle, error: Refused });
            }
            self.mapped.lock().unwrap().remove(&handle.0);
            Ok(())
        };
        Pointed { future: Box::pin(future), poll: Kind::DeregisterPoll, drop: Kind::DeregisterDrop }
    }

    async fn deregister_lost(&self, range: AddressRange) -> Result<bool, Refused> {
        Yields(1).await;
        self.mapped.lock().unwrap().retain(|_, mapped| *mapped != range);
        Ok(true)
    }
}

/// Registers, if only at the second or third call: a panic is one caller's, and only once.
fn get(cache: &RegistrationCache<Bad>, range: AddressRange) -> shootdown::cache::Registration<Bad> {
    for _ in 0..3 {
        match now(cache.get(range)) {
            Ok(registration) => return registration,
            Err(GetError::Panicked { message }) => {
                assert_eq!(message.as_deref(), Some("the device fails"))
            }
            Err(GetError::Register(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }
    panic!("{range} cannot be registered any more");
}

fn unmap(space: &AddressSpace, range: AddressRange) {
    drop(now(space.invalidate(range, Event::Unmap)));
}

/// Returns how many calls there were and which one failed.
fn run(at: u64) -> (u64, Option<Kind>) {
    let (space, device) = (AddressSpace::new(), Bad::default());
    let (handles, mapped) = (device.handles.clone(), device.mapped.clone());
    let refuse = device.refuse.clone();
    CALLS.set(0);
    AT.set(at);
    FIRED.set(None);
    for merge in [Merge::Never, Merge::Touching] {
        let device = Bad { _dropped: Some(Arc::new(Dropped)), ..device.clone() };
        let builder = RegistrationCache::<Bad>::builder().merge(merge).max_registrations(4);
        let cache = builder.on_failure(|_| point(Kind::Reporter)).build(&space, device);
        // Several ranges; one is held to the end by somebody else.
        let other = get(&cache, pages(100, 1));
        for page in [1, 3, 5, 7, 9] {
            drop(get(&cache, pages(page, 1)));
        }
        drop(get(&cache, pages(1, 4)));
        // A caller that goes away while it registers, and an invalidation that finds that.
        let mut gone = Task::new(cache.get(pages(20, 1)));
        assert!(gone.poll().is_pending() || FIRED.get().is_some());
        drop(gone);
        unmap(&space, pages(20, 1));
        // An invalidation while it is in use.
        let held = get(&cache, pages(30, 1));
        let mut invalidation = Task::new(space.invalidate(pages(30, 1), Event::Clear));
        invalidation.expect_pending();
        let mut waits = Task::new(cache.get(pages(30, 1)));
        waits.expect_pending();
        drop(held);
        drop(invalidation.finish());
        drop(waits.finish());
        drop(waits);
        // Failures that are reported.
        refuse.store(1, Ordering::SeqCst);
        drop(get(&cache, pages(40, 1)));
        refuse.store(4, Ordering::SeqCst);
        unmap(&space, pages(40, 1));
        refuse.store(0, Ordering::SeqCst);
        now(cache.flush_range(pages(0, 50)));
        assert_eq!(other.range(), pages(100, 1), "another one's");
        assert!(mapped.lock().unwrap().values().all(|range| *range == pages(100, 1)), "{mapped:?}");
        assert_eq!(cache.stats().pinned_bytes, 4096);
        // Nothing is poisoned.
        drop(get(&cache, pages(1, 4)));
        // The cache goes while it registers, while one is idle and while one is in use.
        let mut gone = Task::new(cache.get(pages(60, 1)));
        assert!(gone.poll().is_pending() || FIRED.get().is_some());
        drop(gone);
        drop(cache);
        let mut invalidation = Task::new(space.invalidate(AddressRange::ALL, Event::Unmap));
        invalidation.expect_pending();
        drop(other);
        drop(invalidation.finish());
        assert_eq!(
            (mapped.lock().unwrap().len(), handles.load(Ordering::SeqCst), space.len()),
            (0, 0, 0)
        );
        assert!(space.active().is_empty());
    }
    AT.set(0);
    (CALLS.get(), FIRED.get())
}

/// Runs it in a destructor that runs while the thread unwinds.
fn run_unwinding(at: u64) -> (u64, Option<Kind>) {
    struct InDrop<'a>(&'a mut dyn FnMut());
    impl Drop for InDrop<'_> {
        fn drop(&mut self) {
            (self.0)();
        }
    }
    let mut result = None;
    // A failed assertion must not leave a destructor.
    let mut body = || result = Some(catch_unwind(|| run(at)));
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let _in_drop = InDrop(&mut body);
        throw("the thread unwinds");
    }));
    assert!(unwound.is_err());
    result.expect("it ran").unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[test]
fn k2_a_device_that_panics_at_any_call_costs_nobody_else_anything() {
    let mut hit = BTreeMap::new();
    for run in [run, run_unwinding] {
        let (calls, _) = run(0);
        assert!(calls > 150, "the scenario calls the device {calls} times");
        for at in 1..=calls {
            let outcome = catch_unwind(|| run(at)).unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                panic!("call {at} of {calls}, {:?}: {text}", FIRED.get());
            });
            *hit.entry(outcome.1.expect("the scenario does the same until the device fails"))
                .or_insert(0) += 1;
        }
    }
    assert_eq!(hit.len(), 9, "every kind of call was one that failed: {hit:?}");
}
