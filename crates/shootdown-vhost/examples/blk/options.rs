//! The command line.
#![forbid(unsafe_code)]

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

/// A vhost-user block device for guests with an IOMMU: its data path is io_uring straight into the
/// guest's memory.
#[derive(Debug, Parser)]
#[command(name = "blk", version)]
pub struct Options {
    /// Listens on this socket; an existing one is replaced. Once for each device
    #[arg(long = "socket", value_name = "PATH", required = true)]
    pub sockets: Vec<PathBuf>,
    /// A disk's content: a file or a block device. The first is that of the first socket, and so on
    #[arg(long = "file", value_name = "PATH", required = true)]
    pub files: Vec<PathBuf>,
    /// Queues of each device
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: u16,
    /// Each read and write is in flight for so many milliseconds before its data is touched
    #[arg(long, value_name = "MS", default_value_t = 0)]
    latency_ms: u64,
    /// Makes a mistake on purpose, to see what a guest makes of it
    #[arg(long, value_name = "FAULT")]
    pub fault: Option<Fault>,
    /// All devices share one IOMMU domain: an INVALIDATE of one is one of all
    #[arg(long)]
    pub domain: bool,
    /// Writes figures of all devices here, as JSON: when a front-end goes, and at the end
    #[arg(long, value_name = "PATH")]
    pub stats: Option<PathBuf>,
    /// Opens the files with O_DIRECT. The guest's buffers have to be aligned as each of them needs
    /// it
    #[arg(long)]
    pub direct: bool,
    /// The guest may not write
    #[arg(long)]
    pub read_only: bool,
    /// Each device ends when its first front-end has gone, and the program with the last of them
    #[arg(long)]
    pub once: bool,
    /// What moves the messages of a session
    #[arg(long, value_name = "DRIVER", default_value = "thread")]
    pub driver: Driver,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// Answers INVALIDATE and GET_VRING_BASE at once, whatever is in flight
    AnswerEarly,
    /// Tells the guest that a request is done before its data has been touched
    EarlyUsed,
    /// Forgets no translation, whatever the front-end says
    KeepTranslations,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    /// A plain thread
    Thread,
    /// A task of tokio
    #[cfg(feature = "tokio")]
    Tokio,
}

impl Options {
    /// Those of this process. Ends it if they are wrong.
    pub fn read() -> Self {
        let options = Self::parse();
        let (sockets, files) = (options.sockets.len(), options.files.len());
        if sockets != files {
            let say = format!(
                "each --socket needs its --file: there are {sockets} sockets and {files} files"
            );
            Self::command().error(ErrorKind::WrongNumberOfValues, say).exit();
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = options.sockets.iter().find(|socket| !seen.insert(*socket)) {
            let say = format!("two devices cannot listen on the same --socket {}", twice.display());
            Self::command().error(ErrorKind::ValueValidation, say).exit();
        }
        options
    }

    pub fn latency(&self) -> Duration {
        Duration::from_millis(self.latency_ms)
    }

    /// The mistake of the session, if it is one of those.
    pub fn session_fault(&self) -> Option<shootdown_vhost::Fault> {
        match self.fault? {
            Fault::AnswerEarly => Some(shootdown_vhost::Fault::AnswerEarly),
            Fault::KeepTranslations => Some(shootdown_vhost::Fault::KeepTranslations),
            Fault::EarlyUsed => None,
        }
    }
}
