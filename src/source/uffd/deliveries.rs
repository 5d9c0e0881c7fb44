//! The delivery: it turns events into invalidations and calls drivers.
#![forbid(unsafe_code)]

use super::batch::{Batch, Changed, Seen, batches};
use super::settle::{Marked, REST, Rounds, Settle, Which, YIELDS};
use super::{Inner, UffdError, ring, wait};
use crate::block::Waitable;
use crate::engine::futures::invalidate::Invalidate;
use crate::engine::gate::Closings;
use crate::event::{Event, Owner};
use crate::foreign::{Report, TaskWaker};
use crate::range::{AddressRange, RangeSet};
use crate::source::ring::Change;
use crate::source::watches::Watched;
use crate::subscription::Subscription;
use crate::sync::{Arc, AtomicBool, Ordering};
use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use core::time::Duration;
use futures::stream::{FuturesUnordered, StreamExt};
use rustix::fd::{AsFd, BorrowedFd};
use std::sync::{MutexGuard, PoisonError};

/// Turns the events that a [`Reader`](crate::source::Reader) has read into invalidations.
///
/// There are two ways to use it:
/// - [`run`](Self::run) it on a thread;
/// - or loop: wait until its descriptor ([`AsFd`]) is readable or [`next_look`](Self::next_look)
///   has passed, and await [`deliver`](Self::deliver), until it [is stopped](Self::is_stopped).
///
/// Its drop starts the remaining invalidations without waiting, ends all watches, and invalidates
/// everything that was watched (M3). In a child of `fork` the drop does nothing.
#[must_use = "dropping the deliveries ends all watches and invalidates what was watched: run them"]
#[derive(Debug)]
pub struct Deliveries {
    pub(super) inner: Arc<Inner>,
}

impl Deliveries {
    /// Invalidates everything read so far. Waits until no device uses it, and until the pages of a
    /// `madvise` are gone. Returns the number of changes.
    ///
    /// Changes of one kind that concern the same notifiers become one invalidation of [many
    /// ranges](crate::Invalidation::ranges) (N4). The first poll starts all invalidations and tells
    /// every driver; then the readers of the space go on. Several deliveries may run at once.
    /// Readers then go on when all of them have told all drivers.
    ///
    /// The call makes the descriptor unreadable until more is read. A future that is dropped before
    /// its first poll makes it readable again.
    ///
    /// While pages have not gone, a poll yields the processor, and later rests for some 100 µs.
    /// [`run`](Self::run) does not.
    ///
    /// A panic of a driver has no caller here: it is counted and [reported](Report::Panicked) (C5).
    ///
    /// # Errors
    /// [`UffdError::Forked`] in a child of `fork`.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. Before the first poll nothing has happened. After
    /// it, the passes belong to the space.
    pub fn deliver(
        &mut self,
    ) -> Waitable<impl Future<Output = Result<usize, UffdError>> + Send + use<>> {
        self.clear();
        let taken = Taken(Some(self.inner.clone()));
        Waitable::new(async move {
            let inner = taken.begin();
            inner.check()?;
            let mut passes = FuturesUnordered::new();
            let mut started = 0;
            core::future::poll_fn(|cx| {
                started = inner.start(Which::All, cx, |late| passes.push(late));
                Poll::Ready(())
            })
            .await;
            while passes.next().await.is_some() {}
            inner.check()?;
            Ok(started)
        })
    }

