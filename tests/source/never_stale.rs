//! The rules M: what a memory source promises, whatever a process does with its memory.

use crate::memory::{PAGE, Raw};
use crate::uffd::{Log, Running, Told, eventually, log, no_fork};
use futures::FutureExt;
use futures::executor::block_on;
use rustix::mm::Advice;
use shootdown::source::{Uffd, UffdError, Unwatched, Watch};
use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, MirrorError,
    PassFuture, Report, RetryBudget, Subscription, WouldBlock,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

crate::list![
    m1_what_is_mirrored_is_watched_although_it_was_mapped_over_while_the_driver_waited,
    m1_report_1_what_is_marked_valid_after_an_invalidation_came_in_between_is_a_collision,
    m1_memory_that_cannot_be_watched_is_not_looked_at,
    m2_report_13_a_watch_whose_memory_was_mapped_over_says_so_is_reported_and_can_be_renewed,
    m2_the_end_of_a_watch_that_its_driver_drops_when_told_is_not_reported,
    m3_dropping_the_reader_invalidates_all_that_was_watched,
    m3_dropping_the_deliveries_invalidates_all_that_was_watched,
    m3_a_drivers_panic_ends_no_delivery_and_is_counted_and_reported,
    m3_a_delivery_that_is_dropped_has_told_everybody_whatever_the_budget,
    m3_deliveries_that_are_dropped_tell_also_a_driver_behind_one_that_would_block,
    m5_a_discard_keeps_its_range_under_invalidation_until_the_pages_are_gone,
    m5_only_readers_of_the_discarded_range_wait,
    m5_pages_that_nobody_watches_are_waited_for_by_who_watches_them_next,
    m5_shared_memory_and_huge_pages_are_seen_to_go,
    m5_pages_of_madv_free_stay_and_the_bound_is_reported,
    m5_without_a_bound_nobody_waits_and_the_promise_is_withdrawn,
    m5_a_source_that_is_dropped_while_pages_are_waited_for_leaves_nothing_behind,
    m7_report_5_a_driver_with_dirty_pages_does_not_write_into_memory_that_belongs_to_somebody_else,
    report_15_an_event_between_the_last_read_and_the_bell_is_delivered_without_a_further_one,
    report_20_a_pass_that_panics_is_counted_and_reported_with_the_driver_seen_in_the_list_before,
    report_22_a_dead_device_holds_up_only_readers_of_its_range,
];

crate::list![fn isolated_tests:
    m2_a_hundred_thousand_pages_of_one_arena_take_some_hundred_mappings,
    m2_h5_watches_leave_mappings_for_the_rest_of_the_program,
    report_21_a_release_and_an_unmap_reach_the_drivers_behind_one_that_fails,
];

/// What a mirror has: the contents that it looked at, and their watch.
#[derive(Default)]
pub struct Copying(pub DriverLock<Option<(u8, Watch)>>);

impl IntervalNotifier for Copying {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let gone = self.0.lock_for(invalidation).take();
        drop(gone);
        Ok(None)
    }
}

fn first_byte(memory: Raw) -> u8 {
    memory.part(0, 1).look().unwrap()[0]
}

/// A driver whose device takes until its gate opens.
pub struct Slow(pub futures::future::Shared<futures::channel::oneshot::Receiver<()>>);

impl IntervalNotifier for Slow {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(Some(PassFuture::new(self.0.clone().map(drop))))
    }
}

pub fn gate() -> (
    futures::channel::oneshot::Sender<()>,
    futures::future::Shared<futures::channel::oneshot::Receiver<()>>,
) {
    let (open, gate) = futures::channel::oneshot::channel();
    (open, gate.shared())
}

pub async fn mirror(
    uffd: &Uffd,
    driver: &Subscription<Copying>,
    memory: Raw,
) -> Result<(), MirrorError<Unwatched<std::convert::Infallible>>> {
    let range = memory.range();
    let install = |copy: &mut Option<(u8, Watch)>, byte, watch| *copy = Some((byte, watch));
    uffd.mirror(
        driver,
        &driver.0,
        range,
        RetryBudget::retries(1000),
        |_| async move { Ok(first_byte(memory)) },
        install,
    )
    .await
}

