//! What a child of `fork` does with futures that are its parent's: nothing (M4).
#![forbid(unsafe_code)]

use alloc::boxed::Box;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};

/// A future that is leaked instead of dropped where it is `inert`, and not polled there but
/// answered for: what it holds would take locks that threads of the parent held when it forked, and
/// nobody holds in the child.
pub(crate) struct LeftToParent<F, I: Fn() -> bool, O> {
    future: Option<Pin<Box<F>>>,
    inert: I,
    answer: O,
}

impl<F: Future, I: Fn() -> bool, O: Fn() -> F::Output> LeftToParent<F, I, O> {
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
