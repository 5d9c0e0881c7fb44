//! Parses what `strace -f -ttt -e trace=%memory,clone,clone3,fork,vfork,execve,exit_group` writes.
//!
//! Interleaved `<unfinished ...>` and `resumed` lines are put together again. Nothing is skipped in silence: a line that cannot be
//! parsed is an error with its number, or, with `--lenient`, counted and listed.

use std::collections::HashMap;
use std::fmt;

/// One system call of the recording.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub pid: u32,
    /// Microseconds since the first line, when it was called.
    pub at_us: u64,
    /// Line of its result; 1-based.
    pub line: usize,
    pub op: Op,
}

/// What a call asked for, and what it got. Failed calls are [`Op::Failed`]: they have no effect.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Map {
        at: u64,
        len: u64,
        writable: bool,
        private: bool,
        fixed: bool,
    },
    Unmap {
        start: u64,
        len: u64,
    },
    Remap {
        old: u64,
        old_len: u64,
        new: u64,
        new_len: u64,
        keep_old: bool,
    },
    /// `result` is the break afterwards; a refused `brk` returns the old one.
    Brk {
        result: u64,
    },
    Advise {
        start: u64,
        len: u64,
        advice: String,
    },
    Protect {
        start: u64,
        len: u64,
        writable: bool,
    },
    /// `mbind` and the like, when they may move pages.
    MovePages {
        start: u64,
        len: u64,
    },
    /// A new task: of the same address space (`CLONE_VM`), of the same process (`CLONE_THREAD`).
    Clone {
        child: u32,
        shares_memory: bool,
        thread: bool,
    },
    Exec,
    Exit,
    /// A memory call that leaves device mappings alone (`mincore`, `mlock`, `msync`, …).
    NoEffect,
    Failed,
}

impl Op {
    /// The kind by which the recording's operations are counted.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Map { fixed: true, .. } => "mmap_fixed",
            Self::Map { .. } => "mmap",
            Self::Unmap { .. } => "munmap",
            Self::Remap { .. } => "mremap",
            Self::Brk { .. } => "brk",
            Self::Advise { .. } => "madvise",
            Self::Protect { .. } => "mprotect",
            Self::MovePages { .. } => "move_pages",
            Self::Clone { thread: true, .. } => "thread",
            Self::Clone { shares_memory: true, .. } => "vfork",
            Self::Clone { .. } => "fork",
            Self::Exec => "execve",
            Self::Exit => "exit_group",
            Self::NoEffect => "no_effect",
            Self::Failed => "failed",
        }
    }
}

/// A recording.
#[derive(Debug, Default)]
pub struct Recording {
    /// Lines read, empty ones not counted.
    pub lines: usize,
    /// Calls in the order in which they take effect.
    pub calls: Vec<Call>,
    /// Lines that could not be parsed, with the reason (`--lenient`).
    pub skipped: Vec<ParseError>,
    /// Notes of strace itself: signals, exits of tasks.
    pub notes: usize,
    /// Calls whose end was not recorded, because the task was killed in them: no effect.
    pub unfinished: usize,
}

/// A line that could not be parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct ParseError {
    pub line: usize,
    pub reason: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.reason)
    }
}

impl std::error::Error for ParseError {}

/// A call whose end has not come yet.
struct Begun {
    name: String,
    text: String,
    at_us: u64,
    line: usize,
}

/// Parses a whole recording. With `lenient` bad lines are collected instead of ending it.
pub fn parse(text: &str, lenient: bool) -> Result<Recording, ParseError> {
    let mut recording = Recording::default();
    let mut begun: HashMap<u32, Begun> = HashMap::new();
    let mut first_us = None;
    // With the line at which it takes effect: a new task exists from the beginning of the call that makes it.
    let mut calls: Vec<(usize, Call)> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        recording.lines += 1;
        match parse_line(line, number, &mut first_us, &mut begun, &mut recording.notes) {
            Ok(Some(call)) => calls.push(call),
            Ok(None) => {}
            Err(reason) if lenient => recording.skipped.push(ParseError { line: number, reason }),
            Err(reason) => return Err(ParseError { line: number, reason }),
        }
    }
    for (pid, call) in begun {
        // A task that is killed in `exit_group` has exited all the same.
        if call.name == "exit_group" {
            calls.push((call.line, Call { pid, at_us: call.at_us, line: call.line, op: Op::Exit }));
        } else {
            recording.unfinished += 1;
        }
    }
    calls.sort_by_key(|(effect, _)| *effect);
    recording.calls = calls.into_iter().map(|(_, call)| call).collect();
    Ok(recording)
}

