//! Every interleaving of small models, explored by loom: `ci/loom.sh`.
//!
//! The library's own locks and atomics are loom's here (`src/sync.rs`); `FuturesUnordered` is one
//! step. Each test prints how many executions it explored. `tests/README.md` lists which mutations
//! of the library these models find.
#![cfg(loom)]
#![allow(missing_docs, clippy::print_stdout)]

use loom::future::block_on;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::thread;
use shootdown::{
    AddressRange, AddressSpace, AsyncIntervalNotifier, AsyncNotifier, DriverLock, Event,
    IntervalNotifier, Invalidation, InvalidationGuard, InvalidationInfo, PassFuture, Subscription,
    Timeline, WouldBlock,
};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize as RealUsize;
use std::task::{Context, Poll, Waker};

/// Explores a model; says how many executions that took.
fn explore(name: &str, preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let executions = Arc::new(RealUsize::new(0));
    let count = executions.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(move || {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    println!(
        "{name}: {} executions, at most {preemptions} preemptions each",
        executions.load(std::sync::atomic::Ordering::Relaxed)
    );
}

fn range() -> AddressRange {
    pages(1, 1)
}

fn pages(first: u64, count: u64) -> AddressRange {
    AddressRange::new(first * 0x1000, count * 0x1000).unwrap()
}

/// The result of a future that need not wait.
fn at_once<F: Future>(future: F) -> F::Output {
    futures::FutureExt::now_or_never(future).expect("nothing to wait for")
}

/// A fence of the device: a flag and the wakers that wait for it.
#[derive(Clone)]
struct Fence(Arc<loom::sync::Mutex<(bool, Vec<Waker>)>>);

impl Fence {
    fn new() -> Self {
        Self(Arc::new(loom::sync::Mutex::new((false, Vec::new()))))
    }

    fn signal(&self) {
        let wakers = {
            let mut fence = self.0.lock().unwrap();
            fence.0 = true;
            std::mem::take(&mut fence.1)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Future for Fence {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut fence = self.0.lock().unwrap();
        if fence.0 {
            return Poll::Ready(());
        }
        fence.1.push(cx.waker().clone());
        Poll::Pending
    }
}

/// A device that maps at most one page, and remembers which value of the memory it maps.
struct Device {
    state: Arc<DriverLock<State>>,
    fence: Option<Fence>,
}

#[derive(Default)]
struct State {
    /// The value that the page table maps.
    mapping: Option<u64>,
    /// The value that the device may still use although the page table does not map it, until a
    /// pass is done.
    in_flight: Option<u64>,
}

impl Device {
    fn new(fence: Option<Fence>) -> Self {
        Self { state: Arc::default(), fence }
    }

    fn in_flight(&self) -> Option<u64> {
        self.state.lock().in_flight
    }
}

impl IntervalNotifier for Device {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        {
            let mut state = self.state.lock_for(invalidation);
            // What an earlier invalidation zapped may still be in flight (O6): every pass waits for
            // all of it.
            state.in_flight = state.mapping.take().or(state.in_flight);
        }
        let (state, fence) = (self.state.clone(), self.fence.clone());
        Ok(Some(PassFuture::new(async move {
            if let Some(fence) = fence {
                fence.await;
            }
            state.lock().in_flight = None;
        })))
    }
}

/// The program's memory: one value, which changes only under a guard.
struct Memory(AtomicU64);

impl Memory {
    /// What the one sentence says: when the guard is handed out, no device uses the old mapping.
    fn change(&self, device: &Device) {
        assert_eq!(device.in_flight(), None, "a device works on after the guard was handed out");
        let value = self.0.load(Ordering::Relaxed);
        if let Some(mapped) = device.state.lock().mapping {
            assert_ne!(mapped, value, "a device maps what is about to change");
        }
        self.0.store(value + 1, Ordering::Relaxed);
    }

    /// A reader's attempt: look at the memory, then install what was seen.
    async fn mirror(&self, subscription: &Subscription<Device>) {
        let sequence = subscription.read_begin().await;
        let value = self.0.load(Ordering::Relaxed);
        let _ = subscription.state.install(subscription, sequence, |state| {
            state.mapping = Some(value);
        });
    }

    /// Nothing that is mapped is stale.
    fn check(&self, device: &Device) {
        if let Some(mapped) = device.state.lock().mapping {
            assert_eq!(mapped, self.0.load(Ordering::Relaxed), "a stale mapping was installed");
        }
    }
}

type Model = (AddressSpace, Arc<Subscription<Device>>, Arc<Memory>);

fn model(fence: Option<Fence>) -> Model {
    let space = AddressSpace::new();
    let device = Arc::new(space.insert(range(), Device::new(fence)).unwrap());
    (space, device, Arc::new(Memory(AtomicU64::new(0))))
}

#[test]
fn two_overlapping_invalidations_and_a_reader_never_install_a_stale_mapping() {
    explore("two invalidations, one reader", 3, || {
        let (space, device, memory) = model(None);
        let invalidations: Vec<_> = (0..2)
            .map(|_| {
                let (space, memory, device) = (space.clone(), memory.clone(), device.clone());
                thread::spawn(move || {
                    let guard = block_on(space.invalidate(range(), Event::Unmap));
                    // Two guards may be held at once: only the device's side is checked then.
                    assert_eq!(device.in_flight(), None);
                    memory.0.fetch_add(1, Ordering::Relaxed);
                    drop(guard);
                })
            })
            .collect();
        block_on(memory.mirror(&device));
        for invalidation in invalidations {
            invalidation.join().unwrap();
        }
        memory.check(&device);
    });
}

#[test]
fn separate_invalidations_under_one_that_keeps_the_space_odd_make_a_reader_collide() {
    // S6: elsewhere an invalidation is active, so the space's sequence stays odd.
    explore("S6", 3, || {
        let (space, device, memory) = model(None);
        let elsewhere = AddressRange::new(0x9000, 0x1000).unwrap();
        let _other = space.insert(elsewhere, Device::new(None)).unwrap();
        let held = block_on(space.invalidate(elsewhere, Event::Clear)).into_owned();
        let reader = {
            let (memory, device) = (memory.clone(), device.clone());
            thread::spawn(move || block_on(memory.mirror(&device)))
        };
        for _ in 0..2 {
            let guard = block_on(space.invalidate(range(), Event::Unmap));
            memory.change(&device);
            drop(guard);
        }
        reader.join().unwrap();
        memory.check(&device);
        drop(held);
    });
}

#[test]
fn insert_against_start() {
    explore("insert against start", 6, || {
        let space = AddressSpace::new();
        let memory = Arc::new(Memory(AtomicU64::new(0)));
        let invalidation = {
            let (space, memory) = (space.clone(), memory.clone());
            thread::spawn(move || {
                let guard = block_on(space.invalidate(range(), Event::Unmap));
                memory.0.fetch_add(1, Ordering::Relaxed);
                drop(guard);
            })
        };
        let device = space.insert(range(), Device::new(None)).unwrap();
        block_on(memory.mirror(&device));
        invalidation.join().unwrap();
        memory.check(&device);
    });
}

/// Says so if it is called, or its pass polled, after it was removed.
struct Removed {
    removed: Arc<AtomicU64>,
    fence: Fence,
}

impl IntervalNotifier for Removed {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        assert_eq!(self.removed.load(Ordering::SeqCst), 0, "called after remove");
        invalidation.set_seq();
        let (removed, fence) = (self.removed.clone(), self.fence.clone());
        Ok(Some(PassFuture::new(async move {
            fence.await;
            assert_eq!(removed.load(Ordering::SeqCst), 0, "a pass ran after remove");
        })))
    }
}

#[test]
fn remove_against_start_and_against_a_running_pass() {
    explore("remove against start and pass", 3, || {
        let space = AddressSpace::new();
        let (removed, fence) = (Arc::new(AtomicU64::new(0)), Fence::new());
        let notifier = Removed { removed: removed.clone(), fence: fence.clone() };
        let subscription = space.insert(range(), notifier).unwrap();
        let invalidation = {
            let space = space.clone();
            thread::spawn(move || drop(block_on(space.invalidate(range(), Event::Unmap))))
        };
        let hardware = thread::spawn(move || fence.signal());
        drop(block_on(subscription.remove()));
        removed.store(1, Ordering::SeqCst);
        invalidation.join().unwrap();
        hardware.join().unwrap();
    });
}

/// Counts those of its kind that were dropped.
struct Counted(u64, Arc<RealUsize>);

impl IntervalNotifier for Counted {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        Ok(None)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn notifiers_that_come_and_go_on_two_threads_do_not_share_memory() {
    // The first removal fills the place of the spare memory, the others find it filled, reserved or
    // empty.
    for polled in [true, false] {
        explore(&format!("spare memory, polled: {polled}"), 4, move || {
            let (space, drops) = (AddressSpace::new(), Arc::new(RealUsize::new(0)));
            let come_and_go = move |space: &AddressSpace, number: u64, drops: &Arc<RealUsize>| {
                let remove =
                    space.insert(range(), Counted(number, drops.clone())).unwrap().remove();
                if polled || number != 1 {
                    assert_eq!(block_on(remove).0, number, "another one's notifier");
                }
            };
            come_and_go(&space, 0, &drops);
            let other = {
                let (space, drops) = (space.clone(), drops.clone());
                thread::spawn(move || {
                    come_and_go(&space, 1, &drops);
                    come_and_go(&space, 2, &drops);
                })
            };
            come_and_go(&space, 3, &drops);
            other.join().unwrap();
            come_and_go(&space, 4, &drops);
            assert_eq!((space.len(), drops.load(std::sync::atomic::Ordering::Relaxed)), (0, 5));
        });
    }
}

#[test]
fn remove_does_not_wait_for_a_guard_that_is_held() {
    explore("remove against a guard", 4, || {
        let (space, device, _memory) = model(None);
        let device = Arc::try_unwrap(device).ok().unwrap();
        let (holding, release) = (Fence::new(), Fence::new());
        let invalidation = {
            let (space, holding, release) = (space.clone(), holding.clone(), release.clone());
            thread::spawn(move || {
                let guard = block_on(space.invalidate(range(), Event::Unmap));
                holding.signal();
                block_on(release);
                drop(guard);
            })
        };
        block_on(holding);
        drop(block_on(device.remove()));
        release.signal();
        invalidation.join().unwrap();
    });
}

#[test]
fn a_future_that_is_dropped_at_any_point_loses_nothing_while_a_reader_waits() {
    // The future is polled `polls` times and dropped; the device completes on a thread of its own.
    for polls in 0..3 {
        explore(&format!("drop after {polls} polls"), 2, move || {
            let fence = Fence::new();
            let (space, device, memory) = model(Some(fence.clone()));
            block_on(memory.mirror(&device));
            let hardware = thread::spawn(move || fence.signal());
            let reader = {
                let (memory, device) = (memory.clone(), device.clone());
                thread::spawn(move || {
                    block_on(memory.mirror(&device));
                })
            };
            let mut invalidate = Box::pin(space.invalidate(range(), Event::Unmap));
            let waker = futures::task::noop_waker();
            for _ in 0..polls {
                if let Poll::Ready(guard) =
                    invalidate.as_mut().poll(&mut Context::from_waker(&waker))
                {
                    memory.change(&device);
                    drop(guard);
                    break;
                }
            }
            drop(invalidate);
            reader.join().unwrap();
            hardware.join().unwrap();
            block_on(space.drain());
            assert_eq!(device.in_flight(), None);
            assert_eq!(space.sequence().get() % 2, 0, "the invalidation was ended");
            memory.check(&device);
        });
    }
}

#[test]
fn a_future_that_is_dropped_between_two_first_passes_loses_nothing() {
    // A budget of one: the first pass is put off, the second awaited before the third is called
    // (B4).
    explore("drop between first passes", 2, || {
        let space = AddressSpace::builder().pass_budget(1).build();
        let (put_off, awaited) = (Fence::new(), Fence::new());
        let devices = [Some(put_off.clone()), Some(awaited.clone()), None].map(|fence| {
            let device = Arc::new(space.insert(range(), Device::new(fence)).unwrap());
            let sequence = block_on(device.read_begin());
            device.state.install(&device, sequence, |state| state.mapping = Some(0)).unwrap();
            device
        });
        let hardware = thread::spawn(move || {
            awaited.signal();
            put_off.signal();
        });
        let reader = {
            let device = devices[0].clone();
            thread::spawn(move || {
                block_on(device.read_begin());
            })
        };
        let mut invalidate = Box::pin(space.invalidate(range(), Event::Unmap));
        let waker = futures::task::noop_waker();
        let guard = invalidate.as_mut().poll(&mut Context::from_waker(&waker));
        drop(guard);
        drop(invalidate);
        reader.join().unwrap();
        hardware.join().unwrap();
        block_on(space.drain());
        assert!(devices.iter().all(|device| device.in_flight().is_none()));
        assert_eq!(space.sequence().get() % 2, 0);
    });
}

#[test]
fn two_waiters_drive_one_invalidations_passes() {
    explore("two waiters", 2, || {
        let fence = Fence::new();
        let (space, device, memory) = model(Some(fence.clone()));
        let mut invalidate = Box::pin(space.invalidate(range(), Event::Unmap));
        let waker = futures::task::noop_waker();
        let first = invalidate.as_mut().poll(&mut Context::from_waker(&waker));
        assert!(first.is_pending());
        // Alive, and never polled again: the two readers have to do it all.
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (memory, device) = (memory.clone(), device.clone());
                thread::spawn(move || block_on(memory.mirror(&device)))
            })
            .collect();
        fence.signal();
        for reader in readers {
            reader.join().unwrap();
        }
        memory.check(&device);
        drop(invalidate);
    });
}

#[test]
fn a_wake_up_while_somebody_else_polls_is_not_lost() {
    explore("wake-up during a poll", 2, || {
        let fence = Fence::new();
        let (space, device, memory) = model(Some(fence.clone()));
        let reader = {
            let (memory, device) = (memory.clone(), device.clone());
            thread::spawn(move || block_on(memory.mirror(&device)))
        };
        let hardware = thread::spawn(move || fence.signal());
        let guard = block_on(space.invalidate(range(), Event::Unmap));
        memory.change(&device);
        drop(guard);
        reader.join().unwrap();
        hardware.join().unwrap();
        memory.check(&device);
    });
}

#[test]
fn release_against_insert() {
    explore("release against insert", 8, || {
        let space = AddressSpace::new();
        let release = {
            let space = space.clone();
            thread::spawn(move || block_on(space.release()))
        };
        let removed = Arc::new(AtomicU64::new(0));
        let fence = Fence::new();
        fence.signal();
        let inserted = space.insert(range(), Removed { removed, fence });
        release.join().unwrap();
        // Either it was there in time and was called, or it was refused.
        match inserted {
            Ok(subscription) => assert!(
                subscription.sequence().get() >= 3,
                "inserted before the release and not called"
            ),
            Err(refused) => drop(refused.into_notifier()),
        }
        assert!(space.is_released());
    });
}

/// What userfaultfd does: the memory changes first, and who changed it goes on as soon as the
/// monitor has heard of it.
#[test]
fn no_reader_that_begins_after_the_change_was_heard_of_gets_an_answer_from_before_it() {
    explore("a pause, a reader", 4, || {
        let (space, device, memory) = model(None);
        let heard = Arc::new(AtomicU64::new(0));
        let monitor = {
            let (space, memory, heard) = (space.clone(), memory.clone(), heard.clone());
            thread::spawn(move || {
                memory.0.fetch_add(1, Ordering::Relaxed);
                let pause = space.pause();
                // Whoever unmapped the memory goes on from here.
                heard.store(1, Ordering::Release);
                let guard = block_on(space.invalidate(range(), Event::Unmap));
                drop(pause);
                drop(guard);
            })
        };
        if heard.load(Ordering::Acquire) == 1 {
            let began = block_on(device.read_begin());
            assert!(
                !device.read_retry(began),
                "the reader began before the invalidation that it should have waited for"
            );
            assert!(began.get() >= 3, "the first pass has not run");
        }
        monitor.join().unwrap();
        memory.check(&device);
    });
}

/// Other pauses come and go meanwhile, and overlap so that the gate is never seen open.
#[test]
fn who_begins_in_a_pause_waits_for_its_end_also_beside_others_that_overlap_it() {
    explore("a pause, others that overlap, a reader", 4, || {
        let (space, device, memory) = model(None);
        let heard = Arc::new(AtomicU64::new(0));
        let monitor = {
            let (space, memory, heard) = (space.clone(), memory.clone(), heard.clone());
            thread::spawn(move || {
                memory.0.fetch_add(1, Ordering::Relaxed);
                let pause = space.pause();
                heard.store(1, Ordering::Release);
                let guard = block_on(space.invalidate(range(), Event::Unmap));
                // What comes next is heard of before the gate is open.
                let next = space.pause();
                drop(pause);
                drop(guard);
                drop(next);
            })
        };
        let other = space.pause();
        if heard.load(Ordering::Acquire) == 1 {
            let mut read = Box::pin(device.read_begin());
            let polled =
                std::future::poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx).is_pending()));
            assert!(at_once(polled), "the other pause is not over");
            let another = space.pause();
            drop(other);
            drop(another);
            let began = block_on(read);
            assert!(began.get() >= 3, "the first pass has not run");
        }
        monitor.join().unwrap();
        memory.check(&device);
    });
}

