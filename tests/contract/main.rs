//! The contract, rule by rule: each test is named after what it says and begins with the rule's
//! number.
#![allow(missing_docs)]

#[path = "../support/mod.rs"]
mod support;

mod blocking;
mod cancellation;
mod details;
mod driver_tasks;
mod executors;
mod fenced;
#[cfg(feature = "std")]
mod fenced_hard;
// Without `std` there is nothing to catch a panic with.
#[cfg(feature = "std")]
mod foreign_code;
mod formats;
#[cfg(feature = "std")]
mod guards;
#[cfg(feature = "lease")]
mod leases;
mod life_cycle;
mod many_ranges;
mod order;
#[cfg(feature = "std")]
mod panics;
mod readers;
mod sequences;
mod sets;
mod sets_hard;
mod timelines;
mod timelines_hard;
#[cfg(feature = "std")]
mod traps;
#[cfg(feature = "std")]
mod waits;
// Miri starts no process.
#[cfg(not(miri))]
mod watchdog;
