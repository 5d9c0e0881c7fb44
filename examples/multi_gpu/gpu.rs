//! A simulated GPU: a TLB, a queue of commands, and an engine that reads the program's memory.
//!
//! The TLB keeps translations until a flush has emptied it, which happens somewhere in the middle
//! of the command; transfers that are under way when a command begins go on with the translations
//! that they have until it has completed. That is why a driver waits.

use crate::driver::{Mirror, Mirrors};
use crate::fault::Fault;
use crate::oracle::{Oracle, PAGE, Page, Pages};
use crate::profile::{Command, Model};
use crate::record::{Record, Step};
use crate::runtime::{Flag, Runtime};
use crate::simulation::Mode;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use shootdown::{DriverLock, Subscription};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What an invalidation has begun.
struct Unfinished {
    /// Rises from one to the next.
    serial: u64,
    pages: Pages,
    /// The invalidation.
    of: Arc<Record>,
    over: Flag,
    /// Of its last command; of the first one also before that is submitted.
    fence: Flag,
}

pub struct Gpu {
    pub id: usize,
    pub runtime: Runtime,
    pub model: Model,
    pub mode: Mode,
    pub oracle: Arc<Oracle>,
    /// A bug of its driver or of itself.
    pub fault: Option<Fault>,
    /// What the driver's lock protects: its page table, by page the generation that was found.
    pub table: DriverLock<BTreeMap<Page, u64>>,
    tlb: Mutex<BTreeMap<Page, u64>>,
    /// When the queue of commands is empty, and the end of the last one.
    queue: Mutex<(Duration, Option<Flag>)>,
    /// Fences of commands.
    under_way: Mutex<Vec<Flag>>,
    /// What invalidations have begun here and not finished: all steps, not one command.
    unfinished: Mutex<Vec<Unfinished>>,
    serial: AtomicU64,
    last: Mutex<Option<Flag>>,
    pub mirrors: Mutex<Mirrors>,
    /// The driver has heard `Release` of a space.
    pub released: AtomicBool,
    pub first_passes: AtomicU64,
    /// Times that the one `finish` of a notifier was in use.
    pub in_use: AtomicU64,
    stop: AtomicBool,
}

