//! The table of a cache: look-up, attempts, and the order of eviction.
//!
//! It knows ranges and stores references; it knows neither devices nor futures. Its caller drops
//! what it returns, outside of the lock around it.
#![forbid(unsafe_code)]

use crate::index::{IntervalIndex, Ordered, Ranged};
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicU64, Ordering};
use alloc::collections::btree_map::Entry;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::num::NonZeroU64;
use core::ops::Bound;
use slab::Slab;

/// Slot of an entry. Slots are reused; `serial` tells the entries apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// Never 0. The niche keeps an element of the index as small as a key.
    serial: NonZeroU64,
    slot: u32,
}

impl Key {
    fn slot(self) -> usize {
        self.slot as usize
    }
}

impl Ordered for Key {
    fn order(self) -> u64 {
        self.serial.get()
    }
}

/// A registration that look-ups find.
pub(super) trait Found {
    /// Returns the time of the last use, by a clock that rises with each miss.
    fn used(&self) -> &AtomicU64;
}

/// Number of busy registrations in a row after which a limit stops its search for an idle one.
const LOOKS: u32 = 8;

/// Entries `E` by key, and the registrations `L` that look-ups find. The lock around it is the
/// caller's.
pub(super) struct Table<E, L> {
    /// Ranges of the live registrations. The keys in it have serials of their own, which rise with
    /// each insertion.
    live: IntervalIndex<Ranged<Key>>,
    /// The live registrations, by slot. Holds all that a look-up needs, close together.
    lives: Vec<Option<Arc<L>>>,
    /// Ranges of the attempts.
    attempts: IntervalIndex<Ranged<Key>>,
    /// Ranges of all entries until they are forgotten. `Some` if registrations must not overlap.
    held: Option<IntervalIndex<Ranged<Key>>>,
    /// Live registrations by exact range. `Some` with exact matching.
    ranges: Option<BTreeMap<(u64, u64), Key>>,
    /// Entries that look-ups no longer find, or never found. Usually few.
    leaving: BTreeSet<Key>,
    slots: Slab<Slot<E>>,
    /// Serial of the next key.
    serial: NonZeroU64,
    /// Order of eviction. `Some` if there are limits.
    queue: Option<Queue>,
    bytes: u128,
    count: usize,
}

struct Slot<E> {
    key: Key,
    range: AddressRange,
    entry: Arc<E>,
    stage: Stage,
}

/// Which index of the table an entry is in.
#[derive(Clone, Copy)]
enum Stage {
    /// The device is to register or registers it.
    Attempt,
    /// Live, with its key in `live`, and the last use as recorded in the queue.
    Live(Key, u64),
    /// Withdrawn from look-ups. The device may still hold it.
    Leaving,
}

/// Registrations in order of their last use, as far as it is known. A look-up only stores the time;
/// the queue is brought up to date when it is searched.
#[derive(Default)]
struct Queue {
    oldest: BTreeSet<(u64, Key)>,
    /// Registrations that were in use when they were last checked.
    busy: BTreeSet<Key>,
    /// The busy registration that was checked last.
    looked: Option<Key>,
}

impl<E, L: Found> Table<E, L> {
    /// Makes an empty table. `limited`: there are limits, so it keeps an eviction order.
    /// `exclusive`: registrations must not overlap, so it indexes every entry. `exact`: look-ups
    /// match the exact range.
    pub(super) fn new(limited: bool, exclusive: bool, exact: bool) -> Self {
        Self {
            live: IntervalIndex::new(),
            lives: Vec::new(),
            attempts: IntervalIndex::new(),
            held: exclusive.then(IntervalIndex::new),
            ranges: exact.then(BTreeMap::new),
            leaving: BTreeSet::new(),
            slots: Slab::new(),
            serial: NonZeroU64::MIN,
            queue: limited.then(Queue::default),
            bytes: 0,
            count: 0,
        }
    }

