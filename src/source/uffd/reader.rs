//! The reader of events. It takes no lock and does not allocate.
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

/// Number of messages read by one call.
const AT_ONCE: usize = 16;

/// Time that a change waits for an earlier delivery.
const MOMENT: Duration = Duration::from_micros(50);

/// Largest multiple of [`MOMENT`] that a change waits while drivers are being told.
const MOMENTS: u64 = 100;

/// Reads the kernel's events. Threads that unmap watched memory wait for the reader. So it never
/// waits for another thread: it takes no lock and does not allocate.
///
/// [`run`](Self::run) it on a thread of its own. Or wait until its descriptor ([`AsFd`]) is
/// readable, and call [`read`](Self::read). Without either, threads that unmap watched memory hang.
///
/// Its drop ends all watches and reads what is left, so that those threads go on. The next delivery
/// invalidates everything that was watched. Readers of the space wait until then (M3). In a child
/// of `fork` the drop does nothing.
#[derive(Debug)]
#[must_use = "dropping the reader ends all watches and invalidates what was watched: run it"]
pub struct Reader {
    pub(super) inner: Arc<Inner>,
    pub(super) fd: Arc<OwnedFd>,
    /// Kept open, so that a descriptor is free when the event of a fork brings one.
    pub(super) reserve: Option<OwnedFd>,
    /// The reader is being dropped, and nothing is watched any more.
    pub(super) ending: bool,
    /// Value of `Inner::told` at the last wait for a delivery.
    pub(super) told: u64,
}

impl Reader {
    /// Reads all pending events without waiting for more, and returns their number. Then
    /// [deliver](crate::source::Deliveries::deliver) them: readers of the space wait until that has
    /// begun.
    ///
    /// If an earlier delivery is under way, the call first gives it some time: 50 µs, or up to 5 ms
    /// while drivers are being told.
    ///
    /// # Errors
    /// Errors of `read`, with two exceptions. No pending event returns 0. A missing descriptor for
    /// the event of a fork is taken from a reserve; if another thread has taken that, everything
    /// watched is invalidated, and the next call reads the event. In a child of `fork`,
    /// [`UffdError::Forked`](super::UffdError::Forked).
    pub fn read(&mut self) -> std::io::Result<usize> {
        self.inner.check()?;
        self.let_readers_go_on();
        let closing = self.inner.shared().close_gate();
        let read = self.read_all();
        self.end_turn(closing);
        if self.inner.orphaned.load(Ordering::Acquire) {
            // There will be no delivery, and readers must not wait for ever. Waits for changes that
            // are under way first, because their threads may hold a lock that a driver needs.
            while uffd::changing(&self.fd) {
                let _ = self.read_all();
                std::thread::yield_now();
            }
            self.inner.open();
        }
        read
    }

    /// Gives a running delivery time to open the gate, and readers time to go on and to check.
    /// Otherwise a storm of changes closes the gate again before it was opened.
    ///
    /// While drivers are being told, the time grows with the number of closings, so that the
    /// delivery does not fall further behind. If no driver is being told, the thread inside the
    /// change may hold a lock that a driver needs, so the time is short.
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
            yield_for(began.elapsed().min(MOMENT));
        }
    }

    /// Locks the table, and reads meanwhile: the thread that holds the lock allocates, so it may be
    /// inside `munmap` and wait for this reader.
    fn with_table(&mut self, change: impl FnOnce(&mut Table)) {
        loop {
            if let Some(mut table) = self.inner.try_table() {
                return change(&mut table);
            }
            let _ = self.read_all();
            std::thread::yield_now();
        }
    }

    /// Makes the next delivery open the gate.
    fn end_turn(&self, closing: Closings) {
        // Events go into the ring before closings: a delivery that takes the closings finds their
        // events.
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
                    // The event of a fork brings a descriptor, and none is free. Frees the reserve
                    // for it.
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

    /// Parses one message of the kernel. Closes the descriptor of a fork, which would report
    /// changes of the child's memory.
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
                    // No delivery will unregister it at its new address.
                    let _ = uffd::unregister(&self.fd, moved);
                }
                Some(Change::Remap(word(1), word(2), word(3)))
            }
            raw::UFFD_EVENT_FORK => {
                let [a, b, c, d, ..] = words[1];
                drop(uffd::adopt(u32::from_ne_bytes([a, b, c, d])));
                Some(Change::Fork)
            }
            // Page faults are not requested.
            _ => None,
        }
    }

    /// Marks the pages that are about to go, before the calling thread has dropped many of them
    /// (M5).
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
    /// Errors of `poll` and of [`read`](Self::read).
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

/// Lets other threads go on for some time.
fn yield_for(time: Duration) {
    let began = Instant::now();
    while began.elapsed() < time {
        std::thread::yield_now();
    }
}

/// Records that no thread is in [`Reader::run`] any more.
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
        // M3: from here on no look-up finds anything that a change may make stale.
        let closing = self.inner.shared().close_gate();
        self.ending = true;
        self.with_table(Table::close);
        // Nothing is watched any more, but the event of a running change must still be read.
        // Closing the descriptor is not enough: a thread inside `fork` waits for this reader, and
        // its half-made child has a copy of the descriptor.
        while self.read_all().is_ok() && uffd::changing(&self.fd) {
            std::thread::yield_now();
        }
        // Once the descriptor is closed, the kernel forgets the remaining registrations: those of
        // memory that has grown or moved meanwhile.
        self.with_table(Table::forget_descriptor);
        self.inner.ring.overflow();
        self.end_turn(closing);
        if self.inner.orphaned.load(Ordering::Acquire) {
            self.inner.open();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_get_all_of_the_time() {
        let began = Instant::now();
        yield_for(MOMENT);
        assert!(began.elapsed() >= MOMENT);
    }
}
