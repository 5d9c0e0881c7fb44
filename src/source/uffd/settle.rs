//! Changes whose event comes before them. Their range stays under invalidation until the pages are
//! gone (M5).
//!
//! `madvise(DONTNEED)` and similar calls raise their event, wait until it has been read, and only
//! then drop the pages. The kernel does not signal the end. So the reader marks the present pages
//! right after the read (`PAGEMAP_SCAN`), and the invalidation lasts until no present page of the
//! range is marked. A mark goes when the page is written. In private memory it goes with its page.
//! In shared memory the kernel keeps it, and it keeps marks on entries that have no page: a page
//! that comes back there and is only read is waited for until the bound.
//!
//! The wait is a pass of the invalidation, made by a notifier of the source itself. So it belongs
//! to the space like every pass (C2), and every waiter of the range looks at the pages (C3),
//! whatever happens to the delivery.
#![forbid(unsafe_code)]

use super::{Inner, ring};
use crate::event::Owner;
use crate::foreign::Report;
use crate::notifier::{IntervalNotifier, Invalidation, WouldBlock};
use crate::pass::PassFuture;
use crate::range::AddressRange;
use crate::source::watches::Watched;
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering, Weak};
use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::cell::Cell;
use core::future::Future;
use core::num::NonZeroU64;
use core::pin::Pin;
use core::task::{Context, Poll};
use core::time::Duration;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

/// Number of looks that yield the processor. Later looks rest.
pub(super) const YIELDS: u32 = 16;

/// Requested time of a rest. With the timer slack of Linux it takes some 100 µs.
pub(super) const REST: Duration = Duration::from_micros(50);

/// Multiple of the `settle` time that a change may take while threads are seen inside calls that
/// have raised an event.
const HELD_UP: u32 = 5;

/// Number of ranges checked after their time was used up. New ones replace the oldest.
const SUSPECTS: usize = 64;

/// How long a range is checked after its time was used up.
const SUSPECTED: Duration = Duration::from_secs(2);

/// Marked pages of one discard. The pages stay registered as long as this exists, because the
/// kernel removes marks with the registration, and a driver that is told drops its watch.
pub(super) struct Marked {
    /// Weak: a pass with this belongs to the space, and the source holds the space.
    inner: Weak<Inner>,
    watched: Watched,
    /// Tag of its invalidation, which distinguishes it from others of the range.
    owner: Owner,
    /// Time of the event. Each discard has its own time: an earlier discard of the same pages may
    /// have used up its own while the pages are still present.
    began: Instant,
    /// Nanoseconds from `began` to the last look that saw a thread inside a call that had raised an
    /// event.
    held_up: AtomicU64,
    /// The wait is over: the pages are gone, the time was used up, or a later discard of the same
    /// pages has taken over.
    over: AtomicBool,
}

impl Marked {
    /// Starts to wait for the pages of `range`. Returns `None` if there is nothing to wait for.
    /// `owner` tags the invalidation.
    pub(super) fn new(inner: &Arc<Inner>, range: AddressRange, owner: Owner) -> Option<Arc<Self>> {
        inner.pagemap.as_ref()?;
        let held = inner.table().hold(range);
        let watched = match held {
            Ok(watched) => watched?,
            Err(_) => {
                inner.report_unsettled(range, Duration::ZERO);
                return None;
            }
        };
        let (held_up, over) = (AtomicU64::new(0), AtomicBool::new(false));
        Some(Arc::new(Self {
            inner: Arc::downgrade(inner),
            watched,
            owner,
            began: Instant::now(),
            held_up,
            over,
        }))
    }

    pub(super) fn range(&self) -> AddressRange {
        self.watched.range
    }

