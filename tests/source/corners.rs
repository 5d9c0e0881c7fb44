//! Corners that a review found: memory that grows or moves, rings that overflow, deliveries that
//! overlap, storms, and futures of which a child of `fork` has copies.

use crate::forks::{exit_code, fork};
use crate::memory::{PAGE, Raw};
use crate::never_stale::{Copying, events_during, mirror, read_during};
use crate::uffd::{Running, eventually, log, no_fork};
use futures::FutureExt;
use futures::executor::block_on;
use rustix::mm::Advice;
use shootdown::cache::{Device, RegistrationCache, StillRegistered};
use shootdown::source::{Deliveries, Fork, OwnedMapping, Reader, Uffd};
use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, Subscription,
    WouldBlock,
};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::thread;
use std::time::{Duration, Instant};

crate::list![
    m3_memory_that_grew_in_place_is_not_watched_behind_the_reader,
    m3_memory_whose_move_was_not_delivered_is_not_watched_behind_the_reader,
    m5_a_discard_of_moved_memory_is_waited_for,
    m5_a_discard_that_found_the_ring_full_is_waited_for,
    m5_marks_outlive_the_watch_that_the_driver_drops_when_it_is_told,
    m5_a_page_that_came_after_the_event_is_not_waited_for,
    m5_a_page_that_was_written_after_its_discard_is_not_waited_for_where_a_watch_was_given_up,
    m5_who_waits_on_a_thread_that_has_delivered_before_looks_at_each_poll,
    m5_a_later_discard_of_the_same_pages_ends_the_wait_of_the_earlier_one,
    m5_every_delivery_looks_at_pages_whose_time_was_used_up,
    m5_who_waits_for_pages_rests_after_some_looks,
    m5_what_was_waited_for_leaves_nothing_behind,
    m5_who_waits_for_pages_refuses_nobody_elses_invalidation,
    m5_a_storm_of_discards_holds_up_no_reader_of_another_range,
    two_deliveries_at_once_open_the_gate_when_both_have_told_everybody,
];

crate::list![fn isolated_tests:
    m8_what_was_moved_or_has_grown_is_in_the_child_once_nobody_watches_it,
    m4_futures_that_a_child_polls_and_drops_hang_nobody,
];

/// Unmaps on a thread of its own; says whether that ends.
fn can_be_unmapped(memory: Raw) -> bool {
    let unmapping = thread::spawn(move || memory.unmap());
    let began = Instant::now();
    while !unmapping.is_finished() && began.elapsed() < Duration::from_secs(10) {
        thread::yield_now();
    }
    unmapping.is_finished()
}

/// A page with room behind it, watched, and then made longer in place.
fn grown(uffd: &Uffd) -> Raw {
    let room = Raw::map(8);
    room.part(1, 7).unmap();
    let watch = uffd.watch(room.part(0, 1).range()).unwrap();
    let grown = room.part(0, 1).remap(4);
    drop(watch);
    grown
}

fn m3_memory_that_grew_in_place_is_not_watched_behind_the_reader() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, deliveries) = Uffd::builder().fork(Fork::Ignore).open(&space).unwrap();
    let room = Raw::map(8);
    events_during(&mut reader, || room.part(1, 7).unmap());
    let watch = uffd.watch(room.part(0, 1).range()).unwrap();
    let grown = room.part(0, 1).remap(4);
    drop(reader);
    assert!(can_be_unmapped(grown), "a thread waits for a reader that is gone");
    drop((watch, deliveries));
}

fn m3_memory_whose_move_was_not_delivered_is_not_watched_behind_the_reader() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, deliveries) = Uffd::builder().fork(Fork::Ignore).open(&space).unwrap();
    let memory = Raw::map(1);
    let watch = uffd.watch(memory.range()).unwrap();
    let moved = Mutex::new(memory);
    read_during(&mut reader, || *moved.lock().unwrap() = memory.remap(4));
    drop(reader);
    assert!(
        can_be_unmapped(moved.into_inner().unwrap()),
        "a thread waits for a reader that is gone"
    );
    drop((watch, deliveries));
}

