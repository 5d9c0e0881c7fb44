//! Settings and counters of a cache.
#![forbid(unsafe_code)]

use super::table::bytes;
use crate::range::AddressRange;
use alloc::boxed::Box;
use core::fmt;
use core::marker::PhantomData;

/// Describes a failure of the device to the reporter of [`Builder::on_failure`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Failure<'a> {
    /// Range that was to be registered or deregistered.
    pub range: AddressRange,
    /// The operation that failed.
    pub operation: Operation,
    /// Error of the device, or an error with the message of its panic.
    pub error: &'a (dyn core::error::Error + 'static),
    /// `true` if the device panicked instead of returning an error.
    pub panicked: bool,
}

/// Operation of a [`Device`](super::Device).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Device::register`](super::Device::register). The caller gets the error, unless giving up
    /// idle registrations helps.
    Register,
    /// [`Device::deregister`](super::Device::deregister). It is tried again, and an invalidation of
    /// the memory waits.
    Deregister,
}

pub(super) type Reporter = Box<dyn Fn(&Failure<'_>) + Send + Sync>;

/// Selects which registrations become one. The setting is [`Builder::merge`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Merge {
    /// Each miss registers its own pages.
    #[default]
    Never,
    /// A miss registers its pages together with those of all registrations that overlap or touch
    /// them, and replaces these. [`Builder::max_registration`] and [`Builder::max_bytes`] limit the
    /// union. Users of a replaced registration keep it until they release it.
    Touching,
}

/// Selects which registration a `get` may return. The setting is [`Builder::matching`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Match {
    /// Any registration that covers the range.
    #[default]
    Covering,
    /// A registration of the range itself, neither larger nor smaller. For devices that must not be
    /// given more than was asked for.
    ///
    /// Nothing is rounded unless [`Builder::page`] is set. With it a registration consists of the
    /// whole pages of the range, and ranges within the same pages share it.
    Exact,
}

/// Selects whether the device may hold two registrations that share a byte. The setting is
/// [`Builder::overlap`].
///
/// Some devices must not (CUDA's `cudaHostRegister` returns error 712). A `get` then clears its
/// way: it withdraws a smaller or shifted registration from look-ups, waits until its users have
/// released it and the device has deregistered it, and registers. Callers with overlapping ranges
/// have their turns in the order in which they asked. No two overlapping registrations are ever in
/// the device, whatever fails, is cancelled or is invalidated (K7).
///
/// # Deadlocks
/// The library cannot see which task holds a registration, so it detects none of these:
/// - A task that holds a registration must not await a `get` of an overlapping range, unless it is
///   sure to get that same registration: the `get` waits for the task itself. Covering the range is
///   not enough with [`Match::Exact`], nor after a
///   [`flush_range`](super::RegistrationCache::flush_range), an invalidation or a `get` of another
///   task has withdrawn the registration.
/// - The same holds for an [`InvalidationGuard`](crate::InvalidationGuard). A `get` of other memory
///   may queue behind a wider one that overlaps it and waits for the guard.
/// - Two tasks that hold a registration and wait for another one, of any range, may wait for each
///   other, unless all tasks take theirs in the same order.
///   [`get_all`](super::RegistrationCache::get_all) is safe: it holds nothing while it waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overlap {
    /// Registrations may overlap.
    #[default]
    Allowed,
    /// Registrations must not overlap. A `get` registers its own pages, once everything that
    /// overlaps them is gone.
    Wait,
    /// Registrations must not overlap. A `get` registers the union of its pages with all
    /// registrations that overlap them, including those in use, once these are gone. Their users
    /// find the union from then on. With [`Merge::Touching`], adjacent registrations belong to the
    /// union as well.
    ///
    /// The `get` registers only its own pages if the union exceeds [`Builder::max_registration`] or
    /// [`Builder::max_bytes`], or if the device refuses it. The union contains nothing that was
    /// invalidated while the `get` waited, and nothing that the device does [not vouch
    /// for](super::Device::still_valid). A window that moves along a buffer registers more and
    /// more: set a limit, or use [`Wait`](Self::Wait).
    Merge,
}

/// Settings of a [`RegistrationCache`](super::RegistrationCache) with a device of type `D`.
/// [`RegistrationCache::builder`](super::RegistrationCache::builder) returns it, and
/// [`build`](Self::build) makes the cache.
#[must_use = "there is no cache before `build`"]
pub struct Builder<D> {
    pub(super) limits: Limits,
    pub(super) on_failure: Option<Reporter>,
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(super) uffd: Option<crate::source::Uffd>,
    /// `None` for the default.
    page: Option<u64>,
    device: PhantomData<fn() -> D>,
}

/// The numeric settings.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_bytes: u64,
    pub(super) max_registrations: usize,
    pub(super) page: u64,
    pub(super) merge: Merge,
    pub(super) exact: bool,
    pub(super) overlap: Overlap,
    /// In bytes; a multiple of `page`, or `u64::MAX` for no limit.
    pub(super) max_registration: u64,
    pub(super) tries: u32,
}

impl Limits {
    /// Returns `true` if there is a limit that evicts registrations.
    pub(super) fn are_set(&self) -> bool {
        self.max_bytes != u64::MAX || self.max_registrations != usize::MAX
    }

