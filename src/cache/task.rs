//! A future without an owner. Any number of waiters poll it.
//!
//! `futures::future::Shared` is similar, but it clones and wakes foreign wakers under its lock, and
//! a panic of one waker poisons it for all waiters (C8, F1).
#![forbid(unsafe_code)]

use crate::foreign::{Callback, Losses, TaskWaker};
use crate::sync::{Arc, Lock, Weak};
use alloc::task::Wake;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use futures::future::BoxFuture;
use slab::Slab;

/// A shared future. Stores the result, and clones it for each waiter.
pub(super) struct Task<T: Send + 'static>(Arc<Inner<T>>);

struct Inner<T: Send + 'static> {
    losses: Arc<Losses>,
    state: Lock<State<T>>,
}

/// State of a task, under its lock. No waker is cloned, woken or dropped under it (C8).
struct State<T> {
    stage: Stage<T>,
    /// The future was woken since its last poll began.
    woken: bool,
    /// How many calls of [`Task::poke`] have not ended. They may poll again.
    pokes: usize,
    /// Wakers of the waiters, by the slot of each. `None` once it was taken to be woken.
    waiting: Slab<Option<Arc<TaskWaker>>>,
}

/// Where the future of a task is.
enum Stage<T> {
    /// No thread polls the future; it is here.
    Idle(BoxFuture<'static, T>),
    /// A thread polls the future, which is on its stack. Other threads try for the right to poll,
    /// and never wait for it.
    Polled,
    /// The future has ended with this result, and was dropped.
    Over(T),
}

/// Result of a poll.
#[derive(PartialEq)]
enum Driven {
    /// The task is over.
    Over,
    /// The future is pending and has stored the waker.
    Waits,
    /// The future was woken during the poll and must be polled again.
    Woken,
    /// Another thread polls the future.
    Busy,
}

impl<T> State<T> {
    fn take_waiting(&mut self) -> Vec<Arc<TaskWaker>> {
        self.waiting.iter_mut().filter_map(|(_, waiting)| waiting.take()).collect()
    }
}

impl<T: Clone> State<T> {
    fn outcome(&self) -> Option<T> {
        match &self.stage {
            Stage::Over(outcome) => Some(outcome.clone()),
            _ => None,
        }
    }
}

fn rouse(waiting: Vec<Arc<TaskWaker>>) {
    waiting.iter().for_each(|waiting| waiting.rouse());
}

/// Ends the task if its poll panics, so that no waiter waits for ever. Only a defect of the library
/// panics here.
struct Turn<'a, T: Clone + Default + Send + 'static> {
    task: &'a Inner<T>,
    armed: bool,
}

impl<T: Clone + Default + Send + 'static> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        if self.armed {
            let waiting = {
                let mut state = self.task.state.lock();
                state.stage = Stage::Over(T::default());
                state.take_waiting()
            };
            rouse(waiting);
        }
    }
}

impl<T: Clone + Default + Send + 'static> Inner<T> {
    fn outcome(&self) -> Option<T> {
        self.state.lock().outcome()
    }

    /// Polls the future unless another thread does. `own` is the slot of the polling waiter. If the
    /// future ends, that waiter sees the result itself and is not woken.
    fn drive(self: &Arc<Self>, own: Option<usize>) -> Driven {
        let mut future = {
            let mut state = self.state.lock();
            match core::mem::replace(&mut state.stage, Stage::Polled) {
                Stage::Idle(future) => {
                    state.woken = false;
                    future
                }
                Stage::Polled => return Driven::Busy,
                over @ Stage::Over(_) => {
                    state.stage = over;
                    return Driven::Over;
                }
            }
        };
        let waker = Waker::from(self.clone());
        let mut turn = Turn { task: self, armed: true };
        let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
        turn.armed = false;
        let (driven, waiting, left, own) = {
            let mut state = self.state.lock();
            match polled {
                Poll::Ready(outcome) => {
                    state.stage = Stage::Over(outcome);
                    let own = own.and_then(|own| state.waiting.get_mut(own)?.take());
                    (Driven::Over, state.take_waiting(), Some(future), own)
                }
                Poll::Pending => {
                    state.stage = Stage::Idle(future);
                    let woken = state.woken;
                    let waiting = if woken { state.take_waiting() } else { Vec::new() };
                    (if woken { Driven::Woken } else { Driven::Waits }, waiting, None, None)
                }
            }
        };
        self.losses.run(Callback::Device, |_| drop(left));
        drop(own);
        rouse(waiting);
        driven
    }
}

impl<T: Send + 'static> Wake for Inner<T> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let waiting = {
            let mut state = self.state.lock();
            state.woken = true;
            // The polling thread wakes the waiters after its poll.
            if matches!(state.stage, Stage::Polled) {
                return;
            }
            state.take_waiting()
        };
        rouse(waiting);
    }
}

impl<T: Send + 'static> Drop for Inner<T> {
    fn drop(&mut self) {
        // The future holds values of the device, so its drop is guarded.
        let stage = core::mem::replace(&mut self.state.get_mut().stage, Stage::Polled);
        self.losses.run(Callback::Device, |_| drop(stage));
    }
}

