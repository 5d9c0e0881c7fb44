//! The service: the peer and the space of a stream, and its mirror's half.
#![forbid(unsafe_code)]

use crate::codec::{Malformed, Received};
use crate::limits::Limits;
use crate::name::{INSECURE_NAME, Name};
use crate::observe::{self, Count, Tally};
use crate::proto;
use crate::proto::shootdown_server::Shootdown;
use crate::sending::{Half, Place, Sending, replaced};
use crate::socket::{InUse, Peer};
use crate::space::Space;
use futures::Stream;
use shootdown_lease::Host;
use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

type Streams = HashMap<(Arc<str>, Host), (u64, CancellationToken)>;

pub(crate) struct Service {
    pub(crate) spaces: BTreeMap<Arc<str>, Space>,
    pub(crate) limits: Limits,
    pub(crate) tally: Tally,
    /// The one stream of each host and space.
    pub(crate) streams: Arc<Mutex<(u64, Streams)>>,
}

/// The peer that has opened a stream, and the space.
struct Opened {
    space: Arc<str>,
    host: Host,
    peer: Peer,
}

#[tonic::async_trait]
impl Shootdown for Service {
    type MirrorStream = Pin<Box<dyn Stream<Item = Result<proto::FromOwner, Status>> + Send>>;

    async fn mirror(
        &self,
        request: Request<Streaming<proto::FromMirror>>,
    ) -> Result<Response<Self::MirrorStream>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let peer = peer.ok_or_else(|| Status::unauthenticated("nobody knows who is there"))?;
        let in_use = InUse::new(&peer.use_);
        let names = match &peer.names {
            Some(names) => names.to_vec(),
            None => insecure_name(&request)
                .map_err(|status| self.refuse(Count::Nameless, &peer, status))?,
        };
        let mut incoming = request.into_inner();
        let space = match timeout(self.limits.open, incoming.message()).await {
            Ok(Ok(Some(message))) => match Received::try_from(message) {
                Ok(Received::Open(space)) => space,
                Ok(Received::Message(_)) => {
                    return Err(self.refuse(Count::NotOpened, &peer, Malformed::Open.into()));
                }
                Err(malformed) => {
                    return Err(self.refuse(Count::Malformed, &peer, malformed.into()));
                }
            },
            Ok(Ok(None)) => {
                return Err(self.refuse(Count::NotOpened, &peer, Malformed::Open.into()));
            }
            Ok(Err(status)) => return Err(self.failed(&peer, status)),
            Err(_) => {
                return Err(self.refuse(
                    Count::NotOpened,
                    &peer,
                    Status::deadline_exceeded("no `Open` in time"),
                ));
            }
        };
        let found = self.spaces.get_key_value(space.as_str());
        let Some((name, space, host)) =
            found.and_then(|(name, space)| Some((name, space, space.host_of(&names)?)))
        else {
            let why = match found {
                None => "there is no such space",
                Some((_, space)) if space.knows(&names) => {
                    "its names are admitted as several hosts"
                }
                Some(_) => "none of its names is admitted",
            };
            self.tally.refuse(
                Count::NotAdmitted,
                &peer,
                format!("asked for the space {space:?}: {why}"),
            );
            // The same answer for all, so that a peer does not learn which spaces exist.
            return Err(Status::permission_denied(
                "no such space, or no name of this certificate may join it",
            ));
        };
        if !space.hub.holds() {
            return Err(self.refuse(Count::NotOwner, &peer, not_owner()));
        }
        Ok(Response::new(self.begin(
            Opened { space: name.clone(), host, peer },
            space,
            incoming,
            in_use,
        )))
    }
}

impl Service {
    fn begin(
        &self,
        opened: Opened,
        space: &Space,
        incoming: Streaming<proto::FromMirror>,
        in_use: InUse,
    ) -> <Self as Shootdown>::MirrorStream {
        let ended = CancellationToken::new();
        let key = (opened.space.clone(), opened.host);
        // The link is made under the lock, so that the newest stream has the newest link.
        let (number, link, older) = {
            let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
            streams.0 += 1;
            let number = streams.0;
            let older = streams.1.insert(key.clone(), (number, ended.clone()));
            (number, space.hub.link(opened.host), older)
        };
        self.tally.add(Count::Streams);
        if let Some((_, older)) = older {
            self.tally.add(Count::Replaced);
            older.cancel();
        }
        observe::stream_began(&opened.space, opened.host.0, &opened.peer);
        let (end, has_ended) = oneshot::channel();
        let sending = Sending::new(
            link,
            space.contents.clone(),
            self.limits.clone(),
            self.tally.clone(),
            opened.peer.clone(),
        );
        let place = Place::new(sending);
        let half =
            Half { place: place.clone(), end: Some(has_ended), _ended: ended.clone().drop_guard() };
        let registered = Registered { streams: self.streams.clone(), key, number };
        let receiving = Receiving {
            incoming,
            space: space.clone(),
            opened,
            limits: self.limits.clone(),
            tally: self.tally.clone(),
            ended,
        };
        tokio::spawn(async move {
            let status = receiving.run().await;
            drop((registered, in_use));
            place.end();
            let _ = end.send(status);
        });
        Box::pin(half)
    }

