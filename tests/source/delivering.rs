//! What a delivery owes whom: the time of a discard, what was read when it fails, readers that depend on nobody.

use crate::memory::Raw;
use crate::never_stale::read_during;
use crate::uffd::{is_readable, log, no_fork};
use futures::FutureExt;
use futures::executor::block_on;
use rustix::mm::Advice;
use shootdown::AddressSpace;
use shootdown::source::Uffd;
use std::task::{Context, RawWakerVTable, Waker};
use std::thread;
use std::time::{Duration, Instant};

crate::list![
    f1_a_waker_that_cannot_be_cloned_loses_nothing_that_was_read,
    m5_a_discard_has_all_of_its_time_whatever_became_of_an_earlier_one,
];

/// A waker whose clone panics.
fn uncloneable() -> Waker {
    static VTABLE: RawWakerVTable = RawWakerVTable::new(|_| panic!("the clone of a waker fails"), |_| {}, |_| {}, |_| {});
    // SAFETY: nothing is behind the pointer, and none of the functions looks there.
    unsafe { Waker::new(std::ptr::null(), &VTABLE) }
}

fn f1_a_waker_that_cannot_be_cloned_loses_nothing_that_was_read() {
    let _fork = no_fork();
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space).unwrap();
    let memory = Raw::map(2);
    let _watch = uffd.watch(memory.range()).unwrap();
    // The first has a pass that is pending when it is told.
    let (_open, closed) = crate::never_stale::gate();
    let _slow = space.insert(memory.part(0, 1).range(), crate::never_stale::Slow(closed)).unwrap();
    let driver = log(&space, memory.part(1, 1).range()).0;
    let before = block_on(driver.read_begin());
    read_during(&mut reader, || (0..2).for_each(|page| memory.part(page, 1).unmap()));
    deliveries.clear();
    let mut delivery = Box::pin(deliveries.deliver());
    let waker = uncloneable();
    let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = delivery.as_mut().poll(&mut Context::from_waker(&waker));
    }));
    assert!(polled.is_err());
    drop(delivery);
    assert!(is_readable(&deliveries), "who waits for the descriptor is told again");
    assert!(driver.read_begin().now_or_never().is_none(), "nobody has been told");
    let _ = deliveries.deliver().now_or_never();
    assert!(driver.read_retry(before), "the memory has gone");
}

fn m5_a_discard_has_all_of_its_time_whatever_became_of_an_earlier_one() {
    let _fork = no_fork();
    let (space, time) = (AddressSpace::new(), Duration::from_millis(100));
    let (uffd, mut reader, mut deliveries) = Uffd::builder().settle(time).open(&space).unwrap();
    let memory = Raw::map(2);
    memory.write(1);
    let _watch = uffd.watch(memory.range()).unwrap();
    let readers = log(&space, memory.range()).0;
    read_during(&mut reader, || memory.part(0, 1).discard(Advice::LinuxFree));
    // Told, and then nobody looks at its page until its time is over.
    assert!(deliveries.deliver().now_or_never().is_none());
    let began = Instant::now();
    while began.elapsed() <= time {
        thread::yield_now();
    }
    read_during(&mut reader, || memory.discard(Advice::LinuxFree));
    let mut delivery = Box::pin(deliveries.deliver());
    assert!(delivery.as_mut().now_or_never().is_none(), "the pages are still there");
    assert!(readers.read_begin().now_or_never().is_none(), "pages that are about to go are found");
    memory.write(2);
    block_on(delivery).unwrap();
}
