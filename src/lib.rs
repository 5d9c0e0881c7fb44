//! Stops every device from using memory before a program changes it, and waits for all devices at
//! once.
//!
//! A driver (of a GPU, an RDMA or NVMe engine, io_uring, a virtual IOMMU) registers the ranges of
//! memory that its device has mapped, and the program invalidates a range before it unmaps,
//! discards or moves it. The library first starts the work on all devices (TLB flushes, preemptions
//! of contexts) and then joins it, so an invalidation takes as long as its slowest device and not
//! as long as all of them together.
//!
//! ```text
//!             first passes           passes, joined           guard held
//!         ┌──────────────────┐  ┌─────────────────────────┐  ┌────────────┐
//! gpu 0   │ zap ─┐           │  │░░░░░░ TLB flush         │  │            │
//! gpu 1   │      └ zap ─┐    │  │░░░░░░░░░░░░░ preemption │  │ the memory │
//! gpu 2   │             └ zap│  │░░░░ TLB flush           │  │  changes   │
//!         └──────────────────┘  └─────────────────────────┘  └────────────┘
//! readers ─── collide ───────── wait in read_begin ───────────────── go on
//! ```
//!
//! 1. **First passes.** The library calls each driver whose range is concerned. The driver removes
//!    (*zaps*) its device's mappings, starts the device's work, and returns a future, its *pass*.
//! 2. **Passes.** The library polls the passes of all drivers until each device is done.
//! 3. **Guard.** The program gets an [`InvalidationGuard`]. It changes the memory and drops the
//!    guard.
//!
//! A *reader* is code that looks at the memory and installs a mapping of it in the device. Its
//! check fails (it *collides*) if an invalidation came between `read_begin` and the check. Then it
//! starts over.
//!
//! This is Linux's `mmu_interval_notifier` in its multi-pass form, with the kernel's sequence
//! semantics, as an async library that runs on any executor. [`docs::from_the_kernel`] has the
//! kernel's names.
//!
//! # A driver
//! ```
//! use shootdown::{
//!     AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier,
//!     Invalidation, PassFuture, WouldBlock,
//! };
//!
//! #[derive(Default)]
//! struct Gpu { page_table: DriverLock<Vec<u64>> }
//!
//! impl IntervalNotifier for Gpu {
//!     fn invalidate(
//!         &self,
//!         invalidation: &Invalidation<'_>,
//!     ) -> Result<Option<PassFuture>, WouldBlock> {
//!         // The first pass: zap, and make readers start over.
//!         self.page_table.lock_for(invalidation).clear();
//!         // The pass: joined with those of all other devices.
//!         Ok(Some(PassFuture::new(flush_tlb())))
//!     }
//! }
//!
//! async fn flush_tlb() { /* resolves when the device is done */ }
//!
//! # futures::executor::block_on(async {
//! let space = AddressSpace::new(); // the memory of one process or guest
//! let range = AddressRange::new(0x7f00_0000_0000, 0x20_0000)?;
//! let gpu = space.insert(range, Gpu::default())?;
//!
//! let guard = space.invalidate(range, Event::Unmap).await;
//! // No device uses the range now: unmap it.
//! drop(guard); // readers go on
//! # drop(gpu);
//! # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
//! ```
//!
//! A program needs this crate, and an executor or none: every future also has `wait()`, which
//! blocks a thread. Only drivers that read an [`Inbox`] with `StreamExt` need the crate `futures`.
//!
//! The guide is in [`docs`]. Begin with [`docs::driver`].
//!
//! # Where to find what
//! | you want to | use |
//! | --- | --- |
//! | write a driver | [`IntervalNotifier`], [`PassFuture`], [`AddressSpace::insert`], [`Subscription`] |
//! | write it as one `async fn` | [`AsyncIntervalNotifier`] in [`AsyncNotifier`] |
//! | write it as a task or a thread | [`AddressSpace::inbox`], [`Inbox`], [`Delivery`] |
//! | install mappings that are never stale | [`DriverLock::mirror`], [`DriverLock::mirror_all`]; by hand [`Subscription::read_begin`] and [`read_retry`](Subscription::read_retry) |
//! | wait for a device's fence | [`Timeline`], [`Reached`] |
//! | invalidate memory before it changes | [`AddressSpace::invalidate`], [`Event`], [`AddressRange`], [`InvalidationGuard`] |
//! | invalidate many ranges at once | [`AddressSpace::invalidate_all`], [`RangeSet`] |
//! | invalidate without waiting | [`AddressSpace::try_invalidate`] |
//! | own memory that is invalidated before it changes | [`source::OwnedMapping`] |
//! | hear of memory that other code unmaps | [`source::Uffd`] |
//! | keep registrations of memory with a device | [`cache::RegistrationCache`] |
//! | wait on a thread | `wait()` of each future, [`Waitable`]; the guide's page [`threads`] |
//! | see what is pending, and count | [`AddressSpace::active`], [`AddressSpace::stats`], [`Subscription::stats`] |
//! | hear of errors that no caller gets | [`Builder::on_report`], [`Report`] |
//! | give up a device that is dead | [`Subscription::fence`], [`AddressSpace::fence`] |
//! | stop a driver | [`Subscription::remove`], [`Subscription::close`] |
//! | end a space | [`AddressSpace::release`] |
//! | test a driver | [`test_util`] |
//! | mirror memory of another host | the guide's page [`hosts`](docs::hosts) |
//! | know what is promised | [`docs::contract`]; tags such as C4 are its rules |
//!
//! # Features
//! | feature | what it adds |
//! | --- | --- |
//! | `std` (default) | threads wait by [`wait()`](Waitable); panics of driver code are caught; invalidations have an age; locks yield to the operating system |
//! | `mapping` (Unix) | [`source::OwnedMapping`]: memory that is invalidated before each system call that changes it |
//! | `userfaultfd` (Linux) | [`source::Uffd`]: memory that other code unmaps; includes `mapping` |
//! | `cache` | [`cache::RegistrationCache`]: registrations of memory with a device, kept and never stale |
//! | `lease` | `Builder::valid_while`: a space whose readers are checked against a lease; `AddressSpace::pause` |
//! | `tracing` | a span for each invalidation |
//! | `metrics` | counters and histograms |
//! | `test-util` | [`test_util`]: faults on demand for the tests of drivers |
//!
//! Each feature except `test-util` and `lease` includes `std`. An item that needs a feature says
//! so.
//!
//! **Without `std`** the crate is `no_std` + `alloc`. A panic of driver code cannot be caught then:
//! one that unwinds may leave its range under invalidation.
//!
//! **`tracing`** makes a span (`DEBUG`, target `shootdown`) for each invalidation, with its range,
//! event, sequence and hits. In it are events (`TRACE`): one for each first pass, and one for each
//! pass that is done, with its latency since the first pass was called. Driver code runs inside the
//! span.
//!
//! **`metrics`** reports through the `metrics` facade. With this feature a pass allocates for its
//! label. [`AddressSpace::stats`] and [`Subscription::stats`] have the counts without any feature.
//!
//! | name | kind |
//! | --- | --- |
//! | `shootdown_invalidations_total` | counter, by event |
//! | `shootdown_hits_total` | counter |
//! | `shootdown_collisions_total` | counter |
//! | `shootdown_retries_total` | counter |
//! | `shootdown_waits_total` | counter |
//! | `shootdown_lapses_total` | counter |
//! | `shootdown_passes_pending` | gauge |
//! | `shootdown_pass_latency_seconds` | histogram, by `notifier`: its [name](IntervalNotifier::name) |
//!
//! A recorder keeps one histogram for each name. So a name should say which device it is, not which
//! buffer.
// Links to items whose feature is off lead to the table of features.
#![cfg_attr(feature = "std", doc = "", doc = "[`threads`]: docs::threads")]
#![cfg_attr(not(feature = "std"), doc = "", doc = "[`threads`]: #features")]
#![cfg_attr(not(feature = "test-util"), doc = "", doc = "[`test_util`]: #features")]
#![cfg_attr(not(feature = "cache"), doc = "", doc = "[`cache::RegistrationCache`]: #features")]
#![cfg_attr(
    not(all(feature = "mapping", unix)),
    doc = "",
    doc = "[`source::OwnedMapping`]: #features"
)]
#![cfg_attr(
    not(all(feature = "userfaultfd", target_os = "linux")),
    doc = "",
    doc = "[`source::Uffd`]: #features"
)]
#![cfg_attr(not(feature = "std"), no_std)]

