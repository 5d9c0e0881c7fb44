//! An owner and its hosts, each with the real ends of the protocol.

use crate::options::Options;
use crate::time::{GaveUp, Processor, Virtual};
use futures::executor::{LocalPool, LocalSpawner};
use futures::future::{FutureExt, LocalBoxFuture};
use futures::task::LocalSpawnExt;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal};
use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture,
    Subscription, WouldBlock,
};
use shootdown_lease::engine::{Hub, Leased, Mirrors, Outgoing};
use shootdown_lease::{
    Boot, Host, Incarnation, Memory, Mirror, MirrorSettings, Owner, Standing, Terms,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What is different in a measurement.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup {
    pub hosts: u32,
    pub tree: bool,
    pub loss: f64,
    pub stragglers: f64,
}

/// Who is dead in the last invalidation of a measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dead {
    /// The last host: a leaf of a tree.
    Leaf,
    /// The first host, which in a tree tells others.
    Inner,
}

/// What one measurement has seen.
#[derive(Debug, Default)]
pub struct Measured {
    pub times: Vec<Duration>,
    /// Of an invalidation with a dead host.
    pub dead: Option<Duration>,
    /// The share of its time that the owner's processor worked while nothing was invalidated.
    pub owner_busy: f64,
    /// GPUs that could reach memory when it changed: has to be 0.
    pub stale: u64,
}

/// A GPU: what it has mapped, and until when it may still use that.
struct Gpu {
    mapped: DriverLock<bool>,
    /// In nanoseconds: the end of the flushes that were begun.
    uses_until: Arc<AtomicU64>,
    time: Virtual,
    flush: Mutex<(SmallRng, LogNormal<f64>)>,
}

impl IntervalNotifier for Gpu {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let mut mapped = self.mapped.lock_for(invalidation);
        let now = self.time.now();
        if std::mem::take(&mut *mapped) {
            let (rng, distribution) = &mut *self.flush.lock().unwrap();
            let took = Duration::from_secs_f64(distribution.sample(rng));
            self.uses_until.fetch_max((now + took).as_nanos(), Ordering::Relaxed);
        }
        let left = Duration::from_nanos(
            self.uses_until.load(Ordering::Relaxed).saturating_sub(now.as_nanos()),
        );
        Ok((!left.is_zero()).then(|| PassFuture::new(self.time.sleep(left))))
    }
}

struct Node {
    leased: Leased,
    gpus: Vec<Subscription<Gpu>>,
    alive: Rc<Cell<bool>>,
}

/// Who tells hosts of invalidations: the owner, or a host of a tree.
#[derive(Clone)]
struct Teller {
    hub: Hub,
    space: AddressSpace,
    _mirrors: Rc<Subscription<Mirrors>>,
    processor: Processor,
    alive: Rc<Cell<bool>>,
}

pub struct Fleet<'a> {
    options: &'a Options,
    setup: Setup,
    time: Virtual,
    pool: LocalPool,
    rng: Rc<RefCell<SmallRng>>,
    space: AddressSpace,
    owner: Teller,
    nodes: Rc<Vec<Node>>,
}

fn memory() -> AddressRange {
    AddressRange::new(1 << 30, 1 << 20).unwrap()
}

/// A future of a host: it stands still for ever once that is dead.
async fn of(alive: Rc<Cell<bool>>, mut work: LocalBoxFuture<'static, ()>) {
    std::future::poll_fn(
        |cx| if alive.get() { work.poll_unpin(cx) } else { std::task::Poll::Pending },
    )
    .await;
}

/// How long an invalidation may take a host of a tree whose hosts below have these terms: they have
/// to be done before its own patience and lease end.
fn wait_of(terms: &Terms) -> Duration {
    terms.patience + terms.owner_term()
}

