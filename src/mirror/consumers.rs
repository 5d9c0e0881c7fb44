//! The wakers of tasks that wait for the stream of an inbox.

use crate::foreign::TaskWaker;
use crate::sync::Arc;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::task::Waker;

/// The tasks that wait for the stream.
///
/// `&Inbox` is a stream, so a task that goes away does not say so. The set is bounded, so that such
/// tasks leave nothing behind (A5). When it is full, the oldest task is woken and forgotten. If
/// that task is alive, it polls again and comes back, and the bound grows.
#[derive(Default)]
pub(super) struct Consumers {
    /// The tasks to wake, oldest first; at most `room` of them.
    waiting: VecDeque<Arc<TaskWaker>>,
    /// The tasks that were forgotten last, to recognise one that comes back.
    forgotten: VecDeque<Arc<TaskWaker>>,
    /// The bound of `waiting`; at least [`FEW_CONSUMERS`] once a task waits.
    room: usize,
    /// The number of tasks that were forgotten since `room` was last doubled.
    count: usize,
}

/// The least bound of waiting tasks.
const FEW_CONSUMERS: usize = 8;
/// The bound of remembered tasks among those that were forgotten.
const REMEMBERED: usize = 32;
/// The bound doubles after this many turns of all known tasks. More tasks than are remembered may
/// be alive then and wake each other in turn, without one being recognised.
const MANY_TURNS: usize = 256;

impl Consumers {
    /// Takes all waiting tasks, to be woken outside of the lock.
    pub(super) fn take(&mut self) -> Vec<Arc<TaskWaker>> {
        self.room = self.waiting.len();
        core::mem::take(&mut self.waiting).into()
    }

    /// Adds a task. Returns the task to wake, if there is one, and tasks to drop; both outside of
    /// the lock.
    #[must_use]
    pub(super) fn add(
        &mut self,
        task: Arc<TaskWaker>,
        waker: &Waker,
    ) -> (Option<Arc<TaskWaker>>, [Option<Arc<TaskWaker>>; 2]) {
        if self.waiting.iter().any(|known| known.wakes(waker)) {
            return (None, [None, None]);
        }
        self.room = self.room.max(FEW_CONSUMERS);
        let back = self.forgotten.iter().position(|known| known.wakes(waker));
        let back = back.and_then(|at| self.forgotten.remove(at));
        self.room += usize::from(back.is_some());
        let oldest = if self.waiting.len() >= self.room { self.waiting.pop_front() } else { None };
        self.waiting.push_back(task);
        let mut gone = None;
        if let Some(oldest) = &oldest {
            self.forgotten.push_back(oldest.clone());
            if self.forgotten.len() > REMEMBERED {
                gone = self.forgotten.pop_front();
            }
            self.count += 1;
            if self.count > MANY_TURNS * (self.room + REMEMBERED) {
                (self.room, self.count) = (2 * self.room, 0);
            }
        }
        (oldest, [back, gone])
    }
}

/// Wakes the tasks. No lock is held.
pub(super) fn wake(tasks: Vec<Arc<TaskWaker>>) {
    tasks.iter().for_each(|task| task.rouse());
}
