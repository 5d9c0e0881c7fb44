//! What a caller of `invalidate` holds: the future, and then the guard.
#![forbid(unsafe_code)]

use crate::engine::first_pass::{InFirstPass, forbid_waiting};
use crate::engine::guard::{Handle, InvalidationGuard};
use crate::engine::pending::Job;
use crate::engine::scratch::{Scratch, Watch};
use crate::engine::{Extra, Report, Shared, State, Unclaimed};
use crate::event::Event;
use crate::notifier::{Invalidation, WouldBlock};
use crate::protocol::Id;
use crate::range::AddressRange;
use crate::sync::{catch, resume};
use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::mem::ManuallyDrop;
use core::pin::Pin;
use core::task::{Context, Poll};

/// How often a non-blockable invalidation polls passes none of which finishes (B3). The recordings need 4; a pass that wakes itself
/// for ever, as one does whose task has used up its cooperative budget, must not hold the caller for ever.
const IDLE_ROUNDS: usize = 32;

/// What to invalidate and how.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) range: AddressRange,
    pub(crate) event: Event,
    pub(crate) blockable: bool,
    /// No notifier may be inserted from now on (L4).
    pub(crate) release: bool,
}

/// An active invalidation that is ours alone: in its first passes, or about to be behind a guard.
struct Running {
    id: Id,
    sequence: u64,
    /// A first pass refused (B2).
    refused: bool,
    /// `None` when no notifier was hit.
    scratch: Option<Box<Scratch>>,
}

/// How far the first passes and the first polls of their passes got.
enum Reached {
    /// Nothing is pending.
    End,
    /// Passes are pending; then the first passes go on from this hit if the pass budget interrupted them (B4).
    Pending(Option<usize>),
}

impl Running {
    #[inline]
    fn start(space: &Shared, request: &Request) -> Self {
        let since = space.clock.as_ref().map(|clock| clock());
        let mut scratch: Option<Box<Scratch>> = None;
        let started = space.with(|state, _| {
            state.released |= request.release;
            let spare = &mut state.spare;
            let fill = |extra: &mut Extra| {
                extra.event = Some(request.event);
                extra.blockable = request.blockable;
                extra.since = since;
            };
            let started = state.protocol.start(request.range, fill, |entry| {
                scratch.get_or_insert_with(|| spare.pop().unwrap_or_default()).hits.push(entry);
            });
            if scratch.is_some() {
                space.calls.begin(started.id);
            }
            started
        });
        Self { id: started.id, sequence: started.sequence, refused: false, scratch }
    }

    /// Calls first passes from hit `at` on, in order (O1), then polls each pass once, in order (O2, O3).
    #[inline]
    fn advance(&mut self, space: &Shared, request: &Request, mut at: usize) -> Reached {
        let Some(scratch) = &mut self.scratch else {
            return Reached::End;
        };
        while let Some(&entry) = scratch.hits.get(at) {
            at += 1;
            if entry.is_removed() {
                continue;
            }
            let may_defer = space.reserve_pass();
            let invalidation = Invalidation {
                range: request.range,
                event: request.event,
                sequence: self.sequence,
                blockable: request.blockable,
                may_defer,
                own: &entry.own,
            };
            let answer = {
                let _here = InFirstPass::enter(space, entry);
                catch(|| entry.notifier().invalidate(&invalidation))
            };
            match answer {
                Ok(Ok(Some(pass))) => {
                    scratch.start_pass(pass, entry, may_defer);
                    if !may_defer {
                        // B4: awaited alone, before the next first pass; those before it wait until all have been called (O2).
                        let last = scratch.started.len() - 1;
                        scratch.first_polls(space, last);
                        if scratch.running() > 0 {
                            return Reached::Pending(Some(at));
                        }
                    }
                    continue;
                }
                Ok(Ok(None)) => {}
                Ok(Err(WouldBlock)) if !request.blockable => {
                    self.refused = true;
                    at = usize::MAX;
                }
                Ok(Err(WouldBlock)) => refused_blockable(space, request, &entry.notifier().name()),
                Err(panic) => scratch.keep_panic(panic),
            }
            if may_defer {
                space.give_pass_back();
            }
        }
        if !scratch.started.is_empty() {
            scratch.first_polls(space, 0);
        }
        if scratch.running() > 0 { Reached::Pending(None) } else { Reached::End }
    }

    /// The first passes and all passes are done: a guard, or the first panic after the end (C5).
    #[inline]
    fn finish<'a>(mut self, space: Handle<'a>) -> InvalidationGuard<'a> {
        let mut panic = None;
        if let Some(scratch) = &mut self.scratch {
            panic = scratch.panic.take();
            space.calls.end(self.id);
        }
        let guard = InvalidationGuard::new(space, self.id, self.scratch);
        if let Some(panic) = panic {
            drop(guard);
            resume(panic);
            unreachable!("only a thread that panics already does not resume, and it polls no future");
        }
        guard
    }
}

