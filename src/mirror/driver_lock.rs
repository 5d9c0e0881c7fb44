//! The lock under which a driver's first pass zaps its mappings and its readers install them.

use super::raw_lock::{RawGuard, RawLock};
use crate::block::Waitable;
use crate::notifier::{IntervalNotifier, Invalidation, Sequence};
use crate::subscription::Subscription;
use core::fmt;
use core::future::Future;
use core::ops::{Deref, DerefMut};
use core::time::Duration;

/// Protects the driver's device mappings `T`: the kernel's `user_lock`, with its rules built in.
///
/// - A first pass calls [`lock_for`](Self::lock_for), which locks *and* sets the sequence.
/// - A reader calls [`mirror`](Self::mirror) or [`mirror_all`](Self::mirror_all). Their last step,
///   [`install`](Self::install), locks, checks `read_retry`, and refuses a stale mapping.
///
/// One lock may serve several subscriptions, such as all mirrored ranges of one GPU. A driver with
/// a lock of its own calls [`Invalidation::set_seq`] and [`Subscription::read_retry`] under it
/// instead. The guide's page [`retry_loop`](crate::docs::retry_loop) explains both.
///
/// It blocks the thread, so hold it for short. With `std` a waiting thread spins for some
/// microseconds and then sleeps; without `std` it spins. A panic of the holder does not poison the
/// lock. A thread that waits for a lock that it holds itself panics (with `std`).
#[derive(Default)]
pub struct DriverLock<T> {
    raw: RawLock<T>,
}

/// Gives access to the mappings of a [`DriverLock`] until it is dropped.
///
/// Do not hold it across an await. With `std` it is not `Send`.
#[must_use = "dropping the guard unlocks at once"]
pub struct DriverGuard<'a, T> {
    guard: RawGuard<'a, T>,
}

/// Tells that a mapping was not installed, because it would be stale
/// ([R2](crate::docs::contract#r-readers)).
///
/// The notifier was invalidated since `read_begin`, or its subscription was closed. Start over with
/// `read_begin`, unless the subscription [was closed](Subscription::is_closed).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Collision;

impl fmt::Display for Collision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the range was invalidated since read_begin: start over with read_begin (or stop, if `is_closed` says so)")
    }
}

impl core::error::Error for Collision {}

/// Bounds how often and how long [`DriverLock::mirror`] starts over after collisions.
///
/// It is checked only after a collision, so a running step is never interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryBudget {
    /// The greatest number of retries.
    pub retries: u32,
    /// The longest time from the first `read_begin` to a retry. It is no bound without a clock
    /// (`std` or [`Builder::clock`](crate::Builder::clock)).
    pub time: Option<Duration>,
}

impl RetryBudget {
    /// Bounds the number of retries only.
    pub const fn retries(retries: u32) -> Self {
        Self { retries, time: None }
    }
}

impl Default for RetryBudget {
    /// Allows 1,000 retries within one second, the kernel's `HMM_RANGE_DEFAULT_TIMEOUT`.
    fn default() -> Self {
        Self { retries: 1000, time: Some(Duration::from_secs(1)) }
    }
}

/// Counts how much of a [`RetryBudget`] is used up.
pub(super) struct Tries {
    budget: RetryBudget,
    retries: u32,
    began: Option<Duration>,
}

impl Tries {
    /// Begins to count. Reads the clock only if the budget bounds the time.
    pub(super) fn begin(budget: RetryBudget, now: impl FnOnce() -> Option<Duration>) -> Self {
        Self { budget, retries: 0, began: budget.time.and_then(|_| now()) }
    }

    /// Counts a retry, or returns the error if the budget is used up.
    pub(super) fn again<E>(
        &mut self,
        now: impl FnOnce() -> Option<Duration>,
    ) -> Result<(), MirrorError<E>> {
        let elapsed = self.began.and_then(|began| Some(now()?.saturating_sub(began)));
        let too_late =
            matches!((self.budget.time, elapsed), (Some(most), Some(elapsed)) if elapsed > most);
        if self.retries == self.budget.retries || too_late {
            return Err(MirrorError::RetriesExhausted { retries: self.retries, elapsed });
        }
        self.retries += 1;
        Ok(())
    }
}

/// Tells why [`DriverLock::mirror`] or [`DriverLock::mirror_all`] gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MirrorError<E> {
    /// Every attempt collided with an invalidation until the [`RetryBudget`] was used up.
    RetriesExhausted {
        /// The number of retries.
        retries: u32,
        /// The time since it began. `None` without a clock or without a bound on the time.
        elapsed: Option<Duration>,
    },
    /// The subscription was closed. No mapping can be installed for it any more.
    Closed,
    /// `prepare` failed with this error.
    Prepare(E),
}

