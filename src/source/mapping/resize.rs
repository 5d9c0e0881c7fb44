//! Resizing memory, and new memory of the same kind.
#![forbid(unsafe_code)]

use super::{Backing, MapError, Memory, os};
use core::cmp::Ordering;

impl Memory {
    /// Resizes the file first: pages beyond its end cannot be accessed, and a sealed file refuses
    /// while nothing has changed yet.
    pub(super) fn resize(&mut self, len: usize) -> Result<(), MapError> {
        let old = self.len();
        #[cfg(target_os = "linux")]
        if let Backing::Shared(file) = self.backing_mut() {
            file.resize(len)?;
        }
        match len.cmp(&old) {
            Ordering::Less => self.shrink(len).map_err(os),
            Ordering::Equal => Ok(()),
            Ordering::Greater => self.grow(len).map_err(os),
        }
    }
}

impl Backing {
    /// Returns new memory of the same kind.
    pub(super) fn again(&self, len: usize) -> rustix::io::Result<Self> {
        #[cfg(target_os = "linux")]
        if let Self::Shared(file) = self {
            return file.again(len).map(Self::Shared);
        }
        let _ = len;
        Ok(Self::Private)
    }
}
