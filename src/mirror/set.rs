//! The collision-retry loop of several ranges at once: `DriverLock::mirror_all` (G).
#![forbid(unsafe_code)]

use super::driver_lock::{DriverLock, MirrorError, RetryBudget, Tries};
use crate::block::Waitable;
use crate::engine::futures::hit::Hit;
use crate::engine::futures::read::ReadBegin;
use crate::notifier::{IntervalNotifier, Sequence};
use crate::subscription::Subscription;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};

/// The result of `prepare` for one range, until it is installed or hit.
struct Prepared<'a, P> {
    sequence: Sequence,
    found: P,
    /// Resolves at the next invalidation of the range. Then `found` is dropped at once, because a
    /// pass of the notifier may wait for that (G2).
    hit: Hit<'a>,
}

/// The ranges of one `mirror_all`, and what is prepared for each. `prepared` has the order of
/// `subscriptions`; `None` is a range that must be prepared.
struct Set<'s, 'a, N: IntervalNotifier, P> {
    subscriptions: &'s [&'a Subscription<N>],
    prepared: Vec<Option<Prepared<'a, P>>>,
}

impl<'a, N: IntervalNotifier, P> Set<'_, 'a, N, P> {
    /// Drops the results whose ranges were hit. Registers the task, so that it is polled at the
    /// next hit.
    fn drop_what_was_hit(&mut self, cx: &mut Context<'_>) {
        for (subscription, prepared) in self.subscriptions.iter().zip(&mut self.prepared) {
            if let Some(hit) = prepared.take_if(|prepared| prepared.hit.poll(cx).is_ready()) {
                drop(hit);
                subscription.shared().collided(subscription.entry());
            }
        }
    }

    /// Begins to read every range that is not prepared. Returns their places and sequences, all of
    /// which are good at the same moment. A range that is hit while another one is waited for
    /// begins again; nothing was prepared for it. Prepared ranges stay good until they are hit
    /// (G2).
    async fn begin(&mut self) -> Vec<(usize, Sequence)> {
        enum Step<'a> {
            Prepared,
            Waits(ReadBegin<'a>),
            Begun(Sequence),
        }
        let mut steps: Vec<Step<'a>> = self.subscriptions.iter().map(|_| Step::Prepared).collect();
        core::future::poll_fn(|cx| {
            loop {
                self.drop_what_was_hit(cx);
                let (mut waits, mut changed) = (false, false);
                for ((subscription, prepared), step) in
                    self.subscriptions.iter().zip(&self.prepared).zip(&mut steps)
                {
                    let own = &subscription.entry().own;
                    let is_good = match step {
                        Step::Prepared => prepared.is_some(),
                        Step::Begun(sequence) => own.is_stable_at(sequence.0) || own.is_closed(),
                        Step::Waits(_) => true,
                    };
                    if !is_good {
                        *step = Step::Waits(subscription.read_begin());
                    }
                    if let Step::Waits(read) = step {
                        match Pin::new(read).poll(cx) {
                            Poll::Ready(sequence) => {
                                (*step, changed) = (Step::Begun(sequence), true)
                            }
                            Poll::Pending => waits = true,
                        }
                    }
                }
                if waits {
                    return Poll::Pending;
                }
                if !changed {
                    return Poll::Ready(());
                }
                // Look again: a range may have been hit meanwhile.
            }
        })
        .await;
        let begun = |(at, step): (usize, Step<'a>)| {
            if let Step::Begun(sequence) = step { Some((at, sequence)) } else { None }
        };
        steps.into_iter().enumerate().filter_map(begun).collect()
    }

    /// Drives the `preparing` futures together. Ends at the first error.
    async fn prepare<E, F: Future<Output = Result<P, E>>>(
        &mut self,
        mut preparing: Vec<(usize, Sequence, Pin<Box<F>>)>,
    ) -> Result<(), E> {
        core::future::poll_fn(|cx| {
            let mut failed = None;
            preparing.retain_mut(|(at, sequence, future)| {
                match (&failed, future.as_mut().poll(cx)) {
                    (None, Poll::Ready(Ok(found))) => {
                        let hit = self.subscriptions[*at].hit(*sequence);
                        self.prepared[*at] = Some(Prepared { sequence: *sequence, found, hit });
                        false
                    }
                    (None, Poll::Ready(Err(error))) => {
                        failed = Some(error);
                        false
                    }
                    _ => true,
                }
            });
            self.drop_what_was_hit(cx);
            match failed {
                Some(error) => Poll::Ready(Err(error)),
                None if preparing.is_empty() => Poll::Ready(Ok(())),
                None => Poll::Pending,
            }
        })
        .await
    }
}

