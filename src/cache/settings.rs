//! What a cache is told when it is made, and what it answers with.
#![forbid(unsafe_code)]

use super::table::bytes;
use crate::range::AddressRange;
use alloc::boxed::Box;
use core::fmt;
use core::marker::PhantomData;

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
    #[default]
    Never,
    /// A miss registers its pages and those of all registrations that overlap or touch them, which
    /// it replaces, as far as [`Builder::max_registration`] and [`Builder::max_bytes`] allow. Users
    /// of those keep them until they let go.
    Touching,
}

/// Which registration a `get` may be given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Match {
    /// Any that covers the range.
    #[default]
    Covering,
    /// One of the range, neither larger nor smaller: for devices that must not be given more than
    /// was asked for. Nothing is rounded, unless [`Builder::page`] is set: then a registration is
    /// of the whole pages of the range, and ranges within the same pages share it.
    Exact,
}

/// Whether the device may have two registrations that share a byte.
///
/// Where it may not (CUDA's `cudaHostRegister` answers error 712), a `get` that finds a smaller or
/// shifted registration in its way takes that one away from look-ups, waits until its users have
/// let go and the device has deregistered it, and then registers. Callers whose ranges overlap have
/// their turns in the order in which they asked. No two are ever in the device, whatever fails, is
/// cancelled or invalidated meanwhile.
///
/// # Deadlocks
/// Do not await a `get` while your task holds a registration that overlaps its range, unless it is
/// sure to be given that one: it waits for you. One that covers the range is not enough with
/// [`Match::Exact`], nor after a [`flush_range`](super::RegistrationCache::flush_range), an
/// invalidation or a `get` of anybody else has taken it away from look-ups. The same goes for an
/// [`InvalidationGuard`](crate::InvalidationGuard): a `get` of other memory may stand behind a
/// wider one that overlaps it and waits for the guard. Nor hold a registration while you wait for
/// another of any range, unless all tasks take theirs in the same order: two tasks may wait for
/// each other. A [`get_all`](super::RegistrationCache::get_all) is safe: it holds nothing while it
/// waits. The library cannot see who holds a registration, so neither is detected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overlap {
    /// It may.
    #[default]
    Allowed,
    /// It may not. Each `get` registers its own pages when what overlaps them has gone.
    Wait,
    /// It may not. A `get` registers the union of its pages with all registrations that overlap
    /// them, when those have gone, also those in use: their users find it from then on. With
    /// [`Merge::Touching`] those that touch belong to the union, too.
    ///
    /// If the union is more than [`Builder::max_registration`] or [`Builder::max_bytes`], or the
    /// device refuses it, the `get` registers its own pages. What was invalidated while it waited
    /// does not belong to the union, nor what the device does
    /// [not vouch for](super::Device::still_valid). A window that moves along a buffer registers
    /// ever more: set a limit, or use [`Wait`](Self::Wait).
    Merge,
}

/// Settings of a [`RegistrationCache`](super::RegistrationCache) of a device `D`, which
/// [`build`](Self::build) is given.
#[must_use = "there is no cache before `build`"]
pub struct Builder<D> {
    pub(super) limits: Limits,
    pub(super) on_failure: Option<Reporter>,
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(super) uffd: Option<crate::source::Uffd>,
    /// Unless the default is right.
    page: Option<u64>,
    device: PhantomData<fn() -> D>,
}

/// What of the settings is a number.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_bytes: u64,
    pub(super) max_registrations: usize,
    pub(super) page: u64,
    pub(super) merge: Merge,
    pub(super) exact: bool,
    pub(super) overlap: Overlap,
    /// In bytes, whole pages of them.
    pub(super) max_registration: u64,
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
        AddressRange::try_from(range.start() & !mask..=range.last() | mask)
            .unwrap_or(AddressRange::ALL)
    }

    /// Whether one registration may be as large.
    pub(super) fn fits(&self, pages: AddressRange) -> bool {
        self.max_registration == u64::MAX || pages.last() - pages.start() < self.max_registration
    }

    /// Whether `union` may be registered in the place of `wanted`, which is part of it.
    pub(super) fn allow(&self, union: AddressRange, wanted: AddressRange) -> bool {
        let few = self.max_bytes == u64::MAX || bytes(union) <= u128::from(self.max_bytes);
        union == wanted || self.fits(union) && few
    }

    /// The registrations that a range takes, in order.
    pub(super) fn pieces(&self, range: AddressRange) -> impl Iterator<Item = AddressRange> + use<> {
        let (all, more) = (
            self.pages(range),
            self.max_registration.checked_add(1).map_or(u64::MAX, |_| self.max_registration - 1),
        );
        let next = move |start: u64| {
            let last = start.saturating_add(more).min(all.last());
            AddressRange::try_from(start..=last).ok()
        };
        core::iter::successors(next(all.start()), move |piece| {
            let start = piece.last().checked_add(1).filter(|start| *start <= all.last())?;
            next(start)
        })
    }
}

