//! C1 to C4 on real executors: futures that are dropped, leaked, or alive and never polled again
//! wedge nobody.
#![cfg(not(any(loom, shuttle)))]
#![allow(missing_docs, clippy::print_stdout)]

mod support;

use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, StreamExt};
use shootdown::{
    AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, Subscription, WouldBlock,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{Act, Device, Gate, Log, Yields, pages};

/// Runs a test on every executor; none of them may hang on it.
fn on_every_executor(test: impl Fn() -> BoxFuture<'static, ()>) {
    let limit = Duration::from_secs(60);
    let run = |name: &'static str, run: &dyn Fn(BoxFuture<'static, ()>)| {
        let began = Instant::now();
        run(test());
        assert!(began.elapsed() < limit, "{name} took {:?}", began.elapsed());
    };
    run("tokio, many threads", &|test| {
        let tokio = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_time()
            .build()
            .unwrap();
        tokio.block_on(async {
            tokio::time::timeout(limit, tokio::spawn(test)).await.expect("it hangs").unwrap()
        });
    });
    run("tokio, one thread", &|test| {
        let tokio = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        tokio.block_on(async { tokio::time::timeout(limit, test).await.expect("it hangs") });
    });
    run("smol", &|test| smol::block_on(smol::future::or(test, hangs(limit))));
    run("futures::executor", &|test| {
        futures::executor::block_on(smol::future::or(test, hangs(limit)))
    });
}

async fn hangs(limit: Duration) {
    smol::Timer::after(limit).await;
    panic!("it hangs");
}

/// A device whose passes need some turns of whoever drives them.
fn device(space: &AddressSpace, log: &Log, turns: u32) -> Arc<Subscription<Device>> {
    let device = Device::new("device", log);
    for _ in 0..1000 {
        device.next(Act::pass(Yields(turns)));
    }
    Arc::new(space.insert(pages(0, 1), device).unwrap())
}

#[test]
fn the_losing_arm_of_a_select_whose_body_reads_the_range() {
    on_every_executor(|| {
        async {
            let (space, log) = (AddressSpace::new(), Log::default());
            let device = device(&space, &log, 50);
            let mut invalidate = space.invalidate(pages(0, 1), Event::Unmap);
            let mut timeout = futures::future::ready(()).fuse();
            let mut polled = futures::future::poll_immediate(&mut invalidate);
            assert!((&mut polled).await.is_none(), "its passes need more turns than one");
            futures::select_biased! {
                () = timeout => {
                    // `invalidate` is alive and is not polled while this runs.
                    device.read_begin().await;
                }
            }
            drop(invalidate.await);
        }
        .boxed()
    });
}

#[test]
fn a_buffered_stream_whose_body_reads_what_another_of_its_futures_invalidates() {
    on_every_executor(|| {
        async {
            let (space, log) = (AddressSpace::new(), Log::default());
            let device = device(&space, &log, 20);
            let invalidations = stream::iter(0..40)
                .map(|_| space.invalidate(pages(0, 1), Event::Clear))
                .buffer_unordered(4);
            let mut invalidations = std::pin::pin!(invalidations);
            let mut done = 0;
            while let Some(guard) = invalidations.next().await {
                drop(guard);
                // The other futures of the stream are not polled during this.
                device.read_begin().await;
                done += 1;
            }
            assert_eq!(done, 40);
        }
        .boxed()
    });
}

#[test]
fn dropped_and_leaked_futures_leave_reader_remover_and_later_invalidations_unharmed() {
    for leak in [false, true] {
        on_every_executor(move || {
            async move {
                let (space, log) = (AddressSpace::new(), Log::default());
                let device = device(&space, &log, 50);
                let other = space.insert(pages(0, 1), Device::new("other", &log)).unwrap();
                for _ in 0..3 {
                    let mut invalidate = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
                    assert!(futures::future::poll_immediate(&mut invalidate).await.is_none());
                    if leak {
                        std::mem::forget(invalidate);
                    }
                }
                device.read_begin().await;
                drop(space.invalidate(pages(0, 1), Event::Unmap).await);
                drop(other.remove().await);
                space.drain().await;
                let device = Arc::into_inner(device).unwrap();
                drop(device.remove().await);
                assert_eq!(space.sequence().get() % 2, 0);
            }
            .boxed()
        });
    }
}

#[test]
fn a_healthy_invalidation_beside_readers_that_never_stop_practically_never_lapses() {
    const INVALIDATIONS: u64 = 300;
    for threads in [0, 2] {
        let tokio = if threads == 0 {
            tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
        } else {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(threads)
                .enable_time()
                .build()
                .unwrap()
        };
        let lapses = tokio.block_on(async {
            let (space, log) = (AddressSpace::new(), Log::default());
            let device = device(&space, &log, 10);
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let device = device.clone();
                    tokio::spawn(async move {
                        loop {
                            device.read_begin().await;
                            tokio::task::yield_now().await;
                        }
                    })
                })
                .collect();
            let invalidate = space.clone();
            let work = tokio::spawn(async move {
                for _ in 0..INVALIDATIONS {
                    drop(invalidate.invalidate(pages(0, 1), Event::Clear).await);
                    tokio::task::yield_now().await;
                }
            });
            work.await.unwrap();
            readers.iter().for_each(tokio::task::JoinHandle::abort);
            space.stats().lapses
        });
        println!(
            "{lapses} of {INVALIDATIONS} healthy invalidations lapsed on {threads} worker threads"
        );
        assert!(lapses * 20 <= INVALIDATIONS, "{lapses} of {INVALIDATIONS} lapsed");
    }
}

