//! A mapping that invalidates before it changes.
#![forbid(unsafe_code)]

mod error;
mod resize;
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

/// Owns memory, and invalidates it around every change.
///
/// When a call that changes the memory returns, no device uses the old pages, and no reader has
/// looked at them in between. This is the kernel's own order, without the gap of a
/// [monitor](super::Uffd). Passes run *before* the change, so a driver may still write back what
/// its device has changed.
///
/// The memory is [anonymous and private](Self::new), or [shared](Self::shared), or a part of a
/// [given descriptor](Self::from_fd).
///
/// ```
/// # use shootdown::{AddressSpace, source::OwnedMapping};
/// let space = AddressSpace::new();
/// let mut mapping = OwnedMapping::new(&space, 1 << 16)?;
/// mapping.write(0, b"data");
///
/// // Waits until no device uses the pages, then discards them.
/// mapping.discard(0..mapping.len()).wait()?;
/// let mut data = [1; 4];
/// mapping.read(0, &mut data);
/// assert_eq!(data, [0; 4]);
///
/// mapping.unmap().wait()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Cancel safety
/// The methods that change the memory return futures that do nothing before they are polled. If a
/// future is dropped before it has resolved, the memory has not changed. (`unmap` takes the
/// mapping, which is then dropped; see below.)
///
/// # Dropping
/// Dropping the mapping without [`unmap`](Self::unmap) is safe. If no device uses the memory, or
/// every device releases it at once, the memory is unmapped. If a device needs time, the memory
/// stays mapped for ever, because unmapping would take it away under the device.
/// [`leaked_bytes`](Self::leaked_bytes) counts it.
///
/// # Shared memory
/// An invalidation covers *this* mapping. Other mappings of the same memory, in this process or
/// another, lose discarded pages without being told: telling them is up to the program.
/// [`read`](Self::read) and [`write`](Self::write) are atomic for each byte, so two mappings of the
/// same memory may be used concurrently. If the file is made shorter, accesses beyond its end kill
/// the process (`SIGBUS`). Seal it (`F_SEAL_SHRINK`) against processes that you do not trust.
///
/// # Fork
/// In a child of `fork` the mapping can be read and written; shared memory remains shared with the
/// parent. Changing it returns [`MapError::Forked`]. Dropping it unmaps it in the child only. The
/// drivers of its space belong to the parent and are not called (M4).
#[must_use = "dropping a mapping unmaps it"]
pub struct OwnedMapping {
    space: AddressSpace,
    /// `None` once it has been unmapped.
    memory: Option<Memory>,
    /// Id of the process that made the mapping.
    process: u32,
}

/// Access rights of a part of a mapping, for [`OwnedMapping::protect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// No access: every access faults.
    None,
    /// Read access.
    Read,
    /// Read and write access, as in a new mapping.
    ReadWrite,
}

fn os(error: rustix::io::Errno) -> MapError {
    MapError::Os(error.into())
}

impl OwnedMapping {
    /// Maps `len` bytes of anonymous private memory, rounded up to whole pages. It is readable,
    /// writable and zero. See also [`shared`](Self::shared).
    ///
    /// # Errors
    /// [`MapError`]. A length of 0 is [`MapError::NotPages`].
    pub fn new(space: &AddressSpace, len: usize) -> Result<Self, MapError> {
        Ok(Self::of(space, Memory::map(whole_pages(len)?).map_err(os)?))
    }

    /// Maps `len` bytes of shared memory, rounded up to whole pages (Linux). It is readable,
    /// writable and zero.
    ///
    /// The memory is a `memfd`. Another process can map it when it has received the
    /// [`descriptor`](Self::descriptor). A `fork` shares it instead of copying it. `/proc/PID/maps`
    /// shows it as `shootdown`. It may be sealed.
    ///
    /// ```
    /// # use shootdown::{AddressSpace, source::OwnedMapping};
    /// # let space = AddressSpace::new();
    /// let mut ring = OwnedMapping::shared(&space, 1 << 16)?;
    /// ring.write(0, b"tail");
    ///
    /// // The other process does this with the received descriptor:
    /// let fd = ring.descriptor().unwrap().try_clone_to_owned()?;
    /// let theirs = OwnedMapping::from_fd(&space, fd, 0, 1 << 16)?;
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

    /// Maps `len` bytes of `fd` from `offset` on, readable, writable and shared with every other
    /// mapping of it (Linux).
    ///
    /// `offset` is a multiple of the page size. `len` is rounded up to whole pages. A descriptor of
    /// hugetlbfs has huge pages. `fd` must be open for reading and writing. This mapping never
    /// changes the length of the file.
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

    /// Returns the addresses of the mapping. [`AddressRange::as_ptr`] makes a pointer of them.
    pub fn range(&self) -> AddressRange {
        self.memory().range()
    }

    /// Returns the length of the mapping in bytes.
    pub fn len(&self) -> usize {
        self.memory().len()
    }

