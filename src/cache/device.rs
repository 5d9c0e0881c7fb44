//! The [`Device`] trait, and the only code that calls it (K2).
#![forbid(unsafe_code)]

use super::error::DevicePanic;
use super::settings::{Failure, Operation, Reporter};
use super::table::bytes;
use super::watch::Source;
use crate::foreign::{Callback, Losses, Panic, keep};
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicBool, AtomicU64, Lock, Ordering, Weak};
use alloc::vec::Vec;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use pin_project::{pin_project, pinned_drop};

/// Registers memory with a device on behalf of a [`RegistrationCache`](super::RegistrationCache).
///
/// Any task that needs them polls the futures: a caller of [`get`](super::RegistrationCache::get),
/// an invalidation that waits for a registration, or, once the last handle of the cache is gone,
/// the task that drops a registration. The methods must not call the cache or wait for an
/// invalidation of its space.
///
/// # Panics
/// A panic of a method or of its future affects only the registration that it was called for:
/// - [`register`](Self::register): the caller gets
///   [`GetError::Panicked`](super::GetError::Panicked).
/// - [`deregister`](Self::deregister): counts as a failure that took the handle. The cache calls
///   [`deregister_lost`](Self::deregister_lost) instead.
/// - [`still_valid`](Self::still_valid): counts as `false`.
pub trait Device: Send + Sync + 'static {
    /// Identifies a registration: a key or an index.
    type Handle: Send + Sync + 'static;
    /// Reason why the device refused.
    type Error: core::error::Error + Send + Sync + 'static;

    /// Maps `range` for the device.
    ///
    /// The range is the requested one, extended to whole [pages](super::Builder::page).
    /// [`Merge`](super::Merge), [`Match`](super::Match) and [`Overlap`](super::Overlap) can make it
    /// larger or smaller. The future is polled to its end. If the last handle of the cache is
    /// dropped meanwhile, the future is dropped and must leave nothing mapped.
    ///
    /// If `register` itself changes the memory and the space learns of it, the registration
    /// predates the change and does not count. See [`Builder::tries`](super::Builder::tries).
    fn register(
        &self,
        range: AddressRange,
    ) -> impl Future<Output = Result<Self::Handle, Self::Error>> + Send;

    /// Ends a registration. Once this resolves to `Ok`, the device no longer uses the memory.
    ///
    /// Called after the last user has released the registration. Wait for work in flight here:
    /// await the device's fence first.
    ///
    /// The device drops the handle. A failure returns it in [`StillRegistered`]. The cache then
    /// assumes that the device still uses the memory, and calls again: three times at once, then
    /// from any task that waits, with more and more yields in between. The future is dropped
    /// unfinished, with the handle, only when neither the cache nor the space can be reached any
    /// more.
    ///
    /// # Panics
    /// A panic takes the handle with it. The cache assumes that the device still uses the memory,
    /// and calls [`deregister_lost`](Self::deregister_lost) from then on.
    fn deregister(
        &self,
        range: AddressRange,
        handle: Self::Handle,
    ) -> impl Future<Output = Result<(), StillRegistered<Self::Handle, Self::Error>>> + Send;

    /// Ends a registration whose handle was lost, because [`deregister`](Self::deregister)
    /// panicked.
    ///
    /// Returns `true` if the device no longer uses `range` through that registration, whatever this
    /// takes (a reset of the device). Other registrations may overlap `range`. Called again after
    /// an error or a panic, like `deregister`.
    ///
    /// Returns `false`, the default, if the device cannot know. The cache then assumes that it uses
    /// the memory for ever:
    /// - Invalidations of `range` do not end. [`AddressSpace::active`](crate::AddressSpace::active)
    ///   lists them.
    /// - `flush` and limits do not wait for the registration.
    /// - Where registrations must not overlap, a `get` beside it returns
    ///   [`GetError::Lost`](super::GetError::Lost).
    fn deregister_lost(
        &self,
        range: AddressRange,
    ) -> impl Future<Output = Result<bool, Self::Error>> + Send {
        let _ = range;
        core::future::ready(Ok(false))
    }

    /// Returns whether a registration that a look-up found still maps the memory at its addresses
    /// (K9). The default is `true` and costs nothing.
    ///
    /// Use it for memory whose changes no source reports. A GPU driver numbers its buffers, for
    /// example, and the handle can store that number. `false` treats the registration as
    /// invalidated: look-ups no longer find it, it is deregistered when its users release it, and
    /// the caller gets a new one.
    ///
    /// Called at each hit with the range of the registration and without a lock held, and again at
    /// the end of a call that had to wait. Not called for a registration made in the same poll. It
    /// must not call the cache.
    #[inline]
    fn still_valid(&self, range: AddressRange, handle: &Self::Handle) -> bool {
        let _ = (range, handle);
        true
    }
}

