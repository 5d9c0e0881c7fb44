//! A simulated GPU and its driver.
//!
//! The driver mirrors mappings of the program: a page table that its DMA engine faults pages into through the read side, and an
//! invalidation that zaps the table, submits a command to the device and returns the wait for it as its pass. The device has a TLB that keeps
//! translations until a flush or preemption has completed, and transfers under way that go on using them until then. That is
//! why the wait matters, and what the check (`Oracle`) would see without it.

use crate::runtime::Runtime;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal};
use shootdown::{AddressRange, DriverLock, IntervalNotifier, Invalidation, PassFuture, RetryBudget, Subscription, WouldBlock};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;
use tracing::Instrument;

pub const PAGE: u64 = 4096;

/// A page of one of the program's address spaces.
pub type Page = (usize, u64);

/// How long the simulated hardware takes.
///
/// Both latencies are log-normal around their median and cut off at their bounds. The defaults are round numbers for what is commonly
/// reported: a TLB invalidation takes some µs to tens of µs; preempting a context means waiting for thread blocks to drain or saving
/// the state of a whole GPU, 100 µs to some ms (Park, Park and Mahlke, "Chimera", ASPLOS 2015, discusses why). They are
/// parameters of the model, not measurements of a product.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub seed: u64,
    /// Share of the invalidations that preempt a context instead of flushing the TLB, 0 to 1.
    pub preempt_share: f64,
    /// Latencies below this are raised to it.
    pub floor: Duration,
    /// Mean time between two DMA accesses of one GPU, beside those that are under way when it is invalidated.
    pub dma_interval: Duration,
    /// Pages of a mapping that a GPU works on.
    pub resident_pages: u64,
}

/// What an invalidation asks of the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Command {
    TlbFlush,
    Preempt,
}

impl Model {
    /// What GPU `gpu` has to do for invalidation `number`, and how long it takes: the same in every mode and for any number of GPUs.
    fn draw(&self, gpu: usize, number: u64) -> (Command, Duration, StdRng) {
        let key = (gpu as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xd1b5_4a32_d192_ed03);
        let mut random = StdRng::seed_from_u64(self.seed ^ key);
        // Median, spread, bounds, in ns.
        let (command, median, sigma, least, most) = if random.random_bool(self.preempt_share) {
            (Command::Preempt, 500_000f64, 0.8, 100_000f64, 5_000_000f64)
        } else {
            (Command::TlbFlush, 12_000f64, 0.5, 3_000f64, 80_000f64)
        };
        let latency = match LogNormal::new(median.ln(), sigma) {
            Ok(distribution) => distribution.sample(&mut random).clamp(least, most),
            Err(_) => median,
        };
        (command, Duration::from_nanos(latency as u64).max(self.floor), random)
    }
}

/// Knows what may be used: a page's generation rises when the guard of an invalidation that covers it is handed out.
#[derive(Default)]
pub struct Oracle {
    state: Mutex<OracleState>,
    accesses: AtomicU64,
    stale: AtomicU64,
}

#[derive(Default)]
struct OracleState {
    generations: BTreeMap<Page, u64>,
    /// What is mapped, by space and start: the last address.
    mapped: BTreeMap<Page, u64>,
}

impl Oracle {
    /// The guard is in the program's hands: whoever still uses the range uses stale mappings.
    pub fn handed_out(&self, space: usize, range: AddressRange) {
        let mut state = self.state.lock().unwrap();
        let pages = (space, range.start() / PAGE)..=(space, range.last() / PAGE);
        state.generations.range_mut(pages).for_each(|(_, generation)| *generation += 1);
    }

    pub fn map(&self, space: usize, range: AddressRange) {
        self.state.lock().unwrap().mapped.insert((space, range.start()), range.last());
    }

