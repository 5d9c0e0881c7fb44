//! The mirror's state machine: how long it may hold on, and what it must release.

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

/// Number of own past epochs that a mirror remembers, and of acknowledgements that it can repeat. A
/// forgotten one costs a wait for the lease, or one more flush.
const REMEMBERED: usize = 64;

/// Work for the mirror's host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MirrorDecision {
    /// The mirror may fetch and use the memory from now on. Check [`is_valid`](Mirror::is_valid)
    /// after each use.
    Joined {
        /// The new epoch.
        epoch: Epoch,
    },
    /// Zap the mappings of the ranges, flush, then call [`Mirror::invalidated`].
    Invalidate {
        /// Argument of that call. Another owner may use the same numbers for its invalidations.
        epoch: Epoch,
        /// Argument of that call.
        invalidation: InvalidationId,
        /// The ranges that will change.
        ranges: RangeSet,
    },
    /// Stop all devices and drop all copies, then call [`Mirror::stopped`]. The lease is about to
    /// end. All fetches and invalidations of this epoch are over, without a decision of their own.
    Stop {
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// Install the contents that came with this reply, in the same critical section as a check of
    /// [`is_valid`](Mirror::is_valid).
    Install {
        /// Returned by [`Mirror::fetch`].
        nonce: Nonce,
        /// The fetched range.
        range: AddressRange,
        /// Number of invalidations that the owner had ended by then.
        version: u64,
    },
    /// An invalidation has met the fetch. Drop the contents, and fetch again if they are still
    /// wanted.
    Collided {
        /// Returned by [`Mirror::fetch`].
        nonce: Nonce,
    },
    /// The owner refused the fetch.
    FetchRefused {
        /// Returned by [`Mirror::fetch`].
        nonce: Nonce,
        /// The reason.
        why: Refusal,
    },
    /// The mirror cannot join. It asks again after a while.
    Denied(
        /// The reason.
        Denied,
    ),
}

/// Reason why a mirror cannot join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Denied {
    /// The owner refused.
    Refused(Refusal),
    /// The owner's term is not longer than the time that the devices take to stop.
    TermTooShort {
        /// Term of the owner.
        term: Duration,
        /// [`MirrorSettings::time_to_stop`].
        time_to_stop: Duration,
    },
    /// The welcome took longer than the lease that it grants.
    TooLate {
        /// Term of the owner.
        term: Duration,
        /// Time from the question to the welcome.
        took: Duration,
    },
    /// The owner is older than one that has welcomed this mirror before. It is no longer the owner,
    /// or its boots do not rise.
    OlderOwner {
        /// Boot of this owner.
        boot: Boot,
        /// Largest boot so far.
        newest: Boot,
    },
    /// A driver panicked when everything had to be released, so its device may not have stopped.
    /// This mirror joins no more; another incarnation may.
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

/// State of a mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Standing {
    /// It holds nothing.
    Out,
    /// It has asked to join, and holds nothing.
    Joining,
    /// It may hold on by this epoch until this moment.
    Live(Epoch, Time),
    /// Its devices are being stopped.
    Stopping(Epoch),
}

/// Counters of a mirror.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MirrorCounts {
    /// Epochs entered.
    pub joined: u64,
    /// Leases that have ended.
    pub lost: u64,
    /// Renewals granted.
    pub renewed: u64,
    /// Invalidations begun.
    pub invalidated: u64,
    /// Fetches that an invalidation has met.
    pub collided: u64,
    /// Messages of epochs that the mirror is not in, and replies to no question or to one answered
    /// before.
    pub strangers: u64,
    /// Calls of [`Mirror::stopped`] after the end of the lease. The devices took longer than
    /// [`MirrorSettings::time_to_stop`], or the process was stopped. Accesses in between are safe
    /// only if the owner fences.
    pub stopped_late: u64,
}

/// The state machine of a mirror of an owner's memory.
///
/// Call [`handle`](Self::handle) with each message, and [`tick`](Self::tick) at the
/// [`deadline`](Self::deadline). Then send every [`next_message`](Self::next_message) and carry out
/// every [`next_decision`](Self::next_decision), in that order. The mirror asks to join by itself,
/// and again after it has lost its lease.
///
/// *After* each use of a copy, check that it was not zapped meanwhile and that the lease
/// [`is_valid`](Self::is_valid) (D4). A process that was stopped in between continues where it was,
/// and could not be told before.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mirror {
    incarnation: Incarnation,
    settings: MirrorSettings,
    rules: Rules,
    now: Time,
    nonce: u64,
    state: State,
    leaving: bool,
    /// Largest boot that has welcomed the mirror. An older owner is no longer the owner.
    boot: Option<Boot>,
    /// Own epochs that are over.
    past: VecDeque<Epoch>,
    /// How long the mirror waits for the answer to a join.
    age: Duration,
    /// Number of leases in a row that ended before a renewal.
    early: u32,
    fetches: BTreeMap<Nonce, Fetch>,
    working: BTreeSet<InvalidationId>,
    acknowledged: VecDeque<InvalidationId>,
    messages: VecDeque<ToOwner>,
    decisions: VecDeque<MirrorDecision>,
    counts: MirrorCounts,
}

impl Mirror {
    /// Makes a mirror that asks to join at its first tick.
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

    /// Leaves a rule out, to check that a simulation notices.
    #[cfg(feature = "test-util")]
    pub fn leave_out(&mut self, rule: Rule) {
        self.rules = Rules::without(rule);
    }

    /// Resets the counters, so that an exploration treats states with equal behaviour as one.
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
            // The owner sends it again.
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

    /// Tells the mirror that a [`MirrorDecision::Invalidate`] was carried out. Returns `true` if it
    /// belongs to the present epoch; otherwise nothing is due any more. Another owner counts from 1
    /// again, so a flush that has outlasted its epoch must not acknowledge the same number in the
    /// next one.
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

    /// Forgets which invalidations are under way, so that the owner sends them again. Call it when
    /// the tasks that carried them out are gone.
    pub fn forget_under_way(&mut self) {
        self.working.clear();
    }

    /// Returns the next message to send.
    pub fn next_message(&mut self) -> Option<ToOwner> {
        self.messages.pop_front()
    }

    /// Returns the next work to do.
    pub fn next_decision(&mut self) -> Option<MirrorDecision> {
        self.decisions.pop_front()
    }

    /// Returns the counters.
    pub fn counts(&self) -> MirrorCounts {
        self.counts
    }
}
