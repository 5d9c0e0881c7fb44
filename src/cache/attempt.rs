//! How a registration comes and goes: the attempt to make it, its notifier, and its end.
#![forbid(unsafe_code)]

use super::inner::Inner;
use super::table::{Key, Leaving, Live, Outcome, Stage};
use super::{Device, Operation};
use crate::notifier::{IntervalNotifier, Invalidation, Sequence, WouldBlock};
use crate::pass::PassFuture;
use crate::range::AddressRange;
use crate::subscription::Subscription;
use crate::sync::Arc;
use alloc::borrow::Cow;
use alloc::sync::Weak;
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Poll};
use futures::channel::oneshot;
use futures::future::{BoxFuture, FutureExt, Shared};
use std::sync::OnceLock;

/// Deregistrations that are tried at once before the cache waits to be used again.
const AT_ONCE: u32 = 3;

/// The end of a registration: waits for the last user, then for the device. Anybody may poll it.
pub(super) type Teardown = Shared<BoxFuture<'static, ()>>;

/// One try to register a range. Anybody who needs the range may poll it, and so does an invalidation that comes meanwhile: it belongs to no caller.
pub(super) struct Attempt<D: Device>(Shared<BoxFuture<'static, Outcome<D::Error>>>);

impl<D: Device> Clone for Attempt<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: Device> Future for Attempt<D> {
    type Output = Outcome<D::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_unpin(cx)
    }
}

impl<D: Device> Attempt<D> {
    /// `sequence` is what `read_begin` returned if the slot is in [`Stage::Attempt`] already.
    pub(super) fn new(
        inner: Arc<Inner<D>>,
        key: Key,
        range: AddressRange,
        subscription: Arc<Subscription<Guardian<D>>>,
        sequence: Option<Sequence>,
    ) -> Self {
        Self(attempt(inner, key, range, subscription, sequence).boxed().shared())
    }
}

async fn attempt<D: Device>(
    inner: Arc<Inner<D>>,
    key: Key,
    range: AddressRange,
    subscription: Arc<Subscription<Guardian<D>>>,
    mut begun: Option<Sequence>,
) -> Outcome<D::Error> {
    // While this waits the stage is `Fresh`, for which no invalidation waits.
    let sequence = loop {
        if let Some(sequence) = begun.take() {
            break sequence;
        }
        let sequence = subscription.read_begin().await;
        let entered = inner.write(|table| {
            let valid = !subscription.read_retry(sequence);
            if valid && let Some(slot) = table.get(key) {
                slot.stage = Stage::Attempt;
            }
            valid
        });
        if entered {
            break sequence;
        }
    };
    // From here on an invalidation waits for this attempt, so the attempt waits for the device only.
    let bytes = range.len().unwrap_or(u64::MAX);
    inner.count(|stats| stats.pinned_bytes += bytes);
    let handle = match inner.device.register(range).await {
        Ok(handle) => handle,
        Err(error) => {
            inner.count(|stats| {
                stats.pinned_bytes -= bytes;
                stats.register_failures += 1;
            });
            inner.report(range, Operation::Register, &error);
            inner.forget(key);
            return Outcome::Failed(Arc::new(error));
        }
    };
    let (gone, handed_back) = oneshot::channel();
    let live = Arc::new(Live::new(range, handle, gone));
    let stuck = Arc::new(AtomicBool::new(false));
    let teardown = teardown(Arc::downgrade(&inner), key, range, handed_back, stuck.clone()).boxed().shared();
    let leaving = Leaving { teardown: teardown.clone(), users: Arc::downgrade(&live), stuck };
    let mut published = Some(live);
    let replaced = inner.write(|table| {
        if subscription.read_retry(sequence) {
            table.reject(key, leaving);
            return None;
        }
        let replaced = table.replaced(range, inner.settings.merge);
        let left: alloc::vec::Vec<_> = replaced.into_iter().filter_map(|key| table.leave(key)).collect();
        if let Some(live) = published.take() {
            table.publish(key, live, leaving);
        }
        Some(left)
    });
    match replaced {
        Some(replaced) => {
            inner.count(|stats| stats.merges += replaced.len() as u64);
            Outcome::Live
        }
        None => {
            // Nobody has seen it: the device lets go at once.
            drop(published);
            teardown.await;
            Outcome::Collided
        }
    }
}

async fn teardown<D: Device>(
    inner: Weak<Inner<D>>,
    key: Key,
    range: AddressRange,
    handed_back: oneshot::Receiver<D::Handle>,
    stuck: Arc<AtomicBool>,
) {
    let Ok(handle) = handed_back.await else { return };
    let Some(inner) = inner.upgrade() else { return };
    let mut failures = 0;
    while let Err(error) = inner.device.deregister(range, &handle).await {
        inner.count(|stats| stats.deregister_failures += 1);
        inner.report(range, Operation::Deregister, &error);
        failures += 1;
        if failures % AT_ONCE == 0 {
            // Whoever polls next tries again; it is never given up, because the device may still use the memory.
            let mut polled = false;
            core::future::poll_fn(|cx| {
                if core::mem::replace(&mut polled, true) {
                    return Poll::Ready(());
                }
                if !stuck.swap(true, Ordering::AcqRel) {
                    // Those who wait for it and would rather not learn of it once.
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            })
            .await;
        }
    }
    inner.count(|stats| stats.pinned_bytes -= range.len().unwrap_or(u64::MAX));
    inner.forget(key);
}

/// The notifier of one registration.
pub(super) struct Guardian<D: Device> {
    pub(super) inner: Weak<Inner<D>>,
    /// Set when the slot exists; before, there is nothing to do.
    pub(super) key: OnceLock<Key>,
}

impl<D: Device> IntervalNotifier for Guardian<D> {
    fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        let Some(inner) = self.inner.upgrade() else { return Ok(None) };
        let mut left = None;
        let pass = inner.write(|table| {
            invalidation.set_seq();
            let key = *self.key.get()?;
            left = table.leave(key);
            let slot = table.get(key)?;
            match &slot.stage {
                Stage::Fresh => None,
                Stage::Attempt => slot.attempt.clone().map(|attempt| PassFuture::new(attempt.map(drop))),
                Stage::Live(leaving) | Stage::Leaving(leaving) => Some(PassFuture::new(leaving.teardown.clone())),
            }
        });
        if left.is_some() {
            inner.count(|stats| stats.invalidations += 1);
        }
        // The table's reference: without users the device is asked when the pass is polled.
        drop(left);
        Ok(pass)
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Owned(alloc::format!("registration with {}", core::any::type_name::<D>()))
    }
}
