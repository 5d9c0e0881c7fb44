//! The owner's state machine: which mirrors may hold on, and when an invalidation is done.

mod books;
mod fetches;
mod invalidations;

use crate::message::{Boot, Epoch, Host, Incarnation, InvalidationId, Nonce, ToMirror, ToOwner};
use crate::rules::{Rule, Rules};
use crate::terms::{Terms, TermsError};
use crate::time::Time;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;
use books::{Member, Phase};
use core::fmt;
use core::time::Duration;
use fetches::Parked;
use invalidations::Invalidation;
use shootdown::AddressRange;

/// State of the memory behind a new owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// The memory is as new as the owner, so no mirror can hold anything.
    New,
    /// The memory has survived a restart, or was taken over from another host. Mirrors of an
    /// earlier owner may hold on. Invalidations wait until those leases have ended; their terms
    /// were no longer than this owner's.
    Survived,
    /// The memory has survived, and earlier owners have granted terms up to this one. Use it when a
    /// term is shortened.
    SurvivedTerm(Duration),
}

/// Work for the owner's host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// No mirror holds anything of the ranges, and none gets it before [`Owner::end`]. Change the
    /// memory, then call that.
    Done {
        /// Returned by [`Owner::invalidate`].
        invalidation: InvalidationId,
        /// How the invalidation ended for each member that it waited for, in that order.
        endings: Vec<(Epoch, Ending)>,
    },
    /// Cut this off from the memory, then call [`Owner::fenced`]. Only with [`Terms::fences`].
    Fence(Fenced),
    /// Read the range and send the contents with a `Fetched` with these values.
    Serve {
        /// The host.
        to: Host,
        /// The epoch of the host.
        epoch: Epoch,
        /// Number of the fetch.
        nonce: Nonce,
        /// The range to read.
        range: AddressRange,
        /// Number of invalidations that have ended.
        version: u64,
    },
}

/// A holder that must be cut off from the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fenced {
    /// Everything that reaches the memory by this epoch: keys, queue pairs, mappings.
    Epoch(Host, Epoch),
    /// Everything that reaches the memory by an epoch of an earlier boot than this one.
    Before(Boot),
}

impl Fenced {
    /// Returns the epoch by which [`Owner::fenced`] identifies it.
    pub fn epoch(self) -> Epoch {
        match self {
            Self::Epoch(_, epoch) => epoch,
            Self::Before(boot) => Epoch { boot, number: 0 },
        }
    }
}

/// How an invalidation ended for one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// The member has released the ranges.
    Acknowledged,
    /// The member has left.
    Left,
    /// The member has joined anew, after its devices had stopped.
    JoinedAnew,
    /// The lease has ended, and the member was fenced if that is needed.
    Expired,
}

/// Counters of an owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct OwnerCounts {
    /// Epochs granted.
    pub joins: u64,
    /// Questions refused: [`Refusal`](crate::Refusal).
    pub refused: u64,
    /// Leases renewed.
    pub renewals: u64,
    /// Members whose leases are no longer renewed.
    pub expelled: u64,
    /// Epochs that ended by time.
    pub expired: u64,
    /// Epochs that their mirrors left, also by joining anew.
    pub left: u64,
    /// `Inv` sent, including repetitions.
    pub sent: u64,
    /// `Inv` sent again.
    pub resent: u64,
    /// Acknowledgements that counted.
    pub acknowledged: u64,
    /// Acknowledgements that did not count: not requested, of another member, or repeated.
    pub unasked: u64,
    /// Other messages with an epoch that the sender does not have, and late joins.
    pub strangers: u64,
    /// Invalidations done. An `engine::Hub` begins none while the books are empty.
    pub done: u64,
}

/// Error of [`Owner::end`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EndError {
    /// A mirror may still hold on: wait for [`Decision::Done`].
    NotDone(InvalidationId),
    /// There is no such invalidation, or it has ended.
    Unknown(InvalidationId),
}

