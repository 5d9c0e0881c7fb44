//! K9: a device that says of what is found whether it is still valid.

use crate::device::Refused;
use crate::support::{Gate, PAGE, Task, now, pages};
use futures::FutureExt;
use shootdown::cache::{Device, Overlap, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A device whose memory has numbers: the handle keeps the one of its time.
#[derive(Clone, Default)]
pub struct Gpu {
    pub buffer: Arc<AtomicU64>,
    pub gate: Option<Gate>,
    pub calls: Arc<AtomicUsize>,
}

impl Device for Gpu {
    type Handle = u64;
    type Error = Refused;

    async fn register(&self, range: AddressRange) -> Result<u64, Refused> {
        if let Some(gate) = &self.gate
            && range.start() >= PAGE
        {
            gate.clone().await;
        }
        Ok(self.buffer.load(Ordering::Acquire))
    }

    async fn deregister(
        &self,
        _: AddressRange,
        _: u64,
    ) -> Result<(), StillRegistered<u64, Refused>> {
        Ok(())
    }

    fn still_valid(&self, _: AddressRange, handle: &u64) -> bool {
        self.calls.fetch_add(1, Ordering::AcqRel);
        *handle == self.buffer.load(Ordering::Acquire)
    }
}

#[test]
fn k9_many_outdated_registrations_are_no_reason_to_refuse() {
    for (tries, count) in [(1, 2), (64, 70)] {
        let (space, gpu) = (AddressSpace::new(), Gpu::default());
        let cache = RegistrationCache::builder().tries(tries).build(&space, gpu.clone());
        for at in 1..=count {
            drop(now(cache.get(pages(0, at))).unwrap());
        }
        gpu.buffer.store(1, Ordering::Release);
        let got = now(cache.get(pages(0, 1))).map(|got| *got.handle());
        assert!(matches!(got, Ok(1)), "tries({tries}), {count} outdated: {got:?}");
    }
}

#[test]
fn k9_no_piece_that_the_device_does_not_vouch_for_is_given_to_the_caller() {
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        let gate = Gate::default();
        let (space, gpu) =
            (AddressSpace::new(), Gpu { gate: Some(gate.clone()), ..Gpu::default() });
        let cache = RegistrationCache::builder()
            .max_registration(PAGE)
            .overlap(overlap)
            .build(&space, gpu.clone());
        drop(now(cache.get(pages(0, 1))).unwrap());
        let mut all = Task::new(cache.get_all(pages(0, 2)));
        all.expect_pending();
        gpu.buffer.store(1, Ordering::Release);
        gate.open();
        let handles: Vec<_> = all.finish().unwrap().iter().map(|one| *one.handle()).collect();
        assert_eq!(handles, [1, 1], "{overlap:?}: the first is of a buffer that is gone");
    }
}

#[test]
fn k9_a_get_that_waited_is_not_given_what_is_outdated_by_then() {
    let gate = Gate::default();
    let (space, gpu) = (AddressSpace::new(), Gpu { gate: Some(gate.clone()), ..Gpu::default() });
    let cache = RegistrationCache::new(&space, gpu.clone());
    let mut waits = Task::new(cache.get(pages(1, 1)));
    waits.expect_pending();
    gate.open();
    drop(now(cache.get(pages(1, 1))).unwrap());
    gpu.buffer.store(1, Ordering::Release);
    let asked = gpu.calls.load(Ordering::Acquire);
    let got = waits.finish().unwrap();
    assert_eq!((*got.handle(), gpu.calls.load(Ordering::Acquire) > asked), (1, true));
}

/// F1: it must not, but nothing of another one is lost.
#[derive(Default)]
struct Calls(Mutex<Option<RegistrationCache<Arc<Calls>>>>, AtomicUsize);

impl Device for Calls {
    type Handle = ();
    type Error = Refused;
    async fn register(&self, _: AddressRange) -> Result<(), Refused> {
        Ok(())
    }
    async fn deregister(
        &self,
        _: AddressRange,
        (): (),
    ) -> Result<(), StillRegistered<(), Refused>> {
        Ok(())
    }
    fn still_valid(&self, _: AddressRange, (): &()) -> bool {
        let cache = self.0.lock().unwrap().take();
        if let Some(cache) = cache {
            let _ = cache.get(pages(5, 1)).now_or_never();
            let _ = cache.flush().now_or_never();
            drop(cache);
        }
        self.1.fetch_add(1, Ordering::Relaxed).is_multiple_of(2)
    }
}

