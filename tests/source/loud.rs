//! Changes that raise an event, for each kind of memory; `silent.rs` has the others.

use crate::kinds::{
    Area, Change, HUGE, HUGES, Kind, Outcome, SMALL, at_the_event, audible, check, outcome, refused,
};
use crate::mapping::{expect_parts, in_parts};
use crate::memory::{PAGE, Raw};
use crate::uffd::no_fork;
use futures::executor::block_on;
use shootdown::source::{MapError, OwnedMapping, Protection};
use shootdown::{AddressRange, AddressSpace, Event};
use std::io;
use std::ptr;
use std::sync::mpsc;

crate::list![
    munmap_and_what_is_mapped_over_raise_unmap,
    mremap_raises_unmap_of_what_it_leaves,
    mremap_that_keeps_the_old_range_raises_unmap_and_the_range_stays_watched,
    dontneed_raises_clear_and_the_range_stays_watched,
    madv_free_raises_clear_also_where_it_is_refused,
    madv_remove_raises_clear_of_shared_memory,
    a_stack_that_its_thread_leaves_raises_clear,
    an_owned_mapping_of_which_a_part_is_watched_moves_and_grows,
];

// In processes of their own: what they unmap must not be mapped by the threads of other tests.
crate::list![fn isolated_tests:
    a_heap_made_smaller_by_brk_raises_unmap,
    the_event_comes_before_pages_are_discarded_and_after_they_are_unmapped,
];

crate::list![fn huge_tests:
    huge_pages_raise_the_same_events,
    a_mapping_of_huge_pages_has_parts_of_huge_pages,
    huge_pages_are_mapped_again_only_where_address_and_length_are_theirs,
    of_a_misaligned_remove_every_changed_huge_page_is_inside_the_invalidation,
];

fn unmap(area: Area) -> io::Result<()> {
    // SAFETY: memory of a test, into which there are no references.
    check(unsafe { libc::munmap(area.ptr(), area.raw.len) })
}

fn map_over(area: Area) -> io::Result<()> {
    area.raw.map_over();
    Ok(())
}

fn munmap_and_what_is_mapped_over_raise_unmap() {
    for kind in SMALL {
        audible(kind, Event::Unmap, unmap);
        audible(kind, Event::Unmap, map_over);
    }
}

