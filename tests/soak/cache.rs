//! A registration cache in the soak: its device's transfers are accesses that the oracle checks
//! like any other.

use crate::soak::{Oracle, PAGE, Soak};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use shootdown::cache::{Device, Merge, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A device that takes its time and sometimes refuses.
pub(crate) struct Nic {
    oracle: Arc<Oracle>,
    random: Mutex<StdRng>,
    /// What it maps.
    mapped: AtomicI64,
}

/// The generations of its pages when it was registered.
pub(crate) struct Pinned {
    first: u64,
    generations: Vec<u64>,
}

impl Nic {
    fn chance(&self, probability: f64) -> bool {
        self.random.lock().unwrap().random_bool(probability)
    }

    async fn works(&self) {
        if self.chance(0.5) {
            tokio::task::yield_now().await;
        } else if self.chance(0.02) {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
    }
}

impl Device for Nic {
    type Handle = Pinned;
    type Error = std::io::Error;

    async fn register(&self, range: AddressRange) -> Result<Pinned, std::io::Error> {
        let pages = range.start() / PAGE..=range.last() / PAGE;
        let generations = pages.map(|page| self.oracle.generation(page)).collect();
        self.works().await;
        if self.chance(0.02) {
            return Err(std::io::Error::other("soak: no room"));
        }
        self.mapped.fetch_add(1, Ordering::SeqCst);
        Ok(Pinned { first: range.start() / PAGE, generations })
    }

    async fn deregister(
        &self,
        _: AddressRange,
        pinned: Pinned,
    ) -> Result<(), StillRegistered<Pinned, std::io::Error>> {
        self.works().await;
        // Transfers that it had begun used the memory until now.
        pinned.accesses(&self.oracle);
        if self.chance(0.02) {
            return Err(StillRegistered {
                handle: pinned,
                error: std::io::Error::other("soak: busy"),
            });
        }
        self.mapped.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

impl Pinned {
    fn accesses(&self, oracle: &Oracle) {
        for (page, generation) in (self.first..).zip(&self.generations) {
            oracle.access(page, *generation);
        }
    }
}

pub(crate) fn cache(
    space: &AddressSpace,
    oracle: &Arc<Oracle>,
    seed: u64,
) -> RegistrationCache<Nic> {
    let random = Mutex::new(StdRng::seed_from_u64(seed));
    let nic = Nic { oracle: oracle.clone(), random, mapped: AtomicI64::new(0) };
    let merge = if seed.is_multiple_of(2) { Merge::Touching } else { Merge::Never };
    RegistrationCache::<Nic>::builder().max_registrations(6).merge(merge).build(space, nic)
}

impl Soak {
    /// A transfer through the cache.
    pub(crate) async fn transfer(&self, random: &mut StdRng) {
        let counts = &self.oracle.counts;
        let range = Self::range(random);
        let Ok(registration) = self.cache.get(range).await else {
            counts.registrations_refused.fetch_add(1, Ordering::Relaxed);
            return;
        };
        registration.handle().accesses(&self.oracle);
        if random.random_bool(0.5) {
            tokio::task::yield_now().await;
            registration.handle().accesses(&self.oracle);
        }
        counts.transfers.fetch_add(1, Ordering::Relaxed);
    }

    /// Registrations that the device still has when the cache should have none.
    pub(crate) async fn registrations_left(&self) -> i64 {
        // A device that refused three times in a row is asked again by the next who needs it.
        for _ in 0..50 {
            tokio::time::timeout(Duration::from_millis(100), self.cache.flush())
                .await
                .unwrap_or(());
            if self.cache.stats().pinned_bytes == 0 {
                break;
            }
        }
        self.cache.device().mapped.load(Ordering::SeqCst)
    }
}
