//! The future of `Inbox::recv`.
#![forbid(unsafe_code)]

use crate::mirror::delivery::Delivery;
use crate::mirror::inbox::Inbox;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};

/// Waits for the next delivery of an inbox: the future of [`Inbox::recv`].
///
/// It resolves to `None` when the stream has ended ([A4]). Several may wait at once.
///
/// # Cancel safety
/// May be dropped at any moment. An invalidation stays queued until a poll has returned it.
///
/// [A4]: crate::docs::contract#a-drivers-that-are-tasks
#[must_use = "nothing is taken before the future is polled"]
pub struct Recv<'a, T: Send + 'static>(&'a Inbox<T>);

impl<T: Send + 'static> Recv<'_, T> {
    /// Blocks the thread until there is a delivery, and returns it ([W1]).
    ///
    /// Returns `None` when the stream has ended. Needs feature `std`.
    ///
    /// [W1]: crate::docs::contract#w-threads-that-wait
    #[cfg(feature = "std")]
    pub fn wait(self) -> Option<Delivery> {
        crate::block::wait(self)
    }
}

impl<T: Send + 'static> Inbox<T> {
    /// Takes the next delivery, by a shared reference; `None` when the stream has ended ([A4]).
    ///
    /// It does what `next` of the stream does, without `futures::StreamExt`. This is a driver that
    /// is a thread:
    /// ```
    /// # use shootdown::*;
    /// # fn zap(_range: AddressRange) {}
    /// # let space = AddressSpace::new();
    /// # let range = AddressRange::new(0x10000, 0x4000)?;
    /// let inbox = space.inbox(range, ())?;
    /// std::thread::scope(|threads| {
    ///     threads.spawn(|| {
    ///         while let Some(invalidation) = inbox.recv().wait() {
    ///             zap(invalidation.range());
    ///             invalidation.done();
    ///         }
    ///     });
    ///     drop(space.invalidate(range, Event::Unmap).wait());
    ///     space.release().wait(); // ends the loop
    /// });
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// [A4]: crate::docs::contract#a-drivers-that-are-tasks
    pub fn recv(&self) -> Recv<'_, T> {
        Recv(self)
    }
}

impl<T: Send + 'static> Future for Recv<'_, T> {
    type Output = Option<Delivery>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_delivery(cx)
    }
}

impl<T: Send + 'static> fmt::Debug for Recv<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recv").field("inbox", self.0).finish()
    }
}
