//! Futures and guards that users hold.
#![forbid(unsafe_code)]

pub(crate) mod drain;
pub(crate) mod guard;
pub(crate) mod hit;
pub(crate) mod invalidate;
pub(crate) mod read;
pub(crate) mod remove;
mod wait;
