//! The driver's side: the collision-retry loop, and drivers that are an `async fn`, a task or a
//! thread.
#![forbid(unsafe_code)]

pub(crate) mod async_notifier;
mod consumers;
pub(crate) mod delivery;
pub(crate) mod driver_lock;
pub(crate) mod inbox;
mod raw_lock;
pub(crate) mod recv;
mod set;
