//! The mirror's side in an `AddressSpace`.

mod state;

use super::Clock;
use super::wake::{After, Guarded, Waiter, sleep_or};
use crate::message::{Epoch, InvalidationId, Nonce, Refusal, ToMirror, ToOwner};
use crate::mirror::{Denied, FetchError, Mirror, MirrorCounts, MirrorDecision, Standing};
use crate::time::Time;
use alloc::boxed::Box;
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
use state::{Answer, State};
use std::panic::AssertUnwindSafe;

/// Memory of another host, held by a lease. It is an `AddressSpace` of the owner's addresses, in
/// which this host's devices and copies are notifiers and readers. This is a handle; clones share
/// one mirror.
///
/// An invalidation of the owner becomes one here, and is acknowledged when all passes are done.
/// When the lease is about to end, everything is invalidated, and readers wait until the mirror has
/// joined anew.
///
/// `read_retry` also checks the lease (rule R4 of `shootdown`), so a reader has the ordinary loop:
/// `read_begin`, [`fetch`](Self::fetch), and an install under the driver's lock unless
/// `read_retry`. After each use of the installed contents, call `read_retry` again (D4).
#[derive(Clone)]
pub struct Leased {
    inner: Arc<Inner>,
}

struct Inner {
    space: AddressSpace,
    state: Guarded<State>,
    clock: Arc<dyn Clock>,
    /// End of the lease in nanoseconds; 0 without a lease. Written under the lock of `state`;
    /// readers load it without.
    until: Arc<AtomicU64>,
    /// Wakes `run`.
    work: Arc<Waiter>,
    /// Wakes the transport.
    out: Arc<Waiter>,
}

