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
//!
//! A space whose memory is held by a lease has the gate look closed for ever, by a bit of its own:
//! then a reader asks whether the lease is valid (it may have ended while this process stood still,
//! so nobody could close the gate). Other spaces do not pay for that.
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
    /// The side on which it is closed now.
    const SIDE: u64 = 1 << 63;
    /// A lease is asked, too. Never changes.
    const LEASED: u64 = 1 << 62;

    /// On cache lines of its own: every reader looks at it.
    #[repr(align(128))]
    pub(crate) struct Gate {
        /// How often it was closed and not yet opened, on either side, and [`SIDE`].
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
        pub(crate) fn new(valid: Option<Valid>) -> Self {
            let word = if valid.is_some() { LEASED } else { 0 };
            Self { word: AtomicU64::new(word), changes: AtomicU64::new(0), valid }
        }

        /// Or there is a lease to be asked. To be asked *before* the notifier's word: whoever finds
        /// the gate open again sees what was invalidated meanwhile.
        #[inline]
        pub(crate) fn is_closed(&self) -> bool {
            self.word.load(Ordering::Acquire) << 1 != 0
        }

        /// Whether it was closed, whatever the lease says.
        pub(crate) fn has_closings(&self) -> bool {
            self.word.load(Ordering::Acquire) & !(SIDE | LEASED) != 0
        }

        /// The same, and not looked at before anything that this thread has read until now: whoever
        /// has seen memory as it is after a change finds the gate closed, or what was
        /// invalidated.
        #[inline]
        pub(crate) fn is_closed_now(&self) -> bool {
            fence(Ordering::Acquire);
            self.is_closed()
        }

        /// The same of the closings alone.
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        pub(crate) fn has_closings_now(&self) -> bool {
            fence(Ordering::Acquire);
            self.has_closings()
        }

        /// How often it was closed and not yet opened.
        #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
        pub(crate) fn closings(&self) -> u64 {
            let word = self.word.load(Ordering::Acquire);
            (word & ONES) + (word >> COUNT & ONES)
        }

        /// Changes the sides, if nothing is left on the one that is not in use. Under the lock of
        /// the space.
        fn change_sides(&self) -> bool {
            let empty = |word: u64| {
                let other = if word & SIDE == 0 { word >> COUNT } else { word };
                other & ONES == 0
            };
            let change = |word| empty(word).then_some(word ^ SIDE);
            // Acquires what those published who emptied it; publishes nothing.
            let changed =
                self.word.fetch_update(Ordering::Acquire, Ordering::Relaxed, change).is_ok();
            if changed {
                self.changes.store(self.changes.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
            changed
        }

        /// Whether all closings from before somebody began have been undone. Under the lock of the
        /// space.
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
        /// Readers that begin from now on wait. Takes no lock and no memory.
        pub(crate) fn close_gate(&self) -> Closings {
            let one = |word: u64| if word & SIDE == 0 { 1 } else { 1 << COUNT };
            let close = |word| Some(word + one(word));
            // Relaxed: whatever lets the other thread go on makes the closing visible to it.
            let closed = self.gate.word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, close);
            Closings(closed.map_or(0, one))
        }

        /// Undoes closings, and wakes the readers that may have waited for that.
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

        /// Whether a reader is held back: the gate is closed, or the lease has ended.
        #[inline]
        pub(crate) fn is_shut(&self) -> bool {
            self.gate.is_closed() && !self.is_let_in()
        }

        /// Whether the gate only looks closed, because there is a lease, and that is valid. Asked
        /// after everything that this thread has read until now.
        #[cold]
        pub(crate) fn is_let_in(&self) -> bool {
            fence(Ordering::Acquire);
            !self.gate.has_closings() && self.is_leased()
        }

        /// Whether the lease is valid, if there is one. Foreign code; one that panics is not.
        fn is_leased(&self) -> bool {
            let valid =
                |valid: &Valid| self.host.losses.run(Callback::Lease, |_| valid()).unwrap_or(false);
            self.gate.valid.as_ref().is_none_or(valid)
        }

        /// Waits for the gate; `open_gate` takes the lock after it has opened it, so a reader
        /// either sees that or is woken. Who has the lease opens it after it has become valid.
        #[cold]
        pub(crate) fn poll_gate(&self, since: &mut Since, cx: &mut Context<'_>) -> Poll<()> {
            let valid = self.is_leased();
            let polled = self.poll_closings(valid, since, cx);
            // It has become valid before this reader was among those who are woken for that.
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
mod real {
    use crate::engine::Shared;
    use crate::engine::host::Valid;
    use core::task::{Context, Poll};

    /// Nobody can close it.
    pub(crate) struct Gate;

    #[derive(Clone, Copy, Default)]
    pub(crate) struct Since(());

    impl Gate {
        pub(crate) fn new(_valid: Option<Valid>) -> Self {
            Self
        }

        #[inline]
        pub(crate) fn is_closed_now(&self) -> bool {
            false
        }
    }

    #[cfg_attr(
        not(feature = "cache"),
        expect(clippy::unused_self, reason = "as where somebody can")
    )]
    impl Shared {
        #[inline]
        pub(crate) fn is_shut(&self) -> bool {
            false
        }

        #[inline]
        pub(crate) fn is_let_in(&self) -> bool {
            true
        }

        pub(crate) fn poll_gate(&self, _since: &mut Since, _cx: &mut Context<'_>) -> Poll<()> {
            Poll::Ready(())
        }
    }
}

#[cfg(any(feature = "userfaultfd", feature = "lease", loom))]
pub(crate) use real::Closings;
pub(crate) use real::{Gate, Since};
