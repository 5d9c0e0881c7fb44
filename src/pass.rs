//! [`PassFuture`]: the further passes of an invalidation, as a future that a first pass returns.
#![forbid(unsafe_code)]

use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use pin_project::pin_project;
use stackfuture::StackFuture;

/// Size of the largest future that a [`PassFuture`] stores without an allocation.
const INLINE: usize = 64;

/// Waits for the work that a first pass has started: a TLB flush, the preemption of a context, the
/// drain of a queue.
///
/// [`IntervalNotifier::invalidate`](crate::IntervalNotifier::invalidate) returns it. It wraps any
/// `Future<Output = ()> + Send + 'static`. A future of up to 64 bytes (aligned to at most 8) is
/// stored in place. A larger one is boxed. The engine joins the passes of all notifiers (rule
/// [O4](crate::docs::contract)). A future with several stages stands for several passes, each at
/// the pace of its driver. A [`Timeline`](crate::Timeline) makes such futures of a device's fences.
///
/// # Cancel safety
/// The engine drops an unfinished pass only if the whole space is dropped, or if its notifier is
/// [fenced](crate::Subscription::fence). Passes belong to the space (rule
/// [C2](crate::docs::contract)).
///
/// ```
/// use shootdown::PassFuture;
///
/// let flushed = async { /* wait for the fence */ };
/// let pass: PassFuture = PassFuture::new(flushed);
/// ```
#[pin_project]
#[must_use = "a pass that is not returned to the engine is not waited for"]
pub struct PassFuture(#[pin] StackFuture<'static, (), INLINE>);

impl PassFuture {
    /// Wraps a future. A future of up to 64 bytes needs no allocation.
    #[inline]
    pub fn new(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(StackFuture::from_or_box(future))
    }

    /// Blocks the thread until the pass is done (rule [W1](crate::docs::contract)). It is for tests
    /// of a driver. In a space, the engine polls the pass.
    #[cfg(feature = "std")]
    pub fn wait(self) {
        crate::block::wait(self);
    }
}

impl From<Pin<Box<dyn Future<Output = ()> + Send>>> for PassFuture {
    fn from(future: Pin<Box<dyn Future<Output = ()> + Send>>) -> Self {
        Self::new(future)
    }
}

impl Future for PassFuture {
    type Output = ();

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.project().0.poll(cx)
    }
}

impl fmt::Debug for PassFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PassFuture").finish_non_exhaustive()
    }
}
