//! One registration: an ordinary driver with a notifier, a lock and futures of its own.
//!
//! It goes through [`Phase`]s under its [`DriverLock`], which its first pass takes like that of any
//! other driver. It knows its cache only as a [`Shelf`], which may be gone: then it lives on until
//! its last user and the device have let go (K1).
//!
//! Locks are taken in one order: that of a registration, then that of the shelf. References that
//! may be the last of anything are dropped outside of both.
#![forbid(unsafe_code)]

use super::device::{Device, Guarded, Orphan};
use super::phase::{Change, Outcome, Phase, Progress, Registering, Step};
use super::table::{Found, Key};
use super::task::{Task, Waiter};
use super::watch::Watched;
use crate::foreign::Callback;
use crate::mirror::driver_lock::DriverLock;
use crate::notifier::{IntervalNotifier, Invalidation, Sequence, WouldBlock};
use crate::pass::PassFuture;
use crate::range::AddressRange;
use crate::subscription::Subscription;
use crate::sync::{Arc, AtomicBool, AtomicU32, AtomicU64, Ordering, Weak};
use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::future::Future;
use futures::FutureExt;
use futures::channel::oneshot;
use std::sync::OnceLock;

/// So often a device may go on at once where nobody waits for it.
const POKES: u32 = 64;

/// What a registration needs of its cache.
pub(super) trait Shelf<D: Device>: Send + Sync {
    /// Lets look-ups find it. Returns what it replaces, or itself if the cache has given it up.
    fn put(&self, key: Key, live: Arc<Live<D>>) -> Result<Vec<Arc<Live<D>>>, Arc<Live<D>>>;
    /// Takes it away from look-ups.
    fn take(&self, key: Key) -> Option<Arc<Live<D>>>;
    /// Takes an attempt away from those who look for one.
    fn reject(&self, key: Key);
    /// Its last user has let go, and the device is to be asked.
    fn idle(&self, key: Key);
    /// It is over. Takes no other lock than the shelf's.
    fn forget(&self, key: Key);
}

/// A registration, from the first who asks for it until the device has let go.
pub(super) struct Entry<D: Device> {
    pub(super) range: AddressRange,
    pub(super) device: Arc<Guarded<D>>,
    /// Where look-ups find it; gone with the last handle of the cache.
    shelf: Weak<dyn Shelf<D>>,
    /// Set when it comes onto the shelf.
    key: OnceLock<Key>,
    progress: DriverLock<Progress<D::Error, Live<D>>>,
    /// Set before anybody else knows of it.
    subscription: OnceLock<Subscription<Guardian<D>>>,
    /// Nobody can ask for what the device registers.
    pub(super) cancelled: AtomicBool,
    /// The last user has let go.
    handed_back: AtomicBool,
    /// The device refuses to deregister it.
    pub(super) stuck: AtomicBool,
    /// A panic of the device has taken its handle, and nobody can know whether it was deregistered.
    pub(super) lost: AtomicBool,
    /// The memory was invalidated when look-ups did not find it any more.
    changed: AtomicBool,
    /// A flush has come while the device registered.
    pub(super) flushed: AtomicBool,
    /// How often what was registered for its caller was given to others who waited.
    pub(super) thefts: AtomicU32,
}

