//! Reads one file, line by line, and puts calls together again that strace wrote in pieces.

use super::Recording;
use super::call::{Call, Op};
use super::calls::{Meaning, Segments, concerns, may_concern, meaning};
use super::error::{Note, NoteKind, ParseError, Skipped};
use super::line::{Body, End, Ending, body, ending, ends, hides, mentions, message};
use super::order::put_early;
use super::prefix::{Clock, Prefix, prefix};
use super::scan::{Parts, parts};
use super::tasks::Tasks;
use std::collections::HashMap;
use std::sync::Arc;

/// So many notes that are not strace's are kept, to be listed on request.
const LISTED: usize = 100;

/// A call comes in at most so many pieces, and is at most so long if it comes in several: each
/// piece has all of it read again.
const PIECES: usize = 64;
const LONGEST: usize = 1 << 20;

/// A call that concerns memory and whose end has not come yet.
struct Begun {
    name: String,
    text: Vec<u8>,
    at_ns: u64,
    line: usize,
    /// How many calls took effect before it began.
    before: usize,
    /// In how many pieces it has come.
    pieces: usize,
    /// It goes on under another number: `execve` from a thread.
    moved: bool,
}

/// A call that its line breaks apart: output of the program, or a message, came in between.
struct Open {
    pid: u32,
    /// By a message: the next line that is no other call is the rest.
    interrupted: bool,
    call: Begun,
}

/// What one file holds.
#[derive(Debug, Default)]
pub(super) struct Part {
    pub(super) recording: Recording,
    /// The task of a file that has one (`-ff`).
    pub(super) of: Option<u32>,
    /// When its first line was, on a clock that files share.
    pub(super) origin: Option<u64>,
    /// A line was strace's.
    pub(super) known: bool,
    /// It has the table of `strace -c`.
    pub(super) counts: bool,
    /// A line that may be a call of another tool's.
    pub(super) near: Skipped,
    pub(super) segments: Segments,
    pub(super) lenient: bool,
}

pub(super) struct Reader {
    file: Option<Arc<str>>,
    lenient: bool,
    line: usize,
    part: Part,
    clock: Clock,
    tasks: Tasks,
    begun: HashMap<u32, Begun>,
    open: Option<Open>,
    /// New tasks, with how many calls took effect before the one that made them began.
    early: Vec<(usize, Call)>,
    /// Every line has a process id at its beginning.
    plain: bool,
    /// Within the table of `strace -c`.
    table: bool,
    other: HashMap<Box<[u8]>, usize>,
}

impl Reader {
    /// `file`: its name, where there are several. `of`: the task that its name says (`-ff`); else
    /// lines that name no task are of `made_up`, until another line says whose they are.
    pub(super) fn new(
        file: Option<Arc<str>>,
        of: Option<u32>,
        made_up: u32,
        lenient: bool,
    ) -> Self {
        Self {
            file,
            lenient,
            line: 0,
            part: Part { of, lenient, ..Part::default() },
            clock: Clock::default(),
            tasks: Tasks::new(of.unwrap_or(made_up)),
            begun: HashMap::new(),
            open: None,
            early: Vec::new(),
            plain: false,
            table: false,
            other: HashMap::new(),
        }
    }

    /// Reads one line.
    pub(super) fn read(&mut self, line: &[u8]) -> Result<(), ParseError> {
        self.line += 1;
        let line = line.trim_ascii_end();
        if line.is_empty() {
            return Ok(());
        }
        self.part.recording.lines += 1;
        if line.starts_with(b" > ") {
            self.note(NoteKind::Stack);
            return Ok(());
        }
        let mut rest = line;
        let prefix = prefix(&mut rest);
        match body(rest) {
            // Output of the program stands before a call: `donemunmap(…`, `step(1)munmap(…`.
            Body::Call { name, text } if !concerns(name) && (may_concern(name) || hides(text)) => {
                self.text(line, rest)
            }
            Body::Call { name, text } => {
                let (pid, at_ns) = self.known(&prefix)?;
                self.call(pid, at_ns, name, text)
            }
            Body::Resumed { name, text } => {
                let (pid, at_ns) = self.known(&prefix)?;
                self.resumed(pid, at_ns, name, text)
            }
            Body::Signal => {
                self.task(&prefix);
                self.note(NoteKind::Signal);
                Ok(())
            }
            Body::End(ending) => {
                let (pid, at_ns) = self.task(&prefix);
                self.note(NoteKind::End);
                self.end(pid, at_ns, ending);
                Ok(())
            }
            Body::Message(text) => {
                self.message(text);
                Ok(())
            }
            Body::Table => {
                (self.table, self.part.counts) = (true, true);
                self.note(NoteKind::Summary);
                Ok(())
            }
            Body::Text => self.text(line, rest),
        }
    }

