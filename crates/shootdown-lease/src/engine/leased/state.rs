//! State of a mirror's side: the mirror, its queues and its waiters.

use super::Inner;
use crate::engine::wake::After;
use crate::message::{Nonce, Refusal, ToOwner};
use crate::mirror::{Denied, Mirror, MirrorDecision, Standing};
use crate::time::Time;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use futures::channel::oneshot;

/// Maximum length of the send queue. Beyond it the oldest message is dropped, as if the network had
/// lost it.
const OUTGOING: usize = 4_096;

/// The mirror, its queues and its waiters. Protected by the lock of [`Inner`]. Only
/// [`Leased::work`](super::Leased::work) changes the mirror, and then calls
/// [`settle`](Self::settle).
pub(super) struct State {
    pub(super) mirror: Mirror,
    /// Messages that the transport has yet to take.
    pub(super) outgoing: VecDeque<ToOwner>,
    /// Decisions that `run` has yet to carry out.
    pub(super) decisions: VecDeque<MirrorDecision>,
    /// Deadline that `run` sleeps until.
    pub(super) deadline: Option<Time>,
    /// Fetches under way, by their number.
    pub(super) fetches: BTreeMap<Nonce, oneshot::Sender<Answer>>,
    /// Senders for tasks that wait until the mirror has joined or will not join any more.
    pub(super) standing: Vec<oneshot::Sender<()>>,
    pub(super) denied: Option<Denied>,
    pub(super) dropped: u64,
    pub(super) panics: u64,
}

/// Result of a fetch.
pub(super) enum Answer {
    /// The contents.
    Contents(Vec<u8>),
    /// The fetch must be repeated: an invalidation has met it, or the lease has ended.
    Again,
    /// The owner refused.
    Refused(Refusal),
    /// The contents have this length, and not that of the range.
    WrongLength(usize),
}

impl State {
    /// Makes the state of a mirror that has not asked to join.
    pub(super) fn new(mirror: Mirror) -> Self {
        Self {
            deadline: mirror.deadline(),
            mirror,
            outgoing: VecDeque::new(),
            decisions: VecDeque::new(),
            fetches: BTreeMap::new(),
            standing: Vec::new(),
            denied: None,
            dropped: 0,
            panics: 0,
        }
    }

    /// Returns `true` if there will be no lease any more.
    pub(super) fn is_lost(&self) -> bool {
        self.mirror.is_leaving() || self.denied == Some(Denied::Panicked)
    }

    /// Forgets everything that an earlier run had begun, so that the owner sends it again. Returns
    /// `true` if the devices must be stopped.
    pub(super) fn begin_anew(&mut self) -> bool {
        self.decisions.clear();
        self.mirror.forget_under_way();
        matches!(self.mirror.standing(), Standing::Stopping(_))
    }

    pub(super) fn settle(&mut self, inner: &Inner, after: &mut After) {
        while let Some(decision) = self.mirror.next_decision() {
            self.decide(decision, None, after);
        }
        while let Some(message) = self.mirror.next_message() {
            if self.outgoing.len() == OUTGOING {
                self.outgoing.pop_front();
                self.dropped += 1;
            }
            self.outgoing.push_back(message);
        }
        let until = self.mirror.valid_until().map_or(0, Time::as_nanos);
        let before = inner.until.swap(until, Ordering::AcqRel);
        if before < until {
            let (space, clock) = (inner.space.clone(), inner.clock.clone());
            after.run(move || {
                // A reader that found the lease ended has read a time of at least `before`, and
                // waits. The end of a pause wakes it. If the lease was renewed in time, no reader
                // waits.
                if clock.now().as_nanos() >= before {
                    drop(space.pause());
                }
            });
        }
        if !self.outgoing.is_empty() || self.mirror.is_over() {
            after.wake(&inner.out);
        }
        if !self.decisions.is_empty()
            || self.mirror.is_over()
            || self.mirror.deadline() != self.deadline
        {
            after.wake(&inner.work);
        }
        if self.mirror.is_over() {
            self.tell_standing(after);
        }
    }

    pub(super) fn decide(
        &mut self,
        decision: MirrorDecision,
        contents: Option<Vec<u8>>,
        after: &mut After,
    ) {
        match decision {
            MirrorDecision::Install { nonce, range, .. } => {
                let answer = match contents {
                    None => Answer::Again,
                    Some(contents) if range.len() == Some(contents.len() as u64) => {
                        Answer::Contents(contents)
                    }
                    Some(contents) => Answer::WrongLength(contents.len()),
                };
                self.answer(nonce, answer, after);
            }
            MirrorDecision::Collided { nonce } => self.answer(nonce, Answer::Again, after),
            MirrorDecision::FetchRefused { nonce, why } => {
                self.answer(nonce, Answer::Refused(why), after)
            }
            MirrorDecision::Denied(why) => self.denied = Some(why),
            MirrorDecision::Joined { .. } => {
                self.denied = None;
                self.tell_standing(after);
            }
            MirrorDecision::Stop { .. } => {
                for sender in core::mem::take(&mut self.fetches).into_values() {
                    after.run(move || drop(sender.send(Answer::Again)));
                }
                self.decisions.push_back(decision);
            }
            MirrorDecision::Invalidate { .. } => self.decisions.push_back(decision),
        }
    }

    fn answer(&mut self, nonce: Nonce, answer: Answer, after: &mut After) {
        if let Some(sender) = self.fetches.remove(&nonce) {
            after.run(move || drop(sender.send(answer)));
        }
    }

    pub(super) fn tell_standing(&mut self, after: &mut After) {
        for sender in core::mem::take(&mut self.standing) {
            after.run(move || _ = sender.send(()));
        }
    }
}
