//! `OwnedMapping`: the invalidation comes before the change.

use crate::memory::PAGE;
use futures::executor::block_on;
use shootdown::source::{MapError, OwnedMapping, Protection};
use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
};
use std::ffi::c_void;
use std::io::BufRead;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

crate::list![
    every_change_is_announced_before_it_happens,
    a_part_that_is_no_part_is_refused_and_nothing_is_invalidated,
    dropped_without_a_device_it_is_unmapped,
    the_owners_last_act_comes_between_the_invalidation_and_the_unmapping,
    a_last_act_that_panics_drops_the_mapping,
    a_change_whose_future_is_dropped_does_not_happen,
    a_part_beyond_the_address_space_is_an_error_that_names_it,
    a_copy_outside_of_the_mapping_panics_before_it_touches_anything,
    a_mapping_of_which_a_part_was_advised_otherwise_grows_and_moves,
    a_mapping_that_is_dropped_while_a_first_pass_unwinds_stays_mapped,
    a_driver_with_dirty_pages_writes_back_before_every_change,
    protect_invalidates_before_the_protection_changes,
    changes_that_are_never_polled_have_never_been,
];

// In processes of their own: they count what is mapped, or was left mapped, in the whole process.
crate::list![fn isolated_tests:
    dropped_under_a_device_that_needs_time_it_stays_mapped,
    dropped_under_a_driver_that_panics_it_stays_mapped_and_the_panic_goes_on,
    a_mapping_whose_parts_are_protected_is_moved_and_resized_with_them,
    a_move_leaves_nothing_mapped_behind_the_mapping,
];

/// Why, where, how much, and what was there.
pub type Told = (Event, u64, u64, Vec<u8>);

/// Notes what it is told, and what the memory held at that moment.
#[derive(Clone, Default)]
pub struct Log {
    pub told: Arc<Mutex<Vec<Told>>>,
    pending: bool,
}

impl IntervalNotifier for Log {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let range = invalidation.range();
        // SAFETY: the promise under test is that the memory is still there while the first pass
        // runs.
        let seen = unsafe {
            std::slice::from_raw_parts(
                std::ptr::with_exposed_provenance::<u8>(range.start() as usize),
                4,
            )
        }
        .to_vec();
        self.told.lock().unwrap().push((
            invalidation.event(),
            range.start(),
            range.len().unwrap(),
            seen,
        ));
        invalidation.set_seq();
        Ok(self.pending.then(|| PassFuture::new(std::future::pending())))
    }
}

pub fn mapped(len: usize) -> (AddressSpace, OwnedMapping, Log, shootdown::Subscription<Log>) {
    let space = AddressSpace::new();
    let mut mapping = OwnedMapping::new(&space, len).unwrap();
    let _ = mapping.as_ptr().expose_provenance();
    mapping.write(0, b"abcd");
    mapping.write(2 * PAGE, b"efgh");
    let log = Log::default();
    let subscription = space.insert(shootdown::AddressRange::ALL, log.clone()).unwrap();
    (space, mapping, log, subscription)
}

pub fn text(mapping: &OwnedMapping, offset: usize) -> [u8; 4] {
    let mut text = [0; 4];
    mapping.read(offset, &mut text);
    text
}

fn every_change_is_announced_before_it_happens() {
    let (_space, mut mapping, log, _subscription) = mapped(3 * PAGE);
    let last = || log.told.lock().unwrap().last().unwrap().clone();
    let start = mapping.range().start();
    block_on(async {
        mapping.discard(2 * PAGE..3 * PAGE).await.unwrap();
        assert_eq!(last(), (Event::Clear, start + 2 * PAGE as u64, PAGE as u64, b"efgh".to_vec()));
        assert_eq!(text(&mapping, 2 * PAGE), [0; 4]);

        mapping.protect(0..PAGE, Protection::Read).await.unwrap();
        assert_eq!(last(), (Event::ProtectionVma, start, PAGE as u64, b"abcd".to_vec()));
        mapping.protect(0..PAGE, Protection::ReadWrite).await.unwrap();
        mapping.write(0, b"ABCD");

        let moved = mapping.remap().await.unwrap();
        assert_eq!(last(), (Event::Unmap, start, 3 * PAGE as u64, b"ABCD".to_vec()));
        assert_ne!(moved.start(), start);
        assert_eq!(mapping.range(), moved);
        assert_eq!(text(&mapping, 0), *b"ABCD");

        let grown = mapping.resize(5 * PAGE - 1).await.unwrap();
        assert_eq!(grown.len(), Some(5 * PAGE as u64), "rounded up to whole pages");
        assert_eq!((text(&mapping, 0), text(&mapping, 4 * PAGE)), (*b"ABCD", [0; 4]));
        mapping.resize(PAGE).await.unwrap();
        assert_eq!((mapping.len(), text(&mapping, 0)), (PAGE, *b"ABCD"));

        let at = mapping.range().start();
        mapping.unmap().await.unwrap();
        assert_eq!(last(), (Event::Unmap, at, PAGE as u64, b"ABCD".to_vec()));
    });
    assert_eq!(log.told.lock().unwrap().len(), 7);
}