impl Gpu {
    pub fn new(
        id: usize,
        runtime: &Runtime,
        model: Model,
        mode: Mode,
        oracle: &Arc<Oracle>,
        fault: Option<Fault>,
    ) -> Arc<Self> {
        let gpu = Arc::new(Self {
            id,
            runtime: runtime.clone(),
            model,
            mode,
            oracle: oracle.clone(),
            fault,
            table: DriverLock::default(),
            tlb: Mutex::default(),
            queue: Mutex::default(),
            under_way: Mutex::default(),
            unfinished: Mutex::default(),
            serial: AtomicU64::new(0),
            last: Mutex::default(),
            mirrors: Mutex::default(),
            released: AtomicBool::new(false),
            first_passes: AtomicU64::new(0),
            in_use: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        runtime.spawn(gpu.clone().engine());
        gpu
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.mirrors.lock().unwrap().clear();
    }

    /// An invalidation has zapped some of `pages`, and waits for this device until `over` is set.
    /// Returns the fence of its first command, which it submits before its first pass returns.
    pub fn begins(&self, record: &Arc<Record>, pages: &Pages, over: &Flag) -> Flag {
        let fence = Flag::default();
        let serial = self.joins(record, pages);
        let mut unfinished = self.unfinished.lock().unwrap();
        unfinished.retain(|begun| !begun.over.is_set());
        let begun = Unfinished {
            serial,
            pages: pages.clone(),
            of: record.clone(),
            over: over.clone(),
            fence: fence.clone(),
        };
        unfinished.push(begun);
        fence
    }

    /// An invalidation flushes after others that have zapped `pages`; it need not be waited for
    /// beside them.
    pub fn joins(&self, record: &Record, pages: &Pages) -> u64 {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed) + 1;
        record.begins(self.id, serial, pages);
        serial
    }

    /// What other invalidations have begun because of some of `pages`, and not finished: the fences
    /// for which the device works. `None` if there is nothing, or this invalidation has begun
    /// something later itself, which is for these pages, too.
    pub fn unfinished(&self, record: &Arc<Record>, pages: &Pages) -> Option<Vec<Flag>> {
        let since = record.begun(self.id, pages);
        let unfinished = self.unfinished.lock().unwrap();
        let is_open = |begun: &&Unfinished| {
            !Arc::ptr_eq(&begun.of, record) && begun.serial > since && !begun.over.is_set()
        };
        let others: Vec<&Unfinished> =
            unfinished.iter().filter(is_open).filter(|begun| pages.overlap(&begun.pages)).collect();
        (!others.is_empty()).then(|| others.iter().map(|begun| begun.fence.clone()).collect())
    }

    /// The fence of some command under way.
    pub fn any_fence(&self) -> Option<Flag> {
        self.under_way.lock().unwrap().first().cloned()
    }

    pub fn last_fence(&self) -> Option<Flag> {
        self.last.lock().unwrap().clone()
    }

    /// Gives the device a command, for an invalidation of `pages`, whose `fence` it signals in the
    /// end. It works on one after the other, except that jobs in flight are in flight already. What
    /// runs on the device until it is preempted, or its job is done, goes on with what was
    /// `zapped`.
    pub fn submit(
        self: &Arc<Self>,
        (record, lane): (&Arc<Record>, usize),
        (command, latency): (Command, Duration),
        (pages, zapped): (&Pages, &[(Page, u64)]),
        (fence, random): (&Flag, &mut StdRng),
    ) {
        let submitted = self.runtime.now();
        let ended = Flag::default();
        let (began, before) = if command == Command::Jobs {
            (submitted, None)
        } else {
            let mut queue = self.queue.lock().unwrap();
            let began = submitted.max(queue.0);
            queue.0 = began + latency;
            (began, queue.1.replace(ended.clone()))
        };
        let (done, interrupt) = (began + latency, self.model.costs.interrupt);
        self.under_way.lock().unwrap().push(fence.clone());
        *self.last.lock().unwrap() = Some(fence.clone());
        // The command says nothing of what was begun for other pages of the invalidation.
        let is_for =
            |begun: &&mut Unfinished| Arc::ptr_eq(&begun.of, record) && pages.cover(&begun.pages);
        for begun in self.unfinished.lock().unwrap().iter_mut().filter(is_for) {
            begun.fence = fence.clone();
        }
        let step = record.step(
            lane,
            Step { command, submitted, latency: latency + interrupt, done: done + interrupt },
        );
        let middle = began + latency.mul_f64(random.random());
        let mut random = StdRng::seed_from_u64(random.random());
        let (gpu, record, pages, signal) =
            (self.clone(), record.clone(), pages.clone(), fence.clone());
        let held = if command == Command::TlbFlush { Vec::new() } else { zapped.to_vec() };
        self.runtime.spawn(async move {
            gpu.runtime.sleep_until(began).await;
            if let Some(before) = before {
                // In real time it may take longer than planned.
                before.wait().await;
            }
            let in_flight = gpu.transfer_in_flight(&pages, &mut random);
            if gpu.fault == Some(Fault::EarlyFence) {
                signal.set();
            }
            gpu.runtime.sleep_until(middle).await;
            if command == Command::TlbFlush {
                gpu.flush(&pages);
                // The engine goes on: what it misses it looks up in the page table.
                gpu.refill(&pages);
            }
            gpu.runtime.sleep_until(done).await;
            // A flush waits for the transfers that go on with what they had from the TLB.
            for (page, generation) in
                held.into_iter().chain(in_flight.filter(|_| command == Command::TlbFlush))
            {
                gpu.oracle.access(page, generation);
            }
            ended.set();
            gpu.runtime.sleep_until(done + interrupt).await;
            record.done(lane, step, gpu.runtime.now());
            gpu.under_way.lock().unwrap().retain(|fence| !fence.is(&signal));
            signal.set();
        });
    }

    /// All of `pages` with one command.
    fn flush(&self, pages: &Pages) {
        let mut tlb = self.tlb.lock().unwrap();
        let mut flushed: Vec<Page> = pages.of(&tlb).map(|(page, _)| page).collect();
        if self.fault == Some(Fault::ShortFlush) {
            flushed.pop();
        }
        for page in flushed {
            tlb.remove(&page);
        }
    }

    fn refill(&self, pages: &Pages) {
        let table = self.table.lock();
        self.tlb.lock().unwrap().extend(pages.of(&table));
    }

    /// A transfer that is under way, of some page among `pages` whose translation is cached.
    fn transfer_in_flight(&self, pages: &Pages, random: &mut StdRng) -> Option<(Page, u64)> {
        let tlb = self.tlb.lock().unwrap();
        let count = pages.of(&tlb).count();
        if count == 0 {
            return None;
        }
        pages.of(&tlb).nth(random.random_range(0..count))
    }

    /// The device reads what it can among `pages`, without a fault.
    pub fn read_what_is_mapped(&self, pages: RangeInclusive<Page>) {
        let table = self.table.lock();
        let tlb = self.tlb.lock().unwrap();
        let only_cached = tlb.range(pages.clone());
        for (page, generation) in
            table.range(pages).filter(|(page, _)| !tlb.contains_key(page)).chain(only_cached)
        {
            self.oracle.access(*page, *generation);
        }
    }

    /// The engine works on a mapping from now on.
    pub fn attach(self: &Arc<Self>, mirror: Arc<Subscription<Mirror>>) {
        self.mirrors.lock().unwrap().insert(&mirror);
        let gpu = self.clone();
        self.runtime.spawn(async move {
            for at in 0..gpu.model.resident_pages {
                gpu.read(&mirror, gpu.resident(&mirror, at)).await;
            }
        });
    }

    /// The mapping is gone: nothing is installed for it any more.
    pub fn detach(&self, mirror: &Arc<Subscription<Mirror>>) {
        {
            let _table = self.table.lock();
            mirror.detach();
        }
        self.mirrors.lock().unwrap().remove(mirror);
    }

    /// Soon the engine comes to these pages again, which it was working on.
    pub fn return_to(self: &Arc<Self>, pages: &[(Page, u64)], random: &mut StdRng) {
        for (page, _) in pages.iter().copied() {
            let Some(mirror) = self.mirrors.lock().unwrap().of(page) else { continue };
            let pause = Duration::from_micros(random.random_range(0..20));
            let gpu = self.clone();
            self.runtime.spawn(async move {
                gpu.runtime.sleep(pause).await;
                if !gpu.stop.load(Ordering::Relaxed) {
                    gpu.read(&mirror, page).await;
                }
            });
        }
    }

    /// Reads pages of the mirrored mappings at random, as long as the program runs.
    async fn engine(self: Arc<Self>) {
        let mut random = StdRng::seed_from_u64(self.model.seed ^ (0xd3a_0000 + self.id as u64));
        loop {
            let pause = self.model.dma_interval.mul_f64(-f64::ln(1.0 - random.random::<f64>()));
            self.runtime.sleep(pause).await;
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let Some(mirror) = self.mirrors.lock().unwrap().any(&mut random) else { continue };
            let at = random.random_range(0..self.model.resident_pages.max(1));
            self.read(&mirror, self.resident(&mirror, at)).await;
        }
    }

    /// The `at`-th page of a mapping that the device works on.
    fn resident(&self, mirror: &Subscription<Mirror>, at: u64) -> Page {
        let range = mirror.range();
        let pages = range.last() / PAGE - range.start() / PAGE + 1;
        (
            mirror.space(),
            range.start() / PAGE + (at * pages / self.model.resident_pages.max(1)).min(pages - 1),
        )
    }

    /// Reads a page: through the TLB, else the page table, else after a fault.
    async fn read(self: &Arc<Self>, mirror: &Subscription<Mirror>, page: Page) {
        // If nothing can be installed the program has taken the page away, or keeps changing it:
        // the engine goes on with another.
        if !self.read_mapped(page) && self.fault_in(mirror, page).await {
            self.read_mapped(page);
        }
    }

    /// Reads a page if the TLB has it, or the page table, from which the TLB is filled. A flush
    /// waits for it.
    fn read_mapped(&self, page: Page) -> bool {
        let table = self.table.lock();
        let mut tlb = self.tlb.lock().unwrap();
        let Some(generation) = tlb.get(&page).or_else(|| table.get(&page)).copied() else {
            return false;
        };
        tlb.insert(page, generation);
        self.oracle.access(page, generation);
        true
    }
}
