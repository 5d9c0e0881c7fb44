//! The two sockets of a session, without any wait.
#![forbid(unsafe_code)]

use super::ServeError;
use super::socket::{Received, Receiver, Sender};
use crate::device::Device;
use crate::message::{Channel, Message};
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
    muted: bool,
}

impl Line {
    fn new(socket: OwnedFd, channel: Channel) -> Self {
        Self {
            socket: Arc::new(socket),
            channel,
            receiver: Receiver::default(),
            sender: Sender::default(),
            gone: false,
            muted: false,
        }
    }

    /// Records an error. A front-end that has disconnected is none, on whichever socket it shows
    /// first.
    fn fail(&mut self, error: ServeError) -> Result<(), ServeError> {
        let gone = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
        };
        self.gone = matches!(&error, ServeError::Io(error) if gone(error));
        if self.gone { Ok(()) } else { Err(error) }
    }

    /// Returns `true` if messages are received: not while the peer does not take what is sent, and
    /// not while too many answers are due.
    pub(super) fn listens(&self) -> bool {
        self.sender.len() < FULL && !self.muted
    }

    /// Returns `true` if something is left to be sent.
    pub(super) fn is_full(&self) -> bool {
        !self.sender.is_empty()
    }
}

pub(super) struct Lines {
    all: Vec<Line>,
    /// An answer received on the back-end channel and not yet handled.
    answer: Option<Message>,
}

/// Number of messages moved before other tasks run.
const AT_ONCE: usize = 64;
/// Number of unsent bytes above which nothing is received.
const FULL: usize = 1 << 16;
/// Number of due answers above which nothing is received.
const DUE: usize = 1024;

/// Result of a step.
#[derive(PartialEq)]
pub(super) enum Step {
    /// There is no work until a socket is ready or the session wakes.
    Idle,
    /// There may be more work.
    More,
    /// The front-end has disconnected.
    Ended,
}

impl Lines {
    pub(super) fn new(frontend: OwnedFd) -> Self {
        Self { all: vec![Line::new(frontend, Channel::Frontend)], answer: None }
    }

    /// Makes lines without sockets.
    pub(super) fn none() -> Self {
        Self { all: Vec::new(), answer: None }
    }

    pub(super) fn all(&self) -> &[Line] {
        &self.all
    }

    /// Moves the messages that can be moved. After each received message the session's output goes
    /// first.
    pub(super) fn step<D: Device>(
        &mut self,
        session: &mut Session<D>,
        cx: &mut Context<'_>,
    ) -> Result<Step, ServeError> {
        for _ in 0..AT_ONCE {
            let mut closes = false;
            while let Poll::Ready(output) = session.poll_output(cx) {
                if let Output::Close = output {
                    closes = true;
                    break;
                }
                self.take(output);
            }
            for line in &mut self.all {
                match line.sender.send(line.socket.as_fd()) {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                        line.fail(error.into())?
                    }
                    _ => {}
                }
            }
            // Answers what was received first.
            if closes && self.all.iter().any(Line::is_full) {
                return Ok(Step::Idle);
            }
            if closes || self.all.iter().any(|line| line.gone && line.channel == Channel::Frontend)
            {
                return Ok(Step::Ended);
            }
            if self.all.iter().any(|line| line.gone) {
                self.all.retain(|line| !line.gone);
                self.answer = None;
                session.backend_closed();
                continue;
            }
            for line in &mut self.all {
                line.muted = session.due() >= DUE;
            }
            if self.all.iter().any(|line| line.channel == Channel::Frontend && !line.listens()) {
                // Does not receive from the other socket either: earlier messages of the front-end
                // have not been handled.
                return Ok(Step::Idle);
            }
            if let Some(message) = self.receive(Channel::Frontend)? {
                session.receive(Channel::Frontend, message)?;
            } else if let Some(answer) = self.answer.take() {
                session.receive(Channel::Backend, answer)?;
            } else {
                // Messages that the front-end has sent before its answer are handled before it, on
                // the other channel.
                self.answer = self.receive(Channel::Backend)?;
                let ended = self.all.iter().any(|line| line.gone);
                if self.answer.is_none() && !ended {
                    return Ok(Step::Idle);
                }
            }
        }
        Ok(Step::More)
    }

    /// Receives the next message of a channel, if there is one and the peer takes what is sent.
    fn receive(&mut self, channel: Channel) -> Result<Option<Message>, ServeError> {
        let Some(line) = self.all.iter_mut().find(|line| line.channel == channel) else {
            return Ok(None);
        };
        if !line.listens() {
            return Ok(None);
        }
        match line.receiver.receive(line.socket.as_fd()) {
            Ok(Received::Message(message)) => return Ok(Some(message)),
            Ok(Received::End) => line.gone = true,
            Err(ServeError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => line.fail(error)?,
        }
        Ok(None)
    }

    fn take(&mut self, output: Output) {
        match output {
            Output::Open(socket) => {
                self.all.retain(|line| line.channel == Channel::Frontend);
                self.answer = None;
                self.all.push(Line::new(socket, Channel::Backend));
            }
            Output::Send(channel, message) => {
                if let Some(line) = self.all.iter_mut().find(|line| line.channel == channel) {
                    line.sender.put(message);
                }
            }
            Output::Close => {}
        }
    }
}
