//! Memory that somebody else unmaps: userfaultfd's events as invalidations.
#![forbid(unsafe_code)]

mod batch;
mod builder;
mod deliveries;
mod error;
mod mirror;
mod reader;
mod settle;
mod watch;

pub use builder::{Fork, Promises, UffdBuilder};
pub use deliveries::Deliveries;
pub use error::UffdError;
pub use mirror::{Unwatched, Watching};
pub use reader::Reader;
pub use watch::Watch;

use super::ring::Ring;
use super::sys::uffd::{ForkMark, Pagemap};
use super::watches::Watched;
use crate::engine::Shared;
use crate::range::AddressRange;
use crate::space::AddressSpace;
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering, Weak};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::fmt;
use core::mem::ManuallyDrop;
use core::time::Duration;
use deliveries::Starting;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::io::Errno;
use settle::{Marked, Suspect};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::Instant;
use watch::Table;

/// Watches ranges of the process's own memory, and turns what happens to them into invalidations of
/// an [`AddressSpace`].
///
/// [`Uffd::open`] returns three handles, because three different places need them: this one, which
/// [watches](Self::watch); a [`Reader`], which reads the kernel's events; and [`Deliveries`], which
/// call the drivers.
///
/// # The promise
/// Once `munmap`, `mmap(MAP_FIXED)` over, `mremap` or `madvise(DONTNEED)` of a watched range has
/// returned, no [`read_begin`](crate::Subscription::read_begin) and no look-up in a cache of that
/// range that begins then answers from before it, and no [check](crate::Subscription::read_retry)
/// of a reader that began before succeeds.
///
/// The kernel lets the caller of `munmap` go on when the event has been *read*, not when it has
/// been handled. So the reader first closes the [gate of the space](AddressSpace::pause), then
/// reads; the delivery starts the invalidation of exactly what the events name, and opens the gate.
///
/// The invalidations are [late](crate::Invalidation::is_late): the memory may be gone, and nothing
/// may be written back to it.
///
/// # The order
/// A watch has to be made *after* `read_begin` has returned and before the memory is looked at, on
/// each try: a watch ends with its memory, and what is mapped there next is not watched.
/// [`mirror`](Self::mirror) does it so, and so does the registration cache (feature `cache`).
///
/// # Two steps
/// A thread inside `munmap` may hold any lock of the program: the allocator's, a driver's. It waits
/// for the reader. So **the reader takes no lock and no memory**: it reads into fixed storage.
/// Everything else happens in the delivery, which may wait for that thread. Run the two on
/// different threads (or the reader on a thread and the delivery as a task); on one thread, a
/// delivery that waits for a lock which a thread inside `munmap` holds, if only the allocator's,
/// waits for ever.
///
/// A thread inside `fork` holds *all* locks of the allocator and, with [`Fork::Report`], waits for
/// the reader, so the reader's thread must be in [`run`](Reader::run) before the program forks: a
/// thread allocates while it starts. An executor's thread may be about to allocate at any moment; a
/// program that forks gives the reader a thread of its own.
///
/// # Who may
/// Everybody: an ordinary user is told of all changes but forks, and [`promises`](Self::promises)
/// says what is done about those.
///
/// # Discarded pages
/// `madvise` with `MADV_DONTNEED`, `MADV_REMOVE` or `MADV_FREE` raises its event *before* the pages
/// go. Their range stays under invalidation until the pages have been seen gone, for 20 ms at most
/// ([`UffdBuilder::settle`]). Only readers of that range wait.
///
/// | memory | what becomes of the pages |
/// | --- | --- |
/// | private, anonymous or of a file | they are seen to go |
/// | huge pages | each is seen to go as one |
/// | shared, `MADV_DONTNEED` | they leave the page table only: whoever has them still has the right ones |
/// | shared, `MADV_REMOVE` | those that the process has touched are seen to go |
/// | `MADV_FREE` | they stay until the kernel needs them, so all of the time is used up and reported; those that a device has pinned do not go, and until they are written they may be read as they were or as zeros |
///
/// # The end
/// In this order:
/// 1. Have dirty data written back while the memory is there: `space.invalidate(range,
///    Event::ProtectionVma)` is not late, if the program unmaps nothing meanwhile.
/// 2. Drop registrations, and `flush` caches.
/// 3. [`stop`](Self::stop), and join the threads of the reader and the deliveries, which drop
///    them; or cancel the tasks that have them. `stop` before `run` makes `run` return at once.
/// 4. [`drain`](AddressSpace::drain) the space.
///
/// When the reader or the deliveries are dropped, also by a panic of their thread, all watches end,
/// no new one is made, and all that was watched is invalidated as
/// [`Event::Unmap`](crate::Event::Unmap), late, by each of the two (M3). A panic of a driver ends
/// nothing: it is [counted and reported](crate::Report::Panicked).
///
/// # Fork
/// In a child of `fork` all handles are inert (M4): using one is [`UffdError::Forked`], dropping
/// one does nothing, and the parent's watches stay. A child that needs a source opens one.
///
/// # What remains
/// - For `munmap` and `mremap` the pages are gone before the event is raised. A thread that maps
///   the same address between the two gets memory to which a device may still have the old mapping,
///   until the invalidation has been delivered. [`OwnedMapping`](super::OwnedMapping) has no such
///   gap.
/// - A page that another thread writes while `madvise` is about to drop it looks like one that was
///   written after it was dropped: the wait ends early, and a device that looks at the page in
///   between gets the old one. Programs do not write memory that they discard.
/// - A discard whose time was used up is looked at for two more seconds (of the last 64 such).
///   Pages of `MADV_FREE` that go later than that are told to nobody; those that a device has
///   pinned do not go.
/// - As long as changes of watched memory come faster than drivers are told of them, all readers of
///   the space begin after a wait for those that are left, and their checks fail. Such changes are
///   slowed down, by 5 ms each at most.
/// - Pages that are swapped out, and pages of shared memory that the process has not touched itself
///   (`MADV_REMOVE`), cannot be seen to go.
/// - Changes that raise no event: `mprotect`, `fallocate(PUNCH_HOLE)` and `ftruncate` of a shared
///   file, `shmdt`, the first write to a page that was only read, and others. The guide
///   [`memory_changes`](crate::docs::memory_changes) lists them, each with what to do: mostly to
///   invalidate by hand, before the change.
/// - A process with a userfaultfd open cannot be checkpointed by CRIU.
/// - Memory that the kernel cannot watch is refused: see [`UffdError::Watch`].
#[must_use = "watches are made through this handle"]
#[derive(Clone)]
pub struct Uffd {
    inner: Arc<Inner>,
}

