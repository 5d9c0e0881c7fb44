//! An invalidation that has started and is neither parked nor in a guard's hands.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::quick::{Begun, pending, start_locked, strip};
use crate::engine::state::Parked;
use crate::engine::work::Work;
use crate::engine::work::first_passes::{Reached, advance_from};
use crate::foreign::{FirstPanic, Losses, TaskWaker, unwinding};
use crate::notifier::Request;
use crate::observe::{self, Trace};
use crate::protocol::Id;
use crate::range::RangeSet;
use crate::sync::Arc;
use alloc::boxed::Box;

/// Has the work of an invalidation between its start and the moment when a guard or the space gets
/// it. Dropped before that, by something that unwinds, it is given up: the passes that it has are
/// the space's, and it ends when they are done (C2, C5).
pub(crate) struct Running<'s> {
    shared: &'s Shared,
    pub(crate) id: Id,
    sequence: u64,
    work: Option<Box<Work>>,
    armed: bool,
}

impl<'s> Running<'s> {
    /// S2: starts an invalidation, the plain way. `set` has what `request` has, if that is of many
    /// ranges.
    pub(crate) fn start(shared: &'s Shared, request: &Request<'_>, set: Option<&RangeSet>) -> Self {
        let since = if shared.host.clock.is_some() { shared.host.now() } else { None };
        let state = shared.state.lock();
        state.protocol.expect(request.range);
        let (id, sequence, work) = start_locked(shared, state, request, set, since);
        let mut running = Self { shared, id, sequence, work, armed: true };
        if let Some(work) = &mut running.work {
            work.timed = since.is_some();
        }
        if observe::ON {
            let hits = running.work.as_ref().map_or(0, |work| work.hits.len());
            let trace = Trace::start(&shared.host.losses, request, sequence, hits);
            if let Some(work) = &mut running.work {
                work.passes().trace = trace;
            }
        }
        running
    }

    /// Goes on with what a claim has given, or the quick way.
    pub(crate) fn resume(
        shared: &'s Shared,
        id: Id,
        sequence: u64,
        work: Option<Box<Work>>,
    ) -> Self {
        Self { shared, id: strip(id), sequence, work, armed: true }
    }

    /// O1 to O3, B1, B2, B4: calls the first passes from hit `from` on, and polls each pass once.
    pub(crate) fn advance(&mut self, request: &Request<'_>, from: u32) -> Reached {
        match &mut self.work {
            Some(work) => {
                advance_from(&self.shared.host, work, request, self.sequence, from as usize)
            }
            None => Reached::Done,
        }
    }

    /// Polls the joined passes, at most `idle` times without one that finishes. Returns whether
    /// they are done.
    pub(crate) fn drive(&mut self, idle: usize) -> bool {
        let Some(work) = &mut self.work else { return true };
        work.passes().drive_alone(&self.shared.host, idle);
        work.passes().running() == 0
    }

    /// The hit whose first pass is called next, if the budget made them stop.
    pub(crate) fn take_deferred(&mut self) -> Option<u32> {
        self.work.as_mut()?.deferred_at.take()
    }

    /// The hit whose first pass is called next stays noted, for who claims the invalidation.
    pub(crate) fn is_deferred(&self) -> bool {
        self.work.as_ref().is_some_and(|work| work.deferred_at.is_some())
    }

    /// The first passes and all passes are done. Returns what a guard takes over, and the panic
    /// that was kept.
    pub(crate) fn finish(mut self) -> (Begun, FirstPanic) {
        self.shared.first_passes_over(self.id);
        self.armed = false;
        let panic = self.take_panic();
        ((self.id, self.work.take()), panic)
    }

    /// The first passes and all passes are done: what a guard takes over, or the first panic after
    /// the end (C5). If the thread is unwinding already, or the invalidation is late, the panic is
    /// lost and the caller gets what the guard takes over.
    pub(crate) fn finish_or_resume(self) -> Begun {
        let (shared, id) = (self.shared, self.id);
        let (begun, panic) = self.finish();
        if !panic.is_some() {
            return begun;
        }
        // A change that has happened is nobody's whom a panic could be told (M7).
        let is_late = shared.with(|state, _| {
            state.protocol.get(id).is_some_and(|active| active.extra.terms.is_late())
        });
        if is_late || unwinding() {
            shared.host.losses.lose_first(panic);
            return begun;
        }
        shared.end_begun(begun);
        shared.host.losses.resume(panic);
        unreachable!("there is a panic, and the thread does not unwind")
    }

    /// Passes are pending: what the quick way would return.
    pub(crate) fn into_begun(mut self) -> Begun {
        self.armed = false;
        (pending(self.id), self.work.take())
    }

    /// Hands it to the space: from now on others may drive the passes. The caller waits as `task`.
    pub(crate) fn park(mut self, lapses: u32, task: Option<Arc<TaskWaker>>) -> Parked {
        let (shared, id) = (self.shared, self.id);
        let now = shared.host.now();
        self.armed = false;
        let Some(work) = self.work.take() else {
            unreachable!("passes are pending, and in the work")
        };
        shared.with(|state, outbox| {
            // The first passes are over, as far as others are concerned, as soon as the passes are
            // listed.
            shared.host.flags.lower(id);
            state.park(id, work, lapses, task, now, outbox)
        })
    }

    /// Hands it to the space and gives it up (B3).
    pub(crate) fn leave(self) {
        let shared = self.shared;
        let Parked { ticket, ready, .. } = self.park(0, None);
        let now = shared.host.now();
        shared.with(|state, outbox| state.leave(ticket, now, outbox));
        if ready {
            // There is nobody who would look.
            shared.cut(ticket);
        }
    }

    /// The panic that was kept so far.
    pub(crate) fn take_panic(&mut self) -> FirstPanic {
        self.work.as_mut().map(|work| work.passes().panic.take()).unwrap_or_default()
    }

    pub(crate) fn losses(&self) -> &'s Arc<Losses> {
        &self.shared.host.losses
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let work = self.work.take();
        if work.is_some() {
            Self { shared: self.shared, id: self.id, sequence: self.sequence, work, armed: false }
                .leave();
        } else {
            self.shared.end_without_hits(self.id);
        }
    }
}
