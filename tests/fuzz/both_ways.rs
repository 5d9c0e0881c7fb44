//! The library's quick ways and its plain ones on the same random schedules.
//!
//! A schedule is a list of bytes. It runs twice: on a space that takes the quick ways, and on one
//! made with `plain_only`. Everything that a driver, a caller or an executor can see is written
//! down, and the two texts must be equal: the order of calls, polls, drops and wakes, what they
//! were told, results, panics, sequences, counters, and what is listed as active. Times are left
//! out, unless the space has a clock, which then is the schedule's own.

use futures::task::{ArcWake, waker};
use proptest::prelude::*;
use shootdown::{
    AddressSpace, Event, IntervalNotifier, Invalidate, Invalidation, InvalidationGuard, PassFuture,
    RangeSet, Remove, Sequence, Subscription, WouldBlock,
};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use crate::support::{Gate, pages};

/// What the drivers of one run do, and what can be seen.
#[derive(Default)]
struct Stage {
    /// One for each first pass, in the order of the calls.
    acts: Mutex<VecDeque<u8>>,
    seen: Mutex<Vec<String>>,
    /// Of passes that wait.
    gates: Mutex<Vec<Gate>>,
}

impl Stage {
    fn note(&self, what: String) {
        self.seen.lock().unwrap().push(what);
    }
}

/// Panics without a message on the standard error.
fn fail(why: String) -> ! {
    resume_unwind(Box::new(why))
}

/// Runs code that may panic; returns the panic's message.
fn attempt<R>(code: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(code)).map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "a panic without a text".to_owned())
    })
}

struct Driver {
    name: usize,
    stage: Arc<Stage>,
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.stage.note(format!("driver {} is dropped", self.name));
    }
}

impl IntervalNotifier for Driver {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let act = self.stage.acts.lock().unwrap().pop_front().unwrap_or(0) % 20;
        let may_defer = invalidation.may_defer();
        self.stage.note(format!(
            "driver {} is called, may defer: {may_defer}: {:?}",
            self.name,
            invalidation.info()
        ));
        let left = match act {
            0..=5 => {
                invalidation.set_seq();
                return Ok(None);
            }
            // It leaves the device alone (S4).
            6 => return Ok(None),
            7 => return Err(WouldBlock),
            8 => fail(format!("first pass of {}", self.name)),
            9..=12 => Left::Ready,
            13 | 14 => Left::Yields(u32::from(act) - 12),
            15 => Left::Panics,
            16 => Left::PanicsInDrop,
            _ => {
                let gate = Gate::default();
                self.stage.gates.lock().unwrap().push(gate.clone());
                Left::Waits(gate)
            }
        };
        invalidation.set_seq();
        Ok(Some(PassFuture::new(Pass { name: self.name, left, stage: self.stage.clone() })))
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Owned(format!("driver {}", self.name))
    }
}

/// What is left to do for a pass.
enum Left {
    Ready,
    Yields(u32),
    Waits(Gate),
    Panics,
    PanicsInDrop,
}

struct Pass {
    name: usize,
    left: Left,
    stage: Arc<Stage>,
}

