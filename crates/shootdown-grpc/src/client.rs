//! The mirror's side: a link to the owner that is made again whenever it breaks.
#![forbid(unsafe_code)]

use crate::backoff::Backoff;
use crate::carry::{Ended, carry};
use crate::codec;
use crate::dial::{Address, Dial, DialError};
use crate::limits::{MAX_FROM_MIRROR, MAX_FROM_OWNER, MAX_SPACE_NAME};
use crate::name::INSECURE_NAME;
use crate::observe;
use crate::proto::FromMirror;
use crate::proto::shootdown_client::ShootdownClient;
use crate::tls::ClientTls;
use futures::StreamExt;
use shootdown_lease::engine::Leased;
use shootdown_lease::{Standing, ToOwner};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Code, Request, Status};

/// Capacity of the queue from the mirror to its connection.
const OUTGOING: usize = 16;

/// Reason why a client cannot be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Neither [`ClientBuilder::tls`] nor [`ClientBuilder::insecure_plaintext`] was called.
    #[error(
        "how the owner is known is not said: call `tls` (or `insecure_plaintext`, where everybody on the network is trusted)"
    )]
    NoSecurity,
    /// [`ClientBuilder::owner`] was not called.
    #[error("no owner to connect to")]
    NoOwner,
    /// The address is not `host:port`, or the host cannot be a name in a certificate.
    #[error("{0:?} is no address of an owner: `host:port`")]
    Address(String),
    /// The name of the space is empty or longer than 255 bytes.
    #[error("a space's name has 1 to 255 bytes, not {0}")]
    SpaceName(usize),
    /// The name for a server without TLS is not valid in a header.
    #[error("the mirror's name is no text of visible ASCII")]
    Name,
}

/// Settings of a client. [`Client::builder`] returns them.
#[derive(Debug)]
pub struct ClientBuilder {
    space: String,
    owners: Vec<String>,
    server_name: Option<String>,
    security: Option<Security>,
    backoff: (Duration, Duration),
    connect_timeout: Duration,
    keep_alive: (Duration, Duration),
}

#[derive(Debug)]
enum Security {
    Tls(ClientTls),
    Plaintext(String),
}

impl ClientBuilder {
    /// Adds an owner as `host:port`. With several owners the client tries them one after the other.
    pub fn owner(mut self, address: impl Into<String>) -> Self {
        self.owners.push(address.into());
        self
    }

    /// Sets the name that the owner's certificate must have, if it is not the host of its address.
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Uses TLS. The mirror and the owner show certificates.
    pub fn tls(mut self, tls: ClientTls) -> Self {
        self.security = Some(Security::Tls(tls));
        self
    }

    /// Uses no TLS, for a server without it. The mirror states its `name`.
    pub fn insecure_plaintext(mut self, name: impl Into<String>) -> Self {
        self.security = Some(Security::Plaintext(name.into()));
        self
    }

    /// Sets the first and the longest wait before a link is made again. Up to half of a wait is
    /// left out at random, so that mirrors do not come all at once. The default is 20 ms and 1 s.
    /// The longest wait should be below half of a term.
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.backoff = (first, longest.max(first));
        self
    }

    /// Sets how long a connection may take until the owner has taken the stream. The default is 2
    /// s.
    pub fn connect_timeout(mut self, time: Duration) -> Self {
        self.connect_timeout = time;
        self
    }

    /// Sets after how long without traffic the owner is probed, and how long its answer may take
    /// before the link is made again. The default is 2 s each.
    pub fn keep_alive(mut self, interval: Duration, time: Duration) -> Self {
        self.keep_alive = (interval, time);
        self
    }

    /// Checks the settings and makes a client. It does not connect yet.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn build(self) -> Result<Client, ClientError> {
        if !(1..=MAX_SPACE_NAME).contains(&self.space.len()) {
            return Err(ClientError::SpaceName(self.space.len()));
        }
        let (tls, name) = match self.security.ok_or(ClientError::NoSecurity)? {
            Security::Tls(tls) => (Some(tls), None),
            Security::Plaintext(name) => {
                (None, Some(MetadataValue::try_from(name).map_err(|_| ClientError::Name)?))
            }
        };
        let server_name = self.server_name.as_deref();
        let read = |address: &String| {
            Address::read(address, server_name).ok_or_else(|| ClientError::Address(address.clone()))
        };
        let owners = self.owners.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        if owners.is_empty() {
            return Err(ClientError::NoOwner);
        }
        let dial = Dial { tls, keep_alive: self.keep_alive };
        let (backoff, connect_timeout) = (self.backoff, self.connect_timeout);
        Ok(Client {
            inner: Arc::new(Inner {
                space: self.space,
                owners,
                name,
                dial,
                backoff,
                connect_timeout,
            }),
        })
    }
}