fn m1_what_is_mirrored_is_watched_although_it_was_mapped_over_while_the_driver_waited() {
    let _fork = no_fork();
    let source = Running::new();
    let memory = Raw::map(1);
    memory.write(1);
    let driver = source.space.insert(memory.range(), Copying::default()).unwrap();
    let (open, closed) = gate();
    let _slow = source.space.insert(memory.range(), Slow(closed)).unwrap();
    // Somebody invalidates the range, and a device takes its time: the mirror waits in
    // `read_begin`.
    let mut other = Box::pin(source.space.invalidate(memory.range(), Event::ProtectionVma));
    assert!(other.as_mut().now_or_never().is_none());
    let mut mirroring = Box::pin(mirror(&source.uffd, &driver, memory));
    assert!(mirroring.as_mut().now_or_never().is_none());
    memory.map_over();
    memory.write(2);
    open.send(()).unwrap();
    drop(block_on(other));
    block_on(mirroring).unwrap();
    assert_eq!(
        driver.0.lock().as_ref().map(|(byte, watch)| (*byte, watch.is_armed())),
        Some((2, true))
    );
    // Everything is quiet. Now the memory goes again.
    memory.map_over();
    block_on(driver.read_begin());
    assert!(driver.0.lock().is_none(), "the driver was not told");
}

/// xenia-canary/xenia-canary PR #1062, shadps4-emu/shadPS4 PR #3186: marked valid after the range
/// was invalidated.
fn m1_report_1_what_is_marked_valid_after_an_invalidation_came_in_between_is_a_collision() {
    let _fork = no_fork();
    let source = Running::new();
    let memory = Raw::map(1);
    memory.write(1);
    let driver = source.space.insert(memory.range(), Copying::default()).unwrap();
    let sequence = block_on(driver.read_begin());
    let watch = source.uffd.watch(memory.range()).unwrap();
    let copied = first_byte(memory);
    memory.map_over();
    let installed = driver.0.install(&driver, sequence, |copy| *copy = Some((copied, watch)));
    assert!(installed.is_err(), "a copy of what is gone was marked valid");
    // A watch that was made too early, before `read_begin`, says so when it is looked at under the
    // lock.
    let early = source.uffd.watch(memory.range()).unwrap();
    memory.map_over();
    let sequence = block_on(driver.read_begin());
    assert!(driver.0.install(&driver, sequence, |_| early.is_armed()) == Ok(false));
}

fn m1_memory_that_cannot_be_watched_is_not_looked_at() {
    let _fork = no_fork();
    let source = Running::new();
    let memory = Raw::map(1);
    let driver = source.space.insert(memory.range(), Copying::default()).unwrap();
    memory.unmap();
    let looked = AtomicBool::new(false);
    let prepare = |_| {
        looked.store(true, Ordering::Relaxed);
        async { Ok::<_, ()>(()) }
    };
    let refused = source.uffd.mirror(
        &driver,
        &driver.0,
        memory.range(),
        RetryBudget::default(),
        prepare,
        |_, (), _| (),
    );
    let refused = block_on(refused).unwrap_err();
    assert!(
        matches!(refused, MirrorError::Prepare(Unwatched::Watch(UffdError::Watch { .. }))),
        "{refused:?}"
    );
    assert!(!looked.into_inner());
}

/// The ranges of reports of one kind.
type Reported = Arc<Mutex<Vec<AddressRange>>>;