impl Future for Pass {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.stage.note(format!("a pass of {} is polled", self.name));
        let name = self.name;
        match &mut self.left {
            Left::Ready | Left::PanicsInDrop | Left::Yields(0) => Poll::Ready(()),
            Left::Yields(times) => {
                *times -= 1;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Left::Waits(gate) => Pin::new(gate).poll(cx),
            Left::Panics => fail(format!("pass of {name}")),
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.stage.note(format!("a pass of {} is dropped", self.name));
        if let Left::PanicsInDrop = self.left {
            fail(format!("drop of a pass of {}", self.name));
        }
    }
}

/// A task whose wakes are seen.
struct Task<F> {
    future: Pin<Box<F>>,
    alarm: Arc<Alarm>,
}

struct Alarm {
    name: usize,
    stage: Arc<Stage>,
}

impl ArcWake for Alarm {
    fn wake_by_ref(this: &Arc<Self>) {
        this.stage.note(format!("task {} is woken", this.name));
    }
}

impl<F: Future> Task<F> {
    fn poll(&mut self) -> Result<Poll<F::Output>, String> {
        let waker = waker(self.alarm.clone());
        attempt(|| self.future.as_mut().poll(&mut Context::from_waker(&waker)))
    }
}

type Reader = Pin<Box<dyn Future<Output = (usize, Sequence)>>>;

struct World<'s> {
    space: &'s AddressSpace,
    stage: Arc<Stage>,
    /// Moved by the schedule, in microseconds.
    time: Arc<AtomicU64>,
    /// The space takes its time from there.
    timed: bool,
    drivers: Vec<Option<Arc<Subscription<Driver>>>>,
    invalidations: Vec<Task<Invalidate<'s>>>,
    guards: Vec<InvalidationGuard<'s>>,
    readers: Vec<Task<Reader>>,
    removals: Vec<Task<Remove<Driver>>>,
    sequences: Vec<(usize, Sequence)>,
    tasks: usize,
}

impl<'s> World<'s> {
    fn task<F>(&mut self, future: F) -> Task<F> {
        self.tasks += 1;
        let alarm = Arc::new(Alarm { name: self.tasks, stage: self.stage.clone() });
        Task { future: Box::pin(future), alarm }
    }

    /// Polls a future once. One that has resolved or panicked goes.
    fn poll<F: Future>(
        &mut self,
        mut task: Task<F>,
        then: impl FnOnce(&mut Self, F::Output),
    ) -> Option<Task<F>> {
        let name = task.alarm.name;
        match task.poll() {
            Ok(Poll::Pending) => {
                self.stage.note(format!("task {name} waits"));
                Some(task)
            }
            Ok(Poll::Ready(output)) => {
                self.stage.note(format!("task {name} is ready"));
                then(self, output);
                self.let_go(task);
                None
            }
            Err(why) => {
                self.stage.note(format!("task {name} has panicked: {why}"));
                self.let_go(task);
                None
            }
        }
    }

    fn let_go<T>(&self, what: T) {
        if let Err(why) = attempt(|| drop(what)) {
            self.stage.note(format!("a drop has panicked: {why}"));
        }
    }

    fn hold(&mut self, guard: InvalidationGuard<'s>) {
        self.stage.note(format!("{guard:?}"));
        self.guards.push(guard);
    }

    fn poll_invalidation(&mut self, at: usize) {
        let task = self.invalidations.remove(at);
        if let Some(task) = self.poll(task, Self::hold) {
            self.stage.note(format!("{:?}", task.future));
            self.invalidations.insert(at, task);
        }
    }

    fn poll_waiters(&mut self) {
        for task in std::mem::take(&mut self.readers) {
            let left = self.poll(task, |world, (driver, sequence)| {
                world.stage.note(format!("driver {driver} reads {}", sequence.get()));
                world.sequences.push((driver, sequence));
            });
            self.readers.extend(left);
        }
        for task in std::mem::take(&mut self.removals) {
            let left = self.poll(task, |world, driver| world.let_go(driver));
            self.removals.extend(left);
        }
    }

    fn insert(&mut self, at: u8, len: u8) {
        let range = pages(u64::from(at % 12), 1 + u64::from(len % 5));
        let driver = Driver { name: self.drivers.len(), stage: self.stage.clone() };
        let inserted = self.space.insert(range, driver);
        self.stage.note(format!("inserted: {}", inserted.is_ok()));
        self.drivers.push(inserted.ok().map(Arc::new));
    }

    fn invalidate(&mut self, future: Invalidate<'s>, poll: bool) {
        let task = self.task(future);
        self.invalidations.push(task);
        if poll {
            self.poll_invalidation(self.invalidations.len() - 1);
        }
    }

