//! Processes that are killed with this one.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// How long a process may take to be ready.
const READY: Duration = Duration::from_secs(20);

/// What mirrors have read, all their lives together.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reads {
    pub(crate) accepted: u64,
    pub(crate) stale: u64,
}

impl std::ops::AddAssign for Reads {
    fn add_assign(&mut self, other: Self) {
        self.accepted += other.accepted;
        self.stale += other.stale;
    }
}

/// In a process that was begun here: it is killed when whoever has begun it ends, however that
/// ends, and also while it is stopped.
pub(crate) fn end_with_parent() -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Whoever has ended before that has closed this.
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
    Ok(())
}

pub(crate) struct Process {
    child: Child,
    lines: Receiver<String>,
    reads: Reads,
}

impl Process {
    /// This program in another role.
    pub(crate) fn begin(arguments: &[String]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child =
            command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("its output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines, reads: Reads::default() })
    }

    /// A mirror of that number.
    pub(crate) fn mirror(
        number: u64,
        owner: impl ToString,
        folder: &Path,
        more: &[&str],
    ) -> Result<Self> {
        let mut arguments = vec!["mirror".to_owned(), "--number".to_owned(), number.to_string()];
        arguments.extend([
            "--owner".to_owned(),
            owner.to_string(),
            "--folder".to_owned(),
            folder.display().to_string(),
        ]);
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        Self::begin(&arguments)
    }

    /// Waits for the line that says what follows that word.
    pub(crate) fn says(&mut self, word: &str) -> Result<String> {
        let end = Instant::now() + READY;
        while let Ok(line) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now()))
        {
            if let Some(rest) = line.strip_prefix(word) {
                return Ok(rest.trim().to_owned());
            }
            self.note(&line);
        }
        bail!("a process did not say {word:?} in time")
    }

    fn note(&mut self, line: &str) {
        let numbers = line.strip_prefix("reads ").and_then(|rest| rest.split_once(' '));
        if let Some((accepted, stale)) = numbers {
            self.reads = Reads {
                accepted: accepted.parse().unwrap_or(0),
                stale: stale.parse().unwrap_or(0),
            };
        }
    }

    /// What it has read, as far as it has said.
    pub(crate) fn reads(&mut self) -> Reads {
        while let Ok(line) = self.lines.try_recv() {
            self.note(&line);
        }
        self.reads
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// Kills it. Returns what it has read.
    pub(crate) fn kill(mut self) -> Reads {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.reads()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