    /// Delivers on this thread until [`Uffd::stop`](crate::source::Uffd::stop). Pending passes do
    /// not delay the start of later invalidations.
    ///
    /// # Errors
    /// Errors of `poll`. In a child of `fork`, [`UffdError::Forked`].
    pub fn run(&mut self) -> std::io::Result<()> {
        /// Rings the bell only while the thread sleeps. Otherwise the thread polls anyway.
        struct Bell {
            inner: Arc<Inner>,
            sleeping: AtomicBool,
        }
        impl alloc::task::Wake for Bell {
            fn wake(self: Arc<Self>) {
                if self.sleeping.load(Ordering::SeqCst) {
                    ring(&self.inner.bell);
                }
            }
        }
        self.inner.check()?;
        let bell = Arc::new(Bell { inner: self.inner.clone(), sleeping: AtomicBool::new(false) });
        let waker = Waker::from(bell.clone());
        let mut cx = Context::from_waker(&waker);
        let mut late = FuturesUnordered::<Late>::new();
        let rounds = Rounds::begin();
        // Number of looks in a row without a rest.
        let mut looks = 0;
        loop {
            rounds.next();
            while let Poll::Ready(Some(())) = late.poll_next_unpin(&mut cx) {}
            let looking = rounds.has_looked() || late.iter().any(Late::looks);
            looks = if looking { looks + 1 } else { 0 };
            let most = match (looking, self.next_look()) {
                (true, _) if looks < YIELDS => {
                    // The thread inside `madvise` may need this processor.
                    std::thread::yield_now();
                    Some(Duration::ZERO)
                }
                (true, next) => Some(next.map_or(REST, |next| next.min(REST))),
                (false, next) => {
                    bell.sleeping.store(true, Ordering::SeqCst);
                    // Polls what was woken before `sleeping` was set: it has not rung the bell.
                    while let Poll::Ready(Some(())) = late.poll_next_unpin(&mut cx) {}
                    next
                }
            };
            let [rung, stopped] = wait([self.inner.bell.as_fd(), self.inner.stop.as_fd()], most)?;
            bell.sleeping.store(false, Ordering::SeqCst);
            if rung || self.next_look().is_some_and(|next| next.is_zero()) {
                self.clear();
                // Starts at once, however many earlier passes can make progress.
                if self.inner.start(Which::Due, &mut cx, |started| late.push(started)) > 0 {
                    looks = 0;
                }
            }
            if stopped {
                return Ok(());
            }
        }
    }

    /// Returns the time until the next call of [`deliver`](Self::deliver) that is due although
    /// nothing was read. `None`: wait until the descriptor is readable. [`run`](Self::run) needs no
    /// such call.
    ///
    /// There are two reasons: a discard did not happen in time ([`Report::Unsettled`]), and its
    /// range must be checked again; or unwatched memory could not be given up, because a change was
    /// under way.
    pub fn next_look(&self) -> Option<Duration> {
        if self.inner.is_forked() {
            return None;
        }
        let (looks, gives_up) = (self.inner.next_look(), self.inner.table().next_tidy());
        looks.into_iter().chain(gives_up).min()
    }

    /// Returns `true` after [`Uffd::stop`](crate::source::Uffd::stop), which makes the descriptor
    /// readable. The program's own loop then calls [`deliver`](Self::deliver) a last time and ends.
    pub fn is_stopped(&self) -> bool {
        self.inner.stopped.load(Ordering::Acquire)
    }

    /// Makes the descriptor unreadable until more is read.
    fn clear(&mut self) {
        if !self.inner.is_forked() {
            let _ = rustix::io::read(&self.inner.bell, &mut [0; 8]);
        }
    }
}

/// The cleared bell of a delivery that has not begun. Its drop rings the bell again.
struct Taken(Option<Arc<Inner>>);

impl Taken {
    fn begin(mut self) -> Arc<Inner> {
        self.0.take().expect("a delivery begins once")
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(inner) = &self.0
            && !inner.is_forked()
        {
            ring(&inner.bell);
        }
    }
}

impl AsFd for Deliveries {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.bell.as_fd()
    }
}

impl std::os::fd::AsRawFd for Deliveries {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.inner.bell)
    }
}

impl Drop for Deliveries {
    fn drop(&mut self) {
        if self.inner.is_forked() {
            return;
        }
        // M3: the gate stays closed from before the watches end until everything is invalidated.
        let closing = self.inner.shared().close_gate();
        self.inner.turns.fetch_add(closing.into_bits(), Ordering::AcqRel);
        self.inner.table().close();
        self.inner.ring.overflow();
        self.inner.orphaned.store(true, Ordering::Release);
        self.inner.open();
    }
}

/// Invalidations that are being started, possibly by several threads.
#[derive(Default)]
pub(super) struct Starting {
    /// Number of threads that have taken events and have not yet told all drivers.
    threads: usize,
    /// Closings of the gate. The last of the threads undoes them.
    closings: Closings,
}

