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
use crate::foreign::Report;
use crate::notifier::{IntervalNotifier, Invalidation, WouldBlock};
use crate::pass::PassFuture;
use crate::range::AddressRange;
use crate::source::sys::uffd;
use crate::source::watches::Watched;
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering, Weak};
use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use core::time::Duration;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

/// Looks between which the one who looks gives its turn to other threads; after that it sleeps.
const YIELDS: u32 = 16;

/// How long a sleep between two looks is asked to be: with the timer slack of Linux some 100 µs.
const SLEEP: Duration = Duration::from_micros(50);

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
    began: Instant,
    /// Nanoseconds from then to the last look that saw a thread inside the call that raised an
    /// event.
    held_up: AtomicU64,
    /// Somebody has waited for them as long as there was time.
    over: AtomicBool,
}

impl Marked {
    /// `None` when the source has ended.
    pub(super) fn new(inner: &Arc<Inner>, range: AddressRange) -> Option<Arc<Self>> {
        let watched = inner.table().hold(range, inner.pagemap.as_ref()?)?;
        let (began, held_up, over) = (Instant::now(), AtomicU64::new(0), AtomicBool::new(false));
        Some(Arc::new(Self { inner: Arc::downgrade(inner), watched, began, held_up, over }))
    }

    fn range(&self) -> AddressRange {
        self.watched.range
    }

    /// Looks at them. Readers of the range go on when it is over.
    fn look(self: &Arc<Self>) -> Seen {
        let Some(inner) = self.inner.upgrade() else { return Seen::Over };
        if self.are_gone(&inner) {
            return Seen::Over;
        }
        let waited = self.began.elapsed();
        if uffd::changing(&*inner.fd) {
            self.held_up.store(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        // The time begins when the thread inside `madvise` has gone on: as long as one has not, for
        // want of a processor, nothing is known of its pages.
        let held_up = Duration::from_nanos(self.held_up.load(Ordering::Relaxed));
        if waited.saturating_sub(held_up) < inner.settle && waited < inner.settle.saturating_mul(HELD_UP) {
            return Seen::There;
        }
        if !self.over.swap(true, Ordering::AcqRel) {
            inner.suspect(self.clone(), waited);
        }
        Seen::Over
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
    /// There is no device, so no sequence is set (S4). Another invalidation of the range that comes
    /// meanwhile waits, too: the pages are not gone.
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        let look = Look { pages: self.0.clone(), looks: 0 };
        Ok(Some(PassFuture::new(look)))
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Owned(alloc::format!("pages of {} that a madvise is about to drop", self.0.range()))
    }
}

/// Looks until the pages are gone.
struct Look {
    pages: Arc<Marked>,
    looks: u32,
}

impl Future for Look {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.pages.look() == Seen::Over {
            return Poll::Ready(());
        }
        // The thread inside `madvise` may need this very processor.
        if self.looks < YIELDS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(SLEEP);
        }
        self.looks = self.looks.saturating_add(1);
        cx.waker().wake_by_ref();
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

impl Inner {
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
    pub(super) fn changed_suspects(&self) -> Vec<AddressRange> {
        let (mut over, mut changed) = (Vec::new(), Vec::new());
        {
            let (mut suspects, now) = (self.suspects(), Instant::now());
            let mut at = 0;
            while let Some(suspect) = suspects.get_mut(at) {
                let gone = suspect.pages.are_gone(self);
                changed.extend(gone.then(|| suspect.pages.range()));
                if gone || now.duration_since(suspect.since) > SUSPECTED {
                    over.push(suspects.remove(at));
                    continue;
                }
                if now >= suspect.next {
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
