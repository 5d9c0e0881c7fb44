//! Turns of callers with overlapping ranges, where the device must not hold overlapping
//! registrations.
//!
//! A caller enters with a range. Its turn comes when no earlier caller with an overlapping range is
//! left. The work of a turn is a [`Task`]. Later callers poll it as well, so a caller that is not
//! polled holds nobody up (K7).
#![forbid(unsafe_code)]

use super::task::{Task, TaskRef, Waiter};
use crate::index::{IntervalIndex, Ordered, Ranged};
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicBool, Lock, Ordering};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::cmp::Ordering::{Equal, Greater, Less};
use core::future::Future;
use core::task::{Context, Poll};
use futures::FutureExt;

/// Number of nearby places checked for another one to wait behind, before the index is searched.
const LOOKS: usize = 8;

/// The places of a cache, in the order of their numbers.
pub(super) struct Turns(Lock<State>);

/// The places, under the lock of [`Turns`].
struct State {
    /// Number of the last place.
    next: u64,
    /// Serial of the last entry in the index.
    serial: u64,
    /// Incremented whenever the root of a place may change.
    version: u64,
    places: BTreeMap<u64, Place>,
    /// The places by range.
    index: IntervalIndex<Ranged<Seat>>,
}

/// Element of the index. A number may be used again, a serial never is.
#[derive(Clone, Copy, PartialEq)]
struct Seat {
    serial: u64,
    number: u64,
}

impl Ordered for Seat {
    fn order(self) -> u64 {
        self.serial
    }
}

/// A caller's place.
struct Place {
    range: AddressRange,
    serial: u64,
    task: TaskRef<()>,
    /// The turn has begun.
    begun: bool,
    /// Number of places that this one waits for: those that overlap it, and have begun or have a
    /// smaller number.
    before: usize,
    /// One of these places. Valid while `before` is not 0.
    behind: u64,
    /// Cached end of the chain along `behind`, with the version in which it was found. The place at
    /// the end waits for no other.
    root: (u64, u64),
}

/// The reason why a turn cannot begin, if there is one.
enum Ahead {
    /// Nothing: the turn has come.
    Nobody,
    /// This task, which waits for no turn.
    Task(Task<()>),
    /// A place that another thread is about to leave.
    Ending,
}

impl Default for Turns {
    fn default() -> Self {
        let (places, index) = (BTreeMap::new(), IntervalIndex::new());
        Self(Lock::new(State { next: 0, serial: 0, version: 1, places, index }))
    }
}

impl State {
    /// Returns the numbers of the places that overlap `range`.
    fn overlapping(&self, range: AddressRange) -> Vec<u64> {
        let mut all = Vec::new();
        self.index.overlapping(range, |Ranged { value, .. }| all.push(value.number));
        all
    }

    /// Returns `true` if place `number` waits for `other`, which overlaps it.
    fn waits(&self, number: u64, other: u64) -> bool {
        self.places.get(&other).is_some_and(|place| match other.cmp(&number) {
            Less => true,
            Equal => false,
            Greater => place.begun,
        })
    }

    /// Returns how many places `number` waits for, and the first of them. Waiting behind the first
    /// keeps chains short.
    fn first_before(&self, number: u64, range: AddressRange) -> (usize, u64) {
        let before: Vec<_> = self
            .overlapping(range)
            .into_iter()
            .filter(|other| self.waits(number, *other))
            .collect();
        let first = before.iter().min_by_key(|other| (!self.places[*other].begun, **other));
        (before.len(), first.copied().unwrap_or(0))
    }

    /// Makes `number` wait for `before`, a new place.
    fn put_behind(&mut self, number: u64, before: u64) {
        if let Some(place) = self.places.get_mut(&number) {
            if place.before == 0 {
                place.behind = before;
            }
            place.before += 1;
            self.version += 1;
        }
    }

    /// Adds a place. A number that was used before goes ahead of all places that have not begun.
    fn enter(&mut self, number: u64, range: AddressRange, task: TaskRef<()>) {
        let (before, behind) = self.first_before(number, range);
        for later in self.overlapping(range) {
            if !self.waits(number, later) {
                self.put_behind(later, number);
            }
        }
        self.serial += 1;
        let serial = self.serial;
        self.index.insert(Ranged { range, value: Seat { serial, number } });
        self.places.insert(
            number,
            Place { range, serial, task, begun: false, before, behind, root: (0, 0) },
        );
    }

    /// Extends place `number`, whose turn has begun, to `range`.
    fn widen(&mut self, number: u64, range: AddressRange) {
        let Some((former, serial)) =
            self.places.get(&number).map(|place| (place.range, place.serial))
        else {
            return;
        };
        for other in self.overlapping(range) {
            let place = &self.places[&other];
            if !place.begun && !place.range.overlaps(former) {
                self.put_behind(other, number);
            }
        }
        self.index.remove(Ranged { range: former, value: Seat { serial, number } });
        self.serial += 1;
        let serial = self.serial;
        self.index.insert(Ranged { range, value: Seat { serial, number } });
        if let Some(place) = self.places.get_mut(&number) {
            (place.range, place.serial) = (range, serial);
        }
    }

