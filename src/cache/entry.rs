//! One registration: an ordinary driver with its own notifier, lock and futures.
//!
//! It goes through its [`Phase`]s under its [`DriverLock`]. Its first pass takes that lock, as in
//! any other driver. It knows the cache only as a [`Shelf`]. If the cache is dropped, the
//! registration lives on until the last user and the device have released it (K1).
//!
//! Lock order: the lock of a registration, then the lock of the shelf. A reference that may be the
//! last one is dropped outside of both.
#![forbid(unsafe_code)]

mod guardian;
mod live;

pub(super) use guardian::Guardian;
pub(super) use live::Live;

use super::device::{Device, Guarded, Orphan};
use super::phase::{Change, Outcome, Phase, Progress, Registering, Step};
use super::table::Key;
use super::task::{Task, Waiter};
use super::watch::Watched;
use crate::foreign::Callback;
use crate::mirror::driver_lock::DriverLock;
use crate::notifier::Sequence;
use crate::range::AddressRange;
use crate::subscription::Subscription;
use crate::sync::{Arc, AtomicBool, AtomicU32, Ordering, Weak};
use alloc::vec::Vec;
use core::future::Future;
use futures::FutureExt;
use std::sync::OnceLock;

/// Number of polls in a row for a device that no waiter drives.
const POKES: u32 = 64;

/// The part of the cache that a registration uses.
pub(super) trait Shelf<D: Device>: Send + Sync {
    /// Publishes `live` to look-ups. Returns the registrations that it replaces, or `live` itself
    /// if the cache has given the attempt up.
    fn put(&self, key: Key, live: Arc<Live<D>>) -> Result<Vec<Arc<Live<D>>>, Arc<Live<D>>>;
    /// Withdraws a registration from look-ups.
    fn take(&self, key: Key) -> Option<Arc<Live<D>>>;
    /// Withdraws an attempt: no further caller joins it.
    fn reject(&self, key: Key);
    /// Queues a registration whose last user has released it, so that a later call drives its
    /// deregistration.
    fn idle(&self, key: Key);
    /// Removes an entry that is over. Takes only the lock of the shelf.
    fn forget(&self, key: Key);
}

/// A registration, from the first request until the device has released the memory.
pub(super) struct Entry<D: Device> {
    pub(super) range: AddressRange,
    pub(super) device: Arc<Guarded<D>>,
    /// The cache. Dead once its last handle is dropped.
    shelf: Weak<dyn Shelf<D>>,
    /// Slot in the table. Set once, when the entry enters it.
    key: OnceLock<Key>,
    progress: DriverLock<Progress<D::Error, Live<D>>>,
    /// Set once, before the entry is shared.
    subscription: OnceLock<Subscription<Guardian<D>>>,
    /// The cache is gone while the device registers. `register` then ends unfinished.
    pub(super) cancelled: AtomicBool,
    /// The last user has released the registration.
    unused: AtomicBool,
    /// `leaving` has the handle of the device.
    handed_back: AtomicBool,
    /// The device refuses to deregister.
    pub(super) stuck: AtomicBool,
    /// A panic of the device has taken the handle, and the device cannot tell whether it still uses
    /// the memory.
    pub(super) lost: AtomicBool,
    /// The memory was invalidated after the registration had left look-ups.
    changed: AtomicBool,
    /// A flush came while the device registered (K3).
    pub(super) flushed: AtomicBool,
    /// How often the registrations of this caller were given to other waiters (K7).
    pub(super) thefts: AtomicU32,
}

impl<D: Device> Entry<D> {
    /// Makes an entry with one claim, which belongs to the caller.
    pub(super) fn claimed(
        range: AddressRange,
        device: Arc<Guarded<D>>,
        shelf: Weak<dyn Shelf<D>>,
    ) -> Self {
        Self {
            range,
            device,
            shelf,
            key: OnceLock::new(),
            progress: DriverLock::new(Progress::new(Phase::Waiting, 1)),
            subscription: OnceLock::new(),
            cancelled: AtomicBool::new(false),
            unused: AtomicBool::new(false),
            handed_back: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            changed: AtomicBool::new(false),
            flushed: AtomicBool::new(false),
            thefts: AtomicU32::new(0),
        }
    }

