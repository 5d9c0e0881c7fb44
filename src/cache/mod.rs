//! A registration cache that is never stale.
//!
//! Registering memory with a device (an RDMA memory region, an io_uring fixed buffer, a GPU's user
//! pointer) takes microseconds, so programs keep registrations. A kept registration is wrong once
//! its memory is unmapped: the device still maps the old pages. The [`AddressSpace`] tells a
//! [`RegistrationCache`] of each change. The first pass of an invalidation withdraws the
//! registration from look-ups. The guard is handed out once the last user has released the
//! registration and the device has deregistered it.
//!
//! ```
//! use shootdown::cache::{Device, RegistrationCache, StillRegistered};
//! use shootdown::{AddressRange, AddressSpace, Event};
//!
//! struct Nic;
//!
//! impl Device for Nic {
//!     type Handle = u32; // a key
//!     type Error = std::io::Error;
//!
//!     async fn register(
//!         &self,
//!         range: AddressRange,
//!     ) -> Result<u32, Self::Error> {
//!         Ok(range.start() as u32)
//!     }
//!
//!     async fn deregister(
//!         &self,
//!         _: AddressRange,
//!         _: u32,
//!     ) -> Result<(), StillRegistered<u32, Self::Error>> {
//!         Ok(())
//!     }
//! }
//!
//! # futures::executor::block_on(async {
//! let space = AddressSpace::new();
//! let cache = RegistrationCache::new(&space, Nic);
//! let buffer = AddressRange::new(0x7000, 0x1000)?;
//!
//! let registration = cache.get(buffer).await?; // registers
//! drop(registration); // stays cached
//! assert_eq!(*cache.get(buffer).await?.handle(), 0x7000);
//! assert_eq!(cache.stats().hits, 1);
//!
//! // Deregisters. The buffer may be unmapped while the guard is held.
//! drop(space.invalidate(buffer, Event::Unmap).await);
//! assert_eq!(cache.stats().registrations, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
//! ```
//!
//! # When something fails
//! - The device refuses to register: all idle registrations are given up and the device is asked
//!   once more, then the caller gets [`GetError::Register`].
//! - The device refuses to deregister: it may still use the memory, so each waiting task asks it
//!   again. An invalidation waits until it succeeds. Other tasks run meanwhile.
//! - The device panics: the callers get [`GetError::Panicked`], or the deregistration counts as
//!   failed. Other ranges are not affected. A panic that no caller is told of is counted
//!   ([`Stats::lost_panics`](crate::Stats::lost_panics)) and reported
//!   ([`Callback::Device`](crate::Callback::Device)).
//! - The memory changes while the device registers: the registration is dropped and begun again,
//!   see [`Builder::tries`]. If the device itself changes that memory each time, the call ends
//!   after eight tries with [`GetError::Invalidated`]. Changes of other memory do not count.
//! - The process has no mapping left for a watch: handled like a device without room.
//!
//! # Structure
//! One registration is an ordinary driver of this crate: it has a notifier, a
//! [`DriverLock`](crate::DriverLock) and futures of its own. The cache is the shelf on which
//! look-ups find it. So a registration outlives its cache, and a failure of the device affects one
//! registration.
//!
//! ```text
//! mod       RegistrationCache, Registration: get, get_all, flush
//!  └ miss      a get that finds nothing
//!     └ way       clears what is in a caller's way, in its turn
//!        └ core      state of all handles: limits, counts, the shelf
//!           │           core/room: limits, flush, making room
//!           └ life      the waiting: an attempt, the end of a registration
//!              └ claim     a caller's interest in a registration
//!                 └ entry     one registration and its lock
//!                    │           entry/live: what users share
//!                    │           entry/guardian: its notifier
//!                    └ phase     the phases of a registration
//!                       └ device    Device, and the only calls of it
//!                          └ watch     the source of invalidations
//!                             └ settings, error   input and output
//! turns     turns of callers, where nothing may overlap (uses only task)
//! task      a future without an owner (uses none of the above)
//! table     look-up, attempts, eviction order (knows no device)
//! ```
//! Each file imports only files below it (`tests/source_rules.rs` checks).
#![forbid(unsafe_code)]

mod claim;
mod core;
mod device;
mod entry;
mod error;
mod life;
mod miss;
mod phase;
mod settings;
mod table;
mod task;
#[cfg(test)]
mod tests;
mod turns;
mod watch;
mod way;

use self::core::Core;
use crate::block::Waitable;
use crate::fork::LeftToParent;
use crate::range::AddressRange;
use crate::space::AddressSpace;
use crate::sync::Arc;
use ::core::fmt;
use alloc::vec::Vec;
pub use device::{Device, StillRegistered};
use entry::Live;
pub use error::{GetError, Unwatched};
pub use settings::{Builder, CacheStats, Failure, Match, Merge, Operation, Overlap};

