//! The driver of a simulated GPU: its interval notifier, its page faults, and four ways to wait.

use crate::fault::Fault;
use crate::gpu::Gpu;
use crate::oracle::{PAGE, Page, Pages};
use crate::profile::Command;
use crate::record::{Record, Step};
use crate::runtime::{Flag, yield_now};
use crate::simulation::Mode;
use rand::Rng;
use rand::rngs::StdRng;
use shootdown::{
    Event, IntervalNotifier, Invalidation, PassFuture, RetryBudget, Subscription, WouldBlock,
};
use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tracing::Instrument;

/// One GPU's notifier of one mapping.
pub struct Mirror {
    gpu: Arc<Gpu>,
    space: usize,
    /// Linux 7.1 has one `finish` for each notifier; this one's is in use.
    in_use: Arc<AtomicBool>,
    /// The mapping is gone. Under the table's lock.
    detached: AtomicBool,
}

impl Mirror {
    pub fn new(gpu: &Arc<Gpu>, space: usize) -> Self {
        Self { gpu: gpu.clone(), space, in_use: Arc::default(), detached: AtomicBool::new(false) }
    }

    /// The mapping is gone. To be called under the table's lock.
    pub fn detach(&self) {
        self.detached.store(true, Ordering::Relaxed);
    }

    pub fn space(&self) -> usize {
        self.space
    }

    /// Removes the pages from the page table, under the lock that readers install under; returns
    /// those that were there. If there are any, this first pass has work for the device until
    /// `over` is set, and another one that finds nothing left knows of it from the same moment on.
    fn zap(
        &self,
        invalidation: &Invalidation<'_>,
        pages: &Pages,
        (record, over): (&Arc<Record>, &Flag),
    ) -> Option<Zapped> {
        let gpu = &self.gpu;
        let late = gpu.fault == Some(Fault::SetSeqOutsideLock);
        let mut table = if late || gpu.fault == Some(Fault::NoSetSeq) {
            gpu.table.lock()
        } else {
            gpu.table.lock_for(invalidation)
        };
        let mut zapped: Vec<(Page, u64)> = pages.of(&table).collect();
        if gpu.fault == Some(Fault::FirstPageOnly) {
            zapped.truncate(1);
        }
        let others = gpu.unfinished(record, pages).unwrap_or_default();
        let first = (!zapped.is_empty()).then(|| gpu.begins(record, pages, over));
        // With this bug its pass does it.
        if gpu.fault != Some(Fault::FlushBeforeZap) {
            for (page, _) in &zapped {
                table.remove(page);
            }
        }
        drop(table);
        if late {
            gpu.runtime.work(gpu.model.fault / 2);
            invalidation.set_seq();
        }
        first.map(|first| Zapped { pages: zapped, others, first })
    }
}

impl IntervalNotifier for Mirror {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        Ok(self.gpu.runtime.alone(|| self.first_pass(invalidation)))
    }

    fn name(&self) -> Cow<'static, str> {
        format!("gpu{}", self.gpu.id).into()
    }
}

