//! Changes whose event comes before them: their range stays under invalidation until the pages are
//! seen gone (M5).
//!
//! `madvise(DONTNEED)` and its kin raise their event, wait until it has been read, and only then
//! drop the pages; no signal of the kernel says when they have. So right after the read the reader
//! marks what is there (`PAGEMAP_SCAN`), and the invalidation lasts until none of the range is
//! there and still marked. A mark goes with its page, or when the page is written.
//!
//! The wait is a pass of the invalidation, left by a notifier of the source's own, so that it
//! belongs to the space as all passes do (C2): whoever waits for the range looks (C3), whatever
//! becomes of the delivery.
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

/// Looks between which the one who looks only gives his turn to other threads; after that he rests.
pub(super) const YIELDS: u32 = 16;

/// How long a rest between two looks is asked to be: with the timer slack of Linux some 100 µs.
pub(super) const REST: Duration = Duration::from_micros(50);

/// How many times longer a change is waited for while threads are seen inside calls that have
/// raised an event.
const HELD_UP: u32 = 5;

/// Ranges that are looked at after their time was used up, at most: those that have been longest
/// are given up for new ones.
const SUSPECTS: usize = 64;

/// How long after its time was used up a range is looked at.
const SUSPECTED: Duration = Duration::from_secs(2);

/// Pages of one such change. They stay registered as long as this exists: the kernel would take the
/// marks away with the registration, and a driver that is told drops its watch.
pub(super) struct Marked {
    /// Weak: a pass of this belongs to the space, which the source holds.
    inner: Weak<Inner>,
    watched: Watched,
    /// Its invalidation is told from others of the range by this.
    owner: Owner,
    /// When the change came. Earlier ones of the same pages give it none of their time: they may
    /// have used theirs up, and the pages of this one are there still.
    began: Instant,
    /// Nanoseconds from then to the last look that saw a thread inside the call that raised an
    /// event.
    held_up: AtomicU64,
    /// Nobody waits for them any more: they are gone, or there was no more time, or a later change
    /// of the same pages is waited for instead.
    over: AtomicBool,
}

impl Marked {
    /// `None` when there is nothing to wait for. `owner` tags the invalidation.
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

    /// Looks at them. Readers of the range go on when it is over.
    fn look(self: &Arc<Self>) -> Seen {
        let Some(inner) = self.inner.upgrade() else { return Seen::Over };
        if self.is_over() {
            return Seen::Over;
        }
        if self.are_gone(&inner) {
            self.over.store(true, Ordering::Release);
            return Seen::Over;
        }
        let waited = self.began.elapsed();
        if inner.table().is_changing() {
            self.held_up
                .store(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        // The time begins when the thread inside `madvise` has gone on: as long as one has not, for
        // want of a processor, nothing is known of its pages.
        let held_up = Duration::from_nanos(self.held_up.load(Ordering::Relaxed));
        if waited.saturating_sub(held_up) < inner.settle
            && waited < inner.settle.saturating_mul(HELD_UP)
        {
            return Seen::There;
        }
        if !self.over.swap(true, Ordering::AcqRel) {
            inner.suspect(self.clone(), waited);
        }
        Seen::Over
    }

    /// Whether nobody waits for them any more.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Whether none of the pages is there any more.
    fn are_gone(&self, inner: &Inner) -> bool {
        let Some(pagemap) = &inner.pagemap else { return true };
        inner.is_forked() || !pagemap.has_marked(self.range()).unwrap_or(false)
    }
}

/// What a look has seen.
#[derive(PartialEq)]
enum Seen {
    There,
    /// The pages are gone, or have been waited for as long as there is time, or the source is gone.
    Over,
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

/// Stands in the range of one such change while its invalidation is active.
pub(super) struct Settle(pub(super) Arc<Marked>);

impl IntervalNotifier for Settle {
    /// There is no device, so no sequence is set (S4). Other invalidations of the range do not
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
    /// The round of polls that [`Deliveries::run`](super::Deliveries::run) is in on this thread,
    /// and whether pages were looked at in it that are still there.
    static ROUND: Cell<(Option<NonZeroU64>, bool)> = const { Cell::new((None, false)) };
}

/// Rounds of polls on this thread, which rests between two of them.
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

    /// Whether pages were still there when they were looked at since the last question.
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

/// Looks until the pages are gone.
struct Look {
    pages: Arc<Marked>,
    looks: u32,
    /// The round of the last look.
    round: Option<NonZeroU64>,
}

impl Future for Look {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let (round, _) = ROUND.get();
        // Whoever may poll it next, and whatever becomes of this thread (C3).
        cx.waker().wake_by_ref();
        if round.is_some() && round == self.round {
            // Once in each round.
            return Poll::Pending;
        }
        if self.pages.look() == Seen::Over {
            return Poll::Ready(());
        }
        match (round, self.pages.inner.upgrade()) {
            (Some(_), _) => ROUND.set((round, true)),
            // The thread inside `madvise` may need this very processor.
            (None, Some(inner)) => inner.rest(self.looks),
            (None, None) => return Poll::Ready(()),
        }
        (self.round, self.looks) = (round, self.looks.saturating_add(1));
        Poll::Pending
    }
}

/// A range whose pages had not gone when its time was used up.
pub(super) struct Suspect {
    pages: Arc<Marked>,
    since: Instant,
    /// When to look again, and how long to wait after that.
    next: Instant,
    pause: Duration,
}

/// At which of them to look.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Which {
    All,
    Due,
}

impl Inner {
    /// Leaves the processor to others after so many looks, unless that was done a moment ago: of
    /// several who look on one thread, one rests.
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