/// Opens the gate when all invalidations of the taken events have been started.
struct Open<'a>(&'a Inner);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let closings = {
            let mut starting = self.0.starting();
            starting.threads -= 1;
            if starting.threads == 0 {
                core::mem::take(&mut starting.closings)
            } else {
                Closings::default()
            }
        };
        self.0.shared().open_gate(closings);
    }
}

/// Rings the bell on a panic, so that the next delivery handles the events.
struct Undelivered<'a>(&'a Inner);

impl Drop for Undelivered<'_> {
    fn drop(&mut self) {
        ring(&self.0.bell);
    }
}

/// The invalidation of a batch of changes.
struct Late {
    inner: Arc<Inner>,
    marked: Vec<Arc<Marked>>,
    /// Notifiers that keep the ranges under invalidation while their pages are present (M5).
    settle: Vec<Subscription<Settle>>,
    invalidation: Option<Pin<Box<Invalidate<'static>>>>,
}

impl Late {
    /// Returns `true` while pages that it waits for are present.
    fn looks(&self) -> bool {
        self.marked.iter().any(|marked| !marked.is_over())
    }
}

impl Future for Late {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.inner.is_forked() {
            return Poll::Ready(());
        }
        let Some(invalidation) = &mut self.invalidation else { return Poll::Ready(()) };
        // Drops the guard at once: the memory has changed already.
        invalidation.as_mut().poll(cx).map(drop)
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        // M4: in a child of `fork` the locks of the space may be held for ever.
        if self.inner.is_forked() {
            let (settle, marked) =
                (core::mem::take(&mut self.settle), core::mem::take(&mut self.marked));
            core::mem::forget((self.invalidation.take(), settle, marked, self.inner.clone()));
        } else if !self.settle.is_empty() {
            let mut settles = self.inner.settles();
            self.settle.iter().for_each(|settle| _ = settles.remove(&settle.id().get()));
        }
    }
}

/// The changes that a delivery has taken.
#[derive(Default)]
struct Changes {
    ranges: Vec<Changed>,
    /// Watches that have ended.
    lost: Vec<Watched>,
    /// Discards whose pages could not be marked.
    unseen: Vec<AddressRange>,
}

impl Inner {
    fn starting(&self) -> MutexGuard<'_, Starting> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts an invalidation of each taken change. Calls `pending` with those whose passes are
    /// pending.
    fn start(
        self: &Arc<Self>,
        look: Which,
        cx: &mut Context<'_>,
        mut pending: impl FnMut(Late),
    ) -> usize {
        // Before events are taken: the clone of a waker is foreign code and may panic.
        let undelivered = Undelivered(self);
        let waker = Waker::from(TaskWaker::new(cx.waker(), &self.shared().host.losses));
        core::mem::forget(undelivered);
        let cx = &mut Context::from_waker(&waker);
        let (mut changes, open) = {
            let mut starting = self.starting();
            starting.threads += 1;
            starting.closings += Closings::from_bits(self.turns.swap(0, Ordering::AcqRel));
            (self.changes(look), Open(self))
        };
        let started = changes.ranges.len();
        let batches = batches(core::mem::take(&mut changes.ranges), |range| self.concerned(range));
        // Makes all of them first: a driver that is told drops its watch, and with it the marks
        // that other invalidations wait for.
        let lates: Vec<Late> = batches.into_iter().filter_map(|batch| self.late(batch)).collect();
        for mut late in lates {
            let polled = Pin::new(&mut late).poll(cx);
            self.told.fetch_add(1, Ordering::Relaxed);
            late.marked.iter().for_each(|marked| self.takes_over(marked));
            if polled.is_pending() {
                pending(late);
            }
        }
        drop(open);
        // The delivery asks for the next time itself.
        let _ = self.table().tidy(|| self.shared().gate.has_closings_now());
        for range in changes.unseen {
            self.report_unsettled(range, Duration::ZERO);
        }
        for lost in changes.lost {
            // A holder that has dropped its watch knows of the end.
            if self.table().watches.has(lost) {
                self.shared().host.losses.report(&Report::WatchEnded { range: lost.range });
            }
        }
        started
    }

