//! Turns of callers whose ranges overlap, where the device may have no two registrations that do.
//!
//! A caller enters with a range and has its turn when no earlier caller with an overlapping range
//! is left. What it does in its turn is a [`Task`]: those behind it poll it as well, so a caller
//! that is not polled holds up nobody (K7).
#![forbid(unsafe_code)]

use super::task::{Task, TaskRef, Waiter};
use crate::index::{IntervalIndex, Ordered, Ranged};
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicBool, Lock, Ordering};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::future::Future;
use core::task::{Context, Poll};
use futures::FutureExt;

/// So many places are looked at for another one to wait behind, before the index is asked.
const LOOKS: usize = 8;

pub(super) struct Turns(Lock<State>);

struct State {
    /// The next number.
    next: u64,
    /// Rises with each place that is taken.
    serial: u64,
    /// Rises whenever the roots of places change.
    version: u64,
    places: BTreeMap<u64, Place>,
    /// The same by range.
    index: IntervalIndex<Ranged<Seat>>,
}

/// A place in the index. A number may be used again, a serial is not.
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

struct Place {
    range: AddressRange,
    serial: u64,
    task: TaskRef<()>,
    /// It has its turn.
    begun: bool,
    /// How many it waits for: those that overlap it and have begun or have a smaller number.
    before: usize,
    /// One of them.
    behind: u64,
    /// Where the way along `behind` has led, and in which version: one that waits for nobody.
    root: (u64, u64),
}

/// Whom somebody waits for.
enum Ahead {
    Nobody,
    Task(Task<()>),
    /// One that another thread is ending.
    Ending,
}

impl Default for Turns {
    fn default() -> Self {
        let (places, index) = (BTreeMap::new(), IntervalIndex::new());
        Self(Lock::new(State { next: 0, serial: 0, version: 1, places, index }))
    }
}

impl State {
    /// Those whose places overlap `range`.
    fn overlapping(&self, range: AddressRange) -> Vec<u64> {
        let mut all = Vec::new();
        self.index.overlapping(range, |Ranged { value, .. }| all.push(value.number));
        all
    }

    /// Whether the place `number` waits for `other`, which overlaps it.
    fn waits(&self, number: u64, other: u64) -> bool {
        self.places
            .get(&other)
            .is_some_and(|place| other != number && (other < number || place.begun))
    }

    /// One that `number` waits for: the first of them, so that ways are short.
    fn first_before(&self, number: u64, range: AddressRange) -> (usize, u64) {
        let before: Vec<_> = self
            .overlapping(range)
            .into_iter()
            .filter(|other| self.waits(number, *other))
            .collect();
        let first = before.iter().min_by_key(|other| (!self.places[*other].begun, **other));
        (before.len(), first.copied().unwrap_or(0))
    }

    /// Lets `number`, which `before` is new for, wait for it.
    fn put_behind(&mut self, number: u64, before: u64) {
        if let Some(place) = self.places.get_mut(&number) {
            if place.before == 0 {
                place.behind = before;
            }
            place.before += 1;
            self.version += 1;
        }
    }

    /// Takes a place. With an old number it is before those that have not begun.
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

    /// Makes the place of `number`, whose turn has begun, as large as `range`.
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

    /// Leaves a place. Returns those whose turn has come.
    fn leave(&mut self, number: u64) -> Vec<Task<()>> {
        let Some(left) = self.places.remove(&number) else { return Vec::new() };
        self.index
            .remove(Ranged { range: left.range, value: Seat { serial: left.serial, number } });
        self.version += 1;
        let mut behind = self.overlapping(left.range);
        behind.retain(|other| !self.places[other].begun && (*other > number || left.begun));
        behind.sort_unstable();
        let mut ready = Vec::new();
        for (at, other) in behind.iter().enumerate() {
            let place = &self.places[other];
            let (range, waits_still) = (place.range, place.before > 1);
            let lost = place.behind == number;
            let next = (waits_still && lost).then(|| {
                let near = behind[..at]
                    .iter()
                    .take(LOOKS)
                    .find(|near| self.places[*near].range.overlaps(range));
                near.copied().unwrap_or_else(|| self.first_before(*other, range).1)
            });
            let Some(place) = self.places.get_mut(other) else { continue };
            place.before -= 1;
            place.behind = next.unwrap_or(place.behind);
            if place.before == 0 {
                ready.extend(place.task.upgrade());
            }
        }
        ready
    }

    /// The one that everything before `number` waits for: that one waits for nobody.
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
    /// Enters, again if `number` is known. `make` makes what is done, of the number of the place
    /// and a flag that says that nobody wants it any more; it calls no foreign code.
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

    /// In the turn of `number`: it needs as much as `range`, which covers what it had.
    pub(super) fn widen(&self, number: u64, range: AddressRange) {
        self.0.lock().widen(number, range);
    }

    /// Begins the turn of `number` if it has come. Otherwise returns the one that everything before
    /// it waits for: that one waits for no turn.
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
        let mut ahead: Option<(Task<()>, Waiter<()>)> = None;
        core::future::poll_fn(|cx: &mut Context<'_>| {
            let task = match self.begin(number) {
                Ahead::Nobody => return Poll::Ready(()),
                Ahead::Ending => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Ahead::Task(task) => task,
            };
            let same = ahead.take().filter(|(known, _)| known.is(&task));
            let (_, waiter) = ahead.insert(same.unwrap_or_else(|| (task.clone(), task.wait())));
            if waiter.poll_unpin(cx).is_ready() {
                // It leaves its place when it ends, here or on another thread.
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await;
    }

    /// Leaves a place. Those whose turn has come are woken.
    fn leave(&self, number: u64) {
        let ready = self.0.lock().leave(number);
        ready.iter().for_each(Task::look_again);
    }
}

/// A place, left by its drop.
pub(super) struct Placed {
    pub(super) turns: Arc<Turns>,
    pub(super) number: u64,
}

impl Drop for Placed {
    fn drop(&mut self) {
        self.turns.leave(self.number);
    }
}

/// A caller's turn. Dropped, it is over.
pub(super) struct Turn {
    task: Task<()>,
    cancelled: Arc<AtomicBool>,
    number: u64,
}

impl Turn {
    /// What its place is known by, to enter again before those who came later.
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
            // Who polls it looks once more, and ends it.
            self.task.look_again();
        }
    }
}

/// `future`, until nobody wants it any more.
pub(super) async fn unless(cancelled: Arc<AtomicBool>, future: impl Future<Output = ()>) {
    let mut future = core::pin::pin!(future);
    core::future::poll_fn(|cx| {
        if cancelled.load(Ordering::Acquire) { Poll::Ready(()) } else { future.as_mut().poll(cx) }
    })
    .await;
}
