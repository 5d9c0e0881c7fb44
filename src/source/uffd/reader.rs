//! The step that reads events: no lock, no memory.
#![forbid(unsafe_code)]

use super::watch::Table;
use super::{Inner, ring, wait};
use crate::engine::gate::Closings;
use crate::range::AddressRange;
use crate::source::ring::Change;
use crate::source::sys::uffd;
use crate::sync::{Arc, Ordering};
use core::time::Duration;
use linux_raw_sys::general as raw;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use std::time::Instant;

/// Messages that are read at once.
const AT_ONCE: usize = 16;

/// How long a change waits for the delivery of those before it.
const MOMENT: Duration = Duration::from_micros(50);

/// So many times as long at most, while drivers are told.
const MOMENTS: u64 = 100;

/// Reads the kernel's events. Threads that unmap watched memory wait for it, so it waits for
/// nobody: no lock, no memory.
///
/// [`run`](Self::run) it on a thread of its own, or wait for its descriptor ([`AsFd`]) to be
/// readable and [`read`](Self::read). While nobody does either, threads that unmap watched memory
/// hang.
///
/// Dropping it ends all watches and reads what is left, so that those threads go on; all that was
/// watched is invalidated by the next delivery, and until then readers of the space wait (M3). In a
/// child of `fork` dropping it does nothing.
#[derive(Debug)]
#[must_use = "dropping the reader ends all watches and invalidates what was watched: run it"]
pub struct Reader {
    pub(super) inner: Arc<Inner>,
    pub(super) fd: Arc<OwnedFd>,
    /// Kept open, so that a descriptor is free when a fork's event brings one.
    pub(super) reserve: Option<OwnedFd>,
    /// Being dropped: nothing is watched any more.
    pub(super) ending: bool,
    /// Invalidations that had been started when it last waited for the delivery.
    pub(super) told: u64,
}

impl Reader {
    /// Reads what there is, without waiting; returns how many events that were. They are then to be
    /// [delivered](crate::source::Deliveries::deliver); readers of the space wait until that has
    /// begun. While a delivery of what was read before is under way it is given some time first,
    /// for 50 µs, or 5 ms if drivers are being told.
    ///
    /// # Errors
    /// What `read` returns, but not for want of data (0 events) or of a descriptor for a fork's
    /// event (one is kept in reserve; while another thread has taken that, everything watched
    /// is invalidated, and the event is read by the next call). In a child of `fork`,
    /// [`UffdError::Forked`](super::UffdError::Forked).
    pub fn read(&mut self) -> std::io::Result<usize> {
        self.inner.check()?;
        self.let_readers_go_on();
        let closing = self.inner.shared().close_gate();
        let read = self.read_all();
        self.end_turn(closing);
        if self.inner.orphaned.load(Ordering::Acquire) {
            // Nobody will deliver them: what is left is that readers do not wait for ever. Not
            // while a change is under way, whose thread may hold a lock that a driver needs.
            while uffd::changing(&self.fd) {
                let _ = self.read_all();
                std::thread::yield_now();
            }
            self.inner.open();
        }
        read
    }

    /// Gives a delivery that is under way a moment to open the gate, and readers one to go on and
    /// to check: without that a storm of changes has the gate closed again before it was opened. As
    /// long as drivers are told, the more the longer it is behind, so that it does not fall behind
    /// further; but if none is, the thread inside the change may hold a lock that a driver needs.
    fn let_readers_go_on(&mut self) {
        let gate = &self.inner.shared().gate;
        let behind = gate.closings().min(MOMENTS);
        if behind == 0 {
            return;
        }
        let told = self.inner.told.load(Ordering::Relaxed);
        let goes_on = core::mem::replace(&mut self.told, told) != told;
        let most = if goes_on { MOMENT * u32::try_from(behind).unwrap_or(1) } else { MOMENT };
        let began = Instant::now();
        while gate.has_closings() && began.elapsed() < most {
            std::thread::yield_now();
        }
        if !gate.has_closings() {
            let closed = began.elapsed();
            while began.elapsed() < closed + closed.min(MOMENT) {
                std::thread::yield_now();
            }
        }
    }

    /// Takes the table's lock, and reads meanwhile: who has it allocates, and so may be inside
    /// `munmap` and wait for this reader.
    fn with_table(&mut self, change: impl FnOnce(&mut Table)) {
        loop {
            if let Some(mut table) = self.inner.try_table() {
                return change(&mut table);
            }
            let _ = self.read_all();
            std::thread::yield_now();
        }
    }

    /// Has the next delivery open the gate that was closed.
    fn end_turn(&self, closing: Closings) {
        // The events before the turn: who takes the turn finds them all.
        self.inner.turns.fetch_add(closing.into_bits(), Ordering::AcqRel);
        ring(&self.inner.bell);
    }

