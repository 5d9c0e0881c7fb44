//! Models of where threads meet: who maps, and who invalidates.
//! `ci/vhost.sh loom`
#![cfg(loom)]
#![allow(missing_docs, clippy::print_stdout)]

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use shootdown::AddressRange;
use shootdown_vhost::{Domain, Iotlb, Permissions, Place, Region, Want};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

/// Explores a model; says how many executions that took.
fn explore(name: &str, model: impl Fn() + Sync + Send + 'static) {
    let executions = Arc::new(AtomicUsize::new(0));
    let count = executions.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.max_branches = 20_000;
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!(
        "{name}: {} executions, at most 2 preemptions each",
        executions.load(Ordering::Relaxed)
    );
}

const PAGE: u64 = 0x1000;

fn region() -> Arc<Region> {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, PAGE).unwrap();
    Region::map(file, 0, PAGE, 0, 1 << 40).unwrap()
}

fn page() -> AddressRange {
    AddressRange::new(0, PAGE).unwrap()
}

fn filled(iotlb: &Iotlb, region: &Arc<Region>) {
    iotlb.update(page(), Place { region: region.clone(), offset: 0 }, Permissions::ReadWrite);
}

/// Whoever has a mapping when its page is taken away is waited for; whoever comes later has none.
#[test]
fn nothing_is_mapped_once_an_invalidate_is_answered() {
    let region = region();
    explore("map and invalidate", move || {
        let iotlb = Iotlb::default();
        filled(&iotlb, &region);
        let taken = Arc::new(AtomicBool::new(false));
        let device = {
            let (iotlb, taken) = (iotlb.clone(), taken.clone());
            thread::spawn(move || {
                let mapping = iotlb.try_map(Want::write(0, 8));
                if mapping.is_some() {
                    assert!(!taken.load(Ordering::SeqCst), "it is mapped, and somebody else's");
                }
                drop(mapping);
            })
        };
        loom::future::block_on(iotlb.invalidate(page()));
        taken.store(true, Ordering::SeqCst);
        device.join().unwrap();
        assert!(iotlb.try_map(Want::read(0, 8)).is_none());
    });
}

/// The same for the other device of a domain.
#[test]
fn a_domain_forgets_as_one() {
    let region = region();
    explore("a domain", move || {
        let domain = Domain::new();
        let (one, other) = (Iotlb::new(&domain), Iotlb::new(&domain));
        filled(&other, &region);
        let taken = Arc::new(AtomicBool::new(false));
        let device = {
            let taken = taken.clone();
            let other = other.clone();
            thread::spawn(move || {
                if let Some(_mapping) = other.try_map(Want::write(0, 8)) {
                    assert!(!taken.load(Ordering::SeqCst), "it is mapped, and somebody else's");
                }
            })
        };
        loom::future::block_on(one.invalidate(page()));
        taken.store(true, Ordering::SeqCst);
        device.join().unwrap();
    });
}

/// A translation that comes while somebody begins to wait for it is not missed.
#[test]
fn no_update_is_lost() {
    let region = region();
    explore("miss and update", move || {
        let iotlb = Iotlb::default();
        iotlb.ask_silently();
        let frontend = {
            let (iotlb, region) = (iotlb.clone(), region.clone());
            thread::spawn(move || filled(&iotlb, &region))
        };
        let mapping = loom::future::block_on(iotlb.map(Want::read(0, 8))).unwrap();
        assert_eq!(mapping.len(), 8);
        frontend.join().unwrap();
    });
}
