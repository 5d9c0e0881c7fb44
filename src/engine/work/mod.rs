//! The work of an invalidation, which one owner has at a time, without the lock: its hits, their
//! first passes, the join of their passes.
//!
//! Foreign code runs here, through [`foreign`](crate::foreign). Nothing here knows the state of the
//! space.
#![forbid(unsafe_code)]

pub(crate) mod first_passes;
mod passes;

use crate::engine::state::Load;
use crate::entry::EntryRef;
use crate::sync::Ordering;
use alloc::boxed::Box;
use alloc::vec::Vec;
pub(crate) use passes::{Passes, Progress, Unpolled};
use slab::Slab;
use sync_wrapper::SyncWrapper;

/// The working memory of an invalidation that hit a notifier, used again by later ones.
pub(crate) struct Work {
    /// The notifiers that the invalidation hit, in order of their first passes.
    pub(crate) hits: Vec<EntryRef>,
    /// Passes need not be `Sync`, and guards are, which hold this: so nobody looks at them who
    /// could not also poll them.
    passes: SyncWrapper<Passes>,
    /// The first passes go on from this hit: the pass budget interrupted them (B4). Taken by who
    /// parks the work or goes on.
    pub(crate) deferred_at: Option<u32>,
    /// The invalidation has a time stamp.
    pub(crate) timed: bool,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            hits: Vec::new(),
            passes: SyncWrapper::new(Passes::default()),
            deferred_at: None,
            timed: false,
        }
    }
}

impl Work {
    #[inline(always)]
    pub(crate) fn passes(&mut self) -> &mut Passes {
        self.passes.get_mut()
    }

    /// The hits, and where their passes go.
    #[inline(always)]
    pub(crate) fn split(&mut self) -> (&[EntryRef], &mut Passes) {
        (&self.hits, self.passes.get_mut())
    }
}

impl Load for Box<Work> {
    fn is_done(&mut self) -> bool {
        self.passes().running() == 0
    }

    fn has_unpolled(&mut self) -> bool {
        self.passes().started() > 0
    }

    fn join_unpolled(&mut self) {
        self.passes().join_started();
    }
}

/// The key of a pass that no [`PendingNotifiers`] lists.
pub(crate) const UNLISTED: usize = usize::MAX;

/// The notifiers whose passes are pending, one for each pass. Keeps
/// [`Entry::pending`](crate::entry::Entry) in step.
#[derive(Default)]
pub(crate) struct PendingNotifiers(Slab<EntryRef>);

impl PendingNotifiers {
    /// One more pass of `entry` is pending. Returns its key.
    pub(crate) fn add(&mut self, entry: EntryRef) -> usize {
        entry.pending.store(entry.pending.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.0.insert(entry)
    }

    /// The pass with this key is done. Returns the notifier if that was the last that it waited
    /// for.
    pub(crate) fn remove(&mut self, key: usize) -> Option<EntryRef> {
        let entry = self.0.try_remove(key)?;
        (count_down(entry) == 0).then_some(entry)
    }

    pub(crate) fn clear(&mut self) {
        for entry in self.0.drain() {
            count_down(entry);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = EntryRef> {
        self.0.iter().map(|(_, entry)| *entry)
    }
}

fn count_down(entry: EntryRef) -> u32 {
    let left = entry.pending.load(Ordering::Relaxed) - 1;
    entry.pending.store(left, Ordering::Relaxed);
    left
}
