//! Hard cases: many of something, clocks that misbehave, executors of odd order, everything at
//! once. Each has once been a defect.
//!
//! `SHOOTDOWN_SECONDS` is how long the random ones take, `SHOOTDOWN_SEED` runs one case again,
//! `SHOOTDOWN_COUNT` is the size of the burst whose memory is given back.
#![cfg(not(any(loom, shuttle)))]
#![allow(missing_docs, clippy::print_stdout)]

#[path = "support/mod.rs"]
mod support;

use futures::StreamExt;
use futures::executor::LocalPool;
use futures::task::{LocalSpawnExt, noop_waker};
use shootdown::{AddressSpace, Event, Subscription};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Wake, Waker};
use std::time::Duration;
use support::*;

/// Runs `code` on a thread and says whether it has returned within `time`; the thread is left alone
/// otherwise.
fn within(time: Duration, code: impl FnOnce() + Send + 'static) -> Result<(), &'static str> {
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || {
        let fine = catch_unwind(AssertUnwindSafe(code)).is_ok();
        let _ = done.send(fine);
    });
    match is_done.recv_timeout(time) {
        Ok(true) => Ok(()),
        Ok(false) => Err("panicked"),
        Err(_) => Err("hangs"),
    }
}

/// An invalidation whose passes are done and that nobody polls.
fn unclaimed<'a>(space: &'a AddressSpace, device: &Subscription<Device>) -> Task<impl Future + 'a> {
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    invalidate
}

// ---- lost wake-ups ----

fn many_that_yield_once(count: usize) -> bool {
    let (space, log) = (AddressSpace::new(), Log::default());
    let _devices: Vec<_> = (0..count)
        .map(|_| {
            space
                .insert(pages(0, 1), Device::new("device", &log).then(Act::pass(Yields(1))))
                .unwrap()
        })
        .collect();
    Task::new(space.invalidate(pages(0, 1), Event::Unmap)).run().is_ready()
}

#[test]
fn an_invalidation_with_more_than_256_passes_that_yield_once_is_woken() {
    assert!(many_that_yield_once(200), "200 are fine");
    assert!(many_that_yield_once(300), "it sleeps, although passes are ready to go on");
}

#[test]
fn a_drain_that_was_rung_more_often_than_its_bell_counts_returns() {
    const COUNT: u64 = 5000;
    let (space, log) = (AddressSpace::new(), Log::default());
    let gate = Gate::default();
    let gates: Vec<Gate> = (0..COUNT).map(|_| Gate::default()).collect();
    let device = space.insert(pages(0, 1), Device::new("device", &log)).unwrap();
    for gate in &gates {
        device.next(Act::pass(gate.clone()));
        Task::new(space.invalidate(pages(0, 1), Event::Unmap)).expect_pending();
    }
    drop(gate);
    let (mut first, mut second) = (Task::new(space.drain()), Task::new(space.drain()));
    first.expect_pending();
    second.expect_pending();
    gates.iter().for_each(Gate::open);
    first.finish();
    assert_eq!(space.active().len(), 0, "all is over");
    assert!(second.run().is_ready(), "the second drain sleeps for ever");
}

#[test]
fn a_drain_hears_of_passes_that_become_the_spaces_while_it_waits() {
    // Two devices and no budget: the pass of the first is awaited alone, that of the second is not
    // called.
    let (space, log) = (AddressSpace::builder().pass_budget(1).build(), Log::default());
    let (one, other, late) = (Gate::default(), Gate::default(), Gate::default());
    let a = space.insert(pages(0, 1), Device::new("a", &log).then(Act::pass(one.clone()))).unwrap();
    let b =
        space.insert(pages(0, 1), Device::new("b", &log).then(Act::pass(other.clone()))).unwrap();
    let c =
        space.insert(pages(5, 1), Device::new("c", &log).then(Act::pass(late.clone()))).unwrap();
    let mut first = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    first.expect_pending();
    let mut second = Task::new(space.invalidate(pages(5, 1), Event::Unmap));
    second.expect_pending();
    let mut drain = Task::new(space.drain());
    drain.expect_pending();
    // The pass of `b`, which was over the budget, is done: the invalidation is unclaimed, with that
    // of `a` never polled.
    other.open();
    drain.expect_pending();
    assert!(!one.is_waited_for());
    drop(first);
    let woken = drain.is_woken();
    let _ = drain.run();
    println!("woken {woken}, waited for {}", one.is_waited_for());
    assert!(
        one.is_waited_for(),
        "nobody drives the pass of an abandoned invalidation, although `drain` waits for it (C3)"
    );
    drop((a, b, c, second));
}

