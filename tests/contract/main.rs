//! The contract, rule by rule: each test is named after what it says and begins with the rule's number.
#![allow(missing_docs)]

#[path = "../support/mod.rs"]
mod support;

mod blocking;
mod cancellation;
mod driver_tasks;
mod executors;
mod life_cycle;
mod order;
// Without `std` there is nothing to catch a panic with.
#[cfg(feature = "std")]
mod panics;
mod readers;
mod sequences;
