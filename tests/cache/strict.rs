//! K7 on threads: a device that must not have two registrations that overlap.

use crate::device::Refused;
use crate::support::{PAGE, Task, Yields, pages};
use futures::FutureExt;
use futures::executor::block_on;
use shootdown::cache::{Device, Overlap, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace, Event};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;

/// What is in a device, and what should not have been.
#[derive(Default)]
struct Inside {
    mapped: BTreeMap<u64, AddressRange>,
    next: u64,
    violations: Vec<(AddressRange, AddressRange)>,
}

#[derive(Clone, Default)]
struct Racy {
    inside: Arc<Mutex<Inside>>,
    go: Arc<AtomicBool>,
}

impl Device for Racy {
    type Handle = u64;
    type Error = Refused;

    async fn register(&self, range: AddressRange) -> Result<u64, Refused> {
        let key = {
            let mut inside = self.inside.lock().unwrap();
            if let Some(other) = inside.mapped.values().find(|other| other.overlaps(range)).copied()
            {
                inside.violations.push((range, other));
            }
            inside.next += 1;
            let key = inside.next;
            inside.mapped.insert(key, range);
            key
        };
        while range == pages(0, 4) && !self.go.load(Ordering::Acquire) {
            Yields(1).await;
        }
        Ok(key)
    }

    async fn deregister(
        &self,
        _: AddressRange,
        key: u64,
    ) -> Result<(), StillRegistered<u64, Refused>> {
        Yields(100).await;
        self.inside.lock().unwrap().mapped.remove(&key);
        Ok(())
    }
}

/// An abandoned registration of 0..4 is ended by an invalidation of page 0 on another thread while
/// a get of 2..4 looks whether anything is in its way.
#[test]
fn k7_a_registration_that_leaves_between_two_looks_does_not_overlap_the_next() {
    let (space, racy) = (AddressSpace::new(), Racy::default());
    let cache = RegistrationCache::builder().overlap(Overlap::Wait).build(&space, racy.clone());
    let (turn, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let until = |value: u64| {
        let mut spins = 0_u32;
        while turn.load(Ordering::Acquire) != value {
            spins += 1;
            if spins.is_multiple_of(1000) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0_u64;
            loop {
                until(4 * round + 1);
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
                assert!(unmap.poll().is_pending());
                turn.store(4 * round + 2, Ordering::Release);
                until(4 * round + 3);
                for _ in 0..(round * 7 % 400) {
                    std::hint::spin_loop();
                }
                racy.go.store(true, Ordering::Release);
                loop {
                    if let Poll::Ready(guard) = unmap.poll() {
                        drop(guard);
                        break;
                    }
                }
                turn.store(4 * round + 4, Ordering::Release);
                round += 1;
            }
        });
        let mut round = 0_u64;
        while round < 1000 && racy.inside.lock().unwrap().violations.is_empty() {
            racy.go.store(false, Ordering::Release);
            assert!(cache.get(pages(0, 4)).now_or_never().is_none());
            turn.store(4 * round + 1, Ordering::Release);
            until(4 * round + 2);
            turn.store(4 * round + 3, Ordering::Release);
            drop(block_on(cache.get(pages(2, 2))).unwrap());
            until(4 * round + 4);
            block_on(cache.flush());
            assert_eq!(racy.inside.lock().unwrap().mapped.len(), 0);
            round += 1;
        }
        stop.store(true, Ordering::Release);
        turn.store(4 * round + 1, Ordering::Release);
    });
    let violations = &racy.inside.lock().unwrap().violations;
    assert!(violations.is_empty(), "{violations:?}");
}

/// A device that must not have two that overlap, with random callers that give up, on threads.
#[derive(Clone, Default)]
struct Strict(Arc<Mutex<Inside>>);

impl Device for Strict {
    type Handle = u64;
    type Error = Refused;

    async fn register(&self, range: AddressRange) -> Result<u64, Refused> {
        let key = {
            let mut inside = self.0.lock().unwrap();
            if let Some(other) = inside.mapped.values().find(|other| other.overlaps(range)).copied()
            {
                inside.violations.push((range, other));
            }
            inside.next += 1;
            let key = inside.next;
            inside.mapped.insert(key, range);
            key
        };
        Yields((key % 4) as u32).await;
        if key.is_multiple_of(11) {
            self.0.lock().unwrap().mapped.remove(&key);
            return Err(Refused);
        }
        Ok(key)
    }

    async fn deregister(
        &self,
        _: AddressRange,
        key: u64,
    ) -> Result<(), StillRegistered<u64, Refused>> {
        Yields((key % 3) as u32).await;
        let mut inside = self.0.lock().unwrap();
        inside.next += 1;
        if inside.next.is_multiple_of(7) {
            return Err(StillRegistered { handle: key, error: Refused });
        }
        inside.mapped.remove(&key).expect("deregistered once");
        Ok(())
    }
}

#[test]
fn k7_on_threads_nobody_hangs_and_nothing_is_left() {
    for overlap in [Overlap::Wait, Overlap::Merge] {
        let (space, strict) = (AddressSpace::new(), Strict::default());
        let cache = RegistrationCache::builder()
            .overlap(overlap)
            .max_registration(8 * PAGE)
            .build(&space, strict.clone());
        std::thread::scope(|scope| {
            for at in 0..5_u64 {
                let (cache, space) = (&cache, &space);
                scope.spawn(move || {
                    let mut state = at + 1;
                    let mut random = move || {
                        state = state
                            .wrapping_mul(6364136223846793005)
                            .wrapping_add(1442695040888963407);
                        state >> 33
                    };
                    for _ in 0..400 {
                        let range = pages(random() % 12, 1 + random() % 6);
                        match (at, random() % 4) {
                            (4, 0) => cache.flush_range(range).wait(),
                            (4, _) => drop(space.invalidate(range, Event::Unmap).wait()),
                            (_, 0) => {
                                let mut given_up = Task::new(cache.get_all(range));
                                for _ in 0..random() % 20 {
                                    if given_up.poll().is_ready() {
                                        break;
                                    }
                                }
                            }
                            (_, 1) => drop(cache.get_all(range).wait()),
                            _ => drop(cache.get(range).wait()),
                        }
                    }
                });
            }
        });
        cache.flush().wait();
        let inside = strict.0.lock().unwrap();
        assert_eq!((inside.mapped.len(), cache.stats().pinned_bytes), (0, 0));
        assert!(
            inside.violations.is_empty(),
            "{overlap:?}: {} of {}: {:?}",
            inside.violations.len(),
            inside.next,
            inside.violations[0]
        );
    }
}
