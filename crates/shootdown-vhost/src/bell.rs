//! Wakes a thread out of `poll`.
#![forbid(unsafe_code)]

use futures::task::ArcWake;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

pub(crate) struct Bell(OwnedFd);

impl ArcWake for Bell {
    fn wake_by_ref(bell: &Arc<Self>) {
        // Full: then the thread wakes up anyway.
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
