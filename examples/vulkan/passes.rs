//! One invalidation and several devices that are at work: waited for one after the other, and all
//! at once.
#![forbid(unsafe_code)]

use crate::gpu::{Gpu, Import};
use crate::options::{Fault, Options, Work};
use crate::problem::Problem;
use crate::vulkan::{Card, Vulkan};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use shootdown::source::OwnedMapping;
use shootdown::{
    AddressRange, AddressSpace, DriverLock, IntervalNotifier, Invalidation, PassFuture,
    RetryBudget, Subscription, Timeline, WouldBlock,
};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How devices are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// A pass budget of 0.
    OneByOne,
    /// No budget.
    AllAtOnce,
}

impl Mode {
    pub const BOTH: [Self; 2] = [Self::OneByOne, Self::AllAtOnce];

    pub fn name(self) -> &'static str {
        match self {
            Self::OneByOne => "one after the other",
            Self::AllAtOnce => "all at once",
        }
    }
}

#[derive(Serialize)]
pub struct Row {
    pub devices: usize,
    pub mode: Mode,
    /// Medians: from the beginning of the invalidation until the memory had changed; the waits for
    /// the devices, added, and the longest of them, each from the device's first pass to its end.
    pub total_ns: u64,
    pub sum_ns: u64,
    pub slowest_ns: u64,
    /// Words of the memory after the change that devices had read.
    pub stale_words: u64,
    /// Devices whose work before their first pass was not done when the change returned.
    pub unfinished: u64,
    /// First passes that were called while another device was waited for.
    pub overlapping: u64,
}

#[derive(Serialize)]
pub struct Passes {
    pub work: Work,
    pub work_ms: u64,
    pub depth: u8,
    pub repeats: u16,
    /// Of the memory.
    pub bytes: usize,
    pub rows: Vec<Row>,
}

impl Passes {
    pub fn row(&self, devices: usize, mode: Mode) -> Option<&Row> {
        self.rows.iter().find(|row| row.devices == devices && row.mode == mode)
    }

    pub fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for row in &self.rows {
            let mut fail = |what: String| {
                failures.push(format!("{} devices, {}: {what}", row.devices, row.mode.name()))
            };
            if row.stale_words > 0 {
                fail(format!(
                    "devices have read {} words of memory that had changed",
                    row.stale_words
                ));
            }
            if row.unfinished > 0 {
                fail(format!(
                    "{} times the memory had changed before a device's work was done",
                    row.unfinished
                ));
            }
            if row.mode == Mode::OneByOne && row.overlapping > 0 {
                fail(format!(
                    "{} first passes were called while another device was waited for",
                    row.overlapping
                ));
            }
        }
        // Work that the host ends takes its time whatever the processors do.
        let most = self
            .rows
            .iter()
            .map(|row| row.devices)
            .max()
            .filter(|most| *most >= 4 && self.work == Work::Host);
        if let Some((one, all)) = most
            .and_then(|most| self.row(most, Mode::OneByOne).zip(self.row(most, Mode::AllAtOnce)))
            && one.total_ns <= all.total_ns
        {
            failures.push(format!(
                "{} devices: waiting for all at once took no less time",
                one.devices
            ));
        }
        failures
    }
}

/// The memory is of so many bytes, rounded up to what all of the cards import.
const BYTES: u64 = 64 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device's driver.
struct Driver {
    gpu: Arc<Gpu>,
    /// What jobs copy from. Without it the device is fed no more.
    import: DriverLock<Option<Import>>,
    /// When its last pass began and ended.
    waited: Arc<Mutex<Option<(Instant, Instant)>>>,
    /// What its work up to the last first pass is done at.
    marker: AtomicU64,
    /// Up to which job somebody waits for it, or has gone on without: the host ends no later ones
    /// that the first pass has met.
    awaited: Timeline,
    fault: Option<Fault>,
    /// Let go of too early by a planted bug, and freed when that is safe.
    early: Mutex<Vec<Import>>,
}

impl IntervalNotifier for Driver {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let mut import = self.import.lock_for(invalidation);
        if import.is_some() && !invalidation.blockable() {
            return Err(WouldBlock);
        }
        let Some(import) = import.take() else { return Ok(None) };
        let began = Instant::now();
        // Behind the work in flight, or the last of that where nothing can be submitted.
        let marker = self.gpu.marker().unwrap_or_else(|_| import.last_job());
        self.marker.store(marker, Ordering::Relaxed);
        if self.fault == Some(Fault::SkipWait) {
            lock(&self.early).push(import);
            return Ok(None);
        }
        let (done, waited, awaited) =
            (self.gpu.done().reached(marker), self.waited.clone(), self.awaited.clone());
        Ok(Some(PassFuture::new(async move {
            awaited.signal(marker);
            done.await;
            drop(import);
            *lock(&waited) = Some((began, Instant::now()));
        })))
    }
}

/// What the threads that feed the devices share.
struct Feed<'a> {
    options: &'a Options,
    /// The last gate that was given to a job, of all devices.
    gates: &'a AtomicU64,
}

