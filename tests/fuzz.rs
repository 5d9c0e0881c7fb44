//! Sequences of operations, written as bytes, on the library and on the contract's rules side by
//! side.
//!
//! With the feature `test-util` each case runs on a space that takes the library's quick ways, and
//! on one that does not; `both_ways` does that with schedules for which there is no model.
//! `SHOOTDOWN_CASES=100000 cargo test --release --features test-util --test fuzz` is the long form.
#![cfg(not(any(loom, shuttle)))]
#![allow(missing_docs)]

#[cfg(feature = "test-util")]
#[path = "fuzz/both_ways.rs"]
mod both_ways;
mod support;

use proptest::prelude::*;
use shootdown::{
    AddressRange, AddressSpace, Event, Invalidate, InvalidationGuard, RangeSet, Subscription,
    WouldBlock,
};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use support::{Act, Device, Gate, Log, Task, pages};

/// The state of one notifier by the rules.
struct Notifier {
    /// `None` once it was removed.
    subscription: Option<Arc<Subscription<Device>>>,
    range: AddressRange,
    own: u64,
    covered_by: Vec<usize>,
}

/// The state of one invalidation by the rules.
struct Running<'s> {
    name: usize,
    set: RangeSet,
    /// The fences of the devices that have to complete, each with its notifier.
    gates: Vec<(usize, Gate)>,
    /// Its caller has dropped it, so it ends by itself.
    abandoned: bool,
    future: Option<Task<Pin<Box<Invalidate<'s>>>>>,
    guard: Option<InvalidationGuard<'s>>,
}

impl Running<'_> {
    fn open(&self) {
        self.gates.iter().for_each(|(_, gate)| gate.open());
    }

    fn is_done(&self) -> bool {
        self.gates.iter().all(|(_, gate)| gate.is_open())
    }
}

struct Reader {
    notifier: usize,
    /// The own sequence on entry.
    sequence: u64,
    /// There was a moment without a covering invalidation.
    moment: bool,
    task: Task<Pin<Box<dyn Future<Output = u64>>>>,
}

struct Machine<'s> {
    space: &'s AddressSpace,
    log: Log,
    sequence: u64,
    notifiers: Vec<Notifier>,
    running: Vec<Running<'s>>,
    readers: Vec<Reader>,
    names: usize,
    /// All that could be seen, step by step.
    seen: Vec<String>,
}

/// The names of devices, so that the order of their calls can be seen.
const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// A space; `plain`: without the library's quick ways.
fn space(plain: bool) -> AddressSpace {
    let builder = AddressSpace::builder();
    #[cfg(feature = "test-util")]
    let builder = if plain { builder.plain_only() } else { builder };
    #[cfg(not(feature = "test-util"))]
    assert!(!plain);
    builder.build()
}

impl<'s> Machine<'s> {
    fn new(space: &'s AddressSpace) -> Self {
        Self {
            space,
            log: Log::default(),
            sequence: 2,
            notifiers: vec![],
            running: vec![],
            readers: vec![],
            names: 0,
            seen: vec![],
        }
    }

    /// Notes all that can be seen, except times.
    fn look(&mut self) {
        let mut active = self.space.active();
        active.iter_mut().for_each(|one| one.age = None);
        let mut stats = self.space.stats();
        stats.longest = None;
        let calls = std::mem::take(&mut *self.log.lock().unwrap());
        let woken: Vec<_> = self.readers.iter().map(|reader| reader.task.is_woken()).collect();
        self.seen
            .push(format!("{:?} {active:?} {stats:?} {calls:?} {woken:?}", self.space.sequence()));
    }

    fn insert(&mut self, range: AddressRange) {
        let subscription = self
            .space
            .insert(range, Device::new(NAMES[self.notifiers.len() % NAMES.len()], &self.log))
            .unwrap();
        let covering = self
            .running
            .iter()
            .filter(|running| running.set.iter().any(|covered| covered.overlaps(range)));
        let covered_by: Vec<usize> = covering.map(|running| running.name).collect();
        let own = if covered_by.is_empty() {
            self.sequence - if self.sequence.is_multiple_of(2) { 1 } else { 2 }
        } else {
            self.sequence |= 1;
            self.sequence
        };
        self.notifiers.push(Notifier {
            subscription: Some(Arc::new(subscription)),
            range,
            own,
            covered_by,
        });
    }

