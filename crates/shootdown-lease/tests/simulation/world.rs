//! The queue of what happens when, in real time that nobody in the run can read.

use super::clock::{MS, US};
use super::counts::Counts;
use super::memory::Memory;
use super::mirror::{Contents, MirrorProcess, Read};
use super::network::Link;
use super::owner::OwnerProcess;
use super::plan::{LATE, Plan, Without};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use shootdown::AddressRange;
use shootdown_lease::{Epoch, Fenced, Host, InvalidationId, Nonce, Time, ToMirror, ToOwner};
use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap};

/// A process of an owner, or of a mirror, by its place in the world's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    Owner(usize),
    Mirror(usize),
}

#[derive(Clone, Debug)]
pub enum Code {
    // Of an owner.
    Handle { from: Host, message: ToOwner, read: Option<Time> },
    Tick,
    Refresh,
    Change,
    Write(InvalidationId),
    End(InvalidationId),
    Serve { to: Host, epoch: Epoch, nonce: Nonce, range: AddressRange, version: u64 },
    Fence(Fenced),
    // Of a mirror.
    Receive { message: ToMirror, contents: Contents },
    Flushed { epoch: Epoch, invalidation: InvalidationId, pages: Vec<usize> },
    Stopped { epoch: Epoch },
    Install { epoch: Epoch, pages: Vec<usize>, seen: Vec<u64>, contents: Contents },
    ReadBegin,
    ReadUse(Read),
    ReadCheck(Read),
}

impl Code {
    fn reads(&self) -> bool {
        matches!(self, Self::ReadBegin | Self::ReadUse(_) | Self::ReadCheck(_))
    }
}

#[derive(Clone, Debug)]
pub enum Event {
    /// Runs in a process, when that runs.
    Code(Process, Code),
    Resume(Process),
    /// A device reaches the memory, whatever its host's processes do.
    Access(usize),
    /// The devices of a process that is dead are stopped.
    DevicesEnd(usize),
    Chaos(usize),
    /// A partition between the owner and a host.
    Cut(usize),
    Unblock(usize),
    StartMirror(usize),
    StartOwner,
    TakeOver,
    Kill(usize),
    Heal,
}

struct Due(u64, u64, Event);

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.0, other.1).cmp(&(self.0, self.1))
    }
}

pub struct World {
    pub plan: Plan,
    pub rng: SmallRng,
    pub now: u64,
    queue: BinaryHeap<Due>,
    order: u64,
    pub counts: Counts,
    pub memory: Memory,
    pub owners: Vec<OwnerProcess>,
    pub mirrors: Vec<MirrorProcess>,
    pub links: Vec<Link>,
    pub boots: u64,
    /// Who is the owner, until when at least: what a lock service knows.
    pub holder: usize,
    pub held_until: u64,
    /// Epochs that have been in the books.
    pub booked: BTreeSet<Epoch>,
    pub healed: bool,
    /// The first stale access.
    pub stale: Option<String>,
    /// The first promise of progress that was not kept.
    pub stuck: Option<String>,
}

/// One run, until its first violation.
pub fn run(seed: u64, without: Without) -> World {
    let mut rng = SmallRng::seed_from_u64(seed);
    let plan = Plan::new(&mut rng, without);
    let mut world = World {
        rng,
        now: 0,
        queue: BinaryHeap::new(),
        order: 0,
        counts: Counts::default(),
        memory: Memory::default(),
        owners: Vec::new(),
        mirrors: Vec::new(),
        links: Vec::new(),
        boots: 0,
        holder: 0,
        held_until: 0,
        booked: BTreeSet::new(),
        healed: false,
        stale: None,
        stuck: None,
        plan,
    };
    world.start();
    while world.stale.is_none()
        && world.stuck.is_none()
        && let Some(Due(at, _, event)) = world.queue.pop()
        && at <= world.plan.end
        && (without == Without::Nothing || !world.healed)
    {
        world.now = at;
        world.happen(event);
    }
    if world.stale.is_none() && world.stuck.is_none() {
        world.at_the_end();
    }
    world
}

impl World {
    fn start(&mut self) {
        self.start_owner(shootdown_lease::Memory::New);
        for host in 0..self.plan.mirrors {
            let link = Link::new(&mut self.rng);
            self.links.push(link);
            let after = self.rng.random_range(0..30 * MS);
            self.after(after, Event::StartMirror(host));
        }
        self.begin_chaos();
        self.after(self.plan.heal, Event::Heal);
    }

    pub fn after(&mut self, time: u64, event: Event) {
        self.order += 1;
        self.queue.push(Due(self.now + time, self.order, event));
    }

    pub fn code_after(&mut self, time: u64, process: Process, code: Code) {
        self.after(time, Event::Code(process, code));
    }

