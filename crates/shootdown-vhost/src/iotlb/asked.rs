//! Translations that are asked for: once for all that miss the same page.
#![forbid(unsafe_code)]

use super::{MapError, PAGE};
use shootdown::{AddressRange, Timeline};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::Permissions;

/// So many are asked for before the first is answered, at most.
const SENT: usize = 16;

/// A translation that is asked for.
#[derive(Debug)]
pub(super) struct Miss {
    pub(super) iova: u64,
    pub(super) access: Permissions,
    /// 1 when who waits is to look again.
    pub(super) over: Timeline,
    /// There is none.
    refused: AtomicBool,
    /// Nobody will answer.
    left: AtomicBool,
}

impl Miss {
    /// Once it is over.
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

/// How misses are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Answers {
    /// There is nobody to ask.
    #[default]
    Nobody,
    /// By an UPDATE, or not at all.
    Silent,
    /// Each has an answer, after its UPDATE if there is one.
    Each,
}

/// What is asked for. Whoever is no longer waited for is signalled outside of the lock.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) answers: Answers,
    /// By page and access, until who waits is to look again.
    waiting: BTreeMap<Key, Arc<Miss>>,
    /// Those of them that were not sent yet.
    unsent: VecDeque<Arc<Miss>>,
    /// Sent, and not answered.
    sent: VecDeque<Arc<Miss>>,
    /// The last UPDATE told of more than a page.
    large: bool,
}

impl Asked {
    /// Asks for the translation of `iova`, alone or with others.
    pub(super) fn ask(&mut self, iova: u64, access: Permissions) -> Arc<Miss> {
        let miss = self.waiting.entry(key(iova, access)).or_insert_with(|| {
            let [refused, left] = [const { AtomicBool::new(false) }; 2];
            let miss = Arc::new(Miss { iova, access, over: Timeline::new(), refused, left });
            self.unsent.push_back(miss.clone());
            miss
        });
        miss.clone()
    }

    /// The next one that is to be sent. Where UPDATEs tell of more than a page, one at a time: the
    /// next may be known by its answer.
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

    /// Takes those out that wait for a part of `range` and that `over` says are over.
    fn take(&mut self, range: AddressRange, over: impl Fn(&Miss) -> bool) -> Vec<Arc<Miss>> {
        let near = self.waiting.range((range.start() / PAGE, 0)..=(range.last() / PAGE, u8::MAX));
        let of_these =
            near.map(|(_, miss)| miss).filter(|miss| range.contains(miss.iova) && over(miss));
        let of_these: Vec<_> = of_these.cloned().collect();
        of_these.iter().for_each(|miss| drop(self.waiting.remove(&miss.key())));
        // So there are never more of them than are waited for.
        if !of_these.is_empty() {
            let mut unsent = std::mem::take(&mut self.unsent);
            unsent.retain(|miss| self.is_waited_for(miss));
            self.unsent = unsent;
        }
        of_these
    }

    /// An UPDATE has told of `range`. Returns those whose waiters look again: where it does not
    /// allow the access, another one may be still to come, and where each miss has an answer that
    /// says so.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn filled(&mut self, range: AddressRange, access: Permissions) -> Vec<Arc<Miss>> {
        self.large = range.last() / PAGE > range.start() / PAGE;
        self.take(range, |miss| access.allow(miss.access))
    }

    /// The front-end has answered the first that was sent. Returns it if somebody waits for it
    /// still; `Err`: nobody has asked. Without an UPDATE it is refused whatever the answer says:
    /// then the access is not allowed.
    pub(super) fn answered(&mut self) -> Result<Option<Arc<Miss>>, ()> {
        let miss = self.sent.pop_front().ok_or(())?;
        if !self.is_waited_for(&miss) {
            return Ok(None);
        }
        miss.refused.store(true, Ordering::Release);
        self.waiting.remove(&miss.key());
        Ok(Some(miss))
    }

    /// Whoever waits is to look, and to ask, again: an answer that is still to come is one to
    /// nobody. Returns all that waits.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn anew(&mut self) -> Vec<Arc<Miss>> {
        self.unsent.clear();
        std::mem::take(&mut self.waiting).into_values().collect()
    }

    /// The same for those that wait for a part of `range`: what was to be said of it may be said of
    /// what was there before.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn invalidated(&mut self, range: AddressRange) -> Vec<Arc<Miss>> {
        self.take(range, |_| true)
    }

    /// The channel is another one: what was asked on the former is not answered any more.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn channel(&mut self) -> Vec<Arc<Miss>> {
        self.sent.clear();
        self.anew()
    }

    /// There is nobody to ask any more. Returns all that waits.
    #[must_use = "who waits for them is to be told"]
    pub(super) fn end(&mut self) -> Vec<Arc<Miss>> {
        self.answers = Answers::Nobody;
        let all = self.anew();
        all.iter().for_each(|miss| miss.left.store(true, Ordering::Release));
        all
    }
}