#[cold]
fn refused_blockable(space: &Shared, request: &Request, notifier: &str) {
    space.with(|state, _| state.counts.refused_blockable += 1);
    space.report(&Report::RefusedBlockable { notifier, range: request.range, event: request.event });
}

/// Hands the pending passes of `scratch` to the space: from now on others may drive them.
fn hand_over(space: &Shared, id: Id, scratch: Box<Scratch>, resume_at: Option<usize>, lapses: u32) -> Unclaimed {
    let now = space.now();
    space.with(|state, after| {
        // The first passes are over, as far as others are concerned, as soon as the passes are listed.
        space.calls.end(id);
        state.hand_over(id, scratch, resume_at, lapses, now, after)
    })
}

/// A non-blockable invalidation (B2, B3).
pub(crate) fn try_invalidate<'a>(space: Handle<'a>, request: &Request) -> Result<InvalidationGuard<'a>, WouldBlock> {
    let mut running = Running::start(&space, request);
    let mut at = 0;
    while let Reached::Pending(resume_at) = running.advance(&space, request, at) {
        let Some(scratch) = &mut running.scratch else {
            break;
        };
        scratch.drive_alone(&space, IDLE_ROUNDS);
        if scratch.running() > 0 {
            let panic = scratch.panic.take();
            if let Some(scratch) = running.scratch.take() {
                let unclaimed = hand_over(&space, running.id, scratch, None, 0);
                space.with(|state, after| {
                    state.counts.abandoned += 1;
                    state.abandon(unclaimed, after);
                });
            }
            if let Some(panic) = panic {
                resume(panic);
            }
            return Err(WouldBlock);
        }
        match resume_at {
            Some(next) => at = next,
            None => break,
        }
    }
    let refused = running.refused;
    let guard = running.finish(space);
    if refused { Err(WouldBlock) } else { Ok(guard) }
}

/// The future of an invalidation; resolves to its guard when every pass of every notifier is done.
///
/// Made by [`AddressSpace::invalidate`](crate::AddressSpace::invalidate); does nothing before its first poll (C1).
///
/// # Cancel safety
/// May be dropped at any moment. Once its first passes ran, their passes belong to the space: they are driven by whoever waits
/// for the range or by [`AddressSpace::drain`](crate::AddressSpace::drain), and the range stays under invalidation until
/// they are done (C2). A future that is kept but not polled holds nobody up: it may *lapse* and then starts over when it
/// is polled again (C4).
///
/// # Panics
/// A panic of a driver's first pass or pass is resumed here once everything has been completed and ended (C5). Panics in debug
/// builds when it would have to wait inside a first pass of the same space (C7), and always when polled after it has resolved.
#[must_use = "nothing is invalidated before the future is awaited"]
pub struct Invalidate<'a> {
    /// Moves into the guard. This and `step` are dropped by hand, so that the drop of a future that has resolved is one comparison.
    space: ManuallyDrop<Option<Handle<'a>>>,
    request: Request,
    step: ManuallyDrop<Step>,
    lapses: u32,
}

enum Step {
    Start,
    /// The passes belong to the space.
    Joining {
        unclaimed: Unclaimed,
        sequence: u64,
        watch: Watch,
    },
    Done,
}

impl<'a> Invalidate<'a> {
    #[inline]
    pub(crate) fn new(space: Handle<'a>, request: Request) -> Self {
        Self { space: ManuallyDrop::new(Some(space)), request, step: ManuallyDrop::new(Step::Start), lapses: 0 }
    }

