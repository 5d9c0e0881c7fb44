//! Drivers that are tasks: invalidations as a stream.

use crate::event::Event;
use crate::mirror::driver_lock::{Collision, DriverLock, MirrorError, RetryBudget};
use crate::notifier::{IntervalNotifier, Invalidation, InvalidationInfo, Sequence, WouldBlock};
use crate::pass::PassFuture;
use crate::range::AddressRange;
use crate::space::{AddressSpace, InsertError};
use crate::subscription::Subscription;
use crate::sync::Arc;
use crate::{Close, ReadBegin};
use alloc::borrow::Cow;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use futures::stream::Stream;
use slab::Slab;

/// A notifier whose invalidations are handled by a task: registered like any other, and a [`Stream`] on the driver's side.
///
/// Its first pass, under its driver lock, sets the sequence and queues the invalidation; its pass is done when the task has called
/// [`done`](Delivery::done) on what it took from the stream (A1). Several may be taken and completed in any order. What is dropped without
/// `done()`, because the task was cancelled or panicked, is delivered again, first in the queue (A2).
///
/// ```
/// # use shootdown::*;
/// use futures::StreamExt;
/// # async fn flush(_range: AddressRange) {}
/// # futures::executor::block_on(async {
/// let space = AddressSpace::new();
/// let range = AddressRange::new(0x10000, 0x4000)?;
/// let mut inbox = space.inbox(range, Vec::<u64>::new())?;
///
/// let driver = async {
///     while let Some(invalidation) = inbox.next().await {
///         inbox.with(|mappings| mappings.retain(|page| !invalidation.range().contains(*page)));
///         flush(invalidation.range()).await;
///         invalidation.done();
///     }
/// };
/// let program = async {
///     drop(space.invalidate(range, Event::Unmap).await);
///     space.release().await; // ends the stream
/// };
/// futures::join!(driver, program);
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
///
/// Dropping the inbox ends the subscription and completes what is pending: by that the driver says that its device maps the range no
/// longer (A4). To handle first what is pending, call [`remove`](Self::remove) and go on until the stream ends.
pub struct Inbox<T: Send + 'static> {
    subscription: Subscription<InboxNotifier<T>>,
    desk: Arc<DriverLock<Desk<T>>>,
}

/// The notifier behind an [`Inbox`].
struct InboxNotifier<T> {
    desk: Arc<DriverLock<Desk<T>>>,
    name: Cow<'static, str>,
}

/// What the driver lock of an inbox protects.
struct Desk<T> {
    mappings: T,
    /// Invalidations whose pass is pending.
    letters: Slab<Letter>,
    /// Those that wait to be taken, in order.
    queue: VecDeque<usize>,
    /// Tasks that wait for the stream.
    consumers: Vec<Waker>,
    /// No further invalidation comes: the inbox was removed, or the space released.
    closing: bool,
    /// The stream has ended, or the inbox is gone: nobody handles what comes now.
    ended: bool,
    serial: u64,
}

struct Letter {
    info: InvalidationInfo,
    serial: u64,
    deliveries: u32,
    done: bool,
    waker: Option<Waker>,
}

/// The pass of a queued invalidation.
struct InboxPass<T: Send + 'static> {
    desk: Arc<DriverLock<Desk<T>>>,
    letter: usize,
}

/// An invalidation that the driver's task has taken from its [`Inbox`]; call [`done`](Self::done) when the device has stopped using the range.
///
/// Dropped without that it goes back to the head of the queue.
#[must_use = "the invalidation waits until `done` is called; dropped, it is delivered again"]
pub struct Delivery<T: Send + 'static> {
    desk: Arc<DriverLock<Desk<T>>>,
    letter: usize,
    serial: u64,
    info: InvalidationInfo,
    deliveries: u32,
}

impl<T> Desk<T> {
    /// The letter that a delivery stands for, unless its pass is gone or done.
    fn letter(&mut self, letter: usize, serial: u64) -> Option<&mut Letter> {
        self.letters.get_mut(letter).filter(|letter| letter.serial == serial && !letter.done)
    }

    /// Whether nothing is left to be handled and nothing will come.
    fn is_over(&self) -> bool {
        self.closing && self.letters.iter().all(|(_, letter)| letter.done)
    }
}