/// Error of a deregistration that failed. It returns the handle, because the device may still use
/// the memory.
#[derive(Debug)]
pub struct StillRegistered<H, E> {
    /// Handle of the registration, for the next try.
    pub handle: H,
    /// Reason why the device did not release the memory.
    pub error: E,
}

impl<D: Device> Device for Arc<D> {
    type Handle = D::Handle;
    type Error = D::Error;

    fn register(
        &self,
        range: AddressRange,
    ) -> impl Future<Output = Result<D::Handle, D::Error>> + Send {
        D::register(self, range)
    }

    fn deregister(
        &self,
        range: AddressRange,
        handle: D::Handle,
    ) -> impl Future<Output = Result<(), StillRegistered<D::Handle, D::Error>>> + Send {
        D::deregister(self, range, handle)
    }

    fn deregister_lost(
        &self,
        range: AddressRange,
    ) -> impl Future<Output = Result<bool, D::Error>> + Send {
        D::deregister_lost(self, range)
    }

    #[inline]
    fn still_valid(&self, range: AddressRange, handle: &D::Handle) -> bool {
        D::still_valid(self, range, handle)
    }
}

impl<D: Device> Device for &'static D {
    type Handle = D::Handle;
    type Error = D::Error;

    fn register(
        &self,
        range: AddressRange,
    ) -> impl Future<Output = Result<D::Handle, D::Error>> + Send {
        D::register(self, range)
    }

    fn deregister(
        &self,
        range: AddressRange,
        handle: D::Handle,
    ) -> impl Future<Output = Result<(), StillRegistered<D::Handle, D::Error>>> + Send {
        D::deregister(self, range, handle)
    }

    fn deregister_lost(
        &self,
        range: AddressRange,
    ) -> impl Future<Output = Result<bool, D::Error>> + Send {
        D::deregister_lost(self, range)
    }

    #[inline]
    fn still_valid(&self, range: AddressRange, handle: &D::Handle) -> bool {
        D::still_valid(self, range, handle)
    }
}

/// Result of a deregistration.
pub(super) enum Deregistered<H> {
    /// The device no longer uses the memory.
    Gone,
    /// The deregistration must be tried again. Holds no handle if a panic has taken it.
    Kept(Option<H>),
    /// The device cannot tell, now or later, whether it still uses the memory.
    Never,
}

/// Reason why a device did not register.
pub(super) enum Fault<E> {
    /// The device returned this error.
    Refused(Arc<E>),
    /// The device panicked with this message.
    Panicked(Option<Arc<str>>),
    /// The cache is gone, so no caller can want the registration.
    Cancelled,
}

/// A registration that the device has not released, while its cache and its last user are gone.
pub(super) trait Orphan: Send + Sync {
    /// Returns `true` if no invalidation of its space is possible any more. This never becomes
    /// `false` again.
    fn is_unreachable(&self) -> bool;
    /// Ends the device's future unfinished. Does nothing if the future is over or being polled: its
    /// poller then checks `is_unreachable` itself.
    fn give_up(&self);
}

/// A device whose panics are caught, and whose failures are counted and reported. The cache and
/// each of its registrations keep it alive.
pub(super) struct Guarded<D: Device> {
    /// `None` only during the drop.
    device: Option<D>,
    on_failure: Option<Reporter>,
    pub(super) losses: Arc<Losses>,
    pub(super) source: Source,
    pub(super) register_failures: AtomicU64,
    pub(super) deregister_failures: AtomicU64,
    pub(super) invalidations: AtomicU64,
    /// Bytes that the device has mapped, or may have mapped.
    pinned: Lock<u128>,
    orphans: Lock<Vec<Weak<dyn Orphan>>>,
}

