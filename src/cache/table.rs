//! What is registered: look-up, stages of a registration, limits.
#![forbid(unsafe_code)]

use super::attempt::{Attempt, Guardian, Teardown};
use super::{Builder, CacheStats, Device, Failure, GetError, Merge, Operation};
use crate::index::{Indexed, IntervalIndex};
use crate::range::AddressRange;
use crate::space::AddressSpace;
use crate::subscription::Subscription;
use crate::sync::Arc;
use alloc::collections::VecDeque;
use alloc::string::ToString;
use alloc::sync::Weak;
use alloc::vec::Vec;
use core::any::Any;
use core::num::NonZeroU64;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crossbeam_utils::CachePadded;
use crossbeam_utils::sync::ShardedLock;
use futures::FutureExt;
use futures::channel::oneshot;
use slab::Slab;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Counters of hits, so that threads do not share one.
const COUNTERS: usize = 16;

/// Where a registration is in the table; used again, so `serial` tells it from an earlier one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Key {
    slot: u32,
    /// Never 0, so that a place in the index takes no more than the key itself.
    serial: NonZeroU64,
}

impl Key {
    fn slot(self) -> usize {
        self.slot as usize
    }
}

impl Indexed for Key {
    fn order(self) -> u64 {
        self.serial.get()
    }
}

/// A registration that the device has. The table has one reference while look-ups find it, each user one; the last to go hands the handle to the
/// teardown. What a look-up touches comes first, mostly on the cache line of the counts.
#[repr(C)]
pub(super) struct Live<D: Device> {
    /// When it was used last, in misses.
    used: AtomicU64,
    handle: Option<D::Handle>,
    pub(super) range: AddressRange,
    gone: Option<oneshot::Sender<D::Handle>>,
}

impl<D: Device> Live<D> {
    pub(super) fn new(range: AddressRange, handle: D::Handle, gone: oneshot::Sender<D::Handle>) -> Self {
        Self { range, used: AtomicU64::new(0), handle: Some(handle), gone: Some(gone) }
    }

    #[inline]
    pub(super) fn handle(&self) -> &D::Handle {
        self.handle.as_ref().expect("the handle goes with the registration")
    }
}

impl<D: Device> Drop for Live<D> {
    fn drop(&mut self) {
        if let (Some(gone), Some(handle)) = (self.gone.take(), self.handle.take()) {
            // Nobody is there to take it only when the whole cache is gone, and the device with it.
            let _ = gone.send(handle);
        }
    }
}

/// How far a registration is. An invalidation waits for what each stage has to wait for.
pub(super) enum Stage<D: Device> {
    /// The device was not asked yet.
    Fresh,
    /// The device is registering it.
    Attempt,
    /// Look-ups find it.
    Live(Leaving<D>),
    /// Look-ups do not find it any more; somebody may use it.
    Leaving(Leaving<D>),
}

/// A registration on its way out.
pub(super) struct Leaving<D: Device> {
    pub(super) teardown: Teardown,
    pub(super) users: Weak<Live<D>>,
    /// The device refuses to deregister it.
    pub(super) stuck: Arc<AtomicBool>,
}

impl<D: Device> Leaving<D> {
    pub(super) fn is_idle(&self) -> bool {
        self.users.strong_count() == 0
    }

    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Acquire)
    }
}

impl<D: Device> Clone for Leaving<D> {
    fn clone(&self) -> Self {
        Self { teardown: self.teardown.clone(), users: self.users.clone(), stuck: self.stuck.clone() }
    }
}

pub(super) struct Slot<D: Device> {
    serial: NonZeroU64,
    pub(super) range: AddressRange,
    pub(super) stage: Stage<D>,
    pub(super) attempt: Option<Attempt<D>>,
    /// When it was asked for.
    began: u64,
    #[expect(dead_code, reason = "the range is under the notifier's eyes as long as the slot exists")]
    subscription: Option<Arc<Subscription<Guardian<D>>>>,
    _watch: Option<alloc::boxed::Box<dyn Any + Send + Sync>>,
}

