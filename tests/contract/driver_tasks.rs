use crate::support::*;
use futures::StreamExt;
use shootdown::{AddressSpace, Collision, Delivery, Event, Inbox, WouldBlock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

type Pages = Vec<u64>;

fn inbox() -> (AddressSpace, Inbox<Pages>) {
    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 1), Pages::new()).unwrap();
    (space, inbox)
}

#[track_caller]
fn take(inbox: &Inbox<Pages>) -> Delivery {
    let mut stream = inbox;
    now(stream.next()).expect("the stream goes on")
}

#[test]
fn a1_the_pass_is_done_when_the_task_says_so_and_installs_in_between_collide() {
    let (space, inbox) = inbox();
    let sequence = now(inbox.read_begin());
    assert!(!inbox.read_retry(sequence));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    assert!(inbox.read_retry(sequence));
    assert_eq!(
        inbox.install(sequence, |pages| pages.push(1)),
        Err(Collision),
        "queued, not taken yet"
    );
    let delivery = take(&inbox);
    assert_eq!(
        (delivery.range(), delivery.event(), delivery.deliveries()),
        (pages(0, 1), Event::Unmap, 1)
    );
    assert_eq!(inbox.install(sequence, |pages| pages.push(1)), Err(Collision));
    invalidate.expect_pending();
    delivery.done();
    drop(invalidate.finish());
    let sequence = now(inbox.read_begin());
    assert_eq!(inbox.install(sequence, |pages| pages.push(1)), Ok(()));
}

#[test]
fn a1_several_may_be_pending_and_be_completed_in_any_order() {
    let (space, inbox) = inbox();
    let mut first = Task::new(space.invalidate(pages(0, 1), Event::Clear));
    let mut second = Task::new(space.invalidate(pages(0, 2), Event::Unmap));
    first.expect_pending();
    second.expect_pending();
    let (one, two) = (take(&inbox), take(&inbox));
    assert_eq!((one.range(), two.range()), (pages(0, 1), pages(0, 2)));
    two.done();
    drop(second.finish());
    first.expect_pending();
    one.done();
    drop(first.finish());
}

#[test]
fn a2_what_was_taken_and_dropped_is_delivered_again_first() {
    let (space, inbox) = inbox();
    let mut first = Task::new(space.invalidate(pages(0, 1), Event::Clear));
    let mut second = Task::new(space.invalidate(pages(0, 2), Event::Unmap));
    first.expect_pending();
    second.expect_pending();
    drop(take(&inbox)); // the task was cancelled
    let again = take(&inbox);
    assert_eq!((again.range(), again.deliveries()), (pages(0, 1), 2));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _taken = again;
        panic!("the handler fails");
    }));
    assert!(panicked.is_err());
    assert_eq!(take(&inbox).deliveries(), 3);
    take(&inbox).done();
    drop(first.finish());
    second.expect_pending();
}

#[test]
fn a2_a_redelivery_wakes_a_task_that_waits_for_the_stream() {
    let (space, inbox) = inbox();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Clear));
    invalidate.expect_pending();
    let taken = take(&inbox);
    let mut stream = &inbox;
    let mut other = Task::new(stream.next());
    other.expect_pending();
    drop(taken);
    other.finish().unwrap().done();
    drop(invalidate.finish());
}

#[test]
fn a3_nothing_is_queued_twice_and_a_non_blockable_invalidation_does_not_wait_for_the_task() {
    let (space, inbox) = inbox();
    assert_eq!(space.try_invalidate(pages(0, 1), Event::Unmap).map(drop), Err(WouldBlock));
    assert_eq!(inbox.queued(), 1);
    drop(take(&inbox));
    drop(take(&inbox));
    assert_eq!(inbox.queued(), 1);
    take(&inbox).done();
    now(space.drain());
    assert_eq!((inbox.queued(), space.active().len()), (0, 0));
}

/// Once woken, drives what was abandoned to its end, and abandons the next one.
struct Abandons(AddressSpace, AtomicBool);

