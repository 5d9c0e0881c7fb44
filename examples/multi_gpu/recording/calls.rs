//! Which calls concern memory, and what each of them did.

use super::call::{Advice, Advised, Call, MapKind, Op, Prot, Remap, marks};
use super::scan::{Parts, flags, list, number};
use std::collections::HashMap;

/// What a call means.
#[derive(Debug, PartialEq)]
pub(super) enum Meaning {
    Op(Op),
    /// It changes no mapping; counted as this.
    Idle(&'static str),
}

/// What earlier calls said: sizes of shared memory (`shmget`), by its number.
pub(super) type Segments = HashMap<u64, u64>;

const PAGE: u64 = 4096;
const PROT: &[(&str, u64)] = &[
    ("PROT_NONE", 0),
    ("PROT_READ", 1),
    ("PROT_WRITE", 2),
    ("PROT_EXEC", 4),
    ("PROT_SEM", 8),
    ("PROT_BTI", 0x10),
    ("PROT_MTE", 0x20),
    ("PROT_GROWSDOWN", 0x0100_0000),
    ("PROT_GROWSUP", 0x0200_0000),
];
const MAP: &[(&str, u64)] = &[
    ("MAP_FILE", 0),
    ("MAP_SHARED", 1),
    ("MAP_PRIVATE", 2),
    ("MAP_SHARED_VALIDATE", 3),
    ("MAP_DROPPABLE", 8),
    ("MAP_FIXED", 0x10),
    ("MAP_ANONYMOUS", 0x20),
    ("MAP_ANON", 0x20),
    ("MAP_32BIT", 0x40),
    ("MAP_ABOVE4G", 0x80),
    ("MAP_GROWSDOWN", 0x100),
    ("MAP_DENYWRITE", 0x800),
    ("MAP_EXECUTABLE", 0x1000),
    ("MAP_LOCKED", 0x2000),
    ("MAP_NORESERVE", 0x4000),
    ("MAP_POPULATE", 0x8000),
    ("MAP_NONBLOCK", 0x1_0000),
    ("MAP_STACK", 0x2_0000),
    ("MAP_HUGETLB", 0x4_0000),
    ("MAP_SYNC", 0x8_0000),
    ("MAP_FIXED_NOREPLACE", 0x10_0000),
    ("MAP_UNINITIALIZED", 0x400_0000),
];
const REMAP: &[(&str, u64)] =
    &[("MREMAP_MAYMOVE", 1), ("MREMAP_FIXED", 2), ("MREMAP_DONTUNMAP", 4)];
const MOVE: &[(&str, u64)] = &[
    ("MPOL_MF_STRICT", 1),
    ("MPOL_MF_MOVE", 2),
    ("MPOL_MF_MOVE_ALL", 4),
    ("MPOL_MF_LAZY", 8),
    ("MPOL_MF_INTERNAL", 16),
];
const SYNC: &[(&str, u64)] = &[("MS_ASYNC", 1), ("MS_INVALIDATE", 2), ("MS_SYNC", 4)];
const SHM: &[(&str, u64)] =
    &[("SHM_RDONLY", 0x1000), ("SHM_RND", 0x2000), ("SHM_REMAP", 0x4000), ("SHM_EXEC", 0x8000)];
/// What advice does.
#[derive(Clone, Copy)]
enum Does {
    Nothing,
    To(Advice),
    /// Sets marks, and takes others away.
    Mark(u8, u8),
}

const ADVICE: &[(&str, u64, Does)] = &[
    ("MADV_NORMAL", 0, Does::Mark(0, marks::RANDOM | marks::SEQUENTIAL)),
    ("MADV_RANDOM", 1, Does::Mark(marks::RANDOM, marks::SEQUENTIAL)),
    ("MADV_SEQUENTIAL", 2, Does::Mark(marks::SEQUENTIAL, marks::RANDOM)),
    ("MADV_WILLNEED", 3, Does::Nothing),
    ("MADV_DONTNEED", 4, Does::To(Advice::Discard)),
    ("MADV_FREE", 8, Does::To(Advice::Discard)),
    ("MADV_REMOVE", 9, Does::To(Advice::Discard)),
    ("MADV_DONTFORK", 10, Does::To(Advice::DontFork)),
    ("MADV_DOFORK", 11, Does::To(Advice::DoFork)),
    ("MADV_MERGEABLE", 12, Does::Mark(marks::MERGEABLE, 0)),
    ("MADV_UNMERGEABLE", 13, Does::Mark(0, marks::MERGEABLE)),
    ("MADV_HUGEPAGE", 14, Does::Mark(marks::HUGE_PAGES, marks::NO_HUGE_PAGES)),
    ("MADV_NOHUGEPAGE", 15, Does::Mark(marks::NO_HUGE_PAGES, marks::HUGE_PAGES)),
    ("MADV_DONTDUMP", 16, Does::Mark(marks::NOT_DUMPED, 0)),
    ("MADV_DODUMP", 17, Does::Mark(0, marks::NOT_DUMPED)),
    ("MADV_WIPEONFORK", 18, Does::To(Advice::WipeOnFork)),
    ("MADV_KEEPONFORK", 19, Does::To(Advice::KeepOnFork)),
    ("MADV_COLD", 20, Does::Nothing),
    ("MADV_PAGEOUT", 21, Does::To(Advice::PageOut)),
    ("MADV_POPULATE_READ", 22, Does::Nothing),
    ("MADV_POPULATE_WRITE", 23, Does::Nothing),
    ("MADV_DONTNEED_LOCKED", 24, Does::To(Advice::Discard)),
    ("MADV_COLLAPSE", 25, Does::To(Advice::Collapse)),
    ("MADV_HWPOISON", 100, Does::To(Advice::PageOut)),
    ("MADV_SOFT_OFFLINE", 101, Does::To(Advice::PageOut)),
    ("MADV_GUARD_INSTALL", 102, Does::To(Advice::Discard)),
    ("MADV_GUARD_REMOVE", 103, Does::Nothing),
];

/// Whether a call may concern memory. All others are only counted.
pub(super) fn concerns(name: &[u8]) -> bool {
    among(name, false)
}

/// Whether a name may be one that concerns memory, with output of the program before it:
/// `donemunmap`. No other call of Linux has a name that ends so.
pub(super) fn may_concern(name: &[u8]) -> bool {
    among(name, true)
}

fn among(name: &[u8], glued: bool) -> bool {
    #[rustfmt::skip]
    const NAMES: [&str; 43] = [
        "mmap", "mmap2", "old_mmap", "mmap_pgoff", "old_mmap_pgoff", "munmap", "mremap", "brk", "madvise", "mprotect",
        "pkey_mprotect", "mbind", "msync", "remap_file_pages", "map_shadow_stack", "process_madvise", "move_pages",
        "migrate_pages", "shmget", "shmat", "shmdt", "clone", "clone2", "clone3", "fork", "vfork", "execve", "execveat",
        "exit", "exit_group", "munlock", "mlock", "mlock2", "mlockall", "munlockall", "mincore", "get_mempolicy",
        "set_mempolicy", "set_mempolicy_home_node", "mseal", "io_pgetevents", "memfd_secret", "process_mrelease",
    ];
    NAMES.iter().any(|known| {
        if glued { name.ends_with(known.as_bytes()) } else { known.as_bytes() == name }
    })
}

/// Puts the sizes of segments in, once all files are read: another file may say them.
pub(super) fn sized(calls: &mut [Call], segments: &Segments) {
    for call in calls {
        if let Op::Attach { len, .. } = &mut call.op {
            *len = segments.get(len).copied().filter(|size| *size > 0).unwrap_or(PAGE);
        }
    }
}

/// What a call did, or why that cannot be told.
pub(super) fn meaning(
    name: &str,
    parts: &Parts<'_>,
    segments: &mut Segments,
) -> Result<Meaning, String> {
    let result = parts.result;
    let word = |at: usize| result.split(|byte| *byte == b' ').nth(at).unwrap_or_default();
    // What strace returned in the kernel's place did not happen.
    if result.ends_with(b"(INJECTED)")
        || (word(0) == b"?" && !matches!(name, "exit_group" | "exit"))
    {
        return Ok(Meaning::Idle("failed"));
    }
    if word(0) == b"-1" {
        return failed(name, word(1), parts);
    }
    let op = match name {
        "mmap" | "mmap2" | "old_mmap" | "mmap_pgoff" | "old_mmap_pgoff" => map(parts)?,
        "munmap" => Op::Unmap { start: parts.address(0)?, len: parts.number(1)? },
        "mremap" => {
            let how = parts.flags(3, REMAP)?;
            Op::Remap(Box::new(Remap {
                old: parts.address(0)?,
                old_len: parts.number(1)?,
                new: aligned(parts.result_address()?)?,
                new_len: parts.number(2)?,
                fixed: how & 2 != 0,
                keep_old: how & 4 != 0,
            }))
        }
        "brk" => Op::Brk { result: parts.result_address()? },
        "madvise" => return advise(parts, false),
        "mprotect" | "pkey_mprotect" => protect(name, parts, false)?,
        "mbind" if parts.flags(5, MOVE)? & 6 != 0 => {
            Op::Bind { start: parts.address(0)?, len: parts.number(1)? }
        }
        "msync" if parts.flags(2, SYNC)? & 4 != 0 => {
            Op::Sync { start: parts.address(0)?, len: parts.number(1)? }
        }
        "remap_file_pages" => Op::MapAnew { start: parts.address(0)?, len: parts.number(1)? },
        "map_shadow_stack" => {
            // Private and anonymous.
            let kind = MapKind::new(0x22, 0);
            Op::Map {
                at: aligned(parts.result_address()?)?,
                len: parts.number(1)?,
                prot: prot(1),
                kind,
            }
        }
        "process_madvise" => return advise_many(parts),
        "move_pages" => return move_pages(parts),
        "migrate_pages" => Op::MigratePages { process: process(parts.argument(0)?)? },
        "shmget" => {
            // A call for a segment that is there already may name a smaller size.
            let size = segments.entry(parts.result_address()?).or_default();
            *size = parts.number(1)?.max(*size);
            return Ok(Meaning::Idle("no_effect"));
        }
        "shmat" => {
            let how = parts.flags(2, SHM)?;
            let len = parts.number(0)?;
            let prot = Prot { read: true, write: how & 0x1000 == 0, exec: how & 0x8000 != 0 };
            Op::Attach { at: aligned(parts.result_address()?)?, len, prot }
        }
        "mlock" | "mlock2" => mark(parts.address(0)?, parts.number(1)?, marks::LOCKED, 0),
        "munlock" => mark(parts.address(0)?, parts.number(1)?, 0, marks::LOCKED),
        "mlockall" => mark(0, u64::MAX, marks::LOCKED, 0),
        "munlockall" => mark(0, u64::MAX, 0, marks::LOCKED),
        "shmdt" => Op::Detach { at: parts.address(0)? },
        "clone" | "clone2" | "clone3" | "fork" | "vfork" => clone(name, parts)?,
        "execve" | "execveat" => Op::Exec,
        "exit_group" => Op::Exit,
        // The end of one thread: its process, and the memory, live on.
        "exit" => Op::Ended,
        _ => return Ok(Meaning::Idle("no_effect")),
    };
    Ok(Meaning::Op(op))
}

/// A call that failed has no effect, with a few exceptions.
fn failed(name: &str, error: &[u8], parts: &Parts<'_>) -> Result<Meaning, String> {
    Ok(match (name, error) {
        // There is a hole. The mapped parts have been changed all the same.
        ("madvise", b"ENOMEM") => match advise(parts, true)? {
            Meaning::Op(op @ Op::Advise { advice, .. }) if advice != Advice::Collapse => {
                Meaning::Op(op)
            }
            _ => Meaning::Idle("failed"),
        },
        ("mprotect" | "pkey_mprotect", b"ENOMEM") => Meaning::Op(protect(name, parts, true)?),
        ("msync", b"ENOMEM") if parts.flags(2, SYNC)? & 4 != 0 => {
            Meaning::Op(Op::Sync { start: parts.address(0)?, len: parts.number(1)? })
        }
        // Not all pages could be moved.
        ("mbind", b"EIO") if parts.flags(5, MOVE)? & 6 != 0 => {
            Meaning::Op(Op::Bind { start: parts.address(0)?, len: parts.number(1)? })
        }
        _ => Meaning::Idle("failed"),
    })
}

fn prot(bits: u64) -> Prot {
    Prot { read: bits & 1 != 0, write: bits & 2 != 0, exec: bits & 4 != 0 }
}

/// Mappings begin at a page. An address that does not has been cut off.
fn aligned(address: u64) -> Result<u64, String> {
    if address.is_multiple_of(PAGE) {
        Ok(address)
    } else {
        Err(format!("{address:#x} is no address of a mapping"))
    }
}

fn map(parts: &Parts<'_>) -> Result<Op, String> {
    let (at, len) = (aligned(parts.result_address()?)?, parts.number(1)?);
    let how = parts.flags(3, MAP)?;
    let has = |flag: u64, mark: u8| if how & flag != 0 { mark } else { 0 };
    // Stacks get no huge pages.
    let marks = has(0x2000, marks::LOCKED)
        | has(0x4000, marks::NOT_RESERVED)
        | has(0x2_0000, marks::NO_HUGE_PAGES);
    let kind = MapKind::new(how, marks);
    if !kind.private() && !kind.shared() {
        return Err("the mapping is neither private nor shared".into());
    }
    Ok(Op::Map { at, len, prot: prot(parts.flags(2, PROT)?), kind })
}

fn mark(start: u64, len: u64, set: u8, clear: u8) -> Op {
    Op::Mark { start, len, set, clear, advice: false }
}

fn protect(name: &str, parts: &Parts<'_>, partial: bool) -> Result<Op, String> {
    let key = match name {
        "mprotect" => None,
        _ if parts.argument(3)? == b"-1" => None,
        _ => Some(u8::try_from(parts.number(3)?).map_err(|_| "it is no protection key")?),
    };
    Ok(Op::Protect {
        start: parts.address(0)?,
        len: parts.number(1)?,
        prot: prot(parts.flags(2, PROT)?),
        key,
        partial,
    })
}

fn advice(text: &[u8]) -> Result<Does, String> {
    let wrong = || format!("{:?} is no advice that is known here", text.escape_ascii().to_string());
    let known = |(name, value, _): &&(&str, u64, Does)| {
        name.as_bytes() == text || number(text) == Some(*value)
    };
    match ADVICE.iter().find(known) {
        Some((_, _, does)) => Ok(*does),
        // Advice of a newer kernel, by number.
        None => Err(wrong()),
    }
}

fn advise(parts: &Parts<'_>, partial: bool) -> Result<Meaning, String> {
    let (start, len) = (parts.address(0)?, parts.number(1)?);
    Ok(match advice(parts.argument(2)?)? {
        Does::To(advice) => Meaning::Op(Op::Advise { start, len, advice, partial }),
        Does::Mark(set, clear) => Meaning::Op(Op::Mark { start, len, set, clear, advice: true }),
        Does::Nothing => Meaning::Idle("madvise"),
    })
}

/// `process_madvise(3<pid:7>, [{iov_base=0x1000, iov_len=4096}], 1, MADV_PAGEOUT, 0) = 4096`
///
/// Without `-y` the descriptor says nothing, and it is taken as the caller's own.
fn advise_many(parts: &Parts<'_>) -> Result<Meaning, String> {
    let Does::To(advice) = advice(parts.argument(3)?)? else {
        return Ok(Meaning::Idle("process_madvise"));
    };
    let of = parts
        .argument(0)?
        .split(|byte| *byte == b'<')
        .nth(1)
        .and_then(|of| of.strip_prefix(b"pid:"));
    let process = of
        .and_then(|of| std::str::from_utf8(of.strip_suffix(b">").unwrap_or(of)).ok()?.parse().ok());
    let ranges = list(parts.argument(1)?).ok_or("the ranges are no list")?;
    let field = |range: &[u8], name: &[u8]| {
        let mut fields =
            range.split(|byte| matches!(byte, b'{' | b',' | b'}')).map(<[u8]>::trim_ascii);
        fields.find_map(|field| number(field.strip_prefix(name)?))
    };
    // So many bytes have been advised, from the first range on.
    let mut left = parts.result_address()?;
    let mut advised = Vec::new();
    for range in &ranges {
        let range = field(range, b"iov_base=")
            .zip(field(range, b"iov_len="))
            .ok_or("a range lacks its base or length")?;
        if left > 0 {
            advised.push((range.0, range.1.min(left)));
        }
        left = left.saturating_sub(range.1);
    }
    Ok(Meaning::Op(Op::AdviseMany(Box::new(Advised { process, ranges: advised, advice }))))
}

/// `move_pages(0, 2, [0x1000, 0x2000], [1, 1], [1, -ENOENT], MPOL_MF_MOVE) = 0`
fn move_pages(parts: &Parts<'_>) -> Result<Meaning, String> {
    if parts.argument(3)? == b"NULL" || parts.flags(5, MOVE)? & 6 == 0 {
        return Ok(Meaning::Idle("move_pages"));
    }
    let pages = list(parts.argument(2)?).ok_or("the pages are no list")?;
    let status = list(parts.argument(4)?).unwrap_or_default();
    let moved = |at: usize| status.get(at).is_none_or(|status| !status.starts_with(b"-"));
    let moved = pages.iter().enumerate().filter(|(at, _)| moved(*at));
    let pages = moved.map(|(_, page)| number(page).ok_or("a page has no address"));
    Ok(Meaning::Op(Op::MovePages(Box::new((
        process(parts.argument(0)?)?,
        pages.collect::<Result<_, _>>()?,
    )))))
}

/// A process that a call names; 0 is the caller.
fn process(text: &[u8]) -> Result<Option<u32>, String> {
    let wrong = || format!("{:?} is no process", text.escape_ascii().to_string());
    let pid = task(text).ok_or_else(wrong)?;
    Ok((pid != 0).then_some(pid))
}

/// `2 /* 9 in strace's PID NS */`: the lines of the task carry the number in the comment.
fn task(text: &[u8]) -> Option<u32> {
    let comment = text.windows(3).position(|part| part == b"/* ").map(|at| &text[at + 3..]);
    let pid = match comment {
        Some(comment) if comment.windows(18).any(|part| part == b" in strace's PID N") => {
            number(comment)?
        }
        _ => number(text)?,
    };
    u32::try_from(pid).ok()
}

fn clone(name: &str, parts: &Parts<'_>) -> Result<Op, String> {
    let child = task(parts.result).ok_or("the result is no process id")?;
    if name == "fork" || name == "vfork" {
        return Ok(Op::Clone { child, shares_memory: name == "vfork", thread: false });
    }
    let mut fields = parts
        .arguments
        .iter()
        .flat_map(|argument| argument.split(|byte| matches!(byte, b'{' | b',')));
    let named = fields.find_map(|field| field.trim_ascii().strip_prefix(b"flags="));
    // With `-e raw=clone` it is the first argument.
    let text = named.or_else(|| {
        parts.arguments.first().copied().filter(|first| number(first).is_some() && name == "clone")
    });
    let text = text.ok_or("its flags are not recorded: record without -e raw=clone3")?;
    // All other flags, and the signal among them, make no difference here.
    let has = |flag: &str, bit: u64| {
        let mut words =
            text.split(|byte| matches!(byte, b'|' | b' ' | b'}')).map(<[u8]>::trim_ascii);
        words.any(|word| {
            word == flag.as_bytes() || flags(word, &[]).is_ok_and(|bits| bits & bit != 0)
        })
    };
    Ok(Op::Clone {
        child,
        shares_memory: has("CLONE_VM", 0x100),
        thread: has("CLONE_THREAD", 0x1_0000),
    })
}
