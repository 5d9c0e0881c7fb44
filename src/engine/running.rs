//! The start of an invalidation, and the time until a guard or the space has it.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::quick::Begun;
use crate::engine::state::{Parked, Record, State};
use crate::engine::work::Work;
use crate::engine::work::first_passes::{Reached, advance_from};
use crate::foreign::{FirstPanic, Losses, TaskWaker, unwinding};
use crate::notifier::Request;
use crate::observe::{self, Trace};
use crate::protocol::{Id, Started};
use crate::range::RangeSet;
use crate::sync::Arc;
use alloc::boxed::Box;
use core::ops::DerefMut;
use core::time::Duration;

/// Holds the work of an invalidation between its start and the moment when a guard or the space
/// gets it. If it is dropped before that, because a panic unwinds, the invalidation is abandoned:
/// its passes belong to the space, and it ends when they are done (C2, C5).
pub(crate) struct Running<'s> {
    shared: &'s Shared,
    pub(crate) id: Id,
    sequence: u64,
    work: Option<Box<Work>>,
    armed: bool,
}

impl<'s> Running<'s> {
    /// Starts an invalidation (S2). `set` is what `request` covers, if that is many ranges.
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

    /// Goes on with an invalidation that was claimed, or that the quick form has started.
    pub(crate) fn resume(
        shared: &'s Shared,
        id: Id,
        sequence: u64,
        work: Option<Box<Work>>,
    ) -> Self {
        Self { shared, id, sequence, work, armed: true }
    }

    /// Calls the first passes from hit `from` on, and polls each pass once (O1 to O3, B1, B2, B4).
    pub(crate) fn advance(&mut self, request: &Request<'_>, from: u32) -> Reached {
        match &mut self.work {
            Some(work) => {
                advance_from(&self.shared.host, work, request, self.sequence, from as usize)
            }
            None => Reached::Done,
        }
    }

    /// Polls the joined passes, at most `idle` times in a row without one that finishes. Returns
    /// whether they are done.
    pub(crate) fn drive(&mut self, idle: usize) -> bool {
        let Some(work) = &mut self.work else { return true };
        work.passes().drive_alone(&self.shared.host, idle);
        work.passes().running() == 0
    }

    /// Takes the hit whose first pass is called next, if the budget interrupted the first passes.
    pub(crate) fn take_deferred(&mut self) -> Option<u32> {
        self.work.as_mut()?.deferred_at.take()
    }

    /// Returns whether the budget interrupted the first passes. The hit stays noted for the claim.
    pub(crate) fn is_deferred(&self) -> bool {
        self.work.as_ref().is_some_and(|work| work.deferred_at.is_some())
    }

    /// Returns what a guard takes over, and the panic that was kept. To be called when the first
    /// passes and all passes are done.
    pub(crate) fn finish(mut self) -> (Begun, FirstPanic) {
        self.shared.first_passes_over(self.id);
        self.armed = false;
        let panic = self.take_panic();
        (Begun::held(self.id, self.work.take()), panic)
    }

    /// Returns what a guard takes over, or ends the invalidation and resumes the panic that was
    /// kept (C5). To be called when the first passes and all passes are done.
    ///
    /// If the thread is unwinding already, or the invalidation is late, the panic is lost and the
    /// guard is handed out.
    pub(crate) fn finish_or_resume(self) -> Begun {
        let (shared, id) = (self.shared, self.id);
        let (begun, panic) = self.finish();
        if !panic.is_some() {
            return begun;
        }
        // The change of a late invalidation has happened, so its caller cannot act on a panic (M7).
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

    /// Returns what the quick form would return: passes are pending.
    pub(crate) fn into_begun(mut self) -> Begun {
        self.armed = false;
        Begun::pending(self.id, self.work.take())
    }

    /// Hands the invalidation to the space, so that other tasks may poll its passes. The caller
    /// waits as `task`.
    pub(crate) fn park(mut self, lapses: u32, task: Option<Arc<TaskWaker>>) -> Parked {
        let (shared, id) = (self.shared, self.id);
        let now = shared.host.now();
        self.armed = false;
        let Some(work) = self.work.take() else {
            unreachable!("passes are pending, and in the work")
        };
        shared.with(|state, outbox| {
            // No first pass runs. `remove` goes by the passes that `park` lists.
            shared.host.flags.lower(id);
            state.park(id, work, lapses, task, now, outbox)
        })
    }

    /// Hands the invalidation to the space and abandons it (B3).
    pub(crate) fn abandon(self) {
        let shared = self.shared;
        let Parked { ticket, ready, .. } = self.park(0, None);
        let now = shared.host.now();
        shared.with(|state, outbox| state.abandon(ticket, now, outbox));
        if ready {
            // No caller is left that would look.
            shared.cut(ticket);
        }
    }

    /// Takes the panic that was kept so far.
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
                .abandon();
        } else {
            self.shared.end_begun(Begun::held(self.id, None));
        }
    }
}

/// Starts an invalidation, calls its first passes and polls each pass once, in every case that
/// there is. `set` has what `request` has, if that is of many ranges.
pub(crate) fn begin_request(
    shared: &Shared,
    request: &Request<'_>,
    set: Option<&RangeSet>,
) -> Begun {
    let mut running = Running::start(shared, request, set);
    match running.advance(request, 0) {
        Reached::Pends | Reached::RefusedAndPends => running.into_begun(),
        Reached::Plainly | Reached::Done | Reached::Refused => running.finish_or_resume(),
    }
}

/// What has started: the invalidation's id and sequence, and its work if it hit a notifier.
type Start = (Id, u64, Option<Box<Work>>);

/// S2: starts an invalidation under the lock, and releases it.
#[inline(always)]
pub(crate) fn start_locked(
    shared: &Shared,
    mut state: impl DerefMut<Target = State>,
    request: &Request<'_>,
    set: Option<&RangeSet>,
    since: Option<Duration>,
) -> Start {
    // When the first passes of an invalidation are over, its flag is read no more. So the
    // invalidation may leave its place, to which the flag belongs.
    let is_movable = |id| shared.host.flags.is_up(id) == Some(false);
    let fill = |record: &mut Record, id| record.fill(request, id, since);
    let Started { id, sequence, hit, extra } = match set {
        None => state.protocol.start(request.range, is_movable, fill, Record::hits),
        Some(set) => state.protocol.start_set(set, request.terms.is_past(), fill, Record::hits),
    };
    if !hit {
        return (id, sequence, None);
    }
    let work = extra.take_work();
    if !shared.host.flags.raise(id) {
        extra.calls = true;
    }
    // A start notes no wake-up and no drop, so there is no outbox to empty.
    drop(state);
    (id, sequence, work)
}
