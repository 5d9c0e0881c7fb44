//! [`LeftToParent`]: a future that a child of `fork` neither polls nor drops (M4).
#![forbid(unsafe_code)]

use alloc::boxed::Box;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};

/// A future that does nothing where `inert` returns `true`, which is in a child of `fork`. A poll
/// returns the `answer` there, and a drop leaks the future.
///
/// A poll or a drop in the child could take a lock that a thread of the parent held during the
/// fork. That thread does not exist in the child, so the lock would never be released.
pub(crate) struct LeftToParent<F, I: Fn() -> bool, O> {
    /// `None` only during the drop.
    future: Option<Pin<Box<F>>>,
    inert: I,
    answer: O,
}

impl<F: Future, I: Fn() -> bool, O: Fn() -> F::Output> LeftToParent<F, I, O> {
    /// Wraps a future.
    pub(crate) fn new(future: F, inert: I, answer: O) -> Self {
        Self { future: Some(Box::pin(future)), inert, answer }
    }
}

impl<F: Future, I: Fn() -> bool + Unpin, O: Fn() -> F::Output + Unpin> Future
    for LeftToParent<F, I, O>
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if (self.inert)() {
            return Poll::Ready((self.answer)());
        }
        self.future.as_mut().expect("it goes only with this").as_mut().poll(cx)
    }
}

impl<F, I: Fn() -> bool, O> Drop for LeftToParent<F, I, O> {
    fn drop(&mut self) {
        if (self.inert)() {
            core::mem::forget(self.future.take());
        }
    }
}
