//! Ranges of addresses, with both ends inclusive so that the last byte of the address space can be
//! named.
#![forbid(unsafe_code)]

mod set;

pub(crate) use set::Parts;
pub use set::RangeSet;

use core::fmt;
use core::ops::{Range, RangeInclusive};

/// A non-empty range of addresses `[start, last]` in bytes, **both ends inclusive**.
///
/// The kernel's interval tree has the same form. Adjacent ranges do not overlap.
///
/// ```
/// use shootdown::{AddressRange, RangeError};
///
/// let pages = AddressRange::new(0x1000, 0x2000)?; // start, length in bytes
/// assert_eq!(pages, AddressRange::try_from(0x1000..0x3000)?); // end exclusive
/// assert_eq!(pages, AddressRange::try_from(0x1000..=0x2fff)?); // end inclusive
/// assert_eq!(AddressRange::new(0x1000, 0), Err(RangeError::Empty { start: 0x1000 }));
/// # Ok::<(), RangeError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressRange {
    start: u64,
    last: u64,
}

/// Why two numbers do not make an [`AddressRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RangeError {
    /// The range holds no byte. Skip the call: there is nothing to watch or to invalidate.
    Empty {
        /// The start that was given.
        start: u64,
    },
    /// `start + len` lies beyond the last address. Shorten the range; to reach the last byte of the
    /// address space use `start..=u64::MAX`.
    Overflow {
        /// The start that was given.
        start: u64,
        /// The length in bytes that was given.
        len: u64,
    },
    /// A [`RangeSet`] was to be made of no range. Skip the call, as for an empty range.
    NoRange,
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Empty { start } => {
                write!(f, "the range at {start:#x} is empty: it must hold at least one byte")
            }
            Self::Overflow { start, len } => write!(
                f,
                "the range of {len:#x} bytes at {start:#x} goes beyond the last address: shorten it, or write start..=u64::MAX"
            ),
            Self::NoRange => f.write_str(
                "a set of ranges needs at least one: skip the call, there is nothing to invalidate",
            ),
        }
    }
}

impl core::error::Error for RangeError {}

impl AddressRange {
    /// The whole address space, `0..=u64::MAX`.
    pub const ALL: Self = Self { start: 0, last: u64::MAX };

    /// The `len` bytes from `start` on.
    ///
    /// # Errors
    /// [`RangeError::Empty`] when `len` is 0, [`RangeError::Overflow`] when a byte of it would lie
    /// beyond `u64::MAX`.
    pub const fn new(start: u64, len: u64) -> Result<Self, RangeError> {
        let Some(more) = len.checked_sub(1) else {
            return Err(RangeError::Empty { start });
        };
        match start.checked_add(more) {
            Some(last) => Ok(Self { start, last }),
            None => Err(RangeError::Overflow { start, len }),
        }
    }

    /// The memory that a slice occupies.
    ///
    /// Exposes the provenance of the slice, so that [`as_ptr`](Self::as_ptr) leads back to it.
    ///
    /// # Errors
    /// [`RangeError::Empty`] when the slice, or its element type, has no size.
    pub fn of_slice<T>(slice: &[T]) -> Result<Self, RangeError> {
        Self::from_ptr(slice.as_ptr(), size_of_val(slice))
    }

