//! The tasks that wait for the stream of an inbox.

use crate::foreign::TaskWaker;
use crate::sync::Arc;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::task::Waker;

/// Tasks that wait for the stream.
///
/// A `&Inbox` is a stream, so nobody says when such a task goes. There is room for few: when one
/// more comes the oldest is woken and forgotten. If it is still there it comes back, which shows
/// that more are alive, and there is more room (A5).
#[derive(Default)]
pub(super) struct Consumers {
    waiting: VecDeque<Arc<TaskWaker>>,
    /// Those that were forgotten last, to tell who comes back.
    forgotten: VecDeque<Arc<TaskWaker>>,
    room: usize,
    /// How often one was forgotten since there was more room.
    count: usize,
}

/// There is room for as many tasks, at least.
const FEW_CONSUMERS: usize = 8;
/// As many are remembered of those that were forgotten.
const REMEMBERED: usize = 32;
/// After so many turns of all that are known there is more room in any case: more than can be
/// remembered may be waking each other.
const MANY_TURNS: usize = 256;

impl Consumers {
    pub(super) fn take(&mut self) -> Vec<Arc<TaskWaker>> {
        self.room = self.waiting.len();
        core::mem::take(&mut self.waiting).into()
    }

    /// One more waits. Returns who is to be woken, and others that are to be dropped outside of the
    /// lock.
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

pub(super) fn wake(tasks: Vec<Arc<TaskWaker>>) {
    tasks.iter().for_each(|task| task.rouse());
}
