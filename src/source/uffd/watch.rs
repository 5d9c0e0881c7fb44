//! What is watched: the handles of users, and what the kernel has been told for them.
#![forbid(unsafe_code)]

use super::{Fork, Inner, Promises, UffdError};
use crate::range::AddressRange;
use crate::source::ranges::Ranges;
use crate::source::sys::page_size;
use crate::source::sys::uffd::{self, Maps, Pagemap};
use crate::source::watches::{WatchState, Watched, Watches};
use crate::sync::Arc;
use core::fmt;
use core::time::Duration;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::time::Instant;

/// As long as what is watched consists of fewer ranges than this, exactly that is watched.
const EXACT: usize = 64;

/// How long after a change was seen to be under way it is asked again whether one is, first and at
/// last.
const SOON: Duration = Duration::from_micros(100);
const LATE: Duration = Duration::from_millis(1);

/// What users watch, and what the kernel watches for that: [`Table::armed`] holds at least all of
/// it.
pub(super) struct Table {
    /// `None` once the reader is gone: the kernel then forgets whatever is left.
    fd: Option<Arc<OwnedFd>>,
    maps: Option<Maps>,
    /// `None` where it cannot be seen what is watched.
    pagemap: Option<Arc<Pagemap>>,
    promises: Promises,
    /// Set once the reader or the deliveries are gone: nothing is watched any more.
    closed: bool,
    pub(super) watches: Watches,
    /// What was registered and not unregistered since. The kernel forgets what is unmapped; this
    /// does not, so that nothing is left registered once nobody reads.
    armed: Ranges,
    /// What was unregistered since there was a moment without a change under way: marks in it are
    /// gone. A change that begins later finds nothing registered, and raises no event.
    dropped: Ranges,
    /// What is to be given up once no change is under way: its marks are needed until then.
    later: Ranges,
    /// When to ask for that again, and how long that was to wait.
    again: Option<(Instant, Duration)>,
    /// Most ranges that `armed` may consist of.
    room: usize,
    /// [`Watch`]es that exist.
    pub(super) handles: usize,
}

impl Table {
    pub(super) fn new(
        fd: Arc<OwnedFd>,
        maps: Option<Maps>,
        pagemap: Option<Arc<Pagemap>>,
        promises: Promises,
    ) -> Self {
        // Each takes two mappings.
        let room = uffd::most_mappings() / 8;
        Self {
            fd: Some(fd),
            maps,
            pagemap,
            promises,
            closed: false,
            watches: Watches::new(),
            armed: Ranges::default(),
            dropped: Ranges::default(),
            later: Ranges::default(),
            again: None,
            room,
            handles: 0,
        }
    }

    /// Watches the pages of `range`.
    fn add(
        &mut self,
        range: AddressRange,
        quiet: bool,
    ) -> Result<(Watched, Arc<WatchState>), UffdError> {
        let range = self.arm(range)?;
        Ok(self.watches.add(range, quiet))
    }

    /// Has the kernel watch the pages of `range`, and what lies around them; returns the pages.
    fn arm(&mut self, range: AddressRange) -> Result<AddressRange, UffdError> {
        let Some(fd) = self.fd.clone().filter(|_| !self.closed) else {
            return Err(UffdError::Closed);
        };
        if self.armed.pieces() >= self.room / 2 {
            self.give_up_later();
        }
        let (range, piece) = self.piece(range);
        let refused = |error: Errno| match error {
            Errno::NOMEM => UffdError::NoRoom { range },
            error => UffdError::Watch { range, os: error.kind() },
        };
        if self.armed.pieces() >= self.room && self.armed.within(range) != [range] {
            return Err(UffdError::NoRoom { range });
        }
        // Also what is armed already: it may have been mapped over since, and nobody has heard of
        // it yet. Noted before: the kernel may refuse when it has done some of it.
        self.armed.insert(piece);
        let mut armed = uffd::register(&*fd, piece).map(|()| piece);
        if armed.is_err() && piece != range {
            // What lies around it may be of a kind that cannot be watched.
            self.give_up(piece);
            self.armed.insert(range);
            armed = uffd::register(&*fd, range).map(|()| range);
        }
        let keep = self.promises.fork == Fork::Keep;
        let kept = armed.and_then(|armed| {
            // The kernel takes a range with a hole, and what is mapped there later is not watched:
            // there must have been a moment without any.
            let whole = match (&self.pagemap, &self.maps) {
                (Some(pagemap), _) => pagemap.is_watched(range).unwrap_or(false),
                (None, Some(maps)) => maps.are_whole(range),
                (None, None) => true,
            };
            if !whole {
                return Err(Errno::INVAL);
            }
            if keep { uffd::keep_from_children(armed, true) } else { Ok(()) }
        });
        if let Err(error) = kept {
            // Some of it may have been done before the kernel came to what it could not.
            self.give_up(range);
            return Err(refused(error));
        }
        Ok(range)
    }

