//! The future of an invalidation, up to its guard, and the form that does not wait.
#![forbid(unsafe_code)]

use super::guard::{Handle, InvalidationGuard};
use crate::engine::Shared;
use crate::engine::lease::Lease;
use crate::engine::nesting::{Waits, forbid_waiting};
use crate::engine::quick::{Begun, begin, begin_set, pends};
use crate::engine::running::Running;
use crate::engine::state::{Look, Parked, Ticket};
use crate::engine::work::first_passes::Reached;
use crate::event::{Event, Owner, Terms};
use crate::foreign::TaskWaker;
use crate::notifier::{Request, WouldBlock};
use crate::range::{AddressRange, Parts, RangeSet};
use crate::sync::Arc;
use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::mem::ManuallyDrop;
use core::pin::Pin;
use core::task::{Context, Poll};

/// How often a non-blockable invalidation polls passes none of which finishes (B3). The recordings
/// need 4; a pass that wakes itself for ever, as one does whose task has used up its cooperative
/// budget, must not hold the caller for ever.
const IDLE_ROUNDS: usize = 32;

/// A non-blockable invalidation (B2, B3).
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
                    running.leave();
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
    let ((id, work), panic) = running.finish();
    let guard = InvalidationGuard::new(space, id, work);
    let panicked = panic.is_some();
    if panicked || refused {
        drop(guard);
        losses.resume(panic);
        // Here if nothing panicked, or if the thread unwinds and a panic cannot go on.
        return Err(WouldBlock);
    }
    Ok(guard)
}

/// The future of an invalidation; resolves to its guard when every pass of every notifier is done.
///
/// Made by [`AddressSpace::invalidate`](crate::AddressSpace::invalidate); does nothing before its
/// first poll (C1).
///
/// # Cancel safety
/// May be dropped at any moment. Once its first passes ran, their passes belong to the space: they
/// are driven by whoever waits for the range or by
/// [`AddressSpace::drain`](crate::AddressSpace::drain), and the range stays under invalidation
/// until they are done (C2). A future that is kept but not polled holds nobody up: it may *lapse*
/// and then starts over when it is polled again (C4).
///
/// # Panics
/// A panic of a driver's first pass or pass is resumed here once everything has been completed and
/// ended (C5); polled while the thread unwinds, it resolves, and the panic is
/// [counted](crate::Stats::lost_panics). Panics in debug builds when it would have to wait inside a
/// first pass that it needs to return (C7), and always when polled after it has resolved.
#[must_use = "nothing is invalidated before the future is awaited"]
pub struct Invalidate<'a> {
    /// Moves into the guard. This and `step` are dropped by hand, so that the drop of a future that
    /// has resolved is one comparison.
    space: ManuallyDrop<Option<Handle<'a>>>,
    range: AddressRange,
    owner: Option<Owner>,
    terms: Terms,
    step: ManuallyDrop<Step>,
    lapses: u32,
}

enum Step {
    Start,
    /// The passes belong to the space. `task` was polled last.
    Joining {
        ticket: Ticket,
        task: Option<Arc<TaskWaker>>,
    },
    Done,
    /// One of the first two, of an invalidation of many ranges. Here these cost the others nothing.
    OfSet(Box<(RangeSet, Step)>),
}

impl<'a> Invalidate<'a> {
    #[inline(always)]
    pub(crate) fn new(space: Handle<'a>, range: AddressRange, event: Event) -> Self {
        let (owner, terms) = (event.owner(), Terms::new(event, true));
        Self {
            space: ManuallyDrop::new(Some(space)),
            range,
            owner,
            terms,
            step: ManuallyDrop::new(Step::Start),
            lapses: 0,
        }
    }

    /// N1: an invalidation of all ranges of `set`.
    pub(crate) fn of_set(space: Handle<'a>, set: RangeSet, event: Event) -> Self {
        let mut future = Self::new(space, set.hull(), event);
        if set.len() > 1 {
            future.step = ManuallyDrop::new(Step::OfSet(Box::new((set, Step::Start))));
        }
        future
    }

    /// The ranges, if there are many.
    fn set(&self) -> Option<&RangeSet> {
        if let Step::OfSet(of) = &*self.step { Some(&of.0) } else { None }
    }