pub(super) struct Table<D: Device> {
    /// Live registrations.
    index: IntervalIndex<Key>,
    slots: Slab<Slot<D>>,
    /// The live ones again, by slot: all that a look-up needs, close together.
    lives: Vec<Option<Arc<Live<D>>>>,
    /// Attempts that have begun and not ended.
    under_way: Vec<Key>,
    /// Registrations on their way out.
    leaving: Vec<Key>,
    /// Live registrations, in order of when they were used last, as far as that is known: a look-up only notes the time.
    oldest: VecDeque<(Key, u64)>,
    /// Of the next registration.
    serial: NonZeroU64,
    live_bytes: u64,
    live: usize,
}

pub(super) struct Inner<D: Device> {
    pub(super) space: AddressSpace,
    pub(super) device: D,
    pub(super) settings: Builder,
    /// Look-ups take one shard of it, changes all.
    table: ShardedLock<Table<D>>,
    hits: [CachePadded<AtomicU64>; COUNTERS],
    /// Rises with each miss.
    clock: AtomicU64,
    stats: Mutex<CacheStats>,
}

pub(super) enum Outcome<E> {
    Live,
    /// The memory was invalidated meanwhile.
    Collided,
    Failed(Arc<E>),
}

impl<E> Clone for Outcome<E> {
    fn clone(&self) -> Self {
        match self {
            Self::Live => Self::Live,
            Self::Collided => Self::Collided,
            Self::Failed(error) => Self::Failed(error.clone()),
        }
    }
}

pub(super) enum Found<D: Device> {
    Live(Arc<Live<D>>),
    Attempt(Attempt<D>),
}

/// Which counter this thread counts in: one of its own, or the last, which is everybody's once there have been many threads.
fn counter() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    std::thread_local!(static OURS: core::cell::Cell<usize> = const { core::cell::Cell::new(usize::MAX) });
    let ours = OURS.get();
    if ours < COUNTERS {
        return ours;
    }
    let ours = NEXT.fetch_add(1, Ordering::Relaxed).min(COUNTERS - 1);
    OURS.set(ours);
    ours
}

impl<D: Device> Inner<D> {
    pub(super) fn new(space: &AddressSpace, device: D, settings: Builder) -> Self {
        let table = Table {
            index: IntervalIndex::new(),
            slots: Slab::new(),
            lives: Vec::new(),
            under_way: Vec::new(),
            leaving: Vec::new(),
            oldest: VecDeque::new(),
            serial: NonZeroU64::MIN,
            live_bytes: 0,
            live: 0,
        };
        Self {
            space: space.clone(),
            device,
            settings,
            table: ShardedLock::new(table),
            hits: core::array::from_fn(|_| CachePadded::new(AtomicU64::new(0))),
            clock: AtomicU64::new(0),
            stats: Mutex::new(CacheStats::default()),
        }
    }