fn reporting(of: fn(&Report<'_>) -> Option<AddressRange>) -> (AddressSpace, Reported) {
    let reported = Reported::default();
    let to = reported.clone();
    let space = AddressSpace::builder()
        .on_report(move |report| to.lock().unwrap().extend(of(report)))
        .build();
    (space, reported)
}

/// firecracker-microvm/firecracker PR #4988: mmap over a watched range ends the watch.
fn m2_report_13_a_watch_whose_memory_was_mapped_over_says_so_is_reported_and_can_be_renewed() {
    let _fork = no_fork();
    let (space, ended) = reporting(|report| match report {
        Report::WatchEnded { range } => Some(*range),
        _ => None,
    });
    // Before there is a source: what it is tried with is then elsewhere, and its end is none of
    // these.
    let memory = Raw::map(3);
    let source = Running::of(&space, Uffd::builder());
    let reports =
        |of: Raw| ended.lock().unwrap().iter().filter(|range| **range == of.range()).count();
    let watches = [
        source.uffd.watch(memory.part(0, 2).range()).unwrap(),
        source.uffd.watch(memory.part(2, 1).range()).unwrap(),
    ];
    let (subscription, told) = log(&space, memory.range());
    memory.part(1, 1).map_over();
    block_on(subscription.read_begin());
    assert_eq!(watches.each_ref().map(Watch::is_armed), [false, true]);
    eventually("it is reported", || reports(memory.part(0, 2)) == 1);
    // Nobody watches what is mapped there now, until the watch is renewed.
    told.lock().unwrap().clear();
    memory.part(1, 1).map_over();
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), []);
    watches[0].renew().unwrap();
    assert!(watches[0].is_armed());
    memory.part(1, 1).unmap();
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), [(Event::Unmap, memory.part(1, 1).range())]);
    eventually("the second end is reported, too", || reports(memory.part(0, 2)) == 2);
    assert_eq!(reports(memory.part(2, 1)), 0);
    assert!(watches[0].renew().is_err(), "there is nothing to be watched");
    assert!(!watches[0].is_armed());
}

fn m2_the_end_of_a_watch_that_its_driver_drops_when_told_is_not_reported() {
    let _fork = no_fork();
    let (space, ended) = reporting(|report| match report {
        Report::WatchEnded { range } => Some(*range),
        _ => None,
    });
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(2);
    let driver = space.insert(memory.part(0, 1).range(), Copying::default()).unwrap();
    block_on(mirror(&uffd, &driver, memory.part(0, 1))).unwrap();
    let _kept = uffd.watch(memory.part(1, 1).range()).unwrap();
    read_during(&mut reader, || memory.unmap());
    block_on(deliveries.deliver()).unwrap();
    assert!(driver.0.lock().is_none());
    assert_eq!(*ended.lock().unwrap(), [memory.part(1, 1).range()]);
}

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

fn m2_a_hundred_thousand_pages_of_one_arena_take_some_hundred_mappings() {
    let _fork = no_fork();
    let source = Running::new();
    let arena = Raw::map(200_000);
    let before = mappings();
    let watches: Vec<_> = (0..100_000)
        .map(|page| source.uffd.watch(arena.part(2 * page, 1).range()).unwrap())
        .collect();
    let taken = mappings().saturating_sub(before);
    println!("100,000 watches of single pages take {taken} mappings");
    assert!(taken < 500, "{taken} mappings");
    // All of them are watched.
    let (subscription, told) = log(&source.space, arena.range());
    for page in [0, 77_777, 99_999] {
        told.lock().unwrap().clear();
        arena.part(2 * page, 1).unmap();
        block_on(subscription.read_begin());
        assert_eq!(*told.lock().unwrap(), [(Event::Unmap, arena.part(2 * page, 1).range())]);
    }
    drop(watches);
    // And now nothing is.
    told.lock().unwrap().clear();
    arena.unmap();
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), []);
}

fn m2_h5_watches_leave_mappings_for_the_rest_of_the_program() {
    let _fork = no_fork();
    // Only what is asked for: each watch of a single page splits the arena.
    let source = Running::of(&AddressSpace::new(), Uffd::builder().granule(PAGE as u64));
    let arena = Raw::map(80_000);
    let mut watches = Vec::new();
    let refused = loop {
        match source.uffd.watch(arena.part(2 * watches.len(), 1).range()) {
            Ok(watch) => watches.push(watch),
            Err(error) => break error,
        }
        assert!(watches.len() < 39_000, "there is always room");
    };
    assert!(matches!(refused, UffdError::NoRoom { .. }), "{refused:?}");
    assert!(refused.to_string().contains("vm.max_map_count"));
    // The program can still map, and the watches are as they were.
    (0..1000).map(|_| Raw::map(3)).for_each(|memory| memory.part(1, 1).unmap());
    let (subscription, told) = log(&source.space, arena.range());
    arena.part(0, 1).unmap();
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), [(Event::Unmap, arena.part(0, 1).range())]);
    watches.pop();
    drop(source.uffd.watch(arena.part(70_000, 1).range()).unwrap());
    drop(watches);
    arena.unmap();
}