    /// Returns the notifier of this entry.
    pub(super) fn guardian(self: &Arc<Self>) -> Guardian<D> {
        Guardian(Arc::downgrade(self))
    }

    /// Stores the subscription. Called once, before the entry is shared.
    pub(super) fn subscribed(&self, subscription: Subscription<Guardian<D>>) {
        let _ = self.subscription.set(subscription);
    }

    /// Stores the key. Called once, under the lock of the shelf.
    pub(super) fn is_at(&self, key: Key) {
        let _ = self.key.set(key);
    }

    pub(super) fn subscription(&self) -> &Subscription<Guardian<D>> {
        self.subscription.get().expect("a registration is subscribed before anybody knows of it")
    }

    /// Returns the slot in the table, if the entry has entered it.
    pub(super) fn key(&self) -> Option<Key> {
        self.key.get().copied()
    }

    pub(super) fn has_claims(&self) -> bool {
        self.progress.lock().claims > 0
    }

    /// Returns `true` if look-ups find the registration and a caller that it was made for has yet
    /// to pick it up.
    pub(super) fn is_kept(&self) -> bool {
        let progress = self.progress.lock();
        progress.claims > 0 && matches!(progress.phase, Phase::Live { .. })
    }

    /// Adds a claim. Returns `false` if the entry is over or leaving.
    pub(super) fn claim(&self) -> bool {
        let mut progress = self.progress.lock();
        let open = !matches!(progress.phase, Phase::Leaving { .. } | Phase::Gone);
        progress.claims += usize::from(open);
        open
    }

    /// Returns `true` if look-ups find the registration.
    pub(super) fn is_live(&self) -> bool {
        matches!(self.progress.lock().phase, Phase::Live { .. })
    }

    /// Holds `live` on behalf of a claim. Returns `false` if the registration is leaving.
    pub(super) fn keep(&self, live: Arc<Live<D>>) -> bool {
        let mut progress = self.progress.lock();
        let found = matches!(progress.phase, Phase::Live { .. });
        progress.keepers += usize::from(found);
        let former = if found { progress.kept.replace(live) } else { Some(live) };
        drop(progress);
        drop(former);
        found
    }

    pub(super) fn unclaim(&self, keeps: bool) {
        let mut progress = self.progress.lock();
        progress.claims -= 1;
        progress.keepers -= usize::from(keeps);
        let kept = if progress.keepers == 0 { progress.kept.take() } else { None };
        let unwanted = progress.claims == 0 && matches!(progress.phase, Phase::Waiting);
        if unwanted {
            progress.phase = Phase::Gone;
        }
        drop(progress);
        drop(kept);
        if unwanted {
            self.leave_shelf();
        }
    }

    /// Returns the invalidation that ended the registration, if one did.
    pub(super) fn ended_by(&self) -> Option<Change> {
        self.progress.lock().by
    }

    /// Returns `true` if the memory changed since it was registered. The range may be unmapped
    /// then.
    pub(super) fn has_changed(&self) -> bool {
        self.changed.load(Ordering::Acquire) || self.ended_by().is_some()
    }

    /// Returns `true` if the last user has released the registration.
    pub(super) fn is_unused(&self) -> bool {
        self.unused.load(Ordering::Acquire)
    }