    /// The whole pages that `range` touches, and what is to be registered for them: the same as
    /// long as there is little of it, then also the mappings around them, up to a granule.
    fn piece(&self, range: AddressRange) -> (AddressRange, AddressRange) {
        let page = page_size() as u64;
        let asked = aligned(range, page);
        let Some(maps) = &self.maps else { return (asked, asked) };
        let (first, last) = (maps.at(asked.start()), maps.at(asked.last()));
        let (Some(first), Some(last)) = (first, last) else { return (asked, asked) };
        // In hugetlbfs only whole huge pages can be watched.
        let asked = aligned(range, page.max(first.page).max(last.page));
        if self.armed.pieces() < EXACT {
            return (asked, asked);
        }
        let granule = self.promises.granule.max(first.page).max(last.page);
        let around = aligned(asked, granule);
        let (start, last) =
            (around.start().max(first.range.start()), around.last().min(last.range.last()));
        let piece = AddressRange::try_from(start.min(asked.start())..=last.max(asked.last()))
            .unwrap_or(asked);
        (asked, piece)
    }

    /// Keeps the pages of `range` registered and marked. Also what nobody watches: its registration
    /// is left from earlier, and who begins to watch it now may find what is about to go. `None`
    /// when there is nothing to wait for; an error when it cannot be seen.
    pub(super) fn hold(&mut self, range: AddressRange) -> Result<Option<Watched>, Errno> {
        let (Some(fd), Some(pagemap)) = (self.fd.as_ref().filter(|_| !self.closed), &self.pagemap)
        else {
            return Ok(None);
        };
        if self.dropped.touches(range) {
            // The marks went with the registration. What is there now may be what is about to go,
            // or new: it is waited for.
            self.armed.insert(range);
            match uffd::register(&**fd, range) {
                Err(Errno::INVAL) => return Ok(None),
                registered => registered?,
            }
            pagemap.mark(range)?;
        }
        Ok(Some(self.watches.add(range, true).0))
    }

    /// Whether a thread is inside a call that has raised an event.
    pub(super) fn is_changing(&self) -> bool {
        self.fd.as_ref().is_some_and(|fd| uffd::changing(&**fd))
    }

    /// Gives up what nobody watches any more, and forgets what was dropped, unless a change is
    /// under way that has raised its event: it is not read, or not delivered, and has then `closed`
    /// the gate. Returns whether somebody has to be told that this is to be tried again.
    #[must_use]
    pub(super) fn tidy(&mut self, closed: impl Fn() -> bool) -> bool {
        while self.later.pieces() > 0 || self.dropped.pieces() > 0 {
            // In this order: the gate is closed before the event is read.
            if self.is_changing() || closed() {
                let known = self.again.is_some();
                // Nothing says when the change is over.
                let pause = self.again.map_or(SOON, |(_, pause)| (2 * pause).min(LATE));
                self.again = Some((Instant::now() + pause, pause));
                return !known;
            }
            // What is given up now was there until now, and is forgotten when that has been asked
            // once more.
            self.dropped = Ranges::default();
            self.give_up_later();
        }
        self.again = None;
        false
    }

    /// When to try again.
    pub(super) fn next_tidy(&self) -> Option<Duration> {
        self.again.map(|(at, _)| at.saturating_duration_since(Instant::now()))
    }

