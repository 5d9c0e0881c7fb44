//! Messages on a non-blocking socket.
#![forbid(unsafe_code)]

use super::ServeError;
use crate::message::{HEADER, Message, ProtocolError};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Maximum number of descriptors of a message.
const DESCRIPTORS: usize = 8;

/// The received part of the next message.
#[derive(Default)]
pub(super) struct Receiver {
    header: Vec<u8>,
    /// The message and the length of its payload, once the header is complete.
    message: Option<(Message, usize)>,
    fds: Vec<OwnedFd>,
}

/// Result of a receive.
pub(super) enum Received {
    Message(Message),
    /// The peer has closed the socket.
    End,
}

impl Receiver {
    /// Receives the next message. Returns `WouldBlock` if it is not complete yet.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<Received, ServeError> {
        loop {
            if self.message.is_none() && self.header.len() == HEADER {
                let mut header = [0; HEADER];
                header.copy_from_slice(&self.header);
                self.message = Some(Message::of_header(header)?);
            }
            let missing = match &self.message {
                None => HEADER - self.header.len(),
                Some((message, len)) => len - message.payload.len(),
            };
            if missing == 0
                && let Some((mut message, _)) = self.message.take()
            {
                self.header.clear();
                message.fds = std::mem::take(&mut self.fds);
                return Ok(Received::Message(message));
            }
            let mut bytes = vec![0; missing];
            let read = self.some(socket, &mut bytes)?;
            if read == 0 {
                return Ok(Received::End);
            }
            let into =
                self.message.as_mut().map_or(&mut self.header, |(message, _)| &mut message.payload);
            into.extend_from_slice(&bytes[..read]);
        }
    }

    fn some(&mut self, socket: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<usize, ServeError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut ancillary, flags)
            .map_err(io::Error::from)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > DESCRIPTORS {
            let (request, found) = (0, self.fds.len());
            return Err(ProtocolError::Descriptors { request, found, expected: DESCRIPTORS }.into());
        }
        Ok(received.bytes)
    }
}

/// Bytes and descriptors that wait to be sent.
#[derive(Default)]
pub(super) struct Sender {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Sender {
    pub(super) fn put(&mut self, message: Message) {
        self.bytes.extend_from_slice(&message.bytes());
        self.fds.extend(message.fds);
    }

    /// Returns the number of bytes that the peer has not taken.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Sends as much as the socket takes. Returns `WouldBlock` if some is left.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while !self.bytes.is_empty() {
            let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a message has at most 8 descriptors",
                ));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let sent = sendmsg(socket, &[IoSlice::new(&self.bytes)], &mut ancillary, flags)?;
            self.fds.clear();
            self.bytes.drain(..sent);
        }
        Ok(())
    }
}
