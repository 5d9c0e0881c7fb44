//! The guide, as modules without code. Every block of code in it compiles.
//!
//! | page | for |
//! | --- | --- |
//! | [`driver`] | who writes a driver: what a first pass does, what its pass waits for, what may go wrong |
//! | [`retry_loop`] | the read side: how a mapping is installed that is never stale |
//! | [`many_ranges`] | who unmaps in bulk, and drivers that flush once for it |
//! | [`notifiers`] | choosing between [`IntervalNotifier`](crate::IntervalNotifier), [`AsyncIntervalNotifier`](crate::AsyncIntervalNotifier) and [`Inbox`](crate::Inbox) |
//! | [`executors`] | tokio, smol, an executor of one's own, `no_std` |
//! | `threads` (feature `std`) | threads that wait: fault handlers, wrappers of `munmap`, C callers |
//! | `fences` (feature `std`) | how a pass learns that its device is done: [`Timeline`](crate::Timeline) |
//! | [`cancellation`] | dropped, leaked and forgotten futures, and why passes belong to the space |
//! | [`from_the_kernel`] | each function of `mmu_notifier.h` and what it is here |
//! | [`recording`] | who wants to know what multi-pass is worth for a program of one's own: recording it, and replaying its memory traffic |
//! | `registration_cache` (feature `cache`) | who registers memory with a device: fences, devices that refuse overlaps, and what waits for itself |
//! | `from_libfabric` (features `cache`, `userfaultfd`) | users of libfabric's memory monitors and UCX's registration cache |
//! | `memory_changes` (feature `userfaultfd`) | which changes of memory raise an event, and what to do about those that raise none |
//! | [`hosts`] | memory that other hosts mirror: leases, when they are enough and when not |
//! | [`contract`] | what the library promises, rule by rule: where tags such as C4 lead |

#[doc = include_str!("driver.md")]
pub mod driver {}

#[doc = include_str!("retry_loop.md")]
pub mod retry_loop {}

#[doc = include_str!("many_ranges.md")]
pub mod many_ranges {}

#[doc = include_str!("notifiers.md")]
pub mod notifiers {}

#[doc = include_str!("executors.md")]
pub mod executors {}

#[doc = include_str!("hosts.md")]
pub mod hosts {}

#[doc = include_str!("../../CONTRACT.md")]
pub mod contract {}

#[cfg(feature = "std")]
#[doc = include_str!("threads.md")]
pub mod threads {}

#[cfg(feature = "std")]
#[doc = include_str!("fences.md")]
pub mod fences {}

#[doc = include_str!("cancellation.md")]
pub mod cancellation {}

#[doc = include_str!("from_the_kernel.md")]
pub mod from_the_kernel {}

#[doc = include_str!("recording.md")]
pub mod recording {}

#[cfg(feature = "cache")]
#[doc = include_str!("registration_cache.md")]
pub mod registration_cache {}

#[cfg(all(feature = "cache", feature = "userfaultfd", target_os = "linux"))]
#[doc = include_str!("from_libfabric.md")]
pub mod from_libfabric {}

#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
#[doc = include_str!("memory_changes.md")]
pub mod memory_changes {}
