//! Recordings: what `strace` wrote about a program's memory.
//!
//! [`open`] reads files, directories, patterns or standard input, and returns the calls that
//! concern memory, in the order in which they take effect.

mod call;
mod calls;
mod error;
mod input;
mod line;
mod order;
mod prefix;
mod reader;
mod scan;
mod tasks;

#[cfg(test)]
pub use call::Advised;
pub use call::{Advice, Call, Op, Prot, Remap};
pub use error::{Error, Note, NoteKind, Skipped};

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::PathBuf;

/// What has been read.
#[derive(Debug, Default)]
pub struct Recording {
    /// Lines read. Empty ones do not count.
    pub lines: usize,
    /// The calls that concern memory, in the order in which they take effect. Calls that failed or
    /// have no effect are only counted.
    pub calls: Vec<Call>,
    /// Lines that are not understood and may concern memory (`--lenient`).
    pub skipped: Skipped,
    /// Lines that are no calls: signals, exits, messages, stacks, output of the program.
    pub notes: usize,
    /// Calls that concern memory and whose end was not recorded. They have no effect.
    pub unfinished: usize,
    /// Calls that concern memory and whose beginning was not recorded, where the result does not
    /// say enough. They have no effect.
    pub incomplete: usize,
    /// Other system calls, by name.
    pub other: BTreeMap<String, usize>,
    /// Notes, by kind.
    pub noted: BTreeMap<NoteKind, usize>,
    /// The first notes that are not strace's own, to be listed on request.
    pub listed: Vec<Note>,
    /// Calls that concern memory and changed nothing: `failed` and `no_effect`.
    pub idle: BTreeMap<&'static str, usize>,
}

impl Recording {
    /// The calls that concern memory, counted by kind, failed ones among them.
    pub fn operations(&self) -> BTreeMap<String, usize> {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for kind in self.calls.iter().filter_map(|call| call.op.kind()) {
            match counts.get_mut(kind) {
                Some(count) => *count += 1,
                None => drop(counts.insert(kind.into(), 1)),
            }
        }
        for (kind, count) in &self.idle {
            *counts.entry((*kind).to_owned()).or_default() += count;
        }
        counts
    }

    /// What was not read as a call that concerns memory: all of it, or in short.
    pub fn remarks(&self, all: bool) -> Vec<String> {
        const SHORT: usize = 10;
        let some = if all { usize::MAX } else { SHORT };
        let mut remarks: Vec<String> = self
            .skipped
            .listed()
            .iter()
            .take(some)
            .map(|error| format!("skipped {error}"))
            .collect();
        let more = self.skipped.len() - remarks.len();
        if more > 0 {
            let how = if all { "" } else { "; -v lists the first of them" };
            remarks.push(format!("skipped {more} more lines{how}"));
        }
        if all {
            remarks.extend(self.listed.iter().map(|note| format!("note {note}")));
            remarks
                .extend(self.noted.iter().map(|(kind, count)| format!("{count} {}", kind.name())));
            remarks
                .extend(self.other.iter().map(|(name, count)| format!("{count} calls of {name}")));
        }
        remarks
    }
}

const BUILT_IN: &[u8] = include_bytes!("../workloads/numpy-training.strace");

/// Reads what `paths` name (files, directories, patterns, `-` for standard input) as one recording,
/// and says how it is called. Without paths it is the recording that is built in.
///
/// With `lenient`, lines that are not understood are counted and kept in
/// [`skipped`](Recording::skipped); otherwise the first of them is an error.
pub fn open(paths: &[PathBuf], lenient: bool) -> Result<(String, Recording), Error> {
    if !paths.is_empty() {
        return input::read_all(paths, lenient);
    }
    let name = "numpy-training.strace (built in)";
    parse(name, BUILT_IN, lenient).map(|recording| (name.into(), recording))
}

/// Reads a recording from anywhere, line by line.
pub fn parse(name: &str, text: impl BufRead, lenient: bool) -> Result<Recording, Error> {
    let part = input::read(text, reader::Reader::new(None, None, u32::MAX, lenient));
    let part = part.map_err(|error| Error::Unreadable { path: name.into(), error })?;
    let part = part.map_err(|error| Error::Line { name: name.into(), error })?;
    input::together(name, vec![part])
}
