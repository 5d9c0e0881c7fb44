//! The step that reads events: no lock, no memory.
#![forbid(unsafe_code)]

use super::{Inner, ring, wait};
use crate::source::ring::Change;
use crate::source::sys::uffd;
use crate::sync::{Arc, Ordering};
use linux_raw_sys::general as raw;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;

/// Messages that are read at once.
const AT_ONCE: usize = 16;

/// Reads the kernel's events. Threads that unmap watched memory wait for it, so it waits for nobody: no lock, no memory.
///
/// [`run`](Self::run) it on a thread of its own, or wait for its descriptor ([`AsFd`]) to be readable and [`read`](Self::read). While nobody does either,
/// threads that unmap watched memory hang. Dropping it ends all watches and reads what is left, so they go on; that is still to be delivered.
#[derive(Debug)]
pub struct Reader {
    pub(super) inner: Arc<Inner>,
    pub(super) fd: Arc<OwnedFd>,
}

impl Reader {
    /// Reads what there is, without waiting; returns how many events that were. They are then to be [delivered](crate::source::Deliveries::deliver); readers
    /// of the space wait until that has begun.
    ///
    /// # Errors
    /// What `read` returns. `WouldBlock` is not an error: 0 events.
    pub fn read(&mut self) -> std::io::Result<usize> {
        self.inner.shared().close_gate();
        let read = self.read_all();
        // The events before the turn: who takes the turn finds them all.
        self.inner.turns.fetch_add(1, Ordering::AcqRel);
        ring(&self.inner.bell);
        if self.inner.orphaned.load(Ordering::Acquire) {
            // Nobody will deliver them: what is left is that readers do not wait for ever.
            self.inner.open();
        }
        read
    }

    fn read_all(&self) -> std::io::Result<usize> {
        let mut buffer = [0; AT_ONCE * uffd::MESSAGE];
        let mut events = 0;
        loop {
            let bytes = match rustix::io::read(&*self.fd, &mut buffer) {
                Ok(bytes) => bytes,
                Err(Errno::AGAIN) => return Ok(events),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let (messages, _) = buffer[..bytes].as_chunks::<{ uffd::MESSAGE }>();
            for message in messages {
                events += 1;
                if let Some(change) = parse(message) {
                    self.inner.ring.put(change);
                }
            }
            if messages.len() < AT_ONCE {
                return Ok(events);
            }
        }
    }

    /// Reads on this thread until [`Uffd::stop`](crate::source::Uffd::stop).
    ///
    /// # Errors
    /// What `poll` and `read` return.
    pub fn run(&mut self) -> std::io::Result<()> {
        loop {
            let [readable, stopped] = wait([self.fd.as_fd(), self.inner.stop.as_fd()])?;
            if readable {
                self.read()?;
            }
            if stopped {
                return Ok(());
            }
        }
    }
}

/// One message of the kernel. A fork's descriptor, which would tell of the child's memory, is closed.
fn parse(message: &[u8; uffd::MESSAGE]) -> Option<Change> {
    let (words, _) = message.as_chunks::<8>();
    let word = |at: usize| words.get(at).map_or(0, |word| u64::from_ne_bytes(*word));
    match u32::from(message[0]) {
        raw::UFFD_EVENT_UNMAP => Some(Change::Unmap(word(1), word(2))),
        raw::UFFD_EVENT_REMOVE => Some(Change::Remove(word(1), word(2))),
        raw::UFFD_EVENT_REMAP => Some(Change::Remap(word(1), word(2), word(3))),
        raw::UFFD_EVENT_FORK => {
            let [a, b, c, d, ..] = words[1];
            drop(uffd::adopt(u32::from_ne_bytes([a, b, c, d])));
            Some(Change::Fork)
        }
        // Page faults are not asked for.
        _ => None,
    }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl std::os::fd::AsRawFd for Reader {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&*self.fd)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Who has the table allocates, and so may be inside `munmap` and wait for this reader.
        loop {
            if let Some(mut table) = self.inner.try_table() {
                break table.close();
            }
            let _ = self.read();
            std::thread::yield_now();
        }
        // Nothing is watched any more, but a change may be under way whose event has to be read. To close the descriptor would not be enough: a thread
        // inside `fork` waits for us, and its child, half made, has a copy of the descriptor.
        while self.read().is_ok() && uffd::changing(&self.fd) {
            std::thread::yield_now();
        }
    }
}
