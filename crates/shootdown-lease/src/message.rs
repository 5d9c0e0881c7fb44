//! What the two ends say to each other.

use core::fmt;
use core::time::Duration;
use shootdown::{AddressRange, RangeSet};

/// Who a mirror is, as the transport has authenticated it: never as a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host(pub u64);

/// One life of a mirror's process: a number that no other life of that host has, such as a random
/// one or the nanoseconds at which it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

/// One life of an owner. Every later owner of the memory has a larger one: a fencing token, such as
/// the revision of a lock in etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Boot(pub u64);

/// One membership of a mirror: from a join to the end of its lease or its leaving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch {
    /// The owner that granted it.
    pub boot: Boot,
    /// Counted by that owner from 1. 0 stands for all epochs of earlier boots.
    pub number: u64,
}

/// A number that a mirror gives to one question; the reply has it, too, and counts once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nonce(pub u64);

/// Names an invalidation of one owner, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InvalidationId(pub u64);

/// From a mirror.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ToOwner {
    /// Asks for a lease. The mirror holds nothing: its devices have stopped, and all earlier epochs
    /// of this incarnation are over.
    Join {
        /// Which life of the host asks.
        incarnation: Incarnation,
        /// For the reply; a join that is sent again has the same one.
        nonce: Nonce,
    },
    /// Asks for more time.
    Renew {
        /// Of this lease.
        epoch: Epoch,
        /// For the reply.
        nonce: Nonce,
    },
    /// Asks for the contents of a range, to hold a copy.
    Fetch {
        /// Under this lease.
        epoch: Epoch,
        /// For the reply.
        nonce: Nonce,
        /// Of which addresses of the owner.
        range: AddressRange,
    },
    /// What was mapped of the ranges of an `Inv` is zapped and flushed, and no fetch from before it
    /// is installed any more.
    Ack {
        /// The epoch that the `Inv` named.
        epoch: Epoch,
        /// The `Inv`.
        invalidation: InvalidationId,
    },
    /// The mirror holds nothing by this epoch and never will: its devices have stopped.
    Left {
        /// The epoch.
        epoch: Epoch,
    },
}

/// To a mirror.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ToMirror {
    /// The mirror is in the books.
    Welcome {
        /// Its epoch.
        epoch: Epoch,
        /// Which life of the host has asked.
        incarnation: Incarnation,
        /// Of the join.
        nonce: Nonce,
        /// How long it may hold on from when it asked.
        term: Duration,
    },
    /// The mirror may hold on for another term from when it asked.
    Renewed {
        /// Its epoch.
        epoch: Epoch,
        /// Of the question.
        nonce: Nonce,
    },
    /// The contents that were asked for are with this message, or follow by the same nonce.
    Fetched {
        /// The mirror's epoch.
        epoch: Epoch,
        /// Of the question.
        nonce: Nonce,
        /// How many invalidations the owner had ended when the contents were read.
        version: u64,
    },
    /// Let go of these ranges, and acknowledge.
    Inv {
        /// The mirror's epoch.
        epoch: Epoch,
        /// To be named in the acknowledgement.
        invalidation: InvalidationId,
        /// What will change.
        ranges: RangeSet,
    },
    /// The epoch is not renewed any more, or over. A hint: the lease ends without it as well.
    Gone {
        /// The epoch.
        epoch: Epoch,
    },
    /// A question will not be answered.
    Refused {
        /// Of the question.
        nonce: Nonce,
        /// What has asked: each life of a host counts its nonces from 1.
        asker: Asker,
        /// Why.
        why: Refusal,
    },
}

/// Whose question is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Asker {
    /// A join of this life of the host.
    Join(Incarnation),
    /// A fetch under this lease.
    Fetch(Epoch),
}

/// Why an owner does not answer a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The books are full.
    Members,
    /// The host has as many epochs as one may have.
    MembersOfHost,
    /// As many fetches wait already as one mirror may have.
    Fetches,
    /// The epoch that this join was given is not renewed any more. A mirror that has not entered it
    /// asks anew, at once.
    Expelled,
    /// The owner's notifier is in no address space, so nothing would tell its mirrors of changes.
    NotWatched,
    /// The range is not shared, is longer than the owner sends at once, or cannot be read.
    Contents,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Members => "the owner has as many mirrors as it takes (`Terms::members`)",
            Self::MembersOfHost => "leases of earlier lives of this host have not ended yet: try again after a term",
            Self::Expelled => "the epoch of this join is not renewed any more: ask anew",
            Self::NotWatched => {
                "nothing would tell mirrors of changes: the owner's program has not inserted the hub into its address space, or has dropped that subscription"
            }
            Self::Fetches => "as many fetches of this mirror wait as the owner takes (`Terms::fetches`)",
            Self::Contents => "the range is not shared, is longer than the owner sends at once, or cannot be read",
        })
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.boot.0, self.number)
    }
}