    /// The invalidation of a change has begun: it is waited for, and earlier ones of the same pages
    /// are not, as their marks cannot be told from its own.
    pub(super) fn takes_over(&self, marked: &Arc<Marked>) {
        let earlier: Vec<_> = {
            let mut waited_for = self.waited_for.lock().unwrap_or_else(PoisonError::into_inner);
            waited_for.retain(|marked| marked.strong_count() > 0);
            let earlier = waited_for.iter().filter_map(Weak::upgrade).collect();
            waited_for.push(Arc::downgrade(marked));
            earlier
        };
        // Outside of the lock: what is held for them may be given up.
        for earlier in earlier.into_iter().filter(|earlier| marked.range().covers(earlier.range()))
        {
            earlier.over.store(true, Ordering::Release);
        }
    }

    /// The time is used up: readers go on, and the range is invalidated again once the pages have
    /// gone.
    fn suspect(&self, pages: Arc<Marked>, waited: Duration) {
        let range = pages.range();
        let (now, pause) = (Instant::now(), Duration::from_millis(1));
        let given_up = {
            let mut suspects = self.suspects();
            let given_up = (suspects.len() == SUSPECTS).then(|| suspects.remove(0));
            suspects.push(Suspect { pages, since: now, next: now + pause, pause });
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

    /// Takes out what has changed after all.
    pub(super) fn changed_suspects(&self, look: Which) -> Vec<AddressRange> {
        let (mut over, mut changed) = (Vec::new(), Vec::new());
        {
            let (mut suspects, now) = (self.suspects(), Instant::now());
            let mut at = 0;
            while let Some(suspect) = suspects.get_mut(at) {
                let due = now >= suspect.next;
                if !due && look == Which::Due {
                    at += 1;
                    continue;
                }
                let gone = suspect.pages.are_gone(self);
                changed.extend(gone.then(|| suspect.pages.range()));
                if gone || now.duration_since(suspect.since) > SUSPECTED {
                    over.push(suspects.remove(at));
                    continue;
                }
                if due {
                    suspect.pause *= 2;
                    suspect.next = now + suspect.pause;
                }
                at += 1;
            }
        }
        // Outside of the lock: what is held for them is given up.
        drop(over);
        changed
    }

    /// When to look at the next suspect.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let next = self.suspects().iter().map(|suspect| suspect.next).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn suspects(&self) -> MutexGuard<'_, Vec<Suspect>> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