fn a_part_that_is_no_part_is_refused_and_nothing_is_invalidated() {
    let (space, mut mapping, log, _subscription) = mapped(3 * PAGE);
    for part in [0..0, 0..PAGE + 1, 1..PAGE, 2 * PAGE..4 * PAGE] {
        let refused = block_on(mapping.discard(part.clone())).unwrap_err();
        assert!(matches!(refused, MapError::NotPages { .. }), "{part:?}");
        assert!(refused.to_string().contains("0x1000"), "{refused}");
        assert!(block_on(mapping.protect(part, Protection::Read)).is_err());
    }
    assert!(matches!(OwnedMapping::new(&space, 0), Err(MapError::NotPages { .. })));
    assert!(matches!(OwnedMapping::new(&space, usize::MAX), Err(MapError::NotPages { .. })));
    assert!(matches!(OwnedMapping::new(&space, 1 << 62), Err(MapError::Os(_))));
    assert_eq!(log.told.lock().unwrap().len(), 0);
}

/// The process's own list of what is mapped: start, end, and what may be done. Read line by line,
/// since a process that has used up its mappings cannot allocate much.
fn lines() -> impl Iterator<Item = (u64, u64, String)> {
    fn number(text: &str) -> u64 {
        u64::from_str_radix(text, 16).unwrap()
    }
    std::io::BufReader::new(std::fs::File::open("/proc/self/maps").unwrap()).lines().map(|line| {
        let line = line.unwrap();
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        (number(start), number(end), rest[..3].to_owned())
    })
}

/// Bytes of address space in use.
pub fn bytes() -> u64 {
    lines().map(|(start, end, _)| end - start).sum()
}

fn is_mapped(address: u64) -> bool {
    lines().any(|(start, end, _)| (start..end).contains(&address))
}

/// What may be done with each page of a mapping.
pub fn rights(mapping: &OwnedMapping) -> Vec<String> {
    let range = mapping.range();
    let mut rights = vec!["gap".to_owned(); mapping.len() / PAGE];
    for (start, end, right) in
        lines().filter(|(start, end, _)| *start <= range.last() && *end > range.start())
    {
        let pages = (range.start()..=range.last()).step_by(PAGE).zip(&mut rights);
        pages
            .filter(|(page, _)| (start..end).contains(page))
            .for_each(|(_, known)| known.clone_from(&right));
    }
    rights
}

fn the_owners_last_act_comes_between_the_invalidation_and_the_unmapping() {
    let (space, mapping, log, _subscription) = mapped(3 * PAGE);
    let (range, mut seen) = (mapping.range(), None);
    let unmapped: Result<(), Box<dyn std::error::Error + Send + Sync>> = block_on(async {
        mapping
            .unmap_with(|of| {
                // SAFETY: the promise under test is that the memory is still there.
                let text = unsafe { std::slice::from_raw_parts(of.as_ptr(), 4) }.to_vec();
                seen = Some((of, text, log.told.lock().unwrap().len(), space.active().len()));
            })
            .await?;
        Ok(())
    });
    unmapped.unwrap();
    assert_eq!(
        seen,
        Some((range, b"abcd".to_vec(), 1, 1)),
        "all devices have been told, and it is under invalidation"
    );
    assert_eq!((log.told.lock().unwrap().len(), space.active().len()), (1, 0));
}

fn a_last_act_that_panics_drops_the_mapping() {
    let (space, mapping, log, _subscription) = mapped(3 * PAGE);
    let unmapped = catch_unwind(AssertUnwindSafe(|| {
        block_on(mapping.unmap_with(|_| panic!("the last act fails"))).is_ok()
    }));
    assert!(unmapped.is_err(), "its caller is told");
    assert_eq!(space.active().len(), 0, "it is over");
    assert_eq!(log.told.lock().unwrap().len(), 2, "the drop invalidates as every drop does");
}

