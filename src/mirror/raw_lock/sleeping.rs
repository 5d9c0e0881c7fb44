//! A spin lock whose waiters sleep, for programs with `std`.
//!
//! Its release is a plain store, where the release of `std`'s mutex is a read-modify-write: a first
//! pass is little more than its driver's lock, and one such instruction is a fifth of it (measured:
//! `docs/measurements.md`, "Locks").
//!
//! A plain store has a price. The releasing thread may read [`RawLock::sleepers`] before its own
//! store is visible. It then misses a thread that goes to sleep at that very moment, and nobody
//! wakes that thread. So each sleep ends after [`LONGEST_SLEEP`] by itself. Every thread that
//! sleeps for longer than a store takes to become visible is woken at once.
#![forbid(unsafe_code)]

use crate::sync::{AtomicUsize, Event, Listener, Ordering};
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::time::Duration;
use spin::mutex::{SpinMutex, SpinMutexGuard};

/// How often a thread looks at the lock before it sleeps: some microseconds.
const LOOKS: u32 = 100;
/// How long a thread sleeps at most before it looks again. In unit tests longer than they may
/// take: they must not pass because of it.
const LONGEST_SLEEP: Duration = Duration::from_millis(if cfg!(test) { 60_000 } else { 1 });

std::thread_local!(static HERE: u8 = const { 0 });

/// An address that no other living thread has.
#[inline]
fn here() -> usize {
    HERE.with(|here| core::ptr::from_ref(here).addr())
}

pub(crate) struct RawLock<T> {
    /// [`here`] of the thread that holds the lock; 0 while the lock is free. Only the holder
    /// writes it.
    holder: AtomicUsize,
    /// How many threads sleep, or are about to.
    sleepers: AtomicUsize,
    mutex: SpinMutex<T>,
    released: Event,
}

// The mutex ignores panics, as `std`'s does when its poison is ignored.
impl<T> std::panic::UnwindSafe for RawLock<T> {}
impl<T> std::panic::RefUnwindSafe for RawLock<T> {}

impl<T> RawLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self {
            holder: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            mutex: SpinMutex::new(value),
            released: Event::new(),
        }
    }

    pub(crate) fn into_inner(self) -> T {
        self.mutex.into_inner()
    }

    /// Returns whether this thread holds the lock.
    #[inline]
    pub(crate) fn is_held_here(&self) -> bool {
        // Only this thread stores its own address, and clears it before the lock is free.
        self.holder.load(Ordering::Relaxed) == here()
    }

    /// Locks, or returns `None` if this thread holds the lock already.
    #[inline]
    pub(crate) fn lock(&self) -> Option<RawGuard<'_, T>> {
        let guard = match self.mutex.try_lock() {
            Some(guard) => guard,
            None => self.contended()?,
        };
        self.holder.store(here(), Ordering::Relaxed);
        let _holder = Holder(&self.holder);
        let _wake = Wake { sleepers: &self.sleepers, released: &self.released };
        Some(RawGuard { _holder, guard, _wake, not_send: PhantomData })
    }

    #[cold]
    fn contended(&self) -> Option<SpinMutexGuard<'_, T>> {
        if self.is_held_here() {
            return None;
        }
        for _ in 0..LOOKS {
            core::hint::spin_loop();
            if !self.mutex.is_locked()
                && let Some(guard) = self.mutex.try_lock()
            {
                return Some(guard);
            }
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let guard = loop {
            let released = self.released.listen();
            if let Some(guard) = self.mutex.try_lock() {
                break guard;
            }
            released.wait_timeout(LONGEST_SLEEP);
        };
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
        Some(guard)
    }
}

pub(crate) struct RawGuard<'a, T> {
    // Fields are dropped in this order: the holder is cleared before the lock is free, and a
    // sleeper is woken after it.
    _holder: Holder<'a>,
    guard: SpinMutexGuard<'a, T>,
    _wake: Wake<'a>,
    /// `Sync` and not `Send`, like the guard of `std`'s mutex: the holder is a thread.
    not_send: PhantomData<std::sync::MutexGuard<'a, T>>,
}

struct Holder<'a>(&'a AtomicUsize);

impl Drop for Holder<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// Without the type of the value, so that a guard is `Sync` where `std`'s is.
struct Wake<'a> {
    sleepers: &'a AtomicUsize,
    released: &'a Event,
}

impl Drop for Wake<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.sleepers.load(Ordering::Relaxed) != 0 {
            wake_one(self.released);
        }
    }
}

#[cold]
fn wake_one(released: &Event) {
    released.notify(1);
}

impl<T> std::panic::UnwindSafe for RawGuard<'_, T> {}
impl<T> std::panic::RefUnwindSafe for RawGuard<'_, T> {}

impl<T> Deref for RawGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for RawGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

#[cfg(all(test, not(miri)))]
impl<T> RawLock<T> {
    fn sleepers(&self) -> usize {
        self.sleepers.load(Ordering::SeqCst)
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use std::thread;
    use std::vec::Vec;

    #[test]
    fn threads_exclude_each_other() {
        let lock = RawLock::new(0_u64);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let mut count = lock.lock().expect("not held here");
                        let read = *count;
                        core::hint::spin_loop();
                        *count = read + 1;
                    }
                });
            }
        });
        assert_eq!(lock.sleepers(), 0);
        assert_eq!(lock.into_inner(), 80_000);
    }

    #[test]
    fn each_of_many_sleepers_is_woken_by_the_release_before_it() {
        let (lock, began) = (RawLock::new(Vec::new()), std::time::Instant::now());
        thread::scope(|scope| {
            let mut held = lock.lock().expect("nobody holds it");
            for thread in 0..8 {
                let lock = &lock;
                scope.spawn(move || lock.lock().expect("not held here").push(thread));
            }
            while lock.sleepers() < 8 {
                thread::yield_now();
            }
            held.push(8);
        });
        assert!(began.elapsed() < LONGEST_SLEEP, "a sleeper was not woken");
        let mut order = lock.into_inner();
        assert_eq!(order[0], 8);
        order.sort_unstable();
        assert_eq!(order, (0..9).collect::<Vec<_>>());
    }

    #[test]
    fn the_holder_is_told_from_others() {
        let lock = RawLock::new(());
        assert!(!lock.is_held_here());
        let guard = lock.lock();
        assert!(lock.is_held_here() && lock.lock().is_none());
        thread::scope(|scope| {
            let elsewhere = scope.spawn(|| lock.is_held_here());
            assert!(!elsewhere.join().expect("does not panic"));
        });
        drop(guard);
        assert!(!lock.is_held_here() && lock.lock().is_some());
    }
}
