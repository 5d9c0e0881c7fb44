//! What can be wrong with a recording, and what in it is no call.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Why there is no recording. `Display` says what to do.
#[derive(Debug)]
pub enum Error {
    /// It cannot be read.
    Unreadable { path: PathBuf, error: io::Error },
    /// A directory without files, or a pattern that fits no file.
    NothingThere { path: PathBuf },
    /// No system call is in it.
    Empty { name: String },
    /// No line is strace's.
    NotStrace { name: String, near: Option<usize> },
    /// It is the table of `strace -c`.
    OnlyCounts { name: String },
    /// A line is not understood and may concern memory.
    Line { name: String, error: ParseError },
}

const HOW: &str = "Record it with: strace -f -ttt -e trace=%memory,clone,clone3,fork,vfork,execve,exit_group -o FILE PROGRAM";

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { path, error } => {
                write!(f, "the workload {} cannot be read: {error}", path.display())
            }
            Self::NothingThere { path } => {
                write!(f, "the workload {} cannot be read: there is no file", path.display())
            }
            Self::Empty { name } => write!(f, "{name} holds no system call\n  {HOW}"),
            Self::NotStrace { name, near } => {
                write!(f, "{name} is not strace's: it holds no system call as strace writes it")?;
                if let Some(line) = near {
                    write!(f, " (line {line} comes near)")?;
                }
                write!(f, "\n  {HOW}")
            }
            Self::OnlyCounts { name } => {
                write!(
                    f,
                    "{name} has only counts of system calls (strace -c), not the calls\n  {HOW}"
                )
            }
            Self::Line { name, error } => {
                write!(f, "{name}, {error}\n  To count such lines and go on, add --lenient. {HOW}")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unreadable { error, .. } => Some(error),
            Self::Line { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// A line that is not understood and may concern memory.
#[derive(Clone, Debug, PartialEq)]
pub struct ParseError {
    /// Where there are several files: which.
    pub file: Option<Arc<str>>,
    pub line: usize,
    pub reason: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        at(f, self.file.as_deref(), self.line)?;
        f.write_str(&self.reason)
    }
}

/// Lines that are not understood and may concern memory: their number, and the first of them.
#[derive(Debug, Default)]
pub struct Skipped {
    count: usize,
    listed: Vec<ParseError>,
}

impl Skipped {
    const LISTED: usize = 1000;

    pub(super) fn add(&mut self, error: ParseError) {
        self.count += 1;
        if self.listed.len() < Self::LISTED {
            self.listed.push(error);
        }
    }

    /// Adds them to those that are skipped; or the first is an error.
    pub(super) fn allowed(self, lenient: bool, skipped: &mut Self) -> Result<(), ParseError> {
        if self.is_empty() {
            return Ok(());
        }
        let unlisted = self.count - self.listed.len();
        for error in self.listed {
            if !lenient {
                return Err(error);
            }
            skipped.add(error);
        }
        skipped.count += unlisted;
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The first of them.
    pub fn listed(&self) -> &[ParseError] {
        &self.listed
    }
}

fn at(f: &mut fmt::Formatter<'_>, file: Option<&str>, line: usize) -> fmt::Result {
    if let Some(file) = file {
        write!(f, "{file}, ")?;
    }
    write!(f, "line {line}: ")
}

impl std::error::Error for ParseError {}

/// A line that is no call.
#[derive(Clone, Debug, PartialEq)]
pub struct Note {
    pub file: Option<Arc<str>>,
    pub line: usize,
    /// Its beginning.
    pub text: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        at(f, self.file.as_deref(), self.line)?;
        f.write_str(&self.text)
    }
}

/// What a line that is no call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NoteKind {
    /// `--- SIGCHLD … ---`
    Signal,
    /// `+++ exited with 0 +++`
    End,
    /// `strace: Process 7 attached`
    Message,
    /// ` > libc.so.6(mmap+0x17) [0x10ab]`
    Stack,
    /// The table of `strace -C`.
    Summary,
    /// Not strace's: a prompt, output of the program.
    Text,
}

impl NoteKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Signal => "signals",
            Self::End => "ends of tasks",
            Self::Message => "messages of strace",
            Self::Stack => "lines of stacks",
            Self::Summary => "lines of a table",
            Self::Text => "lines that are not strace's",
        }
    }
}
