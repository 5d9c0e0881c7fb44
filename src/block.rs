//! [`Waitable`], and the function behind each `wait()`: threads that wait for a future (rules W).
//!
//! The thread polls the future itself, so it helps with the passes that it waits for (C3). Between
//! two polls it sleeps until its waker is woken. It does not enter an executor and polls only this
//! future. So a thread may call `wait()` wherever it may block.
#![forbid(unsafe_code)]

use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use pin_project::pin_project;

/// Wraps the future of a function of this crate, so that a thread can wait for it, too: with `wait`
/// (feature `std`).
///
/// It behaves as the future of an `async fn`. Nothing happens before it is polled. It is `Send` and
/// `Sync` if the data in it is. The guide has a page on threads that wait: `docs::threads`.
#[pin_project]
#[must_use = "nothing happens before the future is awaited or waited for"]
pub struct Waitable<F>(#[pin] F);

impl<F> Waitable<F> {
    /// Wraps a future.
    #[inline]
    pub(crate) fn new(future: F) -> Self {
        Self(future)
    }
}

impl<F: Future> Waitable<F> {
    /// Blocks the thread until the future resolves, and returns its output (rule
    /// [W1](crate::docs::contract)).
    #[cfg(feature = "std")]
    pub fn wait(self) -> F::Output {
        wait(self.0)
    }
}

impl<F: Future> Future for Waitable<F> {
    type Output = F::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.project().0.poll(cx)
    }
}

impl<F> fmt::Debug for Waitable<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waitable").finish_non_exhaustive()
    }
}

#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
pub(crate) use thread::is_of_a_thread;
#[cfg(feature = "std")]
pub(crate) use thread::wait;

#[cfg(feature = "std")]
mod thread {
    use crate::sync::{Arc, AtomicBool, Event, Listener, Ordering};
    use alloc::task::Wake;
    use core::future::Future;
    use core::pin::pin;
    use core::task::{Context, Poll, Waker};

    /// The waker of a thread. It may outlive the wait and has no effect then.
    #[derive(Default)]
    struct Sleeper {
        /// The waker was woken since the thread last looked.
        woken: AtomicBool,
        /// Only threads listen to it. It notifies under its own lock, and waking a thread runs no
        /// foreign code (C8).
        event: Event,
    }

    impl Wake for Sleeper {
        fn wake(self: Arc<Self>) {
            Wake::wake_by_ref(&self);
        }

        fn wake_by_ref(self: &Arc<Self>) {
            // The caller that has set `woken` notifies. Later callers need not.
            if !self.woken.swap(true, Ordering::AcqRel) {
                self.event.notify(1);
            }
        }
    }

    impl Sleeper {
        /// Blocks the thread until the waker was woken since the last call.
        fn sleep(&self) {
            while !self.woken.swap(false, Ordering::AcqRel) {
                let listener = self.event.listen();
                // A wake-up before `listen` has notified no listener, so look again.
                if self.woken.swap(false, Ordering::AcqRel) {
                    return;
                }
                listener.wait();
            }
        }
    }

    /// Returns whether `waker` is that of a thread in [`wait`].
    #[cfg(all(debug_assertions, not(any(loom, shuttle))))]
    pub(crate) fn is_of_a_thread(waker: &Waker) -> bool {
        waker.vtable() == Waker::from(Arc::<Sleeper>::default()).vtable()
    }

    /// Blocks the thread until the future resolves.
    pub(crate) fn wait<F: Future>(future: F) -> F::Output {
        let mut future = pin!(future);
        let sleeper = spare::take();
        let waker = Waker::from(sleeper.clone());
        let mut cx = Context::from_waker(&waker);
        let output = loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
                break output;
            }
            sleeper.sleep();
        };
        drop(waker);
        spare::put(sleeper);
        output
    }

    mod spare {
        use super::{Arc, Ordering, Sleeper};
        use core::cell::Cell;

        std::thread_local!(static SPARE: Cell<Option<Arc<Sleeper>>> = const { Cell::new(None) });

        pub(super) fn take() -> Arc<Sleeper> {
            SPARE.try_with(Cell::take).ok().flatten().unwrap_or_default()
        }

        /// Keeps the waker for the next wait of this thread, unless a clone of it exists: two waits
        /// must not look like polls of one task (C4). Keeps none under model checkers, which run
        /// all threads of a model on one thread.
        pub(super) fn put(mut sleeper: Arc<Sleeper>) {
            if cfg!(any(loom, shuttle)) {
                return;
            }
            if let Some(unshared) = Arc::get_mut(&mut sleeper) {
                unshared.woken.store(false, Ordering::Relaxed);
                let _ = SPARE.try_with(|spare| spare.set(Some(sleeper)));
            }
        }
    }

    #[cfg(all(test, not(any(loom, shuttle))))]
    mod tests {
        use super::spare;
        use crate::sync::Listener;

        #[test]
        fn a_thread_sleeps_on_what_it_slept_on_before_unless_a_waker_of_that_is_left() {
            let sleeper = spare::take();
            let listener = sleeper.event.listen();
            spare::put(sleeper);
            let sleeper = spare::take();
            assert!(listener.listens_to(&sleeper.event));
            let waker = sleeper.clone();
            spare::put(sleeper);
            assert!(!listener.listens_to(&spare::take().event), "C4: these are two tasks");
            drop(waker);
        }
    }
}
