//! A registration cache that is never stale: device mappings of the program's own memory, kept for
//! the next use.
//!
//! To register memory with a device (an RDMA memory region, an io_uring fixed buffer, a GPU's user
//! pointer) takes microseconds, so programs keep registrations. A kept registration is wrong as soon
//! as its memory is unmapped: the device still has the old pages. [`RegistrationCache`] is told of
//! that by the [`AddressSpace`]: an invalidation takes the registration out of the look-up in its
//! first pass, and its guard is handed out when the last user has let go and the device has
//! deregistered it.
//!
//! ```
//! use shootdown::cache::{Device, RegistrationCache};
//! use shootdown::{AddressRange, AddressSpace, Event};
//!
//! struct Nic;
//! impl Device for Nic {
//!     type Handle = u32; // a key
//!     type Error = std::io::Error;
//!     async fn register(&self, range: AddressRange) -> Result<u32, std::io::Error> {
//!         Ok(range.start() as u32)
//!     }
//!     async fn deregister(&self, _: AddressRange, _: &u32) -> Result<(), std::io::Error> {
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
//!   ([`Callback::Device`]).
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
//! mod       RegistrationCache, Registration: get, flush
//!  └ core      what all handles share: limits, counts, the shelf
//!     └ life      all that waits: an attempt, the end of a registration
//!        └ entry     one registration: its phases, its notifier, its users
//!           └ device    Device, and the one place that calls it
//!              └ watch     who says when memory goes away
//!                 └ settings  what goes in and comes out
//! task      a future that belongs to nobody (uses none of the above)
//! table     look-up, attempts, what is given up first (knows no device)
//! ```
//! Each file imports only those below it (`tests/source_rules.rs` looks).
#![forbid(unsafe_code)]

mod core;
mod device;
mod entry;
mod life;
mod settings;
mod table;
mod task;
#[cfg(test)]
mod tests;
mod watch;

use self::core::{Core, Found};
use crate::block::Waitable;
use crate::engine::gate::Since;
use crate::foreign::Callback;
use crate::fork::LeftToParent;
use crate::range::AddressRange;
use crate::space::AddressSpace;
use crate::sync::{Arc, Ordering};
use ::core::fmt;
pub use device::Device;
use entry::{Entry, Live, Outcome};
pub use settings::{Builder, CacheStats, Failure, GetError, Merge, Operation};
use watch::Unwatched;

/// So often in a row the same change ends an attempt before the device is taken to raise it itself.
const SAME_CHANGE: u32 = 8;