    pub(super) fn write<R>(&self, work: impl FnOnce(&mut Table<D>) -> R) -> R {
        work(&mut self.table.write().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut CacheStats)) {
        change(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn report(&self, range: AddressRange, operation: Operation, error: &D::Error) {
        if let Some(reporter) = &self.settings.on_failure {
            reporter(&Failure { range, operation, error });
        }
    }

    /// Nobody can ask for what they register any more. They own the table, which owns them.
    pub(super) fn abandon_attempts(&self) {
        let attempts: Vec<_> = self.write(|table| table.slots.iter_mut().filter_map(|(_, slot)| slot.attempt.take()).collect());
        drop(attempts);
    }

    pub(super) fn stats(&self) -> CacheStats {
        let mut stats = *self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.hits = self.hits.iter().map(|hits| hits.load(Ordering::Relaxed)).sum();
        stats.registrations = self.write(|table| table.live) as u64;
        stats
    }

    /// A look-up, counted.
    #[inline]
    pub(super) fn hit(&self, range: AddressRange) -> Option<Arc<Live<D>>> {
        let live = self.hit_again(range)?;
        let ours = counter();
        let hits = &self.hits[ours];
        if ours < COUNTERS - 1 {
            // Nobody else counts in it.
            hits.store(hits.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        } else {
            hits.fetch_add(1, Ordering::Relaxed);
        }
        Some(live)
    }

    /// A look-up. The gate first: whoever finds it open sees what was invalidated while it was closed.
    #[inline]
    pub(super) fn hit_again(&self, range: AddressRange) -> Option<Arc<Live<D>>> {
        if self.space.shared().gate.is_closed() {
            return None;
        }
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.covering(range, self.clock.load(Ordering::Relaxed))
    }

    /// What covers `range`, or an attempt to register that will.
    pub(super) fn find_or_begin(self: &Arc<Self>, range: AddressRange) -> Result<Found<D>, GetError<D::Error>> {
        let now = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        let mask = self.settings.page - 1;
        let pages = |range: AddressRange| {
            let (start, last) = (range.start() & !mask, range.last() | mask);
            AddressRange::new(start, last.wrapping_sub(start).wrapping_add(1)).unwrap_or(AddressRange::ALL)
        };
        let wanted = pages(range);
        let found = |table: &Table<D>| {
            if let Some(live) = table.covering(range, now) {
                return Some(Found::Live(live));
            }
            let slots =
                table.under_way.iter().filter_map(|key| table.slots.get(key.slot()).filter(|slot| slot.serial == key.serial));
            let under_way = slots.filter(|slot| slot.range.covers(range)).find_map(|slot| slot.attempt.clone());
            under_way.map(Found::Attempt)
        };
        let (known, target) = {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            (found(&table), table.merged(wanted, self.settings.merge))
        };
        if let Some(found) = known {
            return Ok(found);
        }
        // Outside of the lock: to watch and to subscribe takes locks of their own.
        let mut watch = self.watch(target)?;
        let guardian = Guardian { inner: Arc::downgrade(self), key: OnceLock::new() };
        let subscription = match self.space.insert(target, guardian) {
            Ok(subscription) => Arc::new(subscription),
            Err(error) => return Err(GetError::Unwatched(error.to_string())),
        };
        // Mostly nothing is being invalidated, and the attempt can begin at once.
        let stable = subscription.read_begin().now_or_never();
        Ok(self.write(|table| {
            if let Some(found) = found(table) {
                // Another caller was quicker.
                return found;
            }
            let sequence = stable.filter(|sequence| !subscription.read_retry(*sequence));
            let slot = u32::try_from(table.slots.vacant_key()).expect("fewer than 2^32 registrations exist at once");
            let key = Key { slot, serial: table.serial };
            table.serial = table.serial.checked_add(1).expect("2^64 registrations are not made in a process's life");
            let attempt = Attempt::new(self.clone(), key, target, subscription.clone(), sequence);
            // Set once, before anybody else can know of the slot.
            let _ = subscription.key.set(key);
            table.slots.insert(Slot {
                serial: key.serial,
                range: target,
                stage: if sequence.is_some() { Stage::Attempt } else { Stage::Fresh },
                attempt: Some(attempt.clone()),
                began: now,
                subscription: Some(subscription.clone()),
                _watch: watch.take(),
            });
            table.under_way.push(key);
            Found::Attempt(attempt)
        }))
    }

    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    fn watch(&self, range: AddressRange) -> Result<Option<alloc::boxed::Box<dyn Any + Send + Sync>>, GetError<D::Error>> {
        let Some(uffd) = &self.settings.uffd else { return Ok(None) };
        match uffd.watch(range) {
            Ok(watch) => Ok(Some(alloc::boxed::Box::new(watch))),
            Err(error) => Err(GetError::Unwatched(error.to_string())),
        }
    }

    #[cfg(not(all(feature = "userfaultfd", target_os = "linux")))]
    fn watch(&self, _range: AddressRange) -> Result<Option<alloc::boxed::Box<dyn Any + Send + Sync>>, GetError<D::Error>> {
        Ok(None)
    }

    /// A registration is over. What it held is dropped outside of the lock.
    pub(super) fn forget(&self, key: Key) {
        let slot = self.write(|table| {
            table.end_attempt(key);
            table.leaving.retain(|other| *other != key);
            table.get(key).is_some().then(|| table.slots.remove(key.slot()))
        });
        drop(slot);
    }

    /// Gives up idle registrations while there are more than the limits allow.
    pub(super) fn evict_over_limits(&self) -> Vec<Teardown> {
        let Builder { max_bytes, max_registrations, .. } = self.settings;
        if max_bytes == u64::MAX && max_registrations == usize::MAX {
            return Vec::new();
        }
        self.evict(|table| table.live_bytes > max_bytes || table.live > max_registrations)
    }

    pub(super) fn evict_all_idle(&self) -> Vec<Teardown> {
        self.evict(|_| true)
    }

    fn evict(&self, mut over: impl FnMut(&Table<D>) -> bool) -> Vec<Teardown> {
        let (teardowns, live) = self.write(|table| {
            let (mut teardowns, mut dropped) = (Vec::new(), Vec::new());
            // Each once: those used since they were queued go to the end, and so do those in use.
            for _ in 0..table.oldest.len() {
                if !over(table) {
                    break;
                }
                let Some((key, queued)) = table.oldest.pop_front() else { break };
                let Some(slot) = table.get(key) else { continue };
                let Stage::Live(leaving) = &slot.stage else { continue };
                // The table's own reference is one.
                let idle = leaving.users.strong_count() == 1;
                let Some(used) = leaving.users.upgrade().map(|live| live.used.load(Ordering::Relaxed)) else { continue };
                if !idle || used > queued {
                    table.oldest.push_back((key, used));
                    continue;
                }
                if let Some((live, teardown)) = table.leave(key) {
                    dropped.push(live);
                    teardowns.push(teardown);
                }
            }
            (teardowns, dropped)
        });
        self.count(|stats| stats.evictions += teardowns.len() as u64);
        drop(live);
        teardowns
    }

    pub(super) fn leaving(&self) -> Vec<Leaving<D>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let slots = table.leaving.iter().filter_map(|key| table.slots.get(key.slot()));
        let leaving = |slot: &Slot<D>| match &slot.stage {
            Stage::Leaving(leaving) => Some(leaving.clone()),
            _ => None,
        };
        slots.filter_map(leaving).collect()
    }
}

impl<D: Device> Table<D> {
    pub(super) fn get(&mut self, key: Key) -> Option<&mut Slot<D>> {
        self.slots.get_mut(key.slot()).filter(|slot| slot.serial == key.serial)
    }

    #[inline]
    fn covering(&self, range: AddressRange, now: u64) -> Option<Arc<Live<D>>> {
        let mut found = None;
        self.index.overlapping_or_covering(range, |key, covers| {
            if covers
                && found.is_none()
                && let Some(Some(live)) = self.lives.get(key.slot())
            {
                if live.used.load(Ordering::Relaxed) != now {
                    live.used.store(now, Ordering::Relaxed);
                }
                found = Some(live.clone());
            }
        });
        found
    }

    /// What a miss of `wanted` registers.
    fn merged(&self, wanted: AddressRange, merge: Merge) -> AddressRange {
        let mut target = wanted;
        if merge == Merge::Touching {
            loop {
                let (mut start, mut last) = (target.start(), target.last());
                self.index.overlapping(touching(target), |key| {
                    if let Some(slot) = self.slots.get(key.slot()) {
                        (start, last) = (start.min(slot.range.start()), last.max(slot.range.last()));
                    }
                });
                if (start, last) == (target.start(), target.last()) {
                    break;
                }
                target = AddressRange::new(start, (last - start).saturating_add(1)).unwrap_or(AddressRange::ALL);
            }
        }
        target
    }

    /// The device has what nobody may use.
    pub(super) fn reject(&mut self, key: Key, leaving: Leaving<D>) {
        self.end_attempt(key);
        if let Some(slot) = self.get(key) {
            slot.stage = Stage::Leaving(leaving);
            slot.attempt = None;
            self.leaving.push(key);
        }
    }

    /// Nobody can join the attempt any more.
    pub(super) fn end_attempt(&mut self, key: Key) {
        self.under_way.retain(|other| *other != key);
    }

    /// Look-ups find it from now on.
    pub(super) fn publish(&mut self, key: Key, live: Arc<Live<D>>, leaving: Leaving<D>) {
        let Some(slot) = self.get(key) else { return };
        slot.stage = Stage::Live(leaving);
        slot.attempt = None;
        let (range, used) = (slot.range, slot.began);
        live.used.store(used, Ordering::Relaxed);
        self.end_attempt(key);
        if self.lives.len() <= key.slot() {
            self.lives.resize_with(key.slot() + 1, || None);
        }
        self.lives[key.slot()] = Some(live);
        self.index.insert(range, key);
        self.oldest.push_back((key, used));
        self.live += 1;
        // Those that invalidations ended are still in the queue: it must not grow with them.
        if self.oldest.len() > 2 * self.live + 64 {
            let Self { oldest, slots, .. } = self;
            let is_live = |slot: &Slot<D>, key: Key| slot.serial == key.serial && matches!(slot.stage, Stage::Live(_));
            oldest.retain(|(key, _)| slots.get(key.slot()).is_some_and(|slot| is_live(slot, *key)));
        }
        self.live_bytes += range.len().unwrap_or(u64::MAX);
    }

    /// Look-ups find it no more. Returns the table's reference, to be dropped outside of the lock, and what ends the registration.
    pub(super) fn leave(&mut self, key: Key) -> Option<(Arc<Live<D>>, Teardown)> {
        let slot = self.get(key)?;
        let Stage::Live(leaving) = &slot.stage else { return None };
        let (leaving, range) = (leaving.clone(), slot.range);
        let teardown = leaving.teardown.clone();
        slot.stage = Stage::Leaving(leaving);
        self.leaving.push(key);
        let live = self.lives.get_mut(key.slot())?.take()?;
        self.index.remove(range, key);
        self.live -= 1;
        self.live_bytes -= range.len().unwrap_or(u64::MAX);
        Some((live, teardown))
    }

    /// Live registrations that a new one of `range` replaces.
    pub(super) fn replaced(&self, range: AddressRange, merge: Merge) -> Vec<Key> {
        let mut replaced = Vec::new();
        if merge == Merge::Touching {
            self.index.overlapping(range, |key| {
                if self.slots.get(key.slot()).is_some_and(|slot| range.covers(slot.range)) {
                    replaced.push(key);
                }
            });
        }
        replaced
    }
}

/// The range and one byte on either side.
fn touching(range: AddressRange) -> AddressRange {
    let (start, last) = (range.start().saturating_sub(1), range.last().saturating_add(1));
    AddressRange::new(start, (last - start).saturating_add(1)).unwrap_or(AddressRange::ALL)
}

#[cfg(test)]
mod tests {
    use super::super::RegistrationCache;
    use super::*;
    use crate::event::Event;
    use futures::executor::block_on;

    struct Null;

    impl Device for Null {
        type Handle = ();
        type Error = core::convert::Infallible;

        async fn register(&self, _: AddressRange) -> Result<(), Self::Error> {
            Ok(())
        }

        async fn deregister(&self, _: AddressRange, (): &()) -> Result<(), Self::Error> {
            Ok(())
        }
    }

    #[test]
    fn what_invalidations_end_does_not_stay_queued_for_eviction() {
        let space = AddressSpace::new();
        let cache = RegistrationCache::new(&space, Null);
        for page in 0..1000 {
            let range = AddressRange::new(page * 4096, 4096).unwrap();
            drop(block_on(cache.get(range)).unwrap());
            drop(block_on(space.invalidate(range, Event::Unmap)));
        }
        cache.inner.write(|table| {
            assert!(table.oldest.len() <= 65, "{} are queued, none is live", table.oldest.len());
            assert!(table.slots.is_empty() && table.leaving.is_empty() && table.under_way.is_empty());
        });
    }
}
