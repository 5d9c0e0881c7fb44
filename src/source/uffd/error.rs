//! Errors of a source.
#![forbid(unsafe_code)]

use crate::range::AddressRange;
use core::fmt;
use rustix::io::Errno;

/// Reason why memory cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UffdError {
    /// The process may not use userfaultfd, or may not receive events of forks.
    NotPermitted,
    /// The kernel has no userfaultfd, or does not raise the needed events.
    Unsupported,
    /// The kernel cannot watch this memory. It is not mapped, or it is a device, or another
    /// userfaultfd watches it.
    Watch {
        /// The range, in whole pages.
        range: AddressRange,
        /// Answer of the kernel.
        os: std::io::ErrorKind,
    },
    /// The process has no mappings left to separate watched from unwatched memory, or watches use a
    /// quarter of them. This is like a device without room: drop watches and try again.
    NoRoom {
        /// The range, in whole pages.
        range: AddressRange,
    },
    /// The [`Reader`](super::Reader) or the [`Deliveries`](super::Deliveries) were dropped, so
    /// changes would not be reported.
    Closed,
    /// This process is a child of the one that opened the source, which watches the parent's memory
    /// (M4). Open another source.
    Forked,
    /// The operating system refused for another reason.
    Os(std::io::ErrorKind),
}

impl fmt::Display for UffdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPermitted => f.write_str(
                "userfaultfd is not permitted: events of fork need the capability CAP_SYS_PTRACE \
                 (other answers to forks, `Fork::Keep` and `Fork::Ignore`, do not); if the system \
                 call itself is refused (a seccomp filter; before Linux 5.11 the sysctl \
                 vm.unprivileged_userfaultfd = 0), permit it, or let the process open \
                 /dev/userfaultfd",
            ),
            Self::Unsupported => f.write_str(
                "the kernel has no userfaultfd with the events UNMAP, REMOVE, REMAP and \
                 write-protect mode: Linux 5.7 or newer with CONFIG_USERFAULTFD is needed; \
                 invalidate with `OwnedMapping` instead",
            ),
            Self::Watch { range, os } => write!(
                f,
                "{range} cannot be watched ({os}): it must be mapped, be memory and not a device, \
                 begin and end at a page (a huge page in hugetlbfs), and not be watched by another \
                 userfaultfd"
            ),
            Self::NoRoom { range } => write!(
                f,
                "there is no room to watch {range}: each watched part of a mapping takes two of \
                 the process's mappings (sysctl vm.max_map_count), of which watches use at most a \
                 quarter; drop watches, or watch larger ranges"
            ),
            Self::Closed => f.write_str("the reader or the deliveries have been dropped: keep both as long as anything is watched"),
            Self::Forked => f.write_str("this process is a child of the one that opened the source: open another one here"),
            Self::Os(os) => write!(f, "the operating system refused: {os}"),
        }
    }
}

impl core::error::Error for UffdError {}

impl From<UffdError> for std::io::Error {
    fn from(error: UffdError) -> Self {
        Self::other(error)
    }
}

pub(super) fn os(error: Errno) -> UffdError {
    match error {
        Errno::PERM | Errno::ACCESS => UffdError::NotPermitted,
        Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP | Errno::NODEV | Errno::NOTTY => {
            UffdError::Unsupported
        }
        _ => UffdError::Os(error.kind()),
    }
}