    /// Returns the ids of the notifiers that `range` concerns, without the source's own.
    fn concerned(&self, range: AddressRange) -> Vec<u64> {
        let mut concerned = self.shared().concerned(range);
        let settles = self.settles();
        concerned.retain(|id| !settles.contains(id));
        concerned
    }

    fn settles(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.settles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// N4: makes the invalidation of a batch.
    fn late(self: &Arc<Self>, batch: Batch) -> Option<Late> {
        let (mut marked, mut settle, owner) = (Vec::new(), Vec::new(), Owner::new());
        if batch.seen == Seen::ToCome {
            for change in batch.ranges.iter().filter_map(|range| Marked::new(self, *range, owner)) {
                let range = change.range();
                if let Ok(settles) = self.space().insert(range, Settle(change.clone())) {
                    self.settles().insert(settles.id().get());
                    settle.push(settles);
                    marked.push(change);
                }
            }
        }
        let several = batch.ranges.len() > 1;
        let ranges = RangeSet::new(batch.ranges).ok()?;
        let mut invalidation = self.space().invalidate_all(ranges, batch.event).late();
        if !marked.is_empty() {
            invalidation = invalidation.tagged(owner);
        }
        if several && batch.seen == Seen::Happened {
            invalidation = invalidation.past();
        }
        Some(Late {
            inner: self.clone(),
            marked,
            settle,
            invalidation: Some(Box::pin(invalidation.into_owned())),
        })
    }

    /// Starts the invalidations without a waiter. Their passes are left to the space.
    pub(super) fn open(self: &Arc<Self>) {
        self.start(Which::All, &mut Context::from_waker(Waker::noop()), drop);
    }

    /// Takes the changes that the read events name. Only one thread may call it at a time.
    fn changes(&self, look: Which) -> Changes {
        let mut changes = Changes::default();
        let mut again = self.changed_suspects(look);
        changes.ranges.extend(again.drain(..).map(|range| (range, Event::Clear, Seen::Happened)));
        if self.ring.take_overflow() {
            let table = self.table();
            table
                .watches
                .for_each(|range| changes.ranges.push((range, Event::Unmap, Seen::Happened)));
            // The lost events could have named any memory, also pages that are about to go.
            table.watches.end(AddressRange::ALL, |watched| changes.lost.push(watched));
            if self.promises.discards {
                table.for_each_armed(|range| {
                    changes.ranges.push((range, Event::Clear, Seen::ToCome))
                });
            }
        }
        while let Some(change) = self.ring.take() {
            match change {
                Change::Unmap(start, end) => {
                    self.gone(&mut changes, start, end.wrapping_sub(start))
                }
                Change::Remove(start, end) => {
                    self.discarded(&mut changes, start, end, Seen::ToCome)
                }
                Change::Unseen(start, end) => {
                    self.discarded(&mut changes, start, end, Seen::Happened)
                }
                Change::Remap(from, to, len) => {
                    self.gone(&mut changes, from, len);
                    if let Ok(moved) = AddressRange::new(to, len) {
                        self.table().moved(moved);
                    }
                }
                Change::Fork => {
                    let each =
                        |range| changes.ranges.push((range, Event::ProtectionPage, Seen::Happened));
                    self.table().watches.for_each(each);
                }
            }
        }
        changes
    }

    /// Records memory that was unmapped, mapped over or moved away.
    fn gone(&self, changes: &mut Changes, start: u64, len: u64) {
        let Ok(range) = AddressRange::new(start, len) else { return };
        changes.ranges.push((range, Event::Unmap, Seen::Happened));
        self.table().watches.end(range, |watched| changes.lost.push(watched));
    }

    /// Records pages that are about to be dropped.
    fn discarded(&self, changes: &mut Changes, start: u64, end: u64, seen: Seen) {
        let Ok(range) = AddressRange::new(start, end.wrapping_sub(start)) else { return };
        if seen == Seen::Happened {
            changes.unseen.push(range);
        }
        let seen = if self.promises.discards { seen } else { Seen::Happened };
        changes.ranges.push((range, Event::Clear, seen));
    }
}
