//! Costs against what they must not depend on.

use crate::Row;
use crate::devices::{Device, Kind, Population, page, random};
use crate::harness::Harness;
use futures::FutureExt;
use futures::executor::block_on;
use serde::Serialize;
use shootdown::{AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[derive(Clone, Serialize)]
pub struct Curve {
    pub name: &'static str,
    pub x: &'static str,
    pub y: &'static str,
    pub points: Vec<(f64, f64)>,
}

const ACTIVE: &str = "start + end of an invalidation, beside others that are active";
const READERS: &str = "end of an invalidation that one reader waits for, beside readers of others";
const TOGETHER: &str = "two threads: 1 invalidating alone, 2 beside a reader; 3 reading alone, 4 beside an invalidating one";
const DISJOINT: &str = "disjoint invalidations: threads and what one takes";
const LIVENESS: &str =
    "remove + read_begin of an untouched notifier beside 64 tasks that invalidate";

pub fn measure(harness: &mut Harness) -> Vec<Curve> {
    let by_population = |harness: &mut Harness, name, hit: bool| Curve {
        name,
        x: "notifiers",
        y: "ns",
        points: [1, 100, 10_000, 1_000_000, 4_000_000]
            .into_iter()
            .map(|n| {
                let (population, mut next) = (Population::new(n), random(n));
                let mut draw =
                    || if hit { population.page(next() % n) } else { population.gap(next() % n) };
                let addresses: Vec<u64> = (0..crate::DRAWN).map(|_| draw()).collect();
                let mut at = 0;
                let ns = harness.median(&format!("{name} {n}"), |times| {
                    crate::invalidate(&population.space, times, &addresses, &mut at)
                });
                (n as f64, ns)
            })
            .collect(),
    };
    vec![
        by_population(harness, "invalidation without a hit, by registered notifiers", false),
        by_population(harness, "invalidation with one hit, by registered notifiers", true),
        active(harness),
        readers(harness),
        together(),
        disjoint(),
        liveness(),
    ]
}

fn active(harness: &mut Harness) -> Curve {
    let points = [0u64, 1, 10, 100, 1000, 10_000].into_iter().map(|others| {
        let population = Population::new(others + 1);
        let guards: Vec<_> = (1..=others)
            .map(|at| {
                block_on(population.space.invalidate(page(population.page(at)), Event::Clear))
            })
            .collect();
        let ns = harness.median(&format!("{ACTIVE} {others}"), |times| {
            crate::invalidate(&population.space, times, &[0], &mut 0)
        });
        drop(guards);
        (others as f64, ns)
    });
    Curve { name: ACTIVE, x: "active invalidations", y: "ns", points: points.collect() }
}

fn readers(harness: &mut Harness) -> Curve {
    let points = [0u64, 1, 10, 100, 1000, 10_000].into_iter().map(|others| {
        let population = Population::new(others + 1);
        let space = &population.space;
        let guards: Vec<_> = (1..=others)
            .map(|at| block_on(space.invalidate(page(population.page(at)), Event::Clear)))
            .collect();
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        // The first device in memory is not the first in the space: look the waiting ones up by
        // whether they wait.
        let mut waiting = Vec::new();
        let mut free = None;
        for at in 0..=others as usize {
            let mut reader = Box::pin(population.device(at).read_begin());
            if reader.poll_unpin(&mut cx).is_pending() {
                waiting.push(reader)
            } else {
                free = Some(population.device(at))
            }
        }
        let device = free.expect("one device is not under invalidation");
        let ns = harness.median(&format!("{READERS} {others}"), |times| {
            for _ in 0..times {
                let guard = block_on(space.invalidate(device.range(), Event::Clear));
                let mut reader = device.read_begin();
                assert!(reader.poll_unpin(&mut cx).is_pending());
                drop(guard);
                assert!(reader.poll_unpin(&mut cx).is_ready());
            }
        });
        drop((waiting, guards));
        (others as f64, ns)
    });
    Curve { name: READERS, x: "other waiting readers", y: "ns", points: points.collect() }
}

const WINDOW: Duration = Duration::from_millis(300);

/// Operations that `work` does until it is stopped, while `beside` runs on another thread.
fn rate(
    work: impl Fn(&AtomicBool) -> u64,
    beside: Option<&(dyn Fn(&AtomicBool) -> u64 + Sync)>,
) -> f64 {
    let mut rates: Vec<f64> = (0..5)
        .map(|_| {
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(WINDOW);
                    stop.store(true, Ordering::Relaxed);
                });
                if let Some(beside) = beside {
                    scope.spawn(|| beside(&stop));
                }
                let began = Instant::now();
                let done = work(&stop);
                began.elapsed().as_nanos() as f64 / done as f64
            })
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// One thread invalidates, one reads another notifier of the same space.
fn together() -> Curve {
    let population = Population::new(100);
    let space = &population.space;
    let reader = population.device(0);
    let victim = page(population.page(if reader.range().start() == 0 { 1 } else { 0 }));
    let invalidating = |stop: &AtomicBool| {
        block_on(async {
            let mut done = 0;
            while !stop.load(Ordering::Relaxed) {
                drop(space.invalidate(victim, Event::Clear).await);
                done += 1;
            }
            done
        })
    };
    let reading = |stop: &AtomicBool| {
        block_on(async {
            let mut done = 0;
            while !stop.load(Ordering::Relaxed) {
                let reader = black_box(reader);
                let sequence = reader.read_begin().await;
                black_box(reader.read_retry(sequence));
                done += 1;
            }
            done
        })
    };
    let points = vec![
        (1.0, rate(invalidating, None)),
        (2.0, rate(invalidating, Some(&reading))),
        (3.0, rate(reading, None)),
        (4.0, rate(reading, Some(&invalidating))),
    ];
    Curve { name: TOGETHER, x: "case", y: "ns", points }
}

