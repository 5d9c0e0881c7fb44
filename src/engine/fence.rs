//! The way out for a device that never answers (L5).
#![forbid(unsafe_code)]

use super::Shared;
use super::lease::Lease;
use super::state::Help;
use crate::entry::EntryRef;
use crate::foreign::Report;
use crate::sync::Ordering;
use alloc::vec::Vec;

impl Shared {
    /// Closes a notifier and ends its passes. The entry is the caller's, so it stays.
    ///
    /// Passes that are there to be taken are dropped here. Where somebody else has them, under this
    /// lock or after it he finds that he is behind, and drops them before anybody is told that there
    /// is something to wait for.
    pub(crate) fn fence(&self, entry: EntryRef) -> usize {
        let (again, passes, leases) = self.with(|state, _| {
            state.close(entry);
            let again = entry.fence();
            if !again {
                state.fences += 1;
                self.host.fences.store(state.fences, Ordering::Release);
            }
            let passes = entry.pending.load(Ordering::Relaxed) as usize;
            let mut tickets = Vec::new();
            if passes > 0 {
                state.parked.overlapping(entry.range, |parked| tickets.push(parked.value));
            }
            let waits_for = |ticket| match state.help(ticket, |parking, _| parking.pending.iter().any(|of| of == entry)) {
                Help::Leased(work) => Some(Lease::new(self, ticket, work)),
                Help::Gone | Help::Unclaimed | Help::Busy => None,
            };
            (again, passes, tickets.into_iter().filter_map(waits_for).collect::<Vec<_>>())
        });
        leases.into_iter().for_each(Lease::cut);
        if !again {
            let name = entry.name(&self.host.losses);
            self.host.losses.report(&Report::Fenced { notifier: &name, range: entry.range, passes });
        }
        passes
    }
}
