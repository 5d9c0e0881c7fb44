//! Asynchronous, multi-pass memory invalidation for drivers in user space.
//!
//! When a process's memory is unmapped, discarded or moved, every device that mapped it (a GPU, an
//! RDMA or NVMe engine, io_uring, a virtual IOMMU) must stop using it before the memory is reused.
//! Each device needs time for that: a TLB flush takes microseconds, the preemption of a context
//! milliseconds. Who waits for one device after the other waits for the *sum*, and with eight GPUs
//! that is eight times too long. This crate starts the work on all of them first and then waits for
//! all at once, so that an invalidation takes as long as its slowest device. It is Linux's
//! `mmu_interval_notifier` with the multi-pass patch, as an async library without a runtime of its
//! own; the sequence semantics are the kernel's.
//!
//! ```text
//!              first passes                    passes, joined                  guard held
//!         ┌──────────────────────┐  ┌───────────────────────────────────┐  ┌──────────────┐
//! gpu 0   │ zap, submit ─┐       │  │░░░░░░ TLB flush                   │  │              │
//! gpu 1   │              └ zap ─┐│  │░░░░░░░░░░░░░░░░░░░░░░ preemption  │  │  the memory  │
//! gpu 2   │                     └│  │░░░░ TLB flush                     │  │   changes    │
//!         └──────────────────────┘  └───────────────────────────────────┘  └──────────────┘
//! readers ─── collide ───────────── wait in read_begin ──────────────────────────────────── go on
//! ```
//!
//! # A driver
//! ```
//! use shootdown::{AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
//!
//! #[derive(Default)]
//! struct Gpu { page_table: DriverLock<Vec<u64>> }
//!
//! impl IntervalNotifier for Gpu {
//!     fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
//!         self.page_table.lock_for(invalidation).clear();  // first pass: zap, and make readers retry
//!         Ok(Some(PassFuture::new(flush_tlb())))           // waited for together with all other devices
//!     }
//! }
//! # async fn flush_tlb() {}
//!
//! # futures::executor::block_on(async {
//! let space = AddressSpace::new();
//! let range = AddressRange::new(0x7f00_0000_0000, 0x20_0000)?;
//! let gpu = space.insert(range, Gpu::default())?;
//!
//! let guard = space.invalidate(range, Event::Unmap).await;  // no device uses the range now
//! drop(guard);                                              // the memory has changed: readers go on
//! # drop(gpu);
//! # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
//! ```
//!
//! The guide is in `docs`: writing a driver, the collision-retry loop, choosing between the
//! notifier traits, executors and `no_std`, threads that wait, fences, cancellation, coming from
//! the kernel, coming from libfabric or UCX.
//!
//! Tags such as S6, L2 or C4 are rules of the contract, `docs::contract`.
//!
//! # Features
//! `std` (default): contending threads yield to the operating system, panics of driver code are
//! caught and resumed in the caller, invalidations have an age, and threads can wait for every
//! future with its `wait()`. Without it the crate is `no_std` + `alloc`; a panic of driver code
//! that unwinds may then leave its range under invalidation, because there is nothing to catch it
//! with.
//!
//! `tracing`: a span (`DEBUG`, target `shootdown`) for each invalidation, with its range, event,
//! sequence and hits; inside it an event (`TRACE`) for each first pass and for each pass that is
//! done, with its latency since the first pass was called. Driver code runs inside the span.
//!
//! `metrics`: through the `metrics` facade the counters `shootdown_invalidations_total` (by event),
//! `shootdown_hits_total`, `shootdown_collisions_total`, `shootdown_retries_total`,
//! `shootdown_waits_total`, `shootdown_lapses_total`, the gauge `shootdown_passes_pending`, and the
//! histogram `shootdown_pass_latency_seconds` (by `notifier`, its [name](IntervalNotifier::name): a
//! recorder keeps one for each, so a name says which device it is and not which buffer). With this
//! feature a pass allocates for its label. Without either feature, [`AddressSpace::stats`] and
//! [`Subscription::stats`] have the counts.
//!
//! `cache`: the registration cache. `mapping` (Unix): memory that invalidates before it changes.
//! `userfaultfd` (Linux): memory that somebody else unmaps; includes the other two.
//!
//! `test-util`: faults on demand for the tests of drivers, in `test_util`.
#![cfg_attr(not(feature = "std"), no_std)]

