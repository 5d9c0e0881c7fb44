//! A process's memory: every change of it is bracketed by an invalidation, with the event and the
//! owner that the kernel gives it.
//!
//! Changes exclude each other (the kernel's `mmap_lock`). What the processor reads and writes does
//! not wait for them, and neither does a device that [looks](Process::range_fault): that is what
//! the sequence protocol is for.

use crate::engine::pause;
use crate::frame::{Frame, Mapped, PAGE, WORDS};
use crate::vma::{BIG, Backing, Entry, Protection, Tables, Vma};
use futures::lock::{Mutex as AsyncMutex, MutexGuard};
use shootdown::{AddressRange, AddressSpace, Event, InvalidationGuard, Owner};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// An access that the memory does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is mapped there, or it may not even be read: `EFAULT`.
    NotReadable { page: u64 },
    /// It may not be written: `EPERM`.
    NotWritable { page: u64 },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReadable { page } => {
                write!(f, "nothing is mapped at {:#x} that could be read", page * PAGE)
            }
            Self::NotWritable { page } => {
                write!(f, "the memory at {:#x} is read-only", page * PAGE)
            }
        }
    }
}

impl std::error::Error for Fault {}

/// What a device sees of a page: the frame, and whether it may write.
pub type Seen = (Arc<Frame>, bool);

/// Where a page is, seen from a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residence {
    System,
    /// In this device's memory.
    Local,
    /// In another device's, which this one can use.
    Remote,
}

/// A page as a snapshot shows it: without faulting anything in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Not mapped, or not readable.
    Error,
    /// No entry, or none that this device could use as it is.
    None,
    /// `writable` as it is mapped now.
    Present { writable: bool, zero: bool, big: bool, residence: Residence },
}

/// A handle; all clones are the same process.
#[derive(Clone)]
pub struct Process(Arc<Inner>);

struct Inner {
    space: AddressSpace,
    tables: Mutex<Tables>,
    /// Held by whoever changes the memory, for as long as its invalidations take.
    changing: AsyncMutex<()>,
    next: Mutex<u64>,
}

/// The pages that `range` touches, end exclusive.
pub fn pages(range: AddressRange) -> Range<u64> {
    range.start() / PAGE..range.last() / PAGE + 1
}

/// The addresses of pages, end exclusive.
pub fn addresses(pages: Range<u64>) -> AddressRange {
    AddressRange::new(pages.start * PAGE, (pages.end - pages.start) * PAGE)
        .expect("at least one page, and below the last")
}

impl Process {
    pub fn new() -> Self {
        Self::with(Tables::default(), 0x7f00_0000)
    }

    fn with(tables: Tables, next: u64) -> Self {
        let (space, changing) = (AddressSpace::new(), AsyncMutex::new(()));
        Self(Arc::new(Inner {
            space,
            tables: Mutex::new(tables),
            changing,
            next: Mutex::new(next),
        }))
    }

    /// Where devices subscribe.
    pub fn space(&self) -> &AddressSpace {
        &self.0.space
    }

    fn tables<R>(&self, work: impl FnOnce(&mut Tables) -> R) -> R {
        work(&mut self.0.tables.lock().unwrap())
    }

    /// `mmap`: so many pages where there is room, beginning where a big entry could.
    pub fn map(&self, count: u64, protection: Protection, backing: Backing) -> AddressRange {
        let first = {
            let mut next = self.0.next.lock().unwrap();
            let first = *next;
            *next = (first + count).next_multiple_of(BIG) + BIG;
            first
        };
        self.tables(|tables| {
            tables.add(first, Vma { end: first + count, protection, backing, big: false })
        });
        addresses(first..first + count)
    }

    /// `munmap`.
    pub async fn unmap(&self, range: AddressRange) {
        let change = self.change().await;
        self.unmap_under(&change, pages(range)).await;
    }

    async fn unmap_under(&self, _change: &MutexGuard<'_, ()>, pages: Range<u64>) {
        self.split_edges(&pages).await;
        let guard = self.0.space.invalidate(addresses(pages.clone()), Event::Unmap).await;
        let gone = self.tables(|tables| tables.take(pages));
        drop(gone);
        drop(guard);
    }

    /// `mprotect`.
    pub async fn protect(&self, range: AddressRange, protection: Protection) {
        let (_change, pages) = (self.change().await, pages(range));
        self.split_edges(&pages).await;
        let _guard = self.0.space.invalidate(range, Event::ProtectionVma).await;
        self.tables(|tables| {
            tables.areas(pages.clone()).for_each(|(_, vma)| vma.protection = protection);
            if !protection.write {
                tables.write_protect(pages);
            }
        });
    }

