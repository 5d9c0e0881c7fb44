//! A mirror's side: how long it may hold on, and what it lets go of when.

mod fetches;
mod lease;

use crate::message::{
    Asker, Boot, Epoch, Incarnation, InvalidationId, Nonce, Refusal, ToMirror, ToOwner,
};
use crate::rules::{Rule, Rules};
use crate::terms::MirrorSettings;
use crate::time::Time;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use core::fmt;
use core::time::Duration;
use fetches::Fetch;
use shootdown::{AddressRange, RangeSet};

pub use fetches::FetchError;
use lease::State;

/// Epochs of its own that a mirror remembers after it has left them, and acknowledgements that it
/// can repeat. One that is forgotten costs a wait for the lease, or one more flush.
const REMEMBERED: usize = 64;

/// What a mirror's host has to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MirrorDecision {
    /// The mirror may fetch and use the memory from now on, as long as
    /// [`is_valid`](Mirror::is_valid) says so after each use.
    Joined {
        /// Its epoch.
        epoch: Epoch,
    },
    /// Zap what is mapped of the ranges, flush it, then call [`Mirror::invalidated`].
    Invalidate {
        /// For that call: the numbers of another owner's invalidations may be the same.
        epoch: Epoch,
        /// For that call.
        invalidation: InvalidationId,
        /// What will change.
        ranges: RangeSet,
    },
    /// Stop all devices and drop all copies, then call [`Mirror::stopped`]: the lease is about to
    /// end. All fetches and invalidations of this epoch are over, without a decision of their own.
    Stop {
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// Install what came with this reply, in the same critical section as the check that
    /// [`is_valid`](Mirror::is_valid).
    Install {
        /// As [`Mirror::fetch`] returned it.
        nonce: Nonce,
        /// What was asked for.
        range: AddressRange,
        /// How many invalidations the owner had ended by then.
        version: u64,
    },
    /// An invalidation has met the fetch: drop what came, and fetch again if it is still wanted.
    Collided {
        /// As [`Mirror::fetch`] returned it.
        nonce: Nonce,
    },
    /// The owner does not serve the fetch.
    FetchRefused {
        /// As [`Mirror::fetch`] returned it.
        nonce: Nonce,
        /// Why.
        why: Refusal,
    },
    /// The mirror cannot join. It asks again after a while.
    Denied(
        /// Why.
        Denied,
    ),
}

/// Why a mirror cannot join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Denied {
    /// The owner does not take it.
    Refused(Refusal),
    /// The owner's term is no longer than the devices here take to stop.
    TermTooShort {
        /// What the owner grants.
        term: Duration,
        /// [`MirrorSettings::time_to_stop`].
        time_to_stop: Duration,
    },
    /// The welcome took longer than the lease that it grants.
    TooLate {
        /// What the owner grants.
        term: Duration,
        /// How long it took.
        took: Duration,
    },
    /// The owner is older than one that has welcomed this mirror before: it is none any more, or
    /// boots are not counted upwards.
    OlderOwner {
        /// Of this one.
        boot: Boot,
        /// The largest so far.
        newest: Boot,
    },
    /// A driver panicked when everything was to be let go of, so nobody knows whether its device
    /// has stopped. This mirror joins no more; another incarnation may.
    Panicked,
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(why) => write!(f, "{why}"),
            Self::TermTooShort { term, time_to_stop } => {
                write!(
                    f,
                    "the owner grants {term:?}, and the devices take {time_to_stop:?} to stop: it has to grant more"
                )
            }
            Self::TooLate { term, took } => {
                write!(
                    f,
                    "the owner's answer took {took:?}, longer than the term of {term:?} leaves: it has to grant more"
                )
            }
            Self::OlderOwner { boot, newest } => {
                write!(
                    f,
                    "the owner has boot {}, and {} has been there: a later owner needs a larger boot",
                    boot.0, newest.0
                )
            }
            Self::Panicked => f.write_str(
                "a driver panicked when it was to let go: make a mirror with another incarnation",
            ),
        }
    }
}

impl core::error::Error for Denied {}

/// Where a mirror stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Standing {
    /// It holds nothing.
    Out,
    /// It has asked to join, and holds nothing.
    Joining,
    /// It may hold on until that moment.
    Live(Epoch, Time),
    /// Its devices are being stopped.
    Stopping(Epoch),
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MirrorCounts {
    /// Epochs entered.
    pub joined: u64,
    /// Leases that have ended.
    pub lost: u64,
    /// Times that more time was granted.
    pub renewed: u64,
    /// Invalidations begun.
    pub invalidated: u64,
    /// Fetches that an invalidation has met.
    pub collided: u64,
    /// Messages of epochs that the mirror is not in, and replies to what it has not asked, or
    /// again.
    pub strangers: u64,
    /// Times that [`Mirror::stopped`] was called after the lease had ended: the devices took longer
    /// than [`MirrorSettings::time_to_stop`], or the process stood still. What they did in between
    /// is safe only if the owner fences.
    pub stopped_late: u64,
}

