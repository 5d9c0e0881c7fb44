//! N4: what a source has read is told of in batches, and nobody waits longer for that.

use crate::memory::Raw;
use crate::uffd::no_fork;
use futures::FutureExt;
use rustix::mm::Advice;
use shootdown::source::Uffd;
use shootdown::{
    AddressRange, AddressSpace, IntervalNotifier, Invalidation, PassFuture, WouldBlock,
};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

crate::list![
    n4_no_reader_waits_for_more_than_if_each_change_were_told_of_alone,
    n4_s5_who_begins_under_changes_waits_for_one_and_not_for_several_that_have_happened,
    m5_a_batch_with_pages_that_stay_is_under_invalidation_until_they_go,
    n4_pages_that_a_madvise_is_about_to_drop_are_no_notifiers_of_their_own,
];

/// Makes a change that need not raise an event, and reads meanwhile.
fn read_during(reader: &mut shootdown::source::Reader, change: impl FnOnce() + Send) {
    let _ = crate::never_stale::events_during(reader, change);
}

fn n4_s5_who_begins_under_changes_waits_for_one_and_not_for_several_that_have_happened() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) =
        Uffd::builder().settle(Duration::from_secs(3600)).open(&space).unwrap();
    let (gone, discarded) = (Raw::map(5), Raw::map(3));
    discarded.write(1);
    let _watches = [uffd.watch(gone.range()).unwrap(), uffd.watch(discarded.range()).unwrap()];
    let _driver = space.insert(gone.range(), HangsFor(gone.range())).unwrap();
    // Whether a driver of this page that begins during the delivery has to wait.
    let mut waits = |page: Raw, change: &(dyn Fn() + Sync)| {
        read_during(&mut reader, change);
        assert!(deliveries.deliver().now_or_never().is_none());
        let new = space.insert(page.range(), Counts(AtomicUsize::new(0))).unwrap();
        new.read_begin().now_or_never().is_none()
    };
    let unmap = |page: usize| gone.part(page, 1).unmap();
    assert!(waits(gone.part(0, 1), &|| unmap(0)), "one change");
    assert!(!waits(gone.part(2, 1), &|| [2, 4].into_iter().for_each(unmap)));
    let discard = |page: usize| discarded.part(page, 1).discard(Advice::LinuxFree);
    let both = || [0, 2].into_iter().for_each(discard);
    assert!(waits(discarded.part(0, 1), &both), "they are to come");
}

/// Its device never answers for one of its pages.
struct HangsFor(AddressRange);

impl IntervalNotifier for HangsFor {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let hangs = invalidation.ranges().iter().any(|range| range.overlaps(self.0));
        Ok(hangs.then(|| PassFuture::new(std::future::pending())))
    }
}

fn n4_no_reader_waits_for_more_than_if_each_change_were_told_of_alone() {
    let _fork = no_fork();
    for alone in [true, false] {
        let space = AddressSpace::new();
        let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
        let memory = [Raw::map(1), Raw::map(1)];
        let _watches = memory.map(|page| uffd.watch(page.range()).unwrap());
        let _driver = space.insert(AddressRange::ALL, HangsFor(memory[1].range())).unwrap();
        for page in memory {
            read_during(&mut reader, || page.unmap());
            if alone {
                let _ = deliveries.deliver().now_or_never();
            }
        }
        let _ = deliveries.deliver().now_or_never();
        // A driver that maps what is new at the first address.
        let new = space.insert(memory[0].range(), Counts(AtomicUsize::new(0))).unwrap();
        assert!(
            new.read_begin().now_or_never().is_some(),
            "told of alone: {alone}: {:?}",
            space.active()
        );
    }
}

/// The pages of one change of a batch stay, and the driver has dropped its watches in its first
/// pass.
fn m5_a_batch_with_pages_that_stay_is_under_invalidation_until_they_go() {
    let _fork = no_fork();
    struct Drops(Mutex<Vec<shootdown::source::Watch>>);
    impl IntervalNotifier for Drops {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            self.0.lock().unwrap().clear();
            Ok(None)
        }
    }
    let space = AddressSpace::new();
    let time = std::time::Duration::from_secs(20);
    let (uffd, mut reader, mut deliveries) = Uffd::builder().settle(time).open(&space).unwrap();
    let memory = [Raw::map(1), Raw::map(1)];
    memory.iter().for_each(|page| page.write(1));
    let driver = space.insert(AddressRange::ALL, Drops(Mutex::default())).unwrap();
    *driver.0.lock().unwrap() =
        memory.iter().map(|page| uffd.watch(page.range()).unwrap()).collect();
    read_during(&mut reader, || {
        memory[0].discard(Advice::LinuxDontNeed);
        memory[1].discard(Advice::LinuxFree);
    });
    let mut delivery = Box::pin(deliveries.deliver());
    assert!((&mut delivery).now_or_never().is_none(), "the second page is there");
    assert_eq!(space.active().len(), 1, "one batch: {:?}", space.active());
    assert!(driver.read_begin().now_or_never().is_none());
    memory[1].write(2);
    assert_eq!(futures::executor::block_on(delivery).unwrap(), 2);
    assert!(driver.read_begin().now_or_never().is_some());
    drop(uffd);
}

/// Counts its calls.
struct Counts(AtomicUsize);

impl IntervalNotifier for Counts {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(None)
    }
}

fn n4_pages_that_a_madvise_is_about_to_drop_are_no_notifiers_of_their_own() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let time = std::time::Duration::from_secs(20);
    let (uffd, mut reader, mut deliveries) = Uffd::builder().settle(time).open(&space).unwrap();
    let memory = Raw::map(9);
    memory.write(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    let driver = space.insert(AddressRange::ALL, Counts(AtomicUsize::new(0))).unwrap();
    let parts = [1, 3, 5, 7].map(|page| memory.part(page, 1));
    read_during(&mut reader, || parts.iter().for_each(|part| part.discard(Advice::LinuxFree)));
    let mut first = Box::pin(deliveries.deliver());
    assert!((&mut first).now_or_never().is_none());
    assert_eq!(driver.0.swap(0, Ordering::SeqCst), 1, "the discards are one");
    read_during(&mut reader, || parts.iter().for_each(|part| part.unmap()));
    let _ = deliveries.deliver().now_or_never();
    assert_eq!(
        driver.0.load(Ordering::SeqCst),
        1,
        "the unmappings concern the same driver, and nobody else"
    );
}
