//! The engine: starts invalidations, joins their passes, ends them, and lets whoever waits help (C3).
//!
//! Everything that changes is in [`State`], under one lock; what must happen outside of it (wakers, drops, driver code) is
//! noted in [`After`] and done when the lock is free (C8). The parts:
//!
//! - `scratch`: the working memory of an invalidation, reused, and the join of its passes;
//! - `pending`: an invalidation whose guard is not handed out yet and whose passes therefore belong to the space;
//! - `start`: the hits of an invalidation, their first passes and first polls;
//! - `invalidate`, `guard`: the future and the guard that a caller of an invalidation sees;
//! - `wait`, `remove`: the futures that wait for others' invalidations: readers and `drain`, removers;
//! - `gate`: holds the readers of the whole space back for a moment;
//! - `waiters`, `wakes`, `after`: who is to be woken, by an end or by a pass, and what is done when the lock is free;
//! - `calls`, `first_pass`: which first passes run at this moment, for removers and for checks.
#![forbid(unsafe_code)]

mod after;
pub(crate) mod calls;
pub(crate) mod first_pass;
pub(crate) mod gate;
pub(crate) mod guard;
pub(crate) mod invalidate;
pub(crate) mod pending;
pub(crate) mod remove;
pub(crate) mod scratch;
mod start;
pub(crate) mod wait;
mod waiters;
mod wakes;

use crate::entry::{Entry, EntryRef, Spare};
use crate::event::{Event, Owner, Terms};
use crate::index::{IntervalIndex, Ordered, Ranged};
use crate::notifier::{Request, Sequence};
use crate::observe;
use crate::protocol::{Active, Id, Protocol};
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicU64, AtomicUsize, Lock, Ordering, Panic, Weak, catch, resume};
pub(crate) use after::After;
use alloc::boxed::Box;
use alloc::vec::Vec;
use calls::CallTable;
#[cfg(any(feature = "userfaultfd", loom))]
use core::task::Waker;
use core::time::Duration;
use gate::Gate;
use pending::Pending;
use scratch::Scratch;
use slab::Slab;
use waiters::uncovered;
pub(crate) use waiters::{WaitFor, Waiter};

/// What all handles of one address space share.
pub(crate) struct Shared {
    /// The handle that all others are counted with, for those who have a reference only.
    this: Weak<Self>,
    state: Lock<State>,
    /// Memory for the next entry.
    pub(crate) spare: Spare,
    /// Before all readers of the space.
    pub(crate) gate: Gate,
    /// Which active invalidations are in their first passes.
    pub(crate) calls: CallTable,
    pub(crate) budget: Option<Budget>,
    pub(crate) reporter: Option<Reporter>,
    pub(crate) clock: Option<Clock>,
    pub(crate) reads: Reads,
}

/// What happened to readers of the space; only their slow paths count.
#[derive(Default)]
pub(crate) struct Reads {
    pub(crate) collisions: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) waits: AtomicU64,
}

/// Is told what has no caller to be returned to.
pub(crate) type Reporter = Box<dyn Fn(&Report<'_>) + Send + Sync>;
/// The time since some fixed moment.
pub(crate) type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// Something that went wrong in a driver and has no caller to be returned to.
#[derive(Debug)]
#[non_exhaustive]
pub enum Report<'a> {
    /// A first pass answered `WouldBlock` in a blockable invalidation (B1). The others went on; this driver's device may still
    /// use the old mapping.
    RefusedBlockable {
        /// [`IntervalNotifier::name`](crate::IntervalNotifier::name) of the driver at fault.
        notifier: &'a str,
        /// What was invalidated.
        range: AddressRange,
        /// Why.
        event: Event,
    },
}

pub(crate) struct State {
    pub(crate) protocol: Protocol<EntryRef, Extra>,
    /// Active invalidations whose guard is not handed out, by range, so that those who wait find what they can help with.
    pub(crate) unclaimed: IntervalIndex<Ranged<Unclaimed>>,
    pub(crate) waiters: Slab<Waiter>,
    /// Readers that wait for the gate.
    #[cfg(any(feature = "userfaultfd", loom))]
    pub(crate) gated: Vec<Waker>,
    pub(crate) next_order: u64,
    pub(crate) released: bool,
    pub(crate) counts: Counts,
}

/// What the engine keeps beside each active invalidation.
pub(crate) struct Extra {
    pub(crate) owner: Option<Owner>,
    pub(crate) terms: Terms,
    /// While the guard is not handed out and passes were pending.
    pub(crate) pending: Option<Box<Pending>>,
    /// Its serial, and when it was first seen to last: its passes became pending, or somebody listed it. With another serial it is of an earlier
    /// invalidation in this place: most have no use for it, and so need not clear it.
    since: Option<(u64, Duration)>,
    /// The working memory that the last invalidation in this place left, until one takes it that hits something.
    pub(crate) spare: Option<Box<Scratch>>,
}

