//! `vm_memory::IommuMemory` on the IOTLB.
#![allow(missing_docs)]

use futures::FutureExt;
use shootdown::AddressRange;
use shootdown_vhost::{BlockingIommu, Iotlb, MemoryTable, Permissions, Place, Region};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Iommu, IommuMemory};

const PAGE: u64 = 0x1000;

/// Two pages at 0x8000 and 0x9000 of I/O virtual memory: the third and the second of the guest's.
fn memory() -> (Iotlb, IommuMemory<GuestMemoryMmap, BlockingIommu>) {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 4 * PAGE).unwrap();
    let region = Region::map(file, 0, 4 * PAGE, 0x10_0000, 1 << 40).unwrap();
    let backend = MemoryTable::new(vec![region.clone()]).unwrap().guest_memory().unwrap();
    let iotlb = Iotlb::default();
    for (iova, page) in [(0x8000, 2), (0x9000, 1)] {
        let place = Place { region: Arc::clone(&region), offset: (page * PAGE) as usize };
        iotlb.update(AddressRange::new(iova, PAGE).unwrap(), place, Permissions::ReadWrite);
    }
    let memory = IommuMemory::new(backend, BlockingIommu::new(iotlb.clone()), true, ());
    (iotlb, memory)
}

#[test]
fn bytes_are_read_and_written_through_translations() {
    let (iotlb, memory) = memory();
    let text = vec![7u8; 0x1800];
    memory.write_slice(&text, GuestAddress(0x8400)).unwrap();
    let mut back = vec![0u8; 0x1800];
    memory.read_slice(&mut back, GuestAddress(0x8400)).unwrap();
    assert_eq!(back, text);
    // In the guest's own order.
    let physical = memory.get_backend();
    assert_eq!(physical.read_obj::<u8>(GuestAddress(0x10_0000 + 2 * PAGE + 0x3ff)).unwrap(), 0);
    assert_eq!(physical.read_obj::<u8>(GuestAddress(0x10_0000 + 2 * PAGE + 0x400)).unwrap(), 7);
    assert_eq!(physical.read_obj::<u8>(GuestAddress(0x10_0000 + PAGE + 0xbff)).unwrap(), 7);
    assert_eq!(physical.read_obj::<u8>(GuestAddress(0x10_0000 + PAGE + 0xc00)).unwrap(), 0);
    assert!(memory.read_obj::<u64>(GuestAddress(0xa000)).is_err(), "nobody is there to ask");
    assert_eq!(iotlb.domain().space().len(), 0, "nothing is in flight");
}

#[test]
fn an_invalidate_waits_for_the_iterator_and_for_no_slice() {
    let (iotlb, memory) = memory();
    let iterator = memory.iommu().translate(GuestAddress(0x8010), 8, Permissions::Read).unwrap();
    let mut elsewhere = iotlb.invalidate(AddressRange::new(0x9000, PAGE).unwrap());
    assert_eq!((&mut elsewhere).now_or_never(), Some(0));
    let mut invalidated = iotlb.invalidate(AddressRange::new(0x8000, PAGE).unwrap());
    assert_eq!((&mut invalidated).now_or_never(), None);
    let parts: Vec<_> = iterator.map(|part| (part.base.0, part.length)).collect();
    assert_eq!(parts, [(0x10_0000 + 2 * PAGE + 0x10, 8)]);
    assert_eq!((&mut invalidated).now_or_never(), Some(1));
    assert!(memory.iommu().translate(GuestAddress(0x8010), 8, Permissions::Read).is_err());
}
