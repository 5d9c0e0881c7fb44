//! What a fork leaves of a source: everything in the parent, nothing in the child (M4). In
//! processes of their own, because a fork concerns all threads.

use crate::memory::{PAGE, Raw};
use crate::uffd::{Running, eventually, is_readable, log};
use futures::executor::block_on;
use rustix::mm::Advice;
use shootdown::cache::{Device, Registration, RegistrationCache, StillRegistered};
use shootdown::source::{Deliveries, Fork, MapError, OwnedMapping, Reader, Uffd, UffdError, Watch};
use shootdown::{AddressRange, AddressSpace, Event};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

crate::list![fn isolated_tests:
    m4_h2_in_a_child_every_handle_is_inert_and_the_parents_watches_stay,
    m4_a_thousand_forks_beside_threads_that_get_and_unmap,
    m4_in_a_child_an_owned_mapping_calls_no_driver_of_the_parent,
    m3_h3_a_fork_at_the_limit_of_descriptors_is_reported_and_nobody_hangs,
    m8_kept_pages_are_not_in_the_child_and_stay_the_parents,
    m8_whoever_ignores_forks_is_not_told_of_them,
    m5_a_thread_that_does_not_get_its_processor_inside_madvise_leaves_nothing_stale,
];

/// Each registration has a number of its own.
#[derive(Clone, Default)]
struct Nic(Arc<AtomicU64>);

impl Device for Nic {
    type Handle = u64;
    type Error = std::io::Error;

    async fn register(&self, _: AddressRange) -> std::io::Result<u64> {
        Ok(self.0.fetch_add(1, Ordering::Relaxed))
    }

    async fn deregister(
        &self,
        _: AddressRange,
        _: u64,
    ) -> Result<(), StillRegistered<u64, std::io::Error>> {
        Ok(())
    }
}

/// Forks. The child runs `child`, which must allocate nothing that another thread of the parent may
/// be allocating (glibc makes that safe), and leaves with what it returns, without destructors.
/// Returns the child's process.
pub fn fork(child: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child runs on this thread's copy of the stack, and ends in `_exit`.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let code = child();
            // SAFETY: ends the process.
            unsafe { libc::_exit(code) }
        }
        process => process,
    }
}

/// Waits for a child, at most some seconds, and returns its exit code; a child that hangs is
/// killed.
pub fn exit_code(process: libc::pid_t) -> Option<i32> {
    let (began, mut status) = (Instant::now(), 0);
    loop {
        // SAFETY: `status` is ours.
        match unsafe { libc::waitpid(process, &raw mut status, libc::WNOHANG) } {
            0 if began.elapsed() > Duration::from_secs(20) => {
                // SAFETY: a child of ours.
                unsafe { libc::kill(process, libc::SIGKILL) };
                return None;
            }
            0 => thread::yield_now(),
            _ => break,
        }
    }
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}

/// All that a process can have of a source.
struct Handles {
    watch: Watch,
    held: Registration<Nic>,
    cache: RegistrationCache<Nic>,
    deliveries: Deliveries,
    reader: Reader,
    uffd: Uffd,
}

/// Uses all of them in the child; returns the number of the first use that was not refused as it
/// should be, or 0.
fn use_in_child(handles: &mut Handles, memory: Raw) -> i32 {
    let forked = |error: std::io::Error| {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<UffdError>());
        inner == Some(&UffdError::Forked)
    };
    let Handles { watch, held, cache, deliveries, reader, uffd } = handles;
    let got = block_on(cache.get(memory.part(2, 1).range()));
    let checks = [
        uffd.is_forked() && !watch.is_armed(),
        uffd.watch(memory.part(0, 1).range()).map(drop) == Err(UffdError::Forked),
        watch.renew() == Err(UffdError::Forked),
        reader.read().is_err_and(forked)
            && reader.run().is_err_and(forked)
            && deliveries.run().is_err_and(forked),
        block_on(deliveries.deliver()) == Err(UffdError::Forked),
        got.is_err_and(|error| error.to_string().contains("fork")) && *held.handle() == 0,
        // A source of its own works in the child.
        Uffd::builder()
            .fork(Fork::Ignore)
            .open(&AddressSpace::new())
            .is_ok_and(|(own, ..)| own.watch(memory.range()).is_ok()),
    ];
    uffd.stop();
    checks.iter().position(|check| !check).map_or(0, |failed| failed as i32 + 1)
}

