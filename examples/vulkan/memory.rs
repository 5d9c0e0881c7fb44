//! The program's buffers, whose memory goes away and comes back at the same address.
//!
//! While a job may read a buffer its address is never without memory: a device that reads by
//! address would fault.

use crate::problem::Problem;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use shootdown::source::OwnedMapping;
use shootdown::{AddressRange, AddressSpace};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Waker};

/// Buffers of equal length, by number.
pub trait Buffers {
    fn range(&self, buffer: usize) -> AddressRange;

    /// Writes all of a buffer that no job uses.
    fn write(&mut self, buffer: usize, bytes: &[u8]);

    /// Other memory at the buffer's address, with `bytes` in it. A job in flight that uses it may
    /// go on when `steps.release` is called: after all that the program does, or when the program
    /// waits for it.
    fn replace(
        &mut self,
        buffer: usize,
        bytes: &[u8],
        flight: Flight,
        steps: &mut dyn Steps,
    ) -> Result<(), Problem>;
}

/// Who looks on while memory is replaced.
pub trait Steps {
    /// The job in flight may go on.
    fn release(&mut self) -> Result<(), Problem>;

    /// The memory has changed: the call that does it has returned.
    fn changed(&mut self) {}
}

/// Nobody looks on, and nothing is in flight.
impl Steps for () {
    fn release(&mut self) -> Result<(), Problem> {
        Ok(())
    }
}

/// Whether a job that uses a buffer is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flight {
    Idle,
    InFlight,
}

/// The files of shared memory, by the address where they are mapped.
#[derive(Clone, Default)]
pub struct Files(Arc<Mutex<HashMap<u64, OwnedFd>>>);

impl Files {
    fn put(&self, at: u64, file: OwnedFd) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(at, file);
    }

    /// Maps what is mapped at `range` a second time: it keeps its pages, as a device does that pins
    /// them.
    pub fn second(&self, range: AddressRange) -> Result<OwnedMapping, Problem> {
        let files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let file = files
            .get(&range.start())
            .ok_or_else(|| Problem::other(format!("there is no buffer at {range:?}")))?;
        let len = range.len_usize().unwrap_or(0);
        // Nobody else knows this mapping, so its space has no drivers.
        OwnedMapping::from_fd(&AddressSpace::new(), file.try_clone()?, 0, len)
            .map_err(Problem::other)
    }
}

fn memfd(len: usize) -> io::Result<OwnedFd> {
    let file = memfd_create("vulkan", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, len as u64)?;
    Ok(file)
}

/// Where nobody else maps: the kernel gives the highest gap that is wide enough, and another thread
/// that maps something (an allocator, a driver) would be given the place of a buffer between its
/// unmap and its map.
const FAR_FROM_OTHERS: usize = 64 << 30;

/// Memory that is mapped and unmapped by system calls, and nobody is told by the program.
pub struct Raw {
    region: *mut u8,
    region_len: usize,
    /// Bytes from the region's beginning to the first buffer.
    skip: usize,
    len: usize,
    count: usize,
    files: Option<Files>,
}

impl Raw {
    /// Maps `count` buffers of `len` bytes that begin at multiples of `alignment`: private memory,
    /// or shared with `files`.
    pub fn map(
        count: usize,
        len: usize,
        alignment: usize,
        files: Option<Files>,
    ) -> Result<Self, Problem> {
        let region_len = count * len + alignment;
        let low = ptr::without_provenance_mut(FAR_FROM_OTHERS);
        // SAFETY: a new mapping, there or where the kernel chooses.
        let region = unsafe {
            mmap_anonymous(low, region_len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }
        .map_err(io::Error::from)?
        .cast::<u8>();
        let skip = region.addr().next_multiple_of(alignment) - region.addr();
        let this = Self { region, region_len, skip, len, count, files };
        // So that its pages are known by `second`.
        (0..count).try_for_each(|buffer| this.map_at(buffer, MapFlags::FIXED))?;
        Ok(this)
    }

    fn at(&self, buffer: usize) -> *mut u8 {
        assert!(buffer < self.count, "there are {} buffers", self.count);
        // SAFETY: inside the region.
        unsafe { self.region.add(self.skip + buffer * self.len) }
    }

    /// Maps new memory for a buffer.
    fn map_at(&self, buffer: usize, how: MapFlags) -> Result<(), Problem> {
        let (at, both) = (self.at(buffer), ProtFlags::READ | ProtFlags::WRITE);
        match &self.files {
            // SAFETY: inside the region, which is ours; there are no references into it.
            None => unsafe { mmap_anonymous(at.cast(), self.len, both, MapFlags::PRIVATE | how) }
                .map_err(io::Error::from)?,
            Some(files) => {
                let file = memfd(self.len)?;
                // SAFETY: as above.
                let mapped =
                    unsafe { mmap(at.cast(), self.len, both, MapFlags::SHARED | how, &file, 0) }
                        .map_err(io::Error::from)?;
                files.put(at.addr() as u64, file);
                mapped
            }
        };
        Ok(())
    }
}

impl Buffers for Raw {
    fn range(&self, buffer: usize) -> AddressRange {
        AddressRange::new(self.at(buffer).expose_provenance() as u64, self.len as u64)
            .expect("a buffer is a range")
    }