    /// Returns the number of live registrations.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Returns `true` if every part is empty.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let queued = self.queue.as_ref().map_or(0, |queue| queue.oldest.len() + queue.busy.len());
        let held = self.held.as_ref().map_or(0, IntervalIndex::len);
        let named = self.ranges.as_ref().map_or(0, BTreeMap::len) + self.leaving.len();
        self.slots.is_empty()
            && queued + held + named == 0
            && self.live.len() == 0
            && self.attempts.len() == 0
    }

    fn next(&mut self, slot: usize) -> Key {
        let serial = self.serial;
        self.serial =
            serial.checked_add(1).expect("2^64 registrations are not made in a process's life");
        Key {
            serial,
            slot: u32::try_from(slot).expect("fewer than 2^32 registrations exist at once"),
        }
    }

    fn get(&self, key: Key) -> Option<&Slot<E>> {
        self.slots.get(key.slot()).filter(|slot| slot.key == key)
    }

    pub(super) fn entry(&self, key: Key) -> Option<&Arc<E>> {
        self.get(key).map(|slot| &slot.entry)
    }

    /// Returns a live registration that covers `range`, and marks it as used at time `now`. Checks
    /// only the registrations that contain the first byte of `range` (K4).
    #[inline]
    pub(super) fn covering(&self, range: AddressRange, now: u64) -> Option<Arc<L>> {
        let mut found = None;
        self.live.overlapping(first_byte(range), |Ranged { range: own, value: key }| {
            if found.is_none() && own.covers(range) {
                found = self.used_at(key, now);
            }
        });
        found
    }

    /// Returns the live registration of exactly `range`, and marks it as used at time `now`.
    pub(super) fn exactly(&self, range: AddressRange, now: u64) -> Option<Arc<L>> {
        let key = self.ranges.as_ref()?.get(&(range.start(), range.last()))?;
        self.used_at(*key, now)
    }

    fn used_at(&self, key: Key, now: u64) -> Option<Arc<L>> {
        let Some(Some(live)) = self.lives.get(key.slot()) else { return None };
        if live.used().load(Ordering::Relaxed) < now {
            live.used().store(now, Ordering::Relaxed);
        }
        Some(live.clone())
    }

    /// Returns every live registration that overlaps `range`.
    pub(super) fn lives(&self, range: AddressRange) -> Vec<Arc<L>> {
        let mut all = Vec::new();
        self.live.overlapping(range, |Ranged { value: key, .. }| {
            all.extend(self.lives.get(key.slot()).and_then(Clone::clone));
        });
        all
    }

    /// Returns an attempt that covers `range`, or equals it if `exact`.
    pub(super) fn attempt(&self, range: AddressRange, exact: bool) -> Option<(Key, &Arc<E>)> {
        let mut found = None;
        self.attempts.overlapping(first_byte(range), |Ranged { range: own, value: key }| {
            if found.is_none() && if exact { own == range } else { own.covers(range) } {
                found = self.entry(key).map(|entry| (key, entry));
            }
        });
        found
    }

    /// Returns `wanted` extended by every live registration that overlaps or touches it,
    /// repeatedly.
    pub(super) fn merged(&self, wanted: AddressRange) -> AddressRange {
        let mut target = wanted;
        loop {
            let (mut start, mut last) = (target.start(), target.last());
            self.live.overlapping(touching(target), |Ranged { range, .. }| {
                (start, last) = (start.min(range.start()), last.max(range.last()));
            });
            if (start, last) == (target.start(), target.last()) {
                return target;
            }
            target = span(start, last);
        }
    }

    /// Returns `wanted` extended by every live registration and every attempt that overlaps it.
    pub(super) fn united(&self, wanted: AddressRange) -> AddressRange {
        let (mut start, mut last) = (wanted.start(), wanted.last());
        for index in [&self.live, &self.attempts] {
            index.overlapping(wanted, |Ranged { range, .. }| {
                (start, last) = (start.min(range.start()), last.max(range.last()));
            });
        }
        span(start, last)
    }

    /// Returns every entry that overlaps `range`, in any stage. Empty unless the table is
    /// exclusive.
    pub(super) fn overlapping(&self, range: AddressRange) -> Vec<Arc<E>> {
        let mut all = Vec::new();
        if let Some(held) = &self.held {
            held.overlapping(range, |Ranged { value: key, .. }| {
                all.extend(self.entry(key).cloned())
            });
        }
        all
    }

    /// Returns `true` unless the table is exclusive and an entry overlaps `range`.
    pub(super) fn is_free(&self, range: AddressRange) -> bool {
        let mut free = true;
        if let Some(held) = &self.held {
            held.overlapping(range, |_| free = false);
        }
        free
    }

    /// Adds an attempt.
    pub(super) fn begin(&mut self, range: AddressRange, entry: Arc<E>) -> Key {
        let key = self.next(self.slots.vacant_key());
        self.attempts.insert(Ranged { range, value: key });
        if let Some(held) = &mut self.held {
            held.insert(Ranged { range, value: key });
        }
        self.slots.insert(Slot { key, range, entry, stage: Stage::Attempt });
        key
    }

    /// Withdraws an attempt: no further caller joins it.
    pub(super) fn reject(&mut self, key: Key) {
        let Some(slot) = self.slots.get_mut(key.slot()).filter(|slot| slot.key == key) else {
            return;
        };
        if let Stage::Attempt = slot.stage {
            slot.stage = Stage::Leaving;
            self.leaving.insert(key);
            self.attempts.remove(Ranged { range: slot.range, value: key });
        }
    }

    /// Turns an attempt into a live registration. Returns `live` if the attempt was withdrawn
    /// before.
    pub(super) fn publish(&mut self, key: Key, live: Arc<L>) -> Result<(), Arc<L>> {
        if !self.get(key).is_some_and(|slot| matches!(slot.stage, Stage::Attempt)) {
            return Err(live);
        }
        let at = self.next(key.slot());
        let used = live.used().load(Ordering::Relaxed);
        let slot = &mut self.slots[key.slot()];
        slot.stage = Stage::Live(at, used);
        let range = slot.range;
        self.attempts.remove(Ranged { range, value: key });
        if self.lives.len() <= key.slot() {
            self.lives.resize_with(key.slot() + 1, || None);
        }
        self.lives[key.slot()] = Some(live);
        self.live.insert(Ranged { range, value: at });
        if let Some(ranges) = &mut self.ranges {
            ranges.insert((range.start(), range.last()), key);
        }
        if let Some(queue) = &mut self.queue {
            queue.oldest.insert((used, key));
        }
        self.count += 1;
        self.bytes += bytes(range);
        Ok(())
    }

    /// Withdraws a live registration from look-ups. Returns the table's reference.
    pub(super) fn withdraw(&mut self, key: Key) -> Option<Arc<L>> {
        let slot = self.slots.get_mut(key.slot()).filter(|slot| slot.key == key)?;
        let Stage::Live(at, queued) = slot.stage else { return None };
        slot.stage = Stage::Leaving;
        let range = slot.range;
        self.leaving.insert(key);
        self.live.remove(Ranged { range, value: at });
        if let Some(ranges) = &mut self.ranges
            && let Entry::Occupied(known) = ranges.entry((range.start(), range.last()))
            && *known.get() == key
        {
            known.remove();
        }
        if let Some(queue) = &mut self.queue {
            queue.oldest.remove(&(queued, key));
            queue.busy.remove(&key);
        }
        self.count -= 1;
        self.bytes -= bytes(range);
        self.lives.get_mut(key.slot())?.take()
    }

    /// Removes an entry. Returns the table's references.
    pub(super) fn forget(&mut self, key: Key) -> (Option<Arc<E>>, Option<Arc<L>>) {
        let live = self.withdraw(key);
        self.reject(key);
        self.leaving.remove(&key);
        let known = self.get(key).is_some();
        let slot = known.then(|| self.slots.remove(key.slot()));
        if let (Some(held), Some(slot)) = (&mut self.held, &slot) {
            held.remove(Ranged { range: slot.range, value: key });
        }
        (slot.map(|slot| slot.entry), live)
    }

    /// Withdraws the live registrations that `range`, just published as `key`, replaces.
    pub(super) fn replace(&mut self, key: Key, range: AddressRange) -> Vec<Arc<L>> {
        let mut replaced = Vec::new();
        self.live.overlapping(range, |Ranged { range: own, value }| {
            if range.covers(own) && value.slot != key.slot {
                replaced.extend(self.slots.get(value.slot()).map(|slot| slot.key));
            }
        });
        replaced.into_iter().filter_map(|key| self.withdraw(key)).collect()
    }

    /// Returns the attempts and the leaving entries that overlap `range`.
    pub(super) fn unsettled(&self, range: AddressRange) -> (Vec<Arc<E>>, Vec<Arc<E>>) {
        let mut attempts = Vec::new();
        self.attempts.overlapping(range, |Ranged { value: key, .. }| {
            attempts.extend(self.entry(key).cloned())
        });
        let leaving = self
            .leaving
            .iter()
            .filter_map(|key| self.get(*key))
            .filter(|slot| slot.range.overlaps(range));
        (attempts, leaving.map(|slot| slot.entry.clone()).collect())
    }

    /// Returns the keys of the live registrations that overlap `range`.
    fn keys(&self, range: AddressRange) -> Vec<Key> {
        let mut keys = Vec::new();
        self.live.overlapping(range, |Ranged { value, .. }| {
            keys.extend(self.slots.get(value.slot()).map(|slot| slot.key))
        });
        keys
    }

    /// Returns `true` if only the table refers to the registration. The caller holds the lock
    /// exclusively, so no look-up runs.
    fn is_idle(&self, key: Key) -> bool {
        matches!(self.lives.get(key.slot()), Some(Some(live)) if Arc::strong_count(live) == 1)
    }

    fn used(&self, key: Key) -> u64 {
        self.lives
            .get(key.slot())
            .and_then(Option::as_ref)
            .map_or(0, |live| live.used().load(Ordering::Relaxed))
    }

    /// Withdraws the idle registrations that overlap `range`, least recently used first.
    pub(super) fn give_up_idle(&mut self, range: AddressRange) -> Vec<Arc<L>> {
        let idle = self.keys(range).into_iter().filter(|key| self.is_idle(*key));
        let mut idle: Vec<_> = idle.map(|key| (self.used(key), key)).collect();
        idle.sort_unstable();
        idle.into_iter().filter_map(|(_, key)| self.withdraw(key)).collect()
    }

    /// Withdraws every live registration that overlaps `range`, idle or in use.
    pub(super) fn give_up(&mut self, range: AddressRange) -> Vec<Arc<L>> {
        let live = self.keys(range);
        live.into_iter().filter_map(|key| self.withdraw(key)).collect()
    }

    /// Withdraws idle registrations, least recently used first, while a limit is exceeded.
    pub(super) fn give_up_over(&mut self, max_bytes: u64, max_count: usize) -> Vec<Arc<L>> {
        let mut given_up = Vec::new();
        let over = |table: &Self| table.count > max_count || table.bytes > u128::from(max_bytes);
        if over(self) {
            self.look_at_busy();
        }
        while over(self) {
            let Some((queued, key)) =
                self.queue.as_mut().and_then(|queue| queue.oldest.pop_first())
            else {
                break;
            };
            let used = self.used(key);
            if !self.is_idle(key) {
                self.requeue(key, None);
            } else if used != queued {
                self.requeue(key, Some(used));
            } else {
                given_up.extend(self.withdraw(key));
            }
        }
        given_up
    }

    /// Puts a registration, taken out of `oldest` or busy, at the time `used`, or to the busy ones.
    fn requeue(&mut self, key: Key, used: Option<u64>) {
        let Some(queue) = &mut self.queue else { return };
        queue.busy.remove(&key);
        match used {
            Some(used) => _ = queue.oldest.insert((used, key)),
            None => _ = queue.busy.insert(key),
        }
        if let Some(Slot { stage: Stage::Live(_, known), .. }) = self.slots.get_mut(key.slot()) {
            *known = used.unwrap_or(*known);
        }
    }

    /// Requeues busy registrations that are idle by now. Stops after [`LOOKS`] checks in a row that
    /// find one in use.
    fn look_at_busy(&mut self) {
        let busy = self.queue.as_ref().map_or(0, |queue| queue.busy.len());
        let mut looks = 0..LOOKS;
        for _ in 0..busy {
            if looks.next().is_none() {
                return;
            }
            let Some(queue) = &mut self.queue else { return };
            let after = queue.looked.map_or(Bound::Unbounded, Bound::Excluded);
            let Some(key) = queue
                .busy
                .range((after, Bound::Unbounded))
                .next()
                .or_else(|| queue.busy.first())
                .copied()
            else {
                return;
            };
            queue.looked = Some(key);
            if self.is_idle(key) {
                self.requeue(key, Some(self.used(key)));
                looks = 0..LOOKS;
            }
        }
    }

    /// Removes and returns every reference. Called in the drop of the cache.
    pub(super) fn drain(&mut self) -> (Vec<Arc<E>>, Vec<Arc<L>>) {
        let entries = self.slots.drain().map(|slot| slot.entry).collect();
        (entries, self.lives.drain(..).flatten().collect())
    }
}

/// Returns the length of a range in bytes. That of the whole address space does not fit a `u64`.
pub(super) fn bytes(range: AddressRange) -> u128 {
    u128::from(range.last() - range.start()) + 1
}

pub(super) fn span(start: u64, last: u64) -> AddressRange {
    AddressRange::try_from(start..=last).unwrap_or(AddressRange::ALL)
}

fn first_byte(range: AddressRange) -> AddressRange {
    span(range.start(), range.start())
}

/// Returns the range extended by one byte on either side.
pub(super) fn touching(range: AddressRange) -> AddressRange {
    span(range.start().saturating_sub(1), range.last().saturating_add(1))
}
