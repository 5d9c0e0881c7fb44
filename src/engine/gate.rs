//! A gate before the readers of a whole space, which is closed without a lock and without memory.
//!
//! For sources of invalidations that hear of a change while somebody waits for them to have heard:
//! they close the gate, let the other one go on, start the invalidation, and open the gate.
//! Meanwhile no reader begins, so none gets an answer from before the change.
#![forbid(unsafe_code)]

#[cfg(any(feature = "userfaultfd", loom))]
mod real {
    use crate::engine::Shared;
    use crate::foreign::TaskWaker;
    use crate::sync::{AtomicUsize, Ordering, fence};
    use core::task::{Context, Poll};

    /// How often it was closed and not yet opened. On cache lines of its own: every reader looks at
    /// it.
    #[repr(align(128))]
    pub(crate) struct Gate(AtomicUsize);

    impl Gate {
        pub(crate) fn new() -> Self {
            Self(AtomicUsize::new(0))
        }

        /// To be asked *before* the notifier's word: whoever finds the gate open again sees what
        /// was invalidated meanwhile.
        #[inline]
        pub(crate) fn is_closed(&self) -> bool {
            self.0.load(Ordering::Acquire) != 0
        }

        /// The same, and not looked at before anything that this thread has read until now: whoever
        /// has seen memory as it is after a change finds the gate closed, or what was
        /// invalidated.
        #[inline]
        pub(crate) fn is_closed_now(&self) -> bool {
            fence(Ordering::Acquire);
            self.is_closed()
        }
    }

    impl Shared {
        /// Readers that begin from now on wait. Takes no lock and no memory.
        pub(crate) fn close_gate(&self) {
            self.gate.0.fetch_add(1, Ordering::AcqRel);
        }

        /// Undoes `times` closings, and wakes the readers once there is none left.
        pub(crate) fn open_gate(&self, times: usize) {
            if times != 0 && self.gate.0.fetch_sub(times, Ordering::AcqRel) == times {
                self.with(|state, outbox| {
                    if !state.gated.is_empty() {
                        outbox.contents().tasks.append(&mut state.gated);
                    }
                });
            }
        }

        /// Waits for the gate; `open_gate` takes the lock after it has opened it, so a reader
        /// either sees it open or is woken.
        #[cold]
        pub(crate) fn poll_gate(&self, cx: &mut Context<'_>) -> Poll<()> {
            let task = TaskWaker::new(cx.waker(), &self.host.losses);
            self.with(|state, outbox| {
                if !self.gate.is_closed() {
                    outbox.contents().unused.push(task);
                    return Poll::Ready(());
                }
                if state.gated.iter().any(|known| known.wakes(cx.waker())) {
                    outbox.contents().unused.push(task);
                } else {
                    state.gated.push(task);
                }
                Poll::Pending
            })
        }
    }
}

#[cfg(not(any(feature = "userfaultfd", loom)))]
mod real {
    use crate::engine::Shared;
    use core::task::{Context, Poll};

    /// Nobody can close it.
    pub(crate) struct Gate;

    impl Gate {
        pub(crate) fn new() -> Self {
            Self
        }

        #[inline]
        pub(crate) fn is_closed(&self) -> bool {
            false
        }

        #[inline]
        pub(crate) fn is_closed_now(&self) -> bool {
            false
        }
    }

    impl Shared {
        pub(crate) fn poll_gate(&self, _cx: &mut Context<'_>) -> Poll<()> {
            Poll::Ready(())
        }
    }
}

pub(crate) use real::Gate;
