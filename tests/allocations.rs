//! What the library allocates: counted, not timed. One test, because the count is the process's.
#![cfg(all(feature = "std", not(any(loom, shuttle))))]
#![allow(missing_docs, clippy::print_stdout)]

use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, Subscription,
    Timeline, WouldBlock,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::task::{Context, Poll};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicI64 = AtomicI64::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Clone, Copy)]
enum Kind {
    Single,
    Ready,
    PendOnce,
}

struct Device(Kind);

struct PendOnce(bool);

impl Future for PendOnce {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl IntervalNotifier for Device {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(match self.0 {
            Kind::Single => None,
            Kind::Ready => Some(PassFuture::new(async {})),
            Kind::PendOnce => Some(PassFuture::new(PendOnce(false))),
        })
    }
}

/// Allocations of one invalidation of `devices` notifiers, once the space has its working memory.
fn allocations(kind: Kind, devices: usize) -> u64 {
    let space = AddressSpace::new();
    let range = AddressRange::new(0x1000, 0x1000).unwrap();
    let _devices: Vec<Subscription<Device>> =
        (0..devices).map(|_| space.insert(range, Device(kind)).unwrap()).collect();
    let invalidate = || {
        futures::executor::block_on(async {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            drop(space.invalidate(range, Event::Unmap).await);
            ALLOCATIONS.load(Ordering::Relaxed) - before
        })
    };
    invalidate();
    let counts = [invalidate(), invalidate(), invalidate()];
    *counts.iter().max().unwrap()
}

/// Bytes for each of `n` registered notifiers, beside what the driver itself needs.
fn bytes(n: u64, ascending: bool) -> f64 {
    let space = AddressSpace::new();
    let mut starts: Vec<u64> = (0..n).collect();
    if !ascending {
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        for at in (1..starts.len()).rev() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            starts.swap(at, random as usize % (at + 1));
        }
    }
    let mut subscriptions = Vec::with_capacity(n as usize);
    let before = BYTES.load(Ordering::Relaxed);
    for start in starts {
        let range = AddressRange::new(start * 0x2000, 0x1000).unwrap();
        // The driver is of size zero: all bytes are the library's.
        subscriptions.push(space.insert(range, Empty).unwrap());
    }
    (BYTES.load(Ordering::Relaxed) - before) as f64 / n as f64
}

/// Allocations of a reader that collides, the first time and the second.
fn collisions() -> [u64; 2] {
    let space = AddressSpace::new();
    let range = AddressRange::new(0x1000, 0x1000).unwrap();
    let device = space.insert(range, Device(Kind::Single)).unwrap();
    let collide = || {
        futures::executor::block_on(async {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let sequence = device.read_begin().await;
            drop(space.invalidate(range, Event::Unmap).await);
            assert!(device.read_retry(sequence));
            ALLOCATIONS.load(Ordering::Relaxed) - before
        })
    };
    drop(futures::executor::block_on(space.invalidate(range, Event::Unmap)));
    [collide(), collide()]
}

