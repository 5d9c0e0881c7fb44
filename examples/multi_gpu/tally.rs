//! What a run counts, and the line of the result that becomes of it.

use crate::gpu::Gpu;
use crate::oracle::Oracle;
use crate::record::{Lane, Record};
use crate::simulation::{Mode, Outcome, Settings, Timeline};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use shootdown::{Event, Stats};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A line of the result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub gpus: usize,
    pub mode: Mode,
    /// The program's invalidations that reached a notifier.
    pub invalidations: u64,
    /// Those of them that a device had work for. Latencies are of these.
    #[serde(default)]
    pub with_work: u64,
    /// The program's invalidations that reached no notifier.
    #[serde(default)]
    pub unheard: u64,
    /// Pages that the kernel took away meanwhile, each with an invalidation.
    #[serde(default)]
    pub reclaims: u64,
    /// Invalidations that began while another one of the same address space was under way.
    #[serde(default)]
    pub overlaps: u64,
    /// Page faults of devices that came to install what was no longer true, and started over.
    #[serde(default)]
    pub collisions: u64,
    /// Page faults of devices that waited for an invalidation.
    #[serde(default)]
    pub waits: u64,
    /// First passes that waited at once, because the notifier's one `finish` was in use (two-pass).
    #[serde(default)]
    pub finish_in_use: u64,
    pub notifier_calls: u64,
    pub dma_accesses: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
    /// The time that the program waited for invalidations, in all.
    pub total_ns: u64,
    /// The time that it would have waited if each GPU had had nothing else to do, had gone on the
    /// moment it could, and no thread had had to be woken.
    #[serde(default)]
    pub ideal_ns: u64,
    /// `total_ns` over `ideal_ns`.
    pub ideal_ratio: f64,
    pub stale_accesses: u64,
    /// Latencies in ns at each percent of the invalidations, from 0 to 100.
    #[serde(default)]
    pub percentiles_ns: Vec<u64>,
}

/// What has been counted so far.
pub struct Tally {
    /// The processor's time for a further step.
    submit: Duration,
    latencies: Histogram<u64>,
    total: Duration,
    ideal: Duration,
    invalidations: u64,
    pub with_work: u64,
    unheard: u64,
    reclaims: u64,
    overlaps: u64,
    collisions: u64,
    waits: u64,
    timelines: BTreeMap<u64, Timeline>,
}

impl Tally {
    pub fn new(submit: Duration) -> Self {
        Self {
            submit,
            latencies: Histogram::new(3).expect("three significant digits are allowed"),
            total: Duration::ZERO,
            ideal: Duration::ZERO,
            invalidations: 0,
            with_work: 0,
            unheard: 0,
            reclaims: 0,
            overlaps: 0,
            collisions: 0,
            waits: 0,
            timelines: BTreeMap::new(),
        }
    }

    pub fn overlap(&mut self) {
        self.overlaps += 1;
    }

    pub fn reclaimed(&mut self) {
        self.reclaims += 1;
    }

    /// A space is gone.
    pub fn space(&mut self, stats: &Stats) {
        self.collisions += stats.collisions;
        self.waits += stats.waits;
    }

    /// The program has waited for an invalidation.
    pub fn invalidated(
        &mut self,
        record: &Record,
        event: Event,
        hits: usize,
        gpus: usize,
        (began, ended): (Duration, Duration),
    ) {
        if hits == 0 {
            self.unheard += 1;
            return;
        }
        self.invalidations += 1;
        let lanes = record.lanes();
        if lanes.is_empty() {
            return;
        }
        self.with_work += 1;
        self.ideal += self.at_best(&lanes);
        self.total += ended - began;
        // Within the histogram's range, which grows with its values.
        let _ = self.latencies.record(nanos(ended - began));
        if lanes.len() == gpus {
            self.timelines
                .insert(record.number, Timeline { lanes, began, ended, event: Some(event) });
        }
    }

    /// First passes come one after the other, since one thread calls them; then each GPU goes on by
    /// itself, and has nothing else to do.
    fn at_best(&self, lanes: &[Lane]) -> Duration {
        let mut first_passes = Duration::ZERO;
        let chain = |lane: &Lane| {
            first_passes += lane.cost;
            let steps: Duration = lane.steps.iter().map(|step| step.latency).sum();
            let further = u32::try_from(lane.steps.len().saturating_sub(1)).unwrap_or(u32::MAX);
            first_passes + steps + further * self.submit
        };
        lanes.iter().map(chain).max().unwrap_or_default()
    }

    pub fn outcome(
        &mut self,
        settings: &Settings,
        gpus: &[std::sync::Arc<Gpu>],
        oracle: &Oracle,
    ) -> Outcome {
        let ideal_ratio = if self.ideal.is_zero() {
            1.0
        } else {
            self.total.as_secs_f64() / self.ideal.as_secs_f64()
        };
        let sum = |count: fn(&Gpu) -> u64| gpus.iter().map(|gpu| count(gpu)).sum();
        let row = Row {
            gpus: settings.gpus,
            mode: settings.mode,
            invalidations: self.invalidations,
            with_work: self.with_work,
            unheard: self.unheard,
            reclaims: self.reclaims,
            overlaps: self.overlaps,
            collisions: self.collisions,
            waits: self.waits,
            finish_in_use: sum(|gpu| gpu.in_use.load(Ordering::Relaxed)),
            notifier_calls: sum(|gpu| gpu.first_passes.load(Ordering::Relaxed)),
            dma_accesses: oracle.accesses(),
            p50_ns: self.latencies.value_at_quantile(0.5),
            p99_ns: self.latencies.value_at_quantile(0.99),
            max_ns: self.latencies.max(),
            total_ns: nanos(self.total),
            ideal_ns: nanos(self.ideal),
            ideal_ratio,
            stale_accesses: oracle.stale(),
            percentiles_ns: (0..=100)
                .map(|percent| self.latencies.value_at_percentile(f64::from(percent)))
                .collect(),
        };
        Outcome { row, timelines: std::mem::take(&mut self.timelines) }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
