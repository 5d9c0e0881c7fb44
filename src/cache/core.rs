//! State that all handles of a cache share. It implements the [`Shelf`] on which look-ups find
//! registrations.
#![forbid(unsafe_code)]

mod room;

pub(super) use room::{gone, until_gone};

use super::claim::Claim;
use super::device::{Device, Guarded};
use super::entry::{Entry, Live, Shelf};
use super::error::{GetError, Unwatched};
use super::settings::{Builder, CacheStats, Limits, Merge, Overlap};
use super::table::{Key, Table};
use super::turns::Turns;
use super::watch::Source;
use crate::range::AddressRange;
use crate::space::AddressSpace;
use crate::sync::{Arc, AtomicU64, AtomicUsize, Lock, Ordering, Weak};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::cell::Cell;
use crossbeam_utils::CachePadded;
use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard};
use std::sync::PoisonError;

/// Number of hit counters. Several counters keep threads from writing to one cache line.
const COUNTERS: usize = 16;

/// State that all handles of a cache share.
pub(super) struct Core<D: Device> {
    pub(super) space: AddressSpace,
    pub(super) device: Arc<Guarded<D>>,
    pub(super) limits: Limits,
    /// A source of invalidations is set. The process may have lost it (a child of `fork`).
    watched: bool,
    hits: [CachePadded<AtomicU64>; COUNTERS],
    /// Rises by two with each miss, so that a look-up has a later time than the miss before it.
    clock: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) collisions: AtomicU64,
    merges: AtomicU64,
    evictions: AtomicU64,
    outdated: AtomicU64,
    /// Turns of callers with overlapping ranges. Used with [`Overlap::Wait`] and
    /// [`Overlap::Merge`].
    pub(super) turns: Arc<Turns>,
    /// Registrations that the last user has released and the device has not yet deregistered.
    ready: Lock<VecDeque<Key>>,
    /// Registrations that a larger one has replaced.
    replaced: Lock<Vec<Arc<Entry<D>>>>,
    /// Dropped last. The registrations in it may hold the last reference to the space.
    table: Standing<D>,
}

/// The table behind its lock. A look-up locks one shard, a change locks all shards.
struct Standing<D: Device>(ShardedLock<Table<Entry<D>, Live<D>>>);

/// Result of [`Core::find_or_begin`].
pub(super) enum Found<D: Device> {
    /// A registration that covers the range.
    Live(Arc<Live<D>>),
    /// An attempt that will cover the range, and the time of this look-up.
    Attempt(Claim<D>, u64),
    /// Another registration overlaps the range and has to leave first. The caller waits again.
    Blocked,
}

/// Result of [`Core::begin`].
#[derive(Debug, PartialEq)]
pub(super) enum Begun {
    /// The attempt has begun.
    Free,
    /// Another caller began an attempt first, or has registered.
    Late,
    /// Another registration overlaps the range and has to leave first.
    Blocked,
}

/// Returns the index of this thread's counter. The first threads get one each. All later threads
/// share the last one.
pub(super) fn counter() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    std::thread_local! {
        static OURS: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    let ours = OURS.get();
    if ours < COUNTERS {
        return ours;
    }
    let ours = NEXT.fetch_add(1, Ordering::Relaxed).min(COUNTERS - 1);
    OURS.set(ours);
    ours
}

impl<D: Device> Core<D> {
    pub(super) fn new(space: &AddressSpace, device: D, mut settings: Builder<D>) -> Self {
        let limits = settings.checked();
        let source = Source::of(&mut settings);
        let losses = space.shared().host.losses.clone();
        Self {
            space: space.clone(),
            watched: source.is_set(),
            device: Arc::new(Guarded::new(device, settings.on_failure, losses, source)),
            limits,
            hits: core::array::from_fn(|_| CachePadded::new(AtomicU64::new(0))),
            clock: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            collisions: AtomicU64::new(0),
            merges: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            outdated: AtomicU64::new(0),
            turns: Arc::default(),
            ready: Lock::new(VecDeque::new()),
            replaced: Lock::new(Vec::new()),
            table: Standing(ShardedLock::new(Table::new(
                limits.are_set(),
                limits.overlap != Overlap::Allowed,
                limits.exact,
            ))),
        }
    }

