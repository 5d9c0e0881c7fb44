//! The guide: pages about one question each. They are modules without code.
//!
//! Every block of Rust code in the guide compiles. Read [`driver`], [`retry_loop`] and
//! [`notifiers`] first.
//!
//! # Write a driver
//! | page | question |
//! | --- | --- |
//! | [`driver`] | What does a driver do when memory goes away, and what may go wrong? |
//! | [`retry_loop`] | How is a mapping installed that is never stale? |
//! | [`notifiers`] | [`IntervalNotifier`](crate::IntervalNotifier), [`AsyncIntervalNotifier`](crate::AsyncIntervalNotifier) or [`Inbox`](crate::Inbox): which one? |
//! | [`fences`] | How does a pass learn that its device is done? Needs feature `std`. |
//! | [`many_ranges`] | How is a device flushed once for many ranges? |
//!
//! # Run it
//! | page | question |
//! | --- | --- |
//! | [`executors`] | What does the library need of tokio, smol, an executor of one's own, or `no_std`? |
//! | [`threads`] | How does a thread without an executor wait? Needs feature `std`. |
//! | [`cancellation`] | What happens to a future that is dropped, leaked or not polled? |
//!
//! # Connect it to memory
//! | page | question |
//! | --- | --- |
//! | [`memory_changes`] | Which changes of memory raise an event, and what must the program do about the others? Needs feature `userfaultfd`. |
//! | [`registration_cache`] | How are registrations of memory with a device kept? Needs feature `cache`. |
//! | [`hosts`] | How does another host mirror memory, and when are leases not enough? |
//!
//! # Come from somewhere else
//! | page | question |
//! | --- | --- |
//! | [`from_the_kernel`] | Where is each function of `mmu_notifier.h`? |
//! | [`from_libfabric`] | Where are the parts of libfabric's memory monitors and of UCX's registration cache? Needs features `cache` and `userfaultfd`. |
//! | [`recording`] | What is multi-pass worth for a program of one's own? |
//!
//! # Look up a rule
//! [`contract`] is the specification. Tags such as C4 in this documentation are its rules.
//!
//! A page that needs a feature is shown only if the feature is on.
#![cfg_attr(
    not(feature = "std"),
    doc = "",
    doc = "[`fences`]: crate#features",
    doc = "[`threads`]: crate#features"
)]
#![cfg_attr(not(feature = "cache"), doc = "", doc = "[`registration_cache`]: crate#features")]
#![cfg_attr(
    not(all(feature = "userfaultfd", target_os = "linux")),
    doc = "",
    doc = "[`memory_changes`]: crate#features"
)]
#![cfg_attr(
    not(all(feature = "cache", feature = "userfaultfd", target_os = "linux")),
    doc = "",
    doc = "[`from_libfabric`]: crate#features"
)]

#[doc = include_str!("driver.md")]
pub mod driver {}

#[doc = include_str!("retry_loop.md")]
pub mod retry_loop {}

#[doc = include_str!("notifiers.md")]
pub mod notifiers {}

#[cfg(feature = "std")]
#[doc = include_str!("fences.md")]
pub mod fences {}

#[doc = include_str!("many_ranges.md")]
pub mod many_ranges {}

#[doc = include_str!("executors.md")]
pub mod executors {}

#[cfg(feature = "std")]
#[doc = include_str!("threads.md")]
pub mod threads {}

#[doc = include_str!("cancellation.md")]
pub mod cancellation {}

#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
#[doc = include_str!("memory_changes.md")]
pub mod memory_changes {}

#[cfg(feature = "cache")]
#[doc = include_str!("registration_cache.md")]
pub mod registration_cache {}

#[doc = include_str!("hosts.md")]
pub mod hosts {}

#[doc = include_str!("from_the_kernel.md")]
pub mod from_the_kernel {}

#[cfg(all(feature = "cache", feature = "userfaultfd", target_os = "linux"))]
#[doc = include_str!("from_libfabric.md")]
pub mod from_libfabric {}

#[doc = include_str!("recording.md")]
pub mod recording {}

#[doc = include_str!("../../CONTRACT.md")]
pub mod contract {}
