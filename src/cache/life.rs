//! How a registration comes and goes: all that waits.
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

/// Deregistrations that are tried at once before the other tasks have their turn.
const AT_ONCE: u32 = 3;
/// As many turns they have at most between two tries, as a power of two.
const MOST_TURNS: u32 = 6;

/// One caller's try to have a range registered, alone or with others. `watch` is called once it has
/// been seen to be stable, `now` says when it was used last.
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
            // What cannot be watched is refused before it is waited for.
            if polled.is_pending() && early.is_none() {
                early = Some(watch()?);
            }
            polled.map(Ok)
        })
        .await?;
        // M1: what has changed before is not of interest, what changes from now on is told. The
        // memory that was watched earlier may have gone.
        (sequence, watch()?)
    };
    let task = Task::new(&entry.device.losses, register(entry.clone(), sequence, now));
    if let Some(task) = entry.begin(sequence, task, watched) {
        return Ok(task.await);
    }
    // Somebody else was quicker, or an invalidation was.
    match entry.step() {
        Step::Join(task) => Ok(task.await),
        Step::Over(outcome) => Ok(outcome),
        Step::Begin => Ok(Outcome::Collided(None)),
    }
}

/// Registers. Anybody who needs the range may poll it, and so does an invalidation that comes
/// meanwhile, so it waits for the device only.
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
            // An invalidation that came meanwhile waits for this only. Without one it is taken care
            // of like anything that is idle.
            if by.is_some() {
                leaving.wait().await;
            }
            Outcome::Collided(by)
        }
    }
}

/// Waits for the last user, then for the device (K1). It is never given up, because the device may
/// still use the memory (K2).
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
                // Those who do not wait for such a one see it.
                yield_now().await;
                return core::future::pending().await;
            }
        }
        failures += 1;
        if failures >= AT_ONCE {
            entry.stuck.store(true, Ordering::Release);
            let turns = 1u32 << (failures - AT_ONCE).min(MOST_TURNS);
            for _ in 0..turns {
                yield_now().await;
            }
            failures = failures.min(AT_ONCE + MOST_TURNS);
        }
    }
    entry.over();
}

/// Lets the other tasks of whoever polls have their turn.
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
