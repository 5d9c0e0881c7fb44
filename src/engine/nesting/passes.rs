//! The check of C7 for passes: in debug builds, a pass that waits for itself panics with its
//! notifier's name.
//!
//! A reader of a notifier waits until no invalidation covers it, so until the passes of the
//! notifier are done. A pass that awaits such a reader, or the notifier's removal, waits for
//! itself. But a pass may also poll such a future beside a timer that ends it (F3). The difference
//! is who can wake the pass. If only futures that wait for the pass have its waker, no one can.
//!
//! So a pass that polls such a future with its own waker is polled again at once, with a waker
//! whose clones are counted. It panics if it is pending then, has not been woken, and each clone
//! belongs to such a future. Anything else that it awaits has a clone of its own, as each poll
//! renews the waker of a future.
//!
//! A pass that blocks its thread in the `wait` of such a future panics at once.
#![forbid(unsafe_code)]

#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
mod check {
    use crate::block::is_of_a_thread;
    use crate::engine::host::Host;
    use crate::entry::EntryRef;
    use crate::foreign::{Panic, keep};
    use crate::sync::{Arc, AtomicBool, Ordering, fence};
    use alloc::format;
    use alloc::string::String;
    use alloc::task::Wake;
    use core::cell::RefCell;
    use core::task::{Context, Poll, Waker};
    use std::vec::Vec;

    /// A pass that is being polled on this thread.
    struct Polled {
        entry: EntryRef,
        waker: Waker,
        /// The clones of its waker are counted.
        watched: bool,
        /// How many pending waits for the pass itself have been polled with its waker.
        waits: usize,
        /// The message of the last of them.
        message: Option<String>,
    }

    std::thread_local! {
        /// Innermost last.
        static POLLED: RefCell<Vec<Polled>> = const { RefCell::new(Vec::new()) };
    }

    /// Takes the pass off the list when dropped, also when a panic unwinds.
    struct Entered(bool);

    impl Entered {
        /// Puts the pass on the list. In the destructor of a thread-local, the list may be gone.
        fn new(polled: Polled) -> Self {
            Self(POLLED.try_with(|list| list.borrow_mut().push(polled)).is_ok())
        }

        fn leave(mut self) -> Option<Polled> {
            core::mem::take(&mut self.0)
                .then(|| POLLED.try_with(|list| list.borrow_mut().pop()).ok().flatten())
                .flatten()
        }
    }

    impl Drop for Entered {
        fn drop(&mut self) {
            if self.0 {
                let polled = POLLED.try_with(|list| list.borrow_mut().pop());
                drop(polled);
            }
        }
    }

    /// A waker of the join. Its `Arc` counts its clones.
    struct Counted {
        waker: Waker,
        woken: AtomicBool,
    }

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            Wake::wake_by_ref(&self);
        }

        fn wake_by_ref(self: &Arc<Self>) {
            self.woken.store(true, Ordering::Release);
            self.waker.wake_by_ref();
        }
    }

    /// The suspicion that a pass waits for itself.
    pub(crate) struct Suspicion(Option<Arc<Counted>>);

    impl Suspicion {
        pub(crate) fn none() -> Self {
            Self(None)
        }

        /// Polls a pass of `entry` for the first time, with a waker that is not the pass's own.
        /// Checks nothing: a pass that is pending is polled again in any case.
        pub(crate) fn first_poll(
            entry: EntryRef,
            cx: &mut Context<'_>,
            poll: impl FnOnce(&mut Context<'_>) -> Poll<()>,
        ) -> Poll<()> {
            let waker = cx.waker().clone();
            let _entered =
                Entered::new(Polled { entry, waker, watched: false, waits: 0, message: None });
            poll(cx)
        }

        /// Polls a pass of `entry`.
        pub(crate) fn poll(
            &mut self,
            entry: EntryRef,
            cx: &mut Context<'_>,
            poll: impl FnOnce(&mut Context<'_>) -> Result<Poll<()>, Panic>,
        ) -> Result<Poll<()>, Panic> {
            let watched = self.0.is_some();
            let waker = match &self.0 {
                Some(counted) => {
                    counted.woken.store(false, Ordering::Release);
                    Waker::from(counted.clone())
                }
                None => cx.waker().clone(),
            };
            let entered = Entered::new(Polled {
                entry,
                waker: waker.clone(),
                watched,
                waits: 0,
                message: None,
            });
            let answer = poll(&mut Context::from_waker(&waker));
            let Some(Polled { waits, message, .. }) = entered.leave() else { return answer };
            if waits == 0 || !matches!(answer, Ok(Poll::Pending)) {
                return answer;
            }
            match (&self.0, message) {
                (Some(counted), Some(message)) => {
                    // Two clones are ours: the one in `self` and the one in the poll. A task that
                    // wakes does so before it drops its clone.
                    let clones = Arc::strong_count(counted).saturating_sub(2);
                    fence(Ordering::Acquire);
                    if clones == waits && !counted.woken.load(Ordering::Acquire) {
                        return keep(|_| panic!("{message}"));
                    }
                }
                _ => {
                    self.0 = Some(Arc::new(Counted { waker, woken: AtomicBool::new(false) }));
                    cx.waker().wake_by_ref();
                }
            }
            answer
        }
    }

    /// Notes that a future is pending that waits until the passes of `entry` are done. To be called
    /// without a lock.
    pub(crate) fn note_wait(host: &Host, what: &'static str, entry: EntryRef, waker: &Waker) {
        let own = POLLED.try_with(|list| {
            let list = list.borrow();
            let polled = list.last().filter(|polled| polled.entry == entry)?;
            Some((polled.watched, polled.waker.will_wake(waker)))
        });
        let Ok(Some((watched, awaits))) = own else { return };
        // Runs driver code, so nothing is borrowed meanwhile.
        let message = || {
            format!(
                "a pass of {} waits for itself: it awaits {what} of its own notifier, which waits for the pass: \
                 let the pass end first, and do that in a task of its own",
                entry.name(&host.losses)
            )
        };
        if !awaits {
            // The thread that polls the pass is in `wait`, so the poll never returns.
            assert!(!is_of_a_thread(waker), "{}", message());
            return;
        }
        if entry.is_fenced() {
            // The pass is dropped as soon as its poll returns (L5).
            return;
        }
        let message = watched.then(message);
        let _ = POLLED.try_with(|list| {
            if let Some(polled) = list.borrow_mut().last_mut() {
                polled.waits += 1;
                polled.message = message;
            }
        });
    }
}

#[cfg(not(all(feature = "std", debug_assertions, not(any(loom, shuttle)))))]
pub(crate) use super::unchecked::{Suspicion, note_wait};
#[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
pub(crate) use check::{Suspicion, note_wait};