impl Mirror {
    fn first_pass(&self, invalidation: &Invalidation<'_>) -> Option<PassFuture> {
        let gpu = &self.gpu;
        gpu.first_passes.fetch_add(1, Ordering::Relaxed);
        if invalidation.event() == Event::Release {
            gpu.released.store(true, Ordering::Relaxed);
        }
        let deaf = gpu.fault == Some(Fault::IgnoreRelease) && gpu.released.load(Ordering::Relaxed);
        if deaf || gpu.fault.is_some_and(|fault| fault.ignores(invalidation.event())) {
            return None;
        }
        let record = Record::current().unwrap_or_else(|| Record::new(0, Duration::ZERO));
        let (first_pass, pages) =
            (gpu.runtime.now(), Pages::new(self.space, invalidation.ranges()));
        let over = Flag::default();
        let costs = gpu.model.costs;
        let (zapped, first, todo): (_, _, VecDeque<Todo>) =
            match self.zap(invalidation, &pages, (&record, &over)) {
                Some(Zapped { pages, others, first }) => {
                    // A walk that finds nothing is short.
                    gpu.runtime.work(costs.zap);
                    let steps =
                        gpu.model.steps(gpu.id, record.number, record.at).map(Todo::Command);
                    // Jobs may also go on with pages that others have zapped before.
                    (pages, first, steps.chain(others.into_iter().map(Todo::Other)).collect())
                }
                // Where nothing was mapped no translation can be cached, unless another
                // invalidation has zapped these pages and the device is not done with them. (If
                // another mapping's notifier of this GPU did, for this invalidation, that is waited
                // for in any case.)
                None => {
                    let others = gpu.unfinished(&record, &pages)?;
                    // What the others wait for at this moment, and a flush of its own; not their
                    // next step, which is theirs to begin.
                    let flush =
                        gpu.model.steps(gpu.id, record.number, record.at).last().map(Todo::Command);
                    gpu.joins(&record, &pages);
                    (
                        Vec::new(),
                        Flag::default(),
                        others.into_iter().map(Todo::Other).chain(flush).collect(),
                    )
                }
            };
        let another = match gpu.fault {
            Some(Fault::AnyFence) => gpu.any_fence(),
            Some(Fault::OldFence) => gpu.last_fence(),
            _ => None,
        };
        if let Some(fence) = another {
            // It believes that it has nothing else to wait for.
            first.set();
            over.set();
            return Some(PassFuture::new(async move { fence.wait().await }));
        }
        let in_use = gpu.mode == Mode::TwoPass && self.in_use.swap(true, Ordering::Relaxed);
        let cost = gpu.runtime.charged(if zapped.is_empty() {
            costs.submit
        } else {
            costs.zap + costs.submit
        });
        let lane = record.lane(gpu.id, first_pass, cost);
        let chain = Chain::start(gpu, (record, lane), (pages, zapped), (todo, first, over));
        if gpu.fault == Some(Fault::SkipWait) {
            gpu.runtime.spawn(chain.finish(Wait::Pending));
            return None;
        }
        match gpu.mode {
            Mode::PollDriven => Some(PassFuture::new(chain.finish(Wait::Pending))),
            Mode::RoundRobin => Some(PassFuture::new(chain.finish(Wait::Rounds))),
            // The space's pass budget is zero.
            Mode::SinglePass => Some(PassFuture::new(chain.finish(Wait::Blocking))),
            Mode::TwoPass if in_use => {
                gpu.in_use.fetch_add(1, Ordering::Relaxed);
                gpu.runtime.block_on(chain.finish(Wait::Blocking), Duration::ZERO);
                None
            }
            Mode::TwoPass => {
                let in_use = self.in_use.clone();
                Some(PassFuture::new(async move {
                    chain.finish(Wait::Blocking).await;
                    in_use.store(false, Ordering::Relaxed);
                }))
            }
        }
    }
}

/// What a first pass has taken out of the page table.
struct Zapped {
    pages: Vec<(Page, u64)>,
    /// What other invalidations have begun for some of the pages that it was called for.
    others: Vec<Flag>,
    /// What its first command is to signal.
    first: Flag,
}

/// Who waits how for the steps of a device.
#[derive(Clone, Copy, PartialEq)]
enum Wait {
    /// The future says that it is not ready.
    Pending,
    /// The thread blocks in the pass until all steps are done.
    Blocking,
    /// The thread blocks in the pass until one step is done; the next is begun, and the pass goes
    /// to the back of the list.
    Rounds,
}

/// What a device does for an invalidation, step by step. This is the driver in all four modes.
struct Chain {
    gpu: Arc<Gpu>,
    record: Arc<Record>,
    lane: usize,
    pages: Pages,
    zapped: Vec<(Page, u64)>,
    todo: VecDeque<Todo>,
    random: StdRng,
    command: Command,
    /// The step in the record, if the device was not told of it by this invalidation.
    other: Option<usize>,
    fence: Flag,
    /// What the first command is to signal: others may wait for it already.
    first: Option<Flag>,
    over: Flag,
}

/// A step.
enum Todo {
    Command((Command, Duration)),
    /// What another invalidation has begun for the same pages.
    Other(Flag),
}

impl Chain {
    /// Begins the first step.
    fn start(
        gpu: &Arc<Gpu>,
        (record, lane): (Arc<Record>, usize),
        (pages, zapped): (Pages, Vec<(Page, u64)>),
        (todo, first, over): (VecDeque<Todo>, Flag, Flag),
    ) -> Self {
        let mut chain = Self {
            gpu: gpu.clone(),
            random: gpu.model.random(gpu.id, record.number),
            record,
            lane,
            pages,
            zapped,
            todo,
            command: Command::TlbFlush,
            other: None,
            fence: Flag::default(),
            first: Some(first),
            over,
        };
        chain.begin();
        if gpu.fault == Some(Fault::SkipJobs) && chain.command != Command::TlbFlush {
            // The fence that it waits for is that of the flush.
            chain.begin();
        }
        if gpu.fault != Some(Fault::FlushBeforeZap) {
            gpu.return_to(&chain.zapped, &mut chain.random);
        }
        chain
    }

