//! One call of a recording, and what it asked for.

/// A call that changes memory, or an event that ends a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// The task (thread) that called.
    pub pid: u32,
    /// When it was called, in ns since the first line; 0 where no times are recorded.
    pub at_ns: u64,
    /// The line of its result, from 1.
    pub line: usize,
    pub op: Op,
}

/// What a call asked for and got. The addresses are as the program wrote them, not rounded.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Map {
        at: u64,
        len: u64,
        prot: Prot,
        kind: MapKind,
    },
    Unmap {
        start: u64,
        len: u64,
    },
    /// Boxed: it is rare, and the other operations are half as long.
    Remap(Box<Remap>),
    /// `result` is the break afterwards. A `brk` that is refused returns the old one.
    Brk {
        result: u64,
    },
    /// `partial`: there was a hole (`ENOMEM`), and the mapped parts were advised all the same.
    Advise {
        start: u64,
        len: u64,
        advice: Advice,
        partial: bool,
    },
    /// `process_madvise`.
    AdviseMany(Box<Advised>),
    /// `partial`: there was a hole (`ENOMEM`), and what lies before it was changed.
    Protect {
        start: u64,
        len: u64,
        prot: Prot,
        key: Option<u8>,
        partial: bool,
    },
    /// `mbind` that moves pages.
    Bind {
        start: u64,
        len: u64,
    },
    /// `move_pages`: single pages of a process, or of the caller.
    MovePages(Box<(Option<u32>, Vec<u64>)>),
    /// `migrate_pages`: everything of `process`, or of the caller.
    MigratePages {
        process: Option<u32>,
    },
    /// `msync` that writes back.
    Sync {
        start: u64,
        len: u64,
    },
    /// `remap_file_pages`: what is there is mapped anew.
    MapAnew {
        start: u64,
        len: u64,
    },
    /// `shmat`.
    Attach {
        at: u64,
        len: u64,
        prot: Prot,
    },
    /// `shmdt`.
    Detach {
        at: u64,
    },
    /// A new task: of the same address space (`CLONE_VM`), of the same process (`CLONE_THREAD`).
    Clone {
        child: u32,
        shares_memory: bool,
        thread: bool,
    },
    Exec,
    /// `exit_group`: the process ends.
    Exit,
    /// A note: the caller is a thread of `process`, which strace attached to.
    ThreadOf {
        process: u32,
    },
    /// A note, or `exit`: the task ends; with its last task the process.
    Ended,
    /// A note: a signal ends the process.
    Killed,
}

impl Op {
    /// The kind by which operations are counted. Notes have none.
    pub fn kind(&self) -> Option<&'static str> {
        Some(match self {
            Self::Map { kind, .. } if kind.fixed => "mmap_fixed",
            Self::Map { .. } => "mmap",
            Self::Unmap { .. } => "munmap",
            Self::Remap(_) => "mremap",
            Self::Brk { .. } => "brk",
            Self::Advise { .. } => "madvise",
            Self::AdviseMany(_) => "process_madvise",
            Self::Protect { .. } => "mprotect",
            Self::Bind { .. } => "mbind",
            Self::MovePages(_) => "move_pages",
            Self::MigratePages { .. } => "migrate_pages",
            Self::Sync { .. } => "msync",
            Self::MapAnew { .. } => "remap_file_pages",
            Self::Attach { .. } => "shmat",
            Self::Detach { .. } => "shmdt",
            Self::Clone { thread: true, .. } => "thread",
            Self::Clone { shares_memory: true, .. } => "vfork",
            Self::Clone { .. } => "fork",
            Self::Exec => "execve",
            Self::Exit => "exit_group",
            Self::ThreadOf { .. } | Self::Ended | Self::Killed => return None,
        })
    }
}

/// What `mremap` was asked for and got.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remap {
    pub old: u64,
    pub old_len: u64,
    pub new: u64,
    pub new_len: u64,
    /// `MREMAP_FIXED`.
    pub fixed: bool,
    /// `MREMAP_DONTUNMAP`.
    pub keep_old: bool,
}

/// What `process_madvise` was asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Advised {
    /// `None`: of the caller.
    pub process: Option<u32>,
    /// Start and length.
    pub ranges: Vec<(u64, u64)>,
    pub advice: Advice,
}

/// `PROT_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prot {
    pub read: bool,
    pub write: bool,
    pub exec: bool,
}

/// The `MAP_*` flags that matter here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapKind {
    pub private: bool,
    pub anonymous: bool,
    pub fixed: bool,
    pub huge: bool,
}

/// `MADV_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// `DONTNEED`, `DONTNEED_LOCKED`, `FREE`, `REMOVE`, `GUARD_INSTALL`.
    Discard,
    /// `PAGEOUT`, `HWPOISON`, `SOFT_OFFLINE`.
    PageOut,
    Collapse,
    DontFork,
    DoFork,
    WipeOnFork,
    KeepOnFork,
}