impl<D: Device> Builder<D> {
    /// Makes a cache of `device` for memory of `space`.
    ///
    /// # Panics
    /// - The [watching](Self::watch) source belongs to another space. The cache would not learn of
    ///   changes.
    /// - Settings contradict each other: [`Match::Exact`] with [`Merge::Touching`] or
    ///   [`Overlap::Merge`], or [`Merge::Touching`] with [`Overlap::Wait`].
    /// - [`max_registration`](Self::max_registration) is less than one page.
    pub fn build(self, space: &AddressSpace, device: D) -> RegistrationCache<D> {
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        assert!(
            self.uffd
                .as_ref()
                .is_none_or(|uffd| Arc::ptr_eq(uffd.space().shared(), space.shared())),
            "the `Uffd` that watches for a cache tells another space than the cache's: open it for this one"
        );
        RegistrationCache { core: Arc::new(Core::new(space, device, self)) }
    }
}

/// Caches registrations of one device by address. This is a handle, and cheap to clone.
///
/// [`get`](Self::get) returns a [`Registration`]. [`builder`](Self::builder) has the settings.
///
/// # Dropping
/// Dropping the last handle:
/// - ends the attempts to register that are under way;
/// - asks the device to deregister what is idle, without waiting for it. To wait, await
///   [`flush`](Self::flush) first;
/// - leaves what is in use registered until its [`Registration`]s are dropped.
///
/// An invalidation still waits for all of these, and deregisters the rest.
///
/// # In a child of `fork`
/// A cache that [watches](Builder::watch) belongs to the process that made it (M4). In a child,
/// [`get`](Self::get) returns [`GetError::Unwatched`]. [`flush`](Self::flush) and all drops do
/// nothing.
pub struct RegistrationCache<D: Device> {
    core: Arc<Core<D>>,
}

impl<D: Device> Clone for RegistrationCache<D> {
    fn clone(&self) -> Self {
        Self { core: self.core.clone() }
    }
}

impl<D: Device> Drop for RegistrationCache<D> {
    fn drop(&mut self) {
        if self.core.is_inert() {
            // Leaks a reference, so that this drop is never the last.
            ::core::mem::forget(self.core.clone());
        }
    }
}

impl<D: Device> RegistrationCache<D> {
    /// Makes a cache without limits that watches nothing (K5).
    ///
    /// It learns only of changes that the space is told of: by [`AddressSpace::invalidate`] or by
    /// an `OwnedMapping` of the space. For memory that other code unmaps, use [`Builder::watch`];
    /// an open `Uffd` alone is not enough.
    pub fn new(space: &AddressSpace, device: D) -> Self {
        Builder::default().build(space, device)
    }

    /// Returns settings for a cache. [`build`](Builder::build) infers the type of the device.
    ///
    /// ```
    /// # use shootdown::cache::{Device, RegistrationCache, StillRegistered};
    /// # use shootdown::{AddressRange, AddressSpace};
    /// # struct Nic;
    /// # impl Device for Nic {
    /// #     type Handle = u32;
    /// #     type Error = std::io::Error;
    /// #     async fn register(&self, _: AddressRange) -> std::io::Result<u32> {
    /// #         Ok(1)
    /// #     }
    /// #     async fn deregister(
    /// #         &self,
    /// #         _: AddressRange,
    /// #         _: u32,
    /// #     ) -> Result<(), StillRegistered<u32, std::io::Error>> {
    /// #         Ok(())
    /// #     }
    /// # }
    /// let space = AddressSpace::new();
    /// let cache = RegistrationCache::builder()
    ///     .max_registrations(1000)
    ///     .build(&space, Nic);
    /// ```
    pub fn builder() -> Builder<D> {
        Builder::default()
    }

    /// Returns a registration that covers `range`, from the cache or newly made.
    ///
    /// If several callers miss one range at the same time, one registers and the others wait for
    /// it. For a range larger than [`Builder::max_registration`], use [`get_all`](Self::get_all).
    ///
    /// The registration is of the current memory: an invalidation that began before this resolves
    /// is over, or waits until the registration is dropped. A registration made while the space's
    /// gate was closed counts once the gate is open, unless an invalidation has withdrawn it by
    /// then.
    ///
    /// Do not await this while you hold a registration of an overlapping range that may have been
    /// invalidated: it waits until that one is dropped (K1).
    ///
    /// # Errors
    /// [`GetError`] names the reason.
    ///
    /// # Panics
    /// A panic of the device is returned as [`GetError::Panicked`].
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. A registration that has begun belongs to the cache,
    /// and the next task that needs it finishes it.
    pub fn get(
        &self,
        range: AddressRange,
    ) -> Waitable<impl Future<Output = Result<Registration<D>, GetError<D::Error>>>> {
        Waitable::new(self.get_or_register(range))
    }

