//! What a delivery owes whom: the time of a discard, what was read when it fails, readers that
//! depend on nobody.

use crate::memory::Raw;
use crate::never_stale::read_during;
use crate::uffd::{Running, eventually, is_readable, log, no_fork};
use futures::FutureExt;
use futures::executor::block_on;
use rustix::mm::Advice;
use shootdown::source::{Deliveries, Fork, Uffd};
use shootdown::{
    AddressRange, AddressSpace, IntervalNotifier, Invalidation, PassFuture, Subscription,
    WouldBlock,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, RawWakerVTable, Waker};
use std::thread;
use std::time::{Duration, Instant};

crate::list![
    f1_a_waker_that_cannot_be_cloned_loses_nothing_that_was_read,
    a_delivery_clears_the_descriptor_and_one_that_is_never_polled_rings_again,
    a_loop_of_ones_own_learns_that_it_is_to_stop,
    m5_a_discard_has_all_of_its_time_whatever_became_of_an_earlier_one,
    c3_who_waits_for_pages_looks_himself_while_the_delivery_waits_for_a_lock,
    who_delivers_rests_while_pages_stay,
    who_delivers_sleeps_while_a_device_takes_its_time,
    who_delivers_rests_while_he_looks_at_pages_of_another_delivery,
    a_change_gives_an_earlier_delivery_some_time,
    m5_pages_that_stay_are_looked_at_less_and_less_often,
    r1_a_reader_waits_for_those_closings_of_the_gate_that_it_finds_and_for_no_later_ones,
    n4_what_was_read_is_told_of_as_one_and_flushed_once,
    l2_changes_back_to_back_hold_up_no_reader_of_another_range,
];

/// A waker whose clone panics.
fn uncloneable() -> Waker {
    static VTABLE: RawWakerVTable =
        RawWakerVTable::new(|_| panic!("the clone of a waker fails"), |_| {}, |_| {}, |_| {});
    // SAFETY: nothing is behind the pointer, and none of the functions looks there.
    unsafe { Waker::new(std::ptr::null(), &VTABLE) }
}

fn a_delivery_clears_the_descriptor_and_one_that_is_never_polled_rings_again() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    let (driver, told) = log(&space, memory.range());
    assert!(!is_readable(&deliveries));
    read_during(&mut reader, || memory.unmap());
    assert!(is_readable(&deliveries));
    let never_polled = deliveries.deliver();
    assert!(!is_readable(&deliveries), "the call clears it");
    drop(never_polled);
    assert!(is_readable(&deliveries), "what was read is there still");
    assert_eq!(block_on(deliveries.deliver()), Ok(1));
    assert!(!is_readable(&deliveries));
    assert_eq!(told.lock().unwrap().len(), 1);
    drop(driver);
}

fn a_loop_of_ones_own_learns_that_it_is_to_stop() {
    let _fork = no_fork();
    let (uffd, _reader, mut deliveries) = Uffd::open(&AddressSpace::new()).unwrap();
    assert!(!deliveries.is_stopped() && !is_readable(&deliveries));
    uffd.stop();
    assert!(
        deliveries.is_stopped() && is_readable(&deliveries),
        "who waits for the descriptor is woken"
    );
    assert_eq!(block_on(deliveries.deliver()), Ok(0));
}

fn f1_a_waker_that_cannot_be_cloned_loses_nothing_that_was_read() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(2);
    let _watch = uffd.watch(memory.range()).unwrap();
    // The first has a pass that is pending when it is told.
    let (_open, closed) = crate::never_stale::gate();
    let _slow = space.insert(memory.part(0, 1).range(), crate::never_stale::Slow(closed)).unwrap();
    let driver = log(&space, memory.part(1, 1).range()).0;
    let before = block_on(driver.read_begin());
    read_during(&mut reader, || (0..2).for_each(|page| memory.part(page, 1).unmap()));
    let mut delivery = Box::pin(deliveries.deliver());
    let waker = uncloneable();
    let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = delivery.as_mut().poll(&mut Context::from_waker(&waker));
    }));
    assert!(polled.is_err());
    drop(delivery);
    assert!(is_readable(&deliveries), "who waits for the descriptor is told again");
    assert!(driver.read_begin().now_or_never().is_none(), "nobody has been told");
    let _ = deliveries.deliver().now_or_never();
    assert!(driver.read_retry(before), "the memory has gone");
}

