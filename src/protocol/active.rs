//! The active invalidations: [`ActiveSet`], which keeps them in places and in the crowd.
#![forbid(unsafe_code)]

use super::own;
use crate::index::{IntervalIndex, Numbered, Ranged};
use crate::range::{AddressRange, RangeSet};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// An active invalidation, with the data `extra` that the owner of the protocol keeps beside it.
pub(crate) struct Active<M, X> {
    /// The range; of an invalidation of many ranges, from the first address to the last one.
    pub(crate) range: AddressRange,
    /// The sequence that all passes of the invalidation get. Odd if the invalidation hit a
    /// notifier, meaningless otherwise.
    pub(crate) sequence: u64,
    /// The id with which the invalidation was started. 0 in a place that is free.
    id: u64,
    /// Notifiers that were inserted since the start. The invalidation covers them but does not call
    /// them (S5).
    pub(super) newcomers: Vec<M>,
    pub(crate) extra: X,
}

impl<M, X> Active<M, X> {
    /// Returns the serial, which rises with each start.
    pub(crate) fn serial(&self) -> u64 {
        Id(self.id).serial()
    }

    /// Returns whether this is an active invalidation and not a free place.
    fn is_live(&self) -> bool {
        self.id != 0
    }

    /// Returns whether this is the invalidation `id`, and active.
    #[inline]
    pub(super) fn is(&self, id: Id) -> bool {
        self.id == id.0
    }
}

impl<M: Copy, X> Active<M, X> {
    /// Returns the notifiers that were inserted since the start and are covered.
    pub(crate) fn newcomers(&self) -> impl Iterator<Item = M> {
        self.newcomers.iter().copied()
    }
}

/// Names an invalidation. An id is never used again.
///
/// The upper bits are the serial, which rises with each start. The lower [`PLACE_BITS`] are the
/// place in which the invalidation was started. The invalidation may move from there into the
/// crowd. So the place says only where to look first, and whether the flag of first passes counts
/// (`engine::calls`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Id(pub(super) u64);

/// Number of bits of an [`Id`] that hold the place.
pub(super) const PLACE_BITS: u32 = 6;

impl Id {
    /// Puts an id together.
    pub(super) fn new(serial: u64, place: u32) -> Self {
        Self(serial << PLACE_BITS | u64::from(place))
    }

    /// Makes an id of the number that [`raw`](Self::raw) returned.
    #[inline]
    pub(crate) fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// Returns the id as a number.
    #[inline]
    pub(crate) fn raw(self) -> u64 {
        self.0
    }

    /// Returns the serial.
    #[inline]
    pub(crate) fn serial(self) -> u64 {
        self.0 >> PLACE_BITS
    }

    /// Returns the place in which the invalidation was started. It is [`PLACES`] if the
    /// invalidation was started in the crowd or is known to be there.
    #[inline]
    pub(crate) fn place(self) -> usize {
        (self.0 & ((1 << PLACE_BITS) - 1)) as usize
    }

    /// Returns whether the invalidation was started in a place and is not known to have moved.
    pub(crate) fn has_place(self) -> bool {
        self.place() < PLACES
    }

    /// Returns the id of the same invalidation, known to be in the crowd.
    fn in_crowd(self) -> Self {
        Self::new(self.serial(), PLACES as u32)
    }
}

/// Number of active invalidations that have a place. A place is memory that is filled where it lies
/// and used again.
pub(crate) const PLACES: usize = if cfg!(test) { 4 } else { 32 };

/// The active invalidations.
///
/// The youngest invalidations have places. A map would copy each invalidation in and out, and these
/// copies stall on the stores just made (measured: docs/measurements.md). If no place is free, the
/// oldest invalidation that can be moved goes into the *crowd*. The crowd is a map, so that an
/// invalidation that has ended leaves no memory behind. An interval index beside it finds the
/// invalidations that overlap a range. A long invalidation is moved once. A short one is never
/// moved, however many long ones are active.
pub(crate) struct ActiveSet<M, X> {
    pub(super) places: Vec<Active<M, X>>,
    pub(super) occupancy: Occupancy,
    /// The invalidations without a place, by serial.
    pub(super) crowd: BTreeMap<u64, InCrowd<M, X>>,
    /// The range of each invalidation in the crowd, from its first address to its last.
    crowd_ranges: IntervalIndex<Ranged<Numbered<u64>>>,
    /// How many invalidations have entered the crowd.
    entered: u64,
    /// The ranges of each invalidation of many ranges, by serial. All of these are in the crowd.
    sets: BTreeMap<u64, Set>,
    /// How many invalidations may be active at once.
    pub(super) most: u32,
}

/// The ranges of an invalidation of many ranges.
pub(super) struct Set {
    ranges: RangeSet,
    /// Notifiers inserted from now on are not covered: the changes have all happened, so a new
    /// notifier sees the memory as it is now (N4).
    is_past: bool,
}