    /// A line that is surely strace's.
    fn known(&mut self, prefix: &Prefix) -> Result<(u32, u64), ParseError> {
        if !self.part.known {
            (self.part.known, self.plain) = (true, prefix.plain);
            let near = std::mem::take(&mut self.part.near);
            near.allowed(self.lenient, &mut self.part.recording.skipped)?;
        }
        self.table = false;
        let task = self.task(prefix);
        self.cut_off()?;
        Ok(task)
    }

    fn task(&mut self, prefix: &Prefix) -> (u32, u64) {
        let at_ns = self.clock.at(prefix.time);
        let (pid, op) = self.tasks.of_line(prefix.pid);
        if let Some(op) = op {
            self.push(pid, at_ns, op);
        }
        (pid, at_ns)
    }

    fn push(&mut self, pid: u32, at_ns: u64, op: Op) {
        self.part.recording.calls.push(Call { pid, at_ns, line: self.line, op });
    }

    fn note(&mut self, kind: NoteKind) {
        self.part.recording.notes += 1;
        *self.part.recording.noted.entry(kind).or_default() += 1;
    }

    fn wrong(&self, reason: String) -> ParseError {
        ParseError { file: self.file.clone(), line: self.line, reason }
    }

    /// Something that is not understood and may concern memory.
    fn bad(&mut self, error: ParseError) -> Result<(), ParseError> {
        if !self.lenient {
            return Err(error);
        }
        self.part.recording.skipped.add(error);
        Ok(())
    }

    /// A line that is not strace's, or the rest of a call.
    fn text(&mut self, line: &[u8], rest: &[u8]) -> Result<(), ParseError> {
        if let Some(mut open) = self.open.take() {
            let rest = [&b")"[..], b",", b"<detached ...>", b"<unfinished ...>"];
            if open.interrupted || rest.iter().any(|rest| line.trim_ascii_start().starts_with(rest))
            {
                let mut text = std::mem::take(&mut open.call.text);
                text.extend_from_slice(line);
                return self.go_on(open.pid, open.call, text);
            }
            self.open = Some(open);
        }
        if self.table {
            self.note(NoteKind::Summary);
            return Ok(());
        }
        let near = mentions(rest) || matches!(body(rest), Body::Call { .. });
        if self.part.known && (near || (self.plain && self.open.is_none())) {
            let reason = if near {
                "it looks like a call, and is not as strace writes it"
            } else {
                "it is no line of strace's"
            };
            return self.bad(self.wrong(reason.into()));
        }
        if near {
            self.part
                .near
                .add(self.wrong("it looks like a call, and is not as strace writes it".into()));
        }
        self.note(NoteKind::Text);
        if self.part.recording.listed.len() < LISTED {
            let start = line.get(..160).unwrap_or(line);
            let text = String::from_utf8_lossy(start).into_owned();
            self.part.recording.listed.push(Note {
                file: self.file.clone(),
                line: self.line,
                text,
            });
        }
        Ok(())
    }

    fn message(&mut self, text: &[u8]) {
        self.note(NoteKind::Message);
        let mut words =
            text.split(u8::is_ascii_whitespace).skip_while(|word| *word != b"Process").skip(1);
        let mut next = || std::str::from_utf8(words.next()?).ok();
        let pid = next().and_then(|pid| pid.parse::<u32>().ok());
        match (pid, next(), next(), next().and_then(|threads| threads.parse::<u32>().ok())) {
            (Some(pid), Some("attached"), Some("with"), Some(threads)) => {
                self.tasks.attached(pid, threads)
            }
            (Some(pid), Some("attached"), ..) => self.tasks.attached(pid, 1),
            (Some(pid), Some("detached"), ..) => self.tasks.gone(pid),
            _ => {}
        }
    }

