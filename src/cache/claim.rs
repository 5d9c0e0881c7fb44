//! A caller's interest in a registration.
#![forbid(unsafe_code)]

use super::device::{Device, Guarded};
use super::entry::{Entry, Live, Shelf};
use crate::range::AddressRange;
use crate::sync::{Arc, Weak};

/// A caller's interest in a registration. Without any, one that the device was not asked for is
/// over.
pub(super) struct Claim<D: Device> {
    entry: Arc<Entry<D>>,
    keeps: bool,
}

impl<D: Device> Claim<D> {
    /// On a new registration.
    pub(super) fn begin(
        range: AddressRange,
        device: Arc<Guarded<D>>,
        shelf: Weak<dyn Shelf<D>>,
    ) -> Self {
        Self { entry: Arc::new(Entry::claimed(range, device, shelf)), keeps: false }
    }

    /// `None` if it is over or on its way out.
    pub(super) fn new(entry: &Arc<Entry<D>>) -> Option<Self> {
        entry.claim().then(|| Self { entry: entry.clone(), keeps: false })
    }

    /// On one that its caller needs together with others: limits leave it alone as if it were in
    /// use, and no invalidation waits for it (K7). `None` if it is on its way out.
    pub(super) fn keep(live: Arc<Live<D>>) -> Option<Self> {
        let mut claim = Self::new(&live.entry)?;
        claim.keeps = claim.entry.keep(live);
        claim.keeps.then_some(claim)
    }

    pub(super) fn entry(&self) -> &Arc<Entry<D>> {
        &self.entry
    }
}

impl<D: Device> Drop for Claim<D> {
    fn drop(&mut self) {
        if self.entry.device.source.is_inert() {
            core::mem::forget(self.entry.clone());
            return;
        }
        self.entry.unclaim(self.keeps);
    }
}
