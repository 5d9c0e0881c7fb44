//! Drivers and populations of notifiers for the benchmarks.

use shootdown::{
    AddressRange, AddressSpace, DriverLock, IntervalNotifier, Invalidation, PassFuture,
    Subscription, WouldBlock,
};
use std::pin::Pin;
use std::task::{Context, Poll};

const PAGE: u64 = 4096;

/// What a [`Device`] leaves to be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Single,
    Ready,
    PendOnce,
}

/// The driver of the goals: takes its lock, sets the sequence and counts.
pub struct Device {
    kind: Kind,
    calls: DriverLock<u64>,
}

impl Device {
    pub fn new(kind: Kind) -> Self {
        Self { kind, calls: DriverLock::new(0) }
    }
}

impl IntervalNotifier for Device {
    #[inline]
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        *self.calls.lock_for(invalidation) += 1;
        Ok(match self.kind {
            Kind::Single => None,
            Kind::Ready => Some(PassFuture::new(std::future::ready(()))),
            Kind::PendOnce => Some(PassFuture::new(PendOnce::default())),
        })
    }
}

#[derive(Default)]
pub struct PendOnce(bool);

impl Future for PendOnce {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// A cheap random number generator (xorshift64), whose cost is measured and subtracted.
pub fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

pub fn page(address: u64) -> AddressRange {
    AddressRange::new(address, PAGE).unwrap()
}

/// `n` notifiers on every other page, inserted in random order.
pub struct Population {
    pub space: AddressSpace,
    devices: Vec<Subscription<Device>>,
}

impl Population {
    pub fn new(n: u64) -> Self {
        let space = AddressSpace::new();
        let mut order: Vec<u64> = (0..n).collect();
        let mut next = random(n);
        for at in (1..order.len()).rev() {
            order.swap(at, (next() % (at as u64 + 1)) as usize);
        }
        let insert =
            |at: u64| space.insert(page(at * 2 * PAGE), Device::new(Kind::Single)).unwrap();
        let devices = order.into_iter().map(insert).collect();
        Self { space, devices }
    }

    /// A page that a notifier watches.
    pub fn page(&self, at: u64) -> u64 {
        at * 2 * PAGE
    }

    /// A page between two of them.
    pub fn gap(&self, at: u64) -> u64 {
        self.page(at) + PAGE
    }

    /// One more, at `address`.
    pub fn insert_at(&self, address: u64) -> Subscription<Device> {
        self.space.insert(page(address), Device::new(Kind::Single)).unwrap()
    }

    pub fn device(&self, at: usize) -> &Subscription<Device> {
        &self.devices[at]
    }
}

/// A space with `k` notifiers on one page.
pub fn hitting(kind: Kind, k: u64) -> (AddressSpace, Vec<Subscription<Device>>) {
    let space = AddressSpace::new();
    let devices = (0..k).map(|_| space.insert(page(0), Device::new(kind)).unwrap()).collect();
    (space, devices)
}
