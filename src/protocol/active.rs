//! The active invalidations: those that have a place, and the crowd.
#![forbid(unsafe_code)]

use super::own;
use crate::index::{IntervalIndex, Ordered, Ranged};
use crate::range::{AddressRange, RangeSet};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// An active invalidation, with whatever its owner keeps beside it.
pub(crate) struct Active<M, X> {
    pub(crate) range: AddressRange,
    /// The sequence that all its passes get; odd if it hit a notifier, meaningless otherwise.
    pub(crate) sequence: u64,
    /// The id with which it was started; 0 when it is not active.
    id: u64,
    /// Notifiers inserted since it started, which it covers but does not call (S5).
    pub(super) late: Vec<M>,
    pub(crate) extra: X,
}

impl<M, X> Active<M, X> {
    /// Tells this invalidation from an earlier one with the same id; rises with each start.
    pub(crate) fn serial(&self) -> u64 {
        Id(self.id).serial()
    }

    fn is_live(&self) -> bool {
        self.id != 0
    }

    /// Whether it is the invalidation `id`, and active.
    #[inline(always)]
    pub(super) fn is(&self, id: Id) -> bool {
        self.id == id.0
    }
}

impl<M: Copy, X> Active<M, X> {
    pub(crate) fn late(&self) -> impl Iterator<Item = M> {
        self.late.iter().copied()
    }
}

/// Names an invalidation for ever: its serial, which rises with each start, and below that the
/// place in which it was started.
///
/// It may be moved from there into the crowd, so the place says where to look first, and whether to
/// believe its flag of first passes (`engine::calls`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Id(pub(super) u64);

/// Bits of an id for the place.
pub(super) const PLACE_BITS: u32 = 6;

impl Id {
    pub(super) fn new(serial: u64, place: u32) -> Self {
        Self(serial << PLACE_BITS | u64::from(place))
    }

    /// An id from its number.
    #[inline(always)]
    pub(crate) fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    #[inline(always)]
    pub(crate) fn raw(self) -> u64 {
        self.0
    }

    #[inline(always)]
    pub(crate) fn serial(self) -> u64 {
        self.0 >> PLACE_BITS
    }

    /// The place in which it was started, at least [`PLACES`] if it was started in the crowd or is
    /// known to be there.
    #[inline(always)]
    pub(crate) fn place(self) -> usize {
        (self.0 & ((1 << PLACE_BITS) - 1)) as usize
    }

    /// Whether it was started in a place, and is not known to have been moved.
    pub(crate) fn has_place(self) -> bool {
        self.place() < PLACES
    }

    fn in_crowd(self) -> Self {
        Self::new(self.serial(), PLACES as u32)
    }
}

/// How many active invalidations have a place that is filled and used again where it lies.
pub(crate) const PLACES: usize = if cfg!(test) { 4 } else { 32 };

/// The active invalidations.
///
/// The youngest have places; a map would move each in and out, and those copies stall on the stores
/// just made and took a quarter of a short invalidation. When there is no place left the oldest
/// that can be moved goes into the *crowd*: a map, so that what it took is free again when it has
/// ended, and an interval index, so that what asks for those that overlap a range does not ask all.
/// An invalidation that lasts is moved once; one that is short never is, however many last.
pub(crate) struct ActiveSet<M, X> {
    pub(super) places: Vec<Active<M, X>>,
    pub(super) heads: Heads,
    /// By serial.
    pub(super) crowd: BTreeMap<u64, Box<Active<M, X>>>,
    /// From the first address of each to its last.
    crowd_ranges: IntervalIndex<Ranged<InCrowd>>,
    /// Of those in the crowd that have gaps, the ranges. By serial.
    sets: BTreeMap<u64, Set>,
    /// How many may be active at once.
    pub(super) most: u32,
}

/// The ranges of an invalidation of many.
pub(super) struct Set {
    ranges: RangeSet,
    /// Who is inserted from now on is not covered: what has changed is not seen any more (N4).
    is_past: bool,
}

/// The places that are free, and how many invalidations are active.
pub(super) struct Heads {
    /// A bit for each place that exists and is free.
    free: u32,
    pub(super) live: u32,
}

/// The serial of one in the crowd.
#[derive(Clone, Copy, PartialEq)]
struct InCrowd(u64);

impl Ordered for InCrowd {
    fn order(self) -> u64 {
        self.0
    }
}

