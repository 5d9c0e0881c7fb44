//! Parses what `strace -f -ttt -e trace=%memory,clone,clone3,fork,vfork,execve,exit_group` writes.
//!
//! Interleaved `<unfinished ...>` and `resumed` lines are put together again. Nothing is skipped in silence: a line that cannot be
//! parsed is an error with its number, or, with `--lenient`, counted and listed.

use super::{Advice, Call, MapKind, Op, ParseError, Prot, Recording, Remap};
use std::collections::HashMap;

/// A call whose end has not come yet.
struct Begun {
    name: String,
    text: String,
    at_us: u64,
    line: usize,
}

/// Parses a whole recording. With `lenient` bad lines are collected instead of ending it.
pub(super) fn parse(text: &str, lenient: bool) -> Result<Recording, ParseError> {
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
        match parse_line(line, number, &mut first_us, &mut begun, &mut recording) {
            Ok(Some(call)) => calls.push(call),
            Ok(None) => {}
            Err(reason) if lenient => recording.skipped.push(ParseError { file: None, line: number, reason }),
            Err(reason) => return Err(ParseError { file: None, line: number, reason }),
        }
    }
    for (pid, call) in begun {
        // A task that is killed in `exit_group` has exited all the same.
        if call.name == "exit_group" {
            calls.push((call.line, Call { pid, at_ns: call.at_us * 1000, line: call.line, op: Op::Exit }));
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
    recording: &mut Recording,
) -> Result<Line, String> {
    let (pid, rest) = line.trim_start().split_once(' ').ok_or("there is no process id")?;
    let pid: u32 = pid.parse().map_err(|_| format!("{pid:?} is no process id: record with `strace -f`"))?;
    let (time, rest) = rest.trim_start().split_once(' ').ok_or("there is no time")?;
    let time = micros(time).ok_or_else(|| format!("{time:?} is no time: record with `strace -ttt`"))?;
    let at_us = time.saturating_sub(*first_us.get_or_insert(time));
    let rest = rest.trim();
    if rest.starts_with("---") || rest.starts_with("+++") {
        recording.notes += 1;
        return Ok(None);
    }
    if let Some(resumed) = rest.strip_prefix("<... ") {
        let (name, tail) = resumed.split_once(" resumed>").ok_or("a `resumed` line without its end")?;
        let call = begun.remove(&pid).ok_or_else(|| format!("{name} of {pid} is resumed and was not begun"))?;
        if call.name != name {
            return Err(format!("{name} of {pid} is resumed, but {} was begun in line {}", call.name, call.line));
        }
        return finish(pid, &call.name, &format!("{}{tail}", call.text), call.at_us, call.line, number, recording);
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
    finish(pid, name, arguments, at_us, number, number, recording)
}

/// Puts together a call from what stands behind its opening bracket.
fn finish(
    pid: u32,
    name: &str,
    text: &str,
    at_us: u64,
    began: usize,
    line: usize,
    recording: &mut Recording,
) -> Result<Line, String> {
    let (arguments, result) = text.rsplit_once(" = ").ok_or("there is no result")?;
    let result = result.trim();
    let arguments = arguments.trim_end();
    let arguments = arguments.strip_suffix(')').unwrap_or(arguments);
    let failed = result.starts_with("-1") || (result.starts_with('?') && name != "exit_group");
    if failed {
        *recording.idle.entry("failed").or_default() += 1;
        return Ok(None);
    }
    let Some(op) = op(name, arguments, result)? else {
        *recording.idle.entry("no_effect").or_default() += 1;
        return Ok(None);
    };
    // A new task may run before its parent's line says so.
    let effect = if matches!(op, Op::Clone { .. } | Op::Exit) { began } else { line };
    Ok(Some((effect, Call { pid, at_ns: at_us * 1000, line, op })))
}

fn op(name: &str, arguments: &str, result: &str) -> Result<Option<Op>, String> {
    let arguments = split(arguments);
    let argument = |at: usize| arguments.get(at).copied().ok_or_else(|| format!("{name} has no argument {}", at + 1));
    let value = |at: usize| argument(at).and_then(number);
    let has = |at: usize, flag: &str| Ok::<bool, String>(argument(at)?.split('|').any(|known| known.trim() == flag));
    let prot =
        || Ok::<Prot, String>(Prot { read: has(2, "PROT_READ")?, write: has(2, "PROT_WRITE")?, exec: has(2, "PROT_EXEC")? });
    Ok(Some(match name {
        "mmap" | "mmap2" => Op::Map {
            at: number(result)?,
            len: value(1)?,
            prot: prot()?,
            kind: MapKind {
                private: has(3, "MAP_PRIVATE")?,
                fixed: has(3, "MAP_FIXED")?,
                anonymous: has(3, "MAP_ANONYMOUS")?,
                huge: false,
            },
        },
        "munmap" => Op::Unmap { start: value(0)?, len: value(1)? },
        "mremap" => Op::Remap(Box::new(Remap {
            old: value(0)?,
            old_len: value(1)?,
            new: number(result)?,
            new_len: value(2)?,
            fixed: has(3, "MREMAP_FIXED")?,
            keep_old: has(3, "MREMAP_DONTUNMAP")?,
        })),
        "brk" => Op::Brk { result: number(result)? },
        "madvise" => Op::Advise {
            start: value(0)?,
            len: value(1)?,
            advice: match argument(2)? {
                "MADV_DONTNEED" | "MADV_FREE" | "MADV_REMOVE" => Advice::Discard,
                "MADV_PAGEOUT" => Advice::PageOut,
                "MADV_COLLAPSE" => Advice::Collapse,
                _ => return Ok(None),
            },
            partial: false,
        },
        "mprotect" | "pkey_mprotect" => {
            Op::Protect { start: value(0)?, len: value(1)?, prot: prot()?, key: None, partial: false }
        }
        "mbind" if has(5, "MPOL_MF_MOVE")? || has(5, "MPOL_MF_MOVE_ALL")? => Op::Bind { start: value(0)?, len: value(1)? },
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
        | "memfd_secret" => return Ok(None),
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
        "exit" => return Ok(None),
        other => return Err(format!("{other} is no call that this simulation knows")),
    }))
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
