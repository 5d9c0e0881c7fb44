//! How the times of the table are taken on a machine that others use, too.

use criterion::Criterion;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Samples of a row each time it is measured; criterion takes no fewer.
const SAMPLES: usize = 10;
/// How long is worked between two looks at the machine.
const SLICE: Duration = Duration::from_millis(1);
/// How often one look does what it times: 30 µs or so for both.
const LOOKS_AT_MUTEX: u32 = 4_000;
const LOOKS_AT_LOADS: u32 = 20_000;
/// One slice in so many counts: those in which the machine was least crowded.
const QUIET: usize = 4;

/// Takes the samples with criterion, and the median of their quiet slices.
///
/// A sample is taken in slices, and beside each slice two things are timed that say how the machine
/// does at this moment and have nothing to do with what is measured.
///
/// - Locks of a mutex, of which each waits for the one before, say how fast the clock runs: a time
///   is noted in such locks, and said in nanoseconds of the run's median lock.
/// - Loads, of which many are under way at once, take up to twice as long when somebody else uses
///   the other half of the core, and the mutex does not. Those slices count beside which the loads
///   took least: a slice is left out for what happened beside it, never for its own result.
///
/// The calibration rows are measured in this way, too.
pub struct Harness {
    criterion: Criterion,
    machine: Machine,
    /// What was measured, by name, all rounds together.
    slices: BTreeMap<String, Vec<Slice>>,
    /// For the names that criterion sees, which have to differ.
    measured: usize,
}

struct Machine {
    mutex: Mutex<u64>,
    words: [AtomicU64; 2],
}

/// What the machine did at some moment.
#[derive(Clone, Copy)]
struct Look {
    /// Nanoseconds to lock and unlock.
    lock: f64,
    /// What the loads took, in locks.
    loads: f64,
}

#[derive(Clone, Copy)]
struct Slice {
    /// What one operation took, in locks.
    locks: f64,
    /// Nanoseconds of a lock beside it.
    lock: f64,
    /// What the loads took, in locks, before or after, whichever is more.
    crowd: f64,
}

/// Locks and unlocks the mutex, `n` times.
#[inline(never)]
pub fn lock(mutex: &Mutex<u64>, n: u64) {
    (0..n).for_each(|_| *black_box(mutex).lock().unwrap() += 1);
}

/// Compares two words, `n` times.
#[inline(never)]
pub fn load(words: &[AtomicU64; 2], n: u64) {
    for _ in 0..n {
        let words = black_box(words);
        black_box(words[0].load(Ordering::Acquire) == words[1].load(Ordering::Acquire));
    }
}

/// Nanoseconds for one of `n`.
fn time(n: u32, work: impl FnOnce(u64)) -> f64 {
    let began = Instant::now();
    work(n.into());
    began.elapsed().as_nanos() as f64 / f64::from(n)
}

impl Machine {
    fn look(&self) -> Look {
        let lock = time(LOOKS_AT_MUTEX, |n| self::lock(&self.mutex, n));
        Look { lock, loads: time(LOOKS_AT_LOADS, |n| load(&self.words, n)) / lock }
    }
}

impl Harness {
    pub fn new() -> Self {
        let criterion = Criterion::default()
            .sample_size(SAMPLES)
            .warm_up_time(Duration::from_millis(60))
            .measurement_time(Duration::from_millis(220))
            .nresamples(1001);
        let machine =
            Machine { mutex: Mutex::new(0), words: [AtomicU64::new(1), AtomicU64::new(2)] };
        Self { criterion, machine, slices: BTreeMap::new(), measured: 0 }
    }

    /// Nanoseconds for one operation of `work`, which does as many as it is asked for, from where
    /// it left off: now, and in earlier rounds under the same `name`.
    pub fn median(&mut self, name: &str, work: impl FnMut(u64)) -> f64 {
        self.measure(name, work);
        self.ns(name)
    }

    fn measure(&mut self, name: &str, mut work: impl FnMut(u64)) {
        self.measured += 1;
        let (machine, mut samples) = (&self.machine, Vec::new());
        self.criterion.bench_function(&format!("{} {name}", self.measured), |bencher| {
            let mut in_a_slice = 1;
            bencher.iter_custom(|n| {
                let (mut left, mut took, mut slices) = (n, Duration::ZERO, Vec::new());
                let mut before = machine.look();
                while left > 0 {
                    // Slices of one length, and no short one at the end.
                    let operations = left.div_ceil(left.div_ceil(in_a_slice));
                    let began = Instant::now();
                    work(operations);
                    let slice = began.elapsed();
                    let after = machine.look();
                    let (lock, ns) = (
                        (before.lock + after.lock) / 2.0,
                        slice.as_nanos() as f64 / operations as f64,
                    );
                    slices.push(Slice {
                        locks: ns / lock,
                        lock,
                        crowd: before.loads.max(after.loads),
                    });
                    (before, took, left) = (after, took + slice, left - operations);
                    in_a_slice = (SLICE.as_nanos() as f64 / ns).max(1.0) as u64;
                }
                samples.push(slices);
                took
            });
        });
        // The first ones are criterion's warm-up.
        let slices = samples.into_iter().rev().take(SAMPLES).flatten();
        self.slices.entry(name.into()).or_default().extend(slices);
    }

    fn ns(&self, name: &str) -> f64 {
        let all = self.slices.values().flatten().copied().collect();
        let lock = middle(quiet(all).map(|slice| slice.lock).collect());
        let of = self.slices.get(name).cloned().unwrap_or_default();
        middle(quiet(of).map(|slice| slice.locks).collect()) * lock
    }
}

/// Those in which the machine was least crowded.
fn quiet(mut slices: Vec<Slice>) -> impl Iterator<Item = Slice> {
    slices.sort_by(|a, b| a.crowd.total_cmp(&b.crowd));
    let count = slices.len().div_ceil(QUIET);
    slices.into_iter().take(count)
}

/// The median.
pub fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
