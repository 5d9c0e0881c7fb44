//! An io_uring of one thread, and the only place where the kernel is handed memory.
//!
//! What the kernel may touch is in the slot of its operation, not in the future that waits for it.
//! The slot is freed when the kernel has completed the operation. So a future may be dropped at any
//! time; the guest's memory stays in flight until the kernel is done with it.

use io_uring::types::{Fd, FsyncFlags, Timespec};
use io_uring::{IoUring, opcode, squeue};
use shootdown_vhost::{AccessError, Chain};
use slab::Slab;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Submissions that fit into the queue before it is handed to the kernel.
const ENTRIES: u32 = 256;
/// As many parts one `readv` has at most (UIO_MAXIOV).
const PARTS: usize = 1024;
/// The completion of a cancellation, which nobody waits for.
const NOBODY: u64 = u64::MAX;

/// Handles of one io_uring.
#[derive(Clone)]
pub struct Uring(Rc<Inner>);

struct Inner {
    uring: RefCell<IoUring>,
    slots: RefCell<Slab<Slot>>,
}

struct Slot {
    state: State,
    held: Held,
}

enum State {
    /// The kernel has it.
    Pending(Option<Waker>),
    /// The kernel has it, and nobody waits.
    Dropped,
    Done(i32),
}

/// What the kernel reads or writes until an operation is complete. Moving it moves none of that.
#[derive(Default)]
#[expect(dead_code, reason = "it is kept for the kernel")]
struct Held {
    fd: Option<Arc<OwnedFd>>,
    chain: Option<Rc<Chain>>,
    parts: Vec<libc::iovec>,
    time: Option<Box<Timespec>>,
}

/// An operation that the kernel has, or is to have with the next [`Uring::enter`].
struct Operation {
    inner: Rc<Inner>,
    key: usize,
    done: bool,
}

impl Uring {
    pub fn new() -> io::Result<Self> {
        let inner =
            Inner { uring: RefCell::new(IoUring::new(ENTRIES)?), slots: RefCell::default() };
        Ok(Self(Rc::new(inner)))
    }

    /// Reads from `offset` of the file into `range` of what the chain may write: how many bytes it
    /// were, which may be less.
    pub async fn read(
        &self,
        file: &Arc<OwnedFd>,
        chain: &Rc<Chain>,
        range: Range<usize>,
        offset: u64,
    ) -> io::Result<usize> {
        let parts = parts(chain.writable().iovecs(range))?;
        let (at, count) = (parts.as_ptr(), parts.len() as u32);
        let entry = opcode::Readv::new(Fd(file.as_raw_fd()), at, count).offset(offset).build();
        self.start(
            entry,
            Held { fd: Some(file.clone()), chain: Some(chain.clone()), parts, time: None },
        )?
        .await
    }

    /// Writes `range` of what the chain may read to `offset` of the file: how many bytes it were,
    /// which may be less.
    pub async fn write(
        &self,
        file: &Arc<OwnedFd>,
        chain: &Rc<Chain>,
        range: Range<usize>,
        offset: u64,
    ) -> io::Result<usize> {
        let parts = parts(chain.readable().iovecs(range))?;
        let (at, count) = (parts.as_ptr(), parts.len() as u32);
        let entry = opcode::Writev::new(Fd(file.as_raw_fd()), at, count).offset(offset).build();
        self.start(
            entry,
            Held { fd: Some(file.clone()), chain: Some(chain.clone()), parts, time: None },
        )?
        .await
    }

    /// All that has been written to the file is on its disk.
    pub async fn sync(&self, file: &Arc<OwnedFd>) -> io::Result<()> {
        let entry = opcode::Fsync::new(Fd(file.as_raw_fd())).flags(FsyncFlags::DATASYNC).build();
        self.start(entry, Held { fd: Some(file.clone()), ..Held::default() })?.await.map(drop)
    }

    pub async fn fallocate(
        &self,
        file: &Arc<OwnedFd>,
        range: Range<u64>,
        mode: libc::c_int,
    ) -> io::Result<()> {
        let entry = opcode::Fallocate::new(Fd(file.as_raw_fd()), range.end - range.start)
            .offset(range.start)
            .mode(mode)
            .build();
        self.start(entry, Held { fd: Some(file.clone()), ..Held::default() })?.await.map(drop)
    }