    /// Returns `true` if the deregistration has the device's handle, so that polling it asks the
    /// device.
    fn is_handed_back(&self) -> bool {
        self.handed_back.load(Ordering::Acquire)
    }

    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Acquire)
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(super) fn step(&self) -> Step<D::Error> {
        match &self.progress.lock().phase {
            Phase::Waiting => Step::Begin,
            Phase::Registering { task } => Step::Join(task.wait()),
            Phase::Live { .. } => Step::Over(Outcome::Live),
            Phase::Leaving { .. } | Phase::Gone => Step::Over(Outcome::Collided(None)),
        }
    }

    /// Begins to register. Returns `None` if the memory was invalidated since `read_begin`, or if
    /// another caller began first. `task` and `watched` are arguments so that they are dropped
    /// after the guard.
    pub(super) fn begin(
        &self,
        sequence: Sequence,
        task: Registering<D::Error>,
        watched: Watched,
    ) -> Option<Waiter<Outcome<D::Error>>> {
        let mut progress = self.progress.lock();
        // A closed gate is no reason to stop: the look-up checks the gate.
        let valid = !self.subscription().entry().own.is_past(sequence.0);
        if !valid || !matches!(progress.phase, Phase::Waiting) {
            return None;
        }
        let waiter = task.wait();
        progress.phase = Phase::Registering { task };
        // A waiting entry has no watch, so nothing is dropped here.
        progress.watched = watched;
        Some(waiter)
    }

    /// Publishes what the device has registered to look-ups. If the memory was invalidated since
    /// `read_begin`, the registration leaves at once, and the invalidation is returned.
    pub(super) fn publish(
        &self,
        sequence: Sequence,
        live: Arc<Live<D>>,
        leaving: &Task<()>,
    ) -> Result<(), Option<Change>> {
        let shelf = self.shelf.upgrade();
        let (mut live, mut replaced) = (Some(live), Vec::new());
        let (former, by) = {
            let mut progress = self.progress.lock();
            let valid = !self.subscription().entry().own.is_past(sequence.0);
            if let (Some(shelf), Some(key)) = (&shelf, self.key.get()) {
                if valid && let Some(published) = live.take() {
                    match shelf.put(*key, published) {
                        Ok(others) => replaced = others,
                        Err(published) => live = Some(published),
                    }
                } else {
                    shelf.reject(*key);
                }
            }
            let leaving = leaving.clone();
            let phase =
                if live.is_none() { Phase::Live { leaving } } else { Phase::Leaving { leaving } };
            (core::mem::replace(&mut progress.phase, phase), progress.by)
        };
        drop((former, shelf));
        for other in replaced {
            other.entry.leave();
        }
        match live {
            None => Ok(()),
            Some(live) => {
                // No caller has seen it, so the device deregisters it at once.
                drop(live);
                let subscription = self.subscription();
                subscription.shared().collided(subscription.entry());
                Err(by)
            }
        }
    }

    /// Returns a future that waits until the device has registered, if it is registering.
    pub(super) fn registering(&self) -> Option<impl Future<Output = ()> + Send + use<D>> {
        match &self.progress.lock().phase {
            Phase::Registering { task } => Some(self.ended(task)),
            _ => None,
        }
    }

    /// Waits for `task` and drops its result. The drop is guarded, because an error is the device's
    /// code (F1).
    fn ended(&self, task: &Registering<D::Error>) -> impl Future<Output = ()> + Send + use<D> {
        let losses = self.device.losses.clone();
        task.wait().map(move |outcome| {
            losses.run(Callback::Device, |_| drop(outcome));
        })
    }

    /// Moves a live registration to [`Phase::Leaving`]. Called after it was withdrawn from
    /// look-ups.
    pub(super) fn leave(&self) {
        let mut progress = self.progress.lock();
        if let Phase::Live { leaving } = &progress.phase {
            let leaving = leaving.clone();
            progress.phase = Phase::Leaving { leaving };
        }
        let kept = progress.kept.take();
        drop(progress);
        drop(kept);
    }

    /// Returns the task that waits for the users and the device, if the registration is leaving.
    pub(super) fn leaving(&self) -> Option<Task<()>> {
        match &self.progress.lock().phase {
            Phase::Leaving { leaving } => Some(leaving.clone()),
            _ => None,
        }
    }

    /// Polls the device once for a registration that look-ups do not find. Returns `true` if that
    /// is over.
    pub(super) fn goes_on(&self) -> bool {
        let (registering, leaving) = match &self.progress.lock().phase {
            Phase::Registering { task } => (Some(task.clone()), None),
            Phase::Leaving { leaving } => (None, Some(leaving.clone())),
            _ => return true,
        };
        let over = registering.is_none_or(|task| task.poke(1));
        over && leaving.is_none_or(|leaving| leaving.poke(1))
    }

    /// Ends the entry. The device holds nothing for it any more.
    pub(super) fn over(&self) {
        let (phase, watched) = {
            let mut progress = self.progress.lock();
            (
                core::mem::replace(&mut progress.phase, Phase::Gone),
                core::mem::take(&mut progress.watched),
            )
        };
        self.leave_shelf();
        drop((phase, watched));
    }

    fn leave_shelf(&self) {
        if let (Some(shelf), Some(key)) = (self.shelf.upgrade(), self.key.get()) {
            shelf.forget(*key);
        }
    }

    /// Called when the last handle of the cache is dropped. Later requests are impossible. A
    /// registration in use lives on until its users release it.
    pub(super) fn orphan(self: &Arc<Self>) {
        let (task, former, kept) = {
            let mut progress = self.progress.lock();
            let kept = progress.kept.take();
            let (task, former) = match &progress.phase {
                Phase::Waiting => {
                    (None, Some(core::mem::replace(&mut progress.phase, Phase::Gone)))
                }
                Phase::Registering { task } => (Some(task.clone()), None),
                Phase::Live { leaving } => {
                    let leaving = leaving.clone();
                    (
                        None,
                        Some(core::mem::replace(&mut progress.phase, Phase::Leaving { leaving })),
                    )
                }
                Phase::Leaving { .. } | Phase::Gone => (None, None),
            };
            (task, former, kept)
        };
        drop((former, kept));
        if let Some(task) = task {
            self.cancelled.store(true, Ordering::Release);
            task.poke(1);
        }
        if self.is_unused() {
            self.drive();
        }
    }

    /// Polls the deregistration without a waiter. What takes longer is left to the next
    /// invalidation, or given up if no invalidation is possible any more.
    fn drive(self: &Arc<Self>) {
        let Some(leaving) = self.leaving() else { return };
        // Without the handle it stays: the thread that is about to send it drives it after that.
        if !leaving.poke(POKES) && self.is_handed_back() {
            let orphan: Arc<dyn Orphan> = self.clone();
            self.device.left_behind(&orphan);
        }
    }
}

