//! Invalidations whose guard is not handed out yet although their first passes ran: their passes belong to the space (C2).
//!
//! From here on the future that started it is one of several who may drive the passes. It can come back and claim the result,
//! be dropped (the invalidation is *abandoned*: it ends by itself when its passes are done), or never be polled again (it
//! *lapses* when somebody needs its range, C4).
#![forbid(unsafe_code)]

use crate::engine::scratch::{Progress, Scratch, UNLISTED};
use crate::engine::wakes::{PassWaker, Watch};
use crate::engine::{After, Shared, State, Unclaimed};
use crate::entry::EntryRef;
use crate::index::Ranged;
use crate::protocol::Id;
use crate::range::AddressRange;
use crate::sync::{Arc, Ordering, catch, resume};
use alloc::boxed::Box;
use alloc::task::Wake;
use alloc::vec::Vec;
use core::task::Waker;
use core::time::Duration;
use slab::Slab;

/// A waiting reader yields this often to its executor before it lets an unclaimed invalidation lapse for the first time …
const FIRST_YIELDS: u32 = if cfg!(loom) { 1 } else { 64 };
/// … and twice as often after each lapse of the same future, up to this. A model checker tries every length of the wait anyway.
const MOST_YIELDS: u32 = if cfg!(loom) { 2 } else { 1024 };

pub(crate) struct Pending {
    /// Gone while somebody polls the passes: to have it is the right to poll (C8).
    pub(crate) scratch: Option<Box<Scratch>>,
    pub(crate) wakes: Arc<PassWaker>,
    /// Notifiers whose passes are pending.
    pub(crate) waiting: Slab<EntryRef>,
    /// All joined passes are done.
    pub(crate) done: bool,
    /// The future that started it was dropped, or it lapsed.
    pub(crate) abandoned: bool,
    /// Which hit is called next, when the budget made the first passes stop in the middle (B4).
    pub(crate) resume_at: Option<usize>,
    /// How often a waiting reader yields before this lapses.
    pub(crate) patience: u32,
}

/// An unclaimed invalidation whose passes a waiting future may drive.
pub(crate) struct Job {
    pub(crate) unclaimed: Unclaimed,
    pub(crate) scratch: Box<Scratch>,
}

/// How often a reader yields to a future that has lapsed `lapses` times (C4): never less than before.
pub(crate) fn patience(lapses: u32) -> u32 {
    FIRST_YIELDS.saturating_mul(2u32.saturating_pow(lapses)).min(MOST_YIELDS)
}