    /// Waits until there is something to read.
    pub async fn readable(&self, fd: &Arc<OwnedFd>) -> io::Result<()> {
        let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), libc::POLLIN as u32).build();
        self.start(entry, Held { fd: Some(fd.clone()), ..Held::default() })?.await.map(drop)
    }

    pub async fn sleep(&self, duration: Duration) -> io::Result<()> {
        let time = Box::new(Timespec::from(duration));
        let entry = opcode::Timeout::new(&raw const *time).build();
        match self.start(entry, Held { time: Some(time), ..Held::default() })?.await {
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            other => other.map(drop),
        }
    }

    /// `entry` refers to nothing but `held` has it.
    fn start(&self, entry: squeue::Entry, held: Held) -> io::Result<Operation> {
        let inner = &self.0;
        let key = inner.slots.borrow_mut().insert(Slot { state: State::Pending(None), held });
        let pushed = inner.push(&entry.user_data(key as u64));
        if pushed.is_err() {
            let slot = inner.slots.borrow_mut().remove(key);
            drop(slot);
        }
        pushed.map(|()| Operation { inner: inner.clone(), key, done: false })
    }

    /// Submits what has been started, and waits until `want` operations are complete, or more.
    pub fn enter(&self, want: usize) -> io::Result<()> {
        self.0.enter(want)
    }

    /// Wakes whoever waits for what is complete.
    pub fn reap(&self) {
        self.0.reap();
    }
}

/// The first parts, as many as one operation has.
fn parts(all: Result<Vec<libc::iovec>, AccessError>) -> io::Result<Vec<libc::iovec>> {
    let mut parts = all.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    parts.truncate(PARTS);
    Ok(parts)
}

impl Inner {
    /// Every entry comes from this module: [`Uring::start`], or a cancellation, which has no
    /// memory.
    ///
    /// The kernel touches what an entry refers to until the operation is complete: a descriptor,
    /// the guest's memory, a list of its parts or a time. All of them are in the slot of the
    /// operation (`Held`): the parts and the time on the heap, the memory in the mappings of a
    /// chain. The slot is removed in `reap` only, when the kernel has said that it is complete, or
    /// here above if it was never pushed. `Drop` waits for all slots, or leaks them.
    fn push(&self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: what the entry refers to is valid until its completion has been reaped, as
            // above.
            let pushed = unsafe { self.uring.borrow_mut().submission().push(entry) };
            if pushed.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
    }

    fn enter(&self, want: usize) -> io::Result<()> {
        if want == 0 && self.uring.borrow_mut().submission().is_empty() {
            return Ok(());
        }
        loop {
            let entered = self.uring.borrow().submit_and_wait(want);
            match entered.map_err(|error| (error.raw_os_error(), error)) {
                Ok(_) => return Ok(()),
                Err((Some(libc::EINTR), _)) => {}
                // There is no room for completions until some have been taken.
                Err((Some(libc::EBUSY | libc::EAGAIN), _)) if self.reap() > 0 => return Ok(()),
                Err((Some(libc::EBUSY | libc::EAGAIN), _)) => std::thread::yield_now(),
                Err((_, error)) => return Err(error),
            }
        }
    }

    /// Says how many were complete.
    fn reap(&self) -> usize {
        let mut count = 0;
        loop {
            // Nothing is borrowed while foreign code runs.
            let next = self.uring.borrow_mut().completion().next();
            let Some(entry) = next else { return count };
            count += 1;
            if entry.user_data() != NOBODY {
                let (held, waker) = self.complete(entry.user_data() as usize, entry.result());
                drop(held);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
        }
    }

    /// What the kernel has let go of, and who waits for that.
    fn complete(&self, key: usize, result: i32) -> (Held, Option<Waker>) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[key];
        match std::mem::replace(&mut slot.state, State::Done(result)) {
            State::Pending(waker) => (std::mem::take(&mut slot.held), waker),
            State::Dropped | State::Done(_) => (slots.remove(key).held, None),
        }
    }
}

impl Drop for Inner {
    /// All futures are gone, so all that is left is of the kernel.
    fn drop(&mut self) {
        while !self.slots.get_mut().is_empty() {
            if let Err(error) = self.enter(1) {
                tracing::error!(%error, "operations that cannot be waited for keep the guest's memory for ever");
                std::mem::forget(self.slots.take());
                return;
            }
            self.reap();
        }
    }
}

impl Future for Operation {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let inner = self.inner.clone();
        let mut slots = inner.slots.borrow_mut();
        let slot = &mut slots[self.key];
        if let State::Done(result) = slot.state {
            slots.remove(self.key);
            self.done = true;
            return Poll::Ready(
                usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)),
            );
        }
        if let State::Pending(waker) = &mut slot.state
            && !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut slots = self.inner.slots.borrow_mut();
        if let State::Done(_) = slots[self.key].state {
            slots.remove(self.key);
            return;
        }
        let former = std::mem::replace(&mut slots[self.key].state, State::Dropped);
        drop((slots, former));
        // Polls and timeouts end so; reads and writes end by themselves.
        let cancel = opcode::AsyncCancel::new(self.key as u64).build().user_data(NOBODY);
        if let Err(error) = self.inner.push(&cancel) {
            tracing::warn!(%error, "an operation cannot be cancelled");
        }
    }
}
