//! Memory that the library knows nothing of: mapped and unmapped behind its back, as programs do.

use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mremap, munmap,
};
use shootdown::AddressRange;
use std::ffi::c_void;
use std::ptr;

pub const PAGE: usize = 4096;

/// An address as a number, so that threads may share it. Unmapped by whoever is to unmap it, or at
/// the end of the process.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    pub at: usize,
    pub len: usize,
}

impl Raw {
    pub fn map(pages: usize) -> Self {
        let len = pages * PAGE;
        // SAFETY: a new mapping where the kernel chooses.
        let at = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
            .unwrap()
        };
        Self { at: at.addr(), len }
    }

    /// Shared anonymous memory.
    pub fn map_shared(pages: usize) -> Self {
        let len = pages * PAGE;
        // SAFETY: a new mapping where the kernel chooses.
        let at = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
            .unwrap()
        };
        Self { at: at.addr(), len }
    }

    /// 2 MiB at a multiple of that, as a transparent huge page where the system makes them.
    pub fn map_huge() -> Self {
        let huge = 512 * PAGE;
        let all = Self::map(2 * 512);
        let at = all.at.next_multiple_of(huge);
        let memory = Self { at, len: huge };
        memory.discard(Advice::LinuxHugepage);
        memory
    }

    fn ptr(self) -> *mut c_void {
        ptr::with_exposed_provenance_mut(self.at)
    }

    pub fn range(self) -> AddressRange {
        AddressRange::new(self.at as u64, self.len as u64).unwrap()
    }

    pub fn part(self, from: usize, pages: usize) -> Self {
        Self { at: self.at + from * PAGE, len: pages * PAGE }
    }

    pub fn unmap(self) {
        // SAFETY: the tests hold no reference into it.
        unsafe { munmap(self.ptr(), self.len).unwrap() };
    }

    /// Maps new memory at the same address, over what is there.
    pub fn map_over(self) {
        // SAFETY: the tests hold no reference into what it replaces.
        unsafe {
            mmap_anonymous(
                self.ptr(),
                self.len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED,
            )
            .unwrap()
        };
    }

    /// Maps new memory where it was, unless somebody has taken the address since, as the allocator
    /// of another thread may.
    pub fn map_again(self) -> bool {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: it replaces nothing.
        unsafe {
            mmap_anonymous(self.ptr(), self.len, ProtFlags::READ | ProtFlags::WRITE, flags).is_ok()
        }
    }

    pub fn discard(self, advice: Advice) {
        // SAFETY: as above.
        unsafe { madvise(self.ptr(), self.len, advice).unwrap() };
    }

    /// The same with a number that `rustix` may have no name for.
    pub fn advise(self, advice: i32) -> std::io::Result<()> {
        // SAFETY: as above.
        if unsafe { libc::madvise(self.ptr(), self.len, advice) } == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    }

    pub fn remap(self, pages: usize) -> Self {
        let len = pages * PAGE;
        // SAFETY: as above.
        let at = unsafe { mremap(self.ptr(), self.len, len, MremapFlags::MAYMOVE).unwrap() };
        Self { at: at.addr(), len }
    }

    /// Writes its first byte as a device would: without an access of this thread's.
    pub fn poke(self, value: u8) {
        let local = libc::iovec { iov_base: ptr::from_ref(&value).cast_mut().cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: self.ptr(), iov_len: 1 };
        // SAFETY: `local` names one byte that is only read; the kernel checks `remote`, to which
        // nobody holds a reference.
        let written = unsafe {
            libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        };
        assert_eq!(written, 1);
    }

    pub fn write(self, value: u8) {
        // SAFETY: mapped and writable; nobody else accesses it at this moment.
        unsafe { self.ptr().cast::<u8>().write_bytes(value, self.len) };
    }

    /// What is there, read as another process would: `None` if not all of it is mapped.
    pub fn look(self) -> Option<Vec<u8>> {
        let mut copy = vec![0_u8; self.len];
        let local = libc::iovec { iov_base: copy.as_mut_ptr().cast(), iov_len: self.len };
        let remote = libc::iovec { iov_base: self.ptr(), iov_len: self.len };
        // SAFETY: `local` names memory that is ours alone; the kernel checks `remote`.
        let read = unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        };
        (read == self.len as isize).then_some(copy)
    }
}
