//! Mirroring several ranges at once (G).
#![forbid(unsafe_code)]

use super::driver_lock::{DriverLock, MirrorError, RetryBudget};
use crate::block::Waitable;
use crate::notifier::{IntervalNotifier, Sequence};
use crate::subscription::Subscription;
use alloc::vec::Vec;
use core::future::Future;
use futures::future::try_join_all;

/// What was prepared for one of the ranges, and with which sequence.
type Prepared<P> = Option<(Sequence, P)>;

impl<T> DriverLock<T> {
    /// The [collision-retry loop](Self::mirror) of several ranges: all are prepared, all are checked,
    /// all are installed under one lock, or none (G1). For jobs that need all of them at once.
    ///
    /// `prepare` is called with the place in `subscriptions`, counted from 0, and the sequence; what it
    /// returns is awaited together for all ranges. `install` gets what was prepared in the order of
    /// `subscriptions`, once. An invalidation makes the loop prepare those ranges again that it has
    /// hit, and no others (G2). So there are no more calls of `prepare` than ranges and
    /// collisions of single ranges together, and the loop ends as soon as no invalidation hits any of
    /// them while those that were hit last are prepared. A loop for each range in turn, or one that prepares all of them
    /// again, does not end while invalidations come faster than all of the ranges can be prepared.
    ///
    /// The first passes of all subscriptions have to take this lock. They may belong to several
    /// spaces. With none `install` runs at once.
    ///
    /// ```
    /// # use shootdown::*;
    /// # #[derive(Clone, Default)]
    /// # struct Gpu { page_table: std::sync::Arc<DriverLock<Vec<u64>>> }
    /// # impl IntervalNotifier for Gpu {
    /// #     fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
    /// #         self.page_table.lock_for(invalidation).clear();
    /// #         Ok(None)
    /// #     }
    /// # }
    /// # async fn fault_in(address: u64) -> Result<u64, std::io::Error> { Ok(address) }
    /// # futures::executor::block_on(async {
    /// # let (space, gpu) = (AddressSpace::new(), Gpu::default());
    /// # let range = |number: u64| AddressRange::new(number * 0x1000, 0x1000);
    /// # let buffers = [space.insert(range(1)?, gpu.clone())?, space.insert(range(7)?, gpu.clone())?];
    /// gpu.page_table
    ///     .mirror_all(
    ///         &buffers.each_ref(),
    ///         RetryBudget::default(),
    ///         |at, _sequence| fault_in(buffers[at].range().start()),
    ///         |page_table, pages| page_table.extend(pages),
    ///     )
    ///     .await?;
    /// assert_eq!(*gpu.page_table.lock(), [0x1000, 0x7000]);
    /// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`MirrorError::Prepare`] with the first error of `prepare`, which ends those of the other ranges; [`MirrorError::RetriesExhausted`]
    /// when the budget is used up (a retry is a round, of however many ranges); [`MirrorError::Closed`]
    /// when one of the subscriptions was closed.
    ///
    /// # Panics
    /// As [`install`](Self::install).
    ///
    /// # Cancel safety
    /// May be dropped at any moment: nothing is installed then unless it has resolved.
    pub fn mirror_all<N, P, E, F, R>(
        &self,
        subscriptions: &[&Subscription<N>],
        budget: RetryBudget,
        prepare: impl FnMut(usize, Sequence) -> F,
        install: impl FnOnce(&mut T, Vec<P>) -> R,
    ) -> Waitable<impl Future<Output = Result<R, MirrorError<E>>>>
    where
        N: IntervalNotifier,
        F: Future<Output = Result<P, E>>,
    {
        Waitable::new(self.mirror_set(subscriptions, budget, prepare, install))
    }

    async fn mirror_set<N, P, E, F, R>(
        &self,
        subscriptions: &[&Subscription<N>],
        budget: RetryBudget,
        mut prepare: impl FnMut(usize, Sequence) -> F,
        install: impl FnOnce(&mut T, Vec<P>) -> R,
    ) -> Result<R, MirrorError<E>>
    where
        N: IntervalNotifier,
        F: Future<Output = Result<P, E>>,
    {
        let mut prepared: Vec<Prepared<P>> = subscriptions.iter().map(|_| None).collect();
        let now = || subscriptions.first().and_then(|first| first.shared().now());
        // The clock is asked only when there is a bound on the time and a collision.
        let began = budget.time.and_then(|_| now());
        let mut retries = 0;
        loop {
            // Only those that are missing: the others are as good as they were (G2).
            let missing: Vec<usize> = (0..prepared.len()).filter(|at| prepared[*at].is_none()).collect();
            let sequences = futures::future::join_all(missing.iter().map(|at| subscriptions[*at].read_begin())).await;
            let preparing: Vec<F> = missing.iter().zip(&sequences).map(|(at, sequence)| prepare(*at, *sequence)).collect();
            let found = try_join_all(preparing).await.map_err(MirrorError::Prepare)?;
            for ((at, sequence), found) in missing.into_iter().zip(sequences).zip(found) {
                prepared[at] = Some((sequence, found));
            }
            let mut stale = Vec::new();
            {
                let mut guard = self.lock();
                for (subscription, prepared) in subscriptions.iter().zip(&mut prepared) {
                    self.assert_locked_by_first_pass_of(subscription);
                    let collides = |(sequence, _): &mut (Sequence, P)| subscription.read_retry(*sequence);
                    stale.extend(prepared.take_if(collides));
                }
                if stale.is_empty() {
                    return Ok(install(&mut guard, prepared.into_iter().flatten().map(|(_, found)| found).collect()));
                }
            }
            // What the driver has prepared may have a drop of its own, which may want the lock.
            drop(stale);
            if subscriptions.iter().any(|subscription| subscription.is_closed()) {
                return Err(MirrorError::Closed);
            }
            let elapsed = began.and_then(|began| Some(now()?.saturating_sub(began)));
            let too_late = matches!((budget.time, elapsed), (Some(most), Some(elapsed)) if elapsed > most);
            if retries == budget.retries || too_late {
                return Err(MirrorError::RetriesExhausted { retries, elapsed });
            }
            for (subscription, _) in subscriptions.iter().zip(&prepared).filter(|(_, prepared)| prepared.is_none()) {
                subscription.shared().retried(subscription.entry());
            }
            retries += 1;
        }
    }
}
