//! What a caller of `invalidate` holds: the future, and then the guard.
#![forbid(unsafe_code)]

use crate::engine::first_pass::forbid_waiting;
use crate::engine::guard::{Handle, InvalidationGuard, end};
use crate::engine::pending::Job;
use crate::engine::scratch::Scratch;
use crate::engine::start::{Advanced, advance, advance_from, start, start_locked};
use crate::engine::wakes::Watch;
use crate::engine::{Shared, State, Unclaimed};
use crate::event::{Event, Owner, Terms};
use crate::notifier::{Request, WouldBlock};
use crate::observe;
use crate::protocol::Id;
use crate::range::AddressRange;
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

/// An invalidation that has begun, and its working memory if it hit a notifier: a guard can take over. Or [`PENDING`] and the memory.
///
/// Two words, so that they are returned in registers: a guard that is put together behind a call and then moved
/// stalls on its own stores, and that was a third of a short invalidation.
type Begun = (Id, Option<Box<Scratch>>);

/// In place of an id: passes are pending, and the memory has the id.
const PENDING: Id = Id::MAX;

/// The first poll, up to where it has to wait. Takes and returns what fits into registers, see [`Invalidate::poll`].
///
/// What most invalidations do is built into this one function, with hits and without, so that what is known stays in registers; everything else is somebody else's
/// last word (`DESIGN.md`, "The short way through").
#[inline(never)]
fn begin(space: &Shared, range: AddressRange, owner: Option<Owner>, terms: Terms) -> Begun {
    if observe::ON || space.clock.is_some() {
        return begin_slowly(space, range, owner, terms);
    }
    let Some(state) = space.state.try_lock() else {
        return begin_slowly(space, range, owner, terms);
    };
    state.protocol.expect(range);
    let request = Request { range, owner, terms };
    match start_locked(space, state, &request, None) {
        (id, sequence, Some(scratch)) => call(space, id, scratch, &request, sequence),
        (id, _, None) => (id, None),
    }
}

/// The same for an invalidation that is timed or traced, or finds the lock taken.
#[cold]
#[inline(never)]
fn begin_slowly(space: &Shared, range: AddressRange, owner: Option<Owner>, terms: Terms) -> Begun {
    let request = Request { range, owner, terms };
    match start(space, &request) {
        (id, sequence, Some(scratch)) => call_from(space, id, scratch, &request, sequence, 0),
        (id, _, None) => (id, None),
    }
}

/// First passes, and what follows.
#[inline(always)]
fn call(space: &Shared, id: Id, mut scratch: Box<Scratch>, request: &Request, sequence: u64) -> Begun {
    match advance(space, id, &mut scratch, request, sequence) {
        Advanced::Plainly => {
            space.calls.end(id);
            (id, Some(scratch))
        }
        Advanced::Done => finish(space, id, scratch),
        Advanced::Pends => (PENDING, Some(scratch)),
    }
}

/// The same, not built in, from hit `at` on.
#[cold]
#[inline(never)]
fn call_from(space: &Shared, id: Id, mut scratch: Box<Scratch>, request: &Request, sequence: u64, at: usize) -> Begun {
    match advance_from(space, id, &mut scratch, request, sequence, at) {
        Advanced::Pends => (PENDING, Some(scratch)),
        // Something before hit `at` may have panicked.
        Advanced::Plainly | Advanced::Done => finish(space, id, scratch),
    }
}

/// The first passes and all passes are done: what a guard takes over, or the first panic after the end (C5).
fn finish(space: &Shared, id: Id, mut scratch: Box<Scratch>) -> Begun {
    space.calls.end(id);
    if scratch.passes().panic.is_some() { fail(space, id, scratch) } else { (id, Some(scratch)) }
}

/// Ends an invalidation and resumes the panic that was kept.
#[cold]
fn fail(space: &Shared, id: Id, mut scratch: Box<Scratch>) -> ! {
    let panic = scratch.passes().panic.take();
    end(space, id, scratch);
    if let Some(panic) = panic {
        resume(panic);
    }
    unreachable!("there is a panic, and only a thread that panics already does not resume it: that one polls no future");
}

