//! T3, where it is hard: wakers that poll, register, drop and signal.
use crate::support::*;
use shootdown::{Reached, Timeline};
use std::cell::Cell;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

/// Runs code when it is woken.
struct Runs<F>(F);

impl<F: Fn() + Send + Sync + 'static> Wake for Runs<F> {
    fn wake(self: Arc<Self>) {
        (self.0)();
    }
}

fn poll(reached: &mut Reached, waker: &Waker) -> Poll<()> {
    Pin::new(reached).poll(&mut Context::from_waker(waker))
}

#[test]
fn t3_a_signal_wakes_in_order_although_a_waker_registers() {
    crate::support::watched();
    let (timeline, order) = (Timeline::new(), Arc::new(Mutex::new(Vec::new())));
    let mut waiting = Vec::new();
    for number in 1..=40 {
        let (order, again) = (order.clone(), timeline.clone());
        let waker = Waker::from(Arc::new(Runs(move || {
            order.lock().unwrap().push(number);
            // The task goes on, and waits for the next.
            let mut next = again.reached(1000);
            let _ = poll(&mut next, Waker::noop());
        })));
        let mut reached = timeline.reached(number);
        assert!(poll(&mut reached, &waker).is_pending());
        waiting.push(reached);
    }
    timeline.signal(40);
    assert_eq!(*order.lock().unwrap(), (1..=40).collect::<Vec<_>>());
}

thread_local!(static DEPTH: Cell<usize> = const { Cell::new(0) });

#[test]
fn t3_the_stack_does_not_grow_with_the_number_of_waiters() {
    crate::support::watched();
    let (timeline, deepest) = (Timeline::new(), Arc::new(AtomicUsize::new(0)));
    let mut waiting = Vec::new();
    for number in 1..=10_000 {
        let (deepest, again) = (deepest.clone(), timeline.clone());
        let waker = Waker::from(Arc::new(Runs(move || {
            DEPTH.set(DEPTH.get() + 1);
            deepest.fetch_max(DEPTH.get(), Ordering::SeqCst);
            let mut next = again.reached(u64::MAX);
            let _ = poll(&mut next, Waker::noop());
            DEPTH.set(DEPTH.get() - 1);
        })));
        let mut reached = timeline.reached(number);
        assert!(poll(&mut reached, &waker).is_pending());
        waiting.push(reached);
    }
    timeline.signal(10_000);
    let deepest = deepest.load(Ordering::SeqCst);
    assert!(deepest <= 2, "wakers nest {deepest} deep");
}

#[test]
fn t3_another_thread_that_waits_wakes_nobody_out_of_turn() {
    crate::support::watched();
    let (timeline, order) = (Timeline::new(), Arc::new(Mutex::new(Vec::new())));
    let (slow, goes_on) = (Gate::default(), Gate::default());
    let mut waiting = Vec::new();
    for number in 1..=32_u64 {
        let (order, slow, goes_on) = (order.clone(), slow.clone(), goes_on.clone());
        let waker = Waker::from(Arc::new(Runs(move || {
            if number == 1 {
                slow.open();
                while !goes_on.is_open() {
                    std::thread::yield_now();
                }
            }
            order.lock().unwrap().push(number);
        })));
        let mut reached = timeline.reached(number);
        assert!(poll(&mut reached, &waker).is_pending());
        waiting.push(reached);
    }
    std::thread::scope(|threads| {
        threads.spawn(|| timeline.signal(32));
        while !slow.is_open() {
            std::thread::yield_now();
        }
        // One who waits for something else.
        let mut other = timeline.reached(1000);
        let _ = poll(&mut other, Waker::noop());
        goes_on.open();
    });
    assert!(order.lock().unwrap().is_sorted(), "{:?}", order.lock().unwrap());
}

#[test]
fn t3_a_waker_that_drops_its_own_future_and_those_of_others_is_no_deadlock() {
    crate::support::watched();
    let timeline = Timeline::new();
    let all: Arc<Mutex<Vec<Reached>>> = Arc::default();
    let woken = Arc::new(AtomicUsize::new(0));
    for number in 1..=50 {
        let (others, woken) = (all.clone(), woken.clone());
        let waker = Waker::from(Arc::new(Runs(move || {
            woken.fetch_add(1, Ordering::SeqCst);
            let gone = std::mem::take(&mut *others.lock().unwrap());
            drop(gone);
        })));
        let mut reached = timeline.reached(number);
        assert!(poll(&mut reached, &waker).is_pending());
        all.lock().unwrap().push(reached);
    }
    timeline.signal(50);
    assert!(woken.load(Ordering::SeqCst) >= 1);
    let mut next = timeline.reached(51);
    assert!(poll(&mut next, Waker::noop()).is_pending());
    timeline.signal(51);
    assert!(poll(&mut next, Waker::noop()).is_ready());
}
