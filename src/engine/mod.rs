//! The engine: starts invalidations, joins their passes, ends them, and lets whoever waits help
//! (C3).
//!
//! Three worlds, and the border between them:
//!
//! - `state`: all that changes, under the space's one lock. No foreign code, no time of its own:
//!   what is to be done when the lock is free goes into an `outbox`.
//! - `work`: the hits and passes of one invalidation, with one owner at a time and no lock. Foreign
//!   code runs here.
//! - `futures`: what users hold.
//! - The border: what leaves the state is in the hands of a [`lease::Lease`] (passes that are
//!   polled) or a [`running::Running`] (first passes that are called), and comes back when that is
//!   dropped, whoever unwinds.
//!
//! Beside them: `quick`, the quick ways of the start and the end; `wakers`, who is woken; `calls`,
//! which first passes run at this moment; `gate`, which holds the readers of the whole space back;
//! `registration`, how a notifier enters and leaves; `fence`, what ends the passes of a dead
//! device; `held`, who is asked for its name; `host`, settings and counters; `nesting`, the check
//! of C7.
#![forbid(unsafe_code)]

mod calls;
mod fence;
pub(crate) mod futures;
pub(crate) mod gate;
pub(crate) mod held;
pub(crate) mod host;
mod lease;
mod nesting;
mod outbox;
mod quick;
pub(crate) mod registration;
mod running;
pub(crate) mod state;
mod wakers;
mod work;

use crate::entry::{Entry, Spare};
use crate::foreign::{Callback, FirstPanic};
use crate::notifier::Sequence;
use crate::observe;
use crate::protocol::Id;
use crate::sync::{Arc, Lock, Ordering, Weak};
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
use crate::{index::Ordered, range::AddressRange};
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
use alloc::vec::Vec;
use core::time::Duration;
use gate::Gate;
use host::{Host, Settings};
pub(crate) use outbox::Outbox;
use state::{Patience, State};

/// What all handles of one address space share.
pub(crate) struct Shared {
    /// The handle that all others are counted with, for those who have a reference only.
    this: Weak<Self>,
    state: Lock<State>,
    /// Memory for the next entry.
    pub(crate) spare: Spare,
    /// Before all readers of the space.
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

    /// One more handle.
    pub(crate) fn handle(&self) -> Arc<Self> {
        let Some(handle) = self.this.upgrade() else {
            unreachable!("whoever has a reference has it from a handle")
        };
        handle
    }

    /// The way to the state: under the lock, and with somewhere to put what must wait until it is
    /// free.
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

    /// Whether an invalidation may still call first passes. Under the lock.
    pub(crate) fn calls(&self, id: Id, in_crowd: bool) -> bool {
        self.host.flags.is_up(id).unwrap_or(in_crowd)
    }

    /// What tells the notifiers that an invalidation of `range` would call from those of another
    /// range.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn concerned(&self, range: AddressRange) -> Vec<u64> {
        let mut orders = Vec::new();
        self.with(|state, _| state.protocol.overlapping(range, |entry| orders.push(entry.order())));
        orders
    }

    /// Whether a reader has to start over (R2) that finds its notifier not as it was, or the gate
    /// not `open`.
    #[cold]
    #[inline(never)]
    pub(crate) fn collides(&self, entry: &Entry, sequence: Sequence, open: bool) -> bool {
        let retry = !(open || self.is_let_in()) || entry.own.is_past(sequence.0);
        if retry {
            self.collided(entry);
        }
        retry
    }

    /// A check of a reader said that it has to start over.
    pub(crate) fn collided(&self, entry: &Entry) {
        self.host.counters.collisions.fetch_add(1, Ordering::Relaxed);
        entry.tally().collided();
        observe::collided(&self.host.losses);
    }

    /// The library's collision-retry loop starts over.
    #[cold]
    pub(crate) fn retried(&self, entry: &Entry) {
        self.host.counters.retries.fetch_add(1, Ordering::Relaxed);
        entry.tally().retried();
        observe::retried(&self.host.losses);
    }

    /// A reader has to wait.
    #[cold]
    fn waited(&self, entry: &Entry) {
        self.host.counters.waits.fetch_add(1, Ordering::Relaxed);
        entry.tally().waited();
        observe::waited(&self.host.losses);
    }
}

impl Drop for Shared {
    /// No handle, subscription, guard or future is left. What was abandoned and never drained goes
    /// with the space. The first panic of a pass or notifier that is dropped here goes on in
    /// whoever drops the last handle: nobody can ask for the count any more.
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
