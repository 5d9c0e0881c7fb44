//! Changes of the memory while it is registered: they end an attempt, and it must come to an end.

use crate::support::{now, pages};
use futures::FutureExt;
use shootdown::cache::{Device, GetError, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace, Event};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Registering changes memory, and a source says so: this range, or another one.
struct Changes {
    space: AddressSpace,
    what: Option<AddressRange>,
    /// One after the other, and again.
    events: &'static [Event],
    times: u32,
    registered: Arc<AtomicU32>,
}

impl Device for Changes {
    type Handle = ();
    type Error = std::io::Error;

    async fn register(&self, range: AddressRange) -> std::io::Result<()> {
        let before = self.registered.fetch_add(1, Ordering::SeqCst);
        if before < self.times {
            let event = self.events[before as usize % self.events.len()];
            // As a source does that has read an event: it does not wait for the delivery.
            let _ = self.space.invalidate(self.what.unwrap_or(range), event).now_or_never();
        }
        Ok(())
    }

    async fn deregister(
        &self,
        _: AddressRange,
        (): (),
    ) -> Result<(), StillRegistered<(), std::io::Error>> {
        Ok(())
    }
}

fn changes(
    what: Option<AddressRange>,
    times: u32,
) -> (AddressSpace, Arc<AtomicU32>, RegistrationCache<Changes>) {
    raised(what, &[Event::Clear], times)
}

fn raised(
    what: Option<AddressRange>,
    events: &'static [Event],
    times: u32,
) -> (AddressSpace, Arc<AtomicU32>, RegistrationCache<Changes>) {
    let (space, registered) = (AddressSpace::new(), Arc::default());
    let device =
        Changes { space: space.clone(), what, events, times, registered: Arc::clone(&registered) };
    let cache = RegistrationCache::new(&space, device);
    (space, registered, cache)
}

#[test]
fn k1_an_attempt_whose_device_changes_the_memory_each_time_ends_after_eight() {
    let (_space, registered, cache) = changes(None, u32::MAX);
    let refused = now(cache.get(pages(1, 1))).unwrap_err();
    assert!(matches!(refused, GetError::Invalidated { tries: 8 }), "{refused:?}");
    assert_eq!(registered.load(Ordering::SeqCst), 8);
}

/// A process that forks changes the protection of all that it has, each time.
#[test]
fn k1_forks_in_a_row_are_not_taken_for_changes_of_the_device() {
    let (_space, registered, cache) = raised(None, &[Event::ProtectionPage], 40);
    drop(now(cache.get(pages(1, 1))).unwrap());
    assert_eq!((registered.load(Ordering::SeqCst), cache.stats().collisions), (41, 40));
    let (_space, registered, cache) = raised(None, &[Event::ProtectionPage], u32::MAX);
    let refused = now(cache.get(pages(1, 1))).unwrap_err();
    assert!(matches!(refused, GetError::Invalidated { tries: 64 }), "{refused:?}");
    assert_eq!(registered.load(Ordering::SeqCst), 64);
}

#[test]
fn k1_changes_that_differ_are_not_taken_for_one_of_the_device() {
    let (_space, registered, cache) = raised(None, &[Event::Clear, Event::Unmap], 40);
    drop(now(cache.get(pages(1, 1))).unwrap());
    assert_eq!((registered.load(Ordering::SeqCst), cache.stats().collisions), (41, 40));
}

/// The device was not asked yet: the second change comes when the caller has waited for the first.
#[test]
fn k1_a_change_between_the_wait_and_the_device_counts_as_a_try() {
    for tries in [1, 2] {
        let (space, registered) = (AddressSpace::new(), Arc::default());
        let device = Changes {
            space: space.clone(),
            what: None,
            events: &[],
            times: 0,
            registered: Arc::clone(&registered),
        };
        let cache = RegistrationCache::builder().tries(tries).build(&space, device);
        let first = now(space.invalidate(pages(1, 1), Event::Clear));
        let mut get = crate::support::Task::new(cache.get(pages(1, 1)));
        get.expect_pending();
        drop(first);
        let second = now(space.invalidate(pages(1, 1), Event::Clear));
        let polled = get.run();
        drop(second);
        if tries == 1 {
            let refused = polled.map(|got| got.map(drop));
            assert!(
                matches!(refused, std::task::Poll::Ready(Err(GetError::Invalidated { tries: 1 }))),
                "{refused:?}"
            );
        } else {
            assert!(polled.is_pending());
            drop(get.finish().unwrap());
        }
        let asked = registered.load(Ordering::SeqCst);
        assert_eq!((asked, cache.stats().collisions), (tries - 1, 1));
    }
}

