//! Threads that wait: [`Waitable`], and what each `wait()` calls (W).
//!
//! A thread that waits polls the future itself, so that it helps with the passes that it waits for
//! (C3), and sleeps between two polls until its waker is woken. Nothing notes that the thread is
//! inside of an executor: what is polled here is this future only, so it may be called anywhere
//! where the thread may be kept.
#![forbid(unsafe_code)]

use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use pin_project::pin_project;

/// The future of a function of this crate, which a thread can wait for, too: `wait` (feature
/// `std`).
///
/// It is what an `async fn` would return: nothing happens before it is polled, and it is `Send` and
/// `Sync` where what it holds is.
#[pin_project]
#[must_use = "nothing happens before the future is awaited or waited for"]
pub struct Waitable<F>(#[pin] F);

impl<F> Waitable<F> {
    #[inline]
    pub(crate) fn new(future: F) -> Self {
        Self(future)
    }
}

impl<F: Future> Waitable<F> {
    /// Blocks the thread until the future resolves (W1).
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

    /// The waker of a thread. It may outlive the wait: then it wakes nobody.
    #[derive(Default)]
    struct Sleeper {
        woken: AtomicBool,
        /// Only threads listen to it, so that its lock, under which it wakes, is held over no
        /// foreign code (C8).
        event: Event,
    }

    impl Wake for Sleeper {
        fn wake(self: Arc<Self>) {
            Wake::wake_by_ref(&self);
        }

        fn wake_by_ref(self: &Arc<Self>) {
            // Who has set it has notified, or is about to.
            if !self.woken.swap(true, Ordering::AcqRel) {
                self.event.notify(1);
            }
        }
    }

    impl Sleeper {
        /// Until it has been woken since the last call.
        fn sleep(&self) {
            while !self.woken.swap(false, Ordering::AcqRel) {
                let listener = self.event.listen();
                // Who woke before that has notified nobody.
                if self.woken.swap(false, Ordering::AcqRel) {
                    return;
                }
                listener.wait();
            }
        }
    }

    /// Whether it is the waker of a thread that is in [`wait`].
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

    #[cfg(not(any(loom, shuttle)))]
    mod spare {
        use super::{Arc, Sleeper};
        use core::cell::Cell;

        std::thread_local!(static SPARE: Cell<Option<Arc<Sleeper>>> = const { Cell::new(None) });

        pub(super) fn take() -> Arc<Sleeper> {
            SPARE.try_with(Cell::take).ok().flatten().unwrap_or_default()
        }

        /// Keeps it for the next wait of this thread, unless somebody still has its waker: two
        /// waits must not look like polls of one task (C4).
        pub(super) fn put(mut sleeper: Arc<Sleeper>) {
            if let Some(unshared) = Arc::get_mut(&mut sleeper) {
                *unshared.woken.get_mut() = false;
                let _ = SPARE.try_with(|spare| spare.set(Some(sleeper)));
            }
        }
    }

    /// Model checkers run all their threads on one.
    #[cfg(any(loom, shuttle))]
    mod spare {
        use super::{Arc, Sleeper};

        pub(super) fn take() -> Arc<Sleeper> {
            Arc::default()
        }

        pub(super) fn put(_: Arc<Sleeper>) {}
    }
}
