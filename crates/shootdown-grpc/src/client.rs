//! The mirror's side: a link to the owner, made again whenever it breaks.
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

/// Messages between the mirror and its connection.
const OUTGOING: usize = 16;

/// Why a client cannot be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Neither [`ClientBuilder::tls`] nor [`ClientBuilder::insecure_plaintext`] was called.
    #[error(
        "how the owner is known is not said: call `tls` (or `insecure_plaintext`, where everybody on the network is trusted)"
    )]
    NoSecurity,
    /// No [`ClientBuilder::owner`].
    #[error("no owner to connect to")]
    NoOwner,
    /// Not `host:port`, or the host is no name that a certificate may have.
    #[error("{0:?} is no address of an owner: `host:port`")]
    Address(String),
    /// A space's name is empty or longer than 255 bytes.
    #[error("a space's name has 1 to 255 bytes, not {0}")]
    SpaceName(usize),
    /// The name for a server without TLS is no text of a header.
    #[error("the mirror's name is no text of visible ASCII")]
    Name,
}

/// How a client is made: [`Client::builder`].
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
    /// An owner to try, as `host:port`. With several, those that may be the owner are tried one
    /// after the other.
    pub fn owner(mut self, address: impl Into<String>) -> Self {
        self.owners.push(address.into());
        self
    }

    /// The name that the owner's certificate must have, if it is not the host of its address.
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// The mirror shows a certificate, and so does the owner.
    pub fn tls(mut self, tls: ClientTls) -> Self {
        self.security = Some(Security::Tls(tls));
        self
    }

    /// No TLS, for a server that has none; the mirror says its name.
    pub fn insecure_plaintext(mut self, name: impl Into<String>) -> Self {
        self.security = Some(Security::Plaintext(name.into()));
        self
    }

    /// How long to wait before a link is made again: at first, and at most. A random part of up to
    /// half of it is left out, so that mirrors do not come all at once. 20 ms and 1 s unless
    /// changed; the longest should be below half of a term.
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.backoff = (first, longest.max(first));
        self
    }

    /// How long a connection may take until the owner has taken the stream. 2 s unless changed.
    pub fn connect_timeout(mut self, time: Duration) -> Self {
        self.connect_timeout = time;
        self
    }

    /// After how long without traffic the owner is asked whether it is there, and how long its
    /// answer may take before the link is made anew. 2 s each unless changed.
    pub fn keep_alive(mut self, interval: Duration, time: Duration) -> Self {
        self.keep_alive = (interval, time);
        self
    }

    /// Checks what was said. Nothing is connected yet.
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

/// The mirror's end of the transport. A handle: clones are the same.
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

/// Why there is no link.
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
    /// A client for a space by that name.
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

    /// Carries the messages of a mirror, in a task: connects, and connects again whenever the link
    /// breaks. That ends no epoch. Its [`Leased::run`] is the program's to spawn.
    ///
    /// # Panics
    /// Outside a tokio runtime.
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
                        // Two processes with one certificate: nothing gained by hurry.
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
            // What the owner itself says has no source. TLS tells a client that its certificate is
            // refused when the handshake is over on its side.
            let broken = |status: &Status| std::error::Error::source(status).is_some();
            client.mirror(request).await.map_err(|status| {
                if broken(&status) { NoLink::Ended } else { NoLink::Refused(status) }
            })
        };
        let incoming =
            timeout(inner.connect_timeout, open).await.map_err(|_| NoLink::Slow)??.into_inner();
        let began = Instant::now();
        state.up(&inner.space, owner);
        // A mirror that is out has nothing to ask; what it may have to say yet is that it has left.
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

/// What the task of a connection writes down.
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

/// What a client has seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientCounts {
    /// Links made.
    pub links: u64,
    /// Tries that came to none.
    pub failed: u64,
    /// Messages of the owner that do not decode, or say what cannot be.
    pub malformed: u64,
}

/// The link of a mirror to its owner, kept by a task. Dropped, the link is cut; the lease ends by
/// itself.
#[derive(Debug)]
pub struct Connection {
    task: JoinHandle<()>,
    state: Arc<LinkState>,
}

impl Connection {
    /// Whether there is a link now, as far as this end knows. Nothing follows from that for the
    /// lease.
    pub fn is_up(&self) -> bool {
        self.state.up.load(Ordering::Relaxed)
    }

    /// Why there was no link, the last time that there was none: which owner was tried, and what it
    /// said or did. The client goes on trying whatever it is. Look here first when a mirror gets
    /// nowhere, then at [`Leased::denied`](shootdown_lease::engine::Leased::denied).
    pub fn last_error(&self) -> Option<String> {
        self.state.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What happened so far.
    pub fn counts(&self) -> ClientCounts {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ClientCounts {
            links: get(&self.state.links),
            failed: get(&self.state.failed),
            malformed: get(&self.state.malformed),
        }
    }

    /// Waits until the mirror has left ([`Leased::leave`]) and the owner was told. Where no owner
    /// can be reached that is for ever: put a time limit around it. Whoever is not told waits for
    /// the lease.
    ///
    /// # Cancel safety
    /// Nothing is lost by dropping it.
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
