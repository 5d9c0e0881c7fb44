//! `OwnedMapping` of shared memory, and of an address that stays when the memory does not.

use crate::mapping::{Log, in_parts, mapped, rights, text};
use crate::memory::PAGE;
use futures::executor::block_on;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use shootdown::source::{MapError, OwnedMapping, Protection};
use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
};
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

crate::list![
    shared_memory_is_seen_discarded_and_resized_by_all_who_have_its_descriptor,
    a_part_of_a_descriptor_is_discarded_where_it_lies_in_the_file,
    a_descriptor_is_mapped_only_as_far_as_it_reaches,
    a_file_that_is_sealed_against_a_change_keeps_its_mapping,
    mapped_again_the_address_is_the_same_and_everything_new,
    mapped_again_from_a_descriptor_the_address_shows_its_memory,
    nobody_takes_the_address_while_it_is_mapped_again,
];

fn clone(mapping: &OwnedMapping) -> OwnedFd {
    mapping.descriptor().unwrap().try_clone_to_owned().unwrap()
}

fn pages_of(fd: impl AsFd) -> (u64, u64) {
    let stat = fstat(fd).unwrap();
    (stat.st_size as u64 / PAGE as u64, stat.st_blocks as u64 * 512 / PAGE as u64)
}

fn shared_memory_is_seen_discarded_and_resized_by_all_who_have_its_descriptor() {
    let (mine, theirs) = (AddressSpace::new(), AddressSpace::new());
    let mut ring = OwnedMapping::shared(&mine, 4 * PAGE - 1).unwrap();
    assert_eq!(ring.len(), 4 * PAGE);
    assert!(OwnedMapping::new(&mine, PAGE).unwrap().descriptor().is_none());
    let mut back_end = OwnedMapping::from_fd(&theirs, clone(&ring), PAGE as u64, 2 * PAGE).unwrap();
    assert_eq!(pages_of(ring.descriptor().unwrap()), (4, 0));
    ring.write(PAGE, b"ring");
    back_end.write(PAGE, b"back");
    assert_eq!((text(&back_end, 0), text(&ring, 2 * PAGE)), (*b"ring", *b"back"));
    assert_eq!(pages_of(ring.descriptor().unwrap()), (4, 2));

    block_on(async {
        // Gone for both, and given back; a part that may not be written can be discarded as well.
        back_end.protect(0..PAGE, Protection::None).await.unwrap();
        back_end.discard(0..PAGE).await.unwrap();
        assert_eq!(pages_of(ring.descriptor().unwrap()), (4, 1));
        assert_eq!((text(&ring, PAGE), text(&ring, 2 * PAGE)), ([0; 4], *b"back"));

        // The invalidation is over when the file is as long as the mapping, and not before.
        struct Length(OwnedFd, Mutex<Vec<u64>>);
        impl IntervalNotifier for Length {
            fn invalidate(
                &self,
                invalidation: &Invalidation<'_>,
            ) -> Result<Option<PassFuture>, WouldBlock> {
                self.1.lock().unwrap().push(pages_of(&self.0).0);
                invalidation.set_seq();
                Ok(None)
            }
        }
        let driver =
            mine.insert(AddressRange::ALL, Length(clone(&ring), Mutex::default())).unwrap();
        ring.resize(6 * PAGE).await.unwrap();
        ring.write(5 * PAGE, b"last");
        assert_eq!((pages_of(ring.descriptor().unwrap()).0, text(&ring, 2 * PAGE)), (6, *b"back"));
        // Their part of it is as long as the file allows.
        back_end.resize(5 * PAGE).await.unwrap();
        assert_eq!(text(&back_end, 4 * PAGE), *b"last");
        assert!(matches!(
            back_end.resize(5 * PAGE + 1).await,
            Err(MapError::BeyondEnd { end: 0x7000, size: 0x6000 })
        ));
        back_end.resize(PAGE).await.unwrap();
        assert_eq!(pages_of(ring.descriptor().unwrap()).0, 6, "the length is not theirs");
        ring.resize(2 * PAGE).await.unwrap();
        assert_eq!(pages_of(ring.descriptor().unwrap()).0, 2);
        assert_eq!(*driver.1.lock().unwrap(), [4, 6]);
        let moved = ring.remap().await.unwrap();
        ring.write(PAGE, b"same");
        back_end.protect(0..PAGE, Protection::Read).await.unwrap();
        assert_eq!((text(&back_end, 0), ring.range()), (*b"same", moved));
    });
}

