//! The registration cache on memory that is unmapped behind its back.

use crate::memory::{PAGE, Raw};
use crate::uffd::{Running, alone, no_fork};
use futures::executor::block_on;
use shootdown::AddressRange;
use shootdown::cache::{Device, GetError, RegistrationCache};
use shootdown::source::Fork;
use std::os::unix::process::CommandExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

crate::list![
    after_munmap_no_look_up_finds_the_registration,
    memory_given_back_inside_the_allocators_lock_does_not_deadlock,
    fork_with_registered_memory_registers_again,
    memory_that_cannot_be_watched_is_not_registered,
];

/// Counts; each registration has a number of its own.
#[derive(Clone, Default)]
struct Nic {
    next: Arc<AtomicU64>,
    /// Taken by each deregistration, as an allocator's lock would be.
    lock: Arc<Mutex<()>>,
}

impl Device for Nic {
    type Handle = u64;
    type Error = std::io::Error;

    async fn register(&self, _range: AddressRange) -> std::io::Result<u64> {
        Ok(self.next.fetch_add(1, Ordering::Relaxed))
    }

    async fn deregister(&self, _range: AddressRange, _handle: &u64) -> std::io::Result<()> {
        drop(self.lock.lock().unwrap());
        Ok(())
    }
}

fn cache(source: &Running) -> (Nic, RegistrationCache<Nic>) {
    let nic = Nic::default();
    (nic.clone(), RegistrationCache::<Nic>::builder().watch(source.uffd.clone()).build(&source.space, nic))
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
        // By this thread or by another: who knows that the call has returned gets no answer from before it.
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
        // The deregistration of the first waits for the lock; the second has to be read all the same.
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
    // SAFETY: does nothing; with a hook the standard library forks instead of spawning without a copy of the memory.
    unsafe { child.pre_exec(|| Ok(())) };
    assert!(child.status().unwrap().success());
    // The parent's next write copies the page: what the device has pinned may be the child's. Unless the child did not get it.
    let registered_again = *block_on(cache.get(memory.range())).unwrap().handle() != before;
    assert_eq!(registered_again, source.uffd.promises().fork == Fork::Report);
}

fn memory_that_cannot_be_watched_is_not_registered() {
    let _fork = no_fork();
    let source = Running::new();
    let (nic, cache) = cache(&source);
    // So low that the kernel maps nothing there, for other tests neither.
    let memory = Raw { at: PAGE, len: PAGE };
    let refused = block_on(cache.get(memory.range())).unwrap_err();
    assert!(matches!(&refused, GetError::Unwatched(why) if why.contains("cannot be watched")), "{refused}");
    assert_eq!((nic.next.load(Ordering::Relaxed), cache.stats().registrations), (0, 0));
}

/// `cargo run --release --features userfaultfd --example uring_cache -- --json`.
pub fn the_proof_on_io_uring() {
    let mut build = std::process::Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--release", "--features", "userfaultfd", "--example", "uring_cache"]);
    assert!(build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success(), "the example cannot be built");
    let test = std::env::current_exe().unwrap();
    let example = test.ancestors().nth(3).unwrap().join("release/examples/uring_cache");
    let run = |arguments: &[&str]| std::process::Command::new(&example).args(arguments).output().unwrap();
    let output = run(&["--json", "--reads", "3000"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["plain"]["wrong_reads"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(report["cached"]["wrong_reads"], 0, "{report}");
    assert_eq!(report["cached"]["reads"], 3000);
    assert!(
        report["cached"]["hit_ns"].as_f64().unwrap() > 0.0 && report["register_every_time_ns"].as_f64().unwrap() > 0.0,
        "{report}"
    );
    // Without an unmap the plain cache is right, and the example says that it has shown nothing.
    let nothing = run(&["--reads", "10", "--remap-one-in", "1000000"]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("nothing was shown"));
    assert_eq!(run(&["--reads", "0"]).status.code(), Some(2));
}
