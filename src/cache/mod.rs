//! A registration cache that is never stale: device mappings of the program's own memory, kept for
//! the next use.
//!
//! To register memory with a device (an RDMA memory region, an io_uring fixed buffer, a GPU's user
//! pointer) takes microseconds, so programs keep registrations. A kept registration is wrong as
//! soon as its memory is unmapped: the device still has the old pages. [`RegistrationCache`] is
//! told of that by the [`AddressSpace`]: an invalidation takes the registration out of the look-up
//! in its first pass, and its guard is handed out when the last user has let go and the device has
//! deregistered it.
//!
//! ```
//! use shootdown::cache::{Device, RegistrationCache, StillRegistered};
//! use shootdown::{AddressRange, AddressSpace, Event};
//!
//! struct Nic;
//! impl Device for Nic {
//!     type Handle = u32; // a key
//!     type Error = std::io::Error;
//!     async fn register(&self, range: AddressRange) -> Result<u32, std::io::Error> {
//!         Ok(range.start() as u32)
//!     }
//!     async fn deregister(
//!         &self,
//!         _: AddressRange,
//!         _: u32,
//!     ) -> Result<(), StillRegistered<u32, std::io::Error>> {
//!         Ok(())
//!     }
//! }
//!
//! # futures::executor::block_on(async {
//! let space = AddressSpace::new();
//! let cache = RegistrationCache::new(&space, Nic);
//! let buffer = AddressRange::new(0x7000, 0x1000)?;
//!
//! let registration = cache.get(buffer).await?;    // registers
//! drop(registration);                             // stays cached
//! assert_eq!(*cache.get(buffer).await?.handle(), 0x7000);
//! assert_eq!(cache.stats().hits, 1);
//!
//! drop(space.invalidate(buffer, Event::Unmap).await); // deregistered now: unmap it
//! assert_eq!(cache.stats().registrations, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
//! ```
//!
//! # When something fails
//! - The device refuses to register: [`GetError::Register`], after all idle registrations have been
//!   given up and it was asked once more. It refuses to deregister: it is asked again by whoever
//!   waits, because it may still use the memory, so an invalidation waits until it succeeds. Others
//!   have their turn meanwhile.
//! - The device panics: [`GetError::Panicked`] for those who asked, or a failure to deregister like
//!   any other. No other range learns of it. A panic that no caller is told of is counted
//!   ([`Stats::lost_panics`](crate::Stats::lost_panics)) and reported
//!   ([`Callback::Device`](crate::Callback::Device)).
//! - The memory changes while the device registers: the registration is let go of and begun again,
//!   see [`Builder::tries`]. A device that changes the memory itself each time ends after eight
//!   tries with [`GetError::Invalidated`]; what it changes elsewhere does not matter.
//! - The process has no mapping left for a watch: as for a device without room.
//!
//! # How it is made
//! One registration is an ordinary driver of this crate: it has a notifier, a
//! [`DriverLock`](crate::DriverLock) and futures of its own, and the cache is the shelf on which
//! look-ups find it. So a registration outlives its cache, and a failure of the device concerns one
//! registration.
//!
//! ```text
//! mod       RegistrationCache, Registration: get, get_all, flush
//!  └ miss      what a get does that finds nothing
//!     └ way       what a caller in its turn takes out of its way
//!        └ core      what all handles share: limits, counts, the shelf
//!           └ life      all that waits: an attempt, the end of a registration
//!              └ claim     a caller's interest in a registration
//!                 └ entry     one registration: its notifier, its users
//!                    └ phase     how far it is
//!                       └ device    Device, and the one place that calls it
//!                          └ watch     who says when memory goes away
//!                             └ settings, error   what goes in and comes out
//! turns     whose turn it is where nothing may overlap (uses only task)
//! task      a future that belongs to nobody (uses none of the above)
//! table     look-up, attempts, what is given up first (knows no device)
//! ```
//! Each file imports only those below it (`tests/source_rules.rs` looks).
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
    /// Makes the cache.
    ///
    /// # Panics
    /// When what [watches](Self::watch) tells another space: then nobody would say when the memory
    /// goes away. When settings contradict each other: [`Match::Exact`] with [`Merge::Touching`] or
    /// [`Overlap::Merge`], [`Merge::Touching`] with [`Overlap::Wait`], a
    /// [`max_registration`](Self::max_registration) of less than one page.
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

/// Registrations of one device, by address. A handle: cheap to clone.
///
/// # Dropping
/// Dropping the last handle gives up what is being registered at that moment, and asks the device
/// to let go of what is idle, without waiting for it; to wait, await [`flush`](Self::flush) before.
/// What is in use stays registered until its [`Registration`]s are dropped. An invalidation waits
/// for all of it as before, and deregisters what is left.
///
/// # In a child of `fork`
/// A cache that [watches](Builder::watch) belongs to the process that made it: in a child,
/// [`get`](Self::get) is [`GetError::Unwatched`], [`flush`](Self::flush) and all drops do nothing.
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
            // So that this is never the last.
            ::core::mem::forget(self.core.clone());
        }
    }
}