impl Feed<'_> {
    /// Keeps a device at work until it has nothing to copy from. `at_work` is signalled when its
    /// first job is done.
    fn run(&self, driver: &Driver, phase: Duration, at_work: &Timeline) -> Result<(), Problem> {
        let fed = self.feed(driver, phase, at_work);
        if fed.is_err() {
            // So that nobody waits for what it has left.
            let _ = driver.gpu.open_gate(self.gates.load(Ordering::Relaxed));
        }
        at_work.signal(1);
        fed
    }

    fn feed(&self, driver: &Driver, phase: Duration, at_work: &Timeline) -> Result<(), Problem> {
        let (gpu, work) = (&driver.gpu, Duration::from_millis(self.options.work_ms));
        let host = self.options.work == Work::Host;
        let mut queued = VecDeque::new();
        std::thread::sleep(phase);
        loop {
            {
                let import = driver.import.lock();
                while let Some(import) =
                    import.as_ref().filter(|_| queued.len() < usize::from(self.options.depth))
                {
                    let gate =
                        if host { self.gates.fetch_add(1, Ordering::Relaxed) + 1 } else { 0 };
                    queued.push_back((gpu.upload(import, gate)?, gate));
                }
            }
            let Some((job, gate)) = queued.pop_front() else { return Ok(()) };
            if host {
                // The job takes its time, and the host says when it is over.
                std::thread::sleep(work);
                // What the first pass has met does not end before somebody waits for it, so that a
                // wait that is missing is always seen.
                if driver.import.lock().is_none() {
                    driver.awaited.reached(job).wait();
                }
                gpu.open_gate(gate)?;
            }
            gpu.done().reached(job).wait();
            at_work.signal(1);
        }
    }
}

/// Memory that some devices have mapped, in a space of its own.
struct Set {
    mapping: OwnedMapping,
    range: AddressRange,
    drivers: Vec<Subscription<Driver>>,
    mode: Mode,
    len: usize,
}

impl Set {
    fn new(options: &Options, mode: Mode, gpus: &[Arc<Gpu>], len: u64) -> Result<Self, Problem> {
        let builder = AddressSpace::builder();
        let space = if mode == Mode::OneByOne { builder.pass_budget(0) } else { builder }.build();
        let alignment = gpus.iter().map(|gpu| gpu.card.alignment).max().unwrap_or(1);
        let mapping =
            OwnedMapping::new(&space, (len + alignment) as usize).map_err(Problem::other)?;
        mapping.as_ptr().expose_provenance();
        let start = mapping.range().start().next_multiple_of(alignment);
        let range = AddressRange::new(start, len).map_err(Problem::other)?;
        let driver = |gpu: &Arc<Gpu>| {
            let (import, waited, early) = (DriverLock::new(None), Arc::default(), Mutex::default());
            let (gpu, marker, awaited) = (gpu.clone(), AtomicU64::new(0), Timeline::new());
            let driver =
                Driver { gpu, import, waited, marker, awaited, fault: options.fault, early };
            space.insert(range, driver).map_err(Problem::other)
        };
        let drivers = gpus.iter().map(driver).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { mapping, range, drivers, mode, len: len as usize })
    }

    /// The memory is written and mapped, devices work on it, and it changes. `copies` of all of it
    /// are a job.
    fn invalidate(
        &mut self,
        feed: &Feed<'_>,
        copies: &[u32],
        random: &mut StdRng,
    ) -> Result<Sample, Problem> {
        let contents: Vec<u8> = (0..self.len).map(|_| random.random()).collect();
        let offset = (self.range.start() - self.mapping.range().start()) as usize;
        self.mapping.write(offset, &contents);
        let (range, driver) = (self.range, &self.drivers);
        for (driver, copies) in driver.iter().zip(copies) {
            let import = |_| async { driver.gpu.import(range, *copies) };
            let install = |slot: &mut Option<Import>, import| *slot = Some(import);
            driver
                .import
                .mirror(driver, RetryBudget::default(), import, install)
                .wait()
                .map_err(Problem::other)?;
        }
        let work = Duration::from_millis(feed.options.work_ms);
        let mut phase = || Duration::from_nanos(random.random_range(0..=work.as_nanos() as u64));
        let phases: Vec<Duration> = self.drivers.iter().map(|_| phase()).collect();
        let before = phase();
        let at_work: Vec<Timeline> = self.drivers.iter().map(|_| Timeline::new()).collect();
        let (drivers, mapping) = (&self.drivers, &mut self.mapping);
        let (total, unfinished) = std::thread::scope(|threads| {
            let fed: Vec<_> = (drivers.iter().zip(phases).zip(&at_work))
                .map(|((driver, phase), at_work)| {
                    threads.spawn(move || feed.run(driver, phase, at_work))
                })
                .collect();
            at_work.iter().for_each(|at_work| at_work.reached(1).wait());
            std::thread::sleep(before);
            let began = Instant::now();
            let changed = mapping.map_again().wait();
            let total = began.elapsed();
            let mut unfinished = 0;
            for driver in drivers {
                let marker = driver.marker.load(Ordering::Relaxed);
                unfinished += u64::from(driver.gpu.done().value() < marker);
                // Without a change there may be a device that has had no pass: it is fed no more.
                let left = driver.import.lock().take();
                driver.awaited.signal(if left.is_some() { u64::MAX } else { marker });
                lock(&driver.early).extend(left);
            }
            for fed in fed {
                fed.join()
                    .map_err(|_| Problem::other("a thread that feeds a device has panicked"))??;
            }
            changed.map(|()| (total, unfinished)).map_err(Problem::other)
        })?;
        self.sample(Sample { total, unfinished, ..Sample::default() }, &contents)
    }

    fn sample(&self, mut sample: Sample, contents: &[u8]) -> Result<Sample, Problem> {
        let mut got = vec![0; self.len];
        let mut waits = Vec::new();
        for driver in &self.drivers {
            driver.gpu.arrived(&mut got)?;
            sample.stale_words +=
                got.chunks(8).zip(contents.chunks(8)).filter(|(got, was)| got != was).count()
                    as u64;
            waits.extend(lock(&driver.waited).take());
            lock(&driver.early).clear();
        }
        waits.sort();
        sample.overlapping = waits.windows(2).filter(|pair| pair[1].0 < pair[0].1).count() as u64;
        let took = waits.iter().map(|(began, ended)| *ended - *began);
        (sample.sum, sample.slowest) = (took.clone().sum(), took.max().unwrap_or_default());
        Ok(sample)
    }
}

