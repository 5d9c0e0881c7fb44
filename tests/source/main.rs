//! `source` on real memory. Where userfaultfd is not permitted, the tests that need it count as ignored, and say why.
#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr, clippy::unit_arg)]

mod cache;
mod kinds;
mod loud;
mod mapping;
mod memory;
mod refused;
mod shared;
mod silent;
mod uffd;

use libtest_mimic::{Arguments, Trial};
use shootdown::AddressSpace;
use shootdown::source::Uffd;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts what each thread asks of the allocator, frees included: those take its locks as well.
struct Counting;

thread_local!(static ALLOCATOR_CALLS: Cell<u64> = const { Cell::new(0) });

/// How often this thread has called the allocator.
pub fn allocator_calls() -> u64 {
    ALLOCATOR_CALLS.get()
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATOR_CALLS.set(ALLOCATOR_CALLS.get() + 1);
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATOR_CALLS.set(ALLOCATOR_CALLS.get() + 1);
        // SAFETY: the caller's obligations are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    // Called again by the test without permission, as another user.
    if std::env::var_os("SHOOTDOWN_AS_NOBODY").is_some() {
        match Uffd::open(&AddressSpace::new()) {
            Ok(_) => println!("permitted"),
            Err(error) => println!("{error}"),
        }
        return;
    }
    // Called again by a test that uses up what the process may have.
    if let Some(name) = std::env::var_os("SHOOTDOWN_BY_ITSELF") {
        return refused::by_itself(name.to_str().unwrap());
    }
    let refused = Uffd::open(&AddressSpace::new()).err().map(|error| error.to_string());
    // And what a test alone needs: huge pages, swap, a newer kernel.
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
    let no_ring = io_uring::IoUring::new(2).err().map(|error| format!("io_uring is not permitted: {error}"));
    let proof = Trial::test("the_proof_on_io_uring", || Ok(cache::the_proof_on_io_uring()));
    let proof = match refused.clone().or(no_ring) {
        None => proof,
        Some(why) => proof.with_kind(format!("skipped: {why}")).with_ignored_flag(true),
    };
    let plain = mapping::tests()
        .into_iter()
        .chain(shared::tests())
        .chain(refused::tests())
        .map(|(name, test)| Trial::test(name, move || Ok(test())));
    let trials = plain
        .chain(needs(uffd::tests()))
        .chain(needs(cache::tests()))
        .chain(needs_more(loud::tests(), loud::lacking))
        .chain(needs_more(silent::tests(), silent::lacking))
        .chain([proof])
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// The name of each function and the function.
macro_rules! list {
    ($($test:ident),* $(,)?) => {
        pub fn tests() -> Vec<(&'static str, fn())> {
            vec![$((stringify!($test), $test as fn())),*]
        }
    };
}
pub(crate) use list;
