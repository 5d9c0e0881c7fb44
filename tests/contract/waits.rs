//! W: threads that wait.

use crate::support::*;
use shootdown::{AddressSpace, DriverLock, Event, PassFuture, RetryBudget};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

/// Gives the processor to others until it is so.
fn until(so: impl Fn() -> bool) {
    while !so() {
        std::thread::yield_now();
    }
}

#[test]
fn w1_every_future_of_a_space_can_be_waited_for() {
    let (space, device, log) = one_device();
    let sequence = device.read_begin().wait();
    drop(space.invalidate(pages(0, 1), Event::Unmap).wait());
    assert!(device.read_retry(sequence), "the wait has called the notifier");
    let lock = DriverLock::new(Vec::new());
    let mirrored = lock.mirror(
        &device,
        RetryBudget::default(),
        |_| async { Ok::<_, ()>(7) },
        |pages, page| pages.push(page),
    );
    assert_eq!((mirrored.wait(), lock.into_inner()), (Ok(()), vec![7]));
    let other = space.insert(pages(0, 1), Device::new("other", &log)).unwrap();
    other.close().wait();
    assert_eq!(device.remove().wait().calls(), 1);
    let busy =
        space.insert(pages(0, 1), Device::new("busy", &log).then(Act::pass(Yields(50)))).unwrap();
    let mut abandoned = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(abandoned.poll().is_pending());
    drop(abandoned);
    space.drain().wait();
    assert_eq!((busy.calls(), space.active().len()), (1, 0), "it has driven what was abandoned");
    space.release().wait();
    assert!(space.is_released());
    PassFuture::new(Yields(3)).wait();
}

#[test]
fn w1_a_driver_that_is_a_thread_handles_its_inbox() {
    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 4), vec![1, 3]).unwrap();
    let mirrored = inbox.mirror(
        RetryBudget::default(),
        |_| async { Ok::<_, ()>(2) },
        |pages, page| pages.push(page),
    );
    assert_eq!(mirrored.wait(), Ok(()));
    std::thread::scope(|threads| {
        let driver = threads.spawn(|| {
            let mut handled = 0;
            while let Some(invalidation) = inbox.recv().wait() {
                inbox.with(|mapped| {
                    mapped.retain(|page| !invalidation.range().contains(page * PAGE))
                });
                invalidation.done();
                handled += 1;
            }
            handled
        });
        for page in [1, 2] {
            let guard = space.invalidate(pages(page, 1), Event::Unmap).wait();
            assert!(
                inbox.with(|mapped| !mapped.contains(&page)),
                "handled before the guard is handed out"
            );
            drop(guard);
        }
        space.release().wait();
        assert_eq!(driver.join().unwrap(), 3, "and then there are no more");
    });
    assert!(inbox.recv().wait().is_none());
}

#[test]
fn w1_what_recv_did_not_return_stays_queued() {
    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 1), ()).unwrap();
    let (mut first, mut second) = (Task::new(inbox.recv()), Task::new(inbox.recv()));
    first.expect_pending();
    second.expect_pending();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    assert!(first.is_woken() && second.is_woken());
    drop(first);
    second.finish().unwrap().done();
    drop(invalidate.finish());
}

/// An invalidation whose pass another thread completes once it is waited for.
fn wait_for_another_thread() {
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let hardware = std::thread::spawn(move || {
        until(|| gate.is_waited_for());
        gate.open();
    });
    drop(space.invalidate(pages(0, 1), Event::Unmap).wait());
    hardware.join().unwrap();
    assert_eq!(device.calls(), 1);
}

#[test]
fn w3_a_thread_may_wait_inside_another_executor() {
    futures::executor::block_on(async { wait_for_another_thread() });
    smol::block_on(async { wait_for_another_thread() });
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    tokio.block_on(async { tokio::spawn(async { wait_for_another_thread() }).await.unwrap() });
    tokio.block_on(async { wait_for_another_thread() });
}

#[test]
fn w3_a_thread_may_wait_inside_a_wait() {
    PassFuture::new(async {
        Yields(2).await;
        wait_for_another_thread();
        PassFuture::new(async { wait_for_another_thread() }).wait();
        Yields(2).await;
    })
    .wait();
}