impl<E: fmt::Display> fmt::Display for MirrorError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RetriesExhausted { retries, elapsed } => {
                write!(
                    f,
                    "the range was invalidated during each of {} attempts to mirror it",
                    retries + 1
                )?;
                if let Some(elapsed) = elapsed {
                    write!(f, " in {elapsed:?}")?;
                }
                f.write_str(": mirror a smaller range, or allow more retries")
            }
            Self::Closed => f.write_str(
                "the subscription or the inbox was closed: make a new one to mirror memory",
            ),
            Self::Prepare(error) => write!(f, "the mapping could not be prepared: {error}"),
        }
    }
}

impl<E: core::error::Error + 'static> core::error::Error for MirrorError<E> {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            // The text of `error` is a part of this text, so the chain goes on behind it.
            Self::Prepare(error) => error.source(),
            Self::Closed | Self::RetriesExhausted { .. } => None,
        }
    }
}

impl<T> DriverLock<T> {
    /// Makes a lock around the driver's mappings.
    #[cfg(not(any(loom, shuttle)))]
    pub const fn new(mappings: T) -> Self {
        Self { raw: RawLock::new(mappings) }
    }

    #[cfg(any(loom, shuttle))]
    #[allow(missing_docs, reason = "as above; the types of model checkers have no `const fn new`")]
    pub fn new(mappings: T) -> Self {
        Self { raw: RawLock::new(mappings) }
    }

    /// Returns the mappings.
    pub fn into_inner(self) -> T {
        self.raw.into_inner()
    }