fn m4_h2_in_a_child_every_handle_is_inert_and_the_parents_watches_stay() {
    // By hand, so that the child has the reader and the deliveries, too. Forks are ignored: nobody
    // would read their events here.
    let space = AddressSpace::new();
    let (uffd, reader, deliveries) = Uffd::builder().fork(Fork::Ignore).open(&space).unwrap();
    let memory = Raw::map(4);
    let watch = uffd.watch(memory.part(0, 2).range()).unwrap();
    let cache =
        RegistrationCache::<Nic>::builder().watch(uffd.clone()).build(&space, Nic::default());
    let held = block_on(cache.get(memory.part(2, 1).range())).unwrap();
    drop(block_on(cache.get(memory.part(3, 1).range())).unwrap());
    let (subscription, told) = log(&space, memory.part(0, 2).range());
    let mut handles = Some(Handles { watch, held, cache, deliveries, reader, uffd });
    let process = fork(|| {
        let failed = use_in_child(handles.as_mut().unwrap(), memory);
        drop(handles.take());
        failed
    });
    assert_eq!(exit_code(process), Some(0), "the number of the check that failed in the child");
    // Everything is as it was.
    let Handles { watch, held, cache, mut deliveries, mut reader, uffd } = handles.unwrap();
    assert!(!uffd.is_forked() && watch.is_armed());
    assert_eq!(*block_on(cache.get(memory.part(2, 1).range())).unwrap().handle(), *held.handle());
    let changing = thread::spawn(move || {
        memory.part(0, 1).unmap();
        memory.part(3, 1).map_over();
    });
    while !changing.is_finished() {
        reader.read().unwrap();
        block_on(deliveries.deliver()).unwrap();
    }
    changing.join().unwrap();
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), [(Event::Unmap, memory.part(0, 1).range())]);
    assert_eq!(cache.stats().invalidations, 1, "the registration of page 3 has ended with it");
    assert!(uffd.watch(memory.part(1, 1).range()).is_ok());
}