#[test]
fn ten_thousand_passes_that_are_ready_through_tokio_primitives_finish() {
    // Each takes a unit of the task's cooperative budget; when that is used up they answer
    // `Pending` and wake the task, and a join that polls on without returning to tokio would never
    // end (rust-lang/futures-rs#2053).
    for threads in [0, 2] {
        let tokio = if threads == 0 {
            tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
        } else {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(threads)
                .enable_time()
                .build()
                .unwrap()
        };
        tokio.block_on(async {
            let space = AddressSpace::new();
            let finished = Arc::new(AtomicU64::new(0));
            let devices: Vec<_> = (0..10_000)
                .map(|_| space.insert(pages(0, 1), Semaphores(finished.clone())).unwrap())
                .collect();
            let others = Arc::new(AtomicU64::new(0));
            let turns = others.clone();
            let other = tokio::spawn(async move {
                loop {
                    turns.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            });
            let work = tokio::time::timeout(
                Duration::from_secs(60),
                space.invalidate(pages(0, 1), Event::Unmap),
            );
            drop(work.await.expect("it hangs"));
            assert_eq!(finished.load(Ordering::Relaxed), 10_000);
            if threads == 0 {
                let turns = others.load(Ordering::Relaxed);
                assert!(turns >= 10, "another task of the thread had {turns} turns meanwhile");
            }
            // And one that may not wait gives up instead of going round for ever.
            let _ = space.try_invalidate(pages(0, 1), Event::Unmap).map(drop);
            other.abort();
            space.drain().await;
            drop(devices);
        });
    }
}

struct Semaphores(Arc<AtomicU64>);

impl IntervalNotifier for Semaphores {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        let finished = self.0.clone();
        Ok(Some(PassFuture::new(async move {
            let semaphore = tokio::sync::Semaphore::new(1);
            for _ in 0..4 {
                drop(semaphore.acquire().await);
            }
            finished.fetch_add(1, Ordering::Relaxed);
        })))
    }
}

#[test]
fn l2_l3_untouched_notifiers_are_not_kept_waiting_by_a_space_that_is_never_idle() {
    const TASKS: u64 = 64;
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap();
    tokio.block_on(async {
        let (space, log) = (AddressSpace::new(), Log::default());
        let busy: Vec<_> = (0..TASKS)
            .map(|task| {
                let space = space.clone();
                tokio::spawn(async move {
                    let _device = space.insert(pages(10 + task, 1), Slow).unwrap();
                    loop {
                        drop(space.invalidate(pages(10 + task, 1), Event::Clear).await);
                    }
                })
            })
            .collect();
        while space.active().len() < 32 {
            tokio::task::yield_now().await;
        }
        let mut longest = Duration::ZERO;
        for _ in 0..50 {
            let untouched = space.insert(pages(0, 1), Device::new("untouched", &log)).unwrap();
            assert!(!space.active().is_empty(), "the space is never idle");
            let began = Instant::now();
            // Not one turn of the executor is needed: the first poll answers.
            assert!(untouched.read_begin().now_or_never().is_some());
            assert!(untouched.remove().now_or_never().is_some());
            longest = longest.max(began.elapsed());
        }
        println!("read_begin and remove of an untouched notifier took {longest:?} at most, beside {TASKS} tasks that invalidate");
        busy.iter().for_each(tokio::task::JoinHandle::abort);
    });
}

struct Slow;

impl IntervalNotifier for Slow {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(Some(PassFuture::new(tokio::time::sleep(Duration::from_millis(1)))))
    }
}

#[test]
fn a_reader_in_the_task_of_a_forgotten_future_is_served_by_completions_from_other_threads() {
    on_every_executor(|| {
        async {
            let (space, log) = (AddressSpace::new(), Log::default());
            let gate = Gate::default();
            let device = space
                .insert(pages(0, 1), Device::new("device", &log).then(Act::pass(gate.clone())))
                .unwrap();
            let mut invalidate = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
            assert!(futures::future::poll_immediate(&mut invalidate).await.is_none());
            let completion = std::thread::spawn(move || {
                while !gate.is_waited_for() {
                    std::thread::yield_now();
                }
                gate.open();
            });
            device.read_begin().await;
            completion.join().unwrap();
            drop(invalidate.await);
            assert_eq!(device.calls(), 2, "it lapsed and started over");
        }
        .boxed()
    });
}

#[test]
fn a2_a_driver_task_that_its_runtime_aborts_or_that_panics_loses_nothing() {
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap();
    tokio.block_on(async {
        let space = AddressSpace::new();
        let inbox = Arc::new(space.inbox(pages(0, 1), ()).unwrap());
        for panics in [false, true] {
            let invalidate =
                tokio::spawn(space.clone().invalidate(pages(0, 1), Event::Unmap).into_owned());
            let of_driver = inbox.clone();
            let (taken, wait) = tokio::sync::oneshot::channel();
            let driver = tokio::spawn(async move {
                let mut stream = &*of_driver;
                let delivery = stream.next().await.unwrap();
                taken.send(delivery.deliveries()).unwrap();
                assert!(!panics, "the handler fails");
                std::future::pending::<()>().await;
                delivery.done();
            });
            assert_eq!(wait.await.unwrap(), 1);
            if !panics {
                driver.abort();
            }
            assert!(driver.await.is_err());
            assert!(!invalidate.is_finished());
            let mut stream = &*inbox;
            let again = stream.next().await.unwrap();
            assert_eq!(again.deliveries(), 2);
            again.done();
            drop(invalidate.await.unwrap());
        }
    });
}
