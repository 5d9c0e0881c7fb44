//! `Uffd`: who unmaps memory behind the library's back goes on only when readers wait.

use crate::memory::Raw;
use futures::executor::block_on;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::Advice;
use shootdown::source::{Fork, Uffd, UffdBuilder, UffdError};
use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, MirrorError,
    PassFuture, RetryBudget, Subscription, WouldBlock,
};
use std::os::unix::process::CommandExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

crate::list![
    every_kind_of_change_is_an_invalidation_of_exactly_its_range,
    after_munmap_no_reader_gets_an_answer_from_before_it,
    anon_teardown,
    a_lock_that_is_held_across_munmap_does_not_stop_the_reader,
    the_reading_step_asks_nothing_of_the_allocator,
    a_change_is_read_while_an_earlier_one_waits_for_a_device,
    fork_invalidates_what_is_watched,
    a_handle_that_is_dropped_does_not_unwatch_a_new_one_at_the_same_address,
    a_second_userfaultfd_in_the_process_is_an_error_that_names_the_range,
    m8_an_ordinary_user_is_told_of_all_but_forks_and_the_source_says_so,
    when_the_reader_is_dropped_nobody_hangs,
    when_the_deliveries_are_dropped_nobody_hangs,
    more_changes_than_there_is_room_for_invalidate_everything_watched,
];

/// A thread inside `fork` holds the allocator's locks and waits for *every* reader of the process:
/// those of tests that read by hand, on threads that allocate, would never come. So whoever forks
/// is alone.
static FORK: RwLock<()> = RwLock::new(());

pub fn no_fork() -> RwLockReadGuard<'static, ()> {
    FORK.read().unwrap_or_else(PoisonError::into_inner)
}

pub fn alone() -> RwLockWriteGuard<'static, ()> {
    FORK.write().unwrap_or_else(PoisonError::into_inner)
}

/// A source with its two threads, ended when dropped.
pub struct Running {
    pub space: AddressSpace,
    pub uffd: Uffd,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Running {
    pub fn new() -> Self {
        Self::of(&AddressSpace::new(), Uffd::builder())
    }

    pub fn of(space: &AddressSpace, builder: UffdBuilder) -> Self {
        let space = space.clone();
        let (uffd, mut reader, mut deliveries) = builder.open(&space).unwrap();
        let threads = vec![
            thread::spawn(move || reader.run().unwrap()),
            thread::spawn(move || deliveries.run().unwrap()),
        ];
        // A thread allocates while it starts, and a thread inside `fork` holds the allocator's
        // locks: the reader must be there before.
        let page = Raw::map(1);
        let watch = uffd.watch(page.range()).unwrap();
        let probe = log(&space, page.range()).0;
        page.unmap();
        block_on(probe.read_begin());
        drop(watch);
        Self { space, uffd, threads }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.uffd.stop();
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(thread::panicking() || ended.is_ok());
        }
    }
}

pub type Told = Arc<Mutex<Vec<(Event, AddressRange)>>>;

pub struct Log(Told);

impl IntervalNotifier for Log {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.0
            .lock()
            .unwrap()
            .extend(invalidation.ranges().iter().map(|range| (invalidation.event(), *range)));
        invalidation.set_seq();
        Ok(None)
    }
}

pub fn log(space: &AddressSpace, range: AddressRange) -> (Subscription<Log>, Told) {
    let told = Told::default();
    (space.insert(range, Log(told.clone())).unwrap(), told)
}

/// Waits until `done`: the change returns before its delivery has ended.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        thread::yield_now();
    }
}