fn m4_a_thousand_forks_beside_threads_that_get_and_unmap() {
    let source = Running::new();
    let nic = Nic::default();
    let cache =
        RegistrationCache::<Nic>::builder().watch(source.uffd.clone()).build(&source.space, nic);
    let stop = AtomicBool::new(false);
    let rounds: Vec<_> = (0..4).map(|_| AtomicU64::new(0)).collect();
    let forks = std::env::var("SHOOTDOWN_FORKS")
        .map_or(1000, |forks| forks.parse().expect("SHOOTDOWN_FORKS is a number"));
    let watched = Raw::map(1);
    let watch = source.uffd.watch(watched.range()).unwrap();
    thread::scope(|scope| {
        for rounds in &rounds {
            let (cache, stop) = (cache.clone(), &stop);
            scope.spawn(move || {
                // Addresses of its own, so that nobody takes them meanwhile.
                let memory = Raw::map(2);
                while !stop.load(Ordering::Relaxed) {
                    let registered = *block_on(cache.get(memory.range())).unwrap().handle();
                    memory.map_over();
                    assert_ne!(
                        *block_on(cache.get(memory.range())).unwrap().handle(),
                        registered,
                        "it is stale"
                    );
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut children = Vec::new();
        for at in 0..forks {
            let (uffd, cache) = (source.uffd.clone(), cache.clone());
            let held = (at % 3 == 0).then(|| block_on(cache.get(watched.range())).unwrap());
            // Copies of what the parent goes on with: the child drops its own.
            let mine = source.uffd.watch(watched.range()).unwrap();
            let mut in_child = Some((uffd, cache, held, mine));
            children.push(fork(|| {
                drop(in_child.take());
                0
            }));
            drop(in_child);
            if children.len() == 16 {
                children
                    .drain(..)
                    .for_each(|process| assert_eq!(exit_code(process), Some(0), "a child hangs"));
            }
        }
        children
            .drain(..)
            .for_each(|process| assert_eq!(exit_code(process), Some(0), "a child hangs"));
        stop.store(true, Ordering::Relaxed);
    });
    let rounds: Vec<_> = rounds.iter().map(|rounds| rounds.load(Ordering::Relaxed)).collect();
    println!("{forks} forks beside {rounds:?} rounds");
    assert!(rounds.iter().all(|rounds| *rounds > 10), "{rounds:?}");
    // The parent's watches work.
    assert!(watch.is_armed());
    let (subscription, told) = log(&source.space, watched.range());
    watched.unmap();
    block_on(subscription.read_begin());
    assert!(told.lock().unwrap().contains(&(Event::Unmap, watched.range())));
}

fn m4_in_a_child_an_owned_mapping_calls_no_driver_of_the_parent() {
    let space = AddressSpace::new();
    let mut mapping = OwnedMapping::shared(&space, 2 * PAGE).unwrap();
    let (_subscription, told) = log(&space, AddressRange::ALL);
    let mut mine = Some(OwnedMapping::shared(&space, PAGE).unwrap());
    mine.as_mut().unwrap().write(0, b"parent");
    let process = fork(|| {
        let refused = matches!(block_on(mapping.discard(0..PAGE)), Err(MapError::Forked))
            && matches!(block_on(mapping.resize(PAGE)), Err(MapError::Forked))
            && matches!(block_on(mapping.map_again()), Err(MapError::Forked));
        let unmapped = block_on(mine.take().unwrap().unmap());
        let refused = refused
            && unmapped.as_ref().is_err_and(|error| {
                let text = format!("{error} {error:?}");
                matches!(error.error(), MapError::Forked)
                    && text.contains("could not be unmapped: this process is a child")
                    && text.contains("UnmapError { mapping: OwnedMapping")
            });
        // What could not be unmapped is still there.
        let mut text = [0; 6];
        let kept = unmapped.expect_err("it is the parent's").into_mapping();
        kept.read(0, &mut text);
        let refused = refused && &text == b"parent";
        mapping.write(0, b"child");
        drop(kept);
        i32::from(!refused || !told.lock().unwrap().is_empty())
    });
    assert_eq!(exit_code(process), Some(0));
    let mut text = [0; 5];
    mapping.read(0, &mut text);
    assert_eq!(
        (&text, told.lock().unwrap().len()),
        (b"child", 0),
        "it is shared, and nobody was told of anything"
    );
    let mut text = [0; 6];
    mine.as_ref().unwrap().read(0, &mut text);
    assert_eq!(&text, b"parent");
    block_on(mapping.discard(0..PAGE)).unwrap();
    assert_eq!(told.lock().unwrap().len(), 1);
}

fn m3_h3_a_fork_at_the_limit_of_descriptors_is_reported_and_nobody_hangs() {
    let space = AddressSpace::new();
    let Ok((uffd, mut reader, mut deliveries)) = Uffd::builder().fork(Fork::Report).open(&space)
    else {
        println!("an ordinary user gets no events of forks");
        return;
    };
    let memory = Raw::map(2);
    let _watch = uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&space, memory.range());
    let reading = thread::spawn(move || {
        reader.run().unwrap();
        reader
    });
    let delivering = thread::spawn(move || deliveries.run().unwrap());
    // The reader's thread is in `run` once it has read something.
    memory.part(1, 1).unmap();
    block_on(subscription.read_begin());
    told.lock().unwrap().clear();
    // Not one descriptor is left.
    let mut taken = Vec::new();
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 4096 };
    // SAFETY: reads a structure that is ours.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    while let Ok(file) = std::fs::File::open("/dev/null") {
        taken.push(file);
    }
    for _ in 0..20 {
        let process = fork(|| 0);
        assert_eq!(exit_code(process), Some(0));
        block_on(subscription.read_begin());
        // The descriptor in reserve is there again for each.
        let told = std::mem::take(&mut *told.lock().unwrap());
        assert_eq!(told, [(Event::ProtectionPage, memory.range())], "the fork was not reported");
    }
    // Also when another thread takes the one that was in reserve.
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let stolen = std::fs::File::open("/dev/null");
                for _ in 0..100 {
                    thread::yield_now();
                }
                drop(stolen);
            }
        });
        for _ in 0..20 {
            assert_eq!(exit_code(fork(|| 0)), Some(0));
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(taken);
    uffd.stop();
    delivering.join().unwrap();
    drop(reading.join().unwrap());
}