    /// Blocks the thread until no device uses the range (W1).
    #[cfg(feature = "std")]
    pub fn wait(self) -> InvalidationGuard<'a> {
        crate::block::wait(self)
    }

    /// What is left of a future that has resolved or was moved.
    fn resolved() -> Self {
        let (space, step) = (ManuallyDrop::new(None), ManuallyDrop::new(Step::Done));
        Self {
            space,
            range: AddressRange::ALL,
            owner: None,
            terms: Terms::new(Event::Unmap, true),
            step,
            lapses: 0,
        }
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

    /// Says that the memory has changed already (M7), for a source of invalidations that hears of
    /// changes afterwards. To be called before the first poll.
    ///
    /// Drivers learn of it by [`Invalidation::is_late`](crate::Invalidation::is_late). All of them
    /// are told in the first poll, also beyond the [pass budget](crate::Builder::pass_budget) (B4):
    /// whoever has not been told yet uses memory that is gone. In that poll each of their passes is
    /// polled once, and no more. A panic of one has no caller who
    /// could do anything about it: it is [counted](crate::Stats::lost_panics) and
    /// [reported](crate::Report::Panicked), and the future resolves.
    pub fn late(mut self) -> Self {
        self.terms = self.terms.late();
        // The quick way of a first poll is for others.
        self.space =
            ManuallyDrop::new(self.space.take().map(|space| -> Handle<'a> { space.into_owned() }));
        self
    }

    /// Says of several changes that all have happened (N4).
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn past(mut self) -> Self {
        self.terms = self.terms.past();
        if let Step::Start = *self.step {
            // Also if they are one range together: places know of no such thing.
            let set = RangeSet::from(self.range);
            self.step = ManuallyDrop::new(Step::OfSet(Box::new((set, Step::Start))));
        }
        self
    }

    /// Tags it, for a notifier of the library's own that belongs to this invalidation alone.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) fn tagged(mut self, owner: Owner) -> Self {
        self.owner = Some(owner);
        self
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

    /// Continues a first poll that left passes pending. The request is read back from the state:
    /// the quick way need not keep it alive, and a future that resolves at once is never
    /// written to memory.
    #[cold]
    #[inline(never)]
    fn pend(
        space: Handle<'a>,
        begun: Begun,
        cx: &mut Context<'_>,
    ) -> (Self, Poll<InvalidationGuard<'a>>) {
        let (id, work) = begun;
        match settle(Running::resume(&space, id, 0, work), false, 0, cx) {
            Settled::Ready((id, work)) => {
                (Self::resolved(), Poll::Ready(InvalidationGuard::new(space, id, work)))
            }
            Settled::Parked(
                Parked { ticket, ready, request: Request { range, owner, terms, .. } },
                task,
            ) => {
                let step = ManuallyDrop::new(Step::Joining { ticket, task: Some(task) });
                let future = Self {
                    space: ManuallyDrop::new(Some(space)),
                    range,
                    owner,
                    terms,
                    step,
                    lapses: 0,
                };
                if ready { future.go_on(cx) } else { (future, Poll::Pending) }
            }
        }
    }

    /// Every poll but a first one that resolves.
    ///
    /// Takes and returns the future by value: the address of one that resolves at once is given to
    /// nobody. And what unwinds drops it, which gives up what it has begun.
    #[cold]
    #[inline(never)]
    fn go_on(mut self, cx: &mut Context<'_>) -> (Self, Poll<InvalidationGuard<'a>>) {
        loop {
            let Some(space) = &*self.space else {
                panic!("`Invalidate` polled after it has resolved");
            };
            let (set, step) = match &mut *self.step {
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
                Turn::Ready((id, work)) => {
                    *self.step = Step::Done;
                    let Some(space) = self.space.take() else {
                        unreachable!("it was there a moment ago")
                    };
                    return (self, Poll::Ready(InvalidationGuard::new(space, id, work)));
                }
            }
        }
    }
}

/// How one turn of a future has ended.
enum Turn {
    Ready(Begun),
    Again,
    Pending,
    Lapsed,
}

/// One turn of a future that is at `step`.
fn turn(
    shared: &Shared,
    request: &Request<'_>,
    set: Option<&RangeSet>,
    lapses: u32,
    step: &mut Step,
    cx: &mut Context<'_>,
) -> Turn {
    let late = request.terms.is_late();
    let settled = match step {
        Step::Start => {
            let (id, work) = match set {
                None => begin(shared, request.range, request.owner, request.terms),
                Some(set) => begin_set(shared, request.owner, request.terms, set),
            };
            if !pends(id) {
                return Turn::Ready((id, work));
            }
            settle(Running::resume(shared, id, 0, work), late, lapses, cx)
        }
        Step::Joining { ticket, task } => {
            // Before the lock: the clone of a waker is foreign code.
            let task = TaskWaker::renew(task, cx.waker(), &shared.host.losses);
            match look(shared, *ticket, &task) {
                Found::Claimed(running, None) => return Turn::Ready(running.finish_or_resume()),
                Found::Claimed(mut running, Some(from)) => match running.advance(request, from) {
                    Reached::Pends | Reached::RefusedAndPends => settle(running, late, lapses, cx),
                    Reached::Plainly | Reached::Done | Reached::Refused => {
                        return Turn::Ready(running.finish_or_resume());
                    }
                },
                Found::Leased(lease) => {
                    return if lease.drive() { Turn::Again } else { Turn::Pending };
                }
                Found::Busy => return Turn::Pending,
                Found::Lapsed => return Turn::Lapsed,
            }
        }
        Step::Done | Step::OfSet(_) => {
            unreachable!("the handle is gone then, or it is the one in the box")
        }
    };
    match settled {
        Settled::Ready(begun) => Turn::Ready(begun),
        Settled::Parked(Parked { ticket, ready, .. }, task) => {
            let later = ready && late;
            if later {
                task.rouse();
            }
            *step = Step::Joining { ticket, task: Some(task) };
            if ready && !later { Turn::Again } else { Turn::Pending }
        }
    }
}

/// Where an invalidation is whose first passes or first polls have left something.
enum Settled {
    Ready(Begun),
    Parked(Parked, Arc<TaskWaker>),
}

/// Polls the passes once more, and hands them to the space if that is not enough.
fn settle(mut running: Running<'_>, late: bool, lapses: u32, cx: &mut Context<'_>) -> Settled {
    // Who has only yielded is done after one more poll, which comes in any case, and need never be
    // told of to others. But who starts a late one has others to tell.
    if !late && running.drive(1) && !running.is_deferred() {
        return Settled::Ready(running.finish_or_resume());
    }
    let task = TaskWaker::new(cx.waker(), running.losses());
    Settled::Parked(running.park(lapses, Some(task.clone())), task)
}

/// In what state a future finds the invalidation that it handed over.
enum Found<'s> {
    /// Its joined passes are done. The first passes go on from a hit if the budget interrupted
    /// them.
    Claimed(Running<'s>, Option<u32>),
    /// Its passes are to be polled.
    Leased(Lease<'s>),
    /// Somebody polls its passes at this moment.
    Busy,
    /// It was ended on behalf of the future, which starts over (C4).
    Lapsed,
}

fn look<'s>(shared: &'s Shared, ticket: Ticket, task: &Arc<TaskWaker>) -> Found<'s> {
    // The guards are made before anything else can unwind.
    shared.with(|state, outbox| match state.look(ticket, task, outbox) {
        Look::Claimed(id, work, resume_at, sequence) => {
            // Also if there is none left to call: what has its flag up keeps its place until it
            // lowers it.
            shared.host.flags.raise(id);
            Found::Claimed(Running::resume(shared, id, sequence, Some(work)), resume_at)
        }
        Look::Leased(work) => Found::Leased(Lease::new(shared, ticket, work)),
        Look::Busy => Found::Busy,
        Look::Lapsed => Found::Lapsed,
    })
}

impl<'a> Future for Invalidate<'a> {
    type Output = InvalidationGuard<'a>;

    /// The first poll mostly resolves. Then nothing is called that gets the address of the future
    /// or of the guard, so that the compiler keeps both in registers: their stores, of which
    /// the second lock has to wait for each, took longer than what is done between the locks.
    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let range = this.range;
        let first = match &*this.step {
            Step::OfSet(of) => matches!(of.1, Step::Start),
            step => matches!(step, Step::Start),
        };
        let (future, polled) =
            if let (Step::Start, Some(Handle::Borrowed(space))) = (&*this.step, &*this.space) {
                let space: &'a Shared = space;
                // Nothing in these is to be dropped: plain stores. Before the start, which may
                // panic.
                (this.space, this.step) = (ManuallyDrop::new(None), ManuallyDrop::new(Step::Done));
                let (id, work) = begin(space, this.range, this.owner, this.terms);
                if !pends(id) {
                    return Poll::Ready(InvalidationGuard::new(Handle::Borrowed(space), id, work));
                }
                Self::pend(Handle::Borrowed(space), (id, work), cx)
            } else {
                core::mem::replace(this, Self::resolved()).go_on(cx)
            };
        *this = future;
        if polled.is_pending()
            && let Some(space) = &*this.space
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
        // With `Step::Done` the handle is gone and nothing is left.
        if let Some(space) = self.space.take() {
            leave(space, core::mem::replace(&mut *self.step, Step::Done));
        }
    }
}

/// C1, C2: the future is dropped before it has resolved.
#[cold]
fn leave(space: Handle<'_>, step: Step) {
    let step = if let Step::OfSet(of) = step { of.1 } else { step };
    if let Step::Joining { ticket, .. } = step {
        let now = space.now();
        space.with(|state, outbox| state.leave(ticket, now, outbox));
    }
}

impl fmt::Debug for Invalidate<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = if let Step::OfSet(of) = &*self.step { &of.1 } else { &*self.step };
        let step = match step {
            Step::Start => "not started",
            Step::Joining { .. } => "passes pending",
            Step::Done | Step::OfSet(_) => "resolved",
        };
        f.debug_struct("Invalidate")
            .field("ranges", &self.set().map_or(core::slice::from_ref(&self.range), |set| &**set))
            .field("event", &self.terms.event(self.owner))
            .field("step", &step)
            .field("lapses", &self.lapses)
            .finish()
    }
}
