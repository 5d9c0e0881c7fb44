//! Moves memory by copies, and replaces it by mapping over it: for systems without `mremap`.

use super::{Backing, Memory, RIGHTS, Refused};
use core::ptr;
use rustix::io;
use rustix::mm::{self, MapFlags, MprotectFlags};

impl Memory {
    /// Discards pages by mapping new ones, readable and writable, because `madvise` is only a hint.
    pub(in crate::source) fn discard(&mut self, offset: usize, len: usize) -> io::Result<()> {
        assert!(self.inside(offset, len), "what is discarded is outside of the mapping");
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: inside the mapping, which is ours and into which there are no references. The new
        // pages replace only those.
        unsafe { mm::mmap_anonymous(self.at(offset), len, RIGHTS, flags).map(drop) }
    }

    /// Replaces the memory by new memory at the same address. One call does so.
    pub(in crate::source) fn replace(&mut self, backing: Backing) -> Result<(), Refused> {
        self.discard(0, self.len).map_err(Refused::Unchanged)?;
        (self.backing, self.plain) = (backing, true);
        Ok(())
    }

    /// Makes the memory longer. It moves, and is readable and writable.
    pub(in crate::source) fn grow(&mut self, len: usize) -> io::Result<()> {
        self.relocate(len)
    }

    /// Moves the memory to a new mapping of `len` bytes, at least its length, by a copy. The new
    /// mapping is readable and writable.
    pub(in crate::source) fn relocate(&mut self, len: usize) -> io::Result<()> {
        assert!(len >= self.len, "all of it moves");
        let new = Self::new(len, Backing::Private)?;
        if !self.plain {
            self.protect(0, self.len, MprotectFlags::READ)?;
        }
        // SAFETY: both mappings are ours, different, and long enough.
        unsafe { ptr::copy_nonoverlapping(self.at.as_ptr(), new.at.as_ptr(), self.len) };
        *self = new;
        Ok(())
    }
}
