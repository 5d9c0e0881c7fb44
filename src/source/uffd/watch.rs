//! The watches, and what the kernel watches for them.
#![forbid(unsafe_code)]

use super::halves::in_halves;
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

/// While fewer ranges than this are watched, the kernel watches exactly them.
const EXACT: usize = 64;

/// First and longest pause between two checks whether a change is still under way.
const SOON: Duration = Duration::from_micros(100);
const LATE: Duration = Duration::from_millis(1);

/// The ranges that users watch, and the ranges that the kernel watches for them. [`Table::armed`]
/// contains all of the former.
pub(super) struct Table {
    /// `None` once the reader is gone. The kernel then forgets the rest.
    fd: Option<Arc<OwnedFd>>,
    maps: Option<Maps>,
    /// `None` if the kernel cannot tell which pages are watched.
    pagemap: Option<Arc<Pagemap>>,
    promises: Promises,
    /// The reader or the deliveries are gone, and nothing is watched any more.
    closed: bool,
    pub(super) watches: Watches,
    /// Everything registered and not yet unregistered. It keeps unmapped ranges, which the kernel
    /// forgets, so that nothing stays registered once the reader is gone.
    armed: Ranges,
    /// Everything unregistered since [`tidy`](Self::tidy) last saw no change under way. Its marks
    /// are gone. A later change finds nothing registered there, and raises no event.
    dropped: Ranges,
    /// Ranges to give up once no change is under way. Their marks are needed until then.
    later: Ranges,
    /// When to check that again, and the pause before that check.
    again: Option<(Instant, Duration)>,
    /// Most ranges that `armed` may have.
    room: usize,
    /// Number of [`Watch`]es. The cache compares it with the references of the source.
    pub(super) handles: usize,
}

