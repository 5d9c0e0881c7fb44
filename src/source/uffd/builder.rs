//! Settings of a source, and the handshake with the kernel.
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

/// Events that every source needs.
const EVENTS: u64 = (raw::UFFD_FEATURE_EVENT_REMAP
    | raw::UFFD_FEATURE_EVENT_REMOVE
    | raw::UFFD_FEATURE_EVENT_UNMAP) as u64;
const EVENT_FORK: u64 = raw::UFFD_FEATURE_EVENT_FORK as u64;
const WP_ASYNC: u64 = raw::UFFD_FEATURE_WP_ASYNC as u64;
/// Optional features: they let the kernel watch every kind of memory, including files.
const OPTIONAL: u64 =
    WP_ASYNC | (raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM | raw::UFFD_FEATURE_WP_UNPOPULATED) as u64;

/// Returns `true` if `known` has all `features`.
const fn has(known: u64, features: u64) -> bool {
    known & features == features
}

/// Selects what `fork` without `exec` means for watched memory. The setting is
/// [`UffdBuilder::fork`]. (`vfork`, `posix_spawn` and most of [`std::process::Command`] copy no
/// memory, so they do not matter here.)
///
/// After a fork the parent and the child share each page until one of them writes it. If the parent
/// writes, it gets a copy. A device that mapped the page without pinning it for itself then goes on
/// using the page of the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fork {
    /// The kernel reports a fork, and everything that is watched is invalidated
    /// ([`Event::ProtectionPage`](crate::Event::ProtectionPage)). Needs the capability
    /// `CAP_SYS_PTRACE`.
    Report,
    /// Children do not get the watched pages (`MADV_DONTFORK`, as RDMA libraries do it), so nothing
    /// happens to them in the parent.
    ///
    /// A child that touches such a page before it has called `exec` is killed by `SIGSEGV`. Watch
    /// whole buffers, not single objects of a heap. If many ranges are watched, children do not get
    /// the memory [around them](UffdBuilder::granule) either. A range that the program itself has
    /// excluded by `MADV_DONTFORK` is no longer excluded once it was watched.
    Keep,
    /// A fork is ignored. Right for a process that does not fork, and for devices that pin pages
    /// for themselves (since Linux 5.19 a pinned page stays with the parent).
    Ignore,
}

/// Promises of a source: the settings, as far as the kernel and the rights of the process permit
/// them. [`Uffd::promises`] returns them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Promises {
    /// How a fork is handled.
    pub fork: Fork,
    /// `true` if `madvise(DONTNEED)` and the like keep their range under invalidation until the
    /// pages are gone (M5).
    ///
    /// It is `false` before Linux 6.7, if `/proc/self/pagemap` cannot be opened, or if
    /// [`UffdBuilder::settle`] is zero. A device that looks at the memory right after such a call
    /// has begun may then get the old page.
    pub discards: bool,
    /// Size in bytes of the units in which memory is watched, once many ranges are watched. Always
    /// one page before Linux 6.11.
    pub granule: u64,
}

/// Settings of a [`Uffd`]. [`Uffd::builder`] returns them, and [`open`](Self::open) opens the
/// source.
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
    /// Selects how a fork is handled. The default is [`Fork::Report`] if it is permitted, and
    /// [`Fork::Keep`] otherwise; [`Uffd::promises`] tells which.
    pub fn fork(mut self, fork: Fork) -> Self {
        self.fork = Some(fork);
        self
    }

    /// Limits how long the range of a `madvise(DONTNEED)` stays under invalidation until its pages
    /// are gone (M5). The default is 20 ms. Zero withdraws the promise, and no reader waits.
    ///
    /// The time counts from when the thread inside the call has been seen to go on, and is at most
    /// five times as long in all. When it is used up, this is [reported](crate::Report::Unsettled)
    /// and readers go on. The range is invalidated once more if the pages go within two seconds
    /// (for the last 64 such ranges).
    ///
    /// A later discard of the same pages replaces the earlier one, and has its own time. So readers
    /// of pages that are discarded again and again wait as long as this lasts. Pages of `MADV_FREE`
    /// stay until the kernel needs them, and pages that the program writes at once look as if they
    /// had stayed. For such pages readers of the range wait for the whole time.
    pub fn settle(mut self, most: Duration) -> Self {
        self.settle = most;
        self
    }

    /// Sets the unit in which memory is watched once more than 64 ranges are watched: `bytes`, a
    /// power of two. The default is 2 MiB.
    ///
    /// The source then also watches the mappings around a range, up to multiples of `bytes`. This
    /// is necessary because the kernel splits a mapping where a watched part begins and ends, and a
    /// process may have only 65,530 mappings. One page: only the requested ranges are watched,
    /// however many they are.
    ///
    /// A change of the memory around costs a turn of the reader, and hits no driver. Choose one
    /// page if the reader shares a thread with code that unmaps memory.
    ///
    /// # Panics
    /// If `bytes` is not a power of two.
    pub fn granule(mut self, bytes: u64) -> Self {
        assert!(bytes.is_power_of_two(), "a granule is a power of two, not {bytes}");
        self.granule = bytes;
        self
    }

    /// Opens a source of invalidations of `space`. Returns its three handles.
    ///
    /// The descriptor comes from the system call, in the mode that ordinary users are permitted
    /// (`UFFD_USER_MODE_ONLY`). If that is refused, it comes from `/dev/userfaultfd`.
    ///
    /// # Errors
    /// [`UffdError::NotPermitted`], also if [`Fork::Report`] was requested and is not permitted;
    /// [`UffdError::Unsupported`]; [`UffdError::Os`].
    pub fn open(self, space: &AddressSpace) -> Result<(Uffd, Reader, Deliveries), UffdError> {
        let (fd, fork, known) = self.handshake()?;
        let pagemap = if has(known, WP_ASYNC) { Pagemap::open().map(Arc::new) } else { None };
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

    /// Opens a descriptor and enables the features on it.
    fn handshake(self) -> Result<(OwnedFd, Fork, u64), UffdError> {
        // The kernel accepts one handshake for each descriptor. The first descriptor only asks for
        // the known features.
        let known = uffd::api(descriptor()?, 0).map_err(os)?;
        let wp = u64::from(raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP);
        if !has(known, EVENTS | wp) {
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

/// Opens a descriptor without a handshake.
fn descriptor() -> Result<OwnedFd, UffdError> {
    // User mode is enough: no access faults (the kernel removes marks itself), so faults of the
    // kernel need no handling.
    let by_call = match uffd::open(uffd::USER_MODE_ONLY) {
        // Kernels before Linux 5.11 do not have this mode.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_has_features_if_it_knows_all_of_them() {
        assert!(has(EVENTS | WP_ASYNC, EVENTS) && has(u64::MAX, OPTIONAL));
        assert!(!has(0, WP_ASYNC) && !has(!WP_ASYNC, WP_ASYNC));
        assert!(!has(EVENTS, EVENTS | EVENT_FORK));
    }
}
