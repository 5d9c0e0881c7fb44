//! A driver as a task of tokio.
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

/// Serves one front-end until it disconnects. Resolves when all rings have ended, so that the next
/// session of the device may begin.
///
/// # Errors
/// [`ServeError`]. The connection is closed then, also after all rings have ended.
///
/// # Panics
/// Outside of a tokio runtime with I/O enabled.
///
/// # Cancel safety
/// If the future is dropped, the connection is closed at once, whatever is in flight. The front-end
/// takes that for an answer. Let it end by itself.
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
                    // Lets other tasks run.
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
    // Before the socket is closed: the front-end takes that for an answer.
    std::future::poll_fn(|cx| session.poll_closed(cx)).await;
    drop((watched, lines));
    ended
}

/// A socket that the reactor watches.
struct Watched {
    socket: Arc<OwnedFd>,
    /// A duplicate of its descriptor.
    stream: tokio::net::UnixStream,
}

/// Makes the reactor watch the sockets of `lines`, in their order.
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

/// Returns `true` if the socket may have become ready since the last try. Otherwise the task is
/// woken later.
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

/// Records that `interest` was used up, so that the socket is tried again next time.
fn clear(stream: &tokio::net::UnixStream, interest: Interest) {
    let _ = stream.try_io(interest, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
}
