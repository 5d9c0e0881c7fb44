//! The owner's side: who may hold on, and when an invalidation is done.

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

/// What stands behind a new owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// Nobody can hold anything: the memory is as new as the owner.
    New,
    /// Mirrors of an earlier owner may still hold on: the memory has survived a restart, or is
    /// taken over from another host. Invalidations wait for the end of those leases, whose terms
    /// were no longer than this owner's.
    Survived,
    /// The same, where earlier owners have granted terms up to this one: before a term is
    /// shortened.
    SurvivedTerm(Duration),
}

/// What the owner's host has to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Nobody holds anything of the ranges any more, nor gets it before [`Owner::end`]: change the
    /// memory, then call that.
    Done {
        /// As [`Owner::invalidate`] returned it.
        invalidation: InvalidationId,
        /// How each that was waited for has ended, in that order.
        endings: Vec<(Epoch, Ending)>,
    },
    /// Cut it off from the memory, then call [`Owner::fenced`]. Only where [`Terms::fences`].
    Fence(Fenced),
    /// Read the range and send the contents with a `Fetched` of these.
    Serve {
        /// To whom.
        to: Host,
        /// Its epoch.
        epoch: Epoch,
        /// Of the fetch.
        nonce: Nonce,
        /// What to read.
        range: AddressRange,
        /// How many invalidations have ended.
        version: u64,
    },
}

/// What is to be cut off from the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fenced {
    /// All that reaches it by this epoch: keys, queue pairs, mappings.
    Epoch(Host, Epoch),
    /// All that reaches it by any epoch of a boot before this one.
    Before(Boot),
}

impl Fenced {
    /// What [`Owner::fenced`] calls it.
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
    /// It has let go of the ranges.
    Acknowledged,
    /// It has left.
    Left,
    /// It has joined anew, after its devices had stopped.
    JoinedAnew,
    /// Its lease has ended, and it was fenced where that is needed.
    Expired,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct OwnerCounts {
    /// Epochs granted.
    pub joins: u64,
    /// Questions that were refused: [`Refusal`](crate::Refusal).
    pub refused: u64,
    /// Times that a lease was granted anew.
    pub renewals: u64,
    /// Members whose leases are not renewed any more.
    pub expelled: u64,
    /// Epochs that ended by time.
    pub expired: u64,
    /// Epochs that their mirrors left, or left by joining anew.
    pub left: u64,
    /// `Inv` sent, again included.
    pub sent: u64,
    /// Of those, again.
    pub resent: u64,
    /// Acknowledgements that counted.
    pub acknowledged: u64,
    /// Acknowledgements of what was not asked, or not of the one who sent it, or twice.
    pub unasked: u64,
    /// Other messages by an epoch that its sender does not have, and joins that came late.
    pub strangers: u64,
    /// Invalidations that were done; an `engine::Hub` begins none while nobody is in the books.
    pub done: u64,
}

/// Names that `Owner::end` does not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EndError {
    /// Somebody may still hold on: wait for [`Decision::Done`].
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

/// What has a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Timer {
    /// The lease of a member ends; looked up again, because renewals move it.
    Expiry(u64),
    /// An `Inv` to a member is sent again.
    Resend(u64),
    /// Who has not acknowledged this is renewed no more.
    Patience(InvalidationId),
}

