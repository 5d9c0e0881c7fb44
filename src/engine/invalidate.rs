//! What a caller of `invalidate` holds: the future, and then the guard.
#![forbid(unsafe_code)]

use crate::engine::first_pass::forbid_waiting;
use crate::engine::guard::{Handle, InvalidationGuard, end};
use crate::engine::pending::Job;
use crate::engine::scratch::{Scratch, Watch};
use crate::engine::start::{Reached, advance, start};
use crate::engine::{Shared, State, Unclaimed};
use crate::event::Event;
use crate::notifier::{Request, WouldBlock};
use crate::protocol::Id;
use crate::sync::resume;
use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::mem::ManuallyDrop;
use core::pin::Pin;
use core::task::{Context, Poll};

/// How often a non-blockable invalidation polls passes none of which finishes (B3). The recordings need 4; a pass that wakes itself
/// for ever, as one does whose task has used up its cooperative budget, must not hold the caller for ever.
const IDLE_ROUNDS: usize = 32;

/// The first passes and all passes are done: what a guard takes over, or the first panic after the end (C5).
#[inline]
fn finish(space: &Shared, id: Id, mut scratch: Box<Scratch>) -> Finished {
    space.calls.end(id);
    if let Some(panic) = scratch.passes.panic.take() {
        end(space, id, Some(scratch));
        resume(panic);
        unreachable!("only a thread that panics already does not resume, and it polls no future");
    }
    (id, Some(scratch))
}

/// What a guard takes over; [`HANDED_OVER`] and `None` when the invalidation is not ours alone any more.
///
/// Two words and no `Option` around them, so that they are returned in registers: a guard that is put together behind a call and then moved
/// stalls on its own stores, and that was a third of a short invalidation.
type Finished = (Id, Option<Box<Scratch>>);

/// No invalidation has this id.
const HANDED_OVER: Id = Id::MAX;

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
    let (id, sequence, scratch) = start(&space, request);
    let Some(mut scratch) = scratch else {
        return Ok(InvalidationGuard::new(space, id, None));
    };
    let mut at = 0;
    while let Reached::Pending(resume_at) = advance(&space, request, sequence, &mut scratch, at) {
        scratch.passes.drive_alone(&space, IDLE_ROUNDS);
        if scratch.passes.running() > 0 {
            let panic = scratch.passes.panic.take();
            scratch.passes.refused = false;
            let unclaimed = hand_over(&space, id, scratch, None, 0);
            let now = space.now();
            space.with(|state, after| {
                state.counts.abandoned += 1;
                state.abandon(unclaimed, now, after);
            });
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
    let refused = core::mem::take(&mut scratch.passes.refused);
    let (id, scratch) = finish(&space, id, scratch);
    let guard = InvalidationGuard::new(space, id, scratch);
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

    /// The first poll. Not built into the caller, which has its hands full with the guard.
    #[inline(never)]
    fn begin(&mut self) -> Finished {
        let (id, sequence, scratch) = start(self.space(), &self.request);
        if let Some(scratch) = scratch {
            return self.run(id, sequence, scratch, 0);
        }
        // No notifier in the range: no call, no pass, nothing to hand over.
        self.step = ManuallyDrop::new(Step::Done);
        (id, None)
    }

    /// Runs what is ours alone; either it is finished, or it goes to the space.
    fn run(&mut self, id: Id, sequence: u64, mut scratch: Box<Scratch>, at: usize) -> Finished {
        if let Reached::Pending(resume_at) = advance(self.space(), &self.request, sequence, &mut scratch, at) {
            let unclaimed = hand_over(self.space(), id, scratch, resume_at, self.lapses);
            *self.step = Step::Joining { unclaimed, sequence, watch: Watch::default() };
            return (HANDED_OVER, None);
        }
        if let Step::Joining { watch, .. } = &mut *self.step {
            drop(core::mem::take(watch));
        }
        // Nothing else in a step is to be dropped: a plain store, where a replacement would read what was just written.
        self.step = ManuallyDrop::new(Step::Done);
        finish(self.space(), id, scratch)
    }

    #[inline]
    fn space(&self) -> &Shared {
        match &*self.space {
            Some(space) => space,
            None => unreachable!("the handle goes only when the future has resolved or was moved"),
        }
    }

    /// Joins the passes: drives them if nobody else does, waits otherwise.
    #[cold]
    fn join(&mut self, cx: &mut Context<'_>) -> Poll<Finished> {
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
                    let (id, sequence) = (unclaimed.id, *sequence);
                    return Poll::Ready(self.run(id, sequence, scratch, resume_at.unwrap_or(usize::MAX)));
                }
                Found::Lapsed => {
                    self.lapses += 1;
                    drop(core::mem::replace(&mut *self.step, Step::Start));
                    return Poll::Ready((HANDED_OVER, None));
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
            let (id, scratch) = match *this.step {
                Step::Start => this.begin(),
                Step::Joining { .. } => match this.join(cx) {
                    Poll::Ready(finished) => finished,
                    Poll::Pending => return Poll::Pending,
                },
                Step::Done => panic!("`Invalidate` polled after it has resolved"),
            };
            if id != HANDED_OVER
                && let Some(space) = this.space.take()
            {
                return Poll::Ready(InvalidationGuard::new(space, id, scratch));
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
        let now = space.now();
        space.with(|state, after| {
            if state.pending_mut(unclaimed).is_some_and(|pending| !pending.abandoned) {
                state.counts.abandoned += 1;
                state.abandon(unclaimed, now, after);
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
            .field("event", &Event::from(self.request.reason))
            .field("step", &step)
            .field("lapses", &self.lapses)
            .finish()
    }
}