    /// `madvise(MADV_DONTNEED)`: private pages read as zero from now on.
    pub async fn discard(&self, range: AddressRange) {
        let (_change, pages) = (self.change().await, pages(range));
        self.split_edges(&pages).await;
        let _guard = self.0.space.invalidate(range, Event::Clear).await;
        drop(self.tables(|tables| tables.take_entries(pages)));
    }

    /// `madvise(MADV_HUGEPAGE)`: whole blocks that have no page yet get a big entry.
    pub fn advise_big(&self, range: AddressRange) {
        self.tables(|tables| tables.areas(pages(range)).for_each(|(_, vma)| vma.big = true));
    }

    /// `mremap` to the address `to`, over what is there; with `keep` (`MREMAP_DONTUNMAP`) the old
    /// addresses stay mapped, to empty pages.
    pub async fn remap(&self, range: AddressRange, to: u64, keep: bool) -> AddressRange {
        let change = self.change().await;
        let (from, first) = (pages(range), to / PAGE);
        let target = first..first + (from.end - from.start);
        self.unmap_under(&change, target.clone()).await;
        self.split_edges(&from).await;
        let _guard = self.0.space.invalidate(range, Event::Unmap).await;
        self.tables(|tables| {
            let (areas, entries) = tables.take(from.clone());
            for (area, vma) in areas {
                let at = first + (area - from.start);
                tables.add(at, Vma { end: at + (vma.end - area), ..vma.clone() });
                if keep {
                    tables.add(area, vma);
                }
            }
            for (page, mut entry) in entries {
                if from.start % BIG != first % BIG {
                    entry.split();
                }
                tables.entries.insert(first + (page - from.start), entry);
            }
        });
        addresses(target)
    }

    /// `fork`: private pages are shared, and copied by whoever writes first.
    pub async fn fork(&self) -> Self {
        let _change = self.change().await;
        let areas: Vec<_> =
            self.tables(|tables| tables.vmas().map(|(pages, vma)| (pages, vma.clone())).collect());
        let mut child = Tables::default();
        for (pages, vma) in areas {
            let private = matches!(vma.backing, Backing::Private);
            child.add(pages.start, vma);
            if private {
                let _guard =
                    self.0.space.invalidate(addresses(pages.clone()), Event::ProtectionPage).await;
                self.tables(|tables| {
                    tables.write_protect(pages.clone());
                    child.entries.extend(
                        tables.entries.range(pages).map(|(page, entry)| (*page, entry.clone())),
                    );
                });
            }
        }
        Self::with(child, *self.0.next.lock().unwrap())
    }

    /// The end of the process.
    pub async fn exit(&self) {
        let _change = self.change().await;
        let _guard = self.0.space.release().await;
        drop(self.tables(std::mem::take));
    }

    /// What the processor reads: `count` words from `start` on.
    ///
    /// # Errors
    /// Where it would get a signal. What comes before the page has been read.
    pub async fn read(&self, start: u64, count: usize) -> Result<Vec<u64>, Fault> {
        let mut words = Vec::with_capacity(count);
        while words.len() < count {
            let at = start + words.len() as u64 * 8;
            let (page, from) = (at / PAGE, (at % PAGE / 8) as usize);
            let upto = WORDS.min(from + count - words.len());
            let read = |frame: &Frame| words.extend((from..upto).map(|word| frame.load(word)));
            self.access(page, false, None, read).await?;
        }
        Ok(words)
    }

    /// What the processor writes, from `start` on.
    ///
    /// # Errors
    /// Where it would get a signal. What comes before the page has been written.
    pub async fn write(&self, start: u64, words: &[u64]) -> Result<(), Fault> {
        let mut rest = words;
        while !rest.is_empty() {
            let at = start + (words.len() - rest.len()) as u64 * 8;
            let (page, from) = (at / PAGE, (at % PAGE / 8) as usize);
            let (these, next) = rest.split_at(rest.len().min(WORDS - from));
            let write = |frame: &Frame| {
                these.iter().enumerate().for_each(|(word, value)| frame.store(from + word, *value))
            };
            self.access(page, true, None, write).await?;
            rest = next;
        }
        Ok(())
    }

    /// Uses a page under the lock of the page table, so that no change comes in between.
    async fn access<R>(
        &self,
        page: u64,
        write: bool,
        by: Option<Owner>,
        mut work: impl FnMut(&Frame) -> R,
    ) -> Result<R, Fault> {
        loop {
            let used = self.tables(|tables| {
                Ok(usable(tables, page, write, by)?.map(|(frame, _)| work(&frame)))
            })?;
            match used {
                Some(result) => return Ok(result),
                None => self.fault(page, write, by).await?,
            }
        }
    }