impl Default for Extra {
    fn default() -> Self {
        Self { owner: None, terms: Terms::new(Event::Unmap, true), pending: None, since: None, spare: None }
    }
}

impl Active<EntryRef, Extra> {
    /// When the invalidation was first seen to last, if it was.
    pub(crate) fn since(&self) -> Option<Duration> {
        self.extra.since.and_then(|(serial, since)| (serial == self.serial()).then_some(since))
    }

    /// The same; that is `now` if it was not seen before.
    pub(crate) fn seen_to_last(&mut self, now: Option<Duration>) -> Option<Duration> {
        let since = self.since().or(now)?;
        self.extra.since = Some((self.serial(), since));
        Some(since)
    }
}

impl Extra {
    /// Notes why the range is under invalidation, and when that began if it is timed.
    #[inline(always)]
    fn fill(&mut self, request: &Request, serial: u64, since: Option<Duration>) {
        (self.owner, self.terms) = (request.owner, request.terms);
        if let Some(since) = since {
            self.since = Some((serial, since));
        }
    }

    /// Where the start of an invalidation collects its hits.
    #[inline(always)]
    fn hits(&mut self) -> &mut Vec<EntryRef> {
        if self.spare.is_none() {
            self.make_spare();
        }
        let Some(scratch) = &mut self.spare else { unreachable!("there is one now") };
        &mut scratch.hits
    }

    #[cold]
    #[inline(never)]
    fn make_spare(&mut self) {
        self.spare = Some(Box::default());
    }

    /// Keeps the working memory of an invalidation that has ended for the next one in this place.
    #[inline(always)]
    fn recycle(&mut self, mut scratch: Box<Scratch>) {
        scratch.hits.clear();
        debug_assert!(self.spare.is_none(), "an invalidation gives the memory back that it took from here");
        core::mem::forget(self.spare.replace(scratch));
    }
}

/// What happened in a space, under its lock.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) lapses: u64,
    /// The longest that an invalidation was active, of those that were timed.
    pub(crate) longest: Option<Duration>,
    pub(crate) abandoned: u64,
    pub(crate) refused_blockable: u64,
    pub(crate) lost_panics: u64,
}

/// An entry of [`State::unclaimed`].
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Unclaimed {
    pub(crate) id: Id,
    pub(crate) serial: u64,
}

impl Ordered for Unclaimed {
    fn order(self) -> u64 {
        self.serial
    }
}

/// B4: how many passes may be pending at once.
pub(crate) struct Budget {
    limit: usize,
    used: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0) }
    }

    fn reserve(&self) -> bool {
        let take = |used| (used < self.limit).then_some(used + 1);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn give_back(&self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    pub(crate) fn new(sequence: u64, budget: Option<Budget>, reporter: Option<Reporter>, clock: Option<Clock>) -> Arc<Self> {
        let state = State {
            protocol: Protocol::new(sequence),
            unclaimed: IntervalIndex::new(),
            waiters: Slab::new(),
            #[cfg(any(feature = "userfaultfd", loom))]
            gated: Vec::new(),
            next_order: 0,
            released: false,
            counts: Counts::default(),
        };
        Arc::new_cyclic(|this| Self {
            this: this.clone(),
            state: Lock::new(state),
            spare: Spare::new(),
            gate: Gate::new(),
            calls: CallTable::new(),
            budget,
            reporter,
            clock,
            reads: Reads::default(),
        })
    }

    /// One more handle.
    pub(crate) fn handle(&self) -> Arc<Self> {
        let Some(handle) = self.this.upgrade() else { unreachable!("whoever has a reference has it from a handle") };
        handle
    }

    /// The only way to the state: under the lock, and with somewhere to put what must wait until it is free.
    #[inline]
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut State, &mut After) -> R) -> R {
        let mut after = After::default();
        let result = work(&mut self.state.lock(), &mut after);
        after.run();
        result
    }

    #[inline]
    pub(crate) fn give_pass_back(&self) {
        if let Some(budget) = &self.budget {
            budget.give_back();
        }
    }

    /// Time since some fixed moment; `None` where there is no clock, and when the user's panics: it is asked in the middle of things.
    pub(crate) fn now(&self) -> Option<Duration> {
        if let Some(clock) = &self.clock {
            return catch(clock).ok();
        }
        #[cfg(feature = "std")]
        {
            static EPOCH: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
            Some(EPOCH.get_or_init(std::time::Instant::now).elapsed())
        }
        #[cfg(not(feature = "std"))]
        None
    }

    /// Whether a reader has to start over (R2) that finds its notifier not as it was, or the gate not `open`.
    #[cold]
    #[inline(never)]
    pub(crate) fn collides(&self, entry: &Entry, sequence: Sequence, open: bool) -> bool {
        let retry = !open || entry.own.is_past(sequence.0);
        if retry {
            self.collided(entry);
        }
        retry
    }

    /// A check of a reader said that it has to start over.
    pub(crate) fn collided(&self, entry: &Entry) {
        self.reads.collisions.fetch_add(1, Ordering::Relaxed);
        entry.tally().collided();
        observe::collided();
    }

    /// The library's collision-retry loop starts over.
    #[cold]
    pub(crate) fn retried(&self, entry: &Entry) {
        self.reads.retries.fetch_add(1, Ordering::Relaxed);
        entry.tally().retried();
        observe::retried();
    }

    /// A reader has to wait.
    #[cold]
    fn waited(&self, entry: &Entry) {
        self.reads.waits.fetch_add(1, Ordering::Relaxed);
        entry.tally().waited();
        observe::waited();
    }

    pub(crate) fn report(&self, report: &Report<'_>) {
        if let Some(reporter) = &self.reporter {
            // A panicking reporter must not stop the other notifiers; it has no caller of its own.
            let _ = catch(|| reporter(report));
        }
    }
}

