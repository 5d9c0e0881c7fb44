//! The quick ways of the start and the end of an invalidation.
//!
//! They do what [`Running`] and [`State::end`] do, which are their specification, for the common
//! cases: nobody has the lock, no clock, no observer, no budget, passes that are ready at their
//! first poll, nobody who waits. Everything else leaves them, by a tail call. `tests/fuzz.rs` runs
//! each of its cases on a space that takes them and on one that does not.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::outbox::Outbox;
use crate::engine::running::Running;
use crate::engine::state::{Record, State};
use crate::engine::work::Work;
use crate::engine::work::first_passes::{Reached, advance};
use crate::event::{Owner, Terms};
use crate::notifier::Request;
use crate::observe;
use crate::protocol::{Id, Started};
use crate::range::{AddressRange, Parts, RangeSet};
use alloc::boxed::Box;
use core::ops::DerefMut;
use core::time::Duration;

/// An invalidation that has begun, and its work if it hit a notifier: a guard can take over. If the
/// id [`pends`], passes are pending.
///
/// Two words, so that they are returned in registers: a guard that is put together behind a call
/// and then moved stalls on its own stores, and that was a third of a short invalidation.
pub(crate) type Begun = (Id, Option<Box<Work>>);

/// In an id: passes are pending. Serials, of which ids are made, stay below it.
const PENDS: u64 = 1 << 63;

/// Whether passes are pending.
#[inline(always)]
pub(crate) fn pends(id: Id) -> bool {
    id.raw() & PENDS != 0
}

/// The id, marked as pending.
#[inline(always)]
pub(crate) fn pending(id: Id) -> Id {
    Id::from_raw(id.raw() | PENDS)
}

/// The id without the mark.
#[inline(always)]
pub(crate) fn strip(id: Id) -> Id {
    Id::from_raw(id.raw() & !PENDS)
}

/// Starts an invalidation, calls its first passes and polls each pass once.
///
/// The common cases, with hits and without, make no call that returns here, so no callee-saved
/// register is spilled; every uncommon case leaves by a tail call (`DESIGN.md`, "The short way
/// through").
#[inline(never)]
pub(crate) fn begin(
    shared: &Shared,
    range: AddressRange,
    owner: Option<Owner>,
    terms: Terms,
) -> Begun {
    if observe::ON || shared.host.clock.is_some() || shared.host.is_plain_only() {
        return begin_plainly(shared, range, owner, terms);
    }
    let Some(state) = shared.state.try_lock() else {
        return begin_plainly(shared, range, owner, terms);
    };
    state.protocol.expect(range);
    let request = Request { range, owner, terms, parts: None };
    match start_locked(shared, state, &request, None, None) {
        (id, sequence, Some(work)) => call(shared, id, work, &request, sequence),
        (id, _, None) => (id, None),
    }
}

/// Plain form of [`begin`].
#[cold]
#[inline(never)]
fn begin_plainly(
    shared: &Shared,
    range: AddressRange,
    owner: Option<Owner>,
    terms: Terms,
) -> Begun {
    begin_request(shared, &Request { range, owner, terms, parts: None }, None)
}

/// [`begin`] for the ranges of `set`.
pub(crate) fn begin_set(
    shared: &Shared,
    owner: Option<Owner>,
    terms: Terms,
    set: &RangeSet,
) -> Begun {
    begin_request(
        shared,
        &Request { range: set.hull(), owner, terms, parts: Some(Parts::all(set)) },
        Some(set),
    )
}

fn begin_request(shared: &Shared, request: &Request<'_>, set: Option<&RangeSet>) -> Begun {
    let mut running = Running::start(shared, request, set);
    match running.advance(request, 0) {
        Reached::Pends | Reached::RefusedAndPends => running.into_begun(),
        Reached::Plainly | Reached::Done | Reached::Refused => running.finish_or_resume(),
    }
}

/// First passes, and what follows.
#[inline(always)]
fn call(
    shared: &Shared,
    id: Id,
    mut work: Box<Work>,
    request: &Request<'_>,
    sequence: u64,
) -> Begun {
    match advance(&shared.host, &mut work, request, sequence) {
        Reached::Plainly => {
            shared.first_passes_over(id);
            (id, Some(work))
        }
        Reached::Pends | Reached::RefusedAndPends => (pending(id), Some(work)),
        Reached::Done | Reached::Refused => finish(shared, id, work),
    }
}

