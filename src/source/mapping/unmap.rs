//! The end of a mapping.
#![forbid(unsafe_code)]

use super::{Event, MapError, Memory, OwnedMapping, invalidated, os};
use crate::block::Waitable;
use crate::range::AddressRange;
use core::fmt;

/// Error of [`OwnedMapping::unmap`]. It holds the mapping, and its drop drops the mapping.
pub struct UnmapError {
    /// Boxed, so that a result is small.
    mapping: Box<OwnedMapping>,
    error: MapError,
}

impl UnmapError {
    fn new(mapping: OwnedMapping, error: MapError) -> Self {
        Self { mapping: Box::new(mapping), error }
    }

    /// Returns the mapping, which is unchanged.
    pub fn into_mapping(self) -> OwnedMapping {
        *self.mapping
    }

    /// Returns the reason.
    pub fn error(&self) -> &MapError {
        &self.error
    }
}

impl fmt::Display for UnmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} could not be unmapped: {}", self.mapping.range(), self.error)
    }
}

impl fmt::Debug for UnmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnmapError")
            .field("mapping", &self.mapping)
            .field("error", &self.error)
            .finish()
    }
}

impl core::error::Error for UnmapError {}

impl OwnedMapping {
    /// Unmaps the memory, once no device uses it.
    ///
    /// # Errors
    /// [`UnmapError`]. It returns the mapping, which is unchanged.
    pub fn unmap(self) -> Waitable<impl Future<Output = Result<(), UnmapError>>> {
        self.unmap_with(|_| ())
    }

    /// Unmaps the memory like [`unmap`](Self::unmap), and calls `last` just before. No device uses
    /// the memory then, and it is still mapped.
    ///
    /// Use it for bookkeeping, or to look at the devices' results. `last` runs at most once, under
    /// the invalidation, so it must not wait for readers of the range.
    ///
    /// ```
    /// # use shootdown::{AddressSpace, source::OwnedMapping};
    /// # use std::collections::HashMap;
    /// # let space = AddressSpace::new();
    /// let mapping = OwnedMapping::new(&space, 1 << 16)?;
    /// let mut buffers = HashMap::from([(mapping.range(), "ring")]);
    /// mapping
    ///     .unmap_with(|range| drop(buffers.remove(&range)))
    ///     .wait()?;
    /// assert!(buffers.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`unmap`](Self::unmap). If the operating system refused, `last` has run.
    ///
    /// # Panics
    /// A panic of `last` resumes in the caller, and the mapping is dropped.
    pub fn unmap_with(
        mut self,
        last: impl FnOnce(AddressRange),
    ) -> Waitable<impl Future<Output = Result<(), UnmapError>>> {
        Waitable::new(async move {
            if let Err(forked) = self.check() {
                return Err(UnmapError::new(self, forked));
            }
            let space = self.space.clone();
            let guard = match invalidated(&space, self.process, self.range(), Event::Unmap).await {
                Ok(guard) => guard,
                Err(forked) => return Err(UnmapError::new(self, forked)),
            };
            last(self.range());
            let unmapped = self.memory.take().map_or(Ok(()), Memory::unmap);
            drop(guard);
            unmapped.map_err(|(memory, error)| {
                self.memory = Some(memory);
                UnmapError::new(self, os(error))
            })
        })
    }
}
