//! The gate of a library without sources and leases: nothing closes it.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::host::Valid;
use core::task::{Context, Poll};

/// A gate that is never closed.
pub(crate) struct Gate;

#[derive(Clone, Copy, Default)]
pub(crate) struct Since(());

impl Gate {
    pub(crate) fn new(_valid: Option<Valid>) -> Self {
        Self
    }

    #[inline]
    pub(crate) fn is_closed_now(&self) -> bool {
        false
    }
}

#[cfg_attr(not(feature = "cache"), expect(clippy::unused_self, reason = "as in the other form"))]
impl Shared {
    #[inline]
    pub(crate) fn is_shut(&self) -> bool {
        false
    }

    #[inline]
    pub(crate) fn is_let_in(&self) -> bool {
        true
    }

    pub(crate) fn poll_gate(&self, _since: &mut Since, _cx: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}
