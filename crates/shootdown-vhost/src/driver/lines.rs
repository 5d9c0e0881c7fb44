//! The two sockets of a session, as far as they go without waiting.
#![forbid(unsafe_code)]

use super::ServeError;
use super::socket::{Received, Receiver, Sender};
use crate::device::Device;
use crate::message::Channel;
use crate::session::{Output, Session};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};

/// One of the two sockets.
pub(super) struct Line {
    pub(super) socket: Arc<OwnedFd>,
    channel: Channel,
    receiver: Receiver,
    sender: Sender,
    /// The front-end has closed it.
    gone: bool,
}

impl Line {
    fn new(socket: OwnedFd, channel: Channel) -> Self {
        Self { socket: Arc::new(socket), channel, receiver: Receiver::default(), sender: Sender::default(), gone: false }
    }

    /// A front-end that is gone is no error, whichever socket says so first.
    fn fail(&mut self, error: ServeError) -> Result<(), ServeError> {
        let gone = |error: &io::Error| matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe);
        self.gone = matches!(&error, ServeError::Io(error) if gone(error));
        if self.gone { Ok(()) } else { Err(error) }
    }

    /// Whether something is left to be sent.
    pub(super) fn is_full(&self) -> bool {
        !self.sender.is_empty()
    }
}

pub(super) struct Lines(Vec<Line>);

/// How far it went.
#[derive(PartialEq)]
pub(super) enum Step {
    /// Nothing is left to do until a socket is ready or the session wakes.
    Idle,
    /// The front-end has gone.
    Ended,
}

impl Lines {
    pub(super) fn new(frontend: OwnedFd) -> Self {
        Self(vec![Line::new(frontend, Channel::Frontend)])
    }

    /// When nobody is listened to any more.
    pub(super) fn none() -> Self {
        Self(Vec::new())
    }

    pub(super) fn all(&self) -> &[Line] {
        &self.0
    }

    /// Moves all messages that can be moved. After each that is received the session's output comes
    /// first.
    pub(super) fn step<D: Device>(&mut self, session: &mut Session<D>, cx: &mut Context<'_>) -> Result<Step, ServeError> {
        let mut at = 0;
        loop {
            while let Poll::Ready(output) = session.poll_output(cx) {
                self.take(output);
            }
            for line in &mut self.0 {
                match line.sender.send(line.socket.as_fd()) {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => line.fail(error.into())?,
                    _ => {}
                }
            }
            if self.0.iter().any(|line| line.gone && line.channel == Channel::Frontend) {
                return Ok(Step::Ended);
            }
            // Whoever waits for a translation learns when the front-end goes, too.
            self.0.retain(|line| !line.gone);
            let Some(line) = self.0.get_mut(at) else { return Ok(Step::Idle) };
            match line.receiver.receive(line.socket.as_fd()) {
                Ok(Received::Message(message)) => {
                    session.receive(line.channel, message)?;
                    at = 0;
                }
                Ok(Received::End) => line.gone = true,
                Err(ServeError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => at += 1,
                Err(error) => line.fail(error)?,
            }
        }
    }

    fn take(&mut self, output: Output) {
        match output {
            Output::Open(socket) => {
                self.0.retain(|line| line.channel == Channel::Frontend);
                self.0.push(Line::new(socket, Channel::Backend));
            }
            Output::Send(channel, message) => {
                if let Some(line) = self.0.iter_mut().find(|line| line.channel == channel) {
                    line.sender.put(message);
                }
            }
        }
    }
}
