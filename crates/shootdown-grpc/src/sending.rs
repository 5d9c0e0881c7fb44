//! The owner's half of a stream: what its hub has for a mirror, and contents between that.
#![forbid(unsafe_code)]

use crate::codec;
use crate::limits::{Limits, PIECE};
use crate::observe::{Count, Tally};
use crate::proto;
use crate::socket::Peer;
use crate::space::{Contents, Unreadable};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use shootdown_lease::engine::{Link, Outgoing, Serve};
use shootdown_lease::{Asker, Refusal, ToMirror};
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::oneshot;
use tonic::Status;

type Read = (Serve, Result<Bytes, Unreadable>);

/// Contents that are being sent, and how much of them has been.
struct Piecewise {
    serve: Serve,
    contents: Bytes,
    sent: usize,
}

/// What goes out by one stream. Messages come before contents, so that an `Inv` waits for one piece
/// of contents at most, and for nothing that is being read.
pub(crate) struct Sending {
    link: Link,
    contents: Arc<dyn Contents>,
    limits: Limits,
    tally: Tally,
    peer: Peer,
    /// How the mirror's half of the stream has ended.
    end: oneshot::Receiver<Option<Status>>,
    /// Not begun.
    waiting: VecDeque<Serve>,
    reading: FuturesUnordered<BoxFuture<'static, Read>>,
    read: VecDeque<Piecewise>,
    /// All that is here, so that what is asked again is served once.
    serves: Vec<Serve>,
    over: bool,
}

impl Sending {
    pub(crate) fn new(
        link: Link,
        contents: Arc<dyn Contents>,
        limits: Limits,
        tally: Tally,
        peer: Peer,
        end: oneshot::Receiver<Option<Status>>,
    ) -> Self {
        let (waiting, reading, read, serves) = Default::default();
        Self { link, contents, limits, tally, peer, end, waiting, reading, read, serves, over: false }
    }

    /// The next message, once there is one; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<Result<proto::FromOwner, Status>> {
        loop {
            if self.over {
                return None;
            }
            self.begin();
            let (reading, read) = (!self.reading.is_empty(), !self.read.is_empty());
            tokio::select! {
                biased;
                status = &mut self.end => {
                    self.over = true;
                    return status.ok().flatten().map(Err);
                }
                outgoing = self.link.next() => match outgoing {
                    None => {
                        self.over = true;
                        return Some(Err(replaced()));
                    }
                    Some(Outgoing::Message(message)) => return Some(Ok(codec::from_owner(&message))),
                    Some(Outgoing::Serve(serve)) => {
                        if let Some(refused) = self.take(serve) {
                            return Some(Ok(refused));
                        }
                    }
                },
                Some((serve, contents)) = self.reading.next(), if reading => match contents {
                    Ok(contents) if serve.range().len() == Some(contents.len() as u64) => {
                        self.read.push_back(Piecewise { serve, contents, sent: 0 });
                    }
                    Ok(contents) => {
                        let why = format!("{} bytes were read of {}", contents.len(), serve.range());
                        return Some(Ok(self.refuse(&serve, Count::Unreadable, why)));
                    }
                    Err(why) => return Some(Ok(self.refuse(&serve, Count::Unreadable, why))),
                },
                () = std::future::ready(()), if read => {
                    if let Some(piece) = self.piece() {
                        return Some(Ok(piece));
                    }
                }
            }
        }
    }

    /// Takes a fetch, or says why not.
    fn take(&mut self, serve: Serve) -> Option<proto::FromOwner> {
        if self.serves.iter().any(|known| is_same(known, &serve)) {
            return None;
        }
        if serve.range().len().is_none_or(|bytes| bytes > self.limits.fetch) {
            return Some(self.refuse(&serve, Count::Unreadable, "a fetch of too many bytes"));
        }
        if self.serves.len() >= self.limits.fetches {
            return Some(self.refuse(&serve, Count::FetchesDropped, "too many fetches at once"));
        }
        self.serves.push(serve.clone());
        self.waiting.push_back(serve);
        None
    }

    /// Reads what there is room for, all of it at once: one range may be under invalidation for
    /// long.
    fn begin(&mut self) {
        let bytes = |serve: &Serve| serve.range().len().unwrap_or(u64::MAX);
        let begun = |sending: &Self| {
            let waits = |serve: &&Serve| !sending.waiting.iter().any(|waiting| is_same(waiting, serve));
            sending.serves.iter().filter(waits).map(bytes).fold(0_u64, u64::saturating_add)
        };
        if self.waiting.is_empty() {
            return;
        }
        let mut begun = begun(self);
        while let Some(serve) = self.waiting.pop_front() {
            begun = begun.saturating_add(bytes(&serve));
            if begun > self.limits.fetch.saturating_mul(2) {
                self.waiting.push_front(serve);
                return;
            }
            let contents = self.contents.clone();
            self.reading.push(Box::pin(async move {
                let read = contents.read(serve.range()).await;
                (serve, read)
            }));
        }
    }

    /// The next piece of what was read, or the message after the last one.
    fn piece(&mut self) -> Option<proto::FromOwner> {
        let first = self.read.front_mut()?;
        if first.sent == first.contents.len() {
            let message = codec::from_owner(&first.serve.message());
            let first = self.read.pop_front()?;
            self.forget(&first.serve);
            return Some(message);
        }
        let end = (first.sent + PIECE).min(first.contents.len());
        let data = first.contents.slice(first.sent..end);
        let piece = codec::piece(first.serve.nonce(), first.sent as u64, data);
        first.sent = end;
        Some(piece)
    }

    fn refuse(&mut self, serve: &Serve, count: Count, why: impl std::fmt::Display) -> proto::FromOwner {
        self.forget(serve);
        self.tally.refuse(count, &self.peer, why);
        let reason = if count == Count::FetchesDropped { Refusal::Fetches } else { Refusal::Contents };
        codec::from_owner(&ToMirror::Refused { nonce: serve.nonce(), asker: Asker::Fetch(serve.epoch()), why: reason })
    }

    fn forget(&mut self, serve: &Serve) {
        self.serves.retain(|known| !is_same(known, serve));
    }
}

fn is_same(one: &Serve, other: &Serve) -> bool {
    (one.epoch(), one.nonce()) == (other.epoch(), other.nonce())
}

/// A newer stream has taken over.
pub(crate) fn replaced() -> Status {
    Status::aborted("a newer stream of this host has replaced this one")
}
