//! Runs one future on the calling thread. All that it waits for meets in one place: the thread
//! sleeps in the io_uring, and a waker of another thread writes to an eventfd that is polled there.
#![forbid(unsafe_code)]

use crate::uring::Uring;
use futures::task::{ArcWake, noop_waker_ref, waker};
use rustix::event::{EventfdFlags, eventfd};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

/// The future has been polled after the last wake-up, or is about to be.
const AWAKE: u8 = 0;
/// It is to be polled again.
const WOKEN: u8 = 1;
/// The thread sleeps, or is about to.
const ASLEEP: u8 = 2;

struct Bell {
    state: AtomicU8,
    fd: Arc<OwnedFd>,
}

impl ArcWake for Bell {
    fn wake_by_ref(bell: &Arc<Self>) {
        if bell.state.swap(WOKEN, Ordering::AcqRel) == ASLEEP {
            // Full: then the thread wakes up anyway.
            let _ = rustix::io::write(&bell.fd, &1u64.to_ne_bytes());
        }
    }
}

/// # Errors
/// The kernel refuses the io_uring.
pub fn run<T>(uring: &Uring, future: impl Future<Output = T>) -> io::Result<T> {
    let fd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let bell = Arc::new(Bell { state: AtomicU8::new(AWAKE), fd: fd.clone() });
    let waker = waker(bell.clone());
    let mut future = pin!(future);
    let mut rung = Box::pin(uring.readable(&fd));
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Ok(output);
        }
        // Once for each time it rings. The loop goes round anyway then, so no waker is needed.
        while let Poll::Ready(ready) =
            rung.as_mut().poll(&mut Context::from_waker(noop_waker_ref()))
        {
            ready?;
            let _ = rustix::io::read(&fd, &mut [0; 8]);
            rung.set(uring.readable(&fd));
        }
        let sleeps =
            bell.state.compare_exchange(AWAKE, ASLEEP, Ordering::AcqRel, Ordering::Acquire).is_ok();
        uring.enter(usize::from(sleeps))?;
        // Whatever is woken from here on is polled next, without a ring of the bell.
        bell.state.store(AWAKE, Ordering::Release);
        uring.reap();
        bell.state.swap(AWAKE, Ordering::AcqRel);
    }
}
