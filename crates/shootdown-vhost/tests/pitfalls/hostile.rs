//! Guests and front-ends that ask for too much, and domains.

use crate::guest::{PAGE, USER};
use crate::machine::{FEATURES, Machine};
use crate::support::*;
use futures::FutureExt;
use futures::task::noop_waker;
use shootdown::AddressRange;
use shootdown_vhost::message::{Channel, Message};
use shootdown_vhost::{BlockingIommu, Domain, Iotlb, Permissions, Place, Session, Want};
use std::sync::Arc;
use std::task::Context;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserHeaderFlag, VhostUserMemory, VhostUserMemoryRegion,
};
use vm_memory::{ByteValued, GuestAddress, Iommu};

/// Two devices of one domain, one of them without an IOMMU.
#[test]
fn v8_an_invalidate_leaves_a_device_without_an_iommu_alone() {
    let domain = Domain::new();
    let (with, without) = (Iotlb::new(&domain), Iotlb::new(&domain));
    let mut session = Session::new(Arc::new(Keeps::default()), without.clone());
    let waker = noop_waker();
    let features = Message::new(
        FrontendReq::SET_FEATURES,
        VhostUserHeaderFlag::empty(),
        &(1u64 << 32 | 1 << 30).to_ne_bytes(),
    );
    session.receive(Channel::Frontend, features).unwrap();
    let (_, file) = memory_of(4, 0, USER);
    let region = VhostUserMemoryRegion::new(0, 4 * PAGE, USER, 0);
    let payload = [VhostUserMemory::new(1).as_slice(), region.as_slice()].concat();
    session
        .receive(Channel::Frontend, with_fds(FrontendReq::SET_MEM_TABLE, &payload, vec![file]))
        .unwrap();
    while session.poll_output(&mut Context::from_waker(&waker)).is_ready() {}
    assert!(without.try_map(Want::write(PAGE, 8)).is_some());
    // The other one's guest flushes its domain.
    assert!(with.invalidate(AddressRange::new(0, 1 << 63).unwrap()).now_or_never().is_some());
    let found = without.map(Want::write(PAGE, 8)).now_or_never();
    assert!(
        matches!(found, Some(Ok(_))),
        "a device without an IOMMU has lost the guest's memory: {found:?}"
    );
}

/// One large translation, INVALIDATEs of every second page.
#[test]
fn v7_there_are_never_more_translations_than_65536() {
    let pages = 300_000;
    let (region, _file) = memory_of(pages, 0, USER);
    let iotlb = Iotlb::default();
    iotlb.update(
        AddressRange::new(0, pages * PAGE).unwrap(),
        Place { region, offset: 0 },
        Permissions::ReadWrite,
    );
    for page in (1..pages).step_by(2) {
        assert!(
            iotlb
                .invalidate(AddressRange::new(page * PAGE, PAGE).unwrap())
                .now_or_never()
                .is_some()
        );
    }
    assert!(iotlb.len() <= 65_536, "{} translations", iotlb.len());
}

/// virtio 1.2, 2.7.5.3.2: "The device MUST handle the case of zero or more normal chained
/// descriptors followed by a single descriptor with flags&VIRTQ_DESC_F_INDIRECT."
#[test]
fn v7_a_table_may_follow_descriptors() {
    let mut machine = Machine::connected();
    let put = |machine: &Machine, at: u64, bytes: &[u8]| {
        rustix::io::pwrite(&machine.guest.file, bytes, at).unwrap();
    };
    let (header, table, data) = (20, 21, 22);
    for page in [header, table, data] {
        machine.guest.table.insert(0xf_fff0 + page, page);
    }
    let iova = |page: u64| (0xf_fff0 + page) * PAGE;
    put(
        &machine,
        0,
        &[descriptor(iova(header), 8, 1, 1), descriptor(iova(table), 16, 4, 0)].concat(),
    );
    put(&machine, table * PAGE, &descriptor(iova(data), 8, 2, 0));
    put(&machine, PAGE, &[0, 0, 1, 0, 0, 0]);
    machine.start_rings();
    machine.serve_misses();
    assert_eq!(machine.in_flight(), 1, "the request is refused, and the ring is dead");
}

/// virtio 1.2, 2.7.5: "the total length of all buffers in a chain" is at most 2^32 bytes; without a
/// limit a guest of 160 KiB has the device keep 4096 times what it has of translations.
#[test]
fn v7_a_chain_of_more_than_4_gib_is_refused() {
    let mut machine = Machine::connected();
    let put = |machine: &Machine, at: u64, bytes: &[u8]| {
        rustix::io::pwrite(&machine.guest.file, bytes, at).unwrap();
    };
    // 257 pages of I/O virtual memory that are all the same page.
    for at in 0..257 {
        machine.guest.table.insert(0x5_0000 + at, 39);
        machine.update((0x5_0000 + at) * PAGE, PAGE, 39);
    }
    let table = 10;
    for at in 0..16 {
        machine.guest.table.insert(0xf_fff0 + at, table + at);
        machine.update((0xf_fff0 + at) * PAGE, PAGE, table + at);
    }
    for at in 0..4096u64 {
        let next = u16::from(at < 4095);
        put(
            &machine,
            table * PAGE + at * 16,
            &descriptor(0x5_0000 * PAGE, 257 * PAGE as u32, next, at as u16 + 1),
        );
    }
    put(&machine, 0, &descriptor(0xf_fff0 * PAGE, 4096 * 16, 4, 0));
    put(&machine, PAGE, &[0, 0, 1, 0, 0, 0]);
    let before = peak_kib();
    machine.start_rings();
    machine.serve_misses();
    let grown = peak_kib() - before;
    assert_eq!(
        machine.in_flight(),
        0,
        "{} bytes in one chain, {grown} KiB for it",
        4096 * 257 * PAGE
    );
}