/// Which places are free, and how many invalidations are active.
pub(super) struct Occupancy {
    /// One bit for each place that exists and is free.
    free: u32,
    /// Number of active invalidations, with and without a place.
    pub(super) live: u32,
}

/// An invalidation in the crowd.
pub(super) struct InCrowd<M, X> {
    /// Its number among those that entered the crowd, which is its order in the index of these. Not
    /// its serial: an invalidation leaves its place for the crowd when younger ones are there.
    number: u64,
    active: Box<Active<M, X>>,
}

/// The owner's data of an invalidation that has ended.
pub(crate) enum Kept<'a, X> {
    /// The data stays for the next invalidation in this place.
    InPlace(&'a mut X),
    /// The data is not used again. The ranges come with it if there were many. Free both without a
    /// lock.
    Gone(X, Option<RangeSet>),
}

impl<M, X> ActiveSet<M, X> {
    pub(super) fn new() -> Self {
        Self {
            places: Vec::new(),
            occupancy: Occupancy { free: 0, live: 0 },
            crowd: BTreeMap::new(),
            crowd_ranges: IntervalIndex::new(),
            entered: 0,
            sets: BTreeMap::new(),
            most: own::MOST_ACTIVE,
        }
    }

    /// Returns how many invalidations are active.
    pub(crate) fn len(&self) -> usize {
        self.occupancy.live as usize
    }

    /// Returns the invalidation `id`, if it is active.
    pub(crate) fn get(&self, id: Id) -> Option<&Active<M, X>> {
        match self.places.get(id.place()).filter(|active| active.is(id)) {
            None => self.crowd.get(&id.serial()).map(|found| &*found.active),
            found => found,
        }
    }

    /// Returns the invalidation `id`, mutably, if it is active.
    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut Active<M, X>> {
        match self.places.get_mut(id.place()).filter(|active| active.is(id)) {
            None => self.crowd.get_mut(&id.serial()).map(|found| &mut *found.active),
            found => found,
        }
    }

    /// Returns the id of the same invalidation with the place that it has now. The place is
    /// [`PLACES`] if it is in the crowd.
    pub(crate) fn located(&self, id: Id) -> Id {
        if self.places.get(id.place()).is_some_and(|active| active.is(id)) {
            id
        } else {
            id.in_crowd()
        }
    }

