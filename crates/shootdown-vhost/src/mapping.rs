//! Guest memory that is in flight.
#![forbid(unsafe_code)]

use crate::iotlb::{InFlight, Pieces};
use shootdown::{AddressRange, Subscription};
use std::fmt;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, Permissions, VolatileSlice};

/// A translation in use: the guest's memory of a range of I/O virtual addresses, mapped into this
/// process for as long as this exists, whatever becomes of the front-end's memory table.
///
/// An INVALIDATE that overlaps the range is answered when this has been dropped. So drop it when the
/// device has ended its access, and wait for nothing that needs a translation before that.
pub struct Mapping {
    pieces: Pieces,
    access: Permissions,
    registered: Subscription<InFlight>,
}

/// An access that a mapping refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// It goes beyond the end.
    #[error("{len} bytes at {offset} are outside of a mapping of {size} bytes")]
    Outside {
        /// The first byte, from the start of the mapping.
        offset: usize,
        /// How many bytes.
        len: usize,
        /// The size of the mapping.
        size: usize,
    },
    /// The mapping was not asked for with this access.
    #[error("the mapping allows {has:?} only")]
    NotAllowed {
        /// What it allows.
        has: Permissions,
    },
}

impl Mapping {
    pub(crate) fn new(registered: Subscription<InFlight>, access: Permissions) -> Self {
        Self { pieces: Pieces::new(), access, registered }
    }

    pub(crate) fn pieces_mut(&mut self) -> &mut Pieces {
        self.pieces.clear();
        &mut self.pieces
    }

    /// The I/O virtual addresses.
    pub fn range(&self) -> AddressRange {
        self.registered.range()
    }

    /// What it was asked for.
    pub fn access(&self) -> Permissions {
        self.access
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len).sum()
    }

    /// Whether there are none, which is never the case.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory, in order: as few slices as it has contiguous parts. The guest may change it at any
    /// time.
    pub fn slices(&self) -> impl ExactSizeIterator<Item = VolatileSlice<'_>> {
        self.pieces.iter().map(|piece| piece.region.slice(piece.offset, piece.len).expect("it was looked up there"))
    }

    /// Where the parts are in the guest's physical memory, and how long they are.
    pub(crate) fn guest_parts(&self) -> impl Iterator<Item = (u64, usize)> {
        self.pieces.iter().map(|piece| (piece.region.guest() + piece.offset as u64, piece.len))
    }

    /// Pointers for `readv`, `io_uring` and their kin. They are valid as long as the mapping exists: keep it until the kernel has
    /// completed the request.
    pub fn iovecs(&self) -> impl ExactSizeIterator<Item = libc::iovec> {
        self.slices().map(|slice| {
            let pointer = slice.ptr_guard_mut();
            libc::iovec { iov_base: pointer.as_ptr().cast(), iov_len: slice.len() }
        })
    }

    /// Copies from `offset` on into `into`.
    ///
    /// # Errors
    /// [`AccessError`] when it goes beyond the end, or when the mapping is for writes only. Nothing
    /// is copied then.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), AccessError> {
        self.check(offset, into.len(), Permissions::Read)?;
        self.each(offset, into.len(), |slice, at| {
            slice.copy_to(&mut into[at..at + slice.len()]);
        });
        Ok(())
    }

    /// Copies `from` to `offset`.
    ///
    /// # Errors
    /// [`AccessError`] when it goes beyond the end, or when the mapping is for reads only. Nothing
    /// is copied then.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), AccessError> {
        self.check(offset, from.len(), Permissions::Write)?;
        self.each(offset, from.len(), |slice, at| slice.copy_from(&from[at..at + slice.len()]));
        Ok(())
    }

    /// Loads the little-endian number at `offset`, with acquire ordering: what was written before it
    /// is seen.
    ///
    /// # Errors
    /// As for [`read`](Self::read), and when it is not aligned in memory or not contiguous.
    pub fn load_u16(&self, offset: usize) -> Result<u16, AccessError> {
        self.check(offset, 2, Permissions::Read)?;
        let loaded = self.contiguous(offset, 2).and_then(|slice| slice.load(0, std::sync::atomic::Ordering::Acquire).ok());
        loaded.map(u16::from_le).ok_or(self.outside(offset, 2))
    }

    /// Stores a little-endian number at `offset`, with release ordering: who sees it sees what was
    /// written before.
    ///
    /// # Errors
    /// As for [`write`](Self::write), and when it is not aligned in memory or not contiguous.
    pub fn store_u16(&self, offset: usize, value: u16) -> Result<(), AccessError> {
        self.check(offset, 2, Permissions::Write)?;
        let slice = self.contiguous(offset, 2).ok_or(self.outside(offset, 2))?;
        slice.store(value.to_le(), 0, std::sync::atomic::Ordering::Release).map_err(|_| self.outside(offset, 2))
    }

    fn check(&self, offset: usize, len: usize, access: Permissions) -> Result<(), AccessError> {
        if !self.access.allow(access) {
            return Err(AccessError::NotAllowed { has: self.access });
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(self.outside(offset, len)),
        }
    }

    fn outside(&self, offset: usize, len: usize) -> AccessError {
        AccessError::Outside { offset, len, size: self.len() }
    }

    /// Calls `f` for each contiguous part of a range that is inside, with how far it is from `offset`.
    fn each(&self, offset: usize, len: usize, mut f: impl FnMut(VolatileSlice<'_>, usize)) {
        let (mut skip, mut done) = (offset, 0);
        for slice in self.slices() {
            let here = slice.len().saturating_sub(skip).min(len - done);
            if here > 0 {
                f(part(&slice, skip, here), done);
                done += here;
            }
            skip = skip.saturating_sub(slice.len());
        }
    }

    fn contiguous(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        let mut at = 0;
        for slice in self.slices() {
            if offset >= at && offset + len <= at + slice.len() {
                return slice.subslice(offset - at, len).ok();
            }
            at += slice.len();
        }
        None
    }
}

fn part<'a, B: BitmapSlice>(slice: &VolatileSlice<'a, B>, offset: usize, len: usize) -> VolatileSlice<'a, B> {
    slice.subslice(offset, len).expect("it is inside")
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
