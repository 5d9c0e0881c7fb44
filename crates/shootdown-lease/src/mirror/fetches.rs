//! Fetches under way, and their collisions with invalidations.

use super::lease::State;
use super::{Mirror, MirrorDecision};
use crate::message::{Epoch, Nonce, Refusal, ToOwner};
use crate::rules::Rule;
use crate::time::Time;
use core::fmt;
use shootdown::{AddressRange, RangeSet};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fetch {
    range: AddressRange,
    /// An invalidation has met the fetch.
    collided: bool,
    /// When the fetch is sent again.
    pub(super) again: Time,
}

/// Reason why a fetch is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FetchError {
    /// The mirror has no lease: wait for [`MirrorDecision::Joined`].
    NoLease,
    /// The maximum number of fetches ([`MirrorSettings::fetches`](crate::MirrorSettings::fetches))
    /// is under way: wait for one of them.
    Full,
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoLease => "the mirror has no lease now: fetch again when it has joined",
            Self::Full => "as many fetches are under way as `MirrorSettings::fetches` allows: wait for one of them",
        })
    }
}

impl core::error::Error for FetchError {}

impl Mirror {
    /// Asks for the contents of a range. The result is [`MirrorDecision::Install`],
    /// [`MirrorDecision::Collided`] or [`MirrorDecision::FetchRefused`], or the lease ends
    /// ([`MirrorDecision::Stop`]).
    ///
    /// # Errors
    /// [`FetchError`]; nothing is sent then.
    pub fn fetch(&mut self, range: AddressRange, now: Time) -> Result<Nonce, FetchError> {
        self.tick(now);
        let epoch = self.epoch().ok_or(FetchError::NoLease)?;
        if self.fetches.len() >= self.settings.fetches {
            return Err(FetchError::Full);
        }
        let (nonce, again) = (self.next_nonce(), self.now + self.interval());
        self.fetches.insert(nonce, Fetch { range, collided: false, again });
        self.messages.push_back(ToOwner::Fetch { epoch, nonce, range });
        Ok(nonce)
    }

    /// Cancels a fetch.
    pub fn cancel(&mut self, nonce: Nonce) {
        self.fetches.remove(&nonce);
    }

    pub(super) fn next_fetch(&self) -> Option<Time> {
        self.fetches.values().map(|fetch| fetch.again).min()
    }

    /// Sends unanswered fetches again.
    pub(super) fn fetch_again(&mut self) {
        let (now, again) = (self.now, self.now + self.interval());
        let State::Live(lease) = &self.state else { return };
        for (nonce, fetch) in self.fetches.iter_mut().filter(|(_, fetch)| fetch.again <= now) {
            fetch.again = again;
            self.messages.push_back(ToOwner::Fetch {
                epoch: lease.epoch,
                nonce: *nonce,
                range: fetch.range,
            });
        }
    }

    /// Marks the fetches that an invalidation meets. Called before anything is zapped: their
    /// contents may be from before the change.
    pub(super) fn collide(&mut self, ranges: &RangeSet) {
        if !self.rules.keep(Rule::CollidedFetches) {
            return;
        }
        for fetch in self.fetches.values_mut().filter(|fetch| ranges.overlaps(fetch.range)) {
            fetch.collided = true;
        }
    }

    pub(super) fn fetched(&mut self, epoch: Epoch, nonce: Nonce, version: u64) {
        if !self.is_in(epoch) {
            self.counts.strangers += 1;
            return;
        }
        let Some(fetch) = self.fetches.remove(&nonce) else {
            self.counts.strangers += 1;
            return;
        };
        if fetch.collided {
            self.counts.collided += 1;
            return self.decisions.push_back(MirrorDecision::Collided { nonce });
        }
        self.decisions.push_back(MirrorDecision::Install { nonce, range: fetch.range, version });
    }

    pub(super) fn fetch_refused(&mut self, nonce: Nonce, why: Refusal) {
        if self.fetches.remove(&nonce).is_none() {
            self.counts.strangers += 1;
            return;
        }
        self.decisions.push_back(MirrorDecision::FetchRefused { nonce, why });
    }
}