    /// `hmm_range_fault`: what a device is to map, faulted in where it has to be. The answer may be
    /// stale when it is there: install it only if the notifier was not invalidated since
    /// `read_begin`.
    ///
    /// # Errors
    /// [`Fault`].
    pub async fn range_fault(
        &self,
        pages: Range<u64>,
        write: bool,
        by: Owner,
    ) -> Result<Vec<Seen>, Fault> {
        let mut seen = Vec::new();
        for page in pages {
            loop {
                let found = self.tables(|tables| usable(tables, page, write, Some(by)))?;
                if let Some(found) = found {
                    seen.push(found);
                    break;
                }
                self.fault(page, write, Some(by)).await?;
            }
            if page % 16 == 15 {
                pause().await; // it takes time, in which anything may happen
            }
        }
        Ok(seen)
    }

    /// What a device would see, page by page. As with [`range_fault`](Self::range_fault) the answer
    /// may be stale.
    pub fn snapshot(&self, pages: Range<u64>, by: Owner) -> Vec<PageState> {
        self.tables(|tables| pages.map(|page| state(tables, page, by)).collect())
    }

    /// Makes a page usable, which may change what others have mapped.
    async fn fault(&self, page: u64, write: bool, by: Option<Owner>) -> Result<(), Fault> {
        let ready = |tables: &mut Tables| {
            Ok(usable(tables, page, write, by)?.is_some() || tables.fill(page, write))
        };
        if self.tables(ready)? {
            return Ok(());
        }
        let _change = self.change().await;
        // Somebody else may have done it meanwhile.
        if self.tables(ready)? {
            return Ok(());
        }
        self.split_edges(&(page..page + 1)).await;
        // From a device's memory to the system's; else another frame, or an exclusive right that
        // ends.
        let home =
            self.tables(|tables| matches!(tables.entries.get(&page), Some(Entry::Device { .. })));
        let event = if home { Event::Migrate { owner: None } } else { Event::Clear };
        let _guard = self.0.space.invalidate(addresses(page..page + 1), event).await;
        self.tables(|tables| {
            let entry = match tables.entries.get(&page) {
                Some(Entry::Zero) => {
                    Entry::System { page: Mapped::zeroed(None), writable: true, big: false }
                }
                Some(Entry::Exclusive { page, .. }) => {
                    Entry::System { page: page.clone(), writable: false, big: false }
                }
                Some(Entry::Device { page, .. } | Entry::System { page, .. }) => Entry::System {
                    page: Mapped::copy_of(page.frame(), None),
                    writable: false,
                    big: false,
                },
                None => return,
            };
            tables.entries.insert(page, entry);
        });
        Ok(())
    }

    async fn change(&self) -> MutexGuard<'_, ()> {
        self.0.changing.lock().await
    }

    /// Splits the big entries that `pages` cuts: their blocks stay mapped, page by page.
    async fn split_edges(&self, pages: &Range<u64>) {
        for edge in [pages.start, pages.end] {
            let cut =
                |tables: &mut Tables| tables.big_block(edge).filter(|block| block.start != edge);
            let Some(block) = self.tables(cut) else { continue };
            let _guard = self.0.space.invalidate(addresses(block.clone()), Event::Clear).await;
            self.tables(|tables| {
                tables.entries.range_mut(block).for_each(|(_, entry)| entry.split())
            });
        }
    }

    /// Begins to move pages on behalf of a device, or to give it exclusive access: all *other*
    /// devices have let go of them now, and its own notifier, which recognises the owner, was left
    /// alone. The pages stay as they are until one of the methods says otherwise.
    ///
    /// # Errors
    /// [`Fault::NotReadable`] when not all of it is mapped and readable.
    pub async fn begin(&self, pages: Range<u64>, event: Event) -> Result<Migration<'_>, Fault> {
        let change = self.change().await;
        if let Some(page) = self.tables(|tables| tables.unreadable(pages.clone())) {
            return Err(Fault::NotReadable { page });
        }
        self.split_edges(&pages).await;
        let guard = self.0.space.invalidate(addresses(pages.clone()), event).await;
        Ok(Migration { process: self, pages, owner: event.owner(), _guard: guard, _change: change })
    }

    /// All pages that are in the memory of `device`.
    pub fn resident(&self, device: Owner) -> Vec<u64> {
        let is_there =
            |entry: &Entry| matches!(entry, Entry::Device { owner, .. } if *owner == device);
        self.tables(|tables| {
            tables
                .entries
                .iter()
                .filter(|(_, entry)| is_there(entry))
                .map(|(page, _)| *page)
                .collect()
        })
    }
}

