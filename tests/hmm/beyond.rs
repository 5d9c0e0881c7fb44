//! What the kernel's tests do not have: passes that take time, several invalidations at once, the
//! life cycle, retries.

use crate::command::CommandError;
use crate::device::{Device as Gpu, Mirror};
use crate::engine::pause;
use crate::memory::Process;
use crate::runtime::Runtime;
use crate::support::{Act, Device, Gate, Log, called, pages};
use crate::vma::{Backing, Protection};
use futures::future::{FutureExt, join_all};
use shootdown::{
    AddressSpace, DriverLock, Event, MirrorError, Owner, Phase, RetryBudget, Subscription,
    WouldBlock,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

fn device(
    space: &AddressSpace,
    log: &Log,
    name: &'static str,
    acts: impl IntoIterator<Item = Act>,
) -> Arc<Subscription<Device>> {
    let device = acts.into_iter().fold(Device::new(name, log), Device::then);
    Arc::new(space.insert(pages(0, 4), device).unwrap())
}

/// An invalidation of everything, as a task: when it resolves it has been held and ended.
fn invalidate(runtime: &Runtime, space: &AddressSpace) -> futures::future::BoxFuture<'static, ()> {
    let space = space.clone();
    runtime.spawn(async move { drop(space.invalidate(pages(0, 4), Event::Unmap).await) })
}

/// Lets the others run until it is so.
async fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        pause().await;
    }
}

/// Lets the others run for a while, in which something must not happen.
async fn a_while() {
    for _ in 0..200 {
        pause().await;
    }
}

pub async fn there_are_two_passes(runtime: Runtime) {
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let _device = device(&space, &log, "device", [Act::pass(gate.clone())]);
    let mut invalidation = invalidate(&runtime, &space);
    until(|| gate.is_waited_for()).await;
    a_while().await;
    assert!(
        (&mut invalidation).now_or_never().is_none(),
        "the first pass has run, the second takes time"
    );
    let active = space.active();
    assert_eq!((active[0].phase, &active[0].pending[..]), (Phase::Passes, &["device".into()][..]));
    gate.open();
    invalidation.await;
    assert_eq!(called(&log), ["device"]);
}

pub async fn waits_of_devices_overlap(runtime: Runtime) {
    let (space, log) = (AddressSpace::new(), Log::default());
    let gates: Vec<Gate> = (0..8).map(|_| Gate::default()).collect();
    let _devices: Vec<_> = gates
        .iter()
        .map(|gate| device(&space, &log, "device", [Act::pass(gate.clone())]))
        .collect();
    let invalidation = invalidate(&runtime, &space);
    // Nothing opens before all are waited for: one after the other, this would hang.
    until(|| gates.iter().all(Gate::is_waited_for)).await;
    gates.iter().rev().for_each(Gate::open);
    invalidation.await;
}

pub async fn a_second_invalidation_does_not_wait_for_the_first_ones_pass(runtime: Runtime) {
    let (space, log) = (AddressSpace::new(), Log::default());
    let (slow, quick) = (Gate::default(), Gate::default());
    let device =
        device(&space, &log, "device", [Act::pass(slow.clone()), Act::pass(quick.clone())]);
    let mut first = invalidate(&runtime, &space);
    until(|| slow.is_waited_for()).await;
    let second = invalidate(&runtime, &space);
    until(|| quick.is_waited_for()).await;
    quick.open();
    second.await;
    assert!((&mut first).now_or_never().is_none());
    slow.open();
    first.await;
    assert_eq!(device.calls(), 2);
}

pub async fn would_block_half_way_leaves_started_passes_to_the_space(runtime: Runtime) {
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let started = device(&space, &log, "started", [Act::pass(gate.clone())]);
    let _refuses = device(&space, &log, "refuses", [Act::Refuse]);
    let _spared = device(&space, &log, "spared", []);
    assert_eq!(space.try_invalidate(pages(0, 1), Event::Unmap).map(drop), Err(WouldBlock));
    assert_eq!(called(&log), ["started", "refuses"]);
    // The device may still use the memory: readers wait, whoever called.
    let mut reader = runtime.spawn(async move {
        {
            started.read_begin().await;
        }
    });
    a_while().await;
    assert!((&mut reader).now_or_never().is_none());
    assert!(space.active()[0].abandoned);
    gate.open();
    reader.await;
    assert!(space.active().is_empty());
}