    /// Starts an invalidation; bit n of `pending` says whether the n-th device that it hits has
    /// something to wait for.
    fn start(&mut self, set: RangeSet, pending: u8, blockable: bool) -> Result<(), TestCaseError> {
        let name = self.names;
        self.names += 1;
        let mut hits: Vec<usize> = (0..self.notifiers.len())
            .filter(|at| {
                self.notifiers[*at].subscription.is_some()
                    && set.iter().any(|range| self.notifiers[*at].range.overlaps(*range))
            })
            .collect();
        hits.sort_by_key(|at| self.notifiers[*at].range.start());
        let separate = |at: &usize| {
            self.notifiers[*at].own == self.sequence && self.notifiers[*at].covered_by.is_empty()
        };
        if !hits.is_empty() {
            if self.sequence % 2 == 1 && hits.iter().any(separate) {
                self.sequence += 2;
            }
            self.sequence |= 1;
        }
        let mut gates = Vec::new();
        for (bit, at) in hits.iter().enumerate() {
            let notifier = &mut self.notifiers[*at];
            notifier.covered_by.push(name);
            notifier.own = self.sequence;
            if pending >> (bit % 8) & 1 == 1 {
                let gate = Gate::default();
                notifier.subscription.as_ref().unwrap().next(Act::pass(gate.clone()));
                gates.push((*at, gate));
            } else {
                notifier.subscription.as_ref().unwrap().next(Act::Finish);
            }
        }
        let mut running =
            Running { name, set: set.clone(), gates, abandoned: false, future: None, guard: None };
        if blockable {
            let future = if let [range] = set[..] {
                self.space.invalidate(range, Event::Clear)
            } else {
                self.space.invalidate_all(set, Event::Clear)
            };
            // Both kinds of handle.
            let owned = name.is_multiple_of(3);
            let future = if owned { future.into_owned() } else { future };
            running.future = Some(Task::new(Box::pin(future)));
        } else {
            match self.space.try_invalidate(set.hull(), Event::Clear) {
                Ok(guard) => running.guard = Some(guard),
                Err(WouldBlock) => running.abandoned = true,
            }
            prop_assert_eq!(running.abandoned, !running.gates.is_empty(), "B3");
        }
        self.running.push(running);
        Ok(())
    }

    /// Ends an invalidation by the rules (S3, R1).
    fn ended(&mut self, name: usize) {
        for (at, notifier) in self.notifiers.iter_mut().enumerate() {
            let before = notifier.covered_by.len();
            notifier.covered_by.retain(|covering| *covering != name);
            if before == 1 && notifier.covered_by.is_empty() {
                self.readers
                    .iter_mut()
                    .filter(|reader| reader.notifier == at)
                    .for_each(|reader| reader.moment = true);
            }
        }
        self.running.retain(|running| running.name != name);
        if self.running.is_empty() && self.sequence % 2 == 1 {
            self.sequence += 1;
        }
    }

