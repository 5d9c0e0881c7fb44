//! A registration cache that is never stale: device mappings of the program's own memory, kept for the next use.
//!
//! To register memory with a device (an RDMA memory region, an io_uring fixed buffer, a GPU's user pointer) takes microseconds, so programs keep
//! registrations. A kept registration is wrong as soon as its memory is unmapped: the device still has the old pages. [`RegistrationCache`]
//! is told of that by the [`AddressSpace`]: an invalidation takes the registration out of the look-up in its first pass, and its guard is handed out when the
//! last user has let go and the device has deregistered it.
//!
//! ```
//! use shootdown::cache::{Device, RegistrationCache};
//! use shootdown::{AddressRange, AddressSpace, Event};
//!
//! struct Nic;
//! impl Device for Nic {
//!     type Handle = u32; // a key
//!     type Error = std::io::Error;
//!     async fn register(&self, range: AddressRange) -> Result<u32, std::io::Error> { Ok(range.start() as u32) }
//!     async fn deregister(&self, _range: AddressRange, _key: &u32) -> Result<(), std::io::Error> { Ok(()) }
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
#![forbid(unsafe_code)]

mod attempt;
mod inner;
mod table;

use crate::range::AddressRange;
use crate::space::AddressSpace;
use crate::sync::Arc;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::task::Poll;
use futures::future::join_all;
use inner::{Found, Inner};
use table::{Live, Outcome};

/// What memory is registered with.
///
/// Both futures are polled by whoever needs them: a caller of [`get`](RegistrationCache::get), or an invalidation that waits for a registration to
/// go. They must not call the cache or wait for an invalidation of its space.
pub trait Device: Send + Sync + 'static {
    /// What a registration is known by: a key, an index.
    type Handle: Send + Sync + 'static;
    /// Why the device refused.
    type Error: core::error::Error + Send + Sync + 'static;

    /// Maps `range` for the device. Once begun it is polled to its end, unless the whole cache is dropped.
    fn register(&self, range: AddressRange) -> impl Future<Output = Result<Self::Handle, Self::Error>> + Send;

    /// Ends a registration: when this resolves to `Ok`, the device does not use the memory any more. Called once the last user has let go. After an error
    /// the device is taken to use the memory still; it is called again at once, three times in all, and then whenever the cache is used.
    fn deregister(&self, range: AddressRange, handle: &Self::Handle) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// A device that failed, as [`Builder::on_failure`] is told of it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Failure<'a> {
    /// What was to be registered or deregistered.
    pub range: AddressRange,
    /// Which of the two.
    pub operation: Operation,
    /// What the device answered.
    pub error: &'a (dyn core::error::Error + 'static),
}

/// What a [`Device`] was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Device::register`]: the caller is told, unless giving up idle registrations helps.
    Register,
    /// [`Device::deregister`]: it is tried again, and an invalidation of the memory waits.
    Deregister,
}

pub(crate) type Reporter = Box<dyn Fn(&Failure<'_>) + Send + Sync>;

/// Which registrations become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Merge {
    /// Each miss registers its own pages.
    #[default]
    Never,
    /// A miss registers its pages and those of all registrations that overlap or touch them, which it replaces. Users of those keep
    /// them until they let go.
    Touching,
}

/// Settings of a [`RegistrationCache`].
pub struct Builder {
    pub(crate) max_bytes: u64,
    pub(crate) max_registrations: usize,
    pub(crate) page: u64,
    pub(crate) merge: Merge,
    pub(crate) tries: u32,
    pub(crate) on_failure: Option<Reporter>,
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub(crate) uffd: Option<crate::source::Uffd>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            max_bytes: u64::MAX,
            max_registrations: usize::MAX,
            page: 4096,
            merge: Merge::Never,
            tries: 64,
            on_failure: None,
            #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
            uffd: None,
        }
    }
}