impl<T: Send + 'static> Clone for Task<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Clone + Default + Send + 'static> Task<T> {
    pub(super) fn new(
        losses: &Arc<Losses>,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Self {
        let future: BoxFuture<'static, T> = alloc::boxed::Box::pin(future);
        let state =
            State { stage: Stage::Idle(future), woken: false, pokes: 0, waiting: Slab::new() };
        Self(Arc::new(Inner { losses: losses.clone(), state: Lock::new(state) }))
    }

    /// Returns a future that waits for the result and polls the task meanwhile.
    pub(super) fn wait(&self) -> Waiter<T> {
        Waiter { task: self.0.clone(), place: None, waker: None }
    }

    /// Returns a weak reference.
    pub(super) fn downgrade(&self) -> TaskRef<T> {
        TaskRef(Arc::downgrade(&self.0))
    }

    /// Returns `former` if it waits for this task, else a new waiter.
    pub(super) fn wait_again(&self, former: Option<Waiter<T>>) -> Waiter<T> {
        former.filter(|waiter| Arc::ptr_eq(&waiter.task, &self.0)).unwrap_or_else(|| self.wait())
    }

    /// Wakes the waiters, so that they poll the task once more.
    pub(super) fn look_again(&self) {
        self.0.wake_by_ref();
    }

    /// Drops the future unfinished and ends the task with the default result. Returns `false` if a
    /// thread polls it, or may do so again within [`poke`](Self::poke).
    pub(super) fn give_up(&self) -> bool {
        let (future, waiting) = {
            let mut state = self.0.state.lock();
            if state.pokes > 0 {
                return false;
            }
            match core::mem::replace(&mut state.stage, Stage::Polled) {
                Stage::Idle(future) => {
                    state.stage = Stage::Over(T::default());
                    (future, state.take_waiting())
                }
                other => {
                    let over = matches!(other, Stage::Over(_));
                    state.stage = other;
                    return over;
                }
            }
        };
        self.0.losses.run(Callback::Device, |_| drop(future));
        rouse(waiting);
        true
    }

    /// Polls the task without a waiter, up to `times` times while it wakes itself. If another
    /// thread polls it, the waiters poll it once more. Returns `true` if it is over.
    pub(super) fn poke(&self, times: u32) -> bool {
        let _poking = Poking::new(&self.0);
        for _ in 0..times {
            match self.0.drive(None) {
                Driven::Woken => {}
                Driven::Busy => {
                    self.0.wake_by_ref();
                    return false;
                }
                Driven::Over => return true,
                Driven::Waits => return false,
            }
        }
        false
    }
}

/// A call of [`Task::poke`] that has not ended.
struct Poking<'a, T: Send + 'static>(&'a Inner<T>);

impl<'a, T: Send + 'static> Poking<'a, T> {
    fn new(task: &'a Inner<T>) -> Self {
        task.state.lock().pokes += 1;
        Self(task)
    }
}

impl<T: Send + 'static> Drop for Poking<'_, T> {
    fn drop(&mut self) {
        self.0.state.lock().pokes -= 1;
    }
}

/// A weak reference to a [`Task`].
pub(super) struct TaskRef<T: Send + 'static>(Weak<Inner<T>>);

impl<T: Send + 'static> TaskRef<T> {
    /// Returns the task if it still exists. The last reference drops the future, so drop it outside
    /// of locks.
    pub(super) fn upgrade(&self) -> Option<Task<T>> {
        self.0.upgrade().map(Task)
    }
}

/// Waits for a [`Task`]. Its drop leaves nothing behind.
pub(super) struct Waiter<T: Send + 'static> {
    task: Arc<Inner<T>>,
    place: Option<usize>,
    waker: Option<Arc<TaskWaker>>,
}

impl<T: Send + 'static> Unpin for Waiter<T> {}

impl<T: Clone + Default + Send + 'static> Future for Waiter<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        this.task.drive(this.place);
        // Most tasks end in the first poll, and then need no waker.
        if let Some(outcome) = this.task.outcome() {
            return Poll::Ready(outcome);
        }
        let waker = TaskWaker::renew(&mut this.waker, cx.waker(), &this.task.losses);
        let (former, missed, outcome) = {
            let mut state = this.task.state.lock();
            let place = *this.place.get_or_insert_with(|| state.waiting.insert(None));
            let former = state.waiting[place].replace(waker.clone());
            // The task was woken after the poll and before this waker was stored.
            let missed = state.woken && matches!(state.stage, Stage::Idle(_));
            (former, missed, state.outcome())
        };
        drop(former);
        if missed {
            waker.rouse();
        }
        outcome.map_or(Poll::Pending, Poll::Ready)
    }
}

impl<T: Send + 'static> Drop for Waiter<T> {
    fn drop(&mut self) {
        let Some(place) = self.place else { return };
        let waker = self.task.state.lock().waiting.remove(place);
        drop(waker);
    }
}