fn m8_kept_pages_are_not_in_the_child_and_stay_the_parents() {
    let source = Running::of(&AddressSpace::new(), Uffd::builder().fork(Fork::Keep));
    assert_eq!(source.uffd.promises().fork, Fork::Keep);
    let memory = Raw::map(3);
    memory.write(1);
    let watch = source.uffd.watch(memory.part(1, 1).range()).unwrap();
    let (subscription, told) = log(&source.space, memory.range());
    let in_child = |page: usize| {
        let process = fork(|| i32::from(memory.part(page, 1).look().is_some()));
        exit_code(process).unwrap()
    };
    assert_eq!(
        [in_child(0), in_child(1), in_child(2)],
        [1, 0, 1],
        "exactly what is watched is not in the child"
    );
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), [], "nothing has happened to the parent's pages");
    drop(watch);
    assert_eq!(in_child(1), 1, "no longer watched, it is as any memory");
}

fn m8_whoever_ignores_forks_is_not_told_of_them() {
    let source = Running::of(&AddressSpace::new(), Uffd::builder().fork(Fork::Ignore));
    let memory = Raw::map(1);
    memory.write(1);
    let _watch = source.uffd.watch(memory.range()).unwrap();
    let (subscription, told) = log(&source.space, memory.range());
    assert_eq!(exit_code(fork(|| i32::from(memory.look().is_some()))), Some(1));
    block_on(subscription.read_begin());
    assert_eq!(*told.lock().unwrap(), []);
}

fn pin(cpu: usize) {
    // SAFETY: a structure of ours, filled here.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Registers the contents of the first byte.
struct Contents;

impl Device for Contents {
    type Handle = u8;
    type Error = std::io::Error;

    async fn register(&self, range: AddressRange) -> std::io::Result<u8> {
        let page = Raw { at: range.start() as usize, len: PAGE };
        page.look().map(|bytes| bytes[0]).ok_or_else(|| std::io::Error::other("not mapped"))
    }

    async fn deregister(
        &self,
        _: AddressRange,
        _: u8,
    ) -> Result<(), StillRegistered<u8, std::io::Error>> {
        Ok(())
    }
}

/// The event of `madvise` is read, and the thread inside it does not get its processor before the
/// time for that is used up: then a look-up gets the old page, and nobody has been told that the
/// call returned. Once it has, the range is invalidated again.
fn m5_a_thread_that_does_not_get_its_processor_inside_madvise_leaves_nothing_stale() {
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().fork(Fork::Ignore).open(&space).unwrap();
    let cache =
        RegistrationCache::<Contents>::builder().watch(uffd.clone()).build(&space, Contents);
    let memory = Raw::map(1);
    memory.write(0xaa);
    assert_eq!(*block_on(cache.get(memory.range())).unwrap().handle(), 0xaa);
    let (busy, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let others = thread::available_parallelism().unwrap().get() - 1;
    pin(others);
    thread::scope(|scope| {
        scope.spawn(|| {
            pin(0);
            let real_time = libc::sched_param { sched_priority: 10 };
            // SAFETY: reads a structure of ours. An ordinary user is refused, and the thread shares
            // the processor then.
            unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const real_time) };
            while !stop.load(Ordering::SeqCst) {
                if busy.load(Ordering::SeqCst) {
                    std::hint::spin_loop()
                } else {
                    thread::yield_now()
                }
            }
        });
        let discarding = scope.spawn(|| {
            pin(0);
            memory.discard(Advice::LinuxDontNeed);
        });
        eventually("the event is there", || is_readable(&reader));
        busy.store(true, Ordering::SeqCst);
        assert_eq!(reader.read().unwrap(), 1);
        assert_eq!(block_on(deliveries.deliver()), Ok(1));
        let between = *block_on(cache.get(memory.range())).unwrap().handle();
        println!(
            "between: {between:#x}; {:?}; next look: {:?}",
            uffd.stats(),
            deliveries.next_look()
        );
        assert!(uffd.stats().unsettled == 0 || deliveries.next_look().is_some());
        busy.store(false, Ordering::SeqCst);
        discarding.join().unwrap();
        stop.store(true, Ordering::SeqCst);
    });
    // What `run` does by itself.
    block_on(deliveries.deliver()).unwrap();
    assert_eq!(*block_on(cache.get(memory.range())).unwrap().handle(), memory.look().unwrap()[0]);
    assert!(deliveries.next_look().is_none());
}
