//! [`Timeline`]: a fence, which is a number that rises, and futures that wait until it reaches a
//! value.
//!
//! [`Timeline::signal`] must not wait, so it only tries to take the lock. Each holder of the lock
//! looks again after releasing it. So either `signal` gets the lock, or the holder sees the note
//! (`risen`) that `signal` made before it tried. One thread at a time calls wakers (`waking`). It
//! looks again after that in the same way.
#![forbid(unsafe_code)]

use crate::foreign::{Losses, TaskWaker};
use crate::sync::{Arc, AtomicBool, AtomicU64, Lock, Ordering, fence, spin_hint};
use alloc::collections::BTreeMap;
use core::fmt;
use core::future::Future;
use core::num::NonZeroU64;
use core::pin::Pin;
use core::task::{Context, Poll};

/// Counts the finished work of a device's queue, for tasks and threads that wait for it: a fence,
/// as `dma_fence` with its sequence numbers, or a timeline semaphore of Vulkan.
///
/// A driver numbers the work that it submits. When work is done, the device's interrupt handler or
/// poller [signals](Self::signal) its number. A [`PassFuture`](crate::PassFuture) waits for the
/// number with the future of [`reached`](Self::reached). Clones are handles of the same timeline.
/// The guide has more: `docs::fences`.
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
/// Numbers start at 0 and never wrap. At one signal each nanosecond they last for 584 years. If a
/// device counts in 32 bits, its driver adds the upper bits.
///
/// # Numbers that are never signalled
/// A future waits for ever for a number that is never signalled, as with a `dma_fence`. It does not
/// resolve when the last handle is dropped, because that would say that the device is done. A pass
/// that hangs is listed in [`AddressSpace::active`](crate::AddressSpace::active) with the name of
/// its notifier.
///
/// After a reset a device accesses no memory any more. Its driver then signals the last number that
/// it has given out, or [`u64::MAX`], after which every number is reached. The device goes on with
/// a new timeline. A waiting future keeps the state of the timeline alive and needs no handle.
#[derive(Clone, Default)]
pub struct Timeline(Arc<Core>);

struct Core {
    /// The greatest number that was signalled. It only rises. Everything before a signal happens
    /// before a load that returns its number.
    value: AtomicU64,
    /// The value has risen since a thread last looked for futures to wake.
    risen: AtomicBool,
    /// A thread calls wakers, and looks again afterwards. Set under the lock.
    waking: AtomicBool,
    waiting: Lock<Waiting>,
    losses: Arc<Losses>,
}

/// The tasks that wait.
#[derive(Default)]
struct Waiting {
    /// By the number that a task waits for, then by its ticket.
    tasks: BTreeMap<(u64, u64), Arc<TaskWaker>>,
    /// The last ticket that was given out. Tickets rise, so tasks that wait for one number are
    /// woken in the order in which they came.
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

/// Number of tasks that are woken after one acquisition of the lock.
const BATCH: usize = if cfg!(any(loom, shuttle)) { 1 } else { 16 };

impl Timeline {
    /// Makes a timeline whose value is 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the greatest number that was signalled. Everything that happened before that signal
    /// is visible to the caller.
    pub fn value(&self) -> u64 {
        self.0.value.load(Ordering::Acquire)
    }

    /// Raises the value to `value`, and wakes the tasks and threads that wait for this number or a
    /// lower one. It looks at no others. A number that is not above the value has no effect.
    ///
    /// Any thread may call it, also where it must not wait: it never waits for the lock of the
    /// timeline, and allocates nothing. It calls the wakers, unless another thread is calling
    /// wakers of this timeline, or a caller further up this stack is. In that case that thread or
    /// caller calls them. A waker may do anything, including another signal (rule
    /// [C8](crate::docs::contract)). `signal` also frees memory. Code that must not do that, such
    /// as a POSIX signal handler, lets a thread signal for it.
    ///
    /// # Panics
    /// Never because of a waker. A panic of a waker is [counted](Self::lost_panics), and the other
    /// wakers are called. Without `std` a panic cannot be caught.
    pub fn signal(&self, value: u64) {
        if self.0.value.fetch_max(value, Ordering::AcqRel) < value {
            // A read-modify-write, as at the other places, so that the thread that clears `risen`
            // sees the values of all threads that have set it.
            self.0.risen.swap(true, Ordering::AcqRel);
            self.0.look_again();
        }
    }

