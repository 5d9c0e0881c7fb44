//! A mapping that invalidates before it changes.
#![forbid(unsafe_code)]

use super::sys::{Memory, page_size};
use crate::event::Event;
use crate::foreign::{Callback, FirstPanic, keep};
use crate::range::AddressRange;
use crate::space::AddressSpace;
use core::fmt;
use core::ops::Range;
use rustix::mm::MprotectFlags;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that were left mapped, because a mapping was dropped while a device used it.
static LEAKED: AtomicU64 = AtomicU64::new(0);

/// Anonymous private memory whose every change is bracketed by an invalidation: no device uses the old pages when a call that changes
/// them returns, and no reader looks at them in between. This is the kernel's own order, without the gap that a [monitor](super::Uffd) has.
///
/// The methods that change the memory are futures that do nothing before they are polled. When one is dropped before it has resolved, the
/// memory has not changed (the mapping of `unmap` is dropped, see below).
///
/// # Dropping
/// Dropping it without awaiting [`unmap`](Self::unmap) is safe: if no device uses the memory, or all let go at once, it is unmapped; if
/// one needs time, the memory stays mapped for ever ([`leaked_bytes`](Self::leaked_bytes) counts it), because unmapping it would take it away under the device.
pub struct OwnedMapping {
    space: AddressSpace,
    /// `None` once it has been unmapped.
    memory: Option<Memory>,
}

/// What may be done with a part of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nothing: every access faults.
    None,
    /// Reading.
    Read,
    /// Reading and writing, as in a new mapping.
    ReadWrite,
}

/// Why a mapping could not be made or changed.
#[derive(Debug)]
#[non_exhaustive]
pub enum MapError {
    /// A length of 0, or a part that is outside of the mapping or does not begin and end at a page.
    NotPages {
        /// The part, as offsets in the mapping.
        part: Range<usize>,
        /// The mapping's length.
        len: usize,
        /// Bytes of a page.
        page: usize,
    },
    /// The operating system refused; the memory is as it was.
    Os(io::Error),
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPages { part, len, page } => write!(
                f,
                "{:#x}..{:#x} is not a part of a mapping of {len:#x} bytes: it must not be empty, and must begin and end at multiples of {page:#x}",
                part.start, part.end
            ),
            Self::Os(error) => write!(f, "the operating system refused to change the mapping: {error}"),
        }
    }
}

impl core::error::Error for MapError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Os(error) => Some(error),
            Self::NotPages { .. } => None,
        }
    }
}

impl OwnedMapping {
    /// Maps `len` bytes, rounded up to whole pages, readable and writable, filled with zeros.
    ///
    /// # Errors
    /// [`MapError`]; a length of 0 is [`MapError::NotPages`].
    pub fn new(space: &AddressSpace, len: usize) -> Result<Self, MapError> {
        let memory = Memory::map(whole_pages(len)?).map_err(|error| MapError::Os(error.into()))?;
        Ok(Self { space: space.clone(), memory: Some(memory) })
    }

    /// Where the memory is.
    pub fn range(&self) -> AddressRange {
        self.memory().range()
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> usize {
        self.memory().len()
    }

    /// `false`: a mapping has a page at least.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Where it begins, for a device. Valid until the next call of `unmap`, `remap` or `resize`.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory().as_ptr()
    }

