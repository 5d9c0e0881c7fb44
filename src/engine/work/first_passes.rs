//! The first passes of an invalidation, in order, and the first poll of each pass.
#![forbid(unsafe_code)]

use super::{Passes, Work};
use crate::engine::host::{Host, Permit};
use crate::engine::nesting::{Covers, FirstPassOf, InFirstPass};
use crate::entry::{Answer, EntryRef};
use crate::foreign::{Callback, Inside, Panic, Report, keep};
#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
use crate::notifier::take_no_sequence_is_due;
use crate::notifier::{Invalidation, Request};
use crate::observe::Moment;
use crate::sync::Ordering;

/// Why the calls of first passes stopped.
pub(in crate::engine) enum Called {
    /// All were called.
    All,
    /// The next hit's is to be called.
    Some,
    /// A pass beyond the budget is pending. It is awaited alone, before the next first pass (B4).
    Deferred,
    /// One refused, in an invalidation that is not blockable (B2).
    Refused,
}

/// How far the first passes and first polls have come.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Reached {
    /// All first passes were called, none refused, every pass was ready at its first poll, and
    /// nothing panicked.
    Plainly,
    /// All first passes were called and all passes are done. Something may have panicked.
    Done,
    /// A first pass refused, those behind it were not called (B2), and all passes are done.
    Refused,
    /// Passes are pending. [`Work::deferred_at`] says whether first passes are left to be called.
    Pends,
    /// Passes are pending, and a first pass refused.
    RefusedAndPends,
}

/// Calls the first passes of `hits[*at..]` in order.
///
/// `*at` moves on *before* each call, so after a panic it names the next notifier. `invalidation`
/// is made for hit `*at`; most of it is the same for all hits. With `BUDGET`, a notifier for which
/// no permit is left gets the request `at_once`, which does not allow it to defer.
#[inline(always)]
pub(in crate::engine) fn call_from<'a, const BUDGET: bool>(
    inside: Inside,
    host: &Host,
    invalidation: &mut Invalidation<'a>,
    at_once: &'a Request<'a>,
    hits: &'a [EntryRef],
    passes: &mut Passes,
    at: &mut usize,
) -> Called {
    let request = invalidation.request;
    // A late invalidation waits for no permit (M7): a device that has not been told uses memory
    // that is gone.
    let budget =
        if BUDGET { host.budget.as_ref().filter(|_| !request.terms.is_late()) } else { None };
    let Some(mut entry) = hits.get(*at).copied() else { return Called::All };
    loop {
        *at += 1;
        if !entry.own.is_closed() {
            let permit = budget.map(Permit::new);
            if let Some(permit) = &permit {
                invalidation.request = if permit.granted { request } else { at_once };
            }
            let began = Moment::now(&host.losses);
            let answer = {
                let of = || FirstPassOf {
                    space: host.address(),
                    entry,
                    invalidates: Covers::of(request),
                };
                let (_here, _entered) = (InFirstPass::enter(host, of), passes.trace.enter());
                match request.parts {
                    // An invalidation of many ranges goes through the plain form only. Each
                    // notifier is told of the ranges that overlap its own.
                    Some(parts) if BUDGET => {
                        let own = parts.overlapping(entry.range);
                        let own = Request {
                            range: own.hull(),
                            parts: Some(own),
                            ..*invalidation.request
                        };
                        let invalidation = Invalidation { request: &own, ..*invalidation };
                        entry.first_pass(inside, &invalidation, passes.next.as_mut())
                    }
                    _ => entry.first_pass(inside, invalidation, passes.next.as_mut()),
                }
            };
            match answer {
                Answer::Done => passes.trace.first_pass(entry, answer, began),
                Answer::Pass => {
                    let has_permit = permit.map(Permit::keep);
                    let may_defer = has_permit != Some(false);
                    // First: an observer or the assertion may panic, and the pass must not be lost.
                    passes.start_pass::<BUDGET>(entry, has_permit == Some(true), began);
                    passes.trace.first_pass(entry, answer, began);
                    assert_sequence_is_set(host, entry, invalidation.sequence);
                    if !may_defer {
                        // The passes before it wait until all first passes have been called (O2).
                        let last = passes.started() - 1;
                        passes.first_polls(host, last);
                        if passes.running() > 0 {
                            return Called::Deferred;
                        }
                    }
                }
                Answer::WouldBlock => {
                    passes.trace.first_pass(entry, answer, began);
                    if !invalidation.blockable() {
                        return Called::Refused;
                    }
                    refused_blockable(host, request, entry);
                }
            }
        }
        let Some(next) = hits.get(*at) else { return Called::All };
        (entry, invalidation.own) = (*next, &next.own);
    }
}