fn m3_dropping_the_reader_invalidates_all_that_was_watched() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, reader, mut deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(2);
    let watch = uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&space, memory.range());
    drop(reader);
    // Nobody is told of changes from now on: so nobody gets an answer before he has been told that.
    assert!(subscription.read_begin().now_or_never().is_none());
    memory.map_over();
    assert_eq!(block_on(deliveries.deliver()), Ok(1));
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), [(Event::Unmap, memory.range())]);
    assert!(!watch.is_armed());
    assert_eq!(watch.renew(), Err(UffdError::Closed));
}

fn m3_dropping_the_deliveries_invalidates_all_that_was_watched() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, _reader, deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(2);
    let watch = uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&space, memory.range());
    drop(deliveries);
    assert_eq!(*told.lock().unwrap(), [(Event::Unmap, memory.range())]);
    assert!(!watch.is_armed() && subscription.read_begin().now_or_never().is_some());
    memory.unmap();
}

/// Fails at every call.
struct Fails;

impl IntervalNotifier for Fails {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        panic!("this driver always fails");
    }
}

fn m3_a_drivers_panic_ends_no_delivery_and_is_counted_and_reported() {
    let _fork = no_fork();
    let reported = Arc::new(AtomicU64::new(0));
    let to = reported.clone();
    let space = AddressSpace::builder()
        .on_report(move |report| {
            let fails = matches!(
                report,
                Report::Panicked { message: Some("this driver always fails"), .. }
            );
            to.fetch_add(u64::from(fails), Ordering::Relaxed);
        })
        .build();
    let source = Running::of(&space, Uffd::builder());
    let memory = Raw::map(3);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let _fails = space.insert(memory.part(0, 2).range(), Fails).unwrap();
    let (subscription, told) = log(&space, memory.range());
    for page in 0..3 {
        memory.part(page, 1).map_over();
        block_on(subscription.read_begin());
        assert_eq!(
            told.lock().unwrap().len(),
            page + 1,
            "the others are told, and the deliveries go on"
        );
    }
    assert_eq!((reported.load(Ordering::Relaxed), space.stats().lost_panics), (2, 2));
}

/// Told, and busy until its gate opens.
struct Busy(Arc<AtomicU64>, futures::future::Shared<futures::channel::oneshot::Receiver<()>>);

impl IntervalNotifier for Busy {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.0.fetch_add(1, Ordering::SeqCst);
        invalidation.set_seq();
        Ok(Some(PassFuture::new(self.1.clone().map(drop))))
    }
}

/// Reads while `change` runs on another thread; returns how many events there were.
pub fn events_during(
    reader: &mut shootdown::source::Reader,
    change: impl FnOnce() + Send,
) -> usize {
    thread::scope(|scope| {
        let changing = scope.spawn(change);
        let mut events = 0;
        while !changing.is_finished() {
            events += reader.read().unwrap();
            thread::yield_now();
        }
        events
    })
}

/// Does so for a change that raises an event.
pub fn read_during(reader: &mut shootdown::source::Reader, change: impl FnOnce() + Send) {
    assert!(events_during(reader, change) > 0, "it raised no event");
}

fn m3_a_delivery_that_is_dropped_has_told_everybody_whatever_the_budget() {
    let _fork = no_fork();
    let space = AddressSpace::builder().pass_budget(0).build();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    let (open, closed) = gate();
    let calls = Arc::<AtomicU64>::default();
    let _busy = space.insert(memory.range(), Busy(calls.clone(), closed)).unwrap();
    let (second, told) = log(&space, memory.range());
    let before = block_on(second.read_begin());
    read_during(&mut reader, || memory.unmap());
    let mut delivery = Box::pin(deliveries.deliver());
    assert!(delivery.as_mut().now_or_never().is_none());
    drop(delivery);
    assert!(
        second.read_retry(before),
        "told, although the first driver's device is busy and nobody delivers any more"
    );
    open.send(()).unwrap();
    block_on(space.drain());
    assert_eq!((calls.load(Ordering::SeqCst), told.lock().unwrap().len()), (1, 1));
}