    fn give_up_later(&mut self) {
        core::mem::take(&mut self.later).for_each(|range| self.give_up(range));
    }

    pub(super) fn remove(&mut self, watched: Watched) {
        self.watches.remove(watched);
        self.later.insert(watched.range);
    }

    /// Ends what the kernel does for `range` and nobody else needs.
    fn give_up(&mut self, range: AddressRange) {
        // Exactly where there is little; and granules in which nothing is watched any more, with
        // what was registered around it. Where there is much, one in which something is watched
        // stays registered.
        if self.armed.pieces() < EXACT {
            self.give_up_in(range, page_size() as u64);
        }
        self.give_up_in(range, self.promises.granule);
    }

    /// Does so for those multiples of `unit` that `range` touches and in which nothing is watched.
    fn give_up_in(&mut self, range: AddressRange, unit: u64) {
        for free in self.watches.unwatched(aligned(range, unit)) {
            let start = free.start().checked_next_multiple_of(unit);
            let end = free.last().checked_add(1).map_or(u64::MAX, |end| end & !(unit - 1));
            let whole = start
                .filter(|start| *start < end)
                .and_then(|start| AddressRange::new(start, end - start).ok());
            for part in whole.map(|whole| self.armed.within(whole)).into_iter().flatten() {
                self.drop_part(part);
            }
        }
    }

    /// Has the kernel do nothing more for a part, and notes that its marks are gone.
    fn drop_part(&mut self, part: AddressRange) {
        self.armed.remove(part);
        self.disarm(part);
        self.dropped.insert(part);
        self.again.get_or_insert_with(|| (Instant::now() + LATE, LATE));
    }

    /// Has the kernel do nothing more for a part, as far as it is still ours: what was mapped there
    /// since may be the program's own or another source's. Allocates nothing.
    fn disarm(&self, part: AddressRange) {
        let Some(fd) = &self.fd else { return };
        let give_back = |part: AddressRange| {
            if self.promises.fork == Fork::Keep {
                // It may be gone.
                let _ = uffd::keep_from_children(part, false);
            }
        };
        match &self.maps {
            Some(maps) => maps.walk(self.grown(part), |part| {
                if self.is_watched(part) && uffd::unregister(&**fd, part).is_ok() {
                    give_back(part);
                }
            }),
            None => unregister(fd, part, &give_back),
        }
    }

    /// Whether all of a part of one mapping is watched, by whomever, as far as that can be seen.
    fn is_watched(&self, part: AddressRange) -> bool {
        self.pagemap.as_ref().is_none_or(|pagemap| pagemap.is_watched(part).unwrap_or(false))
    }

    /// A part and what has grown at its end: `mremap` enlarges a mapping in place, with all that
    /// the kernel does for it, and raises no event.
    fn grown(&self, part: AddressRange) -> AddressRange {
        let mapping = self.maps.as_ref().and_then(|maps| maps.at(part.last()));
        let (Some(next), Some(mapping)) = (part.last().checked_add(1), mapping) else {
            return part;
        };
        let mut last = mapping.range.last();
        if let Ok(beyond) = AddressRange::try_from(next..=last) {
            last = self.armed.first_in(beyond).map_or(last, |other| other - 1);
        }
        AddressRange::try_from(part.start()..=last.max(part.last())).unwrap_or(part)
    }

    /// What the kernel watches where memory was moved to, it watches no more: nobody asked for
    /// that.
    pub(super) fn moved(&mut self, to: AddressRange) {
        for part in self.watches.unwatched(to) {
            self.drop_part(part);
        }
    }

    /// Calls `each` with all that the kernel may raise events for, unless the source has ended.
    pub(super) fn for_each_armed(&self, each: impl FnMut(AddressRange)) {
        if !self.closed {
            self.armed.for_each(each);
        }
    }

    /// Ends all that the kernel does: changes go on without anybody being told. Allocates nothing.
    pub(super) fn close(&mut self) {
        if !core::mem::replace(&mut self.closed, true) {
            self.armed.for_each(|range| self.disarm(range));
        }
    }