    /// Waits until the value is at least `value`.
    ///
    /// The future fits into a [`PassFuture`](crate::PassFuture) without an allocation.
    pub fn reached(&self, value: u64) -> Reached {
        Reached { core: self.0.clone(), value, ticket: None, task: None }
    }

    /// Returns how many wakers have panicked when they were called or dropped.
    ///
    /// A timeline belongs to no space that could count them, and the caller of
    /// [`signal`](Self::signal) is not responsible for them.
    pub fn lost_panics(&self) -> u64 {
        self.0.losses.count()
    }
}

impl Core {
    /// Returns whether the value is at least `value`.
    fn has_reached(&self, value: u64) -> bool {
        self.value.load(Ordering::Acquire) >= value
    }

    /// Wakes the tasks whose number is reached. If another thread has the lock, it leaves this to
    /// that thread, which calls this function after releasing the lock.
    ///
    /// Call it after the value has risen, and after each release of the lock.
    fn look_again(&self) {
        loop {
            // A full fence between setting `risen` and trying the lock, and between releasing the
            // lock and loading `risen`. So at least one of two threads sees what the other did.
            fence(Ordering::SeqCst);
            if !self.risen.load(Ordering::Relaxed) {
                return;
            }
            let mut batch = [const { None }; BATCH];
            {
                let Some(mut waiting) = self.waiting.try_lock() else { return };
                // A read-modify-write, as below. Either it comes after the one below, or the thread
                // that calls wakers sees the value that this thread has seen.
                if self.waking.swap(true, Ordering::AcqRel) {
                    // The wakers are being called, perhaps by a caller further up this stack. Its
                    // batch comes first.
                    drop(waiting);
                    // That thread may have looked again while this one had the lock.
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
    /// Removes the first task that waits for at most `value`.
    fn pop_up_to(&mut self, value: u64) -> Option<Arc<TaskWaker>> {
        let first = self.tasks.first_entry()?;
        (first.key().0 <= value).then(|| first.remove())
    }
}

/// Waits until a timeline has reached a value: the future of [`Timeline::reached`].
///
/// It keeps the timeline's state alive, but does not signal. A poll after it has resolved resolves
/// again, because the value never falls.
///
/// # Cancel safety
/// The future may be dropped at any moment. It leaves nothing behind.
#[must_use = "nothing is waited for before the future is polled"]
pub struct Reached {
    core: Arc<Core>,
    value: u64,
    /// The ticket of this future, after it has been pending. Its key in [`Waiting::tasks`] is the
    /// value and this ticket.
    ticket: Option<NonZeroU64>,
    task: Option<Arc<TaskWaker>>,
}

/// A `PassFuture` stores it without an allocation.
const _: () = assert!(size_of::<Reached>() <= 64 && align_of::<Reached>() <= 8);

impl Reached {
    /// Blocks the thread until the value is reached (rule [W1](crate::docs::contract)).
    #[cfg(feature = "std")]
    pub fn wait(self) {
        crate::block::wait(self);
    }

    /// Removes the task of this future from the waiting ones, and returns it, to be dropped without
    /// the lock.
    fn leave(&mut self) -> Option<Arc<TaskWaker>> {
        let ticket = self.ticket.take()?;
        let task = {
            let mut waiting = self.core.waiting.lock();
            // A model checker switches threads only at steps like this one, so that another thread
            // may try the lock now.
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
        // The waker is cloned and dropped without the lock. If that panics, nothing has changed.
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