/// Refuses what must not wait.
struct Refuses;

impl IntervalNotifier for Refuses {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        if invalidation.blockable() { Ok(None) } else { Err(WouldBlock) }
    }
}

fn m3_deliveries_that_are_dropped_tell_also_a_driver_behind_one_that_would_block() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(2);
    let _watch = uffd.watch(memory.range()).unwrap();
    let _refuses = space.insert(memory.range(), Refuses).unwrap();
    let (second, told) = log(&space, memory.range());
    read_during(&mut reader, || memory.part(0, 1).unmap());
    drop(deliveries);
    block_on(second.read_begin());
    assert_eq!(
        *told.lock().unwrap(),
        [(Event::Unmap, memory.range())],
        "with the end of the watch"
    );
    memory.part(1, 1).unmap();
}

/// Discards `memory` with `advice`, again and again, while a device copies it as soon as it may:
/// the copies that it still has once the call has returned.
fn stale_copies(source: &Running, memory: Raw, rounds: u32, advice: Advice, empty: u8) -> u32 {
    let driver = source.space.insert(memory.range(), Copying::default()).unwrap();
    let stop = AtomicBool::new(false);
    let mut stale = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                if driver.0.lock().is_none() {
                    let _ = block_on(mirror(&source.uffd, &driver, memory));
                }
                thread::yield_now();
            }
        });
        for _ in 0..rounds {
            memory.write(0xaa);
            // So that the device has these contents.
            drop(block_on(source.space.invalidate(memory.range(), Event::Clear)));
            block_on(mirror(&source.uffd, &driver, memory)).unwrap();
            memory.discard(advice);
            // The check and the copy under the lock, as a look-up of the device has them.
            let sequence = block_on(driver.read_begin());
            let found =
                driver.0.install(&driver, sequence, |copy| copy.as_ref().map(|(byte, _)| *byte));
            stale += u32::from(matches!(found, Ok(Some(byte)) if byte != empty));
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(block_on(source.space.invalidate(memory.range(), Event::Clear)));
    stale
}

/// Rounds of a storm; another number with `SHOOTDOWN_ROUNDS`.
fn rounds() -> u32 {
    std::env::var("SHOOTDOWN_ROUNDS")
        .ok()
        .map_or(10_000, |rounds| rounds.parse().expect("SHOOTDOWN_ROUNDS is a number"))
}

fn m5_a_discard_keeps_its_range_under_invalidation_until_the_pages_are_gone() {
    let _fork = no_fork();
    let source = Running::new();
    let (one, many) = (Raw::map(1), Raw::map(64));
    let stale = stale_copies(&source, one, rounds(), Advice::LinuxDontNeed, 0);
    let of_many = stale_copies(&source, many, rounds() / 4, Advice::LinuxDontNeed, 0);
    println!("{stale} and {of_many} stale; {:?}", source.uffd.stats());
    assert_eq!((stale, of_many), (0, 0), "copies from before a discard that has returned");
}

