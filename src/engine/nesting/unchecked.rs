//! The checks of C7 where there is none: in release builds, without `std`, and for the model
//! checkers.
#![forbid(unsafe_code)]

use super::{FirstPassOf, Waits};
use crate::engine::host::Host;
use crate::entry::EntryRef;
use crate::foreign::Panic;
use core::task::{Context, Poll, Waker};

pub(crate) struct InFirstPass;

impl InFirstPass {
    pub(crate) fn enter(_host: &Host, _of: impl FnOnce() -> FirstPassOf) -> Self {
        Self
    }
}

pub(crate) fn forbid_waiting(
    _host: &Host,
    _waits: &Waits<'_>,
    _stuck: impl Fn(&FirstPassOf) -> bool,
) {
}

pub(crate) struct Suspicion;

impl Suspicion {
    pub(crate) fn none() -> Self {
        Self
    }

    pub(crate) fn first_poll(
        _entry: EntryRef,
        cx: &mut Context<'_>,
        poll: impl FnOnce(&mut Context<'_>) -> Poll<()>,
    ) -> Poll<()> {
        poll(cx)
    }

    pub(crate) fn poll(
        &mut self,
        _entry: EntryRef,
        cx: &mut Context<'_>,
        poll: impl FnOnce(&mut Context<'_>) -> Result<Poll<()>, Panic>,
    ) -> Result<Poll<()>, Panic> {
        poll(cx)
    }
}

pub(crate) fn note_wait(_host: &Host, _what: &'static str, _entry: EntryRef, _waker: &Waker) {}