/// The mirror's side of the transport. This is a handle; clones share one client.
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    space: String,
    owners: Vec<Address>,
    name: Option<MetadataValue<Ascii>>,
    dial: Dial,
    backoff: (Duration, Duration),
    connect_timeout: Duration,
}

/// Reason why there is no link.
#[derive(Debug, Error)]
enum NoLink {
    #[error("{0}")]
    Dial(#[from] DialError),
    #[error("the owner says {:?}: {}", .0.code(), .0.message())]
    Refused(Status),
    #[error(
        "the owner ended the connection before it took the stream: it may not take this mirror's certificate (what it traces says why)"
    )]
    Ended,
    #[error("the owner has not taken the stream in time")]
    Slow,
}

impl Client {
    /// Returns settings of a client for a space with that name.
    pub fn builder(space: impl Into<String>) -> ClientBuilder {
        ClientBuilder {
            space: space.into(),
            owners: Vec::new(),
            server_name: None,
            security: None,
            backoff: (Duration::from_millis(20), Duration::from_secs(1)),
            connect_timeout: Duration::from_secs(2),
            keep_alive: (Duration::from_secs(2), Duration::from_secs(2)),
        }
    }

    /// Carries the messages of a mirror in a task. Connects, and connects again whenever the link
    /// breaks, which ends no epoch. The program itself spawns [`Leased::run`].
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn connect(&self, leased: Leased) -> Connection {
        let state = Arc::<LinkState>::default();
        let task = tokio::spawn(self.clone().run(leased, state.clone()));
        Connection { task, state }
    }

    async fn run(self, leased: Leased, state: Arc<LinkState>) {
        let Inner { space, owners, backoff, .. } = &*self.inner;
        let mut backoff = Backoff::new(backoff.0, backoff.1);
        let mut owners = owners.iter().cycle();
        let Some(mut owner) = owners.next() else { return };
        let mut farewell = None;
        loop {
            let tried = owner;
            let why = match self.link(owner, &leased, &state, &mut farewell).await {
                Ok((Ended::Left, _)) => return state.down(space, tried, &"the mirror has left"),
                Ok((Ended::Down(status), lasted)) => {
                    if lasted > backoff.last() {
                        backoff.reset();
                    }
                    match status.code() {
                        // Two processes use one certificate. Retrying soon does not help.
                        Code::Aborted => backoff.slow_down(),
                        Code::Unavailable | Code::PermissionDenied => {
                            owner = owners.next().unwrap_or(owner)
                        }
                        _ => {}
                    }
                    NoLink::Refused(status)
                }
                Err(why) => {
                    state.failed.fetch_add(1, Ordering::Relaxed);
                    owner = owners.next().unwrap_or(owner);
                    why
                }
            };
            state.down(space, tried, &why);
            sleep(backoff.next()).await;
        }
    }