fn m5_only_readers_of_the_discarded_range_wait() {
    let _fork = no_fork();
    // So long that it does not end by itself.
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().settle(Duration::from_secs(3600)).open(&space).unwrap();
    let memory = Raw::map(2);
    memory.write(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    let (readers, others) =
        (log(&space, memory.part(0, 1).range()).0, log(&space, memory.part(1, 1).range()).0);
    // `MADV_FREE` leaves the page where it is.
    read_during(&mut reader, || memory.part(0, 1).discard(Advice::LinuxFree));
    let mut delivery = Box::pin(deliveries.deliver());
    assert!(delivery.as_mut().now_or_never().is_none());
    assert!(others.read_begin().now_or_never().is_some(), "a reader of another page waits");
    assert!(readers.read_begin().now_or_never().is_none(), "a reader of the page does not wait");
    let active = space.active();
    assert!(
        active.len() == 1 && active[0].pending.iter().any(|name| name.contains("madvise")),
        "{active:?}"
    );
    // Once the page is written it cannot be taken away any more.
    memory.part(0, 1).write(2);
    block_on(delivery).unwrap();
    block_on(readers.read_begin());
    assert_eq!(uffd.stats().unsettled, 0);
}

/// A registration is left from an earlier watch: the event comes, and who begins to watch the page
/// after it may find what is about to go.
fn m5_pages_that_nobody_watches_are_waited_for_by_who_watches_them_next() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().settle(Duration::from_secs(3600)).open(&space).unwrap();
    // So many that registrations are given up by granules.
    let memory = Raw::map(200);
    memory.part(0, 1).write(1);
    let mut watches: Vec<_> =
        (0..80).map(|page| uffd.watch(memory.part(2 * page, 1).range()).unwrap()).collect();
    drop(watches.remove(0));
    read_during(&mut reader, || memory.part(0, 1).discard(Advice::LinuxFree));
    let mut delivery = Box::pin(deliveries.deliver());
    assert!(delivery.as_mut().now_or_never().is_none());
    let (readers, _told) = log(&space, memory.part(0, 1).range());
    assert!(readers.read_begin().now_or_never().is_none(), "who begins now does not wait");
    memory.part(0, 1).write(2);
    block_on(readers.read_begin());
    block_on(delivery).unwrap();
}

fn m5_shared_memory_and_huge_pages_are_seen_to_go() {
    let _fork = no_fork();
    let source = Running::new();
    let shared = Raw::map_shared(16);
    assert_eq!(stale_copies(&source, shared, rounds() / 8, Advice::LinuxRemove, 0), 0);
    // `MADV_DONTNEED` takes shared pages out of the page table only: what was in them stays, and so
    // may the copy.
    assert_eq!(stale_copies(&source, shared, rounds() / 8, Advice::LinuxDontNeed, 0xaa), 0);
    let huge = Raw::map_huge();
    assert_eq!(stale_copies(&source, huge, rounds() / 40, Advice::LinuxDontNeed, 0), 0);
    println!("{:?}", source.uffd.stats());
}

fn m5_pages_of_madv_free_stay_and_the_bound_is_reported() {
    let _fork = no_fork();
    let (space, unsettled) = reporting(|report| match report {
        Report::Unsettled { range, .. } => Some(*range),
        _ => None,
    });
    let source = Running::of(&space, Uffd::builder().settle(Duration::from_millis(2)));
    let memory = Raw::map(4);
    memory.write(1);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&space, memory.range());
    memory.part(1, 2).discard(Advice::LinuxFree);
    block_on(subscription.read_begin());
    assert_eq!(*unsettled.lock().unwrap(), [memory.part(1, 2).range()]);
    assert_eq!((source.uffd.stats().unsettled, told.lock().unwrap().len()), (1, 1));
    // When the pages do go, the range is invalidated once more.
    memory.part(1, 2).discard(Advice::LinuxDontNeed);
    eventually("the pages are seen gone", || told.lock().unwrap().len() >= 3);
    assert!(
        told.lock().unwrap().iter().all(|told| *told == (Event::Clear, memory.part(1, 2).range()))
    );
}

fn m5_without_a_bound_nobody_waits_and_the_promise_is_withdrawn() {
    let _fork = no_fork();
    let source = Running::of(&AddressSpace::new(), Uffd::builder().settle(Duration::ZERO));
    assert!(!source.uffd.promises().discards);
    let memory = Raw::map(1);
    memory.write(1);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (subscription, _told) = log(&source.space, memory.range());
    memory.discard(Advice::LinuxFree);
    block_on(subscription.read_begin());
    assert_eq!(source.uffd.stats().unsettled, 0);
}

/// Writes back what its device has changed, unless it is too late.
struct WritesBack {
    memory: Raw,
    dirty: DriverLock<bool>,
    /// Whether it looks at `is_late`.
    careful: bool,
}

