//! Messages between an owner and a mirror.

use core::fmt;
use core::time::Duration;
use shootdown::{AddressRange, RangeSet};

/// Identifies a mirror's host, as the transport has authenticated it. A message never carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host(pub u64);

/// Identifies one life of a mirror's process. No other life of that host has the same number. Use a
/// random number or the start time in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

/// Identifies one life of an owner. Every later owner of the memory has a larger number: a fencing
/// token, such as the revision of a lock in etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Boot(pub u64);

/// Identifies one membership of a mirror: from a join until its lease ends or it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch {
    /// The owner that granted it.
    pub boot: Boot,
    /// Number given by that owner, from 1. 0 stands for all epochs of earlier boots.
    pub number: u64,
}

/// Number that a mirror gives to one question. The reply carries it, and counts once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nonce(pub u64);

/// Identifies an invalidation of one owner; counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InvalidationId(pub u64);

/// A message from a mirror to its owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ToOwner {
    /// Asks for a lease. The mirror holds nothing: its devices have stopped, and all earlier epochs
    /// of this incarnation are over.
    Join {
        /// The life of the host that asks.
        incarnation: Incarnation,
        /// Number for the reply. A repeated join has the same number.
        nonce: Nonce,
    },
    /// Asks for more time.
    Renew {
        /// The lease to renew.
        epoch: Epoch,
        /// Number for the reply.
        nonce: Nonce,
    },
    /// Asks for the contents of a range, to hold a copy.
    Fetch {
        /// The lease of the mirror.
        epoch: Epoch,
        /// Number for the reply.
        nonce: Nonce,
        /// The range, in addresses of the owner.
        range: AddressRange,
    },
    /// Acknowledges an `Inv`: mappings of its ranges are zapped and flushed, and no earlier fetch
    /// will be installed.
    Ack {
        /// The epoch named in the `Inv`.
        epoch: Epoch,
        /// The invalidation named in the `Inv`.
        invalidation: InvalidationId,
    },
    /// Ends an epoch: the mirror holds nothing by it and never will, because its devices have
    /// stopped.
    Left {
        /// The epoch.
        epoch: Epoch,
    },
}

/// A message from an owner to a mirror.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ToMirror {
    /// Answers a join: the mirror is in the books.
    Welcome {
        /// The new epoch.
        epoch: Epoch,
        /// The life of the host that asked.
        incarnation: Incarnation,
        /// Number of the join.
        nonce: Nonce,
        /// How long the mirror may hold on, from when it asked.
        term: Duration,
    },
    /// Answers a renewal: the mirror may hold on for another term, from when it asked.
    Renewed {
        /// The epoch.
        epoch: Epoch,
        /// Number of the question.
        nonce: Nonce,
    },
    /// Answers a fetch. The contents come with this message, or follow with the same nonce.
    Fetched {
        /// The mirror's epoch.
        epoch: Epoch,
        /// Number of the question.
        nonce: Nonce,
        /// Number of invalidations that the owner had ended when the contents were read.
        version: u64,
    },
    /// Asks the mirror to release these ranges and to acknowledge.
    Inv {
        /// The mirror's epoch.
        epoch: Epoch,
        /// Number for the acknowledgement.
        invalidation: InvalidationId,
        /// The ranges that will change.
        ranges: RangeSet,
    },
    /// Tells that the epoch is over, or will not be renewed. This is a hint: the lease also ends
    /// without it.
    Gone {
        /// The epoch.
        epoch: Epoch,
    },
    /// Refuses a question.
    Refused {
        /// Number of the question.
        nonce: Nonce,
        /// Kind of the question and who asked: each life of a host counts its nonces from 1.
        asker: Asker,
        /// The reason.
        why: Refusal,
    },
}

/// Identifies the asker of a refused question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Asker {
    /// A join of this life of the host.
    Join(Incarnation),
    /// A fetch under this lease.
    Fetch(Epoch),
}

/// Reason why an owner refuses a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The books are full.
    Members,
    /// The host has the maximum number of epochs.
    MembersOfHost,
    /// The maximum number of fetches of this mirror is waiting.
    Fetches,
    /// The epoch granted to this join is no longer renewed. A mirror that has not entered it asks
    /// anew at once.
    Expelled,
    /// The owner's notifier is in no address space, so mirrors would not be told of changes.
    NotWatched,
    /// The range is not shared, exceeds the length of one fetch, or cannot be read.
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
