//! Guest memory in flight.
#![forbid(unsafe_code)]

use crate::in_flight::InFlight;
use crate::parts::Parts;
use shootdown::{AddressRange, Subscription};
use std::fmt;
use vm_memory::{Permissions, VolatileSlice};

/// A translation in use: the guest memory of a range of I/O virtual addresses. It stays mapped into
/// this process while this exists, whatever happens to the front-end's memory table (V5).
/// [`Iotlb::map`](crate::Iotlb::map) returns it.
///
/// An INVALIDATE that overlaps the range is answered when this has been dropped (V1). So drop it
/// when the device has ended its access, and do not wait for another translation before.
pub struct Mapping {
    parts: Parts,
    access: Permissions,
    registered: Subscription<InFlight>,
}

/// An access that a mapping refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// The access goes beyond the end.
    #[error("{len} bytes at {offset} are outside of a mapping of {size} bytes")]
    Outside {
        /// First byte, as an offset in the mapping.
        offset: usize,
        /// Number of bytes.
        len: usize,
        /// Size of the mapping.
        size: usize,
    },
    /// The mapping was not requested for this access.
    #[error("the mapping allows {has:?} only")]
    NotAllowed {
        /// The permitted access.
        has: Permissions,
    },
}

impl Mapping {
    pub(crate) fn new(registered: Subscription<InFlight>, access: Permissions) -> Self {
        Self { parts: Parts::default(), access, registered }
    }

    pub(crate) fn parts_mut(&mut self) -> &mut Parts {
        &mut self.parts
    }

    /// Returns the I/O virtual addresses.
    pub fn range(&self) -> AddressRange {
        self.registered.range()
    }

    /// Returns the permitted access.
    pub fn access(&self) -> Permissions {
        self.access
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.parts.len()
    }

    /// Returns `false`: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the memory in order, with one slice for each contiguous part. The guest may change
    /// it at any time.
    pub fn slices(&self) -> impl ExactSizeIterator<Item = VolatileSlice<'_>> {
        self.parts.slices()
    }

    /// Returns the guest's physical address and the length of each part.
    pub(crate) fn guest_parts(&self) -> impl Iterator<Item = (u64, usize)> {
        self.parts
            .pieces()
            .iter()
            .map(|piece| (piece.region.guest() + piece.offset as u64, piece.len))
    }

    /// Returns pointers for `readv`, `io_uring` and the like. They are valid as long as the mapping
    /// exists: keep it until the kernel has completed the request.
    pub fn iovecs(&self) -> impl ExactSizeIterator<Item = libc::iovec> {
        self.slices().map(|slice| iovec(&slice))
    }

    /// Copies bytes from `offset` on into `into`.
    ///
    /// # Errors
    /// [`AccessError`] if it goes beyond the end or the mapping is for writes only. Nothing is
    /// copied then.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), AccessError> {
        self.check(Permissions::Read)?;
        self.parts.read(offset, into).ok_or(self.outside(offset, into.len()))
    }

    /// Copies `from` into the memory, from `offset` on.
    ///
    /// # Errors
    /// [`AccessError`] if it goes beyond the end or the mapping is for reads only. Nothing is
    /// copied then.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), AccessError> {
        self.check(Permissions::Write)?;
        self.parts.write(offset, from).ok_or(self.outside(offset, from.len()))
    }

    /// Adds pointers to `len` bytes at `offset`, which are inside.
    pub(crate) fn add_iovecs(&self, offset: usize, len: usize, all: &mut Vec<libc::iovec>) {
        self.parts.each(offset, len, |slice, _| all.push(iovec(&slice)));
    }

    fn check(&self, access: Permissions) -> Result<(), AccessError> {
        if self.access.allow(access) {
            Ok(())
        } else {
            Err(AccessError::NotAllowed { has: self.access })
        }
    }

    fn outside(&self, offset: usize, len: usize) -> AccessError {
        AccessError::Outside { offset, len, size: self.len() }
    }
}

fn iovec(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.registered.end();
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({}, {:?})", self.range(), self.access)
    }
}