impl IntervalNotifier for WritesBack {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let dirty = std::mem::take(&mut *self.dirty.lock_for(invalidation));
        assert_eq!(invalidation.info().late, invalidation.is_late());
        if dirty && !(self.careful && invalidation.is_late()) {
            self.memory.poke(0xdd);
        }
        Ok(None)
    }
}

/// Ryujinx/Ryujinx PR #5755: flushes of textures whose memory is gone. (Under an `OwnedMapping` the
/// same driver writes back: `mapping.rs`.)
fn m7_report_5_a_driver_with_dirty_pages_does_not_write_into_memory_that_belongs_to_somebody_else()
{
    let _fork = no_fork();
    let source = Running::new();
    let run = |careful| {
        let memory = Raw::map(1);
        let watch = source.uffd.watch(memory.range()).unwrap();
        let driver = WritesBack { memory, dirty: DriverLock::new(true), careful };
        let driver = source.space.insert(memory.range(), driver).unwrap();
        memory.map_over();
        block_on(driver.read_begin());
        drop(watch);
        // Told by the program itself, before the change, it writes back.
        let corrupted = first_byte(memory);
        *driver.dirty.lock() = true;
        drop(block_on(source.space.invalidate(memory.range(), Event::Unmap)));
        assert_eq!(first_byte(memory), 0xdd);
        corrupted
    };
    assert_eq!((run(true), run(false)), (0, 0xdd));
}

/// firecracker-microvm/firecracker #5056; buildbuddy-io/buildbuddy PR #12673: the last deferred
/// work was never done.
fn report_15_an_event_between_the_last_read_and_the_bell_is_delivered_without_a_further_one() {
    let _fork = no_fork();
    let source = Running::new();
    let memory = Raw::map(1);
    let (subscription, told) = log(&source.space, memory.range());
    let rounds = rounds() / 4;
    for round in 0..rounds {
        // From two threads, so that one event is read while the delivery of the other begins.
        let _watch = source.uffd.watch(memory.range()).unwrap();
        let other = Raw::map(1);
        let _others = source.uffd.watch(other.range()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| other.unmap());
            memory.map_over();
        });
        block_on(subscription.read_begin());
        assert!(told.lock().unwrap().len() > round as usize, "round {round}: not delivered");
    }
}

/// amd/xdna-driver PR #1540: a wait that ended early was taken for done.
fn report_20_a_pass_that_panics_is_counted_and_reported_with_the_driver_seen_in_the_list_before() {
    struct Breaks(futures::future::Shared<futures::channel::oneshot::Receiver<()>>);
    impl IntervalNotifier for Breaks {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            let gate = self.0.clone();
            Ok(Some(PassFuture::new(async move {
                let _ = gate.await;
                panic!("the fence was lost");
            })))
        }
        fn name(&self) -> std::borrow::Cow<'static, str> {
            "breaks".into()
        }
    }
    let _fork = no_fork();
    let reported = Arc::<AtomicU64>::default();
    let to = reported.clone();
    let space = AddressSpace::builder()
        .on_report(move |report| {
            let lost =
                matches!(report, Report::Panicked { message: Some("the fence was lost"), .. });
            to.fetch_add(u64::from(lost), Ordering::Relaxed);
        })
        .build();
    let source = Running::of(&space, Uffd::builder());
    let memory = Raw::map(1);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (open, closed) = gate();
    let breaks = space.insert(memory.range(), Breaks(closed)).unwrap();
    memory.unmap();
    eventually("it is listed by name", || {
        space.active().iter().any(|active| active.pending.contains(&"breaks".into()))
    });
    open.send(()).unwrap();
    block_on(breaks.read_begin());
    eventually("it is reported", || reported.load(Ordering::Relaxed) == 1);
    assert_eq!(space.stats().lost_panics, 1);
}