impl<D> Default for Builder<D> {
    fn default() -> Self {
        let limits = Limits {
            max_bytes: u64::MAX,
            max_registrations: usize::MAX,
            page: 4096,
            merge: Merge::Never,
            exact: false,
            overlap: Overlap::Allowed,
            max_registration: u64::MAX,
            tries: 64,
        };
        Self {
            limits,
            on_failure: None,
            #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
            uffd: None,
            page: None,
            device: PhantomData,
        }
    }
}

impl<D> Builder<D> {
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
    /// default, and 1 with [`Match::Exact`].
    ///
    /// # Panics
    /// When it is none.
    pub fn page(mut self, page: u64) -> Self {
        assert!(page.is_power_of_two(), "a page is a power of two, not {page}");
        self.page = Some(page);
        self
    }

    /// Says which registration a `get` may be given; [`Match::Covering`] by default.
    pub fn matching(mut self, matching: Match) -> Self {
        self.limits.exact = matching == Match::Exact;
        self
    }

    /// Says whether the device may have two registrations that overlap; [`Overlap::Allowed`] by
    /// default.
    pub fn overlap(mut self, overlap: Overlap) -> Self {
        self.limits.overlap = overlap;
        self
    }

    /// Lets no registration be of more than `bytes`, rounded down to whole pages; no limit by
    /// default. What is larger is registered in pieces, by
    /// [`get_all`](super::RegistrationCache::get_all).
    pub fn max_registration(mut self, bytes: u64) -> Self {
        self.limits.max_registration = bytes;
        self
    }

    /// The numbers, once it is known what was set.
    ///
    /// # Panics
    /// As [`build`](Self::build).
    pub(super) fn checked(&self) -> Limits {
        let mut limits = self.limits;
        limits.page = self.page.unwrap_or(if limits.exact { 1 } else { limits.page });
        if limits.max_registration != u64::MAX {
            limits.max_registration &= !(limits.page - 1);
        }
        assert!(
            limits.max_registration > 0,
            "a registration of at most less than one page ({} bytes) holds nothing",
            limits.page
        );
        let merges = limits.merge == Merge::Touching || limits.overlap == Overlap::Merge;
        assert!(
            !(limits.exact && merges),
            "`Match::Exact` gives what was asked for: it excludes `Merge::Touching` and `Overlap::Merge`"
        );
        let replaces = limits.merge == Merge::Touching && limits.overlap == Overlap::Wait;
        assert!(
            !replaces,
            "`Merge::Touching` registers beside what it replaces: with `Overlap::Wait` use `Merge::Never`"
        );
        limits
    }

    /// Says which registrations become one; [`Merge::Never`] by default.
    pub fn merge(mut self, merge: Merge) -> Self {
        self.limits.merge = merge;
        self
    }

    /// Says how often a registration is begun because its memory was invalidated meanwhile, or
    /// outdated by the time that the caller could be given it; 64 by default.
    ///
    /// It ends earlier when the same change (one event of one range) comes eight times in a row
    /// while the device registers: then the device raises it itself, and would do so again. Not so
    /// with changes of protection: each `fork` of the process is one, of the same range as the
    /// last.
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

impl<D> fmt::Debug for Builder<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("max_bytes", &self.limits.max_bytes)
            .field("max_registrations", &self.limits.max_registrations)
            .field("max_registration", &self.limits.max_registration)
            .field("merge", &self.limits.merge)
            .field("exact", &self.limits.exact)
            .field("overlap", &self.limits.overlap)
            .finish_non_exhaustive()
    }
}

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
    /// Registrations that were given up because of a limit, a flush, so that the device had room,
    /// or because they overlapped another.
    pub evictions: u64,
    /// Registrations that an invalidation ended.
    pub invalidations: u64,
    /// Registrations that [`Device::still_valid`](super::Device::still_valid) did not vouch for.
    pub outdated: u64,
    /// Registrations that were begun again because of an invalidation.
    pub collisions: u64,
    /// Times that the device failed to register, panics included.
    pub register_failures: u64,
    /// Times that the device failed to deregister, panics included.
    pub deregister_failures: u64,
    /// Registrations that look-ups find; 0 in a child of `fork` if the cache watches.
    pub registrations: u64,
    /// Bytes that the device has mapped, those included that are on their way out; at most
    /// `u64::MAX`, and 0 in a child of `fork` if the cache watches.
    pub pinned_bytes: u64,
}