fn m5_a_discard_has_all_of_its_time_whatever_became_of_an_earlier_one() {
    let _fork = no_fork();
    let (space, time) = (AddressSpace::new(), Duration::from_millis(100));
    let (uffd, mut reader, mut deliveries) = Uffd::builder().settle(time).open(&space).unwrap();
    let memory = Raw::map(2);
    memory.write(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    let readers = log(&space, memory.range()).0;
    read_during(&mut reader, || memory.part(0, 1).discard(Advice::LinuxFree));
    // Told, and then nobody looks at its page until its time is over.
    assert!(deliveries.deliver().now_or_never().is_none());
    let began = Instant::now();
    while began.elapsed() <= time {
        thread::yield_now();
    }
    read_during(&mut reader, || memory.discard(Advice::LinuxFree));
    let mut delivery = Box::pin(deliveries.deliver());
    assert!(delivery.as_mut().now_or_never().is_none(), "the pages are still there");
    assert!(readers.read_begin().now_or_never().is_none(), "pages that are about to go are found");
    memory.write(2);
    block_on(delivery).unwrap();
}

/// Its pass is ready to go on twice, and then waits for a lock of the program.
struct Locks {
    lock: Arc<Mutex<()>>,
    waits: Arc<AtomicBool>,
}

impl IntervalNotifier for Locks {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let (lock, waits, mut polls) = (self.lock.clone(), self.waits.clone(), 0);
        Ok(Some(PassFuture::new(std::future::poll_fn(move |cx| {
            polls += 1;
            if polls < 3 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            waits.store(true, Ordering::Release);
            drop(lock.lock());
            Poll::Ready(())
        }))))
    }
}

fn c3_who_waits_for_pages_looks_himself_while_the_delivery_waits_for_a_lock() {
    let _fork = no_fork();
    let source = Running::of(
        &AddressSpace::new(),
        Uffd::builder().fork(Fork::Ignore).settle(Duration::from_millis(100)),
    );
    let memory = Raw::map(9);
    memory.write(1);
    let (unmapped, discarded) = (memory.part(0, 1), memory.part(8, 1));
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (lock, waits) = (Arc::<Mutex<()>>::default(), Arc::<AtomicBool>::default());
    let _locks = source
        .space
        .insert(unmapped.range(), Locks { lock: lock.clone(), waits: waits.clone() })
        .unwrap();
    let readers = log(&source.space, discarded.range()).0;
    let held = lock.lock().unwrap();
    discarded.discard(Advice::LinuxFree);
    unmapped.unmap();
    eventually("the delivery waits", || waits.load(Ordering::Acquire));
    let alone = thread::scope(|scope| {
        let reading = scope.spawn(|| block_on(readers.read_begin()));
        let began = Instant::now();
        while !reading.is_finished() && began.elapsed() < Duration::from_secs(10) {
            thread::yield_now();
        }
        let alone = reading.is_finished();
        drop(held);
        alone
    });
    assert!(alone, "the time of the discard is over, and its reader waits for the delivery");
}