impl Builder {
    /// Idle registrations are given up, the one used longest ago first, while more than `bytes` are registered; no limit by default.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// The same for the number of registrations.
    pub fn max_registrations(mut self, registrations: usize) -> Self {
        self.max_registrations = registrations;
        self
    }

    /// Registrations begin and end at multiples of `page` bytes, a power of two; 4096 by default.
    ///
    /// # Panics
    /// When it is none.
    pub fn page(mut self, page: u64) -> Self {
        assert!(page.is_power_of_two(), "a page is a power of two, not {page}");
        self.page = page;
        self
    }

    /// Which registrations become one; [`Merge::Never`] by default.
    pub fn merge(mut self, merge: Merge) -> Self {
        self.merge = merge;
        self
    }

    /// How often a registration is begun again because its memory was invalidated meanwhile; 64 by default.
    pub fn tries(mut self, tries: u32) -> Self {
        self.tries = tries;
        self
    }

    /// Calls `reporter` each time the device fails, also where no caller is told: a deregistration that an invalidation or a limit began. Outside of all
    /// locks; like the device it must not call the cache.
    pub fn on_failure(mut self, reporter: impl Fn(&Failure<'_>) + Send + Sync + 'static) -> Self {
        self.on_failure = Some(Box::new(reporter));
        self
    }

    /// Watches what is registered, for memory that somebody else unmaps. Its space should be the cache's.
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    pub fn watch(mut self, uffd: crate::source::Uffd) -> Self {
        self.uffd = Some(uffd);
        self
    }

    /// Makes the cache.
    pub fn build<D: Device>(self, space: &AddressSpace, device: D) -> RegistrationCache<D> {
        let inner = Arc::new(Inner::new(space, device, self));
        RegistrationCache { handles: Arc::new(Handles(inner.clone())), inner }
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("max_bytes", &self.max_bytes)
            .field("max_registrations", &self.max_registrations)
            .field("merge", &self.merge)
            .finish_non_exhaustive()
    }
}

/// Why there is no registration.
#[derive(Debug)]
#[non_exhaustive]
pub enum GetError<E> {
    /// The device refused, also after all idle registrations had been given up.
    Register(Arc<E>),
    /// The memory was invalidated during each try: see [`Builder::tries`].
    Invalidated {
        /// Tries that were made.
        tries: u32,
    },
    /// The space was [released](AddressSpace::release), or the source of its invalidations refused to watch the memory, for this reason.
    Unwatched(alloc::string::String),
}

impl<E: fmt::Display> fmt::Display for GetError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Register(error) => write!(f, "the device refused to register the memory: {error}"),
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
    /// Registrations that were given up because of a limit, or so that the device had room.
    pub evictions: u64,
    /// Registrations that an invalidation ended.
    pub invalidations: u64,
    /// Registrations that were begun again because of an invalidation.
    pub collisions: u64,
    /// Times that the device failed to register.
    pub register_failures: u64,
    /// Times that the device failed to deregister.
    pub deregister_failures: u64,
    /// Registrations that look-ups find.
    pub registrations: u64,
    /// Bytes that the device has mapped, those included that are on their way out.
    pub pinned_bytes: u64,
}

/// Registrations of one device, by address. A handle: cheap to clone.
///
/// Dropping the last one gives up what is being registered at that moment. It does not wait for the device: to have it deregister what is cached, await
/// [`flush`](Self::flush) before.
pub struct RegistrationCache<D: Device> {
    inner: Arc<Inner<D>>,
    handles: Arc<Handles<D>>,
}

/// What all handles of a cache share and nothing in the cache does: attempts own the table that they are in.
struct Handles<D: Device>(Arc<Inner<D>>);

impl<D: Device> Drop for Handles<D> {
    fn drop(&mut self) {
        self.0.abandon_attempts();
    }
}

impl<D: Device> Clone for RegistrationCache<D> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), handles: self.handles.clone() }
    }
}

