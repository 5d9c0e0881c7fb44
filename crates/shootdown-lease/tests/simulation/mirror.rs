//! A process of a mirror: copies that readers use, and devices.

use super::clock::{Clock, MS, US};
use super::memory::{PAGES, pages, range};
use super::plan::{FLUSH, Without, short};
use super::world::{Code, Event, Process, World};
use rand::Rng;
use shootdown_lease::{Epoch, Incarnation, Mirror, MirrorDecision, Nonce, ToMirror};
use std::collections::BTreeMap;
use std::time::Duration;

/// Versions of pages that go with a message.
pub type Contents = Vec<(usize, u64)>;

/// A read under way.
#[derive(Clone, Debug)]
pub struct Read {
    page: usize,
    version: u64,
    /// The page's sequence before the use.
    sequence: u64,
    /// Whether the lease was valid before the use.
    before: bool,
    /// What was current at the use.
    current: u64,
}

pub struct MirrorProcess {
    pub host: usize,
    pub mirror: Mirror,
    pub clock: Clock,
    pub alive: bool,
    pub paused: bool,
    paused_at: u64,
    pub deferred: Vec<Code>,
    /// Readers run already, while the loop waits for its turn.
    pub readers_run: bool,
    /// Whether it hears a `Gone`.
    pub hints: bool,
    /// Its own connection brings nothing from the first to the second of these real times.
    pub deaf: (u64, u64),
    /// Copies by page.
    copies: [Option<u64>; PAGES],
    /// Counts whenever a page is zapped.
    sequences: [u64; PAGES],
    fetching: BTreeMap<Nonce, usize>,
    arrived: BTreeMap<Nonce, Contents>,
    /// What devices reach by themselves: the version when it was mapped, and by which epoch.
    pub mapped: BTreeMap<usize, (u64, Epoch)>,
    tick_at: u64,
}

impl MirrorProcess {
    pub fn resumed(&mut self, now: u64, stands: bool) -> Vec<Code> {
        if self.paused && stands {
            self.clock.stood += now - self.paused_at;
            self.tick_at = u64::MAX;
            self.deferred.push(Code::Tick);
        }
        self.paused = false;
        std::mem::take(&mut self.deferred)
    }

    pub fn pause(&mut self, now: u64) {
        (self.paused, self.paused_at, self.readers_run) = (true, now, false);
    }

    fn zap(&mut self, pages: &[usize]) {
        for page in pages {
            self.copies[*page] = None;
            self.sequences[*page] += 1;
        }
    }
}

impl World {
    /// The lives of a host, the newest last.
    pub fn lives(&self, host: usize) -> Vec<usize> {
        (0..self.mirrors.len())
            .filter(|life| self.mirrors[*life].alive && self.mirrors[*life].host == host)
            .collect()
    }

    pub fn start_mirror(&mut self, host: usize) {
        if self.healed && !self.lives(host).is_empty() {
            return;
        }
        let before =
            self.mirrors.iter().rev().find(|life| life.host == host).map(|life| life.clock.clone());
        let clock =
            before.unwrap_or_else(|| super::plan::clock(&mut self.rng, self.plan.mirror_rate()));
        let now = clock.read(self.now);
        let process = self.mirrors.len();
        let mut mirror = Mirror::new(Incarnation(process as u64), self.plan.settings.clone(), now);
        if let Without::Rule(rule) = self.plan.without {
            mirror.leave_out(rule);
        }
        self.mirrors.push(MirrorProcess {
            host,
            mirror,
            clock,
            alive: true,
            paused: false,
            paused_at: 0,
            deferred: Vec::new(),
            readers_run: false,
            hints: self.plan.hints,
            deaf: (0, 0),
            copies: [None; PAGES],
            sequences: [0; PAGES],
            fetching: BTreeMap::new(),
            arrived: BTreeMap::new(),
            mapped: BTreeMap::new(),
            tick_at: u64::MAX,
        });
        for _ in 0..3 {
            self.code_after(MS, Process::Mirror(process), Code::ReadBegin);
        }
        if self.plan.devices {
            self.after(MS, Event::Access(process));
        }
        self.drain_mirror(process);
    }

