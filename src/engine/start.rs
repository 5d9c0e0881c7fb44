//! The start of an invalidation: its hits, their first passes, and the first polls of their passes.
#![forbid(unsafe_code)]

use crate::engine::first_pass::InFirstPass;
use crate::engine::scratch::{Passes, Scratch};
use crate::engine::{Budget, Extra, Report, Shared, State};
use crate::entry::{Answer, EntryRef};
use crate::notifier::{Invalidation, Request};
use crate::observe::{self, Moment, Trace};
use crate::protocol::{Id, Started};
use crate::sync::catch;
use alloc::boxed::Box;
use core::ops::DerefMut;
use core::time::Duration;

/// Why the calls of first passes stopped.
enum Called {
    All,
    /// A pass beyond the budget is pending: it is awaited alone, before the next first pass (B4).
    Deferred,
    /// A first pass refused in an invalidation that is not blockable (B2).
    Refused,
}

/// Calls the first passes of `hits` from `at` on; `at` moves behind a notifier before it is called.
#[inline(always)]
fn call_from<const HERE: u8>(
    space: &Shared,
    request: &Request,
    sequence: u64,
    hits: &[EntryRef],
    passes: &mut Passes,
    at: &mut usize,
) -> Called {
    let Some(first) = hits.first() else { return Called::All };
    let budget = space.budget.as_ref();
    // Made once: most of it is the same for all notifiers.
    let mut invalidation = Invalidation { request, sequence, may_defer: true, own: &first.own };
    while let Some(entry) = hits.get(*at) {
        *at += 1;
        if entry.is_removed() {
            continue;
        }
        let reserved = budget.map(Reserved::new);
        if let Some(reserved) = &reserved {
            invalidation.may_defer = reserved.granted;
        }
        invalidation.own = &entry.own;
        let began = Moment::now();
        let answer = {
            let (_here, _entered) = (InFirstPass::enter(space, *entry), passes.trace.enter());
            entry.first_pass(&invalidation, passes.next.as_mut())
        };
        passes.trace.first_pass(*entry, answer, began);
        match answer {
            Answer::Done => {}
            Answer::Pass => {
                let may_defer = reserved.is_none_or(Reserved::keep);
                passes.start_pass(*entry, may_defer, began);
                if !may_defer {
                    // Those before it wait until all have been called (O2).
                    let last = passes.started() - 1;
                    passes.first_polls(space, last);
                    if passes.running() > 0 {
                        return Called::Deferred;
                    }
                }
            }
            Answer::WouldBlock if !request.blockable => return Called::Refused,
            Answer::WouldBlock => refused_blockable(space, request, *entry),
        }
    }
    Called::All
}

/// A place in the pass budget (B4), if one was left; given back unless a pass keeps it.
struct Reserved<'a> {
    budget: &'a Budget,
    granted: bool,
}

impl<'a> Reserved<'a> {
    fn new(budget: &'a Budget) -> Self {
        Self { budget, granted: budget.reserve() }
    }

    /// Whether there is a place, which the pass now keeps.
    fn keep(mut self) -> bool {
        core::mem::take(&mut self.granted)
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.granted {
            self.budget.give_back();
        }
    }
}

/// Starts an invalidation: its id, and its working memory if it hit a notifier.
pub(super) fn start(space: &Shared, request: &Request) -> (Id, Option<Box<Scratch>>) {
    let since = if space.clock.is_some() { space.now() } else { None };
    let mut started = start_locked(space, space.state.lock(), request, since);
    if observe::ON {
        let (sequence, hits) = started.1.as_ref().map_or((0, 0), |scratch| (scratch.sequence, scratch.hits.len()));
        let trace = Trace::start(request, sequence, hits);
        if let Some(scratch) = &mut started.1 {
            scratch.passes.trace = trace;
        }
    }
    if let Some(scratch) = &mut started.1 {
        scratch.timed = since.is_some();
    }
    started
}

/// The same when the lock is taken; it is free afterwards.
#[inline(always)]
pub(super) fn start_locked(
    space: &Shared,
    mut state: impl DerefMut<Target = State>,
    request: &Request,
    since: Option<Duration>,
) -> (Id, Option<Box<Scratch>>) {
    let Started { id, sequence, hit, extra } = state.protocol.start(request.range, Extra::hits);
    extra.fill(request, since);
    if !hit {
        return (id, None);
    }
    let mut scratch = extra.spare.take();
    space.calls.begin(id);
    // No driver was called and nobody woken, so nothing remains for now.
    drop(state);
    if let Some(scratch) = &mut scratch {
        scratch.sequence = sequence;
    }
    (id, scratch)
}

/// Calls first passes from hit `at` on, in order (O1), then polls each pass once, in order (O2, O3). Says in `scratch.pends` if passes are pending then.
///
/// `HERE` tells the places apart that this is built into: what is called from one place only, the compiler does not call.
#[inline(always)]
pub(super) fn advance<const HERE: u8>(space: &Shared, scratch: &mut Scratch, request: &Request, mut at: usize) {
    let Scratch { sequence, hits, passes, pends, .. } = scratch;
    // One landing for all first passes: after a panic the loop goes on behind the notifier that panicked (C5).
    let deferred = loop {
        match catch(|| call_from::<HERE>(space, request, *sequence, hits, passes, &mut at)) {
            Ok(Called::All) => break None,
            Ok(Called::Deferred) => break Some(at),
            Ok(Called::Refused) => {
                passes.refused = true;
                break None;
            }
            Err(panic) => passes.keep_panic(panic),
        }
    };
    if deferred.is_some() {
        *pends = Some(deferred);
    } else if passes.started() > 0 {
        passes.first_polls(space, 0);
        *pends = (passes.running() > 0).then_some(None);
    }
}

#[cold]
fn refused_blockable(space: &Shared, request: &Request, entry: EntryRef) {
    space.with(|state, _| state.counts.refused_blockable += 1);
    let name = entry.name();
    space.report(&Report::RefusedBlockable { notifier: &name, range: request.range, event: request.reason.into() });
}
