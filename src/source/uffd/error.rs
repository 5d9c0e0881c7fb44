//! Why memory cannot be watched.
#![forbid(unsafe_code)]

use crate::range::AddressRange;
use core::fmt;
use rustix::io::Errno;

/// Why memory cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UffdError {
    /// The process may not use userfaultfd, or may not be told of forks.
    NotPermitted,
    /// The kernel has no userfaultfd, or does not raise these events.
    Unsupported,
    /// The kernel cannot watch this memory: it is not mapped, or of a kind that userfaultfd does
    /// not know (a device), or another userfaultfd watches it already.
    Watch {
        /// What was to be watched, in whole pages.
        range: AddressRange,
        /// The kernel's answer.
        os: std::io::ErrorKind,
    },
    /// The process has no mappings left to tell apart what is watched and what is not, or watches
    /// use up a quarter of them: like a device without room. Drop watches that are not needed,
    /// and try again.
    NoRoom {
        /// What was to be watched, in whole pages.
        range: AddressRange,
    },
    /// The [`Reader`](super::Reader) or the [`Deliveries`](super::Deliveries) have been dropped:
    /// nobody would tell of changes.
    Closed,
    /// The process is a child of the one that opened the source, which watches the parent's memory.
    /// Open one in the child.
    Forked,
    /// Something else that the operating system refused.
    Os(std::io::ErrorKind),
}

impl fmt::Display for UffdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPermitted => f.write_str(
                "userfaultfd is not permitted: events of fork need the capability CAP_SYS_PTRACE (other answers to forks, `Fork::Keep` and \
                 `Fork::Ignore`, do not); if the system call itself is refused (a seccomp filter; before Linux 5.11 the sysctl \
                 vm.unprivileged_userfaultfd = 0), permit it, or let the process open /dev/userfaultfd",
            ),
            Self::Unsupported => f.write_str(
                "the kernel has no userfaultfd with the events UNMAP, REMOVE, REMAP and write-protect mode: Linux 5.7 or newer with \
                 CONFIG_USERFAULTFD is needed; invalidate with `OwnedMapping` instead",
            ),
            Self::Watch { range, os } => write!(
                f,
                "{range} cannot be watched ({os}): it must be mapped, be memory and not a device, begin and end at a page (a huge page in hugetlbfs), and \
                 not be watched by another userfaultfd"
            ),
            Self::NoRoom { range } => write!(
                f,
                "there is no room to watch {range}: each watched part of a mapping takes two of the process's mappings (sysctl vm.max_map_count), of \
                 which watches use at most a quarter; drop watches, or watch larger ranges"
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
