//! Fields that are dropped by hand.
#![forbid(unsafe_code)]

use core::mem::ManuallyDrop;

/// A value that its owner's `drop` takes out by hand, or nothing.
///
/// It behaves as an `Option`, but its own drop does nothing: a value that nobody takes is leaked.
/// So the compiler adds no drop of the field behind the owner's `drop`, and a store over an empty
/// one is a plain store. The drop of a future that has resolved is one comparison.
pub(in crate::engine) struct ByHand<T>(ManuallyDrop<Option<T>>);

impl<T> ByHand<T> {
    pub(in crate::engine) fn full(value: T) -> Self {
        Self(ManuallyDrop::new(Some(value)))
    }

    pub(in crate::engine) fn empty() -> Self {
        Self(ManuallyDrop::new(None))
    }

    pub(in crate::engine) fn get(&self) -> Option<&T> {
        self.0.as_ref()
    }

    pub(in crate::engine) fn get_mut(&mut self) -> Option<&mut T> {
        self.0.as_mut()
    }

    /// Moves the value out and leaves nothing.
    pub(in crate::engine) fn take(&mut self) -> Option<T> {
        self.0.take()
    }
}

impl<T> From<Option<T>> for ByHand<T> {
    fn from(value: Option<T>) -> Self {
        Self(ManuallyDrop::new(value))
    }
}

/// Puts `value` into `place`, which is known to be empty.
///
/// An assignment drops what was there. The compiler cannot know that nothing was, so it adds a
/// call, and with it spills of callee-saved registers, to a function that has none otherwise.
pub(in crate::engine) fn fill_empty<T>(place: &mut Option<T>, value: T) {
    debug_assert!(place.is_none(), "the place is empty");
    core::mem::forget(place.replace(value));
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::sync::Arc;

    #[test]
    fn a_value_is_dropped_once_by_who_takes_it() {
        let value = Arc::new(());
        let mut field = ByHand::full(value.clone());
        assert!(field.get().is_some());
        drop(field.take());
        assert!(field.get().is_none() && field.take().is_none());
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn an_empty_place_is_filled() {
        let mut place = None;
        fill_empty(&mut place, 1);
        assert_eq!(place, Some(1));
    }

    #[test]
    fn the_drop_of_a_field_by_hand_leaks() {
        let value = Arc::new(());
        {
            let _dropped_here = ByHand::full(value.clone());
        }
        assert_eq!(Arc::strong_count(&value), 2);
    }
}