fn dropped_without_a_device_it_is_unmapped() {
    // Large, so that nothing else of this process is mapped there meanwhile.
    let (_space, mapping, log, _subscription) = mapped(64 << 20);
    let middle = mapping.range().start() + (32 << 20);
    assert!(is_mapped(middle));
    drop(mapping);
    assert!(!is_mapped(middle));
    assert_eq!(log.told.lock().unwrap().len(), 1);
}

fn dropped_under_a_device_that_needs_time_it_stays_mapped() {
    let (space, mapping, _log, subscription) = mapped(3 * PAGE);
    drop(subscription);
    let pending = Log { pending: true, ..Log::default() };
    let _subscription = space.insert(mapping.range(), pending).unwrap();
    let (start, before) = (mapping.range().start(), OwnedMapping::leaked_bytes());
    drop(mapping);
    assert!(is_mapped(start));
    assert_eq!(OwnedMapping::leaked_bytes() - before, 3 * PAGE as u64);
    assert_eq!(space.active().len(), 1, "the range stays under invalidation");
}

fn a_change_whose_future_is_dropped_does_not_happen() {
    let (space, mut mapping, _log, subscription) = mapped(3 * PAGE);
    drop(subscription);
    let _subscription =
        space.insert(mapping.range(), Log { pending: true, ..Log::default() }).unwrap();
    let mut discard = Box::pin(mapping.discard(0..PAGE));
    assert!(futures::FutureExt::now_or_never(&mut discard).is_none());
    drop(discard);
    assert_eq!(text(&mapping, 0), *b"abcd");
    std::mem::forget(mapping);
}

#[expect(clippy::reversed_empty_ranges, reason = "that is the case under test")]
fn a_part_beyond_the_address_space_is_an_error_that_names_it() {
    let (_space, mut mapping, log, _subscription) = mapped(3 * PAGE);
    let top = usize::MAX - (PAGE - 1);
    let shared = &mut OwnedMapping::shared(&AddressSpace::new(), 3 * PAGE).unwrap();
    for mapping in [&mut mapping, shared] {
        for part in [
            top..usize::MAX,
            0..usize::MAX,
            0..top,
            top - PAGE..top,
            usize::MAX..0,
            top..0,
            PAGE..0,
            3 * PAGE..4 * PAGE,
        ] {
            let discarded = block_on(mapping.discard(part.clone())).unwrap_err();
            let protected = block_on(mapping.protect(part.clone(), Protection::Read)).unwrap_err();
            for refused in [discarded, protected] {
                assert!(
                    matches!(&refused, MapError::NotPages { part: named, .. } if *named == part),
                    "{part:?}: {refused:?}"
                );
                assert!(refused.to_string().contains(&format!("{:#x}", part.start)), "{refused}");
            }
        }
        for len in [0, usize::MAX, usize::MAX - PAGE + 2] {
            assert!(
                matches!(block_on(mapping.resize(len)), Err(MapError::NotPages { .. })),
                "{len:#x}"
            );
        }
        let at = mapping.range();
        assert!(matches!(block_on(mapping.resize(top)), Err(MapError::Os(_))));
        assert_eq!(mapping.range(), at);
    }
    // The attempt to make it as long as that was an invalidation; the others were none.
    assert_eq!(log.told.lock().unwrap().len(), 1);
}

fn a_copy_outside_of_the_mapping_panics_before_it_touches_anything() {
    let space = AddressSpace::new();
    for mut mapping in
        [OwnedMapping::new(&space, PAGE).unwrap(), OwnedMapping::shared(&space, PAGE).unwrap()]
    {
        for offset in [PAGE - 3, PAGE, usize::MAX - 3, usize::MAX] {
            let wrote = catch_unwind(AssertUnwindSafe(|| mapping.write(offset, b"abcd")));
            let read = catch_unwind(AssertUnwindSafe(|| mapping.read(offset, &mut [0; 4])));
            assert!(wrote.is_err() && read.is_err(), "{offset:#x}");
        }
        mapping.write(PAGE, b"");
        assert_eq!(text(&mapping, PAGE - 4), [0; 4]);
    }
}