// ---- consumers ----

fn consumers(count: usize) -> Result<(), &'static str> {
    within(Duration::from_secs(10), move || {
        let space = AddressSpace::new();
        let inbox = space.inbox(pages(0, 1), ()).unwrap();
        let inbox: &'static _ = Box::leak(Box::new(inbox));
        let mut pool = LocalPool::new();
        for _ in 0..count {
            pool.spawner()
                .spawn_local(async move {
                    let mut stream: &shootdown::Inbox<()> = inbox;
                    while let Some(delivery) = stream.next().await {
                        delivery.done();
                    }
                })
                .unwrap();
        }
        pool.run_until_stalled();
    })
}

#[test]
fn many_tasks_that_wait_for_a_stream_come_to_rest() {
    assert_eq!(consumers(9), Ok(()));
    assert_eq!(consumers(64), Ok(()), "64 tasks that have nothing to do wake each other for ever");
}

// ---- patience ----

/// How long a reader that is polled every `step` waits for an abandoned future, up to a minute.
fn waits(step: u64, resolution: u64, patience: Option<Duration>) -> Option<Duration> {
    let micros = Arc::new(AtomicU64::new(0));
    let clock = micros.clone();
    let mut builder = AddressSpace::builder().clock(move || {
        Duration::from_micros(clock.load(Ordering::SeqCst) / resolution * resolution)
    });
    if let Some(patience) = patience {
        builder = builder.patience(patience);
    }
    let space = builder.build();
    let device = space.insert(pages(0, 1), Device::new("device", &Log::default())).unwrap();
    let invalidate = unclaimed(&space, &device);
    let mut reader = Task::new(device.read_begin());
    while micros.load(Ordering::SeqCst) < 60_000_000 {
        if reader.poll().is_ready() {
            drop(invalidate);
            return Some(Duration::from_micros(micros.load(Ordering::SeqCst)));
        }
        micros.fetch_add(step, Ordering::SeqCst);
    }
    None
}

#[test]
fn c4_a_reader_on_a_busy_executor_goes_on() {
    assert!(waits(50, 1, None).is_some());
    let waited = waits(6_000, 1, None);
    assert!(
        waited.is_some(),
        "polled every 6 ms, a reader waits more than a minute for a future that nobody polls"
    );
}

#[test]
fn c4_a_reader_with_a_coarse_clock_goes_on() {
    let waited = waits(1_000, 10_000, None);
    assert!(
        waited.is_some(),
        "with a clock that ticks every 10 ms, a reader waits more than a minute"
    );
}

#[test]
fn c4_no_patience_at_all_is_no_patience() {
    assert_eq!(
        within(Duration::from_secs(5), || {
            let space = AddressSpace::builder().patience(Duration::ZERO).build();
            let device = space.insert(pages(0, 1), Device::new("device", &Log::default())).unwrap();
            let invalidate = unclaimed(&space, &device);
            futures::executor::block_on(device.read_begin());
            drop(invalidate);
        }),
        Ok(()),
        "with a patience of 0 a reader"
    );
}

#[test]
fn c4_a_short_patience_is_short() {
    let waited = waits(300, 1, Some(Duration::from_millis(1)));
    assert!(waited.is_some_and(|waited| waited < Duration::from_secs(1)), "{waited:?}");
}

