//! A soak on real memory: threads that unmap, map over, move, discard, free and fork at random,
//! beside caches, mirrors and io_uring reads that are checked byte by byte.
//!
//! `SOAK_SECONDS=60 cargo test --release --features cache,userfaultfd --test memory_soak` is the
//! long form; its last line is one JSON object. It ends at the first look-up that answers from
//! before a change that had returned, and when a thread gets nowhere for 20 s (with `SOAK_KEEP=1`
//! it then stays, to be looked at).
//!
//! Each page that a thread owns holds a stamp, a number that only rises. The thread changes the
//! page, then writes the next stamp, then says which: whoever finds an earlier stamp than was said
//! before he asked has been given what is gone.
#![allow(missing_docs, unreachable_pub, clippy::print_stdout)]

mod episode;
#[path = "../../examples/uring_cache/memory.rs"]
#[allow(dead_code)]
mod memory;
mod owner;
#[path = "../../examples/uring_cache/ring.rs"]
mod ring;

use episode::{Current, Episode};
use owner::Slot;
use shootdown::AddressSpace;
use shootdown::source::{Fork, Uffd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Threads that change their own memory and look it up.
const OWNERS: usize = 4;

/// What all threads count.
#[derive(Default)]
pub struct Counts {
    changes: AtomicU64,
    look_ups: AtomicU64,
    mirrored: AtomicU64,
    ring_reads: AtomicU64,
    forks: AtomicU64,
    refused: AtomicU64,
    /// Of each owner, and of the one who looks at all.
    progress: [AtomicU64; OWNERS + 1],
    stale: Mutex<Option<String>>,
}

impl Counts {
    fn stale(&self, what: String) {
        self.stale.lock().unwrap().get_or_insert(what);
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().map_or(otherwise, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}"))
    })
}

/// Says where each thread is in the kernel.
fn threads() {
    for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let of = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        println!(
            "{:?}: {} in {}: {}",
            task.file_name(),
            of("comm").trim(),
            of("wchan"),
            of("syscall").trim()
        );
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return println!("memory_soak: test");
    }
    let filter = arguments.iter().find(|argument| !argument.starts_with('-'));
    if filter.is_some_and(|filter| !"memory_soak".contains(filter.as_str())) {
        return;
    }
    if let Err(error) = Uffd::open(&AddressSpace::new()) {
        return println!("memory_soak: skipped: {error}");
    }
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        std::process::exit(4);
    }));
    let (seconds, seed) =
        (number("SOAK_SECONDS", 3), number("SOAK_SEED", u64::from(std::process::id())));
    let counts = Arc::new(Counts::default());
    let slots: Vec<Arc<Slot>> = (0..OWNERS).map(|own| Arc::new(Slot::new(own))).collect();
    let current = Arc::new(Current::new(Episode::begin(seed)));
    let began = Instant::now();
    for (own, slot) in slots.iter().enumerate() {
        let (counts, slot, current) = (counts.clone(), slot.clone(), current.clone());
        std::thread::Builder::new()
            .name(format!("owner {own}"))
            .spawn(move || owner::own(own, seed, &slot, &current, &counts))
            .expect("a thread");
    }
    let looks = (counts.clone(), slots.clone(), current.clone());
    std::thread::spawn(move || owner::look(seed, &looks.1, &looks.2, &looks.0));
    let (mut episodes, mut last, mut since) =
        (0_u64, [0; OWNERS + 1], [Instant::now(); OWNERS + 1]);
    let (mut unsettled, mut forks) = (0, Fork::Ignore);
    while began.elapsed() < Duration::from_secs(seconds) {
        for step in 0..10 {
            std::thread::park_timeout(Duration::from_millis(50));
            if step % 3 == 0 {
                owner::fork(&current.get(), &counts);
            }
            if let Some(what) = &*counts.stale.lock().unwrap() {
                println!("stale after {:.1} s, seed {seed}: {what}", began.elapsed().as_secs_f64());
                println!("{:?}", current.get());
                std::process::exit(1);
            }
            for (at, progress) in counts.progress.iter().enumerate() {
                let now = progress.load(Ordering::Relaxed);
                if now != last[at] {
                    (last[at], since[at]) = (now, Instant::now());
                } else if since[at].elapsed() > Duration::from_secs(20) {
                    println!(
                        "thread {at} gets nowhere after {:.1} s, seed {seed}",
                        began.elapsed().as_secs_f64()
                    );
                    println!("{:?}", current.get());
                    threads();
                    if std::env::var_os("SOAK_KEEP").is_some() {
                        std::thread::park();
                    }
                    std::process::exit(3);
                }
            }
        }
        // The source ends while everybody goes on, each time in another way; then there is a new
        // one.
        let old = current.get();
        old.end();
        unsettled += old.uffd.stats().unsettled;
        forks = old.uffd.promises().fork;
        episodes += 1;
        std::thread::park_timeout(Duration::from_millis(20));
        current.set(Episode::begin(seed.wrapping_add(episodes)));
    }
    let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
    println!(
        "{{\"seconds\": {seconds}, \"seed\": {seed}, \"episodes\": {episodes}, \"fork_mode\": \"{forks:?}\", \"changes\": {}, \"look_ups\": {}, \"mirrored\": {}, \
         \"ring_reads\": {}, \"forks\": {}, \"refused\": {}, \"unsettled\": {unsettled}, \"stale\": 0, \"hangs\": 0}}",
        count(&counts.changes),
        count(&counts.look_ups),
        count(&counts.mirrored),
        count(&counts.ring_reads),
        count(&counts.forks),
        count(&counts.refused),
    );
    assert!(
        count(&counts.changes) > 100
            && count(&counts.look_ups) > 100
            && count(&counts.mirrored) > 100,
        "it did nothing"
    );
    std::process::exit(0);
}
