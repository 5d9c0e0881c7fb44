//! What a translation costs that is known: a [`Mapping`](shootdown_vhost::Mapping), `vm-memory`'s
//! trait on it, and `vm-memory`'s own `Iotlb` under a lock, in turns:
//! `cargo bench -p shootdown-vhost --bench translate`.
#![allow(missing_docs, clippy::print_stdout)]

use shootdown::AddressRange;
use shootdown_vhost::{BlockingIommu, Iotlb, Permissions, Place, Region, Want};
use std::hint::black_box;
use std::sync::{Arc, RwLock, RwLockReadGuard};
use std::time::Instant;
use vm_memory::iommu::{Error, IotlbIterator, IovaRange};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, Iommu, IommuMemory};

const PAGE: u64 = 0x1000;
const ROUNDS: usize = 15;
const CALLS: u64 = 20_000;

/// As `vm-memory` has it in mind: its own `Iotlb` under a lock.
#[derive(Debug)]
struct Locked(RwLock<vm_memory::Iotlb>);

impl Iommu for Locked {
    type IotlbGuard<'a> = RwLockReadGuard<'a, vm_memory::Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let fails = |_| Error::CannotResolve {
            iova_range: IovaRange { base: iova, length },
            reason: "it is not known".to_owned(),
        };
        vm_memory::Iotlb::lookup(self.0.read().unwrap(), iova, length, access).map_err(fails)
    }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Nanoseconds of a call, where the page is another one each time.
fn time(translations: u64, mut call: impl FnMut(u64)) -> f64 {
    let began = Instant::now();
    for at in 0..CALLS {
        call((at * 7919) % translations * PAGE);
    }
    began.elapsed().as_nanos() as f64 / CALLS as f64
}

fn measure(translations: u64) {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, translations * PAGE).unwrap();
    let len = usize::try_from(translations * PAGE).unwrap();
    let backend = || {
        let whole = FileOffset::new(file.try_clone().unwrap().into(), 0);
        GuestMemoryMmap::<()>::from_ranges_with_files([(GuestAddress(0), len, Some(whole))])
            .unwrap()
    };
    let region =
        Region::map(file.try_clone().unwrap(), 0, translations * PAGE, 0, 1 << 40).unwrap();
    let (iotlb, mut table) = (Iotlb::default(), vm_memory::Iotlb::new());
    for page in 0..translations {
        // No two are contiguous.
        let target = (page * 5 + 1) % translations;
        let range = AddressRange::new(page * PAGE, PAGE).unwrap();
        iotlb.update(
            range,
            Place { region: Arc::clone(&region), offset: (target * PAGE) as usize },
            Permissions::ReadWrite,
        );
        table
            .set_mapping(
                GuestAddress(page * PAGE),
                GuestAddress(target * PAGE),
                PAGE as usize,
                Permissions::ReadWrite,
            )
            .unwrap();
    }
    let ours = IommuMemory::new(backend(), BlockingIommu::new(iotlb.clone()), true, ());
    let theirs = IommuMemory::new(backend(), Locked(RwLock::new(table)), true, ());
    let mut all = [const { Vec::new() }; 5];
    for _ in 0..ROUNDS {
        all[0].push(time(translations, |iova| {
            drop(black_box(iotlb.try_map(Want::read(iova, 512)).unwrap()))
        }));
        all[1].push(time(translations, |iova| {
            let translated =
                ours.iommu().translate(GuestAddress(iova), 512, Permissions::Read).unwrap();
            translated.for_each(|part| {
                black_box(part);
            });
        }));
        all[2].push(time(translations, |iova| {
            let translated =
                theirs.iommu().translate(GuestAddress(iova), 512, Permissions::Read).unwrap();
            translated.for_each(|part| {
                black_box(part);
            });
        }));
        all[3].push(time(translations, |iova| {
            black_box(ours.read_obj::<u64>(GuestAddress(iova)).unwrap());
        }));
        all[4].push(time(translations, |iova| {
            black_box(theirs.read_obj::<u64>(GuestAddress(iova)).unwrap());
        }));
    }
    let [mapping, trait_ours, trait_theirs, read_ours, read_theirs] = all.map(median);
    println!(
        "{translations:>6} translations: a mapping {mapping:>5.0} ns; `translate` on it {trait_ours:>5.0} ns, vm-memory's own {trait_theirs:>5.0} ns; \
         `read_obj` {read_ours:>5.0} ns, {read_theirs:>5.0} ns"
    );
}

fn main() {
    println!("medians of {ROUNDS} rounds of {CALLS} calls each, in turns");
    [1, 64, 4096].into_iter().for_each(measure);
}