    /// Polls all tasks as far as they go, and compares.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        for running in &mut self.running {
            if let Some(future) = &mut running.future
                && let Poll::Ready(guard) = future.run()
            {
                running.future = None;
                running.guard = Some(guard);
                prop_assert!(running.is_done(), "a guard although a device is at work");
            }
        }
        let _ = Task::new(self.space.drain()).run();
        let over = |running: &Running<'_>| running.abandoned && running.is_done();
        for name in self
            .running
            .iter()
            .filter(|running| over(running))
            .map(|running| running.name)
            .collect::<Vec<_>>()
        {
            self.ended(name);
        }
        for running in self.running.iter().filter(|running| running.is_done()) {
            prop_assert!(running.guard.is_some(), "all devices are done and there is no guard");
        }
        let mut left = Vec::new();
        for mut reader in std::mem::take(&mut self.readers) {
            match reader.task.run() {
                Poll::Ready(sequence) => {
                    prop_assert!(reader.moment, "R1: before its moment");
                    prop_assert_eq!(sequence, reader.sequence, "R1: the sequence on entry");
                }
                Poll::Pending => {
                    prop_assert!(!reader.moment, "R1: it waits on after its moment");
                    left.push(reader);
                }
            }
        }
        self.readers = left;
        prop_assert_eq!(self.space.sequence().get(), self.sequence);
        prop_assert_eq!(self.space.active().len(), self.running.len());
        for notifier in &self.notifiers {
            if let Some(subscription) = &notifier.subscription {
                prop_assert_eq!(subscription.sequence().get(), notifier.own);
            }
        }
        Ok(())
    }

    fn step(&mut self, bytes: [u8; 4]) -> Result<(), TestCaseError> {
        let [op, a, b, c] = bytes;
        let range = pages(u64::from(a % 12), 1 + u64::from(b % 5));
        let pick = |len: usize| (len > 0).then(|| usize::from(a) % len);
        match op % 11 {
            0 | 1 => self.insert(range),
            // A fence (L5): as if the notifier was removed, and its device done.
            10 => {
                let live: Vec<usize> = (0..self.notifiers.len())
                    .filter(|at| self.notifiers[*at].subscription.is_some())
                    .collect();
                if let Some(at) = pick(live.len()) {
                    let subscription = self.notifiers[live[at]].subscription.take().unwrap();
                    let mut pending = 0;
                    for running in &mut self.running {
                        pending += running
                            .gates
                            .iter()
                            .filter(|(of, gate)| *of == live[at] && !gate.is_open())
                            .count();
                        running.gates.retain(|(of, _)| *of != live[at]);
                    }
                    prop_assert_eq!(subscription.fence(), pending);
                }
            }
            2 => self.start(range.into(), c, true)?,
            // Every page whose bit is set, or all addresses.
            3 => {
                let bits = u16::from_le_bytes([a, b]) & 0x7ff;
                let bits = (0..11).filter(|bit| bits >> bit & 1 == 1).map(|bit| pages(bit, 1));
                self.start(
                    RangeSet::new(bits).unwrap_or_else(|_| AddressRange::ALL.into()),
                    c,
                    true,
                )?;
            }
            4 => self.start(range.into(), if c < 128 { 0 } else { c }, false)?,
            5 => {
                if let Some(at) = pick(self.running.len()) {
                    self.running[at].open();
                }
            }
            6 => {
                // The end, or the drop of a future whose passes are pending.
                if let Some(at) = pick(self.running.len()) {
                    let running = &mut self.running[at];
                    let name = running.name;
                    if running.guard.take().is_some() {
                        self.ended(name);
                    } else if running.future.take().is_some() {
                        running.abandoned = true;
                    }
                }
            }
            7 | 8 => {
                let live: Vec<usize> = (0..self.notifiers.len())
                    .filter(|at| self.notifiers[*at].subscription.is_some())
                    .collect();
                if let Some(at) = pick(live.len()) {
                    let notifier = live[at];
                    let of = &self.notifiers[notifier];
                    let subscription = of.subscription.clone().unwrap();
                    let mut task: Task<Pin<Box<dyn Future<Output = u64>>>> =
                        Task::new(Box::pin(async move { subscription.read_begin().await.get() }));
                    let moment = of.covered_by.is_empty();
                    let sequence = of.own;
                    // On entry: its first poll.
                    match task.poll() {
                        Poll::Ready(now) => {
                            prop_assert!(moment && now == sequence, "R1: it should have waited")
                        }
                        Poll::Pending => {
                            self.readers.push(Reader { notifier, sequence, moment, task })
                        }
                    }
                }
            }
            _ => {
                let removable = |at: &usize| {
                    let subscription = self.notifiers[*at].subscription.as_ref();
                    subscription.is_some_and(|subscription| Arc::strong_count(subscription) == 1)
                };
                let live: Vec<usize> = (0..self.notifiers.len()).filter(removable).collect();
                if let Some(at) = pick(live.len()) {
                    let subscription = self.notifiers[live[at]]
                        .subscription
                        .take()
                        .and_then(Arc::into_inner)
                        .unwrap();
                    let calls = subscription.calls();
                    let mut remove = Task::new(subscription.remove());
                    if let Poll::Ready(device) = remove.run() {
                        prop_assert_eq!(device.calls(), calls);
                    }
                }
            }
        }
        self.settle()
    }
}

/// Runs a case. Returns all that could be seen.
fn run(bytes: &[u8], plain: bool) -> Result<Vec<String>, TestCaseError> {
    let space = space(plain);
    let mut machine = Machine::new(&space);
    for step in bytes.as_chunks::<4>().0 {
        machine.step(*step)?;
        machine.look();
    }
    // Everything comes to an end.
    machine.running.iter().for_each(|running| running.open());
    machine.settle()?;
    while let Some(running) = machine.running.first_mut() {
        let name = running.name;
        prop_assert!(running.guard.take().is_some());
        machine.ended(name);
        machine.settle()?;
    }
    prop_assert!(machine.readers.is_empty(), "a reader waits although nothing is active");
    prop_assert_eq!(machine.space.stats().lapses, 0);
    machine.look();
    Ok(machine.seen)
}

fn cases() -> ProptestConfig {
    let cases =
        std::env::var("SHOOTDOWN_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(400);
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(cases())]
    #[test]
    fn bytes_against_the_rules(bytes in prop::collection::vec(any::<u8>(), 4..600)) {
        let quick = run(&bytes, false)?;
        // The plain forms are the specification of the quick ones.
        if cfg!(feature = "test-util") {
            prop_assert_eq!(quick, run(&bytes, true)?);
        }
    }
}