    /// A process dies; its devices go on for a while.
    pub fn kill_mirror(&mut self, process: usize) {
        self.mirrors[process].alive = false;
        let after = self.rng.random_range(0..250 * MS);
        self.after(after, Event::DevicesEnd(process));
    }

    pub fn run_mirror(&mut self, process: usize, code: Code) {
        let life = &mut self.mirrors[process];
        let now = life.clock.read(self.now);
        match code {
            Code::Receive { message, contents } => {
                if let ToMirror::Fetched { nonce, .. } = message
                    && life.fetching.contains_key(&nonce)
                {
                    life.arrived.insert(nonce, contents);
                }
                life.mirror.handle(message, now);
            }
            Code::Tick => {
                if life.tick_at <= self.now {
                    life.tick_at = u64::MAX;
                }
                life.mirror.tick(now);
            }
            Code::Flushed { epoch, invalidation, pages } => {
                life.mapped.retain(|page, (_, of)| *of != epoch || !pages.contains(page));
                life.mirror.invalidated(epoch, invalidation, now);
            }
            Code::Stopped { epoch } => {
                life.mapped.retain(|_, (_, of)| *of != epoch);
                life.mirror.stopped(now);
            }
            Code::Install { epoch, pages, seen, contents } => {
                self.install(process, epoch, &pages, &seen, &contents)
            }
            Code::ReadBegin => return self.begin_read(process),
            Code::ReadUse(read) => {
                let read = Read { current: self.memory.versions[read.page], ..read };
                let after = self.step();
                return self.code_after(after, Process::Mirror(process), Code::ReadCheck(read));
            }
            Code::ReadCheck(read) => return self.check_read(process, &read),
            _ => unreachable!("{code:?} runs in an owner"),
        }
        self.drain_mirror(process);
    }

    fn step(&mut self) -> u64 {
        match self.rng.random_range(0..10) {
            0..3 => 0,
            3..5 => self.rng.random_range(0..10 * MS),
            _ => self.rng.random_range(0..400 * US),
        }
    }

    fn begin_read(&mut self, process: usize) {
        let (page, own) = (self.rng.random_range(0..PAGES), Process::Mirror(process));
        let life = &mut self.mirrors[process];
        let now = life.clock.read(self.now);
        if let Some(version) = life.copies[page] {
            let before = life.mirror.is_valid(now);
            let read = Read { page, version, sequence: life.sequences[page], before, current: 0 };
            let after = self.step();
            return self.code_after(after, own, Code::ReadUse(read));
        }
        if !life.fetching.values().any(|of| *of == page)
            && let Ok(nonce) = life.mirror.fetch(range(page), now)
        {
            life.fetching.insert(nonce, page);
            self.drain_mirror(process);
        }
        let after = self.rng.random_range(0..2 * MS);
        self.code_after(after, own, Code::ReadBegin);
    }

    /// After the use: the page was not zapped, and the lease has not ended.
    fn check_read(&mut self, process: usize, read: &Read) {
        let life = &self.mirrors[process];
        let valid = if self.plan.keeps(Without::CheckedAfterUse) {
            life.mirror.is_valid(life.clock.read(self.now))
        } else {
            read.before
        };
        if valid && life.sequences[read.page] == read.sequence {
            self.counts.accepted += 1;
            if read.version < read.current {
                let what = format!(
                    "{}: version {} of page {} was read, and {} was current",
                    process, read.version, read.page, read.current
                );
                self.is_stale(|| what);
            }
        } else {
            self.counts.rejected += 1;
        }
        let next = self.rng.random_range(0..3 * MS);
        self.code_after(next, Process::Mirror(process), Code::ReadBegin);
    }

    /// A device reaches memory by what is mapped for it.
    pub fn access(&mut self, process: usize) {
        let life = &self.mirrors[process];
        if !life.alive && life.mapped.is_empty() {
            return;
        }
        if !life.mapped.is_empty() {
            let at = self.rng.random_range(0..life.mapped.len());
            let (page, (version, epoch)) =
                life.mapped.iter().nth(at).map(|(page, of)| (*page, *of)).unwrap();
            self.access_page(process, page, version, epoch);
        }
        let next = self.rng.random_range(0..2 * MS);
        self.after(next, Event::Access(process));
    }

