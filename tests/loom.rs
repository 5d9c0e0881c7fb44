//! Every interleaving of small models, explored by loom: `ci/loom.sh`.
//!
//! The library's own locks and atomics are loom's here (`src/sync.rs`); `FuturesUnordered` is one step. Each test prints how many
//! executions it explored. `tests/README.md` lists which mutations of the library these models find.
#![cfg(loom)]
#![allow(missing_docs, clippy::print_stdout)]

use loom::future::block_on;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use shootdown::{AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize as RealUsize;
use std::task::{Context, Poll};

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
    AddressRange::new(0x1000, 0x1000).unwrap()
}

/// A fence of the device: a flag and the wakers that wait for it.
#[derive(Clone)]
struct Fence(Arc<loom::sync::Mutex<(bool, Vec<std::task::Waker>)>>);

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
        wakers.into_iter().for_each(std::task::Waker::wake);
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
    /// The value that the device may still use although the page table does not map it, until a pass is done.
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
    fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        {
            let mut state = self.state.lock_for(invalidation);
            // What an earlier invalidation zapped may still be in flight (O6): every pass waits for all of it.
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
    async fn mirror(&self, subscription: &shootdown::Subscription<Device>) {
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

type Model = (AddressSpace, Arc<shootdown::Subscription<Device>>, Arc<Memory>);

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
    fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
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
    // The first removal fills the place of the spare memory, the others find it filled, reserved or empty.
    for polled in [true, false] {
        explore(&format!("spare memory, polled: {polled}"), 4, move || {
            let (space, drops) = (AddressSpace::new(), Arc::new(RealUsize::new(0)));
            let come_and_go = move |space: &AddressSpace, number: u64, drops: &Arc<RealUsize>| {
                let remove = space.insert(range(), Counted(number, drops.clone())).unwrap().remove();
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
                if let Poll::Ready(guard) = invalidate.as_mut().poll(&mut Context::from_waker(&waker)) {
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
    // A budget of one: the first pass is put off, the second awaited before the third is called (B4).
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
            Ok(subscription) => assert!(subscription.sequence().get() >= 3, "inserted before the release and not called"),
            Err(refused) => drop(refused.into_notifier()),
        }
        assert!(space.is_released());
    });
}

/// What userfaultfd does: the memory changes first, and who changed it goes on as soon as the monitor has heard of it.
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
            assert!(!device.read_retry(began), "the reader began before the invalidation that it should have waited for");
            assert!(began.get() >= 3, "the first pass has not run");
        }
        monitor.join().unwrap();
        memory.check(&device);
    });
}

/// The other half: a reader that began before looks at the memory when somebody else is using it already.
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
        assert!(!accepted || seen == 0 || began.get() >= 3, "accepted what belongs to somebody else");
        monitor.join().unwrap();
    });
}

/// The word of a closed notifier, read without a lock beside a first pass that sets it, an end that uncovers it and a close.
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
        let invalidator = thread::spawn(move || drop(block_on(space.invalidate(range(), Event::Unmap))));
        let began = device.sequence();
        let was_closed = closed.load(Ordering::Acquire) == 1;
        assert!(device.read_retry(began) || !was_closed, "accepted after the close");
        closer.join().unwrap();
        invalidator.join().unwrap();
        // Whoever was last, the close or the end of the invalidation.
        assert!(device.read_retry(block_on(device.read_begin())), "accepted with a sequence from after the close");
    });
}
