//! What is registered: look-up, attempts, and what is to be given up first.
//!
//! Knows of ranges and of references that it keeps; neither of devices nor of futures. What it
//! gives back is dropped by the caller, outside of the lock around it.
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

/// Where something is in the table; used again, so `serial` tells it from an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// Never 0, so that a place in the index takes no more than the key itself.
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

/// What look-ups find.
pub(super) trait Found {
    /// When it was used last, by a clock that rises with each miss.
    fn used(&self) -> &AtomicU64;
}

/// So many registrations in use are looked at in vain before a limit leaves it at that.
const LOOKS: u32 = 8;

/// Entries `E` by key, and what look-ups find of them, `L`.
pub(super) struct Table<E, L> {
    /// What look-ups find. The keys in it have serials of their own, which rise with each
    /// insertion.
    live: IntervalIndex<Ranged<Key>>,
    /// The same, by slot: all that a look-up needs, close together.
    lives: Vec<Option<Arc<L>>>,
    /// What is being registered.
    attempts: IntervalIndex<Ranged<Key>>,
    /// All of it until it is forgotten, where nothing may overlap.
    held: Option<IntervalIndex<Ranged<Key>>>,
    /// What look-ups find, by its range, where they look for that range only.
    ranges: Option<BTreeMap<(u64, u64), Key>>,
    /// What look-ups do not find any more, or never did: few.
    leaving: BTreeSet<Key>,
    slots: Slab<Slot<E>>,
    /// Of the next key.
    serial: NonZeroU64,
    /// What to give up first, where there are limits.
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

#[derive(Clone, Copy)]
enum Stage {
    Attempt,
    /// With its key in the index, and when it was used last as far as the queue knows.
    Live(Key, u64),
    /// Look-ups do not find it any more.
    Leaving,
}

/// Registrations in order of their last use, as far as that is known: a look-up only notes the
/// time.
#[derive(Default)]
struct Queue {
    oldest: BTreeSet<(u64, Key)>,
    /// Those that were in use when they were looked at.
    busy: BTreeSet<Key>,
    /// The one of them that was looked at last.
    looked: Option<Key>,
}

impl<E, L: Found> Table<E, L> {
    /// `limited`: it says what to give up first. `exclusive`: it says what overlaps a range.
    /// `exact`: look-ups are for a range, neither more nor less.
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

    /// How many look-ups find.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Whether there is nothing in any part of it.
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

    /// What covers `range`, and is used at the time `now`. Looks only at what holds the first byte
    /// of `range`: not at what lies within it.
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

    /// What is `range`, neither more nor less.
    pub(super) fn exactly(&self, range: AddressRange, now: u64) -> Option<Arc<L>> {
        let key = self.ranges.as_ref()?.get(&(range.start(), range.last()))?;
        self.used_at(*key, now)
    }

    #[inline(always)]
    fn used_at(&self, key: Key, now: u64) -> Option<Arc<L>> {
        let Some(Some(live)) = self.lives.get(key.slot()) else { return None };
        if live.used().load(Ordering::Relaxed) < now {
            live.used().store(now, Ordering::Relaxed);
        }
        Some(live.clone())
    }

    /// All that look-ups find of `range`.
    pub(super) fn lives(&self, range: AddressRange) -> Vec<Arc<L>> {
        let mut all = Vec::new();
        self.live.overlapping(range, |Ranged { value: key, .. }| {
            all.extend(self.lives.get(key.slot()).and_then(Clone::clone));
        });
        all
    }

    /// What is being registered and covers `range`, or is it.
    pub(super) fn attempt(&self, range: AddressRange, exact: bool) -> Option<(Key, &Arc<E>)> {
        let mut found = None;
        self.attempts.overlapping(first_byte(range), |Ranged { range: own, value: key }| {
            if found.is_none() && if exact { own == range } else { own.covers(range) } {
                found = self.entry(key).map(|entry| (key, entry));
            }
        });
        found
    }

    /// `wanted` with all that overlaps or touches it, and what touches that.
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

    /// `wanted` with all that overlaps it and is found by look-ups or being registered.
    pub(super) fn united(&self, wanted: AddressRange) -> AddressRange {
        let (mut start, mut last) = (wanted.start(), wanted.last());
        for index in [&self.live, &self.attempts] {
            index.overlapping(wanted, |Ranged { range, .. }| {
                (start, last) = (start.min(range.start()), last.max(range.last()));
            });
        }
        span(start, last)
    }

    /// All that overlaps `range`, however far it is. Only where nothing may overlap.
    pub(super) fn overlapping(&self, range: AddressRange) -> Vec<Arc<E>> {
        let mut all = Vec::new();
        if let Some(held) = &self.held {
            held.overlapping(range, |Ranged { value: key, .. }| {
                all.extend(self.entry(key).cloned())
            });
        }
        all
    }

    /// Whether nothing overlaps `range` that must not.
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

    /// Takes an attempt away from those who look for one.
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

    /// Lets look-ups find it from now on. Returns it if the attempt is over already.
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

    /// Takes it away from look-ups. Returns the table's reference.
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

    /// Ends an entry's business with the table. Returns the table's references.
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