impl<T: Send + 'static> IntervalNotifier for InboxNotifier<T> {
    fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        let mut desk = self.desk.lock_for(invalidation);
        desk.closing |= invalidation.event() == Event::Release;
        if desk.ended {
            return Ok(None);
        }
        desk.serial += 1;
        let serial = desk.serial;
        let letter = Letter { info: invalidation.info(), serial, deliveries: 0, done: false, waker: None };
        let letter = desk.letters.insert(letter);
        desk.queue.push_back(letter);
        let consumers = core::mem::take(&mut desk.consumers);
        drop(desk);
        consumers.into_iter().for_each(Waker::wake);
        Ok(Some(PassFuture::new(InboxPass { desk: self.desk.clone(), letter })))
    }

    fn name(&self) -> Cow<'static, str> {
        self.name.clone()
    }
}

impl<T: Send + 'static> Future for InboxPass<T> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Cloned and dropped outside of the lock: both may be foreign code.
        let waker = cx.waker().clone();
        let mut desk = self.desk.lock();
        let letter = &mut desk.letters[self.letter];
        if letter.done {
            return Poll::Ready(());
        }
        let old = letter.waker.replace(waker);
        drop(desk);
        drop(old);
        Poll::Pending
    }
}

impl<T: Send + 'static> Drop for InboxPass<T> {
    fn drop(&mut self) {
        let mut desk = self.desk.lock();
        let letter = desk.letters.remove(self.letter);
        desk.queue.retain(|queued| *queued != self.letter);
        drop(desk);
        drop(letter);
    }
}

impl<T: Send + 'static> Inbox<T> {
    /// What is watched.
    pub fn range(&self) -> AddressRange {
        self.subscription.range()
    }

    /// Locks the driver's mappings to look at them or to remove some. To install one use [`install`](Self::install).
    pub fn with<R>(&self, look: impl FnOnce(&mut T) -> R) -> R {
        look(&mut self.desk.lock().mappings)
    }

    /// How many invalidations wait to be taken from the stream.
    pub fn queued(&self) -> usize {
        self.desk.lock().queue.len()
    }

    /// Begins a read-side section, as [`Subscription::read_begin`] does.
    pub fn read_begin(&self) -> ReadBegin<'_> {
        self.subscription.read_begin()
    }

    /// Whether an invalidation has come since `read_begin` returned `sequence`, as [`Subscription::read_retry`] does.
    pub fn read_retry(&self, sequence: Sequence) -> bool {
        self.subscription.read_retry(sequence)
    }

    /// Locks, checks and installs in one, as [`DriverLock::install`] does.
    ///
    /// # Errors
    /// [`Collision`] when an invalidation has come since `read_begin`, whether the task has handled it yet or not (A1).
    pub fn install<R>(&self, sequence: Sequence, install: impl FnOnce(&mut T) -> R) -> Result<R, Collision> {
        self.desk.install(&self.subscription, sequence, |desk| install(&mut desk.mappings))
    }

    /// The whole collision-retry loop, as [`DriverLock::mirror`] does it.
    ///
    /// # Errors
    /// [`MirrorError::Prepare`] with the first error of `prepare`; [`MirrorError::RetriesExhausted`] when the budget is used up;
    /// [`MirrorError::Closed`] after [`remove`](Self::remove).
    ///
    /// # Cancel safety
    /// May be dropped at any moment: nothing is installed then unless it has resolved.
    pub async fn mirror<P, E, F, R>(
        &self,
        budget: RetryBudget,
        prepare: impl FnMut(Sequence) -> F,
        mut install: impl FnMut(&mut T, P) -> R,
    ) -> Result<R, MirrorError<E>>
    where
        F: Future<Output = Result<P, E>>,
    {
        self.desk.mirror(&self.subscription, budget, prepare, |desk, prepared| install(&mut desk.mappings, prepared)).await
    }

    /// Ends the subscription in the call: invalidations that start from now on are not queued. The future waits until what is pending has
    /// been handled, so somebody has to go on with the stream, which ends after that (A4).
    pub fn remove(&self) -> Close<'_> {
        let close = self.subscription.close();
        let mut desk = self.desk.lock();
        desk.closing = true;
        let consumers = core::mem::take(&mut desk.consumers);
        drop(desk);
        consumers.into_iter().for_each(Waker::wake);
        close
    }

    fn poll_delivery(&self, cx: &mut Context<'_>) -> Poll<Option<Delivery<T>>> {
        let mut waker = Some(cx.waker().clone());
        let mut desk = self.desk.lock();
        let Some(letter) = desk.queue.pop_front() else {
            if desk.is_over() {
                desk.ended = true;
                return Poll::Ready(None);
            }
            if !desk.consumers.iter().any(|known| known.will_wake(cx.waker())) {
                desk.consumers.extend(waker.take());
            }
            drop(desk);
            return Poll::Pending;
        };
        let of = &mut desk.letters[letter];
        of.deliveries += 1;
        let delivery = Delivery { desk: self.desk.clone(), letter, serial: of.serial, info: of.info, deliveries: of.deliveries };
        drop(desk);
        Poll::Ready(Some(delivery))
    }
}

