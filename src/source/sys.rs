//! System calls that need `unsafe`, each behind a safe function.
//!
//! Mapping memory is safe. Unmapping or moving it is safe only for its owner, because a reference
//! into it would dangle. So [`Memory`] owns what it maps and never lends it. It hands out
//! addresses, and copies in and out while it is borrowed. No other code can unmap it through this
//! module.
//!
//! An address is owned from the call that mapped it to the call that unmaps it *or may have done
//! so*: `mremap` onto a fixed address may unmap the target and fail all the same. Another thread
//! may then have mapped its own memory there. So nothing is unmapped at an address that was the
//! target of such a call, whatever the call returned. At worst address space stays mapped
//! ([`LEAKED`]).

#[cfg(not(target_os = "linux"))]
mod copying;
#[cfg(target_os = "linux")]
mod moving;

#[cfg(target_os = "linux")]
use super::file::File;
use crate::range::AddressRange;
use core::ffi::c_void;
use core::ptr::{self, NonNull};
use rustix::io;
use rustix::mm::{self, MapFlags, MprotectFlags, ProtFlags};
use std::sync::atomic::AtomicU64;
#[cfg(target_os = "linux")]
use std::sync::atomic::{AtomicU8, Ordering};

const RIGHTS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Number of bytes of address space that stay mapped for ever.
pub(super) static LEAKED: AtomicU64 = AtomicU64::new(0);

/// Kind of memory behind a mapping.
pub(super) enum Backing {
    /// Anonymous memory of this process.
    Private,
    /// Memory of a file. Every holder of its descriptor may map it.
    #[cfg(target_os = "linux")]
    Shared(File),
}

/// Memory of this process. Its drop unmaps it.
pub(super) struct Memory {
    at: NonNull<u8>,
    len: usize,
    backing: Backing,
    /// All of it is readable and writable, as it was mapped.
    plain: bool,
}

// SAFETY: the mapping belongs to this value alone, and an address means the same on every thread.
unsafe impl Send for Memory {}
// SAFETY: shared access is to the address, the length, and copies out. Copies into private memory
// need `&mut self`; those into shared memory, which others may have mapped as well, are atomic.
unsafe impl Sync for Memory {}

pub(super) fn page_size() -> usize {
    rustix::param::page_size()
}

/// Maps `len` bytes where the kernel chooses, readable and writable.
fn map(len: usize, backing: &Backing) -> io::Result<NonNull<u8>> {
    // SAFETY: a new mapping where the kernel chooses, so it replaces none.
    let at = unsafe {
        match backing {
            Backing::Private => {
                mm::mmap_anonymous(ptr::null_mut(), len, RIGHTS, MapFlags::PRIVATE)?
            }
            #[cfg(target_os = "linux")]
            Backing::Shared(file) => {
                mm::mmap(ptr::null_mut(), len, RIGHTS, MapFlags::SHARED, file.fd(), file.offset())?
            }
        }
    };
    NonNull::new(at.cast()).ok_or(io::Errno::NOMEM)
}

impl Memory {
    /// Maps `len` bytes of anonymous private memory. `len` is a positive multiple of the page size.
    pub(super) fn map(len: usize) -> io::Result<Self> {
        Self::new(len, Backing::Private)
    }

