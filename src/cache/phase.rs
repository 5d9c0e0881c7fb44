//! How far a registration is.
#![forbid(unsafe_code)]

use super::task::{Task, Waiter};
use super::watch::Watched;
use crate::event::Event;
use crate::range::AddressRange;
use crate::sync::Arc;

/// What ended an attempt.
pub(super) type Change = (Event, AddressRange);

/// What an attempt to register came to.
pub(super) enum Outcome<E> {
    /// Look-ups find it, or did until something took it away.
    Live,
    /// The memory was invalidated meanwhile, by this if it was while the device registered.
    Collided(Option<Change>),
    Failed(Arc<E>),
    Panicked(Option<Arc<str>>),
}

impl<E> Default for Outcome<E> {
    fn default() -> Self {
        Self::Collided(None)
    }
}

impl<E> Clone for Outcome<E> {
    fn clone(&self) -> Self {
        match self {
            Self::Live => Self::Live,
            Self::Collided(by) => Self::Collided(*by),
            Self::Failed(error) => Self::Failed(error.clone()),
            Self::Panicked(message) => Self::Panicked(message.clone()),
        }
    }
}

/// The future that registers.
pub(super) type Registering<E> = Task<Outcome<E>>;

/// How far a registration is. An invalidation waits for what each phase has to wait for.
pub(super) enum Phase<E: Send + Sync + 'static> {
    /// Callers wait for the range to be stable; the device was not asked. No invalidation waits.
    Waiting,
    /// The device registers; an invalidation waits for the task.
    Registering {
        task: Registering<E>,
    },
    /// Look-ups find it. `leaving` waits for the users, then for the device.
    Live {
        leaving: Task<()>,
    },
    /// Look-ups do not find it any more.
    Leaving {
        leaving: Task<()>,
    },
    Gone,
}

pub(super) struct Progress<E: Send + Sync + 'static, L> {
    pub(super) phase: Phase<E>,
    /// Callers that need it.
    pub(super) claims: usize,
    /// Those of them that need others besides it.
    pub(super) keepers: usize,
    /// A user on their behalf: limits leave it alone, and no invalidation waits for it.
    pub(super) kept: Option<Arc<L>>,
    /// What has ended it, if that was an invalidation: the last of them that came while the device
    /// registered, or the one that took it away from look-ups.
    pub(super) by: Option<Change>,
    /// The range is watched from before the device is asked until it has let go (M1).
    pub(super) watched: Watched,
}

impl<E: Send + Sync + 'static, L> Progress<E, L> {
    /// With so many claims, and nothing begun.
    pub(super) fn new(phase: Phase<E>, claims: usize) -> Self {
        Self { phase, claims, keepers: 0, kept: None, by: None, watched: Watched::default() }
    }
}

/// What a caller does next who needs a registration.
pub(super) enum Step<E: Send + Sync + 'static> {
    /// Wait for the range to be stable, and begin.
    Begin,
    Join(Waiter<Outcome<E>>),
    Over(Outcome<E>),
}
