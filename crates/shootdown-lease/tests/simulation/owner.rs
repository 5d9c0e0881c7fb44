//! A process that is the owner, or was.

use super::clock::{Clock, MS, US};
use super::memory::{PAGES, pages, ranges};
use super::mirror::Contents;
use super::plan::{self, FENCE, LATE, Without, short};
use super::world::{Code, Process, World};
use rand::Rng;
use shootdown_lease::{Boot, Decision, Ending, InvalidationId, Memory, Owner, Time, ToMirror};
use std::collections::BTreeMap;
use std::time::Duration;

/// For how long a lock service grants ownership, on the owner's clock, and after how long it may be
/// granted to another, in real time: rule 3 once more.
const OWNERSHIP: u64 = 60 * MS;
const OWNERSHIP_LOST: u64 = OWNERSHIP * 10 / 9 + 1;

pub struct Running {
    pages: Vec<usize>,
    began: Time,
    /// Pauses of the owner before.
    paused: u64,
    pub done: bool,
}

pub struct OwnerProcess {
    pub owner: Owner,
    pub clock: Clock,
    pub alive: bool,
    pub paused: bool,
    paused_at: u64,
    /// How long it stood still so far, and what may have run late.
    stood: u64,
    pub deferred: Vec<Code>,
    pub running: BTreeMap<InvalidationId, Running>,
    /// It does not reach the lock service.
    pub cut_off: bool,
    /// It knows that it is the owner no more; what it has begun goes on.
    pub deposed: bool,
    owned_until: Time,
    /// What an event loop has read at its last turn.
    cached: Time,
    tick_at: u64,
}

impl OwnerProcess {
    pub fn resumed(&mut self, now: u64) -> Vec<Code> {
        if self.paused {
            self.stood += now - self.paused_at + LATE;
        }
        self.paused = false;
        std::mem::take(&mut self.deferred)
    }

    pub fn pause(&mut self, now: u64) {
        (self.paused, self.paused_at) = (true, now);
    }
}

impl World {
    pub fn start_owner(&mut self, memory: Memory) {
        if memory == Memory::Survived
            && self.owners[self.holder].alive
            && !self.owners[self.holder].cut_off
        {
            return;
        }
        self.boots += 1;
        let same_host =
            self.owners.get(self.holder).filter(|old| !old.alive).map(|old| old.clock.clone());
        let clock = same_host.unwrap_or_else(|| plan::clock(&mut self.rng, self.plan.owner_rate()));
        let now = clock.read(self.now);
        let mut owner = Owner::new(Boot(self.boots), self.plan.terms.clone(), memory, now).unwrap();
        if let Without::Rule(rule) = self.plan.without {
            owner.leave_out(rule);
        }
        self.memory.boot = self.boots;
        self.holder = self.owners.len();
        self.owners.push(OwnerProcess {
            owner,
            clock,
            alive: true,
            paused: false,
            paused_at: 0,
            stood: 0,
            deferred: Vec::new(),
            running: BTreeMap::new(),
            cut_off: false,
            deposed: false,
            owned_until: now,
            cached: now,
            tick_at: u64::MAX,
        });
        let process = self.holder;
        self.refresh(process);
        self.code_after(OWNERSHIP / 3, Process::Owner(process), Code::Refresh);
        let first = self.rng.random_range(0..self.plan.changes);
        self.code_after(first, Process::Owner(process), Code::Change);
        self.drain_owner(process);
    }

    /// Asks the lock service for more time; returns whether the process is the owner still.
    fn refresh(&mut self, process: usize) -> bool {
        let owner = &mut self.owners[process];
        if owner.cut_off || process != self.holder {
            return false;
        }
        owner.owned_until = owner.clock.read(self.now) + Duration::from_nanos(OWNERSHIP);
        self.held_until = self.now + OWNERSHIP_LOST;
        true
    }

    pub fn run_owner(&mut self, process: usize, code: Code) {
        let own = Process::Owner(process);
        let now = self.owners[process].clock.read(self.now);
        match code {
            Code::Handle { .. } | Code::Change | Code::Refresh if self.owners[process].deposed => {
                return;
            }
            Code::Handle { from, message, read } => {
                if read.is_none() && self.rng.random_ratio(1, 30) {
                    // It stands still between the clock and the call.
                    let late = self.rng.random_range(0..60 * MS);
                    return self.code_after(
                        late,
                        own,
                        Code::Handle { from, message, read: Some(now) },
                    );
                }
                let now = read.unwrap_or(now);
                let checked = self.plan.keeps(Without::OwnershipChecked);
                if checked
                    && now >= self.owners[process].owned_until
                    && (read.is_some() || !self.refresh(process))
                {
                    if process != self.holder {
                        self.counts.deposed += 1;
                        self.owners[process].deposed = true;
                    }
                    return;
                }
                let owner = &mut self.owners[process];
                let at = if self.plan.without == Without::FreshTime { owner.cached } else { now };
                owner.owner.handle(from, message, at);
            }
            Code::Tick => {
                let owner = &mut self.owners[process];
                if owner.tick_at <= self.now {
                    owner.tick_at = u64::MAX;
                }
                owner.cached = now;
                owner.owner.tick(now);
            }
            Code::Refresh => {
                self.refresh(process);
                self.code_after(OWNERSHIP / 3, own, Code::Refresh);
            }
            Code::Change => self.change(process, now),
            Code::Write(id) => {
                let owner = &self.owners[process];
                let refuses = self.plan.keeps(Without::WritesFenced);
                if !self.memory.write(&owner.running[&id].pages, owner.owner.boot(), refuses) {
                    self.counts.refused_writes += 1;
                }
                let after = short(&mut self.rng, 3 * MS);
                self.code_after(after, own, Code::End(id));
            }
            Code::End(id) => {
                let owner = &mut self.owners[process];
                owner.running.remove(&id);
                owner.owner.end(id, now).unwrap();
            }
            Code::Serve { to, epoch, nonce, range, version } => {
                let contents: Contents = pages(&[range])
                    .into_iter()
                    .map(|page| (page, self.memory.versions[page]))
                    .collect();
                self.send_to_mirror(to, &Owner::fetched(epoch, nonce, version), &contents);
            }
            Code::Fence(what) => {
                self.memory.fence(what);
                self.counts.fences += 1;
                self.owners[process].owner.fenced(what, now);
            }
            _ => unreachable!("{code:?} runs in a mirror"),
        }
        self.drain_owner(process);
    }