    /// The registration of some driver ends in one of four ways.
    fn end_of_driver(&mut self, at: usize, how: u8) {
        let Some(subscription) = self.drivers[at].take() else { return };
        match (how % 4, Arc::try_unwrap(subscription)) {
            (0 | 1, Ok(subscription)) => {
                let task = self.task(subscription.remove());
                self.removals.push(task);
                if how & 4 == 0 {
                    self.poll_waiters();
                }
            }
            (2, Ok(subscription)) => self.let_go(subscription),
            (_, Ok(subscription)) => {
                self.stage.note(format!("fenced: {}", subscription.fence()));
                self.drivers[at] = Some(Arc::new(subscription));
            }
            // A reader has it.
            (_, Err(subscription)) => self.drivers[at] = Some(subscription),
        }
    }

    fn step(&mut self, bytes: [u8; 4]) {
        let [op, a, b, c] = bytes;
        self.time.fetch_add(u64::from(c), Ordering::Relaxed);
        let range = pages(u64::from(a % 12), 1 + u64::from(b % 5));
        let event = [Event::Unmap, Event::Clear, Event::ProtectionVma][usize::from(b % 3)];
        let pick = |len: usize| (len > 0).then(|| usize::from(a) % len);
        let polled = c & 1 == 0;
        let space = self.space;
        match op % 16 {
            0 | 1 => self.insert(a, b),
            2 | 3 => self.invalidate(space.invalidate(range, event), polled),
            4 => self.invalidate(space.invalidate(range, event).into_owned(), polled),
            5 => {
                let bits = u16::from_le_bytes([a, b]);
                let bits = (0..11).filter(|bit| bits >> bit & 1 == 1).map(|bit| pages(bit, 1));
                let set = RangeSet::new(bits).unwrap_or_else(|_| range.into());
                self.invalidate(space.invalidate_all(set, event), polled);
            }
            6 => match attempt(|| space.try_invalidate(range, event)) {
                Ok(Ok(guard)) => self.hold(guard),
                Ok(Err(WouldBlock)) => self.stage.note("it would block".to_owned()),
                Err(why) => self.stage.note(format!("it has panicked: {why}")),
            },
            7 => self.invalidate(space.invalidate(range, event).late(), polled),
            8 => {
                if let Some(at) = pick(self.invalidations.len()) {
                    self.poll_invalidation(at);
                }
            }
            9 | 10 => {
                if let Some(at) = pick(self.guards.len()) {
                    let guard = self.guards.swap_remove(at);
                    self.let_go(guard);
                } else if let Some(at) = pick(self.invalidations.len()) {
                    let task = self.invalidations.swap_remove(at);
                    self.let_go(task);
                }
            }
            11 => {
                let gate = {
                    let mut gates = self.stage.gates.lock().unwrap();
                    pick(gates.len()).map(|at| gates.swap_remove(at))
                };
                if let Some(gate) = gate {
                    gate.open();
                }
            }
            12 => {
                if let Some(at) = pick(self.drivers.len())
                    && let Some(subscription) = self.drivers[at].clone()
                {
                    let reader: Reader =
                        Box::pin(async move { (at, subscription.read_begin().await) });
                    let task = self.task(reader);
                    self.readers.push(task);
                    if polled {
                        self.poll_waiters();
                    }
                }
            }
            13 => {
                if let Some(at) = pick(self.sequences.len()) {
                    let (driver, sequence) = self.sequences[at];
                    if let Some(subscription) = &self.drivers[driver] {
                        let retry = subscription.read_retry(sequence);
                        self.stage.note(format!("driver {driver} has to retry: {retry}"));
                    }
                }
            }
            14 => {
                if let Some(at) = pick(self.drivers.len()) {
                    self.end_of_driver(at, b);
                }
            }
            _ => match b % 4 {
                0 | 1 => self.poll_waiters(),
                2 => {
                    let drain = self.task(space.drain());
                    self.poll(drain, |_, ()| ());
                }
                _ => {
                    if let Some(guard) = self.guards.pop() {
                        let guard = guard.into_owned();
                        self.hold(guard);
                    }
                }
            },
        }
        self.look(b & 1 == 0);
    }

