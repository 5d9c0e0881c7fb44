//! Invalidations: the members that they wait for, and how long.

use super::books::Member;
use super::{Decision, EndError, Ending, Owner, Timer};
use crate::message::{Epoch, Host, InvalidationId, ToMirror};
use crate::rules::Rule;
use crate::time::Time;
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use shootdown::RangeSet;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Invalidation {
    pub(super) ranges: RangeSet,
    /// End of the patience.
    patience: Time,
    /// Epochs that the invalidation waits for, by number.
    waiting: BTreeSet<u64>,
    endings: Vec<(Epoch, Ending)>,
}

impl Owner {
    /// Makes every mirror release `ranges`, and serves no fetch of them until [`end`](Self::end). A
    /// [`Decision::Done`] follows once all have released them, at once if the books are empty.
    pub fn invalidate(&mut self, ranges: RangeSet, now: Time) -> InvalidationId {
        self.now = self.now.max(now);
        let id = InvalidationId(self.next_invalidation);
        self.next_invalidation += 1;
        let patience = self.now + self.terms.patience;
        let waiting: BTreeSet<u64> = self.members.keys().copied().collect();
        self.invalidations.insert(
            id,
            Invalidation { ranges, patience, waiting: waiting.clone(), endings: Vec::new() },
        );
        if waiting.is_empty() {
            self.done(id);
            return id;
        }
        self.timers.insert((patience, Timer::Patience(id)));
        for number in waiting {
            if let Some(member) = self.members.get_mut(&number) {
                member.queue.push_back(id);
            }
            self.pump(number);
        }
        id
    }

    /// Sends as many `Inv` as the member's window allows.
    fn pump(&mut self, number: u64) {
        let (now, window, epoch) = (self.now, self.terms.window, self.epoch(number));
        let resend = now + self.terms.resend;
        let Some(member) = self.members.get_mut(&number) else { return };
        let Some(who) = member.who else { return };
        let first = member.sent.is_empty();
        while member.sent.len() < window
            && let Some(invalidation) = member.queue.pop_front()
        {
            member.sent.insert(invalidation, now);
            let Some(of) = self.invalidations.get(&invalidation) else { continue };
            self.counts.sent += 1;
            self.messages.push_back((
                who.host,
                ToMirror::Inv { epoch, invalidation, ranges: of.ranges.clone() },
            ));
        }
        if first && !member.sent.is_empty() && member.resend.is_none() {
            member.resend = Some(resend);
            self.timers.insert((resend, Timer::Resend(number)));
        }
    }

    /// Sends `Inv` again whose acknowledgement is overdue.
    pub(super) fn resend(&mut self, number: u64) {
        let (now, after) = (self.now, self.terms.resend);
        self.send_again(number, |sent| sent + after <= now);
        let Some(member) = self.members.get_mut(&number) else { return };
        member.resend = member.sent.values().min().map(|oldest| *oldest + after);
        if let Some(at) = member.resend {
            self.timers.insert((at, Timer::Resend(number)));
        }
    }

    fn send_again(&mut self, number: u64, which: impl Fn(Time) -> bool) {
        let (now, epoch) = (self.now, self.epoch(number));
        let Some(member) = self.members.get_mut(&number) else { return };
        let Some(who) = member.who else { return };
        for (invalidation, sent) in member.sent.iter_mut().filter(|(_, sent)| which(**sent)) {
            *sent = now;
            let Some(of) = self.invalidations.get(invalidation) else { continue };
            self.counts.sent += 1;
            self.counts.resent += 1;
            let again =
                ToMirror::Inv { epoch, invalidation: *invalidation, ranges: of.ranges.clone() };
            self.messages.push_back((who.host, again));
        }
    }

    /// Tells the owner that a host can be reached anew. Sends every `Inv` without acknowledgement
    /// again, because earlier ones may be lost. Ends and renews no epoch.
    pub fn connected(&mut self, host: Host, now: Time) {
        self.now = self.now.max(now);
        let of_host = |member: &Member| {
            member.who.is_some_and(|who| who.host == host) && !member.sent.is_empty()
        };
        let numbers: Vec<u64> = self
            .members
            .iter()
            .filter(|(_, member)| of_host(member))
            .map(|(number, _)| *number)
            .collect();
        for number in numbers {
            self.send_again(number, |_| true);
        }
    }

    pub(super) fn acknowledge(&mut self, from: Host, epoch: Epoch, invalidation: InvalidationId) {
        let epoch = if self.rules.keep(Rule::EpochsOfAcknowledgements) {
            epoch
        } else {
            self.newest_of(from).unwrap_or(epoch)
        };
        let asked =
            self.member_of(from, epoch).filter(|member| member.sent.contains_key(&invalidation));
        let Some(member) = asked else {
            self.counts.unasked += 1;
            return;
        };
        member.sent.remove(&invalidation);
        if member.sent.is_empty()
            && let Some(at) = member.resend.take()
        {
            self.timers.remove(&(at, Timer::Resend(epoch.number)));
        }
        self.counts.acknowledged += 1;
        self.end_for(invalidation, epoch, Ending::Acknowledged);
        self.pump(epoch.number);
    }

    fn newest_of(&self, host: Host) -> Option<Epoch> {
        let mut known = self.members.iter().rev();
        known
            .find(|(_, member)| member.who.is_some_and(|who| who.host == host))
            .map(|(number, _)| self.epoch(*number))
    }

    /// Records that the invalidation no longer waits for `epoch`.
    pub(super) fn end_for(&mut self, id: InvalidationId, epoch: Epoch, ending: Ending) {
        let Some(invalidation) = self.invalidations.get_mut(&id) else { return };
        if invalidation.waiting.remove(&epoch.number) {
            invalidation.endings.push((epoch, ending));
            if invalidation.waiting.is_empty() {
                self.done(id);
            }
        }
    }

    fn done(&mut self, id: InvalidationId) {
        let Some(invalidation) = self.invalidations.get_mut(&id) else { return };
        self.timers.remove(&(invalidation.patience, Timer::Patience(id)));
        self.counts.done += 1;
        let endings = core::mem::take(&mut invalidation.endings);
        self.decisions.push_back(Decision::Done { invalidation: id, endings });
    }

    /// Expels the members that have not acknowledged by now.
    pub(super) fn lose_patience(&mut self, id: InvalidationId) {
        let waiting = self.invalidations.get(&id).map(|invalidation| invalidation.waiting.clone());
        for number in waiting.into_iter().flatten() {
            self.expel(number);
        }
    }

    /// Tells the owner that the memory has changed, or will not change. Fetches of the ranges are
    /// served again.
    ///
    /// # Errors
    /// [`EndError`]; nothing has changed then.
    pub fn end(&mut self, id: InvalidationId, now: Time) -> Result<(), EndError> {
        self.now = self.now.max(now);
        let invalidation = self.invalidations.get(&id).ok_or(EndError::Unknown(id))?;
        if !invalidation.waiting.is_empty() {
            return Err(EndError::NotDone(id));
        }
        self.invalidations.remove(&id);
        self.ended += 1;
        self.serve_parked();
        Ok(())
    }

    /// Returns the epochs that an invalidation still waits for; none if there is no such
    /// invalidation.
    pub fn waiting(&self, id: InvalidationId) -> impl Iterator<Item = Epoch> + '_ {
        self.invalidations
            .get(&id)
            .into_iter()
            .flat_map(|of| &of.waiting)
            .map(|number| self.epoch(*number))
    }
}
