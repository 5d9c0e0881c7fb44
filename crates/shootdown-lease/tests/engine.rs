//! The two ends in the engine, on one thread and in virtual time.
#![allow(missing_docs)]

use futures::FutureExt;
use futures::channel::oneshot;
use futures::executor::{LocalPool, LocalSpawner, block_on};
use futures::future::BoxFuture;
use futures::task::LocalSpawnExt;
use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, Subscription,
    WouldBlock,
};
use shootdown_lease::engine::{Hub, Leased, Lost, Mirrors, Outgoing};
use shootdown_lease::{
    Asker, Boot, Ending, Fenced, Host, Incarnation, Memory, Mirror, MirrorSettings, Nonce, Owner,
    Refusal, Standing, Terms, Time, ToMirror, ToOwner,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const TERM: Duration = Duration::from_millis(100);

fn pages(first: u64, count: u64) -> AddressRange {
    AddressRange::new(first * 4096, count * 4096).unwrap()
}

type Sleeper = (u64, oneshot::Sender<()>);

/// Time that passes when the test says so.
#[derive(Clone, Default)]
struct Timer {
    now: Arc<AtomicU64>,
    sleepers: Rc<RefCell<Vec<Sleeper>>>,
}

impl Timer {
    fn now(&self) -> Time {
        Time::from_nanos(self.now.load(Ordering::SeqCst))
    }

    fn clock(&self) -> impl Fn() -> Time + Send + Sync + 'static + use<> {
        let now = self.now.clone();
        move || Time::from_nanos(now.load(Ordering::SeqCst))
    }

    fn sleep(&self) -> impl Fn(Duration) -> BoxFuture<'static, ()> + use<> {
        let timer = self.clone();
        move |time| {
            let (sender, woken) = oneshot::channel();
            let at = timer.now.load(Ordering::SeqCst) + time.as_nanos() as u64;
            timer.sleepers.borrow_mut().push((at, sender));
            woken.map(drop).boxed()
        }
    }
}

/// An owner and its mirrors, with a network that can be cut.
struct World {
    pool: LocalPool,
    spawner: LocalSpawner,
    timer: Timer,
    hub: Hub,
    space: AddressSpace,
    mirrors: Rc<Subscription<Mirrors>>,
    /// What the memory holds.
    contents: Rc<Cell<u8>>,
}

#[derive(Clone)]
struct Node {
    leased: Leased,
    cut: Rc<Cell<bool>>,
    /// The process stands still.
    stopped: Rc<Cell<bool>>,
    /// Its way to the owner.
    up: Rc<Cell<bool>>,
}

impl World {
    fn new(terms: Terms, memory: Memory) -> Self {
        let (pool, timer) = (LocalPool::new(), Timer::default());
        let hub = Hub::new(Owner::new(Boot(1), terms, memory, timer.now()).unwrap(), timer.clock());
        let space = AddressSpace::new();
        let mirrors = Rc::new(space.insert(pages(0, 16), hub.mirrors()).unwrap());
        let spawner = pool.spawner();
        let (run, sleep) = (hub.clone(), timer.sleep());
        spawner.spawn_local(async move { run.run(sleep).await }).unwrap();
        Self { pool, spawner, timer, hub, space, mirrors, contents: Rc::default() }
    }

    fn mirror(&mut self, host: u64) -> Node {
        let mirror = Mirror::new(Incarnation(host), MirrorSettings::default(), self.timer.now());
        let leased = Leased::new(mirror, self.timer.clock());
        let node = Node {
            leased: leased.clone(),
            cut: Rc::default(),
            stopped: Rc::default(),
            up: Rc::default(),
        };
        let (sleep, runs) = (self.timer.sleep(), leased.clone());
        let stopped = node.stopped.clone();
        let run = async move { runs.run(sleep).await };
        self.spawner.spawn_local(unless(stopped.clone(), run)).unwrap();
        self.link(host, &node);
        let (up, hub, cut) = (leased, self.hub.clone(), node.cut.clone());
        let up = async move {
            while let Some(message) = up.next_message().await {
                if !cut.get() {
                    hub.handle(Host(host), message);
                }
            }
        };
        self.spawner.spawn_local(unless(node.up.clone(), unless(stopped, up))).unwrap();
        self.pool.run_until_stalled();
        node
    }

