//! Fences: a number that rises, and futures that wait until it has reached theirs.
//!
//! `signal` is called where nothing may be waited for, so it only tries for the lock. Who has the
//! lock looks again after giving it back: either `signal` gets it, or its holder sees what `signal`
//! has noted before it tried. In the same way one wakes at a time, and looks again after that.
#![forbid(unsafe_code)]

use crate::foreign::{Losses, TaskWaker};
use crate::sync::{Arc, AtomicBool, AtomicU64, Lock, Ordering, fence, spin_hint};
use alloc::collections::BTreeMap;
use core::fmt;
use core::future::Future;
use core::num::NonZeroU64;
use core::pin::Pin;
use core::task::{Context, Poll};

/// A number that rises, and that tasks and threads wait for: the fence of a device's queue, as
/// `dma_fence` with its sequence numbers or a timeline semaphore of Vulkan.
///
/// A driver numbers what it submits. The device, or whoever hears of it, [signals](Self::signal)
/// the number of what is done. Whoever waits for that holds the future of
/// [`reached`](Self::reached).
/// Clones are handles of the same timeline.
///
/// ```
/// use shootdown::{PassFuture, Timeline};
///
/// let done = Timeline::new();
/// // In a first pass: submit a flush, the seventh of this device.
/// let pass = PassFuture::new(done.reached(7)); // without an allocation
/// # let of_interrupt = done.clone();
/// // In the handler of the device's interrupt:
/// of_interrupt.signal(7);
/// # pass.wait();
/// ```
///
/// # Numbers
/// They start at 0 and never wrap: at a signal each nanosecond they last for 584 years. A device
/// that counts in 32 bits needs its driver to add what is above them.
///
/// # Nobody signals
/// What is never signalled is waited for for ever, as a `dma_fence` is: a future that resolved
/// because the last handle was dropped would say that the device is done, when nobody has. A pass
/// that hangs is in [`AddressSpace::active`](crate::AddressSpace::active) with its driver's name. A
/// driver whose device is reset, so that it reaches no memory any more, signals the last number
/// that it has given out, or [`u64::MAX`], after which every number is reached: the device goes on
/// with a new timeline.
/// Waiting futures keep the state alive, and need no handle to.
#[derive(Clone, Default)]
pub struct Timeline(Arc<Core>);

struct Core {
    /// Only rises. What it allows to go on happened before it rose.
    value: AtomicU64,
    /// It has risen since somebody last looked who waits for that.
    risen: AtomicBool,
    /// Somebody calls wakers, and looks again afterwards. Set under the lock.
    waking: AtomicBool,
    waiting: Lock<Waiting>,
    losses: Arc<Losses>,
}

/// Who waits for which number: in that order, and in the order in which they came.
#[derive(Default)]
struct Waiting {
    tasks: BTreeMap<(u64, u64), Arc<TaskWaker>>,
    tickets: u64,
}

impl Default for Core {
    fn default() -> Self {
        let (value, risen, waking) =
            (AtomicU64::new(0), AtomicBool::new(false), AtomicBool::new(false));
        Self {
            value,
            risen,
            waking,
            waiting: Lock::new(Waiting::default()),
            losses: Arc::new(Losses::new(None)),
        }
    }
}

/// So many are woken between two locks.
const BATCH: usize = if cfg!(any(loom, shuttle)) { 1 } else { 16 };

impl Timeline {
    /// At 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// The greatest number that was signalled. What happened before that signal is seen by who has
    /// this value.
    pub fn value(&self) -> u64 {
        self.0.value.load(Ordering::Acquire)
    }

    /// Raises the value to `value`, and wakes who waits for it or for less; nobody else is looked
    /// at. A number that is not above the value changes nothing.
    ///
    /// From any thread, and from where nothing may be waited for: it takes no lock of the timeline
    /// that somebody has, and allocates nothing. It calls the wakers of those it wakes, unless
    /// another thread is at it, or a waker that was called by it, which then does; a waker may do
    /// anything, this included (C8). It also frees memory: what must not do that, such as a POSIX
    /// signal handler, has a thread signal for it.
    ///
    /// # Panics
    /// Never for a waker: its panic is [counted](Self::lost_panics), and the others are woken.
    /// Without `std` there is nothing to catch it with.
    pub fn signal(&self, value: u64) {
        if self.0.value.fetch_max(value, Ordering::AcqRel) < value {
            // A swap, as the others, so that who clears it sees the values of all who have set it.
            self.0.risen.swap(true, Ordering::AcqRel);
            self.0.look_again();
        }
    }