    /// `range` is, or is part of, what `map` was told of.
    pub fn unmap(&self, space: usize, range: AddressRange) {
        let mut state = self.state.lock().unwrap();
        let Some((&(_, start), &last)) = state.mapped.range((space, 0)..=(space, range.start())).next_back() else { return };
        if last < range.start() {
            return;
        }
        state.mapped.remove(&(space, start));
        if start < range.start() {
            state.mapped.insert((space, start), range.start() - 1);
        }
        if let Some(next) = range.last().checked_add(1).filter(|_| last > range.last()) {
            state.mapped.insert((space, next), last);
        }
    }

    /// The generation of a page; `None` when nothing is mapped there.
    fn look(&self, page: Page) -> Option<u64> {
        let mut state = self.state.lock().unwrap();
        let address = page.1 * PAGE;
        let (_, last) = state.mapped.range((page.0, 0)..=(page.0, address)).next_back()?;
        (*last >= address).then_some(())?;
        Some(*state.generations.entry(page).or_insert(0))
    }

    /// A device reads a page through a mapping that it got in `generation`.
    fn access(&self, page: Page, generation: u64) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        let state = self.state.lock().unwrap();
        if state.generations.get(&page).is_some_and(|current| *current != generation) {
            self.stale.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::Relaxed)
    }

    pub fn stale(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }
}

/// What one GPU did for one invalidation.
#[derive(Clone, Copy, Debug)]
pub struct Lane {
    pub gpu: usize,
    pub command: Command,
    /// When its first pass ran.
    pub first_pass: Duration,
    /// When the device began, and when it was done.
    pub began: Duration,
    pub done: Duration,
}

/// The invalidation under way, as the devices see it.
#[derive(Default)]
pub struct Current {
    number: AtomicU64,
    lanes: Mutex<Vec<Lane>>,
}

impl Current {
    pub fn begin(&self, number: u64) {
        self.number.store(number, Ordering::SeqCst);
        self.lanes.lock().unwrap().clear();
    }

    pub fn lanes(&self) -> Vec<Lane> {
        self.lanes.lock().unwrap().clone()
    }
}

/// A fence in memory that the device writes when a command has completed.
#[derive(Clone, Default)]
struct Fence(Arc<Mutex<(bool, Vec<Waker>)>>);

