//! Questions for translations. All misses of one page share one question (V3).
#![forbid(unsafe_code)]

use super::{MapError, PAGE};
use shootdown::{AddressRange, Timeline};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::Permissions;

/// Maximum number of questions sent before the first is answered.
const SENT: usize = 16;

/// A question for a translation.
#[derive(Debug)]
pub(super) struct Miss {
    pub(super) iova: u64,
    pub(super) access: Permissions,
    /// Signalled with 1 when the waiters must look again.
    pub(super) over: Timeline,
    /// The front-end has no translation.
    refused: AtomicBool,
    /// There will be no answer.
    left: AtomicBool,
}

impl Miss {
    /// Returns the result. Call it once the question is over.
    pub(super) fn outcome(&self) -> Result<(), MapError> {
        if self.left.load(Ordering::Acquire) {
            Err(MapError::Nobody { iova: self.iova })
        } else if self.refused.load(Ordering::Acquire) {
            Err(MapError::Refused { iova: self.iova, access: self.access })
        } else {
            Ok(())
        }
    }

    fn key(&self) -> Key {
        key(self.iova, self.access)
    }
}

type Key = (u64, u8);

fn key(iova: u64, access: Permissions) -> Key {
    (iova / PAGE, access as u8)
}

/// How the front-end answers misses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Answers {
    /// There is no front-end to ask.
    #[default]
    Nobody,
    /// By an UPDATE, or not at all.
    Silent,
    /// Each miss gets an answer, after its UPDATE if there is one.
    Each,
}

/// All questions. Those that are over are signalled outside of the lock.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) answers: Answers,
    /// Questions by page and access, until their waiters must look again.
    waiting: BTreeMap<Key, Arc<Miss>>,
    /// Those of `waiting` that have not been sent.
    unsent: VecDeque<Arc<Miss>>,
    /// Questions sent and not answered.
    sent: VecDeque<Arc<Miss>>,
    /// The last UPDATE covered more than a page.
    large: bool,
}

impl Asked {
    /// Asks for the translation of `iova`, or joins an equal question.
    pub(super) fn ask(&mut self, iova: u64, access: Permissions) -> Arc<Miss> {
        let miss = self.waiting.entry(key(iova, access)).or_insert_with(|| {
            let [refused, left] = [const { AtomicBool::new(false) }; 2];
            let miss = Arc::new(Miss { iova, access, over: Timeline::new(), refused, left });
            self.unsent.push_back(miss.clone());
            miss
        });
        miss.clone()
    }

    /// Returns the next question to send. If UPDATEs cover more than a page, one is sent at a time,
    /// because its answer may cover the next one.
    pub(super) fn next(&mut self) -> Option<Arc<Miss>> {
        let most = if self.large { 1 } else { SENT };
        if self.answers == Answers::Each && self.sent.len() >= most {
            return None;
        }
        let miss = self.unsent.pop_front()?;
        if self.answers == Answers::Each {
            self.sent.push_back(miss.clone());
        }
        Some(miss)
    }

    fn is_waited_for(&self, miss: &Arc<Miss>) -> bool {
        self.waiting.get(&miss.key()).is_some_and(|waiting| Arc::ptr_eq(waiting, miss))
    }

    /// Removes the questions for parts of `range` that `over` selects.
    fn take(&mut self, range: AddressRange, over: impl Fn(&Miss) -> bool) -> Vec<Arc<Miss>> {
        let near = self.waiting.range((range.start() / PAGE, 0)..=(range.last() / PAGE, u8::MAX));
        let of_these =
            near.map(|(_, miss)| miss).filter(|miss| range.contains(miss.iova) && over(miss));
        let of_these: Vec<_> = of_these.cloned().collect();
        of_these.iter().for_each(|miss| drop(self.waiting.remove(&miss.key())));
        // So there are never more of them than waiters.
        if !of_these.is_empty() {
            let mut unsent = std::mem::take(&mut self.unsent);
            unsent.retain(|miss| self.is_waited_for(miss));
            self.unsent = unsent;
        }
        of_these
    }

    /// Handles an UPDATE of `range`. Returns the questions whose waiters must look again. A
    /// question whose access is not permitted stays: another UPDATE may follow, or, if each miss is
    /// answered, the answer tells.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn filled(&mut self, range: AddressRange, access: Permissions) -> Vec<Arc<Miss>> {
        self.large = range.last() / PAGE > range.start() / PAGE;
        self.take(range, |miss| access.allow(miss.access))
    }

    /// Handles the answer to the first question that was sent. Returns the question if it still has
    /// waiters, and `Err` if none was sent. Without an UPDATE the question is refused, whatever the
    /// answer says: the access is not permitted then.
    pub(super) fn answered(&mut self) -> Result<Option<Arc<Miss>>, ()> {
        let miss = self.sent.pop_front().ok_or(())?;
        if !self.is_waited_for(&miss) {
            return Ok(None);
        }
        miss.refused.store(true, Ordering::Release);
        self.waiting.remove(&miss.key());
        Ok(Some(miss))
    }

    /// Makes all waiters look, and ask, again. An answer that is still to come counts for none of
    /// them. Returns all questions.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn anew(&mut self) -> Vec<Arc<Miss>> {
        self.unsent.clear();
        std::mem::take(&mut self.waiting).into_values().collect()
    }

    /// Makes the waiters for parts of `range` look again: an answer to them may describe the former
    /// translation.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn invalidated(&mut self, range: AddressRange) -> Vec<Arc<Miss>> {
        self.take(range, |_| true)
    }

    /// Starts a new channel. Questions on the former one will not be answered.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn channel(&mut self) -> Vec<Arc<Miss>> {
        self.sent.clear();
        self.anew()
    }

    /// Ends all questions, because there is no front-end to ask. Returns them.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn end(&mut self) -> Vec<Arc<Miss>> {
        self.answers = Answers::Nobody;
        let all = self.anew();
        all.iter().for_each(|miss| miss.left.store(true, Ordering::Release));
        all
    }
}
