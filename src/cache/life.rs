//! How a registration begins and ends: the futures that wait for the space and the device.
#![forbid(unsafe_code)]

use super::device::{Deregistered, Device, Fault};
use super::entry::{Entry, Live};
use super::error::Unwatched;
use super::phase::{Outcome, Step};
use super::task::Task;
use super::watch::Watched;
use crate::notifier::Sequence;
use crate::sync::{Arc, Ordering};
use core::task::Poll;
use futures::FutureExt;
use futures::channel::oneshot;

/// Number of deregistrations that are tried at once, before other tasks get their turn.
const AT_ONCE: u32 = 3;
/// Exponent of the highest number of yields between two tries: at most `2^MOST_TURNS`.
const MOST_TURNS: u32 = 6;

/// Makes one try to register the range of `entry`, alone or together with other callers.
///
/// Calls `watch` once `read_begin` has found the range stable (M1). `now` is the time of the first
/// use.
pub(super) async fn attempt<D: Device>(
    entry: &Arc<Entry<D>>,
    now: u64,
    watch: impl Fn() -> Result<Watched, Unwatched>,
) -> Result<Outcome<D::Error>, Unwatched> {
    match entry.step() {
        Step::Join(task) => return Ok(task.await),
        Step::Over(outcome) => return Ok(outcome),
        Step::Begin => {}
    }
    let (sequence, watched) = {
        let (mut begin, mut early) = (entry.subscription().read_begin(), None);
        let sequence = core::future::poll_fn(|cx| {
            let polled = begin.poll_unpin(cx);
            // Reports at once that the range cannot be watched, instead of after the wait.
            if polled.is_pending() && early.is_none() {
                early = Some(watch()?);
            }
            polled.map(Ok)
        })
        .await?;
        // M1: earlier changes do not matter, later ones are reported. The watch is made anew here,
        // because the memory of the early watch may be gone.
        (sequence, watch()?)
    };
    let task = Task::new(&entry.device.losses, register(entry.clone(), sequence, now));
    if let Some(task) = entry.begin(sequence, task, watched) {
        return Ok(task.await);
    }
    // Another caller has begun to register, or an invalidation has come.
    match entry.step() {
        Step::Join(task) => Ok(task.await),
        Step::Over(outcome) => Ok(outcome),
        Step::Begin => Ok(Outcome::Collided(None)),
    }
}

/// Registers `entry` with the device. Any caller that needs the range may poll this future. So may
/// an invalidation of the range, so it waits for the device only.
async fn register<D: Device>(
    entry: Arc<Entry<D>>,
    sequence: Sequence,
    now: u64,
) -> Outcome<D::Error> {
    let device = &entry.device;
    let handle = match device.register(entry.range, &entry.cancelled, || entry.has_claims()).await {
        Ok(handle) => handle,
        Err(fault) => {
            entry.over();
            return match fault {
                Fault::Refused(error) => Outcome::Failed(error),
                Fault::Panicked(message) => Outcome::Panicked(message),
                Fault::Cancelled => Outcome::Collided(None),
            };
        }
    };
    let (gone, handed_back) = oneshot::channel();
    let live = Live::new(entry.clone(), handle, gone, now);
    let leaving = Task::new(&device.losses, deregister(entry.clone(), handed_back));
    match entry.publish(sequence, live, &leaving) {
        Ok(()) => Outcome::Live,
        Err(by) => {
            // An invalidation that came meanwhile waits for this future only. Without one the
            // registration is cleaned up like any idle one.
            if by.is_some() {
                leaving.wait().await;
            }
            Outcome::Collided(by)
        }
    }
}

/// Waits for the last user, then until the device has deregistered (K1). Never gives up, because
/// the device may still use the memory (K2).
async fn deregister<D: Device>(entry: Arc<Entry<D>>, handed_back: oneshot::Receiver<D::Handle>) {
    let Ok(handle) = handed_back.await else { return };
    let (mut handle, mut failures) = (Some(handle), 0);
    loop {
        match entry.device.deregister(entry.range, handle.take()).await {
            Deregistered::Gone => break,
            Deregistered::Kept(kept) => handle = kept,
            Deregistered::Never => {
                entry.lost.store(true, Ordering::Release);
                entry.stuck.store(true, Ordering::Release);
                // Lets the waiters that skip a lost registration observe the flags.
                yield_now().await;
                return core::future::pending().await;
            }
        }
        failures = (failures + 1).min(AT_ONCE + MOST_TURNS);
        if failures >= AT_ONCE {
            entry.stuck.store(true, Ordering::Release);
            for _ in 0..1u32 << (failures - AT_ONCE) {
                yield_now().await;
            }
        }
    }
    entry.over();
}

/// Yields to the other tasks of the polling executor once.
pub(super) async fn yield_now() {
    let mut polled = false;
    core::future::poll_fn(|cx| {
        if core::mem::replace(&mut polled, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