    /// The `len` *bytes* that begin where a pointer points to.
    ///
    /// Exposes the provenance of the pointer, so that [`as_ptr`](Self::as_ptr) leads back to what
    /// it points to.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_ptr<T>(start: *const T, len: usize) -> Result<Self, RangeError> {
        Self::new(start.expose_provenance() as u64, len as u64)
    }

    /// Makes a pointer of the first address, for a device, a system call or code that copies.
    ///
    /// A range is two numbers, and says nothing of what is there: it promises neither that the
    /// memory is mapped nor that it may be read, nor for how long, nor that nobody else writes.
    /// Those who read through the pointer (`unsafe`) answer for that. What may be reached are
    /// objects whose provenance was exposed: memory that the kernel mapped, a mapping of
    /// `source::OwnedMapping`, what [`of_slice`](Self::of_slice) and [`from_ptr`](Self::from_ptr)
    /// were given.
    ///
    /// ```
    /// # use shootdown::AddressRange;
    /// let buffer = vec![7_u8; 64];
    /// let range = AddressRange::of_slice(&buffer)?;
    /// assert_eq!(range.as_ptr(), buffer.as_ptr());
    /// # Ok::<(), shootdown::RangeError>(())
    /// ```
    ///
    /// # Panics
    /// When a pointer of this machine is shorter than the address.
    pub fn as_ptr(self) -> *const u8 {
        core::ptr::with_exposed_provenance(self.start_usize())
    }

    /// Makes a pointer through which may be written: see [`as_ptr`](Self::as_ptr).
    ///
    /// Memory that was exposed by a shared reference, as [`of_slice`](Self::of_slice) does, must
    /// not be written through it.
    ///
    /// # Panics
    /// As [`as_ptr`](Self::as_ptr).
    pub fn as_mut_ptr(self) -> *mut u8 {
        core::ptr::with_exposed_provenance_mut(self.start_usize())
    }

    fn start_usize(self) -> usize {
        usize::try_from(self.start).expect("a pointer of this machine is shorter than the address")
    }

    /// First address, inclusive.
    #[inline]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Last address, **inclusive**.
    #[inline]
    pub const fn last(self) -> u64 {
        self.last
    }

    /// Length in bytes; `None` for [`AddressRange::ALL`], whose length does not fit in a `u64`.
    pub const fn len(self) -> Option<u64> {
        (self.last - self.start).checked_add(1)
    }

    /// Length in bytes, for slices and system calls; `None` where it does not fit in a `usize`.
    pub const fn len_usize(self) -> Option<usize> {
        match self.len() {
            Some(len) if len <= usize::MAX as u64 => Some(len as usize),
            _ => None,
        }
    }

    /// The pages of `bytes` that the range touches, in order, each whole: the first one may begin
    /// before the range, and the last one end behind it.
    ///
    /// ```
    /// # use shootdown::{AddressRange, RangeError};
    /// let buffer = AddressRange::new(0x1ff0, 0x20)?;
    /// let pages: Vec<u64> = buffer.pages(0x1000).map(|page| page.start()).collect();
    /// assert_eq!(pages, [0x1000, 0x2000]);
    /// # Ok::<(), RangeError>(())
    /// ```
    ///
    /// # Panics
    /// When `bytes` is no power of two.
    pub fn pages(self, bytes: u64) -> impl DoubleEndedIterator<Item = Self> + Clone {
        assert!(bytes.is_power_of_two(), "a page has a power of two of bytes, not {bytes}");
        let (more, shift) = (bytes - 1, bytes.trailing_zeros());
        (self.start >> shift..=self.last >> shift).map(move |page| {
            let start = page << shift;
            Self { start, last: start + more }
        })
    }

    /// Always `false`: a range holds at least one byte.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Whether the two ranges share a byte. Adjacent ranges do not.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// Whether `address` lies in the range.
    #[inline]
    pub const fn contains(self, address: u64) -> bool {
        self.start <= address && address <= self.last
    }

    /// Whether all of `other` lies in the range.
    #[inline]
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// The bytes that both ranges hold.
    pub fn intersection(self, other: Self) -> Option<Self> {
        self.overlaps(other)
            .then(|| Self { start: self.start.max(other.start), last: self.last.min(other.last) })
    }
}

impl TryFrom<Range<u64>> for AddressRange {
    type Error = RangeError;

    fn try_from(range: Range<u64>) -> Result<Self, RangeError> {
        Self::new(range.start, range.end.saturating_sub(range.start))
    }
}

impl TryFrom<RangeInclusive<u64>> for AddressRange {
    type Error = RangeError;

    fn try_from(range: RangeInclusive<u64>) -> Result<Self, RangeError> {
        let (start, last) = range.into_inner();
        if last < start { Err(RangeError::Empty { start }) } else { Ok(Self { start, last }) }
    }
}

impl<T> TryFrom<&[T]> for AddressRange {
    type Error = RangeError;

    fn try_from(slice: &[T]) -> Result<Self, RangeError> {
        Self::of_slice(slice)
    }
}

