//! The future of an invalidation, up to its guard, and the form that does not wait.
#![forbid(unsafe_code)]

use super::guard::{Handle, InvalidationGuard};
use crate::engine::Shared;
use crate::engine::lease::Lease;
use crate::engine::nesting::{Waits, forbid_waiting};
use crate::engine::quick::{Begun, ByHand, begin};
use crate::engine::running::{Running, begin_request};
use crate::engine::state::{Claimed, Look, Parked, Ticket};
use crate::engine::work::first_passes::Reached;
use crate::event::{Event, Owner, Terms};
use crate::foreign::TaskWaker;
use crate::notifier::{Request, WouldBlock};
use crate::range::{AddressRange, Parts, RangeSet};
use crate::sync::Arc;
use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};

/// How often in a row a non-blockable invalidation polls passes none of which finishes (B3). The
/// kernel's recordings need 4 rounds. A pass may wake itself for ever, as one does whose task has
/// used up its cooperative budget, and must not hold the caller.
const IDLE_ROUNDS: usize = 32;

/// Starts a non-blockable invalidation (B2, B3).
pub(crate) fn try_invalidate<'a>(
    space: Handle<'a>,
    request: Request<'_>,
) -> Result<InvalidationGuard<'a>, WouldBlock> {
    let shared: &Shared = &space;
    let losses = shared.host.losses.clone();
    let mut running = Running::start(shared, &request, None);
    let mut reached = running.advance(&request, 0);
    let refused = loop {
        match reached {
            Reached::Plainly | Reached::Done => break false,
            Reached::Refused => break true,
            Reached::Pends | Reached::RefusedAndPends => {
                if !running.drive(IDLE_ROUNDS) {
                    let panic = running.take_panic();
                    running.abandon();
                    losses.resume(panic);
                    return Err(WouldBlock);
                }
                reached = match (running.take_deferred(), reached) {
                    (Some(from), _) => running.advance(&request, from),
                    (None, Reached::RefusedAndPends) => Reached::Refused,
                    (None, _) => Reached::Done,
                };
            }
        }
    };
    let (begun, panic) = running.finish();
    let guard = InvalidationGuard::new(space, begun);
    let panicked = panic.is_some();
    if panicked || refused {
        drop(guard);
        losses.resume(panic);
        // Reached if nothing panicked, or if the thread unwinds and the panic is lost.
        return Err(WouldBlock);
    }
    Ok(guard)
}

/// The future of an invalidation. Resolves to its guard when every pass of every notifier is done.
///
/// Made by [`AddressSpace::invalidate`](crate::AddressSpace::invalidate); does nothing before its
/// first poll (C1).
///
/// # Cancel safety
/// May be dropped at any moment. Once its first passes ran, their passes belong to the space.
/// Futures that wait for the range poll them, and so does
/// [`AddressSpace::drain`](crate::AddressSpace::drain). The range stays under invalidation until
/// they are done (C2). A future that is kept but not polled holds no other task up: it may *lapse*,
/// and then starts over when it is polled again (C4).
///
/// # Panics
/// Resumes the first panic of a driver's first pass or pass, once everything has been completed and
/// ended (C5). If it is polled while the thread unwinds, it resolves instead, and the panic is
/// [counted](crate::Stats::lost_panics). In debug builds, panics if it would wait inside a first
/// pass that has to return first (C7). Panics if it is polled after it has resolved.
#[must_use = "nothing is invalidated before the future is awaited"]
pub struct Invalidate<'a> {
    /// Moves into the guard.
    pub(in crate::engine) space: ByHand<Handle<'a>>,
    pub(in crate::engine) range: AddressRange,
    pub(in crate::engine) owner: Option<Owner>,
    pub(in crate::engine) terms: Terms,
    /// Empty, as `space` is, once the future has resolved.
    pub(in crate::engine) step: ByHand<Step>,
    lapses: u32,
}

/// How far a future is that has not resolved.
pub(in crate::engine) enum Step {
    /// Nothing has begun, or what had begun has lapsed (C4).
    Start,
    /// The passes belong to the space. `task` was polled last.
    Joining { ticket: Ticket, task: Option<Arc<TaskWaker>> },
    /// One of the others, of an invalidation of many ranges. The ranges lie here, so that a future
    /// of one range is no larger.
    OfSet(Box<(RangeSet, Step)>),
}