    /// The same future with a handle of the space of its own, to be spawned or kept in a structure.
    pub fn into_owned(mut self) -> Invalidate<'static> {
        Invalidate {
            space: ManuallyDrop::new(self.space.take().map(Handle::into_owned)),
            request: self.request,
            step: ManuallyDrop::new(core::mem::replace(&mut *self.step, Step::Done)),
            lapses: self.lapses,
        }
    }

    /// How often this future lapsed because it was not polled while somebody needed its range (C4).
    pub fn lapses(&self) -> u32 {
        self.lapses
    }

    /// Runs what is ours alone; either it is finished, or it goes to the space.
    #[inline]
    fn run(&mut self, mut running: Running, at: usize) -> Option<InvalidationGuard<'a>> {
        let space = self.space.as_ref().expect("invalidation polled after it has resolved");
        match (running.advance(space, &self.request, at), running.scratch.take()) {
            (Reached::Pending(resume_at), Some(scratch)) => {
                let unclaimed = hand_over(space, running.id, scratch, resume_at, self.lapses);
                *self.step = Step::Joining { unclaimed, sequence: running.sequence, watch: Watch::default() };
                None
            }
            (_, scratch) => {
                running.scratch = scratch;
                drop(core::mem::replace(&mut *self.step, Step::Done));
                let space = self.space.take()?;
                Some(running.finish(space))
            }
        }
    }

    /// Joins the passes: drives them if nobody else does, waits otherwise.
    #[cold]
    fn join(&mut self, cx: &mut Context<'_>) -> Poll<Option<InvalidationGuard<'a>>> {
        let (Some(space), Step::Joining { unclaimed, sequence, watch }) = (&*self.space, &mut *self.step) else {
            unreachable!("called in this step, which has a handle");
        };
        loop {
            let waker = cx.waker().clone();
            let (found, unused) = space.with(|state, _| {
                let found = state.look(space, *unclaimed);
                let unused = match (&found, state.pending_mut(*unclaimed)) {
                    (Found::Job(_) | Found::Busy, Some(pending)) => watch.register(&pending.wakes, waker),
                    _ => Some(waker),
                };
                (found, unused)
            });
            drop(unused);
            match found {
                Found::Claimed(scratch, resume_at) => {
                    let running = Running { id: unclaimed.id, sequence: *sequence, refused: false, scratch: Some(scratch) };
                    return Poll::Ready(self.run(running, resume_at.unwrap_or(usize::MAX)));
                }
                Found::Lapsed => {
                    self.lapses += 1;
                    drop(core::mem::replace(&mut *self.step, Step::Start));
                    return Poll::Ready(None);
                }
                Found::Job(job) => {
                    if !space.work(job) {
                        break;
                    }
                }
                Found::Busy => break,
            }
        }
        forbid_waiting(space, "an invalidation");
        Poll::Pending
    }
}

/// In what state a future finds the invalidation that it handed over.
enum Found {
    /// Its joined passes are done. The first passes go on from a hit if the budget interrupted them.
    Claimed(Box<Scratch>, Option<usize>),
    /// Its passes are to be polled.
    Job(Job),
    /// Somebody polls its passes at this moment.
    Busy,
    /// It was ended on behalf of the future, which starts over (C4).
    Lapsed,
}

impl State {
    fn look(&mut self, space: &Shared, unclaimed: Unclaimed) -> Found {
        let Some(pending) = self.pending_mut(unclaimed).filter(|pending| !pending.abandoned) else {
            return Found::Lapsed;
        };
        if !pending.done {
            return pending.scratch.take().map_or(Found::Busy, |scratch| Found::Job(Job { unclaimed, scratch }));
        }
        match self.claim(unclaimed) {
            Some((scratch, resume_at)) => {
                // Its first passes may go on; `remove` has to know.
                space.calls.begin(unclaimed.id);
                Found::Claimed(scratch, resume_at)
            }
            None => Found::Lapsed,
        }
    }
}

impl<'a> Future for Invalidate<'a> {
    type Output = InvalidationGuard<'a>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            match *this.step {
                Step::Start => {
                    let space = this.space.as_ref().expect("an invalidation is not polled after it was moved");
                    let running = Running::start(space, &this.request);
                    if let Some(guard) = this.run(running, 0) {
                        return Poll::Ready(guard);
                    }
                }
                Step::Joining { .. } => match this.join(cx) {
                    Poll::Ready(Some(guard)) => return Poll::Ready(guard),
                    Poll::Ready(None) => {}
                    Poll::Pending => return Poll::Pending,
                },
                Step::Done => panic!("`Invalidate` polled after it has resolved"),
            }
        }
    }
}

impl Drop for Invalidate<'_> {
    #[inline]
    fn drop(&mut self) {
        // With `Step::Done` the handle is gone and nothing is left.
        if let Some(space) = self.space.take() {
            leave(space, core::mem::replace(&mut *self.step, Step::Done));
        }
    }
}

/// C1, C2: the future is dropped before it has resolved.
#[cold]
fn leave(space: Handle<'_>, step: Step) {
    if let Step::Joining { unclaimed, .. } = step {
        space.with(|state, after| {
            if state.pending_mut(unclaimed).is_some_and(|pending| !pending.abandoned) {
                state.counts.abandoned += 1;
                state.abandon(unclaimed, after);
            }
        });
    }
}

impl fmt::Debug for Invalidate<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = match *self.step {
            Step::Start => "not started",
            Step::Joining { .. } => "passes pending",
            Step::Done => "resolved",
        };
        f.debug_struct("Invalidate")
            .field("range", &self.request.range)
            .field("event", &self.request.event)
            .field("step", &step)
            .field("lapses", &self.lapses)
            .finish()
    }
}
