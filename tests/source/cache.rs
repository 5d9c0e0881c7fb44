//! The registration cache on memory that is unmapped behind its back.

use crate::memory::{PAGE, Raw};
use crate::never_stale::read_during;
use crate::uffd::{Running, alone, eventually, is_readable, no_fork};
use futures::FutureExt;
use futures::channel::oneshot;
use futures::executor::block_on;
use futures::future::Shared;
use shootdown::cache::{
    Device, GetError, Match, Merge, Overlap, RegistrationCache, StillRegistered, Unwatched,
};
use shootdown::source::{Fork, Uffd, UffdError};
use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
};
use std::os::unix::process::CommandExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

crate::list![
    after_munmap_no_look_up_finds_the_registration,
    memory_given_back_inside_the_allocators_lock_does_not_deadlock,
    fork_with_registered_memory_registers_again,
    memory_that_cannot_be_watched_is_not_registered,
    m1_a_neighbour_that_is_gone_and_not_yet_told_of_does_not_refuse_a_registration,
    k5_a_cache_whose_source_tells_another_space_is_refused,
    k1_a_watched_registration_that_nobody_can_reach_leaves_nothing_behind,
    k1_a_watched_registration_that_its_source_reaches_is_waited_for,
    m1_what_get_registers_is_watched_however_long_it_waited,
    m1_a_device_that_changes_the_memory_while_it_registers_comes_to_an_end,
    report_9_a_lock_of_the_device_that_is_held_across_munmap_and_look_ups_blocks_nobody,
    report_11_after_a_part_was_unmapped_a_merged_region_is_watched_and_the_hole_is_not,
    k7_m1_a_union_is_not_refused_because_a_neighbour_was_unmapped_while_it_was_waited_for,
    k6_m1_exact_bytes_are_watched_by_their_pages,
];

crate::list![fn isolated_tests:
    k3_when_the_process_has_no_mapping_left_for_a_watch_idle_registrations_are_given_up,
];

/// Counts; each registration has a number of its own.
#[derive(Clone, Default)]
struct Nic {
    next: Arc<AtomicU64>,
    /// Taken by each deregistration, as an allocator's lock would be.
    lock: Arc<Mutex<()>>,
    /// And by each registration, as a vendor's lock would be.
    locked: bool,
    /// Refusals to come.
    refuse: Arc<AtomicU64>,
}

impl Device for Nic {
    type Handle = u64;
    type Error = std::io::Error;

    async fn register(&self, _range: AddressRange) -> std::io::Result<u64> {
        if self.locked {
            drop(self.lock.lock().unwrap());
        }
        if self.refuse.swap(0, Ordering::Relaxed) > 0 {
            return Err(std::io::Error::other("busy"));
        }
        Ok(self.next.fetch_add(1, Ordering::Relaxed))
    }

    async fn deregister(
        &self,
        _range: AddressRange,
        _handle: u64,
    ) -> Result<(), StillRegistered<u64, std::io::Error>> {
        drop(self.lock.lock().unwrap());
        Ok(())
    }
}

fn cache(source: &Running) -> (Nic, RegistrationCache<Nic>) {
    let nic = Nic::default();
    (
        nic.clone(),
        RegistrationCache::<Nic>::builder().watch(source.uffd.clone()).build(&source.space, nic),
    )
}

fn after_munmap_no_look_up_finds_the_registration() {
    let _fork = no_fork();
    let source = Running::new();
    let (_nic, cache) = cache(&source);
    let memory = Raw::map(4);
    let mut last = None;
    for round in 0..500 {
        let handle = *block_on(cache.get(memory.range())).unwrap().handle();
        assert_ne!(Some(handle), last, "round {round}: a registration from before the change");
        assert_eq!(*block_on(cache.get(memory.range())).unwrap().handle(), handle, "a hit");
        last = Some(handle);
        // By this thread or by another: who knows that the call has returned gets no answer from
        // before it.
        if round % 2 == 0 {
            memory.part(1, 1).map_over();
        } else {
            thread::scope(|scope| drop(scope.spawn(|| memory.part(2, 2).map_over())));
        }
    }
    assert!(cache.stats().invalidations >= 499, "all but perhaps the last have been delivered");
}