type Line = Option<(usize, Call)>;

fn parse_line(
    line: &str,
    number: usize,
    first_us: &mut Option<u64>,
    begun: &mut HashMap<u32, Begun>,
    notes: &mut usize,
) -> Result<Line, String> {
    let (pid, rest) = line.trim_start().split_once(' ').ok_or("there is no process id")?;
    let pid: u32 = pid.parse().map_err(|_| format!("{pid:?} is no process id: record with `strace -f`"))?;
    let (time, rest) = rest.trim_start().split_once(' ').ok_or("there is no time")?;
    let time = micros(time).ok_or_else(|| format!("{time:?} is no time: record with `strace -ttt`"))?;
    let at_us = time.saturating_sub(*first_us.get_or_insert(time));
    let rest = rest.trim();
    if rest.starts_with("---") || rest.starts_with("+++") {
        *notes += 1;
        return Ok(None);
    }
    if let Some(resumed) = rest.strip_prefix("<... ") {
        let (name, tail) = resumed.split_once(" resumed>").ok_or("a `resumed` line without its end")?;
        let call = begun.remove(&pid).ok_or_else(|| format!("{name} of {pid} is resumed and was not begun"))?;
        if call.name != name {
            return Err(format!("{name} of {pid} is resumed, but {} was begun in line {}", call.name, call.line));
        }
        return finish(pid, &call.name, &format!("{}{tail}", call.text), call.at_us, call.line, number);
    }
    let (name, arguments) = rest.split_once('(').ok_or("it is no system call")?;
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Err(format!("{name:?} is no system call"));
    }
    if let Some(text) = arguments.strip_suffix("<unfinished ...>") {
        let call = Begun { name: name.into(), text: text.trim_end().into(), at_us, line: number };
        if let Some(before) = begun.insert(pid, call) {
            return Err(format!("{name} of {pid} begins while {} of line {} is unfinished", before.name, before.line));
        }
        return Ok(None);
    }
    finish(pid, name, arguments, at_us, number, number)
}

/// Puts together a call from what stands behind its opening bracket.
fn finish(pid: u32, name: &str, text: &str, at_us: u64, began: usize, line: usize) -> Result<Line, String> {
    let (arguments, result) = text.rsplit_once(" = ").ok_or("there is no result")?;
    let result = result.trim();
    let arguments = arguments.trim_end();
    let arguments = arguments.strip_suffix(')').unwrap_or(arguments);
    let failed = result.starts_with("-1") || (result.starts_with('?') && name != "exit_group");
    let op = if failed { Op::Failed } else { op(name, arguments, result)? };
    // A new task may run before its parent's line says so.
    let effect = if matches!(op, Op::Clone { .. } | Op::Exit) { began } else { line };
    Ok(Some((effect, Call { pid, at_us, line, op })))
}

