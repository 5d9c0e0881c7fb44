//! The phases of a registration, and what is recorded about its progress.
#![forbid(unsafe_code)]

use super::task::{Task, Waiter};
use super::watch::Watched;
use crate::event::Event;
use crate::range::AddressRange;
use crate::sync::Arc;

/// The event and range of an invalidation that ended an attempt or a registration.
pub(super) type Change = (Event, AddressRange);

/// Result of an attempt to register.
pub(super) enum Outcome<E> {
    /// Look-ups found the registration. It may have been withdrawn since.
    Live,
    /// The memory was invalidated during the attempt. Carries that change if it came while the
    /// device registered.
    Collided(Option<Change>),
    /// The device refused with this error.
    Failed(Arc<E>),
    /// The device panicked with this message.
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

/// The shared future that registers. The callers and an invalidation poll it.
pub(super) type Registering<E> = Task<Outcome<E>>;

/// Phase of a registration. An invalidation waits for the task of the phase, if it has one.
pub(super) enum Phase<E: Send + Sync + 'static> {
    /// Callers wait until the range is stable. The device has not been asked, and holds nothing. An
    /// invalidation does not wait.
    Waiting,
    /// The device registers. The handle is inside `task`. An invalidation waits for `task`.
    Registering { task: Registering<E> },
    /// Look-ups find the registration. The handle is in the `Live` that the shelf and the users
    /// share. `leaving` waits for the users, then for the device.
    Live { leaving: Task<()> },
    /// Look-ups no longer find the registration. The handle is with the users, or in `leaving`. An
    /// invalidation waits for `leaving`.
    Leaving { leaving: Task<()> },
    /// The registration is over. The device holds nothing, and look-ups find nothing.
    Gone,
}

/// State of a registration, under its [`DriverLock`](crate::DriverLock).
pub(super) struct Progress<E: Send + Sync + 'static, L> {
    pub(super) phase: Phase<E>,
    /// Number of callers that need the registration.
    pub(super) claims: usize,
    /// Number of claims whose caller also needs other registrations.
    pub(super) keepers: usize,
    /// Reference held for the `keepers`. Limits do not evict the registration while it exists. An
    /// invalidation drops it instead of waiting for it.
    pub(super) kept: Option<Arc<L>>,
    /// The invalidation that ended it, if one did: the last one that came while the device
    /// registered, or the one that withdrew it from look-ups.
    pub(super) by: Option<Change>,
    /// Watch of the range, held from before the device is asked until it has released the memory
    /// (M1).
    pub(super) watched: Watched,
}

impl<E: Send + Sync + 'static, L> Progress<E, L> {
    /// Returns progress in `phase` with `claims` claims and nothing else.
    pub(super) fn new(phase: Phase<E>, claims: usize) -> Self {
        Self { phase, claims, keepers: 0, kept: None, by: None, watched: Watched::default() }
    }
}

/// Next step of a caller that needs a registration.
pub(super) enum Step<E: Send + Sync + 'static> {
    /// Wait until the range is stable, then begin to register.
    Begin,
    /// Wait for the attempt that is under way.
    Join(Waiter<Outcome<E>>),
    /// The attempt is over, with this result.
    Over(Outcome<E>),
}
