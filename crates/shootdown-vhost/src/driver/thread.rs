//! A driver as a plain thread.
#![forbid(unsafe_code)]

use super::ServeError;
use super::lines::{Lines, Step};
use crate::bell::Bell;
use crate::device::Device;
use crate::session::Session;
use futures::task::waker;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::unix::net::UnixStream;
use std::task::Context;

/// Serves one front-end on the calling thread until it disconnects. Returns when all rings have
/// ended, so that the next session of the device may begin. [`Session::stopper`] ends it from
/// elsewhere.
///
/// # Errors
/// [`ServeError`]. The connection is closed then, also after all rings have ended.
pub fn serve<D: Device>(socket: UnixStream, mut session: Session<D>) -> Result<(), ServeError> {
    let bell = Bell::new()?;
    let waker = waker(bell.clone());
    let mut cx = Context::from_waker(&waker);
    let mut lines = Lines::new(socket.into());
    let ended = loop {
        match lines.step(&mut session, &mut cx) {
            Ok(Step::Idle) => {}
            Ok(Step::More) => continue,
            Ok(Step::Ended) => break Ok(()),
            Err(error) => break Err(error),
        }
        if let Err(error) = wait(&bell, &lines) {
            break Err(error.into());
        }
    };
    // Before the socket is closed: the front-end takes that for an answer.
    while session.poll_closed(&mut cx).is_pending() {
        wait(&bell, &Lines::none())?;
    }
    ended
}

/// Waits until a socket is ready or the bell has rung.
fn wait(bell: &Bell, lines: &Lines) -> io::Result<()> {
    let mut fds = vec![PollFd::new(bell, PollFlags::IN)];
    for line in lines.all() {
        let out = if line.is_full() { PollFlags::OUT } else { PollFlags::empty() };
        let read = if line.listens() { PollFlags::IN } else { PollFlags::empty() };
        fds.push(PollFd::new(&*line.socket, read | out));
    }
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    bell.clear();
    Ok(())
}
