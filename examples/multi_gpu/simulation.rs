//! One run: a program's recording, a number of GPUs, a way to wait.

use crate::driver::Mirror;
use crate::fault::Fault;
use crate::gpu::Gpu;
use crate::memory::{Access, Action, Change};
use crate::oracle::{Oracle, PAGE, pages};
use crate::profile::Model;
use crate::record::{Lane, Record};
use crate::runtime::{Flag, Runtime, run_real, run_virtual};
use crate::schedule::{Plan, at_once};
use crate::tally::{Row, Tally};
use clap::ValueEnum;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use shootdown::{AddressRange, AddressSpace, Event, RangeSet, Subscription};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// How devices are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Before Linux 7.1: for each GPU, start and wait
    SinglePass,
    /// Linux 7.1: start all; then, in order, each one's finish, which blocks and does what is left
    TwoPass,
    /// The proposal of August 2025: start all; then go round those that are not done, and block for
    /// each until its present step is
    RoundRobin,
    /// This library: start all; then whoever is ready goes on
    #[value(alias = "multi-pass")]
    #[serde(alias = "multi-pass")]
    PollDriven,
}

impl Mode {
    pub const ALL: [Self; 4] =
        [Self::SinglePass, Self::TwoPass, Self::RoundRobin, Self::PollDriven];

    pub fn name(self) -> &'static str {
        match self {
            Self::SinglePass => "single-pass",
            Self::TwoPass => "two-pass",
            Self::RoundRobin => "round-robin",
            Self::PollDriven => "poll-driven",
        }
    }
}

/// What a run is made of, beside the recording.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub model: Model,
    pub gpus: usize,
    pub mode: Mode,
    pub fault: Option<Fault>,
    pub real_time: bool,
    /// Threads and processes of the recording run side by side.
    pub threads: bool,
    /// GPUs mirror all address spaces, not one.
    pub all_processes: bool,
    /// Stop after so many invalidations that a device had work for.
    pub most_invalidations: Option<u64>,
}

/// One invalidation, GPU by GPU; times are since the run began.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    pub lanes: Vec<Lane>,
    pub began: Duration,
    pub ended: Duration,
    pub event: Option<Event>,
}

pub struct Outcome {
    pub row: Row,
    /// The invalidations in which every GPU took part, by number.
    pub timelines: BTreeMap<u64, Timeline>,
}

/// Runs a recording to its end; `progress` hears of each call that was replayed.
pub fn run(
    plan: &Arc<Plan>,
    settings: Settings,
    progress: impl Fn() + Send + Sync + 'static,
) -> std::io::Result<Outcome> {
    let plan = plan.clone();
    let main =
        move |runtime: Runtime| World::new(runtime, settings, plan, Box::new(progress)).replay();
    if settings.real_time { run_real(main) } else { Ok(run_virtual(main)) }
}

/// A mapping that the GPUs mirror.
struct Mapping {
    /// Bytes of it that are still mapped.
    left: u64,
    range: AddressRange,
    mirrors: Vec<Arc<Subscription<Mirror>>>,
}

struct Space {
    address_space: AddressSpace,
    mappings: Vec<Mapping>,
    /// Invalidations of it under way.
    active: usize,
    released: bool,
}

/// All that runs.
struct World {
    settings: Settings,
    runtime: Runtime,
    plan: Arc<Plan>,
    progress: Box<dyn Fn() + Send + Sync>,
    oracle: Arc<Oracle>,
    gpus: Vec<Arc<Gpu>>,
    spaces: Mutex<BTreeMap<usize, Space>>,
    tally: Mutex<Tally>,
    /// Which calls are over.
    over: Vec<Flag>,
    /// Threads that have begun.
    begun: Mutex<Vec<Flag>>,
    stop: AtomicBool,
    /// Where in the recording the program is, in ns.
    at: AtomicU64,
    unmappings: AtomicU64,
}

/// Numbers of what the kernel does on its own account; those below are the program's.
const RECLAIM: u64 = 1 << 40;

/// The kernel's threads, which go through the same mappings: the last one writes pages back.
const RECLAIMERS: u64 = 3;

/// How often each comes to a page before it goes to the next.
const AGAIN: u64 = 4;

