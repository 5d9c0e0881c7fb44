//! The lease: asked for, renewed, stopped before it ends.

use super::{Denied, Mirror, MirrorDecision, REMEMBERED, Standing};
use crate::message::{Epoch, Incarnation, Nonce, Refusal, ToOwner};
use crate::rules::Rule;
use crate::time::Time;
use alloc::collections::BTreeMap;
use core::time::Duration;

/// The longest wait for the answer to a join.
const LONGEST: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum State {
    /// Joins after that.
    Out {
        until: Time,
    },
    /// Has asked at that time, and asks again with the same nonce.
    Joining {
        nonce: Nonce,
        asked: Time,
        again: Time,
    },
    Live(Lease),
    /// Until the host says that its devices have stopped.
    Stopping {
        epoch: Epoch,
        end: Time,
    },
    /// Has left for good.
    Over,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Lease {
    pub(super) epoch: Epoch,
    term: Duration,
    /// When the devices begin to stop.
    stop: Time,
    /// When each question was asked that has no reply yet.
    asks: BTreeMap<Nonce, Time>,
    next_ask: Time,
}

impl Mirror {
    /// Does what is due by now.
    pub fn tick(&mut self, now: Time) {
        self.now = now;
        match &self.state {
            State::Out { until } if *until <= now => self.join(),
            State::Joining { asked, .. } if self.leaving && *asked + self.age <= now => {
                self.state = State::Over
            }
            State::Joining { nonce, asked, again } if *again <= now && !self.leaving => {
                if *asked + self.age <= now {
                    // Nobody has answered for so long; the next one is waited for longer.
                    self.age = (self.age * 2).min(LONGEST);
                    return self.join();
                }
                let (nonce, asked) = (*nonce, *asked);
                self.state = State::Joining { nonce, asked, again: now + self.settings.retry };
                self.messages.push_back(ToOwner::Join { incarnation: self.incarnation, nonce });
            }
            State::Live(lease) => {
                if lease.stop <= now && self.rules.keep(Rule::StopsByItself) {
                    return self.stop();
                }
                if lease.next_ask <= now {
                    self.ask();
                }
                self.fetch_again();
            }
            _ => {}
        }
    }

    /// Says that the owner can be reached anew: asks at once for what it has no answer to, because
    /// what was on its way may be lost. Ends nothing.
    pub fn connected(&mut self, now: Time) {
        self.tick(now);
        match &self.state {
            State::Joining { .. } if !self.leaving => {
                self.messages.retain(|message| !matches!(message, ToOwner::Join { .. }));
                self.join();
            }
            State::Live(_) => {
                self.ask();
                self.fetches.values_mut().for_each(|fetch| fetch.again = now);
                self.fetch_again();
            }
            State::Joining { .. } | State::Out { .. } | State::Stopping { .. } | State::Over => {}
        }
    }

    /// When to call [`tick`](Self::tick) at the latest; not at all while the devices are being
    /// stopped, and after the mirror has left.
    pub fn deadline(&self) -> Option<Time> {
        match &self.state {
            State::Out { until } => Some(*until),
            State::Joining { asked, .. } if self.leaving => Some(*asked + self.age),
            State::Joining { again, .. } => Some(*again),
            State::Live(lease) => {
                let fetch = self.next_fetch().unwrap_or(lease.next_ask);
                let stop =
                    if self.rules.keep(Rule::StopsByItself) { lease.stop } else { lease.next_ask };
                Some(stop.min(lease.next_ask).min(fetch))
            }
            State::Stopping { .. } | State::Over => None,
        }
    }

    pub(super) fn next_nonce(&mut self) -> Nonce {
        self.nonce += 1;
        Nonce(self.nonce)
    }

    fn join(&mut self) {
        let (nonce, asked) = (self.next_nonce(), self.now);
        self.state = State::Joining { nonce, asked, again: asked + self.settings.retry };
        self.messages.push_back(ToOwner::Join { incarnation: self.incarnation, nonce });
    }

    fn ask(&mut self) {
        let (nonce, now) = (self.next_nonce(), self.now);
        let incarnation = self.incarnation;
        let State::Live(lease) = &mut self.state else { return };
        // What was asked a term ago grants nothing any more.
        let term = lease.term;
        lease.asks.retain(|_, asked| now.since(*asked) < term);
        lease.asks.insert(nonce, now);
        lease.next_ask = now + spread(term, incarnation, nonce);
        let epoch = lease.epoch;
        self.messages.push_back(ToOwner::Renew { epoch, nonce });
    }

    /// From when a reply to what was asked then counts.
    fn counted_from(&self, asked: Time) -> Time {
        if self.rules.keep(Rule::CountedFromAsking) { asked } else { self.now }
    }

    pub(super) fn welcome(&mut self, epoch: Epoch, nonce: Nonce, term: Duration) {
        let joining = match self.state {
            State::Joining { nonce: mine, asked, .. }
                if mine == nonce || !self.rules.keep(Rule::NewestWelcome) =>
            {
                Some(asked)
            }
            _ => None,
        };
        let Some(asked) = joining else { return self.not_entered(epoch) };
        if self.leaving {
            self.not_entered(epoch);
            self.state = State::Over;
            return;
        }
        if let Some(newest) = self.boot.filter(|newest| *newest > epoch.boot) {
            self.deny(Denied::OlderOwner { boot: epoch.boot, newest });
            return self.not_entered(epoch);
        }
        let Some(usable) =
            term.checked_sub(self.settings.time_to_stop).filter(|usable| !usable.is_zero())
        else {
            let time_to_stop = self.settings.time_to_stop;
            self.deny(Denied::TermTooShort { term, time_to_stop });
            return self.not_entered(epoch);
        };
        let from = self.counted_from(asked);
        let stop = from + usable;
        if stop <= self.now {
            // It would have to stop before it begins.
            let took = self.now.since(asked);
            self.decisions.push_back(MirrorDecision::Denied(Denied::TooLate { term, took }));
            self.state = State::Out { until: self.now + self.settings.retry };
            return self.not_entered(epoch);
        }
        self.boot = Some(epoch.boot);
        self.age = self.settings.retry * 8;
        self.acknowledged.clear();
        self.counts.joined += 1;
        let next_ask = from + spread(term, self.incarnation, nonce);
        self.state = State::Live(Lease { epoch, term, stop, asks: BTreeMap::new(), next_ask });
        self.decisions.push_back(MirrorDecision::Joined { epoch });
    }

    fn deny(&mut self, why: Denied) {
        self.decisions.push_back(MirrorDecision::Denied(why));
        self.state = State::Out { until: self.now + self.settings.retry * 8 };
    }

    /// A welcome that came too late, or twice.
    fn not_entered(&mut self, epoch: Epoch) {
        self.counts.strangers += 1;
        if !self.is_in(epoch)
            && !matches!(self.state, State::Stopping { epoch: of, .. } if of == epoch)
        {
            // Nothing is held by it and nothing will be, so nobody has to wait for its end.
            self.remember(epoch);
            self.messages.push_back(ToOwner::Left { epoch });
        }
    }

    pub(super) fn renewed(&mut self, epoch: Epoch, nonce: Nonce) {
        let nonces = self.rules.keep(Rule::Nonces);
        let (now, counted, time_to_stop) =
            (self.now, self.rules.keep(Rule::CountedFromAsking), self.settings.time_to_stop);
        let State::Live(lease) = &mut self.state else {
            self.counts.strangers += 1;
            return;
        };
        // Another life of the host counts its nonces from 1, too: its replies use up none of these.
        let asked = match lease.epoch == epoch {
            true if nonces => lease.asks.remove(&nonce),
            true => lease.asks.values().max().copied(),
            false => None,
        };
        let Some(asked) = asked else {
            self.counts.strangers += 1;
            return;
        };
        let from = if counted { asked } else { now };
        lease.stop = lease.stop.max(from + lease.term.saturating_sub(time_to_stop));
        self.counts.renewed += 1;
        self.early = 0;
    }

    pub(super) fn gone(&mut self, epoch: Epoch) {
        if self.is_in(epoch) {
            self.stop();
        } else {
            self.counts.strangers += 1;
        }
    }

    pub(super) fn join_refused(&mut self, of: Nonce, why: Refusal) {
        match self.state {
            State::Joining { nonce, .. } if nonce == of && self.leaving => self.state = State::Over,
            State::Joining { nonce, .. } if nonce == of && why == Refusal::Expelled => self.join(),
            State::Joining { nonce, .. } if nonce == of => self.deny(Denied::Refused(why)),
            _ => self.counts.strangers += 1,
        }
    }

    /// Whether the mirror may hold on by that epoch.
    pub(super) fn is_in(&self, epoch: Epoch) -> bool {
        matches!(&self.state, State::Live(lease) if lease.epoch == epoch)
    }

    fn stop(&mut self) {
        let State::Live(lease) = &self.state else { return };
        let (epoch, end) = (lease.epoch, lease.stop + self.settings.time_to_stop);
        self.state = State::Stopping { epoch, end };
        self.counts.lost += 1;
        self.early = (self.early + 1).min(4);
        self.fetches.clear();
        self.working.clear();
        if !self.rules.keep(Rule::LeftAfterStop) {
            self.messages.push_back(ToOwner::Left { epoch });
        }
        self.decisions.push_back(MirrorDecision::Stop { epoch });
    }

    /// Says that a [`MirrorDecision::Stop`] was carried out: no device reaches the memory any more,
    /// and no copy is used. The mirror tells the owner and joins anew, unless it is
    /// [leaving](Self::leave). Returns whether that was asked for.
    pub fn stopped(&mut self, now: Time) -> bool {
        self.now = now;
        let State::Stopping { epoch, end } = self.state else { return false };
        self.counts.stopped_late += u64::from(self.now > end);
        self.remember(epoch);
        self.messages.push_back(ToOwner::Left { epoch });
        // Who was told to go at once, again and again, does not come back at once: another process
        // of this host may have done it.
        let pause = if self.early > 1 {
            self.settings.retry * (1 << (self.early - 2))
        } else {
            Duration::ZERO
        };
        self.state =
            if self.leaving { State::Over } else { State::Out { until: self.now + pause } };
        true
    }

    /// Gives the lease up: there is a [`MirrorDecision::Stop`] if the mirror is in that epoch. It
    /// joins anew afterwards.
    pub fn give_up(&mut self, epoch: Epoch, now: Time) {
        self.now = now;
        if self.is_in(epoch) {
            self.stop();
        }
    }

    /// Leaves for good: there is a [`MirrorDecision::Stop`] if the mirror holds a lease. What is
    /// sent after [`stopped`](Self::stopped) lets the owner go on at once. One that is joining
    /// waits a while for the answer, to give back what it grants.
    pub fn leave(&mut self, now: Time) {
        self.now = now;
        self.leaving = true;
        match self.state {
            State::Live(_) => self.stop(),
            State::Out { .. } => self.state = State::Over,
            // Its join may be in the books by now: what it was granted is to be given back.
            State::Joining { .. } | State::Stopping { .. } | State::Over => {}
        }
    }

    fn remember(&mut self, epoch: Epoch) {
        if self.past.contains(&epoch) {
            return;
        }
        if self.past.len() == REMEMBERED {
            self.past.pop_front();
        }
        self.past.push_back(epoch);
    }

    /// An epoch of its own that is over was not heard to be: it says so again. Of others, such as
    /// those of an earlier incarnation, it knows nothing.
    pub(super) fn answer_for_the_past(&mut self, epoch: Epoch) {
        self.counts.strangers += 1;
        if self.past.contains(&epoch) {
            self.messages.push_back(ToOwner::Left { epoch });
        }
    }

    /// Whether there is a lease at `now`: to be asked after each use, with a time that was read
    /// after it (D4). It speaks of the present lease: whether the use began under an earlier one,
    /// only the copy knows, which was zapped in between. Needs no tick.
    pub fn is_valid(&self, now: Time) -> bool {
        self.valid_until().is_some_and(|end| now < end)
    }

    /// The end of the present lease, less the time to stop: what a copy was used for until that
    /// moment, exclusive, since the mirror has joined, is good. `None` without a lease.
    pub fn valid_until(&self) -> Option<Time> {
        match &self.state {
            State::Live(lease) if self.rules.keep(Rule::StopsByItself) => Some(lease.stop),
            State::Live(_) => Some(Time::from_nanos(u64::MAX)),
            _ => None,
        }
    }

    /// Where it stands.
    pub fn standing(&self) -> Standing {
        match &self.state {
            State::Out { .. } | State::Over => Standing::Out,
            State::Joining { .. } => Standing::Joining,
            State::Live(lease) => Standing::Live(lease.epoch, lease.stop),
            State::Stopping { epoch, .. } => Standing::Stopping(*epoch),
        }
    }

    /// Its epoch, if it may hold on.
    pub fn epoch(&self) -> Option<Epoch> {
        match &self.state {
            State::Live(lease) => Some(lease.epoch),
            _ => None,
        }
    }

    /// Whether it was told to leave.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Whether it has left for good and holds nothing.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// How often it asks.
    pub(super) fn interval(&self) -> Duration {
        match &self.state {
            State::Live(lease) => interval(lease.term),
            _ => self.settings.retry,
        }
    }
}

/// From three quarters of an interval to a whole one, by who asks and how often it has: mirrors
/// that joined at the same moment, such as after a restart of the owner, do not go on asking
/// together.
fn spread(term: Duration, of: Incarnation, nonce: Nonce) -> Duration {
    // SplitMix64 (Steele, Lea, Flood 2014), of which the top 8 bits are taken.
    let mut mixed = of.0.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(nonce.0);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    let part = ((mixed ^ mixed >> 31) >> 56) as u32;
    (interval(term).saturating_mul(3 * 256 + part) / 1024).max(Duration::from_nanos(1))
}

/// Five questions in each term, so that four may be lost.
fn interval(term: Duration) -> Duration {
    (term / 5).max(Duration::from_nanos(1))
}
