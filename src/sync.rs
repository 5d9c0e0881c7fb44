//! Atomics and locks: the real ones, or those of a model checker.
//!
//! [`Lock`] is held for a bounded number of steps of the library's own code, and never while driver
//! code runs (C8). So it spins. Its release is a plain store, where a parking mutex needs a
//! read-modify-write, and two locks are most of the cost of a short invalidation (`DESIGN.md`, "The
//! lock").

#[cfg(not(any(loom, shuttle)))]
mod real {
    use super::held::Held;
    use core::ops::DerefMut;
    pub(crate) use core::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };
    /// A thread sleeps on these.
    #[cfg(feature = "std")]
    pub(crate) use event_listener::{Event, Listener};

    /// Spins. Gives the processor to the operating system now and then, if there is one.
    struct Relax;

    impl spin::RelaxStrategy for Relax {
        #[inline]
        fn relax() {
            #[cfg(feature = "std")]
            {
                std::thread_local!(static SPINS: core::cell::Cell<u32> = const { core::cell::Cell::new(0) });
                // The holder may have been preempted. After 64 looks it is better to let it run.
                let spins = SPINS.with(|spins| spins.replace(spins.get().wrapping_add(1)));
                if spins % 64 == 63 {
                    std::thread::yield_now();
                }
            }
            core::hint::spin_loop();
        }
    }

    /// A lock around the library's own state.
    #[derive(Default)]
    pub(crate) struct Lock<T>(spin::mutex::SpinMutex<T, Relax>);

    impl<T> Lock<T> {
        pub(crate) const fn new(value: T) -> Self {
            Self(spin::mutex::SpinMutex::new(value))
        }

        #[inline]
        pub(crate) fn lock(&self) -> impl DerefMut<Target = T> {
            // The loop is a function of its own. Inlined, it would make the caller save registers
            // on each call, mostly for nothing.
            Held::new(match self.0.try_lock() {
                Some(guard) => guard,
                None => self.contended(),
            })
        }

        /// Returns the lock if no thread has it.
        #[inline]
        pub(crate) fn try_lock(&self) -> Option<impl DerefMut<Target = T>> {
            self.0.try_lock().map(Held::new)
        }

        #[cold]
        #[inline(never)]
        fn contended(&self) -> spin::mutex::SpinMutexGuard<'_, T> {
            self.0.lock()
        }

        pub(crate) fn get_mut(&mut self) -> &mut T {
            self.0.get_mut()
        }
    }
}

/// Atomics and locks of a model checker. `loom` explores every interleaving of small models,
/// `shuttle` many random interleavings of larger ones. Both switch threads only at these types, so
/// a call into a dependency (`FuturesUnordered`, `slab`) is one step.
#[cfg(any(loom, shuttle))]
mod checked {
    use core::ops::DerefMut;
    #[cfg(loom)]
    use loom::sync as of;
    #[cfg(shuttle)]
    use shuttle::sync as of;

    pub(crate) use of::atomic::{
        AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };

    #[derive(Default)]
    pub(crate) struct Lock<T>(of::Mutex<T>);

    impl<T> Lock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(of::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> impl DerefMut<Target = T> {
            self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        }

        pub(crate) fn try_lock(&self) -> Option<impl DerefMut<Target = T>> {
            match self.0.try_lock() {
                Ok(guard) => Some(guard),
                Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
                Err(std::sync::TryLockError::WouldBlock) => None,
            }
        }

        pub(crate) fn get_mut(&mut self) -> &mut T {
            self.0.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}

/// An event as `event-listener` promises it to one thread that listens: a listener is woken by a
/// notification after `listen`, and by none before it.
#[cfg(all(feature = "std", any(loom, shuttle)))]
mod event {
    #[cfg(loom)]
    use loom::sync::{Condvar, Mutex};
    #[cfg(shuttle)]
    use shuttle::sync::{Condvar, Mutex};
    use std::sync::PoisonError;

    /// Stands for the trait of that name.
    pub(crate) trait Listener: Sized {
        fn wait(self);
    }

    #[derive(Default)]
    pub(crate) struct Event {
        /// `None` if no thread listens, otherwise whether it has been notified.
        listening: Mutex<Option<bool>>,
        notified: Condvar,
    }

    pub(crate) struct EventListener<'a>(&'a Event);

    impl Event {
        pub(crate) fn listen(&self) -> EventListener<'_> {
            *self.listening.lock().unwrap_or_else(PoisonError::into_inner) = Some(false);
            EventListener(self)
        }

        pub(crate) fn notify(&self, _most: usize) {
            if let Some(notified) =
                &mut *self.listening.lock().unwrap_or_else(PoisonError::into_inner)
            {
                *notified = true;
            }
            self.notified.notify_all();
        }
    }

