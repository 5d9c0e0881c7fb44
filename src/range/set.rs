//! [`RangeSet`]: many ranges at once.
#![forbid(unsafe_code)]

use super::{AddressRange, RangeError};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Deref;

/// Holds a non-empty set of addresses, as sorted ranges that neither overlap nor touch.
///
/// One [invalidation of many ranges](crate::AddressSpace::invalidate_all) covers such a set (rule
/// [N1](crate::docs::contract)). It dereferences to the slice of its [`AddressRange`]s. A clone
/// shares their memory.
///
/// ```
/// use shootdown::{AddressRange, RangeError, RangeSet};
///
/// let page = |number: u64| AddressRange::new(number * 0x1000, 0x1000);
/// let set = RangeSet::new([page(9)?, page(1)?, page(2)?, page(1)?])?;
/// assert_eq!(*set, [AddressRange::new(0x1000, 0x2000)?, page(9)?]);
/// assert_eq!(set.hull(), AddressRange::new(0x1000, 0x9000)?);
/// assert!(!set.overlaps(page(5)?));
/// # Ok::<(), RangeError>(())
/// ```
#[must_use = "a set of ranges does nothing by itself: give it to `invalidate_all`"]
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RangeSet {
    /// At least one range. They are sorted, with a gap before each but the first.
    ranges: Arc<[AddressRange]>,
}

impl RangeSet {
    /// Makes the set of all addresses in `ranges`. They may come in any order, overlap and touch.
    ///
    /// It takes *n* comparisons if the ranges are sorted, and *n* log *n* otherwise.
    ///
    /// # Errors
    /// [`RangeError::NoRange`] if `ranges` has no element.
    pub fn new(ranges: impl IntoIterator<Item = AddressRange>) -> Result<Self, RangeError> {
        let mut sorted: Vec<AddressRange> = ranges.into_iter().collect();
        sorted.sort_unstable_by_key(|range| range.start);
        sorted.dedup_by(|next, before| {
            let joins = next.start <= before.last.saturating_add(1);
            if joins {
                before.last = before.last.max(next.last);
            }
            joins
        });
        if sorted.is_empty() {
            Err(RangeError::NoRange)
        } else {
            Ok(Self { ranges: sorted.into() })
        }
    }

    /// Makes a set of neighbouring ranges of another set.
    fn of_parts(parts: &[AddressRange]) -> Self {
        debug_assert!(!parts.is_empty(), "a set has at least one range");
        Self { ranges: parts.into() }
    }

    /// Returns the range from the first address of the set to its last.
    pub fn hull(&self) -> AddressRange {
        hull(self)
    }

    /// Returns whether one of the ranges shares a byte with `range`. It takes log *n* comparisons
    /// for *n* ranges.
    pub fn overlaps(&self, range: AddressRange) -> bool {
        !self.overlapping(range).is_empty()
    }

    /// Returns the ranges that share a byte with `range`, each whole.
    pub fn overlapping(&self, range: AddressRange) -> &[AddressRange] {
        Parts::all(self).overlapping(range).as_slice()
    }
}

/// Some ranges of a set that are neighbours.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    set: &'a RangeSet,
    from: usize,
    count: usize,
}

impl<'a> Parts<'a> {
    /// Returns all ranges of a set.
    pub(crate) fn all(set: &'a RangeSet) -> Self {
        Self { set, from: 0, count: set.len() }
    }

    /// Returns the ranges.
    pub(crate) fn as_slice(self) -> &'a [AddressRange] {
        &self.set.ranges[self.from..][..self.count]
    }

    /// Returns the ranges that overlap `range`.
    pub(crate) fn overlapping(self, range: AddressRange) -> Self {
        let ranges = self.as_slice();
        let before = ranges.partition_point(|part| part.last < range.start);
        let count = ranges[before..].partition_point(|part| part.start <= range.last);
        Self { from: self.from + before, count, ..self }
    }

    /// Returns the range from the first address to the last one.
    pub(crate) fn hull(self) -> AddressRange {
        hull(self.as_slice())
    }

    /// Returns the ranges as a set of their own. Allocates unless they are all ranges of the set.
    pub(crate) fn to_set(self) -> RangeSet {
        if self.count == self.set.len() {
            self.set.clone()
        } else {
            RangeSet::of_parts(self.as_slice())
        }
    }
}

/// Returns the range from the first address of sorted ranges to the last one.
fn hull(parts: &[AddressRange]) -> AddressRange {
    match (parts.first(), parts.last()) {
        (Some(first), Some(last)) => AddressRange { start: first.start, last: last.last },
        _ => unreachable!("there is at least one range"),
    }
}

impl From<AddressRange> for RangeSet {
    fn from(range: AddressRange) -> Self {
        Self::of_parts(&[range])
    }
}

impl Deref for RangeSet {
    type Target = [AddressRange];

    fn deref(&self) -> &[AddressRange] {
        &self.ranges
    }
}

impl fmt::Debug for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(&**self).finish()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range() -> impl Strategy<Value = AddressRange> {
        // Around both ends of the address space.
        (0..64_u64, 0..8_u64, any::<bool>()).prop_map(|(start, more, high)| {
            let start = if high { u64::MAX - 63 + start } else { start };
            AddressRange { start, last: start.saturating_add(more) }
        })
    }

    proptest! {
        #[test]
        fn n1_a_set_holds_what_its_ranges_hold_sorted_and_apart(
            ranges in proptest::collection::vec(range(), 1..12),
            at in range(),
        ) {
            let set = RangeSet::new(ranges.iter().copied()).unwrap();
            let holds =
                |of: &[AddressRange], address| of.iter().any(|range| range.contains(address));
            for address in (0..80).chain(u64::MAX - 80..=u64::MAX) {
                prop_assert_eq!(holds(&set, address), holds(&ranges, address));
            }
            prop_assert!(set.windows(2).all(|two| two[0].last + 1 < two[1].start));
            let overlapping: Vec<_> =
                set.iter().copied().filter(|range| range.overlaps(at)).collect();
            prop_assert_eq!(set.overlapping(at), overlapping);
            prop_assert_eq!(set.overlaps(at), ranges.iter().any(|range| range.overlaps(at)));
            prop_assert!(ranges.iter().all(|range| set.hull().covers(*range)));
            let (first, last) = (set[0].start, set[set.len() - 1].last);
            prop_assert_eq!(set.hull(), AddressRange { start: first, last });
        }
    }

    #[test]
    fn n1_a_set_of_no_range_is_refused() {
        assert_eq!(RangeSet::new([]), Err(RangeError::NoRange));
        assert_eq!(*RangeSet::from(AddressRange::ALL), [AddressRange::ALL]);
    }
}