/// The other half: a reader that began before looks at the memory when somebody else is using it
/// already.
#[test]
fn nothing_that_was_seen_after_the_change_is_accepted_with_a_sequence_from_before_it() {
    explore("a pause, a look, a check", 4, || {
        let (space, device, _memory) = model(None);
        let content = Arc::new(AtomicU64::new(0));
        let monitor = {
            let (space, content) = (space.clone(), content.clone());
            thread::spawn(move || {
                let pause = space.pause();
                // Whoever unmapped the memory goes on from here, and maps something else.
                content.store(1, Ordering::Release);
                let guard = block_on(space.invalidate(range(), Event::Unmap));
                drop(pause);
                drop(guard);
            })
        };
        let began = block_on(device.read_begin());
        let seen = content.load(Ordering::Relaxed);
        let accepted = !device.read_retry(began);
        assert!(
            !accepted || seen == 0 || began.get() >= 3,
            "accepted what belongs to somebody else"
        );
        monitor.join().unwrap();
    });
}

/// The word of a closed notifier, read without a lock beside a first pass that sets it, an end that
/// uncovers it and a close.
#[test]
fn nothing_is_accepted_after_a_close_whether_an_invalidation_covers_the_notifier_or_not() {
    explore("a close, an invalidation, a check", 3, || {
        let (space, device, _memory) = model(None);
        let closed = Arc::new(AtomicU64::new(0));
        let closer = {
            let (device, closed) = (device.clone(), closed.clone());
            thread::spawn(move || {
                drop(device.close());
                closed.store(1, Ordering::Release);
            })
        };
        let invalidator =
            thread::spawn(move || drop(block_on(space.invalidate(range(), Event::Unmap))));
        let began = device.sequence();
        let was_closed = closed.load(Ordering::Acquire) == 1;
        assert!(device.read_retry(began) || !was_closed, "accepted after the close");
        closer.join().unwrap();
        invalidator.join().unwrap();
        // Whoever was last, the close or the end of the invalidation.
        assert!(
            device.read_retry(block_on(device.read_begin())),
            "accepted with a sequence from after the close"
        );
    });
}

