//! R4: a space whose memory is held by a lease.

use crate::support::{Device, Log, Task, pages};
use futures::executor::block_on;
use shootdown::{AddressSpace, Event, Subscription};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;

fn leased(valid: &Arc<AtomicBool>) -> (AddressSpace, Subscription<Device>) {
    let valid = valid.clone();
    let space = AddressSpace::builder().valid_while(move || valid.load(Ordering::SeqCst)).build();
    let driver = space.insert(pages(0, 16), Device::new("driver", &Log::default())).unwrap();
    (space, driver)
}

#[test]
fn r4_a_check_after_the_end_of_the_lease_fails_although_the_sequence_is_unchanged() {
    let valid = Arc::new(AtomicBool::new(true));
    let (space, driver) = leased(&valid);
    let seen = block_on(driver.read_begin());
    assert!(!driver.read_retry(seen));
    valid.store(false, Ordering::SeqCst);
    assert!(driver.read_retry(seen), "nobody has invalidated anything");
    assert_eq!(driver.sequence(), seen);
    assert_eq!(space.stats().collisions, 1);
    valid.store(true, Ordering::SeqCst);
    assert!(!driver.read_retry(seen));
    drop(block_on(space.invalidate(pages(3, 1), Event::Unmap)));
    assert!(driver.read_retry(seen), "and of a valid one an invalidation is noticed");
}

#[test]
fn r4_without_a_lease_readers_wait_and_are_woken_by_the_end_of_a_pause() {
    let valid = Arc::new(AtomicBool::new(false));
    let (space, driver) = leased(&valid);
    let mut readers: Vec<_> = (0..3).map(|_| Task::new(driver.read_begin())).collect();
    readers.iter_mut().for_each(Task::expect_pending);
    let pause = space.pause();
    drop(pause);
    readers
        .iter_mut()
        .for_each(|reader| assert!(reader.poll().is_pending(), "the pause was not all"));
    let pause = space.pause();
    valid.store(true, Ordering::SeqCst);
    readers.iter_mut().for_each(|reader| assert!(reader.poll().is_pending()));
    drop(pause);
    for reader in &mut readers {
        assert!(reader.is_woken());
        assert_eq!(reader.poll(), Poll::Ready(driver.sequence()));
    }
}

#[test]
fn r4_readers_of_a_lease_wait_for_pauses_and_invalidations_as_ever() {
    let valid = Arc::new(AtomicBool::new(true));
    let (space, driver) = leased(&valid);
    let seen = block_on(driver.read_begin());
    let pause = space.pause();
    assert!(driver.read_retry(seen));
    let mut reader = Task::new(driver.read_begin());
    reader.expect_pending();
    drop(pause);
    assert!(reader.is_woken() && reader.poll().is_ready() && !driver.read_retry(seen));
    let guard = block_on(space.invalidate(pages(0, 1), Event::Clear));
    let mut reader = Task::new(driver.read_begin());
    reader.expect_pending();
    drop(guard);
    assert!(reader.is_woken() && reader.poll().is_ready());
}

#[test]
fn r4_a_lease_that_becomes_valid_while_a_reader_enrols_is_not_missed() {
    // Not valid when the reader looks, valid and announced before it is among those who are woken.
    let space = Arc::<OnceLock<AddressSpace>>::default();
    let calls = Arc::<AtomicUsize>::default();
    let ask = {
        let (space, calls) = (space.clone(), calls.clone());
        move || {
            let call = calls.fetch_add(1, Ordering::SeqCst);
            if let Some(space) = space.get() {
                drop(space.pause());
            }
            call > 1
        }
    };
    let space = space.get_or_init(|| AddressSpace::builder().valid_while(ask).build());
    let driver = space.insert(pages(0, 1), Device::new("driver", &Log::default())).unwrap();
    let mut reader = Task::new(driver.read_begin());
    assert!(reader.poll().is_ready());
    assert_eq!(calls.load(Ordering::SeqCst), 3);
}

#[test]
fn r4_no_lock_is_held_while_the_lease_is_asked_and_a_panic_means_that_it_has_ended() {
    let space = Arc::<OnceLock<AddressSpace>>::default();
    let panics = Arc::<AtomicBool>::default();
    let ask = {
        let (space, panics) = (space.clone(), panics.clone());
        move || {
            // Each takes the lock of the space.
            space.get().is_none_or(|space| {
                space.len() == 1 && space.active().is_empty() && !space.is_released()
            }) && !(panics.load(Ordering::SeqCst) && panic!("the clock has gone"))
        }
    };
    let space = space.get_or_init(|| AddressSpace::builder().valid_while(ask).build());
    let driver = space.insert(pages(0, 1), Device::new("driver", &Log::default())).unwrap();
    let seen = block_on(driver.read_begin());
    assert!(!driver.read_retry(seen));
    #[cfg(feature = "std")]
    {
        panics.store(true, Ordering::SeqCst);
        assert!(driver.read_retry(seen));
        assert_eq!(space.stats().lost_panics, 1);
        Task::new(driver.read_begin()).expect_pending();
    }
}