    /// Returns `false`: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns the first address, for a device. Valid until the next call of `unmap`, `remap` or
    /// `resize`.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory().as_ptr()
    }

    /// Returns the descriptor of shared memory, or `None` for private memory (Linux).
    ///
    /// A [`resize`](Self::resize) of a mapping made by [`shared`](Self::shared) changes the length
    /// of the file, also for other holders of the descriptor.
    #[cfg(target_os = "linux")]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self.memory().backing() {
            Backing::Private => None,
            Backing::Shared(file) => Some(file.fd()),
        }
    }

    /// Copies bytes from `offset` on out of the mapping.
    ///
    /// # Panics
    /// If the copy exceeds the mapping. The process faults if the part is not
    /// [readable](Protection).
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.memory().read(offset, into);
    }

    /// Copies bytes into the mapping, from `offset` on.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub fn write(&mut self, offset: usize, from: &[u8]) {
        self.memory_mut().write(offset, from);
    }

    /// Moves the mapping to another address. Its contents and the protections of its parts stay.
    ///
    /// Systems other than Linux have no `mremap`. There the contents are copied, and the new
    /// mapping is readable and writable.
    ///
    /// Subscriptions do not move: insert the drivers anew for the returned range.
    ///
    /// # Errors
    /// [`MapError::Os`]; the mapping is then whole and where it was. Once a part has been
    /// [protected](Self::protect), a move needs Linux 5.7 (5.13 for shared memory). Older kernels
    /// and huge pages refuse it as invalid input.
    ///
    /// # Panics
    /// If the kernel has moved a part, refuses to move another, and refuses to move the first one
    /// back. It does so only if it lacks memory of its own.
    pub fn remap(&mut self) -> Waitable<impl Future<Output = Result<AddressRange, MapError>>> {
        Waitable::new(async move {
            self.bracketed(Event::Unmap, |memory| memory.relocate(memory.len()).map_err(os))
                .await?;
            Ok(self.range())
        })
    }

    /// Makes the mapping longer or shorter: `len` bytes, rounded up to whole pages.
    ///
    /// Contents that fit stay, with their protection. New pages are readable, writable and zero. A
    /// mapping that is made shorter does not move. One that is made longer may move (on other
    /// systems than Linux it always moves, and is readable and writable). [Shared](Self::shared)
    /// memory is resized for every mapping of it. A [part of a descriptor](Self::from_fd) can grow
    /// only as far as the file reaches; new pages have the contents of the file.
    ///
    /// Subscriptions neither move nor grow: insert the drivers anew for the returned range.
    ///
    /// # Errors
    /// [`MapError`]; the mapping is then whole and where it was. The file of shared memory may be
    /// longer than before. See [`remap`](Self::remap) for parts with different protections.
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

    /// Changes the access rights of a part: offsets, end exclusive, whole pages.
    ///
    /// # Errors
    /// [`MapError`]. If a part with several protections is refused, its beginning may have changed.
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

    /// Discards the pages of a part: offsets, end exclusive, whole pages. They are zero afterwards.
    /// On systems other than Linux they are also readable and writable.
    ///
    /// Private memory is discarded by `MADV_DONTNEED`. For shared memory a hole is punched into its
    /// file (`FALLOC_FL_PUNCH_HOLE`): every mapping of it loses the pages, and the operating system
    /// gets them back.
    ///
    /// # Errors
    /// [`MapError`]. Locked memory (`mlock`) is refused; the pages before it may have been
    /// discarded.
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

    /// Discards everything and maps new memory of the same kind at the same address, under one
    /// invalidation. At no moment can another thread map something at the address.
    ///
    /// All of it is readable and writable afterwards. Private and [shared](Self::shared) memory is
    /// zero. Shared memory has a new descriptor; other mappings of the old one keep it. A [part of
    /// a descriptor](Self::from_fd) is mapped again, with its contents.
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

    /// Discards everything and maps `fd` from `offset` on at the same address and with the same
    /// length, under one invalidation (Linux). See [`from_fd`](Self::from_fd) for the descriptor,
    /// and [`map_again`](Self::map_again) for the rest.
    ///
    /// # Errors
    /// [`MapError`]. Nothing has changed, except with [`MapError::AddressLost`].
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

    /// Runs `change` on the whole memory under an invalidation.
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

    /// Returns how many bytes all mappings of the process together have left mapped. Reasons: the
    /// mapping was dropped while a device used it, or the kernel refused a move and did not say
    /// whether it had unmapped the target.
    pub fn leaked_bytes() -> u64 {
        LEAKED.load(Ordering::Relaxed)
    }

    /// Returns an error in a child of the process that made the mapping (M4).
    fn check(&self) -> Result<(), MapError> {
        if self.process == std::process::id() { Ok(()) } else { Err(MapError::Forked) }
    }

    fn part(&self, part: &Range<usize>) -> Result<AddressRange, MapError> {
        self.check()?;
        let (len, page) = (self.len(), self.memory().unit());
        let whole =
            part.end <= len && part.start.is_multiple_of(page) && part.end.is_multiple_of(page);
        // A part that ends where it starts, or before, has no length, and is no range.
        let range = || {
            let start = self.range().start().checked_add(part.start as u64)?;
            AddressRange::new(start, part.len() as u64).ok()
        };
        whole.then(range).flatten().ok_or(MapError::NotPages { part: part.clone(), len, page })
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("the memory goes only with the mapping")
    }

    fn memory_mut(&mut self) -> &mut Memory {
        self.memory.as_mut().expect("the memory goes only with the mapping")
    }
}

/// Invalidates before a change. In a child of `fork` the future is left to the parent, like the
/// mapping (M4).
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

impl Drop for OwnedMapping {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        if self.check().is_err() {
            // Unmaps only the child's view of the memory. The space and its locks belong to the
            // parent, so the space is leaked.
            core::mem::forget(self.space.clone());
            return;
        }
        // After a panic of a driver, its device may still use the memory.
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
