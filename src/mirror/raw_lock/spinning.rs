//! The forms of the lock where no thread sleeps on it.
//!
//! Model checkers have a mutex of their own, and run all their threads on one. Without `std`
//! threads cannot be told apart, and none can sleep.
#![forbid(unsafe_code)]

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard as Guard};
#[cfg(shuttle)]
use shuttle::sync::{Mutex, MutexGuard as Guard};
#[cfg(not(any(loom, shuttle)))]
use spin::mutex::{SpinMutex as Mutex, SpinMutexGuard as Guard};

pub(crate) struct RawLock<T>(Mutex<T>);

pub(crate) type RawGuard<'a, T> = Guard<'a, T>;

impl<T> RawLock<T> {
    #[cfg(not(any(loom, shuttle)))]
    pub(crate) const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    #[cfg(any(loom, shuttle))]
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    #[cfg(not(any(loom, shuttle)))]
    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner()
    }

    #[cfg(any(loom, shuttle))]
    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[allow(clippy::unused_self, reason = "the form of the lock with `std`")]
    pub(crate) fn is_held_here(&self) -> bool {
        false
    }

    #[cfg(not(any(loom, shuttle)))]
    pub(crate) fn lock(&self) -> Option<RawGuard<'_, T>> {
        Some(self.0.lock())
    }

    #[cfg(any(loom, shuttle))]
    pub(crate) fn lock(&self) -> Option<RawGuard<'_, T>> {
        Some(self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}