fn every_kind_of_change_is_an_invalidation_of_exactly_its_range() {
    let _fork = no_fork();
    let source = Running::new();
    let memory = Raw::map(16);
    memory.write(1);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&source.space, AddressRange::ALL);
    let expect = |event, range: AddressRange| {
        // The reader's promise makes the wait for the delivery short: `read_begin` waits for it.
        block_on(subscription.read_begin());
        assert!(
            told.lock().unwrap().contains(&(event, range)),
            "{event:?} {range}: {:?}",
            told.lock().unwrap()
        );
        told.lock().unwrap().clear();
    };
    memory.part(0, 1).unmap();
    expect(Event::Unmap, memory.part(0, 1).range());
    memory.part(2, 2).discard(Advice::LinuxDontNeed);
    expect(Event::Clear, memory.part(2, 2).range());
    memory.part(4, 1).discard(Advice::LinuxFree);
    expect(Event::Clear, memory.part(4, 1).range());
    memory.part(6, 1).map_over();
    expect(Event::Unmap, memory.part(6, 1).range());
    let moved = memory.part(8, 2).remap(20);
    assert_ne!(moved.at, memory.part(8, 2).at);
    expect(Event::Unmap, memory.part(8, 2).range());
    // What nobody watches raises nothing, where the memory came to lie included. (The kernel does
    // not say how much was added to it there.)
    moved.part(0, 2).unmap();
    let other = Raw::map(4);
    other.unmap();
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), []);
}

/// A driver that has mapped the memory until it is told.
struct Mapped(AtomicBool);

impl IntervalNotifier for Mapped {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        self.0.store(false, Ordering::Release);
        Ok(None)
    }
}

fn after_munmap_no_reader_gets_an_answer_from_before_it() {
    let _fork = no_fork();
    let source = Running::new();
    let stale = AtomicU64::new(0);
    for _ in 0..500 {
        let memory = Raw::map(2);
        let _watch = source.uffd.watch(memory.range()).unwrap();
        let device = source.space.insert(memory.range(), Mapped(AtomicBool::new(true))).unwrap();
        let unmapped = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                memory.unmap();
                unmapped.store(true, Ordering::Release);
            });
            scope.spawn(|| {
                while !unmapped.load(Ordering::Acquire) {
                    thread::yield_now();
                }
                let began = block_on(device.read_begin());
                // The device has let go, and nothing more is to come: the answer is from after the
                // change.
                stale.fetch_add(
                    u64::from(device.0.load(Ordering::Acquire) || device.read_retry(began)),
                    Ordering::Relaxed,
                );
            });
        });
    }
    assert_eq!(stale.into_inner(), 0, "answers from before the change");
}

/// A device that reads through what it has looked at; its mirror is a copy of the memory.
#[derive(Default)]
struct Mirror(DriverLock<Option<Vec<u8>>>);

impl IntervalNotifier for Mirror {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        *self.0.lock_for(invalidation) = None;
        Ok(None)
    }
}

/// The kernel's case (`tests/hmm.rs`) on real memory: the device reads while another thread unmaps
/// and maps something else at the same address. All of the old data or an error, never a mixture
/// and nothing of what belongs to somebody else.
fn anon_teardown() {
    let _fork = no_fork();
    let source = Running::new();
    let (pages, executor) =
        (64, futures::executor::ThreadPool::builder().pool_size(1).create().unwrap());
    let (mut complete, mut refused, mut retried, mut mapped_again) = (0, 0, 0, 0);
    for time in 0..500_u32 {
        let memory = Raw::map(pages);
        memory.write(1);
        let _watch = source.uffd.watch(memory.range()).unwrap();
        let device = Arc::new(source.space.insert(memory.range(), Mirror::default()).unwrap());
        let (started, starts) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let unmap = {
            let started = started.clone();
            thread::spawn(move || {
                while !started.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                // From before the device has looked at the first page to when it has finished.
                (0..time % 50 * 40).for_each(|_| std::hint::spin_loop());
                let half = memory.part(pages / 2, pages / 2);
                half.unmap();
                // Somebody else's from now on.
                let again = half.map_again();
                if again {
                    half.write(2);
                }
                again
            })
        };
        let unchanged = device.sequence();
        let look = {
            let starts = starts.clone();
            move |sequence| {
                starts.fetch_add(1, Ordering::Relaxed);
                // Whatever is there; once the driver knows that the memory has changed, it is an
                // error.
                let looked = if sequence == unchanged { memory.look().ok_or(()) } else { Err(()) };
                async move { looked }
            }
        };
        let read = {
            let device = device.clone();
            async move {
                started.store(true, Ordering::Release);
                let install =
                    |mirror: &mut Option<Vec<u8>>, looked: Vec<u8>| *mirror = Some(looked);
                device
                    .0
                    .mirror(&device, RetryBudget::default(), look, install)
                    .await
                    .map(|()| device.0.lock().clone())
            }
        };
        // On an executor's thread and on this one, in turns.
        let outcome = match time % 2 {
            0 => block_on(futures::task::SpawnExt::spawn_with_handle(&executor, read).unwrap()),
            _ => block_on(read),
        };
        match outcome {
            // `None`: zapped since, which is right as well.
            Ok(mirrored) => {
                complete += 1;
                let wrong = mirrored.iter().flatten().position(|byte| *byte != 1);
                assert_eq!(wrong, None, "byte {wrong:?} is somebody else's");
            }
            Err(error) => {
                assert!(matches!(error, MirrorError::Prepare(())), "{error:?}");
                refused += 1;
            }
        }
        retried += starts.load(Ordering::Relaxed) - 1;
        let again = unmap.join().unwrap();
        mapped_again += u32::from(again);
        memory.part(0, if again { pages } else { pages / 2 }).unmap();
    }
    assert!(mapped_again > 100, "the address was free {mapped_again} times only");
    assert!(
        complete > 0 && refused > 0,
        "{complete} complete, {refused} refused, {retried} retries: they did not meet"
    );
}

