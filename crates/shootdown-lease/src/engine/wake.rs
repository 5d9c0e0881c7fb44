//! Waiting tasks, and a lock outside of which wakers run.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::pin::pin;
use core::task::Poll;
use core::time::Duration;
use futures::future::{Either, select};
use futures::task::AtomicWaker;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// The waker of one task that waits for a change of the state.
#[derive(Debug, Default)]
pub(super) struct Waiter(AtomicWaker);

/// Foreign code to run after the lock is released.
#[derive(Default)]
pub(super) struct After {
    wake: Vec<Arc<Waiter>>,
    run: Vec<alloc::boxed::Box<dyn FnOnce() + Send>>,
}

impl After {
    pub(super) fn wake(&mut self, waiter: &Arc<Waiter>) {
        if !self.wake.iter().any(|known| Arc::ptr_eq(known, waiter)) {
            self.wake.push(waiter.clone());
        }
    }

    pub(super) fn run(&mut self, work: impl FnOnce() + Send + 'static) {
        self.run.push(alloc::boxed::Box::new(work));
    }
}

/// State behind a lock. Wakers run after the lock is released.
pub(super) struct Guarded<T> {
    state: Mutex<T>,
    /// Number of panics of wakers.
    lost_panics: AtomicU64,
}

impl<T> Guarded<T> {
    pub(super) fn new(state: T) -> Self {
        Self { state: Mutex::new(state), lost_panics: AtomicU64::new(0) }
    }

    pub(super) fn with<R>(&self, work: impl FnOnce(&mut T, &mut After) -> R) -> R {
        let mut after = After::default();
        let result =
            work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner), &mut after);
        for waiter in after.wake {
            self.guard(|| waiter.0.wake());
        }
        for work in after.run {
            self.guard(work);
        }
        result
    }

    /// Runs foreign code that does not belong to the caller, and catches its panic.
    pub(super) fn guard<R>(&self, foreign: impl FnOnce() -> R) -> Option<R> {
        let done = catch_unwind(AssertUnwindSafe(foreign));
        self.lost_panics.fetch_add(u64::from(done.is_err()), Ordering::Relaxed);
        done.ok()
    }

    pub(super) fn lost_panics(&self) -> u64 {
        self.lost_panics.load(Ordering::Relaxed)
    }

    /// Waits until `look` returns a value. `waiter` wakes it; one task at a time may wait with it.
    pub(super) async fn until<R>(
        &self,
        waiter: &Waiter,
        mut look: impl FnMut(&mut T, &mut After) -> Option<R>,
    ) -> R {
        core::future::poll_fn(|cx| {
            waiter.0.register(cx.waker());
            self.with(|state, after| look(state, after)).map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// Sleeps for `left`, but not beyond `changed`. Returns `true` if the time has passed. A time of
/// zero needs no timer.
pub(super) async fn sleep_or<S: Future>(
    left: Option<Duration>,
    sleep: impl FnOnce(Duration) -> S,
    changed: impl Future<Output = ()>,
) -> bool {
    match left {
        Some(Duration::ZERO) => true,
        Some(left) => matches!(select(pin!(sleep(left)), pin!(changed)).await, Either::Left(_)),
        None => {
            changed.await;
            false
        }
    }
}
