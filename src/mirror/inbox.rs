//! Drivers that are tasks or threads: invalidations as a stream (A).

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

/// Delivers invalidations to a task or thread, as a [`Stream`]: made by [`AddressSpace::inbox`].
///
/// It is a notifier like any other. Its first pass takes its driver lock, sets the sequence and
/// queues the invalidation. The task takes a [`Delivery`] from the stream, stops the device, and
/// calls [`done`](Delivery::done), which completes the pass ([A1]). It may take several deliveries
/// and complete them in any order. A delivery that is dropped without `done()`, because the task
/// was cancelled or panicked, is delivered again, first in the queue ([A2]).
///
/// The inbox also has the read side of the driver: [`mirror`](Self::mirror), or
/// [`read_begin`](Self::read_begin) and [`install`](Self::install).
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
///         let range = invalidation.range();
///         inbox.with(|pages| pages.retain(|page| !range.contains(*page)));
///         flush(range).await;
///         invalidation.done();
///     }
/// };
/// let program = async {
///     drop(space.invalidate(range, Event::Unmap).await);
///     space.release().await; // ends the stream after the last delivery
/// };
/// futures::join!(driver, program);
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// ```
///
/// # The end of the stream
/// The stream ends after [`release`](AddressSpace::release) or [`close`](Self::close), when all
/// deliveries are done ([A4]). It does not end when the program drops its handles of the space. The
/// inbox keeps the space itself, and so do guards, futures, memory sources and caches, any of which
/// may still invalidate. A program that is done with a space releases it.
///
/// # What the task must not wait for
/// An invalidation is pending until `done()` is called. Between the two, the task must not await
/// - a [`read_begin`](Self::read_begin) or [`mirror`](Self::mirror) of this inbox, or of another
///   driver of the same range,
/// - a [`close`](Self::close),
/// - an invalidation,
/// - another task that waits for one of these.
///
/// Such a wait is for itself, and never ends. The library cannot see it, because any task may
/// complete a delivery. Call `done()` first, or mirror in another task.
///
/// # Dropping
/// The drop ends the subscription and completes all pending passes. It says that the device does
/// not map the range any more ([A4]). To handle pending invalidations first, call
/// [`close`](Self::close) and go on until the stream ends. A task that stops before the stream has
/// ended, for instance after [`Event::Release`], must drop the inbox. Otherwise the next
/// invalidation waits for it.
///
/// [A1]: crate::docs::contract#a-drivers-that-are-tasks
/// [A2]: crate::docs::contract#a-drivers-that-are-tasks
/// [A4]: crate::docs::contract#a-drivers-that-are-tasks
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

/// The state that the inbox, its notifier, its passes and its deliveries share.
struct Desk<T> {
    /// The driver lock of the inbox. First passes and installs hold it. It is also held while the
    /// stream is ended, so that nothing is installed afterwards (A5).
    mappings: DriverLock<T>,
    /// Taken inside the driver lock where both are held.
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
        // C8: wakers are cloned and dropped outside of the lock.
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
    /// Returns the range that the inbox watches.
    pub fn range(&self) -> AddressRange {
        self.subscription.range()
    }

    /// Locks the driver's mappings, to look at them or to remove some.
    ///
    /// To install a mapping, use [`install`](Self::install).
    ///
    /// # Panics
    /// Panics if this thread is in `with` or `install` of the same inbox already, because one lock
    /// cannot be taken twice.
    pub fn with<R>(&self, look: impl FnOnce(&mut T) -> R) -> R {
        look(&mut self.desk.mappings.lock())
    }

    /// Returns the id of its subscription: see [`Subscription::id`].
    pub fn id(&self) -> NotifierId {
        self.subscription.id()
    }

    /// Returns its name in lists of pending passes: see [`AddressSpace::named_inbox`].
    pub fn name(&self) -> &str {
        &self.subscription.name
    }

    /// Returns the counts of what happened to it so far: see [`Subscription::stats`].
    pub fn stats(&self) -> NotifierStats {
        self.subscription.stats()
    }

    /// Returns how many invalidations wait to be taken from the stream.
    pub fn queued(&self) -> usize {
        self.desk.post.lock().queue.len()
    }

    /// Returns whether the stream has ended or [`close`](Self::close) was called ([A5]).
    ///
    /// Nothing can be installed any more then.
    ///
    /// [A5]: crate::docs::contract#a-drivers-that-are-tasks
    pub fn is_closed(&self) -> bool {
        self.subscription.is_closed() || self.desk.post.lock().ended
    }