struct Inner {
    /// Dropped by hand, not in children of `fork`: the last handle of a space would take its lock.
    space: ManuallyDrop<Option<AddressSpace>>,
    born: ForkMark,
    opened: Instant,
    promises: Promises,
    /// How long a change is waited for at most.
    settle: Duration,
    /// `None` where pages cannot be seen to go.
    pagemap: Option<Arc<Pagemap>>,
    /// What is watched. The reader never takes this lock.
    table: Mutex<Table>,
    /// Pages that are waited for, and ranges whose pages had not gone in time.
    waited_for: Mutex<Vec<Weak<Marked>>>,
    suspects: Mutex<Vec<Suspect>>,
    /// Ids of the notifiers that stand where pages are waited for.
    settles: Mutex<BTreeSet<u64>>,
    /// Nanoseconds from `opened` to the last rest between two looks.
    rested: AtomicU64,
    starting: Mutex<Starting>,
    ring: Ring,
    /// [`Closings`](crate::engine::gate::Closings) of the gate after which the reader has read what
    /// there was, and which no delivery has taken.
    turns: AtomicU64,
    /// Invalidations that were started.
    told: AtomicU64,
    /// Readable while there is something to deliver.
    bell: OwnedFd,
    /// Readable once the reader shall stop.
    stop: OwnedFd,
    /// `stop` was called.
    stopped: AtomicBool,
    /// A reader is in its `run`.
    reading: AtomicBool,
    /// There are no deliveries any more.
    orphaned: AtomicBool,
    /// Events that were read.
    events: AtomicU64,
    /// Changes that were not seen to happen within their time.
    unsettled: AtomicU64,
}

impl Uffd {
    /// Opens a source of invalidations of `space`, with what the process is permitted.
    ///
    /// # Errors
    /// [`UffdError::NotPermitted`], [`UffdError::Unsupported`].
    pub fn open(space: &AddressSpace) -> Result<(Self, Reader, Deliveries), UffdError> {
        UffdBuilder::default().open(space)
    }

    /// Settings for a source.
    pub fn builder() -> UffdBuilder {
        UffdBuilder::default()
    }

    /// Watches the pages that `range` touches (whole huge pages in hugetlbfs) until the returned
    /// handle is dropped or the memory is gone. May be called for ranges that overlap: a page
    /// is watched as long as one of its handles exists.
    ///
    /// Call it after `read_begin` and before the memory is looked at (M1), or let
    /// [`mirror`](Self::mirror) do that.
    ///
    /// # Errors
    /// [`UffdError::Watch`], [`UffdError::NoRoom`], [`UffdError::Closed`], [`UffdError::Forked`].
    pub fn watch(&self, range: AddressRange) -> Result<Watch, UffdError> {
        Watch::new(&self.inner, range, false)
    }