/// cloud-hypervisor/cloud-hypervisor PR #8593, #8594: `?` at the first failing endpoint.
fn report_21_a_release_and_an_unmap_reach_the_drivers_behind_one_that_fails() {
    struct AlwaysRefuses;
    impl IntervalNotifier for AlwaysRefuses {
        fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
            Err(WouldBlock)
        }
    }
    let _fork = no_fork();
    let source = Running::new();
    let memory = Raw::map(5);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (open, closed) = gate();
    let calls = Arc::<AtomicU64>::default();
    let _first = source.space.insert(memory.range(), AlwaysRefuses).unwrap();
    let _second = source.space.insert(memory.range(), Fails).unwrap();
    let third = source.space.insert(memory.range(), Busy(calls.clone(), closed)).unwrap();
    memory.part(1, 1).unmap();
    // Or both are told of at once.
    eventually("the third is called", || calls.load(Ordering::SeqCst) == 1);
    // Over a hole, too, into which another test would map: so this one has a process of its own.
    memory.unmap();
    eventually("the third is called for both", || calls.load(Ordering::SeqCst) == 2);
    assert!(third.read_begin().now_or_never().is_none(), "and waited for");
    open.send(()).unwrap();
    block_on(third.read_begin());
    let released =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| block_on(source.space.release())));
    assert!(released.is_err(), "the second one's panic goes on in who releases");
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    eventually("nothing is left", || source.space.active().is_empty());
}

/// ROCm/legacy-rocm-build #6630: the process hangs in `fork`, because an eviction waits for a dead
/// GPU.
fn report_22_a_dead_device_holds_up_only_readers_of_its_range() {
    let _fork = no_fork();
    let source = Running::new();
    let (dead, well) = (Raw::map(4), Raw::map(4));
    let _watches =
        [source.uffd.watch(dead.range()).unwrap(), source.uffd.watch(well.range()).unwrap()];
    let (open, closed) = gate();
    let calls = Arc::<AtomicU64>::default();
    let device = source.space.insert(dead.range(), Busy(calls, closed)).unwrap();
    let (readers, _told): (Subscription<Log>, Told) = log(&source.space, well.range());
    let began = Instant::now();
    dead.part(0, 1).unmap();
    dead.part(1, 1).discard(Advice::LinuxDontNeed);
    well.part(0, 1).unmap();
    let mut child = std::process::Command::new("true");
    // SAFETY: does nothing; with a hook the standard library forks instead of spawning without a
    // copy of the memory.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut child, || Ok(())) };
    assert!(child.status().unwrap().success());
    drop(vec![1_u8; 64 << 20]);
    block_on(readers.read_begin());
    assert!(device.read_begin().now_or_never().is_none());
    assert!(
        source
            .space
            .active()
            .iter()
            .all(|active| active.pending.iter().any(|name| name.contains("Busy")))
    );
    assert!(began.elapsed() < Duration::from_secs(10));
    open.send(()).unwrap();
    block_on(device.read_begin());
}

/// A pass that waits for pages belongs to the space, and must not keep the space.
fn m5_a_source_that_is_dropped_while_pages_are_waited_for_leaves_nothing_behind() {
    struct Counted(Arc<()>);
    impl IntervalNotifier for Counted {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            assert!(Arc::strong_count(&self.0) > 1);
            Ok(None)
        }
    }
    let _fork = no_fork();
    let alive = Arc::new(());
    for settle in [Duration::from_millis(100), Duration::from_secs(3600)] {
        let space = AddressSpace::new();
        let (uffd, mut reader, mut deliveries) =
            Uffd::builder().settle(settle).open(&space).unwrap();
        let memory = Raw::map(1);
        memory.write(1);
        let watch = uffd.watch(memory.range()).unwrap();
        let device = space.insert(memory.range(), Counted(alive.clone())).unwrap();
        read_during(&mut reader, || memory.discard(Advice::LinuxFree));
        let mut delivery = Box::pin(deliveries.deliver());
        assert!(delivery.as_mut().now_or_never().is_none());
        // Abandoned: the pass is the space's.
        drop(delivery);
        block_on(async {
            if settle < Duration::from_secs(1) {
                device.read_begin().await;
            }
        });
        drop((device, watch, uffd, deliveries, reader, space));
        assert_eq!(Arc::strong_count(&alive), 1, "the space is still there");
    }
}
