//! Drivers of a session. They move messages between the session and its sockets.
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

/// Reason why a session has ended without the front-end's wish.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A socket failed.
    #[error("the front-end's socket: {0}")]
    Io(io::Error),
    /// The front-end has violated the protocol.
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