/// A source that waits for pages as long as a test lasts, and a page.
fn patient() -> (AddressSpace, Uffd, Reader, Deliveries, Raw) {
    let space = AddressSpace::new();
    let (uffd, reader, deliveries) =
        Uffd::builder().settle(Duration::from_secs(3600)).open(&space).unwrap();
    let memory = Raw::map(1);
    memory.write(1);
    (space, uffd, reader, deliveries, memory)
}

/// A `MADV_FREE` of `memory` was read, and has left its page where it is: who reads waits until it
/// is written.
fn is_waited_for(
    deliveries: &mut Deliveries,
    reader: &Subscription<impl IntervalNotifier>,
    memory: Raw,
) {
    let mut delivery = Box::pin(deliveries.deliver());
    assert!(delivery.as_mut().now_or_never().is_none());
    for _ in 0..3 {
        assert!(
            reader.read_begin().now_or_never().is_none(),
            "the page that is about to go is found"
        );
    }
    memory.write(2);
    block_on(reader.read_begin());
    block_on(delivery).unwrap();
}

fn m5_a_discard_of_moved_memory_is_waited_for() {
    let _fork = no_fork();
    let (space, uffd, mut reader, mut deliveries, memory) = patient();
    let _watch = uffd.watch(memory.range()).unwrap();
    let moved = Mutex::new(memory);
    read_during(&mut reader, || *moved.lock().unwrap() = memory.remap(4));
    let moved = moved.into_inner().unwrap().part(0, 1);
    // Both are read before one is delivered. `MADV_FREE` leaves the page where it is.
    read_during(&mut reader, || moved.discard(Advice::LinuxFree));
    is_waited_for(&mut deliveries, &log(&space, moved.range()).0, moved);
}

fn m5_a_discard_that_found_the_ring_full_is_waited_for() {
    let _fork = no_fork();
    let (space, uffd, mut reader, mut deliveries, memory) = patient();
    let many = Raw::map(2 * 1100);
    let _watches = [uffd.watch(many.range()).unwrap(), uffd.watch(memory.range()).unwrap()];
    read_during(&mut reader, || {
        (0..1100).for_each(|page| many.part(2 * page, 1).unmap());
        memory.discard(Advice::LinuxFree);
    });
    is_waited_for(&mut deliveries, &log(&space, memory.range()).0, memory);
}

/// The kernel takes the marks away with the registration.
fn m5_marks_outlive_the_watch_that_the_driver_drops_when_it_is_told() {
    let _fork = no_fork();
    let (space, uffd, mut reader, mut deliveries, memory) = patient();
    let driver = space.insert(memory.range(), Copying::default()).unwrap();
    block_on(mirror(&uffd, &driver, memory)).unwrap();
    read_during(&mut reader, || memory.discard(Advice::LinuxFree));
    is_waited_for(&mut deliveries, &driver, memory);
    assert!(driver.0.lock().is_none(), "it was told, and nothing else watches the page");
}

fn m5_a_page_that_came_after_the_event_is_not_waited_for() {
    let _fork = no_fork();
    let (space, uffd, mut reader, mut deliveries, _) = patient();
    // A page without a page table: of a table that is there the kernel marks empty entries as well.
    let all = Raw::map_shared(2 * 512);
    let memory = Raw { at: all.at.next_multiple_of(512 * PAGE), len: PAGE };
    let _watch = uffd.watch(memory.range()).unwrap();
    read_during(&mut reader, || memory.discard(Advice::LinuxDontNeed));
    // Only looked at. A write would take a mark away.
    assert!(memory.look().is_some());
    assert!(deliveries.deliver().now_or_never().is_some(), "no page is about to go");
    assert!(space.active().is_empty());
}

fn m5_who_waits_for_pages_refuses_nobody_elses_invalidation() {
    let _fork = no_fork();
    let (space, uffd, mut reader, mut deliveries, memory) = patient();
    let _watch = uffd.watch(memory.range()).unwrap();
    read_during(&mut reader, || memory.discard(Advice::LinuxFree));
    let mut delivery = Box::pin(deliveries.deliver());
    assert!(delivery.as_mut().now_or_never().is_none());
    assert!(space.try_invalidate(memory.range(), Event::Clear).is_ok(), "no device has it");
    memory.write(2);
    block_on(delivery).unwrap();
}