/// A driver whose first pass takes a lock of the program, under which it notes what has gone.
struct Locks(Arc<Mutex<Vec<AddressRange>>>);

impl IntervalNotifier for Locks {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.0.lock().unwrap().extend_from_slice(invalidation.ranges());
        invalidation.set_seq();
        Ok(None)
    }
}

/// ofiwg/libfabric#5554, #5687: memory is given back inside the allocator's lock, and the monitor
/// needs that lock.
fn a_lock_that_is_held_across_munmap_does_not_stop_the_reader() {
    let _fork = no_fork();
    let source = Running::new();
    let allocator = Arc::new(Mutex::new(Vec::new()));
    let (first, second) = (Raw::map(1), Raw::map(1));
    let _watches =
        [source.uffd.watch(first.range()).unwrap(), source.uffd.watch(second.range()).unwrap()];
    let _device = source.space.insert(AddressRange::ALL, Locks(allocator.clone())).unwrap();
    {
        let held = allocator.lock().unwrap();
        // The delivery of the first waits for the lock that this thread holds; the second has to be
        // read all the same.
        first.unmap();
        second.unmap();
        assert!(held.is_empty());
    }
    // One invalidation or two: both may have been read before the delivery looked.
    eventually("both are delivered", || {
        let told = allocator.lock().unwrap();
        [&first, &second].iter().all(|gone| told.iter().any(|range| range.covers(gone.range())))
    });
}

fn the_reading_step_asks_nothing_of_the_allocator() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(64);
    let _watch = uffd.watch(memory.range()).unwrap();
    let (_device, told) = log(&space, memory.range());
    let gone = AtomicBool::new(false);
    let (mut events, mut calls) = (0, 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            (0..16).for_each(|page| memory.part(page, 1).discard(Advice::LinuxDontNeed));
            memory.part(0, 32).unmap();
            let moved = memory.part(32, 32).remap(64);
            moved.unmap();
            gone.store(true, Ordering::Release);
        });
        while !gone.load(Ordering::Acquire) || events == 0 {
            let before = crate::allocator_calls();
            events += reader.read().unwrap();
            calls += crate::allocator_calls() - before;
            thread::yield_now();
        }
    });
    assert!(events >= 18, "{events} events");
    assert_eq!(calls, 0, "calls of the allocator while {events} events were read");
    let before = crate::allocator_calls();
    block_on(deliveries.deliver()).unwrap();
    assert!(crate::allocator_calls() > before, "the delivery allocates, so the count counts");
    let told = told.lock().unwrap();
    assert_eq!(told[0], (Event::Clear, memory.part(0, 16).range()));
    // With what it was moved to, if that is just below.
    assert!(told[1].0 == Event::Unmap && told[1].1.covers(memory.part(0, 64).range()), "{told:?}");
}

/// Of how many bytes a driver was told, and what lets its device go.
type Call = (u64, futures::channel::oneshot::Sender<()>);

