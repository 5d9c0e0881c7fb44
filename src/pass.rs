//! The further passes of an invalidation: the future that a first pass returns.
#![forbid(unsafe_code)]

use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use pin_project::pin_project;
use stackfuture::StackFuture;

/// Bytes of a future that a [`PassFuture`] holds without an allocation of its own.
const INLINE: usize = 64;

/// What a first pass leaves to be waited for: the end of a TLB flush, of a context preemption, of a
/// queue drain.
///
/// Any `Future<Output = ()> + Send + 'static`. One of up to 64 bytes (aligned to at most 8) is
/// stored in place, a larger one is boxed. The engine joins the passes of all notifiers (O4); a
/// future with several stages is several passes, each at its driver's own pace.
///
/// # Cancel safety
/// The engine drops it unfinished only when the whole space is dropped, or its notifier is
/// [fenced](crate::Subscription::fence): passes belong to the space (C2).
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
    /// Wraps a future, without an allocation if it is small.
    #[inline]
    pub fn new(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(StackFuture::from_or_box(future))
    }

    /// Blocks the thread until the pass is done: for tests of a driver, which the engine polls
    /// otherwise (W1).
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