impl Builder {
    /// Makes the cache.
    ///
    /// # Panics
    /// When what [watches](Self::watch) tells another space: then nobody would say when the memory
    /// goes away.
    pub fn build<D: Device>(self, space: &AddressSpace, device: D) -> RegistrationCache<D> {
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        assert!(
            self.uffd.as_ref().is_none_or(|uffd| Arc::ptr_eq(uffd.space().shared(), space.shared())),
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

/// How often a caller has tried to have its range registered.
struct Tries<D: Device> {
    made: u32,
    /// What the device has registered at the last try, if it was not found then.
    registered: Option<Arc<Entry<D>>>,
    last: Option<entry::Change>,
    same: u32,
    made_room: bool,
    /// Its neighbours were too much, so it is registered without them.
    alone: bool,
    /// What was registered at an earlier try was given up to make room for others: the next is
    /// taken at once.
    hurried: bool,
}

impl<D: Device> Tries<D> {
    /// Whether the same change has come too often in a row.
    fn collided(&mut self, by: Option<entry::Change>) -> bool {
        self.same = if by.is_some() && by == self.last { self.same + 1 } else { 1 };
        self.last = by;
        by.is_some() && self.same >= SAME_CHANGE
    }

    /// What was registered at the last try was taken away before the caller had it. Whether the same
    /// change has done so too often.
    fn overtaken(&mut self, core: &Core<D>, entry: &Entry<D>) -> bool {
        let Some(by) = entry.ended_by() else {
            // Nothing has changed: others needed room.
            self.made -= 1;
            self.hurried = true;
            return false;
        };
        core.collisions.fetch_add(1, Ordering::Relaxed);
        self.collided(Some(by))
    }
}

impl<D: Device> RegistrationCache<D> {
    /// Makes a cache without limits that watches nothing (K5): it learns only of what is told to the
    /// space, by [`AddressSpace::invalidate`] or by an `OwnedMapping` of it. For memory that others
    /// unmap, [`Builder::watch`] it; an open `Uffd` alone is not enough.
    pub fn new(space: &AddressSpace, device: D) -> Self {
        Builder::default().build(space, device)
    }

    /// Returns settings for a cache.
    pub fn builder() -> Builder {
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
    pub fn get(&self, range: AddressRange) -> Waitable<impl Future<Output = Result<Registration<D>, GetError<D::Error>>>> {
        Waitable::new(self.get_or_register(range))
    }

    async fn get_or_register(&self, range: AddressRange) -> Result<Registration<D>, GetError<D::Error>> {
        if self.core.is_inert() {
            return Err(forked());
        }
        if let Some(live) = self.core.hit(range) {
            return Ok(Registration { live });
        }
        // Boxed, so that the future of a hit is small.
        LeftToParent::new(self.miss(range), || self.core.is_inert(), || Err(forked())).await
    }

    async fn miss(&self, range: AddressRange) -> Result<Registration<D>, GetError<D::Error>> {
        let core = &self.core;
        core.misses.fetch_add(1, Ordering::Relaxed);
        let mut tries = Tries { made: 0, registered: None, last: None, same: 0, made_room: false, alone: false, hurried: false };
        loop {
            if core.space.shared().gate.is_closed() {
                let mut since = Since::default();
                ::core::future::poll_fn(|cx| core.space.shared().poll_gate(&mut since, cx)).await;
            }
            let (claim, now) = match core.find_or_begin(range, tries.alone)? {
                Found::Live(live) => return Ok(Registration { live }),
                Found::Attempt(claim, now) => (claim, now),
            };
            // Registered, and then taken away before the gate had opened, or while there was waited for room.
            let overtaken = tries.registered.take().is_some_and(|entry| tries.overtaken(core, &entry));
            if overtaken || tries.made >= core.limits.tries.max(1) {
                return Err(GetError::Invalidated { tries: tries.made });
            }
            tries.made += 1;
            let entry = claim.entry().clone();
            let attempt = life::attempt(&entry, now, || core.device.source.watch(entry.range)).await;
            // From the table, not from the attempt. Before the limits are looked at, so that it is in use.
            let registration = core.look_up(range, now).map(|live| Registration { live });
            drop(claim);
            let gone = core.tidy();
            if (gone.is_empty() || tries.hurried)
                && let Some(registration) = registration
            {
                // Those who come later look after what is to go.
                return Ok(registration);
            }
            // A `get` that is not polled must not hold a registration.
            drop(registration);
            core::until_gone(gone).await;
            if let Some(live) = core.look_up(range, now) {
                return Ok(Registration { live });
            }
            let no_room = match attempt {
                Ok(Outcome::Live) => {
                    tries.registered = Some(entry);
                    continue;
                }
                Ok(Outcome::Collided(by)) => {
                    core.collisions.fetch_add(1, Ordering::Relaxed);
                    if tries.collided(by) {
                        return Err(GetError::Invalidated { tries: tries.made });
                    }
                    continue;
                }
                Ok(Outcome::Panicked(message)) => return Err(GetError::Panicked { message }),
                Err(Unwatched::Refused(why)) => return Err(GetError::Unwatched(why)),
                Ok(Outcome::Failed(error)) => GetError::Register(error),
                Err(Unwatched::NoRoom(why)) => GetError::Unwatched(why),
            };
            if !core.make_room().await || ::core::mem::replace(&mut tries.made_room, true) {
                // Its neighbours may be what is too much.
                if tries.alone || entry.range == core.limits.pages(range) {
                    return Err(no_room);
                }
                tries.alone = true;
            }
            // The device's error is the device's code.
            core.device.losses.run(Callback::Device, |_| drop(no_room));
            tries.made -= 1;
        }
    }

    /// Gives up all registrations that nobody uses, and waits until they and those on their way
    /// out, which some may use, are deregistered.
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
    GetError::Unwatched("the cache belongs to the process that this one was forked from: make another one".into())
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
