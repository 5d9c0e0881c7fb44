//! The waker of an invalidation's passes, and the futures that it wakes.
#![forbid(unsafe_code)]

use crate::engine::state::Ticket;
use crate::foreign::TaskWaker;
use crate::sync::{Arc, Lock};
use alloc::task::Wake;
use alloc::vec::Vec;
use core::task::Waker;
use slab::Slab;

/// The waker of an invalidation's passes. It wakes the future that started the invalidation (the
/// *owner*) first and then all futures that wait for it (C3).
///
/// It wakes all of them, because a single one may be a future that is alive and never polled again,
/// and then the passes would not be polled (C4).
#[derive(Default)]
pub(crate) struct WakerSet(Lock<Wakers>);

#[derive(Default)]
struct Wakers {
    /// A task polls the passes at this moment. It checks `woken` afterwards.
    polling: bool,
    /// A pass was woken since the last poll began.
    woken: bool,
    /// Rises each time all are woken, which makes earlier registrations void.
    epoch: u64,
    /// The task of the owner. Kept after it was woken, to be compared with other tasks (C4).
    owner: Option<Arc<TaskWaker>>,
    owner_waits: bool,
    waiting: Slab<(Arc<Bell>, Ticket)>,
}

/// The set keeps its memory up to this many waiters when none is left.
const MOST_IDLE: usize = 256;

impl WakerSet {
    /// Begins a poll of the passes. A wake-up is only noted until [`end`](Self::end).
    pub(super) fn begin(&self) {
        let mut wakers = self.0.lock();
        wakers.polling = true;
        wakers.woken = false;
    }

    /// Ends the poll. Returns whether a pass was woken during it. To be called when other tasks can
    /// take the passes again: a waiter that is woken earlier finds nothing to poll, and the wake-up
    /// is lost.
    pub(crate) fn end(&self) -> bool {
        let mut wakers = self.0.lock();
        wakers.polling = false;
        wakers.woken
    }

    /// Notes that the poll has left passes that are ready to go on.
    pub(super) fn note_woken(&self) {
        self.0.lock().woken = true;
    }

    /// Returns whether a pass was woken since the last call, during a poll that goes on.
    pub(super) fn take_woken(&self) -> bool {
        core::mem::take(&mut self.0.lock().woken)
    }

    /// Notes that the owner waits as `task`. Returns the former task, to be dropped outside of all
    /// locks, and whether a pass was woken since the last poll. If so, the owner has to look again.
    #[must_use]
    pub(crate) fn await_as_owner(&self, task: Arc<TaskWaker>) -> (Option<Arc<TaskWaker>>, bool) {
        let mut wakers = self.0.lock();
        wakers.owner_waits = true;
        (wakers.owner.replace(task), wakers.woken)
    }

    /// Forgets the owner. Returns its task, to be dropped outside of all locks.
    #[must_use]
    pub(crate) fn disown(&self) -> Option<Arc<TaskWaker>> {
        let mut wakers = self.0.lock();
        wakers.owner_waits = false;
        wakers.owner.take()
    }

    /// Returns whether the owner was last polled with `waker`. A waker without data, such as
    /// [`Waker::noop`], belongs to no task.
    pub(crate) fn is_owned_by(&self, waker: &Waker) -> bool {
        !waker.data().is_null()
            && self.0.lock().owner.as_ref().is_some_and(|owner| owner.wakes(waker))
    }

    /// Wakes the owner, if it waits, and all registered futures.
    pub(crate) fn wake_all(&self) {
        let (owner, mut waiting) = {
            let mut wakers = self.0.lock();
            wakers.epoch += 1;
            let owner =
                if core::mem::take(&mut wakers.owner_waits) { wakers.owner.clone() } else { None };
            (owner, core::mem::take(&mut wakers.waiting))
        };
        if let Some(owner) = owner {
            owner.rouse();
        }
        if waiting.capacity() == 0 {
            return;
        }
        for (bell, ticket) in waiting.drain() {
            if let Some(task) = bell.ring(Some(ticket)) {
                task.rouse();
            }
        }
        // Keeps the memory for later waiters, unless it is large.
        let mut wakers = self.0.lock();
        if wakers.waiting.capacity() == 0 && waiting.capacity() <= MOST_IDLE {
            wakers.waiting = waiting;
        }
    }
}