fn who_delivers_rests_while_pages_stay() {
    let _fork = no_fork();
    let (space, time) = (AddressSpace::new(), Duration::from_millis(500));
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().fork(Fork::Ignore).settle(time).open(&space).unwrap();
    let reading = thread::spawn(move || reader.run().unwrap());
    let delivering = thread::spawn(move || {
        deliveries.run().unwrap();
        let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::try_from(used).unwrap()
    });
    let memory = Raw::map(1);
    memory.write(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    memory.discard(Advice::LinuxFree);
    eventually("the time of the discard is over", || uffd.stats().unsettled == 1);
    uffd.stop();
    reading.join().unwrap();
    let used = delivering.join().unwrap();
    println!("{used:?} of {time:?}");
    assert!(used < time * 2 / 5, "{used:?} of {time:?}");
}

/// The first look comes after a millisecond.
fn m5_pages_that_stay_are_looked_at_less_and_less_often() {
    let _fork = no_fork();
    let (space, soon) = (AddressSpace::new(), Duration::from_nanos(1));
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().fork(Fork::Ignore).settle(soon).open(&space).unwrap();
    let memory = Raw::map(1);
    memory.write(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    read_during(&mut reader, || memory.discard(Advice::LinuxFree));
    block_on(deliveries.deliver()).unwrap();
    assert_eq!(uffd.stats().unsettled, 1);
    eventually("there is more than a millisecond between two looks", || {
        let next = deliveries.next_look().expect("the pages stay");
        if next.is_zero() {
            block_on(deliveries.deliver()).unwrap();
        }
        next > Duration::from_millis(1)
    });
}

/// Waits until a thread sleeps in `poll`, with a limit or without one.
fn sleeps(thread: libc::pid_t, limited: bool) {
    let path = format!("/proc/self/task/{thread}/syscall");
    if std::fs::read_to_string(&path).is_err() {
        println!("left out: the system does not tell in which call a thread is");
        return;
    }
    eventually("the thread sleeps as it should", || {
        // The number of the call, and its arguments: the third is where the limit is.
        let call = std::fs::read_to_string(&path).unwrap_or_default();
        let mut words = call.split(' ');
        words.next() == Some(&libc::SYS_ppoll.to_string())
            && words.nth(2).is_some_and(|limit| (limit != "0x0") == limited)
    });
}

/// Delivers on a thread of its own, which is named.
fn delivering(mut deliveries: Deliveries) -> (thread::JoinHandle<()>, libc::pid_t) {
    let (send, receive) = std::sync::mpsc::channel();
    let delivering = thread::spawn(move || {
        // SAFETY: a number.
        send.send(unsafe { libc::gettid() }).unwrap();
        deliveries.run().unwrap();
    });
    (delivering, receive.recv().unwrap())
}

fn who_delivers_sleeps_while_a_device_takes_its_time() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, deliveries) = Uffd::builder().fork(Fork::Ignore).open(&space).unwrap();
    let reading = thread::spawn(move || reader.run().unwrap());
    let (delivering, thread) = delivering(deliveries);
    let memory = Raw::map(1);
    memory.write(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    let (open, closed) = crate::never_stale::gate();
    let _slow = space.insert(memory.range(), crate::never_stale::Slow(closed)).unwrap();
    memory.discard(Advice::LinuxDontNeed);
    eventually("the device is told", || !space.active().is_empty());
    sleeps(thread, false);
    open.send(()).unwrap();
    uffd.stop();
    reading.join().unwrap();
    delivering.join().unwrap();
}

/// Its pass reads a range of another notifier.
struct Reads(Arc<Subscription<crate::uffd::Log>>);

impl IntervalNotifier for Reads {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let other = self.0.clone();
        Ok(Some(PassFuture::new(async move { _ = other.read_begin().await })))
    }
}

fn who_delivers_rests_while_he_looks_at_pages_of_another_delivery() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().fork(Fork::Ignore).settle(Duration::from_secs(3600)).open(&space).unwrap();
    let (discarded, unmapped) = (Raw::map(1), Raw::map(1));
    discarded.write(1);
    let _watches = [uffd.watch(discarded.range()).unwrap(), uffd.watch(unmapped.range()).unwrap()];
    read_during(&mut reader, || discarded.discard(Advice::LinuxFree));
    assert!(deliveries.deliver().now_or_never().is_none(), "given up, and left to the space");
    let other = Arc::new(log(&space, discarded.range()).0);
    let _reads = space.insert(unmapped.range(), Reads(other)).unwrap();
    let reading = thread::spawn(move || reader.run().unwrap());
    let (delivering, thread) = delivering(deliveries);
    unmapped.unmap();
    sleeps(thread, true);
    discarded.write(2);
    eventually("both are over", || space.active().is_empty());
    uffd.stop();
    reading.join().unwrap();
    delivering.join().unwrap();
}

fn a_change_gives_an_earlier_delivery_some_time() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    read_during(&mut reader, || memory.unmap());
    let mut time = || {
        let began = Instant::now();
        assert_eq!(reader.read().unwrap(), 0);
        began.elapsed()
    };
    assert!(time() >= Duration::from_micros(50), "nothing is being delivered");
    block_on(deliveries.deliver()).unwrap();
    // A driver has been told, and the gate stays closed.
    let _pauses = [(); 100].map(|()| space.pause());
    assert!(time() >= Duration::from_millis(5), "the delivery goes on");
}

