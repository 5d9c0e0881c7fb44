//! Where recordings come from: files, directories, patterns, standard input; and how the files of
//! one run become one recording.

use super::Recording;
use super::call::Call;
use super::calls::{Segments, sized};
use super::error::{Error, ParseError};
use super::order::{OfTask, by_birth, by_time};
use super::reader::{Part, Reader};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longer lines are cut off: no call is so long.
const LONGEST_LINE: u64 = 16 << 20;

/// Reads files as one recording.
pub(super) fn read_all(paths: &[PathBuf], lenient: bool) -> Result<(String, Recording), Error> {
    let mut files = Vec::new();
    for path in paths {
        expand(path, &mut files)?;
    }
    let several = files.len() > 1;
    let name = match files.as_slice() {
        [one] => label(one),
        [first, ..] => format!("{} and {} more files", label(first), files.len() - 1),
        [] => String::new(),
    };
    let mut parts = Vec::with_capacity(files.len());
    for (file, made_up) in files.iter().zip((0..=u32::MAX).rev()) {
        let unreadable = |error| Error::Unreadable { path: file.clone(), error };
        let source: Box<dyn Read> = if is_stdin(file) {
            Box::new(io::stdin().lock())
        } else {
            Box::new(File::open(file).map_err(unreadable)?)
        };
        let shown = several.then(|| Arc::from(label(file)));
        // `-ff` writes a file for each task, with its number at the end of the name.
        let reader = Reader::new(shown, task_of(file), made_up, lenient);
        let read = read(BufReader::with_capacity(1 << 16, source), reader).map_err(unreadable)?;
        parts.push(read.map_err(|error| Error::Line { name: name.clone(), error })?);
    }
    together(&name, parts).map(|recording| (name, recording))
}

/// Reads one source, line by line.
pub(super) fn read(
    mut from: impl BufRead,
    mut reader: Reader,
) -> io::Result<Result<Part, ParseError>> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut from).take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(reader.finish_file());
        }
        if line.last() != Some(&b'\n') {
            from.skip_until(b'\n')?;
        }
        if let Err(error) = reader.read(&line) {
            return Ok(Err(error));
        }
    }
}

/// One recording of the files of one run.
pub(super) fn together(name: &str, parts: Vec<Part>) -> Result<Recording, Error> {
    let name = || name.to_owned();
    if !parts.iter().any(|part| part.known) {
        let near = parts.iter().find_map(|part| part.near.listed().first());
        let text = parts.iter().any(|part| !part.recording.listed.is_empty());
        return Err(match near {
            Some(near) => Error::NotStrace { name: name(), near: Some(near.line) },
            None if parts.iter().any(|part| part.counts) => Error::OnlyCounts { name: name() },
            None if text => Error::NotStrace { name: name(), near: None },
            None => Error::Empty { name: name() },
        });
    }
    let mut all = Recording::default();
    let origins: Vec<Option<u64>> = parts.iter().map(|part| part.origin).collect();
    let (mut calls, mut segments) = (Vec::<OfTask>::with_capacity(parts.len()), Segments::new());
    for part in parts {
        calls.push((part.of, all.add(part.recording)));
        // Another file is strace's: this one is of the same run.
        part.near
            .allowed(part.lenient, &mut all.skipped)
            .map_err(|error| Error::Line { name: name(), error })?;
        for (segment, size) in part.segments {
            let known = segments.entry(segment).or_default();
            *known = size.max(*known);
        }
    }
    all.calls = match calls.len() {
        1 => calls.pop().map(|(_, calls)| calls).unwrap_or_default(),
        _ => match origins.iter().copied().collect::<Option<Vec<u64>>>() {
            Some(origins) => by_time(&origins, calls),
            None => by_birth(calls),
        },
    };
    sized(&mut all.calls, &segments);
    Ok(all)
}

impl Recording {
    /// Adds what another file has, but for its calls, which are returned.
    fn add(&mut self, other: Self) -> Vec<Call> {
        self.lines += other.lines;
        self.notes += other.notes;
        self.unfinished += other.unfinished;
        self.incomplete += other.incomplete;
        // None of them is an error: they have been skipped.
        let _: Result<(), ParseError> = other.skipped.allowed(true, &mut self.skipped);
        self.listed.extend(other.listed);
        for (name, count) in other.other {
            *self.other.entry(name).or_default() += count;
        }
        for (kind, count) in other.noted {
            *self.noted.entry(kind).or_default() += count;
        }
        for (kind, count) in other.idle {
            *self.idle.entry(kind).or_default() += count;
        }
        other.calls
    }
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn label(path: &Path) -> String {
    if is_stdin(path) {
        "standard input".into()
    } else {
        path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
    }
}

/// The number at the end of `trace.19223`.
fn task_of(path: &Path) -> Option<u32> {
    path.extension()?.to_str()?.parse().ok()
}

/// What a path names: itself, the files of a directory, or those that a pattern fits.
fn expand(path: &Path, files: &mut Vec<PathBuf>) -> Result<(), Error> {
    let unreadable = |error| Error::Unreadable { path: path.to_owned(), error };
    let mut found = if is_stdin(path) || path.is_file() {
        vec![path.to_owned()]
    } else if path.is_dir() {
        let entries = std::fs::read_dir(path)
            .map_err(unreadable)?
            .collect::<io::Result<Vec<_>>>()
            .map_err(unreadable)?;
        let hidden = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
        };
        entries
            .into_iter()
            .map(|entry| entry.path())
            .filter(|path| path.is_file() && !hidden(path))
            .collect()
    } else {
        let fits = path
            .to_str()
            .filter(|text| text.contains(['*', '?', '[']))
            .and_then(|text| glob::glob(text).ok());
        match fits {
            Some(fits) => fits.filter_map(Result::ok).filter(|path| path.is_file()).collect(),
            // It is not there, or it is a pipe.
            None => vec![path.to_owned()],
        }
    };
    if found.is_empty() {
        return Err(Error::NothingThere { path: path.to_owned() });
    }
    found.sort_by_cached_key(|path| (path.with_extension(""), task_of(path), path.clone()));
    files.extend(found);
    Ok(())
}