    fn access_page(&mut self, process: usize, page: usize, version: u64, epoch: Epoch) {
        if !self.memory.is_open_to(epoch) {
            self.counts.refused += 1;
            return;
        }
        self.counts.current += 1;
        let current = self.memory.versions[page];
        let owner = &self.owners[self.holder].owner;
        let closed = epoch.boot == owner.boot()
            && self.booked.contains(&epoch)
            && !owner.members().any(|(_, of, _)| of == epoch);
        if version < current || closed {
            self.is_stale(|| {
                format!("a device of {process} reached version {version} of page {page} by {epoch}, {current} was current")
            });
        }
    }

    /// In one critical section: nothing was zapped since the contents came, and the lease is valid.
    fn install(
        &mut self,
        process: usize,
        epoch: Epoch,
        pages: &[usize],
        seen: &[u64],
        contents: &Contents,
    ) {
        let life = &mut self.mirrors[process];
        let same = pages.iter().zip(seen).all(|(page, seen)| life.sequences[*page] == *seen);
        let good = same && life.mirror.is_valid(life.clock.read(self.now));
        if !good && self.plan.keeps(Without::CheckedAtInstall) {
            self.counts.dropped += 1;
            return;
        }
        self.counts.fetches += 1;
        for (page, version) in contents {
            life.copies[*page] = Some(*version);
            if self.plan.devices {
                life.mapped.insert(*page, (*version, epoch));
            }
        }
    }

    fn drain_mirror(&mut self, process: usize) {
        let own = Process::Mirror(process);
        let host = self.mirrors[process].host;
        while let Some(message) = self.mirrors[process].mirror.next_message() {
            self.send_to_owner(host, message);
        }
        while let Some(decision) = self.mirrors[process].mirror.next_decision() {
            let life = &mut self.mirrors[process];
            match decision {
                MirrorDecision::Joined { .. } => self.counts.joins += 1,
                MirrorDecision::Invalidate { epoch, invalidation, ranges } => {
                    let pages = pages(&ranges);
                    life.zap(&pages);
                    let after = short(&mut self.rng, FLUSH);
                    self.code_after(after, own, Code::Flushed { epoch, invalidation, pages });
                }
                MirrorDecision::Stop { epoch } => {
                    life.zap(&std::array::from_fn::<usize, PAGES, _>(|page| page));
                    life.fetching.clear();
                    life.arrived.clear();
                    let most = Duration::as_nanos(&self.plan.settings.time_to_stop) as u64 * 9 / 10;
                    let after = self.rng.random_range(0..=most);
                    self.code_after(after, own, Code::Stopped { epoch });
                }
                MirrorDecision::Install { nonce, .. } => {
                    life.fetching.remove(&nonce);
                    let contents = life.arrived.remove(&nonce).unwrap();
                    // Of which epoch a device's mapping is: the decision comes before a stop does.
                    let Some(epoch) = life.mirror.epoch() else { continue };
                    let pages: Vec<usize> = contents.iter().map(|(page, _)| *page).collect();
                    let seen = pages.iter().map(|page| life.sequences[*page]).collect();
                    let after = short(&mut self.rng, 5 * MS);
                    self.code_after(after, own, Code::Install { epoch, pages, seen, contents });
                }
                MirrorDecision::Collided { nonce } => {
                    self.counts.collided += 1;
                    life.fetching.remove(&nonce);
                    life.arrived.remove(&nonce);
                }
                MirrorDecision::FetchRefused { nonce, .. } => {
                    life.fetching.remove(&nonce);
                }
                MirrorDecision::Denied(_) => {}
            }
        }
        let life = &self.mirrors[process];
        let Some(at) =
            life.mirror.deadline().map(|deadline| life.clock.real_at(deadline).max(self.now))
        else {
            return;
        };
        if at < life.tick_at {
            let at = at + self.turn();
            self.mirrors[process].tick_at = at;
            self.code_after(at - self.now, own, Code::Tick);
        }
    }
}