/// The marks of what was given up are forgotten, and pages are not marked once more.
fn m5_a_page_that_was_written_after_its_discard_is_not_waited_for_where_a_watch_was_given_up() {
    let _fork = no_fork();
    let (_space, uffd, mut reader, mut deliveries, memory) = patient();
    drop(uffd.watch(memory.range()).unwrap());
    let _watch = uffd.watch(memory.range()).unwrap();
    read_during(&mut reader, || memory.discard(Advice::LinuxDontNeed));
    memory.write(2);
    assert!(deliveries.deliver().now_or_never().is_some(), "no page is about to go");
}

fn m5_who_waits_on_a_thread_that_has_delivered_before_looks_at_each_poll() {
    let _fork = no_fork();
    let (stopped, _reader, mut stopping) = Uffd::open(&AddressSpace::new()).unwrap();
    stopped.stop();
    stopping.run().unwrap();
    let (_space, uffd, mut reader, mut deliveries, memory) = patient();
    let _watch = uffd.watch(memory.range()).unwrap();
    read_during(&mut reader, || memory.discard(Advice::LinuxFree));
    let mut delivery = Box::pin(deliveries.deliver());
    assert!(delivery.as_mut().now_or_never().is_none());
    memory.write(2);
    assert!((0..10).any(|_| delivery.as_mut().now_or_never().is_some()));
}

fn m5_a_later_discard_of_the_same_pages_ends_the_wait_of_the_earlier_one() {
    let _fork = no_fork();
    let (_space, uffd, mut reader, mut deliveries, memory) = patient();
    let _watch = uffd.watch(memory.range()).unwrap();
    let mut discard = || {
        read_during(&mut reader, || memory.discard(Advice::LinuxFree));
        let mut delivery = Box::pin(deliveries.deliver());
        assert!(delivery.as_mut().now_or_never().is_none());
        delivery
    };
    let (mut earlier, mut later) = (discard(), discard());
    assert!((0..10).any(|_| earlier.as_mut().now_or_never().is_some()), "it waits on");
    assert!(later.as_mut().now_or_never().is_none());
    memory.write(2);
    block_on(later).unwrap();
    assert_eq!(uffd.stats().unsettled, 0);
}

