//! A driver that is a task of tokio.
#![forbid(unsafe_code)]

use super::ServeError;
use super::lines::{Line, Lines, Step};
use crate::device::Device;
use crate::session::Session;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::Interest;

/// Serves one front-end, until it goes away. Resolves when all rings have ended, so that the next
/// session of the device may begin.
///
/// # Errors
/// [`ServeError`]: the connection is closed then, after the same wait.
///
/// # Panics
/// Outside of a runtime of tokio whose I/O is enabled.
///
/// # Cancel safety
/// Dropped, the connection is closed at once, whatever is in flight: to the front-end that is an
/// answer. Let it end by itself.
pub async fn serve<D: Device>(
    socket: UnixStream,
    mut session: Session<D>,
) -> Result<(), ServeError> {
    let mut lines = Lines::new(socket.into());
    let mut watched = Vec::new();
    let ended = std::future::poll_fn(|cx| {
        loop {
            match lines.step(&mut session, cx)? {
                Step::Idle => {}
                Step::More => {
                    // Other tasks have their turn.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Step::Ended => return Poll::Ready(Ok(())),
            }
            register(&lines, &mut watched)?;
            let mut again = false;
            for (line, watched) in lines.all().iter().zip(&watched) {
                again |= is_ready(line, &watched.stream, cx)?;
            }
            if !again {
                return Poll::Pending;
            }
        }
    })
    .await;
    // Before the socket is closed: who sees that takes it for an answer.
    std::future::poll_fn(|cx| session.poll_closed(cx)).await;
    drop((watched, lines));
    ended
}

/// A socket that the reactor watches.
struct Watched {
    socket: Arc<OwnedFd>,
    /// Another descriptor of it.
    stream: tokio::net::UnixStream,
}

/// Has the reactor watch the sockets of `lines`, in their order.
fn register(lines: &Lines, watched: &mut Vec<Watched>) -> io::Result<()> {
    for (at, line) in lines.all().iter().enumerate() {
        if watched.get(at).is_some_and(|watched| Arc::ptr_eq(&watched.socket, &line.socket)) {
            continue;
        }
        watched.truncate(at);
        let stream = UnixStream::from(line.socket.try_clone()?);
        stream.set_nonblocking(true)?;
        watched.push(Watched {
            socket: line.socket.clone(),
            stream: tokio::net::UnixStream::from_std(stream)?,
        });
    }
    watched.truncate(lines.all().len());
    Ok(())
}

/// Whether the socket may have become ready since it was last tried; otherwise the task is woken.
fn is_ready(
    line: &Line,
    stream: &tokio::net::UnixStream,
    cx: &mut Context<'_>,
) -> io::Result<bool> {
    let mut again = false;
    if line.listens()
        && let Poll::Ready(ready) = stream.poll_read_ready(cx)
    {
        ready?;
        clear(stream, Interest::READABLE);
        again = true;
    }
    if line.is_full()
        && let Poll::Ready(ready) = stream.poll_write_ready(cx)
    {
        ready?;
        clear(stream, Interest::WRITABLE);
        again = true;
    }
    Ok(again)
}

/// The socket was ready for `interest`, and is tried again next.
fn clear(stream: &tokio::net::UnixStream, interest: Interest) {
    let _ = stream.try_io(interest, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
}
