//! What the index stores, and how it says where that is.
#![forbid(unsafe_code)]

use super::Node;
use super::node::CAP;
use crate::range::AddressRange;

/// What can name its place among equals.
pub(crate) trait Ordered: Copy + PartialEq {
    /// Rises with each insertion; the order of intervals with one start.
    fn order(self) -> u64;
}

/// What the index stores: small, comparable, and able to name its interval.
pub(crate) trait Indexed: Ordered {
    /// The interval, which does not change.
    fn range(self) -> AddressRange;

    /// Where the index put it, if it can remember that: a removal looks there first.
    #[inline]
    fn place(self) -> Place {
        Place::UNKNOWN
    }

    /// The index has put it there. It may be moved later without being told.
    #[inline]
    fn set_place(self, _place: Place) {}

    /// Has the cache lines of `memory` fetched and does not wait for them, if it can, which it
    /// says. A load that waits keeps what comes after it waiting, too.
    #[inline]
    fn prefetch<T>(_memory: &T) -> bool {
        false
    }
}

/// A value that does not know its interval, with it.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Ranged<T> {
    pub(crate) range: AddressRange,
    pub(crate) value: T,
}

impl<T: Ordered> Ordered for Ranged<T> {
    fn order(self) -> u64 {
        self.value.order()
    }
}

impl<T: Ordered> Indexed for Ranged<T> {
    fn range(self) -> AddressRange {
        self.range
    }
}

/// A leaf and a place in it.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Place(u32);

impl Place {
    /// In no leaf that there is.
    pub(crate) const UNKNOWN: Self = Self(u32::MAX);

    /// A leaf whose number is too great for this is taken for another one, in which the interval is
    /// not found.
    #[inline]
    pub(super) fn new(leaf: Node, at: usize) -> Self {
        Self(leaf.wrapping_mul(CAP as u32) | at as u32)
    }

    #[inline]
    pub(super) fn get(self) -> (usize, usize) {
        (self.0 as usize / CAP, self.0 as usize % CAP)
    }

    pub(crate) fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    pub(crate) fn raw(self) -> u32 {
        self.0
    }
}