#[test]
fn c4_the_longest_patience_does_not_panic() {
    let space =
        AddressSpace::builder().patience(Duration::MAX).clock(|| Duration::from_secs(1)).build();
    let device = space.insert(pages(0, 1), Device::new("device", &Log::default())).unwrap();
    for _ in 0..2 {
        let invalidate = unclaimed(&space, &device);
        let mut reader = Task::new(device.read_begin());
        for _ in 0..2000 {
            if reader.poll().is_ready() {
                println!("lapsed");
                break;
            }
        }
        drop((reader, invalidate));
    }
}

#[test]
fn f1_a_clock_at_its_end_does_not_panic() {
    let space = AddressSpace::builder().clock(|| Duration::MAX).build();
    let device = space.insert(pages(0, 1), Device::new("device", &Log::default())).unwrap();
    for _ in 0..2 {
        let invalidate = unclaimed(&space, &device);
        let mut reader = Task::new(device.read_begin());
        for _ in 0..2000 {
            if reader.poll().is_ready() {
                break;
            }
        }
        drop((reader, invalidate));
    }
}

#[test]
fn c4_after_a_clock_has_jumped_once_nobody_healthy_lapses() {
    let (space, device, micros) = with_clock(None);
    {
        // Somebody looks at the clock while it shows an hour too much.
        let _invalidate = unclaimed(&space, &device);
        let mut reader = Task::new(device.read_begin());
        assert!(reader.poll().is_pending() && reader.poll().is_pending());
        micros.store(3_600_000_000, Ordering::SeqCst);
        assert!(reader.poll().is_pending());
        micros.store(1_000, Ordering::SeqCst);
    }
    let before = space.stats().lapses;
    let mut invalidate = unclaimed(&space, &device);
    let mut reader = Task::new(device.read_begin());
    for _ in 0..40 {
        let _ = reader.poll();
        micros.fetch_add(10, Ordering::SeqCst);
        if reader.is_woken() && space.stats().lapses > before {
            break;
        }
    }
    assert_eq!(space.stats().lapses, before, "a future lapses 0.4 ms after its passes were done");
    drop(invalidate.run());
}

#[test]
fn c4_a_waker_that_wakes_nobody_says_nothing_about_tasks() {
    let (space, device, micros) = with_clock(None);
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let waker = noop_waker();
    let mut cx = Context::from_waker(&waker);
    let mut invalidate = pin!(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(invalidate.as_mut().poll(&mut cx).is_pending());
    gate.open();
    // Another loop polls a reader, ten times as often.
    let mut reader = pin!(device.read_begin());
    for _ in 0..10 {
        let _ = reader.as_mut().poll(&mut cx);
        micros.fetch_add(10, Ordering::SeqCst);
    }
    assert_eq!(space.stats().lapses, 0, "a future lapses 0.1 ms after its passes were done");
    assert!(invalidate.as_mut().poll(&mut cx).is_ready());
}

// ---- C7, F3 ----

#[cfg(debug_assertions)]
fn blocks_in_a_first_pass(
    before: bool,
    block_on: impl Fn(Pin<Box<dyn Future<Output = ()> + Send>>) + Send + Sync + Clone + 'static,
) -> Result<(), &'static str> {
    within(Duration::from_secs(10), move || {
        let (space, device, _log) = one_device();
        let device = Arc::new(device);
        if before {
            // This thread has waited for a reader once.
            let guard = now(space.invalidate(pages(0, 1), Event::Unmap)).into_owned();
            let of_thread = space.clone();
            let ends = std::thread::spawn(move || {
                while of_thread.stats().waits == 0 {
                    std::thread::yield_now();
                }
                drop(guard);
            });
            let reader = device.clone();
            block_on(Box::pin(async move { _ = reader.read_begin().await }));
            ends.join().unwrap();
        }
        let (reader, block) = (device.clone(), block_on.clone());
        device.next(Act::Run(Box::new(move |_| {
            block(Box::pin(async move { _ = reader.read_begin().await }));
        })));
        let result = catch_unwind(AssertUnwindSafe(|| {
            drop(space.try_invalidate(pages(0, 1), Event::Unmap))
        }));
        assert!(result.is_err());
        device.next(Act::Finish);
    })
}

