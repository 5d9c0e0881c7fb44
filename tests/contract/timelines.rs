//! T: timelines.

use crate::support::*;
use futures::task::{ArcWake, waker};
use proptest::prelude::*;
use shootdown::{Event, Reached, Timeline};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

/// Wakes by running code; counts how often.
struct Runs<F>(F, AtomicUsize);

impl<F: Fn() + Send + Sync> ArcWake for Runs<F> {
    fn wake_by_ref(this: &Arc<Self>) {
        this.1.fetch_add(1, Ordering::SeqCst);
        (this.0)();
    }
}

fn runs<F: Fn() + Send + Sync + 'static>(code: F) -> (Arc<Runs<F>>, Waker) {
    let runs = Arc::new(Runs(code, AtomicUsize::new(0)));
    (runs.clone(), waker(runs))
}

fn poll(reached: &mut Reached, waker: &Waker) -> Poll<()> {
    Pin::new(reached).poll(&mut Context::from_waker(waker))
}

#[test]
fn t1_the_value_rises_only() {
    crate::support::watched();
    let timeline = Timeline::new();
    assert_eq!(timeline.value(), 0);
    now(timeline.reached(0));
    let other = timeline.clone();
    for (signalled, value) in [(3, 3), (2, 3), (3, 3), (0, 3), (u64::MAX, u64::MAX), (7, u64::MAX)]
    {
        other.signal(signalled);
        assert_eq!(timeline.value(), value);
        now(timeline.reached(value));
    }
}

#[test]
fn t2_a_future_resolves_when_its_number_is_reached_and_again_when_it_is_polled_again() {
    crate::support::watched();
    let timeline = Timeline::new();
    let (count, waker) = runs(|| ());
    let mut reached = timeline.reached(2);
    assert!(poll(&mut reached, &waker).is_pending());
    timeline.signal(1);
    assert_eq!(count.1.load(Ordering::SeqCst), 0, "a signal of less wakes nobody");
    assert!(poll(&mut reached, &waker).is_pending());
    timeline.signal(2);
    assert_eq!(count.1.load(Ordering::SeqCst), 1);
    timeline.signal(3);
    assert_eq!(count.1.load(Ordering::SeqCst), 1, "woken once");
    for _ in 0..3 {
        assert!(poll(&mut reached, &waker).is_ready());
    }
}

#[test]
fn t2_the_task_that_polled_last_is_woken() {
    crate::support::watched();
    let timeline = Timeline::new();
    let ((first, of_first), (second, of_second)) = (runs(|| ()), runs(|| ()));
    let mut reached = timeline.reached(1);
    assert!(
        poll(&mut reached, &of_first).is_pending() && poll(&mut reached, &of_second).is_pending()
    );
    timeline.signal(1);
    assert_eq!([&first.1, &second.1].map(|woken| woken.load(Ordering::SeqCst)), [0, 1]);
}

#[test]
fn t3_a_signal_wakes_in_order_of_the_numbers_and_then_of_the_waiters() {
    crate::support::watched();
    let (timeline, order) = (Timeline::new(), Arc::new(Mutex::new(Vec::new())));
    let mut waiting: Vec<_> = [5, 1, 3, 1, 4, 9]
        .into_iter()
        .enumerate()
        .map(|(at, number)| {
            let order = order.clone();
            let (_, waker) = runs(move || order.lock().unwrap().push(at));
            let mut reached = timeline.reached(number);
            assert!(poll(&mut reached, &waker).is_pending());
            reached
        })
        .collect();
    timeline.signal(4);
    assert_eq!(std::mem::take(&mut *order.lock().unwrap()), [1, 3, 2, 4]);
    drop(waiting.swap_remove(0));
    timeline.signal(9);
    assert_eq!(*order.lock().unwrap(), [5], "who has gone is not woken");
}

#[test]
fn t3_more_waiters_than_one_batch_are_all_woken() {
    crate::support::watched();
    let timeline = Timeline::new();
    let mut tasks: Vec<_> = (0..100).map(|_| Task::new(timeline.reached(1))).collect();
    tasks.iter_mut().for_each(Task::expect_pending);
    timeline.signal(1);
    assert!(tasks.iter().all(Task::is_woken));
    tasks.iter_mut().for_each(|task| task.finish());
}

#[test]
fn t3_what_a_waker_does_deadlocks_nobody_and_loses_no_wake_up() {
    crate::support::watched();
    // It polls its task inline, signals, drops another waiter and registers a further one; also in
    // the middle of a batch.
    for before in [0, 15, 40] {
        let timeline = Timeline::new();
        let mut others: Vec<_> = (0..before).map(|_| Task::new(timeline.reached(1))).collect();
        others.iter_mut().for_each(Task::expect_pending);
        let inline = Arc::new(Mutex::new(Some(timeline.reached(1))));
        let goes = Arc::new(Mutex::new(Some(timeline.reached(1))));
        let comes = Arc::new(Mutex::new(None));
        let (count, waker) = runs({
            let (timeline, inline, goes, comes) =
                (timeline.clone(), inline.clone(), goes.clone(), comes.clone());
            move || {
                let polled = inline
                    .lock()
                    .unwrap()
                    .take()
                    .map(|mut reached| poll(&mut reached, Waker::noop()));
                assert_ne!(polled, Some(Poll::Pending));
                drop(goes.lock().unwrap().take());
                timeline.signal(2);
                let mut further = Task::new(timeline.reached(3));
                further.expect_pending();
                *comes.lock().unwrap() = Some(further);
            }
        });
        assert!(poll(inline.lock().unwrap().as_mut().unwrap(), &waker).is_pending());
        assert!(poll(goes.lock().unwrap().as_mut().unwrap(), &Waker::noop().clone()).is_pending());
        let mut last = [Task::new(timeline.reached(1)), Task::new(timeline.reached(2))];
        last.iter_mut().for_each(Task::expect_pending);
        timeline.signal(1);
        assert_eq!((count.1.load(Ordering::SeqCst), timeline.value()), (1, 2));
        assert!(others.iter().chain(&last).all(Task::is_woken), "{before} before it");
        timeline.signal(3);
        assert!(comes.lock().unwrap().as_ref().unwrap().is_woken());
    }
}