impl fmt::Display for EndError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotDone(of) => {
                write!(
                    f,
                    "mirrors may still hold what invalidation {} is to change: wait for `Decision::Done`",
                    of.0
                )
            }
            Self::Unknown(of) => write!(f, "there is no invalidation {}, or it has ended", of.0),
        }
    }
}

impl core::error::Error for EndError {}

/// An event with a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Timer {
    /// The lease of a member ends. The time is checked again, because renewals move it.
    Expiry(u64),
    /// An `Inv` to a member is sent again.
    Resend(u64),
    /// Members that have not acknowledged this invalidation are expelled.
    Patience(InvalidationId),
}

/// The state machine of an owner of mirrored memory.
///
/// Call [`handle`](Self::handle) with each message, and [`tick`](Self::tick) at the
/// [`deadline`](Self::deadline). Then send every [`next_message`](Self::next_message) and carry out
/// every [`next_decision`](Self::next_decision). Handle waiting messages before a tick: after a
/// pause of the owner they keep a mirror from counting as dead.
///
/// **Read the time of a message after it has arrived.** An earlier time, such as that of an event
/// loop, ends a lease too early here, while the mirror still holds on.
///
/// **If another owner can be elected, check after each message has arrived that this one is still
/// the owner**, and drop the message otherwise. It would go on renewing leases unknown to the next
/// owner, which waits only for earlier ones.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    boot: Boot,
    terms: Terms,
    rules: Rules,
    /// Never goes back, even if the clock does.
    now: Time,
    /// Members by the number of their epoch. 0 stands for all epochs of earlier boots.
    members: BTreeMap<u64, Member>,
    next_epoch: u64,
    invalidations: BTreeMap<InvalidationId, Invalidation>,
    next_invalidation: u64,
    ended: u64,
    /// Waiting fetches by epoch and nonce, so that a repeated fetch waits once.
    parked: BTreeMap<(u64, Nonce), Parked>,
    timers: BTreeSet<(Time, Timer)>,
    /// Newest joins of each host's latest lives, to recognise late copies.
    joins: BTreeMap<Host, VecDeque<(Incarnation, Nonce)>>,
    messages: VecDeque<(Host, ToMirror)>,
    decisions: VecDeque<Decision>,
    counts: OwnerCounts,
    /// Members welcomed without being in the books. Only with [`Rule::BookedBeforeWelcome`] left
    /// out.
    #[cfg(feature = "test-util")]
    unbooked: BTreeMap<u64, Who>,
}

impl Owner {
    /// Makes an owner.
    ///
    /// `boot` must be larger than that of every earlier owner of the memory. Messages of earlier
    /// boots count as strangers.
    ///
    /// # Errors
    /// [`TermsError`], if the terms bound nothing.
    pub fn new(boot: Boot, terms: Terms, memory: Memory, now: Time) -> Result<Self, TermsError> {
        terms.check()?;
        let mut owner = Self {
            boot,
            terms,
            rules: Rules::default(),
            now,
            members: BTreeMap::new(),
            next_epoch: 1,
            invalidations: BTreeMap::new(),
            next_invalidation: 1,
            ended: 0,
            parked: BTreeMap::new(),
            timers: BTreeSet::new(),
            joins: BTreeMap::new(),
            messages: VecDeque::new(),
            decisions: VecDeque::new(),
            counts: OwnerCounts::default(),
            #[cfg(feature = "test-util")]
            unbooked: BTreeMap::new(),
        };
        match memory {
            Memory::New => {}
            Memory::Survived => owner.book_earlier_boots(Duration::ZERO),
            Memory::SurvivedTerm(longest) => owner.book_earlier_boots(longest),
        }
        Ok(owner)
    }

    /// Leaves a rule out, to check that a simulation notices. Call it first.
    #[cfg(feature = "test-util")]
    pub fn leave_out(&mut self, rule: Rule) {
        self.rules = Rules::without(rule);
        if rule == Rule::Quarantine && self.members.remove(&0).is_some() {
            self.timers.clear();
        }
    }

