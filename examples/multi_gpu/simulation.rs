//! One run: a program's recording, a number of GPUs, a mode.

use crate::gpu::{Command, Current, Gpu, Lane, Mirror, Model, Oracle};
use crate::memory::{Action, Change, Program};
use crate::recording::Recording;
use crate::runtime::{Runtime, run_real, run_virtual};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use shootdown::{AddressRange, AddressSpace, Event, Subscription};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How passes are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// A pass budget of zero: the kernel before the patch.
    SinglePass,
    MultiPass,
}

/// What a run is made of, beside the recording.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub model: Model,
    pub gpus: usize,
    pub mode: Mode,
    /// The first GPU's driver does not wait for its device.
    pub skip_wait: bool,
    pub real_time: bool,
    /// The program pauses between two calls as long as in the recording, but no longer than this.
    pub longest_pause: Duration,
    /// Stop after so many invalidations.
    pub most_invalidations: Option<u64>,
}

/// A line of the result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub gpus: usize,
    pub mode: Mode,
    /// Those that reached a notifier.
    pub invalidations: u64,
    pub notifier_calls: u64,
    pub dma_accesses: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
    /// The time that the program waited for invalidations, in all.
    pub total_ns: u64,
    /// `total_ns` over the time that the slowest GPU of each invalidation took, in all.
    pub ideal_ratio: f64,
    pub stale_accesses: u64,
    /// Latencies in ns at each percent of the invalidations, from 0 to 100.
    #[serde(default)]
    pub percentiles_ns: Vec<u64>,
}

/// One invalidation, GPU by GPU; times are since it began.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    pub lanes: Vec<Lane>,
    pub began: Duration,
    pub ended: Duration,
    pub event: Option<Event>,
}

pub struct Outcome {
    pub row: Row,
    /// The invalidations in which every GPU took part and one preempted, by number.
    pub timelines: BTreeMap<u64, Timeline>,
}

/// Runs a recording to its end; `progress` hears of each call that was replayed.
pub fn run(
    recording: &Arc<Recording>,
    settings: Settings,
    progress: impl Fn(u64) + Send + Sync + 'static,
) -> std::io::Result<Outcome> {
    let recording = recording.clone();
    let main = move |runtime: Runtime| -> std::pin::Pin<Box<dyn Future<Output = Outcome> + Send>> {
        Box::pin(async move { Simulation::new(runtime, settings).replay(&recording, &progress).await })
    };
    if settings.real_time { run_real(main) } else { Ok(run_virtual(main)) }
}

/// A mapping that the GPUs mirror.
struct Mapping {
    /// Bytes of it that are still mapped.
    left: u64,
    range: AddressRange,
    mirrors: Vec<Arc<Subscription<Mirror>>>,
}

struct Simulation {
    settings: Settings,
    runtime: Runtime,
    oracle: Arc<Oracle>,
    current: Arc<Current>,
    gpus: Vec<Arc<Gpu>>,
    spaces: BTreeMap<usize, (AddressSpace, Vec<Mapping>)>,
    latencies: Histogram<u64>,
    total: Duration,
    ideal: Duration,
    invalidations: u64,
    timelines: BTreeMap<u64, Timeline>,
}

impl Simulation {
    fn new(runtime: Runtime, settings: Settings) -> Self {
        let (oracle, current) = (Arc::new(Oracle::default()), Arc::new(Current::default()));
        let gpu = |id| Gpu::new(id, &runtime, settings.model, &oracle, &current, settings.skip_wait && id == 0);
        let gpus = (0..settings.gpus).map(gpu).collect();
        Self {
            settings,
            gpus,
            oracle,
            current,
            runtime,
            spaces: BTreeMap::new(),
            latencies: Histogram::new(3).expect("three significant digits are allowed"),
            total: Duration::ZERO,
            ideal: Duration::ZERO,
            invalidations: 0,
            timelines: BTreeMap::new(),
        }
    }

