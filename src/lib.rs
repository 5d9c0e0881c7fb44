//! Asynchronous, multi-pass memory invalidation for drivers in user space.
#![cfg_attr(not(feature = "std"), no_std)]
#![warn(missing_docs)]

extern crate alloc;
#[cfg(all(test, not(feature = "std")))]
extern crate std;

mod engine;
mod entry;
mod event;
mod index;
mod mirror;
mod notifier;
mod pass;
mod protocol;
mod range;
mod space;
mod subscription;
mod sync;

pub use engine::Report;
pub use engine::invalidate::{Invalidate, InvalidationGuard};
pub use engine::wait::{Close, Drain, ReadBegin, Remove};
pub use event::{Event, Owner};
pub use mirror::async_notifier::{AsyncIntervalNotifier, AsyncNotifier};
pub use mirror::driver_lock::{Collision, DriverGuard, DriverLock, MirrorError, RetryBudget};
pub use mirror::inbox::{Delivery, Inbox};
pub use notifier::{IntervalNotifier, Invalidation, InvalidationInfo, Sequence, WouldBlock};
pub use pass::PassFuture;
pub use range::{AddressRange, RangeError};
pub use space::{ActiveInvalidation, AddressSpace, Builder, InsertError, Phase, Release, Stats};
pub use subscription::Subscription;