    impl Listener for EventListener<'_> {
        fn wait(self) {
            let mut listening = self.0.listening.lock().unwrap_or_else(PoisonError::into_inner);
            while *listening == Some(false) {
                listening = self.0.notified.wait(listening).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    impl Drop for EventListener<'_> {
        fn drop(&mut self) {
            *self.0.listening.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

#[cfg(loom)]
mod once {
    use super::{AtomicBool, Lock, Ordering};
    use alloc::boxed::Box;

    /// `once_cell`'s box, with the order of its loads and stores where loom sees it.
    pub(crate) struct OnceBox<T> {
        value: once_cell::race::OnceBox<T>,
        filled: AtomicBool,
        filling: Lock<()>,
    }

    impl<T> OnceBox<T> {
        pub(crate) fn new() -> Self {
            Self {
                value: once_cell::race::OnceBox::new(),
                filled: AtomicBool::new(false),
                filling: Lock::new(()),
            }
        }

        pub(crate) fn get(&self) -> Option<&T> {
            if self.filled.load(Ordering::Acquire) { self.value.get() } else { None }
        }

        pub(crate) fn get_or_init(&self, make: impl FnOnce() -> Box<T>) -> &T {
            let filling = self.filling.lock();
            let value = self.value.get_or_init(make);
            self.filled.store(true, Ordering::Release);
            drop(filling);
            value
        }
    }
}

pub(crate) use alloc::sync::{Arc, Weak};
#[cfg(any(loom, shuttle))]
pub(crate) use checked::*;
#[cfg(all(feature = "std", any(loom, shuttle)))]
pub(crate) use event::{Event, Listener};
#[cfg(loom)]
pub(crate) use once::OnceBox;
#[cfg(not(loom))]
pub(crate) use once_cell::race::OnceBox;
#[cfg(not(any(loom, shuttle)))]
pub(crate) use real::*;

/// Tells a model checker that this thread can do nothing useful until another one has gone on.
#[inline]
pub(crate) fn spin_hint() {
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(shuttle)]
    shuttle::thread::yield_now();
}

/// Gives the processor to another thread (C4).
#[inline]
pub(crate) fn give_turn() {
    #[cfg(all(feature = "std", not(any(loom, shuttle))))]
    std::thread::yield_now();
    spin_hint();
}

/// Counts, in debug builds, the locks that a thread holds. Finds a call of foreign code under a
/// lock (C8).
#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
mod held {
    use core::cell::Cell;
    use core::ops::{Deref, DerefMut};

    std::thread_local!(static HELD: Cell<u32> = const { Cell::new(0) });

    /// A guard that is counted.
    pub(crate) struct Held<G>(G);

    impl<G> Held<G> {
        pub(crate) fn new(guard: G) -> Self {
            HELD.set(HELD.get() + 1);
            Self(guard)
        }
    }

    impl<G> Drop for Held<G> {
        fn drop(&mut self) {
            HELD.set(HELD.get() - 1);
        }
    }

    impl<G: Deref> Deref for Held<G> {
        type Target = G::Target;

        fn deref(&self) -> &G::Target {
            &self.0
        }
    }

    impl<G: DerefMut> DerefMut for Held<G> {
        fn deref_mut(&mut self) -> &mut G::Target {
            &mut self.0
        }
    }

    #[track_caller]
    pub(crate) fn assert_no_lock() {
        assert_eq!(HELD.get(), 0, "foreign code is called under a lock of the library");
    }
}

#[cfg(not(all(feature = "std", debug_assertions, not(any(loom, shuttle)))))]
mod held {
    /// Counts nothing.
    #[cfg_attr(
        any(loom, shuttle),
        allow(dead_code, reason = "the locks of model checkers are not wrapped")
    )]
    pub(crate) struct Held;

    impl Held {
        #[allow(clippy::new_ret_no_self, reason = "it stands for a wrapper")]
        #[cfg_attr(any(loom, shuttle), allow(dead_code, reason = "as above"))]
        pub(crate) fn new<G>(guard: G) -> G {
            guard
        }
    }

    pub(crate) fn assert_no_lock() {}
}

pub(crate) use held::assert_no_lock;