#[derive(Default)]
struct Sample {
    total: Duration,
    sum: Duration,
    slowest: Duration,
    stale_words: u64,
    unfinished: u64,
    overlapping: u64,
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> Duration) -> u64 {
    let mut values: Vec<Duration> = samples.iter().map(of).collect();
    values.sort_unstable();
    values.get(values.len() / 2).map_or(0, |value| value.as_nanos() as u64)
}

/// How many copies take as long as a job on an idle device.
fn calibrate(options: &Options, gpu: &Arc<Gpu>, len: u64) -> Result<u32, Problem> {
    if options.work == Work::Host {
        return Ok(1);
    }
    const COPIES: u32 = 64;
    let set = Set::new(options, Mode::AllAtOnce, std::slice::from_ref(gpu), len)?;
    let import = gpu.import(set.range, COPIES)?;
    let mut took = Vec::new();
    for _ in 0..5 {
        let began = Instant::now();
        let job = gpu.upload(&import, 0)?;
        gpu.done().reached(job).wait();
        took.push(began.elapsed());
    }
    took.sort_unstable();
    let copies = Duration::from_millis(options.work_ms).as_secs_f64() / took[2].as_secs_f64()
        * f64::from(COPIES);
    Ok((copies as u32).clamp(1, 100_000))
}

pub fn run(options: &Options, vulkan: &Arc<Vulkan>, cards: &[Card]) -> Result<Passes, Problem> {
    let counts = options.devices();
    let most = counts.last().copied().unwrap_or(0);
    // Several of one card if there are not enough.
    let cards = cards.iter().cycle().take(most);
    // Alignments are powers of two.
    let len = BYTES.next_multiple_of(cards.clone().map(|card| card.alignment).max().unwrap_or(1));
    let gpus = cards
        .map(|card| Gpu::open(vulkan, card, len, options.fence_fd))
        .collect::<Result<Vec<_>, _>>()?;
    let copies =
        gpus.iter().map(|gpu| calibrate(options, gpu, len)).collect::<Result<Vec<_>, _>>()?;
    let (gates, mut random) = (AtomicU64::new(0), StdRng::seed_from_u64(options.seed));
    let feed = Feed { options, gates: &gates };
    let mut rows = Vec::new();
    for devices in counts {
        let of = |mode| Set::new(options, mode, &gpus[..devices], len);
        let mut sets = Mode::BOTH.into_iter().map(of).collect::<Result<Vec<_>, _>>()?;
        let mut samples = [Vec::new(), Vec::new()];
        // In turns, so that both meet the same machine, and with the same jobs.
        for _ in 0..options.repeats {
            let round: u64 = random.random();
            for (set, samples) in sets.iter_mut().zip(&mut samples) {
                samples.push(set.invalidate(&feed, &copies, &mut StdRng::seed_from_u64(round))?);
            }
        }
        rows.extend(sets.iter().zip(&samples).map(|(set, samples)| Row {
            devices,
            mode: set.mode,
            total_ns: median(samples, |sample| sample.total),
            sum_ns: median(samples, |sample| sample.sum),
            slowest_ns: median(samples, |sample| sample.slowest),
            stale_words: samples.iter().map(|sample| sample.stale_words).sum(),
            unfinished: samples.iter().map(|sample| sample.unfinished).sum(),
            overlapping: samples.iter().map(|sample| sample.overlapping).sum(),
        }));
    }
    let Options { work, work_ms, depth, repeats, .. } = *options;
    Ok(Passes { work, work_ms, depth, repeats, bytes: len as usize, rows })
}
