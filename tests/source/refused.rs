//! `OwnedMapping` where the kernel refuses: each test in a process of its own, of which it may use
//! up what there is.

use crate::mapping::{PARTS, bytes, expect_parts, in_parts, text};
use crate::memory::PAGE;
use futures::executor::block_on;
use shootdown::AddressSpace;
use shootdown::source::{MapError, OwnedMapping, Protection};
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

crate::list![fn isolated_tests:
    an_unmapping_that_is_refused_gives_the_mapping_back,
    a_move_that_is_refused_half_way_leaves_the_mapping_whole,
    a_move_without_room_for_mappings_leaves_the_mapping_whole_wherever_it_stops,
    a_move_without_room_for_addresses_changes_nothing,
];

/// Seals a part of a mapping (`mseal`, Linux 6.10): it stays mapped. Says whether it is sealed.
fn is_sealed(mapping: &OwnedMapping, from: usize, len: usize) -> bool {
    let part = mapping.range().as_ptr().wrapping_add(from);
    // SAFETY: the pages are the mapping's. The kernel refuses what would change them.
    let sealed = unsafe { libc::syscall(462, part, len, 0) } == 0;
    if !sealed {
        println!("left out: no mseal here: {}", std::io::Error::last_os_error());
    }
    sealed
}

fn an_unmapping_that_is_refused_gives_the_mapping_back() {
    let space = AddressSpace::new();
    let mut mapping = OwnedMapping::new(&space, 2 * PAGE).unwrap();
    mapping.write(0, b"data");
    if !is_sealed(&mapping, PAGE, PAGE) {
        return;
    }
    let (at, mut acts) = (mapping.range(), 0);
    let refused = block_on(mapping.unmap_with(|_| acts += 1)).unwrap_err();
    assert!(
        matches!(refused.error(), MapError::Os(error) if error.kind() == std::io::ErrorKind::PermissionDenied),
        "{refused:?}"
    );
    let mapping = refused.into_mapping();
    assert_eq!((mapping.range(), text(&mapping, 0), acts), (at, *b"data", 1));
    assert!(space.active().is_empty());
}

/// A page in the middle is sealed: what is before it moves, it does not.
fn a_move_that_is_refused_half_way_leaves_the_mapping_whole() {
    let space = AddressSpace::new();
    for mut mapping in [
        OwnedMapping::new(&space, 8 * PAGE).unwrap(),
        OwnedMapping::shared(&space, 8 * PAGE).unwrap(),
    ] {
        in_parts(&mut mapping);
        let at = mapping.range();
        if !is_sealed(&mapping, 5 * PAGE, 2 * PAGE) {
            return;
        }
        let first = crate::memory::Raw { at: at.start() as usize, len: PAGE };
        let (stop, taken) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let others = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    taken.fetch_or(first.map_again(), Ordering::Relaxed);
                }
            });
            for _ in 0..200 {
                assert!(block_on(mapping.remap()).is_err());
            }
            stop.store(true, Ordering::Relaxed);
            // Its stack has gone when the addresses in use are counted.
            others.join().unwrap();
        });
        assert!(!taken.into_inner(), "somebody took the address of a piece that was away");
        for len in [8 * PAGE, 32 * PAGE] {
            let (before, leaked) = (bytes(), OwnedMapping::leaked_bytes());
            let refused = match len {
                len if len == mapping.len() => block_on(mapping.remap()),
                len => block_on(mapping.resize(len)),
            };
            let refused = refused.unwrap_err();
            assert!(
                matches!(&refused, MapError::Os(error) if error.kind() == std::io::ErrorKind::PermissionDenied),
                "{refused:?}"
            );
            assert_eq!(mapping.range(), at);
            expect_parts(&mut mapping);
            // This kernel refuses before it unmaps the place, which stays mapped all the same: the
            // call does not say so, and on another kernel it might be somebody else's by now.
            assert_eq!(OwnedMapping::leaked_bytes() - leaked, PAGE as u64);
            let after = bytes();
            assert!(
                (before + PAGE as u64..before + 64 * PAGE as u64).contains(&after),
                "{before:#x} {after:#x}"
            );
        }
        // Nothing can be put in its place either: the new memory stays where it was made, and the
        // old is left alone.
        let leaked = OwnedMapping::leaked_bytes();
        let refused = block_on(mapping.map_again()).unwrap_err();
        assert!(
            matches!(&refused, MapError::AddressLost(error) if error.kind() == std::io::ErrorKind::PermissionDenied),
            "{refused:?}"
        );
        assert_eq!(OwnedMapping::leaked_bytes() - leaked, 8 * PAGE as u64);
        let old = crate::memory::Raw { at: at.start() as usize + 5 * PAGE, len: PAGE };
        assert_eq!(old.look().map(|page| page[0]), Some(b'f'));
        assert!(!mapping.range().overlaps(at));
        assert_eq!((mapping.len(), text(&mapping, 5 * PAGE)), (8 * PAGE, [0; 4]));
        in_parts(&mut mapping);
        block_on(mapping.remap()).unwrap();
        expect_parts(&mut mapping);
        block_on(mapping.unmap()).unwrap();
    }
    println!("a sealed page: refused, and moved back");
}

