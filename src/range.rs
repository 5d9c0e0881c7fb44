//! [`AddressRange`]: a range of addresses. Both ends are inclusive, so that a range can contain the
//! last byte of the address space.
#![forbid(unsafe_code)]

mod set;

pub(crate) use set::Parts;
pub use set::RangeSet;

use core::fmt;
use core::ops::{Range, RangeInclusive};

/// Names a non-empty range of addresses `[start, last]` in bytes, **both ends inclusive**.
///
/// The kernel's interval tree uses the same form. Adjacent ranges do not overlap. Several ranges
/// together are a [`RangeSet`].
///
/// ```
/// use shootdown::{AddressRange, RangeError};
///
/// let pages = AddressRange::new(0x1000, 0x2000)?; // start, length in bytes
/// assert_eq!(pages, AddressRange::try_from(0x1000..0x3000)?); // end exclusive
/// assert_eq!(pages, AddressRange::try_from(0x1000..=0x2fff)?); // end inclusive
/// let empty = AddressRange::new(0x1000, 0);
/// assert_eq!(empty, Err(RangeError::Empty { start: 0x1000 }));
/// # Ok::<(), RangeError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressRange {
    start: u64,
    last: u64,
}

/// Says why numbers make no [`AddressRange`], or ranges no [`RangeSet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RangeError {
    /// The range contains no byte. Skip the call: there is nothing to watch or to invalidate.
    Empty {
        /// The start that was given.
        start: u64,
    },
    /// The range extends past the last address. Shorten it. A range up to the last byte of the
    /// address space is `start..=u64::MAX`.
    Overflow {
        /// The start that was given.
        start: u64,
        /// The length in bytes that was given.
        len: u64,
    },
    /// A [`RangeSet`] needs at least one range. Skip the call, as for an empty range.
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
    /// Covers the whole address space, `0..=u64::MAX`.
    pub const ALL: Self = Self { start: 0, last: u64::MAX };

    /// Makes the range of the `len` bytes from `start` on.
    ///
    /// # Errors
    /// [`RangeError::Empty`] if `len` is 0. [`RangeError::Overflow`] if the range would extend past
    /// `u64::MAX`.
    pub const fn new(start: u64, len: u64) -> Result<Self, RangeError> {
        let Some(more) = len.checked_sub(1) else {
            return Err(RangeError::Empty { start });
        };
        match start.checked_add(more) {
            Some(last) => Ok(Self { start, last }),
            None => Err(RangeError::Overflow { start, len }),
        }
    }

    /// Makes the range of the memory that a slice occupies.
    ///
    /// It exposes the provenance of the slice, so that the pointer of [`as_ptr`](Self::as_ptr) may
    /// access it.
    ///
    /// # Errors
    /// [`RangeError::Empty`] if the slice has no elements, or elements of size 0.
    pub fn of_slice<T>(slice: &[T]) -> Result<Self, RangeError> {
        Self::from_ptr(slice.as_ptr(), size_of_val(slice))
    }

    /// Makes the range of the `len` *bytes* from the address of a pointer on.
    ///
    /// It exposes the provenance of the pointer, so that the pointer of [`as_ptr`](Self::as_ptr)
    /// may access the same memory.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn from_ptr<T>(start: *const T, len: usize) -> Result<Self, RangeError> {
        Self::new(start.expose_provenance() as u64, len as u64)
    }

    /// Returns a pointer to the first address, for a device, a system call or code that copies.
    ///
    /// A range is two numbers. It promises nothing about the memory: not that it is mapped, not
    /// that it may be read, not for how long, and not that no other thread writes it. The code that
    /// reads through the pointer (`unsafe`) has to ensure that. The pointer may access objects
    /// whose provenance was exposed: memory that the kernel mapped, a mapping of
    /// `source::OwnedMapping`, and the arguments of [`of_slice`](Self::of_slice) and
    /// [`from_ptr`](Self::from_ptr).
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
    /// If the address does not fit into a pointer of this machine.
    pub fn as_ptr(self) -> *const u8 {
        core::ptr::with_exposed_provenance(self.start_usize())
    }

    /// Returns a pointer to the first address through which memory may be written. It promises as
    /// little as [`as_ptr`](Self::as_ptr).
    ///
    /// Do not write memory through it that was exposed by a shared reference, as
    /// [`of_slice`](Self::of_slice) does.
    ///
    /// # Panics
    /// If the address does not fit into a pointer of this machine.
    pub fn as_mut_ptr(self) -> *mut u8 {
        core::ptr::with_exposed_provenance_mut(self.start_usize())
    }

    fn start_usize(self) -> usize {
        usize::try_from(self.start).expect("a pointer of this machine is shorter than the address")
    }

    /// Returns the first address, inclusive.
    #[inline]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Returns the last address, **inclusive**.
    #[inline]
    pub const fn last(self) -> u64 {
        self.last
    }

    /// Returns the length in bytes. `None` for [`AddressRange::ALL`], whose length does not fit in
    /// a `u64`.
    pub const fn len(self) -> Option<u64> {
        (self.last - self.start).checked_add(1)
    }

    /// Returns the length in bytes, for slices and system calls. `None` if it does not fit in a
    /// `usize`.
    pub const fn len_usize(self) -> Option<usize> {
        match self.len() {
            Some(len) if len <= usize::MAX as u64 => Some(len as usize),
            _ => None,
        }
    }

    /// Returns the pages of `bytes` bytes that the range touches, in order.
    ///
    /// Each page is whole. The first one may begin before the range, and the last one may end after
    /// it.
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
    /// If `bytes` is not a power of two.
    pub fn pages(self, bytes: u64) -> impl DoubleEndedIterator<Item = Self> + Clone {
        assert!(bytes.is_power_of_two(), "a page has a power of two of bytes, not {bytes}");
        let (more, shift) = (bytes - 1, bytes.trailing_zeros());
        (self.start >> shift..=self.last >> shift).map(move |page| {
            let start = page << shift;
            Self { start, last: start + more }
        })
    }

    /// Returns `false`: a range contains at least one byte.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Returns whether the two ranges share a byte. Adjacent ranges do not.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// Returns whether `address` lies in the range.
    #[inline]
    pub const fn contains(self, address: u64) -> bool {
        self.start <= address && address <= self.last
    }

    /// Returns whether all of `other` lies in the range.
    #[inline]
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// Returns the bytes that both ranges contain, or `None` if there are none.
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