fn a_part_of_a_descriptor_is_discarded_where_it_lies_in_the_file() {
    let space = AddressSpace::new();
    let mut whole = OwnedMapping::shared(&space, 5 * PAGE).unwrap();
    (0..5).for_each(|page| whole.write(page * PAGE, b"here"));
    let mut part = OwnedMapping::from_fd(&space, clone(&whole), 2 * PAGE as u64, 3 * PAGE).unwrap();
    block_on(part.discard(PAGE..2 * PAGE)).unwrap();
    let left = [0, 1, 2, 3, 4].map(|page| text(&whole, page * PAGE) == *b"here");
    assert_eq!(left, [true, true, true, false, true]);
}

fn a_descriptor_is_mapped_only_as_far_as_it_reaches() {
    let space = AddressSpace::new();
    let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, 5000).unwrap();
    let of = |offset: u64, len: usize| {
        OwnedMapping::from_fd(&space, fd.try_clone().unwrap(), offset, len).map(|made| made.len())
    };
    assert_eq!(of(0, 5000).unwrap(), 2 * PAGE, "the rest of the last page is there");
    assert_eq!(of(PAGE as u64, 1).unwrap(), PAGE);
    for (offset, len) in [
        (0, 2 * PAGE + 1),
        (PAGE as u64, PAGE + 1),
        (2 * PAGE as u64, 1),
        (1 << 40, PAGE),
        (0, 1 << 40),
    ] {
        let refused = of(offset, len).unwrap_err();
        assert!(
            matches!(refused, MapError::BeyondEnd { size: 5000, .. }),
            "{offset:#x} {len:#x}: {refused:?}"
        );
    }
    for (offset, len) in [(0, 0), (1, PAGE), (u64::MAX, PAGE), (!0xfff, 2 * PAGE), (0, usize::MAX)]
    {
        assert!(matches!(of(offset, len), Err(MapError::NotPages { .. })), "{offset:#x} {len:#x}");
    }
    let (pipe, _other) = std::io::pipe().unwrap();
    assert!(matches!(
        OwnedMapping::from_fd(&space, pipe.into(), 0, PAGE),
        Err(MapError::BeyondEnd { size: 0, .. })
    ));
    let path = std::env::temp_dir().join(format!("shootdown-mapping-{}", std::process::id()));
    std::fs::File::create(&path).unwrap().write_all(&[b'x'; 5000]).unwrap();
    let reading = std::fs::File::open(&path).unwrap();
    let refused = OwnedMapping::from_fd(&space, reading.into(), 0, PAGE).unwrap_err();
    assert!(
        matches!(&refused, MapError::Os(error) if error.kind() == std::io::ErrorKind::PermissionDenied),
        "{refused:?}"
    );
    let both = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let file = OwnedMapping::from_fd(&space, both.into(), 0, 5000).unwrap();
    assert_eq!(text(&file, 4096), *b"xxxx");
}

fn a_file_that_is_sealed_against_a_change_keeps_its_mapping() {
    let space = AddressSpace::new();
    let mut mapping = OwnedMapping::shared(&space, 4 * PAGE).unwrap();
    mapping.write(3 * PAGE, b"last");
    fcntl_add_seals(mapping.descriptor().unwrap(), SealFlags::GROW | SealFlags::SHRINK).unwrap();
    let at = mapping.range();
    for len in [PAGE, 9 * PAGE] {
        let refused = block_on(mapping.resize(len)).unwrap_err();
        assert!(
            matches!(&refused, MapError::Os(error) if error.kind() == std::io::ErrorKind::PermissionDenied),
            "{refused:?}"
        );
        assert_eq!((mapping.range(), text(&mapping, 3 * PAGE)), (at, *b"last"));
    }
    block_on(mapping.remap()).unwrap();
    assert_eq!(text(&mapping, 3 * PAGE), *b"last");
    assert_eq!(
        fcntl_get_seals(mapping.descriptor().unwrap()).unwrap(),
        SealFlags::GROW | SealFlags::SHRINK
    );
}

