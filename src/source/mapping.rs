//! A mapping that invalidates before it changes.
#![forbid(unsafe_code)]

mod error;
mod unmap;

pub use error::MapError;
pub use unmap::UnmapError;

#[cfg(target_os = "linux")]
use super::file::File;
use super::sys::{Backing, LEAKED, Memory, Refused, page_size};
use crate::block::Waitable;
use crate::engine::futures::guard::InvalidationGuard;
use crate::event::Event;
use crate::foreign::{Callback, FirstPanic, keep};
use crate::fork::LeftToParent;
use crate::range::AddressRange;
use crate::space::AddressSpace;
use core::fmt;
use core::ops::Range;
#[cfg(target_os = "linux")]
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::mm::MprotectFlags;
use std::sync::atomic::Ordering;

/// Owns memory and brackets every change of it by an invalidation.
///
/// No device uses the old pages when a call that changes them returns, and no reader looks at them
/// in between. This is the kernel's own order, without the gap that a [monitor](super::Uffd) has:
/// passes run *before* the change, so a driver may still write back what its device has changed.
///
/// The memory is [anonymous and private](Self::new), or [shared](Self::shared), or a part of
/// [somebody's descriptor](Self::from_fd).
///
/// # Cancel safety
/// The methods that change the memory are futures that do nothing before they are polled. When one
/// is dropped before it has resolved, the memory has not changed (the mapping of `unmap` is
/// dropped, see below).
///
/// # Dropping
/// Dropping it without awaiting [`unmap`](Self::unmap) is safe: if no device uses the memory, or
/// all let go at once, it is unmapped; if one needs time, the memory stays mapped for ever
/// ([`leaked_bytes`](Self::leaked_bytes) counts it), because unmapping it would take it away under
/// the device.
///
/// # Shared memory
/// An invalidation covers *this* mapping. Others who have mapped the same memory, in this process
/// or another, see its discarded pages go, and are not told: that is the program's to do.
/// [`read`](Self::read) and [`write`](Self::write) are atomic for each byte, so that two mappings
/// of the same memory may be used at the same time. If somebody makes the file shorter, accesses
/// of what is missing end the process (`SIGBUS`); seal it (`F_SEAL_SHRINK`) against others whom
/// you do not trust.
///
/// # Fork
/// In a child of `fork` it can be read and written; shared memory is the parent's, too. Changing
/// it is [`MapError::Forked`], and dropping it unmaps it in the child only: the drivers of its
/// space are the parent's, and are not called (M4).
#[must_use = "dropping a mapping unmaps it"]
pub struct OwnedMapping {
    space: AddressSpace,
    /// `None` once it has been unmapped.
    memory: Option<Memory>,
    /// The process that it was made in.
    process: u32,
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

fn os(error: rustix::io::Errno) -> MapError {
    MapError::Os(error.into())
}

impl OwnedMapping {
    /// Maps `len` bytes of anonymous private memory, rounded up to whole pages, readable and
    /// writable, filled with zeros.
    ///
    /// # Errors
    /// [`MapError`]; a length of 0 is [`MapError::NotPages`].
    pub fn new(space: &AddressSpace, len: usize) -> Result<Self, MapError> {
        Ok(Self::of(space, Memory::map(whole_pages(len)?).map_err(os)?))
    }

    /// Maps `len` bytes of shared memory, rounded up to whole pages, readable and writable, filled
    /// with zeros (Linux).
    ///
    /// It is a `memfd`, which other processes can map when they have been given its
    /// [`descriptor`](Self::descriptor), and which a `fork` shares instead of copying it. It is
    /// `shootdown` in `/proc/PID/maps`, and may be sealed.
    ///
    /// ```
    /// # use shootdown::{AddressSpace, source::OwnedMapping};
    /// # let space = AddressSpace::new();
    /// let mut ring = OwnedMapping::shared(&space, 1 << 16)?;
    /// ring.write(0, b"tail");
    /// // What the other process does with the descriptor that it has received:
    /// let descriptor = ring.descriptor().unwrap().try_clone_to_owned()?;
    /// let theirs = OwnedMapping::from_fd(&space, descriptor, 0, 1 << 16)?;
    /// let mut tail = [0; 4];
    /// theirs.read(0, &mut tail);
    /// assert_eq!(&tail, b"tail");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[cfg(target_os = "linux")]
    pub fn shared(space: &AddressSpace, len: usize) -> Result<Self, MapError> {
        let len = whole_pages(len)?;
        let memory =
            File::new(len).and_then(|file| Memory::new(len, Backing::Shared(file))).map_err(os)?;
        Ok(Self::of(space, memory))
    }

