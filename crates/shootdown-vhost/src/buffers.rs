//! The buffers of a request as one sequence of bytes.
#![forbid(unsafe_code)]

use crate::mapping::{AccessError, Mapping};
use std::ops::Range;

/// Mappings in a row, as one sequence of bytes.
#[derive(Debug, Default)]
pub struct Buffers(Vec<Mapping>);

impl Buffers {
    /// Makes buffers of these mappings, in order.
    pub fn new(mappings: Vec<Mapping>) -> Self {
        Self(mappings)
    }

    /// Returns the mappings, one for each descriptor.
    pub fn mappings(&self) -> &[Mapping] {
        &self.0
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.0.iter().map(Mapping::len).sum()
    }

    /// Returns `true` if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the parts of the mappings that `range` consists of: the mapping, the offset in it,
    /// the length, and the distance from the start of `range`.
    fn parts(&self, range: Range<usize>) -> impl Iterator<Item = (&Mapping, usize, usize, usize)> {
        let mut at = 0;
        self.0.iter().filter_map(move |mapping| {
            let (start, end) = (at, at + mapping.len());
            at = end;
            let (from, to) = (range.start.max(start), range.end.min(end));
            (from < to).then(|| (mapping, from - start, to - from, from - range.start))
        })
    }

    fn check(&self, offset: usize, len: usize) -> Result<Range<usize>, AccessError> {
        let size = self.len();
        let end = offset.checked_add(len).filter(|end| *end <= size);
        end.map(|end| offset..end).ok_or(AccessError::Outside { offset, len, size })
    }

    /// Copies bytes from `offset` on into `into`.
    ///
    /// # Errors
    /// As for [`Mapping::read`].
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), AccessError> {
        let range = self.check(offset, into.len())?;
        for (mapping, from, len, at) in self.parts(range) {
            mapping.read(from, &mut into[at..at + len])?;
        }
        Ok(())
    }

    /// Copies `from` into the buffers, from `offset` on.
    ///
    /// # Errors
    /// As for [`Mapping::write`].
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), AccessError> {
        let range = self.check(offset, from.len())?;
        for (mapping, start, len, at) in self.parts(range) {
            mapping.write(start, &from[at..at + len])?;
        }
        Ok(())
    }

    /// Returns pointers to the bytes of `range`, for `readv`, `io_uring` and the like. They are
    /// valid as long as the buffers exist: keep them until the kernel has completed the request.
    ///
    /// # Errors
    /// [`AccessError::Outside`] if `range` goes beyond the end.
    pub fn iovecs(&self, range: Range<usize>) -> Result<Vec<libc::iovec>, AccessError> {
        let range = self.check(range.start, range.end.saturating_sub(range.start))?;
        let mut all = Vec::new();
        for (mapping, from, len, _) in self.parts(range) {
            mapping.add_iovecs(from, len, &mut all);
        }
        Ok(all)
    }
}
