//! A mirror's end.

use super::Clock;
use super::wake::{After, Guarded, Waiter, sleep_or};
use crate::message::{Epoch, InvalidationId, Nonce, Refusal, ToMirror, ToOwner};
use crate::mirror::{Denied, FetchError, Mirror, MirrorCounts, MirrorDecision, Standing};
use crate::time::Time;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::pin::pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::Poll;
use core::time::Duration;
use futures::FutureExt;
use futures::channel::oneshot;
use futures::stream::{FuturesUnordered, StreamExt};
use shootdown::{AddressRange, AddressSpace, Event, RangeSet};
use std::panic::AssertUnwindSafe;

/// What waits to be sent at most; of more, the oldest is dropped, as if the network had lost it.
const OUTGOING: usize = 4_096;

/// Memory of another host, held by a lease: an `AddressSpace` of the owner's addresses, in which
/// this host's devices and copies are notifiers and readers. A handle: clones are the same.
///
/// What the owner invalidates is invalidated here, and acknowledged when all passes are done. When
/// the lease is about to end everything is invalidated, and readers wait until the mirror has
/// joined anew. `read_retry` asks the lease, too (rule R4 of `shootdown`), so the loop of a reader
/// is the ordinary one: `read_begin`, [`fetch`](Self::fetch), and install under the driver's lock
/// unless `read_retry`; and who uses what is installed asks `read_retry` again after the use.
#[derive(Clone)]
pub struct Leased {
    inner: Arc<Inner>,
}

struct Inner {
    space: AddressSpace,
    state: Guarded<State>,
    clock: Arc<dyn Clock>,
    /// The end of the lease in nanoseconds; 0 without one. Written under the lock, read by readers.
    until: Arc<AtomicU64>,
    /// What `run` waits for.
    work: Arc<Waiter>,
    /// What the transport waits for.
    out: Arc<Waiter>,
}

struct State {
    mirror: Mirror,
    outgoing: VecDeque<ToOwner>,
    decisions: VecDeque<MirrorDecision>,
    deadline: Option<Time>,
    fetches: BTreeMap<Nonce, oneshot::Sender<Answer>>,
    /// Told when the mirror has joined, or has left for good.
    standing: Vec<oneshot::Sender<()>>,
    denied: Option<Denied>,
    dropped: u64,
    panics: u64,
}

/// How a fetch ends.
enum Answer {
    Contents(Vec<u8>),
    /// To be asked again: an invalidation has met it, or the lease has ended.
    Again,
    Refused(Refusal),
    WrongLength(usize),
}

/// Why there are no contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lost {
    /// The mirror has left, is leaving, or joins no more ([`Denied::Panicked`]).
    Left,
    /// The owner does not serve it.
    Refused(Refusal),
    /// As many fetches are under way as the mirror's settings allow.
    Full,
    /// What came has another length than what was asked for.
    WrongLength {
        /// What was asked for.
        asked: AddressRange,
        /// How many bytes came.
        got: usize,
    },
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("the mirror has left: make a new one to join again"),
            Self::Refused(why) => write!(f, "{why}"),
            Self::Full => write!(f, "{}", FetchError::Full),
            Self::WrongLength { asked, got } => {
                write!(
                    f,
                    "{got} bytes came for {asked}: the owner's transport sends the contents of exactly the range that was asked for"
                )
            }
        }
    }
}

impl core::error::Error for Lost {}

impl Leased {
    /// Takes a mirror. It joins as soon as [`run`](Self::run) runs and a transport carries
    /// messages.
    pub fn new(mirror: Mirror, clock: impl Clock) -> Self {
        let (clock, until): (Arc<dyn Clock>, _) = (Arc::new(clock), Arc::new(AtomicU64::new(0)));
        let asks = (clock.clone(), until.clone());
        let valid = move || asks.0.now().as_nanos() < asks.1.load(Ordering::Acquire);
        let state = State {
            deadline: mirror.deadline(),
            mirror,
            outgoing: VecDeque::new(),
            decisions: VecDeque::new(),
            fetches: BTreeMap::new(),
            standing: Vec::new(),
            denied: None,
            dropped: 0,
            panics: 0,
        };
        let space = AddressSpace::builder().valid_while(valid).build();
        let (work, out) = Default::default();
        Self {
            inner: Arc::new(Inner { space, state: Guarded::new(state), clock, until, work, out }),
        }
    }

    /// The owner's addresses, as devices and readers here see them.
    pub fn space(&self) -> &AddressSpace {
        &self.inner.space
    }