/// A driver whose device takes until it is let go.
struct Slow(Arc<Mutex<Vec<Call>>>);

impl IntervalNotifier for Slow {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let (send, receive) = futures::channel::oneshot::channel();
        let bytes = invalidation.ranges().iter().filter_map(|range| range.len()).sum();
        self.0.lock().unwrap().push((bytes, send));
        Ok(Some(PassFuture::new(async move { receive.await.unwrap_or(()) })))
    }
}

fn a_change_is_read_while_an_earlier_one_waits_for_a_device() {
    let _fork = no_fork();
    let source = Running::new();
    let memory = Raw::map(8);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let device = source.space.insert(memory.range(), Slow(calls.clone())).unwrap();
    for page in 0..8 {
        memory.part(page, 1).unmap();
    }
    // Those that are read before the delivery comes are one.
    let told = || calls.lock().unwrap().iter().map(|(bytes, _)| bytes).sum::<u64>();
    eventually("all are started while none is done", || told() == memory.range().len().unwrap());
    assert_eq!(source.space.active().len(), calls.lock().unwrap().len());
    assert!(
        futures::FutureExt::now_or_never(device.read_begin()).is_none(),
        "a reader waits for the device"
    );
    calls.lock().unwrap().clear();
    eventually("all end", || source.space.active().is_empty());
    block_on(device.read_begin());
}

fn fork_invalidates_what_is_watched() {
    let _fork = alone();
    let source = Running::new();
    let memory = Raw::map(3);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&source.space, memory.range());
    let mut child = std::process::Command::new("true");
    // SAFETY: does nothing; with a hook the standard library forks instead of spawning without a
    // copy of the memory.
    unsafe { child.pre_exec(|| Ok(())) };
    assert!(child.status().unwrap().success());
    block_on(subscription.read_begin());
    // Who may not be told of forks keeps the pages from children.
    let expected: &[_] = if source.uffd.promises().fork == Fork::Report {
        &[(Event::ProtectionPage, memory.range())]
    } else {
        &[]
    };
    assert_eq!(*told.lock().unwrap(), expected);
    // The parent's memory is still watched.
    memory.unmap();
    block_on(subscription.read_begin());
    assert_eq!(told.lock().unwrap().last(), Some(&(Event::Unmap, memory.range())));
}

/// ofiwg/libfabric, pull request #5361.
fn a_handle_that_is_dropped_does_not_unwatch_a_new_one_at_the_same_address() {
    let _fork = no_fork();
    let source = Running::new();
    let memory = Raw::map(2);
    let old = source.uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&source.space, memory.range());
    memory.map_over();
    block_on(subscription.read_begin());
    let new = source.uffd.watch(memory.range()).unwrap();
    drop(old);
    told.lock().unwrap().clear();
    memory.unmap();
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), [(Event::Unmap, memory.range())]);
    drop(new);
}

/// ofiwg/libfabric, pull request #6474: two monitors of one process.
fn a_second_userfaultfd_in_the_process_is_an_error_that_names_the_range() {
    let _fork = no_fork();
    let (one, two) = (Running::new(), Running::new());
    let memory = Raw::map(2);
    let watch = one.uffd.watch(memory.range()).unwrap();
    let refused = two.uffd.watch(memory.range()).unwrap_err();
    assert!(
        matches!(refused, UffdError::Watch { range, .. } if range == memory.range()),
        "{refused:?}"
    );
    assert!(refused.to_string().contains("another userfaultfd"), "{refused}");
    // The first one's watch was not touched.
    let (subscription, told) = log(&one.space, memory.range());
    memory.part(0, 1).unmap();
    block_on(subscription.read_begin());
    assert_eq!(told.lock().unwrap().len(), 1);
    drop(watch);
    let _free_now = two.uffd.watch(memory.part(1, 1).range()).unwrap();
    let gone = one.uffd.watch(memory.part(0, 1).range()).unwrap_err();
    assert!(matches!(gone, UffdError::Watch { .. }), "not mapped: {gone:?}");
    memory.part(1, 1).unmap();
}

/// Whether an event is there to be read.
pub fn is_readable(reader: &impl std::os::fd::AsFd) -> bool {
    let mut polled = [PollFd::new(reader, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::default())).unwrap() == 1
}

