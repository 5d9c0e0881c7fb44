//! What the tests share: a driver that does as it is told, and futures polled by hand.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test binary uses a part of it")]

pub mod formats;
#[cfg(not(any(loom, shuttle)))]
pub mod processor;
// Miri wants no thread to outlive the main one.
#[cfg(not(miri))]
mod watchdog;

use futures::task::{ArcWake, waker};
use shootdown::{
    AddressRange, AddressSpace, IntervalNotifier, Invalidation, InvalidationInfo, PassFuture,
    Sequence, Subscription, WouldBlock,
};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

pub const PAGE: u64 = 4096;

/// In the contract's binary, a test that calls this and hangs is named.
pub fn watched() {
    #[cfg(not(miri))]
    if env!("CARGO_CRATE_NAME") == "contract" {
        watchdog::watch();
    }
}

/// `pages` pages from page `first` on.
pub fn pages(first: u64, pages: u64) -> AddressRange {
    watched();
    AddressRange::new(first * PAGE, pages * PAGE).unwrap()
}

/// A fence that a device signals: pending until it is opened.
#[derive(Clone, Default)]
pub struct Gate(Arc<Mutex<(bool, Vec<Waker>)>>);

impl Gate {
    pub fn open(&self) {
        let wakers = {
            let mut gate = self.0.lock().unwrap();
            gate.0 = true;
            std::mem::take(&mut gate.1)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    pub fn is_open(&self) -> bool {
        self.0.lock().unwrap().0
    }

    /// Whether somebody polled it and waits.
    pub fn is_waited_for(&self) -> bool {
        !self.0.lock().unwrap().1.is_empty()
    }

    /// Wakes whoever waits without opening.
    pub fn nudge(&self) {
        let wakers = std::mem::take(&mut self.0.lock().unwrap().1);
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Future for Gate {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut gate = self.0.lock().unwrap();
        if gate.0 {
            return Poll::Ready(());
        }
        if !gate.1.iter().any(|known| known.will_wake(cx.waker())) {
            gate.1.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// Pending `n` times, waking itself each time.
pub struct Yields(pub u32);

impl Future for Yields {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.0 == 0 {
            return Poll::Ready(());
        }
        self.0 -= 1;
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// What a [`Device`] does in its next first pass.
pub enum Act {
    /// Sets the sequence and is done.
    Finish,
    /// Sets the sequence and returns a pass.
    Pass(PassFuture),
    /// Leaves the device alone (S4).
    Ignore,
    Refuse,
    Panic,
    /// Runs code in the first pass, then sets the sequence and is done.
    Run(Box<dyn FnOnce(&Invalidation<'_>) + Send>),
}

impl Act {
    pub fn pass(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self::Pass(PassFuture::new(future))
    }
}

/// What the devices of one test did, in order.
pub type Log = Arc<Mutex<Vec<(&'static str, InvalidationInfo)>>>;

/// A driver that does what its test tells it to.
pub struct Device {
    pub name: &'static str,
    script: Mutex<VecDeque<Act>>,
    log: Log,
    calls: AtomicUsize,
    dropped: Arc<AtomicUsize>,
}

impl Device {
    pub fn new(name: &'static str, log: &Log) -> Self {
        Self {
            name,
            script: Mutex::default(),
            log: log.clone(),
            calls: AtomicUsize::new(0),
            dropped: Arc::default(),
        }
    }

    /// Does this in the next first pass that has nothing to do yet; without it a first pass
    /// finishes at once.
    pub fn then(self, act: Act) -> Self {
        self.next(act);
        self
    }

    pub fn next(&self, act: Act) {
        self.script.lock().unwrap().push_back(act);
    }

    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// Counts the drops of this device.
    pub fn drops(&self) -> Arc<AtomicUsize> {
        self.dropped.clone()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

impl IntervalNotifier for Device {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.log.lock().unwrap().push((self.name, invalidation.info()));
        let act = self.script.lock().unwrap().pop_front().unwrap_or(Act::Finish);
        match act {
            Act::Finish => invalidation.set_seq(),
            Act::Pass(pass) => {
                invalidation.set_seq();
                return Ok(Some(pass));
            }
            Act::Ignore => {}
            Act::Refuse => return Err(WouldBlock),
            Act::Panic => panic!("{} fails in its first pass", self.name),
            Act::Run(code) => {
                code(invalidation);
                invalidation.set_seq();
            }
        }
        Ok(None)
    }

    fn name(&self) -> Cow<'static, str> {
        Cow::Borrowed(self.name)
    }
}

/// A future that a test polls by hand, and whether it was woken since.
pub struct Task<F: Future> {
    future: Option<Pin<Box<F>>>,
    flag: Arc<Flag>,
}

struct Flag(AtomicBool);

impl ArcWake for Flag {
    fn wake_by_ref(this: &Arc<Self>) {
        this.0.store(true, Ordering::SeqCst);
    }
}

impl<F: Future> Task<F> {
    pub fn new(future: F) -> Self {
        Self { future: Some(Box::pin(future)), flag: Arc::new(Flag(AtomicBool::new(true))) }
    }

    pub fn poll(&mut self) -> Poll<F::Output> {
        self.flag.0.store(false, Ordering::SeqCst);
        let future = self.future.as_mut().expect("polled after it resolved");
        let polled = future.as_mut().poll(&mut Context::from_waker(&waker(self.flag.clone())));
        if polled.is_ready() {
            self.future = None;
        }
        polled
    }

    /// Polls as an executor would: as long as it is woken.
    pub fn run(&mut self) -> Poll<F::Output> {
        while self.future.is_some() && self.flag.0.load(Ordering::SeqCst) {
            if let Poll::Ready(output) = self.poll() {
                return Poll::Ready(output);
            }
        }
        Poll::Pending
    }

    /// Runs it and expects it to finish.
    #[track_caller]
    pub fn finish(&mut self) -> F::Output {
        match self.run() {
            Poll::Ready(output) => output,
            Poll::Pending => panic!("it still waits, and nothing has woken it"),
        }
    }

    #[track_caller]
    pub fn expect_pending(&mut self) {
        assert!(self.run().is_pending(), "it should have waited");
    }

    /// Polls it unless it is done, woken or not; drops what it resolves to.
    pub fn poll_again(&mut self) {
        if self.future.is_some() {
            let _ = self.poll();
        }
    }

    pub fn is_done(&self) -> bool {
        self.future.is_none()
    }

    pub fn is_woken(&self) -> bool {
        self.flag.0.load(Ordering::SeqCst)
    }

    /// Leaks the future, as `mem::forget` does.
    pub fn forget(mut self) {
        std::mem::forget(self.future.take());
    }
}

/// Runs a future to its end on this thread; it must not need anybody else.
#[track_caller]
pub fn now<F: Future>(future: F) -> F::Output {
    Task::new(future).finish()
}

/// A space with one device on page 0.
pub fn one_device() -> (AddressSpace, Subscription<Device>, Log) {
    let (space, log) = (AddressSpace::new(), Log::default());
    let device = space.insert(pages(0, 1), Device::new("device", &log)).unwrap();
    (space, device, log)
}

/// The same with a clock that the test moves, in microseconds.
pub fn with_clock(
    patience: Option<Duration>,
) -> (AddressSpace, Subscription<Device>, Arc<AtomicU64>) {
    let micros = Arc::new(AtomicU64::new(0));
    let clock = micros.clone();
    let mut builder =
        AddressSpace::builder().clock(move || Duration::from_micros(clock.load(Ordering::SeqCst)));
    if let Some(patience) = patience {
        builder = builder.patience(patience);
    }
    let space = builder.build();
    let device = space.insert(pages(0, 1), Device::new("device", &Log::default())).unwrap();
    (space, device, micros)
}

/// The names of the devices that were called, in order.
pub fn called(log: &Log) -> Vec<&'static str> {
    log.lock().unwrap().drain(..).map(|(name, _)| name).collect()
}

pub fn numbers<const N: usize>(sequences: [Sequence; N]) -> [u64; N] {
    sequences.map(Sequence::get)
}