impl<D: Device> Entry<D> {
    /// Makes one that its maker has claimed.
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
            handed_back: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            changed: AtomicBool::new(false),
            flushed: AtomicBool::new(false),
            thefts: AtomicU32::new(0),
        }
    }

    /// The notifier of it.
    pub(super) fn guardian(self: &Arc<Self>) -> Guardian<D> {
        Guardian(Arc::downgrade(self))
    }

    /// Is called once, before anybody else knows of it.
    pub(super) fn subscribed(&self, subscription: Subscription<Guardian<D>>) {
        let _ = self.subscription.set(subscription);
    }

    /// Is called once, under the lock of the shelf.
    pub(super) fn is_at(&self, key: Key) {
        let _ = self.key.set(key);
    }

    pub(super) fn subscription(&self) -> &Subscription<Guardian<D>> {
        self.subscription.get().expect("a registration is subscribed before anybody knows of it")
    }

    /// Where the shelf has it.
    pub(super) fn key(&self) -> Option<Key> {
        self.key.get().copied()
    }

    pub(super) fn has_claims(&self) -> bool {
        self.progress.lock().claims > 0
    }

    /// Whether look-ups find it, and a caller for whom it was registered has still to do so.
    pub(super) fn is_kept(&self) -> bool {
        let progress = self.progress.lock();
        progress.claims > 0 && matches!(progress.phase, Phase::Live { .. })
    }

    /// `false` if it is over or on its way out.
    pub(super) fn claim(&self) -> bool {
        let mut progress = self.progress.lock();
        let open = !matches!(progress.phase, Phase::Leaving { .. } | Phase::Gone);
        progress.claims += usize::from(open);
        open
    }

    /// Whether look-ups find it.
    pub(super) fn is_live(&self) -> bool {
        matches!(self.progress.lock().phase, Phase::Live { .. })
    }

    /// Keeps its registration as if a claim used it. `false` if it is on its way out.
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

    /// The invalidation that has ended it.
    pub(super) fn ended_by(&self) -> Option<Change> {
        self.progress.lock().by
    }

    /// Whether the memory has changed since it was registered: then nothing says that there is any.
    pub(super) fn has_changed(&self) -> bool {
        self.changed.load(Ordering::Acquire) || self.ended_by().is_some()
    }

    /// Whether the last user has let go.
    pub(super) fn is_handed_back(&self) -> bool {
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

    /// Begins to register, unless the memory was invalidated since `read_begin` or somebody else
    /// was quicker. The future and the watch are dropped then, as arguments are: after the guard.
    pub(super) fn begin(
        &self,
        sequence: Sequence,
        task: Registering<D::Error>,
        watched: Watched,
    ) -> Option<Waiter<Outcome<D::Error>>> {
        let mut progress = self.progress.lock();
        // A closed gate does not matter here: it is asked when the registration is looked up.
        let valid = !self.subscription().entry().own.is_past(sequence.0);
        if !valid || !matches!(progress.phase, Phase::Waiting) {
            return None;
        }
        let waiter = task.wait();
        progress.phase = Phase::Registering { task };
        // What waits has none.
        progress.watched = watched;
        Some(waiter)
    }

    /// Lets look-ups find what the device has registered. If the memory was invalidated since
    /// `read_begin`, it only leaves again; what has invalidated it comes back.
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
                // Nobody has seen it: the device lets go at once.
                drop(live);
                let subscription = self.subscription();
                subscription.shared().collided(subscription.entry());
                Err(by)
            }
        }
    }

    /// Waits for the device to register, if it does.
    pub(super) fn registering(&self) -> Option<impl Future<Output = ()> + Send + use<D>> {
        match &self.progress.lock().phase {
            Phase::Registering { task } => Some(self.ended(task)),
            _ => None,
        }
    }

    /// Waits for the device, for one who does not want to know more: an error is the device's code.
    fn ended(&self, task: &Registering<D::Error>) -> impl Future<Output = ()> + Send + use<D> {
        let losses = self.device.losses.clone();
        task.wait().map(move |outcome| {
            losses.run(Callback::Device, |_| drop(outcome));
        })
    }

    /// It was taken away from look-ups.
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

    /// What waits for the users and for the device, if it is on its way out.
    pub(super) fn leaving(&self) -> Option<Task<()>> {
        match &self.progress.lock().phase {
            Phase::Leaving { leaving } => Some(leaving.clone()),
            _ => None,
        }
    }

    /// Asks the device to go on with what look-ups do not find. Says whether that is over.
    pub(super) fn goes_on(&self) -> bool {
        let (registering, leaving) = match &self.progress.lock().phase {
            Phase::Registering { task } => (Some(task.clone()), None),
            Phase::Leaving { leaving } => (None, Some(leaving.clone())),
            _ => return true,
        };
        let over = registering.is_none_or(|task| task.poke(1));
        over && leaving.is_none_or(|leaving| leaving.poke(1))
    }

    /// The device has nothing of it: ends it.
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

    /// The cache is gone: nobody can ask for it any more. What is registered lives on until its
    /// users have let go.
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
        if self.is_handed_back() {
            self.drive();
        }
    }

    /// Asks the device to let go, without anybody who waits for it: what takes time is left to the
    /// next invalidation, or given up if there can be none.
    fn drive(self: &Arc<Self>) {
        let Some(leaving) = self.leaving() else { return };
        if !leaving.poke(POKES) {
            let orphan: Arc<dyn Orphan> = self.clone();
            self.device.left_behind(&orphan);
        }
    }
}