/// Hands the pending passes of `scratch` to the space: from now on others may drive them.
fn hand_over(space: &Shared, mut scratch: Box<Scratch>, lapses: u32) -> Unclaimed {
    let (now, id, resume_at) = (space.now(), scratch.id, scratch.resume_at.take());
    space.with(|state, after| {
        // The first passes are over, as far as others are concerned, as soon as the passes are listed.
        space.calls.end(id);
        state.hand_over(id, scratch, resume_at, lapses, now, after)
    })
}

/// A non-blockable invalidation (B2, B3).
pub(crate) fn try_invalidate<'a>(space: Handle<'a>, request: Request) -> Result<InvalidationGuard<'a>, WouldBlock> {
    let (id, sequence, scratch) = start(&space, &request);
    let Some(mut scratch) = scratch else {
        return Ok(InvalidationGuard::new(space, id, None));
    };
    let mut advanced = advance_from(&space, id, &mut scratch, &request, sequence, 0);
    while advanced == Advanced::Pends {
        scratch.passes().drive_alone(&space, IDLE_ROUNDS);
        if scratch.passes().running() > 0 {
            let panic = scratch.passes().panic.take();
            scratch.passes().refused = false;
            let unclaimed = hand_over(&space, scratch, 0);
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
        advanced = match scratch.resume_at.take() {
            Some(at) => advance_from(&space, id, &mut scratch, &request, sequence, at),
            None => Advanced::Done,
        };
    }
    let refused = core::mem::take(&mut scratch.passes().refused);
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
    range: AddressRange,
    owner: Option<Owner>,
    terms: Terms,
    step: ManuallyDrop<Step>,
    lapses: u32,
}

enum Step {
    Start,
    /// The passes belong to the space.
    Joining {
        unclaimed: Unclaimed,
        watch: Watch,
    },
    Done,
}

impl<'a> Invalidate<'a> {
    #[inline(always)]
    pub(crate) fn new(space: Handle<'a>, range: AddressRange, event: Event) -> Self {
        let (owner, terms) = (event.owner(), Terms::new(event, true));
        Self { space: ManuallyDrop::new(Some(space)), range, owner, terms, step: ManuallyDrop::new(Step::Start), lapses: 0 }
    }

    /// What is left of a future that has resolved or was moved.
    fn resolved() -> Self {
        let (space, step) = (ManuallyDrop::new(None), ManuallyDrop::new(Step::Done));
        Self { space, range: AddressRange::ALL, owner: None, terms: Terms::new(Event::Unmap, true), step, lapses: 0 }
    }

    /// The same future with a handle of the space of its own, to be spawned or kept in a structure.
    pub fn into_owned(mut self) -> Invalidate<'static> {
        Invalidate {
            space: ManuallyDrop::new(self.space.take().map(Handle::into_owned)),
            range: self.range,
            owner: self.owner,
            terms: self.terms,
            step: ManuallyDrop::new(core::mem::replace(&mut *self.step, Step::Done)),
            lapses: self.lapses,
        }
    }

    /// How often this future lapsed because it was not polled while somebody needed its range (C4).
    pub fn lapses(&self) -> u32 {
        self.lapses
    }

    /// Marks the space as released (L4), unless that was done in an earlier poll.
    pub(crate) fn release(&self) {
        if let (Some(space), Step::Start) = (&*self.space, &*self.step) {
            space.with(|state, _| state.released = true);
        }
    }

    /// The rest of a first poll that leaves passes pending. What is invalidated and why is taken from the memory, so that the way of all others need not
    /// keep it: a future that is awaited where it was made is then put together nowhere.
    #[cold]
    #[inline(never)]
    fn pend(space: Handle<'a>, scratch: Option<Box<Scratch>>, cx: &mut Context<'_>) -> (Self, Poll<InvalidationGuard<'a>>) {
        let Some(scratch) = scratch else { unreachable!("passes are pending, and in the memory") };
        let Request { range, owner, terms } = scratch.request;
        let future =
            Self { space: ManuallyDrop::new(Some(space)), range, owner, terms, step: ManuallyDrop::new(Step::Start), lapses: 0 };
        future.go_on(Some((PENDING, Some(scratch))), cx)
    }

    /// Every poll but a first one that resolves; goes on from what that one has `begun`.
    ///
    /// Takes and returns the future by value: the address of one that resolves at once is given to nobody.
    #[cold]
    #[inline(never)]
    fn go_on(mut self, mut begun: Option<Begun>, cx: &mut Context<'_>) -> (Self, Poll<InvalidationGuard<'a>>) {
        loop {
            let Some(space) = &*self.space else {
                panic!("`Invalidate` polled after it has resolved");
            };
            match begun.take() {
                Some((PENDING, Some(mut scratch))) => {
                    // Who has only yielded is done after one more poll, which comes in any case, and need never be told of to others.
                    scratch.passes().drive_alone(space, 1);
                    if scratch.passes().running() == 0 && scratch.resume_at.is_none() {
                        begun = Some(finish(space, scratch.id, scratch));
                        continue;
                    }
                    let unclaimed = hand_over(space, scratch, self.lapses);
                    *self.step = Step::Joining { unclaimed, watch: Watch::default() };
                }
                Some((id, scratch)) => {
                    *self.step = Step::Done;
                    let Some(space) = self.space.take() else { unreachable!("it was there a moment ago") };
                    return (self, Poll::Ready(InvalidationGuard::new(space, id, scratch)));
                }
                None => {}
            }
            let Step::Joining { unclaimed, watch } = &mut *self.step else {
                begun = Some(begin(space, self.range, self.owner, self.terms));
                continue;
            };
            match join(space, *unclaimed, watch, cx) {
                Joined::Pending => return (self, Poll::Pending),
                Joined::Claimed(id, scratch, at) => {
                    let (request, sequence) = (scratch.request, scratch.sequence);
                    begun = Some(call_from(space, id, scratch, &request, sequence, at));
                }
                Joined::Lapsed => {
                    self.lapses += 1;
                    *self.step = Step::Start;
                }
            }
        }
    }
}

