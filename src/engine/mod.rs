//! The engine: starts invalidations, joins their passes, ends them, and lets waiting futures help
//! (C3).
//!
//! Three folders and the border between them:
//!
//! - `state` is all that changes, under the space's one lock. It runs no foreign code and asks for
//!   no time. Work for after the lock goes into an `outbox`.
//! - `work` is the hits and passes of one invalidation. It has one owner at a time and needs no
//!   lock. Foreign code runs here.
//! - `futures` is what users hold.
//! - Two guards are the border. Work that leaves the state is in the hands of a [`lease::Lease`]
//!   (its passes are polled) or a [`running::Running`] (its first passes are called). The drop of
//!   the guard brings it back, also when a panic unwinds.
//!
//! | file | question |
//! | --- | --- |
//! | `quick` | what is written for nanoseconds only? |
//! | `running`, `lease`, `end` | how does an invalidation start, go on, and end? |
//! | `calls` | which first passes run at this moment? |
//! | `wakers` | who is woken when a pass can go on? |
//! | `registration` | how does a notifier enter and leave? |
//! | `gate` | what holds the readers of the whole space back? |
//! | `fence` | what ends the passes of a dead device? |
//! | `held` | which notifiers are kept alive to be asked for their names? |
//! | `host` | what are the settings and counters? |
//! | `nesting` | which wait would never end (C7)? |
#![forbid(unsafe_code)]

mod calls;
mod end;
mod fence;
pub(crate) mod futures;
pub(crate) mod gate;
pub(crate) mod host;
mod lease;
mod nesting;
mod outbox;
pub(crate) mod pinned;
mod quick;
pub(crate) mod registration;
mod running;
pub(crate) mod state;
mod wakers;
mod work;

use crate::entry::{Entry, Spare};
use crate::foreign::{Callback, FirstPanic};
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
use crate::index::Ordered;
use crate::notifier::Sequence;
use crate::observe;
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
use crate::range::AddressRange;
use crate::sync::{Arc, Lock, Ordering, Weak};
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
use alloc::vec::Vec;
use core::time::Duration;
use gate::Gate;
use host::{Host, Settings};
pub(crate) use outbox::Outbox;
use state::{Patience, State};

/// The part of an address space that all its handles share.
pub(crate) struct Shared {
    /// Makes a handle out of a reference.
    this: Weak<Self>,
    state: Lock<State>,
    /// Memory of a former entry, for the next one.
    pub(crate) spare: Spare,
    /// Holds all readers of the space back while it is closed.
    pub(crate) gate: Gate,
    pub(crate) host: Host,
}

impl Shared {
    pub(crate) fn new(mut settings: Settings) -> Arc<Self> {
        let state = State::new(settings.sequence.unwrap_or(2), Patience::new(settings.patience));
        let valid = settings.valid.take();
        Arc::new_cyclic(|this| Self {
            this: this.clone(),
            state: Lock::new(state),
            spare: Spare::new(),
            gate: Gate::new(valid),
            host: Host::new(settings),
        })
    }

    /// Returns one more handle.
    pub(crate) fn handle(&self) -> Arc<Self> {
        let Some(handle) = self.this.upgrade() else {
            unreachable!("a reference is borrowed from a handle")
        };
        handle
    }

    /// Runs `work` on the state, under the lock. The outbox takes what must wait until the lock is
    /// free, and is emptied then.
    #[inline]
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut State, &mut Outbox) -> R) -> R {
        let mut outbox = Outbox::default();
        let result = work(&mut self.state.lock(), &mut outbox);
        outbox.empty(&self.host.losses);
        result
    }

    pub(crate) fn now(&self) -> Option<Duration> {
        self.host.now()
    }

    /// Returns the numbers of the notifiers that an invalidation of `range` would call now. Two
    /// ranges with the same numbers concern the same notifiers.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn concerned(&self, range: AddressRange) -> Vec<u64> {
        let mut orders = Vec::new();
        self.with(|state, _| state.protocol.overlapping(range, |entry| orders.push(entry.order())));
        orders
    }

    /// Returns whether a reader has to start over (R2). Called if its notifier may have changed, or
    /// the gate is not `open`.
    #[cold]
    #[inline(never)]
    pub(crate) fn collides(&self, entry: &Entry, sequence: Sequence, open: bool) -> bool {
        let retry = !(open || self.is_let_in()) || entry.own.is_past(sequence.0);
        if retry {
            self.collided(entry);
        }
        retry
    }

    /// Counts that a reader's check has told it to start over.
    pub(crate) fn collided(&self, entry: &Entry) {
        self.host.counters.collisions.fetch_add(1, Ordering::Relaxed);
        entry.tally().collided();
        observe::collided(&self.host.losses);
    }

    /// Counts that the library's collision-retry loop starts over.
    #[cold]
    pub(crate) fn retried(&self, entry: &Entry) {
        self.host.counters.retries.fetch_add(1, Ordering::Relaxed);
        entry.tally().retried();
        observe::retried(&self.host.losses);
    }

    /// Counts that a reader has to wait.
    #[cold]
    fn waited(&self, entry: &Entry) {
        self.host.counters.waits.fetch_add(1, Ordering::Relaxed);
        entry.tally().waited();
        observe::waited(&self.host.losses);
    }
}

impl Drop for Shared {
    /// Drops the passes of invalidations that were abandoned and never drained. No handle,
    /// subscription, guard or future is left. The first panic of a pass or notifier that is dropped
    /// here goes on in the caller, because the count of lost panics cannot be asked for any more.
    fn drop(&mut self) {
        let mut outbox = Outbox::default();
        let works = self.state.get_mut().dismantle(&mut outbox);
        let losses = self.host.losses.clone();
        let mut first = FirstPanic::default();
        for mut work in works {
            work.passes().discard(&losses, |panic| first.note(&losses, Callback::Pass, panic));
        }
        for entry in outbox.take_dead() {
            if let Err(panic) = crate::foreign::keep(|inside| entry.free(inside)) {
                first.note(&losses, Callback::NotifierDrop, panic);
            }
        }
        outbox.empty(&losses);
        losses.resume(first);
    }
}