    /// Copies out of it.
    ///
    /// # Panics
    /// When the copy would be outside of the mapping. The process faults where it may not be [read](Protection).
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.memory().read(offset, into);
    }

    /// Copies into it.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub fn write(&mut self, offset: usize, from: &[u8]) {
        self.memory_mut().write(offset, from);
    }

    /// Unmaps it, once no device uses it.
    ///
    /// # Errors
    /// The mapping, which is still there, and why.
    pub async fn unmap(mut self) -> Result<(), (Self, MapError)> {
        let space = self.space.clone();
        let guard = space.invalidate(self.range(), Event::Unmap).await;
        let unmapped = self.memory.take().map_or(Ok(()), Memory::unmap);
        drop(guard);
        unmapped.map_err(|(memory, error)| {
            self.memory = Some(memory);
            (self, MapError::Os(error.into()))
        })
    }

    /// Moves it to another address; what is in it stays. Without `mremap` (on systems other than Linux) it is copied, and readable and writable afterwards.
    ///
    /// # Errors
    /// [`MapError::Os`].
    pub async fn remap(&mut self) -> Result<AddressRange, MapError> {
        self.moved(self.len(), true).await
    }

    /// Makes it longer or shorter, rounded up to whole pages; it may move. What fits stays, new pages are zeros.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn resize(&mut self, len: usize) -> Result<AddressRange, MapError> {
        self.moved(whole_pages(len)?, false).await
    }

    async fn moved(&mut self, len: usize, elsewhere: bool) -> Result<AddressRange, MapError> {
        let space = self.space.clone();
        let guard = space.invalidate(self.range(), Event::Unmap).await;
        let moved = self.memory_mut().remap(len, elsewhere);
        drop(guard);
        moved.map_err(|error| MapError::Os(error.into())).map(|()| self.range())
    }

    /// Changes what may be done with a part: offsets, end exclusive, whole pages.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn protect(&mut self, part: Range<usize>, protection: Protection) -> Result<(), MapError> {
        let flags = match protection {
            Protection::None => MprotectFlags::empty(),
            Protection::Read => MprotectFlags::READ,
            Protection::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        let range = self.part(&part)?;
        let space = self.space.clone();
        let guard = space.invalidate(range, Event::ProtectionVma).await;
        let changed = self.memory_mut().protect(part.start, part.len(), flags);
        drop(guard);
        changed.map_err(|error| MapError::Os(error.into()))
    }

    /// Discards the pages of a part: offsets, end exclusive, whole pages. They read as zeros afterwards; on systems other than Linux they are readable and
    /// writable, too.
    ///
    /// # Errors
    /// [`MapError`].
    pub async fn discard(&mut self, part: Range<usize>) -> Result<(), MapError> {
        let range = self.part(&part)?;
        let space = self.space.clone();
        let guard = space.invalidate(range, Event::Clear).await;
        let changed = self.memory_mut().discard(part.start, part.len());
        drop(guard);
        changed.map_err(|error| MapError::Os(error.into()))
    }

    /// Bytes that all mappings of the process together left mapped, because they were dropped while a device used them.
    pub fn leaked_bytes() -> u64 {
        LEAKED.load(Ordering::Relaxed)
    }

    fn part(&self, part: &Range<usize>) -> Result<AddressRange, MapError> {
        let (len, page) = (self.len(), page_size());
        let whole = part.start < part.end && part.end <= len && part.start.is_multiple_of(page) && part.end.is_multiple_of(page);
        let range = AddressRange::new(self.range().start() + part.start as u64, part.len() as u64);
        range.ok().filter(|_| whole).ok_or(MapError::NotPages { part: part.clone(), len, page })
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("the memory goes only with the mapping")
    }

    fn memory_mut(&mut self) -> &mut Memory {
        self.memory.as_mut().expect("the memory goes only with the mapping")
    }
}

fn whole_pages(len: usize) -> Result<usize, MapError> {
    let page = page_size();
    len.checked_next_multiple_of(page).filter(|rounded| *rounded != 0).ok_or(MapError::NotPages { part: 0..len, len, page })
}

impl Drop for OwnedMapping {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        // After a panic of a driver it is not known whether its device has let go.
        match keep(|_| self.space.try_invalidate(memory.range(), Event::Unmap)) {
            Ok(Err(_)) => {
                LEAKED.fetch_add(memory.len() as u64, Ordering::Relaxed);
                memory.leak();
            }
            Ok(Ok(guard)) => {
                drop(memory);
                drop(guard);
            }
            Err(panic) => {
                LEAKED.fetch_add(memory.len() as u64, Ordering::Relaxed);
                memory.leak();
                self.space.shared().host.losses.resume(FirstPanic::new(Callback::FirstPass, panic));
            }
        }
    }
}

impl fmt::Debug for OwnedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnedMapping").field("range", &self.memory.as_ref().map(Memory::range)).finish_non_exhaustive()
    }
}
