//! K3, K8: what nobody needs is idle, whoever waits for other things.

use crate::device::{Act, Card, throw};
use crate::support::{Gate, PAGE, Task, now, pages};
use futures::FutureExt;
use shootdown::cache::{Device, GetError, Overlap, RegistrationCache, StillRegistered};
use shootdown::{AddressRange, AddressSpace, Event};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake};

#[test]
fn k8_a_dropped_get_all_leaves_none_in_use_although_another_get_is_not_polled() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::builder()
        .max_registration(PAGE)
        .max_registrations(1)
        .build(&space, card.clone());
    let mut other = Task::new(cache.get(pages(0, 1)));
    other.expect_pending();
    let unmap = now(space.invalidate(pages(1, 1), Event::Clear));
    let mut all = Task::new(cache.get_all(pages(0, 2)));
    all.expect_pending();
    gate.open();
    all.expect_pending();
    assert_eq!(card.mapped(), [0]);
    drop(all);
    drop(unmap);
    drop(now(cache.get(pages(50, 1))).unwrap());
    assert_eq!(card.mapped(), [50], "nobody has it, and the limit is one");
    drop(other);
}

#[test]
fn k3_a_full_device_gets_room_although_another_get_is_not_polled() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    card.state.lock().unwrap().room = Some(1);
    let cache = RegistrationCache::builder().max_registration(PAGE).build(&space, card.clone());
    let mut other = Task::new(cache.get(pages(0, 1)));
    other.expect_pending();
    let unmap = now(space.invalidate(pages(1, 1), Event::Clear));
    let mut all = Task::new(cache.get_all(pages(0, 2)));
    all.expect_pending();
    gate.open();
    all.expect_pending();
    drop(all);
    drop(unmap);
    let got = now(cache.get(pages(50, 1)));
    assert!(got.is_ok(), "{:?}", got.err());
    drop(other);
}

#[test]
fn k3_what_was_asked_of_the_device_before_a_flush_is_not_found_after_it() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    // A flush is no change of the memory.
    let cache = RegistrationCache::builder().tries(1).build(&space, card.clone());
    let mut under_way = Task::new(cache.get(pages(0, 1)));
    under_way.expect_pending();
    now(cache.flush_range(pages(0, 1)));
    gate.open();
    let got = under_way.finish().unwrap();
    assert_eq!(
        (*got.handle(), card.mapped()),
        (2, vec![0]),
        "asked for again after the flush, and the first one has gone"
    );
    assert_eq!(now(cache.get(pages(0, 1))).unwrap().handle(), got.handle());
    assert_eq!(cache.stats().collisions, 0, "nothing has changed");
}

/// A single `get` that is not polled: another one has driven it.
#[test]
fn k3_k7_what_was_registered_for_a_get_that_is_not_polled_is_idle() {
    for overlap in [Overlap::Allowed, Overlap::Wait] {
        for limit in [usize::MAX, 1] {
            let gate = Gate::default();
            let (space, card) = (
                AddressSpace::new(),
                Card { register_gate: Some(gate.clone()), ..Card::default() },
            );
            if limit > 1 {
                card.state.lock().unwrap().room = Some(1);
            }
            let builder = RegistrationCache::builder().overlap(overlap).max_registrations(limit);
            let cache = builder.build(&space, card.clone());
            let mut unpolled = Task::new(cache.get(pages(0, 2)));
            unpolled.expect_pending();
            let mut behind = Task::new(cache.get(pages(1, 1)));
            behind.expect_pending();
            gate.open();
            for _ in 0..5 {
                if behind.poll().is_ready() {
                    break;
                }
            }
            drop(behind);
            assert_eq!(card.mapped(), [0]);
            let got = now(cache.get(pages(50, 1)));
            assert!(got.is_ok(), "{overlap:?}: {:?}", got.err());
            drop(got);
            assert_eq!(card.mapped(), [50], "{overlap:?}, limit {limit}");
            drop(unpolled);
        }
    }
}

#[test]
fn k8_a_piece_that_fails_late_leaves_all_others_idle() {
    for overlap in [Overlap::Allowed, Overlap::Wait, Overlap::Merge] {
        for (fails, pieces) in [(2, 3), (4, 5), (0, 2)] {
            let (space, card) = (AddressSpace::new(), Card::default());
            let builder = RegistrationCache::builder()
                .max_registration(PAGE)
                .max_registrations(2)
                .overlap(overlap);
            let cache = builder.build(&space, card.clone());
            let mut acts = vec![Act::Succeed; fails];
            acts.extend([Act::Refuse; 4]);
            card.next_register(&acts);
            let error = now(cache.get_all(pages(0, pieces))).unwrap_err();
            assert!(matches!(error, GetError::Register(_)), "{error:?}");
            card.state.lock().unwrap().register.clear();
            drop(now(cache.get(pages(50, 1))).unwrap());
            assert!(card.mapped().len() <= 2, "{overlap:?} {:?}", card.mapped());
            drop(now(space.invalidate(pages(0, 60), Event::Unmap)));
            assert_eq!((card.mapped().len(), cache.stats().pinned_bytes, space.len()), (0, 0, 0));
        }
    }
}

