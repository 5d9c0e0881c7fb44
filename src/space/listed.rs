//! Observation of a space: its active invalidations and its counters.
#![forbid(unsafe_code)]

use super::AddressSpace;
use crate::engine::pinned::Pinned;
use crate::entry::EntryRef;
use crate::event::Event;
use crate::index::Ordered;
use crate::notifier::{NotifierId, Sequence};
use crate::range::{AddressRange, RangeSet};
use crate::sync::Ordering;
use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::time::Duration;

/// Tells how far an active invalidation is: a field of [`ActiveInvalidation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Its first passes are being called.
    FirstPasses,
    /// Passes are pending: [`ActiveInvalidation::pending`] has their names.
    Passes,
    /// All passes are done. The future must be polled to take the guard.
    Unclaimed,
    /// Its guard exists.
    Held,
}

/// Describes one active invalidation: an element of [`AddressSpace::active`] ([C6]).
///
/// [C6]: crate::docs::contract#c-cancellation-panics-stalls
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ActiveInvalidation {
    /// The range under invalidation, from the first address to the last one.
    pub range: AddressRange,
    /// The ranges under invalidation, without the gaps between them. There is one range, or those
    /// of [`AddressSpace::invalidate_all`].
    pub ranges: RangeSet,
    /// The reason.
    pub event: Event,
    /// `true` if it may wait; `false` for [`AddressSpace::try_invalidate`].
    pub blockable: bool,
    /// The odd sequence that all its passes have ([S2]).
    ///
    /// [S2]: crate::docs::contract#s-sequence
    pub sequence: Sequence,
    /// Its progress.
    pub phase: Phase,
    /// `true` if the future that started it is gone. Then it ends when its passes are done.
    pub abandoned: bool,
    /// The time that it has been active.
    ///
    /// The age is exact in a space with a [clock](crate::Builder::clock). Otherwise it is a lower
    /// bound: the time since its passes became pending, or, if it never had to wait, since it was
    /// first listed. It is `None` without `std` and without a clock.
    pub age: Option<Duration>,
    /// [Names](crate::IntervalNotifier::name) of the notifiers whose passes are pending.
    pub pending: Vec<Cow<'static, str>>,
    /// [Ids](crate::Subscription::id) of the notifiers in `pending`, in the same order.
    ///
    /// An id finds the device, and [fences](AddressSpace::fence) it. A notifier in the list may be
    /// healthy in two cases. With a [pass budget](crate::Builder::pass_budget), its pass may wait
    /// for its first poll behind another pass. And a pass that is done stays in the list until it
    /// is polled: poll [`drain`](AddressSpace::drain) once before you look.
    pub pending_ids: Vec<NotifierId>,
}

/// Counts what happened in a space: the result of [`AddressSpace::stats`].
///
/// [`NotifierStats`](crate::NotifierStats) has the counts of one notifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Invalidations that were started. An invalidation that [lapsed](Self::lapses) and started
    /// over is counted again.
    pub invalidations: u64,
    /// Checks of readers that failed because the notifier was invalidated.
    pub collisions: u64,
    /// Times that [`DriverLock::mirror`](crate::DriverLock::mirror) started over. In
    /// [`mirror_all`](crate::DriverLock::mirror_all) each range that starts over counts.
    pub retries: u64,
    /// Times that a reader had to wait for an invalidation. A pause is not counted.
    pub waits: u64,
    /// The longest time that a *timed* invalidation was active; `None` before the first.
    ///
    /// In a space with a [clock](crate::Builder::clock) every invalidation is timed, from its
    /// start. Otherwise an invalidation is timed if its passes are still pending after two polls,
    /// or if [`AddressSpace::active`] lists it, and from that moment on.
    pub longest: Option<Duration>,
    /// Invalidations that the library ended on behalf of a future that was not polled ([C4]). Such
    /// an invalidation starts over when the future is polled again.
    ///
    /// [C4]: crate::docs::contract#c-cancellation-panics-stalls
    pub lapses: u64,
    /// Invalidations that left pending passes to the space, because the future was dropped ([C2])
    /// or could not wait ([B3]).
    ///
    /// [B3]: crate::docs::contract#b-blocking-and-non-blocking
    /// [C2]: crate::docs::contract#c-cancellation-panics-stalls
    pub abandoned: u64,
    /// First passes that returned `WouldBlock` in a blockable invalidation, which is a driver's bug
    /// ([B1]).
    ///
    /// [B1]: crate::docs::contract#b-blocking-and-non-blocking
    pub refused_blockable: u64,
    /// Notifiers that were [fenced](crate::Subscription::fence), because their devices were cut off
    /// ([L5]).
    ///
    /// [L5]: crate::docs::contract#l-life-cycle-and-progress-stronger-than-the-kernel
    pub fences: u64,
    /// Panics of foreign code that had no caller to be resumed in ([C5]).
    ///
    /// Such panics come from passes of abandoned invalidations, wakers, names, the reporter, the
    /// clock and observers. The further panics of an invalidation whose first panic was resumed
    /// count, too. Each is [reported](crate::Report::Panicked).
    ///
    /// [C5]: crate::docs::contract#c-cancellation-panics-stalls
    pub lost_panics: u64,
}

impl AddressSpace {
    /// Returns the counts of what happened in the space so far.
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

    /// Lists the active invalidations, in the order in which they started ([C6]).
    ///
    /// It asks the notifiers with pending passes for their
    /// [names](crate::IntervalNotifier::name), and it allocates. It is meant for people and
    /// watchdogs.
    ///
    /// ```
    /// # use shootdown::{AddressRange, AddressSpace, Event, Phase};
    /// # futures::executor::block_on(async {
    /// # let space = AddressSpace::new();
    /// # let range = AddressRange::new(0x1000, 0x1000)?;
    /// let guard = space.invalidate(range, Event::Unmap).await;
    /// for active in space.active() {
    ///     assert_eq!((active.range, active.phase), (range, Phase::Held));
    /// }
    /// drop(guard);
    /// # Ok::<(), shootdown::RangeError>(()) }).unwrap();
    /// ```
    ///
    /// [C6]: crate::docs::contract#c-cancellation-panics-stalls
    pub fn active(&self) -> Vec<ActiveInvalidation> {
        let now = self.shared.now();
        let mut held: Vec<EntryRef> = Vec::new();
        let mut listed = self.shared.with(|state, _| {
            let mut listed = Vec::with_capacity(state.protocol.active().len());
            let mut longest = state.counts.longest;
            let sets = state.protocol.active().sets();
            for (id, active) in state.protocol.active_mut().iter_mut() {
                let since = active.since_or(now).unwrap_or_default();
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
        // C8: names are driver code, so they are asked for without the lock. The holds keep the
        // notifiers alive.
        let pinned = Pinned { shared: &self.shared, entries: held };
        for (_, of, invalidation) in &mut listed {
            invalidation.pending = pinned.entries[of.clone()]
                .iter()
                .map(|entry| entry.name(&self.shared.host.losses))
                .collect();
        }
        drop(pinned);
        listed.sort_by_key(|(serial, ..)| *serial);
        listed.into_iter().map(|(_, _, invalidation)| invalidation).collect()
    }
}
