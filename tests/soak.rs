//! A bounded soak: many tasks that insert, remove, mirror and invalidate at random, with devices
//! that stall, panic and are abandoned, and an oracle that knows for each page which generation a
//! device may use. With the feature `cache`, a registration cache works in the same space.
//!
//! `SOAK_SECONDS=60 cargo test --release --test soak -- --nocapture` is the long form; its last
//! line is one JSON object. `SOAK_SEED` and `SOAK_THREADS=1` run it on one thread in virtual time,
//! where the same seed gives the same run (20,000 operations a second that was asked for, or
//! `SOAK_OPERATIONS`).
#![allow(missing_docs, clippy::print_stdout)]

#[cfg(all(feature = "std", not(any(loom, shuttle))))]
#[path = "soak/run.rs"]
mod soak;

#[cfg(all(feature = "cache", not(any(loom, shuttle))))]
#[path = "soak/cache.rs"]
mod cache;

/// Not a test of the harness, so that the JSON object is the last line; `--list` and filters get
/// the answers that they expect.
fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filter = arguments.iter().find(|argument| !argument.starts_with('-'));
    if arguments.iter().any(|argument| argument == "--list") {
        println!("soak: test");
    } else if filter.is_none_or(|filter| "soak".contains(filter.as_str())) {
        #[cfg(all(feature = "std", not(any(loom, shuttle))))]
        soak::soak();
        #[cfg(not(all(feature = "std", not(any(loom, shuttle)))))]
        println!(
            "soak: skipped, because panics of drivers can only be survived with the feature `std`"
        );
    }
}
