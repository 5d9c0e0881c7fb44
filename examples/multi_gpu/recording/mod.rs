//! Recordings: what `strace` wrote about a program's memory.
//!
//! [`open`] reads files, directories, patterns or standard input, and returns the calls that concern
//! memory, in the order in which they take effect.

mod call;
mod error;
mod old;

pub use call::{Advice, Call, MapKind, Op, Prot, Remap};
pub use error::{Error, Note, NoteKind, ParseError};

use std::collections::BTreeMap;
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
    pub skipped: Vec<ParseError>,
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
        counts.extend(self.idle.iter().map(|(kind, count)| ((*kind).to_owned(), *count)));
        counts
    }
}

const BUILT_IN: &str = include_str!("../workloads/numpy.strace");

/// Reads what `paths` name, as one recording, and says how it is called. Without paths it is the
/// recording that is built in.
pub fn open(paths: &[PathBuf], lenient: bool) -> Result<(String, Recording), Error> {
    let (name, text) = match paths {
        [] => ("numpy.strace (built in)".to_owned(), BUILT_IN.to_owned()),
        [path, ..] => {
            let text = std::fs::read_to_string(path).map_err(|error| Error::Unreadable { path: path.clone(), error })?;
            (path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(), text)
        }
    };
    let recording = old::parse(&text, lenient).map_err(|error| Error::Line { name: name.clone(), error })?;
    if recording.calls.is_empty() { Err(Error::Empty { name }) } else { Ok((name, recording)) }
}