fn op(name: &str, arguments: &str, result: &str) -> Result<Op, String> {
    let arguments = split(arguments);
    let argument = |at: usize| arguments.get(at).copied().ok_or_else(|| format!("{name} has no argument {}", at + 1));
    let value = |at: usize| argument(at).and_then(number);
    let has = |at: usize, flag: &str| Ok::<bool, String>(argument(at)?.split('|').any(|known| known.trim() == flag));
    Ok(match name {
        "mmap" | "mmap2" => Op::Map {
            at: number(result)?,
            len: value(1)?,
            writable: has(2, "PROT_WRITE")?,
            private: has(3, "MAP_PRIVATE")?,
            fixed: has(3, "MAP_FIXED")?,
        },
        "munmap" => Op::Unmap { start: value(0)?, len: value(1)? },
        "mremap" => Op::Remap {
            old: value(0)?,
            old_len: value(1)?,
            new: number(result)?,
            new_len: value(2)?,
            keep_old: has(3, "MREMAP_DONTUNMAP")?,
        },
        "brk" => Op::Brk { result: number(result)? },
        "madvise" => Op::Advise { start: value(0)?, len: value(1)?, advice: argument(2)?.into() },
        "mprotect" | "pkey_mprotect" => Op::Protect { start: value(0)?, len: value(1)?, writable: has(2, "PROT_WRITE")? },
        "mbind" if has(5, "MPOL_MF_MOVE")? || has(5, "MPOL_MF_MOVE_ALL")? => Op::MovePages { start: value(0)?, len: value(1)? },
        "munlock"
        | "mlock"
        | "mlock2"
        | "mlockall"
        | "munlockall"
        | "msync"
        | "mincore"
        | "mbind"
        | "get_mempolicy"
        | "set_mempolicy"
        | "move_pages"
        | "migrate_pages"
        | "remap_file_pages"
        | "map_shadow_stack"
        | "mseal"
        | "process_madvise"
        | "set_mempolicy_home_node"
        | "shmat"
        | "shmdt"
        | "io_pgetevents"
        | "memfd_secret" => Op::NoEffect,
        "clone" | "clone3" | "fork" | "vfork" => {
            let flags = arguments.join(",");
            let flag = |flag: &str| flags.split(['|', ',', '=', '{', '}', ' ']).any(|known| known == flag);
            let child = result.split_whitespace().next().unwrap_or_default();
            Op::Clone {
                child: child.parse().map_err(|_| format!("{result:?} is no process id"))?,
                shares_memory: name == "vfork" || flag("CLONE_VM"),
                thread: flag("CLONE_THREAD"),
            }
        }
        "execve" | "execveat" => Op::Exec,
        "exit_group" => Op::Exit,
        // The end of one thread: its process, and the memory, live on.
        "exit" => Op::NoEffect,
        other => return Err(format!("{other} is no call that this simulation knows")),
    })
}

/// Splits arguments at the commas that are not inside brackets or quotes.
fn split(arguments: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut from, mut quoted, mut escaped) = (Vec::new(), 0usize, 0, false, false);
    for (at, byte) in arguments.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                parts.push(arguments[from..at].trim());
                from = at + 1;
            }
            _ => {}
        }
    }
    let last = arguments[from..].trim();
    if !last.is_empty() || !parts.is_empty() {
        parts.push(last);
    }
    parts
}

fn number(text: &str) -> Result<u64, String> {
    let text = text.split_whitespace().next().unwrap_or_default();
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None if text == "NULL" => Some(0),
        None => text.parse().ok(),
    };
    parsed.ok_or_else(|| format!("{text:?} is no number"))
}