    fn read_all(&mut self) -> std::io::Result<usize> {
        let mut buffer = [0; AT_ONCE * uffd::MESSAGE];
        let mut events = 0;
        loop {
            let bytes = match rustix::io::read(&*self.fd, &mut buffer) {
                Ok(bytes) => bytes,
                Err(Errno::AGAIN) => return Ok(events),
                Err(Errno::INTR) => continue,
                Err(Errno::MFILE | Errno::NFILE) => {
                    // A fork's event brings a descriptor, and there is none left: that of the
                    // reserve is.
                    if self.reserve.take().is_some() {
                        continue;
                    }
                    self.inner.ring.overflow();
                    std::thread::yield_now();
                    self.refill();
                    return Ok(events);
                }
                Err(error) => return Err(error.into()),
            };
            let (messages, _) = buffer[..bytes].as_chunks::<{ uffd::MESSAGE }>();
            for message in messages {
                events += 1;
                if let Some(change) = self.parse(message) {
                    self.inner.ring.put(change);
                }
            }
            self.inner.events.fetch_add(messages.len() as u64, Ordering::Relaxed);
            self.refill();
            if messages.len() < AT_ONCE {
                return Ok(events);
            }
        }
    }

    fn refill(&mut self) {
        if self.reserve.is_none() {
            self.reserve = fcntl_dupfd_cloexec(&self.inner.bell, 0).ok();
        }
    }

    /// Reads one message of the kernel. The descriptor of a fork, which would tell of the child's
    /// memory, is closed.
    fn parse(&self, message: &[u8; uffd::MESSAGE]) -> Option<Change> {
        let (words, _) = message.as_chunks::<8>();
        let word = |at: usize| words.get(at).map_or(0, |word| u64::from_ne_bytes(*word));
        match u32::from(message[0]) {
            raw::UFFD_EVENT_UNMAP => Some(Change::Unmap(word(1), word(2))),
            raw::UFFD_EVENT_REMOVE => Some(self.mark(word(1), word(2))),
            raw::UFFD_EVENT_REMAP => {
                if self.ending
                    && let Ok(moved) = AddressRange::new(word(2), word(3))
                {
                    // Nobody will read of it there.
                    let _ = uffd::unregister(&self.fd, moved);
                }
                Some(Change::Remap(word(1), word(2), word(3)))
            }
            raw::UFFD_EVENT_FORK => {
                let [a, b, c, d, ..] = words[1];
                drop(uffd::adopt(u32::from_ne_bytes([a, b, c, d])));
                Some(Change::Fork)
            }
            // Page faults are not asked for.
            _ => None,
        }
    }

    /// Marks the pages that are about to go, before the thread that drops them has come far (M5).
    fn mark(&self, start: u64, end: u64) -> Change {
        let pagemap = self.inner.pagemap.as_ref().filter(|_| self.inner.promises.discards);
        let marked = match (pagemap, AddressRange::new(start, end.wrapping_sub(start))) {
            (Some(pagemap), Ok(range)) => pagemap.mark(range).is_ok(),
            (pagemap, _) => pagemap.is_none(),
        };
        if marked { Change::Remove(start, end) } else { Change::Unseen(start, end) }
    }

    /// Reads on this thread until [`Uffd::stop`](crate::source::Uffd::stop).
    ///
    /// # Errors
    /// What `poll` and [`read`](Self::read) return.
    pub fn run(&mut self) -> std::io::Result<()> {
        self.inner.check()?;
        self.inner.reading.store(true, Ordering::Release);
        let _ends = Ends(self.inner.clone());
        loop {
            let [readable, stopped] = wait([self.fd.as_fd(), self.inner.stop.as_fd()], None)?;
            if readable {
                self.read()?;
            }
            if stopped {
                return Ok(());
            }
        }
    }
}

/// Says that nobody is in [`Reader::run`] any more.
struct Ends(Arc<Inner>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.reading.store(false, Ordering::Release);
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
        if self.inner.is_forked() {
            return;
        }
        // From here on nothing is found that changes may make stale (M3).
        let closing = self.inner.shared().close_gate();
        self.ending = true;
        self.with_table(Table::close);
        // Nothing is watched any more, but a change may be under way whose event has to be read. To
        // close the descriptor would not be enough: a thread inside `fork` waits for us, and its
        // child, half made, has a copy of the descriptor.
        while self.read_all().is_ok() && uffd::changing(&self.fd) {
            std::thread::yield_now();
        }
        // The kernel forgets whatever is left, once the descriptor is closed: that of memory that
        // has grown or was moved meanwhile.
        self.with_table(Table::forget_descriptor);
        self.inner.ring.overflow();
        self.end_turn(closing);
        if self.inner.orphaned.load(Ordering::Acquire) {
            self.inner.open();
        }
    }
}