/// Sets the sequence without a lock, as [`AsyncNotifier`] does for a driver with no `begin` of its
/// own.
struct Lockless;

impl AsyncIntervalNotifier for Lockless {
    async fn invalidate(self: Arc<Self>, _: InvalidationInfo) {}
}

type LocklessSubscription = Subscription<AsyncNotifier<Lockless>>;

/// A space whose sequence is 3 and stays odd while `held` lives. `first` watches the first of two
/// pages; the notifier of the second has sequence 3 already. So an invalidation of both pages gets
/// 5 (S6), and one of the first page alone may get 3.
struct TwoSequences {
    space: AddressSpace,
    first: LocklessSubscription,
    held: InvalidationGuard<'static>,
    _others: [LocklessSubscription; 2],
}

impl TwoSequences {
    fn new() -> Self {
        let space = AddressSpace::new();
        let watch = |page| space.insert(pages(page, 1), AsyncNotifier::new(Lockless)).unwrap();
        let [first, second, elsewhere] = [1, 2, 9].map(watch);
        let held = at_once(space.invalidate(pages(9, 1), Event::Clear)).into_owned();
        drop(at_once(space.invalidate(pages(2, 1), Event::Clear)));
        assert_eq!((second.sequence().get(), space.sequence().get()), (3, 3));
        Self { space, first, held, _others: [second, elsewhere] }
    }

