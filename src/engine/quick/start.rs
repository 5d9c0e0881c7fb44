//! The start of an invalidation, its first passes and the first poll of each pass.
#![forbid(unsafe_code)]

use super::Begun;
use super::first_passes::advance;
use crate::engine::Shared;
use crate::engine::running::{Running, begin_request, start_locked};
use crate::engine::work::Work;
use crate::engine::work::first_passes::Reached;
use crate::event::{Owner, Terms};
use crate::notifier::Request;
use crate::observe;
use crate::protocol::Id;
use crate::range::AddressRange;
use alloc::boxed::Box;

/// Starts an invalidation of one range, calls its first passes and polls each pass once.
///
/// The plain form is [`begin_request`]. The common cases, with hits and without, make no call that
/// returns here, so no callee-saved register is spilled. Every other case leaves by a tail call.
#[inline(never)]
pub(in crate::engine) fn begin(
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
        (id, _, None) => Begun::held(id, None),
    }
}

/// Leaves for the plain form, with the arguments in the registers where they are.
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

/// Calls the first passes, and decides what follows.
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
            Begun::held(id, Some(work))
        }
        Reached::Pends | Reached::RefusedAndPends => Begun::pending(id, Some(work)),
        Reached::Done | Reached::Refused => finish(shared, id, work),
    }
}

/// Leaves for the plain form: all passes are done, and something panicked or was refused.
#[cold]
#[inline(never)]
fn finish(shared: &Shared, id: Id, work: Box<Work>) -> Begun {
    Running::resume(shared, id, 0, Some(work)).finish_or_resume()
}
