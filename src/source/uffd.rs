//! Memory that somebody else unmaps: userfaultfd's events as invalidations.
#![forbid(unsafe_code)]

use super::ring::{Change, Ring};
use super::sys::{page_size, uffd};
use super::watches::{WatchId, Watches};
use crate::engine::Shared;
use crate::engine::invalidate::Invalidate;
use crate::event::Event;
use crate::range::AddressRange;
use crate::space::AddressSpace;
use crate::sync::{Arc, AtomicBool, AtomicUsize, Ordering};
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use futures::stream::{FuturesUnordered, StreamExt};
use linux_raw_sys::general as raw;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use std::sync::{Mutex, PoisonError, TryLockError};

/// Messages that are read at once.
const AT_ONCE: usize = 16;

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
/// - `fork` is reported when the child exists; all that is watched is then invalidated ([`Event::ProtectionPage`]: the next write of a page copies it).
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
        let id = table.watches.add(range);
        drop(table);
        Ok(Watch { inner: self.inner.clone(), id, range })
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
        let watched: Vec<_> = self.inner.table().watches.all().collect();
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
            self.watches.all().for_each(|range| unregister(&fd, range));
        }
    }
}

/// A range is watched as long as this exists. Dropping it does not touch the memory, and does not unwatch what others watch.
#[must_use = "a range is watched as long as its handle exists"]
pub struct Watch {
    inner: Arc<Inner>,
    id: WatchId,
    range: AddressRange,
}

impl Watch {
    /// The pages that are watched.
    pub fn range(&self) -> AddressRange {
        self.range
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut table = self.inner.table();
        let free = table.watches.remove(self.id);
        if let Some(fd) = &table.fd {
            free.into_iter().for_each(|range| unregister(fd, range));
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("range", &self.range).finish_non_exhaustive()
    }
}

/// Reads the kernel's events. Threads that unmap watched memory wait for it, so it waits for nobody: no lock, no memory.
///
/// [`run`](Self::run) it on a thread of its own, or wait for its descriptor ([`AsFd`]) to be readable and [`read`](Self::read). While nobody does either,
/// threads that unmap watched memory hang. Dropping it ends all watches and reads what is left, so they go on; that is still to be delivered.
#[derive(Debug)]
pub struct Reader {
    inner: Arc<Inner>,
    fd: Arc<OwnedFd>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").finish_non_exhaustive()
    }
}

impl Reader {
    /// Reads what there is, without waiting; returns how many events that were. They are then to be [delivered](Deliveries::deliver); readers
    /// of the space wait until that has begun.
    ///
    /// # Errors
    /// What `read` returns. `WouldBlock` is not an error: 0 events.
    pub fn read(&mut self) -> std::io::Result<usize> {
        self.inner.shared().close_gate();
        let read = self.read_all();
        // The events before the turn: who takes the turn finds them all.
        self.inner.turns.fetch_add(1, Ordering::AcqRel);
        ring(&self.inner.bell);
        if self.inner.orphaned.load(Ordering::Acquire) {
            // Nobody will deliver them: what is left is that readers do not wait for ever.
            self.inner.open();
        }
        read
    }

