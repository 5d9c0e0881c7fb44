//! Memory that somebody else unmaps: userfaultfd's events as invalidations.
#![forbid(unsafe_code)]

mod deliveries;
mod reader;

pub use deliveries::Deliveries;
pub use reader::Reader;

use super::ring::Ring;
use super::sys::{page_size, uffd};
use super::watches::{Watched, Watches};
use crate::engine::Shared;
use crate::range::AddressRange;
use crate::space::AddressSpace;
use crate::sync::{Arc, AtomicBool, AtomicUsize};
use alloc::vec::Vec;
use core::fmt;
use linux_raw_sys::general as raw;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use std::sync::{Mutex, PoisonError, TryLockError};

const FEATURES: u32 =
    raw::UFFD_FEATURE_EVENT_FORK | raw::UFFD_FEATURE_EVENT_REMAP | raw::UFFD_FEATURE_EVENT_REMOVE | raw::UFFD_FEATURE_EVENT_UNMAP;

/// Watches ranges of the process's own memory, and turns what happens to them into invalidations of an [`AddressSpace`].
///
/// [`Uffd::open`] returns three handles, because three different places need them: this one, which [watches](Self::watch); a
/// [`Reader`], which reads the kernel's events; and [`Deliveries`], which call the drivers.
///
/// # The promise
/// Once `munmap`, `mmap(MAP_FIXED)` over, `mremap` or `madvise(DONTNEED)` of a watched range has returned, no
/// [`read_begin`](crate::Subscription::read_begin) and no look-up in a cache of that range answers from before it, and no
/// [check](crate::Subscription::read_retry) of a reader that began before succeeds.
///
/// The kernel lets the caller of `munmap` go on when the event has been *read*, not when it has been handled. So the reader first closes the
/// [gate of the space](AddressSpace::pause), then reads; the delivery starts the invalidation of exactly what the events name, and opens the gate.
///
/// # Two steps
/// A thread inside `munmap` may hold any lock of the program: the allocator's, a driver's. It waits for the reader. So
/// **the reader takes no lock and no memory**: it reads into fixed storage. Everything else happens in the delivery, which may wait for that thread.
/// Run the two on different threads (or the reader on a thread and the delivery as a task); on one thread, a delivery that
/// waits for a lock which a thread inside `munmap` holds, if only the allocator's, waits for ever.
///
/// A thread inside `fork` holds *all* locks of the allocator and waits for the reader, so the reader's thread must be in [`run`](Reader::run) before the program
/// forks: a thread allocates while it starts. An executor's thread may be about to allocate at any moment; a program that forks gives the reader a
/// thread of its own.
///
/// # What remains
/// - For `munmap` and `mremap` the pages are gone before the event is raised. A thread that maps the same address between the two gets memory to
///   which a device may still have the old mapping, until the invalidation has been delivered. [`OwnedMapping`](super::OwnedMapping)
///   has no such gap.
/// - `mprotect` raises no event.
/// - `fork` is reported when the child exists; all that is watched is then invalidated ([`Event::ProtectionPage`](crate::Event::ProtectionPage): the next write of a page copies it).
/// - Memory that the kernel cannot watch is refused: see [`UffdError::Watch`].
#[derive(Clone)]
pub struct Uffd {
    inner: Arc<Inner>,
}

struct Inner {
    space: AddressSpace,
    /// The descriptor that watches are made with, and what is watched. The reader never takes this lock.
    table: Mutex<Table>,
    ring: Ring,
    /// Times that the reader closed the gate and has read what there was, and the delivery has not opened it yet.
    turns: AtomicUsize,
    /// Readable while there is something to deliver.
    bell: OwnedFd,
    /// Readable once the reader shall stop.
    stop: OwnedFd,
    /// There are no deliveries any more.
    orphaned: AtomicBool,
}

struct Table {
    /// `None` once the reader or the deliveries are gone.
    fd: Option<Arc<OwnedFd>>,
    watches: Watches,
}