fn r1_a_reader_waits_for_those_closings_of_the_gate_that_it_finds_and_for_no_later_ones() {
    let space = AddressSpace::new();
    let reader = log(&space, AddressRange::ALL).0;
    let begins = || {
        let mut read = Box::pin(reader.read_begin());
        assert!(read.as_mut().now_or_never().is_none(), "the gate is closed");
        read
    };
    let first = space.pause();
    let mut one = begins();
    let second = space.pause();
    let mut two = begins();
    drop((space.pause(), space.pause()));
    assert!(one.as_mut().now_or_never().is_none());
    drop(first);
    let sequence = one.now_or_never().expect("it found the first only");
    assert!(reader.read_retry(sequence), "the second is not over");
    let third = space.pause();
    for _ in 0..3 {
        drop(space.pause());
        assert!(two.as_mut().now_or_never().is_none(), "it found the second");
    }
    drop(second);
    two.now_or_never().expect("what it found is over");
    let mut three = begins();
    drop(third);
    let sequence = three.as_mut().now_or_never().expect("the gate is open");
    assert!(!reader.read_retry(sequence));
}

/// Takes some time in its first pass.
struct Slow;

impl IntervalNotifier for Slow {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let began = Instant::now();
        while began.elapsed() < Duration::from_micros(300) {
            thread::yield_now();
        }
        Ok(None)
    }
}

fn l2_changes_back_to_back_hold_up_no_reader_of_another_range() {
    let _fork = no_fork();
    let source = Running::of(&AddressSpace::new(), Uffd::builder().fork(Fork::Ignore));
    let (memory, elsewhere) = (Raw::map(3), Raw::map(1));
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let _slow = source.space.insert(memory.range(), Slow).unwrap();
    let readers = log(&source.space, elsewhere.range()).0;
    let stop = AtomicBool::new(false);
    let answers = thread::scope(|scope| {
        for page in 0..3 {
            let (stop, page) = (&stop, memory.part(page, 1));
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    page.discard(Advice::LinuxDontNeed);
                }
            });
        }
        let reading = scope.spawn(|| {
            eventually("the drivers are behind", || source.uffd.stats().events > 200);
            let mut answers = 0;
            while answers < 5 && !stop.load(Ordering::Relaxed) {
                block_on(readers.read_begin());
                answers += 1;
            }
            answers
        });
        let began = Instant::now();
        while !reading.is_finished() && began.elapsed() < Duration::from_secs(10) {
            thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        reading.join().unwrap()
    });
    assert_eq!(answers, 5, "while the changes went on");
}

/// Counts the flushes, and notes the ranges.
#[derive(Default)]
struct Flushes(Mutex<Vec<Vec<AddressRange>>>);

impl IntervalNotifier for Flushes {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        self.0.lock().unwrap().push(invalidation.ranges().to_vec());
        Ok(None)
    }
}

fn n4_what_was_read_is_told_of_as_one_and_flushed_once() {
    const PAGES: usize = 200;
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let (gone, discarded) = (Raw::map(PAGES), Raw::map(PAGES));
    discarded.write(1);
    let _watches = [uffd.watch(gone.range()).unwrap(), uffd.watch(discarded.range()).unwrap()];
    let driver = space.insert(AddressRange::ALL, Flushes::default()).unwrap();
    let of_a_part = space.insert(gone.part(0, 3).range(), Flushes::default()).unwrap();
    let every_other = || (0..PAGES).step_by(2);
    read_during(&mut reader, || {
        for page in every_other() {
            gone.part(page, 1).unmap();
            discarded.part(page, 1).discard(Advice::LinuxDontNeed);
        }
    });
    assert_eq!(block_on(deliveries.deliver()), Ok(PAGES), "each change is counted");
    let mut told = std::mem::take(&mut *driver.0.lock().unwrap());
    // Two kinds, and of the first one the two pages that concern both drivers.
    assert_eq!(told.iter().map(Vec::len).collect::<Vec<_>>(), [2, PAGES / 2, PAGES / 2 - 2]);
    let of = |memory: &Raw, pages: &mut dyn Iterator<Item = usize>| {
        pages.map(|page| memory.part(page, 1).range()).collect()
    };
    let gone_of_both = of(&gone, &mut every_other().take(2));
    assert_eq!(*of_a_part.0.lock().unwrap(), [gone_of_both]);
    told.sort_by_key(Vec::len);
    let expected: [Vec<AddressRange>; 2] =
        [of(&gone, &mut every_other().skip(2)), of(&discarded, &mut every_other())];
    assert_eq!(told[1..], expected);
}