fn remap(area: Area, len: usize, flags: i32) -> io::Result<()> {
    // SAFETY: memory of a test, into which there are no references.
    let at = unsafe { libc::mremap(area.ptr(), area.raw.len, len, flags, ptr::null_mut::<u8>()) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn mremap_raises_unmap_of_what_it_leaves() {
    let _fork = no_fork();
    for kind in SMALL {
        let area = Area::new(kind);
        let told = outcome(area.range(), || remap(area, 64 * area.raw.len, libc::MREMAP_MAYMOVE));
        let Outcome::Told(mut told) = told else { panic!("{kind:?}: {told:?}") };
        // UNMAP and REMAP, which may be read together.
        told.dedup();
        assert_eq!(told, [(Event::Unmap, area.range())], "{kind:?}");
        let area = Area::new(kind);
        let told = outcome(area.range(), || remap(area, 4 * PAGE, 0));
        assert_eq!(
            told,
            Outcome::Told(vec![(Event::Unmap, area.raw.part(4, 12).range())]),
            "{kind:?}: its end"
        );
    }
}

fn mremap_that_keeps_the_old_range_raises_unmap_and_the_range_stays_watched() {
    let _fork = no_fork();
    for kind in SMALL {
        let area = Area::new(kind);
        let told = outcome(area.range(), || {
            remap(area, area.raw.len, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP)?;
            area.raw.part(1, 1).advise(libc::MADV_DONTNEED)
        });
        let both = vec![(Event::Unmap, area.range()), (Event::Clear, area.raw.part(1, 1).range())];
        assert_eq!(told, Outcome::Told(both), "{kind:?}");
    }
}

const DONTNEED_LOCKED: i32 = 24;

fn dontneed_raises_clear_and_the_range_stays_watched() {
    let _fork = no_fork();
    for (kind, advice) in
        SMALL.into_iter().flat_map(|kind| [(kind, libc::MADV_DONTNEED), (kind, DONTNEED_LOCKED)])
    {
        let area = Area::new(kind);
        let twice = || area.raw.advise(advice).and_then(|()| area.raw.advise(advice));
        let told = vec![(Event::Clear, area.range()); 2];
        assert_eq!(outcome(area.range(), twice), Outcome::Told(told), "{kind:?} {advice}");
        // What is in a file stays there; what is not is gone.
        let gone = matches!(kind, Kind::Private | Kind::MemfdPrivate | Kind::FilePrivate);
        assert_eq!(area.raw.look().unwrap().iter().all(|byte| *byte == 0), gone, "{kind:?}");
    }
}

fn madv_free_raises_clear_also_where_it_is_refused() {
    SMALL
        .into_iter()
        .for_each(|kind| audible(kind, Event::Clear, |area| area.raw.advise(libc::MADV_FREE)));
    assert!(Area::new(Kind::Private).raw.advise(libc::MADV_FREE).is_ok());
    assert!(Area::new(Kind::Memfd).raw.advise(libc::MADV_FREE).is_err());
}

fn madv_remove_raises_clear_of_shared_memory() {
    let remove: Change = |area| area.raw.advise(libc::MADV_REMOVE);
    for kind in [Kind::SharedAnonymous, Kind::Memfd, Kind::Sysv, Kind::File] {
        audible(kind, Event::Clear, remove);
    }
    refused(Kind::Private, libc::EINVAL, remove);
    refused(Kind::MemfdPrivate, libc::EACCES, remove);
    refused(Kind::FilePrivate, libc::EACCES, remove);
}

fn the_event_comes_before_pages_are_discarded_and_after_they_are_unmapped() {
    let _fork = no_fork();
    let all = |look: Option<Vec<u8>>| {
        look.map(|bytes| (bytes[0], bytes.iter().all(|byte| *byte == bytes[0])))
    };
    let discards: [(Change, &[Kind]); 3] = [
        (|area| area.raw.advise(libc::MADV_DONTNEED), &SMALL),
        (|area| area.raw.advise(DONTNEED_LOCKED), &SMALL),
        (
            |area| area.raw.advise(libc::MADV_REMOVE),
            &[Kind::SharedAnonymous, Kind::Memfd, Kind::Sysv, Kind::File],
        ),
    ];
    for (change, kinds) in discards {
        for kind in kinds {
            assert_eq!(
                all(at_the_event(Area::new(*kind), change)),
                Some((1, true)),
                "{kind:?}: still there"
            );
        }
    }
    for kind in SMALL {
        assert_eq!(at_the_event(Area::new(kind), unmap), None, "{kind:?}");
        assert_eq!(
            at_the_event(Area::new(kind), |area| remap(
                area,
                64 * area.raw.len,
                libc::MREMAP_MAYMOVE
            )),
            None,
            "{kind:?}"
        );
        assert_eq!(
            at_the_event(Area::new(kind), |area| remap(area, 4 * PAGE, 0)),
            None,
            "{kind:?}"
        );
        assert_eq!(
            all(at_the_event(Area::new(kind), map_over)),
            Some((0, true)),
            "{kind:?}: new memory"
        );
        let keep =
            |area: Area| remap(area, area.raw.len, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP);
        let private = matches!(kind, Kind::Private | Kind::MemfdPrivate | Kind::FilePrivate);
        let left = all(at_the_event(Area::new(kind), keep)).unwrap();
        assert!(!private || left == (0, true), "{kind:?}: what was written to has moved");
    }
}

/// The C library keeps the stack of a thread that has ended, without its pages.
fn a_stack_that_its_thread_leaves_raises_clear() {
    let _fork = no_fork();
    let (send, receive) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let (mut start, mut len) = (ptr::null_mut(), 0);
        // SAFETY: asks for the place of this thread's stack; the first call fills `attributes`.
        unsafe {
            let mut attributes = std::mem::zeroed();
            check(libc::pthread_getattr_np(libc::pthread_self(), &raw mut attributes)).unwrap();
            check(libc::pthread_attr_getstack(&raw const attributes, &raw mut start, &raw mut len))
                .unwrap();
            libc::pthread_attr_destroy(&raw mut attributes);
        }
        send.send(AddressRange::from_ptr(start.cast_const(), len).unwrap()).unwrap();
        let _ = gone.recv();
    });
    let stack = receive.recv().unwrap();
    let told = outcome(stack, || {
        drop(go);
        thread.join().unwrap();
        Ok(())
    });
    let Outcome::Told(told) = told else { panic!("{told:?}") };
    assert!(
        told.iter().all(|(event, range)| *event == Event::Clear && stack.covers(*range)),
        "{stack}: {told:?}"
    );
    let given: u64 = told.iter().map(|(_, range)| range.len().unwrap()).sum();
    assert!(given > stack.len().unwrap() / 2, "{stack}: {told:?}");
}

