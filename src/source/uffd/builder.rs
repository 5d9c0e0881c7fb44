//! How a source is opened: what a fork means, and what the kernel permits.
#![forbid(unsafe_code)]

use super::error::os;
use super::watch::Table;
use super::{Deliveries, Inner, Reader, Uffd, UffdError};
use crate::source::ring::Ring;
use crate::source::sys::uffd::{self, ForkMark, Maps, Pagemap};
use crate::space::AddressSpace;
use crate::sync::{Arc, AtomicBool, AtomicU64};
use core::mem::ManuallyDrop;
use core::time::Duration;
use linux_raw_sys::general as raw;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::fs::OpenOptions;
use std::sync::Mutex;
use std::time::Instant;

/// Events that every source asks for.
const EVENTS: u64 = (raw::UFFD_FEATURE_EVENT_REMAP
    | raw::UFFD_FEATURE_EVENT_REMOVE
    | raw::UFFD_FEATURE_EVENT_UNMAP) as u64;
const EVENT_FORK: u64 = raw::UFFD_FEATURE_EVENT_FORK as u64;
const WP_ASYNC: u64 = raw::UFFD_FEATURE_WP_ASYNC as u64;
/// Where the kernel can, every kind of memory is watched, files too.
const OPTIONAL: u64 =
    WP_ASYNC | (raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM | raw::UFFD_FEATURE_WP_UNPOPULATED) as u64;

/// What `fork` without `exec` means for watched memory. (`vfork`, `posix_spawn` and most of
/// [`std::process::Command`] copy no memory, and mean nothing here.)
///
/// After a fork the parent and the child share each page until one of them writes it; if that is
/// the parent, it gets a copy, and a device that has mapped the page without pinning it for itself
/// goes on using what is the child's from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fork {
    /// The kernel says when the process forks, and all that is watched is invalidated
    /// ([`Event::ProtectionPage`](crate::Event::ProtectionPage)). Needs the capability
    /// `CAP_SYS_PTRACE`.
    Report,
    /// Children do not get the pages that are watched (`MADV_DONTFORK`, as libraries of RDMA do
    /// it), so nothing happens to them in the parent. A child that touches one before it has
    /// called `exec` is killed by `SIGSEGV`: watch whole buffers, not single objects of a heap,
    /// and where many ranges are watched mind what lies [around them](UffdBuilder::granule), which
    /// children do not get either. A range that the program itself has excluded by
    /// `MADV_DONTFORK` is no longer so once it was watched.
    Keep,
    /// Nothing is done. Right for a process that does not fork, and for devices that pin pages for
    /// themselves (since Linux 5.19 a page that is pinned stays the parent's).
    Ignore,
}

/// What a source promises: what it asked for, as far as the kernel and the process's rights permit
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Promises {
    /// What a fork means.
    pub fork: Fork,
    /// Whether `madvise(DONTNEED)` and the like keep their range under invalidation until the pages
    /// are seen gone (M5). `false` before Linux 6.7, or where `/proc/self/pagemap` cannot be
    /// opened, or when [`UffdBuilder::settle`] is zero: then a device that looks at the memory
    /// right after such a call has begun may get the old page.
    pub discards: bool,
    /// Bytes of the units in which memory is watched once that is many ranges. One page before
    /// Linux 6.11, whatever was asked for.
    pub granule: u64,
}

/// Settings of a [`Uffd`].
#[must_use = "a builder does nothing until `open` is called"]
#[derive(Clone, Copy, Debug)]
pub struct UffdBuilder {
    fork: Option<Fork>,
    settle: Duration,
    granule: u64,
}

impl Default for UffdBuilder {
    fn default() -> Self {
        Self { fork: None, settle: Duration::from_millis(20), granule: 2 << 20 }
    }
}

impl UffdBuilder {
    /// What a fork means. By default [`Fork::Report`] where that is permitted, and [`Fork::Keep`]
    /// where it is not: [`Uffd::promises`] says which.
    pub fn fork(mut self, fork: Fork) -> Self {
        self.fork = Some(fork);
        self
    }

    /// How long the range of a `madvise(DONTNEED)` stays under invalidation at most, until its
    /// pages are seen gone (M5); 20 ms by default, from when the thread inside the call has been
    /// seen to go on, and five times as long in all. When it is used up, that is
    /// [reported](crate::Report::Unsettled), readers go on, and the range is invalidated once more
    /// if the pages go within two seconds (of the last 64 such ranges).
    ///
    /// A later discard of the same pages takes the earlier one over, and has a time of its own:
    /// readers of pages that are discarded again before they have gone wait for as long as that
    /// lasts. Pages of `MADV_FREE` do not go before the kernel needs them, and pages that the
    /// program writes at once look as if they had stayed: then all of it is used up, for readers of
    /// that range. Zero: nobody waits, and the promise is withdrawn.
    pub fn settle(mut self, most: Duration) -> Self {
        self.settle = most;
        self
    }