    /// Takes what `range`, just published as `key`, replaces away from look-ups.
    pub(super) fn replace(&mut self, key: Key, range: AddressRange) -> Vec<Arc<L>> {
        let mut replaced = Vec::new();
        self.live.overlapping(range, |Ranged { range: own, value }| {
            if range.covers(own) && value.slot != key.slot {
                replaced.extend(self.slots.get(value.slot()).map(|slot| slot.key));
            }
        });
        replaced.into_iter().filter_map(|key| self.withdraw(key)).collect()
    }

    /// All entries that are being registered, or on their way out, and touch `range`.
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

    /// The keys of what look-ups find of `range`.
    fn keys(&self, range: AddressRange) -> Vec<Key> {
        let mut keys = Vec::new();
        self.live.overlapping(range, |Ranged { value, .. }| {
            keys.extend(self.slots.get(value.slot()).map(|slot| slot.key))
        });
        keys
    }

    /// Whether nobody but the table has it. Under the lock that keeps look-ups out.
    fn is_idle(&self, key: Key) -> bool {
        matches!(self.lives.get(key.slot()), Some(Some(live)) if Arc::strong_count(live) == 1)
    }

    fn used(&self, key: Key) -> u64 {
        self.lives
            .get(key.slot())
            .and_then(Option::as_ref)
            .map_or(0, |live| live.used().load(Ordering::Relaxed))
    }

    /// Takes all that nobody uses and that overlaps `range` away from look-ups, what was used
    /// longest ago first.
    pub(super) fn give_up_idle(&mut self, range: AddressRange) -> Vec<Arc<L>> {
        let idle = self.keys(range).into_iter().filter(|key| self.is_idle(*key));
        let mut idle: Vec<_> = idle.map(|key| (self.used(key), key)).collect();
        idle.sort_unstable();
        idle.into_iter().filter_map(|(_, key)| self.withdraw(key)).collect()
    }

    /// Takes all that overlaps `range` away from look-ups, whether it is used or not.
    pub(super) fn give_up(&mut self, range: AddressRange) -> Vec<Arc<L>> {
        let live = self.keys(range);
        live.into_iter().filter_map(|key| self.withdraw(key)).collect()
    }

    /// Takes what was used longest ago and is idle away from look-ups, while there is too much.
    pub(super) fn give_up_over(&mut self, max_bytes: u64, max_count: usize) -> Vec<Arc<L>> {
        let mut given_up = Vec::new();
        let over = |table: &Self| table.count > max_count || table.bytes > u128::from(max_bytes);
        if over(self) {
            self.look_at_busy();
        }
        while over(self) {
            let Some((queued, key)) =
                self.queue.as_ref().and_then(|queue| queue.oldest.first().copied())
            else {
                break;
            };
            let used = self.used(key);
            if !self.is_idle(key) {
                self.requeue(key, queued, None);
            } else if used != queued {
                self.requeue(key, queued, Some(used));
            } else {
                given_up.extend(self.withdraw(key));
            }
        }
        given_up
    }

    /// Moves one from where it is queued: to when it was `used`, or to those in use.
    fn requeue(&mut self, key: Key, queued: u64, used: Option<u64>) {
        let Some(queue) = &mut self.queue else { return };
        queue.oldest.remove(&(queued, key));
        queue.busy.remove(&key);
        match used {
            Some(used) => _ = queue.oldest.insert((used, key)),
            None => _ = queue.busy.insert(key),
        }
        if let Some(Slot { stage: Stage::Live(_, known), .. }) = self.slots.get_mut(key.slot()) {
            *known = used.unwrap_or(*known);
        }
    }

    /// Queues those again that were in use and are not any more: all if they are, and else only as
    /// many as a look finds that is in vain [`LOOKS`] times in a row.
    fn look_at_busy(&mut self) {
        let mut in_vain = 0;
        let mut left = self.queue.as_ref().map_or(0, |queue| queue.busy.len());
        while in_vain < LOOKS && left > 0 {
            left -= 1;
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
                let (used, queued) = (self.used(key), self.queued(key));
                self.requeue(key, queued, Some(used));
                in_vain = 0;
            } else {
                in_vain += 1;
            }
        }
    }

    fn queued(&self, key: Key) -> u64 {
        match self.get(key).map(|slot| slot.stage) {
            Some(Stage::Live(_, queued)) => queued,
            _ => 0,
        }
    }

    /// Everything that it refers to, when it is dropped.
    pub(super) fn drain(&mut self) -> (Vec<Arc<E>>, Vec<Arc<L>>) {
        let entries = self.slots.drain().map(|slot| slot.entry).collect();
        (entries, self.lives.drain(..).flatten().collect())
    }
}

/// The bytes of a range; those of the whole address space do not fit in a `u64`.
pub(super) fn bytes(range: AddressRange) -> u128 {
    u128::from(range.last() - range.start()) + 1
}

pub(super) fn span(start: u64, last: u64) -> AddressRange {
    AddressRange::try_from(start..=last).unwrap_or(AddressRange::ALL)
}

fn first_byte(range: AddressRange) -> AddressRange {
    span(range.start(), range.start())
}

/// The range and one byte on either side.
pub(super) fn touching(range: AddressRange) -> AddressRange {
    span(range.start().saturating_sub(1), range.last().saturating_add(1))
}
