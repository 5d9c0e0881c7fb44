//! `source` on real memory. Where userfaultfd is not permitted, the tests that need it count as
//! ignored, and say why.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unit_arg
)]

mod batches;
mod cache;
mod corners;
mod delivering;
mod filtered;
mod forks;
#[path = "../support/formats.rs"]
mod formats;
mod given_up;
mod handles;
mod kinds;
mod loud;
mod mapping;
mod memory;
mod never_stale;
mod refused;
mod shared;
mod silent;
mod uffd;

use libtest_mimic::{Arguments, Trial};
use shootdown::AddressSpace;
use shootdown::source::{Fork, Uffd};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts what each thread asks of the allocator, frees included: those take its locks as well.
struct Counting;

thread_local! {
    static ALLOCATOR_CALLS: Cell<u64> = const { Cell::new(0) };
    static ALLOCATED: Cell<i64> = const { Cell::new(0) };
}

/// How often this thread has called the allocator.
pub fn allocator_calls() -> u64 {
    ALLOCATOR_CALLS.get()
}

/// How many more allocations this thread has made than it has freed.
pub fn allocated() -> i64 {
    ALLOCATED.get()
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATOR_CALLS.set(ALLOCATOR_CALLS.get() + 1);
        ALLOCATED.set(ALLOCATED.get() + 1);
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATOR_CALLS.set(ALLOCATOR_CALLS.get() + 1);
        ALLOCATED.set(ALLOCATED.get() - 1);
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    // Called again by the test without permission, as another user.
    if std::env::var_os("SHOOTDOWN_AS_NOBODY").is_some() {
        let space = AddressSpace::new();
        match Uffd::open(&space) {
            Ok((uffd, ..)) => println!("by default: fork: {:?}", uffd.promises().fork),
            Err(error) => println!("by default: {error}"),
        }
        match Uffd::builder().fork(Fork::Report).open(&space) {
            Ok(_) => println!("report: permitted"),
            Err(error) => println!("report: {error}"),
        }
        return;
    }
    // Called again by `isolated`. The first need no userfaultfd.
    let by_themselves =
        [refused::isolated_tests(), mapping::isolated_tests(), filtered::isolated_tests()].concat();
    let watched_by_themselves = [
        never_stale::isolated_tests(),
        forks::isolated_tests(),
        corners::isolated_tests(),
        given_up::isolated_tests(),
        cache::isolated_tests(),
        loud::isolated_tests(),
        filtered::watching_tests(),
    ]
    .concat();
    let of_huge_pages = [loud::huge_tests(), silent::huge_tests()].concat();
    if let Some(name) = std::env::var_os("SHOOTDOWN_ONE") {
        let children = handles::children();
        let all = by_themselves
            .iter()
            .chain(&watched_by_themselves)
            .chain(&of_huge_pages)
            .chain(&children);
        let test =
            all.into_iter().find(|(test, _)| *test == name).expect("the parent names a test");
        return (test.1)();
    }
    let refused = Uffd::open(&AddressSpace::new()).err().map(|error| error.to_string());
    // And what a test alone needs: swap, a newer kernel.
    let needs_more = |trials: Vec<(&'static str, fn())>, lacking: fn(&str) -> Option<String>| {
        let refused = refused.clone();
        trials.into_iter().map(move |(name, test)| {
            let trial = Trial::test(name, move || Ok(test()));
            match refused.clone().or_else(|| lacking(name)) {
                None => trial,
                Some(why) => trial.with_kind(format!("skipped: {why}")).with_ignored_flag(true),
            }
        })
    };
    let needs = |trials| needs_more(trials, |_| None);
    let alone = |trials: Vec<(&'static str, fn())>| {
        trials.into_iter().map(|(name, _)| Trial::test(name, move || Ok(isolated(name))))
    };
    let watched_alone = alone(watched_by_themselves).map(|trial| match &refused {
        None => trial,
        Some(why) => trial.with_kind(format!("skipped: {why}")).with_ignored_flag(true),
    });
    let watched_alone: Vec<_> = watched_alone.collect();
    let pages = kinds::HugePages::reserve();
    let huge = of_huge_pages.into_iter().map(|(name, _)| {
        let trial = Trial::test(name, move || Ok(kinds::HugePages::isolated(name)));
        match refused.as_ref().or(pages.as_ref().err()) {
            None => trial,
            Some(why) => trial.with_kind(format!("skipped: {why}")).with_ignored_flag(true),
        }
    });
    let huge: Vec<_> = huge.collect();
    let no_ring =
        io_uring::IoUring::new(2).err().map(|error| format!("io_uring is not permitted: {error}"));
    let proof = Trial::test("the_proof_on_io_uring", || Ok(cache::the_proof_on_io_uring()));
    // The example of the proof is built first.
    let cargo = std::process::Command::new(env!("CARGO")).arg("--version").output();
    let sources = cargo.err().map(|error| format!("cargo cannot be run by this user: {error}"));
    let proof = match refused.clone().or(no_ring).or(sources) {
        None => proof,
        Some(why) => proof.with_kind(format!("skipped: {why}")).with_ignored_flag(true),
    };
    let plain = mapping::tests()
        .into_iter()
        .chain(shared::tests())
        .chain(handles::tests())
        .map(|(name, test)| Trial::test(name, move || Ok(test())))
        .chain(alone(by_themselves));
    let trials = plain
        .chain(needs(uffd::tests()))
        .chain(needs(cache::tests()))
        .chain(needs(handles::watching_tests()))
        .chain(needs(loud::tests()))
        .chain(needs_more(silent::tests(), silent::lacking))
        .chain(needs(never_stale::tests()))
        .chain(needs(corners::tests()))
        .chain(needs(batches::tests()))
        .chain(needs(delivering::tests()))
        .chain(watched_alone)
        .chain(huge)
        .chain([proof])
        .collect();
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    drop(pages);
    conclusion.exit();
}

/// Runs a test of this program in a process of its own: it changes what the whole process has, or
/// forks.
pub fn isolated(name: &str) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .env("SHOOTDOWN_ONE", name)
        .output()
        .unwrap();
    print!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The name of each function and the function.
macro_rules! list {
    ($($test:ident),* $(,)?) => {
        $crate::list!(fn tests: $($test),*);
    };
    (fn $name:ident: $($test:ident),* $(,)?) => {
        pub fn $name() -> Vec<(&'static str, fn())> {
            vec![$((stringify!($test), $test as fn())),*]
        }
    };
}
pub(crate) use list;