    /// Resets the counters, so that an exploration treats states with equal behaviour as one.
    #[cfg(feature = "test-util")]
    pub fn forget_counts(&mut self) {
        self.counts = OwnerCounts::default();
    }

    /// Returns the boot.
    pub fn boot(&self) -> Boot {
        self.boot
    }

    /// Returns the terms.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Takes a message from a host, as the transport has authenticated it. `now` was read after the
    /// message had arrived. A message that the host may not send is counted and changes nothing.
    pub fn handle(&mut self, from: Host, message: ToOwner, now: Time) {
        self.now = self.now.max(now);
        match message {
            ToOwner::Join { incarnation, nonce } => self.join(from, incarnation, nonce),
            ToOwner::Renew { epoch, nonce } => self.renew(from, epoch, nonce),
            ToOwner::Fetch { epoch, nonce, range } => self.fetch(from, epoch, nonce, range),
            ToOwner::Ack { epoch, invalidation } => self.acknowledge(from, epoch, invalidation),
            ToOwner::Left { epoch } => self.leave(from, epoch),
        }
    }

    /// Does the work that is due now.
    pub fn tick(&mut self, now: Time) {
        self.now = self.now.max(now);
        while let Some((at, timer)) = self.timers.first().copied()
            && at <= self.now
        {
            self.timers.pop_first();
            match timer {
                Timer::Expiry(number) => self.expire(number),
                Timer::Resend(number) => self.resend(number),
                Timer::Patience(invalidation) => self.lose_patience(invalidation),
            }
        }
    }

    /// Returns the latest time for the next [`tick`](Self::tick). It may find nothing to do then.
    pub fn deadline(&self) -> Option<Time> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Returns the next message to send, and its host.
    pub fn next_message(&mut self) -> Option<(Host, ToMirror)> {
        self.messages.pop_front()
    }

    /// Returns the next work to do.
    pub fn next_decision(&mut self) -> Option<Decision> {
        self.decisions.pop_front()
    }

    /// Returns the counters.
    pub fn counts(&self) -> OwnerCounts {
        self.counts
    }

    /// Returns the members in the books: host, epoch, and how long it may hold on from now, as far
    /// as the owner knows. The time is zero for a member that must be fenced. Members of earlier
    /// boots are not included.
    pub fn members(&self) -> impl Iterator<Item = (Host, Epoch, Duration)> + '_ {
        let booked =
            self.members.iter().filter_map(|(number, member)| Some((number, member, member.who?)));
        booked.map(|(number, member, who)| {
            (who.host, self.epoch(*number), member.expires.since(self.now))
        })
    }

    /// Returns `true` if the books are empty. An invalidation would then be done at once.
    pub fn is_deserted(&self) -> bool {
        self.members.is_empty()
    }

    /// Returns `true` if this epoch is in the books and is renewed.
    pub fn is_live(&self, epoch: Epoch) -> bool {
        epoch.boot == self.boot
            && self.members.get(&epoch.number).is_some_and(|member| member.phase == Phase::Live)
    }

    fn epoch(&self, number: u64) -> Epoch {
        Epoch { boot: self.boot, number }
    }

    fn send(&mut self, to: Host, message: ToMirror) {
        self.messages.push_back((to, message));
    }

    /// Returns how long the owner waits for a lease with this term.
    fn waits_for(&self, term: Duration) -> Duration {
        if self.rules.keep(Rule::DriftMargin) { self.terms.waits_for(term) } else { term }
    }

    /// Returns the member with this epoch, if it belongs to the host.
    fn member_of(&mut self, from: Host, epoch: Epoch) -> Option<&mut Member> {
        let member = self.members.get_mut(&epoch.number).filter(|_| epoch.boot == self.boot)?;
        member.who.is_some_and(|who| who.host == from).then_some(member)
    }
}

/// Identity of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Who {
    host: Host,
    incarnation: Incarnation,
    /// Number of its join.
    nonce: Nonce,
}
