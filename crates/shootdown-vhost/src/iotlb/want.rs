//! What a device wants of an IOTLB, and why it has it not.
#![forbid(unsafe_code)]

use shootdown::AddressRange;
use vm_memory::Permissions;

/// What a device wants to access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// The first I/O virtual address.
    pub iova: u64,
    /// The number of bytes, at least 1.
    pub len: u64,
    /// What the device does there.
    pub access: Permissions,
}

impl Want {
    /// The device reads `len` bytes at `iova`.
    pub fn read(iova: u64, len: u64) -> Self {
        Self { iova, len, access: Permissions::Read }
    }

    /// The device writes `len` bytes at `iova`.
    pub fn write(iova: u64, len: u64) -> Self {
        Self { iova, len, access: Permissions::Write }
    }

    pub(super) fn range(self) -> Result<AddressRange, MapError> {
        AddressRange::new(self.iova, self.len)
            .map_err(|_| MapError::NoRange { iova: self.iova, len: self.len })
    }
}

/// Why there is no mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The range is empty or wraps around.
    #[error("{len} bytes at {iova:#x} are no range of I/O virtual addresses")]
    NoRange {
        /// The first address that was asked for.
        iova: u64,
        /// The length that was asked for.
        len: u64,
    },
    /// The front-end has no translation, or one that does not allow the access.
    #[error("the front-end has no translation of {iova:#x} that allows {access:?}")]
    Refused {
        /// The first address without one.
        iova: u64,
        /// What was to be done there.
        access: Permissions,
    },
    /// There are more translations in these ranges than are kept at a time.
    #[error("the ranges from {iova:#x} on have more translations than are kept at a time")]
    TooMany {
        /// The first address that is not known now.
        iova: u64,
    },
    /// Nobody would answer: the session has ended or has no back-end channel, or the device has
    /// been stopped.
    #[error("{iova:#x} is not known, and there is nobody to ask")]
    Nobody {
        /// The first address without a translation.
        iova: u64,
    },
}