#[derive(Debug)]
struct Bomb;

impl std::fmt::Display for Bomb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("bomb")
    }
}

impl std::error::Error for Bomb {}

impl Drop for Bomb {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            throw("the error fails when it is dropped");
        }
    }
}

struct Bombs(Gate);

impl Device for Bombs {
    type Handle = ();
    type Error = Bomb;
    async fn register(&self, range: AddressRange) -> Result<(), Bomb> {
        if range.start() == 0 {
            self.0.clone().await;
            return Err(Bomb);
        }
        Ok(())
    }
    async fn deregister(&self, _: AddressRange, (): ()) -> Result<(), StillRegistered<(), Bomb>> {
        Ok(())
    }
}

/// Of a registration whose caller has gone: `make_way`, `flush` and an invalidation wait for it.
#[test]
fn f1_an_error_that_panics_when_it_is_dropped_does_not_reach_callers_of_other_ranges() {
    let mut reached = Vec::new();
    for what in ["get", "flush", "invalidate"] {
        let gate = Gate::default();
        let space = AddressSpace::new();
        let cache =
            RegistrationCache::builder().overlap(Overlap::Wait).build(&space, Bombs(gate.clone()));
        assert!(cache.get(pages(0, 2)).now_or_never().is_none());
        gate.open();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match what {
            "get" => drop(now(cache.get(pages(1, 2))).map_err(std::mem::forget)),
            "flush" => now(cache.flush()),
            _ => drop(now(space.invalidate(pages(0, 1), Event::Unmap))),
        }));
        if ended.is_err() {
            reached.push(what);
        }
    }
    assert!(reached.is_empty(), "{reached:?} panic");
}

#[test]
fn k3_what_was_asked_of_the_device_before_a_flush_is_finished_although_its_caller_has_gone() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { register_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::new(&space, card.clone());
    let mut gone = Task::new(cache.get(pages(0, 1)));
    gone.expect_pending();
    now(cache.flush());
    drop(gone);
    // Misses elsewhere look after it, before the device has answered and afterwards.
    let mut waits = Task::new(cache.get(pages(9, 1)));
    waits.expect_pending();
    gate.open();
    drop(waits.finish().unwrap());
    for page in 10..20 {
        drop(now(cache.get(pages(page, 1))).unwrap());
    }
    let pinned = cache.stats().pinned_bytes / PAGE;
    assert_eq!((pinned, card.mapped().len()), (11, 11), "nobody can find it, so it goes");
}

/// Another caller has done what the first one waited for, and the first one does not ask.
#[test]
fn f1_an_error_that_panics_when_it_is_dropped_does_not_reach_a_caller_that_goes_away() {
    let gate = Gate::default();
    let space = AddressSpace::new();
    let cache =
        RegistrationCache::builder().overlap(Overlap::Wait).build(&space, Bombs(gate.clone()));
    let mut first = Task::new(cache.get(pages(0, 2)));
    first.expect_pending();
    let mut behind = Task::new(cache.get(pages(1, 2)));
    behind.expect_pending();
    gate.open();
    drop(behind.finish().map_err(std::mem::forget));
    let lost = space.stats().lost_panics;
    drop(first);
    assert_eq!(space.stats().lost_panics, lost + 1, "its own error");
}

/// Flushes while it is woken, as a task does that its executor polls inline. Notes whether the
/// flush was over at once.
struct Flushes(RegistrationCache<Card>, Mutex<Option<bool>>);

impl Wake for Flushes {
    fn wake(self: Arc<Self>) {
        let is_over = self.0.flush().now_or_never().is_some();
        self.1.lock().unwrap().get_or_insert(is_over);
    }
}

#[test]
fn k3_a_flush_within_the_wake_up_by_the_last_user_waits_for_the_device() {
    let gate = Gate::default();
    let (space, card) =
        (AddressSpace::new(), Card { deregister_gate: Some(gate.clone()), ..Card::default() });
    let cache = RegistrationCache::builder().build(&space, card.clone());
    let held = now(cache.get(pages(0, 1))).unwrap();
    let flushes = Arc::new(Flushes(cache.clone(), Mutex::default()));
    let mut unmap = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    let waker = flushes.clone().into();
    assert!(unmap.as_mut().poll_unpin(&mut Context::from_waker(&waker)).is_pending());
    drop(held);
    assert_eq!(*flushes.1.lock().unwrap(), Some(false), "the device has it still");
    gate.open();
    drop(now(unmap));
    assert_eq!(card.mapped(), []);
}
