//! The owner's half of a stream: messages of its hub, interleaved with contents.
#![forbid(unsafe_code)]

use crate::codec;
use crate::limits::{Limits, PIECE};
use crate::observe::{Count, Tally};
use crate::proto;
use crate::socket::Peer;
use crate::space::{Contents, Unreadable};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, FuturesUnordered};
use futures::{FutureExt, Stream, StreamExt};
use shootdown_lease::engine::{Link, Outgoing, Serve};
use shootdown_lease::{Asker, Refusal, ToMirror};
use std::collections::VecDeque;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use tokio::sync::oneshot;
use tokio_util::sync::DropGuard;
use tonic::Status;

type Read = (Serve, Result<Bytes, Unreadable>);

type Message = Result<proto::FromOwner, Status>;

/// The sender of a stream, which the end of the stream can drop. A peer that takes nothing is never
/// polled again, and would keep all contents in memory.
#[derive(Clone)]
pub(crate) struct Place(Arc<Mutex<Placed>>);

enum Placed {
    Sending(BoxStream<'static, Message>),
    /// Taken out of its slot: no lock is held while it works.
    AtWork,
    Ended,
}

impl Place {
    pub(crate) fn new(sending: Sending) -> Self {
        let next = async |mut sending: Sending| Some((sending.next().await?, sending));
        Self(Arc::new(Mutex::new(Placed::Sending(Box::pin(futures::stream::unfold(
            sending, next,
        ))))))
    }

    /// Drops the sender, now or when it has finished its current work.
    pub(crate) fn end(&self) {
        drop(self.put(Placed::Ended));
    }

    fn put(&self, placed: Placed) -> Placed {
        mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), placed)
    }

    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<Message>> {
        let mut sending = match self.put(Placed::AtWork) {
            Placed::Sending(sending) => sending,
            // The status is about to be sent.
            Placed::AtWork | Placed::Ended => {
                self.end();
                return Poll::Pending;
            }
        };
        let next = sending.poll_next_unpin(cx);
        let mut placed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*placed, Placed::AtWork) {
            *placed = Placed::Sending(sending);
        } else {
            drop(placed);
            drop(sending);
        }
        next
    }
}

/// The owner's half of a stream, in gRPC's form.
pub(crate) struct Half {
    pub(crate) place: Place,
    /// How the mirror's half has ended; `None` once that was sent.
    pub(crate) end: Option<oneshot::Receiver<Option<Status>>>,
    /// Ends the mirror's half when this is dropped.
    pub(crate) _ended: DropGuard,
}

impl Stream for Half {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Message>> {
        let Some(end) = &mut self.end else { return Poll::Ready(None) };
        if let Poll::Ready(status) = end.poll_unpin(cx) {
            self.end = None;
            return Poll::Ready(status.ok().flatten().map(Err));
        }
        let next = ready!(self.place.poll_next(cx));
        if next.is_none() {
            self.end = None;
        }
        Poll::Ready(next)
    }
}

/// Contents being sent, and their progress.
struct Piecewise {
    serve: Serve,
    contents: Bytes,
    sent: usize,
}

/// Sends the output of one stream. Messages go before contents, so an `Inv` waits for one piece of
/// contents at most, and never for a read.
pub(crate) struct Sending {
    link: Link,
    contents: Arc<dyn Contents>,
    limits: Limits,
    tally: Tally,
    peer: Peer,
    /// Fetches that have not begun.
    waiting: VecDeque<Serve>,
    reading: FuturesUnordered<BoxFuture<'static, Read>>,
    read: VecDeque<Piecewise>,
    /// All fetches of the stream, so that a repeated fetch is served once.
    serves: Vec<Serve>,
    /// Number of bytes of the fetches that have begun.
    begun: u64,
    over: bool,
}

impl Sending {
    pub(crate) fn new(
        link: Link,
        contents: Arc<dyn Contents>,
        limits: Limits,
        tally: Tally,
        peer: Peer,
    ) -> Self {
        let (waiting, reading, read, serves) = Default::default();
        Self {
            link,
            contents,
            limits,
            tally,
            peer,
            waiting,
            reading,
            read,
            serves,
            begun: 0,
            over: false,
        }
    }

    /// Waits for the next message. Returns `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<Result<proto::FromOwner, Status>> {
        loop {
            if self.over {
                return None;
            }
            self.begin();
            let (reading, read) = (!self.reading.is_empty(), !self.read.is_empty());
            tokio::select! {
                biased;
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
                        self.forget(&serve);
                        let why = format!("{} bytes were read of {}", contents.len(), serve.range());
                        return Some(Ok(self.refuse(&serve, Count::Unreadable, why)));
                    }
                    Err(why) => {
                        self.forget(&serve);
                        return Some(Ok(self.refuse(&serve, Count::Unreadable, why)));
                    }
                },
                () = std::future::ready(()), if read => {
                    if let Some(piece) = self.piece() {
                        return Some(Ok(piece));
                    }
                }
            }
        }
    }

    /// Accepts a fetch, or returns a refusal.
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

    /// Reads as many fetches as there is room for, concurrently: one range may be under
    /// invalidation for long.
    fn begin(&mut self) {
        while let Some(serve) = self.waiting.pop_front() {
            let begun = self.begun.saturating_add(bytes(&serve));
            if begun > self.limits.fetch.saturating_mul(2) {
                self.waiting.push_front(serve);
                return;
            }
            self.begun = begun;
            let contents = self.contents.clone();
            self.reading.push(Box::pin(async move {
                let read = contents.read(serve.range()).await;
                (serve, read)
            }));
        }
    }

    /// Returns the next piece of contents, or the message after the last piece.
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
        let piece = codec::piece(first.serve.epoch(), first.serve.nonce(), first.sent as u64, data);
        first.sent = end;
        Some(piece)
    }

    fn refuse(&self, serve: &Serve, count: Count, why: impl std::fmt::Display) -> proto::FromOwner {
        self.tally.refuse(count, &self.peer, why);
        let reason =
            if count == Count::FetchesDropped { Refusal::Fetches } else { Refusal::Contents };
        codec::from_owner(&ToMirror::Refused {
            nonce: serve.nonce(),
            asker: Asker::Fetch(serve.epoch()),
            why: reason,
        })
    }

    /// Removes a fetch that is over.
    fn forget(&mut self, serve: &Serve) {
        self.begun = self.begun.saturating_sub(bytes(serve));
        self.serves.retain(|known| !is_same(known, serve));
    }
}

fn bytes(serve: &Serve) -> u64 {
    serve.range().len().unwrap_or(u64::MAX)
}

fn is_same(one: &Serve, other: &Serve) -> bool {
    (one.epoch(), one.nonce()) == (other.epoch(), other.nonce())
}

/// Returns the status of a stream that a newer one has replaced.
pub(crate) fn replaced() -> Status {
    Status::aborted("a newer stream of this host has replaced this one")
}