impl Wake for WakerSet {
    fn wake(self: Arc<Self>) {
        Wake::wake_by_ref(&self);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        {
            let mut wakers = self.0.lock();
            wakers.woken = true;
            if wakers.polling || (!wakers.owner_waits && wakers.waiting.is_empty()) {
                return;
            }
        }
        self.wake_all();
    }
}

/// The registration of a waiting future with a [`WakerSet`]. Its drop takes it back. To be dropped
/// outside of the space's lock.
#[derive(Default)]
pub(crate) struct Registration(Option<(Arc<WakerSet>, usize, u64)>);

impl Registration {
    /// Registers `bell`, to be rung for `ticket`, unless it is registered with this set already.
    /// Returns the former registration, to be dropped outside of all locks.
    ///
    /// To be called under the same lock of the space under which the passes were seen to be
    /// pending: a task that finishes them takes that lock before it wakes.
    #[must_use]
    pub(crate) fn renew(&mut self, with: &Arc<WakerSet>, bell: &Arc<Bell>, ticket: Ticket) -> Self {
        let mut wakers = with.0.lock();
        if let Some((set, _, epoch)) = &self.0
            && Arc::ptr_eq(set, with)
            && *epoch == wakers.epoch
        {
            return Self(None);
        }
        let (key, epoch) = (wakers.waiting.insert((bell.clone(), ticket)), wakers.epoch);
        Self(self.0.replace((with.clone(), key, epoch)))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let Some((set, key, epoch)) = self.0.take() else { return };
        let removed = {
            let mut wakers = set.0.lock();
            (wakers.epoch == epoch).then(|| wakers.waiting.remove(key))
        };
        drop(removed);
    }
}

/// Wakes a waiting future, and collects the parked invalidations at which it has to look again.
#[derive(Default)]
pub(crate) struct Bell(Lock<Rung>);

#[derive(Default)]
struct Rung {
    task: Option<Arc<TaskWaker>>,
    tickets: Vec<Ticket>,
    /// There were more than [`MOST_RUNG`] tickets. The future has to look at all that overlap.
    all: bool,
}

/// The most tickets that are listed for a future that is not polled.
const MOST_RUNG: usize = if cfg!(test) { 4 } else { 4096 };

impl Bell {
    /// Notes that the future waits as `task`. Returns the former task, to be dropped outside of all
    /// locks.
    #[must_use]
    pub(crate) fn arm(&self, task: Arc<TaskWaker>) -> Option<Arc<TaskWaker>> {
        self.0.lock().task.replace(task)
    }

    /// Notes `ticket`. Returns the task, to be woken outside of all locks; `None` if it was woken
    /// since it was last polled.
    #[must_use]
    pub(crate) fn ring(&self, ticket: Option<Ticket>) -> Option<Arc<TaskWaker>> {
        let mut rung = self.0.lock();
        if let Some(ticket) = ticket
            && !rung.all
        {
            rung.all = rung.tickets.len() == MOST_RUNG;
            if rung.all {
                rung.tickets = Vec::new();
            } else {
                rung.tickets.push(ticket);
            }
        }
        rung.task.take()
    }

    /// Takes the tickets that were noted; `None` if there were too many, so all are to be looked
    /// at.
    pub(crate) fn take_rung(&self) -> Option<Vec<Ticket>> {
        let mut rung = self.0.lock();
        if core::mem::take(&mut rung.all) {
            return None;
        }
        Some(core::mem::take(&mut rung.tickets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_keeps_the_memory_of_a_few_waiters_and_not_that_of_many() {
        let set = Arc::new(WakerSet::default());
        let kept = |waiters| {
            let mut registrations: Vec<_> = (0..waiters).map(|_| Registration::default()).collect();
            for (serial, registration) in (0..).zip(&mut registrations) {
                drop(registration.renew(&set, &Arc::default(), Ticket::from_raw(serial)));
            }
            set.wake_all();
            set.0.lock().waiting.capacity()
        };
        assert_eq!(kept(2 * MOST_IDLE), 0);
        assert_ne!(kept(1), 0);
    }

    #[test]
    fn a_future_that_is_not_polled_keeps_no_more_than_a_bound() {
        let bell = Bell::default();
        let ring = |serial| assert!(bell.ring(Some(Ticket::from_raw(serial))).is_none());
        (0..3).for_each(ring);
        assert_eq!(bell.take_rung().map(|tickets| tickets.len()), Some(3));
        (0..100).for_each(ring);
        assert!(bell.take_rung().is_none(), "all are to be looked at");
        assert_eq!(bell.take_rung().map(|tickets| tickets.len()), Some(0));
    }
}
