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
fn call_from<'a, const HERE: u8>(
    space: &Shared,
    invalidation: &mut Invalidation<'a>,
    hits: &'a [EntryRef],
    passes: &mut Passes,
    at: &mut usize,
) -> Called {
    let budget = space.budget.as_ref();
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
            entry.first_pass(invalidation, passes.next.as_mut())
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
            Answer::WouldBlock if !invalidation.request.blockable => return Called::Refused,
            Answer::WouldBlock => refused_blockable(space, &invalidation.request, *entry),
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

/// What has started: the invalidation's id and sequence, and its working memory if it hit a notifier.
pub(super) type Running = (Id, u64, Option<Box<Scratch>>);

/// Starts an invalidation.
pub(super) fn start(space: &Shared, request: Request) -> Running {
    let since = if space.clock.is_some() { space.now() } else { None };
    let (id, sequence, mut scratch) = start_locked(space, space.state.lock(), request, since);
    if observe::ON {
        let trace = Trace::start(&request, sequence, scratch.as_ref().map_or(0, |scratch| scratch.hits.len()));
        if let Some(scratch) = &mut scratch {
            scratch.passes().trace = trace;
        }
    }
    if let Some(scratch) = &mut scratch {
        scratch.timed = since.is_some();
    }
    (id, sequence, scratch)
}

/// The same when the lock is taken; it is free afterwards.
#[inline(always)]
pub(super) fn start_locked(
    space: &Shared,
    mut state: impl DerefMut<Target = State>,
    request: Request,
    since: Option<Duration>,
) -> Running {
    let Started { id, sequence, hit, extra } =
        state.protocol.start(request.range, |extra| extra.fill(request, since), Extra::hits);
    if !hit {
        return (id, sequence, None);
    }
    let scratch = extra.spare.take();
    space.calls.begin(id);
    // No driver was called and nobody woken, so nothing remains for now.
    drop(state);
    (id, sequence, scratch)
}

/// How far an invalidation has come.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Advanced {
    /// All first passes were called and left nothing to be waited for: none panicked, refused, or returned a pass.
    Plainly,
    /// All were called, and the passes are done.
    Done,
    /// Passes are pending; what the rest has to know is in the memory.
    Pends,
}

/// Calls first passes from hit `at` on, in order (O1), then polls each pass once, in order (O2, O3).
///
/// `HERE` tells the places apart that this is built into: what is called from one place only, the compiler does not call.
#[inline(always)]
pub(super) fn advance<const HERE: u8>(
    space: &Shared,
    id: Id,
    scratch: &mut Scratch,
    request: Request,
    sequence: u64,
    mut at: usize,
) -> Advanced {
    let (hits, passes) = scratch.split();
    let Some(first) = hits.first() else { return Advanced::Done };
    // Made once: most of it is the same for all notifiers.
    let mut invalidation = Invalidation { request, sequence, may_defer: true, own: &first.own };
    // One landing for all first passes: after a panic the loop goes on behind the notifier that panicked (C5).
    let mut plain = true;
    let deferred = loop {
        match catch(|| call_from::<HERE>(space, &mut invalidation, hits, passes, &mut at)) {
            Ok(Called::All) => break None,
            Ok(Called::Deferred) => break Some(at),
            Ok(Called::Refused) => {
                plain = false;
                passes.refused = true;
                break None;
            }
            Err(panic) => {
                plain = false;
                passes.keep_panic(panic);
            }
        }
    };
    if deferred.is_none() {
        if passes.started() == 0 {
            return if plain { Advanced::Plainly } else { Advanced::Done };
        }
        passes.first_polls(space, 0);
        if passes.running() == 0 {
            return Advanced::Done;
        }
    }
    (scratch.id, scratch.request, scratch.sequence, scratch.resume_at) = (id, invalidation.request, sequence, deferred);
    Advanced::Pends
}

#[cold]
fn refused_blockable(space: &Shared, request: &Request, entry: EntryRef) {
    space.with(|state, _| state.counts.refused_blockable += 1);
    let name = entry.name();
    space.report(&Report::RefusedBlockable { notifier: &name, range: request.range, event: request.reason.into() });
}
