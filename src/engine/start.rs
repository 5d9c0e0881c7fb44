//! The start of an invalidation: its hits, their first passes, and the first polls of their passes.
#![forbid(unsafe_code)]

use crate::engine::first_pass::InFirstPass;
use crate::engine::scratch::{Passes, Scratch};
use crate::engine::{Budget, Extra, Report, Shared};
use crate::entry::EntryRef;
use crate::notifier::{Invalidation, Request, WouldBlock};
use crate::observe::{self, Moment, Trace};
use crate::protocol::{Id, Started};
use crate::sync::catch;
use alloc::boxed::Box;

/// How far the first passes and the first polls of their passes got.
pub(super) enum Reached {
    /// Nothing is pending.
    End,
    /// Passes are pending; then the first passes go on from this hit if the pass budget interrupted them (B4).
    Pending(Option<usize>),
}

/// Why the calls of first passes stopped.
enum Called {
    All,
    /// A pass beyond the budget is pending: it is awaited alone, before the next first pass (B4).
    Deferred,
    /// A first pass refused in an invalidation that is not blockable (B2).
    Refused,
}

/// Calls the first passes of `hits` from `at` on; `at` moves behind a notifier before it is called.
#[inline]
fn call_from(space: &Shared, request: &Request, sequence: u64, hits: &[EntryRef], passes: &mut Passes, at: &mut usize) -> Called {
    let Some(first) = hits.first() else { return Called::All };
    // Made once: most of it is the same for all notifiers.
    let mut invalidation = Invalidation { request, sequence, may_defer: true, own: &first.own };
    while let Some(entry) = hits.get(*at) {
        *at += 1;
        if entry.is_removed() {
            continue;
        }
        let reserved = Reserved::new(space);
        invalidation.may_defer = reserved.may_defer();
        invalidation.own = &entry.own;
        let began = Moment::now();
        let answer = {
            let (_here, _entered) = (InFirstPass::enter(space, *entry), passes.trace.enter());
            entry.notifier().invalidate(&invalidation)
        };
        passes.trace.first_pass(*entry, &answer, began);
        match answer {
            Ok(Some(pass)) => {
                let may_defer = reserved.keep();
                passes.start_pass(pass, *entry, may_defer, began);
                if !may_defer {
                    // Those before it wait until all have been called (O2).
                    let last = passes.started.len() - 1;
                    passes.first_polls(space, last);
                    if passes.running() > 0 {
                        return Called::Deferred;
                    }
                }
            }
            Ok(None) => {}
            Err(WouldBlock) if !request.blockable => return Called::Refused,
            Err(WouldBlock) => refused_blockable(space, request, &entry.notifier().name()),
        }
    }
    Called::All
}

/// A place in the pass budget (B4), given back unless a pass keeps it.
struct Reserved<'a>(Option<&'a Budget>, bool);

impl<'a> Reserved<'a> {
    #[inline]
    fn new(space: &'a Shared) -> Self {
        let budget = space.budget.as_ref();
        Self(budget, budget.is_none_or(Budget::reserve))
    }

    #[inline]
    fn may_defer(&self) -> bool {
        self.1
    }

    /// Whether there is a place, which the pass now keeps.
    #[inline]
    fn keep(mut self) -> bool {
        self.0 = None;
        self.1
    }
}

impl Drop for Reserved<'_> {
    #[inline]
    fn drop(&mut self) {
        if let (Some(budget), true) = (self.0, self.1) {
            budget.give_back();
        }
    }
}

/// Starts an invalidation: its id, its sequence, and its working memory if it hit a notifier.
#[inline]
pub(super) fn start(space: &Shared, request: &Request) -> (Id, u64, Option<Box<Scratch>>) {
    let since = space.clock.as_ref().map(|clock| clock());
    let mut started = space.with(|state, _| {
        state.released |= request.release;
        let hits = &mut state.next.hits;
        let fill = |extra: &mut Extra| {
            extra.kind = request.reason.kind;
            extra.owner = request.reason.owner;
            extra.blockable = request.blockable;
            extra.since = since;
        };
        let Started { id, sequence } = state.protocol.start(request.range, fill, |entry| hits.push(entry));
        if hits.is_empty() {
            return (id, sequence, None);
        }
        space.calls.begin(id);
        let spare = state.spare.pop().unwrap_or_default();
        (id, sequence, Some(core::mem::replace(&mut state.next, spare)))
    });
    if observe::ON {
        let (_, sequence, scratch) = &mut started;
        let trace = Trace::start(request, *sequence, scratch.as_ref().map_or(0, |scratch| scratch.hits.len()));
        if let Some(scratch) = scratch {
            scratch.passes.trace = trace;
        }
    }
    started
}

/// Calls first passes from hit `at` on, in order (O1), then polls each pass once, in order (O2, O3).
#[inline]
pub(super) fn advance(space: &Shared, request: &Request, sequence: u64, scratch: &mut Scratch, mut at: usize) -> Reached {
    let Scratch { hits, passes, .. } = scratch;
    // One landing for all first passes: after a panic the loop goes on behind the notifier that panicked (C5).
    let deferred = loop {
        match catch(|| call_from(space, request, sequence, hits, passes, &mut at)) {
            Ok(Called::All) => break None,
            Ok(Called::Deferred) => break Some(at),
            Ok(Called::Refused) => {
                passes.refused = true;
                break None;
            }
            Err(panic) => passes.keep_panic(panic),
        }
    };
    if deferred.is_none() && !passes.started.is_empty() {
        passes.first_polls(space, 0);
    }
    if passes.running() > 0 { Reached::Pending(deferred) } else { Reached::End }
}

#[cold]
fn refused_blockable(space: &Shared, request: &Request, notifier: &str) {
    space.with(|state, _| state.counts.refused_blockable += 1);
    space.report(&Report::RefusedBlockable { notifier, range: request.range, event: request.reason.into() });
}