/// Calls first passes from hit `at` on, in order (O1), then polls each pass once, in order (O2,
/// O3). The plain form of [`advance`](crate::engine::quick).
#[cold]
#[inline(never)]
pub(crate) fn advance_from(
    host: &Host,
    work: &mut Work,
    request: &Request<'_>,
    sequence: u64,
    at: usize,
) -> Reached {
    go_on(host, work, request, sequence, at, Ok(Called::Some))
}

/// Handles what stopped the calls (`called`: a panic, a refusal, a budget that is used up), calls
/// the first passes of `hits[at..]`, then polls each new pass once.
#[cold]
#[inline(never)]
pub(in crate::engine) fn go_on(
    host: &Host,
    work: &mut Work,
    request: &Request<'_>,
    sequence: u64,
    mut at: usize,
    mut called: Result<Called, Panic>,
) -> Reached {
    let (hits, passes) = work.split();
    let at_once = Request { terms: request.terms.at_once(), ..*request };
    let mut refused = false;
    loop {
        match called {
            Ok(Called::All) => break,
            Ok(Called::Some) => {}
            Ok(Called::Deferred) => {
                work.deferred_at = u32::try_from(at).ok();
                debug_assert!(
                    work.deferred_at.is_some(),
                    "the index holds fewer than 2^32 notifiers"
                );
                return Reached::Pends;
            }
            Ok(Called::Refused) => {
                refused = true;
                break;
            }
            // The first passes behind it are called all the same (C5).
            Err(panic) => passes.panic.note(&host.losses, Callback::FirstPass, panic),
        }
        let Some(next) = hits.get(at) else { break };
        let mut invalidation = Invalidation { request, sequence, own: &next.own };
        called = keep(|inside| {
            call_from::<true>(inside, host, &mut invalidation, &at_once, hits, passes, &mut at)
        });
    }
    if passes.started() > 0 {
        passes.first_polls(host, 0);
    }
    match (passes.running() == 0, refused) {
        (true, false) => Reached::Done,
        (true, true) => Reached::Refused,
        (false, false) => Reached::Pends,
        (false, true) => Reached::RefusedAndPends,
    }
}

/// Panics, in debug builds, if a first pass has returned a pass without having set the sequence
/// (S4). The pass is waited for all the same.
fn assert_sequence_is_set(_host: &Host, _entry: EntryRef, _sequence: u64) {
    #[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
    assert!(
        take_no_sequence_is_due() || _entry.own.has_reached(_sequence),
        "the first pass of {} returned a pass without having set the sequence, so that readers install stale mappings: call \
         `set_seq` under the lock under which they install, or `DriverLock::lock_for`; a first pass that leaves the device alone \
         returns `Ok(None)`",
        _entry.name(&_host.losses)
    );
}

#[cold]
fn refused_blockable(host: &Host, request: &Request<'_>, entry: EntryRef) {
    host.counters.refused_blockable.fetch_add(1, Ordering::Relaxed);
    let name = entry.name(&host.losses);
    host.losses.report(&Report::RefusedBlockable {
        notifier: &name,
        range: request.range,
        event: request.event(),
    });
}