    /// Notes the state as far as it can be asked for. To list what is active changes what is timed,
    /// so that is not done after each step.
    fn look(&self, active: bool) {
        let mut stats = self.space.stats();
        if !self.timed {
            stats.longest = None;
        }
        self.stage.note(format!("{} {stats:?}", self.space.sequence().get()));
        for (at, subscription) in self.drivers.iter().enumerate() {
            if let Some(subscription) = subscription {
                let (sequence, mut stats) = (subscription.sequence().get(), subscription.stats());
                if !self.timed {
                    stats.longest = Duration::ZERO;
                }
                self.stage.note(format!("driver {at} is at {sequence}, {stats:?}"));
            }
        }
        if active {
            for mut one in self.space.active() {
                if !self.timed {
                    one.age = None;
                }
                self.stage.note(format!("active: {one:?}"));
            }
        }
    }

    /// Everything goes, in some order that is the same for both.
    fn end(mut self) {
        for gate in std::mem::take(&mut *self.stage.gates.lock().unwrap()) {
            gate.open();
        }
        for at in (0..self.invalidations.len()).rev() {
            self.poll_invalidation(at);
        }
        self.look(true);
        std::mem::take(&mut self.guards).into_iter().for_each(|guard| self.let_go(guard));
        self.poll_waiters();
        let (futures, removals) =
            (std::mem::take(&mut self.invalidations), std::mem::take(&mut self.removals));
        self.let_go(futures);
        self.let_go(removals);
        let readers = std::mem::take(&mut self.readers);
        self.let_go(readers);
        self.look(true);
        for at in 0..self.drivers.len() {
            let driver = self.drivers[at].take();
            self.let_go(driver);
        }
        self.look(true);
    }
}

/// Runs a schedule; returns what could be seen.
fn run(settings: u8, acts: &[u8], steps: &[[u8; 4]], plain: bool) -> Vec<String> {
    let (time, timed) = (Arc::new(AtomicU64::new(1)), settings & 7 == 1);
    // Nobody lapses: that takes time, which no schedule has.
    let mut builder = AddressSpace::builder().patience(Duration::MAX);
    if timed {
        let time = time.clone();
        builder = builder.clock(move || Duration::from_micros(time.load(Ordering::Relaxed)));
    }
    if settings & 0x18 == 0x18 {
        builder = builder.pass_budget(usize::from(settings >> 5) % 3);
    }
    if settings & 7 == 2 {
        builder = builder.first_sequence(u64::MAX - 8);
    }
    let space = if plain { builder.plain_only() } else { builder }.build();
    let stage = Arc::new(Stage::default());
    stage.acts.lock().unwrap().extend(acts);
    let mut world = World {
        space: &space,
        stage: stage.clone(),
        time,
        timed,
        drivers: vec![],
        invalidations: vec![],
        guards: vec![],
        readers: vec![],
        removals: vec![],
        sequences: vec![],
        tasks: 0,
    };
    steps.iter().for_each(|step| world.step(*step));
    world.end();
    if let Err(why) = attempt(|| drop(space)) {
        stage.note(format!("the drop of the space has panicked: {why}"));
    }
    std::mem::take(&mut *stage.seen.lock().unwrap())
}

proptest! {
    #![proptest_config(super::cases())]
    #[test]
    fn the_quick_ways_and_the_plain_ones_look_alike(
        settings in any::<u8>(),
        acts in prop::collection::vec(any::<u8>(), 0..100),
        steps in prop::collection::vec(any::<[u8; 4]>(), 1..120),
    ) {
        let quick = run(settings, &acts, &steps, false);
        let plain = run(settings, &acts, &steps, true);
        // The first difference alone: the rest is what became of it.
        let same = quick.iter().zip(&plain).take_while(|(quick, plain)| quick == plain).count();
        prop_assert_eq!(
            quick.get(same),
            plain.get(same),
            "left is quick, right is plain; behind {:?}",
            &quick[same.saturating_sub(6)..same]
        );
    }
}
