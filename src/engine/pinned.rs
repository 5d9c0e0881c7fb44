//! Notifiers that are kept alive without the lock, so that they can be asked for their names.
#![forbid(unsafe_code)]

use super::Shared;
use crate::entry::EntryRef;
use alloc::vec::Vec;

/// Holds notifiers and releases them when dropped. Each was [held](crate::entry::Entry::hold) under
/// the lock once for each time that it is in the list.
pub(crate) struct Pinned<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) entries: Vec<EntryRef>,
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if self.entries.is_empty() {
            return;
        }
        self.shared.with(|state, outbox| {
            for &entry in &self.entries {
                entry.unhold();
                if !entry.is_held() {
                    // `remove` may wait for that.
                    state.nudge(entry, None, outbox);
                    state.reap(entry, outbox);
                }
            }
        });
    }
}
