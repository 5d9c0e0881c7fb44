//! What all handles of a cache share: the shelf on which registrations stand.
#![forbid(unsafe_code)]

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
use crossbeam_utils::CachePadded;
use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard};
use futures::future::{FutureExt, join_all};
use std::sync::PoisonError;

/// Counters of hits, so that threads do not share one.
const COUNTERS: usize = 16;
/// Registrations on their way out that a miss looks after.
const LOOKED_AFTER: usize = 3;

pub(super) struct Core<D: Device> {
    pub(super) space: AddressSpace,
    pub(super) device: Arc<Guarded<D>>,
    pub(super) limits: Limits,
    /// There is a source, which the process may have lost.
    watched: bool,
    hits: [CachePadded<AtomicU64>; COUNTERS],
    /// Rises by two with each miss, so that a look-up is later than the miss before it.
    clock: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) collisions: AtomicU64,
    merges: AtomicU64,
    evictions: AtomicU64,
    outdated: AtomicU64,
    /// Callers for whose registrations the device has to let go of others.
    pub(super) turns: Arc<Turns>,
    /// Registrations whose last user has let go, and which the device has still to let go.
    ready: Lock<VecDeque<Key>>,
    /// Registrations that larger ones have replaced.
    replaced: Lock<Vec<Arc<Entry<D>>>>,
    /// Dropped last: what it holds may then be the last that has the space.
    table: Standing<D>,
}

/// The table. Look-ups take one shard of its lock, changes all.
struct Standing<D: Device>(ShardedLock<Table<Entry<D>, Live<D>>>);

pub(super) enum Found<D: Device> {
    Live(Arc<Live<D>>),
    /// What will cover the range, and the time.
    Attempt(Claim<D>, u64),
    /// Something is in its way again.
    Blocked,
}

