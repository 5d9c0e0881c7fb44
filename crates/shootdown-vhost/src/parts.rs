//! Guest memory in parts, whoever keeps it in use.
#![forbid(unsafe_code)]

use crate::memory::Region;
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, VolatileSlice};

/// Contiguous memory.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) region: Arc<Region>,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

/// Memory in order. Says nothing of how long it may be used.
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

    /// Adds what follows; one piece with what it is contiguous with.
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

    /// Whether there are so many bytes at `offset`.
    pub(crate) fn has(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len())
    }

    /// `None`, and nothing is copied, if it goes beyond the end.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) -> Option<()> {
        self.has(offset, into.len()).then(|| {
            self.each(offset, into.len(), |slice, at| {
                slice.copy_to(&mut into[at..at + slice.len()]);
            });
        })
    }

    /// `None`, and nothing is copied, if it goes beyond the end.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Option<()> {
        self.has(offset, from.len()).then(|| {
            self.each(offset, from.len(), |slice, at| slice.copy_from(&from[at..at + slice.len()]));
        })
    }

    /// `None` if it is not inside, not aligned or not contiguous.
    pub(crate) fn load_u16(&self, offset: usize) -> Option<u16> {
        self.contiguous(offset, 2)?.load(0, Ordering::Acquire).ok().map(u16::from_le)
    }

    /// `None` if it is not inside, not aligned or not contiguous.
    pub(crate) fn store_u16(&self, offset: usize, value: u16) -> Option<()> {
        self.contiguous(offset, 2)?.store(value.to_le(), 0, Ordering::Release).ok()
    }

    /// Calls `f` for each contiguous part of a range that is inside, with how far it is from
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