fn memory_given_back_inside_the_allocators_lock_does_not_deadlock() {
    let _fork = no_fork();
    let source = Running::new();
    let (nic, cache) = cache(&source);
    let (one, two) = (Raw::map(1), Raw::map(1));
    for memory in [one, two] {
        drop(block_on(cache.get(memory.range())).unwrap());
    }
    {
        let _held = nic.lock.lock().unwrap();
        // The deregistration of the first waits for the lock; the second has to be read all the
        // same.
        one.unmap();
        two.unmap();
    }
    block_on(source.space.drain());
    while cache.stats().pinned_bytes > 0 {
        thread::yield_now();
    }
}

fn fork_with_registered_memory_registers_again() {
    let _fork = alone();
    let source = Running::new();
    let (_nic, cache) = cache(&source);
    let memory = Raw::map(2);
    memory.write(7);
    let before = *block_on(cache.get(memory.range())).unwrap().handle();
    let mut child = std::process::Command::new("true");
    // SAFETY: does nothing; with a hook the standard library forks instead of spawning without a
    // copy of the memory.
    unsafe { child.pre_exec(|| Ok(())) };
    assert!(child.status().unwrap().success());
    // The parent's next write copies the page: what the device has pinned may be the child's.
    // Unless the child did not get it.
    let registered_again = *block_on(cache.get(memory.range())).unwrap().handle() != before;
    assert_eq!(registered_again, source.uffd.promises().fork == Fork::Report);
}

fn memory_that_cannot_be_watched_is_not_registered() {
    let _fork = no_fork();
    let source = Running::new();
    let (nic, cache) = cache(&source);
    let idle = Raw::map(1);
    drop(block_on(cache.get(idle.range())).unwrap());
    // So low that the kernel maps nothing there, for other tests neither.
    let memory = Raw { at: PAGE, len: PAGE };
    let refused = block_on(cache.get(memory.range())).unwrap_err();
    assert!(
        matches!(&refused, GetError::Unwatched(Unwatched::Source(UffdError::Watch { .. }))),
        "{refused}"
    );
    assert_eq!((nic.next.load(Ordering::Relaxed), cache.stats().registrations), (1, 1));
    assert_eq!(cache.stats().evictions, 0, "room would not help");
}

/// Somebody unmaps a registered page, and its event is not read while the pages beside it are
/// registered.
fn m1_a_neighbour_that_is_gone_and_not_yet_told_of_does_not_refuse_a_registration() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let builder = RegistrationCache::<Nic>::builder().watch(uffd).merge(Merge::Touching);
    let cache = builder.build(&space, Nic::default());
    // A hole of one page between others, which no other thread's memory fits in.
    let memory = Raw::map(4);
    memory.write(1);
    let (gone, beside) = (memory.part(1, 1), memory.part(2, 2));
    drop(block_on(cache.get(gone.range())).unwrap());
    thread::scope(|scope| {
        let unmapping = scope.spawn(|| gone.unmap());
        eventually("the event is there", || is_readable(&reader));
        let got = block_on(cache.get(beside.range())).map(|got| got.range());
        eventually("it is read", || reader.read().unwrap() == 0 && unmapping.is_finished());
        assert!(matches!(got, Ok(range) if range == beside.range()), "{got:?}");
    });
    block_on(deliveries.deliver()).unwrap();
    assert_eq!(cache.stats().registrations, 1);
}

/// Waits for an invalidation that somebody else has begun, while the memory is mapped over.
fn m1_what_get_registers_is_watched_however_long_it_waited() {
    struct Slow(Shared<oneshot::Receiver<()>>);
    impl IntervalNotifier for Slow {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            Ok(Some(PassFuture::new(self.0.clone().map(drop))))
        }
    }
    let _fork = no_fork();
    let source = Running::new();
    let (_nic, cache) = cache(&source);
    let memory = Raw::map(1);
    let (open, gate) = oneshot::channel();
    let slow = source.space.insert(memory.range(), Slow(gate.shared())).unwrap();
    let mut other = Box::pin(source.space.invalidate(memory.range(), Event::ProtectionVma));
    assert!(other.as_mut().now_or_never().is_none());
    let mut get = Box::pin(cache.get(memory.range()));
    assert!(get.as_mut().now_or_never().is_none(), "it waits for the invalidation");
    memory.map_over();
    open.send(()).unwrap();
    drop(block_on(other));
    drop(slow);
    let first = *block_on(get).unwrap().handle();
    assert_eq!(*block_on(cache.get(memory.range())).unwrap().handle(), first, "quiet, and cached");
    memory.map_over();
    assert_ne!(*block_on(cache.get(memory.range())).unwrap().handle(), first, "its memory is gone");
}

