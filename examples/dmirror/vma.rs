//! What a process has mapped where, and the entries of its page table.

use crate::frame::{File, Frame, Mapped};
use shootdown::Owner;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Pages that one big entry of a page table maps.
pub const BIG: u64 = 512;

/// What may be done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection {
    pub read: bool,
    pub write: bool,
}

impl Protection {
    pub const NONE: Self = Self { read: false, write: false };
    pub const READ: Self = Self { read: true, write: false };
    pub const WRITE: Self = Self { read: true, write: true };
}

/// Where the pages of an area come from.
#[derive(Clone)]
pub enum Backing {
    /// Zero at first, copied on write after a fork.
    Private,
    /// A file's, from its page on.
    Shared(Arc<File>, u64),
}

/// An area of one protection and backing. Page numbers, end exclusive.
#[derive(Clone)]
pub struct Vma {
    pub end: u64,
    pub protection: Protection,
    pub backing: Backing,
    /// Big entries are wanted (`MADV_HUGEPAGE`).
    pub big: bool,
}

/// An entry of the page table. A page without one is filled when it is used.
#[derive(Clone)]
pub enum Entry {
    /// The zero page, read-only.
    Zero,
    /// In the system's memory; `big` if it is mapped together with the others of its block.
    System { page: Mapped, writable: bool, big: bool },
    /// In a device's memory, which the processor can use if it is coherent.
    Device { page: Mapped, writable: bool, coherent: bool, owner: Owner },
    /// In the system's memory, for the owner's atomic accesses alone.
    Exclusive { page: Mapped, owner: Owner },
}

impl Entry {
    /// What `by` (the processor if `None`) reads, or writes, through this entry as it is.
    pub fn usable(&self, write: bool, by: Option<Owner>) -> Option<(Arc<Frame>, bool)> {
        let (page, writable) = match self {
            Self::Zero if !write => return Some((Frame::zero(), false)),
            Self::System { page, writable, .. } => (page, *writable),
            Self::Device { page, writable, coherent, owner } if *coherent || by == Some(*owner) => {
                (page, *writable)
            }
            Self::Exclusive { page, owner } if by == Some(*owner) => (page, true),
            _ => return None,
        };
        (writable || !write).then(|| (page.frame().clone(), writable))
    }

    fn write_protect(&mut self) {
        match self {
            Self::Zero => {}
            Self::System { writable, .. } | Self::Device { writable, .. } => *writable = false,
            Self::Exclusive { page, .. } => {
                *self = Self::System { page: page.clone(), writable: false, big: false }
            }
        }
    }

    pub fn split(&mut self) {
        if let Self::System { big, .. } = self {
            *big = false;
        }
    }
}

/// What lay somewhere: areas and entries by their first page.
pub type Taken = (Vec<(u64, Vma)>, Vec<(u64, Entry)>);

/// Areas and page table of a process.
#[derive(Default)]
pub struct Tables {
    vmas: BTreeMap<u64, Vma>,
    pub entries: BTreeMap<u64, Entry>,
}

impl Tables {
    pub fn vma(&self, page: u64) -> Option<(u64, &Vma)> {
        self.vmas
            .range(..=page)
            .next_back()
            .filter(|(_, vma)| page < vma.end)
            .map(|(first, vma)| (*first, vma))
    }

    pub fn vmas(&self) -> impl Iterator<Item = (Range<u64>, &Vma)> {
        self.vmas.iter().map(|(first, vma)| (*first..vma.end, vma))
    }

    /// Cuts the area that `page` lies in, if it does not begin there.
    fn cut(&mut self, page: u64) {
        let Some((first, vma)) = self.vma(page).filter(|(first, _)| *first != page) else { return };
        let mut upper = vma.clone();
        if let Backing::Shared(_, from) = &mut upper.backing {
            *from += page - first;
        }
        self.vmas.entry(first).and_modify(|vma| vma.end = page);
        self.vmas.insert(page, upper);
    }

    /// The areas that lie in `pages`, cut to fit.
    pub fn areas(&mut self, pages: Range<u64>) -> impl Iterator<Item = (u64, &mut Vma)> {
        self.cut(pages.start);
        self.cut(pages.end);
        self.vmas.range_mut(pages).map(|(first, vma)| (*first, vma))
    }

    pub fn add(&mut self, first: u64, vma: Vma) {
        self.vmas.insert(first, vma);
    }

    /// Takes areas and entries out.
    pub fn take(&mut self, pages: Range<u64>) -> Taken {
        let areas: Vec<_> =
            self.areas(pages.clone()).map(|(first, vma)| (first, vma.clone())).collect();
        areas.iter().for_each(|(first, _)| drop(self.vmas.remove(first)));
        (areas, self.take_entries(pages))
    }

    pub fn take_entries(&mut self, pages: Range<u64>) -> Vec<(u64, Entry)> {
        let numbers: Vec<u64> = self.entries.range(pages).map(|(page, _)| *page).collect();
        numbers.into_iter().filter_map(|page| Some((page, self.entries.remove(&page)?))).collect()
    }

    pub fn write_protect(&mut self, pages: Range<u64>) {
        self.entries.range_mut(pages).for_each(|(_, entry)| entry.write_protect());
    }

    /// Whether all of `pages` may be read, and which is the first that may not.
    pub fn unreadable(&self, mut pages: Range<u64>) -> Option<u64> {
        pages.find(|page| !self.vma(*page).is_some_and(|(_, vma)| vma.protection.read))
    }

    /// The block of `page`, if a big entry maps it.
    pub fn big_block(&self, page: u64) -> Option<Range<u64>> {
        let first = page - page % BIG;
        matches!(self.entries.get(&page), Some(Entry::System { big: true, .. }))
            .then_some(first..first + BIG)
    }

    /// Fills a page that has no entry, or more rights than its entry gives, where nobody has to be
    /// told of it: what was not there, or could do less, no device can have mapped wrongly. Returns
    /// whether it could.
    pub fn fill(&mut self, page: u64, write: bool) -> bool {
        let Some((first, Vma { end, protection: rights, backing, big })) =
            self.vma(page).map(|(first, vma)| (first, vma.clone()))
        else {
            return false;
        };
        let block = page - page % BIG..page - page % BIG + BIG;
        match (self.entries.get_mut(&page), &backing) {
            (None, Backing::Shared(file, from)) => {
                let entry = Entry::System {
                    page: file.page(from + page - first),
                    writable: rights.write,
                    big: false,
                };
                self.entries.insert(page, entry);
            }
            (None, Backing::Private) => {
                let big = big && first <= block.start && block.end <= end;
                if big && self.entries.range(block.clone()).next().is_none() {
                    for page in block {
                        let zeroed = Mapped::zeroed(None);
                        self.entries.insert(
                            page,
                            Entry::System { page: zeroed, writable: rights.write, big: true },
                        );
                    }
                } else if write {
                    self.entries.insert(
                        page,
                        Entry::System { page: Mapped::zeroed(None), writable: true, big: false },
                    );
                } else {
                    self.entries.insert(page, Entry::Zero);
                }
            }
            (Some(Entry::System { page, writable, .. }), backing) if write && !*writable => {
                if matches!(backing, Backing::Private) && page.is_shared() {
                    return false;
                }
                *writable = true;
            }
            _ => return false,
        }
        true
    }
}
