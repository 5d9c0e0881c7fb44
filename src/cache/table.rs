//! What is registered: look-up, stages of a registration, limits.
#![forbid(unsafe_code)]

use super::attempt::{Attempt, Guardian, Teardown};
use super::{Device, Merge};
use crate::index::{IntervalIndex, Ordered, Ranged};
use crate::range::AddressRange;
use crate::subscription::Subscription;
use crate::sync::Arc;
use alloc::collections::VecDeque;
use alloc::sync::Weak;
use alloc::vec::Vec;
use core::any::Any;
use core::num::NonZeroU64;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use futures::channel::oneshot;
use slab::Slab;

/// Where a registration is in the table; used again, so `serial` tells it from an earlier one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Key {
    pub(super) slot: u32,
    /// Never 0, so that a place in the index takes no more than the key itself.
    pub(super) serial: NonZeroU64,
}

impl Key {
    pub(super) fn slot(self) -> usize {
        self.slot as usize
    }
}

impl Ordered for Key {
    fn order(self) -> u64 {
        self.serial.get()
    }
}

/// A registration that the device has. The table has one reference while look-ups find it, each user one; the last to go hands the handle to the
/// teardown. What a look-up touches comes first, mostly on the cache line of the counts.
#[repr(C)]
pub(super) struct Live<D: Device> {
    /// When it was used last, in misses.
    pub(super) used: AtomicU64,
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
    pub(super) serial: NonZeroU64,
    pub(super) range: AddressRange,
    pub(super) stage: Stage<D>,
    pub(super) attempt: Option<Attempt<D>>,
    /// When it was asked for.
    pub(super) began: u64,
    /// The range is under the notifier's eyes as long as the slot exists.
    pub(super) _subscription: Option<Arc<Subscription<Guardian<D>>>>,
    pub(super) _watch: Option<alloc::boxed::Box<dyn Any + Send + Sync>>,
}

pub(super) struct Table<D: Device> {
    /// Live registrations.
    pub(super) index: IntervalIndex<Ranged<Key>>,
    pub(super) slots: Slab<Slot<D>>,
    /// The live ones again, by slot: all that a look-up needs, close together.
    pub(super) lives: Vec<Option<Arc<Live<D>>>>,
    /// Attempts that have begun and not ended.
    pub(super) under_way: Vec<Key>,
    /// Registrations on their way out.
    pub(super) leaving: Vec<Key>,
    /// Live registrations, in order of when they were used last, as far as that is known: a look-up only notes the time.
    pub(super) oldest: VecDeque<(Key, u64)>,
    /// Of the next registration.
    pub(super) serial: NonZeroU64,
    pub(super) live_bytes: u64,
    pub(super) live: usize,
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

impl<D: Device> Table<D> {
    pub(super) fn new() -> Self {
        Self {
            index: IntervalIndex::new(),
            slots: Slab::new(),
            lives: Vec::new(),
            under_way: Vec::new(),
            leaving: Vec::new(),
            oldest: VecDeque::new(),
            serial: NonZeroU64::MIN,
            live_bytes: 0,
            live: 0,
        }
    }

    pub(super) fn get(&mut self, key: Key) -> Option<&mut Slot<D>> {
        self.slots.get_mut(key.slot()).filter(|slot| slot.serial == key.serial)
    }

    #[inline]
    pub(super) fn covering(&self, range: AddressRange, now: u64) -> Option<Arc<Live<D>>> {
        let mut found = None;
        self.index.overlapping(range, |Ranged { range: own, value: key }| {
            if own.covers(range)
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
    pub(super) fn merged(&self, wanted: AddressRange, merge: Merge) -> AddressRange {
        let mut target = wanted;
        if merge == Merge::Touching {
            loop {
                let (mut start, mut last) = (target.start(), target.last());
                self.index.overlapping(touching(target), |Ranged { range, .. }| {
                    (start, last) = (start.min(range.start()), last.max(range.last()));
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
        self.index.insert(Ranged { range, value: key });
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
        self.index.remove(Ranged { range, value: key });
        self.live -= 1;
        self.live_bytes -= range.len().unwrap_or(u64::MAX);
        Some((live, teardown))
    }

    /// Live registrations that a new one of `range` replaces.
    pub(super) fn replaced(&self, range: AddressRange, merge: Merge) -> Vec<Key> {
        let mut replaced = Vec::new();
        if merge == Merge::Touching {
            self.index.overlapping(range, |Ranged { range: own, value: key }| {
                if range.covers(own) {
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
