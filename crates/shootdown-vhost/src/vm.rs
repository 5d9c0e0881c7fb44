//! The IOMMU trait of `vm-memory`, implemented by the IOTLB.
#![forbid(unsafe_code)]

use crate::iotlb::{Iotlb, MapError, Want};
use crate::mapping::Mapping;
use std::fmt;
use std::ops::Deref;
use vm_memory::iommu::{Error, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, Iommu, Permissions};

/// An [`Iotlb`] as [`vm_memory::Iommu`], for code that uses [`vm_memory::IommuMemory`].
///
/// The guard of a translation is a [`Mapping`]. While the iterator of
/// [`translate`](Iommu::translate) exists, an INVALIDATE that overlaps it is not answered. This is
/// enough for accesses that end within the call: `Bytes::read`, `write`, `load`, `store` and the
/// like.
///
/// It is **not** enough for slices that are kept. Slices of `GuestMemory::get_slices` outlive the
/// iterator and its guard, so the front-end considers the memory free while they are in use. For
/// asynchronous I/O take a [`Mapping`] by [`Iotlb::map`], and keep it until the I/O has ended.
///
/// Translations are to the guest's physical addresses.
/// [`MemoryTable::guest_memory`](crate::MemoryTable::guest_memory) of [`Iotlb::memory`] is the
/// backend for them.
///
/// A miss blocks the thread until the front-end has answered, so the thread that drives the
/// [`Session`](crate::Session) must not translate.
#[derive(Clone, Debug)]
pub struct BlockingIommu(Iotlb);

impl BlockingIommu {
    /// Makes an IOMMU with the translations of `iotlb`.
    pub fn new(iotlb: Iotlb) -> Self {
        Self(iotlb)
    }
}

/// Guard of a translation; see [`BlockingIommu`].
pub struct Held {
    /// A view with this translation only.
    view: vm_memory::Iotlb,
    mapping: Mapping,
}

impl Deref for Held {
    type Target = vm_memory::Iotlb;

    fn deref(&self) -> &vm_memory::Iotlb {
        &self.view
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.mapping.fmt(f)
    }
}

fn unresolved(iova: GuestAddress, length: usize, reason: impl fmt::Display) -> Error {
    Error::CannotResolve {
        iova_range: IovaRange { base: iova, length },
        reason: reason.to_string(),
    }
}

impl Iommu for BlockingIommu {
    type IotlbGuard<'a> = Held;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Held>, Error> {
        let mut view = vm_memory::Iotlb::new();
        if length == 0 || iova.0.checked_add(length as u64).is_none() {
            return Err(unresolved(
                iova,
                length,
                "`vm-memory` has no ranges that are empty or reach the last address",
            ));
        }
        let want = Want { iova: iova.0, len: length as u64, access };
        let mapping =
            self.0.map_wait(want).map_err(|error: MapError| unresolved(iova, length, error))?;
        let mut at = iova;
        for (guest, len) in mapping.guest_parts() {
            view.set_mapping(at, GuestAddress(guest), len, access)?;
            at = GuestAddress(at.0 + len as u64);
        }
        let held = Held { view, mapping };
        vm_memory::Iotlb::lookup(held, iova, length, access)
            .map_err(|fails| unresolved(iova, length, format!("{fails:?}")))
    }
}
