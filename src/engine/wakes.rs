//! The waker of an invalidation's passes, and who is registered with it.
#![forbid(unsafe_code)]

use crate::sync::{Arc, Lock, catch, resume};
use alloc::task::Wake;
use core::task::Waker;
use slab::Slab;

/// The waker of an invalidation's passes: wakes everybody who waits for them, whoever started the invalidation (C3).
///
/// Why everybody, and not one of them: one may be a future that is alive and never polled again, and then nobody
/// would poll the passes (C4).
#[derive(Default)]
pub(crate) struct PassWaker(Lock<Wakes>);

#[derive(Default)]
struct Wakes {
    /// Somebody polls the passes at this moment, and will look at `woken` afterwards.
    polling: bool,
    woken: bool,
    /// Rises each time all are woken: registrations from before are void.
    epoch: u64,
    wakers: Slab<Waker>,
}

impl PassWaker {
    pub(super) fn begin(&self) {
        let mut wakes = self.0.lock();
        wakes.polling = true;
        wakes.woken = false;
    }

    /// Ends the poll. Says whether a pass was woken during it.
    pub(crate) fn end(&self) -> bool {
        let mut wakes = self.0.lock();
        wakes.polling = false;
        wakes.woken
    }

    /// Whether a pass was woken since the last look, during a poll that goes on.
    pub(super) fn take_woken(&self) -> bool {
        core::mem::take(&mut self.0.lock().woken)
    }

    /// Wakes all that are registered.
    pub(crate) fn wake_all(&self) {
        let mut woken = {
            let mut wakes = self.0.lock();
            wakes.epoch += 1;
            core::mem::take(&mut wakes.wakers)
        };
        if woken.capacity() == 0 {
            return;
        }
        let mut first = None;
        for waker in woken.drain() {
            first = first.or(catch(|| waker.wake()).err());
        }
        let mut wakes = self.0.lock();
        if wakes.wakers.capacity() == 0 {
            wakes.wakers = woken;
        }
        drop(wakes);
        if let Some(panic) = first {
            resume(panic);
        }
    }
}

impl Wake for PassWaker {
    fn wake(self: Arc<Self>) {
        Wake::wake_by_ref(&self);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        {
            let mut wakes = self.0.lock();
            wakes.woken = true;
            if wakes.polling || wakes.wakers.is_empty() {
                return;
            }
        }
        self.wake_all();
    }
}

/// One future's registration with the waker of an invalidation's passes; taken back when dropped.
#[derive(Default)]
pub(crate) struct Watch(Option<(Arc<PassWaker>, usize, u64)>);

impl Watch {
    /// Registers `waker`, in place of what was registered before. Returns a waker that is to be dropped outside of all locks.
    ///
    /// To be called under the space's lock, where the passes were seen to be pending: whoever finishes them takes that
    /// lock before it wakes.
    #[must_use]
    pub(crate) fn register(&mut self, with: &Arc<PassWaker>, waker: Waker) -> Option<Waker> {
        if let Some((set, key, epoch)) = &self.0
            && Arc::ptr_eq(set, with)
        {
            let mut wakes = set.0.lock();
            if wakes.epoch == *epoch {
                return Some(core::mem::replace(&mut wakes.wakers[*key], waker));
            }
        }
        let old = self.clear();
        let mut wakes = with.0.lock();
        let (key, epoch) = (wakes.wakers.insert(waker), wakes.epoch);
        drop(wakes);
        self.0 = Some((with.clone(), key, epoch));
        old
    }

    fn clear(&mut self) -> Option<Waker> {
        let (set, key, epoch) = self.0.take()?;
        let mut wakes = set.0.lock();
        (wakes.epoch == epoch).then(|| wakes.wakers.remove(key))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.clear());
    }
}
