//! A future that belongs to nobody and that anybody may poll, as often as he likes.
//!
//! `futures::future::Shared` does the same, but clones and wakes the wakers of others under its
//! lock, and a panic of one of them poisons it for all (C8, F1).
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

/// The future, shared. Its result is kept, and cloned for each who asks.
pub(super) struct Task<T: Send + 'static>(Arc<Inner<T>>);

struct Inner<T: Send + 'static> {
    losses: Arc<Losses>,
    state: Lock<State<T>>,
}

struct State<T> {
    stage: Stage<T>,
    /// Somebody woke it since its last poll began.
    woken: bool,
    waiting: Slab<Option<Arc<TaskWaker>>>,
}

enum Stage<T> {
    Idle(BoxFuture<'static, T>),
    /// Somebody polls it. The right to do so is tried for, never waited for.
    Polled,
    Over(T),
}

/// What a poll came to.
#[derive(PartialEq)]
enum Driven {
    Over,
    Waits,
    /// It wants to be polled again.
    Woken,
    /// Somebody else polls it.
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

/// Ends a task whose poll panics, which only a defect of the library does: nobody waits for ever.
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

    /// Polls the future unless somebody does. `own` is the place of who polls: he sees the end.
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
            // Who polls it tells the others.
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
        // It holds what its device made.
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
        let state = State { stage: Stage::Idle(future), woken: false, waiting: Slab::new() };
        Self(Arc::new(Inner { losses: losses.clone(), state: Lock::new(state) }))
    }

    /// Waits for the end, and polls the future meanwhile.
    pub(super) fn wait(&self) -> Waiter<T> {
        Waiter { task: self.0.clone(), place: None, waker: None }
    }

    /// A reference that does not keep it.
    pub(super) fn downgrade(&self) -> TaskRef<T> {
        TaskRef(Arc::downgrade(&self.0))
    }

    /// Whether it is the same one.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Lets those who wait poll it once more.
    pub(super) fn look_again(&self) {
        self.0.wake_by_ref();
    }

    /// Ends it unfinished: nobody can see it end any more. What it has is dropped. `false` if
    /// somebody polls it.
    pub(super) fn give_up(&self) -> bool {
        let (future, waiting) = {
            let mut state = self.0.state.lock();
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

    /// Polls it without anybody who waits, again as often as it wakes itself, at most so often. If
    /// somebody else polls it, those who wait will do so once more. Says whether it is over.
    pub(super) fn poke(&self, times: u32) -> bool {
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

/// A [`Task`] if somebody still has it.
pub(super) struct TaskRef<T: Send + 'static>(Weak<Inner<T>>);

impl<T: Send + 'static> TaskRef<T> {
    /// The last to go drops the future: outside of locks.
    pub(super) fn upgrade(&self) -> Option<Task<T>> {
        self.0.upgrade().map(Task)
    }
}

/// Waits for a [`Task`]. Dropped, it leaves nothing behind.
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
        // Mostly it is over at once, and nobody need be woken.
        if let Some(outcome) = this.task.outcome() {
            return Poll::Ready(outcome);
        }
        let waker = TaskWaker::renew(&mut this.waker, cx.waker(), &this.task.losses);
        let (former, missed, outcome) = {
            let mut state = this.task.state.lock();
            let place = *this.place.get_or_insert_with(|| state.waiting.insert(None));
            let former = state.waiting[place].replace(waker.clone());
            // It was woken after our poll, and before we could be told.
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