    async fn get_or_register(
        &self,
        range: AddressRange,
    ) -> Result<Registration<D>, GetError<D::Error>> {
        if self.core.is_inert() {
            return Err(forked());
        }
        if let Some(live) = self.core.hit(range) {
            return Ok(Registration { live });
        }
        // Boxed, so that the future of a hit is small.
        let miss = miss::one(&self.core, range);
        LeftToParent::new(miss, || self.core.is_inert(), || Err(forked()))
            .await
            .map(|live| Registration { live })
    }

    /// Returns registrations that together cover `range`, in order of their addresses.
    ///
    /// There are as many as [`Builder::max_registration`] requires, and one without that limit. The
    /// range is cut from its first page on, so only the last piece is smaller than the limit.
    /// Pieces that were registered before are found again.
    ///
    /// All or none (K8): the call holds no registration while it waits. If it fails or is dropped,
    /// it leaves none in use, and what it has registered stays in the cache as idle. Limits do not
    /// evict the pieces meanwhile. An invalidation does not wait for them; they are registered
    /// again ([`Builder::tries`]).
    ///
    /// # Errors
    /// [`GetError`] of the first piece that fails, but never [`GetError::TooLarge`].
    ///
    /// # Panics
    /// A panic of the device is returned as [`GetError::Panicked`].
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment, as that of [`get`](Self::get).
    #[expect(clippy::type_complexity, reason = "an alias cannot have the future in it")]
    pub fn get_all(
        &self,
        range: AddressRange,
    ) -> Waitable<impl Future<Output = Result<Vec<Registration<D>>, GetError<D::Error>>>> {
        Waitable::new(self.get_or_register_all(range))
    }

    async fn get_or_register_all(
        &self,
        range: AddressRange,
    ) -> Result<Vec<Registration<D>>, GetError<D::Error>> {
        if self.core.is_inert() {
            return Err(forked());
        }
        let all = miss::all(&self.core, range);
        let all = LeftToParent::new(all, || self.core.is_inert(), || Err(forked())).await?;
        Ok(all.into_iter().map(|live| Registration { live }).collect())
    }

    /// Gives up all registrations (K3), and waits until those not in use are deregistered.
    ///
    /// After it no earlier registration is found. Attempts that the device has not finished are
    /// begun again. A registration in use is deregistered when its users release it; this call does
    /// not wait for it.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. A later call deregisters what was given up.
    pub fn flush(&self) -> Waitable<impl Future<Output = ()>> {
        self.flush_range(AddressRange::ALL)
    }

    /// Gives up the registrations that overlap `range` (K3), and waits until those not in use are
    /// deregistered. [`flush`](Self::flush) does so for all.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment, as that of [`flush`](Self::flush).
    pub fn flush_range(&self, range: AddressRange) -> Waitable<impl Future<Output = ()>> {
        Waitable::new(self.flush_all_in(range))
    }

    async fn flush_all_in(&self, range: AddressRange) {
        if !self.core.is_inert() {
            LeftToParent::new(self.core.flush(range), || self.core.is_inert(), || ()).await;
        }
    }

    /// Returns the counters of the cache and the size of its content.
    pub fn stats(&self) -> CacheStats {
        self.core.stats()
    }

    /// Returns the device.
    pub fn device(&self) -> &D {
        self.core.device.device()
    }
}

fn forked<E>() -> GetError<E> {
    GetError::Unwatched(Unwatched::Forked)
}

impl<D: Device> fmt::Debug for RegistrationCache<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("RegistrationCache");
        // In a child of `fork` a thread of the parent may hold the lock for ever.
        if !self.core.is_inert() {
            debug.field("stats", &self.stats());
        }
        debug.finish_non_exhaustive()
    }
}

/// Keeps memory registered. [`RegistrationCache::get`] returns it.
///
/// Drop it when the device's work on the memory is done. An invalidation of the memory waits for
/// that, even after the cache is gone.
///
/// The drop does not call the device while a handle of the cache exists. Without one no later call
/// of the cache would, so the drop asks the device at once, and does not wait for it.
#[must_use = "the device may use the memory as long as the registration exists"]
pub struct Registration<D: Device> {
    live: Arc<Live<D>>,
}

impl<D: Device> Registration<D> {
    /// Returns the registered range. It covers the requested range.
    #[inline]
    pub fn range(&self) -> AddressRange {
        self.live.range
    }

    /// Returns the offset of `address` from the first registered byte, or `None` if the
    /// registration does not contain it. Devices address memory by a handle and an offset.
    ///
    /// A registration may begin before the requested range. Take the offset from here, not from the
    /// range given to [`get`](RegistrationCache::get).
    #[inline]
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        self.live.range.contains(address).then(|| address - self.live.range.start())
    }

    /// Returns the device's handle of the registration.
    #[inline]
    pub fn handle(&self) -> &D::Handle {
        self.live.handle()
    }
}

impl<D: Device> Clone for Registration<D> {
    fn clone(&self) -> Self {
        Self { live: self.live.clone() }
    }
}

impl<D: Device> fmt::Debug for Registration<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("range", &self.range()).finish_non_exhaustive()
    }
}