    /// Makes a link and keeps it. Returns how it ended, and after how long.
    async fn link(
        &self,
        owner: &Address,
        leased: &Leased,
        state: &LinkState,
        farewell: &mut Option<ToOwner>,
    ) -> Result<(Ended, Duration), NoLink> {
        let inner = &*self.inner;
        let (sender, outgoing) = mpsc::channel(OUTGOING);
        let open = async {
            let channel = inner.dial.dial(owner, inner.connect_timeout).await?;
            let mut client = ShootdownClient::new(channel)
                .max_decoding_message_size(MAX_FROM_OWNER)
                .max_encoding_message_size(MAX_FROM_MIRROR);
            let first = futures::stream::iter([codec::open(&inner.space)]);
            let mut request = Request::new(first.chain(messages(outgoing)));
            if let Some(name) = &inner.name {
                request.metadata_mut().insert(INSECURE_NAME, name.clone());
            }
            // A status from the owner itself has no source. With TLS a client learns that its
            // certificate is refused only after the handshake on its side.
            let broken = |status: &Status| std::error::Error::source(status).is_some();
            client.mirror(request).await.map_err(|status| {
                if broken(&status) { NoLink::Ended } else { NoLink::Refused(status) }
            })
        };
        let incoming =
            timeout(inner.connect_timeout, open).await.map_err(|_| NoLink::Slow)??.into_inner();
        let began = Instant::now();
        state.up(&inner.space, owner);
        // A mirror that is out has no questions. It may still have to say that it has left.
        if !matches!(leased.standing(), Standing::Out) {
            leased.connected();
        }
        let ended = carry(leased, incoming, sender, &state.malformed, farewell).await;
        Ok((ended, began.elapsed()))
    }
}

fn messages(
    mut outgoing: mpsc::Receiver<FromMirror>,
) -> impl futures::Stream<Item = FromMirror> + Send + 'static {
    futures::stream::poll_fn(move |cx| outgoing.poll_recv(cx))
}

/// State that the task of a connection records.
#[derive(Debug, Default)]
struct LinkState {
    up: AtomicBool,
    links: AtomicU64,
    failed: AtomicU64,
    malformed: AtomicU64,
    why: Mutex<Option<String>>,
}

impl LinkState {
    fn up(&self, space: &str, owner: &dyn fmt::Display) {
        self.up.store(true, Ordering::Relaxed);
        self.links.fetch_add(1, Ordering::Relaxed);
        observe::link(space, owner, true);
    }

    fn down(&self, space: &str, owner: &dyn fmt::Display, why: &dyn fmt::Display) {
        self.up.store(false, Ordering::Relaxed);
        *self.why.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{owner}: {why}"));
        observe::link(space, why, false);
    }
}

/// Counters of a client. [`Connection::counts`] returns them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientCounts {
    /// Links made.
    pub links: u64,
    /// Failed tries.
    pub failed: u64,
    /// Messages of the owner that do not decode or are impossible.
    pub malformed: u64,
}

/// The link of a mirror to its owner, kept by a task. [`Client::connect`] returns it. Its drop cuts
/// the link; the lease then ends by time.
#[derive(Debug)]
pub struct Connection {
    task: JoinHandle<()>,
    state: Arc<LinkState>,
}

impl Connection {
    /// Returns `true` if there is a link now, as far as this side knows. This says nothing about
    /// the lease.
    pub fn is_up(&self) -> bool {
        self.state.up.load(Ordering::Relaxed)
    }

    /// Returns the reason of the last failure: the owner that was tried, and what it answered or
    /// did. The client keeps trying in any case. If a mirror makes no progress, look here first,
    /// then at [`Leased::denied`](shootdown_lease::engine::Leased::denied).
    pub fn last_error(&self) -> Option<String> {
        self.state.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the counters.
    pub fn counts(&self) -> ClientCounts {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ClientCounts {
            links: get(&self.state.links),
            failed: get(&self.state.failed),
            malformed: get(&self.state.malformed),
        }
    }

    /// Waits until the mirror has left ([`Leased::leave`]) and the owner has been told. If no owner
    /// can be reached, this never resolves, so use a timeout. An owner that is not told waits for
    /// the end of the lease.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment.
    pub async fn ended(&mut self) {
        if !self.task.is_finished() {
            let _ = (&mut self.task).await;
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}
