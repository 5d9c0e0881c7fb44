//! Drivers that are tasks: invalidations as a stream.

use crate::block::Waitable;
use crate::engine::futures::read::ReadBegin;
use crate::engine::futures::remove::Close;
use crate::event::Event;
use crate::foreign::{Losses, TaskWaker};
use crate::mirror::consumers::wake;
use crate::mirror::delivery::{Counter, Delivery, Letter, Post};
use crate::mirror::driver_lock::{Collision, DriverLock, MirrorError, RetryBudget};
use crate::notifier::{IntervalNotifier, Invalidation, NotifierId, Sequence, WouldBlock};
use crate::pass::PassFuture;
use crate::range::AddressRange;
use crate::space::{AddressSpace, InsertError};
use crate::subscription::Subscription;
use crate::sync::{Arc, Lock};
use crate::tally::NotifierStats;
use alloc::borrow::Cow;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use futures::stream::Stream;

/// A notifier whose invalidations are handled by a task: registered like any other, and a
/// [`Stream`] on the driver's side.
///
/// Its first pass, under its driver lock, sets the sequence and queues the invalidation; its pass
/// is done when the task has called [`done`](Delivery::done) on what it took from the stream (A1).
/// Several may be taken and completed in any order. What is dropped without `done()`, because the
/// task was cancelled or panicked, is delivered again, first in the queue (A2).
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
///     space.release().await; // ends the stream, once all of it has been handled
/// };
/// futures::join!(driver, program);
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
///
/// The stream ends after [`release`](AddressSpace::release) or [`close`](Self::close), and not
/// because the handles of the space are gone: the inbox keeps the space itself, and so do guards,
/// futures, memory sources and caches, any of which may still invalidate. A program that is done
/// with a space releases it.
///
/// # What the task must not wait for
/// An invalidation is pending until `done()` is called for it. A task that has taken one and then
/// awaits what needs it to be over, before `done()`, waits for itself, for ever and in silence: a
/// [`read_begin`](Self::read_begin) or [`mirror`](Self::mirror) of this inbox or of another driver
/// of the same range, a [`close`](Self::close), an invalidation. So does one that waits for a task
/// that does. The library cannot see it, because a delivery may be completed by any task. Call
/// `done()` first, or mirror in a task of its own.
///
/// # Dropping
/// Dropping the inbox ends the subscription and completes what is pending: by that the driver says
/// that its device maps the range no longer (A4). To handle first what is pending, call
/// [`close`](Self::close) and go on until the stream ends. A task that stops before the stream has
/// ended, after [`Event::Release`] for instance, drops the inbox: the next invalidation waits for
/// it otherwise.
#[must_use = "dropping an inbox ends its subscription at once: keep it as long as the device may use the range"]
pub struct Inbox<T: Send + 'static> {
    subscription: Subscription<InboxNotifier<T>>,
    desk: Arc<Desk<T>>,
}

/// The notifier behind an [`Inbox`].
struct InboxNotifier<T> {
    desk: Arc<Desk<T>>,
    name: Cow<'static, str>,
}

/// What the inbox, its notifier, its passes and its deliveries share.
struct Desk<T> {
    /// The driver lock of the inbox. First passes and installs hold it; so does whoever ends the
    /// stream, so that nothing is installed afterwards (A5).
    mappings: DriverLock<T>,
    /// Inside the driver lock where both are held.
    post: Lock<Post>,
    losses: Arc<Losses>,
}

/// The pass of a queued invalidation.
struct InboxPass<T: Send + 'static> {
    desk: Arc<Desk<T>>,
    letter: usize,
}

impl<T: Send + 'static> IntervalNotifier for InboxNotifier<T> {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let mappings = self.desk.mappings.lock_for(invalidation);
        let (letter, consumers) = {
            let mut post = self.desk.post.lock();
            post.closing |= invalidation.event() == Event::Release;
            if post.ended {
                return Ok(None);
            }
            post.serial += 1;
            let serial = post.serial;
            let letter = Letter {
                info: invalidation.info(),
                serial,
                deliveries: 0,
                queued: true,
                done: false,
                task: None,
            };
            let letter = post.letters.insert(letter);
            post.queue.push_back(letter);
            (letter, post.consumers.take())
        };
        drop(mappings);
        let pass = PassFuture::new(InboxPass { desk: self.desk.clone(), letter });
        wake(consumers);
        Ok(Some(pass))
    }

    fn name(&self) -> Cow<'static, str> {
        self.name.clone()
    }
}

