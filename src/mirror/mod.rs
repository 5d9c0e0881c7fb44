//! The driver's side: how it mirrors memory without ever installing a stale mapping, and other
//! forms that a notifier can have.
#![forbid(unsafe_code)]

pub(crate) mod async_notifier;
mod consumers;
pub(crate) mod delivery;
pub(crate) mod driver_lock;
pub(crate) mod inbox;
mod raw_lock;
pub(crate) mod recv;
mod set;
