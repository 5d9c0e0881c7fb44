//! What kind of line it is.

use super::calls::{concerns, may_concern};
use super::scan::skip;
use winnow::Result;
use winnow::ascii::digit1;
use winnow::combinator::{alt, delimited, preceded, terminated};
use winnow::prelude::*;
use winnow::token::{rest, take_while};

/// What stands behind the prefix of a line.
#[derive(Debug, PartialEq)]
pub(super) enum Body<'a> {
    /// `mmap(NULL, …`: the name, and what follows the bracket.
    Call {
        name: &'a [u8],
        text: &'a [u8],
    },
    /// `<... mmap resumed>) = 0x8000`
    Resumed {
        name: &'a [u8],
        text: &'a [u8],
    },
    /// `--- SIGCHLD … ---`
    Signal,
    /// `+++ exited with 0 +++`
    End(End),
    /// `strace: Process 7 attached`, `[ Process PID=7 runs in 32 bit mode. ]`
    Message(&'a [u8]),
    /// The head of the table of `strace -c`.
    Table,
    Text,
}

/// How a task ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum End {
    Exited,
    Killed,
    Superseded(u32),
    Other,
}

/// How a line ends that does not have the result of its call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ending {
    None,
    Unfinished,
    PidChanged(u32),
    /// strace let go of the task, or it is gone.
    Left,
}

pub(super) fn body(text: &[u8]) -> Body<'_> {
    match text.first() {
        Some(b'<') => resumed.parse(text).unwrap_or(Body::Text),
        Some(b'-') if text.starts_with(b"--- ") => Body::Signal,
        Some(b'+') if text.starts_with(b"+++ ") => Body::End(end.parse(text).unwrap_or(End::Other)),
        Some(b'%') if text.starts_with(b"% time") => Body::Table,
        Some(b's') if text.starts_with(b"strace: ") => Body::Message(text),
        Some(b'[') if text.starts_with(b"[ Process PID=") => Body::Message(text),
        Some(b'P') if message(text) == Some(0) => Body::Message(text),
        _ => call.parse(text).unwrap_or(Body::Text),
    }
}

fn name<'a>(text: &mut &'a [u8]) -> Result<&'a [u8]> {
    let word = take_while(1..=64, |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_');
    // A call that strace cannot name.
    alt(("???", word)).parse_next(text)
}

fn call<'a>(text: &mut &'a [u8]) -> Result<Body<'a>> {
    (name, '(', rest).map(|(name, _, text)| Body::Call { name, text }).parse_next(text)
}

fn resumed<'a>(text: &mut &'a [u8]) -> Result<Body<'a>> {
    let name = delimited("<... ", name, " resumed>");
    (name, rest).map(|(name, text)| Body::Resumed { name, text }).parse_next(text)
}

fn end(text: &mut &[u8]) -> Result<End> {
    let how = alt((
        "exited with ".value(End::Exited),
        "killed by ".value(End::Killed),
        preceded("superseded by execve in pid ", digit1.parse_to::<u32>()).map(End::Superseded),
    ));
    terminated(preceded("+++ ", how), rest).parse_next(text)
}

fn pid_changed(text: &mut &[u8]) -> Result<u32> {
    delimited("<pid changed to ", digit1.parse_to::<u32>(), " ...>").parse_next(text)
}

/// How a text ends, and how long it is without that.
pub(super) fn ending(text: &[u8]) -> (Ending, usize) {
    let Some(at) = text.iter().rposition(|byte| *byte == b'<') else {
        return (Ending::None, text.len());
    };
    let found = match &text[at..] {
        b"<unfinished ...>" => Ending::Unfinished,
        b"<detached ...>" => Ending::Left,
        tail if tail.starts_with(b"<ptrace(") => Ending::Left,
        tail => match pid_changed.parse(tail) {
            Ok(pid) => Ending::PidChanged(pid),
            Err(_) => return (Ending::None, text.len()),
        },
    };
    (found, at)
}

/// Where a message of strace's interrupts a line.
pub(super) fn message(text: &[u8]) -> Option<usize> {
    fn process(text: &mut &[u8]) -> Result<()> {
        let what = alt((" attached", " detached", " suspended", " resumed"));
        ("Process ", digit1, what, rest).void().parse_next(text)
    }
    let mut from = 0;
    while let Some(at) = text[from..].windows(8).position(|part| part == b"Process ") {
        let at = from + at;
        if process.parse(&text[at..]).is_ok() {
            return Some(if text[..at].ends_with(b"strace: ") { at - 8 } else { at });
        }
        from = at + 8;
    }
    None
}

/// Whether a call has its end: a bracket, a result.
pub(super) fn ends(text: &[u8]) -> bool {
    last_end(text).is_some()
}

/// Where the last bracket is that a result follows.
fn last_end(text: &[u8]) -> Option<usize> {
    let mut at = text.len();
    while let Some(found) = text[..at].iter().rposition(|byte| *byte == b'=') {
        let (before, after) = (text[..found].trim_ascii_end(), &text[found + 1..]);
        if before.ends_with(b")")
            && before.len() < found
            && after.first() == Some(&b' ')
            && after.len() > 1
        {
            return Some(before.len() - 1);
        }
        at = found;
    }
    None
}

/// Whether a line that is none of strace's may be a call that concerns memory.
pub(super) fn mentions(text: &[u8]) -> bool {
    let resumed = text.windows(9).any(|part| part == b" resumed>");
    // Of the whole line, once: a line may have many brackets.
    let (end, unfinished) = (last_end(text), text.ends_with(b"<unfinished ...>"));
    let names =
        text.iter().enumerate().filter(|(_, byte)| **byte == b'(' || (resumed && **byte == b' '));
    names.into_iter().any(|(at, _)| {
        let name = last_word(&text[..at]);
        let whole = || at == name.len() || unfinished || end.is_some_and(|end| end > at);
        (resumed && concerns(name)) || (may_concern(name) && text[at] == b'(' && whole())
    })
}

/// Whether an unknown call has another within it that concerns memory: what looks like a call is
/// output of the program, and the other stands behind it (`step(1)munmap(0x1000, 4096) = 0`).
pub(super) fn hides(text: &[u8]) -> bool {
    let (mut at, mut whole) = (0, true);
    let paths = text.iter().rposition(|byte| *byte == b'>').unwrap_or(0);
    while let Some(byte) = text.get(at) {
        match byte {
            b'(' if may_concern(last_word(&text[..at])) => return true,
            b'<' if at < paths
                && at.checked_sub(1).is_some_and(|at| text[at].is_ascii_alphanumeric()) =>
            {
                at += skip(&text[at..]).unwrap_or(1);
            }
            // What stands in quotes is no call. If there is no other quote it is an ordinary byte.
            b'"' | b'/' if whole => match skip(&text[at..]) {
                Some(len) => at += len,
                None => (whole, at) = (false, at + 1),
            },
            _ => at += 1,
        }
    }
    false
}

fn last_word(text: &[u8]) -> &[u8] {
    text.rsplit(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_').next().unwrap_or_default()
}