fn m5_every_delivery_looks_at_pages_whose_time_was_used_up() {
    let _fork = no_fork();
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().settle(Duration::from_nanos(1)).open(&AddressSpace::new()).unwrap();
    let memory = Raw::map(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    // So often that a look is mostly not due.
    for round in 1..=50 {
        memory.write(1);
        read_during(&mut reader, || memory.discard(Advice::LinuxFree));
        block_on(deliveries.deliver()).unwrap();
        assert_eq!(uffd.stats().unsettled, round);
        assert_eq!(block_on(deliveries.deliver()), Ok(0), "the page is there");
        memory.write(2);
        assert_eq!(block_on(deliveries.deliver()), Ok(1), "it cannot go any more");
        assert_eq!(block_on(deliveries.deliver()), Ok(0), "that was told");
    }
}

/// How often this thread has given its processor away because it had to wait.
fn rests() -> i64 {
    // SAFETY: numbers, of which all may be zero.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: writes the structure.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) }, 0);
    usage.ru_nvcsw
}

fn m5_who_waits_for_pages_rests_after_some_looks() {
    let _fork = no_fork();
    let (_space, uffd, mut reader, mut deliveries, memory) = patient();
    let _watch = uffd.watch(memory.range()).unwrap();
    read_during(&mut reader, || memory.discard(Advice::LinuxFree));
    let mut delivery = Box::pin(deliveries.deliver());
    let mut look = || assert!(delivery.as_mut().now_or_never().is_none());
    (0..20).for_each(|_| look());
    let before = rests();
    eventually("it rests", || {
        look();
        rests() > before + 100
    });
    memory.write(2);
    block_on(delivery).unwrap();
}

fn m5_what_was_waited_for_leaves_nothing_behind() {
    const ROUNDS: usize = 1100;
    let _fork = no_fork();
    let (_space, uffd, mut reader, mut deliveries, memory) = patient();
    let _watch = uffd.watch(memory.range()).unwrap();
    let turn = AtomicUsize::new(0);
    let more = thread::scope(|scope| {
        // On one thread, because to start a thread allocates.
        scope.spawn(|| {
            for round in 1..=ROUNDS {
                while turn.load(Ordering::Acquire) < round {
                    thread::yield_now();
                }
                memory.write(1);
                memory.discard(Advice::LinuxDontNeed);
            }
        });
        let mut before = 0;
        for round in 1..=ROUNDS {
            turn.store(round, Ordering::Release);
            while reader.read().unwrap() == 0 {
                thread::yield_now();
            }
            block_on(deliveries.deliver()).unwrap();
            if round == 100 {
                before = crate::allocated();
            }
        }
        crate::allocated() - before
    });
    assert!(more < 64, "{more} allocations of a thousand discards are still there");
}

/// A reader looks every now and then at what nobody changes, beside a thread that discards and
/// writes one page every 50 µs.
fn m5_a_storm_of_discards_holds_up_no_reader_of_another_range() {
    let _fork = no_fork();
    let source = Running::of(&AddressSpace::new(), Uffd::builder().fork(Fork::Ignore));
    let (memory, elsewhere) = (Raw::map(4), Raw::map(1));
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (readers, others) =
        (log(&source.space, memory.range()).0, log(&source.space, elsewhere.range()).0);
    let stop = AtomicBool::new(false);
    let pause = |micros| {
        let until = Instant::now() + Duration::from_micros(micros);
        while Instant::now() < until {
            thread::yield_now();
        }
    };
    let (longest, after) = thread::scope(|scope| {
        let elsewhere = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                block_on(others.read_begin());
                longest = longest.max(began.elapsed());
                pause(200);
            }
            longest
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                block_on(readers.read_begin());
            }
        });
        for round in 0..10_000 {
            let page = memory.part(round % 4, 1);
            page.discard(Advice::LinuxDontNeed);
            page.write(2);
            pause(50);
        }
        let began = Instant::now();
        block_on(readers.read_begin());
        let after = began.elapsed();
        stop.store(true, Ordering::Relaxed);
        (elsewhere.join().unwrap(), after)
    });
    println!(
        "elsewhere at most {longest:?}; right after the storm {after:?}; {:?}",
        source.uffd.stats()
    );
    assert!(
        longest < Duration::from_secs(1) && after < Duration::from_secs(1),
        "elsewhere {longest:?}, after {after:?}"
    );
}

/// Takes some time in its first pass.
struct Slow;

impl IntervalNotifier for Slow {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        (0..20).for_each(|_| thread::yield_now());
        Ok(None)
    }
}

fn two_deliveries_at_once_open_the_gate_when_both_have_told_everybody() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, deliveries) = Uffd::builder().fork(Fork::Ignore).open(&space).unwrap();
    let reading = thread::spawn(move || reader.run().unwrap());
    let (deliveries, stop) = (Mutex::new(deliveries), AtomicBool::new(false));
    let stale = thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let delivery = deliveries.lock().unwrap().deliver();
                    block_on(delivery).unwrap();
                    thread::yield_now();
                }
            });
        }
        let mut stale = 0;
        for _ in 0..2000 {
            let memory = Raw::map(2);
            let _slow = space.insert(memory.part(0, 1).range(), Slow).unwrap();
            let driver = log(&space, memory.part(1, 1).range()).0;
            let sequence = block_on(driver.read_begin());
            let watch = uffd.watch(memory.range()).unwrap();
            memory.unmap();
            stale += u32::from(!driver.read_retry(sequence));
            drop(watch);
        }
        stop.store(true, Ordering::Relaxed);
        stale
    });
    uffd.stop();
    reading.join().unwrap();
    assert_eq!(stale, 0, "checks that succeeded after `munmap` had returned");
}