impl<'a> Invalidate<'a> {
    #[inline]
    pub(crate) fn new(space: Handle<'a>, range: AddressRange, event: Event) -> Self {
        let (owner, terms) = (event.owner(), Terms::new(event, true));
        Self {
            space: ByHand::full(space),
            range,
            owner,
            terms,
            step: ByHand::full(Step::Start),
            lapses: 0,
        }
    }

    /// Makes an invalidation of all ranges of `set` (N1).
    pub(crate) fn of_set(space: Handle<'a>, set: RangeSet, event: Event) -> Self {
        let mut future = Self::new(space, set.hull(), event);
        if set.len() > 1 {
            future.step = ByHand::full(Step::OfSet(Box::new((set, Step::Start))));
        }
        future
    }

    /// Returns the ranges, if there are many.
    fn set(&self) -> Option<&RangeSet> {
        if let Some(Step::OfSet(of)) = self.step.get() { Some(&of.0) } else { None }
    }

    /// Blocks the thread until no device uses the range (W1).
    #[cfg(feature = "std")]
    pub fn wait(self) -> InvalidationGuard<'a> {
        crate::block::wait(self)
    }

    /// Returns what is left of a future that has resolved or was moved.
    fn resolved() -> Self {
        Self {
            space: ByHand::empty(),
            range: AddressRange::ALL,
            owner: None,
            terms: Terms::new(Event::Unmap, true),
            step: ByHand::empty(),
            lapses: 0,
        }
    }

    /// Gives the future a handle of the space of its own, so that it can be spawned or kept in a
    /// structure.
    pub fn into_owned(mut self) -> Invalidate<'static> {
        Invalidate {
            space: self.space.take().map(Handle::into_owned).into(),
            range: self.range,
            owner: self.owner,
            terms: self.terms,
            step: self.step.take().into(),
            lapses: self.lapses,
        }
    }

    /// Says that the memory has changed already (M7). For a source of invalidations that hears of
    /// changes afterwards. To be called before the first poll.
    ///
    /// Drivers learn of it by [`Invalidation::is_late`](crate::Invalidation::is_late). All of them
    /// are told in the first poll, also beyond the [pass budget](crate::Builder::pass_budget) (B4),
    /// because a device that has not been told uses memory that is gone. That poll polls each of
    /// their passes once. A panic of a driver is [counted](crate::Stats::lost_panics) and
    /// [reported](crate::Report::Panicked), because the caller cannot act on it, and the future
    /// resolves.
    pub fn late(mut self) -> Self {
        self.terms = self.terms.late();
        // With an owned handle, the first poll takes the plain form, which knows late ones.
        self.space = self.space.take().map(|space| -> Handle<'a> { space.into_owned() }).into();
        self
    }

    /// Says that several changes have all happened (N4).
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn past(mut self) -> Self {
        self.terms = self.terms.past();
        if let Some(Step::Start) = self.step.get() {
            // As a set even if it is one range: only a set has the flag `is_past`.
            let set = RangeSet::from(self.range);
            self.step = ByHand::full(Step::OfSet(Box::new((set, Step::Start))));
        }
        self
    }

    /// Tags the invalidation with an owner, by which the source's own notifier recognises it.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn tagged(mut self, owner: Owner) -> Self {
        self.owner = Some(owner);
        self
    }

    /// Returns how often this future lapsed because it was not polled while another task needed its
    /// range (C4).
    pub fn lapses(&self) -> u32 {
        self.lapses
    }

    /// Marks the space as released (L4), unless that was done in an earlier poll.
    pub(crate) fn release(&self) {
        if let (Some(space), Some(Step::Start)) = (self.space.get(), self.step.get()) {
            space.with(|state, _| state.released = true);
        }
    }

    /// Continues a first poll that left passes pending. Takes the request back from the state, so
    /// that the quick form need not keep it.
    #[cold]
    #[inline(never)]
    fn pend(
        space: Handle<'a>,
        begun: Begun,
        cx: &mut Context<'_>,
    ) -> (Self, Poll<InvalidationGuard<'a>>) {
        let (id, work) = begun.into_pending();
        match poll_or_park(Running::resume(&space, id, 0, work), false, 0, cx) {
            AfterPoll::Done(begun) => {
                (Self::resolved(), Poll::Ready(InvalidationGuard::new(space, begun)))
            }
            AfterPoll::Parked(
                Parked { ticket, ready, request: Request { range, owner, terms, .. } },
                task,
            ) => {
                let step = ByHand::full(Step::Joining { ticket, task: Some(task) });
                let space = ByHand::full(space);
                let future = Self { space, range, owner, terms, step, lapses: 0 };
                if ready { future.go_on(cx) } else { (future, Poll::Pending) }
            }
        }
    }

    /// Polls the future from whatever step it is at.
    ///
    /// Takes and returns it by value. A panic that unwinds drops it, which abandons what it has
    /// begun. And the quick form of a first poll gives its address to no function.
    fn go_on(mut self, cx: &mut Context<'_>) -> (Self, Poll<InvalidationGuard<'a>>) {
        loop {
            let (Some(space), Some(step)) = (self.space.get(), self.step.get_mut()) else {
                panic!("`Invalidate` polled after it has resolved");
            };
            let (set, step) = match step {
                Step::OfSet(of) => (Some(&of.0), &mut of.1),
                step => (None, step),
            };
            let request = Request {
                range: self.range,
                owner: self.owner,
                terms: self.terms,
                parts: set.map(Parts::all),
            };
            match turn(space, &request, set, self.lapses, step, cx) {
                Turn::Again => {}
                Turn::Lapsed => {
                    self.lapses = self.lapses.saturating_add(1);
                    *step = Step::Start;
                }
                Turn::Pending => return (self, Poll::Pending),
                Turn::Ready(begun) => {
                    drop(self.step.take());
                    let Some(space) = self.space.take() else {
                        unreachable!("it was there a moment ago")
                    };
                    return (self, Poll::Ready(InvalidationGuard::new(space, begun)));
                }
            }
        }
    }
}