/// Eight pages that name themselves, three protections in five parts.
pub fn in_parts(mapping: &mut OwnedMapping) {
    for page in 0..8 {
        mapping.write(page * PAGE, &[b'a' + page as u8; 4]);
    }
    block_on(async {
        mapping.protect(PAGE..2 * PAGE, Protection::Read).await.unwrap();
        mapping.protect(3 * PAGE..5 * PAGE, Protection::None).await.unwrap();
        mapping.protect(7 * PAGE..8 * PAGE, Protection::Read).await.unwrap();
    });
}

pub const PARTS: [&str; 8] = ["rw-", "r--", "rw-", "---", "---", "rw-", "rw-", "r--"];

pub fn expect_parts(mapping: &mut OwnedMapping) {
    assert_eq!(rights(mapping)[..8], PARTS);
    block_on(mapping.protect(3 * PAGE..5 * PAGE, Protection::Read)).unwrap();
    for page in 0..8 {
        assert_eq!(text(mapping, page * PAGE), [b'a' + page as u8; 4], "page {page}");
    }
    block_on(mapping.protect(3 * PAGE..5 * PAGE, Protection::None)).unwrap();
}

fn a_mapping_whose_parts_are_protected_is_moved_and_resized_with_them() {
    let space = AddressSpace::new();
    for mut mapping in [
        OwnedMapping::new(&space, 8 * PAGE).unwrap(),
        OwnedMapping::shared(&space, 8 * PAGE).unwrap(),
    ] {
        in_parts(&mut mapping);
        let (old, leaked) = (mapping.range(), OwnedMapping::leaked_bytes());
        let moved = block_on(mapping.remap()).unwrap();
        assert!(!moved.overlaps(old));
        expect_parts(&mut mapping);

        // Large, so that nothing else of this process is mapped in its middle afterwards.
        let grown = block_on(mapping.resize(64 << 20)).unwrap();
        assert_eq!(grown.len(), Some(64 << 20));
        expect_parts(&mut mapping);
        assert!(
            rights(&mapping)[8..].iter().all(|rights| rights == "rw-"),
            "new pages are readable and writable"
        );
        assert_eq!(text(&mapping, 8 * PAGE), [0; 4]);
        mapping.write((64 << 20) - 4, b"last");

        let shorter = block_on(mapping.resize(8 * PAGE)).unwrap();
        assert_eq!(shorter.start(), grown.start(), "made shorter it does not move");
        assert!(!is_mapped(grown.start() + (32 << 20)));
        expect_parts(&mut mapping);
        assert_eq!(block_on(mapping.resize(5 * PAGE)).unwrap().len(), Some(5 * PAGE as u64));
        assert_eq!(rights(&mapping), PARTS[..5]);
        assert_eq!(OwnedMapping::leaked_bytes(), leaked);

        // One protection, and not that of a new page.
        block_on(mapping.protect(0..5 * PAGE, Protection::Read)).unwrap();
        block_on(mapping.resize(6 * PAGE)).unwrap();
        assert_eq!(rights(&mapping), ["r--", "r--", "r--", "r--", "r--", "rw-"]);
    }
}

/// To find its parts, the kernel is asked to make them longer.
fn a_move_leaves_nothing_mapped_behind_the_mapping() {
    let space = AddressSpace::new();
    for mut mapping in [
        OwnedMapping::new(&space, 64 << 20).unwrap(),
        OwnedMapping::shared(&space, 64 << 20).unwrap(),
    ] {
        // Now there is room behind it.
        block_on(mapping.resize(2 * PAGE)).unwrap();
        block_on(mapping.protect(PAGE..2 * PAGE, Protection::Read)).unwrap();
        let before = bytes();
        block_on(mapping.remap()).unwrap();
        let more = bytes().saturating_sub(before);
        assert!(more < 1 << 20, "{more:#x}");
    }
}

fn a_mapping_of_which_a_part_was_advised_otherwise_grows_and_moves() {
    let (_space, mut mapping, _log, _subscription) = mapped(3 * PAGE);
    let part = mapping.range().as_mut_ptr().wrapping_add(PAGE).cast::<c_void>();
    // SAFETY: the page is the mapping's; what a child of `fork` sees is changed and nothing else.
    unsafe { rustix::mm::madvise(part, PAGE, rustix::mm::Advice::LinuxDontFork).unwrap() };
    block_on(async {
        mapping.resize(300 * PAGE).await.unwrap();
        assert_eq!(
            (text(&mapping, 0), text(&mapping, 2 * PAGE), text(&mapping, 299 * PAGE)),
            (*b"abcd", *b"efgh", [0; 4])
        );
        mapping.remap().await.unwrap();
    });
    assert_eq!((text(&mapping, 0), text(&mapping, 2 * PAGE)), (*b"abcd", *b"efgh"));
}