    /// Begins the next step, if there is one.
    fn begin(&mut self) -> bool {
        match self.todo.pop_front() {
            None => return false,
            Some(Todo::Command(next)) => {
                self.gpu.runtime.work(self.gpu.model.costs.submit);
                self.command = next.0;
                self.fence = self.first.take().unwrap_or_default();
                let (what, how) =
                    ((&self.pages, self.zapped.as_slice()), (&self.fence, &mut self.random));
                self.gpu.submit((&self.record, self.lane), next, what, how);
            }
            Some(Todo::Other(fence)) => {
                let now = self.gpu.runtime.now();
                self.other = Some(self.record.step(
                    self.lane,
                    Step {
                        command: self.command,
                        submitted: now,
                        latency: Duration::ZERO,
                        done: now,
                    },
                ));
                self.fence = fence;
            }
        }
        true
    }

    /// Waits for all steps, and begins each that depends on the one before.
    async fn finish(mut self, how: Wait) {
        loop {
            // For who looks at the run through `tracing`, as the example `trace` does.
            let span = match self.command {
                Command::Jobs => tracing::info_span!("jobs in flight", gpu = self.gpu.id),
                Command::Preempt => tracing::info_span!("preemption", gpu = self.gpu.id),
                Command::TlbFlush => tracing::info_span!("TLB flush", gpu = self.gpu.id),
            };
            let wait = self.fence.wait().instrument(span);
            if how == Wait::Pending || !self.gpu.runtime.may_block() {
                wait.await;
            } else {
                self.gpu.runtime.block_on(wait, self.gpu.model.costs.wake);
            }
            if let Some(step) = self.other.take() {
                self.record.joined(self.lane, step, self.gpu.runtime.now());
            }
            if !self.begin() {
                break;
            }
            if how == Wait::Rounds {
                yield_now().await;
            }
        }
        if self.gpu.fault == Some(Fault::FlushBeforeZap) {
            let mut table = self.gpu.table.lock();
            for (page, _) in &self.zapped {
                table.remove(page);
            }
        }
        self.over.set();
    }
}

/// What the GPU reads: mirrored mappings, by their first page.
#[derive(Default)]
pub struct Mirrors(BTreeMap<Page, Arc<Subscription<Mirror>>>);

impl Mirrors {
    fn key(mirror: &Subscription<Mirror>) -> Page {
        (mirror.space, mirror.range().start() / PAGE)
    }

    pub fn insert(&mut self, mirror: &Arc<Subscription<Mirror>>) {
        self.0.insert(Self::key(mirror), mirror.clone());
    }

    pub fn remove(&mut self, mirror: &Arc<Subscription<Mirror>>) {
        // Another one may have been mapped there since.
        if self.0.get(&Self::key(mirror)).is_some_and(|known| Arc::ptr_eq(known, mirror)) {
            self.0.remove(&Self::key(mirror));
        }
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The one in which a page lies.
    pub fn of(&self, page: Page) -> Option<Arc<Subscription<Mirror>>> {
        let (_, mirror) = self.0.range((page.0, 0)..=page).next_back()?;
        (mirror.range().last() / PAGE >= page.1).then(|| mirror.clone())
    }

    pub fn any(&self, random: &mut impl Rng) -> Option<Arc<Subscription<Mirror>>> {
        if self.0.is_empty() {
            return None;
        }
        self.0.values().nth(random.random_range(0..self.0.len())).cloned()
    }
}

/// Nothing is mapped there any more, or it may not be read.
#[derive(Debug)]
struct Unmapped;

impl Gpu {
    /// A page fault of the device: looks at the program's memory and installs what is found, unless
    /// it changes meanwhile. Whether there is an entry now.
    pub async fn fault_in(&self, mirror: &Subscription<Mirror>, page: Page) -> bool {
        let half = self.model.fault / 2;
        let look = async || {
            self.runtime.sleep(half).await;
            let found = self.oracle.look(page);
            self.runtime.sleep(half).await;
            found
        };
        let install = |table: &mut BTreeMap<Page, u64>, generation| {
            // Also when its mapping has gone, and another one is there: then it is that one's to
            // install.
            let open = !mirror.detached.load(Ordering::Relaxed);
            if open {
                table.insert(page, generation);
            }
            open
        };
        match self.fault {
            Some(Fault::LateBegin) => loop {
                let Some(generation) = look().await else { return false };
                let sequence = mirror.read_begin().await;
                if let Ok(installed) =
                    self.table.install(mirror, sequence, |table| install(table, generation))
                {
                    return installed;
                }
            },
            Some(Fault::RetryOutsideLock) => loop {
                let sequence = mirror.read_begin().await;
                let Some(generation) = look().await else { return false };
                if !mirror.read_retry(sequence) {
                    self.runtime.sleep(self.model.fault * 2).await;
                    return install(&mut self.table.lock(), generation);
                }
            },
            _ => {
                let prepare = |_| async { look().await.ok_or(Unmapped) };
                self.table
                    .mirror(mirror, RetryBudget::retries(64), prepare, install)
                    .await
                    .unwrap_or(false)
            }
        }
    }
}
