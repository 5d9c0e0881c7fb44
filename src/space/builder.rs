//! The settings of a space, until it is made.
#![forbid(unsafe_code)]

use super::AddressSpace;
use crate::engine::Shared;
use crate::engine::host::Settings;
use crate::foreign::Report;
use alloc::boxed::Box;
use core::fmt;
use core::time::Duration;

/// Sets up a new [`AddressSpace`]: made by [`AddressSpace::builder`].
///
/// ```
/// use shootdown::AddressSpace;
///
/// let space = AddressSpace::builder()
///     .pass_budget(64)
///     .on_report(|report| eprintln!("{report}"))
///     .build();
/// # drop(space);
/// ```
#[derive(Default)]
#[must_use = "a builder makes no space until `build` is called"]
pub struct Builder {
    settings: Settings,
}

impl Builder {
    /// Bounds the number of passes that may be pending at once in the whole space ([B4]).
    ///
    /// By default there is no bound. When the budget is used up, an invalidation awaits each
    /// further pass before it calls the next first pass. A budget of 0 is the kernel before the
    /// multi-pass patch: one device after the other.
    ///
    /// [B4]: crate::docs::contract#b-blocking-and-non-blocking
    pub fn pass_budget(mut self, passes: usize) -> Self {
        self.settings.budget = Some(passes);
        self
    }

    /// Calls `reporter` for errors that no caller is told of: see [`Report`].
    ///
    /// No lock of the library is held during the call. A panic of `reporter` is
    /// [counted](crate::Stats::lost_panics).
    pub fn on_report(mut self, reporter: impl Fn(&Report<'_>) + Send + Sync + 'static) -> Self {
        self.settings.reporter = Some(Box::new(reporter));
        self
    }

    /// Takes the time from `clock`, which returns the time since some fixed moment.
    ///
    /// The clock is read at the start of *every* invalidation. By default the library reads the
    /// operating system's clock, and only when an invalidation turns out to last, because reading
    /// it takes longer than a short invalidation (see
    /// [`ActiveInvalidation::age`](crate::ActiveInvalidation::age)). Virtual time and `no_std` need
    /// a clock.
    ///
    /// No lock of the library is held during the call. A panic of `clock` is
    /// [counted](crate::Stats::lost_panics), and that reading has no time.
    pub fn clock(mut self, clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        self.settings.clock = Some(Box::new(clock));
        self
    }

    /// Sets how long waiters wait for a future whose passes are done and that is not polled ([C4]).
    ///
    /// After this time, 20 ms by default, the future *lapses*. The time counts from the moment its
    /// passes were done. It doubles after each lapse of the same future, up to one second, or up to
    /// `patience` if that is longer. Without a clock, or with a clock that stands still, the
    /// library counts turns of the waiters instead.
    ///
    /// [C4]: crate::docs::contract#c-cancellation-panics-stalls
    pub fn patience(mut self, patience: Duration) -> Self {
        self.settings.patience = Some(patience);
        self
    }

    /// Checks readers against a lease: they succeed only while `valid` returns `true` ([R4]).
    ///
    /// While `valid` returns `false`, no `read_begin` begins, every
    /// [`read_retry`](crate::Subscription::read_retry) is true, and a registration cache finds
    /// nothing. Passes and invalidations go on. Other spaces pay nothing for this.
    ///
    /// This is for memory that another host owns, such as mirrors of `shootdown-lease`. A process
    /// that was stopped goes on where it was, after its lease has ended, and nothing could
    /// invalidate its memory meanwhile. So `valid` must read the time itself, on a clock that goes
    /// on in suspend.
    ///
    /// `valid` is called for each check, on the thread that checks. The driver's lock may be held
    /// then; a lock of the library never is. A panic of it is counted and means `false`. Before
    /// `valid` returns `true` again, [pause](AddressSpace::pause) the space; end the pause
    /// afterwards, which wakes the readers.
    ///
    /// Needs feature `lease`.
    ///
    /// [R4]: crate::docs::contract#r-readers
    #[cfg(any(feature = "lease", loom))]
    pub fn valid_while(mut self, valid: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.settings.valid = Some(Box::new(valid));
        self
    }

    /// Turns off the library's fast paths.
    ///
    /// They must make no difference, which tests compare.
    ///
    /// Needs feature `test-util`.
    #[cfg(feature = "test-util")]
    pub fn plain_only(mut self) -> Self {
        self.settings.plain_only = true;
        self
    }

    /// Sets the first sequence of the space, rounded down to an even number ([S1]).
    ///
    /// The default is 2. Tests of wrap-around use this.
    ///
    /// [S1]: crate::docs::contract#s-sequence
    pub fn first_sequence(mut self, sequence: u64) -> Self {
        self.settings.sequence = Some(sequence & !1);
        self
    }

    /// Makes the space.
    pub fn build(self) -> AddressSpace {
        AddressSpace { shared: Shared::new(self.settings) }
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("first_sequence", &self.settings.sequence)
            .field("pass_budget", &self.settings.budget)
            .field("patience", &self.settings.patience)
            .finish_non_exhaustive()
    }
}