    /// Maps `len` bytes from `offset` on of a descriptor that somebody else made, readable and
    /// writable, shared with all who have mapped it (Linux).
    ///
    /// `offset` is a multiple of the page size, `len` is rounded up to whole pages; for a
    /// descriptor of hugetlbfs those are huge pages. The descriptor must be open for reading and
    /// writing. It is never made longer or shorter by this mapping.
    ///
    /// # Errors
    /// [`MapError::NotPages`], [`MapError::BeyondEnd`], [`MapError::Os`].
    #[cfg(target_os = "linux")]
    pub fn from_fd(
        space: &AddressSpace,
        fd: OwnedFd,
        offset: u64,
        len: usize,
    ) -> Result<Self, MapError> {
        let (file, len) = File::adopt(fd, offset, len)?;
        Ok(Self::of(space, Memory::new(len, Backing::Shared(file)).map_err(os)?))
    }

    fn of(space: &AddressSpace, memory: Memory) -> Self {
        Self { space: space.clone(), memory: Some(memory), process: std::process::id() }
    }

    /// Returns where the memory is. [`AddressRange::as_ptr`] makes a pointer of it.
    pub fn range(&self) -> AddressRange {
        self.memory().range()
    }

    /// Returns the bytes of the mapping.
    pub fn len(&self) -> usize {
        self.memory().len()
    }

    /// Returns `false`: a mapping has a page at least.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns where it begins, for a device. Valid until the next call of `unmap`, `remap` or
    /// `resize`.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory().as_ptr()
    }

