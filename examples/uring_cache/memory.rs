//! The program's buffers, which it unmaps and maps again at the same address, and the file that it
//! reads.

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use shootdown::AddressRange;
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;

pub const PAGE: usize = 4096;

/// Pages next to each other, each a buffer.
pub struct Buffers {
    at: *mut u8,
    pages: usize,
}

impl Buffers {
    pub fn map(pages: usize) -> io::Result<Self> {
        // SAFETY: a new mapping where the kernel chooses.
        let at = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                pages * PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        Ok(Self { at: at.cast(), pages })
    }

    fn page(&self, buffer: usize) -> *mut u8 {
        assert!(buffer < self.pages, "there are {} buffers", self.pages);
        // SAFETY: inside the mapping.
        unsafe { self.at.add(buffer * PAGE) }
    }

    pub fn range(&self, buffer: usize) -> AddressRange {
        AddressRange::new(self.page(buffer).addr() as u64, PAGE as u64).expect("a page is a range")
    }

    /// Unmaps a buffer and maps new memory at its address, as an allocator does.
    pub fn remap(&self, buffer: usize) -> io::Result<()> {
        let at = self.page(buffer).cast();
        // SAFETY: ours; there are no references into it.
        unsafe { munmap(at, PAGE)? };
        // SAFETY: a new mapping that replaces none: the kernel refuses if another thread was
        // quicker.
        unsafe {
            mmap_anonymous(
                at,
                PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE,
            )?
        };
        Ok(())
    }

    /// What the program sees in a buffer.
    pub fn first_word(&self, buffer: usize) -> u64 {
        // SAFETY: mapped; the device has finished.
        unsafe { self.page(buffer).cast::<u64>().read_volatile() }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: ours; there are no references into it. On failure it stays mapped.
        let _ = unsafe { munmap(self.at.cast(), self.pages * PAGE) };
    }
}

/// A file of blocks, each filled with a number of its own.
pub struct File(std::fs::File);

const BLOCKS: u64 = 256;

impl File {
    pub fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("uring_cache-{}", std::process::id()));
        let mut file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)?;
        // It lives as long as it is open.
        std::fs::remove_file(&path)?;
        let this = |block: u64| (block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for block in 0..BLOCKS {
            file.write_all(&this(block).to_ne_bytes().repeat(PAGE / 8))?;
        }
        file.rewind()?;
        Ok(Self(file))
    }

    pub fn blocks(&self) -> u64 {
        BLOCKS
    }

    /// What every word of a block is.
    pub fn word(&self, block: u64) -> u64 {
        (block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
