//! The queue of an inbox, and the deliveries that its task has taken.
#![forbid(unsafe_code)]

use crate::event::Event;
use crate::foreign::TaskWaker;
use crate::mirror::consumers::{Consumers, wake};
use crate::notifier::InvalidationInfo;
use crate::range::AddressRange;
use crate::sync::{Arc, Lock};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use slab::Slab;

/// The queue of an inbox. Its lock is inside the driver lock where both are held.
#[derive(Default)]
pub(super) struct Post {
    /// One letter for each invalidation whose pass exists.
    pub(super) letters: Slab<Letter>,
    /// Keys of the letters that wait to be taken, in order.
    pub(super) queue: VecDeque<usize>,
    pub(super) consumers: Consumers,
    /// Set when the inbox is closed or the space released. The stream ends when all letters are
    /// done.
    pub(super) closing: bool,
    /// Set when the stream has ended or the inbox is dropped. Later invalidations leave no pass.
    pub(super) ended: bool,
    /// The serial of the last letter.
    pub(super) serial: u64,
}

/// One invalidation, as long as its pass exists. It is queued, taken, or done.
pub(super) struct Letter {
    pub(super) info: InvalidationInfo,
    /// Tells it from later letters with the same key.
    pub(super) serial: u64,
    pub(super) deliveries: u32,
    /// Set while its key is in the queue; clear while a [`Delivery`] has it.
    pub(super) queued: bool,
    /// Set when `done()` was called or the inbox was dropped: its pass is ready.
    pub(super) done: bool,
    /// The task that polled its pass last.
    pub(super) task: Option<Arc<TaskWaker>>,
}

/// The desk of an inbox, without the type of the driver's mappings.
pub(super) trait Counter: Send + Sync {
    fn post(&self) -> &Lock<Post>;
    /// Returns whether this thread holds the driver lock.
    fn is_held_here(&self) -> bool;
}

/// Holds an invalidation that the driver's task has taken from its [`Inbox`](crate::Inbox).
///
/// Call [`done`](Self::done) when the device has stopped using the range. Until then readers of the
/// range wait: see [`Inbox`](crate::Inbox#what-the-task-must-not-wait-for). If it is dropped
/// without `done`, it goes back to the head of the queue ([A2]).
///
/// [A2]: crate::docs::contract#a-drivers-that-are-tasks
#[must_use = "the invalidation waits until `done` is called; dropped, it is delivered again"]
pub struct Delivery {
    desk: Arc<dyn Counter>,
    letter: usize,
    serial: u64,
    info: InvalidationInfo,
    deliveries: u32,
}

impl Post {
    /// Returns the letter of a delivery, unless its pass is gone or done.
    pub(super) fn letter(&mut self, letter: usize, serial: u64) -> Option<&mut Letter> {
        self.letters.get_mut(letter).filter(|letter| letter.serial == serial && !letter.done)
    }

    /// Returns whether all letters are done and no further one comes.
    pub(super) fn is_over(&self) -> bool {
        self.closing && self.letters.iter().all(|(_, letter)| letter.done)
    }
}

impl Delivery {
    pub(super) fn new(
        desk: Arc<dyn Counter>,
        letter: usize,
        serial: u64,
        info: InvalidationInfo,
        deliveries: u32,
    ) -> Self {
        Self { desk, letter, serial, info, deliveries }
    }

    /// Returns the range that is invalidated, from the first address to the last one.
    pub fn range(&self) -> AddressRange {
        self.info.range
    }

    /// Returns the ranges that are invalidated, without the gaps between them.
    ///
    /// See [`Invalidation::ranges`](crate::Invalidation::ranges).
    pub fn ranges(&self) -> &[AddressRange] {
        self.info.ranges()
    }

    /// Returns the reason.
    pub fn event(&self) -> Event {
        self.info.event
    }

    /// Returns whether the memory may have changed already ([M7]).
    ///
    /// If `true`, nothing may be written back to it. See
    /// [`Invalidation::is_late`](crate::Invalidation::is_late).
    ///
    /// [M7]: crate::docs::contract#m-memory-sources
    pub fn is_late(&self) -> bool {
        self.info.late
    }

    /// Returns all that the first pass was told.
    pub fn info(&self) -> InvalidationInfo {
        self.info.clone()
    }

    /// Returns how often it was delivered, this time included ([A2]).
    ///
    /// If it is above 1, an earlier handler may have begun its work.
    ///
    /// [A2]: crate::docs::contract#a-drivers-that-are-tasks
    pub fn deliveries(&self) -> u32 {
        self.deliveries
    }

    /// Completes the pass: the device has stopped using the range ([A1]).
    ///
    /// # Panics
    /// Panics inside [`with`](crate::Inbox::with) or [`install`](crate::Inbox::install) of its own
    /// inbox, because a task that it wakes may need the lock that is held there. The delivery then
    /// goes back to the head of the queue.
    ///
    /// [A1]: crate::docs::contract#a-drivers-that-are-tasks
    pub fn done(self) {
        assert!(
            !self.desk.is_held_here(),
            "`done` is called while this thread holds the inbox's lock: call it after `with` or `install` has returned"
        );
        let (task, consumers) = {
            let mut post = self.desk.post().lock();
            let task = post.letter(self.letter, self.serial).and_then(|letter| {
                letter.done = true;
                letter.task.take()
            });
            (task, if post.is_over() { post.consumers.take() } else { Vec::new() })
        };
        if let Some(task) = task {
            task.rouse();
        }
        wake(consumers);
        // The drop of `self` finds the letter done, and does nothing.
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        let consumers = {
            let mut post = self.desk.post().lock();
            let Some(letter) = post.letter(self.letter, self.serial) else { return };
            letter.queued = true;
            post.queue.push_front(self.letter);
            post.consumers.take()
        };
        wake(consumers);
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("info", &self.info)
            .field("deliveries", &self.deliveries)
            .finish_non_exhaustive()
    }
}