impl<D: Device> RegistrationCache<D> {
    /// A cache without limits.
    pub fn new(space: &AddressSpace, device: D) -> Self {
        Builder::default().build(space, device)
    }

    /// Settings for a cache.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// A registration that covers `range`, from the cache or made now. Of misses of one range at the same time, one registers and the others wait for it.
    ///
    /// The registration is of memory as it is: an invalidation that began before this resolves is over, or waits for the registration to be
    /// dropped.
    ///
    /// # Errors
    /// [`GetError`].
    ///
    /// # Cancel safety
    /// May be dropped at any moment. A registration that has begun belongs to the cache and is finished by whoever needs it next.
    pub async fn get(&self, range: AddressRange) -> Result<Registration<D>, GetError<D::Error>> {
        if let Some(live) = self.inner.hit(range) {
            return Ok(Registration { live });
        }
        // Boxed, so that the future of a hit is small.
        Box::pin(self.miss(range)).await
    }

    async fn miss(&self, range: AddressRange) -> Result<Registration<D>, GetError<D::Error>> {
        let inner = &self.inner;
        inner.count(|stats| stats.misses += 1);
        let (mut tries, mut made_room) = (0, false);
        loop {
            core::future::poll_fn(|cx| inner.space.shared().poll_gate(cx)).await;
            let attempt = match inner.find_or_begin(range)? {
                Found::Live(live) => return Ok(Registration { live }),
                Found::Attempt(attempt) => attempt,
            };
            let outcome = attempt.await;
            // From the table, not from the attempt: a `get` that is not polled must not hold a registration. Before the limits are looked at, so that it
            // is in use.
            let live = inner.hit_again(range);
            self.sweep().await;
            if let Some(live) = live {
                return Ok(Registration { live });
            }
            match outcome {
                Outcome::Live => tries += 1,
                Outcome::Collided => {
                    tries += 1;
                    inner.count(|stats| stats.collisions += 1);
                }
                Outcome::Failed(error) => {
                    let idle = inner.evict_all_idle();
                    if idle.is_empty() || made_room {
                        return Err(GetError::Register(error));
                    }
                    made_room = true;
                    join_all(idle).await;
                }
            }
            if tries >= inner.settings.tries {
                return Err(GetError::Invalidated { tries });
            }
        }
    }

    /// Gives up what the limits say, and goes on with what is on its way out.
    async fn sweep(&self) {
        join_all(self.inner.evict_over_limits()).await;
        let mut leaving = self.inner.leaving();
        // Those that have users end when these let go, and those whose device refuses are tried again another time: neither is waited for here.
        core::future::poll_fn(|cx| {
            leaving.retain_mut(|leaving| core::pin::Pin::new(&mut leaving.teardown).poll(cx).is_pending());
            if leaving.iter().any(|leaving| leaving.is_idle() && !leaving.is_stuck()) { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    /// Gives up all registrations that nobody uses, and waits until they and those on their way out are deregistered.
    pub async fn flush(&self) {
        let mut all: Vec<_> = self.inner.evict_all_idle();
        all.extend(self.inner.leaving().into_iter().map(|leaving| leaving.teardown));
        join_all(all).await;
    }

    /// What happened so far, and what is cached.
    pub fn stats(&self) -> CacheStats {
        self.inner.stats()
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.inner.device
    }
}

impl<D: Device> fmt::Debug for RegistrationCache<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistrationCache").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// Memory that is registered as long as this exists. Let go of it when the device's work on the memory is done: an invalidation of the
/// memory waits for that.
#[must_use = "the device may use the memory as long as the registration exists"]
pub struct Registration<D: Device> {
    live: Arc<Live<D>>,
}

impl<D: Device> Registration<D> {
    /// What is registered: covers what was asked for.
    #[inline]
    pub fn range(&self) -> AddressRange {
        self.live.range
    }

    /// What the device knows it by.
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