    /// Takes a message of the owner; for `Fetched` with the contents, of the length of the range
    /// that was asked for. Without contents the fetch is asked again.
    pub fn handle(&self, message: ToMirror, contents: Option<Vec<u8>>) {
        let mut contents = contents;
        self.work(|state, now, after| {
            state.mirror.handle(message, now);
            // What came belongs to the decision that this message has made, if any.
            while let Some(decision) = state.mirror.next_decision() {
                let contents = matches!(decision, MirrorDecision::Install { .. })
                    .then(|| contents.take())
                    .flatten();
                state.decide(decision, contents, after);
            }
        });
    }

    /// What to send next, once there is something; `None` when the mirror has left for good and
    /// said so. One task at a time may wait here. Cancel safe. Not to be called while there is no
    /// connection: what was not sent is dropped in time, and the protocol sends it again.
    pub async fn next_message(&self) -> Option<ToOwner> {
        let over = |state: &State| state.mirror.is_over().then_some(None);
        let next = |state: &mut State| state.outgoing.pop_front().map(Some).or_else(|| over(state));
        self.inner.state.until(&self.inner.out, |state, _| next(state)).await
    }

    /// Keeps the lease and carries out what the owner asks, on any executor, until the mirror has
    /// [left](Self::leave). Readers get nowhere while this does not run. One task at a time. If it
    /// is dropped, the lease ends by itself, and nobody stops the devices then; another run begins
    /// what was under way anew.
    ///
    /// A panic of a driver costs the lease: everything is let go of, and the mirror joins anew.
    /// Where that panics as well it joins no more ([`Denied::Panicked`]).
    pub async fn run<S: Future>(&self, sleep: impl Fn(Duration) -> S) {
        let mut under_way = FuturesUnordered::new();
        // What an earlier run had begun is begun anew.
        if self.work(|state, _, _| state.begin_anew()) {
            under_way.push(Box::pin(self.stop()) as futures::future::BoxFuture<'_, ()>);
        }
        loop {
            // Decisions first: what they do takes effect before the next message goes out.
            let mut over = false;
            let changed = async {
                let next = self.inner.state.until(&self.inner.work, |state, _| {
                    over = state.mirror.is_over();
                    let decision = state.decisions.pop_front();
                    (decision.is_some() || over || state.mirror.deadline() != state.deadline)
                        .then_some(decision)
                });
                next.await
            };
            let (deadline, now) = (self.deadline(), self.inner.clock.now());
            let decision = {
                let mut changed = pin!(changed);
                let mut found = None;
                let worked = core::future::poll_fn(|cx| {
                    // What is under way makes progress whatever else there is.
                    while let Poll::Ready(Some(())) = under_way.poll_next_unpin(cx) {}
                    changed.as_mut().poll(cx).map(|decision| found = decision)
                });
                if sleep_or(deadline.map(|at| at.since(now)), &sleep, worked).await {
                    self.work(|state, now, _| state.mirror.tick(now));
                }
                found
            };
            match decision {
                Some(MirrorDecision::Invalidate { epoch, invalidation, ranges }) => {
                    under_way.push(Box::pin(self.invalidate(epoch, invalidation, ranges))
                        as futures::future::BoxFuture<'_, ()>);
                }
                Some(MirrorDecision::Stop { .. }) => under_way.push(Box::pin(self.stop())),
                _ => {}
            }
            if over {
                return;
            }
            self.inner.state.with(|state, _| state.deadline = state.mirror.deadline());
        }
    }

    async fn invalidate(&self, epoch: Epoch, invalidation: InvalidationId, ranges: RangeSet) {
        let invalidated = AssertUnwindSafe(async {
            drop(self.inner.space.invalidate_all(ranges, Event::Clear).await)
        });
        let done = invalidated.catch_unwind().await;
        self.work(|state, now, _| match done {
            Ok(()) => _ = state.mirror.invalidated(epoch, invalidation, now),
            // Nobody knows whether that driver's device has let go: all stop, and then join anew.
            Err(_) => {
                state.panics += 1;
                state.mirror.give_up(epoch, now);
            }
        });
    }

    /// Nothing begins any more, because the lease is not valid; what is there is let go of.
    async fn stop(&self) {
        let stopped = AssertUnwindSafe(async {
            drop(self.inner.space.invalidate(AddressRange::ALL, Event::Clear).await)
        });
        let done = stopped.catch_unwind().await;
        self.work(|state, now, after| match done {
            Ok(()) => {
                // Of an earlier run's panic, too: now everything has been let go of.
                state.denied = None;
                state.mirror.stopped(now);
            }
            // The mirror says nothing, and the lease ends by time.
            Err(_) => {
                state.panics += 1;
                state.denied = Some(Denied::Panicked);
                state.tell_standing(after);
            }
        });
    }

    /// Asks the owner for the contents of a range: waits for the lease, and asks again when an
    /// invalidation has met it. The contents are as they were at some moment since the call;
    /// whether they may be installed, `read_retry` says. Cancel safe.
    ///
    /// # Errors
    /// [`Lost`].
    pub async fn fetch(&self, range: AddressRange) -> Result<Vec<u8>, Lost> {
        loop {
            self.joined().await.ok_or(Lost::Left)?;
            let (sender, answer) = oneshot::channel();
            let asked = self.work(|state, now, _| {
                let nonce = state.mirror.fetch(range, now)?;
                state.fetches.insert(nonce, sender);
                Ok(nonce)
            });
            let nonce = match asked {
                Ok(nonce) => nonce,
                Err(FetchError::Full) => return Err(Lost::Full),
                // It has ended meanwhile.
                Err(FetchError::NoLease) => continue,
            };
            let _cancel = Cancel { leased: self, nonce };
            match answer.await {
                Ok(Answer::Contents(contents)) => return Ok(contents),
                Ok(Answer::Refused(why)) => return Err(Lost::Refused(why)),
                Ok(Answer::WrongLength(got)) => {
                    return Err(Lost::WrongLength { asked: range, got });
                }
                Ok(Answer::Again) | Err(_) => {}
            }
        }
    }

    /// Waits until there is a lease; `None` if there will be none: the mirror has left, or joins no
    /// more ([`Denied::Panicked`]). Cancel safe.
    pub async fn joined(&self) -> Option<Epoch> {
        loop {
            let (sender, changed) = oneshot::channel();
            let standing = self.inner.state.with(|state, _| {
                if state.is_lost() {
                    return Some(None);
                }
                if let Some(epoch) = state.mirror.epoch() {
                    return Some(Some(epoch));
                }
                state.standing.retain(|waits| !waits.is_canceled());
                state.standing.push(sender);
                None
            });
            match standing {
                Some(standing) => return standing,
                None => drop(changed.await),
            }
        }
    }

    /// Leaves for good: lets go of everything, and returns when that is done and waits to be sent.
    /// Needs [`run`](Self::run), and while the mirror is joining, the owner's answer or a while.
    /// Where a driver panics it returns as well ([`Denied::Panicked`]): the owner waits for the end
    /// of the lease.
    pub async fn leave(&self) {
        self.work(|state, now, after| {
            state.mirror.leave(now);
            state.tell_standing(after);
        });
        loop {
            let (sender, changed) = oneshot::channel();
            let over = self.inner.state.with(|state, _| {
                let over = state.mirror.is_over() || state.denied == Some(Denied::Panicked);
                if !over {
                    state.standing.retain(|waits| !waits.is_canceled());
                    state.standing.push(sender);
                }
                over
            });
            if over {
                return;
            }
            let _ = changed.await;
        }
    }

    /// Whether there is a lease at this moment. `read_retry` asks this and whether anything was
    /// invalidated since: a use that began under an earlier lease is not good because there is one
    /// now.
    pub fn has_lease(&self) -> bool {
        self.inner.clock.now().as_nanos() < self.inner.until.load(Ordering::Acquire)
    }

    /// Where the mirror stands.
    pub fn standing(&self) -> Standing {
        self.inner.state.with(|state, _| state.mirror.standing())
    }

    /// What happened so far.
    pub fn counts(&self) -> MirrorCounts {
        self.inner.state.with(|state, _| state.mirror.counts())
    }

    /// Why the mirror cannot join, if that is what its last try has come to. It goes on trying,
    /// unless a driver has panicked.
    pub fn denied(&self) -> Option<Denied> {
        self.inner.state.with(|state, _| state.denied)
    }

    /// Messages that were dropped because nobody sent them.
    pub fn dropped(&self) -> u64 {
        self.inner.state.with(|state, _| state.dropped)
    }

    /// Panics of drivers here, each of which has cost a lease.
    pub fn panics(&self) -> u64 {
        self.inner.state.with(|state, _| state.panics)
    }

    /// Panics of wakers, which have stopped nobody.
    pub fn lost_panics(&self) -> u64 {
        self.inner.state.lost_panics()
    }

    /// Says that the owner can be reached anew: what waits to be sent is dropped, because it is
    /// old, and what matters is asked again at once. Ends nothing.
    pub fn connected(&self) {
        self.work(|state, now, _| {
            // What was left is not asked for again.
            state.outgoing.retain(|message| matches!(message, ToOwner::Left { .. }));
            state.mirror.connected(now);
        });
    }

    pub(super) fn clock(&self) -> Arc<dyn Clock> {
        self.inner.clock.clone()
    }

    fn deadline(&self) -> Option<Time> {
        self.inner.state.with(|state, _| {
            state.deadline = state.mirror.deadline();
            state.deadline
        })
    }

    /// All that changes the mirror goes through here.
    fn work<R>(&self, work: impl FnOnce(&mut State, Time, &mut After) -> R) -> R {
        let inner = &self.inner;
        let now = inner.clock.now();
        inner.state.with(|state, after| {
            let result = work(state, now, after);
            state.settle(inner, after);
            result
        })
    }
}

impl State {
    /// Whether there will be no lease any more.
    fn is_lost(&self) -> bool {
        self.mirror.is_leaving() || self.denied == Some(Denied::Panicked)
    }

    /// Before a run: what an earlier one had begun is forgotten, so that it is asked again. Returns
    /// whether the mirror has to stop.
    fn begin_anew(&mut self) -> bool {
        self.decisions.clear();
        self.mirror.forget_under_way();
        matches!(self.mirror.standing(), Standing::Stopping(_))
    }

    fn settle(&mut self, inner: &Inner, after: &mut After) {
        while let Some(decision) = self.mirror.next_decision() {
            self.decide(decision, None, after);
        }
        while let Some(message) = self.mirror.next_message() {
            if self.outgoing.len() == OUTGOING {
                self.outgoing.pop_front();
                self.dropped += 1;
            }
            self.outgoing.push_back(message);
        }
        let until = self.mirror.valid_until().map_or(0, Time::as_nanos);
        let before = inner.until.swap(until, Ordering::AcqRel);
        if before < until {
            let (space, clock) = (inner.space.clone(), inner.clock.clone());
            after.run(move || {
                // A reader that has found the lease ended has read no later time than this, and
                // waits: the end of a pause wakes it. Of a renewal in time nobody has to hear.
                if clock.now().as_nanos() >= before {
                    drop(space.pause());
                }
            });
        }
        if !self.outgoing.is_empty() || self.mirror.is_over() {
            after.wake(&inner.out);
        }
        if !self.decisions.is_empty()
            || self.mirror.is_over()
            || self.mirror.deadline() != self.deadline
        {
            after.wake(&inner.work);
        }
        if self.mirror.is_over() {
            self.tell_standing(after);
        }
    }

    fn decide(&mut self, decision: MirrorDecision, contents: Option<Vec<u8>>, after: &mut After) {
        match decision {
            MirrorDecision::Install { nonce, range, .. } => {
                let answer = match contents {
                    None => Answer::Again,
                    Some(contents) if range.len() == Some(contents.len() as u64) => {
                        Answer::Contents(contents)
                    }
                    Some(contents) => Answer::WrongLength(contents.len()),
                };
                self.answer(nonce, answer, after);
            }
            MirrorDecision::Collided { nonce } => self.answer(nonce, Answer::Again, after),
            MirrorDecision::FetchRefused { nonce, why } => {
                self.answer(nonce, Answer::Refused(why), after)
            }
            MirrorDecision::Denied(why) => self.denied = Some(why),
            MirrorDecision::Joined { .. } => {
                self.denied = None;
                self.tell_standing(after);
            }
            MirrorDecision::Stop { .. } => {
                for sender in core::mem::take(&mut self.fetches).into_values() {
                    after.run(move || drop(sender.send(Answer::Again)));
                }
                self.decisions.push_back(decision);
            }
            MirrorDecision::Invalidate { .. } => self.decisions.push_back(decision),
        }
    }

    fn answer(&mut self, nonce: Nonce, answer: Answer, after: &mut After) {
        if let Some(sender) = self.fetches.remove(&nonce) {
            after.run(move || drop(sender.send(answer)));
        }
    }

    fn tell_standing(&mut self, after: &mut After) {
        for sender in core::mem::take(&mut self.standing) {
            after.run(move || _ = sender.send(()));
        }
    }
}

/// Gives a fetch up when nobody waits for it any more.
struct Cancel<'a> {
    leased: &'a Leased,
    nonce: Nonce,
}

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        let sender = self.leased.inner.state.with(|state, _| {
            state.mirror.cancel(self.nonce);
            state.fetches.remove(&self.nonce)
        });
        drop(sender);
    }
}

impl fmt::Debug for Leased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leased").field("standing", &self.standing()).finish_non_exhaustive()
    }
}
