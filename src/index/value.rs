//! The values that the index stores, and [`Position`], which says where one of them is.
#![forbid(unsafe_code)]

use super::Node;
use super::node::CAP;
use crate::range::AddressRange;

/// A value with an order among intervals that have the same start.
pub(crate) trait Ordered: Copy + PartialEq {
    /// Returns the order, which rises with each insertion.
    fn order(self) -> u64;
}

/// A value that the index can store: small, comparable, with an interval.
pub(crate) trait Indexed: Ordered {
    /// Returns the interval, which never changes.
    fn range(self) -> AddressRange;

    /// Returns where the index has put the value, if the value can store that. A removal looks
    /// there first.
    #[inline]
    fn position(self) -> Position {
        Position::UNKNOWN
    }

    /// Stores where the index has put the value. The index may move the value later without another
    /// call.
    #[inline]
    fn set_position(self, _position: Position) {}

    /// Prefetches the cache lines of `memory` without waiting for them. Returns whether it can: the
    /// default cannot, and a load instead would stall what follows it.
    #[inline]
    fn prefetch<T>(_memory: &T) -> bool {
        false
    }
}

/// A value together with its interval, for values that do not store it.
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

/// A value with a number, for values that are inserted in no order of their own. The number has to
/// rise with each insertion.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Numbered<T> {
    pub(crate) number: u64,
    pub(crate) value: T,
}

impl<T: Copy + PartialEq> Ordered for Numbered<T> {
    fn order(self) -> u64 {
        self.number
    }
}

/// A leaf and a slot in it.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Position(u32);

impl Position {
    /// A position in no leaf.
    pub(crate) const UNKNOWN: Self = Self(u32::MAX);

    /// Packs a leaf and a slot. A leaf number that does not fit wraps around. It then names another
    /// leaf, where the value is not found, and the removal searches for it.
    #[inline]
    pub(super) fn new(leaf: Node, at: usize) -> Self {
        Self(leaf.wrapping_mul(CAP as u32) | at as u32)
    }

    /// Returns the leaf and the slot.
    #[inline]
    pub(super) fn get(self) -> (usize, usize) {
        (self.0 as usize / CAP, self.0 as usize % CAP)
    }

    /// Makes a position of the number that [`raw`](Self::raw) returned.
    pub(crate) fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// Returns the position as a number.
    pub(crate) fn raw(self) -> u32 {
        self.0
    }
}
