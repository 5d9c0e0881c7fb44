//! Notifiers whose invalidation is one `async fn`.

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

/// A driver whose invalidation is one `async fn`: its first poll is the first pass, the rest is the
/// pass future. Register it as [`AsyncNotifier`].
///
/// Costs an allocation a call, for the future. Choose [`IntervalNotifier`] where that matters,
/// [`Inbox`](crate::Inbox) where a task handles invalidations one after the other.
///
/// ```
/// # use shootdown::*;
/// # use std::sync::Arc;
/// # #[derive(Default)]
/// # struct Gpu { page_table: DriverLock<Vec<u64>> }
/// # impl Gpu { async fn flush(&self, _: AddressRange) {} }
/// impl AsyncIntervalNotifier for Gpu {
///     async fn invalidate(self: Arc<Self>, invalidation: InvalidationInfo) {
///         self.page_table.lock().retain(|page| !invalidation.range.contains(*page)); // first pass: do not wait before this
///         self.flush(invalidation.range).await;
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
    /// Decides, without waiting, whether the invalidation concerns the device, before `invalidate`
    /// is called.
    ///
    /// Returns `Ok(true)` after [`set_seq`](Invalidation::set_seq), which is what it does unless it
    /// is written otherwise. To leave the device alone (S4) return `Ok(false)` without it; then
    /// `invalidate` is not called.
    ///
    /// The sequence may be set here, before the driver's lock is taken, because two things hold: it
    /// never goes back, also when first passes of two invalidations set it at the same time (S4);
    /// and `invalidate` zaps under the driver's lock *afterwards*. A reader that checks under that
    /// lock before the zap and installs is zapped; one that checks after it collides. A driver that
    /// zaps in `begin` has to take its lock first.
    ///
    /// # Errors
    /// [`WouldBlock`] to refuse a non-blockable invalidation.
    fn begin(&self, invalidation: &Invalidation<'_>) -> Result<bool, WouldBlock> {
        invalidation.set_seq();
        Ok(true)
    }

    /// Stops the device from using the range. Up to the first await that is not ready it runs as
    /// the first pass: take the driver lock and zap the mappings before that.
    ///
    /// A driver writes `async fn invalidate(self: Arc<Self>, invalidation: InvalidationInfo)`.
    fn invalidate(
        self: Arc<Self>,
        invalidation: InvalidationInfo,
    ) -> impl Future<Output = ()> + Send + 'static;

    /// As [`IntervalNotifier::name`].
    fn name(&self) -> Cow<'static, str> {
        Cow::Borrowed(core::any::type_name::<Self>())
    }
}

/// Makes an [`AsyncIntervalNotifier`] an [`IntervalNotifier`]; dereferences to it.
#[must_use = "nothing calls the notifier before it is inserted into a space"]
pub struct AsyncNotifier<A: ?Sized>(Arc<A>);

impl<A: AsyncIntervalNotifier> AsyncNotifier<A> {
    /// Wraps a driver, or an `Arc` of one.
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
        // What the future waits for is waited for by the pass that it becomes, not by this call
        // (F3).
        let _inline = Inline::enter();
        let mut pass: Pin<Box<dyn Future<Output = ()> + Send>> =
            Box::pin(self.0.clone().invalidate(invalidation.info()));
        // The engine polls it again with a waker of its own, so that nothing that happens in
        // between is lost.
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