    /// The same for a holder who hears of the end of the watch by the invalidation, so that it is
    /// not reported.
    #[cfg(feature = "cache")]
    pub(crate) fn watch_quietly(&self, range: AddressRange) -> Result<Watch, UffdError> {
        Watch::new(&self.inner, range, true)
    }

    /// Whether nobody has the source but one handle and watches: neither can invalidate anything.
    #[cfg(feature = "cache")]
    pub(crate) fn is_abandoned(&self) -> bool {
        let table = self.inner.table();
        Arc::strong_count(&self.inner) <= 1 + table.handles
    }

    /// Returns what the source promises: what was asked for, as far as it is permitted.
    pub fn promises(&self) -> Promises {
        self.inner.promises
    }

    /// Returns what has happened so far.
    pub fn stats(&self) -> UffdStats {
        UffdStats {
            events: self.inner.events.load(Ordering::Relaxed),
            unsettled: self.inner.unsettled.load(Ordering::Relaxed),
        }
    }

    /// Returns whether a thread is in [`Reader::run`], so that the program may fork: see
    /// [above](Self#two-steps). After the reader's thread was spawned, yield until it is.
    pub fn is_reading(&self) -> bool {
        self.inner.reading.load(Ordering::Acquire)
    }

    /// Returns whether the process is a child of the one that opened the source (M4).
    #[inline]
    pub fn is_forked(&self) -> bool {
        self.inner.is_forked()
    }

    /// Makes [`Reader::run`] and [`Deliveries::run`] return, now or when they are called. Loops of
    /// one's own learn of it by [`Deliveries::is_stopped`], whose descriptor becomes readable. See
    /// [above](Self#the-end).
    pub fn stop(&self) {
        // The descriptors are the parent's, too.
        if !self.is_forked() {
            self.inner.stopped.store(true, Ordering::Release);
            ring(&self.inner.stop);
            ring(&self.inner.bell);
        }
    }

    /// The space whose memory this watches.
    pub fn space(&self) -> &AddressSpace {
        self.inner.space()
    }
}

/// What has happened in a source so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct UffdStats {
    /// Events that were read.
    pub events: u64,
    /// Discards whose pages were not seen to go in time:
    /// [`Report::Unsettled`](crate::Report::Unsettled).
    pub unsettled: u64,
}

impl fmt::Debug for Uffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_forked() {
            return f.debug_struct("Uffd").field("forked", &true).finish_non_exhaustive();
        }
        let mut watched = Vec::new();
        self.inner.table().watches.for_each(|range| watched.push(range));
        f.debug_struct("Uffd")
            .field("promises", &self.promises())
            .field("watched", &watched)
            .finish()
    }
}

/// Makes an eventfd readable. It can only fail when it is readable already (the counter is full).
fn ring(bell: &OwnedFd) {
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

impl Inner {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn space(&self) -> &AddressSpace {
        self.space.as_ref().expect("the space goes only with the source")
    }

    fn shared(&self) -> &Shared {
        self.space().shared()
    }

    #[inline]
    fn is_forked(&self) -> bool {
        self.born.is_forked()
    }

    /// Whether the source may be used in this process.
    fn check(&self) -> Result<(), UffdError> {
        if self.is_forked() { Err(UffdError::Forked) } else { Ok(()) }
    }

    /// Ends what was done for a user of a range.
    fn unwatch(&self, watched: Watched) {
        let untold = {
            let mut table = self.table();
            table.remove(watched);
            table.tidy(|| self.shared().gate.has_closings_now())
        };
        if untold {
            ring(&self.bell);
        }
    }

    /// The same unless somebody has it.
    fn try_table(&self) -> Option<std::sync::MutexGuard<'_, Table>> {
        match self.table.try_lock() {
            Ok(table) => Some(table),
            Err(TryLockError::Poisoned(table)) => Some(table.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !self.is_forked() {
            self.space.take();
        }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").finish_non_exhaustive()
    }
}

/// Waits until one of the descriptors is readable, or for `most`; says which.
fn wait<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    most: Option<Duration>,
) -> std::io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    let most = most.and_then(|most| Timespec::try_from(most).ok());
    loop {
        match poll(&mut polled, most.as_ref()) {
            Ok(_) => return Ok(polled.map(|fd| fd.revents().contains(PollFlags::IN))),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