/// Registering discards the memory, which raises an event each time.
fn m1_a_device_that_changes_the_memory_while_it_registers_comes_to_an_end() {
    struct Discards(Raw, AtomicU64, u64);
    impl Device for Discards {
        type Handle = u64;
        type Error = std::io::Error;

        async fn register(&self, _range: AddressRange) -> std::io::Result<u64> {
            let calls = self.1.fetch_add(1, Ordering::Relaxed);
            if calls < self.2 {
                self.0.discard(rustix::mm::Advice::LinuxDontNeed);
            }
            Ok(calls)
        }

        async fn deregister(
            &self,
            _range: AddressRange,
            _handle: u64,
        ) -> Result<(), StillRegistered<u64, std::io::Error>> {
            Ok(())
        }
    }
    let _fork = no_fork();
    let source = Running::new();
    let memory = Raw::map(2);
    for (changes, other) in [(1, false), (u64::MAX, false), (u64::MAX, true)] {
        // The registered page itself, or one that only the gate tells of.
        let (page, beside) = (memory.part(0, 1), memory.part(1, 1));
        let _watch = source.uffd.watch(beside.range()).unwrap();
        let device =
            Arc::new(Discards(if other { beside } else { page }, AtomicU64::new(0), changes));
        let builder = RegistrationCache::<Arc<Discards>>::builder().watch(source.uffd.clone());
        let cache = builder.build(&source.space, device.clone());
        let got = block_on(cache.get(page.range()));
        let calls = device.1.load(Ordering::Relaxed);
        match got {
            Ok(_) => assert!(changes == 1 || other, "from before the change"),
            Err(GetError::Invalidated { tries }) => {
                assert!(!other && changes > 1 && tries <= 8, "{tries}")
            }
            Err(error) => panic!("{error}"),
        }
        assert!(calls <= if other { 1 } else { 8 }, "{calls} registrations");
    }
}

/// ofiwg/libfabric #9003: the vendor's lock and the cache's lock, taken in two orders.
fn report_9_a_lock_of_the_device_that_is_held_across_munmap_and_look_ups_blocks_nobody() {
    let _fork = no_fork();
    let source = Running::new();
    let nic = Nic { locked: true, ..Nic::default() };
    let lock = nic.lock.clone();
    let of_reporter = nic.lock.clone();
    let builder =
        RegistrationCache::<Nic>::builder().watch(source.uffd.clone()).max_registrations(2);
    let cache = builder
        .on_failure(move |_| drop(of_reporter.lock().unwrap()))
        .build(&source.space, nic.clone());
    let pinned = Raw::map(1);
    drop(block_on(cache.get(pinned.range())).unwrap());
    let (changing, fixed) = (Raw::map(3), Raw::map(8));
    thread::scope(|scope| {
        // In `libcuda`, under its lock: unmaps, looks up what is in use, prints.
        let unmapping = scope.spawn(|| {
            let held = block_on(cache.get(pinned.range())).unwrap();
            for _ in 0..1000 {
                let _held = lock.lock().unwrap();
                changing.part(1, 1).map_over();
                let text = format!("{cache:?}");
                assert!(text.contains("registrations"));
                // In use, so it is a hit unless the gate is closed; what waits is not waited for.
                drop(cache.get(pinned.range()).now_or_never());
            }
            drop(held);
        });
        let mut at = 0;
        while !unmapping.is_finished() {
            at += 1;
            nic.refuse.store(u64::from(at % 50 == 0), Ordering::Relaxed);
            drop(block_on(cache.get(changing.range())));
            drop(block_on(cache.get(fixed.part(at % 8, 1).range())));
        }
        unmapping.join().unwrap();
    });
    block_on(cache.flush());
    assert_eq!(cache.stats().pinned_bytes, 0);
}

/// ofiwg/libfabric #5347: merged regions, an unmap of a part, and what is watched then.
fn report_11_after_a_part_was_unmapped_a_merged_region_is_watched_and_the_hole_is_not() {
    let _fork = no_fork();
    let source = Running::new();
    let builder =
        RegistrationCache::<Nic>::builder().watch(source.uffd.clone()).merge(Merge::Touching);
    let cache = builder.build(&source.space, Nic::default());
    let memory = Raw::map(8);
    memory.write(1);
    let (a, b) = (memory.part(0, 4), memory.part(4, 4));
    drop(block_on(cache.get(a.range())).unwrap());
    let merged = block_on(cache.get(b.range())).unwrap();
    assert_eq!(merged.range(), memory.range());
    drop(merged);
    a.part(0, 2).unmap();
    let again = block_on(cache.get(b.range())).unwrap();
    assert_eq!(again.range(), b.range(), "what is gone is not registered with it");
    drop(again);
    assert_eq!(watched(b.range()), 4);
    block_on(cache.flush());
    assert_eq!(cache.stats().pinned_bytes, 0);
    // Given up once no change is under way, with the next watch that goes or the next delivery.
    eventually("nothing is watched any more", || {
        drop(source.uffd.watch(b.range()));
        watched(memory.range()) == 0
    });
}

