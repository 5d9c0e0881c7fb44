//! The work of an invalidation: its hits, their first passes, the join of their passes.
//!
//! The work has one owner at a time, who needs no lock. Foreign code runs here, through
//! [`foreign`](crate::foreign). Nothing here knows the state of the space.
#![forbid(unsafe_code)]

pub(crate) mod first_passes;
mod passes;

use crate::engine::state::Load;
use crate::entry::EntryRef;
use crate::sync::Ordering;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::num::NonZeroU32;
pub(crate) use passes::{Passes, Progress, Unpolled};
use slab::Slab;
use sync_wrapper::SyncWrapper;

/// The working memory of an invalidation that hit a notifier, used again by later ones.
pub(crate) struct Work {
    /// The notifiers that the invalidation hit, in order of their first passes.
    pub(crate) hits: Vec<EntryRef>,
    /// A pass need not be `Sync`, but a guard is, which holds this. So passes can be reached by
    /// `&mut` only.
    passes: SyncWrapper<Passes>,
    /// The hit whose first pass is called next, if the pass budget interrupted the first passes
    /// (B4). Taken when the work is parked or the first passes go on.
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
    pub(crate) fn passes(&mut self) -> &mut Passes {
        self.passes.get_mut()
    }

    /// Returns the hits, and the place of their passes.
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

/// The key of a pass in [`PendingNotifiers`]. Counts from 1, so that an `Option` of it has one
/// word.
#[derive(Clone, Copy)]
pub(crate) struct Listed(NonZeroU32);

/// The notifiers whose passes are pending, one for each pass.
///
/// Each change here changes [`Entry::pending`](crate::entry::Entry), too.
#[derive(Default)]
pub(crate) struct PendingNotifiers(Slab<EntryRef>);

impl PendingNotifiers {
    /// Lists one more pass of `entry`. Returns its key.
    pub(crate) fn add(&mut self, entry: EntryRef) -> Listed {
        entry.pending.store(entry.pending.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let key = u32::try_from(self.0.insert(entry) + 1).ok().and_then(NonZeroU32::new);
        Listed(key.expect("fewer than 2^32 - 1 passes are pending"))
    }

    /// Takes the pass with this key off the list. Returns its notifier if no other pass of that is
    /// there.
    pub(crate) fn remove(&mut self, Listed(key): Listed) -> Option<EntryRef> {
        let entry = self.0.try_remove(key.get() as usize - 1)?;
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