    /// Waits until the value is at least `value`.
    pub fn reached(&self, value: u64) -> Reached {
        Reached { core: self.0.clone(), value, ticket: None, task: None }
    }

    /// How many wakers have panicked, when they were woken or dropped: a timeline belongs to no
    /// space that would count them, and who signals has nothing to do with them.
    pub fn lost_panics(&self) -> u64 {
        self.0.losses.count()
    }
}

impl Core {
    fn has_reached(&self, value: u64) -> bool {
        self.value.load(Ordering::Acquire) >= value
    }

    /// To be called after the value has risen, and after the lock was given back. Wakes those whose
    /// number is reached, or leaves that to who has the lock, and will call this.
    fn look_again(&self) {
        loop {
            // Between the note and the try, and between giving the lock back and the look: one of
            // two threads sees what the other did.
            fence(Ordering::SeqCst);
            if !self.risen.load(Ordering::Relaxed) {
                return;
            }
            let mut batch = [const { None }; BATCH];
            {
                let Some(mut waiting) = self.waiting.try_lock() else { return };
                // A swap, as below: either it comes after that, or whoever is at it sees what we
                // have seen.
                if self.waking.swap(true, Ordering::AcqRel) {
                    // Perhaps below us on this stack: those that it has taken come first.
                    drop(waiting);
                    // It may have found the lock taken by us when it looked again.
                    fence(Ordering::SeqCst);
                    if self.waking.load(Ordering::Relaxed) {
                        return;
                    }
                    continue;
                }
                self.risen.swap(false, Ordering::AcqRel);
                // That swap has synchronised with all whose values count.
                let value = self.value.load(Ordering::Relaxed);
                for place in &mut batch {
                    *place = waiting.pop_up_to(value);
                }
                if batch.iter().all(Option::is_some) {
                    self.risen.swap(true, Ordering::AcqRel);
                }
            }
            batch.iter().flatten().for_each(|task| task.rouse());
            self.waking.swap(false, Ordering::AcqRel);
        }
    }
}

impl Waiting {
    fn pop_up_to(&mut self, value: u64) -> Option<Arc<TaskWaker>> {
        let first = self.tasks.first_entry()?;
        (first.key().0 <= value).then(|| first.remove())
    }
}

/// The future of [`Timeline::reached`].
///
/// It keeps the timeline's state, but signals nothing. Polled again after it has resolved, it
/// resolves again: the value does not fall.
///
/// # Cancel safety
/// May be dropped at any moment, and leaves nothing behind.
#[must_use = "nothing is waited for before the future is polled"]
pub struct Reached {
    core: Arc<Core>,
    value: u64,
    /// Its place among those who wait for this value, once it has waited.
    ticket: Option<NonZeroU64>,
    task: Option<Arc<TaskWaker>>,
}

/// A pass holds it in place.
const _: () = assert!(size_of::<Reached>() <= 64 && align_of::<Reached>() <= 8);

impl Reached {
    /// Blocks the thread until the value is reached (W1).
    #[cfg(feature = "std")]
    pub fn wait(self) {
        crate::block::wait(self);
    }

    /// Takes it back from those who wait. Returns what is to be dropped outside of the lock.
    fn leave(&mut self) -> Option<Arc<TaskWaker>> {
        let ticket = self.ticket.take()?;
        let task = {
            let mut waiting = self.core.waiting.lock();
            // Nothing else here is a step to a model checker: another one may try for the lock now.
            spin_hint();
            waiting.tasks.remove(&(self.value, ticket.get()))
        };
        self.core.look_again();
        task
    }
}

impl Future for Reached {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if this.core.has_reached(this.value) {
            drop((this.leave(), this.task.take()));
            return Poll::Ready(());
        }
        // Cloned and dropped outside of the lock. A panic of that leaves all as it was.
        let task = TaskWaker::renew(&mut this.task, cx.waker(), &this.core.losses);
        let (reached, _former) = {
            let mut waiting = this.core.waiting.lock();
            if this.core.has_reached(this.value) {
                (true, None)
            } else {
                let ticket = *this.ticket.get_or_insert_with(|| {
                    waiting.tickets += 1;
                    NonZeroU64::new(waiting.tickets).expect("it is at least one")
                });
                (false, waiting.tasks.insert((this.value, ticket.get()), task))
            }
        };
        this.core.look_again();
        if reached {
            drop((this.leave(), this.task.take()));
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        drop(self.leave());
    }
}

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timeline").field("value", &self.value()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reached = self.core.has_reached(self.value);
        f.debug_struct("Reached")
            .field("value", &self.value)
            .field("reached", &reached)
            .finish_non_exhaustive()
    }
}