/// The C library's own heap lies below what is taken here, and must not grow meanwhile.
fn a_heap_made_smaller_by_brk_raises_unmap() {
    const LEN: usize = 64 * PAGE;
    // SAFETY: sets how much the C library keeps.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX) };
    drop((0..64).map(|_| vec![1_u8; 100 << 10]).collect::<Vec<_>>());
    // SAFETY: what is added belongs to nobody else.
    let at = unsafe { libc::sbrk(0) }.addr();
    // SAFETY: as above.
    unsafe { libc::sbrk((at.next_multiple_of(PAGE) - at + LEN) as isize) };
    let heap = Raw { at: at.next_multiple_of(PAGE), len: LEN };
    heap.write(1);
    let told = outcome(heap.range(), || {
        // SAFETY: if nobody has added anything, the end is what was added above.
        unsafe {
            assert_eq!(libc::sbrk(0).addr(), heap.at + LEN, "the heap has grown meanwhile");
            libc::sbrk(-(LEN as isize));
        }
        Ok(())
    });
    assert_eq!(told, Outcome::Told(vec![(Event::Unmap, heap.range())]));
    // SAFETY: as above.
    assert_eq!(unsafe { libc::sbrk(LEN as isize) }.addr(), heap.at);
    heap.write(1);
    let area = Area { kind: Kind::Private, raw: heap, fd: -1 };
    let gone = at_the_event(area, |area| {
        // SAFETY: as above.
        check(unsafe { libc::sbrk(-(area.raw.len as isize)) }.addr() as i64)
    });
    assert_eq!(gone, None, "it has gone when the event can be read");
}

fn huge_pages_raise_the_same_events() {
    for kind in HUGES {
        audible(kind, Event::Unmap, unmap);
        audible(kind, Event::Unmap, map_over);
        audible(kind, Event::Clear, |area| area.raw.advise(libc::MADV_DONTNEED));
        audible(kind, Event::Clear, |area| area.raw.advise(DONTNEED_LOCKED));
    }
    audible(Kind::HugeMemfd, Event::Clear, |area| area.raw.advise(libc::MADV_REMOVE));
    refused(Kind::Huge, libc::EACCES, |area| area.raw.advise(libc::MADV_REMOVE));
    for kind in HUGES {
        refused(kind, libc::EINVAL, |area| remap(area, 2 * area.raw.len, libc::MREMAP_MAYMOVE));
        refused(kind, libc::EINVAL, |area| {
            remap(area, area.raw.len, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP)
        });
    }
}

/// A watched part is a mapping of its own for the kernel, and each of its moves raises events.
fn an_owned_mapping_of_which_a_part_is_watched_moves_and_grows() {
    let _fork = no_fork();
    let source = crate::uffd::Running::new();
    let space = AddressSpace::new();
    let kinds = [
        OwnedMapping::new(&space, 8 * PAGE).unwrap(),
        OwnedMapping::shared(&space, 8 * PAGE).unwrap(),
    ];
    for (mut mapping, parts) in kinds.into_iter().zip([true, false]) {
        if parts {
            in_parts(&mut mapping);
        } else {
            mapping.write(7 * PAGE, b"last");
        }
        for change in 0..2 {
            let part = Raw { at: mapping.range().start() as usize + 2 * PAGE, len: 4 * PAGE };
            let _watch = source.uffd.watch(part.range()).unwrap();
            block_on(async {
                match change {
                    0 => mapping.remap().await.unwrap(),
                    _ => mapping.resize(9000 * PAGE).await.unwrap(),
                }
            });
            if parts {
                expect_parts(&mut mapping);
            } else {
                let mut last = [0; 4];
                mapping.read(7 * PAGE, &mut last);
                assert_eq!(&last, b"last");
            }
        }
    }
}

/// Two huge pages of a file of three.
fn of_huge_pages(space: &AddressSpace) -> OwnedMapping {
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor of an area is nobody's after that.
    let fd = unsafe { rustix::fd::OwnedFd::from_raw_fd(Area::untouched(Kind::HugeMemfd).fd) };
    OwnedMapping::from_fd(space, fd, 0, HUGE + 1).unwrap()
}

fn descriptor(mapping: &OwnedMapping) -> rustix::fd::OwnedFd {
    mapping.descriptor().unwrap().try_clone_to_owned().unwrap()
}

