//! Mirroring several ranges at once (G).
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

/// What was prepared for one of the ranges.
struct Prepared<'a, P> {
    sequence: Sequence,
    found: P,
    /// A pass of its notifier may wait for what was found, so it goes at the next invalidation,
    /// whatever else is waited for meanwhile.
    hit: Hit<'a>,
}

/// A set in the making.
struct Set<'s, 'a, N: IntervalNotifier, P> {
    subscriptions: &'s [&'a Subscription<N>],
    prepared: Vec<Option<Prepared<'a, P>>>,
}

impl<'a, N: IntervalNotifier, P> Set<'_, 'a, N, P> {
    /// Drops what was hit. With the task's waker, so that it is polled when more is.
    fn drop_what_was_hit(&mut self, cx: &mut Context<'_>) {
        for (subscription, prepared) in self.subscriptions.iter().zip(&mut self.prepared) {
            if let Some(hit) = prepared.take_if(|prepared| prepared.hit.poll(cx).is_ready()) {
                drop(hit);
                subscription.shared().collided(subscription.entry());
            }
        }
    }

    /// `read_begin` of those for which nothing is prepared, until all of them have a sequence that
    /// is good: who was hit while another one was waited for has prepared nothing that could be
    /// stale. Those that are prepared are as good as they were (G2).
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
                // Once more: none of them may have been hit meanwhile.
            }
        })
        .await;
        let begun = |(at, step): (usize, Step<'a>)| {
            if let Step::Begun(sequence) = step { Some((at, sequence)) } else { None }
        };
        steps.into_iter().enumerate().filter_map(begun).collect()
    }

    /// Prepares those that have begun, together.
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
    /// The [collision-retry loop](Self::mirror) of several ranges: all are prepared, all are
    /// checked, all are installed under one lock, or none (G1). For jobs that need all of them at
    /// once.
    ///
    /// `prepare` is called with the place in `subscriptions`, counted from 0, and the sequence;
    /// what it returns is awaited together for all ranges. `install` gets what was prepared in the
    /// order of `subscriptions`, once. An invalidation makes the loop prepare those ranges again
    /// that it has hit, and no others (G2). So there are no more calls of `prepare` than ranges and
    /// collisions of single ranges together, and the loop ends as soon as no invalidation hits any
    /// of them while those that were hit last are prepared. A loop for each range in turn, or one
    /// that prepares all of them again, does not end while invalidations come faster than all of
    /// the ranges can be prepared.
    ///
    /// What was prepared for a range is dropped at its next invalidation, also while others are
    /// waited for: a pass of its notifier may wait for that (a pin, a registration).
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
    /// [`MirrorError::Prepare`] with the first error of `prepare`, which ends those of the other
    /// ranges; [`MirrorError::RetriesExhausted`] when the budget is used up (a retry is a round, of
    /// however many ranges); [`MirrorError::Closed`] when one of the subscriptions was closed.
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
            // What the driver has prepared may have a drop of its own, which may want the lock.
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
