//! What a space says of itself: what is active, and what has happened.
#![forbid(unsafe_code)]

use super::AddressSpace;
use crate::engine::held::Held;
use crate::entry::EntryRef;
use crate::event::Event;
use crate::index::Ordered;
use crate::notifier::{NotifierId, Sequence};
use crate::range::{AddressRange, RangeSet};
use crate::sync::Ordering;
use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::time::Duration;

/// How far an active invalidation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Its first passes run at this moment.
    FirstPasses,
    /// Passes are pending; see [`ActiveInvalidation::pending`].
    Passes,
    /// All its passes are done and its future has to be polled to take the guard.
    Unclaimed,
    /// Somebody holds its guard.
    Held,
}

/// One active invalidation, as [`AddressSpace::active`] lists it (C6).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ActiveInvalidation {
    /// What is under invalidation, from the first address to the last one.
    pub range: AddressRange,
    /// The same without the gaps: one range, or those of
    /// [`AddressSpace::invalidate_all`].
    pub ranges: RangeSet,
    /// Why.
    pub event: Event,
    /// Whether it may wait.
    pub blockable: bool,
    /// The sequence of its passes.
    pub sequence: Sequence,
    /// How far it is.
    pub phase: Phase,
    /// The future that started it is gone; it ends by itself when its passes are done.
    pub abandoned: bool,
    /// How long it has been active. Exact in a space with a [clock](crate::Builder::clock).
    /// Otherwise the time since its passes became pending, or for an invalidation that never had to
    /// wait, since it was first listed here: a lower bound. `None` without `std` and clock.
    pub age: Option<Duration>,
    /// Names of the notifiers whose passes are pending.
    pub pending: Vec<Cow<'static, str>>,
    /// The [ids](crate::Subscription::id) of the same notifiers, in the same order: to find the
    /// device that a name speaks of, and [fence](crate::Subscription::fence) it. With a [pass
    /// budget](crate::Builder::pass_budget) some of them may be well, as their passes wait for
    /// their first poll behind another one; and so may those whose passes nobody polls: poll
    /// [`drain`](AddressSpace::drain) once before the look.
    pub pending_ids: Vec<NotifierId>,
}

/// What happened in a space so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Invalidations that were started.
    pub invalidations: u64,
    /// Times that a reader's check said that its notifier was invalidated.
    pub collisions: u64,
    /// Times that [`DriverLock::mirror`](crate::DriverLock::mirror) started over; of
    /// [`mirror_all`](crate::DriverLock::mirror_all) each range that did.
    pub retries: u64,
    /// Times that a reader had to wait for an invalidation (a pause is not counted).
    pub waits: u64,
    /// The longest that an invalidation was active, of those that were timed: all in a space with a
    /// [clock](crate::Builder::clock); otherwise those whose passes were still pending when they
    /// had been polled twice, from then on, and those that [`AddressSpace::active`] listed. `None`
    /// before the first.
    pub longest: Option<Duration>,
    /// Invalidations that were ended on behalf of a future that was not polled, and started over if
    /// it was polled again (C4).
    pub lapses: u64,
    /// Invalidations whose future was dropped, or that could not wait, while passes were pending
    /// (C2, B3).
    pub abandoned: u64,
    /// First passes that answered `WouldBlock` in a blockable invalidation: a driver's bug (B1).
    pub refused_blockable: u64,
    /// Notifiers whose devices were cut off ([`Subscription::fence`](crate::Subscription::fence),
    /// L5).
    pub fences: u64,
    /// Panics of code that is not the library's and that had no caller to be resumed in (C5):
    /// passes of abandoned invalidations, wakers, names, the reporter, the clock, observers, and
    /// the further panics of an invalidation whose first one was resumed. Each is
    /// [reported](crate::Report::Panicked), too.
    pub lost_panics: u64,
}

impl AddressSpace {
    /// What happened so far.
    pub fn stats(&self) -> Stats {
        let (counts, invalidations, fences) =
            self.shared.with(|state, _| (state.counts, state.protocol.last_serial(), state.fences));
        let counters = &self.shared.host.counters;
        Stats {
            invalidations,
            collisions: counters.collisions.load(Ordering::Relaxed),
            retries: counters.retries.load(Ordering::Relaxed),
            waits: counters.waits.load(Ordering::Relaxed),
            longest: counts.longest,
            lapses: counts.lapses,
            abandoned: counts.abandoned,
            refused_blockable: counters.refused_blockable.load(Ordering::Relaxed),
            fences,
            lost_panics: self.shared.host.losses.count(),
        }
    }

    /// The invalidations that are active at this moment, in the order in which they started (C6).
    /// Asks the notifiers with pending passes for their [names](crate::IntervalNotifier::name), so
    /// it allocates, and is meant for people and watchdogs.
    pub fn active(&self) -> Vec<ActiveInvalidation> {
        let now = self.shared.now();
        let mut held: Vec<EntryRef> = Vec::new();
        let mut listed = self.shared.with(|state, _| {
            let mut listed = Vec::with_capacity(state.protocol.active().len());
            let mut longest = state.counts.longest;
            let sets = state.protocol.active().sets();
            for (id, active) in state.protocol.active_mut().iter_mut() {
                let since = active.seen_to_last(now).unwrap_or_default();
                if let Some(now) = now {
                    longest = longest.max(Some(now.saturating_sub(since)));
                }
                let from = held.len();
                let calls = self.shared.calls(id, active.extra.calls);
                let parked = active.extra.parked();
                held.extend(parked.iter().flat_map(|parking| parking.pending.iter()));
                let phase = match parked {
                    Some(parking) if parking.stage.unclaimed().is_some() => Phase::Unclaimed,
                    Some(_) => Phase::Passes,
                    None if calls => Phase::FirstPasses,
                    None => Phase::Held,
                };
                let invalidation = ActiveInvalidation {
                    range: active.range,
                    ranges: sets.get(&id.serial()).cloned().unwrap_or_else(|| active.range.into()),
                    event: active.extra.terms.event(active.extra.owner),
                    blockable: active.extra.terms.blockable(),
                    sequence: Sequence(active.sequence),
                    phase,
                    abandoned: parked.is_some_and(|parking| parking.stage.is_abandoned()),
                    age: now.map(|now| now.saturating_sub(since)),
                    pending: Vec::new(),
                    pending_ids: held[from..]
                        .iter()
                        .map(|entry| NotifierId(entry.order()))
                        .collect(),
                };
                listed.push((active.serial(), from..held.len(), invalidation));
            }
            state.counts.longest = longest;
            held.iter().for_each(|entry| entry.hold());
            listed
        });
        // Names are driver code: asked for without the lock, while the holds keep the notifiers
        // alive.
        let held = Held { shared: &self.shared, entries: held };
        for (_, of, invalidation) in &mut listed {
            invalidation.pending = held.entries[of.clone()]
                .iter()
                .map(|entry| entry.name(&self.shared.host.losses))
                .collect();
        }
        drop(held);
        listed.sort_by_key(|(serial, ..)| *serial);
        listed.into_iter().map(|(_, _, invalidation)| invalidation).collect()
    }
}
