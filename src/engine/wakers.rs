//! Who is woken when a pass can go on: the waker of an invalidation's passes, and those who are
//! registered with it.
#![forbid(unsafe_code)]

use crate::engine::state::Ticket;
use crate::foreign::TaskWaker;
use crate::sync::{Arc, Lock};
use alloc::task::Wake;
use alloc::vec::Vec;
use core::task::Waker;
use slab::Slab;

/// The waker of an invalidation's passes. It wakes the future that started the invalidation (the
/// *owner*) first and then everybody who waits for it (C3).
///
/// Why everybody, and not one of them: one may be a future that is alive and never polled again,
/// and then nobody would poll the passes (C4).
#[derive(Default)]
pub(crate) struct WakerSet(Lock<Wakers>);

#[derive(Default)]
struct Wakers {
    /// Somebody polls the passes at this moment, and will look at `woken` afterwards.
    polling: bool,
    /// A pass was woken since the last poll began.
    woken: bool,
    /// Rises each time all are woken: registrations from before are void.
    epoch: u64,
    /// The task of the owner. Kept after it was woken, to be compared with others (C4).
    owner: Option<Arc<TaskWaker>>,
    owner_waits: bool,
    waiting: Slab<(Arc<Bell>, Ticket)>,
}

/// Room for this many waiters stays when none is left.
const MOST_IDLE: usize = 256;

impl WakerSet {
    /// A poll of the passes begins: a wake-up is only noted until [`end`](Self::end).
    pub(super) fn begin(&self) {
        let mut wakers = self.0.lock();
        wakers.polling = true;
        wakers.woken = false;
    }

    /// Ends the poll. Returns whether a pass was woken during it. To be called when others can take
    /// the passes again: a waiter that is woken earlier would find nothing to poll, and the
    /// wake-up would be lost.
    pub(crate) fn end(&self) -> bool {
        let mut wakers = self.0.lock();
        wakers.polling = false;
        wakers.woken
    }

    /// Some passes are ready to go on, and were left at that.
    pub(super) fn note_woken(&self) {
        self.0.lock().woken = true;
    }

    /// Whether a pass was woken since the last look, during a poll that goes on.
    pub(super) fn take_woken(&self) -> bool {
        core::mem::take(&mut self.0.lock().woken)
    }

    /// The owner waits. Returns what is to be dropped outside of all locks, and whether a pass was
    /// woken since the last poll, in which case the owner has to look again itself.
    #[must_use]
    pub(crate) fn await_as_owner(&self, task: Arc<TaskWaker>) -> (Option<Arc<TaskWaker>>, bool) {
        let mut wakers = self.0.lock();
        wakers.owner_waits = true;
        (wakers.owner.replace(task), wakers.woken)
    }

    /// There is no owner any more. Returns what is to be dropped outside of all locks.
    #[must_use]
    pub(crate) fn disown(&self) -> Option<Arc<TaskWaker>> {
        let mut wakers = self.0.lock();
        wakers.owner_waits = false;
        wakers.owner.take()
    }

    /// Whether the owner was last polled with `waker`. A waker that wakes nobody is no task's.
    pub(crate) fn is_owned_by(&self, waker: &Waker) -> bool {
        !waker.data().is_null()
            && self.0.lock().owner.as_ref().is_some_and(|owner| owner.wakes(waker))
    }

    /// Wakes all that are registered.
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
        // The memory is used again, unless it is much.
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

/// A waiting future's registration with a [`WakerSet`]; taken back when dropped, outside of the
/// space's lock.
#[derive(Default)]
pub(crate) struct Registration(Option<(Arc<WakerSet>, usize, u64)>);

impl Registration {
    /// Registers `bell`, to be rung for `ticket`, unless it is registered with this set already.
    /// Returns a registration with another set, to be dropped outside of all locks.
    ///
    /// To be called under the space's lock, where the passes were seen to be pending: whoever
    /// finishes them takes that lock before it wakes.
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

/// What wakes a waiting future, and says why: the parked invalidations at which it has to look
/// again.
#[derive(Default)]
pub(crate) struct Bell(Lock<Rung>);

#[derive(Default)]
struct Rung {
    task: Option<Arc<TaskWaker>>,
    tickets: Vec<Ticket>,
    /// There were more than [`MOST_RUNG`] tickets: all that overlap are to be looked at.
    all: bool,
}

/// As many tickets are listed for a future that is not polled; after that it has to look at all.
const MOST_RUNG: usize = if cfg!(test) { 4 } else { 4096 };

impl Bell {
    /// The task waits. Returns what is to be dropped outside of all locks.
    #[must_use]
    pub(crate) fn arm(&self, task: Arc<TaskWaker>) -> Option<Arc<TaskWaker>> {
        self.0.lock().task.replace(task)
    }

    /// Notes `ticket`. Returns the task, to be woken outside of all locks, unless it was woken
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

    /// What it was rung for; `None` if that is all there is.
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