impl<'a> Fleet<'a> {
    pub fn new(options: &'a Options, setup: Setup) -> Self {
        let (time, pool) = (Virtual::default(), LocalPool::new());
        let rng = Rc::new(RefCell::new(SmallRng::seed_from_u64(options.seed)));
        let children = if setup.tree { options.fan_out } else { setup.hosts };
        // Terms from the leaves upwards: depth 0 tells leaves only.
        let depth_of = |mut host: u32| {
            let mut depth = 0_usize;
            while host * children + children < setup.hosts && children > 0 {
                host = host * children + children;
                depth += 1;
            }
            depth
        };
        let mut terms = vec![Terms::new(options.term)];
        for _ in 0..depth_of(0) + 1 {
            let below = wait_of(terms.last().unwrap());
            let mut above = Terms::new(below + options.term);
            (above.patience, above.resend) = (below + options.term / 10, options.term / 10);
            terms.push(above);
        }
        for level in &mut terms {
            (level.members, level.resend) = (20_000, options.term / 10);
        }
        let space = AddressSpace::new();
        let owner_of = |level: usize| {
            let mut terms: Terms = terms[level].clone();
            terms.shared = memory();
            Owner::new(Boot(1), terms, Memory::New, time.now()).unwrap()
        };
        let teller = |hub: Hub, space: &AddressSpace, alive: &Rc<Cell<bool>>| {
            let mirrors = Rc::new(hub.insert(space).unwrap());
            Teller {
                hub,
                space: space.clone(),
                _mirrors: mirrors,
                processor: Processor::new(&time),
                alive: alive.clone(),
            }
        };
        let forever = Rc::new(Cell::new(true));
        let top = if setup.tree { depth_of(0) } else { 0 };
        let clock = time.clone();
        let owner = teller(Hub::new(owner_of(top), move || clock.now()), &space, &forever);
        let mut fleet = Self {
            options,
            setup,
            time: time.clone(),
            pool,
            rng,
            space,
            owner: owner.clone(),
            nodes: Rc::default(),
        };
        fleet.run_hub(&owner);
        let mut tellers: Vec<Option<Teller>> = Vec::new();
        let mut nodes = Vec::new();
        for host in 0..setup.hosts {
            let (alive, clock) = (Rc::new(Cell::new(true)), time.clone());
            let below = host
                .checked_mul(children)
                .map(|first| first + children)
                .filter(|first| setup.tree && *first < setup.hosts);
            let level = below.map(|_| depth_of(host) - 1);
            let mut settings = MirrorSettings::default();
            settings.retry = options.term / 5;
            settings.time_to_stop = level.map_or(Duration::ZERO, |level| wait_of(&terms[level]));
            let leased = Leased::new(
                Mirror::new(Incarnation(u64::from(host) + 1), settings, time.now()),
                move || clock.now(),
            );
            let gpus = (0..options.gpus)
                .map(|gpu| leased.space().insert(memory(), fleet.gpu(host, gpu)).unwrap())
                .collect();
            // A host that tells others is a mirror above and an owner below: its hub is one more
            // device.
            let own = level
                .map(|level| teller(Hub::below(&leased, owner_of(level)), leased.space(), &alive));
            if let Some(own) = &own {
                fleet.run_hub(own);
            }
            let above = match host.checked_sub(children) {
                Some(later) if setup.tree => {
                    tellers[(later / children) as usize].clone().unwrap_or_else(|| owner.clone())
                }
                _ => owner.clone(),
            };
            let processor =
                own.as_ref().map_or_else(|| Processor::new(&time), |own| own.processor.clone());
            fleet.connect(host, &above, &leased, &processor, &alive);
            tellers.push(own);
            nodes.push(Node { leased, gpus, alive });
        }
        fleet.nodes = Rc::new(nodes);
        fleet
    }