    /// Returns the active invalidations.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Id, &Active<M, X>)> {
        let in_places = (0..).zip(&self.places).filter(|(_, active)| active.is_live());
        in_places.map(|(place, active)| (Id::new(active.serial(), place), active)).chain(
            self.crowd
                .iter()
                .map(|(serial, found)| (Id::new(*serial, PLACES as u32), &*found.active)),
        )
    }

    /// Returns the active invalidations, mutably.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (Id, &mut Active<M, X>)> {
        let in_places = (0..).zip(&mut self.places).filter(|(_, active)| active.is_live());
        in_places.map(|(place, active)| (Id::new(active.serial(), place), active)).chain(
            self.crowd
                .iter_mut()
                .map(|(serial, found)| (Id::new(*serial, PLACES as u32), &mut *found.active)),
        )
    }

    /// Returns whether an active invalidation that overlaps `range` is `wanted`. Looks at no more
    /// than [`PLACES`] invalidations that do not overlap it.
    pub(crate) fn any_overlapping(
        &self,
        range: AddressRange,
        mut wanted: impl FnMut(Id, &Active<M, X>) -> bool,
    ) -> bool {
        let overlaps = |active: &Active<M, X>| active.is_live() && active.range.overlaps(range);
        let mut in_places = (0..).zip(&self.places).filter(|(_, active)| overlaps(active));
        let mut any =
            in_places.any(|(place, active)| wanted(Id::new(active.serial(), place), active));
        if !any {
            self.crowd_ranges.overlapping(range, |found| {
                let serial = found.value.value;
                let id = Id::new(serial, PLACES as u32);
                let overlaps = || overlaps_set(&self.sets, serial, range);
                any = any
                    || overlaps()
                        && self.crowd.get(&serial).is_some_and(|found| wanted(id, &found.active));
            });
        }
        any
    }

    /// Calls `each` with the active invalidations that cover a notifier inserted for `range` (S5,
    /// N4).
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
            crowd_ranges.overlapping(range, |found| {
                let serial = found.value.value;
                if overlaps_set(sets, serial, range)
                    && sets.get(&serial).is_none_or(|set| !set.is_past)
                    && let Some(found) = crowd.get_mut(&serial)
                {
                    each(&mut found.active);
                }
            });
        }
    }

    /// Returns the ranges of each invalidation of many ranges, by serial.
    pub(crate) fn sets(&self) -> BTreeMap<u64, RangeSet> {
        self.sets.iter().map(|(serial, set)| (*serial, set.ranges.clone())).collect()
    }

    /// Returns whether invalidation `id` overlaps `range` with one of its ranges and not only with
    /// a gap. The hull of its ranges must overlap `range`.
    pub(crate) fn overlaps(&self, id: Id, range: AddressRange) -> bool {
        overlaps_set(&self.sets, id.serial(), range)
    }

    /// Adds an active invalidation of `range`: in a free place, in a place that is made or vacated
    /// for it, or else in the crowd. `first` is its id, with place 0.
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
        if self.occupancy.free == 0 && !self.make_room(is_movable) {
            return self.take_in_crowd(Id(first).serial(), range);
        }
        let place = self.occupancy.free.trailing_zeros();
        let active = &mut self.places[place as usize];
        let id = Id(first | u64::from(place));
        active.range = range;
        active.id = id.0;
        self.occupancy.free &= self.occupancy.free - 1;
        self.occupancy.live += 1;
        (id, active)
    }

    /// Makes a free place: adds one, or moves the oldest movable invalidation to the crowd. Returns
    /// whether there is one.
    ///
    /// # Panics
    /// When one more invalidation would be more than can be counted. Nothing has changed then.
    #[cold]
    #[inline(never)]
    fn make_room(&mut self, is_movable: impl Fn(Id) -> bool) -> bool
    where
        X: Default,
    {
        if self.places.len() < PLACES {
            self.occupancy.free = 1 << self.places.len();
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
        self.occupancy.free = 1 << place;
        self.enter_crowd(Box::new(active));
        true
    }

    /// Panics if one more invalidation would be more than can be counted.
    pub(super) fn assert_room(&self) {
        assert!(
            self.occupancy.live < self.most,
            "{} invalidations are active at once: drop the guards of those that have ended",
            self.occupancy.live
        );
    }

    /// Adds an active invalidation of `range` to the crowd.
    #[cold]
    #[inline(never)]
    fn take_in_crowd(&mut self, serial: u64, range: AddressRange) -> (Id, &mut Active<M, X>)
    where
        X: Default,
    {
        self.occupancy.live += 1;
        let id = Id::new(serial, PLACES as u32);
        (id, self.enter_crowd(Box::new(Active::new(range, id))))
    }

    /// Returns how many ranges the index of the crowd holds.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn indexed(&self) -> usize {
        self.crowd_ranges.len()
    }

    /// Puts an invalidation into the crowd.
    fn enter_crowd(&mut self, active: Box<Active<M, X>>) -> &mut Active<M, X> {
        self.entered += 1;
        let (number, serial) = (self.entered, active.serial());
        let numbered = Numbered { number, value: serial };
        self.crowd_ranges.insert(Ranged { range: active.range, value: numbered });
        &mut self.crowd.entry(serial).or_insert(InCrowd { number, active }).active
    }

    /// Adds an active invalidation of many ranges to the crowd.
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

    /// Removes and returns the ranges of an invalidation that leaves the crowd, if it has many.
    pub(super) fn take_set(&mut self, id: Id) -> Option<RangeSet> {
        self.sets.remove(&id.serial()).map(|set| set.ranges)
    }

    /// Removes invalidation `id` from the crowd.
    pub(super) fn leave_crowd(&mut self, id: Id) -> Option<Box<Active<M, X>>> {
        let InCrowd { number, active } = self.crowd.remove(&id.serial())?;
        let numbered = Numbered { number, value: id.serial() };
        let found = self.crowd_ranges.remove(Ranged { range: active.range, value: numbered });
        debug_assert!(found, "the index has each invalidation of the crowd");
        self.occupancy.live -= 1;
        if self.crowd.is_empty() {
            // This also frees the memory of the index.
            self.crowd_ranges = IntervalIndex::new();
        }
        Some(active)
    }
}

impl<M, X: Default> Active<M, X> {
    /// Makes an invalidation that has not started, or a free place if `id` is 0.
    pub(super) fn new(range: AddressRange, id: Id) -> Self {
        Self { range, sequence: 0, id: id.0, newcomers: Vec::new(), extra: X::default() }
    }
}

/// Returns whether one of the ranges of an invalidation in the crowd overlaps `range`. Its hull
/// must overlap `range`.
fn overlaps_set(sets: &BTreeMap<u64, Set>, serial: u64, range: AddressRange) -> bool {
    sets.get(&serial).is_none_or(|set| set.ranges.overlaps(range))
}

/// Frees the place of invalidation `id`. Returns how many invalidations remain active.
#[inline]
pub(super) fn release<M, X>(active: &mut Active<M, X>, occupancy: &mut Occupancy, id: Id) -> u32 {
    active.id = 0;
    occupancy.free |= 1 << id.place();
    occupancy.live -= 1;
    occupancy.live
}
