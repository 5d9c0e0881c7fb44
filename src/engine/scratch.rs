//! The working memory of an invalidation, used again by later ones, and the join of its passes.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::wakes::PassWaker;
use crate::entry::EntryRef;
use crate::event::{Event, Terms};
use crate::notifier::Request;
use crate::observe::{self, Moment, Trace};
use crate::pass::PassFuture;
use crate::protocol::Id;
use crate::range::AddressRange;
use crate::sync::{Arc, Panic, catch};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use futures::stream::{FuturesUnordered, StreamExt};
use slab::Slab;
use sync_wrapper::SyncWrapper;

/// How often passes that wake themselves are polled before the executor gets its turn again.
const ROUNDS: usize = 4;
/// Passes that may finish in one poll before the executor gets its turn again.
const FINISHED_AT_ONCE: usize = 256;

/// Where a pass future lies from its first poll to its end. Boxed so that it need not move when it goes from the first poll to the
/// join, and used again, so that a pass that is ready at its first poll allocates nothing.
type Place = Pin<Box<Option<PassFuture>>>;

/// The key of a pass that its invalidation does not list as pending.
pub(crate) const UNLISTED: usize = usize::MAX;

pub(crate) struct Scratch {
    /// Which invalidation it is, once its passes are pending.
    pub(crate) id: Id,
    /// What is invalidated and why, likewise.
    pub(crate) request: Request,
    /// The sequence that all its passes get, likewise.
    pub(crate) sequence: u64,
    /// The notifiers that the invalidation hit, in order of their first passes.
    pub(crate) hits: Vec<EntryRef>,
    /// Passes need not be `Sync`, and guards are, which hold this: so nobody looks at them who could not also poll them.
    passes: SyncWrapper<Passes>,
    /// The first passes go on from this hit, if the pass budget interrupted them (B4); likewise.
    pub(crate) resume_at: Option<usize>,
    /// It has a time stamp: its passes were pending.
    pub(crate) timed: bool,
    /// Spare record of a pending invalidation.
    pub(crate) pending: Option<Box<super::pending::Pending>>,
}

impl Default for Scratch {
    fn default() -> Self {
        let request = Request { range: AddressRange::ALL, owner: None, terms: Terms::new(Event::Unmap, true) };
        Self {
            id: 0,
            request,
            sequence: 0,
            hits: Vec::new(),
            passes: SyncWrapper::new(Passes::default()),
            resume_at: None,
            timed: false,
            pending: None,
        }
    }
}

impl Scratch {
    #[inline(always)]
    pub(crate) fn passes(&mut self) -> &mut Passes {
        self.passes.get_mut()
    }

    /// The hits, and where their passes go.
    #[inline(always)]
    pub(crate) fn split(&mut self) -> (&[EntryRef], &mut Passes) {
        (&self.hits, self.passes.get_mut())
    }
}

/// What the first passes left to be waited for.
pub(crate) struct Passes {
    /// Passes that no one has polled yet, in order of their first passes, and behind them records of earlier ones whose memory is used again.
    slots: Vec<Pass>,
    /// How many of them are not polled yet.
    started: usize,
    /// Where the next first pass puts what it leaves.
    pub(crate) next: Place,
    /// What the last [`Passes::drive`] finished.
    pub(crate) finished: Vec<Finished>,
    /// The first panic of a first pass or of a pass (C5).
    pub(crate) panic: Option<Panic>,
    /// A first pass refused (B2).
    pub(crate) refused: bool,
    pub(crate) trace: Trace,
    places: Vec<Place>,
    join: Option<Join>,
}

impl Default for Passes {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            started: 0,
            next: Box::pin(None),
            finished: Vec::new(),
            panic: None,
            refused: false,
            trace: Default::default(),
            places: Vec::new(),
            join: None,
        }
    }
}

/// The passes that stayed pending at their first poll.
struct Join {
    running: FuturesUnordered<Pass>,
    wakes: Arc<PassWaker>,
    /// `wakes` as a waker.
    waker: Waker,
}

/// A pass, its notifier, and what is given back when it is done.
pub(crate) struct Pass {
    future: Option<Place>,
    pub(crate) entry: EntryRef,
    pub(crate) listed: usize,
    /// It counts against the pass budget (B4).
    budgeted: bool,
    /// Its first pass was called then.
    began: Moment,
}

impl Pass {
    /// The pass itself; what stays is a record without a place, that nobody lists.
    fn move_out(&mut self) -> Self {
        let listed = core::mem::replace(&mut self.listed, UNLISTED);
        Self { future: self.future.take(), listed, ..*self }
    }
}

/// A pass that is done.
pub(crate) struct Finished {
    pub(crate) entry: EntryRef,
    pub(crate) listed: usize,
    pub(crate) budgeted: bool,
    began: Moment,
    pub(crate) panic: Option<Panic>,
}

