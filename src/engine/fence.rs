//! The fence: ends the passes of a device that never answers (L5).
#![forbid(unsafe_code)]

use super::Shared;
use super::lease::Lease;
use super::outbox::Outbox;
use super::pinned::Pinned;
use super::state::{Help, State, Ticket};
use super::work::Unpolled;
use crate::entry::EntryRef;
use crate::foreign::Report;
use crate::index::Ordered;
use crate::range::AddressRange;
use crate::sync::Ordering;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Passes that a fence has found, to be ended without the lock.
struct Found<'s> {
    leases: Vec<Lease<'s>>,
    unpolled: Vec<Unpolled>,
}

impl Shared {
    /// Closes a notifier and ends its passes. Returns how many were pending. The caller keeps the
    /// entry alive.
    pub(crate) fn fence(&self, entry: EntryRef) -> usize {
        let (again, passes, found) = self.with(|state, outbox| {
            let again = self.close_for_good(state, entry);
            let passes = entry.pending.load(Ordering::Relaxed) as usize;
            let range = (passes > 0).then_some(entry.range);
            (again, passes, range.map(|range| self.find(state, range, |of| of == entry, outbox)))
        });
        self.end(found);
        if !again {
            self.report_fenced(entry, passes);
        }
        passes
    }

    /// Closes all notifiers with these ids and ends their passes, in one search of the space. Their
    /// subscriptions may be anywhere, or gone. Returns how many passes were pending.
    pub(crate) fn fence_all(&self, ids: impl IntoIterator<Item = u64>) -> usize {
        let mut wanted: BTreeMap<u64, Option<EntryRef>> =
            ids.into_iter().map(|id| (id, None)).collect();
        let (fenced, found) = self.with(|state, outbox| {
            let mut note = |entry: EntryRef| {
                if let Some(place) = wanted.get_mut(&entry.order()) {
                    *place = Some(entry);
                }
            };
            state.protocol.overlapping(AddressRange::ALL, &mut note);
            // Notifiers that were taken out of the space and have a pass pending.
            let parked =
                state.protocol.active().iter().filter_map(|(_, active)| active.extra.parked());
            parked.flat_map(|parking| parking.pending.iter()).for_each(note);
            let mut fenced = Vec::new();
            for entry in wanted.into_values().flatten() {
                if !self.close_for_good(state, entry) {
                    entry.hold();
                    fenced.push((entry, entry.pending.load(Ordering::Relaxed) as usize));
                }
            }
            (fenced, self.find(state, AddressRange::ALL, |of| of.is_fenced(), outbox))
        });
        let (entries, passes): (Vec<_>, Vec<_>) = fenced.into_iter().unzip();
        let pinned = Pinned { shared: self, entries };
        self.end(Some(found));
        pinned
            .entries
            .iter()
            .zip(&passes)
            .for_each(|(entry, passes)| self.report_fenced(*entry, *passes));
        drop(pinned);
        passes.into_iter().sum()
    }

    /// Closes a notifier and marks it as fenced. Under the lock. Returns whether it was fenced
    /// before.
    fn close_for_good(&self, state: &mut State, entry: EntryRef) -> bool {
        state.close(entry);
        let again = entry.fence();
        if !again {
            state.fences += 1;
            self.host.fences.store(state.fences, Ordering::Release);
        }
        again
    }

    /// Takes the passes of fenced notifiers out of parked and unclaimed invalidations. A task that
    /// has leased others sees the count of fences when it brings them back, and drops them.
    fn find(
        &self,
        state: &mut State,
        range: AddressRange,
        of: impl Fn(EntryRef) -> bool,
        outbox: &mut Outbox,
    ) -> Found<'_> {
        let (mut tickets, mut leases, mut unpolled) = (Vec::new(), Vec::new(), Vec::new());
        state.parked.overlapping(range, |parked| tickets.push(parked.value.value));
        for ticket in tickets {
            match state.help(ticket, |parking, _| parking.pending.iter().any(&of)) {
                Help::Leased(work) => leases.push(Lease::new(self, ticket, work)),
                Help::Unclaimed => unpolled.extend(state.cut_unclaimed(ticket, &of, outbox)),
                Help::Gone | Help::Busy => {}
            }
        }
        Found { leases, unpolled }
    }

    /// Ends the passes that were found, without the lock.
    fn end(&self, found: Option<Found<'_>>) {
        let Some(Found { leases, unpolled }) = found else { return };
        leases.into_iter().for_each(Lease::cut);
        unpolled.into_iter().for_each(|unpolled| unpolled.discard(&self.host));
    }

    fn report_fenced(&self, entry: EntryRef, passes: usize) {
        let name = entry.name(&self.host.losses);
        self.host.losses.report(&Report::Fenced { notifier: &name, range: entry.range, passes });
    }

    /// Drops the passes of fenced notifiers of an invalidation, if that is parked.
    pub(super) fn cut(&self, ticket: Ticket) {
        let lease = self.with(|state, _| match state.help(ticket, |_, _| true) {
            Help::Leased(work) => Some(Lease::new(self, ticket, work)),
            Help::Gone | Help::Unclaimed | Help::Busy => None,
        });
        if let Some(lease) = lease {
            lease.cut();
        }
    }
}