/// A driver whose first pass fails.
struct Fails;

impl IntervalNotifier for Fails {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        panic!("the first pass fails");
    }
}

fn dropped_under_a_driver_that_panics_it_stays_mapped_and_the_panic_goes_on() {
    let space = AddressSpace::new();
    let mapping = OwnedMapping::new(&space, 3 * PAGE).unwrap();
    let (range, leaked) = (mapping.range(), OwnedMapping::leaked_bytes());
    let _driver = space.insert(range, Fails).unwrap();
    let dropped = catch_unwind(AssertUnwindSafe(|| drop(mapping)));
    assert!(dropped.is_err(), "who drops it is told");
    assert!(is_mapped(range.start()), "the device was never seen to let go");
    assert_eq!(OwnedMapping::leaked_bytes() - leaked, 3 * PAGE as u64);
}

fn a_mapping_that_is_dropped_while_a_first_pass_unwinds_stays_mapped() {
    let space = AddressSpace::new();
    let mapping = OwnedMapping::new(&space, PAGE).unwrap();
    let (range, leaked) = (mapping.range(), OwnedMapping::leaked_bytes());
    let _driver = space.insert(range, Fails).unwrap();
    let unmapped = catch_unwind(AssertUnwindSafe(|| block_on(mapping.unmap()).is_ok()));
    assert!(unmapped.is_err(), "its caller is told");
    assert!(is_mapped(range.start()), "the device was never seen to let go");
    assert!(OwnedMapping::leaked_bytes() >= leaked + PAGE as u64);
}

/// A device that may have written to its copy of the first page, and then writes back when it is
/// told. It takes a while.
#[derive(Clone, Default)]
struct Dirty(Arc<AtomicBool>);

impl IntervalNotifier for Dirty {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        if !self.0.swap(false, Ordering::Relaxed) {
            return Ok(None);
        }
        let (to, mut turns) = (invalidation.range().start() as usize, 3);
        Ok(Some(PassFuture::new(std::future::poll_fn(move |cx| {
            turns -= 1;
            cx.waker().wake_by_ref();
            if turns != 0 {
                return std::task::Poll::Pending;
            }
            // SAFETY: the promise under test: while a pass runs the memory is there.
            unsafe { std::ptr::with_exposed_provenance_mut::<[u8; 4]>(to).write(*b"back") };
            std::task::Poll::Ready(())
        }))))
    }
}

/// Ryujinx PR #5755: a driver writes back, and the memory is somebody else's by then.
fn a_driver_with_dirty_pages_writes_back_before_every_change() {
    let space = AddressSpace::new();
    let device = Dirty::default();
    let dirty = || device.0.store(true, Ordering::Relaxed);
    let wrote = || !device.0.load(Ordering::Relaxed);
    let _driver = space.insert(AddressRange::ALL, device.clone()).unwrap();
    for kind in ["private", "shared"] {
        let shared = OwnedMapping::shared(&AddressSpace::new(), 4 * PAGE).unwrap();
        let private = kind == "private";
        let fd = || shared.descriptor().unwrap().try_clone_to_owned().unwrap();
        let made = if private {
            OwnedMapping::new(&space, 4 * PAGE)
        } else {
            OwnedMapping::shared(&space, 4 * PAGE)
        };
        let mut mapping = made.unwrap();
        block_on(async {
            // What stays holds what was written back: that came before the move, and before the
            // page could be written no more.
            dirty();
            mapping.remap().await.unwrap();
            assert_eq!((text(&mapping, 0), wrote()), (*b"back", true));
            mapping.write(0, b"none");
            dirty();
            mapping.resize(100 * PAGE).await.unwrap();
            assert_eq!((text(&mapping, 0), wrote()), (*b"back", true));
            mapping.write(0, b"none");
            dirty();
            mapping.protect(0..PAGE, Protection::Read).await.unwrap();
            assert_eq!((text(&mapping, 0), wrote()), (*b"back", true));
            mapping.protect(0..PAGE, Protection::ReadWrite).await.unwrap();
            // What is new is not written to.
            dirty();
            mapping.discard(0..PAGE).await.unwrap();
            assert_eq!((text(&mapping, 0), wrote()), ([0; 4], true));
            dirty();
            mapping.map_again().await.unwrap();
            assert_eq!((text(&mapping, 0), wrote()), ([0; 4], true));
            mapping.resize(4 * PAGE).await.unwrap();
            dirty();
            mapping.map_again_from_fd(fd(), 0).await.unwrap();
            assert_eq!((text(&shared, 0), text(&mapping, 0), wrote()), ([0; 4], [0; 4], true));
            dirty();
            mapping.unmap().await.unwrap();
            assert_eq!(
                (text(&shared, 0), wrote()),
                (*b"back", true),
                "the last write, before it was unmapped"
            );
        });
    }
}

