//! What is noted of one invalidation: who worked for it, and when.

use crate::oracle::Pages;
use crate::profile::Command;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A step of a device's work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    pub command: Command,
    pub submitted: Duration,
    /// How long it takes by itself, from the moment the device begins to the fence.
    pub latency: Duration,
    /// When its fence is signalled.
    pub done: Duration,
}

/// One device in one invalidation.
#[derive(Clone, Debug, Default)]
pub struct Lane {
    pub gpu: usize,
    /// When its first pass began.
    pub first_pass: Duration,
    /// The processor's time until the first step was submitted.
    pub cost: Duration,
    pub steps: Vec<Step>,
}

/// One invalidation, from outside of the library.
pub struct Record {
    /// By which its random numbers are drawn: the same in each mode.
    pub number: u64,
    /// Where in the recording it is: the time, without what invalidations took.
    pub at: Duration,
    lanes: Mutex<Vec<Lane>>,
    /// What each GPU began for it, and for which pages.
    begun: Mutex<BTreeMap<usize, Vec<(u64, Pages)>>>,
}

thread_local! {
    /// The invalidation that this thread waits for: first passes run on it.
    static CURRENT: RefCell<Option<Arc<Record>>> = const { RefCell::new(None) };
}

impl Record {
    pub fn new(number: u64, at: Duration) -> Arc<Self> {
        Arc::new(Self { number, at, lanes: Mutex::default(), begun: Mutex::default() })
    }

    /// The one whose first passes run here.
    pub fn current() -> Option<Arc<Self>> {
        CURRENT.with_borrow(Clone::clone)
    }

    /// Runs `wait`, which waits for this invalidation.
    pub fn during<T>(self: &Arc<Self>, wait: impl FnOnce() -> T) -> T {
        let before = CURRENT.replace(Some(self.clone()));
        let output = wait();
        CURRENT.set(before);
        output
    }

    /// A device begins to work for it; returns the number of its lane.
    pub fn lane(&self, gpu: usize, first_pass: Duration, cost: Duration) -> usize {
        let mut lanes = self.lanes.lock().unwrap();
        lanes.push(Lane { gpu, first_pass, cost, steps: Vec::new() });
        lanes.len() - 1
    }

    /// A GPU has begun its work of number `serial` for `pages` of it.
    pub fn begins(&self, gpu: usize, serial: u64, pages: &Pages) {
        self.begun.lock().unwrap().entry(gpu).or_default().push((serial, pages.clone()));
    }

    /// The number of the last work for all of `pages` that a GPU has begun for it; 0 for none.
    pub fn begun(&self, gpu: usize, pages: &Pages) -> u64 {
        let begun = self.begun.lock().unwrap();
        let of_gpu = begun.get(&gpu).map_or(&[][..], Vec::as_slice);
        of_gpu.iter().rev().find(|(_, of)| of.cover(pages)).map_or(0, |(serial, _)| *serial)
    }

    pub fn step(&self, lane: usize, step: Step) -> usize {
        let steps = &mut self.lanes.lock().unwrap()[lane].steps;
        steps.push(step);
        steps.len() - 1
    }

    /// When a fence was signalled. In real time that is later than planned, and the step has taken
    /// as long.
    pub fn done(&self, lane: usize, step: usize, at: Duration) {
        let step = &mut self.lanes.lock().unwrap()[lane].steps[step];
        if at > step.done {
            step.latency += at - step.done;
            step.done = at;
        }
    }

    /// When something of another invalidation was over, for which this one waited.
    pub fn joined(&self, lane: usize, step: usize, at: Duration) {
        self.lanes.lock().unwrap()[lane].steps[step].done = at;
    }

    /// In the order of their first passes.
    pub fn lanes(&self) -> Vec<Lane> {
        self.lanes.lock().unwrap().clone()
    }
}
