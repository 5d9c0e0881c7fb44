//! Polls the passes of all parked invalidations of a space.
#![forbid(unsafe_code)]

use super::wait::{Goal, Verdict, Wait};
use crate::engine::Shared;
use crate::engine::state::{Parking, State, WaitFor};
use crate::entry::EntryRef;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};

/// The future of [`AddressSpace::drain`](crate::AddressSpace::drain).
///
/// # Cancel safety
/// May be dropped at any moment. Passes that it has polled to their end stay done.
#[must_use = "nothing is driven before the future is polled"]
pub struct Drain<'a> {
    space: &'a Shared,
    wait: Wait,
    /// The serial of the last invalidation that is waited for.
    until: Option<u64>,
}

impl<'a> Drain<'a> {
    pub(crate) fn new(space: &'a Shared) -> Self {
        Self { space, wait: Wait::default(), until: None }
    }

    /// Blocks the thread until all is done (W1).
    #[cfg(feature = "std")]
    pub fn wait(self) {
        crate::block::wait(self);
    }
}

/// The goal of a [`Drain`]: each invalidation up to this serial has no pass pending and is not
/// abandoned.
struct Drained(u64);

impl Goal for Drained {
    fn queue(&self) -> Option<(EntryRef, WaitFor)> {
        None
    }

    fn look(&mut self, _: &State, _: bool, held_up: bool) -> Verdict {
        if held_up { Verdict::Wait } else { Verdict::Over }
    }

    fn wants(&self, parking: &Parking, serial: u64) -> bool {
        serial <= self.0 && parking.stage.unclaimed().is_none()
    }
}

impl Future for Drain<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { space, wait, until } = &mut *self;
        let until =
            *until.get_or_insert_with(|| space.with(|state, _| state.protocol.last_serial()));
        wait.poll(space, &mut Drained(until), cx)
    }
}

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        self.wait.give_up(self.space);
    }
}

impl fmt::Debug for Drain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drain").finish_non_exhaustive()
    }
}
