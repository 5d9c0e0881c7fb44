//! The gate: holds the readers of a whole space back. It is closed without a lock and without
//! memory.
//!
//! A source of invalidations hears of a change while another thread waits for it to have heard. It
//! closes the gate, lets that thread go on, starts the invalidation, and opens the gate. No reader
//! begins meanwhile, so none gets an answer from before the change.
//!
//! In a storm of changes the gate is closed again before it was opened. So a reader does not wait
//! for a moment at which the gate is open. It waits until all closings from before it began have
//! been undone. Later closings belong to changes that the reader overlaps, so its answer may be
//! from before them. The reader's check ([`read_retry`](crate::Subscription::read_retry)) finds
//! that: no check succeeds while the gate is closed.
//!
//! Closings are counted on two sides, A and B. They go to A. When B is empty, a waiting reader, or
//! the thread that opens the gate for it, changes the sides, and later closings go to B. When A is
//! empty, the next change lets them go to A again. After two changes every closing from before the
//! first change has been undone.
//!
//! In a space whose memory is held by a lease, a bit makes the gate look closed for ever. Then a
//! reader asks whether the lease is valid: the lease may have ended while this process stood still
//! and could not close the gate. Other spaces do not pay for that.
#![forbid(unsafe_code)]

#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
mod real {
    use crate::engine::Shared;
    use crate::engine::host::Valid;
    use crate::foreign::{Callback, TaskWaker};
    use crate::sync::{AtomicU64, Ordering, fence};
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    use core::ops::AddAssign;
    use core::task::{Context, Poll};

    /// Bits of the count of one side.
    const COUNT: u32 = 31;
    const ONES: u64 = (1 << COUNT) - 1;
    /// The side on which closings are counted now.
    const SIDE: u64 = 1 << 63;
    /// There is a lease to be asked. Never changes.
    const LEASED: u64 = 1 << 62;

    /// Has cache lines of its own, because every reader reads it.
    #[repr(align(128))]
    pub(crate) struct Gate {
        /// The count of closings that were not undone on each side, [`SIDE`], and [`LEASED`].
        word: AtomicU64,
        /// How often the sides were changed. Under the lock of the space.
        changes: AtomicU64,
        valid: Option<Valid>,
    }