#[cfg(debug_assertions)]
#[test]
fn c7_a_first_pass_that_blocks_fails_loudly() {
    assert_eq!(blocks_in_a_first_pass(false, futures::executor::block_on), Ok(()));
    assert_eq!(blocks_in_a_first_pass(false, smol::block_on), Ok(()));
    assert_eq!(
        blocks_in_a_first_pass(false, |future| shootdown::PassFuture::new(future).wait()),
        Ok(())
    );
}

#[cfg(debug_assertions)]
#[test]
fn c7_a_first_pass_that_blocks_fails_loudly_on_a_thread_that_has_waited_before_wait() {
    assert_eq!(
        blocks_in_a_first_pass(true, |future| shootdown::PassFuture::new(future).wait()),
        Ok(())
    );
}

#[cfg(debug_assertions)]
#[test]
fn c7_a_first_pass_that_blocks_fails_loudly_on_a_thread_that_has_waited_before_futures() {
    assert_eq!(blocks_in_a_first_pass(true, futures::executor::block_on), Ok(()));
}

#[cfg(debug_assertions)]
#[test]
fn c7_a_first_pass_that_blocks_fails_loudly_on_a_thread_that_has_waited_before_smol() {
    assert_eq!(blocks_in_a_first_pass(true, smol::block_on), Ok(()));
}

#[cfg(debug_assertions)]
#[test]
fn c7_a_first_pass_that_blocks_fails_loudly_on_a_thread_that_has_waited_before_park() {
    struct Thread(std::thread::Thread);
    impl Wake for Thread {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    // A waker of its own for each call, as `pollster` has it.
    let block_on = |mut future: Pin<Box<dyn Future<Output = ()> + Send>>| {
        let waker = Waker::from(Arc::new(Thread(std::thread::current())));
        while future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            std::thread::park();
        }
    };
    assert_eq!(blocks_in_a_first_pass(false, block_on), Ok(()));
    assert_eq!(blocks_in_a_first_pass(true, block_on), Ok(()), "the address of an earlier waker");
}

// ---- everything at once, polled only when woken ----

mod shuffle {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    use shootdown::InvalidationGuard;

    type Sub = Arc<Subscription<Device>>;

    enum Done {
        Guard(InvalidationGuard<'static>),
        Other,
    }

    struct Running {
        what: &'static str,
        task: Task<Pin<Box<dyn Future<Output = Done>>>>,
        /// Never polled again.
        frozen: bool,
    }