    /// Looks at the pages. Readers of the range go on once it is ready: the pages or the source are
    /// gone, or the time was used up.
    fn look(self: &Arc<Self>) -> Poll<()> {
        let Some(inner) = self.inner.upgrade() else { return Poll::Ready(()) };
        if self.is_over() {
            return Poll::Ready(());
        }
        if self.are_gone(&inner) {
            self.over.store(true, Ordering::Release);
            return Poll::Ready(());
        }
        let waited = self.began.elapsed();
        if inner.table().is_changing() {
            self.held_up
                .store(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        // The time starts when the thread inside `madvise` has gone on. A thread without a
        // processor has not dropped its pages yet.
        let held_up = Duration::from_nanos(self.held_up.load(Ordering::Relaxed));
        if waited.saturating_sub(held_up) < inner.settle
            && waited < inner.settle.saturating_mul(HELD_UP)
        {
            return Poll::Pending;
        }
        if !self.over.swap(true, Ordering::AcqRel) {
            inner.suspect(self.clone(), waited);
        }
        Poll::Ready(())
    }

    /// Returns `true` if the wait is over.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Returns `true` if no marked page is present.
    fn are_gone(&self, inner: &Inner) -> bool {
        let Some(pagemap) = &inner.pagemap else { return true };
        inner.is_forked() || !pagemap.has_marked(self.range()).unwrap_or(false)
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.upgrade()
            && !inner.is_forked()
        {
            inner.unwatch(self.watched);
        }
    }
}

/// A notifier of the range while the invalidation of the discard is active.
pub(super) struct Settle(pub(super) Arc<Marked>);

impl IntervalNotifier for Settle {
    /// Sets no sequence, because there is no device (S4). Other invalidations of the range do not
    /// wait.
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let ours = invalidation.is_tagged(self.0.owner);
        if ours {
            invalidation.is_not_the_devices();
        }
        Ok(ours.then(|| PassFuture::new(Look { pages: self.0.clone(), looks: 0, round: None })))
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Owned(alloc::format!("pages of {} that a madvise is about to drop", self.0.range()))
    }
}

std::thread_local! {
    /// The round of polls of [`Deliveries::run`](super::Deliveries::run) on this thread, and
    /// whether pages were seen present since the last question.
    static ROUND: Cell<(Option<NonZeroU64>, bool)> = const { Cell::new((None, false)) };
}

/// Rounds of polls on this thread. The thread rests between two rounds.
pub(super) struct Rounds(());

impl Rounds {
    pub(super) fn begin() -> Self {
        ROUND.set((Some(NonZeroU64::MIN), false));
        Self(())
    }

    pub(super) fn next(&self) {
        let (round, looked) = ROUND.get();
        ROUND.set((round.and_then(|round| round.checked_add(1)), looked));
    }

    /// Returns `true` if a look since the last call saw pages present.
    pub(super) fn has_looked(&self) -> bool {
        let (round, looked) = ROUND.get();
        ROUND.set((round, false));
        looked
    }
}

impl Drop for Rounds {
    fn drop(&mut self) {
        ROUND.set((None, false));
    }
}

/// The pass: looks until the wait is over.
struct Look {
    pages: Arc<Marked>,
    looks: u32,
    /// Round of the last look.
    round: Option<NonZeroU64>,
}

impl Future for Look {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let (round, _) = ROUND.get();
        // Another waiter may poll next, whatever happens to this thread (C3).
        cx.waker().wake_by_ref();
        if round.is_some() && round == self.round {
            // One look in each round.
            return Poll::Pending;
        }
        if self.pages.look().is_ready() {
            return Poll::Ready(());
        }
        match (round, self.pages.inner.upgrade()) {
            (Some(_), _) => ROUND.set((round, true)),
            // The thread inside `madvise` may need this processor.
            (None, Some(inner)) => inner.rest(self.looks),
            (None, None) => return Poll::Ready(()),
        }
        (self.round, self.looks) = (round, self.looks.saturating_add(1));
        Poll::Pending
    }
}

/// A range whose pages were present when its time was used up.
pub(super) struct Suspect {
    pages: Arc<Marked>,
    looks: Looks,
}

/// The times at which a suspect is looked at.
struct Looks {
    since: Instant,
    /// Time of the next look, and the pause before it.
    next: Instant,
    pause: Duration,
}

impl Looks {
    fn from(since: Instant) -> Self {
        let pause = Duration::from_millis(1);
        Self { since, next: since + pause, pause }
    }

    fn are_due(&self, now: Instant) -> bool {
        now >= self.next
    }

    /// Doubles the pause.
    fn go_on(&mut self, now: Instant) {
        self.pause *= 2;
        self.next = now + self.pause;
    }