    async fn replay(mut self, recording: &Recording, progress: &(impl Fn(u64) + Send + Sync)) -> Outcome {
        let mut program = Program::default();
        let mut last_ns = 0;
        for (at, call) in (0..).zip(&recording.calls) {
            let pause = Duration::from_nanos(call.at_ns.saturating_sub(last_ns));
            last_ns = last_ns.max(call.at_ns);
            if !pause.is_zero() {
                self.runtime.sleep(pause.min(self.settings.longest_pause)).await;
            }
            for action in program.run(call) {
                self.act(action).await;
            }
            progress(at + 1);
            if self.settings.most_invalidations.is_some_and(|most| self.invalidations >= most) {
                break;
            }
        }
        // What the recording did not end: devices keep no mapping of a program that is gone.
        for action in program.end() {
            self.act(action).await;
        }
        self.gpus.iter().for_each(|gpu| gpu.stop());
        self.outcome()
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Created { space, mappings } => {
                let clock = self.runtime.clone();
                let builder = AddressSpace::builder().clock(move || clock.now());
                let builder = if self.settings.mode == Mode::SinglePass { builder.pass_budget(0) } else { builder };
                self.spaces.insert(space, (builder.build(), Vec::new()));
                mappings.into_iter().for_each(|(range, _)| self.map(space, range));
            }
            Action::Mapped { space, range, .. } => self.map(space, range),
            Action::Invalidate { space, range, event, then } => {
                let gone = if let Change::Unmapped(gone) = then { gone } else { Vec::new() };
                self.invalidate(space, range, event, &gone).await;
            }
            Action::Released { space } => {
                self.invalidate(space, AddressRange::ALL, Event::Release, &[]).await;
                for mapping in self.spaces.remove(&space).into_iter().flat_map(|(_, mappings)| mappings) {
                    self.oracle.unmap(space, mapping.range);
                    self.forget(mapping);
                }
            }
        }
    }

    /// A new mapping: every GPU registers a notifier for it and begins to work on it.
    fn map(&mut self, space: usize, range: AddressRange) {
        self.oracle.map(space, range);
        let Some((address_space, mappings)) = self.spaces.get_mut(&space) else { return };
        let mut mirrors = Vec::with_capacity(self.gpus.len());
        for gpu in &self.gpus {
            let Ok(mirror) = address_space.insert(range, gpu.mirror(space)) else { return };
            let mirror = Arc::new(mirror);
            gpu.attach(mirror.clone());
            mirrors.push(mirror);
        }
        let left = range.len().unwrap_or(u64::MAX);
        mappings.push(Mapping { left, range, mirrors });
    }

    async fn invalidate(&mut self, space: usize, range: AddressRange, event: Event, gone: &[AddressRange]) {
        let Some((address_space, _)) = self.spaces.get(&space) else { return };
        let address_space = address_space.clone();
        self.current.begin(self.invalidations);
        let began = self.runtime.now();
        if event == Event::Release {
            let mirrored = !address_space.is_empty();
            address_space.release().await;
            if mirrored {
                self.handed_out(space, range, event, began);
            }
        } else {
            let guard = address_space.invalidate(range, event).await;
            if guard.hits() > 0 {
                self.handed_out(space, range, event, began);
            }
            // The memory changes while the guard is held.
            gone.iter().for_each(|part| self.oracle.unmap(space, *part));
            drop(guard);
        }
        let Some((_, mappings)) = self.spaces.get_mut(&space) else { return };
        let mut kept = Vec::with_capacity(mappings.len());
        let mut dead = Vec::new();
        for mut mapping in mappings.drain(..) {
            for part in gone.iter().filter_map(|part| mapping.range.intersection(*part)) {
                mapping.left = mapping.left.saturating_sub(part.len().unwrap_or(u64::MAX));
            }
            if mapping.left == 0 { dead.push(mapping) } else { kept.push(mapping) }
        }
        *mappings = kept;
        dead.into_iter().for_each(|mapping| self.forget(mapping));
    }

    /// The guard has been handed out: what the invalidation took, and what it would have at best.
    fn handed_out(&mut self, space: usize, range: AddressRange, event: Event, began: Duration) {
        let ended = self.runtime.now();
        self.oracle.handed_out(space, range);
        let lanes = self.current.lanes();
        // What each device worked for it; one that is not waited for does not count.
        let mut work = vec![Duration::ZERO; self.gpus.len()];
        for lane in lanes.iter().filter(|lane| !(self.settings.skip_wait && lane.gpu == 0)) {
            work[lane.gpu] += lane.done.saturating_sub(lane.began);
        }
        self.invalidations += 1;
        self.ideal += work.into_iter().max().unwrap_or_default();
        self.total += ended - began;
        // Within the histogram's range, which grows with its values.
        let _ = self.latencies.record(u64::try_from((ended - began).as_nanos()).unwrap_or(u64::MAX));
        let preempts = lanes.iter().any(|lane| lane.command == Command::Preempt);
        if lanes.len() == self.gpus.len() && preempts {
            self.timelines.insert(self.invalidations, Timeline { lanes, began, ended, event: Some(event) });
        }
    }

    fn forget(&self, mapping: Mapping) {
        for (gpu, mirror) in self.gpus.iter().zip(&mapping.mirrors) {
            gpu.detach(mirror);
        }
    }

    fn outcome(self) -> Outcome {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let ideal_ratio = if self.ideal.is_zero() { 1.0 } else { self.total.as_secs_f64() / self.ideal.as_secs_f64() };
        let row = Row {
            gpus: self.settings.gpus,
            mode: self.settings.mode,
            invalidations: self.invalidations,
            notifier_calls: self.gpus.iter().map(|gpu| gpu.calls()).sum(),
            dma_accesses: self.oracle.accesses(),
            p50_ns: self.latencies.value_at_quantile(0.5),
            p99_ns: self.latencies.value_at_quantile(0.99),
            max_ns: self.latencies.max(),
            total_ns: nanos(self.total),
            ideal_ratio,
            stale_accesses: self.oracle.stale(),
            percentiles_ns: (0..=100).map(|percent| self.latencies.value_at_percentile(f64::from(percent))).collect(),
        };
        Outcome { row, timelines: self.timelines }
    }
}