    fn link(&self, host: u64, node: &Node) {
        let (mut link, leased, cut) =
            (self.hub.link(Host(host)), node.leased.clone(), node.cut.clone());
        let (space, contents, spawner) =
            (self.space.clone(), self.contents.clone(), self.spawner.clone());
        let down = async move {
            while let Some(outgoing) = link.next().await {
                match outgoing {
                    Outgoing::Message(message) if !cut.get() => leased.handle(message, None),
                    Outgoing::Message(_) => {}
                    Outgoing::Serve(serve) => {
                        let (leased, cut, space, contents) =
                            (leased.clone(), cut.clone(), space.clone(), contents.clone());
                        let answer = async move {
                            serve.ready(&space).await.unwrap();
                            let length = serve.range().len().unwrap() as usize;
                            if !cut.get() {
                                leased.handle(serve.message(), Some(vec![contents.get(); length]));
                            }
                        };
                        spawner.spawn_local(answer).unwrap();
                    }
                }
            }
        };
        self.spawner.spawn_local(unless(node.stopped.clone(), down)).unwrap();
    }

    /// Lets time pass, in steps of a millisecond.
    fn pass(&mut self, time: Duration) {
        for _ in 0..time.as_millis() {
            let now = self.timer.now.fetch_add(1_000_000, Ordering::SeqCst) + 1_000_000;
            let due: Vec<_> = {
                let mut sleepers = self.timer.sleepers.borrow_mut();
                let (due, later) = sleepers.drain(..).partition(|(at, _)| *at <= now);
                *sleepers = later;
                due
            };
            for (_, sleeper) in due {
                let _ = sleeper.send(());
            }
            self.pool.run_until_stalled();
        }
    }

    /// Starts an invalidation; the cell is true while its guard is held, and for ever after.
    fn invalidate(&mut self, range: AddressRange) -> Rc<Cell<bool>> {
        let (space, done) = (self.space.clone(), Rc::<Cell<bool>>::default());
        let told = done.clone();
        let changes = self.contents.clone();
        let invalidation = async move {
            let guard = space.invalidate(range, Event::Unmap).await;
            changes.set(changes.get() + 1);
            told.set(true);
            drop(guard);
        };
        self.spawner.spawn_local(invalidation).unwrap();
        self.pool.run_until_stalled();
        done
    }
}

/// A future of a process that can be stopped.
async fn unless(stopped: Rc<Cell<bool>>, work: impl Future<Output = ()>) {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|cx| {
        if stopped.get() { std::task::Poll::Pending } else { work.as_mut().poll(cx) }
    })
    .await;
}

/// A device of a mirror whose flushes end when the test says so.
#[derive(Clone, Default)]
struct Gpu(Arc<Mutex<Vec<oneshot::Sender<()>>>>);

