//! The futures that wait for notifiers: a linked list for each notifier, all in one arena.
#![forbid(unsafe_code)]

use crate::engine::outbox::Outbox;
use crate::engine::state::{State, Ticket};
use crate::engine::wakers::Bell;
use crate::entry::EntryRef;
use crate::sync::Arc;
use slab::Slab;

/// The moment that a future waits for.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum WaitFor {
    /// A moment at which no active invalidation covers the notifier (R1).
    Uncovered,
    /// A moment at which no call of the notifier and no pass of it is under way (L1).
    Quiet,
}

/// A future in the list of those that wait for one notifier.
pub(crate) struct Waiter {
    bell: Arc<Bell>,
    wait_for: WaitFor,
    /// The moment has come. The waiter is in no list any more.
    pub(crate) fired: bool,
    entry: EntryRef,
    prev: Option<u32>,
    next: Option<u32>,
}

/// The arena keeps its memory up to this many waiters when none is left.
const MOST_IDLE: usize = 256;

impl State {
    /// Puts a future into the list of those that wait for `entry`. Returns its key.
    pub(crate) fn add_waiter(
        &mut self,
        entry: EntryRef,
        wait_for: WaitFor,
        bell: Arc<Bell>,
    ) -> usize {
        let link = u32::try_from(self.waiters.vacant_key()).ok().filter(|link| *link < u32::MAX);
        let link = link.expect("fewer than 2^32 - 1 futures wait in one space");
        let next = entry.first_waiter();
        let key =
            self.waiters.insert(Waiter { bell, wait_for, fired: false, entry, prev: None, next });
        if let Some(next) = next {
            self.waiters[next as usize].prev = Some(link);
        }
        entry.set_first_waiter(Some(link));
        key
    }

    /// Takes a future out, whether its moment has come or not.
    pub(crate) fn remove_waiter(&mut self, key: usize) {
        if !self.waiters[key].fired {
            unlink(&mut self.waiters, key);
        }
        // The future has the bell, too, so this does not drop the last reference.
        self.waiters.remove(key);
        if self.waiters.is_empty() && self.waiters.capacity() > MOST_IDLE {
            self.waiters = Slab::new();
        }
    }

    /// Wakes all futures that wait for `entry`, before their moment: they have to look at `ticket`,
    /// or whether their moment has come.
    pub(crate) fn nudge(&mut self, entry: EntryRef, ticket: Option<Ticket>, outbox: &mut Outbox) {
        let mut at = entry.first_waiter();
        while let Some(key) = at {
            let waiter = &self.waiters[key as usize];
            if let Some(task) = waiter.bell.ring(ticket) {
                outbox.contents().tasks.push(task);
            }
            at = waiter.next;
        }
    }
}

/// Called when the last invalidation that covered `entry` has ended. Wakes every waiter of `entry`,
/// marks the readers among them as fired (R1), and frees the entry if it has been removed.
#[cold]
pub(super) fn uncovered(waiters: &mut Slab<Waiter>, entry: EntryRef, outbox: &mut Outbox) {
    let mut at = entry.first_waiter();
    while let Some(key) = at {
        let key = key as usize;
        let waiter = &mut waiters[key];
        at = waiter.next;
        if let Some(task) = waiter.bell.ring(None) {
            outbox.contents().tasks.push(task);
        }
        if waiter.wait_for == WaitFor::Uncovered {
            waiter.fired = true;
            unlink(waiters, key);
        }
    }
    if entry.unused() {
        outbox.contents().dead.push(entry);
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