impl<T: Send + 'static> Stream for Inbox<T> {
    type Item = Delivery<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Delivery<T>>> {
        self.poll_delivery(cx)
    }
}

/// So that a task can take from the stream while others read: `(&inbox).next()`.
impl<T: Send + 'static> Stream for &Inbox<T> {
    type Item = Delivery<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Delivery<T>>> {
        self.poll_delivery(cx)
    }
}

impl<T: Send + 'static> Drop for Inbox<T> {
    fn drop(&mut self) {
        drop(self.subscription.close());
        let mut desk = self.desk.lock();
        (desk.closing, desk.ended) = (true, true);
        let mut wakers = core::mem::take(&mut desk.consumers);
        desk.queue.clear();
        for (_, letter) in &mut desk.letters {
            letter.done = true;
            wakers.extend(letter.waker.take());
        }
        drop(desk);
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl<T: Send + 'static> fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").field("range", &self.range()).field("queued", &self.queued()).finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Delivery<T> {
    /// What is invalidated.
    pub fn range(&self) -> AddressRange {
        self.info.range
    }

    /// Why.
    pub fn event(&self) -> Event {
        self.info.event
    }

    /// All that the first pass was told.
    pub fn info(&self) -> InvalidationInfo {
        self.info
    }

    /// How often it has been delivered, this time included: above 1, a handler may have begun already (A2).
    pub fn deliveries(&self) -> u32 {
        self.deliveries
    }

    /// The device has stopped using the range: completes the pass.
    pub fn done(self) {
        let mut desk = self.desk.lock();
        let waker = desk.letter(self.letter, self.serial).and_then(|letter| {
            letter.done = true;
            letter.waker.take()
        });
        let consumers = if desk.is_over() { core::mem::take(&mut desk.consumers) } else { Vec::new() };
        drop(desk);
        waker.into_iter().chain(consumers).for_each(Waker::wake);
        // The drop that follows finds it done.
    }
}

impl<T: Send + 'static> Drop for Delivery<T> {
    fn drop(&mut self) {
        let mut desk = self.desk.lock();
        if desk.letter(self.letter, self.serial).is_none() {
            return;
        }
        desk.queue.push_front(self.letter);
        let consumers = core::mem::take(&mut desk.consumers);
        drop(desk);
        consumers.into_iter().for_each(Waker::wake);
    }
}

impl<T: Send + 'static> fmt::Debug for Delivery<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery").field("info", &self.info).field("deliveries", &self.deliveries).finish_non_exhaustive()
    }
}

impl AddressSpace {
    /// Registers a driver that is a task, with its mappings `T` under a driver lock of the inbox's own.
    ///
    /// # Errors
    /// [`InsertError`], with the mappings in it, after [`release`](Self::release).
    pub fn inbox<T: Send + 'static>(&self, range: AddressRange, mappings: T) -> Result<Inbox<T>, InsertError<T>> {
        self.named_inbox(range, mappings, Cow::Borrowed(core::any::type_name::<Inbox<T>>()))
    }

    /// [`inbox`](Self::inbox) with a name for lists of what is pending (C6).
    ///
    /// # Errors
    /// [`InsertError`], with the mappings in it, after [`release`](Self::release).
    pub fn named_inbox<T: Send + 'static>(
        &self,
        range: AddressRange,
        mappings: T,
        name: impl Into<Cow<'static, str>>,
    ) -> Result<Inbox<T>, InsertError<T>> {
        if self.is_released() {
            return Err(InsertError::new(mappings));
        }
        let desk = Desk {
            mappings,
            letters: Slab::new(),
            queue: VecDeque::new(),
            consumers: Vec::new(),
            closing: false,
            ended: false,
            serial: 0,
        };
        let desk = Arc::new(DriverLock::new(desk));
        match self.insert(range, InboxNotifier { desk: desk.clone(), name: name.into() }) {
            Ok(subscription) => Ok(Inbox { subscription, desk }),
            Err(error) => {
                drop(error);
                // Released just now: the notifier was the only other one who knew the desk.
                match Arc::try_unwrap(desk) {
                    Ok(desk) => Err(InsertError::new(desk.into_inner().mappings)),
                    Err(_) => unreachable!("the notifier was dropped with the error"),
                }
            }
        }
    }
}