    /// Once what is watched consists of more than 64 ranges, watches the mappings around what is
    /// asked for, too, up to multiples of `bytes`, a power of two; 2 MiB by default. The kernel
    /// splits a mapping where a watched part begins and ends, and a process may have 65,530
    /// mappings. One page: only what is asked for, however much that is.
    ///
    /// Changes of what lies around cost a turn of the reader, and hit no driver. A program whose
    /// reader shares a thread with code that unmaps memory chooses one page.
    ///
    /// # Panics
    /// When `bytes` is no power of two.
    pub fn granule(mut self, bytes: u64) -> Self {
        assert!(bytes.is_power_of_two(), "a granule is a power of two, not {bytes}");
        self.granule = bytes;
        self
    }

    /// Opens a source of invalidations of `space`, and its two other handles.
    ///
    /// The descriptor comes from the system call, in the mode that ordinary users are permitted
    /// (`UFFD_USER_MODE_ONLY`); where that is refused, from `/dev/userfaultfd`.
    ///
    /// # Errors
    /// [`UffdError::NotPermitted`], also for a [`Fork::Report`] that was asked for;
    /// [`UffdError::Unsupported`]; [`UffdError::Os`].
    pub fn open(self, space: &AddressSpace) -> Result<(Uffd, Reader, Deliveries), UffdError> {
        let (fd, fork, known) = self.handshake()?;
        let pagemap = if known & WP_ASYNC != 0 { Pagemap::open().map(Arc::new) } else { None };
        let maps = Maps::open();
        let page = crate::source::sys::page_size() as u64;
        let granule = if maps.is_some() { self.granule.max(page) } else { page };
        let promises =
            Promises { fork, discards: pagemap.is_some() && !self.settle.is_zero(), granule };
        let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(os);
        let fd = Arc::new(fd);
        let inner = Arc::new(Inner {
            space: ManuallyDrop::new(Some(space.clone())),
            born: ForkMark::new().map_err(os)?,
            opened: Instant::now(),
            promises,
            settle: self.settle,
            pagemap: pagemap.clone(),
            table: Mutex::new(Table::new(fd.clone(), maps, pagemap, promises)),
            waited_for: Mutex::default(),
            suspects: Mutex::default(),
            settles: Mutex::default(),
            rested: AtomicU64::new(0),
            starting: Mutex::default(),
            ring: Ring::new(),
            turns: AtomicU64::new(0),
            told: AtomicU64::new(0),
            bell: bell()?,
            stop: bell()?,
            stopped: AtomicBool::new(false),
            reading: AtomicBool::new(false),
            orphaned: AtomicBool::new(false),
            events: AtomicU64::new(0),
            unsettled: AtomicU64::new(0),
        });
        let reserve = Some(bell()?);
        Ok((
            Uffd { inner: inner.clone() },
            Reader { inner: inner.clone(), fd, reserve, ending: false, told: 0 },
            Deliveries { inner },
        ))
    }

    /// Opens a descriptor and agrees on what it tells.
    fn handshake(self) -> Result<(OwnedFd, Fork, u64), UffdError> {
        // The kernel accepts one handshake for each descriptor: the first is only asked what there
        // is.
        let known = uffd::api(descriptor()?, 0).map_err(os)?;
        let wp = u64::from(raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP);
        if known & (EVENTS | wp) != EVENTS | wp {
            return Err(UffdError::Unsupported);
        }
        let agree = |features: u64| {
            let fd = descriptor()?;
            uffd::api(&fd, features).map(|_| fd).map_err(os)
        };
        let features = EVENTS | (known & OPTIONAL);
        match self.fork {
            Some(Fork::Report) => Ok((agree(features | EVENT_FORK)?, Fork::Report, known)),
            Some(fork) => Ok((agree(features)?, fork, known)),
            None => match agree(features | EVENT_FORK) {
                Ok(fd) => Ok((fd, Fork::Report, known)),
                Err(UffdError::NotPermitted | UffdError::Unsupported) => {
                    Ok((agree(features)?, Fork::Keep, known))
                }
                Err(error) => Err(error),
            },
        }
    }
}

/// A descriptor before its handshake.
fn descriptor() -> Result<OwnedFd, UffdError> {
    // What is marked is unmarked by the kernel, and nothing else faults: so faults of the kernel
    // itself need not be handled.
    let by_call = match uffd::open(uffd::USER_MODE_ONLY) {
        // Before Linux 5.11 there was no such mode.
        Err(Errno::INVAL) => uffd::open(0),
        opened => opened,
    };
    let by_device = |refused: Errno| {
        let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
        device
            .map_err(|_| refused)
            .and_then(|device| uffd::open_by(&device, uffd::USER_MODE_ONLY).map_err(|_| refused))
    };
    match by_call {
        Err(refused @ (Errno::PERM | Errno::ACCESS | Errno::NOSYS)) => by_device(refused),
        opened => opened,
    }
    .map_err(os)
}
