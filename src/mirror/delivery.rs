//! What waits to be handled by a driver that is a task, and what it has taken.
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

/// What waits to be handled.
#[derive(Default)]
pub(super) struct Post {
    /// Invalidations whose pass is pending.
    pub(super) letters: Slab<Letter>,
    /// Those that wait to be taken, in order.
    pub(super) queue: VecDeque<usize>,
    pub(super) consumers: Consumers,
    /// No further invalidation comes: the inbox was removed, or the space released.
    pub(super) closing: bool,
    /// The stream has ended, or the inbox is gone: nobody handles what comes now.
    pub(super) ended: bool,
    pub(super) serial: u64,
}

pub(super) struct Letter {
    pub(super) info: InvalidationInfo,
    pub(super) serial: u64,
    pub(super) deliveries: u32,
    /// It is in the queue.
    pub(super) queued: bool,
    pub(super) done: bool,
    pub(super) task: Option<Arc<TaskWaker>>,
}

/// What a delivery needs of the inbox that it comes from, whatever the driver's mappings are.
pub(super) trait Counter: Send + Sync {
    fn post(&self) -> &Lock<Post>;
    /// Whether this thread holds the driver lock.
    fn is_held_here(&self) -> bool;
}

/// An invalidation that the driver's task has taken from its [`Inbox`](crate::Inbox); call
/// [`done`](Self::done) when the device has stopped using the range.
///
/// Dropped without that it goes back to the head of the queue. While it is held, readers of the
/// range wait: see [`Inbox`](crate::Inbox#what-the-task-must-not-wait-for).
#[must_use = "the invalidation waits until `done` is called; dropped, it is delivered again"]
pub struct Delivery {
    desk: Arc<dyn Counter>,
    letter: usize,
    serial: u64,
    info: InvalidationInfo,
    deliveries: u32,
}

impl Post {
    /// The letter that a delivery stands for, unless its pass is gone or done.
    pub(super) fn letter(&mut self, letter: usize, serial: u64) -> Option<&mut Letter> {
        self.letters.get_mut(letter).filter(|letter| letter.serial == serial && !letter.done)
    }

    /// Whether nothing is left to be handled and nothing will come.
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

    /// What is invalidated, from the first address to the last one.
    pub fn range(&self) -> AddressRange {
        self.info.range
    }

    /// What is invalidated, without the gaps: see
    /// [`Invalidation::ranges`](crate::Invalidation::ranges).
    pub fn ranges(&self) -> &[AddressRange] {
        self.info.ranges()
    }

    /// Why.
    pub fn event(&self) -> Event {
        self.info.event
    }

    /// Returns whether the memory may have changed already (M7): then nothing may be written back
    /// to it. See [`Invalidation::is_late`](crate::Invalidation::is_late).
    pub fn is_late(&self) -> bool {
        self.info.late
    }

    /// All that the first pass was told.
    pub fn info(&self) -> InvalidationInfo {
        self.info.clone()
    }

    /// How often it has been delivered, this time included: above 1, a handler may have begun
    /// already (A2).
    pub fn deliveries(&self) -> u32 {
        self.deliveries
    }

    /// The device has stopped using the range: completes the pass.
    ///
    /// # Panics
    /// When called inside [`with`](crate::Inbox::with) or [`install`](crate::Inbox::install) of its
    /// own inbox: what it wakes may need the lock that is held there. The delivery then goes back
    /// to the head of the queue.
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
        // The drop that follows finds it done.
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
