//! The device: an io_uring whose fixed buffers are registered one by one.

use crate::memory::{File, PAGE};
use io_uring::{IoUring, opcode, types};
use shootdown::AddressRange;
use shootdown::cache::{Device, StillRegistered};
use std::io;
use std::sync::Mutex;

/// A slot of the ring's table that has no buffer.
const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

pub struct Ring {
    uring: Mutex<IoUring>,
    free: Mutex<Vec<u32>>,
}

impl Ring {
    /// A ring with a table of `slots` fixed buffers, all empty (`IORING_REGISTER_BUFFERS2`,
    /// sparse), and one for the way from one to another.
    pub fn new(slots: usize) -> io::Result<Self> {
        let say = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!(
                    "io_uring cannot be used ({error}): see the sysctl kernel.io_uring_disabled"
                ),
            )
        };
        let slots = slots as u32 + 1;
        let uring = IoUring::new(8).map_err(say)?;
        uring.submitter().register_buffers_sparse(slots).map_err(say)?;
        Ok(Self { uring: Mutex::new(uring), free: Mutex::new((0..slots).rev().collect()) })
    }

    fn update(&self, slot: u32, buffer: libc::iovec) -> io::Result<()> {
        let uring = self.uring.lock().unwrap();
        // SAFETY: the kernel pins the pages itself; what happens when the program unmaps them is
        // what this example is about.
        unsafe { uring.submitter().register_buffers_update(slot, &[buffer], None) }
    }

    /// Reads a block of the file through a fixed buffer, to the address that it was registered for,
    /// and waits for it.
    pub fn read(&self, file: &File, block: u64, slot: u32, range: AddressRange) -> io::Result<()> {
        let mut uring = self.uring.lock().unwrap();
        let at = std::ptr::with_exposed_provenance_mut(range.start() as usize);
        let read = opcode::ReadFixed::new(types::Fd(file.fd()), at, PAGE as u32, slot as u16)
            .offset(block * PAGE as u64)
            .build();
        // SAFETY: the kernel writes to the pages that it has pinned for this slot, and this thread
        // waits for it.
        unsafe {
            uring.submission().push(&read).map_err(|error| io::Error::other(error.to_string()))?
        };
        uring.submit_and_wait(1)?;
        let done = uring
            .completion()
            .next()
            .ok_or_else(|| io::Error::other("the ring has lost a read"))?;
        match done.result() {
            length if length == PAGE as i32 => Ok(()),
            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            short => Err(io::Error::other(format!("{short} bytes were read instead of {PAGE}"))),
        }
    }
}

/// The ring's fixed buffers as what memory is registered with.
pub struct Fixed {
    pub ring: Ring,
}

impl Fixed {
    pub fn new(ring: Ring) -> Self {
        Self { ring }
    }
}

impl Device for Fixed {
    type Handle = u32;
    type Error = io::Error;

    async fn register(&self, range: AddressRange) -> io::Result<u32> {
        let slot = self
            .ring
            .free
            .lock()
            .unwrap()
            .pop()
            .ok_or_else(|| io::Error::other("the ring's table is full"))?;
        let base = std::ptr::with_exposed_provenance_mut(range.start() as usize);
        let buffer = libc::iovec { iov_base: base, iov_len: range.len().unwrap_or(0) as usize };
        match self.ring.update(slot, buffer) {
            Ok(()) => Ok(slot),
            Err(error) => {
                self.ring.free.lock().unwrap().push(slot);
                Err(error)
            }
        }
    }

    async fn deregister(
        &self,
        _range: AddressRange,
        slot: u32,
    ) -> Result<(), StillRegistered<u32, io::Error>> {
        self.ring.update(slot, EMPTY).map_err(|error| StillRegistered { handle: slot, error })?;
        self.ring.free.lock().unwrap().push(slot);
        Ok(())
    }
}
