//! Memory that other code unmaps: userfaultfd's events become invalidations.
#![forbid(unsafe_code)]

mod batch;
mod builder;
mod deliveries;
mod error;
mod halves;
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

/// Watches ranges of the process's own memory, and turns changes of them into invalidations of an
/// [`AddressSpace`].
///
/// [`Uffd::open`] returns three handles, for three different places:
/// - this one, which [watches](Self::watch) ranges;
/// - a [`Reader`], which reads the kernel's events;
/// - [`Deliveries`], which call the drivers.
///
/// ```no_run
/// use shootdown::source::Uffd;
/// use shootdown::{AddressRange, AddressSpace};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let space = AddressSpace::new();
/// let (uffd, mut reader, mut deliveries) = Uffd::open(&space)?;
/// let reader = std::thread::spawn(move || reader.run());
/// let deliveries = std::thread::spawn(move || deliveries.run());
/// while !uffd.is_reading() {
///     std::thread::yield_now();
/// }
///
/// let buffer = vec![0_u8; 1 << 20];
/// // Changes of the buffer now invalidate its range in `space`.
/// let watch = uffd.watch(AddressRange::of_slice(&buffer)?)?;
/// drop(watch);
///
/// uffd.stop();
/// reader.join().unwrap()?;
/// deliveries.join().unwrap()?;
/// # Ok(()) }
/// ```
///
/// # The promise
/// Once `munmap`, `mmap(MAP_FIXED)` over, `mremap` or `madvise(DONTNEED)` of a watched range has
/// returned:
/// - a [`read_begin`](crate::Subscription::read_begin) or a look-up in a registration cache of that
///   range that begins then does not return anything from before the change;
/// - the [check](crate::Subscription::read_retry) of a reader that began before fails.
///
/// The kernel lets the caller of `munmap` go on once the event has been *read*, not once it has
/// been handled. So the reader first closes the [gate of the space](AddressSpace::pause), then
/// reads. The delivery starts the invalidation of exactly the ranges that the events name, and then
/// opens the gate.
///
/// The invalidations are [late](crate::Invalidation::is_late): the memory may be gone, and nothing
/// may be written back to it.
///
/// # The order
/// Make the watch *after* `read_begin` has returned and before you look at the memory, on each try
/// (M1). A watch ends with its memory, and memory that is mapped there later is not watched.
/// [`mirror`](Self::mirror) and the registration cache (feature `cache`) keep this order.
///
/// # Two steps
/// A thread inside `munmap` may hold any lock of the program: the allocator's, a driver's. It waits
/// for the reader. So **the reader takes no lock and does not allocate**: it reads into fixed
/// storage. Everything else happens in the delivery, which may wait for that thread.
///
/// Run the two on different threads, or the reader on a thread and the delivery as a task. On one
/// thread, a delivery may wait for a lock, if only the allocator's, that a thread inside `munmap`
/// holds. It then waits for ever.
///
/// A thread inside `fork` holds *all* locks of the allocator. With [`Fork::Report`] it waits for
/// the reader. A thread allocates while it starts, so the reader's thread must be in
/// [`run`](Reader::run) before the program forks. A thread of an executor may allocate at any
/// moment. So a program that forks gives the reader a thread of its own.
///
/// # Privileges
/// None are needed. An ordinary user receives all changes except forks, and
/// [`promises`](Self::promises) tells how forks are handled.
///
/// # Discarded pages
/// `madvise` with `MADV_DONTNEED`, `MADV_REMOVE` or `MADV_FREE` raises its event *before* the pages
/// go. Their range stays under invalidation until the pages are gone (M5), for 20 ms at most
/// ([`UffdBuilder::settle`]). Only readers of that range wait.
///
/// | memory | how the pages go |
/// | --- | --- |
/// | private, anonymous or of a file | the source sees them go |
/// | huge pages | the source sees each go as one |
/// | shared, `MADV_DONTNEED` | they leave the page table only: a device that has them still has the right ones |
/// | shared, `MADV_REMOVE` | the source sees those go that the process has touched |
/// | `MADV_FREE` | they stay until the kernel needs them, so the whole time is used up and reported; pages that a device has pinned do not go, and until they are written they may be read with their old contents or as zeros |
///
/// # The end
/// In this order:
/// 1. Let drivers write dirty data back while the memory is there:
///    `space.invalidate(range, Event::ProtectionVma)` is not late, if the program unmaps nothing
///    meanwhile.
/// 2. Drop registrations, and `flush` caches.
/// 3. Call [`stop`](Self::stop), and join the threads of the reader and the deliveries, which drop
///    them. Or cancel the tasks that have them. After `stop`, `run` returns at once.
/// 4. [`drain`](AddressSpace::drain) the space.
///
/// When the reader or the deliveries are dropped, also by a panic of their thread, all watches end
/// and no new one can be made. Each of the two then invalidates everything that was watched, as a
/// late [`Event::Unmap`](crate::Event::Unmap) (M3). A panic of a driver ends nothing: it is
/// [counted and reported](crate::Report::Panicked).
///
/// # Fork
/// In a child of `fork` all handles are inert (M4): using one returns [`UffdError::Forked`],
/// dropping one does nothing, and the parent's watches stay. A child that needs a source opens one.
///
/// # What remains
/// - With `munmap` and `mremap` the pages are gone before the event is raised. If a thread maps the
///   same address between the two, a device may still map the old pages there, until the
///   invalidation is delivered. [`OwnedMapping`](super::OwnedMapping) has no such gap.
/// - A page that another thread writes while `madvise` is about to drop it looks like a page that
///   was written after it was dropped. The wait ends early, and a device that looks at the page in
///   between gets the old one. Programs do not write memory that they discard.
/// - A discard whose time was used up is checked for two more seconds (the last 64 of them). If
///   pages of `MADV_FREE` go later than that, no driver is told. Pages that a device has pinned do
///   not go.
/// - While changes of watched memory come faster than they are delivered, each reader of the space
///   first waits for the pending ones, and its check fails. Such changes are slowed down, by at
///   most 5 ms each.
/// - The source cannot see pages go that are swapped out, nor pages of shared memory that the
///   process has not touched itself (`MADV_REMOVE`).
/// - Some changes raise no event: `mprotect`, `fallocate(PUNCH_HOLE)` and `ftruncate` of a shared
///   file, `shmdt`, the first write to a page that was only read, and others. The guide
///   [`memory_changes`](crate::docs::memory_changes) lists them with their remedies; mostly it is
///   to invalidate by hand, before the change.
/// - CRIU cannot checkpoint a process that has a userfaultfd open.
/// - Memory that the kernel cannot watch is refused: see [`UffdError::Watch`].
#[must_use = "watches are made through this handle"]
#[derive(Clone)]
pub struct Uffd {
    inner: Arc<Inner>,
}