impl<D: Device> Orphan for Entry<D> {
    /// Whether nobody but subscriptions has the space: it cannot be invalidated any more.
    fn is_unreachable(&self) -> bool {
        let shared = self.subscription().shared();
        let sources = usize::from(self.device.source.is_abandoned());
        // A notifier enters after its handle was made, and its handle goes after it has left:
        // counted in between there are handles too many, never too few.
        shared.with(|state, _| {
            let registered = state.protocol.registered();
            Arc::strong_count(shared) <= registered + sources
        })
    }

    fn give_up(&self) {
        let Some(leaving) = self.leaving() else { return };
        // It keeps the registration alive, which keeps the space alive; also as the pass of an
        // invalidation that nobody owns.
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
        // Others of the same device may have found the space in use only because of this one.
        drop(self.subscription.take());
        self.device.look_at_orphans();
    }
}

/// A registration that the device has. The shelf has one reference while look-ups find it, each
/// user one; the last to go hands the handle to the future that waits for it. What a look-up
/// touches comes first, mostly on the cache line of the counts.
#[repr(C)]
pub(super) struct Live<D: Device> {
    /// When it was used last, by the clock of misses.
    used: AtomicU64,
    handle: Option<D::Handle>,
    pub(super) range: AddressRange,
    gone: Option<oneshot::Sender<D::Handle>>,
    pub(super) entry: Arc<Entry<D>>,
}

impl<D: Device> Live<D> {
    pub(super) fn new(
        entry: Arc<Entry<D>>,
        handle: D::Handle,
        gone: oneshot::Sender<D::Handle>,
        used: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicU64::new(used),
            handle: Some(handle),
            range: entry.range,
            gone: Some(gone),
            entry,
        })
    }

    #[inline]
    pub(super) fn handle(&self) -> &D::Handle {
        self.handle.as_ref().expect("the handle goes with the registration")
    }
}

impl<D: Device> Found for Live<D> {
    #[inline]
    fn used(&self) -> &AtomicU64 {
        &self.used
    }
}

impl<D: Device> Drop for Live<D> {
    fn drop(&mut self) {
        if self.entry.device.source.is_inert() {
            core::mem::forget((self.handle.take(), self.gone.take(), self.entry.clone()));
            return;
        }
        let (Some(gone), Some(handle)) = (self.gone.take(), self.handle.take()) else { return };
        self.entry.handed_back.store(true, Ordering::Release);
        if let Err(handle) = gone.send(handle) {
            self.entry.device.drop_handle(handle);
        }
        match (self.entry.shelf.upgrade(), self.entry.key.get()) {
            (Some(shelf), Some(key)) => shelf.idle(*key),
            _ => self.entry.drive(),
        }
    }
}

/// The notifier of one registration.
pub(super) struct Guardian<D: Device>(Weak<Entry<D>>);

impl<D: Device> IntervalNotifier for Guardian<D> {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let Some(entry) = self.0.upgrade() else { return Ok(None) };
        let shelf = entry.shelf.upgrade();
        let (mut live, mut kept) = (None, None);
        let pass = {
            let mut progress = entry.progress.lock_for(invalidation);
            match &mut progress.phase {
                Phase::Waiting => None,
                Phase::Gone => {
                    entry.changed.store(true, Ordering::Release);
                    None
                }
                Phase::Registering { task } => {
                    let pass = PassFuture::new(entry.ended(task));
                    progress.by = Some((invalidation.event(), invalidation.range()));
                    Some(pass)
                }
                Phase::Live { leaving } => {
                    let leaving = leaving.clone();
                    let pass = leaving.wait();
                    progress.phase = Phase::Leaving { leaving };
                    progress.by = Some((invalidation.event(), invalidation.range()));
                    kept = progress.kept.take();
                    live = shelf
                        .as_ref()
                        .zip(entry.key.get())
                        .and_then(|(shelf, key)| shelf.take(*key));
                    entry.device.invalidations.fetch_add(1, Ordering::Relaxed);
                    Some(PassFuture::new(pass))
                }
                Phase::Leaving { leaving } => {
                    entry.changed.store(true, Ordering::Release);
                    Some(PassFuture::new(leaving.wait()))
                }
            }
        };
        // The shelf's references: without users the device is asked when the pass is polled.
        drop((live, kept));
        drop((shelf, entry));
        Ok(pass)
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Owned(alloc::format!("registration with {}", core::any::type_name::<D>()))
    }
}