    /// Gives up the descriptor: once the reader has dropped its own, the kernel forgets what it
    /// still does for it, whatever that is.
    pub(super) fn forget_descriptor(&mut self) {
        self.fd = None;
    }
}

/// The multiples of `unit` bytes, a power of two, that a range touches.
fn aligned(range: AddressRange, unit: u64) -> AddressRange {
    let (start, last) = (range.start() & !(unit - 1), range.last() | (unit - 1));
    AddressRange::try_from(start..=last).unwrap_or(AddressRange::ALL)
}

/// Ends the kernel's watch of the pages of `range`, where the kernel does not say what is mapped
/// there, and calls `each` with what it has done so for. Allocates nothing.
///
/// It refuses for a range in which there is somebody else's memory by now, or none, as a whole:
/// what it refuses is tried again in halves: down to a page if there is at most [`HALVED`], else to
/// some 64 pieces, because memory that is gone must not be asked for page by page.
fn unregister(fd: &OwnedFd, range: AddressRange, each: &impl Fn(AddressRange)) {
    let least = range.len().map_or(u64::MAX, |len| {
        if len <= HALVED { page_size() as u64 } else { (len / 64).max(HALVED) }
    });
    unregister_halves(fd, range, least, each);
}

/// A range of so many bytes is unwatched page by page if it must be.
const HALVED: u64 = 1 << 20;

fn unregister_halves(fd: &OwnedFd, range: AddressRange, least: u64, each: &impl Fn(AddressRange)) {
    if uffd::unregister(fd, range).is_ok() {
        return each(range);
    }
    let Some(len) = range.len().filter(|len| *len > least) else { return };
    let half = (len / 2).next_multiple_of(page_size() as u64);
    let halves = [
        AddressRange::new(range.start(), half),
        AddressRange::new(range.start() + half, len - half),
    ];
    halves.into_iter().flatten().for_each(|part| unregister_halves(fd, part, least, each));
}

/// A range is watched as long as this exists and its memory does.
///
/// Dropping it does not touch the memory, and does not unwatch what others watch. In a child of
/// `fork` it does nothing.
#[must_use = "a range is watched as long as its handle exists"]
pub struct Watch {
    inner: Arc<Inner>,
    watched: Watched,
    state: Arc<WatchState>,
}

impl Watch {
    pub(super) fn new(
        inner: &Arc<Inner>,
        range: AddressRange,
        quiet: bool,
    ) -> Result<Self, UffdError> {
        inner.check()?;
        // Before it is counted: there are never more watches than references.
        let inner = inner.clone();
        let (watched, state) = {
            let mut table = inner.table();
            let added = table.add(range, quiet)?;
            table.handles += 1;
            added
        };
        Ok(Self { inner, watched, state })
    }

    /// Returns the pages that are watched.
    pub fn range(&self) -> AddressRange {
        self.watched.range
    }

    /// Returns whether all of the range has been watched without a gap since the watch was made or
    /// last renewed, as far as has been [delivered](super::Deliveries): `false` once a part of
    /// it was unmapped, mapped over or moved, events were lost, or the source has ended (M2). The
    /// range has been invalidated then, and new memory at its addresses is watched only once the
    /// watch is [renewed](Self::renew).
    pub fn is_armed(&self) -> bool {
        self.state.is_armed() && !self.inner.is_forked()
    }

    /// Watches what is mapped in the range now. As a new watch (M1): *after*
    /// [`read_begin`](crate::Subscription::read_begin), and before the memory is looked at.
    ///
    /// # Errors
    /// As [`Uffd::watch`](super::Uffd::watch); the watch is as it was then.
    pub fn renew(&self) -> Result<(), UffdError> {
        self.inner.check()?;
        let mut table = self.inner.table();
        table.arm(self.watched.range)?;
        table.watches.renew(self.watched);
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // In a child of `fork` the lock may be held by a thread that does not exist there, and the
        // memory is the parent's (M4).
        if !self.inner.is_forked() {
            self.inner.unwatch(self.watched);
            self.inner.table().handles -= 1;
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("range", &self.range())
            .field("armed", &self.is_armed())
            .finish_non_exhaustive()
    }
}
