//! Measures whether those who wait for an invalidation leave it its time (C4).

#[path = "../../tests/support/fairness.rs"]
mod workload;

use crate::bounds::{self, Bound};
use crate::harness::middle;
use crate::support::processor::of_process;
use serde::Serialize;
use std::time::Duration;
use workload::{Abandoned, Host, Run, Waited, Waiters, abandoned, beside_readers, waited_for};

/// Invalidations of each configuration, and in how many runs.
const INVALIDATIONS: usize = 1000;
const RUNS: usize = 5;
/// How often a reader meets a future that is not polled.
const ABANDONED: usize = 25;
/// The library's patience with a future that is not polled.
const PATIENCE_MS: f64 = 20.0;

/// Invalidations beside readers that read all the time.
#[derive(Serialize)]
struct Beside {
    readers: String,
    invalidations: u64,
    lapses: u64,
    /// Medians of the runs.
    median_us: f64,
    p90_us: f64,
}

/// Invalidations that all readers wait for. Medians of the runs.
#[derive(Serialize)]
struct Waiting {
    waiters: String,
    /// Processor time of the process for each invalidation.
    processor_us: f64,
    /// What the waiters' own threads have of it.
    of_waiters_us: f64,
    /// Waits that could not be answered at once, of all readers, for each invalidation.
    waits: f64,
    /// Polls of one wait, if there are any.
    polls: Option<f64>,
    polls_p99: Option<f64>,
    lapses: u64,
}

#[derive(Default, Serialize)]
pub struct Fairness {
    beside: Vec<Beside>,
    waiting: Vec<Waiting>,
    pub rows: Vec<Bound>,
}

const HOSTS: [(Host, usize, &str); 8] = [
    (Host::Threads, 0, "none"),
    (Host::Threads, 1, "1 reader in block_on on a thread"),
    (Host::Threads, 8, "8 readers in block_on on threads"),
    (Host::Threads, 64, "64 readers in block_on on threads"),
    (Host::Pool, 8, "8 readers on a pool of 2 threads"),
    (Host::TokioOneThread, 8, "8 readers on tokio, current thread"),
    (Host::Tokio, 8, "8 readers on tokio, 2 threads"),
    (Host::Smol, 8, "8 readers on smol, 2 threads"),
];

const WAITERS: [(Waiters, &str); 5] = [
    (Waiters::Threads(0), "none"),
    (Waiters::Threads(8), "8 readers in block_on on threads"),
    (Waiters::Tasks(8), "8 readers, tasks of one other thread"),
    // What it takes to tell so many threads of an end, with or without the library.
    (Waiters::Woken(8), "not readers: 8 threads, each woken once"),
    (Waiters::Woken(1), "not readers: 1 thread, woken once"),
];