    /// Closings of a gate that are to be undone.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub(crate) struct Closings(u64);

    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    impl Closings {
        /// Returns a number, so that the caller can add closings up in an atomic.
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

    /// When a reader began to wait: how often the sides had been changed.
    #[derive(Clone, Copy, Default)]
    pub(crate) struct Since(Option<u64>);

    impl Gate {
        pub(crate) fn new(valid: Option<Valid>) -> Self {
            let word = if valid.is_some() { LEASED } else { 0 };
            Self { word: AtomicU64::new(word), changes: AtomicU64::new(0), valid }
        }

        /// Returns whether the gate is closed, or a lease is to be asked. To be read *before* the
        /// notifier's word: a reader that finds the gate open again sees what was invalidated
        /// meanwhile.
        #[inline]
        pub(crate) fn is_closed(&self) -> bool {
            self.word.load(Ordering::Acquire) << 1 != 0
        }

        /// Returns whether it was closed, whatever the lease says.
        pub(crate) fn has_closings(&self) -> bool {
            self.word.load(Ordering::Acquire) & !(SIDE | LEASED) != 0
        }

        /// Returns [`is_closed`](Self::is_closed), read after all earlier reads of this thread. A
        /// thread that has seen memory as it is after a change finds the gate closed, or its
        /// notifier invalidated.
        #[inline]
        pub(crate) fn is_closed_now(&self) -> bool {
            fence(Ordering::Acquire);
            self.is_closed()
        }

        /// Returns [`has_closings`](Self::has_closings), read after all earlier reads of this
        /// thread.
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        pub(crate) fn has_closings_now(&self) -> bool {
            fence(Ordering::Acquire);
            self.has_closings()
        }

        /// Returns how many closings were not undone.
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        pub(crate) fn closings(&self) -> u64 {
            let word = self.word.load(Ordering::Acquire);
            (word & ONES) + (word >> COUNT & ONES)
        }

        /// Changes the sides if nothing is left on the one that is not in use. Returns whether it
        /// did. Under the lock of the space.
        fn change_sides(&self) -> bool {
            let empty = |word: u64| {
                let other = if word & SIDE == 0 { word >> COUNT } else { word };
                other & ONES == 0
            };
            let change = |word| empty(word).then_some(word ^ SIDE);
            // Acquire: sees what the openers of that side wrote. Publishes nothing.
            let changed =
                self.word.fetch_update(Ordering::Acquire, Ordering::Relaxed, change).is_ok();
            if changed {
                self.changes.store(self.changes.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
            changed
        }

        /// Returns whether all closings from before a reader began have been undone. Under the lock
        /// of the space.
        fn was_open(&self, since: &mut Since) -> bool {
            if !self.has_closings() {
                return true;
            }
            let changes = || self.changes.load(Ordering::Relaxed);
            let began = *since.0.get_or_insert_with(changes);
            self.change_sides();
            changes() - began >= 2
        }
    }

    impl Shared {
        /// Closes the gate: readers that begin from now on wait. Takes no lock and no memory.
        pub(crate) fn close_gate(&self) -> Closings {
            let one = |word: u64| if word & SIDE == 0 { 1 } else { 1 << COUNT };
            let close = |word| Some(word + one(word));
            // Relaxed: whatever lets the other thread go on makes the closing visible to it.
            let closed = self.gate.word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, close);
            Closings(closed.map_or(0, one))
        }

        /// Undoes closings, and wakes the readers that waited for that.
        pub(crate) fn open_gate(&self, closings: Closings) {
            if closings.0 == 0 {
                return;
            }
            self.gate.word.fetch_sub(closings.0, Ordering::AcqRel);
            self.with(|state, outbox| {
                if !state.gated.is_empty()
                    && (!self.gate.has_closings() || self.gate.change_sides())
                {
                    outbox.contents().tasks.append(&mut state.gated);
                }
            });
        }

        /// Returns whether a reader is held back: the gate is closed, or the lease has ended.
        #[inline]
        pub(crate) fn is_shut(&self) -> bool {
            self.gate.is_closed() && !self.is_let_in()
        }

        /// Returns whether the gate only looks closed, because there is a lease, and that is valid.
        /// Read after all earlier reads of this thread.
        #[cold]
        pub(crate) fn is_let_in(&self) -> bool {
            fence(Ordering::Acquire);
            !self.gate.has_closings() && self.is_leased()
        }

        /// Returns whether the lease is valid, or there is none. Runs foreign code. If that panics,
        /// the lease is not valid.
        fn is_leased(&self) -> bool {
            let valid =
                |valid: &Valid| self.host.losses.run(Callback::Lease, |_| valid()).unwrap_or(false);
            self.gate.valid.as_ref().is_none_or(valid)
        }

        /// Waits for the gate. `open_gate` takes the lock after it has opened the gate, so a reader
        /// sees that or is woken. The holder of a lease opens the gate after the lease has become
        /// valid.
        #[cold]
        pub(crate) fn poll_gate(&self, since: &mut Since, cx: &mut Context<'_>) -> Poll<()> {
            let valid = self.is_leased();
            let polled = self.poll_closings(valid, since, cx);
            // The lease has become valid before this reader was in the list of those to be woken.
            if polled.is_pending() && !valid && self.is_leased() {
                return self.poll_closings(true, since, cx);
            }
            polled
        }

        fn poll_closings(&self, valid: bool, since: &mut Since, cx: &mut Context<'_>) -> Poll<()> {
            if valid && !self.gate.has_closings() {
                return Poll::Ready(());
            }
            let task = TaskWaker::new(cx.waker(), &self.host.losses);
            self.with(|state, outbox| {
                if self.gate.was_open(since) && valid {
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

#[cfg(not(any(feature = "userfaultfd", feature = "lease", loom)))]
mod open;

#[cfg(not(any(feature = "userfaultfd", feature = "lease", loom)))]
pub(crate) use open::{Gate, Since};
#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
pub(crate) use real::{Closings, Gate, Since};

#[cfg(all(test, feature = "userfaultfd", target_os = "linux", not(any(loom, shuttle))))]
mod tests;
