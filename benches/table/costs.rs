//! Measures costs that must not depend on what else there is, has been, or is waited for.

#[path = "../../tests/support/costs.rs"]
mod workload;

use crate::bounds::Bound;
use crate::curves::Curve;
use crate::harness::{Harness, middle};
use crate::support::{now, pages};
use shootdown::{AddressSpace, Event};
use std::time::Duration;
use workload::Cost;

const BURST: &str = "insert + remove under one active invalidation, after a burst of others";
const REMOVE: &str = "remove under a guard that covers it, beside guards of other ranges";
const ONE_READER: &str = "one reader before N that are done and not polled, per invalidation";
const DRAIN: &str = "drain of N that finish one by one, per invalidation";
const READERS: &str = "N readers each waiting for one of N, per reader";

const SIZES: [usize; 5] = [1000, 2000, 4000, 8000, 16_000];
const RUNS: usize = 11;
/// Notifiers that are removed in one run.
const REMOVED: u64 = 1000;

pub fn measure(harness: &mut Harness) -> Vec<Curve> {
    vec![
        burst(harness),
        removals(),
        by_size(ONE_READER, workload::one_reader),
        by_size(DRAIN, workload::drain),
        by_size(READERS, workload::readers),
    ]
}

fn burst(harness: &mut Harness) -> Curve {
    let points = [0u64, 100, 1000, 10_000, 100_000].into_iter().map(|burst| {
        let space = AddressSpace::new();
        drop(workload::guards(&space, burst));
        let _one = now(space.invalidate(pages(9, 1), Event::Unmap));
        let ns = harness.median(&format!("{BURST} {burst}"), |times| {
            workload::insert_and_remove(&space, times)
        });
        (burst as f64, ns)
    });
    Curve { name: BURST, x: "were active at once", y: "ns", points: points.collect() }
}

fn removals() -> Curve {
    let points = [0u64, 10, 100, 1000, 10_000, 100_000].into_iter().map(|others| {
        let each = |time: Duration| time.as_nanos() as f64 / REMOVED as f64;
        let ns = middle((0..RUNS).map(|_| each(workload::removals(REMOVED, others))).collect());
        (others as f64, ns)
    });
    Curve { name: REMOVE, x: "held guards", y: "ns", points: points.collect() }
}

/// The time for each of `n`, which is the same for all `n` if the time of all is linear.
fn by_size(name: &'static str, cost: impl Fn(usize) -> Cost) -> Curve {
    let mut runs: [Vec<f64>; SIZES.len()] = Default::default();
    // In turns, because the machine changes its speed.
    for _ in 0..RUNS {
        for (runs, n) in runs.iter_mut().zip(SIZES) {
            runs.push(cost(n).took.as_nanos() as f64 / n as f64);
        }
    }
    let points = SIZES.into_iter().zip(runs).map(|(n, runs)| (n as f64, middle(runs)));
    Curve { name, x: "N", y: "ns", points: points.collect() }
}

/// What the curves promise, as rows.
pub fn rows(curves: &[Curve]) -> Vec<Bound> {
    let of = |name: &str| {
        curves.iter().find(|curve| curve.name == name).map_or(&[][..], |curve| &curve.points)
    };
    let mut rows = Vec::new();
    for (name, curve, bound) in [
        ("insert + remove after 100,000 were active, over a fresh space", BURST, 2.0),
        ("remove under a guard, beside 100,000 of other ranges, over beside none", REMOVE, 4.0),
    ] {
        if let [first, .., last] = of(curve) {
            rows.push(Bound::new(name, "×", bound, last.1 / first.1));
        }
    }
    for (name, curve) in [
        ("one reader before N not polled, from 2,000 to 16,000: a doubling, at most", ONE_READER),
        ("drain of N, the same", DRAIN),
        ("N readers of N, the same", READERS),
    ] {
        // From the second size on; of the time of all.
        let doubling = |pair: &[(f64, f64)]| pair[1].0 * pair[1].1 / (pair[0].0 * pair[0].1);
        let most = of(curve).get(1..).unwrap_or_default().windows(2).map(doubling).reduce(f64::max);
        rows.push(Bound::new(name, "×", 2.4, most.unwrap_or(f64::NAN)));
    }
    rows
}