// Map of the modules. Each module uses only the modules below it (`tests/source_rules.rs`).
//
// | what | where |
// | --- | --- |
// | registrations of memory with a device (feature `cache`) | `cache` |
// | sources of invalidations: owned mappings, userfaultfd (features `mapping`, `userfaultfd`) | `source` |
// | drivers: `DriverLock` and the collision-retry loop, `Inbox`, `AsyncIntervalNotifier` | `mirror` |
// | `AddressSpace`, `Subscription` | `space`, `subscription` |
// | start, join and end of invalidations; waits: `Invalidate`, `InvalidationGuard`, `ReadBegin`, `Remove` | `engine`; its fast paths in `engine::quick` |
// | spans and metrics (features `tracing`, `metrics`) | `observe` |
// | memory of a registered notifier; all `unsafe` code except the system calls of `source` | `entry` |
// | the traits and values of a driver: `IntervalNotifier`, `Invalidation`, `PassFuture` | `notifier`, `pass` |
// | the sequence protocol: a state machine without locks and wakers | `protocol` |
// | the intervals that overlap a range, in order | `index` |
// | fences: `Timeline`, `Reached` | `timeline` |
// | every call of foreign code and the handling of its panics: `Report`, `Callback` | `foreign` |
// | event counters: `NotifierStats` | `tally` |
// | futures that a child of `fork` leaves to its parent (rule M4) | `fork` |
// | threads that wait: `Waitable`, each `wait()` | `block` |
// | locks, atomics and clocks of the platform or of a model checker | `sync` |
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
