//! Sources of invalidations of the process's own memory.
//!
//! - [`OwnedMapping`] is a mapping that invalidates *before* each system call that changes it, and
//!   ends the invalidation after the call. This is the kernel's own order, and it leaves no gap.
//!   Prefer it if the program itself decides when its memory goes away.
//! - [`Uffd`] (Linux, feature `userfaultfd`) watches memory that other code unmaps. It reports a
//!   change after it has happened. [What remains](Uffd#what-remains) lists the gaps.
//!
//! | | `OwnedMapping` | `Uffd` |
//! | --- | --- | --- |
//! | reports a change | before it | after it, before the caller goes on |
//! | `munmap`, `mremap`, `madvise(DONTNEED)` | yes | yes |
//! | `mprotect`, holes and lengths of files, `shmat` over it | its own | no: the kernel raises no event, see the guide `memory_changes` |
//! | needs | a program that calls it | Linux; no privilege, except for events of forks |

#[cfg(target_os = "linux")]
mod file;
mod mapping;
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
mod ranges;
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
mod ring;
mod sys;
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
mod uffd;
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
mod watches;

pub use mapping::{MapError, OwnedMapping, Protection, UnmapError};
#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
pub use uffd::{
    Deliveries, Fork, Promises, Reader, Uffd, UffdBuilder, UffdError, UffdStats, Unwatched, Watch,
    Watching,
};