    pub(super) fn run(seed: u64, steps: u32) {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let micros = Arc::new(AtomicU64::new(0));
        let clock = micros.clone();
        let mut builder = AddressSpace::builder().patience(Duration::from_millis(40));
        if rng.random_bool(0.95) {
            builder = builder.clock(move || Duration::from_micros(clock.load(Ordering::SeqCst)));
        }
        let budget = rng.random_range(0..6usize);
        if budget < 4 {
            builder = builder.pass_budget(budget);
        }
        let space = builder.build();
        let log = Log::default();
        let mut gates: Vec<Gate> = Vec::new();
        let mut subs: Vec<Sub> = Vec::new();
        let mut guards: Vec<InvalidationGuard<'static>> = Vec::new();
        let mut tasks: Vec<Running> = Vec::new();
        let range = |rng: &mut SmallRng| pages(rng.random_range(0..6), rng.random_range(1..4));
        let busy = rng.random_range(5..60usize);
        for _ in 0..steps {
            micros.fetch_add(50, Ordering::SeqCst);
            match rng.random_range(0..100) {
                0..8 if subs.len() < 6 => {
                    subs.push(Arc::new(space.insert(range(rng), Device::new("d", &log)).unwrap()))
                }
                8..22 if tasks.len() < busy && guards.len() < busy => {
                    for sub in &subs {
                        let act = match rng.random_range(0..5) {
                            0 => Act::Finish,
                            1 => Act::Ignore,
                            2 => Act::pass(Yields(rng.random_range(1..8))),
                            _ => {
                                gates.push(Gate::default());
                                Act::pass(gates.last().unwrap().clone())
                            }
                        };
                        sub.next(act);
                    }
                    let future = space.invalidate(range(rng), Event::Unmap).into_owned();
                    let mut task: Task<Pin<Box<dyn Future<Output = Done>>>> =
                        Task::new(Box::pin(async move { Done::Guard(future.await) }));
                    match task.poll() {
                        std::task::Poll::Ready(Done::Guard(guard)) => guards.push(guard),
                        std::task::Poll::Ready(Done::Other) => unreachable!(),
                        std::task::Poll::Pending => tasks.push(Running {
                            what: "invalidate",
                            task,
                            frozen: rng.random_bool(0.15),
                        }),
                    }
                }
                22..26 => {
                    if let Ok(guard) = space.try_invalidate(range(rng), Event::Unmap) {
                        guards.push(guard.into_owned());
                    }
                }
                26..40 if !gates.is_empty() => {
                    let at = rng.random_range(0..gates.len());
                    if rng.random_bool(0.3) {
                        gates[at].nudge();
                    } else {
                        gates.swap_remove(at).open();
                    }
                }
                40..48 if !subs.is_empty() && tasks.len() < busy => {
                    let sub = subs[rng.random_range(0..subs.len())].clone();
                    let task: Task<Pin<Box<dyn Future<Output = Done>>>> =
                        Task::new(Box::pin(async move {
                            sub.read_begin().await;
                            Done::Other
                        }));
                    tasks.push(Running { what: "read", task, frozen: false });
                }
                48..50 if tasks.len() < busy => {
                    let space = space.clone();
                    let task: Task<Pin<Box<dyn Future<Output = Done>>>> =
                        Task::new(Box::pin(async move {
                            space.drain().await;
                            Done::Other
                        }));
                    tasks.push(Running { what: "drain", task, frozen: false });
                }
                50..54 if !subs.is_empty() => {
                    let sub = subs.swap_remove(rng.random_range(0..subs.len()));
                    let task: Task<Pin<Box<dyn Future<Output = Done>>>> = match Arc::try_unwrap(sub)
                    {
                        Ok(sub) => {
                            let remove = sub.remove();
                            Task::new(Box::pin(async move {
                                drop(remove.await);
                                Done::Other
                            }))
                        }
                        Err(sub) => Task::new(Box::pin(async move {
                            sub.close().await;
                            Done::Other
                        })),
                    };
                    tasks.push(Running { what: "remove", task, frozen: false });
                }
                54..62 if !guards.is_empty() => {
                    drop(guards.swap_remove(rng.random_range(0..guards.len())))
                }
                62..64 if !tasks.is_empty() => {
                    let at = rng.random_range(0..tasks.len());
                    if !tasks[at].frozen && tasks[at].what != "remove" {
                        if rng.random_bool(0.5) {
                            drop(tasks.swap_remove(at));
                        } else if tasks[at].what != "drain" {
                            tasks[at].frozen = true;
                        }
                    }
                }
                64..66 => {
                    let _ = space.active();
                }
                _ if !tasks.is_empty() => {
                    let at = rng.random_range(0..tasks.len());
                    step(&mut tasks, at, &mut guards);
                }
                _ => {}
            }
        }
        gates.iter().for_each(Gate::open);
        guards.clear();
        // Whoever is frozen and can be woken stays frozen; all others go on when they are woken.
        for round in 0.. {
            micros.fetch_add(20, Ordering::SeqCst);
            let ready: Vec<usize> = (0..tasks.len())
                .filter(|at| !tasks[*at].frozen && tasks[*at].task.is_woken())
                .collect();
            if ready.is_empty() {
                break;
            }
            assert!(round < 100_000, "seed {seed}: livelock of {:?}", names(&tasks));
            let at = ready[rng.random_range(0..ready.len())];
            step(&mut tasks, at, &mut guards);
            guards.clear();
        }
        let stuck: Vec<_> =
            tasks.iter().filter(|task| !task.frozen).map(|task| task.what).collect();
        assert!(
            stuck.is_empty(),
            "seed {seed}: {stuck:?} sleep for ever: {:?}, all {:?}",
            space.active(),
            names(&tasks)
        );
        tasks.clear();
        let mut drain = Task::new(space.drain());
        assert!(drain.run().is_ready(), "seed {seed}: drain sleeps");
        drop(drain);
        assert_eq!((space.active().len(), space.sequence().get() % 2), (0, 0), "seed {seed}");
        // All places of the pass budget came back.
        let may = Arc::new(Mutex::new(Vec::new()));
        let room = if budget < 4 { budget } else { 4 };
        let _last: Vec<_> = (0..room)
            .map(|_| {
                let may = may.clone();
                let device = Device::new("last", &log);
                device.next(Act::Run(Box::new(move |invalidation| {
                    may.lock().unwrap().push(invalidation.may_defer())
                })));
                space.insert(pages(100, 1), device).unwrap()
            })
            .collect();
        drop(now(space.invalidate(pages(100, 1), Event::Unmap)));
        assert_eq!(*may.lock().unwrap(), vec![true; room], "seed {seed}");
    }

