//! Errors of a `get`.
#![forbid(unsafe_code)]

use crate::range::AddressRange;
use crate::sync::Arc;
use core::fmt;

/// Reason why [`get`](super::RegistrationCache::get) returned no registration.
#[derive(Debug)]
#[non_exhaustive]
pub enum GetError<E> {
    /// The device refused, even after all idle registrations were given up.
    Register(Arc<E>),
    /// The device panicked. The next call starts anew.
    Panicked {
        /// Message of the panic, if it was a string.
        message: Option<Arc<str>>,
    },
    /// The memory was invalidated during each try. See [`Builder::tries`](super::Builder::tries).
    Invalidated {
        /// Number of tries.
        tries: u32,
    },
    /// No source reports changes of the memory, so the cache does not register it (K5).
    Unwatched(Unwatched),
    /// The range exceeds the limit for one registration.
    /// [`get_all`](super::RegistrationCache::get_all) registers it in pieces.
    TooLarge {
        /// Limit for one registration in bytes: the value given to
        /// [`max_registration`](super::Builder::max_registration), in whole pages.
        max: u64,
    },
    /// Registrations must not overlap, and the device may hold one there for ever. See
    /// [`Device::deregister_lost`](super::Device::deregister_lost).
    Lost {
        /// Range of the lost registration.
        range: AddressRange,
    },
}

/// Reason why no source reports changes of the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unwatched {
    /// The space was [released](crate::AddressSpace::release).
    Released,
    /// This process is a child of `fork`, and the cache belongs to its parent (M4). Make another
    /// cache.
    Forked,
    /// The source of invalidations refused to watch the memory. Carries its reason.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    Source(crate::source::UffdError),
}

impl fmt::Display for Unwatched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Released => f.write_str("the space was released"),
            Self::Forked => f.write_str(
                "the cache belongs to the process that this one was forked from: make another one",
            ),
            #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
            Self::Source(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for Unwatched {}

impl<E: fmt::Display> fmt::Display for GetError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Register(error) => {
                write!(f, "the device refused to register the memory: {error}")
            }
            Self::Panicked { message } => {
                write!(
                    f,
                    "the memory is not registered, because {}",
                    DevicePanic { message: message.clone() }
                )
            }
            Self::Invalidated { tries } => {
                write!(
                    f,
                    "the memory was invalidated during each of {tries} registrations: register it when it no longer changes"
                )
            }
            Self::Unwatched(why) => write!(
                f,
                "nobody would say when the memory goes away, so it is not registered: {why}"
            ),
            Self::TooLarge { max } => {
                write!(
                    f,
                    "one registration holds at most {max} bytes: register the memory in pieces, with `get_all`"
                )
            }
            Self::Lost { range } => {
                write!(
                    f,
                    "the device panicked when it was to deregister {range}, and may have it for ever"
                )
            }
        }
    }
}

impl<E: core::error::Error + 'static> core::error::Error for GetError<E> {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Register(error) => Some(&**error),
            _ => None,
        }
    }
}

/// Error of a panic, as [`Failure::error`](super::Failure::error) reports it.
#[derive(Debug)]
pub(super) struct DevicePanic {
    pub(super) message: Option<Arc<str>>,
}

impl fmt::Display for DevicePanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => write!(f, "the device panicked: {message}"),
            None => f.write_str("the device panicked"),
        }
    }
}

impl core::error::Error for DevicePanic {}