impl State {
    /// Ends an active invalidation (S3, C2) and wakes whoever waited for that. `now` if it was timed.
    pub(crate) fn end(&mut self, id: Id, mut scratch: Option<Box<Scratch>>, now: Option<Duration>, after: &mut After) {
        if let Some(scratch) = &mut scratch {
            scratch.timed = false;
        }
        let hits = scratch.as_ref().map_or(&[][..], |scratch| &scratch.hits);
        if let Some(now) = now {
            self.lasted(id, hits, now);
        }
        let (tell, extra) = self.protocol.end(id, hits);
        if tell {
            self.tell(id, scratch, after);
        } else if let Some(scratch) = scratch {
            extra.recycle(scratch);
        }
    }

    /// Wakes whoever waited for the end of the invalidation `id`, which has just ended, and keeps its working memory.
    #[cold]
    pub(crate) fn tell(&mut self, id: Id, scratch: Option<Box<Scratch>>, after: &mut After) {
        let hits = scratch.as_ref().map_or(&[][..], |scratch| &scratch.hits);
        let Self { protocol, waiters, .. } = self;
        let extra = protocol.tell(id, hits, |entry| uncovered(waiters, entry, after));
        if let Some(scratch) = scratch {
            extra.recycle(scratch);
        }
    }

    /// Notes how long an invalidation has been active.
    #[cold]
    pub(crate) fn lasted(&mut self, id: Id, hits: &[EntryRef], now: Duration) {
        if let Some(since) = self.protocol.active().get(id).and_then(Active::since) {
            let age = now.saturating_sub(since);
            self.counts.longest = self.counts.longest.max(Some(age));
            let micros = u32::try_from(age.as_micros()).unwrap_or(u32::MAX);
            hits.iter().for_each(|entry| entry.lasted(micros));
        }
    }

    /// Notes that `entry` may have nothing that keeps it alive any more.
    pub(crate) fn reap(&mut self, entry: EntryRef, after: &mut After) {
        if entry.unused() {
            after.work().dead.push(entry);
        }
    }

    /// Keeps a panic that nobody can be told of from being dropped under the lock.
    pub(crate) fn lose_panic(&mut self, panic: Option<Panic>, after: &mut After) {
        if let Some(panic) = panic {
            self.counts.lost_panics += 1;
            after.work().panics.push(panic);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // No handle, subscription, guard or future is left. What was abandoned and never drained goes with the space.
        let mut after = After::default();
        let state = self.state.get_mut();
        let ids: Vec<Id> = state.protocol.active().iter().map(|(id, _)| id).collect();
        let mut scratches = Vec::new();
        for id in ids {
            let pending = state.protocol.active_mut().get_mut(id).and_then(|active| active.extra.pending.take());
            let scratch = pending.and_then(|mut pending| pending.scratch.take());
            let hits = scratch.as_ref().map_or(&[][..], |scratch| &scratch.hits);
            if state.protocol.end(id, hits).0 {
                state.protocol.tell(id, hits, |entry| {
                    if entry.unused() {
                        after.work().dead.push(entry);
                    }
                });
            }
            scratches.push(scratch);
        }
        let panic = catch(|| drop(scratches)).err();
        after.run();
        if let Some(panic) = panic {
            resume(panic);
        }
    }
}