    /// Begins to change some pages.
    fn change(&mut self, process: usize, now: Time) {
        // Nothing new shortly before the end.
        if self.now + 400 * MS > self.plan.end {
            return;
        }
        let mut changed: Vec<usize> = (0..PAGES).filter(|_| self.rng.random_ratio(1, 4)).collect();
        if changed.is_empty() {
            changed.push(self.rng.random_range(0..PAGES));
        }
        let owner = &mut self.owners[process];
        let id = owner.owner.invalidate(ranges(&changed), now);
        owner
            .running
            .insert(id, Running { pages: changed, began: now, paused: owner.stood, done: false });
        self.counts.invalidations += 1;
        self.counts.at_once = self.counts.at_once.max(owner.running.len() as u64);
        let next = self.rng.random_range(0..self.plan.changes * 2);
        self.code_after(next, Process::Owner(process), Code::Change);
    }

    fn drain_owner(&mut self, process: usize) {
        let own = Process::Owner(process);
        while let Some((to, message)) = self.owners[process].owner.next_message() {
            if let ToMirror::Welcome { epoch, .. } = message
                && self.owners[process].owner.members().any(|(_, of, _)| of == epoch)
            {
                self.booked.insert(epoch);
            }
            self.send_to_mirror(to, &message, &Vec::new());
        }
        while let Some(decision) = self.owners[process].owner.next_decision() {
            match decision {
                Decision::Done { invalidation, endings } => {
                    self.counts.done += 1;
                    self.counts.waited += u64::from(!endings.is_empty());
                    for (_, ending) in endings {
                        *match ending {
                            Ending::Acknowledged => &mut self.counts.acknowledged,
                            Ending::Left => &mut self.counts.left,
                            Ending::JoinedAnew => &mut self.counts.joined_anew,
                            Ending::Expired => &mut self.counts.expired,
                        } += 1;
                    }
                    // Nothing hurries an owner that was deposed and does not know.
                    let slow = self.owners[process].cut_off && self.rng.random_bool(0.8);
                    let after = if slow {
                        self.rng.random_range(0..250 * MS)
                    } else {
                        short(&mut self.rng, 3 * MS)
                    };
                    self.code_after(after, own, Code::Write(invalidation));
                    self.look_at_wait(process, invalidation);
                }
                Decision::Fence(what) => {
                    let after = self.rng.random_range(0..FENCE);
                    self.code_after(after, own, Code::Fence(what));
                }
                Decision::Serve { to, epoch, nonce, range, version } => {
                    let after = short(&mut self.rng, 5 * MS);
                    self.code_after(after, own, Code::Serve { to, epoch, nonce, range, version });
                }
            }
        }
        let owner = &self.owners[process];
        let Some(at) =
            owner.owner.deadline().map(|deadline| owner.clock.real_at(deadline).max(self.now))
        else {
            return;
        };
        if at < owner.tick_at {
            let at = at + self.turn();
            self.owners[process].tick_at = at;
            self.code_after(at - self.now, own, Code::Tick);
        }
    }

    /// Patience, the owner's term, what the owner stood still and what its host took to fence: no
    /// invalidation takes longer, on the owner's clock.
    fn look_at_wait(&mut self, process: usize, id: InvalidationId) {
        let owner = &mut self.owners[process];
        let now = owner.clock.read(self.now);
        let Some(running) = owner.running.get_mut(&id) else { return };
        running.done = true;
        let terms = &self.plan.terms;
        let stood = (owner.stood - running.paused)
            + if self.plan.terms.fences { FENCE } else { 0 }
            + 2 * 300 * US;
        let most = terms.patience + terms.owner_term() + Duration::from_nanos(stood * 11 / 10 + 1);
        let took = now.since(running.began);
        if took > most {
            self.is_stuck(format!("an invalidation took {took:?}, and {most:?} is the most"));
        }
    }
}
