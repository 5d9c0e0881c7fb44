//! Messages are lost, doubled, delayed and overtaken.

use super::clock::{MS, US};
use super::mirror::Contents;
use super::world::{Code, Process, World};
use rand::Rng;
use rand::rngs::SmallRng;
use shootdown_lease::{Host, ToMirror, ToOwner};

/// Between a host and the owner's.
#[derive(Clone, Debug)]
pub struct Link {
    pub to_owner: bool,
    pub to_mirror: bool,
    /// How long everything takes to the mirror at least.
    back: u64,
    /// The owner that the host takes for the owner.
    believes: usize,
    /// How far messages may be apart that are not slow.
    spread: u64,
}

impl Link {
    pub fn new(rng: &mut SmallRng) -> Self {
        let back = if rng.random_ratio(1, 5) { rng.random_range(0..60 * MS) } else { 0 };
        Self {
            to_owner: true,
            to_mirror: true,
            back,
            believes: 0,
            spread: rng.random_range(100 * US..2 * MS),
        }
    }

    pub fn heal(&mut self) {
        (self.to_owner, self.to_mirror) = (true, true);
    }

    /// Nothing goes wrong any more.
    pub fn heal_for_good(&mut self) {
        self.heal();
        self.back = 0;
    }
}

impl World {
    /// When the copies of a message arrive.
    fn carry(&mut self, spread: u64, open: bool) -> Vec<u64> {
        self.counts.messages += 1;
        if !open {
            self.counts.cut += 1;
            return Vec::new();
        }
        let mut copies = 1;
        if !self.healed {
            if self.rng.random_ratio(self.plan.lost, 1_000) {
                self.counts.lost += 1;
                return Vec::new();
            }
            if self.rng.random_ratio(self.plan.doubled, 1_000) {
                self.counts.doubled += 1;
                copies = 2;
            }
        }
        (0..copies).map(|_| self.delay(spread)).collect()
    }

    fn delay(&mut self, spread: u64) -> u64 {
        let base = 30 * US + self.rng.random_range(0..spread);
        if self.healed {
            return base;
        }
        if self.rng.random_ratio(self.plan.very_slow, 1_000) {
            self.counts.slow += 1;
            return self.rng.random_range(100 * MS..300 * MS);
        }
        if self.rng.random_ratio(self.plan.slow, 1_000) {
            self.rng.random_range(0..110 * MS)
        } else {
            base
        }
    }

    /// To who is taken for the owner: a deposed one may be for long.
    pub fn send_to_owner(&mut self, host: usize, message: ToOwner) {
        let Link { to_owner, spread, believes, .. } = self.links[host];
        let lives = self.owners[believes].alive && !self.owners[believes].deposed;
        if believes != self.holder
            && (self.healed || self.rng.random_bool(if lives { 0.02 } else { 0.3 }))
        {
            self.links[host].believes = self.holder;
        }
        for delay in self.carry(spread, to_owner) {
            let to =
                if self.rng.random_ratio(1, 50) { self.holder } else { self.links[host].believes };
            let code =
                Code::Handle { from: Host(host as u64), message: message.clone(), read: None };
            self.code_after(delay, Process::Owner(to), code);
        }
    }

    /// To all lives of a host: who is authenticated is the host.
    pub fn send_to_mirror(&mut self, host: Host, message: &ToMirror, contents: &Contents) {
        let host = host.0 as usize;
        let Link { to_mirror, spread, back, .. } = self.links[host];
        for life in self.lives(host) {
            if !self.mirrors[life].hints && !self.healed && matches!(message, ToMirror::Gone { .. })
            {
                continue;
            }
            let (from, until) = self.mirrors[life].deaf;
            let deaf = !self.healed && (from..until).contains(&self.now);
            for delay in self.carry(spread, to_mirror && !deaf) {
                let code = Code::Receive { message: message.clone(), contents: contents.clone() };
                self.code_after(back + delay, Process::Mirror(life), code);
            }
        }
    }
}
