//! The collision-retry loop of a driver whose memory is watched.
#![forbid(unsafe_code)]

use super::{Uffd, UffdError, Watch};
use crate::block::Waitable;
use crate::fork::LeftToParent;
use crate::mirror::driver_lock::{DriverLock, MirrorError, RetryBudget};
use crate::notifier::{IntervalNotifier, Sequence};
use crate::range::AddressRange;
use crate::subscription::Subscription;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, ready};

/// Error of a preparation under a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unwatched<E> {
    /// The memory cannot be watched.
    Watch(UffdError),
    /// `prepare` failed with this error.
    Prepare(E),
}

impl<E: fmt::Display> fmt::Display for Unwatched<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Watch(error) => fmt::Display::fmt(error, f),
            Self::Prepare(error) => fmt::Display::fmt(error, f),
        }
    }
}

impl<E: core::error::Error + 'static> core::error::Error for Unwatched<E> {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            // `Display` prints the inner error, so its source is this one's source.
            Self::Watch(error) => error.source(),
            Self::Prepare(error) => error.source(),
        }
    }
}

impl Uffd {
    /// Runs the whole collision-retry loop of a driver that mirrors watched memory (M1).
    ///
    /// The order is: `read_begin`; a new watch of `range`; `prepare`, which looks at the memory;
    /// then lock, check and `install`, or all of it again. `install` gets the watch, to keep it
    /// with what it installs and to drop it at the same time.
    ///
    /// This is [`DriverLock::mirror`] with the one order that misses no change: if memory is mapped
    /// over after the watch was made, the check fails; if it was mapped over before, the new memory
    /// is watched.
    ///
    /// ```no_run
    /// # use shootdown::*;
    /// # use shootdown::source::{Uffd, Watch};
    /// # #[derive(Default)]
    /// # struct Gpu { pages: DriverLock<Option<(u64, Watch)>> }
    /// # impl IntervalNotifier for Gpu {
    /// #     fn invalidate(
    /// #         &self,
    /// #         invalidation: &Invalidation<'_>,
    /// #     ) -> Result<Option<PassFuture>, WouldBlock> {
    /// #         *self.pages.lock_for(invalidation) = None;
    /// #         Ok(None)
    /// #     }
    /// # }
    /// # async fn pin(range: AddressRange) -> Result<u64, std::io::Error> {
    /// #     Ok(range.start())
    /// # }
    /// # async fn example(
    /// #     uffd: Uffd,
    /// #     buffer: AddressRange,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// let gpu = uffd.space().insert(buffer, Gpu::default())?;
    /// uffd.mirror(
    ///     &gpu,
    ///     &gpu.pages,
    ///     buffer,
    ///     RetryBudget::default(),
    ///     |_sequence| pin(buffer),
    ///     |pages, pinned, watch| *pages = Some((pinned, watch)),
    /// )
    /// .await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`MirrorError::Prepare`] with [`Unwatched`]; [`MirrorError::RetriesExhausted`];
    /// [`MirrorError::Closed`].
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. Unless it has resolved, nothing is installed and
    /// nothing stays watched.
    pub fn mirror<N, T, P, E, F, R>(
        &self,
        subscription: &Subscription<N>,
        lock: &DriverLock<T>,
        range: AddressRange,
        budget: RetryBudget,
        prepare: impl FnMut(Sequence) -> F,
        install: impl FnOnce(&mut T, P, Watch) -> R,
    ) -> Waitable<impl Future<Output = Result<R, MirrorError<Unwatched<E>>>>>
    where
        N: IntervalNotifier,
        F: Future<Output = Result<P, E>>,
    {
        let prepare = self.prepare_watched(range, prepare);
        Waitable::new(async move {
            let install = |mappings: &mut T, (prepared, watch)| install(mappings, prepared, watch);
            let forked = || Err(MirrorError::Prepare(Unwatched::Watch(UffdError::Forked)));
            LeftToParent::new(
                lock.mirror(subscription, budget, prepare, install),
                || self.is_forked(),
                forked,
            )
            .await
        })
    }

    /// Returns a `prepare` for [`DriverLock::mirror`] or [`Inbox::mirror`](crate::Inbox::mirror)
    /// that first watches `range`, on each try (M1). It resolves to the result of `prepare` and the
    /// watch.
    pub fn prepare_watched<P, E, F>(
        &self,
        range: AddressRange,
        mut prepare: impl FnMut(Sequence) -> F,
    ) -> impl FnMut(Sequence) -> Watching<F>
    where
        F: Future<Output = Result<P, E>>,
    {
        move |sequence| {
            // Watches before `prepare` is called, because `prepare` may look at the memory at once.
            Watching(match self.watch(range) {
                Ok(watch) => Step::Preparing { watch: Some(watch), prepare: prepare(sequence) },
                Err(error) => Step::Refused(Some(error)),
            })
        }
    }
}

/// Future of a `prepare` under a watch. [`Uffd::prepare_watched`] makes it.
#[pin_project::pin_project]
#[must_use = "futures do nothing unless polled"]
pub struct Watching<F>(#[pin] Step<F>);

#[pin_project::pin_project(project = StepProjection)]
enum Step<F> {
    Refused(Option<UffdError>),
    Preparing {
        watch: Option<Watch>,
        #[pin]
        prepare: F,
    },
}

impl<F, P, E> Future for Watching<F>
where
    F: Future<Output = Result<P, E>>,
{
    type Output = Result<(P, Watch), Unwatched<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        const RESOLVED: &str = "`Watching` polled after it has resolved";
        Poll::Ready(match self.project().0.project() {
            StepProjection::Refused(error) => Err(Unwatched::Watch(error.take().expect(RESOLVED))),
            StepProjection::Preparing { watch, prepare } => {
                let prepared = ready!(prepare.poll(cx));
                let watch = watch.take().expect(RESOLVED);
                prepared.map(|prepared| (prepared, watch)).map_err(Unwatched::Prepare)
            }
        })
    }
}

impl<F, P, E> Watching<F>
where
    F: Future<Output = Result<P, E>>,
{
    /// Blocks the thread until `prepare` has resolved (W1).
    #[cfg(feature = "std")]
    pub fn wait(self) -> Result<(P, Watch), Unwatched<E>> {
        crate::block::wait(self)
    }
}

impl<F> fmt::Debug for Watching<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watching").finish_non_exhaustive()
    }
}