    fn read_all(&self) -> std::io::Result<usize> {
        let mut buffer = [0; AT_ONCE * uffd::MESSAGE];
        let mut events = 0;
        loop {
            let bytes = match rustix::io::read(&*self.fd, &mut buffer) {
                Ok(bytes) => bytes,
                Err(Errno::AGAIN) => return Ok(events),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let (messages, _) = buffer[..bytes].as_chunks::<{ uffd::MESSAGE }>();
            for message in messages {
                events += 1;
                if let Some(change) = parse(message) {
                    self.inner.ring.put(change);
                }
            }
            if messages.len() < AT_ONCE {
                return Ok(events);
            }
        }
    }

    /// Reads on this thread until [`Uffd::stop`].
    ///
    /// # Errors
    /// What `poll` and `read` return.
    pub fn run(&mut self) -> std::io::Result<()> {
        loop {
            let [readable, stopped] = wait([self.fd.as_fd(), self.inner.stop.as_fd()])?;
            if readable {
                self.read()?;
            }
            if stopped {
                return Ok(());
            }
        }
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

/// One message of the kernel. A fork's descriptor, which would tell of the child's memory, is closed.
fn parse(message: &[u8; uffd::MESSAGE]) -> Option<Change> {
    let (words, _) = message.as_chunks::<8>();
    let word = |at: usize| words.get(at).map_or(0, |word| u64::from_ne_bytes(*word));
    match u32::from(message[0]) {
        raw::UFFD_EVENT_UNMAP => Some(Change::Unmap(word(1), word(2))),
        raw::UFFD_EVENT_REMOVE => Some(Change::Remove(word(1), word(2))),
        raw::UFFD_EVENT_REMAP => Some(Change::Remap(word(1), word(2), word(3))),
        raw::UFFD_EVENT_FORK => {
            let [a, b, c, d, ..] = words[1];
            drop(uffd::adopt(u32::from_ne_bytes([a, b, c, d])));
            Some(Change::Fork)
        }
        // Page faults are not asked for.
        _ => None,
    }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl std::os::fd::AsRawFd for Reader {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&*self.fd)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Who has the table allocates, and so may be inside `munmap` and wait for this reader.
        loop {
            if let Some(mut table) = self.inner.try_table() {
                break table.close();
            }
            let _ = self.read();
            std::thread::yield_now();
        }
        // Nothing is watched any more, but a change may be under way whose event has to be read. To close the descriptor would not be enough: a thread
        // inside `fork` waits for us, and its child, half made, has a copy of the descriptor.
        while self.read().is_ok() && uffd::changing(&self.fd) {
            std::thread::yield_now();
        }
    }
}

/// Turns what was read into invalidations.
///
/// [`run`](Self::run) it on a thread, or wait for its descriptor ([`AsFd`]) to be readable and await [`deliver`](Self::deliver). Dropping it starts what
/// is left without waiting, and stops watching.
#[derive(Debug)]
pub struct Deliveries {
    inner: Arc<Inner>,
}

impl Deliveries {
    /// Invalidates what was read so far, and waits until no device uses it. The invalidations start in the first poll; then the readers of the space
    /// go on. Resolves to how many there were.
    ///
    /// # Cancel safety
    /// May be dropped at any moment: before the first poll nothing has happened, after it the passes belong to the space.
    ///
    /// # Panics
    /// Resumes a panic of a driver's first pass or pass (C5), after all of them have been started.
    pub fn deliver(&mut self) -> impl Future<Output = usize> + Send + use<> {
        let inner = self.inner.clone();
        async move {
            let mut passes = FuturesUnordered::new();
            let mut started = 0;
            core::future::poll_fn(|cx| {
                started = inner.start(cx, |invalidation| passes.push(invalidation));
                Poll::Ready(())
            })
            .await;
            while passes.next().await.is_some() {}
            started
        }
    }

    /// Delivers on this thread until [`Uffd::stop`]. Passes that are pending do not keep it from starting what is read meanwhile.
    ///
    /// # Errors
    /// What `poll` returns.
    ///
    /// # Panics
    /// As [`deliver`](Self::deliver).
    pub fn run(&mut self) -> std::io::Result<()> {
        struct Bell(Arc<Inner>);
        impl alloc::task::Wake for Bell {
            fn wake(self: Arc<Self>) {
                ring(&self.0.bell);
            }
        }
        let waker = Waker::from(Arc::new(Bell(self.inner.clone())));
        let mut cx = Context::from_waker(&waker);
        let mut running = FuturesUnordered::new();
        loop {
            let [rung, stopped] = wait([self.inner.bell.as_fd(), self.inner.stop.as_fd()])?;
            if rung {
                self.clear();
                running.push(self.deliver());
                while let Poll::Ready(Some(_)) = running.poll_next_unpin(&mut cx) {}
            }
            if stopped {
                return Ok(());
            }
        }
    }

    /// Makes the descriptor unreadable until more is read. To be called before [`deliver`](Self::deliver) by who waits for the descriptor.
    pub fn clear(&mut self) {
        let _ = rustix::io::read(&self.inner.bell, &mut [0; 8]);
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
        self.inner.table().close();
        self.inner.orphaned.store(true, Ordering::Release);
        self.inner.open();
    }
}

/// Opens the gate when the invalidations have been started, or a driver has panicked.
struct Open<'a>(&'a Shared, usize);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open_gate(self.1);
    }
}

impl Inner {
    /// Starts an invalidation of everything that the events name; `pending` gets those whose passes are pending.
    fn start(&self, cx: &mut Context<'_>, mut pending: impl FnMut(Pin<alloc::boxed::Box<Invalidate<'static>>>)) -> usize {
        let open = Open(self.shared(), self.turns.swap(0, Ordering::AcqRel));
        let changes = self.changes();
        let started = changes.len();
        let mut panic = None;
        for (range, event) in changes {
            let mut invalidation = alloc::boxed::Box::pin(self.space.invalidate(range, event).into_owned());
            match crate::sync::catch(|| invalidation.as_mut().poll(cx).map(drop)) {
                Ok(Poll::Ready(())) => {}
                Ok(Poll::Pending) => pending(invalidation),
                Err(thrown) => panic = panic.or(Some(thrown)),
            }
        }
        drop(open);
        if let Some(panic) = panic {
            crate::sync::resume(panic);
        }
        started
    }

    /// Without anybody who could wait: the passes are left to the space.
    fn open(&self) {
        let _open = Open(self.shared(), self.turns.swap(0, Ordering::AcqRel));
        for (range, event) in self.changes() {
            // What cannot be waited for is abandoned, and whoever needs the range drives it.
            let _ = crate::sync::catch(|| self.space.try_invalidate(range, event).map(drop));
        }
    }

    /// What the events that were read name.
    fn changes(&self) -> Vec<(AddressRange, Event)> {
        let mut changes = Vec::new();
        let whole = |changes: &mut Vec<_>, event| {
            changes.extend(self.table().watches.all().map(|range| (range, event)));
        };
        if self.ring.take_overflow() {
            whole(&mut changes, Event::Unmap);
        }
        while let Some(change) = self.ring.take() {
            match change {
                Change::Unmap(start, end) => changes.extend(named(start, end.wrapping_sub(start), Event::Unmap)),
                Change::Remove(start, end) => changes.extend(named(start, end.wrapping_sub(start), Event::Clear)),
                Change::Remap(from, to, len) => {
                    changes.extend(named(from, len, Event::Unmap));
                    // The kernel goes on watching where the memory is now; nobody asked for that.
                    let table = self.table();
                    if let (Some(fd), Ok(moved)) = (&table.fd, AddressRange::new(to, len)) {
                        table.watches.unwatched(moved).into_iter().for_each(|range| unregister(fd, range));
                    }
                }
                Change::Fork => whole(&mut changes, Event::ProtectionPage),
            }
        }
        changes
    }
}

fn named(start: u64, len: u64, event: Event) -> Option<(AddressRange, Event)> {
    AddressRange::new(start, len).ok().map(|range| (range, event))
}