struct Inner {
    /// Taken by hand, and leaked in a child of `fork`: dropping the last handle of a space takes
    /// its lock.
    space: ManuallyDrop<Option<AddressSpace>>,
    born: ForkMark,
    opened: Instant,
    promises: Promises,
    /// Longest time that a change is waited for.
    settle: Duration,
    /// `None` if the source cannot see pages go.
    pagemap: Option<Arc<Pagemap>>,
    /// The watches, and what the kernel watches. The reader never waits for this lock.
    table: Mutex<Table>,
    /// Pages that are waited for, and ranges whose pages did not go in time.
    waited_for: Mutex<Vec<Weak<Marked>>>,
    suspects: Mutex<Vec<Suspect>>,
    /// Ids of the source's own notifiers, which wait for pages.
    settles: Mutex<BTreeSet<u64>>,
    /// Time of the last rest between two looks, in nanoseconds since `opened`.
    rested: AtomicU64,
    starting: Mutex<Starting>,
    ring: Ring,
    /// [`Closings`](crate::engine::gate::Closings) of the gate whose events have been read, and
    /// which no delivery has taken.
    turns: AtomicU64,
    /// Number of invalidations started.
    told: AtomicU64,
    /// An eventfd. Readable while there is something to deliver.
    bell: OwnedFd,
    /// An eventfd. Readable once the reader is to stop.
    stop: OwnedFd,
    /// `stop` was called.
    stopped: AtomicBool,
    /// A thread is in [`Reader::run`].
    reading: AtomicBool,
    /// The deliveries were dropped.
    orphaned: AtomicBool,
    /// Number of events read.
    events: AtomicU64,
    /// Number of changes that were not seen to happen in time.
    unsettled: AtomicU64,
}