    /// Invalidates the first page alone, on a thread of its own. Returns the sequence of that.
    fn invalidate_first(&self) -> thread::JoinHandle<u64> {
        let space = self.space.clone();
        thread::spawn(move || at_once(space.invalidate(pages(1, 1), Event::Unmap)).sequence().get())
    }
}

#[test]
fn s4_of_two_first_passes_that_set_the_sequence_at_once_the_later_one_stays() {
    explore("S4, two first passes", 3, || {
        let model = TwoSequences::new();
        let alone = model.invalidate_first();
        let both = at_once(model.space.invalidate(pages(1, 2), Event::Unmap)).sequence().get();
        let alone = alone.join().unwrap();
        let own = model.first.sequence().get();
        assert!(
            own >= alone.max(both),
            "own sequence {own} after first passes with {alone} and {both}"
        );
        drop(model.held);
    });
}

#[test]
fn s4_a_check_misses_no_invalidation_when_first_passes_set_the_sequence_without_a_lock() {
    explore("S4, a check", 3, || {
        let model = TwoSequences::new();
        let alone = model.invalidate_first();
        let both = at_once(model.space.invalidate(pages(1, 2), Event::Unmap));
        // Begins under one of them or both, and ends when both have.
        let mut reader = Box::pin(model.first.read_begin());
        let mut cx = Context::from_waker(Waker::noop());
        let mut began = reader.as_mut().poll(&mut cx);
        drop(both);
        alone.join().unwrap();
        if began.is_pending() {
            began = reader.as_mut().poll(&mut cx);
        }
        let Poll::Ready(sequence) = began else { panic!("nothing covers it any more") };
        // The reader looks at the memory, which changes then.
        drop(at_once(model.space.invalidate(pages(1, 1), Event::Unmap)));
        assert!(
            model.first.read_retry(sequence),
            "the invalidation was missed: {sequence:?} is the own sequence again"
        );
        drop(reader);
        drop(model.held);
    });
}