/// Notifiers of three sizes that come and go: allocations of one that follows another of its size,
/// and whether all bytes are free again afterwards.
fn comings_and_goings() {
    struct Large([u64; 9]);

    impl IntervalNotifier for Large {
        fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
            Ok(None)
        }
    }

    let range = AddressRange::new(0x1000, 0x1000).unwrap();
    // What the thread keeps for ever is allocated.
    futures::executor::block_on(async {});
    let bytes = BYTES.load(Ordering::Relaxed);
    {
        let space = AddressSpace::new();
        let count = |work: &dyn Fn()| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            work();
            ALLOCATIONS.load(Ordering::Relaxed) - before
        };
        let small = || {
            futures::executor::block_on(space.insert(range, Device(Kind::Ready)).unwrap().remove());
        };
        let large = || {
            let removed =
                futures::executor::block_on(space.insert(range, Large([7; 9])).unwrap().remove());
            assert_eq!(removed.0, [7; 9]);
        };
        let dropped = || drop(space.insert(range, Large([3; 9])).unwrap().remove());
        count(&small);
        assert_eq!([count(&small), count(&small)], [0, 0], "in the memory of the one before");
        assert_eq!([count(&large), count(&large)], [1, 0], "another size");
        assert_eq!(
            [count(&dropped), count(&large), count(&large)],
            [0, 1, 0],
            "a future that nobody polled leaves no memory, and room for the next"
        );
        let empty = || {
            futures::executor::block_on(space.insert(range, Empty).unwrap().remove());
        };
        assert_eq!([count(&empty), count(&small), count(&large)], [1, 1, 1], "one size at a time");
        // Of two at the same time the memory of one is kept.
        let two: Vec<_> = (0..2).map(|_| space.insert(range, Empty).unwrap().remove()).collect();
        for remove in two {
            futures::executor::block_on(remove);
        }
        assert_eq!(count(&empty), 0);
        // The last one outlives the handle of its space.
        let last = space.insert(range, Device(Kind::Single)).unwrap().remove();
        drop(space);
        futures::executor::block_on(last);
    }
    assert_eq!(BYTES.load(Ordering::Relaxed), bytes, "all memory is free again");
}

/// What many invalidations were active with at once.
#[derive(Clone, Copy, Debug)]
enum Burst {
    /// Held guards of a range that a notifier watches.
    Guards,
    /// Passes that are pending, of futures that were dropped.
    Passes,
}

/// Bytes of the working memory of a space: after one invalidation, after so many at once, and after
/// as many again.
fn working_memory(kind: Burst, burst: usize) -> [i64; 3] {
    use futures::FutureExt;
    use futures::channel::oneshot::{Sender, channel};
    use futures::executor::block_on;

    struct Fences(Mutex<Vec<Sender<()>>>);

    impl IntervalNotifier for Fences {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            let (open, opens) = channel();
            self.0.lock().unwrap().push(open);
            Ok(Some(PassFuture::new(opens.map(drop))))
        }
    }

    let [watched, fenced] =
        [0x1000, 0x10_0000].map(|start| AddressRange::new(start, 0x1000).unwrap());
    let space = AddressSpace::new();
    let _single = space.insert(watched, Device(Kind::Single)).unwrap();
    let fences = space.insert(fenced, Fences(Mutex::default())).unwrap();
    let before = BYTES.load(Ordering::Relaxed);
    [1, burst, burst].map(|count| {
        match kind {
            Burst::Guards => drop(
                (0..count)
                    .map(|_| block_on(space.invalidate(watched, Event::Unmap)))
                    .collect::<Vec<_>>(),
            ),
            Burst::Passes => {
                for _ in 0..count {
                    assert!(
                        space.invalidate(fenced, Event::Unmap).now_or_never().is_none(),
                        "its pass waits for its fence"
                    );
                }
                for open in std::mem::take(&mut *fences.0.lock().unwrap()) {
                    open.send(()).expect("the pass is pending");
                }
                block_on(space.drain());
            }
        }
        assert!(space.active().is_empty());
        BYTES.load(Ordering::Relaxed) - before
    })
}

