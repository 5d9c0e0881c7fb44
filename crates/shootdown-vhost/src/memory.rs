//! The guest's memory as the front-end shares it.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion, VolatileMemory, VolatileSlice,
};

/// A region of shared memory, mapped into this process. It is unmapped with its last user: the
/// table that contains it, and each [`Mapping`](crate::Mapping) of a part of it.
pub struct Region {
    map: Arc<MmapRegion>,
    guest: u64,
    user: u64,
}

/// Reason why the front-end's memory is not mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The file is too short, or the kernel refused.
    #[error("{len:#x} bytes of guest memory at {guest:#x} cannot be mapped: {error}")]
    Map {
        /// Guest physical address of the region.
        guest: u64,
        /// Length in bytes.
        len: u64,
        /// Error of the kernel or of `vm-memory`.
        error: vm_memory::mmap::MmapRegionError,
    },
    /// Addresses of a region wrap around, or two regions overlap.
    #[error("the region of {len:#x} bytes at {guest:#x} wraps around or overlaps another one")]
    Overlap {
        /// Guest physical address of the region.
        guest: u64,
        /// Length in bytes.
        len: u64,
    },
}

impl Region {
    /// Maps `len` bytes of `file` from `offset` on. They are at `guest` in the guest's physical
    /// memory and at `user` in the front-end's address space.
    ///
    /// # Errors
    /// [`MemoryError`] if addresses wrap around or the memory cannot be mapped.
    pub fn map(
        file: OwnedFd,
        offset: u64,
        len: u64,
        guest: u64,
        user: u64,
    ) -> Result<Arc<Self>, MemoryError> {
        let wraps = [guest, user, offset].iter().any(|start| start.checked_add(len).is_none());
        let size = usize::try_from(len)
            .ok()
            .filter(|size| *size > 0 && !wraps)
            .ok_or(MemoryError::Overlap { guest, len })?;
        let map = MmapRegion::from_file(FileOffset::new(File::from(file), offset), size)
            .map_err(|error| MemoryError::Map { guest, len, error })?;
        Ok(Arc::new(Self { map: Arc::new(map), guest, user }))
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        self.map.size()
    }

    /// Returns `false`: a region has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the guest physical address of the first byte.
    pub fn guest(&self) -> u64 {
        self.guest
    }

    /// Returns `len` bytes at `offset`, if they are inside.
    pub(crate) fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        self.map.get_slice(offset, len).ok()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({:#x}+{:#x}, user {:#x})", self.guest, self.len(), self.user)
    }
}

/// A part of a region.
#[derive(Clone, Debug)]
pub struct Place {
    /// The region.
    pub region: Arc<Region>,
    /// Offset of the first byte in the region.
    pub offset: usize,
}

/// All regions that the front-end shares.
#[derive(Clone, Debug, Default)]
pub struct MemoryTable {
    /// Shared with clones.
    regions: Arc<[Arc<Region>]>,
}

impl MemoryTable {
    /// Makes a table of these regions.
    ///
    /// # Errors
    /// [`MemoryError::Overlap`] if two of them overlap in the guest or in the front-end.
    pub fn new(regions: Vec<Arc<Region>>) -> Result<Self, MemoryError> {
        let overlap = |a: u64, b: u64, one: &Region, other: &Region| {
            a < b + other.len() as u64 && b < a + one.len() as u64
        };
        for (at, region) in regions.iter().enumerate() {
            for other in &regions[..at] {
                if overlap(region.guest, other.guest, region, other)
                    || overlap(region.user, other.user, region, other)
                {
                    return Err(MemoryError::Overlap {
                        guest: region.guest,
                        len: region.len() as u64,
                    });
                }
            }
        }
        Ok(Self { regions: regions.into() })
    }

    /// Returns the regions, in the front-end's order.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Returns the memory by guest physical addresses, for `vm-memory`: the backend of a
    /// [`vm_memory::IommuMemory`] with a [`BlockingIommu`](crate::BlockingIommu). It keeps the
    /// memory mapped.
    ///
    /// # Errors
    /// The error of `vm-memory` for an empty table.
    pub fn guest_memory(&self) -> Result<GuestMemoryMmap, GuestRegionCollectionError> {
        let mut regions: Vec<_> = self.regions.iter().collect();
        regions.sort_by_key(|region| region.guest);
        let regions = regions.into_iter().map(|region| {
            GuestRegionMmap::with_arc(region.map.clone(), GuestAddress(region.guest))
        });
        // Checked before: no region ends beyond the last address.
        GuestMemoryMmap::from_regions(regions.flatten().collect())
    }

    /// Returns the place of the front-end's address `user`, and the number of bytes of that region
    /// from there on.
    pub fn find_user(&self, user: u64) -> Option<(Place, u64)> {
        self.find(user, |region| region.user)
    }

    /// Returns the place of the guest physical address `guest`, and the number of bytes of that
    /// region from there on.
    pub fn find_guest(&self, guest: u64) -> Option<(Place, u64)> {
        self.find(guest, |region| region.guest)
    }

    fn find(&self, address: u64, start: impl Fn(&Region) -> u64) -> Option<(Place, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = address
                .checked_sub(start(region))
                .filter(|offset| *offset < region.len() as u64)?;
            let place = Place { region: region.clone(), offset: usize::try_from(offset).ok()? };
            Some((place, region.len() as u64 - offset))
        })
    }
}

#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;

    /// Makes memory of so many pages, at 0 in the guest and at 1 << 40 in the front-end.
    pub(crate) fn region(pages: usize) -> Arc<Region> {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let len = (pages * 0x1000) as u64;
        rustix::fs::ftruncate(&file, len).unwrap();
        Region::map(file, 0, len, 0, 1 << 40).unwrap()
    }
}