#[test]
fn f1_a_device_that_calls_the_cache_when_it_is_asked_hangs_nobody() {
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        let (space, device) = (AddressSpace::new(), Arc::new(Calls::default()));
        let cache = RegistrationCache::builder().overlap(overlap).build(&space, device.clone());
        for _ in 0..4 {
            drop(now(cache.get(pages(0, 1))).unwrap());
            *device.0.lock().unwrap() = Some(cache.clone());
            drop(now(cache.get(pages(0, 1))).unwrap());
        }
        now(cache.flush());
        assert_eq!(
            (cache.stats().registrations, cache.stats().pinned_bytes, space.len()),
            (0, 0, 0)
        );
    }
}

#[cfg(feature = "lease")]
#[test]
fn r4_without_a_valid_lease_nothing_is_found_and_a_get_waits() {
    use std::sync::atomic::AtomicBool;
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        let valid = Arc::new(AtomicBool::new(true));
        let asked = valid.clone();
        let space =
            AddressSpace::builder().valid_while(move || asked.load(Ordering::SeqCst)).build();
        let cache = RegistrationCache::builder().overlap(overlap).build(&space, Gpu::default());
        drop(now(cache.get(pages(0, 1))).unwrap());
        drop(now(cache.get(pages(0, 1))).unwrap());
        assert_eq!((cache.stats().misses, cache.stats().hits), (1, 1));
        valid.store(false, Ordering::SeqCst);
        let mut waits = Task::new(Box::pin(cache.get(pages(0, 1))));
        waits.expect_pending();
        let pause = space.pause();
        valid.store(true, Ordering::SeqCst);
        drop(pause);
        assert!(waits.is_woken() && waits.poll().is_ready());
        assert_eq!(
            (cache.stats().registrations, cache.stats().pinned_bytes),
            (1, PAGE),
            "what had been registered is found"
        );
    }
}

#[test]
fn k9_a_shared_or_static_device_is_asked() {
    fn asks<D: Device<Handle = u64, Error = Refused>>(device: D, gpu: &Gpu) {
        let cache = RegistrationCache::new(&AddressSpace::new(), device);
        let buffer = gpu.buffer.load(Ordering::Acquire);
        for (change, expected) in [(0, buffer), (0, buffer), (1, buffer + 1), (0, buffer + 1)] {
            gpu.buffer.fetch_add(change, Ordering::AcqRel);
            assert_eq!(*now(cache.get(pages(0, 1))).unwrap().handle(), expected);
        }
        assert_eq!((cache.stats().hits, cache.stats().outdated), (2, 1));
    }
    let gpu = Gpu::default();
    asks(gpu.clone(), &gpu);
    asks(Arc::new(gpu.clone()), &gpu);
    asks::<&'static Gpu>(Box::leak(Box::new(gpu.clone())), &gpu);
}

#[test]
fn k9_where_nothing_may_overlap_the_device_is_asked_only_about_what_an_earlier_poll_has_made() {
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        let gate = Gate::default();
        let gpu = Gpu { gate: Some(gate.clone()), ..Gpu::default() };
        let builder = RegistrationCache::builder().overlap(overlap);
        let cache = builder.build(&AddressSpace::new(), gpu.clone());
        let asked = || gpu.calls.swap(0, Ordering::AcqRel);
        let mut get = Task::new(cache.get(pages(1, 1)));
        get.expect_pending();
        gate.open();
        drop(get.finish().unwrap());
        assert_eq!(asked(), 0, "{overlap:?}");
        drop(now(cache.get(pages(1, 1))).unwrap());
        assert_eq!(asked(), 1, "{overlap:?}");
    }
}

#[test]
fn k9_what_is_registered_at_once_is_not_asked_about_although_something_gives_way_to_it() {
    let gpu = Gpu::default();
    let cache =
        RegistrationCache::builder().max_registrations(1).build(&AddressSpace::new(), gpu.clone());
    for at in 1..4 {
        drop(now(cache.get(pages(at, 1))).unwrap());
    }
    assert_eq!((cache.stats().evictions, gpu.calls.load(Ordering::Acquire)), (2, 0));
}