fn mapped_again_the_address_is_the_same_and_everything_new() {
    let space = AddressSpace::new();
    for mut mapping in [
        OwnedMapping::new(&space, 8 * PAGE).unwrap(),
        OwnedMapping::shared(&space, 8 * PAGE).unwrap(),
    ] {
        in_parts(&mut mapping);
        let old = mapping.descriptor().map(|fd| {
            OwnedMapping::from_fd(&space, fd.try_clone_to_owned().unwrap(), 0, PAGE).unwrap()
        });
        let _ = mapping.as_ptr().expose_provenance();
        let log = Log::default();
        let _subscription = space.insert(mapping.range(), log.clone()).unwrap();
        let at = mapping.range();
        block_on(mapping.map_again()).unwrap();
        assert_eq!((mapping.range(), rights(&mapping)), (at, vec!["rw-".to_owned(); 8]));
        for page in 0..8 {
            assert_eq!(text(&mapping, page * PAGE), [0; 4]);
            mapping.write(page * PAGE, b"anew");
        }
        assert_eq!(
            *log.told.lock().unwrap(),
            [(Event::Unmap, at.start(), 8 * PAGE as u64, b"aaaa".to_vec())]
        );
        assert!(
            old.is_none_or(|old| text(&old, 0) == *b"aaaa"),
            "who has mapped the old memory keeps it"
        );
        block_on(mapping.resize(20 * PAGE)).unwrap();
        assert_eq!(text(&mapping, 7 * PAGE), *b"anew");
    }
}

fn mapped_again_from_a_descriptor_the_address_shows_its_memory() {
    let space = AddressSpace::new();
    let mut source = OwnedMapping::shared(&space, 8 * PAGE).unwrap();
    in_parts(&mut source);
    for mut mapping in [
        OwnedMapping::new(&space, 4 * PAGE).unwrap(),
        OwnedMapping::shared(&space, 4 * PAGE).unwrap(),
    ] {
        let at = mapping.range();
        mapping.write(0, b"mine");
        for (offset, kind) in [(5 * PAGE as u64, "beyond"), (1, "pages"), (u64::MAX, "pages")] {
            let refused = block_on(mapping.map_again_from_fd(clone(&source), offset)).unwrap_err();
            let (beyond, pages) = (
                matches!(refused, MapError::BeyondEnd { .. }),
                matches!(refused, MapError::NotPages { .. }),
            );
            assert!(if kind == "beyond" { beyond } else { pages }, "{offset:#x}: {refused:?}");
            assert_eq!((mapping.range(), text(&mapping, 0)), (at, *b"mine"));
        }
        block_on(mapping.map_again_from_fd(clone(&source), 4 * PAGE as u64)).unwrap();
        assert_eq!(
            (mapping.range(), text(&mapping, 0), text(&mapping, 3 * PAGE)),
            (at, *b"eeee", *b"hhhh")
        );
        // Once more, the same part of the same descriptor.
        block_on(mapping.protect(0..PAGE, Protection::Read)).unwrap();
        block_on(mapping.map_again()).unwrap();
        assert_eq!((mapping.range(), text(&mapping, 0)), (at, *b"eeee"));
        mapping.write(PAGE, b"ffff");
        assert_eq!(text(&source, 5 * PAGE), *b"ffff");
        assert!(matches!(block_on(mapping.resize(5 * PAGE)), Err(MapError::BeyondEnd { .. })));
    }
}

fn nobody_takes_the_address_while_it_is_mapped_again() {
    let (_space, mut mapping, _log, subscription) = mapped(64 * PAGE);
    drop(subscription);
    let memory = crate::memory::Raw { at: mapping.range().start() as usize, len: mapping.len() };
    let (stop, taken) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                taken.fetch_or(memory.map_again(), Ordering::Relaxed);
            }
        });
        for round in 0..2_000_u32 {
            mapping.write(0, &round.to_ne_bytes());
            block_on(mapping.map_again()).unwrap();
            assert_eq!(text(&mapping, 0), [0; 4]);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(!taken.into_inner(), "somebody else's memory was mapped at an address that is ours");
    assert_eq!(mapping.range().start(), memory.at as u64);
}