/// How far the passes of an invalidation have been joined.
enum Joined {
    Pending,
    /// They are done; first passes go on from this hit.
    Claimed(Id, Box<Scratch>, usize),
    /// It was ended on behalf of the future, which starts over (C4).
    Lapsed,
}

/// Joins the passes: drives them if nobody else does, waits otherwise.
fn join(space: &Shared, unclaimed: Unclaimed, watch: &mut Watch, cx: &mut Context<'_>) -> Joined {
    // Only who has to wait leaves a waker; mostly the passes are done when they have been driven once.
    let mut waits = false;
    loop {
        let waker = waits.then(|| cx.waker().clone());
        let (found, unused) = space.with(|state, _| {
            let found = state.look(space, unclaimed);
            let unused = match (&found, waker, state.pending_mut(unclaimed)) {
                (Found::Job(_) | Found::Busy, Some(waker), Some(pending)) => watch.register(&pending.wakes, waker),
                (_, waker, _) => waker,
            };
            (found, unused)
        });
        drop(unused);
        match found {
            Found::Claimed(scratch, resume_at) => {
                drop(core::mem::take(watch));
                return Joined::Claimed(unclaimed.id, scratch, resume_at.unwrap_or(usize::MAX));
            }
            Found::Lapsed => return Joined::Lapsed,
            Found::Job(job) => {
                if space.work(job, false) {
                    continue;
                }
            }
            Found::Busy => {}
        }
        if waits {
            return Joined::Pending;
        }
        waits = true;
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

    /// The first poll mostly resolves. Then nothing is called that gets the address of the future or of the guard, so that the compiler keeps both in
    /// registers: their stores, of which the second lock has to wait for each, took longer than what is done between the locks.
    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let (future, polled) = if let (Step::Start, Some(Handle::Borrowed(space))) = (&*this.step, &*this.space) {
            let space: &'a Shared = space;
            // Nothing in these is to be dropped: plain stores. Before the start, which may panic.
            (this.space, this.step) = (ManuallyDrop::new(None), ManuallyDrop::new(Step::Done));
            let (id, scratch) = begin(space, this.range, this.owner, this.terms);
            if id != PENDING {
                return Poll::Ready(InvalidationGuard::new(Handle::Borrowed(space), id, scratch));
            }
            Self::pend(Handle::Borrowed(space), scratch, cx)
        } else {
            core::mem::replace(this, Self::resolved()).go_on(None, cx)
        };
        *this = future;
        if polled.is_pending()
            && let Some(space) = &*this.space
        {
            forbid_waiting(space, "an invalidation");
        }
        polled
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
            .field("range", &self.range)
            .field("event", &self.terms.event(self.owner))
            .field("step", &step)
            .field("lapses", &self.lapses)
            .finish()
    }
}
