//! The owner of an active invalidation's work, and what follows: a plain state machine.
//!
//! ```text
//!              park                    lease
//! WithCaller ───────▶ Parked ◀──────────────────────▶ Leased
//!   ▲  ▲   └──────┐             give_back, some left    │
//!   │  │     park,│ all done                            │ give_back, all done
//!   │  │          ▼                                     ▼
//!   │  └────── Unclaimed ◀──────────────────────────────┤ then Claim
//!   │  claim      │ abandon                             │ then End
//!   │             ▼                                     ▼
//!   └─────── the invalidation ends ◀────────────────────┘
//! ```
//!
//! `abandon` makes a parked or leased invalidation end when its passes are done. If some passes
//! were never polled, because the budget interrupted the first passes (B4), they are parked first.
#![forbid(unsafe_code)]

/// The owner of the work `W`.
pub(crate) enum Stage<W> {
    /// First passes run, or a guard is held, or the invalidation has ended. The caller has the
    /// work.
    WithCaller,
    /// Passes are pending, and no task polls them at this moment. The work is here.
    Parked { work: W, then: Then },
    /// A task polls the passes. Its [`Lease`](crate::engine::lease::Lease) has the work.
    Leased { then: Then },
    /// The joined passes are done, and the caller has not come back. The work is here.
    Unclaimed { work: W, claim: Claim },
}

/// What follows when the joined passes are done.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Then {
    /// The caller comes back for the work.
    Claim(Claim),
    /// The invalidation ends: it is abandoned.
    End,
}

/// What the caller needs when it comes back.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Claim {
    /// The hit whose first pass is called next, if the budget interrupted the first passes (B4).
    pub(crate) resume_at: Option<u32>,
    /// How often the caller's future has lapsed.
    pub(crate) lapses: u32,
}

/// What the caller of a transition has to do.
#[derive(Debug)]
pub(crate) enum Next<W> {
    Nothing,
    /// Wake the waiting futures: passes are to be polled.
    Drive,
    /// End the invalidation: its passes are done.
    End(W),
}

/// The questions that the stage asks of the work.
pub(crate) trait Load {
    /// Returns whether no joined pass is pending.
    fn is_done(&mut self) -> bool;
    /// Returns whether some passes were never polled.
    fn has_unpolled(&mut self) -> bool;
    /// Joins the passes that were never polled. No further first pass will be called.
    fn join_unpolled(&mut self);
}

impl<W: Load> Stage<W> {
    /// Takes the work from the caller: other tasks may poll its passes from now on (C2).
    pub(crate) fn park(&mut self, mut work: W, claim: Claim) {
        debug_assert!(matches!(self, Self::WithCaller));
        *self = if work.is_done() {
            Self::Unclaimed { work, claim }
        } else {
            Self::Parked { work, then: Then::Claim(claim) }
        };
    }

    /// Gives the work of a parked invalidation out, to be polled. It comes back by
    /// [`give_back`](Self::give_back).
    pub(crate) fn lease(&mut self) -> Option<W> {
        match core::mem::replace(self, Self::WithCaller) {
            Self::Parked { work, then } => {
                *self = Self::Leased { then };
                Some(work)
            }
            other => {
                *self = other;
                None
            }
        }
    }

    /// Takes the work back from a lease.
    pub(crate) fn give_back(&mut self, mut work: W) -> Next<W> {
        let Self::Leased { then } = *self else {
            unreachable!("there is one lease, and it comes back once")
        };
        match then {
            Then::Claim(claim) => {
                *self = Self::WithCaller;
                self.park(work, claim);
                Next::Nothing
            }
            Then::End if !work.is_done() => {
                *self = Self::Parked { work, then };
                Next::Nothing
            }
            Then::End if work.has_unpolled() => {
                work.join_unpolled();
                *self = Self::Parked { work, then };
                Next::Drive
            }
            Then::End => {
                *self = Self::WithCaller;
                Next::End(work)
            }
        }
    }

    /// Gives the work of an unclaimed invalidation back to the caller.
    pub(crate) fn claim(&mut self) -> Option<(W, Claim)> {
        match core::mem::replace(self, Self::WithCaller) {
            Self::Unclaimed { work, claim } => Some((work, claim)),
            other => {
                *self = other;
                None
            }
        }
    }

    /// Notes that the caller does not come back.
    pub(crate) fn abandon(&mut self) -> Next<W> {
        match core::mem::replace(self, Self::WithCaller) {
            Self::WithCaller => Next::Nothing,
            Self::Parked { work, .. } => {
                *self = Self::Parked { work, then: Then::End };
                Next::Nothing
            }
            Self::Leased { .. } => {
                *self = Self::Leased { then: Then::End };
                Next::Nothing
            }
            Self::Unclaimed { mut work, .. } => {
                if !work.has_unpolled() {
                    return Next::End(work);
                }
                work.join_unpolled();
                *self = Self::Parked { work, then: Then::End };
                Next::Drive
            }
        }
    }