impl Uffd {
    /// Opens a source of invalidations of `space`, with the default settings.
    /// [`builder`](Self::builder) has others.
    ///
    /// # Errors
    /// [`UffdError::NotPermitted`], [`UffdError::Unsupported`], [`UffdError::Os`].
    pub fn open(space: &AddressSpace) -> Result<(Self, Reader, Deliveries), UffdError> {
        UffdBuilder::default().open(space)
    }

    /// Returns settings for a source.
    pub fn builder() -> UffdBuilder {
        UffdBuilder::default()
    }

    /// Watches the pages that `range` touches (whole huge pages in hugetlbfs), until the returned
    /// handle is dropped or the memory is gone. Watches may overlap: a page is watched as long as
    /// one of its handles exists.
    ///
    /// Call it after `read_begin` and before the memory is looked at (M1). [`mirror`](Self::mirror)
    /// does that.
    ///
    /// # Errors
    /// [`UffdError::Watch`], [`UffdError::NoRoom`], [`UffdError::Closed`], [`UffdError::Forked`].
    pub fn watch(&self, range: AddressRange) -> Result<Watch, UffdError> {
        Watch::new(&self.inner, range, false)
    }

    /// Watches `range` without reporting the end of the watch, because the invalidation tells the
    /// holder.
    #[cfg(feature = "cache")]
    pub(crate) fn watch_quietly(&self, range: AddressRange) -> Result<Watch, UffdError> {
        Watch::new(&self.inner, range, true)
    }

    /// Returns `true` if only one handle and watches hold the source. Neither can invalidate
    /// anything.
    #[cfg(feature = "cache")]
    pub(crate) fn is_abandoned(&self) -> bool {
        let table = self.inner.table();
        Arc::strong_count(&self.inner) <= 1 + table.handles
    }

    /// Returns what the source promises: the settings, as far as they are permitted.
    pub fn promises(&self) -> Promises {
        self.inner.promises
    }

    /// Returns the counters of the source.
    pub fn stats(&self) -> UffdStats {
        UffdStats {
            events: self.inner.events.load(Ordering::Relaxed),
            unsettled: self.inner.unsettled.load(Ordering::Relaxed),
        }
    }

    /// Returns `true` while a thread is in [`Reader::run`], so that the program may fork: see
    /// [above](Self#two-steps). After the spawn of the reader's thread, yield until it is `true`.
    pub fn is_reading(&self) -> bool {
        self.inner.reading.load(Ordering::Acquire)
    }

    /// Returns `true` in a child of the process that opened the source (M4).
    #[inline]
    pub fn is_forked(&self) -> bool {
        self.inner.is_forked()
    }

    /// Makes [`Reader::run`] and [`Deliveries::run`] return, now or when they are called. The
    /// program's own loops see it with [`Deliveries::is_stopped`]; their descriptor becomes
    /// readable. See [above](Self#the-end).
    pub fn stop(&self) {
        // In a child the descriptors are shared with the parent.
        if !self.is_forked() {
            self.inner.stopped.store(true, Ordering::Release);
            ring(&self.inner.stop);
            ring(&self.inner.bell);
        }
    }

    /// Returns the space that this source invalidates.
    pub fn space(&self) -> &AddressSpace {
        self.inner.space()
    }
}

/// Counters of a source. [`Uffd::stats`] returns them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct UffdStats {
    /// Events read.
    pub events: u64,
    /// Discards whose pages did not go in time: [`Report::Unsettled`](crate::Report::Unsettled).
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

/// Makes an eventfd readable. The write fails only if the counter is full, and then it is readable.
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

    /// Returns an error in a child of the process that opened the source (M4).
    fn check(&self) -> Result<(), UffdError> {
        if self.is_forked() { Err(UffdError::Forked) } else { Ok(()) }
    }

    /// Removes a watch, and gives up what the kernel watched only for it.
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

    /// Locks the table, unless another thread holds the lock.
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

/// Waits until one of the descriptors is readable, or for `most`. Returns which are readable.
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