impl Table {
    pub(super) fn new(
        fd: Arc<OwnedFd>,
        maps: Option<Maps>,
        pagemap: Option<Arc<Pagemap>>,
        promises: Promises,
    ) -> Self {
        // Each range takes two mappings.
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

    /// Adds a watch of the pages of `range`.
    fn add(
        &mut self,
        range: AddressRange,
        quiet: bool,
    ) -> Result<(Watched, Arc<WatchState>), UffdError> {
        let range = self.arm(range)?;
        Ok(self.watches.add(range, quiet))
    }

    /// Makes the kernel watch the pages of `range`, and possibly the memory around them. Returns
    /// the pages.
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
        let keep = self.promises.fork == Fork::Keep;
        let kept = self.register(&fd, range, piece).and_then(|armed| {
            // The kernel accepts a range with a hole, and does not watch what is mapped there
            // later. So check that there was a moment without a hole.
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
            // The kernel may have watched a part before it refused.
            self.give_up(range);
            return Err(refused(error));
        }
        Ok(range)
    }

    /// Registers `piece`, or else `range`, which is a part of it. Returns which of them.
    ///
    /// Registers armed memory again: it may have been mapped over, with the event not yet
    /// delivered. Inserts before the call, because the kernel may do a part of it and then refuse.
    fn register(
        &mut self,
        fd: &OwnedFd,
        range: AddressRange,
        piece: AddressRange,
    ) -> Result<AddressRange, Errno> {
        self.armed.insert(piece);
        let registered = uffd::register(fd, piece);
        if registered.is_err() && piece != range {
            // The memory around `range` may be gone or of another kind by now.
            self.give_up(piece);
            self.armed.insert(range);
            return uffd::register(fd, range).map(|()| range);
        }
        registered.map(|()| piece)
    }

    /// Returns the whole pages that `range` touches, and the piece to register for them. The piece
    /// equals the pages while few ranges are watched. Later it includes the mappings around them,
    /// up to a granule.
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

    /// Keeps the pages of `range` registered and marked, also those without a watch: they may still
    /// be registered from earlier, and a new watch may find pages that are about to go. Returns
    /// `None` if there is nothing to wait for, and an error if the kernel cannot show it.
    pub(super) fn hold(&mut self, range: AddressRange) -> Result<Option<Watched>, Errno> {
        let (Some(fd), Some(pagemap)) = (self.fd.as_ref().filter(|_| !self.closed), &self.pagemap)
        else {
            return Ok(None);
        };
        if self.dropped.touches(range) {
            // The marks went with the registration. The present pages may be the old ones that are
            // about to go, or new ones. Waits for both.
            self.armed.insert(range);
            match uffd::register(&**fd, range) {
                Err(Errno::INVAL) => return Ok(None),
                registered => registered?,
            }
            pagemap.mark(range)?;
        }
        Ok(Some(self.watches.add(range, true).0))
    }

    /// Returns `true` while a thread is inside a call that has raised an event.
    pub(super) fn is_changing(&self) -> bool {
        self.fd.as_ref().is_some_and(|fd| uffd::changing(&**fd))
    }

    /// Gives up ranges without a watch, and forgets `dropped`, unless a change is under way. Its
    /// event is either not read, or not delivered; the gate is then `closed`. Returns `true` if a
    /// delivery must be woken to try again.
    #[must_use]
    pub(super) fn tidy(&mut self, closed: impl Fn() -> bool) -> bool {
        while self.later.pieces() > 0 || self.dropped.pieces() > 0 {
            // This order: the gate is closed before the event is read.
            if self.is_changing() || closed() {
                let known = self.again.is_some();
                // The kernel does not tell when the change is over.
                let pause = self.again.map_or(SOON, |(_, pause)| (2 * pause).min(LATE));
                self.again = Some((Instant::now() + pause, pause));
                return !known;
            }
            // Ranges given up now were registered until now. They are forgotten after the next
            // check.
            self.dropped = Ranges::default();
            self.give_up_later();
        }
        self.again = None;
        false
    }

    /// Returns the time until the next call of `tidy`.
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

    /// Unregisters what only `range` needed.
    fn give_up(&mut self, range: AddressRange) {
        // While few ranges are registered, works page by page. Otherwise only granules without a
        // watch are given up, with what was registered around them; a granule with a watch stays
        // registered.
        if self.armed.pieces() < EXACT {
            self.give_up_in(range, page_size() as u64);
        }
        self.give_up_in(range, self.promises.granule);
    }

    /// Unregisters every multiple of `unit` that `range` touches and that has no watch.
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

    /// Unregisters a part, and records that its marks are gone.
    fn drop_part(&mut self, part: AddressRange) {
        self.armed.remove(part);
        self.disarm(part);
        self.dropped.insert(part);
        self.again.get_or_insert_with(|| (Instant::now() + LATE, LATE));
    }

    /// Unregisters a part, as far as it is still ours: memory mapped there since may belong to the
    /// program or another source. Does not allocate.
    fn disarm(&self, part: AddressRange) {
        let Some(fd) = &self.fd else { return };
        let give_back = |part: AddressRange| {
            if self.promises.fork == Fork::Keep {
                // The memory may be gone.
                let _ = uffd::keep_from_children(part, false);
            }
        };
        match &self.maps {
            Some(maps) => maps.walk(self.grown(part), |part| {
                if self.is_watched(part) && uffd::unregister(&**fd, part).is_ok() {
                    give_back(part);
                }
            }),
            // The kernel refuses a range that contains memory of another owner, or none.
            None => in_halves(part, &|part| {
                let unregistered = uffd::unregister(&**fd, part).is_ok();
                if unregistered {
                    give_back(part);
                }
                unregistered
            }),
        }
    }

    /// Returns `true` if all of a part of one mapping is watched, by this source or another, as far
    /// as the kernel tells.
    fn is_watched(&self, part: AddressRange) -> bool {
        self.pagemap.as_ref().is_none_or(|pagemap| pagemap.is_watched(part).unwrap_or(false))
    }

    /// Returns the part and what was added at its end. `mremap` enlarges a mapping in place
    /// together with its registration, and raises no event.
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

    /// Unregisters unwatched memory at the target of a move. The registration moved with the
    /// memory.
    pub(super) fn moved(&mut self, to: AddressRange) {
        for part in self.watches.unwatched(to) {
            self.drop_part(part);
        }
    }

    /// Calls `each` with every range for which the kernel may raise events, unless the source has
    /// ended.
    pub(super) fn for_each_armed(&self, each: impl FnMut(AddressRange)) {
        if !self.closed {
            self.armed.for_each(each);
        }
    }

    /// Unregisters everything: changes no longer raise events. Does not allocate.
    pub(super) fn close(&mut self) {
        if !core::mem::replace(&mut self.closed, true) {
            self.armed.for_each(|range| self.disarm(range));
        }
    }

    /// Drops the descriptor. Once the reader has dropped its own, the kernel forgets every
    /// registration.
    pub(super) fn forget_descriptor(&mut self) {
        self.fd = None;
    }
}

/// Returns the multiples of `unit` (a power of two) that `range` touches.
fn aligned(range: AddressRange, unit: u64) -> AddressRange {
    let (start, last) = (range.start() & !(unit - 1), range.last() | (unit - 1));
    AddressRange::try_from(start..=last).unwrap_or(AddressRange::ALL)
}

/// Keeps a range watched, as long as this handle and the memory exist.
/// [`Uffd::watch`](super::Uffd::watch) returns it.
///
/// Its drop does not touch the memory, and does not affect other watches. In a child of `fork` it
/// does nothing (M4).
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
        // Cloned first, so that `handles` never exceeds the references.
        let inner = inner.clone();
        let (watched, state) = {
            let mut table = inner.table();
            let added = table.add(range, quiet)?;
            table.handles += 1;
            added
        };
        Ok(Self { inner, watched, state })
    }

    /// Returns the watched pages.
    pub fn range(&self) -> AddressRange {
        self.watched.range
    }

    /// Returns `true` if the whole range has been watched without a gap since the watch was made or
    /// last renewed, as far as changes have been [delivered](super::Deliveries) (M2).
    ///
    /// It is `false` once a part was unmapped, mapped over or moved, once events were lost, and
    /// once the source has ended. The range has then been invalidated. New memory at its addresses
    /// is watched only after the watch is [renewed](Self::renew).
    pub fn is_armed(&self) -> bool {
        self.state.is_armed() && !self.inner.is_forked()
    }

    /// Watches the memory that is mapped in the range now. Like a new watch (M1), renew it *after*
    /// [`read_begin`](crate::Subscription::read_begin), and before you look at the memory.
    ///
    /// # Errors
    /// As [`Uffd::watch`](super::Uffd::watch). The watch is then unchanged.
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
        // M4: in a child of `fork` a thread of the parent may hold the lock, and the memory is the
        // parent's.
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
