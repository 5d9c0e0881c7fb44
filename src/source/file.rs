//! The descriptor behind shared memory: which part of the file is mapped, and how long the file is.
#![forbid(unsafe_code)]

use super::mapping::MapError;
use super::sys::page_size;
use core::ops::Range;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    FallocateFlags, MemfdFlags, StatFs, fallocate, fstat, fstatfs, ftruncate, memfd_create,
};
use rustix::io;

/// Type that `statfs` returns for hugetlbfs. Its files are mapped in huge pages.
const HUGETLBFS: u64 = 0x9584_58f6;

/// A file that a mapping shows a part of.
pub(super) struct File {
    fd: OwnedFd,
    /// Offset of the mapping in the file.
    offset: u64,
    /// Page size of the file in bytes: offsets and lengths are multiples of it.
    unit: usize,
    /// The library made the file. Its length is then that of the mapping.
    ours: bool,
}

impl File {
    /// Makes an unnamed file of `len` bytes in memory.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let fd = memfd_create("shootdown", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, len as u64)?;
        Ok(Self { fd, offset: 0, unit: page_size(), ours: true })
    }

    /// Takes a descriptor of the program for a mapping of `len` bytes from `offset` on. Also
    /// returns the length in whole pages.
    pub(super) fn adopt(fd: OwnedFd, offset: u64, len: usize) -> Result<(Self, usize), MapError> {
        let unit = fstatfs(&fd).map_or_else(|_| page_size(), |system| unit_of(&system));
        let mut file = Self { fd, offset, unit, ours: false };
        let whole = len
            .checked_next_multiple_of(unit)
            .filter(|whole| *whole != 0 && offset.is_multiple_of(unit as u64));
        let whole = whole.ok_or_else(|| file.not_pages(len))?;
        file.resize(whole)?;
        Ok((file, whole))
    }

    fn not_pages(&self, len: usize) -> MapError {
        let start = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let size = fstat(&self.fd).map_or(0, |stat| stat.st_size as usize);
        MapError::NotPages {
            part: Range { start, end: start.saturating_add(len) },
            len: size,
            page: self.unit,
        }
    }

    /// Returns a file for a new mapping of `len` bytes: a duplicate of the program's descriptor, or
    /// a new file.
    pub(super) fn again(&self, len: usize) -> io::Result<Self> {
        if self.ours {
            return Self::new(len);
        }
        Ok(Self {
            fd: self
                .fd
                .try_clone()
                .map_err(|error| io::Errno::from_io_error(&error).unwrap_or(io::Errno::MFILE))?,
            ..*self
        })
    }

    /// Makes the file long enough for a mapping of `len` bytes, if the library made it. Otherwise
    /// checks that it is long enough.
    pub(super) fn resize(&mut self, len: usize) -> Result<(), MapError> {
        let end = self.offset.checked_add(len as u64).ok_or_else(|| self.not_pages(len))?;
        if self.ours {
            return ftruncate(&self.fd, end).map_err(|error| MapError::Os(error.into()));
        }
        let size = fstat(&self.fd).map_err(|error| MapError::Os(error.into()))?.st_size as u64;
        // The rest of the last page is accessible, and zero.
        match size.next_multiple_of(self.unit as u64) >= end {
            true => Ok(()),
            false => Err(MapError::BeyondEnd { end, size }),
        }
    }

    /// Discards a part of the file, for every mapping of it.
    pub(super) fn punch(&self, offset: usize, len: usize) -> io::Result<()> {
        fallocate(
            &self.fd,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            self.offset + offset as u64,
            len as u64,
        )
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn unit(&self) -> usize {
        self.unit
    }
}

/// Returns the page size of files of a file system. Its block size is another thing, except in
/// hugetlbfs.
fn unit_of(system: &StatFs) -> usize {
    // Some processors have a signed type, of which 32 bits count.
    if system.f_type as u64 & 0xffff_ffff == HUGETLBFS {
        system.f_bsize as usize
    } else {
        page_size()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_in_hugetlbfs_a_page_is_a_block() {
        let file = File::new(1).unwrap();
        let mut system = fstatfs(file.fd()).unwrap();
        for block in [512, 2 << 20] {
            system.f_bsize = block;
            assert_eq!(unit_of(&system), page_size());
        }
        system.f_type = HUGETLBFS as _;
        assert_eq!(unit_of(&system), 2 << 20);
    }
}