    fn are_over(&self, now: Instant) -> bool {
        now.duration_since(self.since) > SUSPECTED
    }
}

/// Selects the suspects to look at.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Which {
    /// Every suspect.
    All,
    /// Those whose next look is due.
    Due,
}

impl Inner {
    /// Yields the processor; after many looks, sleeps. Does not sleep right after another sleep:
    /// one sleep is enough for all passes on a thread.
    fn rest(&self, looks: u32) {
        if looks < YIELDS {
            return std::thread::yield_now();
        }
        let now = || u64::try_from(self.opened.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if now().saturating_sub(self.rested.load(Ordering::Relaxed)) > 30_000 {
            std::thread::sleep(REST);
            self.rested.store(now(), Ordering::Relaxed);
        }
    }

    /// Records that the invalidation of a discard has begun. Earlier discards of the same pages are
    /// over, because their marks cannot be told from the new ones.
    pub(super) fn takes_over(&self, marked: &Arc<Marked>) {
        let earlier: Vec<_> = {
            let mut waited_for = self.waited_for.lock().unwrap_or_else(PoisonError::into_inner);
            waited_for.retain(|marked| marked.strong_count() > 0);
            let earlier = waited_for.iter().filter_map(Weak::upgrade).collect();
            waited_for.push(Arc::downgrade(marked));
            earlier
        };
        // Without the lock: the registrations held for them may be given up.
        for earlier in earlier.into_iter().filter(|earlier| marked.range().covers(earlier.range()))
        {
            earlier.over.store(true, Ordering::Release);
        }
    }

    /// Ends a wait whose time was used up. The range is invalidated again once its pages have gone.
    fn suspect(&self, pages: Arc<Marked>, waited: Duration) {
        let range = pages.range();
        let looks = Looks::from(Instant::now());
        let given_up = {
            let mut suspects = self.suspects();
            let given_up = (suspects.len() == SUSPECTS).then(|| suspects.remove(0));
            suspects.push(Suspect { pages, looks });
            given_up
        };
        drop(given_up);
        ring(&self.bell);
        self.report_unsettled(range, waited);
    }

    pub(super) fn report_unsettled(&self, range: AddressRange, waited: Duration) {
        self.unsettled.fetch_add(1, Ordering::Relaxed);
        self.shared().host.losses.report(&Report::Unsettled { range, waited });
    }

    /// Removes and returns the suspects whose pages have gone.
    pub(super) fn changed_suspects(&self, look: Which) -> Vec<AddressRange> {
        let (mut over, mut changed) = (Vec::new(), Vec::new());
        {
            let (mut suspects, now) = (self.suspects(), Instant::now());
            let mut at = 0;
            while let Some(suspect) = suspects.get_mut(at) {
                let due = suspect.looks.are_due(now);
                if !due && look == Which::Due {
                    at += 1;
                    continue;
                }
                let gone = suspect.pages.are_gone(self);
                changed.extend(gone.then(|| suspect.pages.range()));
                if gone || suspect.looks.are_over(now) {
                    over.push(suspects.remove(at));
                    continue;
                }
                if due {
                    suspect.looks.go_on(now);
                }
                at += 1;
            }
        }
        // Without the lock: the registrations held for them are given up.
        drop(over);
        changed
    }

    /// Returns the time until the next look at a suspect.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let next = self.suspects().iter().map(|suspect| suspect.looks.next).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn suspects(&self) -> MutexGuard<'_, Vec<Suspect>> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn m5_a_suspect_is_looked_at_after_ever_longer_pauses_and_no_longer_than_for_two_seconds() {
        let (since, millis) = (Instant::now(), Duration::from_millis);
        let mut looks = Looks::from(since);
        let mut now = since;
        for pause in [1, 2, 4, 8] {
            assert!(!looks.are_due(now));
            now += millis(pause);
            assert_eq!(looks.next, now);
            assert!(looks.are_due(now) && !looks.are_over(now));
            looks.go_on(now);
        }
        assert!(!looks.are_over(since + SUSPECTED));
        assert!(looks.are_over(since + SUSPECTED + millis(1)));
    }
}