/// Why memory cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UffdError {
    /// The process may not use userfaultfd, or may not be told of forks.
    NotPermitted,
    /// The kernel has no userfaultfd, or does not raise these events.
    Unsupported,
    /// The kernel cannot watch this memory: it is not mapped, or of a kind that userfaultfd does not know (a file on disk, a device), or another
    /// userfaultfd watches it already.
    Watch {
        /// What was to be watched, in whole pages.
        range: AddressRange,
        /// The kernel's answer.
        os: std::io::ErrorKind,
    },
    /// The [`Reader`] or the [`Deliveries`] have been dropped: nobody would tell of changes.
    Closed,
    /// Something else that the operating system refused.
    Os(std::io::ErrorKind),
}

impl fmt::Display for UffdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPermitted => f.write_str(
                "userfaultfd is not permitted: run with the capability CAP_SYS_PTRACE (the events of fork need it), \
                 and where the sysctl vm.unprivileged_userfaultfd is 0, set it to 1 or run as root",
            ),
            Self::Unsupported => f.write_str(
                "the kernel has no userfaultfd with the events UNMAP, REMOVE, REMAP and FORK: Linux 4.11 or newer with CONFIG_USERFAULTFD \
                 is needed; invalidate with `OwnedMapping` instead",
            ),
            Self::Watch { range, os } => write!(
                f,
                "{range} cannot be watched ({os}): it must be mapped, be anonymous or shared memory, and not be watched by another userfaultfd"
            ),
            Self::Closed => f.write_str("the reader or the deliveries have been dropped: keep both as long as anything is watched"),
            Self::Os(os) => write!(f, "the operating system refused: {os}"),
        }
    }
}

impl core::error::Error for UffdError {}

fn os(error: Errno) -> UffdError {
    match error {
        Errno::PERM | Errno::ACCESS => UffdError::NotPermitted,
        Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP => UffdError::Unsupported,
        _ => UffdError::Os(error.kind()),
    }
}

impl Uffd {
    /// A new source of invalidations of `space`.
    ///
    /// # Errors
    /// [`UffdError::NotPermitted`], [`UffdError::Unsupported`].
    pub fn open(space: &AddressSpace) -> Result<(Self, Reader, Deliveries), UffdError> {
        // Nothing is ever protected, so faults of the kernel itself need not be handled, and user mode is enough.
        let open = || match uffd::open(UserfaultfdFlags::empty()) {
            Err(Errno::PERM) => uffd::open(UserfaultfdFlags::from_bits_retain(raw::UFFD_USER_MODE_ONLY)),
            opened => opened,
        };
        // The kernel accepts one handshake for each descriptor: the first is only asked what there is.
        let known = uffd::api(open().map_err(os)?, 0).map_err(os)?;
        if known & u64::from(FEATURES) != u64::from(FEATURES) {
            return Err(UffdError::Unsupported);
        }
        let fd = open().map_err(os)?;
        // Where the kernel can, every kind of memory is watched, files too.
        let optional = known & u64::from(raw::UFFD_FEATURE_WP_ASYNC | raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
        uffd::api(&fd, u64::from(FEATURES) | optional).map_err(os)?;
        let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(os);
        let fd = Arc::new(fd);
        let inner = Arc::new(Inner {
            space: space.clone(),
            table: Mutex::new(Table { fd: Some(fd.clone()), watches: Watches::new() }),
            ring: Ring::new(),
            turns: AtomicUsize::new(0),
            bell: bell()?,
            stop: bell()?,
            orphaned: AtomicBool::new(false),
        });
        Ok((Self { inner: inner.clone() }, Reader { inner: inner.clone(), fd }, Deliveries { inner }))
    }

    /// Watches the pages that `range` touches until the returned handle is dropped. May be called for ranges that overlap: a page is watched as long
    /// as one of its handles exists. A handle outlives its memory: mapped again, an address has to be watched again.
    ///
    /// # Errors
    /// [`UffdError::Watch`], [`UffdError::Closed`].
    pub fn watch(&self, range: AddressRange) -> Result<Watch, UffdError> {
        let range = pages(range);
        let mut table = self.inner.table();
        let fd = table.fd.clone().ok_or(UffdError::Closed)?;
        let len = range.len().ok_or(UffdError::Watch { range, os: std::io::ErrorKind::InvalidInput })?;
        if let Err(error) = uffd::register(&fd, range.start(), len) {
            // Some of it may have been registered before the kernel came to what it could not.
            for part in table.watches.unwatched(range) {
                unregister(&fd, part);
            }
            return Err(UffdError::Watch { range, os: error.kind() });
        }
        let watched = table.watches.add(range);
        drop(table);
        Ok(Watch { inner: self.inner.clone(), watched })
    }

    /// Makes [`Reader::run`] and [`Deliveries::run`] return.
    pub fn stop(&self) {
        ring(&self.inner.stop);
    }

    /// The space whose memory this watches.
    pub fn space(&self) -> &AddressSpace {
        &self.inner.space
    }
}

impl fmt::Debug for Uffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut watched = Vec::new();
        self.inner.table().watches.for_each(|range| watched.push(range));
        f.debug_struct("Uffd").field("watched", &watched).finish()
    }
}