impl Wake for Abandons {
    fn wake(self: Arc<Self>) {
        if !self.1.swap(true, Ordering::SeqCst) {
            now(self.0.drain());
            assert!(self.0.try_invalidate(pages(0, 1), Event::Unmap).is_err());
        }
    }
}

#[test]
fn a3_nothing_is_queued_twice_when_the_next_one_comes_before_done_has_returned() {
    let (space, inbox) = inbox();
    assert!(space.try_invalidate(pages(0, 1), Event::Unmap).is_err());
    let waker = Waker::from(Arc::new(Abandons(space.clone(), AtomicBool::new(false))));
    let mut drain = Box::pin(space.drain());
    assert!(drain.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    take(&inbox).done();
    assert_eq!((inbox.queued(), space.active().len()), (1, 1), "the first is over");
    take(&inbox).done();
    assert_eq!(inbox.queued(), 0);
    now(drain);
}

#[test]
fn a4_dropping_the_inbox_completes_what_is_pending() {
    let (space, inbox) = inbox();
    let mut queued = Task::new(space.invalidate(pages(0, 1), Event::Clear));
    let mut taken = Task::new(space.invalidate(pages(0, 1), Event::Clear));
    queued.expect_pending();
    taken.expect_pending();
    let delivery = take(&inbox);
    drop(inbox);
    drop((queued.finish(), taken.finish()));
    delivery.done(); // too late, and harmless
    assert_eq!((space.len(), space.active().len()), (0, 0));
}

#[test]
fn a4_remove_handles_first_what_is_pending_and_then_the_stream_ends() {
    let (space, inbox) = inbox();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Clear));
    invalidate.expect_pending();
    assert!(!inbox.is_closed());
    let mut remove = Task::new(inbox.close());
    remove.expect_pending();
    assert!(inbox.is_closed(), "though the stream goes on");
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(inbox.queued(), 1, "the second was not queued any more");
    take(&inbox).done();
    remove.finish();
    drop(invalidate.finish());
    let mut stream = &inbox;
    assert!(now(stream.next()).is_none());
}

#[test]
fn a4_the_stream_ends_after_release_once_all_has_been_handled() {
    let (space, inbox) = inbox();
    let inbox = Arc::new(inbox);
    let of_task = inbox.clone();
    let mut driver = Task::new(async move {
        let mut stream = &*of_task;
        let mut handled = 0;
        while let Some(delivery) = stream.next().await {
            delivery.done();
            handled += 1;
        }
        handled
    });
    driver.expect_pending();
    let mut release = Task::new(space.release());
    release.expect_pending();
    assert_eq!(driver.finish(), 1);
    release.finish();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
}

#[test]
fn a5_after_the_stream_has_ended_nothing_is_installed() {
    let (space, inbox) = inbox();
    let mut release = Task::new(space.release());
    release.expect_pending();
    take(&inbox).done();
    release.finish();
    let sequence = now(inbox.read_begin());
    assert!(!inbox.is_closed());
    let mut stream = &inbox;
    assert!(now(stream.next()).is_none());
    assert!(inbox.is_closed());
    assert_eq!(inbox.install(sequence, |pages| pages.push(1)), Err(Collision));
    let sequence = now(inbox.read_begin());
    assert_eq!(inbox.install(sequence, |pages| pages.push(1)), Err(Collision));
    let budget = shootdown::RetryBudget::default();
    let mirrored = now(inbox.mirror(budget, async |_| Ok::<_, ()>(()), |pages, ()| pages.push(1)));
    assert_eq!(mirrored, Err(shootdown::MirrorError::Closed));
}

#[test]
fn an_inbox_of_a_released_space_gives_its_mappings_back() {
    let space = AddressSpace::new();
    now(space.release());
    assert_eq!(space.inbox(pages(0, 1), vec![7]).unwrap_err().into_notifier(), [7]);
}