/// A mirror of an owner's memory: a state machine.
///
/// Call [`handle`](Self::handle) with each message, [`tick`](Self::tick) when
/// [`deadline`](Self::deadline) has come, then send what [`next_message`](Self::next_message) has
/// and do what [`next_decision`](Self::next_decision) says, in that order. It asks to join by
/// itself, and again when it has lost its lease.
///
/// Whoever uses a copy asks *after* the use whether it was zapped meanwhile and whether the lease
/// [`is_valid`](Self::is_valid) (D4): a process that was stopped in between goes on where it was,
/// and nobody could tell it before.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mirror {
    incarnation: Incarnation,
    settings: MirrorSettings,
    rules: Rules,
    now: Time,
    nonce: u64,
    state: State,
    leaving: bool,
    /// The largest boot that has welcomed it: an older owner is none any more.
    boot: Option<Boot>,
    /// Own epochs that are over.
    past: VecDeque<Epoch>,
    /// How long a join is waited for.
    age: Duration,
    /// Leases in a row that ended before they had been renewed.
    early: u32,
    fetches: BTreeMap<Nonce, Fetch>,
    working: BTreeSet<InvalidationId>,
    acknowledged: VecDeque<InvalidationId>,
    messages: VecDeque<ToOwner>,
    decisions: VecDeque<MirrorDecision>,
    counts: MirrorCounts,
}

impl Mirror {
    /// A mirror that will ask to join at its first tick.
    pub fn new(incarnation: Incarnation, settings: MirrorSettings, now: Time) -> Self {
        let settings = settings.usable();
        Self {
            incarnation,
            age: settings.retry * 8,
            settings,
            rules: Rules::default(),
            now,
            nonce: 0,
            state: State::Out { until: now },
            early: 0,
            leaving: false,
            boot: None,
            past: VecDeque::new(),
            fetches: BTreeMap::new(),
            working: BTreeSet::new(),
            acknowledged: VecDeque::new(),
            messages: VecDeque::new(),
            decisions: VecDeque::new(),
            counts: MirrorCounts::default(),
        }
    }

    /// Leaves a rule out, to see that a simulation notices.
    #[cfg(feature = "test-util")]
    pub fn leave_out(&mut self, rule: Rule) {
        self.rules = Rules::without(rule);
    }

    /// Forgets its counts, so that an exploration takes states that act alike for one.
    #[cfg(feature = "test-util")]
    pub fn forget_counts(&mut self) {
        self.counts = MirrorCounts::default();
    }

    /// Takes a message of the owner.
    pub fn handle(&mut self, message: ToMirror, now: Time) {
        self.tick(now);
        match message {
            ToMirror::Welcome { epoch, incarnation, nonce, term }
                if incarnation == self.incarnation =>
            {
                self.welcome(epoch, nonce, term);
            }
            ToMirror::Renewed { epoch, nonce } => self.renewed(epoch, nonce),
            ToMirror::Inv { epoch, invalidation, ranges } => {
                self.invalidate(epoch, invalidation, ranges)
            }
            ToMirror::Fetched { epoch, nonce, version } => self.fetched(epoch, nonce, version),
            ToMirror::Gone { epoch } => self.gone(epoch),
            ToMirror::Refused { nonce, asker: Asker::Fetch(epoch), why } if self.is_in(epoch) => {
                self.fetch_refused(nonce, why)
            }
            ToMirror::Refused { nonce, asker: Asker::Join(of), why } if of == self.incarnation => {
                self.join_refused(nonce, why)
            }
            ToMirror::Welcome { .. } | ToMirror::Refused { .. } => self.counts.strangers += 1,
        }
    }

    fn invalidate(&mut self, epoch: Epoch, invalidation: InvalidationId, ranges: RangeSet) {
        if !self.is_in(epoch) {
            return self.answer_for_the_past(epoch);
        }
        if self.working.contains(&invalidation) {
            return;
        }
        if self.acknowledged.contains(&invalidation) {
            return self.messages.push_back(ToOwner::Ack { epoch, invalidation });
        }
        if self.working.len() >= self.settings.invalidations {
            // It is sent again.
            self.counts.strangers += 1;
            return;
        }
        self.collide(&ranges);
        self.working.insert(invalidation);
        self.counts.invalidated += 1;
        if !self.rules.keep(Rule::AcknowledgedAfterFlush) {
            self.messages.push_back(ToOwner::Ack { epoch, invalidation });
        }
        self.decisions.push_back(MirrorDecision::Invalidate { epoch, invalidation, ranges });
    }

    /// Says that a [`MirrorDecision::Invalidate`] was carried out. Returns whether it is one of the
    /// present epoch; otherwise nothing is due any more. Another owner counts anew, so a flush that
    /// has outlasted its epoch must not acknowledge what has the same number in the next one.
    pub fn invalidated(&mut self, epoch: Epoch, invalidation: InvalidationId, now: Time) -> bool {
        self.tick(now);
        if !self.is_in(epoch) || !self.working.remove(&invalidation) {
            return false;
        }
        if self.acknowledged.len() == REMEMBERED.max(self.settings.invalidations) {
            self.acknowledged.pop_front();
        }
        self.acknowledged.push_back(invalidation);
        self.messages.push_back(ToOwner::Ack { epoch, invalidation });
        true
    }

    /// Forgets which invalidations are under way: those who carried them out are gone, so they are
    /// to be sent again.
    pub fn forget_under_way(&mut self) {
        self.working.clear();
    }

    /// What to send next.
    pub fn next_message(&mut self) -> Option<ToOwner> {
        self.messages.pop_front()
    }

    /// What to do next.
    pub fn next_decision(&mut self) -> Option<MirrorDecision> {
        self.decisions.pop_front()
    }

    /// What happened so far.
    pub fn counts(&self) -> MirrorCounts {
        self.counts
    }
}