    fn refuse(&self, count: Count, peer: &Peer, status: Status) -> Status {
        self.tally.refuse(count, peer, status.message());
        status
    }

    fn failed(&self, peer: &Peer, status: Status) -> Status {
        failed(&self.tally, peer, status)
    }
}

/// Returns the status to send on a stream that could not be read.
fn failed(tally: &Tally, peer: &Peer, status: Status) -> Status {
    match status.code() {
        Code::OutOfRange => {
            tally.refuse(Count::Oversized, peer, status.message());
            status
        }
        // A status of the decoder. A broken connection has a source.
        Code::Internal | Code::Unimplemented if std::error::Error::source(&status).is_none() => {
            tally.refuse(Count::Malformed, peer, status.message());
            Status::invalid_argument(status.message())
        }
        _ => status,
    }
}

fn insecure_name(request: &Request<Streaming<proto::FromMirror>>) -> Result<Vec<Name>, Status> {
    let name = request.metadata().get(INSECURE_NAME).and_then(|name| name.to_str().ok());
    let name = name.filter(|name| !name.is_empty());
    name.map(|name| vec![Name::from(name)])
        .ok_or_else(|| Status::unauthenticated(format!("no `{INSECURE_NAME}`")))
}

fn not_owner() -> Status {
    Status::unavailable("this owner owns the space no more")
}

/// Registers a stream of its host. Its drop removes it, unless a newer one has replaced it.
struct Registered {
    streams: Arc<Mutex<(u64, Streams)>>,
    key: (Arc<str>, Host),
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if streams.1.get(&self.key).is_some_and(|(number, _)| *number == self.number) {
            streams.1.remove(&self.key);
        }
    }
}

/// The mirror's half of a stream.
struct Receiving {
    incoming: Streaming<proto::FromMirror>,
    space: Space,
    opened: Opened,
    limits: Limits,
    tally: Tally,
    ended: CancellationToken,
}

impl Receiving {
    /// Hands messages to the hub until the stream ends. Returns the status to send, if any.
    async fn run(mut self) -> Option<Status> {
        let mut pace = Pace::new(&self.limits);
        let ended = self.ended.clone();
        let status = loop {
            let message = tokio::select! {
                biased;
                () = ended.cancelled() => break Some(replaced()),
                message = self.incoming.message() => message,
            };
            let status = match message {
                Ok(None) => break None,
                Ok(Some(message)) => self.take(message),
                Err(status) => Err(failed(&self.tally, &self.opened.peer, status)),
            };
            if let Err(status) = status {
                break Some(status);
            }
            if let Some(wait) = pace.wait(Instant::now()) {
                self.tally.add(Count::Throttled);
                tokio::select! {
                    () = ended.cancelled() => break Some(replaced()),
                    () = sleep(wait) => {}
                }
            }
        };
        observe::stream_ended(&self.opened.space, self.opened.host.0);
        status
    }

    fn take(&self, message: proto::FromMirror) -> Result<(), Status> {
        let malformed = |malformed: Malformed| {
            self.tally.refuse(Count::Malformed, &self.opened.peer, &malformed);
            Status::from(malformed)
        };
        let message = match Received::try_from(message).map_err(malformed)? {
            Received::Message(message) => message,
            Received::Open(_) => return Err(malformed(Malformed::Open)),
        };
        self.tally.add(Count::Messages);
        // The hub checks that it holds the memory before it grants anything, and always takes
        // acknowledgements.
        self.space.hub.handle(self.opened.host, message);
        if !self.space.hub.holds() {
            let status = not_owner();
            self.tally.refuse(Count::NotOwner, &self.opened.peer, status.message());
            return Err(status);
        }
        Ok(())
    }
}

/// Rate limit of a stream: a burst, and messages per second.
struct Pace {
    each: Duration,
    burst: Duration,
    /// When all received messages would have come at that rate.
    at: Option<Instant>,
}

impl Pace {
    fn new(limits: &Limits) -> Self {
        let each = Duration::from_secs(1) / limits.messages_a_second.max(1);
        Self { each, burst: each * limits.burst.max(1), at: None }
    }

    /// Counts a message. Returns how long the next one must wait, if at all.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let at = self.at.map_or(now, |at| at.max(now)) + self.each;
        self.at = Some(at);
        let ahead = at.saturating_duration_since(now).saturating_sub(self.burst);
        (!ahead.is_zero()).then_some(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_pace_holds() {
        let limits = Limits { messages_a_second: 10, burst: 3, ..Limits::default() };
        let (mut pace, now) = (Pace::new(&limits), Instant::now());
        let waits: Vec<_> = (0..5).map(|_| pace.wait(now)).collect();
        let each = Duration::from_millis(100);
        assert_eq!(waits, [None, None, None, Some(each), Some(each * 2)]);
        let later = now + Duration::from_secs(60);
        assert_eq!((pace.wait(later), pace.wait(later), pace.wait(later)), (None, None, None));
        assert_eq!(pace.wait(later), Some(each));
    }
}
