//! Invalidations whose passes are done and that their futures have not claimed yet (C4).
#![forbid(unsafe_code)]

use super::{Patience, Stage, State, Ticket};
use crate::engine::outbox::Outbox;
use core::task::Waker;
use core::time::Duration;

impl State {
    /// Ends an unclaimed invalidation because its future is not polled (C4). The future starts over
    /// if it is polled again. Returns `false` if the invalidation is not unclaimed any more.
    pub(crate) fn lapse(
        &mut self,
        ticket: Ticket,
        now: Option<Duration>,
        outbox: &mut Outbox,
    ) -> bool {
        let Some(parking) = self.parking(ticket) else { return false };
        let Stage::Unclaimed { work, .. } = &parking.stage else { return false };
        work.hits.iter().for_each(|entry| entry.tally().lapsed());
        self.counts.lapses += 1;
        self.end_when_done(ticket, now, outbox);
        true
    }

    /// Counts one more future that waits until an unclaimed invalidation is claimed. Returns the
    /// episode that the future waits for.
    pub(crate) fn await_claim(&mut self, ticket: Ticket) -> Option<u32> {
        let Self { protocol, patience, .. } = self;
        let parking = protocol.get_mut(ticket)?.extra.parked_mut()?;
        let claim = parking.stage.unclaimed()?;
        if parking.awaited.count == 0 {
            patience.begin(ticket, parking.done_at, claim.lapses);
        }
        parking.awaited.count += 1;
        Some(parking.awaited.episode)
    }

    /// Returns whether the episode that a future waits for goes on.
    pub(crate) fn is_awaited(&self, ticket: Ticket, episode: u32) -> bool {
        self.parking(ticket).is_some_and(|parking| {
            parking.stage.unclaimed().is_some() && parking.awaited.episode == episode
        })
    }

    /// Counts one waiting future less.
    pub(crate) fn await_claim_no_more(&mut self, ticket: Ticket, episode: u32) {
        if !self.is_awaited(ticket, episode) {
            return;
        }
        let Some(parking) = self.parking_mut(ticket) else { return };
        parking.awaited.count -= 1;
        if parking.awaited.count == 0 {
            self.patience.end(ticket);
        }
    }

    /// Returns whether it is certain that the task of the future that started `ticket` was polled
    /// and did not poll the future (C4). A waiter was polled `polls` times with `waker`: it is
    /// certain if the future left that waker, and `polls` is high enough.
    pub(crate) fn is_certain(&self, ticket: Ticket, waker: &Waker, polls: u64) -> bool {
        self.parking(ticket).is_some_and(|parking| {
            let claim = parking.stage.unclaimed();
            claim.is_some_and(|claim| polls >= Patience::certain_after(claim.lapses))
                && parking.wakers.is_owned_by(waker)
        })
    }
}
