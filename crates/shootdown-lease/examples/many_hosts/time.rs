//! Virtual time, and processors that do one thing at a time in it.

use futures::channel::oneshot;
use futures::future::BoxFuture;
use futures::{FutureExt, executor::LocalPool};
use shootdown_lease::Time;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// It has taken so long that it may never end: the owner does not keep up, or too much is lost.
#[derive(Debug)]
pub struct GaveUp;

/// A clock that moves when nothing is left to do at the present moment.
#[derive(Clone, Default)]
pub struct Virtual {
    now: Arc<AtomicU64>,
    sleepers: Arc<Mutex<Sleepers>>,
}

#[derive(Default)]
struct Sleepers {
    next: u64,
    /// By time, and those of one moment in the order in which they began.
    waiting: BTreeMap<(u64, u64), oneshot::Sender<()>>,
}

impl Virtual {
    pub fn now(&self) -> Time {
        Time::from_nanos(self.now.load(Ordering::Relaxed))
    }

    pub fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        let (sender, woken) = oneshot::channel();
        let at = (self.now() + time).as_nanos();
        let mut sleepers = self.sleepers.lock().unwrap();
        sleepers.next += 1;
        let key = (at, sleepers.next);
        sleepers.waiting.insert(key, sender);
        woken.map(drop).boxed()
    }

    /// Runs until `done`; not longer than `most`, and not when nothing will ever happen.
    pub fn run_until(
        &self,
        pool: &mut LocalPool,
        most: Duration,
        mut done: impl FnMut() -> bool,
    ) -> Result<(), GaveUp> {
        let last = self.now() + most;
        loop {
            pool.run_until_stalled();
            if done() {
                return Ok(());
            }
            let next = self.sleepers.lock().unwrap().waiting.pop_first();
            let Some(((at, _), sleeper)) = next.filter(|((at, _), _)| *at <= last.as_nanos())
            else {
                return Err(GaveUp);
            };
            self.now.store(at, Ordering::Relaxed);
            let _ = sleeper.send(());
        }
    }
}

/// What a host's processor is doing: messages wait for each other.
#[derive(Clone)]
pub struct Processor {
    time: Virtual,
    free: Arc<AtomicU64>,
    busy: Arc<AtomicU64>,
}

impl Processor {
    pub fn new(time: &Virtual) -> Self {
        Self { time: time.clone(), free: Arc::default(), busy: Arc::default() }
    }

    pub fn work(&self, cost: Duration) -> BoxFuture<'static, ()> {
        let (now, cost) = (self.time.now().as_nanos(), cost.as_nanos() as u64);
        let end = now.max(self.free.load(Ordering::Relaxed)) + cost;
        self.free.store(end, Ordering::Relaxed);
        self.busy.fetch_add(cost, Ordering::Relaxed);
        self.time.sleep(Duration::from_nanos(end - now))
    }

    /// How long it has worked since it was asked last.
    pub fn take_busy(&self) -> Duration {
        Duration::from_nanos(self.busy.swap(0, Ordering::Relaxed))
    }
}