    fn write(&mut self, buffer: usize, bytes: &[u8]) {
        assert!(bytes.len() <= self.len, "a buffer has {} bytes", self.len);
        // SAFETY: mapped, as long as that, and there are no references into it; no job reads it
        // now.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(buffer), bytes.len()) };
    }

    fn replace(
        &mut self,
        buffer: usize,
        bytes: &[u8],
        flight: Flight,
        steps: &mut dyn Steps,
    ) -> Result<(), Problem> {
        if flight == Flight::Idle {
            // SAFETY: ours; there are no references into it.
            unsafe { munmap(self.at(buffer).cast(), self.len) }.map_err(io::Error::from)?;
            self.map_at(buffer, MapFlags::FIXED_NOREPLACE)?;
        } else {
            self.map_at(buffer, MapFlags::FIXED)?;
        }
        steps.changed();
        self.write(buffer, bytes);
        steps.release()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: ours; there are no references into it. On failure it stays mapped.
        let _ = unsafe { munmap(self.region.cast(), self.region_len) };
    }
}

/// The same as mappings that invalidate before they change.
pub struct Owned {
    mappings: Vec<OwnedMapping>,
    len: usize,
    alignment: usize,
    files: Option<Files>,
}

impl Owned {
    /// As [`Raw::map`].
    pub fn map(
        space: &AddressSpace,
        count: usize,
        len: usize,
        alignment: usize,
        files: Option<Files>,
    ) -> Result<Self, Problem> {
        // A mapping begins at a page.
        let whole = len + if alignment > rustix::param::page_size() { alignment } else { 0 };
        let one = || match files {
            None => OwnedMapping::new(space, whole),
            Some(_) => OwnedMapping::shared(space, whole),
        };
        let mappings =
            (0..count).map(|_| one()).collect::<Result<Vec<_>, _>>().map_err(Problem::other)?;
        let this = Self { mappings, len, alignment, files };
        (0..count).try_for_each(|buffer| this.put(buffer))?;
        Ok(this)
    }

    /// Makes the buffer's file known.
    fn put(&self, buffer: usize) -> Result<(), Problem> {
        if let (Some(files), Some(file)) = (&self.files, self.mappings[buffer].descriptor()) {
            files.put(self.range(buffer).start(), file.try_clone_to_owned()?);
        }
        Ok(())
    }

    fn skip(&self, buffer: usize) -> usize {
        let at = self.mappings[buffer].as_ptr().expose_provenance();
        at.next_multiple_of(self.alignment) - at
    }
}

impl Buffers for Owned {
    fn range(&self, buffer: usize) -> AddressRange {
        let at = self.mappings[buffer].range().start() + self.skip(buffer) as u64;
        AddressRange::new(at, self.len as u64).expect("a buffer is a range")
    }

    fn write(&mut self, buffer: usize, bytes: &[u8]) {
        let skip = self.skip(buffer);
        self.mappings[buffer].write(skip, bytes);
    }

    fn replace(
        &mut self,
        buffer: usize,
        bytes: &[u8],
        _flight: Flight,
        steps: &mut dyn Steps,
    ) -> Result<(), Problem> {
        let early = {
            let mut change = pin!(self.mappings[buffer].map_again());
            let began = change.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            match began {
                std::task::Poll::Ready(changed) => {
                    changed.map_err(Problem::other)?;
                    true
                }
                std::task::Poll::Pending => {
                    // It waits for the job.
                    steps.release()?;
                    futures::executor::block_on(change).map_err(Problem::other)?;
                    false
                }
            }
        };
        steps.changed();
        self.put(buffer)?;
        self.write(buffer, bytes);
        if early { steps.release() } else { Ok(()) }
    }
}