/// Allocations of a pass that waits for a timeline: to make it, to find it ready, to wait; and
/// whether all that waiters left is free again.
fn fences() {
    let timeline = Timeline::new();
    timeline.signal(1);
    let count = |work: &mut dyn FnMut()| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        work();
        ALLOCATIONS.load(Ordering::Relaxed) - before
    };
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let [ready, waits] = [1, 2].map(|number| PassFuture::new(timeline.reached(number)));
    let (mut ready, mut waits) = (std::pin::pin!(Some(ready)), std::pin::pin!(Some(waits)));
    assert_eq!(
        count(&mut || drop(PassFuture::new(timeline.reached(2)))),
        0,
        "a pass holds it in place"
    );
    assert_eq!(
        count(&mut || assert!(ready.as_mut().as_pin_mut().unwrap().poll(&mut cx).is_ready())),
        0,
        "it is reached"
    );
    // The task's waker, and the first node of the tree.
    assert_eq!(
        count(&mut || assert!(waits.as_mut().as_pin_mut().unwrap().poll(&mut cx).is_pending())),
        2,
        "it waits"
    );
    assert_eq!(count(&mut || timeline.signal(2)), 0, "a signal");
    waits.set(None);
    let bytes = BYTES.load(Ordering::Relaxed);
    for number in 0..10_000 {
        let mut waits: Vec<_> = (0..10).map(|more| timeline.reached(3 + number + more)).collect();
        for reached in &mut waits {
            assert!(Pin::new(reached).poll(&mut cx).is_pending());
        }
    }
    assert_eq!(BYTES.load(Ordering::Relaxed), bytes, "waiters that have gone leave nothing");
}

/// Allocations of waits of a thread, the first and the second.
fn threads_that_wait() -> [u64; 2] {
    let space = AddressSpace::new();
    let range = AddressRange::new(0x1000, 0x1000).unwrap();
    let _devices =
        [Kind::Ready, Kind::Single].map(|kind| space.insert(range, Device(kind)).unwrap());
    drop(futures::executor::block_on(space.invalidate(range, Event::Unmap)));
    [(); 2].map(|()| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        drop(space.invalidate(range, Event::Unmap).wait());
        ALLOCATIONS.load(Ordering::Relaxed) - before
    })
}

struct Empty;

impl IntervalNotifier for Empty {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        Ok(None)
    }
}

#[test]
fn allocations_and_bytes_are_within_their_bounds() {
    // A pass is told to the recorder with its notifier's name.
    let told = u64::from(cfg!(feature = "metrics"));
    for devices in [1, 16, 256] {
        let told = told * devices as u64;
        assert_eq!(allocations(Kind::Single, devices), 0, "single-pass, {devices} notifiers");
        assert_eq!(
            allocations(Kind::Ready, devices),
            told,
            "passes ready at their first poll, {devices} notifiers"
        );
        let pending = allocations(Kind::PendOnce, devices);
        println!("{devices} passes that pend: {pending} allocations");
        assert!(
            pending <= devices as u64 + 2 + told,
            "{pending} allocations for {devices} passes that pend"
        );
    }
    assert_eq!(collisions(), [1, 0], "a notifier's counters are made once");
    comings_and_goings();
    fences();
    assert_eq!(threads_that_wait(), [1 + told, told], "what a thread sleeps on is made once");
    let burst = if cfg!(debug_assertions) { 10_000 } else { 100_000 };
    for (kind, each) in [(Burst::Guards, 0), (Burst::Passes, 0)] {
        // What the process keeps for ever is allocated.
        working_memory(kind, 1);
        let [one, many, again] = working_memory(kind, burst);
        println!(
            "{kind:?}: a space works in {one} bytes after one, in {many} after {burst} at once"
        );
        // There are 32 places for active invalidations, each of which keeps its working memory. The
        // index of those that were parked keeps its nodes, too: up to 64 bytes for each of the most
        // at once.
        let most = 32 * one + burst as i64 * each;
        assert!(many <= most, "{many} bytes after {burst} {kind:?}, {one} after one");
        assert!(again <= most, "{again} bytes after the same again");
    }
    // Up to four million where that takes seconds: without optimization a million are enough of a
    // wait.
    let most = if cfg!(debug_assertions) { 1_000_000 } else { 4_000_000 };
    for n in [100, 10_000, 1_000_000, 4_000_000].into_iter().filter(|n| *n <= most) {
        let [ascending, random] = [true, false].map(|ascending| bytes(n, ascending));
        println!(
            "{n} notifiers: {ascending:.1} bytes each, {random:.1} when they came in random order"
        );
        assert!(
            ascending.max(random) <= 128.0,
            "{ascending} and {random} bytes for each of {n} notifiers"
        );
    }
}
