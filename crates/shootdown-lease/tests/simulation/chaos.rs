//! What goes wrong.

use super::clock::MS;
use super::plan::Without;
use super::world::{Event, Process, World};
use rand::Rng;
use shootdown_lease::{Epoch, Host, ToOwner};

impl World {
    fn mean(&self, kind: usize) -> Option<u64> {
        let plan = &self.plan;
        let means = [
            plan.pauses,
            plan.owner_pauses,
            plan.crashes,
            plan.owner_crashes,
            plan.second_starts,
            plan.takeovers,
            plan.partitions,
            plan.links,
        ];
        means.get(kind).copied()
    }

    pub fn begin_chaos(&mut self) {
        for kind in (0..).take_while(|kind| self.mean(*kind).is_some()).collect::<Vec<_>>() {
            self.next_chaos(kind);
        }
    }

    fn next_chaos(&mut self, kind: usize) {
        if let Some(mean) = self.mean(kind).filter(|mean| *mean > 0) {
            let after = self.rng.random_range(0..mean * 2);
            self.after(after, Event::Chaos(kind));
        }
    }

    pub fn chaos(&mut self, kind: usize) {
        if self.healed {
            return;
        }
        let host = self.rng.random_range(0..self.links.len());
        let life = self.lives(host).last().copied();
        let owners: Vec<usize> =
            (0..self.owners.len()).filter(|owner| self.owners[*owner].alive).collect();
        match kind {
            0 => {
                if let Some(life) = life.filter(|life| !self.mirrors[*life].paused) {
                    self.counts.pauses += 1;
                    self.pause_mirror(life);
                }
            }
            1 => {
                if let Some(owner) =
                    owners.last().copied().filter(|owner| !self.owners[*owner].paused)
                {
                    self.counts.owner_pauses += 1;
                    self.pause_owner(owner);
                }
            }
            2 => {
                if let Some(life) = life {
                    self.counts.crashes += 1;
                    self.kill_mirror(life);
                    let after = self.rng.random_range(0..60 * MS);
                    self.after(after, Event::StartMirror(host));
                }
            }
            3 => {
                let holder = self.holder;
                if self.owners[holder].alive && !self.owners[holder].cut_off {
                    self.counts.owner_crashes += 1;
                    self.owners[holder].alive = false;
                    let after = self.rng.random_range(0..40 * MS);
                    self.after(after, Event::StartOwner);
                }
            }
            4 => {
                // A supervisor starts a second life while the first one goes on, or will.
                if let Some(life) = life {
                    self.counts.second_starts += 1;
                    if self.rng.random_bool(0.5) && !self.mirrors[life].paused {
                        self.pause_mirror(life);
                    }
                    self.mirrors[life].hints &= self.rng.random_bool(0.3);
                    self.start_mirror(host);
                    let from = self.now + self.rng.random_range(10 * MS..70 * MS);
                    let until = from + self.rng.random_range(50 * MS..250 * MS);
                    self.mirrors.last_mut().unwrap().deaf = (from, until);
                    let after = self.rng.random_range(50 * MS..300 * MS);
                    self.after(after, Event::Kill(life));
                }
            }
            5 => self.lose_ownership(),
            6 => self.cut(host),
            _ => self.link_down(host),
        }
        self.next_chaos(kind);
    }

    fn pause_mirror(&mut self, life: usize) {
        self.mirrors[life].pause(self.now);
        let most = if self.rng.random_bool(0.4) { 30 * MS } else { 280 * MS };
        let after = self.rng.random_range(2 * MS..most);
        self.after(after, Event::Resume(Process::Mirror(life)));
    }

    fn pause_owner(&mut self, owner: usize) {
        self.owners[owner].pause(self.now);
        let most = if self.rng.random_bool(0.4) { 30 * MS } else { 260 * MS };
        let after = self.rng.random_range(2 * MS..most);
        self.after(after, Event::Resume(Process::Owner(owner)));
    }

    /// The owner does not reach the lock service any more, and goes on; another will take over.
    fn lose_ownership(&mut self) {
        let holder = self.holder;
        if !self.owners[holder].alive || self.owners[holder].cut_off {
            return;
        }
        self.counts.takeovers += 1;
        self.owners[holder].cut_off = true;
        if self.rng.random_bool(0.5) && !self.owners[holder].paused {
            self.pause_owner(holder);
        }
        let after = self.held_until.saturating_sub(self.now) + self.rng.random_range(0..20 * MS);
        self.after(after, Event::TakeOver);
    }

    pub fn take_over(&mut self) {
        if self.owners[self.holder].cut_off {
            self.start_owner(shootdown_lease::Memory::Survived);
        }
    }

    fn link_down(&mut self, host: usize) {
        self.counts.links += 1;
        (self.links[host].to_owner, self.links[host].to_mirror) = (false, false);
        if !self.plan.keeps(Without::LinksAreNoSigns) {
            let owner = &mut self.owners[self.holder];
            let of = |member: &(Host, Epoch, _)| member.0 == Host(host as u64);
            let epochs: Vec<Epoch> =
                owner.owner.members().filter(of).map(|(_, epoch, _)| epoch).collect();
            let now = owner.clock.read(self.now);
            for epoch in epochs {
                owner.owner.handle(Host(host as u64), ToOwner::Left { epoch }, now);
            }
        }
        self.unblock_later(host);
    }

    /// A partition: both ways, or one.
    pub fn cut(&mut self, host: usize) {
        if self.healed {
            return;
        }
        let which = self.rng.random_range(0..3);
        self.links[host].to_owner &= which == 1;
        self.links[host].to_mirror &= which == 2;
        *(if which == 0 { &mut self.counts.partitions } else { &mut self.counts.one_way }) += 1;
        self.unblock_later(host);
    }

    fn unblock_later(&mut self, host: usize) {
        let after = self.rng.random_range(5 * MS..350 * MS);
        self.after(after, Event::Unblock(host));
    }

    pub fn unblock(&mut self, host: usize) {
        self.links[host].heal();
    }
}
