//! One connection of a mirror: its bytes, its peer, and the conditions to cut it.
#![forbid(unsafe_code)]

use crate::limits::LONGEST;
use crate::list::Listed;
use crate::name::Name;
use crate::observe::{Count, Tally};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

/// The peer of a connection, for each of its streams.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// Names in its certificate; `None` without TLS.
    pub(crate) names: Option<Arc<[Name]>>,
    pub(crate) use_: Arc<Use>,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.names.as_deref() {
            Some([name, ..]) => write!(f, "{name} ({})", self.address),
            _ => write!(f, "{}", self.address),
        }
    }
}

/// Use of a connection: the number of its streams.
#[derive(Debug, Default)]
pub(crate) struct Use {
    streams: AtomicUsize,
    ever: AtomicBool,
    /// A stream has begun or ended since the last check.
    lately: AtomicBool,
}

impl Use {
    fn is_idle(&self) -> bool {
        !self.lately.swap(false, Ordering::Relaxed) && self.streams.load(Ordering::Relaxed) == 0
    }
}

/// Counts a stream of a connection while it exists.
#[derive(Debug)]
pub(crate) struct InUse(Arc<Use>);

impl InUse {
    pub(crate) fn new(of: &Arc<Use>) -> Self {
        of.streams.fetch_add(1, Ordering::Relaxed);
        of.ever.store(true, Ordering::Relaxed);
        of.lately.store(true, Ordering::Relaxed);
        Self(of.clone())
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.lately.store(true, Ordering::Relaxed);
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A byte stream, encrypted or not.
pub(crate) trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// Resources that a connection holds while it exists.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) _permit: OwnedSemaphorePermit,
    /// Removes the connection from the list of its name.
    pub(crate) _listed: Option<Listed>,
}

/// A connection that has been accepted and authenticated.
pub(crate) struct Socket {
    wire: Box<dyn Wire>,
    peer: Peer,
    tally: Tally,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Next check whether the connection has streams.
    idle: Pin<Box<Sleep>>,
    idle_for: Duration,
    /// End of the certificate.
    end: Pin<Box<Sleep>>,
    /// When a peer that takes no written bytes is given up.
    stalled: Option<Pin<Box<Sleep>>>,
    stalled_for: Duration,
    _slot: Slot,
}

impl Socket {
    pub(crate) fn new(
        wire: Box<dyn Wire>,
        peer: Peer,
        terms: Terms,
        tally: Tally,
        slot: Slot,
    ) -> Self {
        let now = Instant::now();
        let (valid_for, idle_for) = (terms.valid_for.min(LONGEST), terms.idle_for.min(LONGEST));
        Self {
            wire,
            peer,
            tally,
            cut: Box::pin(terms.cut.cancelled_owned()),
            idle: Box::pin(sleep_until(now + idle_for)),
            idle_for,
            end: Box::pin(sleep_until(now + valid_for)),
            stalled: None,
            stalled_for: terms.stalled_for.min(LONGEST),
            _slot: slot,
        }
    }

    fn poll_alive(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if self.end.as_mut().poll(cx).is_ready() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the certificate has expired"));
        }
        while self.idle.as_mut().poll(cx).is_ready() {
            if self.peer.use_.is_idle() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "no stream on this connection",
                ));
            }
            self.idle.as_mut().reset(Instant::now() + self.idle_for);
        }
        Ok(())
    }

    /// Writes. Also checks here whether to cut the connection: HTTP/2 reads nothing while an answer
    /// of its own waits for the socket.
    fn poll_out<T>(
        &mut self,
        cx: &mut Context<'_>,
        out: impl FnOnce(Pin<&mut Box<dyn Wire>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        self.poll_alive(cx)?;
        let written = out(Pin::new(&mut self.wire), cx);
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let (now, stalled_for) = (Instant::now(), self.stalled_for);
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep_until(now + stalled_for)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the peer takes nothing of what is sent",
        )))
    }
}

/// How long a connection may last.
#[derive(Debug)]
pub(crate) struct Terms {
    pub(crate) cut: CancellationToken,
    pub(crate) idle_for: Duration,
    /// Without the peer taking any written bytes.
    pub(crate) stalled_for: Duration,
    pub(crate) valid_for: Duration,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.peer.use_.ever.load(Ordering::Relaxed) {
            self.tally.refuse(
                Count::WithoutStream,
                &self.peer,
                "the connection ended without a stream",
            );
        }
    }
}

impl Connected for Socket {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_alive(cx)?;
        let read = ready!(Pin::new(&mut self.wire).poll_read(cx, buffer));
        Poll::Ready(read)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_out(cx, |wire, cx| wire.poll_write(cx, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_out(cx, |wire, cx| wire.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_out(cx, |wire, cx| wire.poll_shutdown(cx))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_out(cx, |wire, cx| wire.poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.is_write_vectored()
    }
}