    /// Locks the mappings, to look at them or to remove some.
    ///
    /// To install a mapping, use [`install`](Self::install). In a first pass, use
    /// [`lock_for`](Self::lock_for).
    ///
    /// # Panics
    /// Panics if this thread holds the lock already (with `std`). Without `std` it spins for ever.
    #[inline]
    pub fn lock(&self) -> DriverGuard<'_, T> {
        match self.raw.lock() {
            Some(guard) => DriverGuard { guard },
            None => held_already(),
        }
    }

    /// Returns whether this thread holds the lock. Always `false` without `std`.
    #[inline]
    pub(crate) fn is_held_here(&self) -> bool {
        self.raw.is_held_here()
    }

    /// Locks in a first pass, and sets the notifier's own sequence.
    ///
    /// Readers that began before then collide ([R2](crate::docs::contract#r-readers)). Zap the
    /// mappings while you hold the guard.
    ///
    /// # Panics
    /// Panics if this thread holds the lock already (with `std`).
    #[inline]
    pub fn lock_for(&self, invalidation: &Invalidation<'_>) -> DriverGuard<'_, T> {
        let guard = self.lock();
        invalidation.own.note_driver_lock(self.address());
        invalidation.set_seq();
        guard
    }

    /// Locks, checks the sequence, and runs `install`, in one critical section.
    ///
    /// The check is that the notifier was not invalidated since `read_begin` returned `sequence`
    /// ([R2](crate::docs::contract#r-readers)).
    ///
    /// # Errors
    /// Returns [`Collision`] if it was. Then `install` does not run.
    ///
    /// # Panics
    /// Panics if this thread holds the lock already (with `std`). In debug builds, panics if the
    /// notifier's first pass takes another [`DriverLock`] with [`lock_for`](Self::lock_for) and not
    /// this one, because such a check could miss an invalidation. (The lock is not known before the
    /// first invalidation. A first pass that takes several locks is not checked.)
    pub fn install<N: IntervalNotifier, R>(
        &self,
        subscription: &Subscription<N>,
        sequence: Sequence,
        install: impl FnOnce(&mut T) -> R,
    ) -> Result<R, Collision> {
        self.install_if(subscription, sequence, |_| true, install)
    }

    /// Installs as [`install`](Self::install) does, if `open` also allows it under the lock.
    pub(crate) fn install_if<N: IntervalNotifier, R>(
        &self,
        subscription: &Subscription<N>,
        sequence: Sequence,
        open: impl FnOnce(&T) -> bool,
        install: impl FnOnce(&mut T) -> R,
    ) -> Result<R, Collision> {
        let mut guard = self.lock();
        self.assert_locked_by_first_pass_of(subscription);
        if subscription.read_retry(sequence) || !open(&guard) {
            Err(Collision)
        } else {
            Ok(install(&mut guard))
        }
    }

    /// Mirrors memory: the whole collision-retry loop of a driver.
    ///
    /// 1. It awaits [`read_begin`](Subscription::read_begin).
    /// 2. It awaits `prepare`, which looks at the memory and may wait for it.
    /// 3. It locks, checks the sequence, and runs `install`. After a collision it starts over.
    ///
    /// `prepare` runs on each try. `install` runs at most once, with the result of `prepare`. Put
    /// work that can fail into `prepare`. A `prepare` that cannot fail resolves to
    /// `Ok::<_, Infallible>(…)`. For several ranges see [`mirror_all`](Self::mirror_all).
    ///
    /// ```
    /// # use shootdown::*;
    /// # #[derive(Default)]
    /// # struct Gpu { page_table: DriverLock<Vec<u64>> }
    /// # impl IntervalNotifier for Gpu {
    /// #     fn invalidate(&self, i: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
    /// #         self.page_table.lock_for(i).clear();
    /// #         Ok(None)
    /// #     }
    /// # }
    /// # async fn fault_in(address: u64) -> Result<u64, std::io::Error> { Ok(address) }
    /// # futures::executor::block_on(async {
    /// # let gpu = AddressSpace::new().insert(AddressRange::new(0x1000, 0x1000)?, Gpu::default())?;
    /// gpu.page_table
    ///     .mirror(
    ///         &gpu,
    ///         RetryBudget::default(),
    ///         |_sequence| fault_in(0x1000),
    ///         |page_table, page| page_table.push(page),
    ///     )
    ///     .await?;
    /// assert_eq!(*gpu.page_table.lock(), [0x1000]);
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// - [`MirrorError::Prepare`] with the first error of `prepare`.
    /// - [`MirrorError::RetriesExhausted`] when the budget is used up.
    /// - [`MirrorError::Closed`] when the subscription was closed.
    ///
    /// # Panics
    /// Panics for the same misuses as [`install`](Self::install).
    ///
    /// # Cancel safety
    /// May be dropped at any moment. Nothing is installed unless it has resolved.
    pub fn mirror<N, P, E, F, R>(
        &self,
        subscription: &Subscription<N>,
        budget: RetryBudget,
        prepare: impl FnMut(Sequence) -> F,
        install: impl FnOnce(&mut T, P) -> R,
    ) -> Waitable<impl Future<Output = Result<R, MirrorError<E>>>>
    where
        N: IntervalNotifier,
        F: Future<Output = Result<P, E>>,
    {
        Waitable::new(self.mirror_if(subscription, budget, |_| true, prepare, install))
    }

    /// Mirrors as [`mirror`](Self::mirror) does, as long as `open` allows it under the lock.
    pub(crate) async fn mirror_if<N, P, E, F, R>(
        &self,
        subscription: &Subscription<N>,
        budget: RetryBudget,
        open: impl Fn(&T) -> bool,
        mut prepare: impl FnMut(Sequence) -> F,
        install: impl FnOnce(&mut T, P) -> R,
    ) -> Result<R, MirrorError<E>>
    where
        N: IntervalNotifier,
        F: Future<Output = Result<P, E>>,
    {
        let space = subscription.shared();
        let mut tries = Tries::begin(budget, || space.now());
        let mut install = Some(install);
        loop {
            let sequence = subscription.read_begin().await;
            let prepared = prepare(sequence).await.map_err(MirrorError::Prepare)?;
            let once = |mappings: &mut T| {
                let Some(install) = install.take() else {
                    unreachable!("the loop ends when it has run")
                };
                install(mappings, prepared)
            };
            if let Ok(installed) = self.install_if(subscription, sequence, &open, once) {
                return Ok(installed);
            }
            if subscription.is_closed() || !open(&self.lock()) {
                return Err(MirrorError::Closed);
            }
            tries.again(|| space.now())?;
            space.retried(subscription.entry());
        }
    }

    /// Panics in debug builds if the first pass is known to take another lock.
    pub(super) fn assert_locked_by_first_pass_of<N: IntervalNotifier>(
        &self,
        subscription: &Subscription<N>,
    ) {
        assert!(
            subscription.entry().own.is_driver_lock(self.address()),
            "mapping installed for {} under another lock than its first pass takes with `lock_for`: take this one there, or install under that one",
            subscription.notifier_name()
        );
    }

    /// Returns the address, which identifies this lock.
    fn address(&self) -> usize {
        core::ptr::from_ref(self).addr()
    }
}

#[cold]
fn held_already() -> ! {
    panic!(
        "this thread holds this driver lock already: drop the guard, or leave the closure, before \
         it is locked again, also by a first pass that is called from here"
    )
}

impl<T> Deref for DriverGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for DriverGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<T: fmt::Debug> fmt::Debug for DriverGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl<T> fmt::Debug for DriverLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverLock").finish_non_exhaustive()
    }
}