/// Whether passes remain.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Progress {
    AllFinished,
    /// None of the rest is ready to go on.
    Waiting,
    /// Some of the rest are ready to go on; the caller stopped to let others run.
    Yielded,
}

impl Future for Pass {
    type Output = (Finished, Option<Place>);

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let Some(place) = &mut this.future else {
            panic!("a pass is not polled after it is done");
        };
        let polled = catch(|| match place.as_mut().as_pin_mut() {
            Some(future) => future.poll(cx),
            None => Poll::Ready(()),
        });
        let mut panic = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(())) => None,
            Err(panic) => Some(panic),
        };
        if let Err(in_drop) = catch(|| place.as_mut().set(None)) {
            panic = panic.or(Some(in_drop));
        }
        // A drop that panicked has left the place empty all the same, or may have not: it is not used again.
        let place = this.future.take().filter(|_| panic.is_none());
        let done = Finished { entry: this.entry, listed: this.listed, budgeted: this.budgeted, began: this.began, panic };
        Poll::Ready((done, place))
    }
}

/// Polls passes from `at` on, once each, and empties the places of those that are done; `at` moves behind a pass before it is polled. `pend` counts
/// the others.
#[inline]
fn poll_from(started: &mut [Pass], at: &mut usize, pend: &mut usize, trace: &Trace, cx: &mut Context<'_>) {
    while let Some(pass) = started.get_mut(*at) {
        *at += 1;
        if let Some(place) = &mut pass.future
            && let Some(future) = place.as_mut().as_pin_mut()
        {
            if future.poll(cx).is_ready() {
                place.as_mut().set(None);
                trace.pass(pass.entry, pass.began, false);
            } else {
                *pend += 1;
            }
        }
    }
}

/// Keeps the first panic (C5). Runs the drop of any further one.
#[cold]
fn keep(first: &mut Option<Panic>, panic: Panic) {
    let _ = catch(|| first.get_or_insert(panic));
}

impl Passes {
    /// Keeps what a first pass left in `next`, until all first passes have been called (O2). `BUDGET`: there may be a pass budget.
    #[inline(always)]
    pub(crate) fn start_pass<const BUDGET: bool>(&mut self, entry: EntryRef, budgeted: bool, began: Moment) {
        if let Some(slot) = self.slots.get_mut(self.started)
            && let Some(spare) = &mut slot.future
        {
            core::mem::swap(spare, &mut self.next);
            (slot.entry, slot.began) = (entry, began);
            if BUDGET {
                slot.budgeted = budgeted;
            }
            self.started += 1;
        } else {
            self.start_first_pass(entry, budgeted, began);
        }
    }

    /// The same for one that finds no record with a place.
    #[cold]
    #[inline(never)]
    fn start_first_pass(&mut self, entry: EntryRef, budgeted: bool, began: Moment) {
        let spare = self.places.pop().unwrap_or_else(|| Box::pin(None));
        let place = core::mem::replace(&mut self.next, spare);
        let pass = Pass { future: Some(place), entry, listed: UNLISTED, budgeted, began };
        match self.slots.get_mut(self.started) {
            Some(slot) => *slot = pass,
            None => self.slots.push(pass),
        }
        self.started += 1;
    }

    /// How many passes no one has polled yet.
    #[inline]
    pub(crate) fn started(&self) -> usize {
        self.started
    }

    pub(crate) fn started_mut(&mut self) -> &mut [Pass] {
        &mut self.slots[..self.started]
    }

    #[inline(always)]
    fn join(&mut self) -> &mut Join {
        if self.join.is_none() {
            self.make_join();
        }
        let Some(join) = &mut self.join else { unreachable!("there is one now") };
        join
    }

    #[cold]
    #[inline(never)]
    fn make_join(&mut self) {
        let wakes = Arc::new(PassWaker::default());
        self.join = Some(Join { running: FuturesUnordered::new(), waker: Waker::from(wakes.clone()), wakes });
    }

    /// Who is woken when a pass can go on.
    pub(crate) fn wakes(&mut self) -> &Arc<PassWaker> {
        &self.join().wakes
    }

    /// Passes that were polled and are not done.
    pub(crate) fn running(&self) -> usize {
        self.join.as_ref().map_or(0, |join| join.running.len())
    }

    /// Keeps the first panic (C5).
    pub(crate) fn keep_panic(&mut self, panic: Panic) {
        keep(&mut self.panic, panic);
    }

    /// Polls each started pass from `from` on once, in order (O3). What stays pending goes into the join; most passes of
    /// fast devices never get there. Says whether none does, and none panicked.
    #[inline(never)]
    pub(crate) fn first_polls(&mut self, space: &Shared, from: usize) -> bool {
        self.first_polls_of(space, from, self.started)
    }

    /// The same for the only pass: without a loop.
    #[inline(never)]
    pub(crate) fn first_poll(&mut self, space: &Shared) -> bool {
        self.first_polls_of(space, 0, 1)
    }