/// shadPS4 PR #4212.
fn protect_invalidates_before_the_protection_changes() {
    let (space, mut mapping, _log, subscription) = mapped(3 * PAGE);
    drop(subscription);
    struct Looks(Mutex<Vec<(Event, AddressRange, String)>>);
    impl IntervalNotifier for Looks {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            let range = invalidation.range();
            let now =
                lines().find(|(start, end, _)| (*start..*end).contains(&range.start())).unwrap().2;
            self.0.lock().unwrap().push((invalidation.event(), range, now));
            invalidation.set_seq();
            Ok(None)
        }
    }
    let driver = space.insert(AddressRange::ALL, Looks(Mutex::default())).unwrap();
    let page = AddressRange::new(mapping.range().start() + PAGE as u64, PAGE as u64).unwrap();
    let sequence = block_on(driver.read_begin());
    block_on(async {
        mapping.protect(PAGE..2 * PAGE, Protection::Read).await.unwrap();
        mapping.protect(PAGE..2 * PAGE, Protection::None).await.unwrap();
    });
    let told = |now: &str| (Event::ProtectionVma, page, now.to_owned());
    assert_eq!(*driver.0.lock().unwrap(), [told("rw-"), told("r--")]);
    assert!(driver.read_retry(sequence), "a reader that began before collides");
    assert_eq!(rights(&mapping)[1], "---");
}

/// asomers/futures-locks #1, #2, #3.
fn changes_that_are_never_polled_have_never_been() {
    let (space, mut mapping, log, subscription) = mapped(3 * PAGE);
    let sequence = block_on(subscription.read_begin());
    drop(mapping.discard(0..PAGE));
    drop(mapping.protect(0..PAGE, Protection::None));
    drop(mapping.remap());
    drop(mapping.resize(9 * PAGE));
    drop(mapping.map_again());
    assert_eq!(
        (text(&mapping, 0), mapping.len(), rights(&mapping)),
        (*b"abcd", 3 * PAGE, vec!["rw-".to_owned(); 3])
    );
    assert_eq!(log.told.lock().unwrap().len(), 0);
    assert!(!subscription.read_retry(sequence) && space.active().is_empty());

    // Made in one order, awaited in another.
    let mut other = OwnedMapping::new(&space, PAGE).unwrap();
    let _ = other.as_ptr().expose_provenance();
    other.write(0, b"next");
    let (at, beside) = (mapping.range(), other.range());
    let first = mapping.discard(2 * PAGE..3 * PAGE);
    let second = other.unmap();
    block_on(async {
        second.await.unwrap();
        assert_eq!(
            log.told.lock().unwrap().iter().map(|told| (told.0, told.1)).collect::<Vec<_>>(),
            [(Event::Unmap, beside.start())]
        );
        first.await.unwrap();
    });
    assert_eq!(log.told.lock().unwrap().last().unwrap().0, Event::Clear);

    // That of `unmap` owns the mapping: never polled it is the drop of the mapping.
    let big = OwnedMapping::new(&space, 64 << 20).unwrap();
    let _ = big.as_ptr().expose_provenance();
    let middle = big.range().start() + (32 << 20);
    let unmap = big.unmap();
    assert!(is_mapped(middle) && log.told.lock().unwrap().len() == 2);
    drop(unmap);
    assert!(!is_mapped(middle));
    assert_eq!((text(&mapping, 0), mapping.range()), (*b"abcd", at));
    assert_eq!(log.told.lock().unwrap().len(), 3);
}