impl Fence {
    fn signal(&self) {
        let wakers = {
            let mut fence = self.0.lock().unwrap();
            fence.0 = true;
            std::mem::take(&mut fence.1)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    fn is_signalled(&self) -> bool {
        self.0.lock().unwrap().0
    }

    fn poll(&self, cx: &std::task::Context<'_>) -> Poll<()> {
        let mut fence = self.0.lock().unwrap();
        if fence.0 {
            return Poll::Ready(());
        }
        if !fence.1.iter().any(|known| known.will_wake(cx.waker())) {
            fence.1.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

pub struct Gpu {
    pub id: usize,
    runtime: Runtime,
    model: Model,
    oracle: Arc<Oracle>,
    current: Arc<Current>,
    /// The page table: which generation of a page the device maps.
    table: DriverLock<BTreeMap<Page, u64>>,
    /// Translations that the device has cached.
    tlb: Mutex<BTreeMap<Page, u64>>,
    /// When the command queue has worked off what is in it.
    busy_until: Mutex<Duration>,
    /// The last command, what it covers, and its fence.
    last: Mutex<Option<(std::ops::RangeInclusive<Page>, Command, Fence)>>,
    /// Mappings that the DMA engine works on.
    mirrors: Mutex<Vec<Arc<Subscription<Mirror>>>>,
    /// This driver forgets to wait for its device.
    skips_wait: bool,
    calls: AtomicU64,
    stop: AtomicBool,
}

/// The notifier of one mapping.
pub struct Mirror {
    gpu: Arc<Gpu>,
    space: usize,
}

impl IntervalNotifier for Mirror {
    fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        let gpu = &self.gpu;
        gpu.calls.fetch_add(1, Ordering::Relaxed);
        let range = invalidation.range();
        let pages = (self.space, range.start() / PAGE)..=(self.space, range.last() / PAGE);
        let zapped = {
            let mut table = gpu.table.lock_for(invalidation);
            let zapped: Vec<Page> = table.range(pages.clone()).map(|(page, _)| *page).collect();
            for page in &zapped {
                table.remove(page);
            }
            zapped
        };
        // A command under way for the same pages does for this notifier too; so it is when one GPU mirrors several mappings in the range.
        // If none is and nothing was mapped, no translation can be cached either, and the device is left alone.
        let under_way = gpu.last.lock().unwrap().clone().filter(|(of, _, fence)| !fence.is_signalled() && covers(of, &pages));
        let (command, fence) = match under_way {
            Some((_, command, fence)) => (command, fence),
            None if zapped.is_empty() => return Ok(None),
            None => gpu.submit(pages),
        };
        // For who looks at the run through `tracing`, as the example `trace` does.
        let span = match command {
            Command::TlbFlush => tracing::info_span!("TLB flush", gpu = gpu.id),
            Command::Preempt => tracing::info_span!("preemption", gpu = gpu.id),
        };
        let wait = std::future::poll_fn(move |cx| fence.poll(cx)).instrument(span);
        // Dropping the wait here is the bug that `--fault skip-wait` plants.
        Ok((!gpu.skips_wait).then(|| PassFuture::new(wait)))
    }

    fn name(&self) -> Cow<'static, str> {
        format!("gpu{}", self.gpu.id).into()
    }
}

impl Gpu {
    pub fn new(
        id: usize,
        runtime: &Runtime,
        model: Model,
        oracle: &Arc<Oracle>,
        current: &Arc<Current>,
        skips_wait: bool,
    ) -> Arc<Self> {
        let gpu = Arc::new(Self {
            id,
            runtime: runtime.clone(),
            model,
            oracle: oracle.clone(),
            current: current.clone(),
            table: DriverLock::default(),
            tlb: Mutex::default(),
            busy_until: Mutex::default(),
            last: Mutex::default(),
            mirrors: Mutex::default(),
            skips_wait,
            calls: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        runtime.spawn(gpu.clone().dma_engine());
        gpu
    }

    /// First passes that ran.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.mirrors.lock().unwrap().clear();
    }

    /// The notifier of a mapping, to be registered.
    pub fn mirror(self: &Arc<Self>, space: usize) -> Mirror {
        Mirror { gpu: self.clone(), space }
    }

    /// The DMA engine works on a mapping from now on.
    pub fn attach(self: &Arc<Self>, mirror: Arc<Subscription<Mirror>>) {
        self.mirrors.lock().unwrap().push(mirror.clone());
        let gpu = self.clone();
        self.runtime.spawn(async move {
            for at in 0..gpu.model.resident_pages {
                gpu.read(&mirror, at).await;
            }
        });
    }

    /// The mapping is gone.
    pub fn detach(&self, mirror: &Arc<Subscription<Mirror>>) {
        self.mirrors.lock().unwrap().retain(|known| !Arc::ptr_eq(known, mirror));
    }

    /// Puts a command into the device's queue; it works on one after the other.
    fn submit(self: &Arc<Self>, pages: std::ops::RangeInclusive<Page>) -> (Command, Fence) {
        let (now, covered) = (self.runtime.now(), pages.clone());
        let (command, latency, mut random) = self.model.draw(self.id, self.current.number.load(Ordering::SeqCst));
        let (began, done) = {
            let mut busy_until = self.busy_until.lock().unwrap();
            let began = now.max(*busy_until);
            *busy_until = began + latency;
            (began, *busy_until)
        };
        let lane = {
            let mut lanes = self.current.lanes.lock().unwrap();
            lanes.push(Lane { gpu: self.id, command, first_pass: now, began, done });
            (lanes.len() - 1, lanes[lanes.len() - 1])
        };
        let fence = Fence::default();
        let (gpu, signal) = (self.clone(), fence.clone());
        let middle = began + latency.mul_f64(random.random());
        self.runtime.spawn(async move {
            // Transfers that are under way go on with the translations that they have, until the command has completed.
            gpu.runtime.sleep_until(middle).await;
            gpu.read_in_flight(pages.clone(), &mut random);
            gpu.runtime.sleep_until(done).await;
            gpu.read_in_flight(pages.clone(), &mut random);
            {
                let mut tlb = gpu.tlb.lock().unwrap();
                let flushed: Vec<Page> = tlb.range(pages).map(|(page, _)| *page).collect();
                for page in flushed {
                    tlb.remove(&page);
                }
            }
            gpu.complete(lane);
            signal.signal();
        });
        *self.last.lock().unwrap() = Some((covered, command, fence.clone()));
        (command, fence)
    }

    /// Notes when the device was really done, which in real time is later than planned.
    fn complete(&self, (at, planned): (usize, Lane)) {
        let done = self.runtime.now();
        let mut lanes = self.current.lanes.lock().unwrap();
        if let Some(lane) = lanes.get_mut(at).filter(|lane| lane.gpu == planned.gpu && lane.first_pass == planned.first_pass) {
            lane.done = done;
        }
    }

    /// A transfer under way reads some page among `pages` whose translation is cached.
    fn read_in_flight(&self, pages: std::ops::RangeInclusive<Page>, random: &mut StdRng) {
        let cached = {
            let tlb = self.tlb.lock().unwrap();
            let count = tlb.range(pages.clone()).count();
            if count == 0 {
                return;
            }
            tlb.range(pages).nth(random.random_range(0..count)).map(|(page, generation)| (*page, *generation))
        };
        if let Some((page, generation)) = cached {
            self.oracle.access(page, generation);
        }
    }

    /// Reads pages of the mirrored mappings at random, as long as the program runs.
    async fn dma_engine(self: Arc<Self>) {
        let mut random = StdRng::seed_from_u64(self.model.seed ^ (0xd3a_0000 + self.id as u64));
        loop {
            let pause = self.model.dma_interval.mul_f64(-f64::ln(1.0 - random.random::<f64>()));
            self.runtime.sleep(pause).await;
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let mirror = {
                let mirrors = self.mirrors.lock().unwrap();
                if mirrors.is_empty() {
                    continue;
                }
                mirrors[random.random_range(0..mirrors.len())].clone()
            };
            let at = random.random_range(0..self.model.resident_pages.max(1));
            self.read(&mirror, at).await;
        }
    }

    /// Reads the `at`-th page that the device works on: through the TLB, else the page table, else after a fault.
    async fn read(&self, mirror: &Subscription<Mirror>, at: u64) {
        let range = mirror.range();
        let pages = range.last() / PAGE - range.start() / PAGE + 1;
        let page = (mirror.space, range.start() / PAGE + (at * pages / self.model.resident_pages.max(1)).min(pages - 1));
        if let Some(generation) = self.translate(page) {
            self.oracle.access(page, generation);
            return;
        }
        let walk = |_| async {
            // The fault travels to the host and the driver walks the program's page table.
            self.runtime.sleep(Duration::from_micros(2)).await;
            self.oracle.look(page).ok_or(Unmapped)
        };
        let install = |table: &mut BTreeMap<Page, u64>, generation| {
            table.insert(page, generation);
        };
        let faulted = self.table.mirror(mirror, RetryBudget::retries(64), walk, install).await;
        // Otherwise the program has taken the page away, or keeps changing it: the engine goes on with another.
        if let Ok(()) = faulted
            && let Some(generation) = self.translate(page)
        {
            self.oracle.access(page, generation);
        }
    }

    /// Looks a page up in the TLB, and fills it from the page table on a miss.
    fn translate(&self, page: Page) -> Option<u64> {
        let table = self.table.lock();
        let mut tlb = self.tlb.lock().unwrap();
        let cached = tlb.get(&page).copied();
        let generation = cached.or_else(|| table.get(&page).copied())?;
        tlb.insert(page, generation);
        Some(generation)
    }
}

fn covers(outer: &std::ops::RangeInclusive<Page>, inner: &std::ops::RangeInclusive<Page>) -> bool {
    outer.start() <= inner.start() && inner.end() <= outer.end()
}

/// Nothing is mapped there any more.
#[derive(Debug)]
struct Unmapped;