impl<D: Device> Guarded<D> {
    pub(super) fn new(
        device: D,
        on_failure: Option<Reporter>,
        losses: Arc<Losses>,
        source: Source,
    ) -> Self {
        Self {
            device: Some(device),
            on_failure,
            losses,
            source,
            register_failures: AtomicU64::new(0),
            deregister_failures: AtomicU64::new(0),
            invalidations: AtomicU64::new(0),
            pinned: Lock::new(0),
            orphans: Lock::new(Vec::new()),
        }
    }

    pub(super) fn device(&self) -> &D {
        self.device.as_ref().expect("the device goes with the last who has it")
    }

    pub(super) fn pinned(&self) -> u64 {
        u64::try_from(*self.pinned.lock()).unwrap_or(u64::MAX)
    }

    fn unpin(&self, range: AddressRange) {
        *self.pinned.lock() -= bytes(range);
    }

    /// Gives up `orphan` if the space cannot be reached, now or when another registration of the
    /// device ends.
    pub(super) fn left_behind(&self, orphan: &Arc<dyn Orphan>) {
        // Pushed before the check: of two registrations that end at once, the later check sees the
        // other.
        self.orphans.lock().push(Arc::downgrade(orphan));
        self.look_at_orphans();
    }

    /// Gives up the orphans if their space cannot be reached.
    pub(super) fn look_at_orphans(&self) {
        while let Some(orphan) = self.an_orphan() {
            if !orphan.is_unreachable() {
                return;
            }
            // All orphans belong to one space. Their drops call this again, and find an empty list.
            let all = core::mem::take(&mut *self.orphans.lock());
            all.iter().filter_map(Weak::upgrade).for_each(|orphan| orphan.give_up());
        }
    }

    /// Returns any orphan that still exists.
    fn an_orphan(&self) -> Option<Arc<dyn Orphan>> {
        let mut orphans = self.orphans.lock();
        while let Some(last) = orphans.last() {
            if let Some(orphan) = last.upgrade() {
                return Some(orphan);
            }
            orphans.pop();
        }
        None
    }

    /// Registers `range`. `told` returns `true` if a caller waits that a panic is reported to.
    pub(super) async fn register(
        &self,
        range: AddressRange,
        cancelled: &AtomicBool,
        told: impl Fn() -> bool,
    ) -> Result<D::Handle, Fault<D::Error>> {
        *self.pinned.lock() += bytes(range);
        let ended = match keep(|_| self.device().register(range)) {
            Ok(future) => {
                Caught { future: Some(future), losses: &self.losses, cancelled: Some(cancelled) }
                    .await
            }
            Err(panic) => Ended::Panicked(panic),
        };
        let fault = match ended {
            Ended::Done(Ok(handle)) => return Ok(handle),
            Ended::Done(Err(error)) => {
                self.failed(&self.register_failures, range, Operation::Register, &error, false);
                Fault::Refused(Arc::new(error))
            }
            Ended::Panicked(panic) => {
                let message = self.panicked(
                    &self.register_failures,
                    range,
                    Operation::Register,
                    panic,
                    told(),
                );
                Fault::Panicked(message)
            }
            Ended::Cancelled => Fault::Cancelled,
        };
        self.unpin(range);
        Err(fault)
    }