    /// Returns the whole pages that `range` touches.
    pub(super) fn pages(&self, range: AddressRange) -> AddressRange {
        let mask = self.page - 1;
        AddressRange::try_from(range.start() & !mask..=range.last() | mask)
            .unwrap_or(AddressRange::ALL)
    }

    /// Returns `true` if one registration may be as large as `pages`.
    pub(super) fn fits(&self, pages: AddressRange) -> bool {
        self.max_registration == u64::MAX || pages.last() - pages.start() < self.max_registration
    }

    /// Returns `true` if `union` may be registered instead of `wanted`, which is a part of it.
    pub(super) fn allow(&self, union: AddressRange, wanted: AddressRange) -> bool {
        let few = self.max_bytes == u64::MAX || bytes(union) <= u128::from(self.max_bytes);
        union == wanted || self.fits(union) && few
    }

    /// Cuts `range` into the ranges of its registrations, in order.
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
    /// Evicts idle registrations, least recently used first, while more than `bytes` bytes are
    /// registered. There is no limit by default. See also
    /// [`max_registrations`](Self::max_registrations).
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.limits.max_bytes = bytes;
        self
    }

    /// Evicts idle registrations, least recently used first, while there are more than
    /// `registrations`. There is no limit by default. See also [`max_bytes`](Self::max_bytes).
    pub fn max_registrations(mut self, registrations: usize) -> Self {
        self.limits.max_registrations = registrations;
        self
    }

    /// Makes registrations begin and end at multiples of `page` bytes. The default is 4096, and 1
    /// with [`Match::Exact`].
    ///
    /// # Panics
    /// If `page` is not a power of two.
    pub fn page(mut self, page: u64) -> Self {
        assert!(page.is_power_of_two(), "a page is a power of two, not {page}");
        self.page = Some(page);
        self
    }

    /// Selects which registration a `get` may return. The default is [`Match::Covering`].
    pub fn matching(mut self, matching: Match) -> Self {
        self.limits.exact = matching == Match::Exact;
        self
    }

    /// Selects whether the device may hold overlapping registrations. The default is
    /// [`Overlap::Allowed`].
    pub fn overlap(mut self, overlap: Overlap) -> Self {
        self.limits.overlap = overlap;
        self
    }

    /// Limits one registration to `bytes` bytes, rounded down to whole pages. There is no limit by
    /// default. [`get_all`](super::RegistrationCache::get_all) registers a larger range in pieces.
    pub fn max_registration(mut self, bytes: u64) -> Self {
        self.limits.max_registration = bytes;
        self
    }

    /// Returns the numeric settings with their defaults filled in.
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

    /// Selects which registrations become one. The default is [`Merge::Never`].
    pub fn merge(mut self, merge: Merge) -> Self {
        self.limits.merge = merge;
        self
    }

    /// Limits how often a registration is begun because its memory was invalidated meanwhile, or
    /// because the device no longer vouched for it. The default is 64.
    ///
    /// The call ends earlier if the same change (one event of one range) comes eight times in a row
    /// while the device registers: the device then causes the change itself, and would do so again.
    /// Changes of protection are exempt, because each `fork` of the process is one, of the same
    /// range as the last.
    pub fn tries(mut self, tries: u32) -> Self {
        self.limits.tries = tries;
        self
    }

    /// Calls `reporter` each time the device fails or panics. This includes failures that no caller
    /// is told of: a deregistration that an invalidation or a limit began.
    ///
    /// No lock is held during the call. Like the device, the reporter must not call the cache. A
    /// panic of it is counted ([`Stats::lost_panics`](crate::Stats::lost_panics)).
    pub fn on_failure(mut self, reporter: impl Fn(&Failure<'_>) + Send + Sync + 'static) -> Self {
        self.on_failure = Some(Box::new(reporter));
        self
    }

    /// Watches registered memory with `uffd`, for memory that other code unmaps (K5).
    ///
    /// Its space must be that of the cache: [`build`](Self::build) panics otherwise.
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

/// Counters of a cache, and the size of its content.
/// [`RegistrationCache::stats`](super::RegistrationCache::stats) returns them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheStats {
    /// Look-ups that found a registration.
    pub hits: u64,
    /// Look-ups that found none.
    pub misses: u64,
    /// Registrations replaced by a larger one.
    pub merges: u64,
    /// Registrations evicted by a limit, a flush, a device without room, or an overlapping
    /// registration.
    pub evictions: u64,
    /// Registrations ended by an invalidation.
    pub invalidations: u64,
    /// Registrations that [`Device::still_valid`](super::Device::still_valid) did not vouch for.
    pub outdated: u64,
    /// Registrations begun again because of an invalidation.
    pub collisions: u64,
    /// Failures of the device to register, including panics.
    pub register_failures: u64,
    /// Failures of the device to deregister, including panics.
    pub deregister_failures: u64,
    /// Registrations that look-ups find. 0 in a child of `fork` if the cache watches.
    pub registrations: u64,
    /// Bytes that the device has mapped, including registrations that are leaving, at most
    /// `u64::MAX`. 0 in a child of `fork` if the cache watches.
    pub pinned_bytes: u64,
}
