//! What a caller in its turn registers, and what it takes out of its way, where the device may have
//! no two registrations that overlap.
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

/// So many looks at least, one after the other, before patience is over: in between the others had
/// their turn.
const LOOKS: u32 = 16;
/// Where there is no clock, patience is over after this many looks.
const TICKS: u32 = 64;
/// A clock that shows no later time this often in a row is taken to stand still.
const STILL: u32 = 1024;

/// A turn, and the place that it has.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) number: u64,
    pub(super) range: AddressRange,
    /// How often what was registered for its caller was given to others.
    pub(super) thefts: u32,
}

/// The way to a registration of `range`, in a turn.
pub(super) struct Way<'a, D: Device> {
    core: &'a Arc<Core<D>>,
    range: AddressRange,
    /// Its pages.
    own: AddressRange,
    place: Place,
    merges: bool,
    /// What was taken away for this, and belongs to the union as long as its memory has not
    /// changed.
    taken: Vec<Arc<Entry<D>>>,
    /// The union whose members the device has vouched for.
    vouched: Option<AddressRange>,
}

impl<'a, D: Device> Way<'a, D> {
    pub(super) fn new(core: &'a Arc<Core<D>>, range: AddressRange, place: Place) -> Self {
        let own = core.limits.pages(range);
        // Pieces are what they are.
        let merges = core.limits.overlap == Overlap::Merge
            && place.range.covers(own)
            && core.limits.fits(place.range);
        Self { core, range, own, place, merges, taken: Vec::new(), vouched: None }
    }

    /// Waits until nothing of the device overlaps what may be registered, or something will do for
    /// the range already. Returns what may be registered: the pages `alone`, or the union.
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
                if way.iter().any(|entry| entry.is_lost() && entry.range.overlaps(self.own))
                    || alone
                {
                    return Err(GetError::Lost { range: lost.range });
                }
                alone = true;
                continue;
            }
            // What its caller has left is finished first.
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

    /// Whether memory of what `union` was made of has changed since this was asked: it belongs to
    /// none any more.
    pub(super) fn has_changed(&mut self, union: AddressRange) -> bool {
        let changed = |entry: &Arc<Entry<D>>| entry.has_changed() && entry.range.overlaps(union);
        let before = self.taken.len();
        self.taken.retain(|entry| !changed(entry));
        union != self.own && self.taken.len() < before
    }

    /// The pages with all that overlaps them, or touches them where that merges: what is
    /// registered, and what was until it was taken away for this.
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

    /// Those whose ranges overlap what is to be registered come later.
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

/// How long a caller has to take what was registered for it, before the next one that needs the
/// place takes it away: as long as an invalidation has to be claimed (C4).
struct Patience {
    whole: Duration,
    passed: Duration,
    shown: Option<Duration>,
    still: u32,
}

impl Patience {
    /// With a caller from whom so much was taken before.
    fn new<D: Device>(core: &Core<D>, thefts: u32) -> Self {
        let shared = core.space.shared();
        let whole = shared.with(|state, _| state.patience.with(thefts));
        Self { whole, passed: Duration::ZERO, shown: shared.now(), still: 0 }
    }

    /// Looks at the clock. A look counts only so much: who looks may have been held up, and the
    /// caller as well.
    fn is_over<D: Device>(&mut self, core: &Core<D>) -> bool {
        // It may be what the caller waits for.
        give_turn();
        let now = core.space.shared().now();
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