    /// A line that begins a call.
    fn call(&mut self, pid: u32, at_ns: u64, name: &[u8], text: &[u8]) -> Result<(), ParseError> {
        if !concerns(name) && (text.ends_with(b" <unfinished ...>") || ends(text)) {
            if !text.ends_with(b" <unfinished ...>") {
                self.count(name);
            }
            return Ok(());
        }
        if let (Some(parts), Ok(name)) = (parts(text), std::str::from_utf8(name)) {
            return self.finish(pid, name, at_ns, self.part.recording.calls.len(), &parts);
        }
        self.go_on(pid, self.begin(name, at_ns), text.to_vec())
    }

    fn begin(&self, name: &[u8], at_ns: u64) -> Begun {
        let name = String::from_utf8_lossy(name).into_owned();
        let before = self.part.recording.calls.len();
        Begun { name, text: Vec::new(), at_ns, line: self.line, before, pieces: 0, moved: false }
    }

    /// A call of which there is as much as this.
    fn go_on(&mut self, pid: u32, mut call: Begun, mut text: Vec<u8>) -> Result<(), ParseError> {
        let memory = concerns(call.name.as_bytes());
        call.pieces += 1;
        if call.pieces > PIECES || (call.pieces > 1 && text.len() > LONGEST) {
            if memory {
                let error =
                    self.wrong(format!("{} is broken into too many or too long pieces", call.name));
                return self.bad(ParseError { line: call.line, ..error });
            }
            self.note(NoteKind::Text);
            return Ok(());
        }
        let (end, len) = ending(&text);
        text.truncate(len);
        match end {
            Ending::Unfinished | Ending::PidChanged(_) => {
                if memory {
                    call.text = text;
                    let to = if let Ending::PidChanged(to) = end { to } else { pid };
                    call.moved = to != pid;
                    if self.begun.insert(to, call).is_some() {
                        self.part.recording.unfinished += 1;
                    }
                }
            }
            Ending::Left => {
                if memory {
                    self.part.recording.unfinished += 1;
                } else {
                    self.count(call.name.as_bytes());
                }
            }
            Ending::None if memory && let Some(parts) = parts(&text) => {
                return self.finish(pid, &call.name, call.at_ns, call.before, &parts);
            }
            Ending::None if !memory && ends(&text) => self.count(call.name.as_bytes()),
            Ending::None => {
                let at = message(&text);
                if let Some(at) = at {
                    self.message(&text[at..]);
                    text.truncate(at);
                }
                self.open =
                    Some(Open { pid, interrupted: at.is_some(), call: Begun { text, ..call } });
            }
        }
        Ok(())
    }

    fn resumed(
        &mut self,
        pid: u32,
        at_ns: u64,
        name: &[u8],
        text: &[u8],
    ) -> Result<(), ParseError> {
        if !concerns(name) {
            self.count(name);
            return Ok(());
        }
        let call = match self.begun.remove(&pid) {
            Some(call) if call.name.as_bytes() == name => call,
            other => {
                if let Some(call) = other {
                    let reason = format!(
                        "another call is resumed than {}, begun in line {}",
                        call.name, call.line
                    );
                    self.bad(self.wrong(reason))?;
                }
                // Its beginning was not recorded.
                let call = self.begin(name, at_ns);
                return self.without_beginning(pid, &call, text);
            }
        };
        let whole = [call.text.as_slice(), text].concat();
        self.go_on(pid, call, whole)
    }

    /// Some calls say enough by their result.
    fn without_beginning(&mut self, pid: u32, call: &Begun, text: &[u8]) -> Result<(), ParseError> {
        let enough = match call.name.as_str() {
            "brk" | "execve" | "execveat" | "exit_group" | "exit" | "fork" | "vfork" => true,
            "clone" | "clone3" => text.windows(6).any(|part| part == b"flags="),
            _ => false,
        };
        match parts(text).filter(|_| enough) {
            Some(parts) => self.finish(pid, &call.name, call.at_ns, call.before, &parts),
            None => {
                self.part.recording.incomplete += 1;
                Ok(())
            }
        }
    }

