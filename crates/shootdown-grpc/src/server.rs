//! The owner's side: a socket, the peers that may connect, and the spaces that they may join.
#![forbid(unsafe_code)]

use crate::accept::Door;
use crate::limits::{LONGEST, Limits, MAX_FROM_MIRROR, MAX_FROM_OWNER};
use crate::list::List;
use crate::observe::Tally;
use crate::proto::shootdown_server::ShootdownServer;
use crate::service::Service;
use crate::space::Space;
use crate::tls::ServerTls;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use thiserror::Error;
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// Reason why a server cannot start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// Neither [`ServerBuilder::tls`] nor [`ServerBuilder::insecure_plaintext`] was called.
    #[error(
        "who may connect is not said: call `tls` (or `insecure_plaintext`, where everybody on the network is trusted)"
    )]
    NoSecurity,
    /// The name of a space is empty or longer than 255 bytes.
    #[error("a space's name has 1 to 255 bytes, not {0}")]
    SpaceName(usize),
    /// The address cannot be bound.
    #[error("the address cannot be bound: {0}")]
    Bind(#[from] io::Error),
}

/// Settings of a server. [`Server::builder`] returns them.
#[derive(Debug, Default)]
pub struct ServerBuilder {
    security: Option<Security>,
    spaces: BTreeMap<Arc<str>, Space>,
    limits: Limits,
    tally: Tally,
}

#[derive(Debug)]
enum Security {
    Tls(ServerTls),
    Plaintext,
}

impl ServerBuilder {
    /// Uses TLS. The mirrors and the owner show certificates.
    pub fn tls(mut self, tls: ServerTls) -> Self {
        self.security = Some(Security::Tls(tls));
        self
    }

    /// Uses no TLS. Any process that reaches the port can take any name, read the memory, and delay
    /// every invalidation. For tests, and for networks in which every host is trusted.
    pub fn insecure_plaintext(mut self) -> Self {
        self.security = Some(Security::Plaintext);
        self
    }

    /// Offers a space by a name of 1 to 255 bytes.
    pub fn space(mut self, name: impl Into<Arc<str>>, space: Space) -> Self {
        self.spaces.insert(name.into(), space);
        self
    }

    /// Sets the limits for peers.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Listens at an address. [`Server::run`] then serves mirrors.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn bind(self, address: impl ToSocketAddrs) -> Result<Server, ServerError> {
        let tls = match self.security.ok_or(ServerError::NoSecurity)? {
            Security::Tls(tls) => Some(TlsAcceptor::from(tls.config)),
            Security::Plaintext => None,
        };
        if let Some(name) = self
            .spaces
            .keys()
            .find(|name| !(1..=crate::limits::MAX_SPACE_NAME).contains(&name.len()))
        {
            return Err(ServerError::SpaceName(name.len()));
        }
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok(Server {
            listener,
            address,
            tls,
            spaces: self.spaces,
            limits: self.limits,
            tally: self.tally,
        })
    }
}

/// The owner's side of the transport. It listens, and serves the mirrors of its spaces.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<TlsAcceptor>,
    spaces: BTreeMap<Arc<str>, Space>,
    limits: Limits,
    tally: Tally,
}

impl Server {
    /// Returns settings of a server, without a space and without TLS.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// Returns the address at which it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Returns a handle to its counters. Keep it while the server runs.
    pub fn tally(&self) -> Tally {
        self.tally.clone()
    }

    /// Serves mirrors for ever. Each stream and each handshake is a task.
    ///
    /// # Cancel safety
    /// If the future is dropped, the server stops listening and cuts all connections. This ends no
    /// epoch, and mirrors try to connect again.
    ///
    /// # Panics
    /// Outside of a tokio runtime, or in one without timers or I/O.
    pub async fn run(self) -> Infallible {
        let cut = CancellationToken::new();
        let _cut_all = cut.clone().drop_guard();
        let Self { listener, tls, spaces, limits, tally, .. } = self;
        let door =
            Door { tls, limits: limits.clone(), tally: tally.clone(), cut, list: List::default() };
        // One at a time: a connection that waits here has its permit already.
        let (ready, mut accepted) = mpsc::channel(1);
        let incoming = futures::stream::poll_fn(move |cx| accepted.poll_recv(cx));
        let told = tell_books(&spaces);
        let service = Service { spaces, limits: limits.clone(), tally, streams: Arc::default() };
        let service = ShootdownServer::new(service)
            .max_decoding_message_size(MAX_FROM_MIRROR)
            .max_encoding_message_size(MAX_FROM_OWNER);
        let server = tonic::transport::Server::builder()
            .max_concurrent_streams(limits.streams_of_a_connection)
            .http2_max_header_list_size(limits.headers)
            .http2_keepalive_interval(Some(limits.keep_alive.min(LONGEST)))
            .http2_keepalive_timeout(Some(limits.keep_alive_timeout.min(LONGEST)))
            .initial_stream_window_size(64 * 1_024)
            .initial_connection_window_size(256 * 1_024)
            .serve_with_incoming(service, incoming);
        tokio::select! {
            served = server => unreachable!("it serves as long as there may be connections: {served:?}"),
            () = door.accept(&listener, ready) => unreachable!("somebody receives connections"),
            never = told => never,
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, spaces, limits, .. } = self;
        f.debug_struct("Server")
            .field("address", address)
            .field("spaces", spaces)
            .field("limits", limits)
            .finish_non_exhaustive()
    }
}

/// Interval between two reports of the hubs' counters.
#[cfg(any(feature = "tracing", feature = "metrics"))]
const TELL: std::time::Duration = std::time::Duration::from_secs(1);

/// Reports the hubs' counters from time to time.
#[cfg(any(feature = "tracing", feature = "metrics"))]
fn tell_books(spaces: &BTreeMap<Arc<str>, Space>) -> impl Future<Output = Infallible> + use<> {
    let hubs =
        spaces.iter().map(|(name, space)| (name.clone(), space.hub.clone(), Default::default()));
    let mut hubs: Vec<_> = hubs.collect();
    async move {
        loop {
            tokio::time::sleep(TELL).await;
            for (name, hub, before) in &mut hubs {
                crate::observe::books::tell(name, hub, before);
            }
        }
    }
}

#[cfg(not(any(feature = "tracing", feature = "metrics")))]
fn tell_books(_: &BTreeMap<Arc<str>, Space>) -> impl Future<Output = Infallible> + use<> {
    std::future::pending()
}
