//! The owner's side in an `AddressSpace`.

use super::Clock;
use super::leased::Leased;
use super::link::{Link, Outbox, Outgoing, Serve};
use super::wake::{After, Guarded, Waiter, sleep_or};
use crate::message::{Asker, Epoch, Host, InvalidationId, Refusal, ToMirror, ToOwner};
use crate::owner::{Decision, Ending, Fenced, Owner, OwnerCounts};
use crate::time::Time;
use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;
use shootdown::{
    AddressSpace, InsertError, IntervalNotifier, Invalidation, PassFuture, RangeSet, Subscription,
    WouldBlock,
};

/// An owner with its clock, and the queue of messages to each host. This is a handle; clones share
/// one hub.
#[derive(Clone)]
pub struct Hub {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) state: Guarded<State>,
    clock: Box<dyn Clock>,
    /// Returns `true` if the owner may grant leases at this moment.
    held: Option<Box<dyn Fn() -> bool + Send + Sync>>,
    /// Wakes `run` when the deadline has changed.
    timer: Arc<Waiter>,
    fence: Arc<Waiter>,
}

pub(super) struct State {
    owner: Owner,
    pub(super) outboxes: BTreeMap<Host, Outbox>,
    links: u64,
    /// Passes that wait, and passes that are done.
    passes: BTreeMap<InvalidationId, Pass>,
    fences: VecDeque<Fenced>,
    deadline: Option<Time>,
    dropped: u64,
    /// Number of existing [`Mirrors`] notifiers.
    notifiers: usize,
    /// Counts how invalidations ended for members.
    endings: Endings,
}

struct Pass {
    waiter: Arc<Waiter>,
    done: bool,
}

/// Counter of each [`Ending`].
#[derive(Clone, Copy, Debug, Default)]
struct Endings([u64; 4]);

impl Hub {
    /// Makes a hub for an owner. The hub reads `clock` after each message has arrived.
    pub fn new(owner: Owner, clock: impl Clock) -> Self {
        Self::make(owner, Box::new(clock), None)
    }

    /// Makes a hub for an owner that may lose the memory. Messages that ask for a grant are taken
    /// only while `held` returns `true`; it is called after each message has arrived.
    /// Acknowledgements are always taken.
    ///
    /// Use it for an elected owner. `held` then compares the time with the end of the owner's term,
    /// counted from when it asked for the term.
    pub fn while_held(
        owner: Owner,
        clock: impl Clock,
        held: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        Self::make(owner, Box::new(clock), Some(Box::new(held)))
    }

    /// Makes the hub of a host that is a mirror itself, for the hosts below it in a tree. It grants
    /// only while its own lease lasts. [Insert](Self::insert) it into [`Leased::space`].
    ///
    /// The mirror's [`time_to_stop`](crate::MirrorSettings::time_to_stop) must cover the time that
    /// the hosts below may take: the patience and the [term](crate::Terms::owner_term) of this
    /// owner, and the time of its own devices.
    pub fn below(leased: &Leased, owner: Owner) -> Self {
        let (above, clock) = (leased.clone(), leased.clock());
        Self::make(owner, Box::new(move || clock.now()), Some(Box::new(move || above.has_lease())))
    }

    fn make(
        owner: Owner,
        clock: Box<dyn Clock>,
        held: Option<Box<dyn Fn() -> bool + Send + Sync>>,
    ) -> Self {
        let state = State {
            deadline: owner.deadline(),
            owner,
            outboxes: BTreeMap::new(),
            links: 0,
            passes: BTreeMap::new(),
            fences: VecDeque::new(),
            dropped: 0,
            notifiers: 0,
            endings: Endings::default(),
        };
        let (timer, fence) = Default::default();
        Self { inner: Arc::new(Inner { state: Guarded::new(state), clock, held, timer, fence }) }
    }

    /// Inserts [`mirrors`](Self::mirrors) over the [shared range](crate::Terms::shared). Keep the
    /// subscription as long as anything is mirrored.
    ///
    /// # Errors
    /// [`Released`](InsertError), if the space has ended.
    pub fn insert(
        &self,
        space: &AddressSpace,
    ) -> Result<Subscription<Mirrors>, InsertError<Mirrors>> {
        let shared = self.inner.state.with(|state, _| state.owner.terms().shared);
        space.insert(shared, self.mirrors())
    }

    /// Returns the notifier of all mirrors. Insert it into the owner's `AddressSpace`, over
    /// everything that is mirrored; [`insert`](Self::insert) does so. Its pass of an invalidation
    /// ends when every mirror has released the range or can no longer hold on.
    ///
    /// It refuses an invalidation that is not blockable while a member is in the books.
    ///
    /// Without such a notifier in a space, because its subscription was dropped or removed, the hub
    /// grants nothing. Mirrors are then told to release everything, but no invalidation waits for
    /// them: they may use changed memory until their leases have ended.
    pub fn mirrors(&self) -> Mirrors {
        self.inner.state.with(|state, _| state.notifiers += 1);
        Mirrors { hub: self.clone() }
    }