    /// A whole call.
    fn finish(
        &mut self,
        pid: u32,
        name: &str,
        at_ns: u64,
        before: usize,
        parts: &Parts<'_>,
    ) -> Result<(), ParseError> {
        let op = match meaning(name, parts, &mut self.part.segments) {
            Ok(Meaning::Op(op)) => op,
            Ok(Meaning::Idle(kind)) => {
                *self.part.recording.idle.entry(kind).or_default() += 1;
                return Ok(());
            }
            Err(reason) => return self.bad(self.wrong(format!("{name}: {reason}"))),
        };
        let done = Call { pid, at_ns, line: self.line, op };
        match done.op {
            // A new task may run before its parent's line says so.
            Op::Clone { child, .. } => {
                self.tasks.born(child);
                if before < self.part.recording.calls.len() {
                    self.early.push((before, done));
                    return Ok(());
                }
            }
            Op::Ended => self.count(b"exit"),
            _ => {}
        }
        self.part.recording.calls.push(done);
        Ok(())
    }

    fn end(&mut self, pid: u32, at_ns: u64, end: End) {
        match end {
            End::Exited | End::Killed => {
                match self.begun.remove(&pid) {
                    // A task that is killed in `exit_group` has exited all the same.
                    Some(call) if call.name == "exit_group" => self.push(pid, call.at_ns, Op::Exit),
                    Some(_) => self.part.recording.unfinished += 1,
                    None => {}
                }
                self.push(pid, at_ns, if end == End::Killed { Op::Killed } else { Op::Ended });
                self.tasks.gone(pid);
            }
            // The thread that called `execve` goes on under the number of its process. Which of the
            // two numbers is whose depends on the version of strace.
            End::Superseded(by) => {
                let executes =
                    |call: Option<&Begun>| call.is_some_and(|call| call.name.starts_with("execve"));
                let (from, to) = if executes(self.begun.get(&pid)) { (pid, by) } else { (by, pid) };
                if self.begun.get(&from).is_some_and(|call| executes(Some(call)) && !call.moved)
                    && let Some(call) = self.begun.remove(&from)
                    && self.begun.insert(to, call).is_some()
                {
                    self.part.recording.unfinished += 1;
                }
                self.tasks.gone(by);
            }
            End::Other => {}
        }
    }

    /// A call was left open, and another line begins.
    fn cut_off(&mut self) -> Result<(), ParseError> {
        let Some(Open { call, .. }) = self.open.take() else { return Ok(()) };
        if concerns(call.name.as_bytes()) {
            let error = self.wrong(format!("{} has no result", call.name));
            return self.bad(ParseError { line: call.line, ..error });
        }
        self.note(NoteKind::Text);
        Ok(())
    }

    fn count(&mut self, name: &[u8]) {
        match self.other.get_mut(name) {
            Some(count) => *count += 1,
            None => drop(self.other.insert(name.into(), 1)),
        }
    }

    /// The end of the file.
    pub(super) fn finish_file(mut self) -> Result<Part, ParseError> {
        if let Some(Open { call, .. }) = self.open.take() {
            // The recording ends in the middle of a line.
            self.part.recording.unfinished += usize::from(concerns(call.name.as_bytes()));
        }
        let mut begun: Vec<(u32, Begun)> = self.begun.drain().collect();
        begun.sort_unstable_by_key(|(_, call)| call.line);
        for (pid, call) in begun {
            if call.name == "exit_group" {
                self.part.recording.calls.push(Call {
                    pid,
                    at_ns: call.at_ns,
                    line: call.line,
                    op: Op::Exit,
                });
            } else {
                self.part.recording.unfinished += 1;
            }
        }
        let recording = &mut self.part.recording;
        put_early(&mut recording.calls, self.early);
        if let Some((made_up, found)) = self.tasks.renamed() {
            recording
                .calls
                .iter_mut()
                .filter(|call| call.pid == made_up)
                .for_each(|call| call.pid = found);
        }
        recording.other = self
            .other
            .into_iter()
            .map(|(name, n)| (String::from_utf8_lossy(&name).into_owned(), n))
            .collect();
        self.part.origin = self.clock.origin();
        Ok(self.part)
    }
}
