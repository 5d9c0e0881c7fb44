//! The wait of an INVALIDATE for mappings in flight.
#![forbid(unsafe_code)]

use super::Iotlb;
use shootdown::{AddressRange, Invalidate};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

/// Future of [`Iotlb::invalidate`]. Resolves to the number of mappings that it has waited for.
#[must_use = "the answer to an INVALIDATE is sent when this has resolved"]
pub struct Invalidated {
    future: Invalidate<'static>,
    iotlb: Iotlb,
    began: Instant,
}

impl Invalidated {
    /// Waits for the mappings that overlap `range`, on behalf of `iotlb`.
    pub(super) fn new(iotlb: &Iotlb, range: AddressRange) -> Self {
        Self { future: iotlb.wait_for(range), iotlb: iotlb.clone(), began: Instant::now() }
    }
}

impl Future for Invalidated {
    type Output = u64;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<u64> {
        let guard = ready!(Pin::new(&mut self.future).poll(cx));
        let met = guard.hits() as u64;
        drop(guard);
        self.iotlb.0.counters.answered(self.began.elapsed(), met);
        Poll::Ready(met)
    }
}

impl fmt::Debug for Invalidated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Invalidated(since {:?})", self.began.elapsed())
    }
}