impl<T: Send + 'static> Future for InboxPass<T> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Cloned and dropped outside of the lock.
        let task = TaskWaker::new(cx.waker(), &self.desk.losses);
        let _old = {
            let mut post = self.desk.post.lock();
            let letter = &mut post.letters[self.letter];
            if letter.done {
                return Poll::Ready(());
            }
            letter.task.replace(task)
        };
        Poll::Pending
    }
}

impl<T: Send + 'static> Drop for InboxPass<T> {
    fn drop(&mut self) {
        let _letter = {
            let mut post = self.desk.post.lock();
            let letter = post.letters.try_remove(self.letter);
            if letter.as_ref().is_some_and(|letter| letter.queued) {
                post.queue.retain(|queued| *queued != self.letter);
            }
            letter
        };
    }
}

impl<T: Send + 'static> Inbox<T> {
    /// What is watched.
    pub fn range(&self) -> AddressRange {
        self.subscription.range()
    }

    /// Locks the driver's mappings to look at them or to remove some. To install one use
    /// [`install`](Self::install).
    ///
    /// # Panics
    /// When this thread is in `with` or `install` of the same inbox already: one lock cannot be
    /// taken twice.
    pub fn with<R>(&self, look: impl FnOnce(&mut T) -> R) -> R {
        look(&mut self.desk.mappings.lock())
    }

    /// What tells its subscription from all others of the space, also in
    /// [lists of what is pending](crate::ActiveInvalidation::pending_ids).
    pub fn id(&self) -> NotifierId {
        self.subscription.id()
    }

    /// What it is called in those lists: see [`AddressSpace::named_inbox`].
    pub fn name(&self) -> &str {
        &self.subscription.name
    }

    /// What has happened to it so far, as [`Subscription::stats`] says it.
    pub fn stats(&self) -> NotifierStats {
        self.subscription.stats()
    }

    /// How many invalidations wait to be taken from the stream.
    pub fn queued(&self) -> usize {
        self.desk.post.lock().queue.len()
    }

    /// Whether the stream has ended, or [`close`](Self::close) was called: nothing can be
    /// installed any more (A5).
    pub fn is_closed(&self) -> bool {
        self.subscription.is_closed() || self.desk.post.lock().ended
    }

    /// Begins a read-side section, as [`Subscription::read_begin`] does.
    pub fn read_begin(&self) -> ReadBegin<'_> {
        self.subscription.read_begin()
    }

    /// Whether an invalidation has come since `read_begin` returned `sequence`, as
    /// [`Subscription::read_retry`] does.
    pub fn read_retry(&self, sequence: Sequence) -> bool {
        self.subscription.read_retry(sequence)
    }

    /// Locks, checks and installs in one, as [`DriverLock::install`] does.
    ///
    /// # Errors
    /// [`Collision`] when an invalidation has come since `read_begin`, whether the task has handled
    /// it yet or not (A1), and always when the inbox [is closed](Self::is_closed) (A5).
    ///
    /// # Panics
    /// When this thread is in `with` or `install` of the same inbox already.
    pub fn install<R>(
        &self,
        sequence: Sequence,
        install: impl FnOnce(&mut T) -> R,
    ) -> Result<R, Collision> {
        self.desk.mappings.install_if(
            &self.subscription,
            sequence,
            |_| self.desk.is_open(),
            install,
        )
    }

    /// The whole collision-retry loop, as [`DriverLock::mirror`] does it.
    ///
    /// # Errors
    /// [`MirrorError::Prepare`] with the first error of `prepare`;
    /// [`MirrorError::RetriesExhausted`] when the budget is used up; [`MirrorError::Closed`]
    /// after [`close`](Self::close) and after the stream has ended (A5).
    ///
    /// # Cancel safety
    /// May be dropped at any moment: nothing is installed then unless it has resolved.
    pub fn mirror<P, E, F, R>(
        &self,
        budget: RetryBudget,
        prepare: impl FnMut(Sequence) -> F,
        install: impl FnOnce(&mut T, P) -> R,
    ) -> Waitable<impl Future<Output = Result<R, MirrorError<E>>>>
    where
        F: Future<Output = Result<P, E>>,
    {
        Waitable::new(self.desk.mappings.mirror_if(
            &self.subscription,
            budget,
            |_| self.desk.is_open(),
            prepare,
            install,
        ))
    }

    /// Ends the subscription in the call: invalidations that start from now on are not queued. The
    /// future waits until what is pending has been handled, so somebody has to go on with the
    /// stream, which ends after that (A4). Nothing can be installed any more.
    pub fn close(&self) -> Close<'_> {
        let close = self.subscription.close();
        let consumers = {
            let mut post = self.desk.post.lock();
            post.closing = true;
            post.consumers.take()
        };
        wake(consumers);
        close
    }

    pub(super) fn poll_delivery(&self, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        // Cloned and dropped outside of the lock.
        let task = TaskWaker::new(cx.waker(), &self.desk.losses);
        let changed = {
            let mut post = self.desk.post.lock();
            if let Some(letter) = post.queue.pop_front() {
                let of = &mut post.letters[letter];
                (of.deliveries, of.queued) = (of.deliveries.saturating_add(1), false);
                let (serial, info, deliveries) = (of.serial, of.info.clone(), of.deliveries);
                drop(post);
                return Poll::Ready(Some(Delivery::new(
                    self.desk.clone(),
                    letter,
                    serial,
                    info,
                    deliveries,
                )));
            }
            if post.is_over() {
                drop(post);
                return self.end_stream().map_or_else(
                    || {
                        // Something has come between the two locks.
                        task.rouse();
                        Poll::Pending
                    },
                    |()| Poll::Ready(None),
                );
            }
            post.consumers.add(task.clone(), cx.waker())
        };
        let (woken, _gone) = changed;
        if let Some(woken) = woken {
            woken.rouse();
        }
        Poll::Pending
    }

    /// A4, A5: the stream ends, unless something has come. Under the driver lock, so that nothing
    /// is installed afterwards.
    fn end_stream(&self) -> Option<()> {
        {
            let _mappings = self.desk.mappings.lock();
            let mut post = self.desk.post.lock();
            if !post.is_over() || !post.queue.is_empty() {
                return None;
            }
            post.ended = true;
        }
        drop(self.subscription.close());
        Some(())
    }
}

