//! The books. Every holder is in them, from before it learns that it may hold on until after it has
//! stopped (D2).

use super::{Decision, Ending, Fenced, Owner, Timer, Who};
use crate::message::{Asker, Epoch, Host, Incarnation, InvalidationId, Nonce, Refusal, ToMirror};
use crate::rules::Rule;
use crate::time::Time;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::time::Duration;

/// Number of lives of a host whose joins are remembered.
const LIVES: usize = 16;

/// Phase of a member. In each of them it may hold on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    /// The lease is renewed on request.
    Live,
    /// The lease is no longer renewed.
    Expelled,
    /// The lease has ended, and the host was asked to fence the member.
    Fencing,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Member {
    /// `None` for the member that stands for all earlier boots.
    pub(super) who: Option<Who>,
    pub(super) phase: Phase,
    pub(super) expires: Time,
    /// Due times of its timers.
    pub(super) expiry: Time,
    pub(super) resend: Option<Time>,
    /// Invalidations to send once the window has room.
    pub(super) queue: VecDeque<InvalidationId>,
    /// Invalidations in flight, with the time of the last `Inv`.
    pub(super) sent: BTreeMap<InvalidationId, Time>,
    /// Number of waiting fetches.
    pub(super) parked: usize,
}

impl Owner {
    fn book(&mut self, number: u64, who: Option<Who>, phase: Phase, term: Duration) {
        let expires = self.now + self.waits_for(term);
        let (queue, sent) = (VecDeque::new(), BTreeMap::new());
        self.members.insert(
            number,
            Member { who, phase, expires, expiry: expires, resend: None, queue, sent, parked: 0 },
        );
        self.timers.insert((expires, Timer::Expiry(number)));
    }

    /// Books one member for all leases of earlier owners (D2). It is never renewed. Earlier owners
    /// have granted terms up to `longest`, or up to this owner's.
    pub(super) fn book_earlier_boots(&mut self, longest: Duration) {
        self.book(0, None, Phase::Expelled, self.terms.term.max(longest));
    }

    /// Returns `true` if a join is a late copy of one that was answered.
    fn is_late(&self, from: Host, incarnation: Incarnation, nonce: Nonce) -> bool {
        let lives = self.joins.get(&from).into_iter().flatten();
        lives.into_iter().any(|(of, newest)| *of == incarnation && nonce <= *newest)
    }

    fn note_join(&mut self, who: Who) {
        let lives = self.joins.entry(who.host).or_default();
        lives.retain(|(of, _)| *of != who.incarnation);
        if lives.len() == LIVES {
            lives.pop_front();
        }
        lives.push_back((who.incarnation, who.nonce));
    }

    pub(super) fn join(&mut self, from: Host, incarnation: Incarnation, nonce: Nonce) {
        let of_host = |member: &Member| member.who.filter(|who| who.host == from);
        let known: Vec<(u64, Who)> = self
            .members
            .iter()
            .filter_map(|(number, member)| Some((*number, of_host(member)?)))
            .collect();
        let same = known.iter().filter(|(_, who)| who.incarnation == incarnation);
        if let Some((number, who)) = same.clone().max_by_key(|(_, who)| who.nonce).copied() {
            if who.nonce == nonce {
                return self.welcome_again(number, who);
            }
            if who.nonce > nonce {
                self.counts.strangers += 1;
                return;
            }
        }
        if self.is_late(from, incarnation, nonce) {
            // The epoch of that join is over. A mirror that still waits for the answer asks anew.
            self.counts.strangers += 1;
            return self.send(
                from,
                ToMirror::Refused {
                    nonce,
                    asker: Asker::Join(incarnation),
                    why: Refusal::Expelled,
                },
            );
        }
        // The mirror stopped before it asked again, so its earlier epoch is over.
        for (number, who) in &known {
            let anew = who.incarnation == incarnation;
            if anew || !self.rules.keep(Rule::OtherIncarnationsStay) {
                self.close(*number, Ending::JoinedAnew);
            } else {
                // Another incarnation: not over, only no longer renewed (D1).
                self.expel(*number);
            }
        }
        let of_host = self
            .members
            .values()
            .filter(|member| member.who.is_some_and(|who| who.host == from))
            .count();
        let refusal = if of_host >= self.terms.members_of_a_host {
            Some(Refusal::MembersOfHost)
        } else {
            (self.members.len() >= self.terms.members).then_some(Refusal::Members)
        };
        if let Some(why) = refusal {
            self.counts.refused += 1;
            return self
                .send(from, ToMirror::Refused { nonce, asker: Asker::Join(incarnation), why });
        }
        let number = self.next_epoch;
        self.next_epoch += 1;
        let who = Who { host: from, incarnation, nonce };
        self.note_join(who);
        // D2: first the books, then the welcome.
        #[cfg(feature = "test-util")]
        if !self.rules.keep(Rule::BookedBeforeWelcome) {
            self.unbooked.insert(number, who);
            return self.welcome(number, who);
        }
        self.book(number, Some(who), Phase::Live, self.terms.term);
        self.counts.joins += 1;
        self.welcome(number, who);
    }

