//! What commands to a mirror return.

use crate::frame::PAGE;
use crate::memory::Fault;
use shootdown::MirrorError;
use std::fmt;

/// Why a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// The process itself could not do that (`EFAULT`, `EPERM`, `EINVAL`).
    Fault(Fault),
    /// The device has not got this page (`ENOENT`), or has it exclusively where it should not
    /// (`EPERM`).
    Page(u64),
    /// The memory changed each time, until the retry budget was used up.
    Busy { retries: u32 },
    /// The mirror was closed.
    Closed,
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => fault.fmt(f),
            Self::Page(page) => {
                write!(f, "the page at {:#x} is not where the command needs it", page * PAGE)
            }
            Self::Busy { retries } => {
                write!(
                    f,
                    "the memory changed during each of {} tries: raise the retry budget",
                    retries + 1
                )
            }
            Self::Closed => f.write_str("the mirror was closed"),
        }
    }
}

impl std::error::Error for CommandError {}

impl From<Fault> for CommandError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<MirrorError<Fault>> for CommandError {
    fn from(error: MirrorError<Fault>) -> Self {
        match error {
            MirrorError::Prepare(fault) => Self::Fault(fault),
            MirrorError::RetriesExhausted { retries, .. } => Self::Busy { retries },
            _ => Self::Closed,
        }
    }
}

/// What a command did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What the device read.
    pub words: Vec<u64>,
    /// Pages that it went through.
    pub pages: u64,
    /// Times that it had to fault pages in.
    pub faults: u32,
}