#[test]
fn a2_a_handler_that_is_cancelled_at_any_await_loses_no_invalidation_and_completes_none_early() {
    // The handler has five awaits; it is dropped after each number of polls, and another one takes
    // over.
    for polls in 0..8 {
        let (space, inbox) = inbox();
        let handled = Arc::new(std::sync::Mutex::new(Vec::new()));
        let handler = || {
            let (inbox, handled) = (&inbox, handled.clone());
            async move {
                let mut stream = inbox;
                while let Some(delivery) = stream.next().await {
                    Yields(1).await;
                    inbox.with(|mappings| mappings.clear());
                    Yields(2).await;
                    handled.lock().unwrap().push(delivery.range());
                    delivery.done();
                    Yields(1).await;
                }
            }
        };
        let mut first = Task::new(space.invalidate(pages(0, 1), Event::Clear));
        let mut second = Task::new(space.invalidate(pages(0, 2), Event::Unmap));
        first.expect_pending();
        second.expect_pending();
        let mut cancelled = Task::new(handler());
        for _ in 0..polls {
            assert!(cancelled.poll().is_pending());
            let done = handled.lock().unwrap().clone();
            assert_eq!(
                first.run().is_ready(),
                done.contains(&pages(0, 1)),
                "completed early, or late"
            );
            if done.contains(&pages(0, 1)) {
                break;
            }
        }
        drop(cancelled);
        let mut next = Task::new(handler());
        next.expect_pending();
        drop(second.finish());
        assert_eq!(*handled.lock().unwrap(), [pages(0, 1), pages(0, 2)], "after {polls} polls");
        drop(first.run());
        assert!(space.active().is_empty());
    }
}

#[test]
fn a4_an_inbox_that_is_dropped_with_its_task_wedges_nobody() {
    let (space, inbox) = inbox();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Clear));
    invalidate.expect_pending();
    let mut task = Task::new(async move {
        let mut inbox = inbox;
        let _taken = inbox.next().await;
        std::future::pending::<()>().await;
    });
    assert!(task.poll().is_pending());
    invalidate.expect_pending();
    drop(task);
    drop(invalidate.finish());
}

/// nutanix/libvfio-user PR #609, #369, spdk/spdk #2074: an unmap was acknowledged with I/O in
/// flight.
#[test]
fn report_24_an_unmap_waits_for_the_last_of_64_ios_and_a_second_one_does_not_wait_for_it() {
    let (space, inbox) = inbox();
    let begin = |id: u64| {
        let sequence = now(inbox.read_begin());
        inbox.install(sequence, |in_flight| in_flight.push(id))
    };
    assert!((0..64).all(|id| begin(id) == Ok(())));
    let sequence = now(inbox.read_begin());
    let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    unmap.expect_pending();
    // A new I/O on the range is refused.
    assert_eq!(inbox.install(sequence, |in_flight| in_flight.push(64)), Err(Collision));
    assert!(Task::new(inbox.read_begin()).poll().is_pending());
    let delivery = take(&inbox);
    // The same region again, whose I/Os the device has no part in (O6).
    let mut second = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    second.expect_pending();
    take(&inbox).done();
    drop(second.finish());
    for id in 0..64 {
        unmap.expect_pending();
        inbox.with(|in_flight| in_flight.retain(|other| *other != id));
    }
    assert!(inbox.with(|in_flight| in_flight.is_empty()));
    delivery.done();
    drop(unmap.finish());
    assert_eq!(begin(64), Ok(()));
}

#[test]
fn c6_an_inbox_says_who_it_is_and_what_has_happened_to_it() {
    let space = AddressSpace::new();
    let inbox = space.named_inbox(pages(0, 1), Pages::default(), "ring 7").unwrap();
    let other = space.inbox(pages(4, 1), ()).unwrap();
    assert!(inbox.name() == "ring 7" && other.name().contains("Inbox"), "{}", other.name());
    let began = now(inbox.read_begin());
    let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    unmap.expect_pending();
    let listed = &space.active()[0];
    assert_eq!(
        (&listed.pending[..], &listed.pending_ids[..]),
        (&["ring 7".into()][..], &[inbox.id()][..])
    );
    assert_ne!(inbox.id(), other.id());
    assert!(inbox.install(began, |_| ()).is_err());
    assert_eq!((inbox.stats().collisions, other.stats().collisions), (1, 0));
    take(&inbox).done();
    drop(unmap.finish());
}