impl IntervalNotifier for Gpu {
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

impl Gpu {
    fn flush(&self) -> usize {
        let pending = std::mem::take(&mut *self.0.lock().unwrap());
        pending.into_iter().map(|flush| flush.send(())).filter(Result::is_ok).count()
    }
}

#[test]
fn an_invalidation_waits_for_the_devices_of_all_mirrors_and_for_nothing_else() {
    let mut world = World::new(Terms::new(TERM), Memory::New);
    let nodes = [world.mirror(1), world.mirror(2)];
    let gpus = [Gpu::default(), Gpu::default()];
    let subscriptions: Vec<_> = nodes
        .iter()
        .zip(&gpus)
        .map(|(node, gpu)| node.leased.space().insert(pages(0, 4), gpu.clone()).unwrap())
        .collect();
    let done = world.invalidate(pages(1, 1));
    assert!(!done.get());
    assert!(
        subscriptions[0].read_begin().now_or_never().is_none(),
        "the range is under invalidation there, too"
    );
    assert_eq!(gpus[0].flush(), 1);
    world.pass(Duration::from_millis(5));
    assert!(!done.get(), "the other one has not flushed");
    assert_eq!(gpus[1].flush(), 1);
    world.pool.run_until_stalled();
    assert!(done.get());
    assert_eq!(world.hub.endings(Ending::Acknowledged), 2);
    let elsewhere = world.invalidate(pages(8, 1));
    assert!(elsewhere.get(), "where no device is, an acknowledgement comes at once");
}

#[test]
fn a_stopped_mirror_is_waited_for_exactly_until_it_holds_nothing_any_more() {
    let mut world = World::new(Terms::new(TERM), Memory::New);
    let node = world.mirror(1);
    let driver = node.leased.space().insert(pages(0, 4), Gpu::default()).unwrap();
    world.pass(Duration::from_millis(250));
    let Standing::Live(_, end) = node.leased.standing() else {
        panic!("{:?}", node.leased.standing())
    };
    assert!(end > world.timer.now());
    let seen = block_on(driver.read_begin());
    node.stopped.set(true);
    let done = world.invalidate(pages(1, 1));
    let mut waited = 0;
    while !done.get() {
        // Whoever goes on after a stop finds the sequence unchanged.
        assert_eq!(driver.sequence(), seen);
        assert_eq!(driver.read_retry(seen), world.timer.now() >= end, "at {}", world.timer.now());
        world.pass(Duration::from_millis(1));
        waited += 1;
        assert!(waited < 200);
    }
    assert!(driver.read_retry(seen), "it ended while the mirror could hold on");
    assert!((50..=152).contains(&waited), "patience and the owner's term, no longer: {waited} ms");
    assert_eq!(world.hub.endings(Ending::Expired), 1);
    node.stopped.set(false);
}

#[test]
fn a_link_that_is_down_ends_nothing_and_one_that_comes_back_in_time_has_cost_no_epoch() {
    let mut world = World::new(Terms::new(TERM), Memory::New);
    let node = world.mirror(1);
    world.pass(Duration::from_millis(30));
    let epoch = world.hub.members()[0].1;
    node.cut.set(true);
    let done = world.invalidate(pages(1, 1));
    world.pass(Duration::from_millis(30));
    assert!(!done.get());
    node.cut.set(false);
    world.link(1, &node);
    node.leased.connected();
    world.pool.run_until_stalled();
    assert!(done.get(), "sent again at once");
    world.pass(Duration::from_millis(300));
    assert_eq!((world.hub.members()[0].1, world.hub.endings(Ending::Acknowledged)), (epoch, 1));
    assert_eq!(node.leased.counts().lost, 0);
}

#[test]
fn a_mirror_that_is_cut_off_lets_go_before_its_lease_ends_and_joins_anew() {
    let mut world = World::new(Terms::new(TERM), Memory::New);
    let node = world.mirror(1);
    let gpu = Gpu::default();
    let driver = node.leased.space().insert(pages(0, 4), gpu.clone()).unwrap();
    let seen = block_on(driver.read_begin());
    node.cut.set(true);
    world.pass(Duration::from_millis(101));
    assert!(matches!(node.leased.standing(), Standing::Stopping(_)));
    assert!(driver.read_retry(seen) && driver.read_begin().now_or_never().is_none());
    assert_eq!(gpu.flush(), 1, "everything is invalidated");
    node.cut.set(false);
    let mut reader = Box::pin(driver.read_begin());
    assert!(reader.as_mut().now_or_never().is_none());
    world.pass(Duration::from_millis(50));
    assert!(matches!(node.leased.standing(), Standing::Live(..)));
    assert_eq!(node.leased.counts().joined, 2);
    assert!(reader.now_or_never().is_some(), "readers go on");
    assert!(world.invalidate(pages(9, 1)).get());
}

#[test]
fn what_is_fetched_across_a_change_is_fetched_again() {
    let mut world = World::new(Terms::new(TERM), Memory::New);
    let node = world.mirror(1);
    let gpu = Gpu::default();
    let driver = node.leased.space().insert(pages(0, 4), gpu.clone()).unwrap();
    // Asked while the change is under way: answered after it.
    let done = world.invalidate(pages(1, 1));
    let (leased, got) =
        (node.leased.clone(), Rc::<RefCell<Option<Result<Vec<u8>, Lost>>>>::default());
    let told = got.clone();
    let fetch = async move { *told.borrow_mut() = Some(leased.fetch(pages(1, 1)).await) };
    world.spawner.spawn_local(fetch).unwrap();
    world.pass(Duration::from_millis(20));
    assert!(got.borrow().is_none() && !done.get());
    gpu.flush();
    world.pass(Duration::from_millis(20));
    assert!(done.get());
    assert_eq!(got.borrow_mut().take(), Some(Ok(vec![1; 4096])));
    assert!(driver.read_begin().now_or_never().is_some());
}

#[test]
fn an_answer_without_contents_is_asked_again_and_one_of_a_wrong_length_is_an_error() {
    let timer = Timer::default();
    let leased = Leased::new(
        Mirror::new(Incarnation(1), MirrorSettings::default(), timer.now()),
        timer.clock(),
    );
    let mut owner = Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap();
    let mut pool = LocalPool::new();
    let (run, sleep) = (leased.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { run.run(sleep).await }).unwrap();
    let fetches = leased.clone();
    let mut fetch = Box::pin(async move { fetches.fetch(pages(0, 1)).await });
    let mut answers = [None, Some(vec![7; 4095])].into_iter();
    let mut ended = None;
    for _ in 0..20 {
        pool.run_until_stalled();
        ended = ended.or_else(|| fetch.as_mut().now_or_never());
        if ended.is_some() {
            break;
        }
        while let Some(Some(message)) = leased.next_message().now_or_never() {
            owner.handle(Host(1), message, timer.now());
        }
        while let Some((_, message)) = owner.next_message() {
            leased.handle(message, None);
        }
        while let Some(shootdown_lease::Decision::Serve { epoch, nonce, version, .. }) =
            owner.next_decision()
        {
            leased.handle(ToMirror::Fetched { epoch, nonce, version }, answers.next().flatten());
        }
    }
    assert_eq!(ended, Some(Err(Lost::WrongLength { asked: pages(0, 1), got: 4095 })));
    assert!(answers.next().is_none(), "asked twice");
}

#[test]
fn what_may_not_block_is_refused_as_long_as_anybody_is_in_the_books() {
    let mut world = World::new(Terms::new(TERM), Memory::New);
    assert!(world.space.try_invalidate(pages(0, 1), Event::Unmap).is_ok());
    let node = world.mirror(1);
    assert!(world.space.try_invalidate(pages(0, 1), Event::Unmap).is_err());
    let leaves = node.leased.clone();
    world.pool.run_until(async move { leaves.leave().await });
    world.pool.run_until_stalled();
    assert!(world.hub.members().is_empty());
    assert!(world.space.try_invalidate(pages(0, 1), Event::Unmap).is_ok());
    assert_eq!(block_on(node.leased.fetch(pages(0, 1))), Err(Lost::Left));
    assert_eq!(block_on(node.leased.joined()), None);
}

#[test]
fn a_restart_over_memory_that_survived_waits_for_the_leases_of_before_and_fences_them() {
    let terms = {
        let mut terms = Terms::new(TERM);
        terms.fences = true;
        terms
    };
    let mut world = World::new(terms, Memory::Survived);
    let done = world.invalidate(pages(0, 1));
    world.pass(Duration::from_millis(100));
    assert!(world.hub.next_fence().now_or_never().is_none());
    world.pass(Duration::from_millis(1));
    assert!(!done.get());
    let what = world.hub.next_fence().now_or_never().unwrap();
    assert_eq!(what, Fenced::Before(Boot(1)));
    assert!(world.hub.fenced(what) && !world.hub.fenced(what));
    world.pool.run_until_stalled();
    assert!(done.get());
}

#[test]
fn a_host_that_reads_nothing_costs_bounded_memory_and_holds_up_nobody() {
    let mut terms = Terms::new(TERM);
    (terms.window, terms.fetches) = (4, 4);
    let mut world = World::new(terms, Memory::New);
    let well = world.mirror(1);
    // One that floods the owner with questions and never reads.
    let mut deaf = world.hub.link(Host(2));
    world.hub.handle(Host(2), ToOwner::Join { incarnation: Incarnation(1), nonce: Nonce(1) });
    let Some(Some(Outgoing::Message(ToMirror::Welcome { epoch, .. }))) = deaf.next().now_or_never()
    else {
        panic!()
    };
    for nonce in 2..10_000 {
        world
            .hub
            .handle(Host(2), ToOwner::Fetch { epoch, nonce: Nonce(nonce), range: pages(0, 1) });
    }
    let kept = std::iter::from_fn(|| deaf.next().now_or_never().flatten()).count();
    assert!(kept < 50 && world.hub.dropped() as usize + kept == 9_998, "{kept}");
    let done = world.invalidate(pages(3, 1));
    world.pass(Duration::from_millis(1));
    assert_eq!(world.hub.counts().acknowledged, 1, "the one that is well has let go");
    world.pass(Duration::from_millis(160));
    assert!(done.get());
    assert_eq!(well.leased.counts().lost, 0);
}

#[test]
fn mirrors_that_are_fenced_from_outside_end_their_passes() {
    let mut world = World::new(Terms::new(TERM), Memory::New);
    let node = world.mirror(1);
    node.cut.set(true);
    let done = world.invalidate(pages(0, 1));
    assert_eq!((done.get(), world.hub.waiting()), (false, 1));
    world.mirrors.fence();
    world.pool.run_until_stalled();
    assert_eq!((done.get(), world.hub.waiting()), (true, 0));
}

#[test]
fn a_flush_that_ends_after_the_mirror_has_joined_another_owner_acknowledges_nothing_there() {
    let mut world = World::new(Terms::new(TERM), Memory::New);
    let node = world.mirror(1);
    let gpu = Gpu::default();
    let _driver = node.leased.space().insert(pages(0, 4), gpu.clone()).unwrap();
    let first = world.invalidate(pages(1, 1));
    let old: Vec<_> = std::mem::take(&mut *gpu.0.lock().unwrap());
    assert_eq!(old.len(), 1);
    // The lease ends; all that is mapped is let go of, and the mirror joins a new owner with
    // numbers of its own.
    node.cut.set(true);
    world.pass(Duration::from_millis(160));
    assert!(first.get() && gpu.flush() == 1);
    node.up.set(true);
    world.hub = Hub::new(
        Owner::new(Boot(2), Terms::new(TERM), Memory::New, world.timer.now()).unwrap(),
        world.timer.clock(),
    );
    let (run, sleep) = (world.hub.clone(), world.timer.sleep());
    world.spawner.spawn_local(async move { run.run(sleep).await }).unwrap();
    world.space = AddressSpace::new();
    world.mirrors = Rc::new(world.space.insert(pages(0, 16), world.hub.mirrors()).unwrap());
    let (up, hub, leased) = (node.leased.clone(), world.hub.clone(), node.leased.clone());
    world
        .spawner
        .spawn_local(async move {
            while let Some(message) = up.next_message().await {
                hub.handle(Host(1), message)
            }
        })
        .unwrap();
    node.cut.set(false);
    world.link(1, &node);
    leased.connected();
    world.pass(Duration::from_millis(60));
    assert!(
        matches!(leased.standing(), Standing::Live(epoch, _) if epoch.boot == Boot(2)),
        "{:?}",
        leased.standing()
    );
    let second = world.invalidate(pages(1, 1));
    assert!(!second.get());
    for flush in old {
        let _ = flush.send(());
    }
    world.pass(Duration::from_millis(2));
    assert!(!second.get(), "the first invalidation of both has the same number");
    assert_eq!(gpu.flush(), 1);
    world.pool.run_until_stalled();
    assert!(second.get());
}

#[test]
fn where_nothing_would_tell_of_changes_nobody_joins_and_who_has_joined_is_told_to_let_go() {
    let timer = Timer::default();
    let hub = Hub::new(
        Owner::new(Boot(1), Terms::new(TERM), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let mut link = hub.link(Host(1));
    let join = |nonce| ToOwner::Join { incarnation: Incarnation(1), nonce: Nonce(nonce) };
    let mut said = || link.next().now_or_never().flatten();
    hub.handle(Host(1), join(1));
    let refused = ToMirror::Refused {
        nonce: Nonce(1),
        asker: Asker::Join(Incarnation(1)),
        why: Refusal::NotWatched,
    };
    assert_eq!(said(), Some(Outgoing::Message(refused)));
    let space = AddressSpace::new();
    let mirrors = hub.insert(&space).unwrap();
    hub.handle(Host(1), join(2));
    let Some(Outgoing::Message(ToMirror::Welcome { epoch, .. })) = said() else { panic!() };
    drop(mirrors);
    assert_eq!(said(), Some(Outgoing::Message(ToMirror::Gone { epoch })));
    assert!(matches!(said(), Some(Outgoing::Message(ToMirror::Inv { .. }))));
    hub.handle(Host(1), ToOwner::Renew { epoch, nonce: Nonce(3) });
    assert_eq!(said(), None, "and is renewed no more");
}