impl State {
    /// Hands an invalidation whose passes are pending to the space.
    pub(crate) fn hand_over(
        &mut self,
        id: Id,
        mut scratch: Box<Scratch>,
        resume_at: Option<usize>,
        lapses: u32,
        now: Option<Duration>,
        after: &mut After,
    ) -> Unclaimed {
        let wakes = scratch.passes().wakes().clone();
        let mut pending = match scratch.pending.take() {
            Some(mut pending) => {
                pending.wakes = wakes;
                pending
            }
            None => Box::new(Pending {
                scratch: None,
                wakes,
                waiting: Slab::new(),
                done: false,
                abandoned: false,
                resume_at: None,
                patience: 0,
            }),
        };
        scratch.passes().list(&mut pending.waiting);
        for (_, entry) in &pending.waiting {
            entry.pending.store(entry.pending.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        let Some(active) = self.protocol.active_mut().get_mut(id) else {
            unreachable!("an invalidation in its first passes is active");
        };
        active.seen_to_last(now);
        scratch.timed = true;
        let (range, unclaimed) = (active.range, Unclaimed { id, serial: active.serial() });
        // Whoever sleeps because of this invalidation can now help with it (C3).
        let mut asleep: Vec<EntryRef> = Vec::new();
        let sleeps = |entry: &EntryRef| entry.first_waiter().is_some();
        asleep.extend(scratch.hits.iter().copied().chain(active.late()).filter(sleeps));
        pending.done = scratch.passes().running() == 0;
        pending.abandoned = false;
        pending.resume_at = resume_at;
        pending.patience = patience(lapses);
        pending.scratch = Some(scratch);
        active.extra.pending = Some(pending);
        self.unclaimed.insert(Ranged { range, value: unclaimed });
        for entry in asleep {
            self.nudge(entry, after);
        }
        unclaimed
    }

    pub(crate) fn pending_mut(&mut self, unclaimed: Unclaimed) -> Option<&mut Pending> {
        self.protocol.get_mut(unclaimed.id, unclaimed.serial)?.extra.pending.as_deref_mut()
    }

    /// Takes an invalidation whose joined passes are done back from the space: the guard, or the rest of the first passes, come next.
    pub(crate) fn claim(&mut self, unclaimed: Unclaimed) -> Option<(Box<Scratch>, Option<usize>)> {
        let active = self.protocol.get_mut(unclaimed.id, unclaimed.serial)?;
        let mut pending = active.extra.pending.take()?;
        self.unclaimed.remove(Ranged { range: active.range, value: unclaimed });
        let mut scratch = pending.scratch.take()?;
        // Passes that wait for their first poll are no longer the space's.
        for pass in scratch.passes().started_mut() {
            pass.listed = UNLISTED;
        }
        for entry in pending.waiting.drain() {
            entry.pending.store(entry.pending.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
        }
        let resume_at = pending.resume_at.take();
        scratch.pending = Some(pending);
        Some((scratch, resume_at))
    }

    /// Ends an unclaimed invalidation all of whose passes are done.
    fn end_unclaimed(&mut self, unclaimed: Unclaimed, now: Option<Duration>, after: &mut After) {
        if let Some((mut scratch, _)) = self.claim(unclaimed) {
            self.lose_panic(scratch.passes().panic.take(), after);
            after.work().traces.push(core::mem::take(&mut scratch.passes().trace));
            self.end(unclaimed.id, Some(scratch), now, after);
        }
    }

    /// Nobody will claim this invalidation: it ends as soon as its passes are done, now if they are.
    pub(crate) fn abandon(&mut self, unclaimed: Unclaimed, now: Option<Duration>, after: &mut After) {
        let Some(pending) = self.pending_mut(unclaimed) else {
            return;
        };
        pending.abandoned = true;
        pending.resume_at = None;
        if !pending.done {
            return;
        }
        let Some(scratch) = &mut pending.scratch else {
            return;
        };
        if scratch.passes().started() == 0 {
            self.end_unclaimed(unclaimed, now, after);
        } else {
            // Further first passes will not be called, so the passes that waited for that can be polled.
            scratch.passes().join_started();
            pending.done = false;
            after.work().wakes.push(pending.wakes.clone());
        }
    }

    /// C4: ends the range on behalf of a future that is not polled; it starts over if it ever is.
    pub(crate) fn lapse(&mut self, unclaimed: Unclaimed, now: Option<Duration>, after: &mut After) {
        self.counts.lapses += 1;
        if let Some(scratch) = self.pending_mut(unclaimed).and_then(|pending| pending.scratch.as_deref()) {
            scratch.hits.iter().for_each(|entry| entry.tally().lapsed());
        }
        self.abandon(unclaimed, now, after);
    }

    /// Takes the passes of the unclaimed invalidations that overlap `range` and are `wanted`, to be polled, as far as nobody polls them
    /// already, and registers `waker` with all that have pending passes. Those with nothing left to drive go into `help.idle`.
    pub(crate) fn jobs(
        &mut self,
        range: AddressRange,
        waker: &Arc<TaskWaker>,
        help: &mut Help,
        wanted: impl Fn(&Pending, u64) -> bool,
        after: &mut After,
    ) -> Vec<Job> {
        let mut jobs = Vec::new();
        help.idle.clear();
        help.overlapping.clear();
        self.unclaimed.overlapping(range, |unclaimed| help.overlapping.push(unclaimed.value));
        let mut watched = 0;
        for &unclaimed in &help.overlapping {
            let Some(pending) = self.pending_mut(unclaimed) else {
                continue;
            };
            if !wanted(pending, unclaimed.serial) {
                continue;
            }
            if pending.done {
                help.idle.push(unclaimed);
                continue;
            }
            if watched == help.watches.len() {
                help.watches.push(Watch::default());
            }
            after.work().unused.extend(help.watches[watched].register(&pending.wakes, Waker::from(waker.clone())));
            watched += 1;
            if let Some(scratch) = pending.scratch.take() {
                jobs.push(Job { unclaimed, scratch });
            }
        }
        jobs
    }
}

/// What a waiting future needs to help with the invalidations that it waits for.
#[derive(Default)]
pub(crate) struct Help {
    /// Invalidations whose passes are done and which nobody has claimed.
    pub(crate) idle: Vec<Unclaimed>,
    overlapping: Vec<Unclaimed>,
    watches: Vec<Watch>,
}

/// A task's waker that can be cloned under the lock: that runs no foreign code.
pub(crate) struct TaskWaker(pub(crate) Waker);

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.0.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.wake_by_ref();
    }
}

/// Wakes everybody when it goes out of scope, also when something before that panics.
struct WakeAfterwards(Option<Arc<PassWaker>>);

impl Drop for WakeAfterwards {
    fn drop(&mut self) {
        if let Some(wakes) = self.0.take()
            && let Err(panic) = catch(|| wakes.wake_all())
        {
            resume(panic);
        }
    }
}

impl Shared {
    /// Polls the passes of one invalidation and gives them back. Says whether the joined ones are all done, and then wakes everyone who waits for that.
    ///
    /// `may_end`: nobody may be left to claim it, so that it ends here. Not so when the future that started it is the one who polls: that cannot be dropped
    /// meanwhile, nor lapse before its passes are done.
    pub(crate) fn work(&self, job: Job, may_end: bool) -> bool {
        let Job { unclaimed, mut scratch } = job;
        let progress = scratch.passes().drive();
        let finished = core::mem::take(&mut scratch.passes().finished);
        let now = if may_end && progress == Progress::AllFinished { self.now() } else { None };
        let mut wake = WakeAfterwards(None);
        self.with(|state, after| {
            let (done, wakes) = state.put_back(self, unclaimed, (scratch, finished), progress, now, after);
            wake.0 = wakes;
            done
        })
    }
}

impl State {
    fn put_back(
        &mut self,
        space: &Shared,
        unclaimed: Unclaimed,
        (mut scratch, mut finished): (Box<Scratch>, Vec<super::scratch::Finished>),
        progress: Progress,
        now: Option<Duration>,
        after: &mut After,
    ) -> (bool, Option<Arc<PassWaker>>) {
        let mut quiet = Vec::new();
        let Some(pending) = self.pending_mut(unclaimed) else {
            unreachable!("an invalidation whose passes are being polled is neither claimed nor ended");
        };
        for done in finished.drain(..) {
            if done.listed != UNLISTED {
                pending.waiting.remove(done.listed);
                let left = done.entry.pending.load(Ordering::Relaxed) - 1;
                done.entry.pending.store(left, Ordering::Relaxed);
                if left == 0 && done.entry.first_waiter().is_some() {
                    quiet.push(done.entry);
                }
            }
            if done.budgeted {
                space.give_pass_back();
            }
            if scratch.passes().panic.is_none() {
                scratch.passes().panic = done.panic;
            } else if done.panic.is_some() {
                after.work().panics.extend(done.panic);
            }
        }
        // Its memory is used again.
        scratch.passes().finished = finished;
        if progress == Progress::AllFinished && pending.abandoned && scratch.passes().started() > 0 {
            scratch.passes().join_started();
        }
        let done = scratch.passes().running() == 0;
        pending.done = done;
        pending.scratch = Some(scratch);
        // Only now, when others can take the passes again: see `Scratch::drive`.
        let woken = pending.wakes.end();
        // Then something is to be done for those who wait: to claim, to poll on, or to wait for something else.
        let wakes = (woken || progress != Progress::Waiting).then(|| pending.wakes.clone());
        let abandoned = pending.abandoned;
        for entry in quiet {
            self.nudge(entry, after);
        }
        if done && abandoned {
            self.end_unclaimed(unclaimed, now, after);
        }
        (done, wakes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c4_patience_never_falls_however_often_a_future_lapses() {
        let patience: std::vec::Vec<u32> = (0..100).chain([u32::MAX]).map(patience).collect();
        assert!(patience.is_sorted(), "{patience:?}");
        assert_eq!((patience[0], patience[1], patience[100]), (FIRST_YIELDS, 2 * FIRST_YIELDS, MOST_YIELDS));
    }
}