impl fmt::Debug for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last)
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn the_last_byte_of_the_address_space_can_be_named() {
        let top = AddressRange::try_from(u64::MAX - 4095..=u64::MAX).unwrap();
        assert_eq!(top, AddressRange::new(u64::MAX - 4095, 4096).unwrap());
        assert_eq!(AddressRange::ALL.len(), None);
        assert_eq!(top.len(), Some(4096));
    }

    #[test]
    fn empty_and_overflowing_ranges_are_told_apart() {
        assert_eq!(AddressRange::new(7, 0), Err(RangeError::Empty { start: 7 }));
        assert_eq!(
            AddressRange::new(u64::MAX, 2),
            Err(RangeError::Overflow { start: u64::MAX, len: 2 })
        );
        #[expect(clippy::reversed_empty_ranges, reason = "that is the case under test")]
        let reversed = AddressRange::try_from(9..3);
        assert_eq!(reversed, Err(RangeError::Empty { start: 9 }));
        #[expect(clippy::reversed_empty_ranges, reason = "that is the case under test")]
        let reversed = AddressRange::try_from(9..=3);
        assert_eq!(reversed, Err(RangeError::Empty { start: 9 }));
        let none: &[u8] = &[];
        assert!(matches!(AddressRange::of_slice(none), Err(RangeError::Empty { .. })));
    }

    #[test]
    fn both_ends_belong_to_a_range() {
        let range = AddressRange::new(0x1000, 0x1000).unwrap();
        let inside: std::vec::Vec<u64> =
            [0xfff, 0x1000, 0x1fff, 0x2000].into_iter().filter(|at| range.contains(*at)).collect();
        assert_eq!(inside, [0x1000, 0x1fff]);
        let part = |start, last| AddressRange::try_from(start..=last).unwrap();
        assert!(
            range.covers(range)
                && range.covers(part(0x1000, 0x1000))
                && range.covers(part(0x1fff, 0x1fff))
        );
        assert!(
            !range.covers(part(0xfff, 0x1fff))
                && !range.covers(part(0x1000, 0x2000))
                && !range.covers(part(0x3000, 0x3000))
        );
        assert_eq!(range.intersection(part(0x1800, 0x2800)), Some(part(0x1800, 0x1fff)));
        assert_eq!(range.intersection(part(0, 0x1000)), Some(part(0x1000, 0x1000)));
        assert_eq!(part(7, 7).len(), Some(1));
        assert!(!range.is_empty());
        let text = RangeError::Overflow { start: u64::MAX, len: 2 }.to_string();
        assert!(text.contains("0xffffffffffffffff"), "{text}");
        assert_eq!(
            (std::format!("{range}"), std::format!("{range:?}")),
            ("0x1000..=0x1fff".into(), "0x1000..=0x1fff".into())
        );
    }

    #[test]
    fn the_pages_of_a_range_are_those_that_it_touches() {
        let part = |start, last| AddressRange::try_from(start..=last).unwrap();
        let pages = |range: AddressRange| {
            range
                .pages(0x1000)
                .map(|page| (page.start(), page.last()))
                .collect::<std::vec::Vec<_>>()
        };
        assert_eq!(pages(part(0x1fff, 0x2000)), [(0x1000, 0x1fff), (0x2000, 0x2fff)]);
        assert_eq!(pages(part(0x1000, 0x1fff)), [(0x1000, 0x1fff)]);
        assert_eq!(pages(part(u64::MAX, u64::MAX)), [(u64::MAX - 0xfff, u64::MAX)]);
        assert_eq!(
            AddressRange::ALL
                .pages(1 << 63)
                .rev()
                .map(AddressRange::start)
                .collect::<std::vec::Vec<_>>(),
            [1 << 63, 0]
        );
        assert_eq!(part(7, 8).pages(1).collect::<std::vec::Vec<_>>(), [part(7, 7), part(8, 8)]);
        assert_eq!((AddressRange::ALL.len_usize(), part(7, 9).len_usize()), (None, Some(3)));
    }

    #[test]
    fn a_pointer_and_a_range_lead_to_each_other() {
        let mut words = [1_u32, 2, 3];
        let range = AddressRange::from_ptr(words.as_mut_ptr(), size_of_val(&words)).unwrap();
        assert_eq!(range, AddressRange::of_slice(&words).unwrap());
        assert_eq!(
            (range.as_ptr().addr(), range.as_mut_ptr().addr()),
            (words.as_ptr().addr(), words.as_ptr().addr())
        );
        assert_eq!(range.len(), Some(12));
        let empty = AddressRange::from_ptr(words.as_ptr(), 0).unwrap_err();
        assert_eq!(empty, RangeError::Empty { start: words.as_ptr().addr() as u64 });
        assert!(
            AddressRange::from_ptr(core::ptr::without_provenance::<u8>(usize::MAX), usize::MAX)
                .is_err()
        );
    }

    #[test]
    fn adjacency_is_no_overlap() {
        let low = AddressRange::new(0, 4096).unwrap();
        let high = AddressRange::new(4096, 4096).unwrap();
        assert!(!low.overlaps(high) && !high.overlaps(low));
        assert!(low.overlaps(AddressRange::new(4095, 2).unwrap()));
        assert_eq!(low.intersection(high), None);
    }
}