    fn gpu(&self, host: u32, gpu: u32) -> Gpu {
        let mut rng = SmallRng::seed_from_u64(
            self.options.seed ^ u64::from(host) << 20 ^ u64::from(gpu) << 8,
        );
        let slow = if rng.random_bool(self.setup.stragglers) { 20.0 } else { 1.0 };
        let flush = LogNormal::new((self.options.flush.as_secs_f64() * slow).ln(), 0.5).unwrap();
        Gpu {
            mapped: DriverLock::default(),
            uses_until: Arc::default(),
            time: self.time.clone(),
            flush: Mutex::new((rng, flush)),
        }
    }

    fn spawner(&self) -> LocalSpawner {
        self.pool.spawner()
    }

    fn run_hub(&self, teller: &Teller) {
        let (hub, time) = (teller.hub.clone(), self.time.clone());
        let run = async move { hub.run(|left| time.sleep(left)).await };
        self.spawner().spawn_local(of(teller.alive.clone(), run.boxed_local())).unwrap();
    }

    /// A message's way: a random delay, or none at all.
    fn way(&self) -> impl Fn() -> Option<Duration> + Clone + 'static {
        let (rng, loss, half) = (self.rng.clone(), self.setup.loss, self.options.rtt / 2);
        let jitter = LogNormal::new(0.0, 0.2).unwrap();
        move || {
            let rng = &mut *rng.borrow_mut();
            let delay = half.mul_f64(jitter.sample(rng));
            (!rng.random_bool(loss)).then_some(delay)
        }
    }

    fn connect(
        &self,
        host: u32,
        above: &Teller,
        leased: &Leased,
        processor: &Processor,
        alive: &Rc<Cell<bool>>,
    ) {
        let (spawner, cost, way) = (self.spawner(), self.options.message, self.way());
        let (time, leased, id) = (self.time.clone(), leased.clone(), Host(host.into()));
        let (run, timer) = (leased.clone(), time.clone());
        let run = async move { run.run(|left| timer.sleep(left)).await };
        spawner.spawn_local(of(alive.clone(), run.boxed_local())).unwrap();
        let down = {
            let (spawns, time, leased, way) =
                (spawner.clone(), time.clone(), leased.clone(), way.clone());
            let (mut link, above, processor, alive) =
                (above.hub.link(id), above.clone(), processor.clone(), alive.clone());
            async move {
                while let Some(outgoing) = link.next().await {
                    let (above, time, leased, way) =
                        (above.clone(), time.clone(), leased.clone(), way.clone());
                    let (processor, goes_on) = (processor.clone(), alive.clone());
                    let arrives = async move {
                        let (message, contents) = match outgoing {
                            Outgoing::Message(message) => (message, None),
                            Outgoing::Serve(serve) => {
                                if serve.ready(&above.space).await.is_err() {
                                    return;
                                }
                                (
                                    serve.message(),
                                    serve.range().len().map(|length| vec![0; length as usize]),
                                )
                            }
                        };
                        above.processor.work(cost).await;
                        if let Some(delay) = way() {
                            time.sleep(delay).await;
                            processor.work(cost).await;
                            if goes_on.get() {
                                leased.handle(message, contents);
                            }
                        }
                    };
                    spawns.spawn_local(arrives).unwrap();
                }
            }
        };
        spawner.spawn_local(of(above.alive.clone(), down.boxed_local())).unwrap();
        let (above, processor, spawns) = (above.clone(), processor.clone(), spawner.clone());
        let up = async move {
            while let Some(message) = leased.next_message().await {
                processor.work(cost).await;
                let Some(delay) = way() else { continue };
                let (time, above) = (time.clone(), above.clone());
                let arrives = async move {
                    time.sleep(delay).await;
                    above.processor.work(cost).await;
                    if above.alive.get() {
                        above.hub.handle(id, message);
                    }
                };
                spawns.spawn_local(arrives).unwrap();
            }
        };
        spawner.spawn_local(of(alive.clone(), up.boxed_local())).unwrap();
    }

    fn run(&mut self, done: impl FnMut() -> bool) -> Result<(), GaveUp> {
        let most = self.options.term * 100;
        self.time.clone().run_until(&mut self.pool, most, done)
    }

    /// Has every GPU of a host that has a lease map the memory.
    fn map_all(&mut self) -> Result<(), GaveUp> {
        let left = Rc::new(Cell::new(0_usize));
        for at in 0..self.nodes.len() {
            if !self.nodes[at].alive.get() {
                continue;
            }
            left.set(left.get() + 1);
            let (nodes, told) = (self.nodes.clone(), left.clone());
            let map = async move {
                let node = &nodes[at];
                for gpu in &node.gpus {
                    loop {
                        let seen = gpu.read_begin().await;
                        if !*gpu.mapped.lock()
                            && gpu.mapped.install(gpu, seen, |mapped| *mapped = true).is_err()
                        {
                            continue;
                        }
                        break;
                    }
                }
                told.set(told.get() - 1);
            };
            self.spawner().spawn_local(map).unwrap();
        }
        self.run(|| left.get() == 0)
    }

    /// GPUs that may still reach the memory at this moment: mapped, and by a lease that has not
    /// ended.
    fn reaching(&self) -> u64 {
        let now = self.time.now().as_nanos();
        let uses = |gpu: &Subscription<Gpu>| {
            *gpu.mapped.lock() || gpu.uses_until.load(Ordering::Relaxed) > now
        };
        let of = |node: &Node| node.gpus.iter().filter(|gpu| uses(gpu)).count() as u64;
        // A host whose lease has ended is stopped; one that is dead is, because nothing of it runs.
        let holds = |node: &&Node| {
            node.leased.has_lease()
                || matches!(node.leased.standing(), Standing::Stopping(_)) && node.alive.get()
        };
        self.nodes.iter().filter(holds).map(of).sum()
    }

    fn invalidate(&mut self, measured: &mut Measured) -> Result<Duration, GaveUp> {
        let (space, done) = (self.space.clone(), Rc::<Cell<bool>>::default());
        let (told, began) = (done.clone(), self.time.now());
        let (release, held) = futures::channel::oneshot::channel::<()>();
        let change = async move {
            let guard = space.invalidate(memory(), Event::Unmap).await;
            told.set(true);
            let _ = held.await;
            drop(guard);
        };
        self.spawner().spawn_local(change).unwrap();
        self.run(|| done.get())?;
        let took = self.time.now().since(began);
        measured.stale += self.reaching();
        drop(release);
        Ok(took)
    }

    /// Measures, and at the end kills a host, if one is to be dead.
    ///
    /// # Errors
    /// [`GaveUp`], if the hosts do not even join, or an invalidation does not end.
    pub fn measure(mut self, dead: Option<Dead>) -> Result<Measured, GaveUp> {
        let mut measured = Measured::default();
        // Until all have joined.
        let nodes = self.nodes.clone();
        let joined =
            move || nodes.iter().all(|node| matches!(node.leased.standing(), Standing::Live(..)));
        self.run(joined)?;
        let (began, quiet) = (self.time.now(), self.options.term * 2);
        self.owner.processor.take_busy();
        let time = self.time.clone();
        self.run(|| time.now().since(began) >= quiet)?;
        measured.owner_busy = self.owner.processor.take_busy().as_secs_f64()
            / self.time.now().since(began).as_secs_f64();
        let count = if dead.is_some() { 0 } else { self.options.invalidations };
        for _ in 0..count {
            self.map_all()?;
            let took = self.invalidate(&mut measured)?;
            measured.times.push(took);
        }
        if let Some(dead) = dead {
            self.map_all()?;
            let host = if dead == Dead::Leaf { self.nodes.len() - 1 } else { 0 };
            self.nodes[host].alive.set(false);
            measured.dead = Some(self.invalidate(&mut measured)?);
        }
        measured.times.sort_unstable();
        Ok(measured)
    }
}
