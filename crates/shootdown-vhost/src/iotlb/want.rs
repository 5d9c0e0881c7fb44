//! Requests to an IOTLB, and their errors.
#![forbid(unsafe_code)]

use shootdown::AddressRange;
use vm_memory::Permissions;

/// A range and an access that a device wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// First I/O virtual address.
    pub iova: u64,
    /// Number of bytes, at least 1.
    pub len: u64,
    /// Access of the device.
    pub access: Permissions,
}

impl Want {
    /// Wants to read `len` bytes at `iova`.
    pub fn read(iova: u64, len: u64) -> Self {
        Self { iova, len, access: Permissions::Read }
    }

    /// Wants to write `len` bytes at `iova`.
    pub fn write(iova: u64, len: u64) -> Self {
        Self { iova, len, access: Permissions::Write }
    }

    pub(super) fn range(self) -> Result<AddressRange, MapError> {
        AddressRange::new(self.iova, self.len)
            .map_err(|_| MapError::NoRange { iova: self.iova, len: self.len })
    }
}

/// Reason why there is no mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The range is empty or wraps around.
    #[error("{len} bytes at {iova:#x} are no range of I/O virtual addresses")]
    NoRange {
        /// First requested address.
        iova: u64,
        /// Requested length.
        len: u64,
    },
    /// The front-end has no translation, or one that does not permit the access.
    #[error("the front-end has no translation of {iova:#x} that allows {access:?}")]
    Refused {
        /// First address without one.
        iova: u64,
        /// Requested access.
        access: Permissions,
    },
    /// The ranges have more translations than are kept at a time.
    #[error("the ranges from {iova:#x} on have more translations than are kept at a time")]
    TooMany {
        /// First address that is not known at the moment.
        iova: u64,
    },
    /// There is no answer to wait for: the session has ended or has no back-end channel, or the
    /// device was stopped.
    #[error("{iova:#x} is not known, and there is nobody to ask")]
    Nobody {
        /// First address without a translation.
        iova: u64,
    },
}
