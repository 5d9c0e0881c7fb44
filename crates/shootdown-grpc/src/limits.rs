//! Limits on the messages and the cost of a peer.
#![forbid(unsafe_code)]

use std::time::Duration;

/// Maximum number of ranges in a set.
pub(crate) const MAX_RANGES: usize = 1_024;
/// Maximum length of a space's name in bytes.
pub(crate) const MAX_SPACE_NAME: usize = 255;
/// Maximum size of a mirror's message in bytes.
pub(crate) const MAX_FROM_MIRROR: usize = 1_024;
/// Maximum size of an owner's message in bytes.
pub(crate) const MAX_FROM_OWNER: usize = 128 * 1_024;
/// Size of a piece of contents in bytes.
pub(crate) const PIECE: usize = 64 * 1_024;

/// Longest time for a timer.
pub(crate) const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Limits for the peers of a server. The limits of single messages are part of the protocol, in
/// `proto/shootdown.proto`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Maximum number of connections, including those that have not shown a certificate. Further
    /// ones are closed at once. The default is 4,096. Use more than the number of mirrors.
    pub connections: usize,
    /// Maximum number of connections that have not shown a certificate yet. The default is 256.
    pub handshakes: usize,
    /// Maximum number of connections with one certificate. A further one ends the oldest, so that a
    /// host that was cut off can come back. The default is 64. Use more than the number of spaces,
    /// because a mirror has one connection for each.
    pub connections_of_a_name: usize,
    /// How long a TLS handshake may take, and how long a connection may have no stream. The default
    /// is 5 s.
    pub handshake: Duration,
    /// How long a stream may take to name its space. The default is 5 s.
    pub open: Duration,
    /// Maximum number of streams of one connection. The default is 16.
    pub streams_of_a_connection: u32,
    /// Maximum rate of messages of one stream per second, over some time. Faster messages stay in
    /// the mirror's socket. The default is 20,000.
    pub messages_a_second: u32,
    /// Number of messages that a stream may send at once before the rate applies. The default is
    /// 4,096.
    pub burst: u32,
    /// Maximum number of bytes of one fetch. A stream may have twice as many in memory. The default
    /// is 16 MiB.
    pub fetch: u64,
    /// Maximum number of fetches of one stream that wait to be read and sent. Further ones are
    /// refused. The default is 1,024.
    pub fetches: usize,
    /// Maximum size of a request's headers in bytes. The default is 8 KiB.
    pub headers: u32,
    /// Time without traffic after which a connection is probed. The default is 10 s.
    pub keep_alive: Duration,
    /// How long the answer to a probe may take before the connection is closed. The default is 10
    /// s. A peer that takes no written bytes is given up after both times.
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