    pub fn is_stale(&mut self, what: impl FnOnce() -> String) {
        if self.stale.is_none() {
            self.stale = Some(what());
        }
    }

    pub fn is_stuck(&mut self, what: String) {
        if self.stuck.is_none() && self.plan.without == Without::Nothing {
            self.stuck = Some(what);
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Code(Process::Owner(process), code) => {
                let owner = &mut self.owners[process];
                if owner.paused {
                    owner.deferred.push(code);
                } else if owner.alive {
                    self.run_owner(process, code);
                }
            }
            Event::Code(Process::Mirror(process), code) => {
                let mirror = &mut self.mirrors[process];
                if mirror.paused && !(mirror.readers_run && code.reads()) {
                    mirror.deferred.push(code);
                } else if mirror.alive {
                    self.run_mirror(process, code);
                }
            }
            Event::Resume(process) => self.resume(process),
            Event::Access(process) => self.access(process),
            Event::DevicesEnd(process) => self.mirrors[process].mapped.clear(),
            Event::Chaos(kind) => self.chaos(kind),
            Event::Cut(host) => self.cut(host),
            Event::Unblock(host) => self.unblock(host),
            Event::StartMirror(host) => self.start_mirror(host),
            Event::StartOwner => self.start_owner(shootdown_lease::Memory::Survived),
            Event::TakeOver => self.take_over(),
            Event::Kill(process) => {
                self.kill_mirror(process);
                let host = self.mirrors[process].host;
                if self.lives(host).is_empty() {
                    self.start_mirror(host);
                }
            }
            Event::Heal => self.heal(),
        }
    }

    /// A process goes on: what waited runs in any order, and not all of it at once. Readers are
    /// threads of their own, and may run before the loop does.
    pub fn resume(&mut self, process: Process) {
        if let Process::Mirror(of) = process
            && self.mirrors[of].paused
            && !self.mirrors[of].readers_run
            && self.rng.random_bool(0.6)
        {
            let life = &mut self.mirrors[of];
            life.readers_run = true;
            let (reads, others) =
                std::mem::take(&mut life.deferred).into_iter().partition(Code::reads);
            life.deferred = others;
            let after = self.rng.random_range(0..2 * LATE);
            self.after(after, Event::Resume(process));
            return self.run_soon(process, reads);
        }
        let waited = match process {
            Process::Owner(process) => {
                // What stops an owner often cuts its links, too.
                if self.plan.partitions > 0 {
                    let (host, after) = (
                        self.rng.random_range(0..self.links.len()),
                        self.rng.random_range(0..20 * MS),
                    );
                    self.after(after, Event::Cut(host));
                }
                self.owners[process].resumed(self.now)
            }
            Process::Mirror(process) => {
                let stands = !self.plan.keeps(Without::ClocksGoOn);
                self.mirrors[process].resumed(self.now, stands)
            }
        };
        self.run_soon(process, waited);
    }

    fn run_soon(&mut self, process: Process, mut waited: Vec<Code>) {
        waited.shuffle(&mut self.rng);
        for code in waited {
            let late = if self.rng.random_bool(0.5) { 0 } else { self.rng.random_range(0..LATE) };
            self.code_after(late, process, code);
        }
    }

    /// Nothing goes wrong any more.
    fn heal(&mut self) {
        self.healed = true;
        for host in 0..self.links.len() {
            self.links[host].heal_for_good();
            let lives = self.lives(host);
            for old in lives.iter().rev().skip(1) {
                self.kill_mirror(*old);
            }
            if let Some(life) = lives.last()
                && self.mirrors[*life].paused
            {
                self.resume(Process::Mirror(*life));
            }
        }
        for process in 0..self.owners.len() {
            if process != self.holder {
                self.owners[process].alive = false;
            }
        }
        let holder = self.holder;
        self.owners[holder].cut_off = false;
        if self.owners[holder].paused {
            self.resume(Process::Owner(holder));
        }
    }

    /// Everything has ended that had 700 ms without trouble.
    fn at_the_end(&mut self) {
        let running = self.owners[self.holder].running.len();
        let owner = &self.owners[self.holder].owner;
        let waiting = owner.members().count();
        if !self.owners[self.holder].alive || running > 0 {
            return self
                .is_stuck(format!("{running} invalidations never ended; {waiting} members"));
        }
        for host in 0..self.plan.mirrors {
            let live = self.lives(host).last().and_then(|life| self.mirrors[*life].mirror.epoch());
            if !live.is_some_and(|epoch| self.owners[self.holder].owner.is_live(epoch)) {
                let stands =
                    self.lives(host).last().map(|life| self.mirrors[*life].mirror.standing());
                return self.is_stuck(format!("mirror {host} never joined again: {stands:?}"));
            }
        }
    }

    /// Small delays of code that waits for its turn.
    pub fn turn(&mut self) -> u64 {
        self.rng.random_range(0..300 * US)
    }
}
