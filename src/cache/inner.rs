//! What all handles of a cache share: look-ups, misses, limits.
#![forbid(unsafe_code)]

use super::attempt::{Attempt, Guardian, Teardown};
use super::table::{Key, Leaving, Live, Slot, Stage, Table};
use super::{Builder, CacheStats, Device, Failure, GetError, Operation};
use crate::range::AddressRange;
use crate::space::AddressSpace;
use crate::sync::Arc;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::any::Any;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crossbeam_utils::CachePadded;
use crossbeam_utils::sync::ShardedLock;
use futures::FutureExt;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Counters of hits, so that threads do not share one.
const COUNTERS: usize = 16;

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
        Self {
            space: space.clone(),
            device,
            settings,
            table: ShardedLock::new(Table::new()),
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
                _subscription: Some(subscription.clone()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::RegistrationCache;
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