#[test]
fn w3_a_thread_may_wait_where_its_thread_locals_are_gone() {
    struct AtTheEnd;
    impl Drop for AtTheEnd {
        fn drop(&mut self) {
            wait_for_another_thread();
        }
    }
    std::thread_local!(static AT_THE_END: AtTheEnd = const { AtTheEnd });
    let thread = std::thread::spawn(|| {
        AT_THE_END.with(|_| ());
        // Made later, gone earlier.
        wait_for_another_thread();
    });
    thread.join().unwrap();
}

#[test]
fn w2_a_thread_that_waits_drives_an_abandoned_pass() {
    let (space, device, _log) = one_device();
    let (gate, done) = (Gate::default(), Arc::new(AtomicUsize::new(0)));
    let (opens, counts) = (gate.clone(), done.clone());
    device.next(Act::pass(async move {
        opens.await;
        Yields(3).await;
        counts.fetch_add(1, Ordering::SeqCst);
    }));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    drop(invalidate);
    std::thread::scope(|threads| {
        let reader = threads.spawn(|| device.read_begin().wait());
        until(|| space.stats().waits == 1);
        assert_eq!(done.load(Ordering::SeqCst), 0);
        // Nobody but the reader is there to poll the pass again.
        gate.open();
        reader.join().unwrap();
    });
    assert_eq!(done.load(Ordering::SeqCst), 1);
    assert!(space.active().is_empty());
}

#[test]
fn w2_a_first_pass_that_waits_for_its_own_invalidation_fails_with_the_notifiers_name() {
    if cfg!(not(debug_assertions)) {
        return;
    }
    type Wait = fn(&AddressSpace, &shootdown::Subscription<Device>);
    let waits: [(&str, Wait); 3] = [
        ("read_begin", |_, reader| _ = reader.read_begin().wait()),
        ("remove", |_, reader| reader.close().wait()),
        ("an invalidation", |space, _| drop(space.invalidate(pages(0, 1), Event::Clear).wait())),
    ];
    for (what, wait) in waits {
        let (space, device, log) = one_device();
        let reader = Arc::new(space.insert(pages(0, 1), Device::new("reader", &log)).unwrap());
        let inside = (space.clone(), reader.clone());
        // Waits that need not wait leave no trace for the check to trip over.
        drop(space.invalidate(pages(0, 1), Event::Unmap).wait());
        if what == "an invalidation" {
            reader.next(Act::pass(Gate::default()));
        }
        device.next(Act::Run(Box::new(move |_| wait(&inside.0, &inside.1))));
        let panic = catch_unwind(AssertUnwindSafe(|| {
            drop(space.invalidate(pages(0, 1), Event::Unmap).wait())
        }))
        .map(drop);
        let message = *panic.expect_err(what).downcast::<String>().unwrap();
        assert!(
            message.contains(&format!("{what} waits inside the first pass of device")),
            "{message}"
        );
    }
}

#[test]
fn w4_many_threads_wait_at_once() {
    const THREADS: u64 = 16;
    let (space, device, _log) = one_device();
    let guard = space.invalidate(pages(0, 1), Event::Unmap).wait();
    std::thread::scope(|threads| {
        let readers: Vec<_> =
            (0..THREADS).map(|_| threads.spawn(|| device.read_begin().wait())).collect();
        until(|| space.stats().waits == THREADS);
        drop(guard);
        for reader in readers {
            assert!(!device.read_retry(reader.join().unwrap()));
        }
    });
}

/// Counts its polls; ready at the last one. Each poll hands its waker out.
struct Handed(usize, Arc<AtomicUsize>, std::sync::mpsc::Sender<Waker>);

impl Future for Handed {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.1.fetch_add(1, Ordering::SeqCst) + 1 == self.0 {
            return Poll::Ready(());
        }
        self.2.send(cx.waker().clone()).unwrap();
        Poll::Pending
    }
}

