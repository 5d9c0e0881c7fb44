//! The end of an invalidation.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::outbox::Outbox;
use crate::engine::state::State;
use crate::engine::work::Work;
use crate::observe;
use crate::protocol::Id;
use alloc::boxed::Box;
use core::ops::DerefMut;

/// Ends an invalidation (S3, C2).
///
/// The plain form is [`Shared::end_plainly`].
#[inline(always)]
pub(in crate::engine) fn end(shared: &Shared, id: Id, work: Option<Box<Work>>) {
    match work {
        Some(work) => end_with_hits(shared, id, work),
        None => end_without_hits(shared, id),
    }
}

/// Ends an invalidation that hit a notifier.
///
/// Most that hit anything hit one notifier. That case has no loop and only tail calls, so no
/// callee-saved register is spilled.
#[inline(never)]
fn end_with_hits(shared: &Shared, id: Id, work: Box<Work>) {
    if observe::ON || work.timed || shared.host.is_plain_only() {
        return shared.end_plainly(id, Some(work));
    }
    // Read before the lock is taken: a read behind it would wait for it.
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

/// Ends an invalidation with any number of hits, under the lock.
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

/// Wakes the futures that waited for the end of an invalidation.
#[cold]
#[inline(never)]
fn tell(shared: &Shared, mut state: impl DerefMut<Target = State>, id: Id, work: Box<Work>) {
    let mut outbox = Outbox::default();
    state.tell(id, work, &mut outbox);
    drop(state);
    outbox.empty(&shared.host.losses);
}

/// Ends an invalidation that hit nothing.
#[inline(never)]
fn end_without_hits(shared: &Shared, id: Id) {
    if shared.host.clock.is_some() || shared.host.is_plain_only() {
        return shared.end_plainly(id, None);
    }
    let ended = shared.state.try_lock().is_some_and(|mut state| state.protocol.quick_end_none(id));
    if !ended {
        shared.end_plainly(id, None);
    }
}