/// The owner of memory that other hosts mirror: a state machine.
///
/// Call [`handle`](Self::handle) with each message, [`tick`](Self::tick) when
/// [`deadline`](Self::deadline) has come, then send what [`next_message`](Self::next_message) has
/// and do what [`next_decision`](Self::next_decision) says. Messages that wait are to be handled
/// before a tick: after a pause of the owner they are what saves a mirror from being taken for
/// dead.
///
/// **The time of a message is read after it has arrived.** A time that an event loop has read
/// before makes a lease end too early here, while its mirror still holds on.
///
/// **An owner that can be deposed looks, after each message has arrived, whether it is the owner
/// still**, and handles none otherwise: it would go on renewing leases that the next owner, once it
/// has waited for those from before, knows nothing of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    boot: Boot,
    terms: Terms,
    rules: Rules,
    /// Does not go back, whatever the clock does.
    now: Time,
    /// By number of the epoch; 0 are those of earlier boots.
    members: BTreeMap<u64, Member>,
    next_epoch: u64,
    invalidations: BTreeMap<InvalidationId, Invalidation>,
    next_invalidation: u64,
    ended: u64,
    /// By epoch and nonce, so that one that is sent again waits once.
    parked: BTreeMap<(u64, Nonce), Parked>,
    timers: BTreeSet<(Time, Timer)>,
    /// The newest joins of each host's latest lives, so that a late copy of one is known as such.
    joins: BTreeMap<Host, VecDeque<(Incarnation, Nonce)>>,
    messages: VecDeque<(Host, ToMirror)>,
    decisions: VecDeque<Decision>,
    counts: OwnerCounts,
    /// Welcomed and not in the books: with [`Rule::BookedBeforeWelcome`] left out.
    #[cfg(feature = "test-util")]
    unbooked: BTreeMap<u64, Who>,
}

impl Owner {
    /// An owner that begins now.
    ///
    /// `boot` has to be larger than that of every earlier owner of the memory; messages of earlier
    /// boots are counted as strangers.
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

    /// Leaves a rule out, to see that a simulation notices. To be called before anything else.
    #[cfg(feature = "test-util")]
    pub fn leave_out(&mut self, rule: Rule) {
        self.rules = Rules::without(rule);
        if rule == Rule::Quarantine && self.members.remove(&0).is_some() {
            self.timers.clear();
        }
    }

    /// Forgets its counts, so that an exploration takes states that act alike for one.
    #[cfg(feature = "test-util")]
    pub fn forget_counts(&mut self) {
        self.counts = OwnerCounts::default();
    }

    /// Its boot.
    pub fn boot(&self) -> Boot {
        self.boot
    }

    /// Its terms.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Takes a message from a host, as the transport has authenticated it, at a time that was read
    /// after the message had arrived. What the host may not say is counted and changes nothing.
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

    /// Does what is due by now.
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

    /// When to call [`tick`](Self::tick) at the latest. It may find nothing to do then.
    pub fn deadline(&self) -> Option<Time> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// What to send next, and to whom.
    pub fn next_message(&mut self) -> Option<(Host, ToMirror)> {
        self.messages.pop_front()
    }

    /// What to do next.
    pub fn next_decision(&mut self) -> Option<Decision> {
        self.decisions.pop_front()
    }

    /// What happened so far.
    pub fn counts(&self) -> OwnerCounts {
        self.counts
    }

    /// Who is in the books: its epoch, and for how long it may hold on from now, as far as the
    /// owner knows; zero if it has to be fenced yet. Without those of earlier boots.
    pub fn members(&self) -> impl Iterator<Item = (Host, Epoch, Duration)> + '_ {
        let booked =
            self.members.iter().filter_map(|(number, member)| Some((number, member, member.who?)));
        booked.map(|(number, member, who)| {
            (who.host, self.epoch(*number), member.expires.since(self.now))
        })
    }

    /// Whether nobody is in the books: an invalidation would be done at once.
    pub fn is_deserted(&self) -> bool {
        self.members.is_empty()
    }

    /// Who has an epoch that is renewed.
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

    /// How long a lease of that term is waited for.
    fn waits_for(&self, term: Duration) -> Duration {
        if self.rules.keep(Rule::DriftMargin) { self.terms.waits_for(term) } else { term }
    }

    /// The member that has this epoch, if it is this host's.
    fn member_of(&mut self, from: Host, epoch: Epoch) -> Option<&mut Member> {
        let member = self.members.get_mut(&epoch.number).filter(|_| epoch.boot == self.boot)?;
        member.who.is_some_and(|who| who.host == from).then_some(member)
    }
}

/// Whose a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Who {
    host: Host,
    incarnation: Incarnation,
    /// Of its join.
    nonce: Nonce,
}