#[test]
fn c3_a_fence_that_is_signalled_at_any_moment_of_the_first_poll_wakes_the_owner() {
    // Nobody else waits: nobody makes up for a wake-up that is lost between the poll and the park.
    explore("the owner alone", 5, || {
        let fence = Fence::new();
        let (space, device, memory) = model(Some(fence.clone()));
        let hardware = thread::spawn(move || fence.signal());
        let guard = block_on(space.invalidate(range(), Event::Unmap));
        memory.change(&device);
        drop(guard);
        hardware.join().unwrap();
    });
}

#[test]
fn c3_with_a_budget_a_fence_that_is_signalled_at_any_moment_wakes_the_owner() {
    // The first passes stop at each pass, which is beyond the budget: the owner parks twice.
    explore("the owner alone, budget", 3, || {
        let space = AddressSpace::builder().pass_budget(0).build();
        let fences = [Fence::new(), Fence::new()];
        let devices =
            fences.clone().map(|fence| space.insert(range(), Device::new(Some(fence))).unwrap());
        let hardware = thread::spawn(move || fences.iter().for_each(Fence::signal));
        drop(block_on(space.invalidate(range(), Event::Unmap)));
        assert!(devices.iter().all(|device| device.in_flight().is_none()));
        hardware.join().unwrap();
    });
}

#[test]
fn c4_beside_a_future_that_is_alive_and_never_polled_again_a_reader_goes_on() {
    explore("one reader beside a future", 4, || {
        let fence = Fence::new();
        let (space, device, memory) = model(Some(fence.clone()));
        let mut invalidate = Box::pin(space.invalidate(range(), Event::Unmap));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(invalidate.as_mut().poll(&mut cx).is_pending());
        let hardware = thread::spawn(move || fence.signal());
        block_on(memory.mirror(&device));
        hardware.join().unwrap();
        memory.check(&device);
        assert_eq!((space.stats().lapses, space.active().len()), (1, 0));
        // It has lapsed, and starts over.
        let Poll::Ready(guard) = invalidate.as_mut().poll(&mut cx) else {
            panic!("the fence is signalled")
        };
        assert_eq!(device.state.lock().mapping, None);
        memory.change(&device);
        drop(guard);
    });
}

