//! Making room: limits, flushes, and a device that is full. All of them withdraw registrations from
//! look-ups and wait for the device (K3).
#![forbid(unsafe_code)]

use super::Core;
use crate::cache::device::Device;
use crate::cache::entry::{Entry, Live, Shelf};
use crate::cache::settings::Limits;
use crate::range::AddressRange;
use crate::sync::{Arc, Ordering};
use alloc::vec::Vec;
use futures::future::{FutureExt, join_all};

/// Number of leaving registrations that one miss looks after.
const LOOKED_AFTER: usize = 3;

impl<D: Device> Core<D> {
    /// Withdraws every idle registration that overlaps `range`.
    fn give_up_idle(&self, range: AddressRange) -> Vec<Arc<Entry<D>>> {
        self.given_up(self.write(|table| table.give_up_idle(range)))
    }

    /// Withdraws idle registrations while there are more than the limits allow.
    fn give_up_over(&self) -> Vec<Arc<Entry<D>>> {
        let Limits { max_bytes, max_registrations, .. } = self.limits;
        if !self.limits.are_set() {
            return Vec::new();
        }
        self.given_up(self.write(|table| table.give_up_over(max_bytes, max_registrations)))
    }

    fn given_up(&self, lives: Vec<Arc<Live<D>>>) -> Vec<Arc<Entry<D>>> {
        self.evictions.fetch_add(lives.len() as u64, Ordering::Relaxed);
        lives
            .into_iter()
            .map(|live| {
                let entry = live.entry.clone();
                entry.leave();
                drop(live);
                entry
            })
            .collect()
    }

    /// Enforces the limits and drives some of the leaving registrations. Returns the registrations
    /// that the device has not yet released.
    pub(in crate::cache) fn tidy(&self) -> Vec<Arc<Entry<D>>> {
        let mut gone = self.give_up_over();
        gone.append(&mut self.replaced.lock());
        for _ in 0..LOOKED_AFTER {
            let Some(key) = self.ready.lock().pop_front() else { break };
            let entry = self.read().entry(key).cloned();
            if entry.is_some_and(|entry| !entry.goes_on()) {
                self.ready.lock().push_back(key);
            }
        }
        // A registration in use is deregistered when its users release it.
        gone.retain(|entry| {
            entry.is_unused() && entry.leaving().is_some_and(|leaving| !leaving.poke(1))
        });
        gone
    }

    /// Withdraws everything idle and waits until the device has deregistered it. Returns `true` if
    /// there was anything.
    pub(in crate::cache) async fn make_room(&self) -> bool {
        let mut gone = self.give_up_idle(AddressRange::ALL);
        let (_, leaving) = self.read().unsettled(AddressRange::ALL);
        gone.extend(leaving.into_iter().filter(|entry| entry.is_unused() && !entry.is_stuck()));
        let any = !gone.is_empty();
        until_gone(gone).await;
        any
    }

    /// Withdraws everything that overlaps `range`, and waits until the unused part of it is
    /// deregistered (K3).
    pub(in crate::cache) async fn flush(&self, range: AddressRange) {
        let (begun, leaving) = self.read().unsettled(range);
        // Attempts without a waiting caller are finished first. Attempts with one are begun anew.
        let (awaited, left): (Vec<_>, Vec<_>) =
            begun.into_iter().partition(|entry| entry.has_claims());
        for entry in awaited.into_iter().filter(|entry| entry.registering().is_some()) {
            entry.flushed.store(true, Ordering::Release);
            if let Some(key) = entry.key() {
                self.reject(key);
                // Its callers may stop waiting, so the cache looks after it.
                self.idle(key);
            }
        }
        let left = left.into_iter().chain(leaving.into_iter().filter(|entry| !entry.has_claims()));
        join_all(left.filter_map(|entry| entry.registering())).await;
        let mut all = self.given_up(self.write(|table| table.give_up(range)));
        all.extend(self.read().unsettled(range).1);
        all.retain(|entry| entry.is_unused());
        gone(all, Entry::is_lost).await;
    }
}

/// Waits until the unused ones of `entries` are deregistered. Skips an entry that the device
/// refuses to deregister: it is retried later.
pub(in crate::cache) async fn until_gone<D: Device>(mut entries: Vec<Arc<Entry<D>>>) {
    entries.retain(|entry| entry.is_unused());
    gone(entries, Entry::is_stuck).await;
}

/// Waits until each of `entries` is over, or `hopeless` says that it will not end soon.
pub(in crate::cache) async fn gone<D: Device>(
    entries: Vec<Arc<Entry<D>>>,
    hopeless: impl Fn(&Entry<D>) -> bool,
) {
    let mut waits: Vec<_> =
        entries.into_iter().filter_map(|entry| Some((entry.leaving()?.wait(), entry))).collect();
    core::future::poll_fn(|cx| {
        waits
            .retain_mut(|(leaving, entry)| leaving.poll_unpin(cx).is_pending() && !hopeless(entry));
        if waits.is_empty() { core::task::Poll::Ready(()) } else { core::task::Poll::Pending }
    })
    .await;
}