/// Runs this test program as an ordinary user, where nobody may read the original.
pub fn as_nobody(what: &str) -> std::process::Output {
    let directory = std::env::temp_dir().join(format!("shootdown-nobody-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let program = directory.join("source");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    let output = loop {
        let run = std::process::Command::new(&program)
            .env("SHOOTDOWN_AS_NOBODY", what)
            .uid(65534)
            .gid(65534)
            .output();
        match run {
            // A process that another test has just started still has the descriptor with which the
            // copy was written.
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                thread::yield_now()
            }
            run => break run,
        }
    };
    std::fs::remove_dir_all(&directory).unwrap();
    output.unwrap()
}

fn m8_an_ordinary_user_is_told_of_all_but_forks_and_the_source_says_so() {
    let _fork = alone();
    if !rustix::process::geteuid().is_root() {
        let promises = Uffd::open(&AddressSpace::new()).unwrap().0.promises();
        assert_eq!(promises.fork, Fork::Keep);
        return;
    }
    assert_eq!(Uffd::open(&AddressSpace::new()).unwrap().0.promises().fork, Fork::Report);
    let output = as_nobody("open");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("by default: fork: Keep"), "{said}");
    let refused = said.lines().find(|line| line.starts_with("report: ")).unwrap();
    assert!(refused.contains("CAP_SYS_PTRACE") && refused.contains("Fork::Keep"), "{said}");
}

fn when_the_reader_is_dropped_nobody_hangs() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, reader, mut deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(2);
    let _watch = uffd.watch(memory.range()).unwrap();
    let unmapping = thread::spawn(move || memory.unmap());
    // Nobody reads: once the event is there the thread waits in the kernel.
    eventually("the event is there", || is_readable(&reader));
    assert!(!unmapping.is_finished());
    drop(reader);
    unmapping.join().unwrap();
    assert_eq!(uffd.watch(Raw::map(1).range()).unwrap_err(), UffdError::Closed);
    block_on(deliveries.deliver()).unwrap();
}

fn when_the_deliveries_are_dropped_nobody_hangs() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(2);
    let _watch = uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&space, memory.range());
    let unmapping = thread::spawn(move || memory.part(0, 1).unmap());
    eventually("the event is read", || reader.read().unwrap() > 0 || unmapping.is_finished());
    unmapping.join().unwrap();
    assert!(
        futures::FutureExt::now_or_never(subscription.read_begin()).is_none(),
        "read and not delivered: readers wait"
    );
    drop(deliveries);
    block_on(subscription.read_begin());
    assert_eq!(
        *told.lock().unwrap(),
        [(Event::Unmap, memory.range())],
        "all that was watched, with what was read"
    );
    memory.part(1, 1).unmap();
    reader.read().unwrap();
    block_on(subscription.read_begin());
    assert_eq!(uffd.watch(Raw::map(1).range()).unwrap_err(), UffdError::Closed);
}

fn more_changes_than_there_is_room_for_invalidate_everything_watched() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let (memory, other) = (Raw::map(1500), Raw::map(1));
    let _watches = [uffd.watch(memory.range()).unwrap(), uffd.watch(other.range()).unwrap()];
    let (subscription, told) = log(&space, other.range());
    let unmapping = thread::spawn(move || {
        (0..1500)
            .step_by(2)
            .chain((1..1500).step_by(2))
            .for_each(|page| memory.part(page, 1).unmap())
    });
    let mut read = 0;
    eventually("all are read, and none is delivered", || {
        read += reader.read().unwrap();
        // A fork of another test's is an event, too.
        read >= 1500
    });
    unmapping.join().unwrap();
    assert!(block_on(deliveries.deliver()).unwrap() > 1024);
    block_on(subscription.read_begin());
    let told = told.lock().unwrap();
    assert_eq!(told[0], (Event::Unmap, other.range()), "what was lost may have been here");
    // And it may have been a discard whose pages are still there.
    assert!(
        told[1..]
            .iter()
            .all(|(event, range)| *event == Event::Clear && range.covers(other.range())),
        "{told:?}"
    );
}