impl<D: Device> RegistrationCache<D> {
    /// Makes a cache without limits that watches nothing (K5): it learns only of what is told to
    /// the space, by [`AddressSpace::invalidate`] or by an `OwnedMapping` of it. For memory that
    /// others unmap, [`Builder::watch`] it; an open `Uffd` alone is not enough.
    pub fn new(space: &AddressSpace, device: D) -> Self {
        Builder::default().build(space, device)
    }

    /// Returns settings for a cache. The device's type follows from what
    /// [`build`](Builder::build) is given.
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
    /// let cache = RegistrationCache::builder().max_registrations(1000).build(&space, Nic);
    /// ```
    pub fn builder() -> Builder<D> {
        Builder::default()
    }

    /// Returns a registration that covers `range`, from the cache or made now. Of misses of one
    /// range at the same time, one registers and the others wait for it.
    ///
    /// The registration is of memory as it is: an invalidation that began before this resolves is
    /// over, or waits for the registration to be dropped. What was registered while the space's
    /// gate was closed counts once it is open, unless an invalidation has taken it by then.
    ///
    /// Do not await it while you hold a registration of an overlapping range that may have been
    /// invalidated: it waits for that one to be dropped (K1).
    ///
    /// # Errors
    /// [`GetError`].
    ///
    /// # Panics
    /// Never because of the device: see [`GetError::Panicked`].
    ///
    /// # Cancel safety
    /// May be dropped at any moment. A registration that has begun belongs to the cache and is
    /// finished by whoever needs it next.
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

    /// Returns registrations that cover `range` together, in order of their addresses: as many as
    /// [`Builder::max_registration`] makes necessary, one without it. The range is cut from its
    /// first page on, so that only the last piece is smaller than the limit; what was registered
    /// before in the same pieces is found again.
    ///
    /// All or none: it holds no registration while it waits, and on an error or when it is dropped
    /// none is in use because of it. What it has registered by then stays in the cache like
    /// anything idle. Limits leave the pieces alone meanwhile; an invalidation does not wait for
    /// them, and makes them be registered again ([`Builder::tries`]).
    ///
    /// # Errors
    /// [`GetError`], of the first piece that fails; never [`GetError::TooLarge`].
    ///
    /// # Panics
    /// Never because of the device.
    ///
    /// # Cancel safety
    /// As of [`get`](Self::get).
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

    /// Gives up all registrations: none that was made before is found again, and what the device
    /// was asked for and has not finished is asked for again. Waits until those that nobody uses
    /// are deregistered. What is in use is deregistered when its users have let go, and not waited
    /// for.
    ///
    /// # Cancel safety
    /// May be dropped at any moment: what was given up is deregistered by whoever comes next.
    pub fn flush(&self) -> Waitable<impl Future<Output = ()>> {
        self.flush_range(AddressRange::ALL)
    }

    /// Does what [`flush`](Self::flush) does for registrations that overlap `range` only.
    ///
    /// # Cancel safety
    /// As of [`flush`](Self::flush).
    pub fn flush_range(&self, range: AddressRange) -> Waitable<impl Future<Output = ()>> {
        Waitable::new(self.flush_all_in(range))
    }

    async fn flush_all_in(&self, range: AddressRange) {
        if !self.core.is_inert() {
            LeftToParent::new(self.core.flush(range), || self.core.is_inert(), || ()).await;
        }
    }

    /// Counts what happened so far, and what is cached.
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
        // In a child of `fork` somebody may hold the lock for ever.
        if !self.core.is_inert() {
            debug.field("stats", &self.stats());
        }
        debug.finish_non_exhaustive()
    }
}

/// Memory that is registered as long as this exists. Let go of it when the device's work on the
/// memory is done: an invalidation of the memory waits for that, also when the cache is gone.
///
/// Its drop does not call the device, unless the last handle of the cache is gone: then nobody else
/// might, and the device is asked at once and not waited for.
#[must_use = "the device may use the memory as long as the registration exists"]
pub struct Registration<D: Device> {
    live: Arc<Live<D>>,
}

impl<D: Device> Registration<D> {
    /// Returns what is registered: it covers what was asked for.
    #[inline]
    pub fn range(&self) -> AddressRange {
        self.live.range
    }

    /// Returns how many bytes `address` lies after the first byte of what is registered: devices
    /// address memory by a handle and an offset. `None` if it is not registered with this.
    ///
    /// A registration may begin before what was asked for: take the offset from here, and not from
    /// the range that `get` was given.
    #[inline]
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        self.live.range.contains(address).then(|| address - self.live.range.start())
    }

    /// Returns what the device knows it by.
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