/// How one turn of a future has ended.
enum Turn {
    /// All passes are done.
    Ready(Begun),
    /// The next turn finds more to do.
    Again,
    /// The task will be woken.
    Pending,
    /// The invalidation was ended, and the future starts over (C4).
    Lapsed,
}

/// Takes one turn with a future that is at `step`.
fn turn(
    shared: &Shared,
    request: &Request<'_>,
    set: Option<&RangeSet>,
    lapses: u32,
    step: &mut Step,
    cx: &mut Context<'_>,
) -> Turn {
    let late = request.terms.is_late();
    let after = match step {
        Step::Start => {
            let begun = match set {
                None => begin(shared, request.range, request.owner, request.terms),
                Some(_) => begin_request(shared, request, set),
            };
            if !begun.pends() {
                return Turn::Ready(begun);
            }
            let (id, work) = begun.into_pending();
            poll_or_park(Running::resume(shared, id, 0, work), late, lapses, cx)
        }
        Step::Joining { ticket, task } => {
            // Before the lock, because the clone of a waker is foreign code.
            let task = TaskWaker::renew(task, cx.waker(), &shared.host.losses);
            match look(shared, *ticket, &task) {
                Look::Claimed((running, None)) => return Turn::Ready(running.finish_or_resume()),
                Look::Claimed((mut running, Some(from))) => match running.advance(request, from) {
                    Reached::Pends | Reached::RefusedAndPends => {
                        poll_or_park(running, late, lapses, cx)
                    }
                    Reached::Plainly | Reached::Done | Reached::Refused => {
                        return Turn::Ready(running.finish_or_resume());
                    }
                },
                Look::Leased(lease) => {
                    return if lease.drive() { Turn::Again } else { Turn::Pending };
                }
                Look::Busy => return Turn::Pending,
                Look::Lapsed => return Turn::Lapsed,
            }
        }
        Step::OfSet(_) => unreachable!("it is the one in the box"),
    };
    match after {
        AfterPoll::Done(begun) => Turn::Ready(begun),
        AfterPoll::Parked(Parked { ticket, ready, .. }, task) => {
            let later = ready && late;
            if later {
                task.rouse();
            }
            *step = Step::Joining { ticket, task: Some(task) };
            if ready && !later { Turn::Again } else { Turn::Pending }
        }
    }
}

