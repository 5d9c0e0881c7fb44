//! Drivers of a session: they move messages between it and its sockets.
#![forbid(unsafe_code)]

mod lines;
mod socket;
mod thread;
#[cfg(feature = "tokio")]
mod with_tokio;

pub use thread::serve;
#[cfg(feature = "tokio")]
pub use with_tokio::serve as serve_tokio;

use crate::message::ProtocolError;
use std::io;

/// Why a session has ended, other than by the front-end's wish.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A socket failed.
    #[error("the front-end's socket: {0}")]
    Io(io::Error),
    /// The front-end has sent what the protocol does not allow.
    #[error("the front-end: {0}")]
    Protocol(ProtocolError),
}

impl From<io::Error> for ServeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<ProtocolError> for ServeError {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}
