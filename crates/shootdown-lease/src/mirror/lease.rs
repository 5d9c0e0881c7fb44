//! The lease of a mirror: the join, renewals, and the stop before it ends.

use super::{Denied, Mirror, MirrorDecision, REMEMBERED, Standing};
use crate::message::{Epoch, Incarnation, Nonce, Refusal, ToOwner};
use crate::rules::Rule;
use crate::time::Time;
use alloc::collections::BTreeMap;
use core::time::Duration;

/// Longest wait for the answer to a join.
const LONGEST: Duration = Duration::from_secs(30);

/// State of a mirror, and what it may hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum State {
    /// Holds nothing. Joins at `until`.
    Out { until: Time },
    /// Holds nothing. Has asked to join at `asked`, and asks again at `again` with the same nonce.
    Joining { nonce: Nonce, asked: Time, again: Time },
    /// May hold on, by this lease.
    Live(Lease),
    /// The host is stopping its devices. The lease ends at `end`.
    Stopping { epoch: Epoch, end: Time },
    /// Has left for good, and holds nothing.
    Over,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Lease {
    pub(super) epoch: Epoch,
    term: Duration,
    /// When the devices begin to stop.
    stop: Time,
    /// Questions without a reply, with the time when they were asked.
    asks: BTreeMap<Nonce, Time>,
    next_ask: Time,
}

impl Mirror {
    /// Does the work that is due now.
    pub fn tick(&mut self, now: Time) {
        self.now = now;
        match &self.state {
            State::Out { until } if *until <= now => self.join(),
            State::Joining { asked, .. } if self.leaving && *asked + self.age <= now => {
                self.state = State::Over
            }
            State::Joining { nonce, asked, again } if *again <= now && !self.leaving => {
                if *asked + self.age <= now {
                    // No answer came in this time. The next join waits longer.
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

    /// Tells the mirror that the owner can be reached anew. Repeats every unanswered question at
    /// once, because earlier messages may be lost. Ends nothing.
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

    /// Returns the latest time for the next [`tick`](Self::tick). `None` while the devices are
    /// being stopped, and after the mirror has left.
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
        // A question from a term ago grants nothing any more.
        let term = lease.term;
        lease.asks.retain(|_, asked| now.since(*asked) < term);
        lease.asks.insert(nonce, now);
        lease.next_ask = now + spread(term, incarnation, nonce);
        let epoch = lease.epoch;
        self.messages.push_back(ToOwner::Renew { epoch, nonce });
    }

    /// Returns the time from which the reply to a question counts.
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
            // The mirror would have to stop before it begins.
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

    /// Handles a welcome that came too late or twice.
    fn not_entered(&mut self, epoch: Epoch) {
        self.counts.strangers += 1;
        if !self.is_in(epoch)
            && !matches!(self.state, State::Stopping { epoch: of, .. } if of == epoch)
        {
            // The mirror holds nothing by this epoch and never will, so the owner need not wait for
            // its end.
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
        // Another life of the host also counts its nonces from 1. Its replies must not use up
        // questions of this one.
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

    /// Returns `true` if the mirror may hold on by that epoch.
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

    /// Tells the mirror that a [`MirrorDecision::Stop`] was carried out: no device reaches the
    /// memory, and no copy is used. The mirror tells the owner, and joins anew unless it is
    /// [leaving](Self::leave). Returns `true` if the mirror had asked for the stop.
    pub fn stopped(&mut self, now: Time) -> bool {
        self.now = now;
        let State::Stopping { epoch, end } = self.state else { return false };
        self.counts.stopped_late += u64::from(self.now > end);
        self.remember(epoch);
        self.messages.push_back(ToOwner::Left { epoch });
        // A mirror that was told to go soon after each join waits before it joins again: another
        // process of this host may be the reason.
        let pause = if self.early > 1 {
            self.settings.retry * (1 << (self.early - 2))
        } else {
            Duration::ZERO
        };
        self.state =
            if self.leaving { State::Over } else { State::Out { until: self.now + pause } };
        true
    }

    /// Gives the lease up. If the mirror is in `epoch`, a [`MirrorDecision::Stop`] follows, and the
    /// mirror joins anew afterwards.
    pub fn give_up(&mut self, epoch: Epoch, now: Time) {
        self.now = now;
        if self.is_in(epoch) {
            self.stop();
        }
    }

    /// Leaves for good. If the mirror holds a lease, a [`MirrorDecision::Stop`] follows; the
    /// message after [`stopped`](Self::stopped) lets the owner go on at once. A mirror that is
    /// joining waits a while for the answer, to give the lease back.
    pub fn leave(&mut self, now: Time) {
        self.now = now;
        self.leaving = true;
        match self.state {
            State::Live(_) => self.stop(),
            State::Out { .. } => self.state = State::Over,
            // The join may be in the books by now. Its lease must be given back.
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

    /// Says again that an own epoch is over, because the owner has not received it. The mirror does
    /// not answer for other epochs, such as those of an earlier incarnation.
    pub(super) fn answer_for_the_past(&mut self, epoch: Epoch) {
        self.counts.strangers += 1;
        if self.past.contains(&epoch) {
            self.messages.push_back(ToOwner::Left { epoch });
        }
    }

    /// Returns `true` if there is a lease at `now`. Call it after each use of a copy, with a time
    /// that was read after the use (D4). Needs no tick.
    ///
    /// It checks the present lease only. If the use began under an earlier lease, the copy was
    /// zapped in between; only the copy can tell.
    pub fn is_valid(&self, now: Time) -> bool {
        self.valid_until().is_some_and(|end| now < end)
    }

    /// Returns the end of the present lease, less the time to stop; `None` without a lease. A use
    /// of a copy is good if it lies between the join and this moment (exclusive).
    pub fn valid_until(&self) -> Option<Time> {
        match &self.state {
            State::Live(lease) if self.rules.keep(Rule::StopsByItself) => Some(lease.stop),
            State::Live(_) => Some(Time::from_nanos(u64::MAX)),
            _ => None,
        }
    }

    /// Returns the state of the mirror.
    pub fn standing(&self) -> Standing {
        match &self.state {
            State::Out { .. } | State::Over => Standing::Out,
            State::Joining { .. } => Standing::Joining,
            State::Live(lease) => Standing::Live(lease.epoch, lease.stop),
            State::Stopping { epoch, .. } => Standing::Stopping(*epoch),
        }
    }

    /// Returns the epoch, if the mirror may hold on.
    pub fn epoch(&self) -> Option<Epoch> {
        match &self.state {
            State::Live(lease) => Some(lease.epoch),
            _ => None,
        }
    }

    /// Returns `true` after [`leave`](Self::leave).
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Returns `true` if the mirror has left for good and holds nothing.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Returns the time between two questions.
    pub(super) fn interval(&self) -> Duration {
        match &self.state {
            State::Live(lease) => interval(lease.term),
            _ => self.settings.retry,
        }
    }
}

/// Returns three quarters of an interval up to a whole one, depending on the incarnation and the
/// nonce. So mirrors that joined at the same moment, such as after a restart of the owner, do not
/// keep asking together.
fn spread(term: Duration, of: Incarnation, nonce: Nonce) -> Duration {
    // SplitMix64 (Steele, Lea, Flood 2014); uses the top 8 bits.
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