    fn welcome_again(&mut self, number: u64, who: Who) {
        // The same question again: the member is booked already.
        if self.grant(number) {
            self.welcome(number, who);
        } else {
            // A mirror that still asks does not know the epoch, so it would ignore `Gone`.
            self.counts.refused += 1;
            let Who { host, incarnation, nonce } = who;
            self.send(
                host,
                ToMirror::Refused {
                    nonce,
                    asker: Asker::Join(incarnation),
                    why: Refusal::Expelled,
                },
            );
        }
    }

    fn welcome(&mut self, number: u64, who: Who) {
        let (epoch, term) = (self.epoch(number), self.terms.term);
        self.send(
            who.host,
            ToMirror::Welcome { epoch, incarnation: who.incarnation, nonce: who.nonce, term },
        );
    }

    /// Grants a member a term from now. Returns `false` if it is no longer renewed.
    fn grant(&mut self, number: u64) -> bool {
        let expires = self.now + self.waits_for(self.terms.term);
        let Some(member) =
            self.members.get_mut(&number).filter(|member| member.phase == Phase::Live)
        else {
            return false;
        };
        member.expires = member.expires.max(expires);
        true
    }

    pub(super) fn renew(&mut self, from: Host, epoch: Epoch, nonce: Nonce) {
        #[cfg(feature = "test-util")]
        if let Some(who) = self.unbooked.remove(&epoch.number) {
            self.book(epoch.number, Some(who), Phase::Live, self.terms.term);
        }
        if self.member_of(from, epoch).is_none() {
            self.counts.strangers += 1;
            return self.send(from, ToMirror::Gone { epoch });
        }
        if self.grant(epoch.number) {
            self.counts.renewals += 1;
            self.send(from, ToMirror::Renewed { epoch, nonce });
        } else {
            self.send(from, ToMirror::Gone { epoch });
        }
    }

    pub(super) fn leave(&mut self, from: Host, epoch: Epoch) {
        if self.member_of(from, epoch).is_none() {
            // Usually a repeated message.
            self.counts.strangers += 1;
            return;
        }
        self.close(epoch.number, Ending::Left);
    }

    /// Stops renewing a member, and tells it.
    pub(super) fn expel(&mut self, number: u64) {
        let epoch = self.epoch(number);
        let Some(member) =
            self.members.get_mut(&number).filter(|member| member.phase == Phase::Live)
        else {
            return;
        };
        member.phase = Phase::Expelled;
        let to = member.who.map(|who| who.host);
        self.counts.expelled += 1;
        if let Some(to) = to {
            self.send(to, ToMirror::Gone { epoch });
        }
    }

    /// Stops renewing all members, and tells them.
    pub fn expel_all(&mut self, now: Time) {
        self.now = self.now.max(now);
        let numbers: Vec<u64> = self.members.keys().copied().collect();
        for number in numbers {
            self.expel(number);
        }
    }

    /// Ends a lease, unless it was renewed meanwhile.
    pub(super) fn expire(&mut self, number: u64) {
        let (now, epoch) = (self.now, self.epoch(number));
        let Some(member) = self.members.get_mut(&number) else { return };
        if member.expires > now {
            member.expiry = member.expires;
            self.timers.insert((member.expiry, Timer::Expiry(number)));
            return;
        }
        if !self.terms.fences || !self.rules.keep(Rule::Fenced) {
            return self.close(number, Ending::Expired);
        }
        member.phase = Phase::Fencing;
        let what =
            member.who.map_or(Fenced::Before(self.boot), |who| Fenced::Epoch(who.host, epoch));
        self.decisions.push_back(Decision::Fence(what));
    }

    /// Tells the owner that a [`Decision::Fence`] was carried out, so that nothing reaches the
    /// memory by that epoch. Returns `true` if the owner had asked for it.
    pub fn fenced(&mut self, what: Fenced, now: Time) -> bool {
        self.now = self.now.max(now);
        let epoch = what.epoch();
        let asked = epoch.boot == self.boot
            && self.members.get(&epoch.number).is_some_and(|member| member.phase == Phase::Fencing);
        if asked {
            self.close(epoch.number, Ending::Expired);
        }
        asked
    }

    /// Removes a member from the books: it has stopped, or can no longer hold on.
    pub(super) fn close(&mut self, number: u64, ending: Ending) {
        let epoch = self.epoch(number);
        let Some(member) = self.members.remove(&number) else { return };
        self.timers.remove(&(member.expiry, Timer::Expiry(number)));
        if let Some(at) = member.resend {
            self.timers.remove(&(at, Timer::Resend(number)));
        }
        let count = if ending == Ending::Expired {
            &mut self.counts.expired
        } else {
            &mut self.counts.left
        };
        *count += 1;
        let parked: Vec<_> = self
            .parked
            .range((number, Nonce(0))..=(number, Nonce(u64::MAX)))
            .map(|(key, _)| *key)
            .collect();
        for key in parked {
            self.parked.remove(&key);
        }
        for invalidation in member.queue.into_iter().chain(member.sent.into_keys()) {
            self.end_for(invalidation, epoch, ending);
        }
    }
}
