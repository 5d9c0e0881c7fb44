//! The layout of a split virtqueue (virtio 1.2, section 2.7), without any wait.
#![forbid(unsafe_code)]

use super::RingError;
use crate::iotlb::Want;
use crate::parts::Parts;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::Permissions;

/// Size of a descriptor in bytes.
pub(super) const DESCRIPTOR: u64 = 16;
/// Maximum number of descriptors of an indirect table.
pub(super) const LONGEST_TABLE: u64 = 4096;
/// Maximum number of bytes of all buffers of a chain (virtio 1.2, section 2.7.5).
pub(super) const LONGEST_CHAIN: u64 = 1 << 32;
/// Size of an entry of the used ring in bytes.
const USED: usize = 8;

/// The three parts of a ring, as I/O virtual addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// Kicks and calls go by index (VIRTIO_RING_F_EVENT_IDX).
    pub(super) event_idx: bool,
}

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }

    pub(super) fn is_indirect(&self) -> bool {
        self.has(VRING_DESC_F_INDIRECT)
    }

    pub(super) fn is_writable(&self) -> bool {
        self.has(VRING_DESC_F_WRITE)
    }

    pub(super) fn want(&self) -> Want {
        let access = if self.is_writable() { Permissions::Write } else { Permissions::Read };
        Want { iova: self.address, len: u64::from(self.len), access }
    }
}

/// Returns the length of an indirect table in bytes, if it is valid.
pub(super) fn table_len(table: Descriptor) -> Option<u64> {
    let len = u64::from(table.len);
    let fits = len > 0 && len % DESCRIPTOR == 0 && len / DESCRIPTOR <= LONGEST_TABLE;
    (fits && !table.has(VRING_DESC_F_NEXT)).then_some(len)
}

fn descriptor(table: &Parts, at: u16) -> Option<Descriptor> {
    let mut bytes = [0; DESCRIPTOR as usize];
    table.read(usize::from(at) * bytes.len(), &mut bytes)?;
    let (mut address, mut len) = ([0; 8], [0; 4]);
    address.copy_from_slice(&bytes[..8]);
    len.copy_from_slice(&bytes[8..12]);
    Some(Descriptor {
        address: u64::from_le_bytes(address),
        len: u32::from_le_bytes(len),
        flags: u16::from_le_bytes([bytes[12], bytes[13]]),
        next: u16::from_le_bytes([bytes[14], bytes[15]]),
    })
}

/// Returns the chain from `first` on in a table of `size` descriptors. An indirect descriptor ends
/// it.
pub(super) fn chain(
    table: &Parts,
    first: u16,
    size: u64,
    head: u16,
) -> Result<Vec<Descriptor>, RingError> {
    let (mut found, mut at) = (Vec::new(), first);
    loop {
        if u64::from(at) >= size || found.len() as u64 >= size {
            return Err(RingError::Chain { head });
        }
        let next = descriptor(table, at).ok_or(RingError::Chain { head })?;
        found.push(next);
        if next.is_indirect() || !next.has(VRING_DESC_F_NEXT) {
            return Ok(found);
        }
        at = next.next;
    }
}

impl Layout {
    fn event(self) -> u64 {
        if self.event_idx { 2 } else { 0 }
    }

    /// Returns the available ring and the used ring.
    pub(super) fn to_put(self) -> [Want; 2] {
        [self.want_available(), self.want_used()]
    }

    fn want_available(self) -> Want {
        Want::read(self.available, 4 + 2 * u64::from(self.size) + self.event())
    }

    fn want_used(self) -> Want {
        let len = 4 + USED as u64 * u64::from(self.size) + self.event();
        Want { iova: self.used, len, access: Permissions::ReadWrite }
    }

    /// Returns the descriptors, the available ring and the used ring.
    pub(super) fn all(self) -> [Want; 3] {
        [
            Want::read(self.descriptors, DESCRIPTOR * u64::from(self.size)),
            self.want_available(),
            self.want_used(),
        ]
    }

    fn entry(self, index: u16) -> usize {
        usize::from(index % self.size)
    }

    /// Returns how many entries the available ring has beyond `next`.
    pub(super) fn ahead(self, available: &Parts, next: u16) -> Option<u16> {
        Some(available.load_u16(2)?.wrapping_sub(next))
    }

    pub(super) fn head(self, available: &Parts, next: u16) -> Option<u16> {
        available.load_u16(4 + 2 * self.entry(next))
    }

    /// Requests a kick once there is more than `next`. A request made just before is seen
    /// afterwards.
    pub(super) fn want_kick(self, used: &Parts, next: u16) -> Option<()> {
        if self.event_idx {
            used.store_u16(4 + USED * usize::from(self.size), next)?;
        } else {
            used.store_u16(0, 0)?;
        }
        fence(Ordering::SeqCst);
        Some(())
    }

    pub(super) fn used_index(self, used: &Parts) -> Option<u16> {
        used.load_u16(2)
    }

    pub(super) fn put_used(self, used: &Parts, index: u16, head: u16, len: u32) -> Option<()> {
        let mut entry = [0; USED];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&len.to_le_bytes());
        used.write(4 + USED * self.entry(index), &entry)?;
        used.store_u16(2, index.wrapping_add(1))
    }

    /// Returns `true` if the driver wants to be called for the entry `index`, which has been put.
    pub(super) fn wants_call(self, available: &Parts, index: u16) -> Option<bool> {
        fence(Ordering::SeqCst);
        if self.event_idx {
            return Some(available.load_u16(4 + 2 * usize::from(self.size))? == index);
        }
        let flags = available.load_u16(0)?;
        Some(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