/// Reason why a fetch returned no contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lost {
    /// The mirror has left, is leaving, or joins no more ([`Denied::Panicked`]).
    Left,
    /// The owner refused the fetch.
    Refused(Refusal),
    /// The maximum number of fetches of the mirror's settings is under way.
    Full,
    /// The contents do not have the length of the range.
    WrongLength {
        /// The range of the fetch.
        asked: AddressRange,
        /// Number of bytes received.
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
    /// Makes a space for a mirror. The mirror joins once [`run`](Self::run) runs and a transport
    /// carries messages.
    pub fn new(mirror: Mirror, clock: impl Clock) -> Self {
        let (clock, until): (Arc<dyn Clock>, _) = (Arc::new(clock), Arc::new(AtomicU64::new(0)));
        let asks = (clock.clone(), until.clone());
        let valid = move || asks.0.now().as_nanos() < asks.1.load(Ordering::Acquire);
        let space = AddressSpace::builder().valid_while(valid).build();
        let (work, out) = Default::default();
        Self {
            inner: Arc::new(Inner {
                space,
                state: Guarded::new(State::new(mirror)),
                clock,
                until,
                work,
                out,
            }),
        }
    }

    /// Returns the space of the owner's addresses, for devices and readers of this host.
    pub fn space(&self) -> &AddressSpace {
        &self.inner.space
    }

    /// Takes a message of the owner. `Fetched` comes with the contents, which have the length of
    /// the fetched range. Without contents the fetch is repeated.
    pub fn handle(&self, message: ToMirror, contents: Option<Vec<u8>>) {
        let mut contents = contents;
        self.work(|state, now, after| {
            state.mirror.handle(message, now);
            // The contents belong to the decision that this message has caused, if any.
            while let Some(decision) = state.mirror.next_decision() {
                let contents = matches!(decision, MirrorDecision::Install { .. })
                    .then(|| contents.take())
                    .flatten();
                state.decide(decision, contents, after);
            }
        });
    }

    /// Waits for the next message to send. Returns `None` once the mirror has left for good and has
    /// said so.
    ///
    /// One task at a time may wait here. Do not call it without a connection: the queue drops
    /// messages in time, and the protocol sends them again.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. A message that it has not returned stays queued.
    pub async fn next_message(&self) -> Option<ToOwner> {
        let over = |state: &State| state.mirror.is_over().then_some(None);
        let next = |state: &mut State| state.outgoing.pop_front().map(Some).or_else(|| over(state));
        self.inner.state.until(&self.inner.out, |state, _| next(state)).await
    }

    /// Keeps the lease and carries out the owner's requests, on any executor, until the mirror has
    /// [left](Self::leave). `sleep` returns a timer of the runtime. Readers make no progress while
    /// this does not run. One task at a time may run it.
    ///
    /// A panic of a driver costs the lease: everything is invalidated, and the mirror joins anew.
    /// If that invalidation panics as well, the mirror joins no more ([`Denied::Panicked`]).
    ///
    /// # Cancel safety
    /// If the future is dropped, the lease ends by time, and the devices are not stopped. A later
    /// run begins everything under way anew.
    pub async fn run<S: Future>(&self, sleep: impl Fn(Duration) -> S) {
        let mut under_way = FuturesUnordered::new();
        // Everything that an earlier run had begun is begun anew.
        if self.work(|state, _, _| state.begin_anew()) {
            under_way.push(Box::pin(self.stop()) as futures::future::BoxFuture<'_, ()>);
        }
        loop {
            // Decisions first: they take effect before the next message goes out.
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
                    // Invalidations under way make progress whatever else happens.
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
            // The device of that driver may still use the memory. Everything stops, and the mirror
            // joins anew.
            Err(_) => {
                state.panics += 1;
                state.mirror.give_up(epoch, now);
            }
        });
    }

    /// Invalidates everything. Readers cannot begin, because the lease is not valid.
    async fn stop(&self) {
        let stopped = AssertUnwindSafe(async {
            drop(self.inner.space.invalidate(AddressRange::ALL, Event::Clear).await)
        });
        let done = stopped.catch_unwind().await;
        self.work(|state, now, after| match done {
            Ok(()) => {
                // Also clears a panic of an earlier run: everything has been released now.
                state.denied = None;
                state.mirror.stopped(now);
            }
            // The mirror does not say that it has stopped, so the lease ends by time.
            Err(_) => {
                state.panics += 1;
                state.denied = Some(Denied::Panicked);
                state.tell_standing(after);
            }
        });
    }

    /// Fetches the contents of a range from the owner. Waits for a lease, and repeats the fetch if
    /// it collides with an invalidation.
    ///
    /// The contents are those of some moment since the call. `read_retry` tells whether they may be
    /// installed.
    ///
    /// # Errors
    /// [`Lost`].
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. The fetch is then cancelled.
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
                // The lease has ended meanwhile.
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

    /// Waits until there is a lease. Returns `None` if there will be none: the mirror has left, or
    /// joins no more ([`Denied::Panicked`]).
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment.
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

    /// Leaves for good. Returns when everything is released and the message about it waits to be
    /// sent.
    ///
    /// Needs a [`run`](Self::run) in progress. If the mirror is joining, it waits for the owner's
    /// answer, or for a while. It also returns if a driver panics ([`Denied::Panicked`]): the owner
    /// then waits for the end of the lease.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. The mirror leaves all the same.
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

    /// Returns `true` if there is a lease at this moment. It does not validate a use: the use may
    /// have begun under an earlier lease. `read_retry` checks the lease and the invalidations
    /// since.
    pub fn has_lease(&self) -> bool {
        self.inner.clock.now().as_nanos() < self.inner.until.load(Ordering::Acquire)
    }

    /// Returns the state of the mirror.
    pub fn standing(&self) -> Standing {
        self.inner.state.with(|state, _| state.mirror.standing())
    }

    /// Returns the counters of the mirror.
    pub fn counts(&self) -> MirrorCounts {
        self.inner.state.with(|state, _| state.mirror.counts())
    }

    /// Returns the reason why the last attempt to join failed. The mirror keeps trying, unless a
    /// driver has panicked.
    pub fn denied(&self) -> Option<Denied> {
        self.inner.state.with(|state, _| state.denied)
    }

    /// Returns the number of messages dropped because the transport did not take them.
    pub fn dropped(&self) -> u64 {
        self.inner.state.with(|state, _| state.dropped)
    }

    /// Returns the number of panics of drivers. Each has cost a lease.
    pub fn panics(&self) -> u64 {
        self.inner.state.with(|state, _| state.panics)
    }

    /// Returns the number of panics of wakers. They affect no other task.
    pub fn lost_panics(&self) -> u64 {
        self.inner.state.lost_panics()
    }

    /// Tells the mirror that the owner can be reached anew. Drops queued messages, because they are
    /// old, and asks again at once for what matters. Ends nothing.
    pub fn connected(&self) {
        self.work(|state, now, _| {
            // A `Left` is not requested again, so it stays.
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

    /// Runs `work` under the lock, then [`State::settle`]. Every change of the mirror goes through
    /// here.
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

/// Cancels a fetch when its future is dropped.
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