    /// Returns the descriptor of shared memory; `None` for private memory (Linux).
    ///
    /// Who gives it to others should know that a [`resize`](Self::resize) of a mapping that was
    /// made by [`shared`](Self::shared) changes the length of the file.
    #[cfg(target_os = "linux")]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self.memory().backing() {
            Backing::Private => None,
            Backing::Shared(file) => Some(file.fd()),
        }
    }

    /// Copies out of it, from `offset` on.
    ///
    /// # Panics
    /// When the copy would be outside of the mapping. The process faults where it may not be
    /// [read](Protection).
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.memory().read(offset, into);
    }

    /// Copies into it, from `offset` on.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub fn write(&mut self, offset: usize, from: &[u8]) {
        self.memory_mut().write(offset, from);
    }

    /// Moves it to another address; what is in it stays, and so do the protections of its parts.
    ///
    /// Without `mremap` (on systems other than Linux) it is copied, and readable and writable
    /// afterwards.
    ///
    /// Subscriptions do not move: drivers are inserted anew for the range that is returned.
    ///
    /// # Errors
    /// [`MapError::Os`]; it is then where it was, whole. Once a part has been
    /// [protected](Self::protect) this needs Linux 5.7 (5.13 for shared memory), and is refused as
    /// invalid input before that, and for huge pages.
    ///
    /// # Panics
    /// When the kernel has moved a part, refuses another and refuses to take the first one back,
    /// which it does for want of its own memory only.
    pub fn remap(&mut self) -> Waitable<impl Future<Output = Result<AddressRange, MapError>>> {
        Waitable::new(async move {
            self.bracketed(Event::Unmap, |memory| memory.relocated(memory.len())).await?;
            Ok(self.range())
        })
    }

    /// Makes it longer or shorter, `len` rounded up to whole pages.
    ///
    /// What fits stays, with its protection; new pages are readable and writable, and zeros. Made
    /// shorter it does not move, made longer it may (on Linux; elsewhere it always does, and is
    /// readable and writable). [Shared](Self::shared) memory is resized for all who have mapped
    /// it; a [part of a descriptor](Self::from_fd) only as far as the descriptor reaches, and new
    /// pages have what is there.
    ///
    /// Subscriptions neither move nor grow: drivers are inserted anew for the range that is
    /// returned.
    ///
    /// # Errors
    /// [`MapError`]; the mapping is then where it was, whole. The file of shared memory may be
    /// longer than it. See [`remap`](Self::remap) for parts with different protections.
    ///
    /// # Panics
    /// As [`remap`](Self::remap).
    pub fn resize(
        &mut self,
        len: usize,
    ) -> Waitable<impl Future<Output = Result<AddressRange, MapError>>> {
        Waitable::new(async move {
            let len = whole_units(len, self.memory().unit())?;
            self.bracketed(Event::Unmap, |memory| memory.resize(len)).await?;
            Ok(self.range())
        })
    }

    /// Changes what may be done with a part: offsets, end exclusive, whole pages.
    ///
    /// # Errors
    /// [`MapError`]. A part that has several protections and is refused may have changed up to
    /// where it was refused.
    pub fn protect(
        &mut self,
        part: Range<usize>,
        protection: Protection,
    ) -> Waitable<impl Future<Output = Result<(), MapError>>> {
        Waitable::new(async move {
            let flags = match protection {
                Protection::None => MprotectFlags::empty(),
                Protection::Read => MprotectFlags::READ,
                Protection::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
            };
            let range = self.part(&part)?;
            let space = self.space.clone();
            let guard = invalidated(&space, self.process, range, Event::ProtectionVma).await?;
            let changed = self.memory_mut().protect(part.start, part.len(), flags);
            drop(guard);
            changed.map_err(os)
        })
    }

    /// Discards the pages of a part: offsets, end exclusive, whole pages. They read as zeros
    /// afterwards; on systems other than Linux they are readable and writable, too.
    ///
    /// Private memory is discarded by `MADV_DONTNEED`; shared memory by punching a hole into its
    /// file (`FALLOC_FL_PUNCH_HOLE`), so that it is gone for all who have mapped it, and the
    /// operating system has it back.
    ///
    /// # Errors
    /// [`MapError`]. Memory that is locked (`mlock`) is refused; what lies before it in the part
    /// may have been discarded.
    pub fn discard(
        &mut self,
        part: Range<usize>,
    ) -> Waitable<impl Future<Output = Result<(), MapError>>> {
        Waitable::new(async move {
            let range = self.part(&part)?;
            let space = self.space.clone();
            let guard = invalidated(&space, self.process, range, Event::Clear).await?;
            let changed = self.memory_mut().discard(part.start, part.len());
            drop(guard);
            changed.map_err(os)
        })
    }

    /// Discards all of it and maps new memory of the same kind at the same address, under one
    /// invalidation: at no moment may somebody else take the address.
    ///
    /// All of it is readable and writable afterwards. Private memory and [shared](Self::shared)
    /// memory are zeros; the latter has a new descriptor, and who has mapped the old one keeps it.
    /// A [part of a descriptor](Self::from_fd) is mapped once more, with what is in it.
    ///
    /// # Errors
    /// [`MapError::Os`]: nothing has changed. [`MapError::AddressLost`].
    pub fn map_again(&mut self) -> Waitable<impl Future<Output = Result<(), MapError>>> {
        Waitable::new(async move {
            self.bracketed(Event::Unmap, |memory| {
                let backing = memory.backing().again(memory.len()).map_err(os)?;
                replaced(memory.replace(backing))
            })
            .await
        })
    }

    /// Discards all of it and maps a descriptor from `offset` on at the same address, with the same
    /// length, under one invalidation (Linux). See [`from_fd`](Self::from_fd) for what may be
    /// mapped, [`map_again`](Self::map_again) for the rest.
    ///
    /// # Errors
    /// [`MapError`]; but for [`MapError::AddressLost`] nothing has changed.
    #[cfg(target_os = "linux")]
    pub fn map_again_from_fd(
        &mut self,
        fd: OwnedFd,
        offset: u64,
    ) -> Waitable<impl Future<Output = Result<(), MapError>>> {
        Waitable::new(async move {
            let len = self.len();
            let (file, whole) = File::adopt(fd, offset, len)?;
            if whole != len || !(self.range().start() as usize).is_multiple_of(file.unit()) {
                return Err(MapError::NotPages { part: 0..len, len, page: file.unit() });
            }
            self.bracketed(Event::Unmap, |memory| replaced(memory.replace(Backing::Shared(file))))
                .await
        })
    }

    /// Changes all of it between the beginning and the end of an invalidation.
    async fn bracketed(
        &mut self,
        event: Event,
        change: impl FnOnce(&mut Memory) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        self.check()?;
        let space = self.space.clone();
        let guard = invalidated(&space, self.process, self.range(), event).await?;
        let changed = change(self.memory_mut());
        drop(guard);
        changed
    }

    /// Returns the bytes that all mappings of the process together left mapped: because they were
    /// dropped while a device used them, or because the kernel refused to move something there and
    /// did not say whether it had unmapped the place already.
    pub fn leaked_bytes() -> u64 {
        LEAKED.load(Ordering::Relaxed)
    }

    /// Whether it may be changed in this process (M4).
    fn check(&self) -> Result<(), MapError> {
        if self.process == std::process::id() { Ok(()) } else { Err(MapError::Forked) }
    }

    fn part(&self, part: &Range<usize>) -> Result<AddressRange, MapError> {
        self.check()?;
        let (len, page) = (self.len(), self.memory().unit());
        let whole = part.start < part.end
            && part.end <= len
            && part.start.is_multiple_of(page)
            && part.end.is_multiple_of(page);
        // Added only when it lies inside, so that the sum is an address.
        let range =
            || AddressRange::new(self.range().start() + part.start as u64, part.len() as u64).ok();
        whole.then(range).flatten().ok_or(MapError::NotPages { part: part.clone(), len, page })
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("the memory goes only with the mapping")
    }

    fn memory_mut(&mut self) -> &mut Memory {
        self.memory.as_mut().expect("the memory goes only with the mapping")
    }
}

