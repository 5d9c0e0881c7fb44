//! The range that a caller registers in its turn, and the removal of what is in its way. Used where
//! the device must not hold overlapping registrations.
#![forbid(unsafe_code)]

use super::core::{Core, gone};
use super::device::Device;
use super::entry::Entry;
use super::error::GetError;
use super::life::yield_now;
use super::settings::{Merge, Overlap};
use super::table::{span, touching};
use crate::range::AddressRange;
use crate::sync::{Arc, Ordering, give_turn};
use alloc::vec::Vec;
use core::time::Duration;
use futures::future::join_all;

/// Minimum number of looks before patience is over. Other tasks run between two looks.
const LOOKS: u32 = 16;
/// Number of looks after which patience is over if there is no clock.
const TICKS: u32 = 64;
/// Number of equal readings after which the clock counts as stopped.
const STILL: u32 = 1024;

/// A turn and its place.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) number: u64,
    pub(super) range: AddressRange,
    /// How often the registrations of its caller were given to others.
    pub(super) thefts: u32,
}

/// Clears the way for a registration of `range`, in a turn.
pub(super) struct Way<'a, D: Device> {
    core: &'a Arc<Core<D>>,
    range: AddressRange,
    /// The whole pages of `range`.
    own: AddressRange,
    place: Place,
    merges: bool,
    /// Entries withdrawn for this registration. They belong to the union until their memory
    /// changes.
    taken: Vec<Arc<Entry<D>>>,
    /// The union whose members the device has vouched for (K9).
    vouched: Option<AddressRange>,
}

impl<'a, D: Device> Way<'a, D> {
    pub(super) fn new(core: &'a Arc<Core<D>>, range: AddressRange, place: Place) -> Self {
        let own = core.limits.pages(range);
        // A piece of a larger range is never merged.
        let merges = core.limits.overlap == Overlap::Merge
            && place.range.covers(own)
            && core.limits.fits(place.range);
        Self { core, range, own, place, merges, taken: Vec::new(), vouched: None }
    }

    /// Waits until nothing in the device overlaps the range to be registered, or until another
    /// registration serves the range. Returns that range: the pages if `alone`, otherwise the
    /// union.
    pub(super) async fn make(
        &mut self,
        mut alone: bool,
    ) -> Result<AddressRange, GetError<D::Error>> {
        let mut patience: Option<Patience> = None;
        loop {
            let target = if alone || !self.merges { self.own } else { self.union() };
            self.widen(target);
            let Some(way) = self.core.in_the_way(target, self.range).filter(|way| !way.is_empty())
            else {
                return Ok(target);
            };
            if let Some(lost) = way.iter().find(|entry| entry.is_lost()) {
                if target == self.own {
                    return Err(GetError::Lost { range: lost.range });
                }
                alone = true;
                continue;
            }
            // An attempt that its caller has left is finished first.
            let registering: Vec<_> = way.iter().filter_map(|entry| entry.registering()).collect();
            if !registering.is_empty() {
                drop(way);
                join_all(registering).await;
                continue;
            }
            let kept = way.iter().filter(|entry| entry.is_kept());
            if let Some(thefts) = kept.map(|entry| entry.thefts.load(Ordering::Relaxed)).max()
                && !patience
                    .get_or_insert_with(|| Patience::new(self.core, thefts))
                    .is_over(self.core)
            {
                drop(way);
                yield_now().await;
                continue;
            }
            patience = None;
            for entry in &way {
                if self.core.give_way(entry) && self.merges {
                    self.taken.push(entry.clone());
                }
            }
            if way.iter().all(|entry| entry.leaving().is_none()) {
                yield_now().await;
            }
            gone(way, Entry::is_lost).await;
        }
    }

    /// Returns `true` if the memory of a member of `union` has changed since the last call. That
    /// member no longer belongs to a union.
    pub(super) fn has_changed(&mut self, union: AddressRange) -> bool {
        let changed = |entry: &Arc<Entry<D>>| entry.has_changed() && entry.range.overlaps(union);
        let before = self.taken.len();
        self.taken.retain(|entry| !changed(entry));
        union != self.own && self.taken.len() < before
    }

    /// Returns the pages extended by every registration that overlaps them, including those
    /// withdrawn for this turn. With [`Merge::Touching`], adjacent registrations count as well.
    fn union(&mut self) -> AddressRange {
        loop {
            let union = self.united();
            if self.vouched == Some(union) || union == self.own || !self.core.outdate_all(union) {
                self.vouched = Some(union);
                return union;
            }
        }
    }

    fn united(&self) -> AddressRange {
        let (touches, mut union) = (self.core.limits.merge == Merge::Touching, self.own);
        loop {
            let near = if touches { union } else { self.own };
            let mut wider = hull(union, self.core.united(near));
            for entry in self.taken.iter().filter(|entry| !entry.has_changed() && !entry.is_lost())
            {
                let near = if touches { touching(wider) } else { self.own };
                if entry.range.overlaps(near) {
                    wider = hull(wider, entry.range);
                }
            }
            if wider == union {
                return if self.core.limits.allow(union, self.own) { union } else { self.own };
            }
            union = wider;
        }
    }

    /// Extends the place, so that callers which overlap `target` come later.
    fn widen(&mut self, target: AddressRange) {
        if !self.place.range.covers(target) {
            self.place.range = hull(self.place.range, target);
            self.core.turns.widen(self.place.number, self.place.range);
        }
    }
}

fn hull(one: AddressRange, other: AddressRange) -> AddressRange {
    span(one.start().min(other.start()), one.last().max(other.last()))
}

/// Time in which a caller may pick up its registration before the next caller takes its place: as
/// long as an invalidation may stay unclaimed (C4).
struct Patience {
    whole: Duration,
    passed: Duration,
    shown: Option<Duration>,
    still: u32,
}

impl Patience {
    /// Returns the patience with a caller that lost `thefts` registrations before.
    fn new<D: Device>(core: &Core<D>, thefts: u32) -> Self {
        let shared = core.space.shared();
        let whole = shared.with(|state, _| state.patience.with(thefts));
        Self { whole, passed: Duration::ZERO, shown: shared.now(), still: 0 }
    }

    /// Reads the clock.
    fn is_over<D: Device>(&mut self, core: &Core<D>) -> bool {
        // This thread may be the one that the caller waits for.
        give_turn();
        self.look(core.space.shared().now())
    }

    /// Notes a look while the clock shows `now`. It counts at most `1 / LOOKS` of the time, because
    /// this thread and the caller may both have been held up. Returns `true` if patience is over.
    fn look(&mut self, now: Option<Duration>) -> bool {
        let passed = match (now, self.shown) {
            (Some(now), Some(shown)) if now > shown => {
                self.still = 0;
                (now - shown).min(self.whole / LOOKS)
            }
            (Some(_), _) if self.still < STILL => {
                self.still += 1;
                Duration::ZERO
            }
            _ => (self.whole / TICKS).max(Duration::from_nanos(1)),
        };
        self.shown = now;
        self.passed = self.passed.saturating_add(passed);
        self.passed >= self.whole
    }
}

#[cfg(test)]
mod tests;
