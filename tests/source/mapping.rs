//! `OwnedMapping`: the invalidation comes before the change.

use crate::memory::PAGE;
use futures::executor::block_on;
use shootdown::source::{MapError, OwnedMapping, Protection};
use shootdown::{AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
use std::sync::{Arc, Mutex};

crate::list![
    every_change_is_announced_before_it_happens,
    a_part_that_is_no_part_is_refused_and_nothing_is_invalidated,
    dropped_without_a_device_it_is_unmapped,
    dropped_under_a_device_that_needs_time_it_stays_mapped,
    a_change_whose_future_is_dropped_does_not_happen,
];

/// Why, where, how much, and what was there.
type Told = (Event, u64, u64, Vec<u8>);

/// Notes what it is told, and what the memory held at that moment.
#[derive(Clone, Default)]
struct Log {
    told: Arc<Mutex<Vec<Told>>>,
    pending: bool,
}

impl IntervalNotifier for Log {
    fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        let range = invalidation.range();
        // SAFETY: the promise under test is that the memory is still there while the first pass runs.
        let seen =
            unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(range.start() as usize), 4) }.to_vec();
        self.told.lock().unwrap().push((invalidation.event(), range.start(), range.len().unwrap(), seen));
        invalidation.set_seq();
        Ok(self.pending.then(|| PassFuture::new(std::future::pending())))
    }
}

fn mapped(len: usize) -> (AddressSpace, OwnedMapping, Log, shootdown::Subscription<Log>) {
    let space = AddressSpace::new();
    let mut mapping = OwnedMapping::new(&space, len).unwrap();
    let _ = mapping.as_ptr().expose_provenance();
    mapping.write(0, b"abcd");
    mapping.write(2 * PAGE, b"efgh");
    let log = Log::default();
    let subscription = space.insert(shootdown::AddressRange::ALL, log.clone()).unwrap();
    (space, mapping, log, subscription)
}

fn text(mapping: &OwnedMapping, offset: usize) -> [u8; 4] {
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

/// Whether a page is mapped, by the process's own list.
fn is_mapped(address: u64) -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().any(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split_once(' ').unwrap().0;
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        (number(start)..number(end)).contains(&address)
    })
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
    let _subscription = space.insert(mapping.range(), Log { pending: true, ..Log::default() }).unwrap();
    let mut discard = Box::pin(mapping.discard(0..PAGE));
    assert!(futures::FutureExt::now_or_never(&mut discard).is_none());
    drop(discard);
    assert_eq!(text(&mapping, 0), *b"abcd");
    std::mem::forget(mapping);
}
