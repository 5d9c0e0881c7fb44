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
    /// Marks that tell mappings apart (`MADV_HUGEPAGE`, `mlock`, …): no invalidation, but
    /// neighbours with other marks are other mappings.
    Mark {
        start: u64,
        len: u64,
        set: u8,
        clear: u8,
        advice: bool,
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
    /// `shmat`. Until all files are read, `len` is the number of the segment.
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
            Self::Map { kind, .. } if kind.fixed() => "mmap_fixed",
            Self::Map { .. } => "mmap",
            Self::Unmap { .. } => "munmap",
            Self::Remap(_) => "mremap",
            Self::Brk { .. } => "brk",
            Self::Advise { .. } | Self::Mark { advice: true, .. } => "madvise",
            Self::Mark { .. } => "no_effect",
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

/// The `MAP_*` flags that matter here, as Linux numbers them. In two bytes: there are many calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapKind {
    /// Private or shared, fixed, anonymous: the lowest bits.
    flags: u8,
    /// [`marks`].
    pub marks: u8,
}

impl MapKind {
    const HUGE: u8 = 0x80;

    pub fn new(flags: u64, marks: u8) -> Self {
        let huge = if flags & 0x4_0000 != 0 { Self::HUGE } else { 0 };
        Self { flags: (flags & 0x3f) as u8 | huge, marks }
    }

    pub fn private(self) -> bool {
        matches!(self.flags & 0xf, 2 | 8)
    }

    pub fn shared(self) -> bool {
        matches!(self.flags & 0xf, 1 | 3)
    }

    pub fn fixed(self) -> bool {
        self.flags & 0x10 != 0
    }

    pub fn anonymous(self) -> bool {
        self.flags & 0x20 != 0
    }

    pub fn huge(self) -> bool {
        self.flags & Self::HUGE != 0
    }
}

/// What tells neighbouring mappings apart, beside their protection.
pub mod marks {
    pub const HUGE_PAGES: u8 = 1;
    pub const NO_HUGE_PAGES: u8 = 2;
    pub const MERGEABLE: u8 = 4;
    pub const NOT_DUMPED: u8 = 8;
    pub const RANDOM: u8 = 16;
    pub const SEQUENTIAL: u8 = 32;
    pub const LOCKED: u8 = 64;
    pub const NOT_RESERVED: u8 = 128;
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