fn m8_what_was_moved_or_has_grown_is_in_the_child_once_nobody_watches_it() {
    let source = Running::of(&AddressSpace::new(), Uffd::builder().fork(Fork::Keep));
    let in_child = |memory: Raw| exit_code(fork(|| i32::from(memory.look().is_some()))) == Some(1);
    let memory = Raw::map(1);
    memory.write(1);
    let watch = source.uffd.watch(memory.range()).unwrap();
    assert!(!in_child(memory));
    let moved = memory.remap(4);
    let (probe, _told) = log(&source.space, memory.range());
    block_on(probe.read_begin());
    eventually("it is delivered", || in_child(moved.part(0, 1)));
    drop(watch);
    let grown = grown(&source.uffd);
    assert!(in_child(grown));
    // A neighbour that is watched does not keep what is not.
    let pair = Raw::map(2);
    let (one, _other) = (
        source.uffd.watch(pair.part(0, 1).range()).unwrap(),
        source.uffd.watch(pair.part(1, 1).range()).unwrap(),
    );
    drop(one);
    assert!(in_child(pair.part(0, 1)) && !in_child(pair.part(1, 1)));
}

/// Registers never; says by which waker it would be told.
#[derive(Default)]
struct Stuck(Mutex<Option<Waker>>);

impl Device for Stuck {
    type Handle = ();
    type Error = std::io::Error;

    async fn register(&self, _: AddressRange) -> std::io::Result<()> {
        std::future::poll_fn(|cx| {
            *self.0.lock().unwrap() = Some(cx.waker().clone());
            std::task::Poll::<()>::Pending
        })
        .await;
        Ok(())
    }

    async fn deregister(
        &self,
        _: AddressRange,
        (): (),
    ) -> Result<(), StillRegistered<(), std::io::Error>> {
        Ok(())
    }
}

fn m4_futures_that_a_child_polls_and_drops_hang_nobody() {
    type Any<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().fork(Fork::Ignore).settle(Duration::from_secs(3600)).open(&space).unwrap();
    let device = Arc::new(Stuck::default());
    let cache = RegistrationCache::<Arc<Stuck>>::builder()
        .watch(uffd.clone())
        .build(&space, device.clone());
    let memory = Raw::map(4);
    memory.write(1);
    let _watch = uffd.watch(memory.part(3, 1).range()).unwrap();
    let driver = space.insert(memory.part(1, 1).range(), Copying::default()).unwrap();
    // What the mirror and the second look-up wait for.
    let (_open, closed) = crate::never_stale::gate();
    let _slow =
        space.insert(memory.part(1, 2).range(), crate::never_stale::Slow(closed.clone())).unwrap();
    let mut owned = OwnedMapping::new(&space, PAGE).unwrap();
    let _owned = space.insert(owned.range(), crate::never_stale::Slow(closed)).unwrap();
    let mut other = Box::pin(space.invalidate(memory.part(1, 2).range(), Event::Clear));
    assert!(other.as_mut().now_or_never().is_none());
    read_during(&mut reader, || memory.part(3, 1).discard(Advice::LinuxFree));
    let mut futures: Vec<Any<'_>> = vec![
        Box::pin(async { drop(cache.get(memory.part(0, 1).range()).await) }),
        Box::pin(async { drop(deliveries.deliver().await) }),
        Box::pin(async { drop(cache.get(memory.part(2, 1).range()).await) }),
        Box::pin(async { drop(mirror(&uffd, &driver, memory.part(1, 1)).await) }),
        Box::pin(async { drop(owned.discard(0..PAGE).await) }),
    ];
    // The delivery first: it opens the gate that the others wait for.
    futures.swap(0, 1);
    assert!(futures.iter_mut().all(|future| future.as_mut().now_or_never().is_none()));
    let (stop, waker) = (AtomicBool::new(false), device.0.lock().unwrap().clone().unwrap());
    let hung = thread::scope(|scope| {
        // Locks of the space and of the cache's task are mostly held by somebody.
        for _ in 0..2 {
            scope.spawn(|| {
                let elsewhere = AddressRange::new(0x1000, 0x1000).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    waker.wake_by_ref();
                    drop(space.try_invalidate(elsewhere, Event::Clear));
                }
            });
        }
        let hung = (0..40).filter(|round| {
            let child = fork(|| {
                let answers = round % 2 == 0
                    || futures.iter_mut().all(|future| future.as_mut().now_or_never().is_some());
                drop(std::mem::take(&mut futures));
                i32::from(!answers)
            });
            exit_code(child) != Some(0)
        });
        // A few are enough: each is waited for.
        let hung = hung.take(3).count();
        stop.store(true, Ordering::Relaxed);
        hung
    });
    assert_eq!(hung, 0, "children hang, or their futures do not say that they are the parent's");
}
