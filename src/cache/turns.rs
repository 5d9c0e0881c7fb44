//! Turns of callers whose ranges overlap, where the device may have no two registrations that do.
//!
//! A caller enters with a range and has its turn when no earlier caller with an overlapping range
//! is left. What it does in its turn is a [`Task`]: those behind it poll it as well, so a caller
//! that is not polled holds up nobody (K7).
#![forbid(unsafe_code)]

use super::task::{Task, TaskRef, Waiter};
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicBool, Lock, Ordering};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::future::Future;
use core::task::{Context, Poll};
use futures::FutureExt;

#[derive(Default)]
pub(super) struct Turns(Lock<State>);

#[derive(Default)]
struct State {
    next: u64,
    places: BTreeMap<u64, Place>,
}

struct Place {
    range: AddressRange,
    task: TaskRef<()>,
    /// It has its turn.
    begun: bool,
}

/// Whom somebody waits for.
enum Ahead {
    Nobody,
    Task(Task<()>),
    /// One that another thread is ending.
    Ending,
}

impl Turns {
    /// Enters. `make` makes what is done, of the number of the place and a flag that says that
    /// nobody wants it any more; it calls no foreign code.
    pub(super) fn enter(&self, range: AddressRange, make: impl FnOnce(u64, Arc<AtomicBool>) -> Task<()>) -> Turn {
        let cancelled = Arc::new(AtomicBool::new(false));
        let mut state = self.0.lock();
        let number = state.next;
        state.next += 1;
        let task = make(number, cancelled.clone());
        state.places.insert(number, Place { range, task: task.downgrade(), begun: false });
        Turn { task, cancelled }
    }

    /// Begins the turn of `number` if it has come. Otherwise returns the one that everything before
    /// it waits for: that one waits for no turn.
    fn begin(&self, number: u64) -> Ahead {
        let mut state = self.0.lock();
        let (mut at, Some(mut range)) = (number, state.places.get(&number).map(|place| place.range)) else {
            return Ahead::Nobody;
        };
        loop {
            let mut before = state
                .places
                .iter()
                .filter(|(other, place)| **other != at && (**other < at || place.begun) && place.range.overlaps(range));
            match before.next() {
                Some((other, place)) if place.begun => {
                    let task = state.places[other].task.upgrade();
                    return task.map_or(Ahead::Ending, Ahead::Task);
                }
                Some((other, place)) => (at, range) = (*other, place.range),
                None => break,
            }
        }
        if at != number {
            let task = state.places[&at].task.upgrade();
            return task.map_or(Ahead::Ending, Ahead::Task);
        }
        if let Some(place) = state.places.get_mut(&number) {
            place.begun = true;
        }
        Ahead::Nobody
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

    /// Leaves a place. Those behind it look again.
    fn leave(&self, number: u64) {
        let behind: Vec<_> = {
            let mut state = self.0.lock();
            state.places.remove(&number);
            let behind = state.places.range(number..).filter(|(_, place)| !place.begun);
            behind.filter_map(|(_, place)| place.task.upgrade()).collect()
        };
        behind.iter().for_each(Task::look_again);
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
}

impl Turn {
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
    core::future::poll_fn(|cx| if cancelled.load(Ordering::Acquire) { Poll::Ready(()) } else { future.as_mut().poll(cx) }).await;
}