pub fn measure() -> Fairness {
    let mut fairness = Fairness::default();
    fairness.beside();
    fairness.waiting();
    for (by, name, bound) in [
        (
            Abandoned::BySameTask,
            "a reader behind a future that its own task does not poll, ms",
            1.0,
        ),
        (
            Abandoned::ByAnotherTask,
            "a reader behind a future that another task does not poll, ms",
            PATIENCE_MS + 5.0,
        ),
    ] {
        let took = middle((0..ABANDONED).map(|_| abandoned(by).as_secs_f64() * 1e3).collect());
        fairness.rows.push(Bound::new(name, "ms", bound, took));
    }
    fairness
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The value below which this part of them is.
fn quantile(mut values: Vec<f64>, at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get((values.len() as f64 * at) as usize).copied().unwrap_or(f64::NAN)
}

impl Fairness {
    fn beside(&mut self) {
        let mut runs: [Vec<Run>; HOSTS.len()] = Default::default();
        // In turns, because the machine changes its speed.
        for _ in 0..RUNS {
            for (runs, (host, readers, _)) in runs.iter_mut().zip(HOSTS) {
                runs.push(beside_readers(host, readers, INVALIDATIONS / RUNS));
            }
        }
        for (runs, (_, _, name)) in runs.into_iter().zip(HOSTS) {
            let of_runs = |at| {
                let times = |run: &Run| run.took.iter().copied().map(micros).collect();
                middle(runs.iter().map(|run| quantile(times(run), at)).collect())
            };
            let (median_us, p90_us) = (of_runs(0.5), of_runs(0.9));
            let mut all = Run::default();
            runs.into_iter().for_each(|run| all.add(run));
            let (invalidations, lapses) = (all.invalidations(), all.lapses);
            self.beside.push(Beside {
                readers: name.into(),
                invalidations,
                lapses,
                median_us,
                p90_us,
            });
            if name != "none" {
                let of_1000 = lapses as f64 * 1000.0 / invalidations as f64;
                self.rows.push(Bound::new(
                    format!("lapses in 1,000 beside {name}"),
                    "",
                    1.0,
                    of_1000,
                ));
            }
        }
        if let [alone, _, beside, ..] = &self.beside[..] {
            let median = Bound::new(
                "median beside 8 readers on threads, over without",
                "×",
                1.15,
                beside.median_us / alone.median_us,
            );
            let p90 = Bound::new(
                "p90 beside 8 readers on threads, over without",
                "×",
                1.5,
                beside.p90_us / alone.p90_us,
            );
            self.rows.extend([median, p90]);
        }
    }

    /// What is counted is said at [`waited_for`].
    fn waiting(&mut self) {
        if of_process().is_none() {
            println!("left out: the processor time of waiting, which cannot be asked for here");
            return;
        }
        let mut runs: [Vec<Waited>; WAITERS.len()] = Default::default();
        for _ in 0..RUNS {
            for (runs, (waiters, _)) in runs.iter_mut().zip(WAITERS) {
                runs.push(waited_for(waiters, INVALIDATIONS / RUNS));
            }
        }
        let each = (INVALIDATIONS / RUNS) as f64;
        for (runs, (_, name)) in runs.into_iter().zip(WAITERS) {
            let polls: Vec<f64> =
                runs.iter().flat_map(|run| &run.polls).map(|polls| *polls as f64).collect();
            self.waiting.push(Waiting {
                waiters: name.into(),
                processor_us: middle(
                    runs.iter()
                        .filter_map(|run| run.processor)
                        .map(|time| micros(time) / each)
                        .collect(),
                ),
                of_waiters_us: middle(
                    runs.iter().map(|run| micros(run.of_waiters) / each).collect(),
                ),
                waits: middle(runs.iter().map(|run| run.waits as f64 / each).collect()),
                polls: Some(quantile(polls.clone(), 0.5)).filter(|polls| !polls.is_nan()),
                polls_p99: Some(quantile(polls, 0.99)).filter(|polls| !polls.is_nan()),
                lapses: runs.iter().map(|run| run.lapses).sum(),
            });
        }
        if let [none, threads, tasks, ..] = &self.waiting[..] {
            for waiting in [threads, tasks] {
                let name = format!("processor time beside {}, over without", waiting.waiters);
                self.rows.push(Bound::new(
                    name,
                    "×",
                    2.0,
                    waiting.processor_us / none.processor_us,
                ));
            }
        }
    }

    pub fn print(&self) {
        println!(
            "\n{:<58} {:>9} {:>9} {:>9} {:>9}",
            "invalidations, pass of 1 ms, beside", "number", "lapses", "median µs", "p90 µs"
        );
        for Beside { readers, invalidations, lapses, median_us, p90_us } in &self.beside {
            println!("{readers:<58} {invalidations:>9} {lapses:>9} {median_us:>9.0} {p90_us:>9.0}");
        }
        println!(
            "\n{:<58} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "each invalidation, and who waits for it",
            "cpu µs",
            "theirs",
            "waits",
            "polls",
            "p99 polls",
            "lapses"
        );
        for Waiting { waiters, processor_us, of_waiters_us, waits, polls, polls_p99, lapses } in
            &self.waiting
        {
            let [polls, p99] = [polls, polls_p99]
                .map(|polls| polls.map_or_else(|| "-".into(), |polls| format!("{polls:.0}")));
            println!(
                "{waiters:<58} {processor_us:>9.1} {of_waiters_us:>9.1} {waits:>9.2} {polls:>9} {p99:>9} {lapses:>9}"
            );
        }
        bounds::print("fairness", &self.rows);
    }
}