    /// Returns the work; `None` while it is leased or with the caller.
    pub(crate) fn work(&self) -> Option<&W> {
        match self {
            Self::Parked { work, .. } | Self::Unclaimed { work, .. } => Some(work),
            Self::WithCaller | Self::Leased { .. } => None,
        }
    }

    pub(crate) fn is_parked(&self) -> bool {
        !matches!(self, Self::WithCaller)
    }

    /// Returns whether the invalidation ends by itself when its passes are done.
    pub(crate) fn is_abandoned(&self) -> bool {
        matches!(self, Self::Parked { then: Then::End, .. } | Self::Leased { then: Then::End })
    }

    /// Returns what the caller needs, if it could claim the work now.
    pub(crate) fn unclaimed(&self) -> Option<Claim> {
        match self {
            Self::Unclaimed { claim, .. } => Some(*claim),
            _ => None,
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Work as numbers: joined passes that are pending, and passes that were never polled.
    #[derive(Clone, Debug, PartialEq)]
    struct Passes {
        pending: u32,
        unpolled: u32,
    }

    const DONE: Passes = Passes { pending: 0, unpolled: 0 };

    impl Load for Passes {
        fn is_done(&mut self) -> bool {
            self.pending == 0
        }

        fn has_unpolled(&mut self) -> bool {
            self.unpolled > 0
        }

        fn join_unpolled(&mut self) {
            self.pending += core::mem::take(&mut self.unpolled);
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Lease,
        /// Gives a lease back after this many passes have finished.
        GiveBack(u32),
        Claim,
        Abandon,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![3 => Just(Op::Lease), 3 => (0..3u32).prop_map(Op::GiveBack), 1 => Just(Op::Claim), 1 => Just(Op::Abandon)]
    }

    proptest! {
        /// In any order of operations, the work is in one place and comes out once. It is claimed
        /// only if it was not abandoned, and ended only if it was. No pass is pending then, and at
        /// an end all have been polled.
        #[test]
        fn the_work_is_in_one_place_and_comes_out_once(
            pending in 0..4u32,
            unpolled in 0..3u32,
            resume_at in proptest::option::of(0..9u32),
            ops in proptest::collection::vec(op(), 0..40),
        ) {
            let claim = Claim { resume_at, lapses: 3 };
            let mut stage = Stage::WithCaller;
            stage.park(Passes { pending, unpolled }, claim);
            let (mut leased, mut abandoned, mut out) = (None::<Passes>, false, false);
            for op in ops {
                match op {
                    Op::Lease => {
                        let taken = stage.lease();
                        prop_assert!(taken.is_none() || leased.is_none(), "leased twice");
                        leased = taken.or(leased);
                    }
                    Op::GiveBack(finished) => {
                        let Some(mut work) = leased.take() else { continue };
                        work.pending = work.pending.saturating_sub(finished);
                        if let Next::End(work) = stage.give_back(work) {
                            prop_assert!(abandoned && !out);
                            prop_assert_eq!(work, DONE);
                            out = true;
                        }
                    }
                    Op::Claim => {
                        if let Some((mut work, found)) = stage.claim() {
                            prop_assert!(!abandoned && !out && leased.is_none() && work.is_done());
                            prop_assert_eq!((found, work.unpolled), (claim, unpolled));
                            out = true;
                        }
                    }
                    Op::Abandon => {
                        abandoned |= !out;
                        if let Next::End(work) = stage.abandon() {
                            prop_assert!(!out && leased.is_none());
                            prop_assert_eq!(work, DONE);
                            out = true;
                        }
                    }
                }
                let places = usize::from(stage.work().is_some()) + usize::from(leased.is_some()) + usize::from(out);
                prop_assert_eq!(places, 1);
                prop_assert_eq!(stage.is_parked(), !out);
                prop_assert_eq!(stage.is_abandoned(), abandoned && !out);
            }
            // A task that polls its passes brings it to its end.
            let mut work = match leased {
                Some(work) => work,
                None => stage.lease().unwrap_or(Passes { pending: 0, unpolled: 0 }),
            };
            work.pending = 0;
            if matches!(stage, Stage::Leased { .. }) {
                out |= matches!(stage.give_back(work), Next::End(_));
            }
            if let Some(mut work) = stage.lease() {
                work.pending = 0;
                out |= matches!(stage.give_back(work), Next::End(_));
            }
            out |= stage.claim().is_some();
            prop_assert!(out && !stage.is_parked());
        }
    }
}