    /// Begins a read-side section: see [`Subscription::read_begin`].
    pub fn read_begin(&self) -> ReadBegin<'_> {
        self.subscription.read_begin()
    }

    /// Returns whether an invalidation has come since `read_begin` returned `sequence`.
    ///
    /// See [`Subscription::read_retry`].
    pub fn read_retry(&self, sequence: Sequence) -> bool {
        self.subscription.read_retry(sequence)
    }

    /// Locks, checks and installs in one critical section: see [`DriverLock::install`].
    ///
    /// # Errors
    /// Returns [`Collision`] if an invalidation has come since `read_begin`, whether the task has
    /// handled it or not ([A1]), and always if the inbox [is closed](Self::is_closed) ([A5]). Then
    /// `install` does not run.
    ///
    /// # Panics
    /// Panics if this thread is in `with` or `install` of the same inbox already.
    ///
    /// [A1]: crate::docs::contract#a-drivers-that-are-tasks
    /// [A5]: crate::docs::contract#a-drivers-that-are-tasks
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

    /// Mirrors memory: the whole collision-retry loop, as in [`DriverLock::mirror`].
    ///
    /// Do not await it in the task that handles deliveries, before `done()`.
    ///
    /// ```
    /// # use shootdown::*;
    /// # async fn pin(address: u64) -> Result<u64, std::io::Error> { Ok(address) }
    /// # futures::executor::block_on(async {
    /// # let space = AddressSpace::new();
    /// # let range = AddressRange::new(0x1000, 0x1000)?;
    /// let inbox = space.inbox(range, Vec::<u64>::new())?;
    /// inbox
    ///     .mirror(
    ///         RetryBudget::default(),
    ///         |_sequence| pin(0x1000),
    ///         |pages, page| pages.push(page),
    ///     )
    ///     .await?;
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// - [`MirrorError::Prepare`] with the first error of `prepare`.
    /// - [`MirrorError::RetriesExhausted`] when the budget is used up.
    /// - [`MirrorError::Closed`] after [`close`](Self::close), and after the stream has ended
    ///   ([A5]).
    ///
    /// # Cancel safety
    /// May be dropped at any moment. Nothing is installed unless it has resolved.
    ///
    /// [A5]: crate::docs::contract#a-drivers-that-are-tasks
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

    /// Ends the subscription, in the call itself.
    ///
    /// Invalidations that start from now on are not queued, and nothing can be installed any more.
    /// The future waits until pending invalidations have been handled. So a task must go on with
    /// the stream, which ends after the last of them ([A4]).
    ///
    /// [A4]: crate::docs::contract#a-drivers-that-are-tasks
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

    /// Takes the next delivery, or registers the task. `None` ends the stream (A4).
    pub(super) fn poll_delivery(&self, cx: &mut Context<'_>) -> Poll<Option<Delivery>> {
        // C8: wakers are cloned and dropped outside of the lock.
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
                if self.end_stream() {
                    return Poll::Ready(None);
                }
                // An invalidation came between the two locks: poll again.
                task.rouse();
                return Poll::Pending;
            }
            post.consumers.add(task.clone(), cx.waker())
        };
        let (woken, _gone) = changed;
        if let Some(woken) = woken {
            woken.rouse();
        }
        Poll::Pending
    }

    /// Ends the stream (A4). Returns `false` if an invalidation has come. Holds the driver lock,
    /// so that nothing is installed afterwards (A5).
    fn end_stream(&self) -> bool {
        {
            let _mappings = self.desk.mappings.lock();
            let mut post = self.desk.post.lock();
            if !post.is_over() {
                return false;
            }
            post.ended = true;
        }
        drop(self.subscription.close());
        true
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
    /// Returns whether mappings may be installed. The caller holds the driver lock.
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

/// Lets a task take from the stream while others read: `(&inbox).next()`. In an `Arc`:
/// `(&*inbox).next()`.
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
    /// Registers a driver that is a task or a thread: see [`Inbox`].
    ///
    /// The inbox keeps the driver's mappings under a driver lock of its own.
    ///
    /// # Errors
    /// Returns [`InsertError`], with the mappings in it, after [`release`](Self::release).
    pub fn inbox<T: Send + 'static>(
        &self,
        range: AddressRange,
        mappings: T,
    ) -> Result<Inbox<T>, InsertError<T>> {
        self.named_inbox(range, mappings, Cow::Borrowed(core::any::type_name::<Inbox<T>>()))
    }

    /// Registers a driver as [`inbox`](Self::inbox) does, with a name for lists of pending passes
    /// ([C6]).
    ///
    /// # Errors
    /// Returns [`InsertError`], with the mappings in it, after [`release`](Self::release).
    ///
    /// [C6]: crate::docs::contract#c-cancellation-panics-stalls
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
                // Released since the check above. The notifier had the only other handle of the
                // desk.
                match Arc::try_unwrap(desk) {
                    Ok(desk) => Err(InsertError::new(desk.mappings.into_inner())),
                    Err(_) => unreachable!("the notifier was dropped with the error"),
                }
            }
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