/// Something panicked or was slow, and all passes are done.
#[cold]
#[inline(never)]
fn finish(shared: &Shared, id: Id, work: Box<Work>) -> Begun {
    Running::resume(shared, id, 0, Some(work)).finish_or_resume()
}

/// What has started: the invalidation's id and sequence, and its work if it hit a notifier.
type Start = (Id, u64, Option<Box<Work>>);

/// S2: starts an invalidation when the lock is taken; it is free afterwards.
#[inline(always)]
pub(crate) fn start_locked(
    shared: &Shared,
    mut state: impl DerefMut<Target = State>,
    request: &Request<'_>,
    set: Option<&RangeSet>,
    since: Option<Duration>,
) -> Start {
    // Once its first passes are over, nobody looks at its flag any more, which is that of its
    // place.
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
    // No driver was called and nobody woken, so nothing remains for now.
    drop(state);
    (id, sequence, work)
}

/// Ends an invalidation (S3, C2).
#[inline(never)]
pub(crate) fn end(shared: &Shared, id: Id, work: Box<Work>) {
    if observe::ON || work.timed || shared.host.is_plain_only() {
        return shared.end_plainly(id, Some(work));
    }
    // Most invalidations that hit anything hit one notifier. This way has no loop and only tail
    // calls, so no callee-saved register is spilled. The hit is read ahead of the lock, so that it
    // is not waited for behind it.
    let only = if let [only] = work.hits[..] { Some(only) } else { None };
    let Some(mut state) = shared.state.try_lock() else {
        return shared.end_plainly(id, Some(work));
    };
    if let Some(only) = only
        && let Some(record) = state.protocol.quick_end_one(id, only)
    {
        record.recycle(work);
        return;
    }
    end_locked(shared, state, id, work);
}

/// [`end`] with any number of hits, when the lock is taken.
#[cold]
#[inline(never)]
fn end_locked(shared: &Shared, mut state: impl DerefMut<Target = State>, id: Id, work: Box<Work>) {
    match state.protocol.quick_end(id, &work.hits) {
        Some((false, record)) => record.recycle(work),
        Some((true, _)) => tell(shared, state, id, work),
        None => {
            drop(state);
            shared.end_plainly(id, Some(work));
        }
    }
}

/// Wakes whoever waited for the end of an invalidation.
#[cold]
#[inline(never)]
fn tell(shared: &Shared, mut state: impl DerefMut<Target = State>, id: Id, work: Box<Work>) {
    let mut outbox = Outbox::default();
    state.tell(id, work, &mut outbox);
    drop(state);
    outbox.empty(&shared.host.losses);
}

impl Shared {
    /// Ends an invalidation whose guard nobody gets.
    pub(crate) fn end_begun(&self, (id, work): Begun) {
        match work {
            Some(work) => end(self, id, work),
            None => self.end_without_hits(id),
        }
    }

    /// Ends an invalidation that hit nothing.
    #[inline(never)]
    pub(crate) fn end_without_hits(&self, id: Id) {
        let quick = self.host.clock.is_none() && !self.host.is_plain_only();
        let ended = quick
            && self.state.try_lock().is_some_and(|mut state| state.protocol.quick_end_none(id));
        if !ended {
            self.end_plainly(id, None);
        }
    }

    /// The plain end: for an invalidation that is timed, traced or in the crowd, under which
    /// notifiers were inserted, or that finds the lock taken.
    #[cold]
    fn end_plainly(&self, id: Id, mut work: Option<Box<Work>>) {
        let timed = self.host.clock.is_some() || work.as_ref().is_some_and(|work| work.timed);
        let now = if timed { self.host.now() } else { None };
        // Closed when the lock is free.
        let _trace = work.as_mut().map(|work| core::mem::take(&mut work.passes().trace));
        self.with(|state, outbox| state.end(id, work, now, outbox));
    }

    /// The invalidation will call no further first pass (L1).
    #[inline(always)]
    pub(crate) fn first_passes_over(&self, id: Id) {
        if !self.host.flags.lower(id) {
            self.first_passes_over_in_crowd(id);
        }
    }

    #[cold]
    #[inline(never)]
    fn first_passes_over_in_crowd(&self, id: Id) {
        self.with(|state, _| {
            if let Some(active) = state.protocol.active_mut().get_mut(id) {
                active.extra.calls = false;
            }
        });
    }
}