impl<D: Device> Orphan for Entry<D> {
    /// Returns `true` if only subscriptions hold the space. It can no longer be invalidated then.
    fn is_unreachable(&self) -> bool {
        let shared = self.subscription().shared();
        let sources = usize::from(self.device.source.is_abandoned());
        // A notifier is registered after its handle was made, and its handle is dropped after it
        // was removed. So a concurrent change makes the count of handles too high, never too low.
        shared.with(|state, _| {
            let registered = state.protocol.registered();
            Arc::strong_count(shared) <= registered + sources
        })
    }

    fn give_up(&self) {
        let Some(leaving) = self.leaving() else { return };
        // The task keeps the registration alive, and the registration keeps the space alive. The
        // same holds if it is the pass of an abandoned invalidation.
        if leaving.give_up() {
            let mut progress = self.progress.lock();
            let former = (
                core::mem::replace(&mut progress.phase, Phase::Gone),
                core::mem::take(&mut progress.watched),
            );
            drop(progress);
            drop(former);
        }
    }
}

impl<D: Device> Drop for Entry<D> {
    fn drop(&mut self) {
        if self.device.source.is_inert() {
            core::mem::forget(self.subscription.take());
            let gone = DriverLock::new(Progress::new(Phase::Gone, 0));
            core::mem::forget(core::mem::replace(&mut self.progress, gone));
            return;
        }
        // Another orphan of this device may have become unreachable with this subscription.
        drop(self.subscription.take());
        self.device.look_at_orphans();
    }
}