    /// Removes a place. Returns the tasks whose turn has come.
    fn leave(&mut self, number: u64) -> Vec<Task<()>> {
        let Some(range) = self.places.get(&number).map(|place| place.range) else {
            return Vec::new();
        };
        let mut behind = self.overlapping(range);
        behind.retain(|other| !self.places[other].begun && self.waits(*other, number));
        behind.sort_unstable();
        if let Some(Place { serial, .. }) = self.places.remove(&number) {
            self.index.remove(Ranged { range, value: Seat { serial, number } });
        }
        self.version += 1;
        let mut ready = Vec::new();
        for (at, other) in behind.iter().enumerate() {
            let Some(place) = self.places.get_mut(other) else { continue };
            place.before -= 1;
            if place.before == 0 {
                ready.extend(place.task.upgrade());
            } else if place.behind == number {
                let range = place.range;
                let mut near = behind[..at].iter().take(LOOKS);
                let near = near.find(|near| self.places[*near].range.overlaps(range)).copied();
                let next = near.unwrap_or_else(|| self.first_before(*other, range).1);
                if let Some(place) = self.places.get_mut(other) {
                    place.behind = next;
                }
            }
        }
        ready
    }

    /// Returns the place at the end of the chain that `number` waits for. It waits for no other
    /// place.
    fn root(&mut self, number: u64) -> u64 {
        let (mut at, mut way) = (number, Vec::new());
        let root = loop {
            let place = &self.places[&at];
            if place.before == 0 {
                break at;
            }
            if place.root.0 == self.version {
                break place.root.1;
            }
            way.push(at);
            at = place.behind;
        };
        for at in way {
            if let Some(place) = self.places.get_mut(&at) {
                place.root = (self.version, root);
            }
        }
        root
    }
}

impl Turns {
    /// Enters a place, or enters again with a known `number`. `make` makes the work from the number
    /// and a flag that is set when the caller gives up. It runs under the lock and calls no foreign
    /// code.
    pub(super) fn enter(
        &self,
        number: Option<u64>,
        range: AddressRange,
        make: impl FnOnce(u64, Arc<AtomicBool>) -> Task<()>,
    ) -> Turn {
        let cancelled = Arc::new(AtomicBool::new(false));
        let mut state = self.0.lock();
        let number = number.unwrap_or_else(|| {
            state.next += 1;
            state.next
        });
        let task = make(number, cancelled.clone());
        state.enter(number, range, task.downgrade());
        Turn { task, cancelled, number }
    }

    /// Extends the place of `number` to `range`, which covers its former range. Called in its turn.
    pub(super) fn widen(&self, number: u64, range: AddressRange) {
        self.0.lock().widen(number, range);
    }

    /// Begins the turn of `number` if it has come. Otherwise returns the task at the end of its
    /// chain, which waits for no turn.
    fn begin(&self, number: u64) -> Ahead {
        let mut state = self.0.lock();
        let Some(place) = state.places.get_mut(&number) else { return Ahead::Nobody };
        if place.before == 0 {
            place.begun = true;
            return Ahead::Nobody;
        }
        let root = state.root(number);
        let task = state.places[&root].task.upgrade();
        task.map_or(Ahead::Ending, Ahead::Task)
    }

    /// Waits for the turn of `number`.
    pub(super) async fn come(&self, number: u64) {
        let mut ahead: Option<Waiter<()>> = None;
        core::future::poll_fn(|cx: &mut Context<'_>| {
            let task = match self.begin(number) {
                Ahead::Nobody => return Poll::Ready(()),
                Ahead::Ending => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Ahead::Task(task) => task,
            };
            let waiter = task.wait_again(ahead.take());
            if ahead.insert(waiter).poll_unpin(cx).is_ready() {
                // The task leaves its place when it ends, on this thread or on another.
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await;
    }

    /// Leaves a place, and wakes the tasks whose turn has come.
    fn leave(&self, number: u64) {
        let ready = self.0.lock().leave(number);
        ready.iter().for_each(Task::look_again);
    }
}

/// A place. Its drop leaves it.
pub(super) struct Placed {
    pub(super) turns: Arc<Turns>,
    pub(super) number: u64,
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.turns.leave(self.number);
    }
}

/// A caller's turn. Its drop gives it up.
pub(super) struct Turn {
    task: Task<()>,
    cancelled: Arc<AtomicBool>,
    number: u64,
}

impl Turn {
    /// Returns the number of the place. Entering with it again goes ahead of later callers.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn wait(&self) -> Waiter<()> {
        self.task.wait()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Release);
        if !self.task.give_up() {
            // Another thread polls it. That thread polls once more, sees the flag and ends the
            // task.
            self.task.look_again();
        }
    }
}

/// Runs `future` until it ends or `cancelled` is set.
pub(super) async fn unless(cancelled: Arc<AtomicBool>, future: impl Future<Output = ()>) {
    let mut future = core::pin::pin!(future);
    core::future::poll_fn(|cx| {
        if cancelled.load(Ordering::Acquire) { Poll::Ready(()) } else { future.as_mut().poll(cx) }
    })
    .await;
}

#[cfg(test)]
mod tests;
