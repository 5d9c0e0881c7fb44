//! Moving, resizing and replacing memory, by the means of the system.
#![forbid(unsafe_code)]

use super::{Backing, MapError, Memory, os};

impl Memory {
    #[cfg(target_os = "linux")]
    pub(super) fn relocated(&mut self, len: usize) -> Result<(), MapError> {
        self.relocate(len).map_err(os)
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn relocated(&mut self, len: usize) -> Result<(), MapError> {
        self.copied(len).map_err(os)
    }

    /// Resizes the file first: pages beyond its end cannot be accessed, and a sealed file refuses
    /// while nothing has changed yet.
    #[cfg(target_os = "linux")]
    pub(super) fn resize(&mut self, len: usize) -> Result<(), MapError> {
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
    pub(super) fn resize(&mut self, len: usize) -> Result<(), MapError> {
        self.copied(len).map_err(os)
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