// Map of the modules.
// Each module uses only those below it.
//
// | what | where |
// | --- | --- |
// | registrations of memory with a device, kept and never stale (feature `cache`) | `cache` |
// | where invalidations come from: owned mappings, userfaultfd (features `mapping`, `userfaultfd`) | `source` |
// | drivers: `DriverLock` with the collision-retry loop, `Inbox` for drivers that are tasks, `AsyncIntervalNotifier` | `mirror` |
// | `AddressSpace`, `Subscription` | `space`, `subscription` |
// | start, join, end; whoever waits helps: `Invalidate`, `InvalidationGuard`, `ReadBegin`, `Remove` | `engine` |
// | what the features `tracing` and `metrics` are told | `observe` |
// | a registered notifier in memory (all the `unsafe` there is, but for the system calls of `source`) | `entry` |
// | what a driver implements and is told: `IntervalNotifier`, `Invalidation`, `PassFuture` | `notifier`, `pass` |
// | the sequence protocol, a plain state machine | `protocol` |
// | which intervals overlap a range, in order | `index` |
// | every call of code that is not the library's, and what becomes of its panics: `Report`, `Callback` | `foreign` |
// | what is counted: `NotifierStats` | `tally` |
// | fences: `Timeline`, `Reached` | `timeline` |
// | futures that a child of `fork` leaves to its parent (rule M4) | `fork` |
// | threads that wait: `Waitable`, each `wait()` | `block` |
// | `AddressRange`, `RangeSet`, `Event` | `range`, `event` |

extern crate alloc;
#[cfg(all(test, not(feature = "std")))]
extern crate std;

mod block;
#[cfg(all(feature = "cache", not(any(loom, shuttle))))]
pub mod cache;
#[cfg(any(doc, doctest))]
pub mod docs;
mod engine;
mod entry;
mod event;
mod foreign;
#[cfg(any(all(feature = "cache", not(any(loom, shuttle))), all(feature = "mapping", unix)))]
mod fork;
mod index;
mod mirror;
mod notifier;
mod observe;
mod pass;
mod protocol;
mod range;
#[cfg(all(feature = "mapping", unix))]
pub mod source;
mod space;
mod subscription;
mod sync;
mod tally;
#[cfg(feature = "test-util")]
pub mod test_util;
mod timeline;

pub use block::Waitable;
pub use engine::futures::drain::Drain;
pub use engine::futures::guard::InvalidationGuard;
pub use engine::futures::invalidate::Invalidate;
pub use engine::futures::read::ReadBegin;
pub use engine::futures::remove::{Close, Remove};
pub use event::{Event, Owner};
pub use foreign::{Callback, Report};
pub use mirror::async_notifier::{AsyncIntervalNotifier, AsyncNotifier};
pub use mirror::delivery::Delivery;
pub use mirror::driver_lock::{Collision, DriverGuard, DriverLock, MirrorError, RetryBudget};
pub use mirror::inbox::Inbox;
pub use mirror::recv::Recv;
pub use notifier::{
    IntervalNotifier, Invalidation, InvalidationInfo, NotifierId, Sequence, WouldBlock,
};
pub use pass::PassFuture;
pub use range::{AddressRange, RangeError, RangeSet};
#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
pub use space::Pause;
pub use space::{ActiveInvalidation, AddressSpace, Builder, InsertError, Phase, Release, Stats};
pub use subscription::Subscription;
pub use tally::NotifierStats;
pub use timeline::{Reached, Timeline};
