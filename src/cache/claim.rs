//! A caller's interest in a registration.
#![forbid(unsafe_code)]

use super::device::{Device, Guarded};
use super::entry::{Entry, Live, Shelf};
use crate::range::AddressRange;
use crate::sync::{Arc, Weak};

/// A caller's interest in a registration. Without any, one that the device was not asked for is
/// over.
pub(super) struct Claim<D: Device>(Arc<Entry<D>>);

impl<D: Device> Claim<D> {
    /// On a new registration.
    pub(super) fn begin(range: AddressRange, device: Arc<Guarded<D>>, shelf: Weak<dyn Shelf<D>>) -> Self {
        Self(Arc::new(Entry::claimed(range, device, shelf)))
    }

    /// `None` if it is over or on its way out.
    pub(super) fn new(entry: &Arc<Entry<D>>) -> Option<Self> {
        entry.claim().then(|| Self(entry.clone()))
    }

    /// On one that its caller needs together with others: limits leave it alone as if it were in
    /// use, and no invalidation waits for it (K7). `None` if it is on its way out.
    pub(super) fn keep(live: Arc<Live<D>>) -> Option<Self> {
        let claim = Self::new(&live.entry)?;
        claim.0.keep(live).then_some(claim)
    }

    pub(super) fn entry(&self) -> &Arc<Entry<D>> {
        &self.0
    }
}

impl<D: Device> Drop for Claim<D> {
    fn drop(&mut self) {
        if self.0.device.source.is_inert() {
            core::mem::forget(self.0.clone());
            return;
        }
        self.0.unclaim();
    }
}
