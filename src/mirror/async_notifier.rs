//! Drivers whose invalidation is one `async fn`.

use crate::foreign::Inline;
use crate::notifier::{IntervalNotifier, Invalidation, InvalidationInfo, WouldBlock};
use crate::pass::PassFuture;
use crate::sync::Arc;
use alloc::borrow::Cow;
use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::ops::Deref;
use core::pin::Pin;
use core::task::{Context, Waker};

/// Handles an invalidation in one `async fn`: its first poll is the first pass, the rest is the
/// pass.
///
/// Wrap the driver in [`AsyncNotifier`] to insert it. Each call allocates the future. Choose
/// [`IntervalNotifier`] where that matters, and [`Inbox`](crate::Inbox) where a task handles
/// invalidations.
///
/// ```
/// # use shootdown::*;
/// # use std::sync::Arc;
/// # #[derive(Default)]
/// # struct Gpu { page_table: DriverLock<Vec<u64>> }
/// # impl Gpu { async fn flush(&self, _: AddressRange) {} }
/// impl AsyncIntervalNotifier for Gpu {
///     async fn invalidate(self: Arc<Self>, invalidation: InvalidationInfo) {
///         let range = invalidation.range;
///         // The first pass: do not wait before this.
///         self.page_table.lock().retain(|page| !range.contains(*page));
///         // The pass.
///         self.flush(range).await;
///     }
/// }
/// # futures::executor::block_on(async {
/// let space = AddressSpace::new();
/// let range = AddressRange::new(0x10000, 0x4000)?;
/// let gpu = space.insert(range, AsyncNotifier::new(Gpu::default()))?;
/// drop(space.invalidate(range, Event::Unmap).await);
/// # drop(gpu);
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
pub trait AsyncIntervalNotifier: Send + Sync + 'static {
    /// Decides, without waiting, whether the invalidation concerns the device.
    ///
    /// It runs before [`invalidate`](Self::invalidate). The default calls
    /// [`set_seq`](Invalidation::set_seq) and returns `Ok(true)`. To leave the device alone, return
    /// `Ok(false)` without `set_seq` ([S4]); then `invalidate` is not called.
    ///
    /// The sequence may be set here, before the driver's lock is taken, for two reasons:
    /// - The sequence never goes back, also when the first passes of two invalidations set it at
    ///   the same time ([S4]).
    /// - `invalidate` zaps under the driver's lock *afterwards*. If a reader checks under that lock
    ///   before the zap, its mapping is zapped. If it checks after the zap, it collides.
    ///
    /// A driver that zaps in `begin` must take its lock first.
    ///
    /// # Errors
    /// Return [`WouldBlock`] to refuse a non-blockable invalidation.
    ///
    /// [S4]: crate::docs::contract#s-sequence
    fn begin(&self, invalidation: &Invalidation<'_>) -> Result<bool, WouldBlock> {
        invalidation.set_seq();
        Ok(true)
    }

    /// Stops the device from using the range.
    ///
    /// A driver writes `async fn invalidate(self: Arc<Self>, invalidation: InvalidationInfo)`. Up
    /// to the first await that is not ready, it runs as the first pass. Take the driver's lock and
    /// zap the mappings before that. The rules of a pass hold for the rest: see the guide's page
    /// [`driver`](crate::docs::driver).
    fn invalidate(
        self: Arc<Self>,
        invalidation: InvalidationInfo,
    ) -> impl Future<Output = ()> + Send + 'static;

    /// Returns the name of the driver: see [`IntervalNotifier::name`].
    fn name(&self) -> Cow<'static, str> {
        Cow::Borrowed(core::any::type_name::<Self>())
    }
}

/// Makes an [`AsyncIntervalNotifier`] an [`IntervalNotifier`]; dereferences to the driver's `Arc`.
#[must_use = "nothing calls the notifier before it is inserted into a space"]
pub struct AsyncNotifier<A: ?Sized>(Arc<A>);

impl<A: AsyncIntervalNotifier> AsyncNotifier<A> {
    /// Wraps a driver, or an `Arc` of a driver.
    pub fn new(driver: impl Into<Arc<A>>) -> Self {
        Self(driver.into())
    }
}

impl<A: AsyncIntervalNotifier> IntervalNotifier for AsyncNotifier<A> {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        if !self.0.begin(invalidation)? {
            return Ok(None);
        }
        // F3: if the future waits, its pass waits, and not this call.
        let _inline = Inline::enter();
        let mut pass: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(self.0.clone().invalidate(invalidation.info()));
        // No wake-up is lost: the engine polls the pass again, with a waker of its own.
        let first = pass.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        Ok(first.is_pending().then(|| PassFuture::from(pass)))
    }

    fn name(&self) -> Cow<'static, str> {
        self.0.name()
    }
}

impl<A: ?Sized> Deref for AsyncNotifier<A> {
    type Target = Arc<A>;

    fn deref(&self) -> &Arc<A> {
        &self.0
    }
}

impl<A: ?Sized> fmt::Debug for AsyncNotifier<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncNotifier").finish_non_exhaustive()
    }
}