impl World {
    fn new(
        runtime: Runtime,
        settings: Settings,
        plan: Arc<Plan>,
        progress: Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Self> {
        let oracle = Arc::new(Oracle::default());
        let gpu = |id| {
            let fault = settings.fault.filter(|_| id == 0 || id + 1 == settings.gpus);
            Gpu::new(id, &runtime, settings.model, settings.mode, &oracle, fault)
        };
        let gpus = (0..settings.gpus).map(gpu).collect();
        Arc::new(Self {
            settings,
            gpus,
            oracle,
            progress,
            spaces: Mutex::default(),
            tally: Mutex::new(Tally::new(if settings.real_time {
                Duration::ZERO
            } else {
                settings.model.costs.submit
            })),
            over: plan.calls.iter().map(|_| Flag::default()).collect(),
            begun: Mutex::default(),
            stop: AtomicBool::new(false),
            at: AtomicU64::new(0),
            unmappings: AtomicU64::new(0),
            plan,
            runtime,
        })
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap()
    }

    fn sleep(&self, time: Duration) {
        if !time.is_zero() {
            self.runtime.block_on(self.runtime.sleep(time), Duration::ZERO);
        }
    }

    fn wait(&self, flag: &Flag) {
        self.runtime.block_on(flag.wait(), Duration::ZERO);
    }

    fn replay(self: Arc<Self>) -> Outcome {
        let threads = if self.settings.model.reclaim.is_zero() { 0 } else { RECLAIMERS };
        let reclaim = |thread| {
            let world = self.clone();
            self.runtime.thread(move || world.reclaim(thread))
        };
        let kernel: Vec<Flag> = (0..threads).map(reclaim).collect();
        if self.settings.threads {
            for task in &self.plan.first {
                // One that nobody started begins when the recording comes to it.
                if let Some(before) =
                    self.plan.tasks.get(task).and_then(|calls| calls.first()?.checked_sub(1))
                {
                    self.wait(&self.over[before]);
                }
                self.begin(*task);
            }
            let mut waited = 0;
            // Those that begin meanwhile are waited for, too.
            while let Some(ended) = { self.begun.lock().unwrap().get(waited).cloned() } {
                self.wait(&ended);
                waited += 1;
            }
        } else {
            let mut last = Duration::ZERO;
            for call in 0..self.plan.calls.len() {
                self.sleep(self.plan.calls[call].at.saturating_sub(last));
                last = self.plan.calls[call].at;
                if !self.call(call) {
                    break;
                }
            }
        }
        // What the recording did not end: devices keep no mapping of a program that is gone.
        let rest =
            if self.stop.load(Ordering::Relaxed) { Vec::new() } else { self.plan.rest.clone() };
        for (actions, number) in at_once(&rest, self.plan.batch).zip(RECLAIM / 2..) {
            self.act(actions, number, self.now_in_recording());
        }
        self.stop.store(true, Ordering::Relaxed);
        kernel.iter().for_each(|thread| self.wait(thread));
        for space in self.spaces.lock().unwrap().values() {
            self.tally().space(&space.address_space.stats());
        }
        self.gpus.iter().for_each(|gpu| gpu.stop());
        let outcome = self.tally().outcome(&self.settings, &self.gpus, &self.oracle);
        // They hold the mirrors, and the mirrors them.
        self.spaces.lock().unwrap().clear();
        outcome
    }

    fn now_in_recording(&self) -> Duration {
        Duration::from_nanos(self.at.load(Ordering::Relaxed))
    }

    /// Starts a thread of the program.
    fn begin(self: &Arc<Self>, task: u32) {
        let world = self.clone();
        let ended = self.runtime.thread(move || {
            let calls = world.plan.tasks.get(&task).cloned().unwrap_or_default();
            let mut last = world.now_in_recording();
            for index in calls {
                let call = &world.plan.calls[index];
                world.sleep(call.at.saturating_sub(last));
                last = call.at;
                for earlier in &call.after {
                    world.wait(&world.over[*earlier]);
                }
                if !world.call(index) {
                    return;
                }
            }
        });
        self.begun.lock().unwrap().push(ended);
    }

    /// Carries out one call; `false` when the run is to end.
    fn call(self: &Arc<Self>, index: usize) -> bool {
        let call = &self.plan.calls[index];
        let ends = || self.stop.load(Ordering::Relaxed);
        self.at.fetch_max(u64::try_from(call.at.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        for (actions, number) in at_once(&call.actions, self.plan.batch).zip(index as u64 * 1024..)
        {
            if ends() {
                break;
            }
            self.act(actions, number, call.at);
        }
        self.over[index].set();
        if let Some(task) = call.begins.filter(|_| self.settings.threads && !ends()) {
            self.begin(task);
        }
        (self.progress)();
        !ends()
    }

    /// What is done at once: one action, or changes that are invalidated together.
    fn act(&self, actions: &[Action], number: u64, at: Duration) {
        let changes = actions.iter().filter_map(|action| match action {
            Action::Invalidate { range, then, .. } => Some((*range, then)),
            _ => None,
        });
        let Some(first) = actions.first() else { return };
        match *first {
            Action::Created { space, ref mappings } => {
                let clock = self.runtime.clone();
                let builder = AddressSpace::builder().clock(move || clock.now());
                let builder = if self.settings.mode == Mode::SinglePass {
                    builder.pass_budget(0)
                } else {
                    builder
                };
                let created = Space {
                    address_space: builder.build(),
                    mappings: Vec::new(),
                    active: 0,
                    released: false,
                };
                self.spaces.lock().unwrap().insert(space, created);
                mappings.iter().for_each(|(range, access)| self.map(space, *range, *access));
            }
            Action::Mapped { space, range, access } => self.map(space, range, access),
            Action::Invalidate { space, event, .. } => {
                self.invalidate(
                    space,
                    event,
                    &changes.collect::<Vec<_>>(),
                    &Record::new(number, at),
                );
            }
            Action::Released { space } => self.release(space, &Record::new(number, at)),
        }
    }

    /// A new mapping: every GPU registers a notifier for it and begins to work on it.
    fn map(&self, space: usize, range: AddressRange, access: Access) {
        self.oracle.map(space, range, access);
        if !self.settings.all_processes && space != self.plan.followed {
            return;
        }
        let Some(address_space) =
            self.spaces.lock().unwrap().get(&space).map(|space| space.address_space.clone())
        else {
            return;
        };
        let mut mirrors = Vec::with_capacity(self.gpus.len());
        for gpu in &self.gpus {
            let Ok(mirror) = address_space.insert(range, Mirror::new(gpu, space)) else { return };
            let mirror = Arc::new(mirror);
            gpu.attach(mirror.clone());
            mirrors.push(mirror);
        }
        let mapping = Mapping { left: range.len().unwrap_or(u64::MAX), range, mirrors };
        if let Some(space) = self.spaces.lock().unwrap().get_mut(&space) {
            space.mappings.push(mapping);
        }
    }

    /// An invalidation of a space begins.
    fn enter(&self, space: usize) -> Option<AddressSpace> {
        let mut spaces = self.spaces.lock().unwrap();
        let space = spaces.get_mut(&space)?;
        space.active += 1;
        if space.active > 1 {
            self.tally().overlap();
        }
        Some(space.address_space.clone())
    }

    /// Invalidates the ranges of `changes` at once, and makes these.
    fn invalidate(
        &self,
        space: usize,
        event: Event,
        changes: &[(AddressRange, &Change)],
        record: &Arc<Record>,
    ) {
        let Some(address_space) = self.enter(space) else { return };
        let skips = || match (self.settings.fault, event) {
            (Some(Fault::SkipUnmap), Event::Unmap) => {
                self.unmappings.fetch_add(1, Ordering::Relaxed) % 2 == 1
            }
            (Some(Fault::SkipClear), Event::Clear) => true,
            _ => false,
        };
        let mut guard = None;
        if let Ok(ranges) =
            RangeSet::new(changes.iter().map(|(range, _)| *range).filter(|_| !skips()))
        {
            let began = self.runtime.now();
            let held = record.during(|| {
                // Waking is charged where devices block it; who waits in the task is woken here.
                self.runtime.block_on(
                    address_space.invalidate_all(ranges, event),
                    self.settings.model.costs.wake,
                )
            });
            self.note(record, event, held.hits(), began);
            if self.settings.fault == Some(Fault::EarlyEnd) {
                drop(held);
                self.runtime.work(self.settings.model.fault * 2);
            } else {
                guard = Some(held);
            }
        }
        // The memory changes while the guard is held.
        let half = self.settings.model.change / 2;
        for (range, then) in changes {
            self.runtime.work(half);
            self.oracle.change(space, *range, then);
            // A device that can still read it does.
            self.gpus.iter().for_each(|gpu| gpu.read_what_is_mapped(pages(space, *range)));
            self.runtime.work(half);
        }
        drop(guard);
        self.leave(space, changes);
    }

    /// An invalidation of a space is over. Mappings of which nothing is left are no longer
    /// mirrored.
    fn leave(&self, space: usize, changes: &[(AddressRange, &Change)]) {
        let mut spaces = self.spaces.lock().unwrap();
        let Some(of_space) = spaces.get_mut(&space) else { return };
        of_space.active -= 1;
        let (mut gone, mut unmaps) = (Vec::new(), false);
        for (_, then) in changes {
            let Change::Unmapped(parts) = then else { continue };
            unmaps = true;
            let mut kept = Vec::with_capacity(of_space.mappings.len());
            for mut mapping in of_space.mappings.drain(..) {
                for part in parts.iter().filter_map(|part| mapping.range.intersection(*part)) {
                    mapping.left = mapping.left.saturating_sub(part.len().unwrap_or(u64::MAX));
                }
                if mapping.left == 0 { gone.push(mapping) } else { kept.push(mapping) }
            }
            of_space.mappings = kept;
        }
        let over = of_space.released && of_space.active == 0 && unmaps;
        let ended = if over { spaces.remove(&space) } else { None };
        drop(spaces);
        if let Some(ended) = ended {
            self.tally().space(&ended.address_space.stats());
            gone.extend(ended.mappings);
        }
        for mapping in gone {
            self.gpus.iter().zip(&mapping.mirrors).for_each(|(gpu, mirror)| gpu.detach(mirror));
        }
    }

    fn release(&self, space: usize, record: &Arc<Record>) {
        let Some(address_space) = self.enter(space) else { return };
        let (mirrored, began) = (address_space.len(), self.runtime.now());
        record.during(|| {
            self.runtime.block_on(address_space.release(), self.settings.model.costs.wake)
        });
        self.note(record, Event::Release, mirrored, began);
        let mut spaces = self.spaces.lock().unwrap();
        if let Some(space) = spaces.get_mut(&space) {
            space.active -= 1;
            // The memory goes with the unmapping that follows.
            space.released = true;
        }
    }

    /// An invalidation has been waited for.
    fn note(&self, record: &Arc<Record>, event: Event, hits: usize, began: Duration) {
        let ended = self.runtime.now();
        let mut tally = self.tally();
        if record.number >= RECLAIM {
            tally.reclaimed();
            return;
        }
        tally.invalidated(record, event, hits, self.settings.gpus, (began, ended));
        if self.settings.most_invalidations.is_some_and(|most| tally.with_work >= most) {
            self.stop.store(true, Ordering::Relaxed);
            // Nobody waits for a call that does not come.
            self.over.iter().for_each(Flag::set);
        }
    }

    /// The kernel, under pressure: takes pages away from the program, and takes them again when
    /// devices have come back to them; and writes some back, for which it write-protects them.
    fn reclaim(&self, thread: u64) {
        let mut random = StdRng::seed_from_u64(self.settings.model.seed ^ (0x5ec1_a1e0 + thread));
        let mut pause =
            |mean: Duration| self.sleep(mean.mul_f64(-f64::ln(1.0 - random.random::<f64>())));
        for turn in 0.. {
            pause(if turn % AGAIN == 0 {
                self.settings.model.reclaim
            } else {
                self.settings.model.fault
            });
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // Each at another page.
            let Some((space, page)) = self.resident(turn / AGAIN + thread) else { continue };
            let event = if thread == RECLAIMERS - 1 { Event::ProtectionPage } else { Event::Clear };
            let record = Record::new(RECLAIM + turn * RECLAIMERS + thread, self.now_in_recording());
            self.invalidate(space, event, &[(page, &Change::Discarded)], &record);
        }
    }

    /// Some page that devices work on: the next one of a mapping, and after its last one the first
    /// of the next.
    fn resident(&self, at: u64) -> Option<(usize, AddressRange)> {
        let spaces = self.spaces.lock().unwrap();
        let mirrored: Vec<(usize, AddressRange)> = spaces
            .iter()
            .filter(|(_, space)| !space.released)
            .flat_map(|(id, space)| space.mappings.iter().map(|mapping| (*id, mapping.range)))
            .collect();
        let resident = self.settings.model.resident_pages.max(1);
        let (space, range) =
            *mirrored.get(usize::try_from(at / resident).ok()?.checked_rem(mirrored.len())?)?;
        let (first, count) = (range.start() / PAGE, range.last() / PAGE - range.start() / PAGE + 1);
        let page = first + (at % resident * count / resident).min(count - 1);
        Some((space, AddressRange::new(page * PAGE, PAGE).ok()?))
    }
}
