//! A mirror's end in the engine, and the hook.

use crate::support::*;
use futures::FutureExt;
use futures::channel::oneshot;
use futures::executor::{LocalPool, block_on};
use futures::future::BoxFuture;
use futures::task::{ArcWake, LocalSpawnExt, waker};
use shootdown::{AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
use shootdown_lease::engine::{Hub, Leased, Lost, Outgoing};
use shootdown_lease::{
    Boot, Denied, Ending, Host, Incarnation, Memory, Mirror, MirrorSettings, Owner, Standing,
    Terms, Time,
};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::Context;

/// What a thread used from before the end of a lease until after the next one has begun.
#[test]
fn d4_a_check_knows_that_a_lease_has_ended_although_there_is_another_one() {
    let (timer, mut pool) = (Timer::default(), LocalPool::new());
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let _mirrors = hub.mirrors();
    let leased = leased(&timer, 1, MirrorSettings::default());
    let driver = leased.space().insert(pages(0, 1), Copies).unwrap();
    let (runs, sleep) = (leased.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    let mut link = hub.link(Host(1));
    pool.run_until_stalled();
    carry(&hub, 1, &mut link, &leased);
    pool.run_until_stalled();
    let seen = block_on(driver.read_begin());
    timer.pass(&mut pool, 200); // cut off; the owner may have changed everything
    carry(&hub, 1, &mut link, &leased);
    timer.pass(&mut pool, 30);
    carry(&hub, 1, &mut link, &leased);
    assert!(leased.has_lease() && driver.read_retry(seen));
}

#[test]
fn d3_a_clock_that_jumped_and_came_back_does_not_lengthen_the_next_lease() {
    let mut owner = Owner::new(Boot(1), Terms::new(TERM), Memory::New, ms(0)).unwrap();
    let mut mirror = Mirror::new(Incarnation(1), MirrorSettings::default(), ms(0));
    joined(&mut mirror, &mut owner, 1, ms(0));
    mirror.tick(ms(60_000)); // one wrong reading
    assert!(mirror.stopped(ms(2)));
    mirror.tick(ms(2));
    while let Some(message) = mirror.next_message() {
        owner.handle(Host(1), message, ms(2));
    }
    while let Some((_, message)) = owner.next_message() {
        mirror.handle(message, ms(2));
    }
    owner.tick(ms(200));
    assert!(owner.is_deserted());
    assert!(!mirror.is_valid(ms(200)));
}

#[test]
fn d9_a_mirror_that_has_left_says_so_although_its_link_is_made_anew() {
    let (timer, mut pool) = (Timer::default(), LocalPool::new());
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let _mirrors = hub.mirrors();
    let leased = leased(&timer, 1, MirrorSettings::default());
    let (runs, sleep) = (leased.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    let mut link = hub.link(Host(1));
    pool.run_until_stalled();
    carry(&hub, 1, &mut link, &leased);
    let leaves = leased.clone();
    pool.run_until(async move { leaves.leave().await });
    let mut link = hub.link(Host(1));
    leased.connected();
    carry(&hub, 1, &mut link, &leased);
    assert!(hub.members().is_empty(), "\"returns when that is done and waits to be sent\"");
}

#[test]
fn d9_a_mirror_that_leaves_while_it_joins_is_in_no_books_afterwards() {
    let (timer, mut pool) = (Timer::default(), LocalPool::new());
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let _mirrors = hub.mirrors();
    let leased = leased(&timer, 1, MirrorSettings::default());
    let (runs, sleep) = (leased.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    let mut link = hub.link(Host(1));
    pool.run_until_stalled();
    let join = leased.next_message().now_or_never().flatten().unwrap();
    hub.handle(Host(1), join);
    let leaves = leased.clone();
    pool.spawner().spawn_local(async move { leaves.leave().await }).unwrap();
    pool.run_until_stalled();
    assert_eq!(
        leased.next_message().now_or_never(),
        None,
        "what the join is granted is to be given back"
    );
    carry(&hub, 1, &mut link, &leased);
    pool.run_until_stalled();
    assert!(hub.members().is_empty());
    assert_eq!(leased.next_message().now_or_never(), Some(None));
    // Where nobody answers it does not wait for ever.
    let deaf = self::leased(&timer, 2, MirrorSettings::default());
    let (runs, leaves, sleep) = (deaf.clone(), deaf.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    pool.run_until_stalled();
    let left = Rc::<Cell<bool>>::default();
    let told = left.clone();
    let leave = async move {
        leaves.leave().await;
        told.set(true);
    };
    pool.spawner().spawn_local(leave).unwrap();
    timer.pass(&mut pool, 200);
    assert!(left.get());
}

struct Flushes(Arc<Mutex<Vec<oneshot::Sender<()>>>>);

impl IntervalNotifier for Flushes {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let (sender, flushed) = oneshot::channel();
        self.0.lock().unwrap().push(sender);
        Ok(Some(PassFuture::new(flushed.map(drop))))
    }
}

#[test]
fn d9_a_mirror_whose_run_was_dropped_while_it_stopped_joins_anew_when_it_runs_again() {
    let timer = Timer::default();
    let mut pool = LocalPool::new();
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let _mirrors = hub.mirrors();
    let leased = leased(&timer, 1, MirrorSettings::default());
    let flushes = Arc::<Mutex<Vec<_>>>::default();
    let _driver = leased.space().insert(pages(0, 1), Flushes(flushes.clone())).unwrap();
    let mut link = hub.link(Host(1));
    let gone = Rc::new(Cell::new(false));
    let (runs, sleep, ends) = (leased.clone(), timer.sleep(), gone.clone());
    let run = async move {
        let mut run = Box::pin(runs.run(sleep));
        std::future::poll_fn(|cx| {
            if ends.get() { std::task::Poll::Ready(()) } else { run.as_mut().poll(cx) }
        })
        .await;
    };
    pool.spawner().spawn_local(run).unwrap();
    pool.run_until_stalled();
    carry(&hub, 1, &mut link, &leased);
    // Cut off until it stops; then `run` is dropped.
    timer.pass(&mut pool, 101);
    assert!(matches!(leased.standing(), Standing::Stopping(_)));
    gone.set(true);
    flushes.lock().unwrap().drain(..).for_each(|flush| _ = flush.send(()));
    pool.run_until_stalled();
    let (runs, sleep) = (leased.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    for _ in 0..1_000 {
        timer.pass(&mut pool, 1);
        carry(&hub, 1, &mut link, &leased);
        flushes.lock().unwrap().drain(..).for_each(|flush| _ = flush.send(()));
    }
    assert!(
        matches!(leased.standing(), Standing::Live(..)),
        "{:?} a second later",
        leased.standing()
    );
}

#[test]
fn f1_a_driver_that_panics_ends_no_mirror() {
    struct Panics(AtomicBool);
    impl IntervalNotifier for Panics {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            invalidation.set_seq();
            assert!(!self.0.swap(false, SeqCst), "the driver fails once");
            Ok(None)
        }
    }
    let timer = Timer::default();
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let space = AddressSpace::new();
    let _mirrors = space.insert(pages(0, 16), hub.mirrors()).unwrap();
    let leased = leased(&timer, 1, MirrorSettings::default());
    let _driver = leased.space().insert(pages(0, 1), Panics(AtomicBool::new(true))).unwrap();
    let mut link = hub.link(Host(1));
    let mut run = Box::pin(leased.run(timer.sleep()));
    let mut cx = Context::from_waker(std::task::Waker::noop());
    assert!(run.as_mut().poll(&mut cx).is_pending());
    carry(&hub, 1, &mut link, &leased);
    let mut invalidation = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(invalidation.as_mut().now_or_never().is_none());
    carry(&hub, 1, &mut link, &leased);
    let went_on = catch_unwind(AssertUnwindSafe(|| run.as_mut().poll(&mut cx).is_pending()));
    assert!(went_on.is_ok(), "the panic of one driver is the end of no host");
    for _ in 0..4 {
        carry(&hub, 1, &mut link, &leased);
        assert!(run.as_mut().poll(&mut cx).is_pending());
    }
    drop(invalidation.now_or_never().expect("it has let go of everything"));
    assert_eq!(
        (hub.endings(Ending::Acknowledged), hub.endings(Ending::Left)),
        (0, 1),
        "nobody knows what that device has"
    );
    assert_eq!((leased.panics(), leased.counts().joined, leased.has_lease()), (1, 2, true));
}

#[test]
fn d9_a_mirror_whose_driver_panics_when_all_is_let_go_of_says_nothing_and_joins_no_more() {
    struct Panics;
    impl IntervalNotifier for Panics {
        fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
            panic!("the driver fails")
        }
    }
    let (timer, mut pool) = (Timer::default(), LocalPool::new());
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let space = AddressSpace::new();
    let _mirrors = hub.insert(&space).unwrap();
    let leased = leased(&timer, 1, MirrorSettings::default());
    let _driver = leased.space().insert(pages(0, 1), Panics).unwrap();
    let mut link = hub.link(Host(1));
    let (runs, sleep) = (leased.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    let (runs, sleep) = (hub.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    pool.run_until_stalled();
    carry(&hub, 1, &mut link, &leased);
    let mut invalidation = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    let mut waited = 0;
    while invalidation.as_mut().now_or_never().is_none() {
        carry(&hub, 1, &mut link, &leased);
        timer.pass(&mut pool, 1);
        waited += 1;
    }
    assert!((90..160).contains(&waited), "its lease has ended by time: {waited} ms");
    assert_eq!((hub.endings(Ending::Expired), hub.endings(Ending::Left)), (1, 0));
    for _ in 0..300 {
        carry(&hub, 1, &mut link, &leased);
        timer.pass(&mut pool, 1);
    }
    assert_eq!(
        (leased.denied(), leased.panics(), leased.counts().joined),
        (Some(Denied::Panicked), 2, 1)
    );
    // And nobody waits for ever.
    assert_eq!(block_on(leased.joined()), None);
    assert_eq!(block_on(leased.fetch(pages(0, 1))), Err(Lost::Left));
    block_on(leased.leave());
}

/// A reader that finds the lease ended while its renewal is being taken in by another thread, which
/// has read the clock before.
#[test]
fn r4_a_lease_that_is_valid_again_by_a_late_renewal_wakes_who_waits() {
    type Hook = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;
    let (now, hook) = (Arc::new(AtomicU64::new(0)), Hook::default());
    let clock = {
        let (now, hook) = (now.clone(), hook.clone());
        move || {
            let read = Time::from_nanos(now.load(SeqCst));
            // What other threads do between this reading and the use of it.
            if let Some(meanwhile) = { hook.lock().unwrap().take() } {
                meanwhile();
            }
            read
        }
    };
    let owner = Owner::new(Boot(1), Terms::new(TERM), Memory::New, ms(0)).unwrap();
    let owner_clock = now.clone();
    let hub = Hub::new(owner, move || Time::from_nanos(owner_clock.load(SeqCst)));
    let _mirrors = hub.mirrors();
    let leased = Leased::new(Mirror::new(Incarnation(1), MirrorSettings::default(), ms(0)), clock);
    let driver = Arc::new(leased.space().insert(pages(0, 1), Copies).unwrap());
    let mut link = hub.link(Host(1));
    let mut run = Box::pin(leased.run(|_| std::future::pending::<()>()));
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let _ = run.as_mut().poll(&mut cx);
    carry(&hub, 1, &mut link, &leased);
    let _ = run.as_mut().poll(&mut cx);
    let Standing::Live(_, stop) = leased.standing() else { panic!() };
    // Asked in time, answered in time; the answer arrives when the lease is about to end.
    now.store(80 * MS, SeqCst);
    drop(run);
    let mut run = Box::pin(leased.run(|_| std::future::pending::<()>()));
    let _ = run.as_mut().poll(&mut cx);
    while let Some(Some(message)) = leased.next_message().now_or_never() {
        hub.handle(Host(1), message);
    }
    now.store(stop.as_nanos() - 1, SeqCst);
    struct Count(AtomicUsize);
    impl ArcWake for Count {
        fn wake_by_ref(count: &Arc<Self>) {
            count.0.fetch_add(1, SeqCst);
        }
    }
    let woken = Arc::new(Count(AtomicUsize::new(0)));
    let reader = Arc::<Mutex<Option<BoxFuture<'static, ()>>>>::default();
    *reader.lock().unwrap() = Some(Box::pin(async move {
        driver.read_begin().await;
    }));
    let (polls, wakes, later) = (reader.clone(), waker(woken.clone()), now.clone());
    let pending = Arc::new(AtomicBool::new(false));
    let found = pending.clone();
    *hook.lock().unwrap() = Some(Box::new(move || {
        later.store(stop.as_nanos() + 1, SeqCst);
        let mut reader = polls.lock().unwrap();
        found.store(
            reader.as_mut().unwrap().as_mut().poll(&mut Context::from_waker(&wakes)).is_pending(),
            SeqCst,
        );
    }));
    while let Some(Some(outgoing)) = link.next().now_or_never() {
        if let Outgoing::Message(message) = outgoing {
            leased.handle(message, None);
        }
    }
    let _ = run.as_mut().poll(&mut cx);
    assert!(pending.load(SeqCst), "it found that the lease had ended");
    assert!(leased.has_lease(), "which is valid again");
    assert!(woken.0.load(SeqCst) > 0, "and nobody has woken the reader");
}

#[test]
fn f1_a_clock_that_panics_once_leaves_no_reader_behind() {
    let (timer, panics) = (Timer::default(), Arc::new(AtomicBool::new(false)));
    let (reads, fails) = (timer.clock(), panics.clone());
    let clock = move || {
        assert!(!fails.swap(false, SeqCst), "once");
        reads()
    };
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let _mirrors = hub.mirrors();
    let leased =
        Leased::new(Mirror::new(Incarnation(1), MirrorSettings::default(), timer.now()), clock);
    let driver = leased.space().insert(pages(0, 1), Copies).unwrap();
    let (mut pool, mut link) = (LocalPool::new(), hub.link(Host(1)));
    let (runs, sleep) = (leased.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    pool.run_until_stalled();
    carry(&hub, 1, &mut link, &leased);
    pool.run_until_stalled();
    struct Count(AtomicUsize);
    impl ArcWake for Count {
        fn wake_by_ref(count: &Arc<Self>) {
            count.0.fetch_add(1, SeqCst);
        }
    }
    let woken = Arc::new(Count(AtomicUsize::new(0)));
    let (mut reader, wakes) = (Box::pin(driver.read_begin()), waker(woken.clone()));
    panics.store(true, SeqCst);
    if reader.as_mut().poll(&mut Context::from_waker(&wakes)).is_ready() {
        return; // asked again at once
    }
    for _ in 0..1_000 {
        timer.pass(&mut pool, 1);
        carry(&hub, 1, &mut link, &leased);
    }
    assert!(leased.has_lease() && woken.0.load(SeqCst) > 0);
}