pub async fn a_range_is_stable_when_all_nested_invalidations_have_ended(runtime: Runtime) {
    let (space, log) = (AddressSpace::new(), Log::default());
    let device = device(&space, &log, "device", []);
    let outer = space.invalidate(pages(0, 4), Event::Unmap).await;
    let inner = space.invalidate(pages(1, 1), Event::Clear).await;
    assert_eq!(outer.sequence(), inner.sequence());
    let mut reader = runtime.spawn({
        let device = device.clone();
        async move { device.read_begin().await }
    });
    drop(outer);
    a_while().await;
    assert!((&mut reader).now_or_never().is_none(), "the inner one is under way");
    assert!(space.sequence().get() % 2 == 1);
    drop(inner);
    assert!(!device.read_retry(reader.await));
    assert!(space.sequence().get().is_multiple_of(2));
}

pub async fn insert_during_an_invalidation_waits_for_it(runtime: Runtime) {
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let _device = device(&space, &log, "device", [Act::pass(gate.clone())]);
    let invalidation = invalidate(&runtime, &space);
    until(|| gate.is_waited_for()).await;
    let late = device(&space, &log, "late", []);
    let mut reader = runtime.spawn({
        let late = late.clone();
        async move { late.read_begin().await }
    });
    a_while().await;
    assert!((&mut reader).now_or_never().is_none());
    gate.open();
    invalidation.await;
    assert!(!late.read_retry(reader.await));
    assert_eq!(called(&log), ["device"], "not for an invalidation that was there before");
}

pub async fn remove_during_an_invalidation_waits_for_its_own_pass_only(runtime: Runtime) {
    let (space, log) = (AddressSpace::new(), Log::default());
    let gates = [Gate::default(), Gate::default()];
    let [first, second] =
        gates.clone().map(|gate| device(&space, &log, "device", [Act::pass(gate)]));
    let invalidation = invalidate(&runtime, &space);
    until(|| gates.iter().all(Gate::is_waited_for)).await;
    let mut removed = runtime.spawn(Arc::into_inner(first).unwrap().remove().map(drop));
    a_while().await;
    assert!((&mut removed).now_or_never().is_none());
    gates[0].open();
    removed.await;
    gates[1].open();
    invalidation.await;
    drop(space.invalidate(pages(0, 4), Event::Unmap).await);
    assert_eq!((second.calls(), called(&log).len()), (2, 3));
}

pub async fn release_with_live_notifiers(runtime: Runtime) {
    let process = Process::new();
    let range = process.map(64, Protection::WRITE, Backing::Private);
    let gpu = Gpu { owner: Owner::new(), coherent: false };
    let mirrors = [Mirror::open(&process, gpu).unwrap(), Mirror::open(&process, gpu).unwrap()];
    for mirror in &mirrors {
        mirror.read(range).await.unwrap();
    }
    // A device that is at work meanwhile reads all of it or learns that it is gone.
    let exit = runtime.spawn({
        let process = process.clone();
        async move { process.exit().await }
    });
    let outcome = mirrors[0].read(range).await;
    assert!(outcome.is_err() || outcome.is_ok_and(|read| read.words.iter().all(|word| *word == 0)));
    exit.await;
    // Called once, and again each time that the exit, not polled while its reader waited, lapsed
    // and started over (C4).
    let calls = 1 + process.space().stats().lapses as usize;
    for mirror in mirrors {
        assert_eq!(mirror.take_events(), vec![Event::Release; calls]);
        assert!(matches!(mirror.read(range).await, Err(CommandError::Fault(_))));
        mirror.close().await;
    }
    assert!(matches!(Mirror::open(&process, gpu), Err(CommandError::Closed)));
}

pub async fn sequence_wraps_around(runtime: Runtime) {
    let space = AddressSpace::builder().first_sequence(u64::MAX - 3).build();
    let (log, mut seen) = (Log::default(), Vec::new());
    let device = device(&space, &log, "device", []);
    for _ in 0..4 {
        let began = device.read_begin().await;
        seen.push(began.get());
        invalidate(&runtime, &space).await;
        assert!(device.read_retry(began));
        let again = device.read_begin().await;
        assert!(!device.read_retry(again) && again != began);
    }
    assert!(seen.windows(2).any(|pair| pair[1] < pair[0]), "{seen:?} did not wrap around");
}

