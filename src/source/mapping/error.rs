//! Errors of a mapping.
#![forbid(unsafe_code)]

use core::fmt;
use core::ops::Range;
use std::io;

/// Reason why a mapping could not be made or changed.
#[derive(Debug)]
#[non_exhaustive]
pub enum MapError {
    /// The length is 0, or the part is outside of the mapping or not whole pages.
    NotPages {
        /// The part, as offsets in the mapping (in the file, when a mapping is made).
        part: Range<usize>,
        /// Length of the mapping (of the file).
        len: usize,
        /// Page size in bytes.
        page: usize,
    },
    /// The mapping would end beyond the end of the given file, and an access there would kill the
    /// process. A pipe, a socket or a device has 0 bytes.
    BeyondEnd {
        /// End of the mapping in the file, exclusive.
        end: u64,
        /// Length of the file in bytes.
        size: u64,
    },
    /// This process is a child of the one that made the mapping. The drivers belong to the parent
    /// (M4).
    Forked,
    /// The operating system refused. The memory is unchanged, unless the method says otherwise.
    Os(io::Error),
    /// The new memory could not be put at the old address. The mapping is now the new memory at
    /// another address: see [`OwnedMapping::range`](super::OwnedMapping::range). The old address
    /// counts as lost; [`OwnedMapping::leaked_bytes`](super::OwnedMapping::leaked_bytes) includes
    /// it.
    AddressLost(io::Error),
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPages { part, page, .. } if part.is_empty() => write!(
                f,
                "{:#x}..{:#x} holds no byte: a mapping and a part of it have at least one page of {page:#x} bytes",
                part.start, part.end
            ),
            Self::NotPages { part, len, page } => write!(
                f,
                "{:#x}..{:#x} is not a part of {len:#x} bytes: it must lie inside, and begin and end at multiples of {page:#x}, also in a file",
                part.start, part.end
            ),
            Self::BeyondEnd { end, size } => {
                write!(
                    f,
                    "the mapping would end at {end:#x} of a file of {size:#x} bytes: make the file longer first (ftruncate), if it is a file"
                )
            }
            Self::Forked => f.write_str(
                "this process is a child of the one that made the mapping, whose devices cannot be told here: make another one, of the same descriptor if it is shared",
            ),
            Self::Os(error) => write!(f, "the operating system refused to map the memory or to change it: {error}"),
            Self::AddressLost(error) => {
                write!(f, "the new memory is at another address, the old one could not be taken over: {error}")
            }
        }
    }
}

impl core::error::Error for MapError {}