/// Where an invalidation is after [`poll_or_park`].
enum AfterPoll {
    /// All passes are done.
    Done(Begun),
    /// It belongs to the space. The task waits for it.
    Parked(Parked, Arc<TaskWaker>),
}

/// Polls pending passes once more, and hands the invalidation to the space if some still pend.
fn poll_or_park(
    mut running: Running<'_>,
    late: bool,
    lapses: u32,
    cx: &mut Context<'_>,
) -> AfterPoll {
    // A pass that only yields is done after one more poll, so it need not be listed in the space.
    // A late invalidation is not polled again: its caller has other notifiers to tell.
    if !late && running.drive(1) && !running.is_deferred() {
        return AfterPoll::Done(running.finish_or_resume());
    }
    let task = TaskWaker::new(cx.waker(), running.losses());
    AfterPoll::Parked(running.park(lapses, Some(task.clone())), task)
}

/// Looks at a parked invalidation for its future. What comes out of the state is in the hands of a
/// guard before anything else can unwind. A claim comes with the hit at which the first passes go
/// on, if the budget interrupted them (B4).
fn look<'s>(
    shared: &'s Shared,
    ticket: Ticket,
    task: &Arc<TaskWaker>,
) -> Look<(Running<'s>, Option<u32>), Lease<'s>> {
    shared.with(|state, outbox| match state.look(ticket, task, outbox) {
        Look::Claimed(Claimed { id, work, resume_at, sequence }) => {
            // Raised even if no first pass is left: an invalidation whose flag is up is not moved.
            shared.host.flags.raise(id);
            Look::Claimed((Running::resume(shared, id, sequence, Some(work)), resume_at))
        }
        Look::Leased(work) => Look::Leased(Lease::new(shared, ticket, work)),
        Look::Busy => Look::Busy,
        Look::Lapsed => Look::Lapsed,
    })
}

impl<'a> Future for Invalidate<'a> {
    type Output = InvalidationGuard<'a>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let range = this.range;
        let first = match this.step.get() {
            Some(Step::OfSet(of)) => matches!(of.1, Step::Start),
            step => matches!(step, Some(Step::Start)),
        };
        let (future, polled) = match this.begin_quickly() {
            Some((space, begun)) if !begun.pends() => {
                return Poll::Ready(InvalidationGuard::new(Handle::Borrowed(space), begun));
            }
            Some((space, begun)) => Self::pend(Handle::Borrowed(space), begun, cx),
            None => core::mem::replace(this, Self::resolved()).go_on(cx),
        };
        *this = future;
        if polled.is_pending()
            && let Some(space) = this.space.get()
        {
            let waits = Waits { what: "an invalidation", first, waker: cx.waker() };
            let set = this.set();
            forbid_waiting(&space.host, &waits, |of| match set {
                None => of.entry.range.overlaps(range),
                Some(set) => set.overlaps(of.entry.range),
            });
        }
        polled
    }
}

impl Drop for Invalidate<'_> {
    #[inline]
    fn drop(&mut self) {
        // A future that has resolved has no handle.
        if let Some(space) = self.space.take() {
            abandon(space, self.step.take());
        }
    }
}

/// Abandons what a future has begun that is dropped before it has resolved (C1, C2).
fn abandon(space: Handle<'_>, step: Option<Step>) {
    let step = if let Some(Step::OfSet(of)) = step { Some(of.1) } else { step };
    if let Some(Step::Joining { ticket, .. }) = step {
        let now = space.now();
        space.with(|state, outbox| state.abandon(ticket, now, outbox));
    }
}

impl fmt::Debug for Invalidate<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut step = self.step.get();
        if let Some(Step::OfSet(of)) = step {
            step = Some(&of.1);
        }
        let step = match step {
            Some(Step::Start) => "not started",
            Some(Step::Joining { .. }) => "passes pending",
            Some(Step::OfSet(_)) | None => "resolved",
        };
        f.debug_struct("Invalidate")
            .field("ranges", &self.set().map_or(core::slice::from_ref(&self.range), |set| &**set))
            .field("event", &self.terms.event(self.owner))
            .field("step", &step)
            .field("lapses", &self.lapses)
            .finish()
    }
}
