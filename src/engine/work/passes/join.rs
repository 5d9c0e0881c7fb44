//! The join: passes that stayed pending at their first poll, polled together.
#![forbid(unsafe_code)]

use super::Passes;
use super::pass::{Outcome, Pass};
use crate::engine::host::Host;
use crate::engine::wakers::WakerSet;
use crate::foreign::Callback;
use crate::observe;
use crate::sync::{Arc, Ordering};
use core::task::{Context, Poll, Waker};
use futures::stream::{FuturesUnordered, StreamExt};

/// How often passes that wake themselves are polled before the executor gets its turn again.
const ROUNDS: usize = 4;
/// Passes that may finish in one poll before the executor gets its turn again.
const FINISHED_AT_ONCE: usize = 256;

/// The passes that stayed pending at their first poll.
pub(super) struct Join {
    pub(super) running: FuturesUnordered<Pass>,
    /// How many of `running` are over: a pass cannot be taken out before it is polled (L5).
    pub(super) shells: usize,
    wakers: Arc<WakerSet>,
    /// `wakers` as a waker.
    pub(super) waker: Waker,
}

/// How a poll of the joined passes ended.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Progress {
    /// A panic unwound through it.
    Interrupted,
    /// No joined pass is left.
    AllFinished,
    /// Some are left, and none of them is ready to go on.
    Waiting,
    /// Some are left that are ready to go on. The poll stopped to let other tasks run.
    Yielded,
}

impl Passes {
    pub(super) fn join(&mut self) -> &mut Join {
        if self.join.is_none() {
            self.make_join();
        }
        let Some(join) = &mut self.join else { unreachable!("there is one now") };
        join
    }

    #[cold]
    #[inline(never)]
    fn make_join(&mut self) {
        let wakers = Arc::new(WakerSet::default());
        self.join = Some(Join {
            running: FuturesUnordered::new(),
            shells: 0,
            waker: Waker::from(wakers.clone()),
            wakers,
        });
    }

    /// Returns the wakers that are woken when a joined pass can go on.
    pub(crate) fn wakers(&mut self) -> &Arc<WakerSet> {
        &self.join().wakers
    }

    /// Returns how many passes were polled and are not done.
    pub(crate) fn running(&self) -> usize {
        self.join.as_ref().map_or(0, |join| join.running.len() - join.shells)
    }

    /// Puts all passes that wait for their first poll into the join. No further first pass will be
    /// called. Under the lock.
    pub(in crate::engine::work) fn join_started(&mut self) {
        self.join();
        let Self { slots, started, join: Some(join), untold, .. } = self else { return };
        *untold += *started;
        for record in &mut slots[..core::mem::take(started)] {
            join.running.push(record.move_out());
        }
    }

    /// Polls the joined passes of an invalidation that is not parked as long as one of them is
    /// ready to go on, but at most `idle` times in a row without one that finishes. If some of the
    /// rest are ready then, [`WakerSet::await_as_owner`] says so.
    pub(crate) fn drive_alone(&mut self, host: &Host, idle: usize) {
        let mut left = idle;
        loop {
            let progress = self.drive(host);
            let woken = self.wakers().end();
            if !self.finished.is_empty() {
                left = idle;
            }
            self.finished.clear();
            left -= 1;
            let behind = self.is_behind(host.fences.load(Ordering::Relaxed));
            let goes_on =
                progress == Progress::Yielded || (woken && progress == Progress::Waiting) || behind;
            if !goes_on || left == 0 {
                return;
            }
        }
    }

    /// Polls the joined passes as far as they go, within bounds.
    ///
    /// Wake-ups are only noted from here until [`WakerSet::end`]. Call that when other tasks can
    /// take the passes again: a waiter that is woken earlier finds nothing to poll, and the wake-up
    /// is lost.
    pub(crate) fn drive(&mut self, host: &Host) -> Progress {
        self.cut(host);
        let progress = self.drive_joined(host);
        self.tidy();
        // Also if the passes that were left have been cut.
        if self.running() == 0 { Progress::AllFinished } else { progress }
    }

    fn drive_joined(&mut self, host: &Host) -> Progress {
        let Some(join) = &mut self.join else {
            return Progress::AllFinished;
        };
        let mut cx = Context::from_waker(&join.waker);
        let mut rounds = 0;
        let mut count = 0;
        join.wakers.begin();
        (0..core::mem::take(&mut self.untold)).for_each(|_| observe::pass_pends(&host.losses));
        let _entered = self.trace.enter();
        loop {
            match join.running.poll_next_unpin(&mut cx) {
                Poll::Ready(Some(Outcome { finished: None, .. })) => join.shells -= 1,
                Poll::Ready(Some(Outcome { finished: Some(finished), began, slot, panic })) => {
                    let (entry, panicked) = (finished.entry, panic.is_some());
                    if finished.budgeted {
                        host.give_permit_back();
                    }
                    // Before an observer runs, whose panic must not lose it.
                    self.finished.push(finished);
                    self.spare_slots.extend(slot);
                    if let Some(panic) = panic {
                        self.panic.note(&host.losses, Callback::Pass, panic);
                    }
                    observe::pass_pends_no_more(&host.losses);
                    self.trace.pass(&host.losses, entry, began, panicked);
                    count += 1;
                    if count < FINISHED_AT_ONCE {
                        continue;
                    }
                    if join.running.len() == join.shells {
                        return Progress::AllFinished;
                    }
                    // `FuturesUnordered` does not wake again for passes that it knows are ready.
                    join.wakers.note_woken();
                    return Progress::Yielded;
                }
                Poll::Ready(None) => return Progress::AllFinished,
                Poll::Pending => {
                    rounds += 1;
                    if rounds == ROUNDS || !join.wakers.take_woken() {
                        return Progress::Waiting;
                    }
                }
            }
        }
    }
}