/// Which counter this thread counts in: one of its own, or the last, which is everybody's once
/// there have been many threads.
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

    /// Whether this is a child of the process that the cache is of (M4).
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
        // A thread of the parent may have held the locks when it forked (M4).
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

    /// A look-up, counted.
    #[inline]
    pub(super) fn hit(&self, range: AddressRange) -> Option<Arc<Live<D>>> {
        let live = self.vouched(range, self.clock.load(Ordering::Relaxed) + 1)?;
        self.count_hit();
        Some(live)
    }

    /// A look-up at a time. What its device does not vouch for is not found.
    #[inline]
    pub(super) fn vouched(&self, range: AddressRange, now: u64) -> Option<Arc<Live<D>>> {
        self.look_up(range, now).filter(|live| self.is_vouched_for(live))
    }

    /// Whether the device vouches for what a look-up has found. It is not found again otherwise.
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
            // Nobody else counts in it.
            hits.store(hits.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        } else {
            hits.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Look-ups of all that `range` takes, counted if all find something.
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

    /// A look-up at a time. The gate first: whoever finds it open sees what was invalidated while
    /// it was closed.
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

    /// What is being registered and will do for `range`.
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

    /// Takes one away whose device says that it is not of the memory there any more.
    #[cold]
    fn outdate(&self, live: &Arc<Live<D>>) {
        let found = live.entry.key().and_then(|key| self.take(key));
        self.outdated.fetch_add(u64::from(found.is_some()), Ordering::Relaxed);
        live.entry.leave();
    }

    /// `wanted` with all that overlaps it, or touches it where that merges, and is registered or
    /// being so.
    pub(super) fn united(&self, wanted: AddressRange) -> AddressRange {
        let table = self.read();
        let union = table.united(wanted);
        if self.limits.merge == Merge::Touching { table.merged(union) } else { union }
    }

    /// Takes away what is registered of `range` and its device does not vouch for. Says whether
    /// there was anything.
    pub(super) fn outdate_all(&self, range: AddressRange) -> bool {
        let lives = self.read().lives(range);
        let mut any = false;
        for live in lives {
            any |= !self.is_vouched_for(&live);
        }
        any
    }

    /// What covers `range`, or an attempt to register that will: `target`, if somebody has said so,
    /// who has seen that nothing is in its way.
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
                    // It is over, and about to say so itself.
                    None => self.reject(key),
                }
                continue;
            }
            // Outside of the lock: to subscribe takes one of its own.
            let claim = self.subscribe(target)?;
            let entry = claim.entry();
            let begun = self.write(|table| {
                let late =
                    self.find(table, range, now).is_some() || self.attempt(table, range).is_some();
                // What has been leaving since it was looked at, too.
                let free = !late && table.is_free(target);
                if free {
                    entry.is_at(table.begin(target, entry.clone()));
                }
                (free, late)
            });
            match begun {
                (true, _) => return Ok(Found::Attempt(claim, now)),
                // Another caller was quicker.
                (false, true) => {}
                (false, false) => return Ok(Found::Blocked),
            }
        }
    }

    fn subscribe(self: &Arc<Self>, target: AddressRange) -> Result<Claim<D>, GetError<D::Error>> {
        let shelf: Weak<Self> = Arc::downgrade(self);
        let claim = Claim::begin(target, self.device.clone(), shelf);
        match self.space.insert(target, claim.entry().guardian()) {
            Ok(subscription) => claim.entry().subscribed(subscription),
            Err(_) => return Err(GetError::Unwatched(Unwatched::Released)),
        }
        Ok(claim)
    }

    /// Gives up idle registrations that overlap `range`.
    fn give_up_idle(&self, range: AddressRange) -> Vec<Arc<Entry<D>>> {
        self.given_up(self.write(|table| table.give_up_idle(range)))
    }

    /// Gives up idle registrations while there are more than the limits allow.
    fn give_up_over(&self) -> Vec<Arc<Entry<D>>> {
        let Limits { max_bytes, max_registrations, .. } = self.limits;
        if !self.limits.are_set() {
            return Vec::new();
        }
        self.given_up(self.write(|table| table.give_up_over(max_bytes, max_registrations)))
    }

    fn given_up(&self, lives: Vec<Arc<Live<D>>>) -> Vec<Arc<Entry<D>>> {
        self.evictions.fetch_add(lives.len() as u64, Ordering::Relaxed);
        lives
            .into_iter()
            .map(|live| {
                let entry = live.entry.clone();
                entry.leave();
                drop(live);
                entry
            })
            .collect()
    }

    /// Gives up what the limits say, and looks after some of what is on its way out for other
    /// reasons. Returns what the device has still to let go of.
    pub(super) fn tidy(&self) -> Vec<Arc<Entry<D>>> {
        let mut gone = self.give_up_over();
        gone.append(&mut self.replaced.lock());
        for _ in 0..LOOKED_AFTER {
            let Some(key) = self.ready.lock().pop_front() else { break };
            let entry = self.read().entry(key).cloned();
            if entry.is_some_and(|entry| !entry.goes_on()) {
                self.ready.lock().push_back(key);
            }
        }
        // Those in use go when their users let go.
        gone.retain(|entry| {
            entry.is_handed_back() && entry.leaving().is_some_and(|leaving| !leaving.poke(1))
        });
        gone
    }

    /// Gives up all that is idle, and waits for the device to let go. Says whether there was
    /// anything.
    pub(super) async fn make_room(&self) -> bool {
        let mut gone = self.give_up_idle(AddressRange::ALL);
        let (_, leaving) = self.read().unsettled(AddressRange::ALL);
        gone.extend(
            leaving.into_iter().filter(|entry| entry.is_handed_back() && !entry.is_stuck()),
        );
        let any = !gone.is_empty();
        until_gone(gone).await;
        any
    }

    /// What is in the way of registering `target` for `range`: all that overlaps it. `None` if
    /// something will do for `range` already.
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

    /// Takes one away because another is to have its place. Says whether look-ups found it.
    pub(super) fn give_way(&self, entry: &Entry<D>) -> bool {
        let Some(live) = entry.key().and_then(|key| self.take(key)) else { return false };
        let merged = self.limits.overlap == Overlap::Merge;
        let count = if merged { &self.merges } else { &self.evictions };
        count.fetch_add(1, Ordering::Relaxed);
        entry.leave();
        drop(live);
        true
    }

    /// Takes all that overlaps `range` away from look-ups, and waits until what nobody uses there
    /// is over.
    pub(super) async fn flush(&self, range: AddressRange) {
        let (begun, leaving) = self.read().unsettled(range);
        // What nobody waits for any more is finished first. What somebody waits for is begun again.
        let (awaited, left): (Vec<_>, Vec<_>) =
            begun.into_iter().partition(|entry| entry.has_claims());
        for entry in awaited.into_iter().filter(|entry| entry.registering().is_some()) {
            entry.flushed.store(true, Ordering::Release);
            if let Some(key) = entry.key() {
                self.reject(key);
                // Those who wait for it may go away.
                self.idle(key);
            }
        }
        let left = left.into_iter().chain(leaving.into_iter().filter(|entry| !entry.has_claims()));
        join_all(left.filter_map(|entry| entry.registering())).await;
        let mut all = self.given_up(self.write(|table| table.give_up(range)));
        all.extend(self.read().unsettled(range).1);
        all.retain(|entry| entry.is_handed_back());
        gone(all, Entry::is_lost).await;
    }
}

/// Waits until those that nobody uses are over, or their device refuses: those are tried again
/// another time.
pub(super) async fn until_gone<D: Device>(mut entries: Vec<Arc<Entry<D>>>) {
    entries.retain(|entry| entry.is_handed_back());
    gone(entries, Entry::is_stuck).await;
}

/// Waits until those on their way out are over, or not worth waiting for.
pub(super) async fn gone<D: Device>(
    entries: Vec<Arc<Entry<D>>>,
    hopeless: impl Fn(&Entry<D>) -> bool,
) {
    let mut waits: Vec<_> =
        entries.into_iter().filter_map(|entry| Some((entry.leaving()?.wait(), entry))).collect();
    core::future::poll_fn(|cx| {
        waits
            .retain_mut(|(leaving, entry)| leaving.poll_unpin(cx).is_pending() && !hopeless(entry));
        if waits.is_empty() { core::task::Poll::Ready(()) } else { core::task::Poll::Pending }
    })
    .await;
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
        // Those that others have ended meanwhile go, also if nobody else looks.
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
    /// The last handle is gone, and nobody finds anything any more. What is idle is deregistered
    /// if the device does it at once; what is in use is its users'.
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