/// Not an event, but here are the huge pages.
fn a_mapping_of_huge_pages_has_parts_of_huge_pages() {
    let space = AddressSpace::new();
    let mut mapping = of_huge_pages(&space);
    let text = |mapping: &OwnedMapping, at: usize| {
        let mut text = [0; 4];
        mapping.read(at, &mut text);
        text
    };
    assert_eq!(mapping.len(), 2 * HUGE, "rounded up to whole huge pages");
    mapping.write(0, b"abcd");
    mapping.write(HUGE, b"efgh");
    block_on(async {
        let refused = mapping.discard(0..PAGE).await.unwrap_err();
        assert!(matches!(refused, MapError::NotPages { page: HUGE, .. }), "{refused}");
        mapping.discard(0..HUGE).await.unwrap();
        let at = mapping.remap().await.unwrap();
        assert_eq!((text(&mapping, 0), text(&mapping, HUGE)), ([0; 4], *b"efgh"));
        let grown = mapping.resize(2 * HUGE + 1).await.unwrap();
        assert!(grown != at && grown.len() == Some(3 * HUGE as u64));
        assert_eq!(text(&mapping, HUGE), *b"efgh");
        assert!(matches!(mapping.resize(3 * HUGE + 1).await, Err(MapError::BeyondEnd { .. })));
        mapping.map_again().await.unwrap();
        assert_eq!((mapping.range(), text(&mapping, HUGE)), (grown, *b"efgh"));
        // Parts with protections stay where they are, whole.
        mapping.protect(0..HUGE, Protection::Read).await.unwrap();
        let refused = mapping.remap().await.unwrap_err();
        assert!(
            matches!(&refused, MapError::Os(error) if error.kind() == io::ErrorKind::InvalidInput),
            "{refused:?}"
        );
        assert_eq!((mapping.range(), text(&mapping, HUGE)), (grown, *b"efgh"));
        mapping.resize(HUGE).await.unwrap();
        mapping.unmap().await.unwrap();
    });
}

fn huge_pages_are_mapped_again_only_where_address_and_length_are_theirs() {
    let space = AddressSpace::new();
    let (huge, small) = (of_huge_pages(&space), OwnedMapping::shared(&space, 3 * HUGE).unwrap());
    let expect_refused = |mapping: &mut OwnedMapping| {
        let (at, refused) =
            (mapping.range(), block_on(mapping.map_again_from_fd(descriptor(&huge), 0)));
        assert!(matches!(refused, Err(MapError::NotPages { page: HUGE, .. })), "{refused:?}");
        assert_eq!(mapping.range(), at);
    };
    // Where huge pages were.
    let mut mapping = of_huge_pages(&space);
    block_on(mapping.map_again_from_fd(descriptor(&small), 0)).unwrap();
    block_on(mapping.resize(HUGE + PAGE)).unwrap();
    expect_refused(&mut mapping);
    block_on(mapping.resize(HUGE)).unwrap();
    block_on(mapping.map_again_from_fd(descriptor(&huge), 0)).unwrap();
    // As long as a huge page. One more page keeps it from where a huge page would lie.
    let mut mapping = OwnedMapping::from_fd(&space, descriptor(&small), 0, HUGE + PAGE).unwrap();
    while mapping.range().start().is_multiple_of(HUGE as u64) {
        block_on(mapping.remap()).unwrap();
    }
    block_on(mapping.resize(HUGE)).unwrap();
    expect_refused(&mut mapping);
}

/// e2b-dev/infra PR #3002.
fn of_a_misaligned_remove_every_changed_huge_page_is_inside_the_invalidation() {
    let _fork = no_fork();
    let area = Area::new(Kind::HugeMemfd);
    // From the second small page of the first huge one to the middle of the third.
    let part = Raw { at: area.raw.at + PAGE, len: 2 * HUGE + HUGE / 2 };
    let told = outcome(area.range(), || {
        part.advise(libc::MADV_REMOVE)?;
        area.raw.advise(libc::MADV_DONTNEED)
    });
    let Outcome::Told(told) = told else { panic!("{told:?}") };
    let (event, invalidated) = told[0];
    assert_eq!(event, Event::Clear);
    assert_eq!(told[1..], [(Event::Clear, area.range())], "it is watched after the first as well");
    let look = area.raw.look().unwrap();
    let changed: Vec<u64> = (0..look.len())
        .filter(|byte| look[*byte] != 1)
        .map(|byte| (area.raw.at + byte) as u64)
        .collect();
    assert!(changed.len() >= HUGE, "the huge page in the middle is gone");
    assert!(changed.iter().all(|byte| invalidated.contains(*byte)), "{invalidated}");
}
