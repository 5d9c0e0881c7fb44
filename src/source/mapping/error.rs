//! Why a mapping could not be made or changed.
#![forbid(unsafe_code)]

use core::fmt;
use core::ops::Range;
use std::io;

/// Why a mapping could not be made or changed.
#[derive(Debug)]
#[non_exhaustive]
pub enum MapError {
    /// A length of 0, or a part that is outside of the mapping or does not begin and end at a page.
    NotPages {
        /// The part, as offsets in the mapping (in the file, when a mapping is made).
        part: Range<usize>,
        /// The mapping's length (the file's).
        len: usize,
        /// Bytes of a page.
        page: usize,
    },
    /// The mapping would end behind the end of its descriptor, which the program did not make
    /// here: an access would end the process. A pipe, a socket or a device has 0 bytes.
    BeyondEnd {
        /// Where in the file the mapping would end, exclusive.
        end: u64,
        /// Bytes that the file has.
        size: u64,
    },
    /// The process is a child of the one that made the mapping: the drivers are the parent's.
    Forked,
    /// The operating system refused; the memory is as it was, unless the method says otherwise.
    Os(io::Error),
    /// New memory could not be put at the address of the old one. The mapping is the new memory, at
    /// another address: see [`OwnedMapping::range`](super::OwnedMapping::range). The old address is
    /// taken for lost, and counted by
    /// [`OwnedMapping::leaked_bytes`](super::OwnedMapping::leaked_bytes).
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
