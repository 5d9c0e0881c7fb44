//! The start of an invalidation: its hits, their first passes, and the first polls of their passes.
#![forbid(unsafe_code)]

use crate::engine::first_pass::InFirstPass;
use crate::engine::scratch::{Passes, Scratch};
use crate::engine::{Budget, Extra, Report, Shared, State};
use crate::entry::{Answer, EntryRef};
use crate::notifier::{Invalidation, Request};
use crate::observe::{self, Moment, Trace};
use crate::protocol::{Id, Started};
use crate::sync::{Panic, catch};
use alloc::boxed::Box;
use core::ops::DerefMut;
use core::time::Duration;

/// Why the calls of first passes stopped.
enum Called {
    All,
    /// Those before the next hit.
    Some,
    /// A pass beyond the budget is pending: it is awaited alone, before the next first pass (B4).
    Deferred,
    /// A first pass refused in an invalidation that is not blockable (B2).
    Refused,
}

/// Calls the first passes of hit `at` and those behind it; `at` moves behind a notifier before it is called. `invalidation` is made for hit `at`; most of it
/// is the same for all. `BUDGET`: there may be a pass budget; those for which it has no place are asked `at_once`.
#[inline(always)]
fn call_from<'a, const BUDGET: bool>(
    space: &Shared,
    invalidation: &mut Invalidation<'a>,
    at_once: &'a Request,
    hits: &'a [EntryRef],
    passes: &mut Passes,
    at: &mut usize,
) -> Called {
    let budget = if BUDGET { space.budget.as_ref() } else { None };
    let request = invalidation.request;
    let Some(mut entry) = hits.get(*at).copied() else { return Called::All };
    loop {
        *at += 1;
        if !entry.own.is_closed() {
            let reserved = budget.map(Reserved::new);
            if let Some(reserved) = &reserved {
                invalidation.request = if reserved.granted { request } else { at_once };
            }
            let began = Moment::now();
            let answer = {
                let (_here, _entered) = (InFirstPass::enter(space, entry), passes.trace.enter());
                entry.first_pass(invalidation, passes.next.as_mut())
            };
            passes.trace.first_pass(entry, answer, began);
            match answer {
                Answer::Done => {}
                Answer::Pass => {
                    let may_defer = reserved.is_none_or(Reserved::keep);
                    passes.start_pass::<BUDGET>(entry, may_defer, began);
                    if !may_defer {
                        // Those before it wait until all have been called (O2).
                        let last = passes.started() - 1;
                        passes.first_polls(space, last);
                        if passes.running() > 0 {
                            return Called::Deferred;
                        }
                    }
                }
                Answer::WouldBlock if !invalidation.blockable() => return Called::Refused,
                Answer::WouldBlock => refused_blockable(space, request, entry),
            }
        }
        let Some(next) = hits.get(*at) else { return Called::All };
        (entry, invalidation.own) = (*next, &next.own);
    }
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
pub(super) fn start(space: &Shared, request: &Request) -> Running {
    let since = if space.clock.is_some() { space.now() } else { None };
    let state = space.state.lock();
    state.protocol.expect(request.range);
    let (id, sequence, mut scratch) = start_locked(space, state, request, since);
    if observe::ON {
        let trace = Trace::start(request, sequence, scratch.as_ref().map_or(0, |scratch| scratch.hits.len()));
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
    request: &Request,
    since: Option<Duration>,
) -> Running {
    let Started { id, sequence, hit, extra } =
        state.protocol.start(request.range, |extra, serial| extra.fill(request, serial, since), Extra::hits);
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
    /// All first passes were called, of those called now none refused, and what passes they left were ready at once; nothing panicked.
    Plainly,
    /// All were called, and the passes are done.
    Done,
    /// Passes are pending; what the rest has to know is in the memory.
    Pends,
}

/// Calls first passes in order (O1), then polls each pass once, in order (O2, O3).
///
/// To be built into one place, for most invalidations; all others call [`advance_from`].
#[inline(always)]
pub(super) fn advance(space: &Shared, id: Id, scratch: &mut Scratch, request: &Request, sequence: u64) -> Advanced {
    if space.budget.is_some() {
        return advance_from(space, id, scratch, request, sequence, 0);
    }
    let mut at = 0;
    let (hits, passes) = scratch.split();
    let Some(first) = hits.first() else { return Advanced::Plainly };
    let mut invalidation = Invalidation { request, sequence, own: &first.own };
    // One landing for all first passes.
    let called = catch(|| call_from::<false>(space, &mut invalidation, request, hits, passes, &mut at));
    if matches!(called, Ok(Called::All)) {
        let plain = match passes.started() {
            0 => true,
            1 => passes.first_poll(space),
            _ => passes.first_polls(space, 0),
        };
        if plain {
            return Advanced::Plainly;
        }
    }
    follow(space, id, scratch, request, sequence, at, called)
}

/// The same from hit `at` on, not built in.
#[cold]
#[inline(never)]
pub(super) fn advance_from(
    space: &Shared,
    id: Id,
    scratch: &mut Scratch,
    request: &Request,
    sequence: u64,
    at: usize,
) -> Advanced {
    follow(space, id, scratch, request, sequence, at, Ok(Called::Some))
}

/// What follows when first passes, up to hit `at`, were `called` with something left to do.
#[cold]
#[inline(never)]
fn follow(
    space: &Shared,
    id: Id,
    scratch: &mut Scratch,
    request: &Request,
    sequence: u64,
    mut at: usize,
    mut called: Result<Called, Panic>,
) -> Advanced {
    let (hits, passes) = scratch.split();
    let at_once = Request { terms: request.terms.at_once(), ..*request };
    let resume_at = loop {
        match called {
            Ok(Called::All) => break None,
            Ok(Called::Some) => {}
            Ok(Called::Deferred) => break Some(at),
            Ok(Called::Refused) => {
                passes.refused = true;
                break None;
            }
            // The others are called all the same (C5).
            Err(panic) => passes.keep_panic(panic),
        }
        let Some(next) = hits.get(at) else { break None };
        let mut invalidation = Invalidation { request, sequence, own: &next.own };
        called = catch(|| call_from::<true>(space, &mut invalidation, &at_once, hits, passes, &mut at));
    };
    if resume_at.is_none() {
        if passes.started() > 0 {
            passes.first_polls(space, 0);
        }
        if passes.running() == 0 {
            return Advanced::Done;
        }
    }
    (scratch.id, scratch.request, scratch.sequence, scratch.resume_at) = (id, *request, sequence, resume_at);
    Advanced::Pends
}

#[cold]
fn refused_blockable(space: &Shared, request: &Request, entry: EntryRef) {
    space.with(|state, _| state.counts.refused_blockable += 1);
    let name = entry.name();
    space.report(&Report::RefusedBlockable { notifier: &name, range: request.range, event: request.event() });
}