/// What the owner of the protocol keeps beside an invalidation that has ended.
pub(crate) enum Kept<'a, X> {
    /// It stays for the next one in this place.
    InPlace(&'a mut X),
    /// Nobody will use it again. With the ranges, if there were many, to be freed without a lock.
    Gone(X, Option<RangeSet>),
}

impl<M, X> ActiveSet<M, X> {
    pub(super) fn new() -> Self {
        Self {
            places: Vec::new(),
            heads: Heads { free: 0, live: 0 },
            crowd: BTreeMap::new(),
            crowd_ranges: IntervalIndex::new(),
            sets: BTreeMap::new(),
            most: own::MOST_ACTIVE,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.heads.live as usize
    }

    pub(crate) fn get(&self, id: Id) -> Option<&Active<M, X>> {
        match self.places.get(id.place()).filter(|active| active.is(id)) {
            None => self.crowd.get(&id.serial()).map(|active| &**active),
            found => found,
        }
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut Active<M, X>> {
        match self.places.get_mut(id.place()).filter(|active| active.is(id)) {
            None => self.crowd.get_mut(&id.serial()).map(|active| &mut **active),
            found => found,
        }
    }

    /// The id, with what is known of where the invalidation is.
    pub(crate) fn located(&self, id: Id) -> Id {
        if self.places.get(id.place()).is_some_and(|active| active.is(id)) {
            id
        } else {
            id.in_crowd()
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Id, &Active<M, X>)> {
        let in_places = (0..).zip(&self.places).filter(|(_, active)| active.is_live());
        in_places.map(|(place, active)| (Id::new(active.serial(), place), active)).chain(
            self.crowd.iter().map(|(serial, active)| (Id::new(*serial, PLACES as u32), &**active)),
        )
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (Id, &mut Active<M, X>)> {
        let in_places = (0..).zip(&mut self.places).filter(|(_, active)| active.is_live());
        in_places.map(|(place, active)| (Id::new(active.serial(), place), active)).chain(
            self.crowd
                .iter_mut()
                .map(|(serial, active)| (Id::new(*serial, PLACES as u32), &mut **active)),
        )
    }

    /// Whether one of those that overlap `range` is as `wanted`. Looks at no more than [`PLACES`]
    /// others.
    pub(crate) fn any_overlapping(
        &self,
        range: AddressRange,
        mut wanted: impl FnMut(Id, &Active<M, X>) -> bool,
    ) -> bool {
        let overlaps = |active: &Active<M, X>| active.is_live() && active.range.overlaps(range);
        let mut in_places = (0..).zip(&self.places).filter(|(_, active)| overlaps(active));
        let mut any =
            in_places.any(|(place, active)| wanted(Id::new(active.serial(), place), active));
        if !any && !self.crowd.is_empty() {
            self.crowd_ranges.overlapping(range, |Ranged { value: InCrowd(serial), .. }| {
                let id = Id::new(serial, PLACES as u32);
                let overlaps = || overlaps_set(&self.sets, serial, range);
                any = any
                    || overlaps()
                        && self.crowd.get(&serial).is_some_and(|active| wanted(id, active));
            });
        }
        any
    }

    /// Those that cover who is inserted into `range`.
    pub(super) fn for_overlapping(
        &mut self,
        range: AddressRange,
        mut each: impl FnMut(&mut Active<M, X>),
    ) {
        self.places
            .iter_mut()
            .filter(|active| active.is_live() && active.range.overlaps(range))
            .for_each(&mut each);
        if !self.crowd.is_empty() {
            let Self { crowd, crowd_ranges, sets, .. } = self;
            crowd_ranges.overlapping(range, |Ranged { value: InCrowd(serial), .. }| {
                if overlaps_set(sets, serial, range)
                    && sets.get(&serial).is_none_or(|set| !set.is_past)
                    && let Some(active) = crowd.get_mut(&serial)
                {
                    each(active);
                }
            });
        }
    }

    /// The ranges of each invalidation of many ranges, by serial.
    pub(crate) fn sets(&self) -> BTreeMap<u64, RangeSet> {
        self.sets.iter().map(|(serial, set)| (*serial, set.ranges.clone())).collect()
    }

    /// Whether one that overlaps `range` from its first address to its last does so in truth.
    pub(crate) fn overlaps(&self, id: Id, range: AddressRange) -> bool {
        overlaps_set(&self.sets, id.serial(), range)
    }

    /// A place that was free and is live now, made or vacated if there was none, or one in the
    /// crowd. `first` is the id that it would have in place 0.
    #[inline(always)]
    pub(super) fn take(
        &mut self,
        first: u64,
        range: AddressRange,
        is_movable: impl Fn(Id) -> bool,
    ) -> (Id, &mut Active<M, X>)
    where
        X: Default,
    {
        if self.heads.free == 0 && !self.make_room(is_movable) {
            return self.take_in_crowd(Id(first).serial(), range);
        }
        let place = self.heads.free.trailing_zeros();
        let active = &mut self.places[place as usize];
        let id = Id(first | u64::from(place));
        active.range = range;
        active.id = id.0;
        self.heads.free &= self.heads.free - 1;
        self.heads.live += 1;
        (id, active)
    }

    /// Sees to it that there is a free place. Returns whether there is one.
    #[cold]
    #[inline(never)]
    fn make_room(&mut self, is_movable: impl Fn(Id) -> bool) -> bool
    where
        X: Default,
    {
        if self.places.len() < PLACES {
            self.heads.free = 1 << self.places.len();
            self.places.push(Active::new(AddressRange::ALL, Id(0)));
            return true;
        }
        self.assert_room();
        let movable = (0..)
            .zip(&self.places)
            .filter(|(place, active)| is_movable(Id::new(active.serial(), *place)));
        let Some((place, _)) = movable.min_by_key(|(_, active)| active.serial()) else {
            return false;
        };
        let active = core::mem::replace(
            &mut self.places[place as usize],
            Active::new(AddressRange::ALL, Id(0)),
        );
        self.heads.free = 1 << place;
        self.crowd_ranges.insert(Ranged { range: active.range, value: InCrowd(active.serial()) });
        self.crowd.insert(active.serial(), Box::new(active));
        true
    }

    /// Panics before anything has changed if one more would be more than can be counted.
    pub(super) fn assert_room(&self) {
        assert!(
            self.heads.live < self.most,
            "{} invalidations are active at once: drop the guards of those that have ended",
            self.heads.live
        );
    }

    #[cold]
    #[inline(never)]
    fn take_in_crowd(&mut self, serial: u64, range: AddressRange) -> (Id, &mut Active<M, X>)
    where
        X: Default,
    {
        self.heads.live += 1;
        self.crowd_ranges.insert(Ranged { range, value: InCrowd(serial) });
        let id = Id::new(serial, PLACES as u32);
        (id, self.crowd.entry(serial).or_insert_with(|| Box::new(Active::new(range, id))))
    }

    /// One in the crowd, live, that has gaps.
    pub(super) fn take_set_in_crowd(
        &mut self,
        serial: u64,
        set: &RangeSet,
        is_past: bool,
    ) -> (Id, &mut Active<M, X>)
    where
        X: Default,
    {
        self.sets.insert(serial, Set { ranges: set.clone(), is_past });
        self.take_in_crowd(serial, set.hull())
    }

    /// The ranges of one that leaves the crowd, if it has many.
    pub(super) fn take_set(&mut self, id: Id) -> Option<RangeSet> {
        self.sets.remove(&id.serial()).map(|set| set.ranges)
    }

    /// Takes one out of the crowd.
    pub(super) fn leave_crowd(&mut self, id: Id) -> Option<Box<Active<M, X>>> {
        let active = self.crowd.remove(&id.serial())?;
        let known = Ranged { range: active.range, value: InCrowd(id.serial()) };
        let found = self.crowd_ranges.remove(known);
        debug_assert!(found, "the index has each invalidation of the crowd");
        self.heads.live -= 1;
        if self.crowd.is_empty() {
            // Also the memory of the index.
            self.crowd_ranges = IntervalIndex::new();
        }
        Some(active)
    }
}

impl<M, X: Default> Active<M, X> {
    pub(super) fn new(range: AddressRange, id: Id) -> Self {
        Self { range, sequence: 0, id: id.0, late: Vec::new(), extra: X::default() }
    }
}

/// Whether one of the ranges of an invalidation in the crowd overlaps `range`, which its hull does.
fn overlaps_set(sets: &BTreeMap<u64, Set>, serial: u64, range: AddressRange) -> bool {
    sets.get(&serial).is_none_or(|set| set.ranges.overlaps(range))
}

/// The place of an invalidation is free again. Returns how many remain active.
#[inline(always)]
pub(super) fn release<M, X>(active: &mut Active<M, X>, heads: &mut Heads, id: Id) -> u32 {
    active.id = 0;
    heads.free |= 1 << id.place();
    heads.live -= 1;
    heads.live
}