impl<T> DriverLock<T> {
    /// Mirrors several ranges at once: prepares all, checks all, and installs all, or none ([G1]).
    ///
    /// It is the [collision-retry loop](Self::mirror) of a job that needs all ranges at the same
    /// moment.
    ///
    /// - `prepare` is called with the place in `subscriptions`, counted from 0, and the sequence.
    ///   The futures of all ranges are awaited together.
    /// - `install` runs once, in one critical section, with the results in the order of
    ///   `subscriptions`.
    ///
    /// After an invalidation the loop prepares only the ranges again that were hit ([G2]). So
    /// `prepare` is called at most once for each range and once for each collision of a range. The
    /// loop ends as soon as no invalidation hits any range while the ranges that were hit last are
    /// prepared. (A loop for each range in turn, or one that prepares all ranges again, does not
    /// end while invalidations come faster than all ranges can be prepared.)
    ///
    /// The result of `prepare` is dropped at the next invalidation of its range, also while other
    /// ranges are waited for. A pass of its notifier may wait for that (a pin, a registration).
    ///
    /// The first passes of all subscriptions must take this lock. The subscriptions may belong to
    /// several spaces. Without any subscription `install` runs at once.
    ///
    /// ```
    /// # use shootdown::*;
    /// # #[derive(Clone, Default)]
    /// # struct Gpu { page_table: std::sync::Arc<DriverLock<Vec<u64>>> }
    /// # impl IntervalNotifier for Gpu {
    /// #     fn invalidate(&self, i: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
    /// #         self.page_table.lock_for(i).clear();
    /// #         Ok(None)
    /// #     }
    /// # }
    /// # async fn fault_in(address: u64) -> Result<u64, std::io::Error> { Ok(address) }
    /// # futures::executor::block_on(async {
    /// # let (space, gpu) = (AddressSpace::new(), Gpu::default());
    /// # let range = |number: u64| AddressRange::new(number * 0x1000, 0x1000);
    /// # let (first, second) = (gpu.clone(), gpu.clone());
    /// # let buffers = [space.insert(range(1)?, first)?, space.insert(range(7)?, second)?];
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
    /// - [`MirrorError::Prepare`] with the first error of `prepare`. It ends the other ranges'
    ///   futures ([G3]).
    /// - [`MirrorError::RetriesExhausted`] when the budget is used up. A retry is one round,
    ///   whatever the number of ranges.
    /// - [`MirrorError::Closed`] when one of the subscriptions was closed.
    ///
    /// # Panics
    /// Panics for the same misuses as [`install`](Self::install).
    ///
    /// # Cancel safety
    /// May be dropped at any moment. Nothing is installed unless it has resolved.
    ///
    /// [G1]: crate::docs::contract#g-several-ranges-mirrored-at-once
    /// [G2]: crate::docs::contract#g-several-ranges-mirrored-at-once
    /// [G3]: crate::docs::contract#g-several-ranges-mirrored-at-once
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
        let mut set = Set { subscriptions, prepared: subscriptions.iter().map(|_| None).collect() };
        let now = || subscriptions.first().and_then(|first| first.shared().now());
        let mut tries = Tries::begin(budget, now);
        loop {
            let begun = set.begin().await;
            let preparing = begun
                .into_iter()
                .map(|(at, sequence)| (at, sequence, Box::pin(prepare(at, sequence))))
                .collect();
            set.prepare(preparing).await.map_err(MirrorError::Prepare)?;
            let mut stale = Vec::new();
            {
                let mut guard = self.lock();
                for (subscription, prepared) in subscriptions.iter().zip(&mut set.prepared) {
                    self.assert_locked_by_first_pass_of(subscription);
                    let collides =
                        |prepared: &mut Prepared<'_, P>| subscription.read_retry(prepared.sequence);
                    stale.extend(prepared.take_if(collides));
                }
                if set.prepared.iter().all(Option::is_some) {
                    let prepared = core::mem::take(&mut set.prepared);
                    return Ok(install(
                        &mut guard,
                        prepared.into_iter().flatten().map(|prepared| prepared.found).collect(),
                    ));
                }
            }
            // Outside of the lock: the drop of a result is driver code and may take it.
            drop(stale);
            if subscriptions.iter().any(|subscription| subscription.is_closed()) {
                return Err(MirrorError::Closed);
            }
            tries.again(now)?;
            for (subscription, _) in
                subscriptions.iter().zip(&set.prepared).filter(|(_, prepared)| prepared.is_none())
            {
                subscription.shared().retried(subscription.entry());
            }
        }
    }
}