    #[inline(always)]
    fn first_polls_of(&mut self, space: &Shared, from: usize, end: usize) -> bool {
        self.join();
        let Self { slots, join: Some(join), trace, .. } = self else { return false };
        let mut cx = Context::from_waker(&join.waker);
        let (mut at, mut pend) = (from, 0);
        let to_poll = &mut slots[..end];
        let polled = {
            let _entered = trace.enter();
            catch(|| poll_from(to_poll, &mut at, &mut pend, trace, &mut cx))
        };
        let plain = polled.is_ok() && pend == 0;
        if !plain || space.budget.is_some() {
            self.more_first_polls(space, from, at, polled);
        }
        self.started = from;
        plain
    }

    /// The rest of the first polls, when those before `at` were `polled` and something is left to do.
    #[cold]
    #[inline(never)]
    fn more_first_polls(&mut self, space: &Shared, from: usize, mut at: usize, mut polled: Result<(), Panic>) {
        let Self { slots, started, join: Some(join), panic: first, trace, .. } = self else { return };
        let mut cx = Context::from_waker(&join.waker);
        let to_poll = &mut slots[..*started];
        // After a panic the polls go on behind the pass that panicked (C5).
        while let Err(panic) = polled {
            keep(first, panic);
            // It need not be empty if its drop panicked, too: it is not used again.
            let mut place = to_poll.get_mut(at - 1).and_then(|pass| pass.future.take());
            if let Err(in_drop) = catch(|| drop(place.take())) {
                keep(first, in_drop);
            }
            let _entered = trace.enter();
            polled = catch(|| poll_from(to_poll, &mut at, &mut 0, trace, &mut cx));
        }
        // A wake-up meanwhile is not lost: the join polls what it has just been given in any case.
        for slot in &mut slots[from..*started] {
            if slot.future.as_ref().is_some_and(|place| place.is_some()) {
                observe::pass_pends();
                join.running.push(slot.move_out());
            } else if slot.budgeted {
                space.give_pass_back();
            }
        }
    }

    /// Puts all passes that wait for their first poll into the join: nobody will call further first passes.
    pub(crate) fn join_started(&mut self) {
        self.join();
        let Self { slots, started, join: Some(join), .. } = self else { return };
        for slot in &mut slots[..core::mem::take(started)] {
            observe::pass_pends();
            join.running.push(slot.move_out());
        }
    }

    /// Gives each pass in the join a key among those that are listed as pending, and each one that is not polled yet.
    pub(crate) fn list(&mut self, pending: &mut Slab<EntryRef>) {
        let running = self.join.iter_mut().flat_map(|join| join.running.iter_mut());
        for pass in self.slots[..self.started].iter_mut().chain(running) {
            if pass.listed == UNLISTED {
                pass.listed = pending.insert(pass.entry);
            }
        }
    }

    /// Polls the joined passes of an invalidation that was not handed over, as long as one of them is ready to go on, but
    /// no more than `idle` times without one that finishes.
    pub(crate) fn drive_alone(&mut self, space: &Shared, idle: usize) {
        let mut left = idle;
        loop {
            let progress = self.drive();
            let woken = self.wakes().end();
            if !self.finished.is_empty() {
                left = idle;
            }
            let mut finished = core::mem::take(&mut self.finished);
            for done in finished.drain(..) {
                if done.budgeted {
                    space.give_pass_back();
                }
                if let Some(panic) = done.panic {
                    self.keep_panic(panic);
                }
            }
            self.finished = finished;
            left -= 1;
            let goes_on = progress == Progress::Yielded || (woken && progress == Progress::Waiting);
            if !goes_on || left == 0 {
                return;
            }
        }
    }

    /// Polls the joined passes as far as they go, within bounds; `self.finished` says which are done.
    ///
    /// A wake-up from now on is only noted, until [`PassWaker::end`] is called, which must not be before others can take the passes
    /// again: one that they heard of earlier would find nothing to poll and be lost.
    pub(crate) fn drive(&mut self) -> Progress {
        let Some(join) = &mut self.join else {
            return Progress::AllFinished;
        };
        let mut cx = Context::from_waker(&join.waker);
        let mut rounds = 0;
        let mut finished = 0;
        join.wakes.begin();
        let _entered = self.trace.enter();
        loop {
            match join.running.poll_next_unpin(&mut cx) {
                Poll::Ready(Some((done, place))) => {
                    self.places.extend(place);
                    observe::pass_pends_no_more();
                    self.trace.pass(done.entry, done.began, done.panic.is_some());
                    self.finished.push(done);
                    finished += 1;
                    if finished < FINISHED_AT_ONCE {
                        continue;
                    }
                    return if join.running.is_empty() { Progress::AllFinished } else { Progress::Yielded };
                }
                Poll::Ready(None) => return Progress::AllFinished,
                Poll::Pending => {
                    rounds += 1;
                    if rounds == ROUNDS || !join.wakes.take_woken() {
                        return Progress::Waiting;
                    }
                }
            }
        }
    }
}
