//! Many ranges at once.
#![forbid(unsafe_code)]

use super::{AddressRange, RangeError};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Deref;

/// A non-empty set of addresses, as ranges that are sorted and neither overlap nor touch: what one
/// [invalidation of many ranges](crate::AddressSpace::invalidate_all) covers.
///
/// Dereferences to the slice of its ranges. A clone shares their memory.
///
/// ```
/// use shootdown::{AddressRange, RangeError, RangeSet};
///
/// let page = |number: u64| AddressRange::new(number * 0x1000, 0x1000);
/// let set = RangeSet::new([page(9)?, page(1)?, page(2)?, page(1)?])?;
/// assert_eq!(*set, [AddressRange::new(0x1000, 0x2000)?, page(9)?]);
/// assert_eq!(set.hull(), AddressRange::try_from(0x1000..0xa000)?); // end exclusive
/// assert!(!set.overlaps(page(5)?));
/// # Ok::<(), RangeError>(())
/// ```
#[must_use = "a set of ranges does nothing by itself: give it to `invalidate_all`"]
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RangeSet {
    /// Sorted, with a gap before each but the first; at least one.
    ranges: Arc<[AddressRange]>,
}

impl RangeSet {
    /// The addresses that any of `ranges` holds. They may come in any order, overlap and touch.
    ///
    /// Sorts what is not sorted: *n* log *n*, or *n* comparisons where it is.
    ///
    /// # Errors
    /// [`RangeError::NoRange`] when there is none.
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

    /// The ranges of another set, or some of them.
    fn of_parts(parts: &[AddressRange]) -> Self {
        debug_assert!(!parts.is_empty(), "a set has at least one range");
        Self { ranges: parts.into() }
    }

    /// From the first address of the set to its last.
    pub fn hull(&self) -> AddressRange {
        hull(self)
    }

    /// Whether one of the ranges shares a byte with `range`: in the logarithm of how many there
    /// are.
    pub fn overlaps(&self, range: AddressRange) -> bool {
        !self.overlapping(range).is_empty()
    }

    /// Those of the ranges that share a byte with `range`, whole.
    pub fn overlapping(&self, range: AddressRange) -> &[AddressRange] {
        Parts::all(self).overlapping(range).as_slice()
    }
}

/// Neighbours in a set.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    set: &'a RangeSet,
    from: usize,
    count: usize,
}

impl<'a> Parts<'a> {
    pub(crate) fn all(set: &'a RangeSet) -> Self {
        Self { set, from: 0, count: set.len() }
    }

    pub(crate) fn as_slice(self) -> &'a [AddressRange] {
        &self.set.ranges[self.from..][..self.count]
    }

    /// Those that overlap `range`.
    pub(crate) fn overlapping(self, range: AddressRange) -> Self {
        let ranges = self.as_slice();
        let before = ranges.partition_point(|part| part.last < range.start);
        let count = ranges[before..].partition_point(|part| part.start <= range.last);
        Self { from: self.from + before, count, ..self }
    }

    pub(crate) fn hull(self) -> AddressRange {
        hull(self.as_slice())
    }

    pub(crate) fn to_set(self) -> RangeSet {
        if self.count == self.set.len() {
            self.set.clone()
        } else {
            RangeSet::of_parts(self.as_slice())
        }
    }
}

/// From the first address of sorted ranges to the last one.
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
        fn n1_a_set_holds_what_its_ranges_hold_sorted_and_apart(ranges in proptest::collection::vec(range(), 1..12), at in range()) {
            let set = RangeSet::new(ranges.iter().copied()).unwrap();
            let holds = |of: &[AddressRange], address| of.iter().any(|range| range.contains(address));
            for address in (0..80).chain(u64::MAX - 80..=u64::MAX) {
                prop_assert_eq!(holds(&set, address), holds(&ranges, address));
            }
            prop_assert!(set.windows(2).all(|two| two[0].last + 1 < two[1].start));
            let overlapping: Vec<_> = set.iter().copied().filter(|range| range.overlaps(at)).collect();
            prop_assert_eq!(set.overlapping(at), overlapping);
            prop_assert_eq!(set.overlaps(at), ranges.iter().any(|range| range.overlaps(at)));
            prop_assert!(ranges.iter().all(|range| set.hull().covers(*range)));
            prop_assert!(set.contains(&set[0]) && set[0].start == set.hull().start && set[set.len() - 1].last == set.hull().last);
        }
    }

    #[test]
    fn n1_a_set_of_no_range_is_refused() {
        assert_eq!(RangeSet::new([]), Err(RangeError::NoRange));
        assert_eq!(*RangeSet::from(AddressRange::ALL), [AddressRange::ALL]);
    }
}