/// The last page of the address space, by `vm_memory`'s trait.
#[test]
fn v7_the_last_byte_of_all_is_an_error() {
    let (region, _file) = memory_of(1, 0, USER);
    let iotlb = Iotlb::default();
    let last = u64::MAX - 0xfff;
    iotlb.update(
        AddressRange::new(last, PAGE).unwrap(),
        Place { region, offset: 0 },
        Permissions::ReadWrite,
    );
    let iommu = BlockingIommu::new(iotlb);
    // A range has an end beyond its last byte there.
    assert!(iommu.translate(GuestAddress(last), PAGE as usize, Permissions::Read).is_err());
    assert!(iommu.translate(GuestAddress(last), PAGE as usize - 1, Permissions::Read).is_ok());
}

/// Nothing at all, by `vm_memory`'s trait.
#[test]
fn v7_a_range_without_bytes_is_an_error() {
    let iommu = BlockingIommu::new(Iotlb::default());
    assert!(iommu.translate(GuestAddress(PAGE), 0, Permissions::Read).is_err());
}

/// Holds: no message, and no word in the rings, is a panic.
#[test]
fn v7_no_message_is_a_panic() {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    let edges = [
        0u64,
        1,
        2,
        7,
        8,
        0x100,
        0xfff,
        PAGE,
        USER,
        USER + PAGE,
        USER + 39 * PAGE,
        0x10_0000,
        0x10_1000,
        0xffff_0000,
        0x7fff_ffff,
        0xffff_ffff,
        1 << 32,
        u64::MAX,
        u64::MAX - 1,
        u64::MAX - 0xfff,
        1 << 63,
        FEATURES,
        FEATURES & !(1 << 33),
        0x229,
        0x221,
    ];
    for seed in 0..300 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut machine = Machine::connected();
        if seed % 2 == 0 {
            machine.start_rings();
        }
        for _ in 0..400 {
            let request: u32 =
                if random.random_bool(0.4) { 22 } else { random.random_range(0..45) };
            let words = random.random_range(0..8);
            let mut payload: Vec<u8> = (0..words)
                .flat_map(|_| {
                    let word = edges[random.random_range(0..edges.len())]
                        .wrapping_add(random.random_range(0..3))
                        .wrapping_sub(1);
                    word.to_ne_bytes()
                })
                .collect();
            if request == 22 {
                payload.resize(32, 0);
                payload[24] = random.random_range(0..5);
                payload[25] = random.random_range(0..6);
            }
            if request == 24 || request == 25 {
                // See a13.
                payload.truncate(0);
            }
            let flags = if random.random_bool(0.5) {
                VhostUserHeaderFlag::NEED_REPLY
            } else {
                VhostUserHeaderFlag::empty()
            };
            let mut message = Message::new(request, flags, &payload);
            let file = || machine.guest.file.try_clone().unwrap();
            message.fds = (0..random.random_range(0..3))
                .map(|_| if random.random_bool(0.5) { fd() } else { file() })
                .collect();
            let channel =
                if random.random_bool(0.05) { Channel::Backend } else { Channel::Frontend };
            let _ = machine.session.receive(channel, message);
            machine.poll_session();
            if random.random_bool(0.3) {
                let word: u16 = random.random();
                let small: u16 = random.random_range(0..12);
                let at = random.random_range(0..6 * PAGE / 2) * 2;
                let at = if random.random_bool(0.7) {
                    random.random_range(0..6) * PAGE + random.random_range(0..20) * 2
                } else {
                    at
                };
                let word = if random.random_bool(0.7) { small } else { word };
                rustix::io::pwrite(&machine.guest.file, &word.to_le_bytes(), at).unwrap();
            }
            machine.run_tasks();
            machine.poll_session();
            while machine.in_flight() > 0 && random.random_bool(0.7) {
                machine.access();
            }
            while !machine.misses.is_empty() && random.random_bool(0.8) {
                machine.misses.remove(0);
                let _ =
                    machine.session.receive(Channel::Backend, answer(random.random_range(0..2)));
                machine.poll_session();
            }
        }
        machine.poll_closed();
        while machine.in_flight() > 0 {
            machine.access();
        }
        machine.run_tasks();
        assert!(machine.poll_closed(), "seed {seed}: a ring is left");
    }
}