pub async fn a_reader_is_not_held_up_by_unrelated_traffic(runtime: Runtime) {
    let (space, log) = (AddressSpace::new(), Log::default());
    let stop = Arc::new(AtomicBool::new(false));
    let device = device(&space, &log, "device", []);
    let _other = space.insert(pages(100, 1), Device::new("other", &log)).unwrap();
    // At any moment one of the two holds an invalidation: the kernel's reader would wait for ever.
    let traffic: Vec<_> = (0..2)
        .map(|_| {
            let (space, stop) = (space.clone(), stop.clone());
            runtime.spawn(async move {
                let mut held = space.invalidate(pages(100, 1), Event::Unmap).await;
                while !stop.load(Ordering::Acquire) {
                    pause().await;
                    held = space.invalidate(pages(100, 1), Event::Unmap).await;
                }
                drop(held);
            })
        })
        .collect();
    until(|| space.active().len() >= 2).await;
    for _ in 0..500 {
        let began = device.read_begin().await;
        assert!(!device.read_retry(began));
        pause().await;
    }
    assert!(!space.active().is_empty(), "there was always one");
    stop.store(true, Ordering::Release);
    join_all(traffic).await;
    assert_eq!(device.calls(), 0);
}

/// A mirror whose memory is invalidated each time it has been looked at.
async fn unlucky(
    space: &AddressSpace,
    budget: RetryBudget,
    looks: &AtomicU64,
) -> Result<(), MirrorError<()>> {
    struct Driver(DriverLock<()>);
    impl shootdown::IntervalNotifier for Driver {
        fn invalidate(
            &self,
            invalidation: &shootdown::Invalidation<'_>,
        ) -> Result<Option<shootdown::PassFuture>, WouldBlock> {
            drop(self.0.lock_for(invalidation));
            Ok(None)
        }
    }
    let driver = space.insert(pages(0, 4), Driver(DriverLock::new(()))).unwrap();
    let look = |_| async {
        looks.fetch_add(1, Ordering::Relaxed);
        a_while().await;
        drop(space.invalidate(pages(0, 1), Event::Unmap).await);
        Ok(())
    };
    driver.0.mirror(&driver, budget, look, |(), ()| ()).await
}

pub async fn a_retry_budget_that_is_used_up_is_an_error_that_says_so(runtime: Runtime) {
    let (space, looks) = (AddressSpace::new(), Arc::new(AtomicU64::new(0)));
    let counted = looks.clone();
    let outcome = runtime
        .spawn(async move { unlucky(&space, RetryBudget::retries(5), &counted).await })
        .await;
    let error = outcome.unwrap_err();
    assert!(matches!(error, MirrorError::RetriesExhausted { retries: 5, .. }), "{error:?}");
    assert_eq!(looks.load(Ordering::Relaxed), 6);
    let text = MirrorError::<Gone>::RetriesExhausted { retries: 5, elapsed: None }.to_string();
    assert!(text.contains("each of 6 attempts") && text.contains("allow more retries"), "{text}");
    // Through a driver's command it is the driver's error: to replace the zero page is an
    // invalidation that collides with the look itself.
    let (process, gpu) = (Process::new(), Gpu { owner: Owner::new(), coherent: false });
    let range = process.map(1, Protection::WRITE, Backing::Private);
    process.read(range.start(), 1).await.unwrap();
    let mirror = Mirror::open(&process, gpu).unwrap().with_budget(RetryBudget::retries(0));
    assert_eq!(
        mirror.write(range.start(), &[1; 512]).await,
        Err(CommandError::Busy { retries: 0 })
    );
    assert_eq!(
        mirror.write(range.start(), &[1; 512]).await.unwrap().faults,
        1,
        "it was replaced the first time"
    );
    let text =
        CommandError::from(MirrorError::RetriesExhausted { retries: 5, elapsed: None }).to_string();
    assert!(text.contains("each of 6 tries") && text.contains("retry budget"), "{text}");
}

#[derive(Debug)]
struct Gone;

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("gone")
    }
}

pub async fn a_step_in_progress_is_not_interrupted_by_the_budget(runtime: Runtime) {
    // A clock that the test moves: the time is used up in the middle of the first look.
    let now = Arc::new(AtomicU64::new(0));
    let clock = now.clone();
    let space = AddressSpace::builder()
        .clock(move || Duration::from_millis(clock.load(Ordering::Relaxed)))
        .build();
    let finished = Arc::new(AtomicU64::new(0));
    let looks = finished.clone();
    let outcome = runtime.spawn(async move {
        let budget = RetryBudget { retries: 1000, time: Some(Duration::from_millis(10)) };
        let late = async {
            now.store(11, Ordering::Relaxed);
        };
        futures::join!(unlucky(&space, budget, &looks), late).0
    });
    let error = outcome.await.unwrap_err();
    let MirrorError::RetriesExhausted { retries: 0, elapsed } = error else { panic!("{error:?}") };
    assert_eq!(elapsed, Some(Duration::from_millis(11)));
    assert_eq!(finished.load(Ordering::Relaxed), 1, "the step that was under way was finished");
}
