//! Where invalidations come from: the process's own memory.
//!
//! - [`OwnedMapping`]: a mapping that invalidates *before* each system call that changes it and
//!   ends the invalidation after it, which is the kernel's own order. Nothing is left open. Prefer
//!   it where the program can say when its memory goes away.
//! - [`Uffd`] (Linux, feature `userfaultfd`): watches memory that somebody else unmaps, and hears
//!   of the change when it has happened. What remains open then is written
//!   [there](Uffd#what-remains).
//!
//! | | `OwnedMapping` | `Uffd` |
//! | --- | --- | --- |
//! | hears of the change | before it | when it has happened, before the caller goes on |
//! | `munmap`, `mremap`, `madvise(DONTNEED)` | yes | yes |
//! | `mprotect`, holes and lengths of files, `shmat` over it | its own | no: the kernel raises no event, see the guide `memory_changes` |
//! | needs | a program that calls it | Linux; no privilege, but for events of forks |

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