/// Pages on their way from or to a device: see [`Process::begin`]. The change is over when this is
/// dropped.
pub struct Migration<'a> {
    process: &'a Process,
    pages: Range<u64>,
    owner: Option<Owner>,
    _guard: InvalidationGuard<'a>,
    _change: MutexGuard<'a, ()>,
}

impl Migration<'_> {
    /// Moves what is private and in the system's memory to the owner's; returns what it has then
    /// and is to map.
    pub fn to_device(&self, coherent: bool) -> Vec<(u64, Seen)> {
        let Some(owner) = self.owner else { return Vec::new() };
        self.process.tables(|tables| {
            let mut moved = Vec::new();
            for page in self.pages.clone() {
                let Some((_, vma)) =
                    tables.vma(page).filter(|(_, vma)| matches!(vma.backing, Backing::Private))
                else {
                    continue;
                };
                let rights = vma.protection;
                let (copy, writable) = match tables.entries.get(&page) {
                    Some(Entry::Device { page: there, writable, owner: at, .. })
                        if *at == owner =>
                    {
                        moved.push((page, (there.frame().clone(), *writable)));
                        continue;
                    }
                    None | Some(Entry::Zero) => (Mapped::zeroed(Some(owner)), rights.write),
                    Some(Entry::System { page, writable, .. }) => {
                        (Mapped::copy_of(page.frame(), Some(owner)), *writable)
                    }
                    Some(Entry::Device { .. } | Entry::Exclusive { .. }) => continue,
                };
                moved.push((page, (copy.frame().clone(), writable)));
                tables
                    .entries
                    .insert(page, Entry::Device { page: copy, writable, coherent, owner });
            }
            moved
        })
    }

    /// Moves what is in the owner's memory to the system's; returns how many pages that were.
    pub fn to_system(&self) -> usize {
        self.process.tables(|tables| {
            let mut moved = 0;
            for (_, entry) in tables.entries.range_mut(self.pages.clone()) {
                if let Entry::Device { page, writable, owner, .. } = entry
                    && Some(*owner) == self.owner
                {
                    *entry = Entry::System {
                        page: Mapped::copy_of(page.frame(), None),
                        writable: *writable,
                        big: false,
                    };
                    moved += 1;
                }
            }
            moved
        })
    }

    /// Gives the owner exclusive access to the private pages that are in the system's memory and
    /// writable; returns what it is to map.
    pub fn exclusive(&self) -> Vec<(u64, Seen)> {
        let Some(owner) = self.owner else { return Vec::new() };
        self.process.tables(|tables| {
            let mut given = Vec::new();
            for number in self.pages.clone() {
                let private = tables
                    .vma(number)
                    .is_some_and(|(_, vma)| matches!(vma.backing, Backing::Private));
                let Some(entry) = tables.entries.get_mut(&number).filter(|_| private) else {
                    continue;
                };
                match entry {
                    Entry::System { page, writable: true, .. } => {
                        given.push((number, (page.frame().clone(), true)));
                        *entry = Entry::Exclusive { page: page.clone(), owner };
                    }
                    Entry::Exclusive { page, owner: of } if *of == owner => {
                        given.push((number, (page.frame().clone(), true)))
                    }
                    _ => {}
                }
            }
            given
        })
    }
}

/// What `by` may use as it is; an error if it may not be used at all.
fn usable(
    tables: &Tables,
    page: u64,
    write: bool,
    by: Option<Owner>,
) -> Result<Option<Seen>, Fault> {
    let Some((_, vma)) = tables.vma(page).filter(|(_, vma)| vma.protection.read) else {
        return Err(Fault::NotReadable { page });
    };
    if write && !vma.protection.write {
        return Err(Fault::NotWritable { page });
    }
    Ok(tables.entries.get(&page).and_then(|entry| entry.usable(write, by)))
}

fn state(tables: &Tables, page: u64, by: Owner) -> PageState {
    if usable(tables, page, false, Some(by)).is_err() {
        return PageState::Error;
    }
    let Some(entry) = tables.entries.get(&page) else { return PageState::None };
    let Some((frame, writable)) = entry.usable(false, Some(by)) else { return PageState::None };
    let residence = match frame.device() {
        None => Residence::System,
        Some(owner) if owner == by => Residence::Local,
        Some(_) => Residence::Remote,
    };
    let big = matches!(entry, Entry::System { big: true, .. });
    PageState::Present { writable, zero: matches!(entry, Entry::Zero), big, residence }
}
