//! Fetches, including those that wait until memory has changed.

use super::{Decision, Owner};
use crate::message::{Asker, Epoch, Host, Nonce, Refusal, ToMirror};
use crate::owner::books::Phase;
use crate::rules::Rule;
use core::mem;
use shootdown::AddressRange;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Parked {
    pub(super) to: Host,
    pub(super) epoch: Epoch,
    pub(super) nonce: Nonce,
    pub(super) range: AddressRange,
}

impl Owner {
    pub(super) fn fetch(&mut self, from: Host, epoch: Epoch, nonce: Nonce, range: AddressRange) {
        #[cfg(feature = "test-util")]
        if epoch.boot == self.boot
            && self.unbooked.get(&epoch.number).is_some_and(|who| who.host == from)
        {
            return self.serve(Parked { to: from, epoch, nonce, range });
        }
        let limit = self.terms.fetches;
        let Some(member) = self.member_of(from, epoch).filter(|member| member.phase == Phase::Live)
        else {
            self.counts.strangers += 1;
            return self.send(from, ToMirror::Gone { epoch });
        };
        let full = member.parked >= limit;
        // A range that is not shared would never be invalidated.
        let served = self.terms.shared.covers(range)
            && range.len().is_some_and(|bytes| bytes <= self.terms.fetch_bytes);
        if !served {
            self.counts.refused += 1;
            return self.send(
                from,
                ToMirror::Refused { nonce, asker: Asker::Fetch(epoch), why: Refusal::Contents },
            );
        }
        let parked = Parked { to: from, epoch, nonce, range };
        if !self.is_under_invalidation(range) {
            return self.serve(parked);
        }
        let key = (epoch.number, nonce);
        if self.parked.contains_key(&key) {
            return;
        }
        if full {
            self.counts.refused += 1;
            return self.send(
                from,
                ToMirror::Refused { nonce, asker: Asker::Fetch(epoch), why: Refusal::Fetches },
            );
        }
        if let Some(member) = self.members.get_mut(&epoch.number) {
            member.parked += 1;
        }
        self.parked.insert(key, parked);
    }

    fn is_under_invalidation(&self, range: AddressRange) -> bool {
        self.rules.keep(Rule::ParkedFetches)
            && self.invalidations.values().any(|invalidation| invalidation.ranges.overlaps(range))
    }

    fn serve(&mut self, of: Parked) {
        let Parked { to, epoch, nonce, range } = of;
        self.decisions.push_back(Decision::Serve { to, epoch, nonce, range, version: self.ended });
    }

    /// Serves the waiting fetches that can be served after an invalidation has ended.
    pub(super) fn serve_parked(&mut self) {
        for (key, parked) in mem::take(&mut self.parked) {
            if self.is_under_invalidation(parked.range) {
                self.parked.insert(key, parked);
                continue;
            }
            if let Some(member) = self.members.get_mut(&key.0) {
                member.parked -= 1;
            }
            self.serve(parked);
        }
    }

    /// Makes the message that goes with the contents of a [`Decision::Serve`].
    pub fn fetched(epoch: Epoch, nonce: Nonce, version: u64) -> ToMirror {
        ToMirror::Fetched { epoch, nonce, version }
    }
}
