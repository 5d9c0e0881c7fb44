//! Messages on a socket that does not block.
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

/// As many descriptors come with a message at most.
const DESCRIPTORS: usize = 8;

/// What has been received of the next message.
#[derive(Default)]
pub(super) struct Receiver {
    header: Vec<u8>,
    /// Once the header is complete; with the length of its payload.
    message: Option<(Message, usize)>,
    fds: Vec<OwnedFd>,
}

/// What a look at a socket has come to.
pub(super) enum Received {
    Message(Message),
    /// The peer has closed it.
    End,
}

impl Receiver {
    /// The next message. `WouldBlock` when there is none yet.
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

/// What is still to be sent.
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

    /// How many bytes the peer has not taken.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Sends as much as the socket takes. `WouldBlock` when some is left.
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