    /// Opens the queue of messages to a host, and ends an earlier link of that host. Messages
    /// without acknowledgement are sent again. No epoch begins or ends.
    pub fn link(&self, host: Host) -> Link {
        let waiter = Arc::<Waiter>::default();
        let generation = self.work(|state, now, after| {
            state.links += 1;
            let outbox =
                Outbox { generation: state.links, queue: VecDeque::new(), waiter: waiter.clone() };
            if let Some(older) = state.outboxes.insert(host, outbox) {
                after.wake(&older.waiter);
            }
            state.owner.connected(host, now);
            state.links
        });
        Link { hub: self.clone(), host, generation, waiter }
    }

    /// Takes a message from a host, as the transport has authenticated it.
    pub fn handle(&self, from: Host, message: ToOwner) {
        let grants = !matches!(message, ToOwner::Ack { .. } | ToOwner::Left { .. });
        // If the clock panics, there is no current time, and an old one must not be used.
        let now = self.inner.now();
        let taken = now.filter(|_| !grants || self.holds());
        self.work_at(now.unwrap_or_default(), |state, _, after| match taken {
            // The owner would not learn of changes, so it grants nothing.
            Some(_) if grants && state.notifiers == 0 => {
                if let ToOwner::Join { incarnation, nonce } = message {
                    let refused = ToMirror::Refused {
                        nonce,
                        asker: Asker::Join(incarnation),
                        why: Refusal::NotWatched,
                    };
                    state.push(from, Outgoing::Message(refused), after);
                }
            }
            Some(now) => state.owner.handle(from, message, now),
            None => state.dropped += 1,
        });
    }

    /// Returns `true` if the owner [holds](Self::while_held) the memory at this moment. A transport
    /// ends the links of an owner that does not, so that mirrors look for another one.
    pub fn holds(&self) -> bool {
        self.inner.held.as_ref().is_none_or(|held| self.inner.state.guard(held) == Some(true))
    }

    /// Keeps time for ever, on any executor: sends messages again and ends leases. One task at a
    /// time may run it. An invalidation that waits for a dead mirror ends only while this runs.
    /// `sleep` returns a timer of the runtime.
    ///
    /// If the owner itself was stopped for a while, waiting messages get one more interval to be
    /// handled, before any mirror counts as dead.
    pub async fn run<S: Future>(&self, sleep: impl Fn(Duration) -> S) {
        loop {
            let deadline = self.inner.state.with(|state, _| state.deadline);
            let Some(now) = self.inner.now() else {
                sleep(self.inner.state.with(|state, _| state.owner.terms().resend)).await;
                continue;
            };
            let changed = self
                .inner
                .state
                .until(&self.inner.timer, |state, _| (state.deadline != deadline).then_some(()));
            if !sleep_or(deadline.map(|at| at.since(now)), &sleep, changed).await {
                continue;
            }
            let resend = self.inner.state.with(|state, _| state.owner.terms().resend);
            if deadline.zip(self.inner.now()).is_some_and(|(at, now)| now.since(at) > resend) {
                sleep(resend).await;
            }
            self.tick();
        }
    }

    /// Does the work that is due now. For programs that keep time themselves, at
    /// [`deadline`](Self::deadline).
    pub fn tick(&self) {
        self.work(|state, now, _| state.owner.tick(now));
    }

    /// Returns the latest time for the next [`tick`](Self::tick).
    pub fn deadline(&self) -> Option<Time> {
        self.inner.state.with(|state, _| state.deadline)
    }

    /// Waits for the next host or boot that must be cut off from the memory. Cut it off, then call
    /// [`fenced`](Self::fenced). One task at a time may wait here.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. A fence that it has not returned stays queued.
    pub async fn next_fence(&self) -> Fenced {
        self.inner.state.until(&self.inner.fence, |state, _| state.fences.pop_front()).await
    }

    /// Tells the owner that a fence was carried out. Returns `true` if the owner had asked for it.
    pub fn fenced(&self, what: Fenced) -> bool {
        self.work(|state, now, _| state.owner.fenced(what, now))
    }

    /// Returns the counters of the owner.
    pub fn counts(&self) -> OwnerCounts {
        self.inner.state.with(|state, _| state.owner.counts())
    }

    /// Returns how often an invalidation ended like this for a member.
    pub fn endings(&self, how: Ending) -> u64 {
        self.inner.state.with(|state, _| state.endings.0[how as usize])
    }

    /// Returns the number of dropped messages: those without room or without a link on their way
    /// out, and those not taken because the owner did not [hold](Self::while_held) the memory.
    pub fn dropped(&self) -> u64 {
        self.inner.state.with(|state, _| state.dropped)
    }

    /// Returns the number of panics of wakers and of the clock. They affect no other task.
    pub fn lost_panics(&self) -> u64 {
        self.inner.state.lost_panics()
    }