fn disjoint() -> Curve {
    let population = Population::new(100);
    let space = &population.space;
    let work = |at: u64| {
        move |stop: &AtomicBool| {
            block_on(async {
                let mut done = 0;
                while !stop.load(Ordering::Relaxed) {
                    drop(space.invalidate(page(at), Event::Clear).await);
                    done += 1;
                }
                done
            })
        }
    };
    let (first, second) = (work(population.page(3)), work(population.page(60)));
    let points = vec![(1.0, rate(first, None)), (2.0, rate(first, Some(&second)))];
    Curve { name: DISJOINT, x: "threads", y: "ns", points }
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

/// L2 and L3 under load: with 64 tasks that invalidate back to back the space is never idle.
fn liveness() -> Curve {
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .expect("tokio starts");
    let space = AddressSpace::new();
    let invalidations = std::sync::Arc::new(AtomicU64::new(0));
    for task in 0..64 {
        let (space, invalidations) = (space.clone(), invalidations.clone());
        tokio.spawn(async move {
            let range = page((100 + task) * 8192);
            let _slow = space.insert(range, Slow).expect("the space is not released");
            loop {
                drop(space.invalidate(range, Event::Clear).await);
                invalidations.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    while invalidations.load(Ordering::Relaxed) < 64 {
        std::thread::yield_now();
    }
    let mut took: Vec<f64> = (0..2000)
        .map(|_| {
            let untouched = space
                .insert(page(0), Device::new(Kind::Single))
                .expect("the space is not released");
            let began = Instant::now();
            block_on(untouched.read_begin());
            black_box(block_on(untouched.remove()));
            began.elapsed().as_nanos() as f64
        })
        .collect();
    tokio.shutdown_background();
    took.sort_by(f64::total_cmp);
    let points = vec![(50.0, took[1000]), (99.0, took[1980]), (100.0, took[1999])];
    Curve { name: LIVENESS, x: "percentile", y: "ns", points }
}

/// What the curves promise, as rows.
pub fn bounds(curves: &[Curve]) -> Vec<Row> {
    let of = |name: &str| {
        curves.iter().find(|curve| curve.name == name).map_or(&[][..], |curve| &curve.points)
    };
    let mut rows = Vec::new();
    let mut row = |name: &str, bound: f64, measured: f64| {
        rows.push(Row::new(name.into(), None, bound, bound, measured));
    };
    // Not linear: ten thousand times the others, at most four times the cost (their records no
    // longer fit the nearest cache).
    for (name, curve) in [
        ("start + end beside 10,000 active ones", ACTIVE),
        ("end beside 10,000 waiting readers", READERS),
    ] {
        if let [first, .., last] = of(curve) {
            row(name, first.1 * 4.0, last.1);
        }
    }
    if let [alone, beside, reading, beside_reading] = of(TOGETHER) {
        row("invalidating beside a reading thread (a third of its rate)", alone.1 * 3.0, beside.1);
        row(
            "reading beside an invalidating thread (a third of its rate)",
            reading.1 * 3.0,
            beside_reading.1,
        );
    }
    if let [median, ..] = of(LIVENESS) {
        row("remove + read_begin while 64 tasks invalidate, median", 100_000.0, median.1);
    }
    rows
}
