//! Bounds on what a peer can send, and on what it can cost.
#![forbid(unsafe_code)]

use std::time::Duration;

/// Ranges in one set.
pub(crate) const MAX_RANGES: usize = 1_024;
/// Bytes of a space's name.
pub(crate) const MAX_SPACE_NAME: usize = 255;
/// Bytes of one message of a mirror.
pub(crate) const MAX_FROM_MIRROR: usize = 1_024;
/// Bytes of one message of an owner.
pub(crate) const MAX_FROM_OWNER: usize = 128 * 1_024;
/// Bytes of one piece of contents.
pub(crate) const PIECE: usize = 64 * 1_024;

/// A timer has no later end.
pub(crate) const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);

/// What a peer of a server may do and cost. The bounds of single messages are part of the protocol
/// and stand in `proto/shootdown.proto`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Connections at one time, those that have not shown a certificate yet included. Further ones
    /// are closed at once. 4,096 unless changed; above the number of mirrors.
    pub connections: usize,
    /// Of those, before they have shown a certificate. 256 unless changed.
    pub handshakes: usize,
    /// Of those, by one certificate. A further one ends the oldest, so that a host that was cut off
    /// can come back. 64 unless changed; above the number of spaces, because a mirror has a
    /// connection for each.
    pub connections_of_a_name: usize,
    /// How long a TLS handshake may take, and how long a connection may stay without a stream. 5 s
    /// unless changed.
    pub handshake: Duration,
    /// How long a stream may take to say which space it is for. 5 s unless changed.
    pub open: Duration,
    /// Streams of one connection. 16 unless changed.
    pub streams_of_a_connection: u32,
    /// Messages that one stream may send in a second, over some time. What comes faster is left in
    /// the mirror's socket. 20,000 unless changed.
    pub messages_a_second: u32,
    /// Messages that it may send at once before that bound holds. 4,096 unless changed.
    pub burst: u32,
    /// Bytes that one fetch may ask for; a stream may have twice as many in memory. 16 MiB unless
    /// changed.
    pub fetch: u64,
    /// Fetches of one stream that wait to be read and sent. Further ones are refused. 1,024 unless
    /// changed.
    pub fetches: usize,
    /// Bytes of the headers of a request. 8 KiB unless changed.
    pub headers: u32,
    /// After how long without traffic a connection is asked whether it is there. 10 s unless
    /// changed.
    pub keep_alive: Duration,
    /// How long the answer may take, before the connection is closed. 10 s unless changed. A peer
    /// that takes nothing of what is sent is given up after both times.
    pub keep_alive_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4_096,
            handshakes: 256,
            connections_of_a_name: 64,
            handshake: Duration::from_secs(5),
            open: Duration::from_secs(5),
            streams_of_a_connection: 16,
            messages_a_second: 20_000,
            burst: 4_096,
            fetch: 16 << 20,
            fetches: 1_024,
            headers: 8 * 1_024,
            keep_alive: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(10),
        }
    }
}
