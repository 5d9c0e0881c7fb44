//! Guest memory in parts. Others keep it in use.
#![forbid(unsafe_code)]

use crate::memory::Region;
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, VolatileSlice};

/// A contiguous part of a region.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) region: Arc<Region>,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

/// Parts of memory in order. They do not keep the memory in use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parts(SmallVec<[Piece; 1]>);

impl Parts {
    pub(crate) const fn new() -> Self {
        Self(SmallVec::new_const())
    }

    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.0
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Appends a part. Merges it with the last one if they are contiguous.
    pub(crate) fn push(&mut self, region: &Arc<Region>, offset: usize, len: usize) {
        match self.0.last_mut() {
            Some(before)
                if before.offset + before.len == offset && Arc::ptr_eq(&before.region, region) =>
            {
                before.len += len
            }
            _ => self.0.push(Piece { region: region.clone(), offset, len }),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(|piece| piece.len).sum()
    }

    pub(crate) fn slices(&self) -> impl ExactSizeIterator<Item = VolatileSlice<'_>> {
        self.0.iter().map(|piece| {
            piece.region.slice(piece.offset, piece.len).expect("it was looked up there")
        })
    }

    /// Returns `true` if there are `len` bytes at `offset`.
    pub(crate) fn has(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len())
    }

    /// Copies out of the memory. Returns `None` and copies nothing if it goes beyond the end.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) -> Option<()> {
        self.has(offset, into.len()).then(|| {
            self.each(offset, into.len(), |slice, at| {
                slice.copy_to(&mut into[at..at + slice.len()]);
            });
        })
    }

    /// Copies into the memory. Returns `None` and copies nothing if it goes beyond the end.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Option<()> {
        self.has(offset, from.len()).then(|| {
            self.each(offset, from.len(), |slice, at| slice.copy_from(&from[at..at + slice.len()]));
        })
    }

    /// Loads a number. Returns `None` if it is not inside, not aligned or not contiguous.
    pub(crate) fn load_u16(&self, offset: usize) -> Option<u16> {
        self.contiguous(offset, 2)?.load(0, Ordering::Acquire).ok().map(u16::from_le)
    }

    /// Stores a number. Returns `None` if it is not inside, not aligned or not contiguous.
    pub(crate) fn store_u16(&self, offset: usize, value: u16) -> Option<()> {
        self.contiguous(offset, 2)?.store(value.to_le(), 0, Ordering::Release).ok()
    }

    /// Calls `f` with each contiguous part of a range inside the memory, and its distance from
    /// `offset`.
    pub(crate) fn each(
        &self,
        offset: usize,
        len: usize,
        mut f: impl FnMut(VolatileSlice<'_>, usize),
    ) {
        let (mut skip, mut done) = (offset, 0);
        for slice in self.slices() {
            let here = slice.len().saturating_sub(skip).min(len - done);
            if here > 0 {
                f(slice.subslice(skip, here).expect("it is inside"), done);
                done += here;
            }
            skip = skip.saturating_sub(slice.len());
        }
    }

    fn contiguous(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        let mut at = 0;
        for slice in self.slices() {
            if offset >= at && offset.checked_add(len)? <= at + slice.len() {
                return slice.subslice(offset - at, len).ok();
            }
            at += slice.len();
        }
        None
    }
}
