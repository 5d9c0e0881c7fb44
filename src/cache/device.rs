//! What memory is registered with, and the one place that calls it (K2).
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

/// What memory is registered with.
///
/// Both futures are polled by whoever needs them: a caller of
/// [`get`](super::RegistrationCache::get), an invalidation that waits for a registration to go, and
/// once the last handle of the cache is gone whoever drops a registration. They must not call the
/// cache or wait for an invalidation of its space.
///
/// A panic, of a method or of a future of it, concerns the one registration that it was asked for:
/// of [`register`](Self::register) it is [`GetError::Panicked`](super::GetError::Panicked), of
/// [`deregister`](Self::deregister) a failure that has taken the handle
/// ([`deregister_lost`](Self::deregister_lost)), of [`still_valid`](Self::still_valid) a `false`.
pub trait Device: Send + Sync + 'static {
    /// What a registration is known by: a key, an index.
    type Handle: Send + Sync + 'static;
    /// Why the device refused.
    type Error: core::error::Error + Send + Sync + 'static;

    /// Maps `range` for the device: whole [pages](super::Builder::page) around what was asked for,
    /// or more or less than that by [`Merge`](super::Merge), [`Match`](super::Match) and
    /// [`Overlap`](super::Overlap). Once begun it is polled to its end, unless the last handle of
    /// the cache is dropped: then it is dropped, and must leave nothing mapped.
    ///
    /// If it changes the memory itself in a way that the space hears of, the registration is one
    /// from before the change and does not count; see [`Builder::tries`](super::Builder::tries).
    fn register(
        &self,
        range: AddressRange,
    ) -> impl Future<Output = Result<Self::Handle, Self::Error>> + Send;

    /// Ends a registration: when this resolves to `Ok`, the device does not use the memory any
    /// more. Called once the last user has let go. Work of the device that is still in flight is
    /// waited for here: await its fence first.
    ///
    /// The handle is the device's to drop. A failure gives it back in [`StillRegistered`]: the
    /// device is taken to use the memory still, and is called again: at once, three times in all,
    /// and then by whoever waits, who gives the other tasks their turn between two calls, ever more
    /// often. The future is dropped unfinished, with the handle, only when neither the cache nor
    /// the space can be reached any more.
    ///
    /// # Panics
    /// A panic takes the handle with it. The device is taken to use the memory still, and
    /// [`deregister_lost`](Self::deregister_lost) is called from then on.
    fn deregister(
        &self,
        range: AddressRange,
        handle: Self::Handle,
    ) -> impl Future<Output = Result<(), StillRegistered<Self::Handle, Self::Error>>> + Send;

    /// Ends a registration whose handle is gone, because [`deregister`](Self::deregister) panicked:
    /// `true` says that the device does not use `range` through it any more, whatever that takes (a
    /// reset of the device). Other registrations that overlap `range` may exist. Called again after
    /// an error or a panic, as `deregister` is.
    ///
    /// `false`, the default, says that nobody can know. Then the device is taken to use the memory
    /// for ever: invalidations of `range` do not end, which
    /// [`AddressSpace::active`](crate::AddressSpace::active) shows; `flush` and limits do not wait
    /// for it; and where nothing may overlap, a `get` beside it is
    /// [`GetError::Lost`](super::GetError::Lost).
    fn deregister_lost(
        &self,
        range: AddressRange,
    ) -> impl Future<Output = Result<bool, Self::Error>> + Send {
        let _ = range;
        core::future::ready(Ok(false))
    }

    /// Says whether a registration that a look-up has found is still one of the memory at its
    /// addresses; `true` by default, which costs nothing.
    ///
    /// For memory whose changes nobody reports, such as a GPU's, whose driver numbers its buffers:
    /// the handle keeps the number. `false` treats the registration as invalidated: it is not found
    /// again and deregistered when its users have let go, and the caller gets a new one.
    ///
    /// Asked at each hit with the registration's own range, without a lock held, and again at the
    /// end of a call that had to wait. It must not call the cache. What the same poll has
    /// registered is not asked about.
    #[inline]
    fn still_valid(&self, range: AddressRange, handle: &Self::Handle) -> bool {
        let _ = (range, handle);
        true
    }
}

/// A deregistration that failed: the handle comes back, since the device may use the memory still.
#[derive(Debug)]
pub struct StillRegistered<H, E> {
    /// What the registration is known by. The next try gets it.
    pub handle: H,
    /// Why the device did not let go.
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

/// What a deregistration came to.
pub(super) enum Deregistered<H> {
    Gone,
    /// It is to be tried again; without the handle if a panic has taken it.
    Kept(Option<H>),
    /// Nobody can know, now or later.
    Never,
}

/// Why a device did not register.
pub(super) enum Fault<E> {
    Refused(Arc<E>),
    Panicked(Option<Arc<str>>),
    /// Nobody wants it any more.
    Cancelled,
}

/// A registration whose cache and last user are gone, and which the device has not let go.
pub(super) trait Orphan: Send + Sync {
    /// Whether nobody can invalidate it any more. Once that is so it stays so.
    fn is_unreachable(&self) -> bool;
    /// Ends the device's future unfinished. Does nothing when it is over, or while somebody polls
    /// it: who polls it without waiting then looks at it himself.
    fn give_up(&self);
}

/// A device whose panics are caught and whose failures are counted and reported. Lives as long as
/// the cache or a registration does.
pub(super) struct Guarded<D: Device> {
    /// `None` only while it is dropped.
    device: Option<D>,
    on_failure: Option<Reporter>,
    pub(super) losses: Arc<Losses>,
    pub(super) source: Source,
    pub(super) register_failures: AtomicU64,
    pub(super) deregister_failures: AtomicU64,
    pub(super) invalidations: AtomicU64,
    /// Bytes that it has mapped, or may have.
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

    /// Gives a registration up if nobody can reach the space, now or when another one of the device
    /// goes.
    pub(super) fn left_behind(&self, orphan: &Arc<dyn Orphan>) {
        // Noted before it is looked at: of two that go at once the later one sees the other.
        self.orphans.lock().push(Arc::downgrade(orphan));
        self.look_at_orphans();
    }

    /// Gives up those that nobody can reach.
    pub(super) fn look_at_orphans(&self) {
        while let Some(orphan) = self.an_orphan() {
            if !orphan.is_unreachable() {
                return;
            }
            // So are all: they are of one space. Their drops look here again, and find nothing.
            let all = core::mem::take(&mut *self.orphans.lock());
            all.iter().filter_map(Weak::upgrade).for_each(|orphan| orphan.give_up());
        }
    }

    /// One of them.
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

    /// Registers `range`. `told` says whether somebody waits who is told of a panic.
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

    /// Deregisters. A failure was counted and reported.
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

    /// Whether what a look-up has found is still a registration of the memory there.
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

    /// Drops what a device made, without a panic.
    pub(super) fn drop_handle(&self, handle: D::Handle) {
        self.losses.run(Callback::Device, |_| drop(handle));
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

    /// Returns the panic's message. Who is not `told` of it finds it among those that were lost.
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

/// A future of a device: its panics are caught, in its poll and in its drop.
#[pin_project(PinnedDrop)]
struct Caught<'a, F> {
    /// `None` when it has ended.
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
