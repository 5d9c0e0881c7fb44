//! A caller's interest in a registration.
#![forbid(unsafe_code)]

use super::device::{Device, Guarded};
use super::entry::{Entry, Live, Shelf};
use crate::range::AddressRange;
use crate::sync::{Arc, Weak};

/// A caller's interest in a registration. When the last claim is dropped before the device was
/// asked, the registration is over.
pub(super) struct Claim<D: Device> {
    entry: Arc<Entry<D>>,
    keeps: bool,
}

impl<D: Device> Claim<D> {
    /// Makes a new entry with one claim.
    pub(super) fn begin(
        range: AddressRange,
        device: Arc<Guarded<D>>,
        shelf: Weak<dyn Shelf<D>>,
    ) -> Self {
        Self { entry: Arc::new(Entry::claimed(range, device, shelf)), keeps: false }
    }

    /// Claims `entry`. Returns `None` if it is over or leaving.
    pub(super) fn new(entry: &Arc<Entry<D>>) -> Option<Self> {
        entry.claim().then(|| Self { entry: entry.clone(), keeps: false })
    }

    /// Claims a registration that its caller needs together with others. Limits treat it as in use,
    /// and an invalidation does not wait for it (K8). Returns `None` if it is leaving.
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
