//! What is noted under the lock and done when it is free (C8).
#![forbid(unsafe_code)]

use crate::engine::state::Record;
use crate::engine::wakers::{Bell, WakerSet};
use crate::engine::work::Work;
use crate::entry::EntryRef;
use crate::foreign::{Callback, FirstPanic, Losses, TaskWaker};
use crate::observe::Trace;
use crate::range::RangeSet;
use crate::sync::Arc;
use alloc::boxed::Box;
use alloc::vec::Vec;

/// What remains to be done once the lock is free. Mostly nothing, which costs one comparison.
#[derive(Default)]
pub(crate) struct Outbox(Option<Box<Contents>>);

#[derive(Default)]
pub(crate) struct Contents {
    /// Tasks to be woken.
    pub(crate) tasks: Vec<Arc<TaskWaker>>,
    /// Tasks that nobody needs to wake any more.
    pub(crate) unused: Vec<Arc<TaskWaker>>,
    /// Bells of futures that may be gone.
    pub(crate) bells: Vec<Arc<Bell>>,
    /// Everybody who waits for the passes of some invalidation is to be woken.
    pub(crate) sets: Vec<Arc<WakerSet>>,
    /// Entries that nothing keeps alive any more.
    pub(crate) dead: Vec<EntryRef>,
    /// Panics that have no caller left.
    pub(crate) panics: Vec<FirstPanic>,
    /// Spans to be closed.
    pub(crate) traces: Vec<Trace>,
    /// Memory of invalidations that have ended. All passes in it are done.
    pub(crate) works: Vec<Work>,
    pub(crate) records: Vec<Record>,
    /// What invalidations of many ranges covered.
    pub(crate) ranges: Vec<RangeSet>,
}

impl Outbox {
    #[cold]
    pub(crate) fn contents(&mut self) -> &mut Contents {
        self.0.get_or_insert_default()
    }

    /// The entries that nothing keeps alive any more.
    pub(crate) fn take_dead(&mut self) -> Vec<EntryRef> {
        self.0.as_mut().map(|contents| core::mem::take(&mut contents.dead)).unwrap_or_default()
    }

    /// Wakes and frees. Foreign code runs here; none of its panics leaves, so all of the list is
    /// worked off.
    #[inline]
    pub(crate) fn empty(self, losses: &Losses) {
        if let Some(contents) = self.0 {
            contents.empty(losses);
        }
    }
}

impl Contents {
    #[cold]
    fn empty(self, losses: &Losses) {
        self.tasks.iter().for_each(|task| task.rouse());
        self.sets.iter().for_each(|set| set.wake_all());
        for entry in self.dead {
            losses.run(Callback::NotifierDrop, |inside| entry.free(inside));
        }
        self.panics.into_iter().for_each(|panic| losses.lose_first(panic));
        // The drops of the others keep their panics themselves.
    }
}