#[test]
fn c4_beside_a_reader_that_is_never_polled_again_another_one_takes_the_watch_over() {
    explore("the watch is taken over", 3, || {
        let fence = Fence::new();
        let (space, device, memory) = model(Some(fence.clone()));
        let mut cx = Context::from_waker(Waker::noop());
        let mut invalidate = Box::pin(space.invalidate(range(), Event::Unmap));
        assert!(invalidate.as_mut().poll(&mut cx).is_pending());
        let hardware = thread::spawn(move || fence.signal());
        // If the fence is signalled by now it drives the passes to their end, and has the watch.
        let mut forgotten = Box::pin(device.read_begin());
        assert!(forgotten.as_mut().poll(&mut cx).is_pending());
        block_on(memory.mirror(&device));
        hardware.join().unwrap();
        memory.check(&device);
        assert_eq!((space.stats().lapses, space.active().len()), (1, 0));
        drop((forgotten, invalidate));
    });
}

#[test]
fn c2_a_future_that_is_dropped_while_a_waiter_has_the_passes_leaves_a_range_that_ends() {
    // Before the hardware is done, or beside it.
    for afterwards in [true, false] {
        explore(&format!("drop beside a lease, hardware afterwards: {afterwards}"), 4, move || {
            let fence = Fence::new();
            let (space, device, memory) = model(Some(fence.clone()));
            let mut invalidate = Box::pin(space.invalidate(range(), Event::Unmap));
            assert!(invalidate.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            if !afterwards {
                fence.signal();
            }
            let reader = {
                let (memory, device) = (memory.clone(), device.clone());
                thread::spawn(move || block_on(memory.mirror(&device)))
            };
            drop(invalidate);
            if afterwards {
                fence.signal();
            }
            reader.join().unwrap();
            memory.check(&device);
            assert_eq!(
                (device.in_flight(), space.sequence().get() % 2, space.active().len()),
                (None, 0, 0)
            );
            // It ended, and did not have to lapse, if it was given up before its passes were done.
            assert!(!afterwards || space.stats().lapses == 0);
        });
    }
}

#[test]
fn r1_a_reader_that_takes_no_lock_sees_the_memory_as_the_end_left_it() {
    // The ends of one hit, of several, and of a watched one go different ways.
    for (hits, watched) in [(1, false), (2, false), (1, true)] {
        explore(&format!("a fast reader, {hits} hits, watched: {watched}"), 3, move || {
            let (space, device, memory) = model(None);
            let _other = (hits == 2).then(|| space.insert(range(), Device::new(None)).unwrap());
            let guard = at_once(space.invalidate(range(), Event::Unmap)).into_owned();
            let mut waits = Box::pin(device.read_begin());
            if watched {
                assert!(waits.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            }
            // On a thread of its own, so that loom begins with a look after the end.
            let fast = {
                let (memory, device) = (memory.clone(), device.clone());
                thread::spawn(move || {
                    if futures::FutureExt::now_or_never(device.read_begin()).is_some() {
                        assert_eq!(
                            memory.0.load(Ordering::Relaxed),
                            1,
                            "the end is seen, and not what came before it"
                        );
                    }
                })
            };
            memory.0.store(1, Ordering::Relaxed);
            drop(guard);
            fast.join().unwrap();
        });
    }
}

/// Notes whether its first pass runs.
struct Busy(Arc<AtomicU64>);

impl IntervalNotifier for Busy {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        self.0.store(1, Ordering::Relaxed);
        self.0.store(0, Ordering::Relaxed);
        Ok(None)
    }
}

#[test]
fn l1_what_a_first_pass_did_happened_before_its_notifier_is_removed_under_a_held_guard() {
    explore("remove sees the first pass", 3, || {
        let space = AddressSpace::new();
        let (busy, release) = (Arc::new(AtomicU64::new(0)), Fence::new());
        let subscription = space.insert(range(), Busy(busy.clone())).unwrap();
        let invalidation = {
            let (space, release) = (space.clone(), release.clone());
            thread::spawn(move || {
                let guard = block_on(space.invalidate(range(), Event::Unmap));
                block_on(release);
                drop(guard);
            })
        };
        drop(block_on(subscription.remove()));
        assert_eq!(
            busy.load(Ordering::Relaxed),
            0,
            "removed, and the first pass is seen as running"
        );
        release.signal();
        invalidation.join().unwrap();
    });
}

#[test]
fn memory_of_a_notifier_goes_to_the_next_one_after_all_that_was_done_with_it() {
    explore("spare memory, order", 4, || {
        let space = AddressSpace::new();
        let drops = Arc::new(RealUsize::new(0));
        let (gone, first) = (
            Arc::new(AtomicU64::new(0)),
            space.insert(range(), Counted(0, drops.clone())).unwrap(),
        );
        let memory = std::ptr::from_ref(&*first).addr();
        // On a thread of its own, so that loom begins with an insertion after the removal.
        let insertion = {
            let (space, gone) = (space.clone(), gone.clone());
            thread::spawn(move || {
                let second = space.insert(range(), Counted(1, drops)).unwrap();
                if std::ptr::from_ref(&*second).addr() == memory {
                    assert_eq!(
                        gone.load(Ordering::Relaxed),
                        1,
                        "memory is used again, and its former use is not seen"
                    );
                }
            })
        };
        let mut remove = first.remove();
        assert!(Pin::new(&mut remove).poll(&mut Context::from_waker(Waker::noop())).is_ready());
        gone.store(1, Ordering::Relaxed);
        // Now the memory is to be had.
        drop(remove);
        insertion.join().unwrap();
    });
}

#[test]
fn l5_a_device_that_is_fenced_at_any_moment_holds_up_neither_the_owner_nor_a_reader() {
    for readers in [0, 1] {
        explore(&format!("fence beside {readers} readers"), 2, move || {
            // Its fence is never signalled.
            let space = AddressSpace::new();
            let dead = Arc::new(space.insert(range(), Device::new(Some(Fence::new()))).unwrap());
            let well =
                (readers > 0).then(|| Arc::new(space.insert(range(), Device::new(None)).unwrap()));
            let reader = well.clone().map(|well| {
                thread::spawn(move || {
                    block_on(well.read_begin());
                })
            });
            let operator = {
                let dead = dead.clone();
                thread::spawn(move || {
                    dead.fence();
                })
            };
            drop(block_on(space.invalidate(range(), Event::Unmap)));
            operator.join().unwrap();
            reader.into_iter().for_each(|reader| reader.join().unwrap());
            assert!(space.active().is_empty());
        });
    }
}

#[test]
fn n2_of_many_ranges_a_reader_of_one_waits_and_one_that_is_inserted_into_a_gap_does_not() {
    explore("many ranges", 1, || {
        let fence = Fence::new();
        let (space, device, memory) = model(Some(fence.clone()));
        let set = shootdown::RangeSet::new([range(), pages(5, 1)]).unwrap();
        let reader = {
            let (memory, device) = (memory.clone(), device.clone());
            thread::spawn(move || block_on(memory.mirror(&device)))
        };
        let inserter = {
            let space = space.clone();
            thread::spawn(move || {
                let gap = space.insert(pages(3, 1), Device::new(None)).unwrap();
                at_once(gap.read_begin());
                fence.signal();
            })
        };
        let guard = block_on(space.invalidate_all(set, Event::Unmap));
        memory.change(&device);
        drop(guard);
        reader.join().unwrap();
        inserter.join().unwrap();
        memory.check(&device);
    });
}

#[test]
fn w4_a_thread_that_waits_is_woken_whenever_that_comes() {
    // `event-listener` is not loom's: what stands in for it in `src/sync.rs` has what it promises.
    explore("wait(), one wake", 6, || {
        let fence = Fence::new();
        let signals = fence.clone();
        let hardware = thread::spawn(move || signals.signal());
        PassFuture::new(fence).wait();
        hardware.join().unwrap();
    });
    explore("wait(), two wakes, one of which says nothing", 4, || {
        let fence = Fence::new();
        let (nudges, signals) = (fence.clone(), fence.clone());
        let nudging = thread::spawn(move || {
            let wakers = std::mem::take(&mut nudges.0.lock().unwrap().1);
            wakers.iter().for_each(Waker::wake_by_ref);
            // Late, and once more.
            wakers.into_iter().for_each(Waker::wake);
        });
        let hardware = thread::spawn(move || signals.signal());
        PassFuture::new(fence).wait();
        nudging.join().unwrap();
        hardware.join().unwrap();
    });
}

#[test]
fn w4_what_came_before_a_wake_is_seen_by_the_poll_after_it() {
    /// What the future and the thread that wakes it have in common.
    #[derive(Default)]
    struct Shared {
        /// Nobody waited when the thread looked, so it wakes nobody.
        late: bool,
        waiting: Option<Waker>,
    }
    explore("wait(), what came before the wake", 4, || {
        let before = Arc::new(AtomicU64::new(0));
        let shared = Arc::new(loom::sync::Mutex::new(Shared::default()));
        let waking = {
            let (before, shared) = (before.clone(), shared.clone());
            thread::spawn(move || {
                let waiting = {
                    let mut shared = shared.lock().unwrap();
                    shared.late = shared.waiting.is_none();
                    shared.waiting.take()
                };
                // Outside of the lock: only the wake can order it.
                before.store(1, Ordering::Relaxed);
                waiting.into_iter().for_each(Waker::wake);
            })
        };
        let mut polled = false;
        PassFuture::new(std::future::poll_fn(move |cx| {
            if polled {
                assert_eq!(before.load(Ordering::Relaxed), 1, "woken, and does not see why");
                return Poll::Ready(());
            }
            polled = true;
            let mut shared = shared.lock().unwrap();
            if shared.late {
                return Poll::Ready(());
            }
            shared.waiting = Some(cx.waker().clone());
            Poll::Pending
        }))
        .wait();
        waking.join().unwrap();
    });
}

#[test]
fn w2_two_threads_that_wait_end_an_invalidation() {
    explore("wait() of an invalidation and of a reader", 2, || {
        let fence = Fence::new();
        let (space, device, memory) = model(Some(fence.clone()));
        let hardware = thread::spawn(move || fence.signal());
        let reader = {
            let (memory, device) = (memory.clone(), device.clone());
            thread::spawn(move || {
                PassFuture::new(async move { memory.mirror(&device).await }).wait()
            })
        };
        let guard = space.invalidate(range(), Event::Unmap).wait();
        memory.change(&device);
        drop(guard);
        reader.join().unwrap();
        hardware.join().unwrap();
        memory.check(&device);
    });
}

#[test]
fn t2_a_signal_is_seen_with_all_that_came_before_it() {
    explore("timeline, one signal", 6, || {
        let (timeline, before) = (Timeline::new(), Arc::new(AtomicU64::new(0)));
        let device = {
            let (timeline, before) = (timeline.clone(), before.clone());
            thread::spawn(move || {
                before.store(1, Ordering::Relaxed);
                timeline.signal(2);
            })
        };
        block_on(timeline.reached(1));
        assert_eq!(before.load(Ordering::Relaxed), 1);
        device.join().unwrap();
    });
}

#[test]
fn t2_a_look_that_need_not_wait_sees_what_came_before_the_signal() {
    explore("timeline, a look without the lock", 6, || {
        let (timeline, before) = (Timeline::new(), Arc::new(AtomicU64::new(0)));
        // On a thread of its own, so that loom begins with a look after the signal.
        let looks = {
            let (timeline, before) = (timeline.clone(), before.clone());
            thread::spawn(move || {
                if futures::FutureExt::now_or_never(timeline.reached(1)).is_some() {
                    assert_eq!(before.load(Ordering::Relaxed), 1);
                }
            })
        };
        before.store(1, Ordering::Relaxed);
        timeline.signal(1);
        looks.join().unwrap();
    });
}

#[test]
fn t2_who_has_the_value_sees_what_came_before_its_signal() {
    explore("timeline, the value", 6, || {
        let (timeline, before) = (Timeline::new(), Arc::new(AtomicU64::new(0)));
        // On a thread of its own, so that loom begins with a look after the signal.
        let looks = {
            let (timeline, before) = (timeline.clone(), before.clone());
            thread::spawn(move || {
                if timeline.value() == 1 {
                    assert_eq!(before.load(Ordering::Relaxed), 1);
                }
            })
        };
        before.store(1, Ordering::Relaxed);
        timeline.signal(1);
        looks.join().unwrap();
    });
}

#[test]
fn t3_no_wake_up_is_lost_between_two_signals() {
    // Who does not get the lock leaves its waiter to the other, or to the one that registers.
    explore("timeline, two signals, two waiters", 2, || {
        let timeline = Timeline::new();
        let first = {
            let timeline = timeline.clone();
            thread::spawn(move || timeline.signal(1))
        };
        let second = {
            let timeline = timeline.clone();
            thread::spawn(move || timeline.signal(2))
        };
        block_on(async { futures::join!(timeline.reached(2), timeline.reached(1)) });
        first.join().unwrap();
        second.join().unwrap();
        assert_eq!(timeline.value(), 2);
    });
    explore("timeline, two signals, two threads that wait", 2, || {
        let timeline = Timeline::new();
        let other = {
            let timeline = timeline.clone();
            thread::spawn(move || timeline.reached(1).wait())
        };
        let signals = {
            let timeline = timeline.clone();
            thread::spawn(move || {
                timeline.signal(1);
                timeline.signal(2);
            })
        };
        timeline.reached(2).wait();
        other.join().unwrap();
        signals.join().unwrap();
    });
}

#[test]
fn t4_a_waiter_that_goes_leaves_the_others_their_wake_up() {
    explore("timeline, signal against drop", 3, || {
        let timeline = Timeline::new();
        let mut goes = Box::pin(timeline.reached(1));
        assert!(goes.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let device = {
            let timeline = timeline.clone();
            thread::spawn(move || timeline.signal(1))
        };
        let dropping = thread::spawn(move || drop(goes));
        block_on(timeline.reached(1));
        device.join().unwrap();
        dropping.join().unwrap();
    });
}

/// The notifier of a reader that takes no lock, such as `read_unchanged` of
/// `crates/shootdown-lease`: with the fence that the writer of a sequence lock has.
struct Fenced;

impl IntervalNotifier for Fenced {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        fence(Ordering::Release);
        Ok(None)
    }
}

#[test]
fn r2_a_reader_without_a_lock_that_fences_accepts_nothing_from_within_a_change() {
    explore("a reader without a lock", 3, || {
        let space = AddressSpace::new();
        let reader = Arc::new(space.insert(range(), Fenced).unwrap());
        let memory = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let changer = {
            let (space, memory) = (space.clone(), memory.clone());
            thread::spawn(move || {
                let guard = block_on(space.invalidate(range(), Event::Clear));
                memory.iter().for_each(|word| word.store(1, Ordering::Relaxed));
                drop(guard);
            })
        };
        let seen = block_on(reader.read_begin());
        let contents = [0, 1].map(|at| memory[at].load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        if !reader.read_retry(seen) {
            assert_eq!(contents[0], contents[1], "contents from within a change");
        }
        changer.join().unwrap();
    });
}
