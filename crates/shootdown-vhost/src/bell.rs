//! Eventfds that wake threads out of `poll`, eventfds of the front-end, and blocking on futures.
#![forbid(unsafe_code)]

use futures::task::ArcWake;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

pub(crate) struct Bell(OwnedFd);

impl ArcWake for Bell {
    fn wake_by_ref(bell: &Arc<Self>) {
        // If the counter is full, the thread wakes up anyway.
        let _ = rustix::io::write(&bell.0, &1u64.to_ne_bytes());
    }
}

impl Bell {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(crate) fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An eventfd of the front-end that is written to.
pub(crate) struct Call {
    fd: OwnedFd,
    /// A write may block. The eventfd is then polled before each write.
    blocks: bool,
}

impl Call {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let blocks = fcntl_getfl(&fd).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
        Self { fd, blocks }
    }

    /// Writes the eventfd. A full one is readable already, which is enough.
    pub(crate) fn ring(&self) {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if self.blocks
            && !poll(&mut [PollFd::new(&self.fd, PollFlags::OUT)], Some(&now))
                .is_ok_and(|ready| ready > 0)
        {
            return;
        }
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }
}

/// Polls `future` to its end on this thread, also inside another executor.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let (mut future, mut cx) = (pin!(future), Context::from_waker(&waker));
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return output;
        }
        std::thread::park();
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
