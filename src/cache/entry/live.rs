//! A live registration, shared by its users.
#![forbid(unsafe_code)]

use super::Entry;
use crate::cache::device::Device;
use crate::cache::table::Found;
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicU64, Ordering};
use futures::channel::oneshot;

/// A registration that the device holds.
///
/// The shelf holds one reference while look-ups find it, and each user holds one. The last one to
/// drop sends the handle to the task that waits for it. The fields that a look-up touches come
/// first, so that they share a cache line with the reference counts.
#[repr(C)]
pub(in crate::cache) struct Live<D: Device> {
    /// Time of the last use, by the clock of misses.
    used: AtomicU64,
    /// `None` only during the drop.
    handle: Option<D::Handle>,
    pub(in crate::cache) range: AddressRange,
    /// Sends the handle to the task that waits for the last user.
    gone: Option<oneshot::Sender<D::Handle>>,
    pub(in crate::cache) entry: Arc<Entry<D>>,
}

impl<D: Device> Live<D> {
    pub(in crate::cache) fn new(
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
    pub(in crate::cache) fn handle(&self) -> &D::Handle {
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
        // Before the handle is sent: that wakes those who wait for the deregistration, and they may
        // look for what is unused.
        self.entry.unused.store(true, Ordering::Release);
        // The receiver exists: `leaving` ends with the handle, and an orphan that is given up was
        // marked as handed back before.
        let _ = gone.send(handle);
        // Only now: whoever sees the mark may give `leaving` up, and the handle must be in it by
        // then, so that the device has been asked.
        self.entry.handed_back.store(true, Ordering::Release);
        match (self.entry.shelf.upgrade(), self.entry.key.get()) {
            (Some(shelf), Some(key)) => shelf.idle(*key),
            _ => self.entry.drive(),
        }
    }
}