    /// Maps `len` bytes of `backing`. `len` is a positive multiple of the page size.
    pub(super) fn new(len: usize, backing: Backing) -> io::Result<Self> {
        Ok(Self { at: map(len, &backing)?, len, backing, plain: true })
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.at.as_ptr()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn backing(&self) -> &Backing {
        &self.backing
    }

    #[cfg(target_os = "linux")]
    pub(super) fn backing_mut(&mut self) -> &mut Backing {
        &mut self.backing
    }

    fn at(&self, offset: usize) -> *mut c_void {
        self.at.as_ptr().wrapping_add(offset).cast()
    }

    fn inside(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Copies bytes from `offset` on into `into`. The part must be readable.
    pub(super) fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(self.inside(offset, into.len()), "the copy is outside of the mapping");
        match self.backing {
            // SAFETY: inside the mapping, which cannot be unmapped while it is borrowed; `into` is
            // another object.
            Backing::Private => unsafe {
                ptr::copy_nonoverlapping(
                    self.at.as_ptr().add(offset),
                    into.as_mut_ptr(),
                    into.len(),
                )
            },
            #[cfg(target_os = "linux")]
            Backing::Shared(_) => into
                .iter_mut()
                .zip(offset..)
                .for_each(|(byte, at)| *byte = self.byte(at).load(Ordering::Relaxed)),
        }
    }

    /// Copies `from` into the memory, from `offset` on. The part must be writable.
    pub(super) fn write(&mut self, offset: usize, from: &[u8]) {
        assert!(self.inside(offset, from.len()), "the copy is outside of the mapping");
        match self.backing {
            // SAFETY: as above.
            Backing::Private => unsafe {
                ptr::copy_nonoverlapping(from.as_ptr(), self.at.as_ptr().add(offset), from.len())
            },
            #[cfg(target_os = "linux")]
            Backing::Shared(_) => from
                .iter()
                .zip(offset..)
                .for_each(|(byte, at)| self.byte(at).store(*byte, Ordering::Relaxed)),
        }
    }

    /// Returns a byte of shared memory. Other mappings may access it at the same time.
    #[cfg(target_os = "linux")]
    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.len, "the byte is outside of the mapping");
        // SAFETY: inside the mapping, which cannot be unmapped while it is borrowed. All other
        // accesses of shared memory by this module are atomic, too.
        unsafe { AtomicU8::from_ptr(self.at.as_ptr().add(offset)) }
    }

    /// Discards pages. They are zero afterwards.
    #[cfg(target_os = "linux")]
    pub(super) fn discard(&mut self, offset: usize, len: usize) -> io::Result<()> {
        assert!(self.inside(offset, len), "what is discarded is outside of the mapping");
        match &self.backing {
            // SAFETY: inside the mapping, into which there are no references.
            Backing::Private => unsafe {
                mm::madvise(self.at(offset), len, mm::Advice::LinuxDontNeed)
            },
            Backing::Shared(file) => file.punch(offset, len),
        }
    }

    pub(super) fn protect(
        &mut self,
        offset: usize,
        len: usize,
        flags: MprotectFlags,
    ) -> io::Result<()> {
        assert!(self.inside(offset, len), "what is protected is outside of the mapping");
        self.plain = false;
        // SAFETY: inside the mapping, into which there are no references.
        unsafe { mm::mprotect(self.at(offset), len, flags) }
    }

    /// Returns the page size of the memory in bytes: a page, or a huge page.
    pub(super) fn unit(&self) -> usize {
        match &self.backing {
            Backing::Private => page_size(),
            #[cfg(target_os = "linux")]
            Backing::Shared(file) => file.unit(),
        }
    }

    /// Unmaps everything behind the first `len` bytes. `len` is shorter than the memory.
    pub(super) fn shrink(&mut self, len: usize) -> io::Result<()> {
        assert!(len < self.len && len != 0, "a part stays mapped");
        // SAFETY: the end of a mapping that is ours, into which there are no references.
        unsafe { mm::munmap(self.at(len), self.len - len)? };
        self.len = len;
        Ok(())
    }

    /// Unmaps the memory. If the kernel refuses, returns it with the error.
    pub(super) fn unmap(mut self) -> Result<(), (Self, io::Errno)> {
        // SAFETY: the mapping is ours, and there are no references into it.
        match unsafe { mm::munmap(self.at(0), self.len) } {
            Ok(()) => {
                self.len = 0;
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }

    /// Leaves the memory mapped for ever, and counts it.
    pub(super) fn leak(mut self) {
        LEAKED.fetch_add(self.len as u64, std::sync::atomic::Ordering::Relaxed);
        self.len = 0;
    }

    pub(super) fn range(&self) -> AddressRange {
        AddressRange::new(self.at.as_ptr().expose_provenance() as u64, self.len as u64)
            .expect("the kernel maps no empty range at 0")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: as in `unmap`. It fails for an existing mapping only if the kernel lacks
            // memory; the mapping then stays.
            let _ = unsafe { mm::munmap(self.at(0), self.len) };
        }
    }
}

/// Reason why memory was not replaced.
pub(super) enum Refused {
    /// Nothing has changed.
    Unchanged(io::Errno),
    /// The old address is lost. The new memory is mapped at another address.
    #[cfg_attr(
        not(target_os = "linux"),
        expect(dead_code, reason = "only `mremap` leaves that open")
    )]
    AddressLost(io::Errno),
}

#[cfg(all(feature = "userfaultfd", target_os = "linux"))]
pub(super) mod uffd;