    /// Returns the members in the books, with the rest of their leases.
    pub fn members(&self) -> Vec<(Host, Epoch, Duration)> {
        self.inner.state.with(|state, _| state.owner.members().collect())
    }

    /// Returns the number of invalidations that wait for a mirror.
    pub fn waiting(&self) -> usize {
        self.inner.state.with(|state, _| state.passes.values().filter(|pass| !pass.done).count())
    }

    /// Reads the clock, runs `work` under the lock, then [`State::settle`]. Every change of the
    /// owner goes through here.
    fn work<R>(&self, work: impl FnOnce(&mut State, Time, &mut After) -> R) -> R {
        // If the clock panics, the owner uses the latest time that it knows.
        self.work_at(self.inner.now().unwrap_or_default(), work)
    }

    fn work_at<R>(&self, now: Time, work: impl FnOnce(&mut State, Time, &mut After) -> R) -> R {
        let inner = &self.inner;
        inner.state.with(|state, after| {
            let result = work(state, now, after);
            state.settle(now, inner, after);
            result
        })
    }
}

impl Inner {
    /// Returns `None` if the clock panics.
    fn now(&self) -> Option<Time> {
        self.state.guard(|| self.clock.now())
    }
}

impl State {
    fn settle(&mut self, now: Time, inner: &Inner, after: &mut After) {
        while let Some(decision) = self.owner.next_decision() {
            match decision {
                Decision::Done { invalidation, endings } => {
                    for (_, ending) in endings {
                        self.endings.0[ending as usize] += 1;
                    }
                    // Fetches wait for the end of the local invalidation (`Serve`), so they need
                    // not wait here.
                    let _ = self.owner.end(invalidation, now);
                    if let Some(pass) = self.passes.get_mut(&invalidation) {
                        pass.done = true;
                        after.wake(&pass.waiter);
                    }
                }
                Decision::Fence(what) => {
                    self.fences.push_back(what);
                    after.wake(&inner.fence);
                }
                Decision::Serve { to, epoch, nonce, range, version } => {
                    self.push(to, Outgoing::Serve(Serve { epoch, nonce, range, version }), after);
                }
            }
        }
        while let Some((to, message)) = self.owner.next_message() {
            self.push(to, Outgoing::Message(message), after);
        }
        let deadline = self.owner.deadline();
        if deadline != self.deadline {
            self.deadline = deadline;
            after.wake(&inner.timer);
        }
    }

    fn push(&mut self, to: Host, outgoing: Outgoing, after: &mut After) {
        let terms = self.owner.terms();
        let room = terms.window.saturating_mul(2).saturating_add(terms.fetches).saturating_add(16);
        match self.outboxes.get_mut(&to).filter(|outbox| outbox.queue.len() < room) {
            Some(outbox) => {
                outbox.queue.push_back(outgoing);
                after.wake(&outbox.waiter);
            }
            None => self.dropped += 1,
        }
    }
}

/// The notifier of all mirrors of an owner. [`Hub::mirrors`] makes it.
pub struct Mirrors {
    hub: Hub,
}

/// The owner no longer learns of changes, so every member is expelled and told to release
/// everything.
impl Drop for Mirrors {
    fn drop(&mut self) {
        self.hub.work(|state, now, _| {
            state.notifiers -= 1;
            if state.notifiers == 0 {
                let shared = state.owner.terms().shared;
                state.owner.expel_all(now);
                state.owner.invalidate(shared.into(), now);
            }
        });
    }
}

impl IntervalNotifier for Mirrors {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let Ok(ranges) = RangeSet::new(invalidation.ranges().iter().copied()) else {
            unreachable!("an invalidation has at least one range")
        };
        let waiter = Arc::<Waiter>::default();
        let blockable = invalidation.blockable();
        let begun = self.hub.work(|state, now, _| {
            if state.owner.is_deserted() {
                return Ok(None);
            }
            if !blockable {
                return Err(WouldBlock);
            }
            let id = state.owner.invalidate(ranges, now);
            state.passes.insert(id, Pass { waiter: waiter.clone(), done: false });
            Ok(Some(id))
        })?;
        invalidation.set_seq();
        let Some(id) = begun else { return Ok(None) };
        let pass = Waiting { hub: self.hub.clone(), id };
        Ok(Some(PassFuture::new(async move {
            let done = |state: &mut State| {
                state.passes.get(&id).is_none_or(|pass| pass.done).then_some(())
            };
            pass.hub.inner.state.until(&waiter, |state, _| done(state)).await;
        })))
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Borrowed("mirrors")
    }
}

/// A pass that waits. Its drop removes it from the state; the pass is dropped when it ends or the
/// mirrors are fenced.
struct Waiting {
    hub: Hub,
    id: InvalidationId,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.hub.inner.state.with(|state, _| state.passes.remove(&self.id));
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Mirrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirrors").finish_non_exhaustive()
    }
}
