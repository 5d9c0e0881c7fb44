//! The mutex in a [`DriverLock`](super::driver_lock::DriverLock).
#![forbid(unsafe_code)]

#[cfg(all(feature = "std", not(any(loom, shuttle))))]
mod sleeping;
#[cfg(not(all(feature = "std", not(any(loom, shuttle)))))]
mod spinning;

#[cfg(all(feature = "std", not(any(loom, shuttle))))]
pub(crate) use sleeping::{RawGuard, RawLock};
#[cfg(not(all(feature = "std", not(any(loom, shuttle)))))]
pub(crate) use spinning::{RawGuard, RawLock};

impl<T: Default> Default for RawLock<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}
