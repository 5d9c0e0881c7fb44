//! The guest's memory, as the front-end shares it.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion, VolatileMemory, VolatileSlice,
};

/// Memory that the front-end shares, mapped into this process. It is unmapped when the last user
/// lets go: the table that has it, and each [`Mapping`](crate::Mapping) of a part of it.
pub struct Region {
    map: Arc<MmapRegion>,
    guest: u64,
    user: u64,
}

/// Why the front-end's memory is not mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The file is too short, or the kernel refused.
    #[error("{len:#x} bytes of guest memory at {guest:#x} cannot be mapped: {error}")]
    Map {
        /// The guest's physical address of the region.
        guest: u64,
        /// Its length in bytes.
        len: u64,
        /// What the kernel or `vm-memory` said.
        error: vm_memory::mmap::MmapRegionError,
    },
    /// Addresses of a region wrap around, or two regions overlap.
    #[error("the region of {len:#x} bytes at {guest:#x} wraps around or overlaps another one")]
    Overlap {
        /// The guest's physical address of the region.
        guest: u64,
        /// Its length in bytes.
        len: u64,
    },
}

impl Region {
    /// Maps `len` bytes of `file` from `offset` on. They are at `guest` in the guest's physical
    /// memory and at `user` in the front-end's address space.
    ///
    /// # Errors
    /// [`MemoryError`] when addresses wrap around, or when it cannot be mapped.
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

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.map.size()
    }

    /// Whether it is empty, which no region is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The guest's physical address of the first byte.
    pub fn guest(&self) -> u64 {
        self.guest
    }

    /// `len` bytes at `offset`, if they are inside.
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
    /// The first byte in it.
    pub offset: usize,
}

/// All regions that the front-end shares.
#[derive(Clone, Debug, Default)]
pub struct MemoryTable {
    /// A clone is a handle of the same.
    regions: Arc<[Arc<Region>]>,
}

impl MemoryTable {
    /// A table of these regions.
    ///
    /// # Errors
    /// [`MemoryError::Overlap`] when two of them overlap in the guest or in the front-end.
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

    /// The regions, in the front-end's order.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The same memory by the guest's physical addresses, for `vm-memory`: what
    /// [`BlockingIommu`](crate::BlockingIommu) translates to, as the backend of a
    /// [`vm_memory::IommuMemory`]. It keeps the memory mapped.
    ///
    /// # Errors
    /// What `vm-memory` says of a table that is empty.
    pub fn guest_memory(&self) -> Result<GuestMemoryMmap, GuestRegionCollectionError> {
        let mut regions: Vec<_> = self.regions.iter().collect();
        regions.sort_by_key(|region| region.guest);
        let regions = regions.into_iter().map(|region| {
            GuestRegionMmap::with_arc(region.map.clone(), GuestAddress(region.guest))
        });
        // No region ends beyond the last address: that was checked.
        GuestMemoryMmap::from_regions(regions.flatten().collect())
    }

    /// Where the front-end's address `user` is, and how many bytes of that region follow it.
    pub fn find_user(&self, user: u64) -> Option<(Place, u64)> {
        self.find(user, |region| region.user)
    }

    /// Where the guest's physical address `guest` is, and how many bytes of that region follow it.
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

    /// Memory of so many pages, at 0 in the guest and at 1 << 40 in the front-end.
    pub(crate) fn region(pages: usize) -> Arc<Region> {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let len = (pages * 0x1000) as u64;
        rustix::fs::ftruncate(&file, len).unwrap();
        Region::map(file, 0, len, 0, 1 << 40).unwrap()
    }
}