    /// Deregisters `range`. Counts and reports a failure.
    pub(super) async fn deregister(
        &self,
        range: AddressRange,
        handle: Option<D::Handle>,
    ) -> Deregistered<D::Handle> {
        let ended = match handle {
            Some(handle) => match keep(|_| self.device().deregister(range, handle)) {
                Ok(future) => {
                    Caught { future: Some(future), losses: &self.losses, cancelled: None }.await
                }
                Err(panic) => Ended::Panicked(panic),
            }
            .map(|ended| {
                ended
                    .map(|()| true)
                    .map_err(|StillRegistered { handle, error }| (Some(handle), error))
            }),
            None => match keep(|_| self.device().deregister_lost(range)) {
                Ok(future) => {
                    Caught { future: Some(future), losses: &self.losses, cancelled: None }.await
                }
                Err(panic) => Ended::Panicked(panic),
            }
            .map(|ended| ended.map_err(|error| (None, error))),
        };
        match ended {
            Ended::Done(Ok(true)) => {
                self.unpin(range);
                Deregistered::Gone
            }
            Ended::Done(Ok(false)) => Deregistered::Never,
            Ended::Done(Err((handle, error))) => {
                self.failed(&self.deregister_failures, range, Operation::Deregister, &error, false);
                self.losses.run(Callback::Device, |_| drop(error));
                Deregistered::Kept(handle)
            }
            Ended::Panicked(panic) => {
                self.panicked(
                    &self.deregister_failures,
                    range,
                    Operation::Deregister,
                    panic,
                    false,
                );
                Deregistered::Kept(None)
            }
            Ended::Cancelled => Deregistered::Kept(None),
        }
    }

    /// Asks the device about a registration that a look-up found (K9).
    #[inline]
    pub(super) fn still_valid(&self, range: AddressRange, handle: &D::Handle) -> bool {
        let Some(device) = &self.device else { return true };
        match keep(|_| device.still_valid(range, handle)) {
            Ok(valid) => valid,
            Err(panic) => {
                self.losses.lose(Callback::Device, panic);
                false
            }
        }
    }

    fn failed(
        &self,
        count: &AtomicU64,
        range: AddressRange,
        operation: Operation,
        error: &(dyn core::error::Error + 'static),
        panicked: bool,
    ) {
        count.fetch_add(1, Ordering::Relaxed);
        if let Some(reporter) = &self.on_failure {
            self.losses.run(Callback::Device, |_| {
                reporter(&Failure { range, operation, error, panicked })
            });
        }
    }

    /// Counts and reports a panic, and returns its message. Unless a caller is `told`, the panic
    /// also counts as lost.
    fn panicked(
        &self,
        count: &AtomicU64,
        range: AddressRange,
        operation: Operation,
        panic: Panic,
        told: bool,
    ) -> Option<Arc<str>> {
        let message: Option<Arc<str>> = panic.message().map(Arc::from);
        self.failed(count, range, operation, &DevicePanic { message: message.clone() }, true);
        if !told {
            self.losses.lose(Callback::Device, panic);
        }
        message
    }
}

impl<D: Device> Drop for Guarded<D> {
    fn drop(&mut self) {
        let Self { device, on_failure, losses, .. } = self;
        losses.run(Callback::Device, |_| drop(device.take()));
        losses.run(Callback::Device, |_| drop(on_failure.take()));
    }
}

enum Ended<T> {
    Done(T),
    Panicked(Panic),
    Cancelled,
}

impl<T> Ended<T> {
    fn map<U>(self, change: impl FnOnce(T) -> U) -> Ended<U> {
        match self {
            Self::Done(done) => Ended::Done(change(done)),
            Self::Panicked(panic) => Ended::Panicked(panic),
            Self::Cancelled => Ended::Cancelled,
        }
    }
}

/// A future of the device. Catches a panic in its poll and in its drop.
#[pin_project(PinnedDrop)]
struct Caught<'a, F> {
    /// `None` once it has ended.
    #[pin]
    future: Option<F>,
    losses: &'a Losses,
    cancelled: Option<&'a AtomicBool>,
}

impl<F: Future> Future for Caught<'_, F> {
    type Output = Ended<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let ended = if this.cancelled.is_some_and(|cancelled| cancelled.load(Ordering::Acquire)) {
            Ended::Cancelled
        } else {
            match keep(|_| this.future.as_mut().as_pin_mut().map(|future| future.poll(cx))) {
                Ok(Some(Poll::Ready(output))) => Ended::Done(output),
                Ok(Some(Poll::Pending) | None) => return Poll::Pending,
                Err(panic) => Ended::Panicked(panic),
            }
        };
        this.losses.run(Callback::Device, |_| this.future.set(None));
        Poll::Ready(ended)
    }
}

#[pinned_drop]
impl<F> PinnedDrop for Caught<'_, F> {
    fn drop(self: Pin<&mut Self>) {
        let mut this = self.project();
        this.losses.run(Callback::Device, |_| this.future.set(None));
    }
}