/// The whole pages that a range touches.
fn pages(range: AddressRange) -> AddressRange {
    let mask = page_size() as u64 - 1;
    let (start, last) = (range.start() & !mask, range.last() | mask);
    AddressRange::new(start, last.wrapping_sub(start).wrapping_add(1)).unwrap_or(AddressRange::ALL)
}

/// Ends the kernel's watch of all pages of `range` that are still ours.
///
/// It refuses for a range in which there is somebody else's memory by now, or none, as a whole; so what it refuses is tried again in halves, down to a
/// page if it has at most [`HALVED`] bytes, else to some 64 pieces: memory that is gone must not be asked for page by page.
/// What stays watched for that raises events that name nobody's range.
fn unregister(fd: &OwnedFd, range: AddressRange) {
    let Some(len) = range.len() else { return };
    unregister_to(fd, range, if len <= HALVED { page_size() as u64 } else { (len / 64).max(HALVED) });
}

/// A range of so many bytes is unwatched page by page if it must be.
const HALVED: u64 = 1 << 20;

fn unregister_to(fd: &OwnedFd, range: AddressRange, least: u64) {
    let Some(len) = range.len() else { return };
    if uffd::unregister(fd, range.start(), len).is_ok() || len <= least {
        return;
    }
    let half = (len / 2).next_multiple_of(page_size() as u64);
    let halves = [AddressRange::new(range.start(), half), AddressRange::new(range.start() + half, len - half)];
    halves.into_iter().flatten().for_each(|part| unregister_to(fd, part, least));
}

/// Makes an eventfd readable. It can only fail when it is readable already (the counter is full).
fn ring(bell: &OwnedFd) {
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

impl Inner {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared(&self) -> &Shared {
        self.space.shared()
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

impl Table {
    /// No watch is made any more, and what is watched is given up: changes go on without anybody being told. Allocates nothing.
    fn close(&mut self) {
        if let Some(fd) = self.fd.take() {
            self.watches.for_each(|range| unregister(&fd, range));
        }
    }
}

/// A range is watched as long as this exists. Dropping it does not touch the memory, and does not unwatch what others watch.
#[must_use = "a range is watched as long as its handle exists"]
pub struct Watch {
    inner: Arc<Inner>,
    watched: Watched,
}

impl Watch {
    /// The pages that are watched.
    pub fn range(&self) -> AddressRange {
        self.watched.range
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut table = self.inner.table();
        let free = table.watches.remove(self.watched);
        if let Some(fd) = &table.fd {
            free.into_iter().for_each(|range| unregister(fd, range));
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("range", &self.range()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").finish_non_exhaustive()
    }
}

/// Waits until one of the descriptors is readable; says which.
fn wait<const N: usize>(fds: [BorrowedFd<'_>; N]) -> std::io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        match poll(&mut polled, None) {
            Ok(_) => return Ok(polled.map(|fd| fd.revents().contains(PollFlags::IN))),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
