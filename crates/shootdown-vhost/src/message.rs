//! Messages of the two channels as bytes and descriptors. Types of `vhost` are used where they fit;
//! it has none for IOTLB messages on a socket.
#![forbid(unsafe_code)]

use std::fmt;
use std::os::fd::OwnedFd;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::{VhostAccess, VhostIotlbMsg, VhostIotlbType};
use vm_memory::{ByteValued, Permissions};

/// Length of a header in bytes.
pub const HEADER: usize = 12;
/// Longest accepted payload in bytes.
pub const LONGEST: usize = 4096;
/// Length of an IOTLB message in bytes.
const IOTLB: usize = 32;

/// The socket that a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// The front-end asks, and the back-end answers.
    Frontend,
    /// The back-end asks (SET_BACKEND_REQ_FD), and the front-end answers.
    Backend,
}

/// A message with its descriptors.
pub struct Message {
    /// Type of the message, as a number of its channel.
    pub request: u32,
    /// Protocol version, and whether the message is an answer or needs one.
    pub flags: u32,
    /// Bytes after the header.
    pub payload: Vec<u8>,
    /// Descriptors received with the message, or to be sent with it.
    pub fds: Vec<OwnedFd>,
}

/// A violation of the protocol by the peer. Close the connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// The version is not 1.
    #[error("a message of version {0} of the protocol; this is version 1")]
    Version(u32),
    /// The payload is longer than that of any message.
    #[error("a message {request} of {len} bytes; none has more than {LONGEST}")]
    TooLong {
        /// Type of the message.
        request: u32,
        /// Length in the header.
        len: usize,
    },
    /// The payload does not fit the type of the message.
    #[error("message {request} with a payload of {len} bytes that is none of its own")]
    Payload {
        /// Type of the message.
        request: u32,
        /// Length of the payload.
        len: usize,
    },
    /// There are too many or too few descriptors.
    #[error("message {request} with {found} descriptors instead of {expected}")]
    Descriptors {
        /// Type of the message.
        request: u32,
        /// Number of descriptors received.
        found: usize,
        /// Number of descriptors that the message needs.
        expected: usize,
    },
    /// The device does not have this queue.
    #[error("message {request} for queue {queue}; the device has {queues}")]
    Queue {
        /// Type of the message.
        request: u32,
        /// Number of the queue.
        queue: u32,
        /// Number of queues of the device.
        queues: u16,
    },
    /// An answer on the back-end channel without a question.
    #[error("an answer that nothing was asked for")]
    Answer,
    /// A request on the back-end channel that is not an answer.
    #[error("message {0} on the back-end channel is no answer")]
    NoAnswer(u32),
}

impl Message {
    /// Makes a message without descriptors.
    pub fn new(request: impl Into<u32>, flags: VhostUserHeaderFlag, payload: &[u8]) -> Self {
        let flags = flags.bits() | 1;
        Self { request: request.into(), flags, payload: payload.to_vec(), fds: Vec::new() }
    }

    /// Returns the bytes to send.
    pub fn bytes(&self) -> Vec<u8> {
        let len = u32::try_from(self.payload.len()).expect("payloads are short");
        let header = [self.request, self.flags, len].into_iter().flat_map(u32::to_ne_bytes);
        header.chain(self.payload.iter().copied()).collect()
    }

    /// Parses a header. Returns the message without its payload, and the length of the payload in
    /// bytes.
    ///
    /// # Errors
    /// [`ProtocolError`] if the version differs or the payload is too long.
    pub fn of_header(header: [u8; HEADER]) -> Result<(Self, usize), ProtocolError> {
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (request, flags, len) = (word(0), word(4), word(8) as usize);
        if flags & VhostUserHeaderFlag::VERSION.bits() != 1 {
            return Err(ProtocolError::Version(flags & VhostUserHeaderFlag::VERSION.bits()));
        }
        if len > LONGEST {
            return Err(ProtocolError::TooLong { request, len });
        }
        Ok((Self { request, flags, payload: Vec::new(), fds: Vec::new() }, len))
    }

    /// Returns `true` if the sender waits for an answer even to a message that has none of its own.
    pub fn needs_reply(&self) -> bool {
        self.flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0
    }

    /// Returns `true` if the message is an answer.
    pub fn is_reply(&self) -> bool {
        self.flags & VhostUserHeaderFlag::REPLY.bits() != 0
    }

    /// Returns the payload as the type of the request.
    pub(crate) fn body<T: ByteValued>(&self) -> Result<T, ProtocolError> {
        let (body, rest) = self.head::<T>()?;
        if rest.is_empty() { Ok(body) } else { Err(self.malformed()) }
    }

    /// Returns the start of the payload as a type, and the bytes after it.
    pub(crate) fn head<T: ByteValued>(&self) -> Result<(T, &[u8]), ProtocolError> {
        let (head, rest) =
            self.payload.split_at_checked(size_of::<T>()).ok_or_else(|| self.malformed())?;
        let mut body = T::zeroed();
        body.as_mut_slice().copy_from_slice(head);
        Ok((body, rest))
    }

    pub(crate) fn malformed(&self) -> ProtocolError {
        ProtocolError::Payload { request: self.request, len: self.payload.len() }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (request, flags, len, fds) =
            (self.request, self.flags, self.payload.len(), self.fds.len());
        write!(f, "message {request}, flags {flags:#x}, {len} bytes, {fds} descriptors")
    }
}

/// Returns the bytes of an IOTLB message.
pub fn iotlb_bytes(message: &VhostIotlbMsg) -> [u8; IOTLB] {
    let mut bytes = [0; IOTLB];
    bytes[..8].copy_from_slice(&message.iova.to_ne_bytes());
    bytes[8..16].copy_from_slice(&message.size.to_ne_bytes());
    bytes[16..24].copy_from_slice(&message.userspace_addr.to_ne_bytes());
    bytes[24] = message.perm as u8;
    bytes[25] = message.msg_type as u8;
    bytes
}

/// Parses an IOTLB message. Returns `None` if the bytes are none. Fields that its type does not use
/// may have any value.
pub fn iotlb_message(bytes: &[u8]) -> Option<VhostIotlbMsg> {
    let bytes: &[u8; IOTLB] = bytes.try_into().ok()?;
    let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_ne_bytes).ok();
    let msg_type = match bytes[25] {
        1 => VhostIotlbType::Miss,
        2 => VhostIotlbType::Update,
        3 => VhostIotlbType::Invalidate,
        4 => VhostIotlbType::AccessFail,
        _ => return None,
    };
    let perm = match bytes[24] {
        1 => VhostAccess::ReadOnly,
        2 => VhostAccess::WriteOnly,
        3 => VhostAccess::ReadWrite,
        _ => VhostAccess::No,
    };
    Some(VhostIotlbMsg {
        iova: word(0)?,
        size: word(8)?,
        userspace_addr: word(16)?,
        perm,
        msg_type,
    })
}

pub(crate) fn permissions(access: VhostAccess) -> Permissions {
    match access {
        VhostAccess::No => Permissions::No,
        VhostAccess::ReadOnly => Permissions::Read,
        VhostAccess::WriteOnly => Permissions::Write,
        VhostAccess::ReadWrite => Permissions::ReadWrite,
    }
}

pub(crate) fn vhost_access(access: Permissions) -> VhostAccess {
    match access {
        Permissions::No => VhostAccess::No,
        Permissions::Read => VhostAccess::ReadOnly,
        Permissions::Write => VhostAccess::WriteOnly,
        Permissions::ReadWrite => VhostAccess::ReadWrite,
    }
}
