//! What a child of `fork` does with futures that are its parent's: nothing (M4).
#![forbid(unsafe_code)]

use alloc::boxed::Box;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};

/// A future that is leaked instead of dropped where it is `inert`: what it holds would take locks that
/// threads of the parent held when it forked, and nobody holds in the child.
pub(crate) struct LeftToParent<F, I: Fn() -> bool> {
    future: Option<Pin<Box<F>>>,
    inert: I,
}

impl<F: Future, I: Fn() -> bool> LeftToParent<F, I> {
    pub(crate) fn new(future: F, inert: I) -> Self {
        Self { future: Some(Box::pin(future)), inert }
    }
}

impl<F: Future, I: Fn() -> bool + Unpin> Future for LeftToParent<F, I> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.future.as_mut().expect("it goes only with this").as_mut().poll(cx)
    }
}

impl<F, I: Fn() -> bool> Drop for LeftToParent<F, I> {
    fn drop(&mut self) {
        if (self.inert)() {
            core::mem::forget(self.future.take());
        }
    }
}