    fn read(&self) -> ShardedLockReadGuard<'_, Table<Entry<D>, Live<D>>> {
        self.table.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write<R>(&self, work: impl FnOnce(&mut Table<Entry<D>, Live<D>>) -> R) -> R {
        work(&mut self.table.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns `true` in a child of the process that owns the cache (M4).
    #[inline]
    pub(super) fn is_inert(&self) -> bool {
        self.watched && self.device.source.is_inert()
    }

    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.ready.lock().len() + self.replaced.lock().len()
    }

    pub(super) fn stats(&self) -> CacheStats {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        // M4: a thread of the parent may have held the locks when it forked.
        let counted = !self.is_inert();
        CacheStats {
            hits: self.hits.iter().map(|hits| of(hits)).sum(),
            misses: of(&self.misses),
            merges: of(&self.merges),
            evictions: of(&self.evictions),
            invalidations: of(&self.device.invalidations),
            outdated: of(&self.outdated),
            collisions: of(&self.collisions),
            register_failures: of(&self.device.register_failures),
            deregister_failures: of(&self.device.deregister_failures),
            registrations: if counted { self.read().len() as u64 } else { 0 },
            pinned_bytes: if counted { self.device.pinned() } else { 0 },
        }
    }

    /// Looks `range` up and counts the hit.
    #[inline]
    pub(super) fn hit(&self, range: AddressRange) -> Option<Arc<Live<D>>> {
        let live = self.vouched(range, self.clock.load(Ordering::Relaxed) + 1)?;
        self.count_hit();
        Some(live)
    }

    /// Looks `range` up at time `now`. Ignores a registration that the device does not vouch for
    /// (K9).
    #[inline]
    pub(super) fn vouched(&self, range: AddressRange, now: u64) -> Option<Arc<Live<D>>> {
        self.look_up(range, now).filter(|live| self.is_vouched_for(live))
    }

    /// Asks the device whether `live` is still valid (K9). If not, look-ups no longer find it.
    #[inline]
    pub(super) fn is_vouched_for(&self, live: &Arc<Live<D>>) -> bool {
        let valid = self.device.still_valid(live.range, live.handle());
        if !valid {
            self.outdate(live);
        }
        valid
    }

    #[inline]
    fn count_hit(&self) {
        let ours = counter();
        let hits = &self.hits[ours];
        if ours < COUNTERS - 1 {
            // No other thread writes to this counter.
            hits.store(hits.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        } else {
            hits.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Looks up every piece of `range`. Returns and counts them only if all are found.
    pub(super) fn hit_all(&self, range: AddressRange) -> Option<Vec<Arc<Live<D>>>> {
        let now = self.clock.load(Ordering::Relaxed) + 1;
        let all: Vec<_> = self
            .limits
            .pieces(range)
            .map(|piece| self.vouched(piece, now))
            .collect::<Option<_>>()?;
        all.iter().for_each(|_| self.count_hit());
        Some(all)
    }

    /// Looks `range` up at time `now`. Checks the gate first: a look-up that finds the gate open
    /// sees every invalidation made while it was closed.
    #[inline]
    pub(super) fn look_up(&self, range: AddressRange, now: u64) -> Option<Arc<Live<D>>> {
        if self.space.shared().is_shut() {
            return None;
        }
        self.find(&self.read(), range, now)
    }

    #[inline]
    fn find(
        &self,
        table: &Table<Entry<D>, Live<D>>,
        range: AddressRange,
        now: u64,
    ) -> Option<Arc<Live<D>>> {
        if self.limits.exact {
            return table.exactly(self.limits.pages(range), now);
        }
        table.covering(range, now)
    }

    /// Returns an attempt whose registration will serve a `get` of `range`.
    fn attempt<'a>(
        &self,
        table: &'a Table<Entry<D>, Live<D>>,
        range: AddressRange,
    ) -> Option<(Key, &'a Arc<Entry<D>>)> {
        if self.limits.exact {
            return table.attempt(self.limits.pages(range), true);
        }
        table.attempt(range, false)
    }

    /// Withdraws a registration that the device no longer vouches for (K9).
    fn outdate(&self, live: &Arc<Live<D>>) {
        let found = live.entry.key().and_then(|key| self.take(key));
        self.outdated.fetch_add(u64::from(found.is_some()), Ordering::Relaxed);
        live.entry.leave();
    }

    /// Returns `wanted` extended by every overlapping registration and attempt. With
    /// [`Merge::Touching`], adjacent registrations count as well.
    pub(super) fn united(&self, wanted: AddressRange) -> AddressRange {
        let table = self.read();
        let union = table.united(wanted);
        if self.limits.merge == Merge::Touching { table.merged(union) } else { union }
    }

    /// Withdraws every registration in `range` that the device does not vouch for. Returns `true`
    /// if there was one.
    pub(super) fn outdate_all(&self, range: AddressRange) -> bool {
        let lives = self.read().lives(range);
        let mut any = false;
        for live in lives {
            any |= !self.is_vouched_for(&live);
        }
        any
    }

    /// Returns a registration that covers `range`, or joins or begins an attempt to register it.
    ///
    /// The attempt is of `target` if that is given. The caller has then checked that nothing is in
    /// its way.
    pub(super) fn find_or_begin(
        self: &Arc<Self>,
        range: AddressRange,
        target: Option<AddressRange>,
    ) -> Result<Found<D>, GetError<D::Error>> {
        let now = self.clock.fetch_add(2, Ordering::Relaxed) + 2;
        let wanted = self.limits.pages(range);
        loop {
            let (known, target) = {
                let table = self.read();
                if let Some(live) = self.find(&table, range, now) {
                    return Ok(Found::Live(live));
                }
                let known = self.attempt(&table, range).map(|(key, entry)| (key, entry.clone()));
                let merges =
                    known.is_none() && target.is_none() && self.limits.merge == Merge::Touching;
                let merged = if merges { table.merged(wanted) } else { wanted };
                (
                    known,
                    target.unwrap_or(if self.limits.allow(merged, wanted) {
                        merged
                    } else {
                        wanted
                    }),
                )
            };
            if let Some((key, entry)) = known {
                match Claim::new(&entry) {
                    Some(claim) => return Ok(Found::Attempt(claim, now)),
                    // The attempt is over and is about to leave the table itself.
                    None => self.reject(key),
                }
                continue;
            }
            // Without the table's lock: `subscribe` takes the lock of the space.
            let claim = self.subscribe(target)?;
            match self.begin(&claim, range, now) {
                Begun::Free => return Ok(Found::Attempt(claim, now)),
                Begun::Late => {}
                Begun::Blocked => return Ok(Found::Blocked),
            }
        }
    }

    /// Begins the attempt of `claim`, unless something serves `range` by now or is in the way.
    pub(super) fn begin(&self, claim: &Claim<D>, range: AddressRange, now: u64) -> Begun {
        let entry = claim.entry();
        self.write(|table| {
            if self.find(table, range, now).is_some() || self.attempt(table, range).is_some() {
                return Begun::Late;
            }
            // Checks again for leaving registrations that overlap: one may have appeared since the
            // caller looked.
            if !table.is_free(entry.range) {
                return Begun::Blocked;
            }
            entry.is_at(table.begin(entry.range, entry.clone()));
            Begun::Free
        })
    }

    pub(super) fn subscribe(
        self: &Arc<Self>,
        target: AddressRange,
    ) -> Result<Claim<D>, GetError<D::Error>> {
        let shelf: Weak<Self> = Arc::downgrade(self);
        let claim = Claim::begin(target, self.device.clone(), shelf);
        match self.space.insert(target, claim.entry().guardian()) {
            Ok(subscription) => claim.entry().subscribed(subscription),
            Err(_) => return Err(GetError::Unwatched(Unwatched::Released)),
        }
        Ok(claim)
    }

    /// Returns every entry that overlaps `target`. Returns `None` if a registration or attempt
    /// already serves `range`.
    pub(super) fn in_the_way(
        &self,
        target: AddressRange,
        range: AddressRange,
    ) -> Option<Vec<Arc<Entry<D>>>> {
        let table = self.read();
        if self.find(&table, range, 0).is_some() || self.attempt(&table, range).is_some() {
            return None;
        }
        Some(table.overlapping(target))
    }

    /// Withdraws `entry` because another range needs its place. Returns `true` if look-ups found it
    /// until now.
    pub(super) fn give_way(&self, entry: &Entry<D>) -> bool {
        let Some(live) = entry.key().and_then(|key| self.take(key)) else { return false };
        let merged = self.limits.overlap == Overlap::Merge;
        let count = if merged { &self.merges } else { &self.evictions };
        count.fetch_add(1, Ordering::Relaxed);
        entry.leave();
        drop(live);
        true
    }
}

impl<D: Device> Shelf<D> for Core<D> {
    fn put(&self, key: Key, live: Arc<Live<D>>) -> Result<Vec<Arc<Live<D>>>, Arc<Live<D>>> {
        let range = live.range;
        let merges = self.limits.merge == Merge::Touching;
        let replaced = self.write(|table| {
            let published = table.publish(key, live);
            published.map(|()| if merges { table.replace(key, range) } else { Vec::new() })
        })?;
        if !replaced.is_empty() {
            self.merges.fetch_add(replaced.len() as u64, Ordering::Relaxed);
            self.replaced.lock().extend(replaced.iter().map(|live| live.entry.clone()));
        }
        Ok(replaced)
    }

    fn take(&self, key: Key) -> Option<Arc<Live<D>>> {
        self.write(|table| table.withdraw(key))
    }

    fn reject(&self, key: Key) {
        self.write(|table| table.reject(key));
    }

    fn idle(&self, key: Key) {
        let table = self.read();
        let mut ready = self.ready.lock();
        // Rotates the first two: drops the ones that are over and queues the others again. This
        // bounds the queue even if no miss looks after it.
        for _ in 0..2 {
            match ready.pop_front() {
                Some(key) if table.entry(key).is_some() => ready.push_back(key),
                _ => {}
            }
        }
        ready.push_back(key);
    }

    fn forget(&self, key: Key) {
        let forgotten = self.write(|table| table.forget(key));
        drop(forgotten);
    }
}

impl<D: Device> Drop for Standing<D> {
    /// The last handle is gone, and no look-up can find anything. Deregisters idle registrations
    /// that the device releases at once. Registrations in use belong to their users.
    fn drop(&mut self) {
        let (entries, lives) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).drain();
        if entries.first().is_some_and(|entry| entry.device.source.is_inert()) {
            core::mem::forget((entries, lives));
            return;
        }
        for entry in &entries {
            entry.orphan();
        }
        drop(lives);
    }
}
