//! Work that is noted under the lock and done when the lock is free (C8).
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

/// Work for after the lock. An empty outbox costs one comparison.
#[derive(Default)]
pub(crate) struct Outbox(Option<Box<Contents>>);

#[derive(Default)]
pub(crate) struct Contents {
    /// Tasks to be woken.
    pub(crate) tasks: Vec<Arc<TaskWaker>>,
    /// Tasks to be dropped without being woken.
    pub(crate) unused: Vec<Arc<TaskWaker>>,
    /// Bells to be dropped. Their futures may be gone, so this may be the last reference.
    pub(crate) bells: Vec<Arc<Bell>>,
    /// Sets all of whose wakers are to be woken.
    pub(crate) sets: Vec<Arc<WakerSet>>,
    /// Entries to be freed.
    pub(crate) dead: Vec<EntryRef>,
    /// Panics that have no caller any more.
    pub(crate) panics: Vec<FirstPanic>,
    /// Spans of invalidations that have ended, to be closed.
    pub(crate) traces: Vec<Trace>,
    /// Memory of invalidations that have ended, to be freed. All passes in it are done.
    pub(crate) works: Vec<Work>,
    pub(crate) records: Vec<Record>,
    /// Ranges of invalidations that have ended, to be freed.
    pub(crate) ranges: Vec<RangeSet>,
}

impl Outbox {
    #[cold]
    pub(crate) fn contents(&mut self) -> &mut Contents {
        self.0.get_or_insert_default()
    }

    /// Takes the entries that are to be freed.
    pub(crate) fn take_dead(&mut self) -> Vec<EntryRef> {
        self.0.as_mut().map(|contents| core::mem::take(&mut contents.dead)).unwrap_or_default()
    }

    /// Wakes and frees. Foreign code runs here. None of its panics leaves, so everything is done.
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
        // The rest is dropped here. Those drops keep their panics themselves.
    }
}
