//! What a cache is told when it is made, and what it answers with.
#![forbid(unsafe_code)]

use crate::range::AddressRange;
use crate::sync::Arc;
use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;

/// A device that failed, as [`Builder::on_failure`] is told of it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Failure<'a> {
    /// What was to be registered or deregistered.
    pub range: AddressRange,
    /// Which of the two.
    pub operation: Operation,
    /// What the device answered, or an error with the message of its panic.
    pub error: &'a (dyn core::error::Error + 'static),
    /// Whether it panicked instead of answering.
    pub panicked: bool,
}

/// What a [`Device`](super::Device) was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Device::register`](super::Device::register): the caller is told, unless giving up idle
    /// registrations helps.
    Register,
    /// [`Device::deregister`](super::Device::deregister): it is tried again, and an invalidation of
    /// the memory waits.
    Deregister,
}

pub(super) type Reporter = Box<dyn Fn(&Failure<'_>) + Send + Sync>;

/// Which registrations become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Merge {
    /// Each miss registers its own pages.
    ///
    /// For a device that refuses ranges that overlap: a miss beside an *idle* registration that
    /// overlaps gives that up and succeeds, one beside a registration in *use* is answered with the
    /// device's error. [`Touching`](Self::Touching) does not help there, because the larger range
    /// is registered before the smaller ones go.
    #[default]
    Never,
    /// A miss registers its pages and those of all registrations that overlap or touch them, which
    /// it replaces. Users of those keep them until they let go.
    Touching,
}

/// Settings of a [`RegistrationCache`](super::RegistrationCache).
pub struct Builder {
    pub(super) limits: Limits,
    pub(super) on_failure: Option<Reporter>,
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(super) uffd: Option<crate::source::Uffd>,
}

/// What of the settings is a number.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_bytes: u64,
    pub(super) max_registrations: usize,
    pub(super) page: u64,
    pub(super) merge: Merge,
    pub(super) tries: u32,
}

impl Limits {
    /// Whether something has to be given up when there is too much of it.
    pub(super) fn are_set(&self) -> bool {
        self.max_bytes != u64::MAX || self.max_registrations != usize::MAX
    }

    /// The whole pages that a range touches.
    pub(super) fn pages(&self, range: AddressRange) -> AddressRange {
        let mask = self.page - 1;
        AddressRange::try_from(range.start() & !mask..=range.last() | mask).unwrap_or(AddressRange::ALL)
    }
}

impl Default for Builder {
    fn default() -> Self {
        let limits = Limits { max_bytes: u64::MAX, max_registrations: usize::MAX, page: 4096, merge: Merge::Never, tries: 64 };
        Self {
            limits,
            on_failure: None,
            #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
            uffd: None,
        }
    }
}

impl Builder {
    /// Gives up idle registrations, the one used longest ago first, while more than `bytes` are
    /// registered; no limit by default.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.limits.max_bytes = bytes;
        self
    }

    /// Does the same for the number of registrations.
    pub fn max_registrations(mut self, registrations: usize) -> Self {
        self.limits.max_registrations = registrations;
        self
    }

    /// Makes registrations begin and end at multiples of `page` bytes, a power of two; 4096 by
    /// default.
    ///
    /// # Panics
    /// When it is none.
    pub fn page(mut self, page: u64) -> Self {
        assert!(page.is_power_of_two(), "a page is a power of two, not {page}");
        self.limits.page = page;
        self
    }

    /// Says which registrations become one; [`Merge::Never`] by default.
    pub fn merge(mut self, merge: Merge) -> Self {
        self.limits.merge = merge;
        self
    }

    /// Says how often a registration is begun because its memory was invalidated meanwhile; 64
    /// by default.
    ///
    /// It ends earlier when the same change (one event of one range) comes eight times in a row
    /// while the device registers: then the device raises it itself, and would do so again.
    pub fn tries(mut self, tries: u32) -> Self {
        self.limits.tries = tries;
        self
    }

    /// Calls `reporter` each time the device fails or panics, also where no caller is told: a
    /// deregistration that an invalidation or a limit began. Outside of all locks; like the device
    /// it must not call the cache. A panic of it is counted
    /// ([`Stats::lost_panics`](crate::Stats::lost_panics)).
    pub fn on_failure(mut self, reporter: impl Fn(&Failure<'_>) + Send + Sync + 'static) -> Self {
        self.on_failure = Some(Box::new(reporter));
        self
    }

    /// Watches what is registered, for memory that somebody else unmaps (K5). Its space must be the
    /// cache's: [`build`](Self::build) panics otherwise.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub fn watch(mut self, uffd: crate::source::Uffd) -> Self {
        self.uffd = Some(uffd);
        self
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("max_bytes", &self.limits.max_bytes)
            .field("max_registrations", &self.limits.max_registrations)
            .field("merge", &self.limits.merge)
            .finish_non_exhaustive()
    }
}

/// Why there is no registration.
#[derive(Debug)]
#[non_exhaustive]
pub enum GetError<E> {
    /// The device refused, also after all idle registrations had been given up.
    Register(Arc<E>),
    /// The device panicked. The next call starts anew.
    Panicked {
        /// The panic's message, if it was a string.
        message: Option<Arc<str>>,
    },
    /// The memory was invalidated during each try: see [`Builder::tries`].
    Invalidated {
        /// Tries that were made.
        tries: u32,
    },
    /// The space was [released](crate::AddressSpace::release), or the source of its invalidations
    /// refused to watch the memory, for this reason.
    Unwatched(String),
}

impl<E: fmt::Display> fmt::Display for GetError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Register(error) => write!(f, "the device refused to register the memory: {error}"),
            Self::Panicked { message } => {
                write!(f, "the memory is not registered, because {}", DevicePanic { message: message.clone() })
            }
            Self::Invalidated { tries } => {
                write!(
                    f,
                    "the memory was invalidated during each of {tries} registrations: register it when it no longer changes"
                )
            }
            Self::Unwatched(why) => write!(f, "nobody would say when the memory goes away, so it is not registered: {why}"),
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

/// What [`Failure::error`] is for a panic.
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

/// What happened in a cache so far, and what is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheStats {
    /// Look-ups that found a registration.
    pub hits: u64,
    /// Look-ups that did not.
    pub misses: u64,
    /// Registrations that a larger one replaced.
    pub merges: u64,
    /// Registrations that were given up because of a limit, a flush, or so that the device had
    /// room.
    pub evictions: u64,
    /// Registrations that an invalidation ended.
    pub invalidations: u64,
    /// Registrations that were begun again because of an invalidation.
    pub collisions: u64,
    /// Times that the device failed to register, panics included.
    pub register_failures: u64,
    /// Times that the device failed to deregister, panics included.
    pub deregister_failures: u64,
    /// Registrations that look-ups find.
    pub registrations: u64,
    /// Bytes that the device has mapped, those included that are on their way out; at most
    /// `u64::MAX`.
    pub pinned_bytes: u64,
}