#[test]
fn k1_a_cache_is_told_how_often_to_begin() {
    for (tries, made) in [(0, 1), (1, 1), (5, 5)] {
        let (space, registered) = (AddressSpace::new(), Arc::default());
        let device = Changes {
            space: space.clone(),
            what: None,
            events: &[Event::ProtectionPage],
            times: u32::MAX,
            registered: Arc::clone(&registered),
        };
        let cache = RegistrationCache::builder().tries(tries).build(&space, device);
        let refused = now(cache.get(pages(1, 1))).unwrap_err();
        assert!(matches!(refused, GetError::Invalidated { tries } if tries == made), "{refused:?}");
        assert_eq!(registered.swap(0, Ordering::SeqCst), made);
        let refused = now(cache.get_all(pages(1, 1))).unwrap_err();
        assert!(matches!(refused, GetError::Invalidated { tries } if tries == made), "{refused:?}");
        assert_eq!(registered.load(Ordering::SeqCst), made);
    }
}

#[test]
fn k1_an_attempt_whose_device_changes_the_memory_once_succeeds() {
    let (_space, registered, cache) = changes(None, 1);
    drop(now(cache.get(pages(1, 1))).unwrap());
    assert_eq!((registered.load(Ordering::SeqCst), cache.stats().collisions), (2, 1));
    // What it changes elsewhere is no collision at all.
    let (_space, registered, cache) = changes(Some(pages(100, 1)), u32::MAX);
    drop(now(cache.get(pages(1, 1))).unwrap());
    assert_eq!((registered.load(Ordering::SeqCst), cache.stats().collisions), (1, 0));
}

/// A source closes the gate before it reads an event, and opens it once the invalidation of exactly
/// what the event names has started.
#[cfg(feature = "userfaultfd")]
#[test]
fn m1_what_is_registered_while_the_gate_is_closed_counts_once_it_is_open() {
    struct Slow(crate::support::Gate, AtomicU32);
    impl Device for Slow {
        type Handle = ();
        type Error = std::io::Error;

        async fn register(&self, _: AddressRange) -> std::io::Result<()> {
            self.1.fetch_add(1, Ordering::SeqCst);
            self.0.clone().await;
            Ok(())
        }

        async fn deregister(
            &self,
            _: AddressRange,
            (): (),
        ) -> Result<(), StillRegistered<(), std::io::Error>> {
            Ok(())
        }
    }
    for hit in [false, true] {
        let (space, gate) = (AddressSpace::new(), crate::support::Gate::default());
        let cache = RegistrationCache::new(&space, Arc::new(Slow(gate.clone(), AtomicU32::new(0))));
        let mut get = crate::support::Task::new(cache.get(pages(1, 1)));
        get.expect_pending();
        let pause = space.pause();
        gate.open();
        get.expect_pending();
        if hit {
            // The event was about this range: what was registered is from before it.
            drop(now(space.invalidate(pages(1, 1), Event::Unmap)));
        }
        drop(pause);
        drop(get.finish().unwrap());
        assert_eq!(cache.device().1.load(Ordering::SeqCst), if hit { 2 } else { 1 });
    }
}

/// As a userfaultfd does: the gate is closed when the event has been read, and the delivery comes
/// when the device has registered.
#[cfg(feature = "userfaultfd")]
#[test]
fn m1_an_attempt_whose_device_raises_an_event_that_is_delivered_later_ends_after_eight() {
    struct Raises(AddressSpace, std::sync::Mutex<Option<shootdown::Pause<'static>>>, AtomicU32);
    impl Device for Raises {
        type Handle = ();
        type Error = std::io::Error;

        async fn register(&self, _: AddressRange) -> std::io::Result<()> {
            self.2.fetch_add(1, Ordering::SeqCst);
            let space: &'static AddressSpace = Box::leak(Box::new(self.0.clone()));
            *self.1.lock().unwrap() = Some(space.pause());
            Ok(())
        }

        async fn deregister(
            &self,
            _: AddressRange,
            (): (),
        ) -> Result<(), StillRegistered<(), std::io::Error>> {
            Ok(())
        }
    }
    let space = AddressSpace::new();
    let device = Arc::new(Raises(space.clone(), std::sync::Mutex::default(), AtomicU32::new(0)));
    let cache = RegistrationCache::new(&space, device.clone());
    let mut get = crate::support::Task::new(cache.get(pages(1, 1)));
    let result = loop {
        if let std::task::Poll::Ready(result) = get.run() {
            break result;
        }
        drop(now(space.invalidate(pages(1, 1), Event::Clear)));
        drop(device.1.lock().unwrap().take());
    };
    assert!(matches!(result, Err(GetError::Invalidated { tries: 8 })), "{result:?}");
    assert_eq!(device.2.load(Ordering::SeqCst), 8);
}
