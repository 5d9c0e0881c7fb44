//! Who waits for which notifier: a list for each, in one arena.
#![forbid(unsafe_code)]

use crate::engine::{After, State};
use crate::entry::EntryRef;
use core::task::Waker;
use slab::Slab;

/// What a future waits for.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum WaitFor {
    /// A moment at which no active invalidation covers the notifier (R1).
    Uncovered,
    /// That no call of the notifier and no pass of it is under way (L1).
    Quiet,
}

/// A future in the list of those that wait for one notifier.
pub(crate) struct Waiter {
    pub(crate) waker: Option<Waker>,
    wait_for: WaitFor,
    /// The moment has come; the waiter is in no list any more.
    pub(crate) fired: bool,
    entry: EntryRef,
    prev: Option<u32>,
    next: Option<u32>,
}

impl State {
    /// Puts a future in the list of those that wait for `entry`.
    pub(crate) fn add_waiter(&mut self, entry: EntryRef, wait_for: WaitFor, waker: Waker) -> usize {
        let next = entry.first_waiter();
        let waiter = Waiter { waker: Some(waker), wait_for, fired: false, entry, prev: None, next };
        let key = self.waiters.insert(waiter);
        let link = u32::try_from(key).expect("fewer than 2^32 futures wait");
        if let Some(next) = next {
            self.waiters[next as usize].prev = Some(link);
        }
        entry.set_first_waiter(Some(link));
        key
    }

    /// Takes a future out again, whether its moment has come or not.
    pub(crate) fn remove_waiter(&mut self, key: usize, after: &mut After) {
        if !self.waiters[key].fired {
            unlink(&mut self.waiters, key);
        }
        after.work().unused.extend(self.waiters.remove(key).waker);
    }

    /// Wakes those that wait for `entry` without their moment having come: there is something for them to help with.
    pub(crate) fn nudge(&mut self, entry: EntryRef, after: &mut After) {
        let mut at = entry.first_waiter();
        while let Some(key) = at {
            let waiter = &mut self.waiters[key as usize];
            after.work().wakers.extend(waiter.waker.take());
            at = waiter.next;
        }
    }
}

/// R1: the moment that the readers of `entry` wait for. Also the one at which a removed entry may go.
#[cold]
pub(super) fn uncovered(waiters: &mut Slab<Waiter>, entry: EntryRef, after: &mut After) {
    let mut at = entry.first_waiter();
    while let Some(key) = at {
        let key = key as usize;
        let waiter = &mut waiters[key];
        at = waiter.next;
        after.work().wakers.extend(waiter.waker.take());
        if waiter.wait_for == WaitFor::Uncovered {
            waiter.fired = true;
            unlink(waiters, key);
        }
    }
    if entry.unused() {
        after.work().dead.push(entry);
    }
}

fn unlink(waiters: &mut Slab<Waiter>, key: usize) {
    let Waiter { entry, prev, next, .. } = waiters[key];
    if let Some(next) = next {
        waiters[next as usize].prev = prev;
    }
    match prev {
        Some(prev) => waiters[prev as usize].next = next,
        None => entry.set_first_waiter(next),
    }
}