fn k7_m1_a_union_is_not_refused_because_a_neighbour_was_unmapped_while_it_was_waited_for() {
    let _fork = no_fork();
    let source = Running::new();
    let builder =
        RegistrationCache::<Nic>::builder().watch(source.uffd.clone()).overlap(Overlap::Merge);
    let cache = builder.build(&source.space, Nic::default());
    // A hole of one page between others, which no other thread's memory fits in.
    let memory = Raw::map(5);
    memory.write(1);
    let held = cache.get(memory.part(1, 2).range()).wait().unwrap();
    let mut waits = Box::pin(cache.get(memory.part(2, 3).range()));
    assert!((&mut waits).now_or_never().is_none());
    memory.part(1, 1).unmap();
    drop(held);
    drop(block_on(waits).expect("its own pages are mapped"));
    // New memory in the hole is not what the device was given.
    assert!(memory.part(1, 1).map_again());
    let before = cache.stats().misses;
    let new = cache.get(memory.part(1, 1).range()).wait().unwrap();
    assert_eq!(
        cache.stats().misses,
        before + 1,
        "{} was registered before this page was mapped",
        new.range()
    );
}

fn k6_m1_exact_bytes_are_watched_by_their_pages() {
    let _fork = no_fork();
    let source = Running::new();
    let builder =
        RegistrationCache::<Nic>::builder().watch(source.uffd.clone()).matching(Match::Exact);
    let cache = builder.build(&source.space, Nic::default());
    let memory = Raw::map(2);
    memory.write(1);
    let start = memory.range().start();
    let (one, two) =
        (AddressRange::new(start + 10, 20).unwrap(), AddressRange::new(start + 100, 4096).unwrap());
    for _ in 0..20 {
        for range in [one, two] {
            assert_eq!(cache.get(range).wait().unwrap().range(), range);
        }
        let before = cache.stats().misses;
        memory.map_over();
        drop(cache.get(one).wait().unwrap());
        drop(cache.get(two).wait().unwrap());
        assert_eq!(cache.stats().misses, before + 2, "both were of memory that is gone");
    }
}

/// Pages of a range that the kernel says a userfaultfd watches.
fn watched(range: AddressRange) -> u64 {
    flagged(range, &["uw", "um"])
}

/// Pages of a range of which `smaps` has one of these flags.
pub fn flagged(range: AddressRange, flags_of: &[&str]) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut area, mut pages) = (None, 0);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap();
        if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) =
                (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            area = AddressRange::try_from(start..end).ok();
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split_whitespace().any(|flag| flags_of.contains(&flag))
        {
            let common = area.and_then(|area| area.intersection(range)).and_then(AddressRange::len);
            pages += common.unwrap_or(0) / 4096;
        }
    }
    pages
}

/// The others need mappings, too.
fn k3_when_the_process_has_no_mapping_left_for_a_watch_idle_registrations_are_given_up() {
    // Only what is asked for is watched, so that each watch of a page takes mappings.
    let source = Running::of(&AddressSpace::new(), Uffd::builder().granule(4096));
    let (_nic, cache) = cache(&source);
    let most: usize =
        std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if most > 1 << 17 {
        // More pages than a test should map.
        return;
    }
    let memory = Raw::map(most + 1000);
    let held = block_on(cache.get(memory.part(0, 1).range())).unwrap();
    for page in (2..most + 900).step_by(2) {
        drop(block_on(cache.get(memory.part(page, 1).range())).unwrap());
    }
    assert!(cache.stats().evictions > 1000, "{:?}", cache.stats());
    assert_eq!(*held.handle(), 0, "in use");
    // With all in use there is an end, and an error that says why.
    let mut all = Vec::new();
    let refused = (0..most + 900).step_by(2).find_map(|page| {
        match block_on(cache.get(memory.part(page, 1).range())) {
            Ok(registration) => {
                all.push(registration);
                None
            }
            Err(error) => Some(error),
        }
    });
    assert!(
        matches!(refused, Some(GetError::Unwatched(Unwatched::Source(UffdError::NoRoom { .. })))),
        "{refused:?}"
    );
}