impl<T: Send> Counter for Desk<T> {
    fn post(&self) -> &Lock<Post> {
        &self.post
    }

    fn is_held_here(&self) -> bool {
        self.mappings.is_held_here()
    }
}

impl<T> Desk<T> {
    /// Whether something may be installed. Under the driver lock.
    fn is_open(&self) -> bool {
        !self.post.lock().ended
    }
}

impl<T: Send + 'static> Stream for Inbox<T> {
    type Item = Delivery;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        self.poll_delivery(cx)
    }
}

/// So that a task can take from the stream while others read: `(&inbox).next()`.
impl<T: Send + 'static> Stream for &Inbox<T> {
    type Item = Delivery;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        self.poll_delivery(cx)
    }
}

impl<T: Send + 'static> Drop for Inbox<T> {
    fn drop(&mut self) {
        drop(self.subscription.close());
        let tasks = {
            let mut post = self.desk.post.lock();
            let post = &mut *post;
            (post.closing, post.ended) = (true, true);
            post.queue.clear();
            let mut tasks = post.consumers.take();
            for (_, letter) in &mut post.letters {
                (letter.done, letter.queued) = (true, false);
                tasks.extend(letter.task.take());
            }
            tasks
        };
        wake(tasks);
    }
}

impl<T: Send + 'static> fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox")
            .field("range", &self.range())
            .field("queued", &self.queued())
            .finish_non_exhaustive()
    }
}

impl AddressSpace {
    /// Registers a driver that is a task, with its mappings `T` under a driver lock of the inbox's
    /// own.
    ///
    /// # Errors
    /// [`InsertError`], with the mappings in it, after [`release`](Self::release).
    pub fn inbox<T: Send + 'static>(
        &self,
        range: AddressRange,
        mappings: T,
    ) -> Result<Inbox<T>, InsertError<T>> {
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
        let (mappings, losses) = (DriverLock::new(mappings), self.shared().host.losses.clone());
        let desk = Arc::new(Desk { mappings, post: Lock::new(Post::default()), losses });
        match self.insert(range, InboxNotifier { desk: desk.clone(), name: name.into() }) {
            Ok(subscription) => Ok(Inbox { subscription, desk }),
            Err(error) => {
                drop(error);
                // Released just now: the notifier was the only other one who knew the desk.
                match Arc::try_unwrap(desk) {
                    Ok(desk) => Err(InsertError::new(desk.mappings.into_inner())),
                    Err(_) => unreachable!("the notifier was dropped with the error"),
                }
            }
        }
    }
}
