//! A gate before the readers of a whole space, which is closed without a lock and without memory.
//!
//! For sources of invalidations that hear of a change while somebody waits for them to have heard:
//! they close the gate, let the other one go on, start the invalidation, and open the gate.
//! Meanwhile no reader begins, so none gets an answer from before the change.
//!
//! In a storm of changes it is closed again before it was opened, so a reader does not wait for a
//! moment at which it is open. It waits until all closings from before it began have been undone:
//! those that come later are of changes that it overlaps, and may answer from before. Who uses the
//! answer checks it ([`read_retry`](crate::Subscription::read_retry)), and no check succeeds while
//! the gate is closed.
//!
//! Closings are counted on one of two sides. A waiting reader has the sides changed once nothing is
//! left on the other one, which is then that of the closings to come; when the sides have been
//! changed twice, nothing is left of what was there when it began.
#![forbid(unsafe_code)]

#[cfg(any(feature = "userfaultfd", loom))]
mod real {
    use crate::engine::Shared;
    use crate::foreign::TaskWaker;
    use crate::sync::{AtomicU64, Ordering, fence};
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    use core::ops::AddAssign;
    use core::task::{Context, Poll};

    /// Bits of the count of one side.
    const COUNT: u32 = 31;
    const ONES: u64 = (1 << COUNT) - 1;
    /// The side on which it is closed now.
    const SIDE: u64 = 1 << 63;

    /// On cache lines of its own: every reader looks at it.
    #[repr(align(128))]
    pub(crate) struct Gate {
        /// How often it was closed and not yet opened, on either side, and [`SIDE`].
        word: AtomicU64,
        /// How often the sides were changed. Under the lock of the space.
        changes: AtomicU64,
    }

    /// Closings of a gate that are to be undone.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub(crate) struct Closings(u64);

    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    impl Closings {
        /// What others count in an atomic.
        pub(crate) fn into_bits(self) -> u64 {
            self.0
        }

        pub(crate) fn from_bits(bits: u64) -> Self {
            Self(bits)
        }
    }

    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    impl AddAssign for Closings {
        fn add_assign(&mut self, other: Self) {
            self.0 += other.0;
        }
    }

    /// When a reader began to wait.
    #[derive(Clone, Copy, Default)]
    pub(crate) struct Since(Option<u64>);

    impl Gate {
        pub(crate) fn new() -> Self {
            Self { word: AtomicU64::new(0), changes: AtomicU64::new(0) }
        }

        /// To be asked *before* the notifier's word: whoever finds the gate open again sees what
        /// was invalidated meanwhile.
        #[inline]
        pub(crate) fn is_closed(&self) -> bool {
            self.word.load(Ordering::Acquire) << 1 != 0
        }

        /// The same, and not looked at before anything that this thread has read until now: whoever
        /// has seen memory as it is after a change finds the gate closed, or what was
        /// invalidated.
        #[inline]
        pub(crate) fn is_closed_now(&self) -> bool {
            fence(Ordering::Acquire);
            self.is_closed()
        }

        /// How often it was closed and not yet opened.
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        pub(crate) fn closings(&self) -> u64 {
            let word = self.word.load(Ordering::Acquire);
            (word & ONES) + (word >> COUNT & ONES)
        }

        /// Changes the sides, if nothing is left on the one that is not in use. Under the lock of the
        /// space.
        fn change_sides(&self) -> bool {
            let empty = |word: u64| {
                let other = if word & SIDE == 0 { word >> COUNT } else { word };
                other & ONES == 0
            };
            let change = |word| empty(word).then_some(word ^ SIDE);
            let changed = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, change).is_ok();
            if changed {
                self.changes.store(self.changes.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
            changed
        }

        /// Whether all closings from before somebody began have been undone. Under the lock of the
        /// space.
        fn was_open(&self, since: &mut Since) -> bool {
            if !self.is_closed() {
                return true;
            }
            let changes = || self.changes.load(Ordering::Relaxed);
            let began = *since.0.get_or_insert_with(changes);
            self.change_sides();
            changes() - began >= 2
        }
    }

    impl Shared {
        /// Readers that begin from now on wait. Takes no lock and no memory.
        pub(crate) fn close_gate(&self) -> Closings {
            let one = |word: u64| if word & SIDE == 0 { 1 } else { 1 << COUNT };
            let close = |word| Some(word + one(word));
            let closed = self.gate.word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, close);
            Closings(closed.map_or(0, one))
        }

        /// Undoes closings, and wakes the readers that may have waited for that.
        pub(crate) fn open_gate(&self, closings: Closings) {
            if closings.0 == 0 {
                return;
            }
            self.gate.word.fetch_sub(closings.0, Ordering::AcqRel);
            self.with(|state, outbox| {
                if !state.gated.is_empty() && (!self.gate.is_closed() || self.gate.change_sides()) {
                    outbox.contents().tasks.append(&mut state.gated);
                }
            });
        }

        /// Waits for the gate; `open_gate` takes the lock after it has opened it, so a reader
        /// either sees that or is woken.
        #[cold]
        pub(crate) fn poll_gate(&self, since: &mut Since, cx: &mut Context<'_>) -> Poll<()> {
            let task = TaskWaker::new(cx.waker(), &self.host.losses);
            self.with(|state, outbox| {
                if self.gate.was_open(since) {
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

    #[derive(Clone, Copy, Default)]
    pub(crate) struct Since(());

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
        pub(crate) fn poll_gate(&self, _since: &mut Since, _cx: &mut Context<'_>) -> Poll<()> {
            Poll::Ready(())
        }
    }
}

#[cfg(any(feature = "userfaultfd", loom))]
pub(crate) use real::Closings;
pub(crate) use real::{Gate, Since};