    fn names(tasks: &[Running]) -> Vec<(&'static str, bool)> {
        tasks.iter().map(|task| (task.what, task.frozen)).collect()
    }

    fn step(tasks: &mut Vec<Running>, at: usize, guards: &mut Vec<InvalidationGuard<'static>>) {
        if tasks[at].frozen || !tasks[at].task.is_woken() {
            return;
        }
        if let std::task::Poll::Ready(done) = tasks[at].task.poll() {
            if let Done::Guard(guard) = done {
                guards.push(guard);
            }
            tasks.swap_remove(at);
        }
    }
}

#[test]
fn whoever_is_woken_only_when_there_is_something_to_do_finishes() {
    let seconds =
        std::env::var("SHOOTDOWN_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let first = std::env::var("SHOOTDOWN_SEED").ok().and_then(|text| text.parse().ok());
    let began = std::time::Instant::now();
    let mut runs = 0;
    for seed in first.unwrap_or(0).. {
        shuffle::run(seed, 400);
        runs += 1;
        if first.is_some() || began.elapsed() > Duration::from_secs(seconds) {
            break;
        }
    }
    println!("{runs} runs");
}

#[test]
#[cfg(feature = "std")]
fn c4_a_clock_that_panics_once_lets_nobody_lapse_early() {
    let (micros, fails) = (Arc::new(AtomicU64::new(100_000_000)), Arc::new(AtomicBool::new(false)));
    let (clock, fail) = (micros.clone(), fails.clone());
    let space = AddressSpace::builder()
        .clock(move || {
            assert!(!fail.load(Ordering::SeqCst), "no time");
            Duration::from_micros(clock.load(Ordering::SeqCst))
        })
        .build();
    let device = space.insert(pages(0, 1), Device::new("device", &Log::default())).unwrap();
    let gate = Gate::default();
    device.next(Act::pass(gate.clone()));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    gate.open();
    let mut reader = Task::new(device.read_begin());
    // It drives the pass to its end, while the clock fails.
    fails.store(true, Ordering::SeqCst);
    assert!(reader.poll().is_pending());
    fails.store(false, Ordering::SeqCst);
    for _ in 0..40 {
        let _ = reader.poll();
        micros.fetch_add(10, Ordering::SeqCst);
        if space.stats().lapses > 0 {
            break;
        }
    }
    assert_eq!(space.stats().lapses, 0, "a future lapses 0.4 ms after its passes were done");
    drop(invalidate.run());
}

#[test]
fn c4_a_reader_beside_a_task_that_computes_goes_on() {
    assert_eq!(
        within(Duration::from_secs(10), || {
            let (space, device, _log) = one_device();
            let invalidate = unclaimed(&space, &device);
            let mut pool = LocalPool::new();
            pool.spawner()
                .spawn_local(async {
                    loop {
                        let began = std::time::Instant::now();
                        while began.elapsed() < Duration::from_millis(6) {}
                        Yields(1).await;
                    }
                })
                .unwrap();
            pool.run_until(async {
                device.read_begin().await;
            });
            drop(invalidate);
        }),
        Ok(()),
        "the reader of an abandoned range, on an executor each of whose turns takes 6 ms,"
    );
}

#[test]
fn f3_a_first_pass_may_start_what_waits_for_it() {
    let (space, near, log) = one_device();
    let near = Arc::new(near);
    let far = space.insert(pages(9, 1), Device::new("far", &log)).unwrap();
    let reader = near.clone();
    // The pass of `far` waits for readers of `near`, which an invalidation holds up that has begun
    // the other one.
    far.next(Act::pass(async move { _ = reader.read_begin().await }));
    let elsewhere = space.clone();
    near.next(Act::Run(Box::new(move |_| {
        // Never waits.
        assert!(elsewhere.try_invalidate(pages(9, 1), Event::Unmap).is_err());
    })));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    now(space.drain());
}

// ---- memory ----

struct Counting;

std::thread_local!(static LIVE: std::cell::Cell<isize> = const { std::cell::Cell::new(0) });

#[allow(unsafe_code)]
// SAFETY: it counts, and the system allocates.
unsafe impl std::alloc::GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
        LIVE.set(LIVE.get() + layout.size() as isize);
        // SAFETY: the caller's contract.
        unsafe { std::alloc::GlobalAlloc::alloc(&std::alloc::System, layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: std::alloc::Layout) {
        LIVE.set(LIVE.get() - layout.size() as isize);
        // SAFETY: the caller's contract.
        unsafe { std::alloc::GlobalAlloc::dealloc(&std::alloc::System, memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn settled(space: &AddressSpace, device: &Subscription<Device>, log: &Log) -> isize {
    // One of everything.
    let invalidate = unclaimed(space, device);
    drop(invalidate);
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    *log.lock().unwrap() = Vec::new();
    LIVE.get()
}

#[test]
fn memory_after_a_burst_of_parked_invalidations_and_of_readers() {
    let count: usize =
        std::env::var("SHOOTDOWN_COUNT").ok().and_then(|text| text.parse().ok()).unwrap_or(20_000);
    let (space, device, log) = one_device();
    let fresh = settled(&space, &device, &log);
    {
        let gates: Vec<Gate> = (0..count).map(|_| Gate::default()).collect();
        for gate in &gates {
            device.next(Act::pass(gate.clone()));
            Task::new(space.invalidate(pages(0, 1), Event::Unmap)).expect_pending();
        }
        gates.iter().for_each(Gate::open);
        now(space.drain());
    }
    let parked = settled(&space, &device, &log) - fresh;
    {
        let gate = Gate::default();
        device.next(Act::pass(gate.clone()));
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        let mut readers: Vec<_> = (0..20_000).map(|_| Task::new(device.read_begin())).collect();
        readers.iter_mut().for_each(Task::expect_pending);
        gate.open();
        drop(invalidate.finish());
        readers.iter_mut().for_each(|reader| _ = reader.finish());
    }
    let readers = settled(&space, &device, &log) - fresh - parked;
    {
        let many: Vec<_> = (0..5_000)
            .map(|_| {
                space
                    .insert(pages(9, 1), Device::new("many", &log).then(Act::pass(Yields(2))))
                    .unwrap()
            })
            .collect();
        let guard = now(space.invalidate(pages(0, 10), Event::Unmap));
        drop((guard, many));
    }
    let notifiers = settled(&space, &device, &log) - fresh - parked - readers;
    println!("bytes kept: parked {parked}, readers {readers}, notifiers {notifiers}");
    assert!(parked < 64 << 10 && readers < 64 << 10, "kept: parked {parked}, readers {readers}");
}

#[test]
fn how_many_consumers_are_too_many() {
    let most = (9..40).find(|count| consumers_quickly(*count).is_err());
    assert_eq!(most, None);
}

fn consumers_quickly(count: usize) -> Result<(), &'static str> {
    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 1), ()).unwrap();
    let mut streams = vec![&inbox; count];
    let mut tasks: Vec<_> = streams.iter_mut().map(|stream| Task::new(stream.next())).collect();
    // In turns.
    for _ in 0..1000 {
        let mut any = false;
        for task in &mut tasks {
            if task.is_woken() {
                any = true;
                let _ = task.poll();
            }
        }
        if !any {
            return Ok(());
        }
    }
    Err("hangs")
}

// ---- threads ----

#[test]
fn threads_that_do_everything_come_to_an_end() {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    let seconds =
        std::env::var("SHOOTDOWN_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    for (budget, round) in [(None, 0), (Some(1), 1), (Some(0), 2)] {
        let mut builder = AddressSpace::builder();
        if let Some(budget) = budget {
            builder = builder.pass_budget(budget);
        }
        let space = builder.build();
        let until = std::time::Instant::now() + Duration::from_secs(seconds);
        let count = Arc::new(AtomicUsize::new(0));
        let done = (0..4u64)
            .map(|thread| {
                let (space, count) = (space.clone(), count.clone());
                let (tell, told) = mpsc::channel();
                std::thread::spawn(move || {
                    let rng = &mut SmallRng::seed_from_u64(round * 10 + thread);
                    let log = Log::default();
                    let range =
                        |rng: &mut SmallRng| pages(rng.random_range(0..4), rng.random_range(1..4));
                    while std::time::Instant::now() < until {
                        count.fetch_add(1, Ordering::Relaxed);
                        log.lock().unwrap().clear();
                        match rng.random_range(0..3) {
                            0 => {
                                let sub = space.insert(range(rng), Device::new("d", &log)).unwrap();
                                for _ in 0..rng.random_range(0..6) {
                                    sub.next(Act::pass(Yields(rng.random_range(0..60))));
                                }
                                for _ in 0..rng.random_range(0..4) {
                                    futures::executor::block_on(sub.read_begin());
                                }
                                if rng.random_bool(0.7) {
                                    drop(futures::executor::block_on(sub.remove()));
                                }
                            }
                            1 => {
                                let mut invalidate = space.invalidate(range(rng), Event::Unmap);
                                if rng.random_bool(0.7) {
                                    drop(futures::executor::block_on(invalidate));
                                } else {
                                    let _ = Pin::new(&mut invalidate)
                                        .poll(&mut Context::from_waker(Waker::noop()));
                                }
                            }
                            _ => {
                                drop(space.try_invalidate(range(rng), Event::Unmap));
                                if rng.random_bool(0.2) {
                                    futures::executor::block_on(space.drain());
                                }
                            }
                        }
                    }
                    let _ = tell.send(());
                });
                told
            })
            .collect::<Vec<_>>();
        let stuck = done
            .iter()
            .enumerate()
            .filter(|(_, done)| {
                done.recv_timeout(
                    until.saturating_duration_since(std::time::Instant::now())
                        + Duration::from_secs(8),
                )
                .is_err()
            })
            .map(|(thread, _)| thread)
            .collect::<Vec<_>>();
        println!(
            "budget {budget:?}: {} turns, stuck {stuck:?}, {:?}",
            count.load(Ordering::Relaxed),
            space.stats()
        );
        assert!(stuck.is_empty(), "{:?}", space.active());
    }
}

#[test]
fn an_inbox_handles_what_is_queued_in_time_that_is_not_quadratic() {
    let time = |count: usize| {
        let space = AddressSpace::new();
        let inbox = space.inbox(pages(0, 1), ()).unwrap();
        let mut unmaps: Vec<_> =
            (0..count).map(|_| Task::new(space.invalidate(pages(0, 1), Event::Unmap))).collect();
        unmaps.iter_mut().for_each(Task::expect_pending);
        let mut stream = &inbox;
        let began = std::time::Instant::now();
        for unmap in &mut unmaps {
            now(stream.next()).unwrap().done();
            drop(unmap.finish());
        }
        began.elapsed()
    };
    // Eight times as many: 64 times as long if each looked at all others.
    let times = [4_000, 32_000].map(|count| (0..3).map(|_| time(count)).min().unwrap());
    assert!(times[1].as_secs_f64() < 24.0 * times[0].as_secs_f64(), "{times:?}");
}
