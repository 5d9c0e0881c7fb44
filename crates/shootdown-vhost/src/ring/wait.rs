//! A ring for a plain thread.
#![forbid(unsafe_code)]

use super::{Chain, CompleteError, Next, Ring, RingError};
use crate::bell::{Bell, block_on};
use futures::task::waker;
use rustix::event::{PollFd, PollFlags, poll};
use smallvec::{SmallVec, smallvec};
use std::io;
use std::os::fd::BorrowedFd;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

impl Ring {
    /// Returns the next request, and blocks the thread until the driver has made one available.
    /// Returns `None` if the ring is [stopping](Next::Stopping).
    ///
    /// # Errors
    /// As for [`next`](Self::next). [`RingError::Wait`] if no descriptor is left to wait with.
    pub fn next_wait(&mut self) -> Result<Option<Chain>, RingError> {
        let bell = match &self.bell {
            Some(bell) => bell.clone(),
            None => self
                .bell
                .insert(Bell::new().map_err(|error| RingError::Wait { error: error.kind() })?)
                .clone(),
        };
        let waker = waker(bell.clone());
        let mut cx = Context::from_waker(&waker);
        loop {
            let next = {
                let mut next = pin!(self.next());
                loop {
                    match next.as_mut().poll(&mut cx) {
                        Poll::Ready(next) => break next?,
                        // Waits for a translation or a stop.
                        Poll::Pending => drop(wait(&bell, None)?),
                    };
                }
            };
            match next {
                Next::Chain(chain) => return Ok(Some(chain)),
                Next::Stopping => return Ok(None),
                Next::Empty => {}
            }
            let mut stopping = self.stopping();
            let mut deaf = false;
            while Pin::new(&mut stopping).poll(&mut cx).is_pending() {
                let kick = (!deaf).then(|| self.kick());
                match wait(&bell, kick)? {
                    Some(events) if events.contains(PollFlags::IN) => {
                        let _ = rustix::io::read(self.kick(), &mut [0; 8]);
                        break;
                    }
                    // The descriptor has failed, so the driver can no longer kick.
                    Some(events) => deaf |= !events.is_empty(),
                    None => {}
                }
            }
        }
    }
}

/// Waits until the bell has rung or `kick` has an event. Returns the event.
fn wait(bell: &Bell, kick: Option<BorrowedFd<'_>>) -> Result<Option<PollFlags>, RingError> {
    let mut fds: SmallVec<[PollFd<'_>; 2]> = smallvec![PollFd::new(bell, PollFlags::IN)];
    fds.extend(kick.map(|kick| PollFd::from_borrowed_fd(kick, PollFlags::IN)));
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(RingError::Wait { error: io::Error::from(error).kind() }),
    }
    bell.clear();
    Ok(fds.get(1).map(PollFd::revents))
}

impl Chain {
    /// Completes the request like [`complete`](Self::complete), and blocks the thread until the
    /// driver has been told.
    ///
    /// # Errors
    /// As for [`complete`](Self::complete).
    pub fn complete_wait(self, len: u32) -> Result<(), CompleteError> {
        block_on(self.complete(len))
    }
}