#[test]
fn w1_a_thread_that_waits_sleeps_until_it_is_woken() {
    let (polls, (wakers, woken)) = (Arc::new(AtomicUsize::new(0)), channel());
    let seen = polls.clone();
    let waking = std::thread::spawn(move || {
        let waker: Waker = woken.recv().unwrap();
        // A thread that does not sleep polls meanwhile.
        (0..1_000).for_each(|_| std::thread::yield_now());
        let polls = seen.load(Ordering::SeqCst);
        waker.wake();
        (polls, woken.into_iter().map(Waker::wake).count())
    });
    PassFuture::new(Handed(3, polls, wakers)).wait();
    assert_eq!(waking.join().unwrap(), (1, 1));
}

#[test]
fn w4_no_wake_is_lost_whenever_it_comes() {
    // From another thread, at any moment of the way to sleep: each poll needs one wake, so a lost
    // one hangs.
    let rounds = if cfg!(miri) { 50 } else { 20_000 };
    let (polls, (wakers, woken)) = (Arc::new(AtomicUsize::new(0)), channel());
    let waking = std::thread::spawn(move || woken.into_iter().map(Waker::wake).count());
    PassFuture::new(Handed(rounds, polls.clone(), wakers)).wait();
    assert_eq!((polls.load(Ordering::SeqCst), waking.join().unwrap()), (rounds, rounds - 1));
}

#[test]
fn w4_a_waker_that_outlives_its_wait_wakes_nobody() {
    let (polls, (wakers, woken)) = (Arc::new(AtomicUsize::new(0)), channel());
    let kept = Arc::new(Mutex::new(Vec::<Waker>::new()));
    for _ in 0..10 {
        // Woken from within, so that the wait ends; its waker is kept.
        let keep = kept.clone();
        let mut polled = 0;
        PassFuture::new(std::future::poll_fn(move |cx| {
            polled += 1;
            keep.lock().unwrap().push(cx.waker().clone());
            cx.waker().wake_by_ref();
            if polled == 2 { Poll::Ready(()) } else { Poll::Pending }
        }))
        .wait();
    }
    let late = std::thread::spawn(move || {
        // While the other thread sleeps, in a wait that no wake of these is for.
        let waker = woken.recv().unwrap();
        let kept = std::mem::take(&mut *kept.lock().unwrap());
        let shared = kept.iter().filter(|kept| kept.will_wake(&waker)).count();
        let count = kept.len();
        kept.into_iter().for_each(Waker::wake);
        waker.wake();
        // A poll that one of them caused has sent its waker.
        (count, shared, woken.into_iter().map(Waker::wake).count())
    });
    PassFuture::new(Handed(2, polls.clone(), wakers)).wait();
    assert_eq!(late.join().unwrap(), (20, 0, 0), "two waits are no polls of one task");
    assert_eq!(polls.load(Ordering::SeqCst), 2, "polled once, and once when it was woken");
}

#[test]
fn w1_a_panic_goes_on_in_the_thread_that_waits() {
    let (space, device, _log) = one_device();
    device.next(Act::pass(async {
        Yields(1).await;
        panic!("the pass fails");
    }));
    let panic =
        catch_unwind(AssertUnwindSafe(|| drop(space.invalidate(pages(0, 1), Event::Unmap).wait())));
    assert_eq!(panic.map(drop).unwrap_err().downcast_ref::<&str>(), Some(&"the pass fails"));
    // And the thread may wait again.
    drop(space.invalidate(pages(0, 1), Event::Unmap).wait());
}

/// A task of tokio may do so much until it gives its turn; after that what it polls is pending and
/// wakes it at once.
#[test]
fn w3_a_wait_inside_an_unconstrained_task_of_tokio_ends_whatever_its_budget() {
    for turns in [1_usize, 1000] {
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
            let task = runtime.spawn(tokio::task::unconstrained(async move {
                // The device's answers are all there.
                let (sender, mut answers) = tokio::sync::mpsc::unbounded_channel();
                (0..turns).for_each(|turn| sender.send(turn).unwrap());
                PassFuture::new(async move {
                    for _ in 0..turns {
                        answers.recv().await.unwrap();
                    }
                })
                .wait();
            }));
            runtime.block_on(task).unwrap();
            let _ = done.send(());
        });
        let ended = is_done.recv_timeout(std::time::Duration::from_secs(5)).is_ok();
        assert!(
            ended,
            "a pass that has {turns} answers to take, all of which are there, is waited for for ever"
        );
    }
}
