//! The system calls that the compiler cannot check, each behind a function that can be called safely.
//!
//! Mapping memory is safe; unmapping or moving it is safe only for who owns it, because a reference into it would dangle. So
//! [`Memory`] owns what it maps and never lends it: it hands out addresses, and copies in and out between two system calls, for which it is borrowed.
//! Nobody else can unmap it through this module.

use crate::range::AddressRange;
use core::ffi::c_void;
use core::ptr::{self, NonNull};
use rustix::io;
use rustix::mm::{self, MapFlags, MprotectFlags, ProtFlags};

/// Anonymous private memory of this process, unmapped when dropped.
pub(super) struct Memory {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to this value alone, and an address means the same on every thread.
unsafe impl Send for Memory {}
// SAFETY: shared access is to the address, the length, and copies out; copies in need `&mut self`.
unsafe impl Sync for Memory {}

pub(super) fn page_size() -> usize {
    rustix::param::page_size()
}

impl Memory {
    /// Maps `len` bytes, a positive multiple of the page size.
    pub(super) fn map(len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping where the kernel chooses, so it replaces none.
        let at = unsafe { mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)? };
        let at = NonNull::new(at.cast()).ok_or(io::Errno::NOMEM)?;
        Ok(Self { at, len })
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.at.as_ptr()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn inside(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Copies out of it; it must be readable.
    pub(super) fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(self.inside(offset, into.len()), "the copy is outside of the mapping");
        // SAFETY: inside the mapping, which nobody unmaps while it is borrowed; `into` is another object.
        unsafe { ptr::copy_nonoverlapping(self.at.as_ptr().add(offset), into.as_mut_ptr(), into.len()) }
    }

    /// Copies into it; it must be writable.
    pub(super) fn write(&mut self, offset: usize, from: &[u8]) {
        assert!(self.inside(offset, from.len()), "the copy is outside of the mapping");
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.at.as_ptr().add(offset), from.len()) }
    }

    /// Discards its pages (`MADV_DONTNEED`): they read as zeros afterwards.
    #[cfg(target_os = "linux")]
    pub(super) fn discard(&mut self, offset: usize, len: usize) -> io::Result<()> {
        assert!(self.inside(offset, len), "what is discarded is outside of the mapping");
        // SAFETY: inside the mapping, into which there are no references.
        unsafe { mm::madvise(self.at.as_ptr().add(offset).cast::<c_void>(), len, mm::Advice::LinuxDontNeed) }
    }

    /// Elsewhere that call is a hint: new pages take their place, readable and writable.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn discard(&mut self, offset: usize, len: usize) -> io::Result<()> {
        assert!(self.inside(offset, len), "what is discarded is outside of the mapping");
        let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
        // SAFETY: inside the mapping, which is ours and into which there are no references: the new pages replace only those.
        unsafe { mm::mmap_anonymous(self.at.as_ptr().add(offset).cast::<c_void>(), len, rights, flags).map(drop) }
    }

    pub(super) fn protect(&mut self, offset: usize, len: usize, flags: MprotectFlags) -> io::Result<()> {
        assert!(self.inside(offset, len), "what is protected is outside of the mapping");
        // SAFETY: as above.
        unsafe { mm::mprotect(self.at.as_ptr().add(offset).cast::<c_void>(), len, flags) }
    }

    /// Moves it to another address, with another length.
    #[cfg(target_os = "linux")]
    pub(super) fn remap(&mut self, len: usize, elsewhere: bool) -> io::Result<()> {
        let old = self.at.as_ptr().cast::<c_void>();
        let at = if elsewhere {
            // Somewhere else is where nothing is: reserved first, then replaced in one step.
            let mut place = Self::map(len)?;
            // SAFETY: both mappings are ours, and there are no references into either.
            let at = unsafe { mm::mremap_fixed(old, self.len, len, mm::MremapFlags::MAYMOVE, place.at.as_ptr().cast())? };
            // The reserved mapping is gone: the moved one is in its place.
            place.len = 0;
            at
        } else {
            // SAFETY: the mapping is ours, and there are no references into it.
            unsafe { mm::mremap(old, self.len, len, mm::MremapFlags::MAYMOVE)? }
        };
        self.at = NonNull::new(at.cast()).ok_or(io::Errno::NOMEM)?;
        self.len = len;
        Ok(())
    }

    /// Without `mremap`: a new mapping, readable and writable, and a copy of what fits.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn remap(&mut self, len: usize, _elsewhere: bool) -> io::Result<()> {
        let new = Self::map(len)?;
        self.protect(0, self.len, MprotectFlags::READ)?;
        // SAFETY: both mappings are ours, different, and long enough.
        unsafe { ptr::copy_nonoverlapping(self.at.as_ptr(), new.at.as_ptr(), self.len.min(len)) };
        *self = new;
        Ok(())
    }

    /// Unmaps it. On failure it is still mapped.
    pub(super) fn unmap(mut self) -> Result<(), (Self, io::Errno)> {
        // SAFETY: the mapping is ours, and there are no references into it.
        match unsafe { mm::munmap(self.at.as_ptr().cast(), self.len) } {
            Ok(()) => {
                self.len = 0;
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }

    /// Leaves it mapped for ever.
    pub(super) fn leak(mut self) {
        self.len = 0;
    }

    pub(super) fn range(&self) -> AddressRange {
        AddressRange::new(self.at.as_ptr().addr() as u64, self.len as u64).expect("the kernel maps no empty range at 0")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: as in `unmap`. It cannot fail for a mapping that is there, but for want of kernel memory; then it stays.
            let _ = unsafe { mm::munmap(self.at.as_ptr().cast(), self.len) };
        }
    }
}

#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
pub(super) mod uffd;