/// Invalidates before a change. The future is left to the parent in a child of `fork` (M4), as the
/// mapping itself is.
async fn invalidated(
    space: &AddressSpace,
    process: u32,
    range: AddressRange,
    event: Event,
) -> Result<InvalidationGuard<'_>, MapError> {
    let invalidation = async { Ok(space.invalidate(range, event).await) };
    LeftToParent::new(invalidation, move || process != std::process::id(), || Err(MapError::Forked))
        .await
}

fn whole_pages(len: usize) -> Result<usize, MapError> {
    whole_units(len, page_size())
}

fn whole_units(len: usize, page: usize) -> Result<usize, MapError> {
    len.checked_next_multiple_of(page).filter(|rounded| *rounded != 0).ok_or(MapError::NotPages {
        part: 0..len,
        len,
        page,
    })
}

fn replaced(answer: Result<(), Refused>) -> Result<(), MapError> {
    answer.map_err(|refused| match refused {
        Refused::Unchanged(error) => os(error),
        Refused::AddressLost(error) => MapError::AddressLost(error.into()),
    })
}

impl Memory {
    #[cfg(target_os = "linux")]
    fn relocated(&mut self, len: usize) -> Result<(), MapError> {
        self.relocate(len).map_err(os)
    }

    #[cfg(not(target_os = "linux"))]
    fn relocated(&mut self, len: usize) -> Result<(), MapError> {
        self.copied(len).map_err(os)
    }

    /// The file is resized first: a page that it does not have cannot be accessed, and it may be
    /// refused (sealed), when nothing has changed yet.
    #[cfg(target_os = "linux")]
    fn resize(&mut self, len: usize) -> Result<(), MapError> {
        let old = self.len();
        if let Backing::Shared(file) = self.backing_mut() {
            file.resize(len)?;
        }
        match len.cmp(&old) {
            core::cmp::Ordering::Less => self.shrink(len).map_err(os),
            core::cmp::Ordering::Equal => Ok(()),
            core::cmp::Ordering::Greater => self.grow(len).map_err(os),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn resize(&mut self, len: usize) -> Result<(), MapError> {
        self.copied(len).map_err(os)
    }
}

impl Backing {
    /// New memory of the same kind.
    fn again(&self, len: usize) -> rustix::io::Result<Self> {
        #[cfg(target_os = "linux")]
        if let Self::Shared(file) = self {
            return file.again(len).map(Self::Shared);
        }
        let _ = len;
        Ok(Self::Private)
    }
}

impl Drop for OwnedMapping {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        if self.check().is_err() {
            // Only the child's own view of the memory goes; the space is the parent's, and so are
            // its locks.
            core::mem::forget(self.space.clone());
            return;
        }
        // After a panic of a driver it is not known whether its device has let go.
        match keep(|_| self.space.try_invalidate(memory.range(), Event::Unmap)) {
            Ok(Err(_)) => memory.leak(),
            Ok(Ok(guard)) => {
                drop(memory);
                drop(guard);
            }
            Err(panic) => {
                memory.leak();
                self.space.shared().host.losses.resume(FirstPanic::new(Callback::FirstPass, panic));
            }
        }
    }
}

impl fmt::Debug for OwnedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.memory {
            Some(memory) => f
                .debug_struct("OwnedMapping")
                .field("range", &memory.range())
                .finish_non_exhaustive(),
            None => f.write_str("OwnedMapping(unmapped)"),
        }
    }
}