/// `seconds.micros` as microseconds.
fn micros(text: &str) -> Option<u64> {
    let (seconds, fraction) = text.split_once('.')?;
    (fraction.len() == 6).then_some(())?;
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(fraction.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ops(lines: &[&str]) -> Vec<Op> {
        let text: String = lines.iter().map(|line| format!("7 1000.000000 {line}\n")).collect();
        parse(&text, false).unwrap().calls.into_iter().map(|call| call.op).collect()
    }

    #[test]
    fn interleaved_calls_are_put_together_and_take_effect_when_they_return() {
        let text = "\
            5 1.000000 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0 <unfinished ...>\n\
            6 1.000001 munmap(0x9000, 4096 <unfinished ...>\n\
            5 1.000002 <... mmap resumed>) = 0x8000\n\
            6 1.000003 <... munmap resumed>)        = 0\n";
        let calls = parse(text, false).unwrap().calls;
        let map = Op::Map { at: 0x8000, len: 4096, writable: true, private: true, fixed: false };
        assert_eq!(calls[0], Call { pid: 5, at_us: 0, line: 3, op: map });
        assert_eq!(calls[1], Call { pid: 6, at_us: 1, line: 4, op: Op::Unmap { start: 0x9000, len: 4096 } });
    }

    #[test]
    fn a_new_task_exists_from_the_beginning_of_the_call_that_makes_it() {
        let text = "\
            5 1.000000 clone3({flags=CLONE_VM|CLONE_VFORK, exit_signal=SIGCHLD, stack=0x7f, stack_size=0x9000}, 88 <unfinished ...>\n\
            6 1.000001 brk(NULL) = 0x1000\n\
            5 1.000002 <... clone3 resumed>) = 6\n";
        let calls = parse(text, false).unwrap().calls;
        assert_eq!(calls[0].op, Op::Clone { child: 6, shares_memory: true, thread: false });
        assert_eq!(calls[1].pid, 6);
    }

    #[test]
    fn every_form_of_call_is_understood() {
        assert_eq!(
            ops(&[
                "mremap(0x1000, 4096, 8192, MREMAP_MAYMOVE|MREMAP_DONTUNMAP) = 0x5000",
                "brk(0x3000)             = 0x3000",
                "madvise(0x1000, 4096, MADV_DONTNEED) = 0",
                "mprotect(0x1000, 4096, PROT_READ|PROT_WRITE) = 0",
                "mbind(0x1000, 4096, MPOL_BIND, [0x1], 64, MPOL_MF_MOVE) = 0",
                "mbind(0x1000, 4096, MPOL_BIND, [0x1], 64, 0) = 0",
                "execve(\"a, b) = 1\", [\"x\"], 0x7f /* 36 vars */) = 0",
                "clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|SIGCHLD, child_tidptr=0x7f) = 9",
                "vfork()                 = 10",
                "exit_group(0)           = ?",
            ]),
            [
                Op::Remap { old: 0x1000, old_len: 4096, new: 0x5000, new_len: 8192, keep_old: true },
                Op::Brk { result: 0x3000 },
                Op::Advise { start: 0x1000, len: 4096, advice: "MADV_DONTNEED".into() },
                Op::Protect { start: 0x1000, len: 4096, writable: true },
                Op::MovePages { start: 0x1000, len: 4096 },
                Op::NoEffect,
                Op::Exec,
                Op::Clone { child: 9, shares_memory: false, thread: false },
                Op::Clone { child: 10, shares_memory: true, thread: false },
                Op::Exit,
            ]
        );
    }

    #[test]
    fn failed_and_interrupted_calls_have_no_effect() {
        assert_eq!(
            ops(&[
                "munmap(0x1001, 4096) = -1 EINVAL (Invalid argument)",
                "execve(\"cc\", [...], 0x7f /* 3 vars */) = -1 ENOENT (No such file or directory)",
                "mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 3, 0) = ?",
            ]),
            [Op::Failed, Op::Failed, Op::Failed]
        );
    }

    #[test]
    fn a_bad_line_is_an_error_with_its_number_or_counted() {
        let text = "5 1.000000 brk(NULL) = 0x1000\nnonsense\n5 1.000001 wibble(1) = 0\n";
        assert_eq!(parse(text, false).unwrap_err().line, 2);
        let recording = parse(text, true).unwrap();
        assert_eq!((recording.lines, recording.calls.len()), (3, 1));
        assert_eq!(recording.skipped.iter().map(|error| error.line).collect::<Vec<_>>(), [2, 3]);
        assert!(parse("5 1.000000 <... brk resumed>) = 0", false).unwrap_err().reason.contains("was not begun"));
    }

    #[test]
    fn notes_of_strace_and_calls_that_never_end_are_counted() {
        let text = "\
            5 1.000000 --- SIGCHLD {si_signo=SIGCHLD} ---\n\
            5 1.000001 munmap(0x1000, 4096 <unfinished ...>\n\
            6 1.000002 exit_group(1 <unfinished ...>\n\
            5 1.000003 +++ exited with 0 +++\n";
        let recording = parse(text, false).unwrap();
        assert_eq!((recording.notes, recording.unfinished, recording.calls.len()), (2, 1, 1));
        assert_eq!(recording.calls[0].op, Op::Exit);
    }

    #[test]
    fn both_recordings_are_read_without_a_rest() {
        for (text, lines) in
            [(include_str!("workloads/numpy.strace"), 2596), (include_str!("workloads/cargo-build.strace"), 11596)]
        {
            let recording = parse(text, false).unwrap();
            assert_eq!((recording.lines, recording.unfinished), (lines, 0));
        }
    }
}