/// `cargo run --release --features cache,userfaultfd --example uring_cache -- --json`.
pub fn the_proof_on_io_uring() {
    let mut build = std::process::Command::new(env!("CARGO"));
    build.args([
        "build",
        "--quiet",
        "--release",
        "--features",
        "cache,userfaultfd",
        "--example",
        "uring_cache",
    ]);
    assert!(
        build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success(),
        "the example cannot be built"
    );
    let test = std::env::current_exe().unwrap();
    let example = test.ancestors().nth(3).unwrap().join("release/examples/uring_cache");
    let run =
        |arguments: &[&str]| std::process::Command::new(&example).args(arguments).output().unwrap();
    let output = run(&["--json", "--reads", "3000"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["plain"]["wrong_reads"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(report["cached"]["wrong_reads"], 0, "{report}");
    assert_eq!(report["cached"]["reads"], 3000);
    assert!(
        report["cached"]["hit_ns"].as_f64().unwrap() > 0.0
            && report["register_every_time_ns"].as_f64().unwrap() > 0.0,
        "{report}"
    );
    // Without an unmap the plain cache is right, and the example says that it has shown nothing.
    let nothing = run(&["--reads", "10", "--remap-one-in", "1000000"]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("nothing was shown"));
    assert_eq!(run(&["--reads", "0"]).status.code(), Some(2));
}

/// A source tells one space; a cache of another would never hear of anything.
fn k5_a_cache_whose_source_tells_another_space_is_refused() {
    let _fork = no_fork();
    let (source, other) = (Running::new(), AddressSpace::new());
    let build = || {
        RegistrationCache::<Nic>::builder().watch(source.uffd.clone()).build(&other, Nic::default())
    };
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(build)).unwrap_err();
    assert!(refused.downcast_ref::<&str>().is_some_and(|text| text.contains("another space")));
}

/// Takes its time to deregister: until the gate is open, or for ever.
#[derive(Clone)]
struct Leaves(Arc<()>, Shared<oneshot::Receiver<()>>);

impl Device for Leaves {
    type Handle = ();
    type Error = std::io::Error;

    async fn register(&self, _: AddressRange) -> std::io::Result<()> {
        Ok(())
    }

    async fn deregister(
        &self,
        _: AddressRange,
        (): (),
    ) -> Result<(), StillRegistered<(), std::io::Error>> {
        self.1.clone().await.map_err(|_| unreachable!("the gate stays"))
    }
}

/// In use when all handles go, and its device takes its time: nobody can wait for it any more, and
/// nothing is left.
fn k1_a_watched_registration_that_nobody_can_reach_leaves_nothing_behind() {
    let _fork = no_fork();
    let (_closed, gate) = oneshot::channel();
    let device = Leaves(Arc::new(()), gate.shared());
    let space = AddressSpace::new();
    let (uffd, reader, deliveries) = Uffd::builder().fork(Fork::Ignore).open(&space).unwrap();
    let cache =
        RegistrationCache::<Leaves>::builder().watch(uffd.clone()).build(&space, device.clone());
    let held = block_on(cache.get(Raw::map(1).range())).unwrap();
    drop(cache);
    drop((uffd, reader, deliveries, space));
    assert_eq!(Arc::strong_count(&device.0), 2, "it is in use");
    drop(held);
    assert_eq!(Arc::strong_count(&device.0), 1, "the device is kept for ever");
}

/// The same, but the source is still there, and tells that the memory goes.
fn k1_a_watched_registration_that_its_source_reaches_is_waited_for() {
    let _fork = no_fork();
    let (open, gate) = oneshot::channel();
    let device = Leaves(Arc::new(()), gate.shared());
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().fork(Fork::Ignore).open(&space).unwrap();
    let cache = RegistrationCache::<Leaves>::builder().watch(uffd).build(&space, device.clone());
    let memory = Raw::map(1);
    let held = block_on(cache.get(memory.range())).unwrap();
    drop((cache, space));
    drop(held);
    assert_eq!(Arc::strong_count(&device.0), 2, "the device has it registered");
    read_during(&mut reader, || memory.unmap());
    let mut delivery = Box::pin(deliveries.deliver());
    assert!(delivery.as_mut().now_or_never().is_none(), "it is registered until the gate is open");
    open.send(()).unwrap();
    block_on(delivery).unwrap();
    assert_eq!(Arc::strong_count(&device.0), 1, "nothing is left");
}