#[test]
#[cfg(feature = "std")]
fn t3_a_waker_that_panics_is_counted_and_the_others_are_woken() {
    crate::support::watched();
    let timeline = Timeline::new();
    let (count, panics) = runs(|| panic!("a waker fails"));
    let mut bad = timeline.reached(1);
    assert!(poll(&mut bad, &panics).is_pending());
    let mut good: Vec<_> = (0..20).map(|_| Task::new(timeline.reached(1))).collect();
    good.iter_mut().for_each(Task::expect_pending);
    assert_eq!(timeline.lost_panics(), 0);
    timeline.signal(1);
    assert!(good.iter().all(Task::is_woken));
    assert_eq!((count.1.load(Ordering::SeqCst), timeline.lost_panics()), (1, 1));
    assert!(poll(&mut bad, &panics).is_ready());
}

#[test]
fn t4_a_future_outlives_the_handles_and_stays_pending() {
    crate::support::watched();
    let timeline = Timeline::new();
    let mut task = Task::new(timeline.reached(1));
    task.expect_pending();
    drop(timeline);
    assert!(
        !task.is_woken() && task.poll().is_pending(),
        "nobody has said that the device is done"
    );
}

#[test]
fn t4_a_pass_that_waits_for_a_timeline_is_driven_by_whoever_waits() {
    crate::support::watched();
    let (space, device, _log) = one_device();
    let timeline = Timeline::new();
    device.next(Act::pass(timeline.reached(1)));
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    invalidate.expect_pending();
    drop(invalidate);
    let mut reader = Task::new(device.read_begin());
    reader.expect_pending();
    timeline.signal(1);
    reader.finish();
    assert!(space.active().is_empty());
}

#[test]
#[cfg(feature = "std")]
fn t2_threads_signal_and_wait_at_once() {
    crate::support::watched();
    const LAST: u64 = if cfg!(miri) { 20 } else { 2_000 };
    let timeline = Timeline::new();
    std::thread::scope(|threads| {
        for first in 1..=2 {
            let timeline = timeline.clone();
            threads.spawn(move || {
                (first..=LAST).step_by(2).for_each(|number| timeline.signal(number))
            });
        }
        for _ in 0..3 {
            let timeline = timeline.clone();
            threads.spawn(move || {
                for number in 1..=LAST {
                    drop(timeline.reached(number + 1));
                    timeline.reached(number).wait();
                    assert!(timeline.value() >= number);
                }
            });
        }
    });
    assert_eq!(timeline.value(), LAST);
}

#[derive(Clone, Debug)]
enum Step {
    Signal(u64),
    Wait(u64),
    Poll(usize),
    Drop(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..40u64).prop_map(Step::Signal),
        (0..40u64).prop_map(Step::Wait),
        any::<usize>().prop_map(Step::Poll),
        any::<usize>().prop_map(Step::Drop),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 10 } else { 500 }))]

    /// Against a number and a list: who is woken by which signal, and what a poll returns.
    #[test]
    fn t3_a_timeline_does_as_a_number_and_a_list(steps in prop::collection::vec(step(), 1..80)) {
        let (timeline, mut value, mut serial) = (Timeline::new(), 0, 0);
        let mut waiting = BTreeMap::new();
        for step in steps {
            match step {
                Step::Signal(number) => {
                    timeline.signal(number);
                    value = value.max(number);
                }
                Step::Wait(number) => {
                    let mut task = Task::new(timeline.reached(number));
                    let polled = task.poll();
                    prop_assert_eq!(polled.is_ready(), number <= value);
                    if polled.is_pending() {
                        waiting.insert(serial, (number, task));
                        serial += 1;
                    }
                }
                Step::Poll(at) | Step::Drop(at) if !waiting.is_empty() => {
                    let key = *waiting.keys().nth(at % waiting.len()).unwrap();
                    let (number, task) = waiting.get_mut(&key).unwrap();
                    if matches!(step, Step::Drop(_)) || task.poll().is_ready() {
                        prop_assert!(matches!(step, Step::Drop(_)) || *number <= value);
                        waiting.remove(&key);
                    }
                }
                Step::Poll(_) | Step::Drop(_) => {}
            }
            prop_assert_eq!(timeline.value(), value);
            for (number, task) in waiting.values() {
                prop_assert_eq!(task.is_woken(), *number <= value);
            }
        }
    }
}
