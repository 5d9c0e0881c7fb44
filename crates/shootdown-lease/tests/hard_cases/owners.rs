//! An owner's end in the engine.

use crate::support::*;
use futures::FutureExt;
use futures::executor::LocalPool;
use futures::task::{ArcWake, LocalSpawnExt, waker};
use shootdown::{AddressSpace, Event};
use shootdown_lease::engine::{Hub, Outgoing};
use shootdown_lease::{
    Boot, Host, Incarnation, Memory, MirrorSettings, Nonce, Owner, Terms, ToOwner,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::task::Context;

#[test]
fn l2_a_fetch_does_not_wait_for_invalidations_of_other_pages() {
    let (timer, mut pool) = (Timer::default(), LocalPool::new());
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let space = AddressSpace::new();
    let _mirrors = space.insert(pages(0, 16), hub.mirrors()).unwrap();
    let leased = leased(&timer, 1, MirrorSettings::default());
    let (runs, sleep) = (leased.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    let mut link = hub.link(Host(1));
    pool.run_until_stalled();
    carry(&hub, 1, &mut link, &leased);
    pool.run_until_stalled();
    let fetches = leased.clone();
    let mut fetch = Box::pin(async move { fetches.fetch(pages(0, 1)).await });
    // Two programs change pages 8 and 9; each change is short, and acknowledged at once.
    let mut guards = Vec::new();
    let mut serves = None;
    for round in 0..1_000 {
        let mut invalidation = Box::pin(space.invalidate(pages(8 + round % 2, 1), Event::Unmap));
        assert!(invalidation.as_mut().now_or_never().is_none());
        if round == 1 {
            assert!(fetch.as_mut().now_or_never().is_none());
        }
        while let Some(Some(outgoing)) = link.next().now_or_never() {
            match outgoing {
                Outgoing::Message(message) => leased.handle(message, None),
                Outgoing::Serve(serve) => {
                    let space = space.clone();
                    serves = Some(async move { serve.ready(&space).await }.boxed());
                }
            }
        }
        pool.run_until_stalled();
        while let Some(Some(message)) = leased.next_message().now_or_never() {
            hub.handle(Host(1), message);
        }
        guards.push(invalidation.now_or_never().expect("acknowledged"));
        if guards.len() == 2 {
            drop(guards.remove(0));
        }
        if serves.as_mut().is_some_and(|ready| ready.now_or_never().is_some()) {
            return;
        }
    }
    panic!("1,000 invalidations of other pages later");
}

/// What is served waits for the invalidation, whose `Inv` must not wait behind what is served.
#[test]
fn d7_a_fetch_that_meets_an_invalidation_costs_nobody_a_lease() {
    let (timer, mut pool) = (Timer::default(), LocalPool::new());
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let space = AddressSpace::new();
    let _mirrors = space.insert(pages(0, 16), hub.mirrors()).unwrap();
    let leased = leased(&timer, 1, MirrorSettings::default());
    let spawner = pool.spawner();
    let (runs, sleep) = (leased.clone(), timer.sleep());
    spawner.spawn_local(async move { runs.run(sleep).await }).unwrap();
    let (runs, sleep) = (hub.clone(), timer.sleep());
    spawner.spawn_local(async move { runs.run(sleep).await }).unwrap();
    let (up, owner) = (leased.clone(), hub.clone());
    let up = async move {
        while let Some(message) = up.next_message().await {
            owner.handle(Host(1), message);
        }
    };
    spawner.spawn_local(up).unwrap();
    let (mut link, below, owned, spawns) =
        (hub.link(Host(1)), leased.clone(), space.clone(), spawner.clone());
    let down = async move {
        while let Some(outgoing) = link.next().await {
            match outgoing {
                Outgoing::Message(message) => below.handle(message, None),
                Outgoing::Serve(serve) => {
                    let (below, owned) = (below.clone(), owned.clone());
                    let answer = async move {
                        serve.ready(&owned).await.unwrap();
                        below.handle(
                            serve.message(),
                            Some(vec![7; serve.range().len().unwrap() as usize]),
                        );
                    };
                    spawns.spawn_local(answer).unwrap();
                }
            }
        }
    };
    spawner.spawn_local(down).unwrap();
    timer.pass(&mut pool, 30);
    let epoch = leased.standing();
    // A fetch has arrived; before the link's task has its turn, an invalidation of another page
    // begins.
    let fetches = leased.clone();
    let mut fetch = Box::pin(async move { fetches.fetch(pages(0, 1)).await });
    assert!(fetch.as_mut().now_or_never().is_none());
    let asked = leased.next_message().now_or_never().flatten().unwrap();
    assert!(matches!(asked, ToOwner::Fetch { .. }));
    hub.handle(Host(1), asked);
    let mut invalidation = Box::pin(space.invalidate(pages(8, 1), Event::Unmap));
    let mut waited = 0;
    while invalidation.as_mut().now_or_never().is_none() {
        timer.pass(&mut pool, 1);
        waited += 1;
        assert!(waited < 1_000);
    }
    assert!(
        waited < 10,
        "{waited} ms on a network without delay; {epoch:?}, then {:?}",
        leased.standing()
    );
}

#[test]
fn f1_a_transport_whose_waker_panics_costs_no_other_host_its_wake_up_and_no_mirror_its_pass() {
    struct Panics(AtomicBool);
    impl ArcWake for Panics {
        fn wake_by_ref(waker: &Arc<Self>) {
            assert!(!waker.0.load(SeqCst), "the runtime has gone");
        }
    }
    struct Count(AtomicUsize);
    impl ArcWake for Count {
        fn wake_by_ref(count: &Arc<Self>) {
            count.0.fetch_add(1, SeqCst);
        }
    }
    let timer = Timer::default();
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let space = AddressSpace::new();
    let _mirrors = space.insert(pages(0, 16), hub.mirrors()).unwrap();
    let mut links = [hub.link(Host(1)), hub.link(Host(2))];
    for host in 1..=2 {
        hub.handle(Host(host), ToOwner::Join { incarnation: Incarnation(1), nonce: Nonce(1) });
    }
    for link in &mut links {
        while link.next().now_or_never().is_some() {}
    }
    let (panics, count) =
        (Arc::new(Panics(AtomicBool::new(false))), Arc::new(Count(AtomicUsize::new(0))));
    let [first, second] = &mut links;
    let (mut first, mut second) = (Box::pin(first.next()), Box::pin(second.next()));
    assert!(first.as_mut().poll(&mut Context::from_waker(&waker(panics.clone()))).is_pending());
    assert!(second.as_mut().poll(&mut Context::from_waker(&waker(count.clone()))).is_pending());
    panics.0.store(true, SeqCst);
    let mut invalidation = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    let begun = catch_unwind(AssertUnwindSafe(|| invalidation.as_mut().now_or_never().is_none()));
    assert_eq!(count.0.load(SeqCst), 1, "the other host is not told of the invalidation");
    assert!(
        begun.is_ok(),
        "the pass is lost: where nobody calls (a memory source), the change goes on"
    );
}

#[test]
fn f1_a_clock_that_panics_for_a_while_does_not_end_the_owners_run() {
    let (timer, mut pool) = (Timer::default(), LocalPool::new());
    let panics = Arc::new(AtomicBool::new(false));
    let (reads, fails) = (timer.clock(), panics.clone());
    let clock = move || {
        assert!(!fails.load(SeqCst), "the clock has gone");
        reads()
    };
    let hub =
        Hub::new(Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(), clock);
    let space = AddressSpace::new();
    let _mirrors = hub.insert(&space).unwrap();
    let (runs, sleep) = (hub.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    hub.handle(Host(1), ToOwner::Join { incarnation: Incarnation(1), nonce: Nonce(1) });
    let mut invalidation = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(invalidation.as_mut().now_or_never().is_none());
    panics.store(true, SeqCst);
    timer.pass(&mut pool, 200);
    panics.store(false, SeqCst);
    assert!(hub.lost_panics() > 0);
    timer.pass(&mut pool, 30);
    assert!(
        invalidation.now_or_never().is_some(),
        "the lease of the mirror that is gone has ended"
    );
}