/// Uses up the mappings of the process, then gives some back, one more each time.
fn a_move_without_room_for_mappings_leaves_the_mapping_whole_wherever_it_stops() {
    let space = AddressSpace::new();
    let limit: usize =
        std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    let mut mappings = [
        OwnedMapping::new(&space, 8 * PAGE).unwrap(),
        OwnedMapping::shared(&space, 8 * PAGE).unwrap(),
    ];
    mappings.iter_mut().for_each(in_parts);
    // Every other page of a large mapping is read-only.
    let filler = crate::memory::Raw::map(2 * limit);
    let page = |number: usize| filler.part(number, 1).range().as_mut_ptr().cast::<c_void>();
    let protect = |number: usize, flags| {
        // SAFETY: a page of memory that nobody uses.
        unsafe { rustix::mm::mprotect(page(number), PAGE, flags) }
    };
    let mut full = 0;
    while protect(2 * full + 1, rustix::mm::MprotectFlags::READ).is_ok() {
        full += 1;
    }
    let (mut refused, mut moved) = (0, 0);
    for round in 0..24_usize {
        for mapping in &mut mappings {
            for longer in [false, true] {
                let (at, len) = (mapping.range(), mapping.len());
                let answer = match longer {
                    true => block_on(mapping.resize(len + 8 * PAGE)),
                    false => block_on(mapping.remap()),
                };
                match answer {
                    Ok(now) => {
                        moved += 1;
                        assert_ne!(now, at);
                    }
                    Err(MapError::Os(error)) => {
                        assert_eq!(error.kind(), std::io::ErrorKind::OutOfMemory);
                        refused += 1;
                        assert_eq!(mapping.range(), at, "round {round}");
                    }
                    Err(error) => panic!("{error}"),
                }
                assert_eq!(rights_by_trial(mapping), PARTS, "round {round}");
                for page in [0, 1, 2, 5, 6, 7] {
                    assert_eq!(
                        text(mapping, page * PAGE),
                        [b'a' + page as u8; 4],
                        "round {round}, page {page}"
                    );
                }
                // Made shorter it gives back what it took, and needs nothing.
                block_on(mapping.resize(8 * PAGE)).unwrap();
            }
        }
        // One mapping less.
        protect(
            2 * (full - 1 - round) + 1,
            rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
        )
        .unwrap();
    }
    assert!(refused > 8 && moved > 8, "{refused} refused, {moved} moved");
    assert_eq!(
        OwnedMapping::leaked_bytes(),
        0,
        "who is refused for want of mappings does not use them up"
    );
    mappings.iter_mut().for_each(|mapping| {
        block_on(mapping.protect(3 * PAGE..5 * PAGE, Protection::Read)).unwrap()
    });
    mappings.iter().for_each(|mapping| {
        assert_eq!((text(mapping, 3 * PAGE), text(mapping, 4 * PAGE)), (*b"dddd", *b"eeee"))
    });
    println!("{refused} moves refused and {moved} made, {full} mappings beside them");
}

/// What may be done with the first eight pages, without the list, which is long by now.
fn rights_by_trial(mapping: &OwnedMapping) -> [&'static str; 8] {
    std::array::from_fn(|page| {
        let mut byte = 0_u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        // The last byte of the page: nothing is there.
        let remote = libc::iovec {
            iov_base: mapping.as_ptr().wrapping_add(page * PAGE + PAGE - 1).cast(),
            iov_len: 1,
        };
        // SAFETY: `local` is ours; the kernel checks `remote`, which belongs to the mapping.
        let (read, wrote) = unsafe {
            let read = libc::process_vm_readv(
                libc::getpid(),
                &raw const local,
                1,
                &raw const remote,
                1,
                0,
            );
            (
                read,
                libc::process_vm_writev(
                    libc::getpid(),
                    &raw const local,
                    1,
                    &raw const remote,
                    1,
                    0,
                ),
            )
        };
        match (read, wrote) {
            (1, 1) => "rw-",
            (1, _) => "r--",
            _ => "---",
        }
    })
}

/// The process may have some more addresses, but not enough for two places.
fn a_move_without_room_for_addresses_changes_nothing() {
    let space = AddressSpace::new();
    let len = 64 << 20;
    for mut mapping in
        [OwnedMapping::new(&space, len).unwrap(), OwnedMapping::shared(&space, len).unwrap()]
    {
        in_parts(&mut mapping);
        mapping.write(len - 4, b"last");
        let (at, leaked) = (mapping.range(), OwnedMapping::leaked_bytes());
        let used = bytes();
        let limit =
            |bytes| rustix::process::setrlimit(rustix::process::Resource::As, bytes).unwrap();
        let most = rustix::process::getrlimit(rustix::process::Resource::As).maximum;
        let allow =
            |more| limit(rustix::process::Rlimit { current: Some(used + more), maximum: most });
        let expect_whole = |answer: Result<(), MapError>, mapping: &mut OwnedMapping| {
            assert!(matches!(answer, Err(MapError::Os(_))), "{answer:?}");
            assert_eq!((mapping.range(), text(mapping, len - 4)), (at, *b"last"));
            expect_parts(mapping);
        };
        allow(32 << 20);
        let answer = block_on(mapping.remap()).map(drop);
        expect_whole(answer, &mut mapping);
        let answer = block_on(mapping.resize(len + (8 << 20))).map(drop);
        expect_whole(answer, &mut mapping);
        let answer = block_on(mapping.map_again());
        expect_whole(answer, &mut mapping);
        // It would need its length twice, for a moment; to move it needs it once.
        allow(len as u64 + (32 << 20));
        let answer = block_on(mapping.map_again());
        expect_whole(answer, &mut mapping);
        assert_ne!(block_on(mapping.remap()).unwrap(), at);
        expect_parts(&mut mapping);
        limit(rustix::process::Rlimit { current: most, maximum: most });
        println!(
            "{:#x} bytes of addresses were left mapped",
            OwnedMapping::leaked_bytes() - leaked
        );
        block_on(mapping.remap()).unwrap();
        expect_parts(&mut mapping);
    }
}
