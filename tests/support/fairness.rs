//! Runs invalidations whose pass takes a millisecond beside readers, on several executors.
//!
//! Shared by `tests/fairness.rs` and the section "fairness" of `cargo bench --bench table`.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each of the two uses a part of it")]

use crate::support::processor::{of_process, of_thread};
use crate::support::{Gate, pages};
use futures::channel::oneshot;
use futures::executor::{ThreadPool, block_on};
use futures::future::{maybe_done, poll_immediate};
use futures::stream::{FuturesUnordered, StreamExt};
use shootdown::{
    AddressSpace, Event, IntervalNotifier, Invalidation, PassFuture, Subscription, Timeline,
    WouldBlock,
};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the pass of each invalidation takes.
pub const PASS: Duration = Duration::from_millis(1);
/// Between the end of an invalidation and the start of the next one.
const GAP: Duration = Duration::from_micros(500);
/// Between two reads of a reader that pauses.
const PAUSE: Duration = Duration::from_micros(200);

/// Completes each request after its time, as hardware does. Its thread ends with it.
pub struct Timer(Sender<(Instant, oneshot::Sender<()>)>);

impl Timer {
    fn start() -> Arc<Self> {
        let (requests, received) = channel();
        named("timer", move || serve(&received));
        Arc::new(Self(requests))
    }

    /// Counts from the call, not from the first poll.
    fn after(&self, wait: Duration) -> impl Future<Output = ()> + Send + use<> {
        let (done, wait_for) = oneshot::channel();
        self.0
            .send((Instant::now() + wait, done))
            .expect("the timer runs as long as it has a handle");
        async move { wait_for.await.expect("the timer answers every request") }
    }
}

fn serve(requests: &Receiver<(Instant, oneshot::Sender<()>)>) {
    let mut due = BTreeMap::new();
    for serial in 0u64.. {
        while let Some(first) = due.first_entry()
            && *first.key() <= (Instant::now(), u64::MAX)
        {
            // Whoever asked may be gone.
            let _: Result<(), ()> = oneshot::Sender::send(first.remove(), ());
        }
        let request = match due.first_key_value() {
            Some(((at, _), _)) => {
                requests.recv_timeout(at.saturating_duration_since(Instant::now()))
            }
            None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match request {
            Ok((at, done)) => _ = due.insert((at, serial), done),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Starts a thread that a profile tells from the others.
fn named(name: &str, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    std::thread::Builder::new().name(name.into()).spawn(work).expect("a thread starts")
}

struct Timed(Arc<Timer>);

impl IntervalNotifier for Timed {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(Some(PassFuture::new(self.0.after(PASS))))
    }
}

/// Where readers and the invalidating task run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Each in `block_on` on a thread of its own; the readers pause between two reads.
    Threads,
    /// As tasks of `futures::executor::ThreadPool`. The readers pause, too: it polls a task that
    /// wakes itself again at once, so two of them that only yield would leave it to nobody.
    Pool,
    /// As tasks of one executor. The readers never pause: they yield between two reads.
    TokioOneThread,
    Tokio,
    Smol,
}

/// What came out of some invalidations.
#[derive(Default)]
pub struct Run {
    pub lapses: u64,
    /// What each invalidation took, up to the guard.
    pub took: Vec<Duration>,
}

impl Run {
    pub fn invalidations(&self) -> u64 {
        self.took.len() as u64
    }

    pub fn add(&mut self, other: Self) {
        self.lapses += other.lapses;
        self.took.extend(other.took);
    }
}

/// Invalidates beside so many readers that read all the time.
pub fn beside_readers(host: Host, readers: usize, invalidations: usize) -> Run {
    let (space, timer) = (AddressSpace::new(), Timer::start());
    let device = Arc::new(space.insert(pages(0, 1), Timed(timer.clone())).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let work = {
        let (space, stop, timer) = (space.clone(), stop.clone(), timer.clone());
        async move {
            let mut took = Vec::with_capacity(invalidations);
            for _ in 0..invalidations {
                timer.after(GAP).await;
                let began = Instant::now();
                let guard = space.invalidate(pages(0, 1), Event::Unmap).await;
                took.push(began.elapsed());
                drop(guard);
            }
            stop.store(true, Ordering::Release);
            took
        }
    };
    let reads = || {
        let (device, stop, timer) = (device.clone(), stop.clone(), timer.clone());
        async move {
            while !stop.load(Ordering::Acquire) {
                device.read_begin().await;
                match host {
                    Host::Threads | Host::Pool => timer.after(PAUSE).await,
                    _ => yield_now().await,
                }
            }
        }
    };
    let took = match host {
        Host::Threads => {
            let threads: Vec<_> =
                (0..readers).map(|_| ReadingThread::start(device.clone())).collect();
            let took = block_on(work);
            threads.into_iter().for_each(ReadingThread::stop);
            took
        }
        Host::Pool => {
            let pool = ThreadPool::builder().pool_size(2).create().unwrap();
            (0..readers).for_each(|_| pool.spawn_ok(reads()));
            let (send, receive) = oneshot::channel();
            pool.spawn_ok(async move { send.send(work.await).expect("somebody waits for it") });
            block_on(receive).unwrap()
        }
        Host::TokioOneThread | Host::Tokio => {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            let tokio = match host {
                Host::Tokio => builder.worker_threads(2).build().unwrap(),
                _ => tokio::runtime::Builder::new_current_thread().build().unwrap(),
            };
            tokio.block_on(async {
                (0..readers).for_each(|_| drop(tokio::spawn(reads())));
                tokio::spawn(work).await.unwrap()
            })
        }
        Host::Smol => {
            let executor = smol::Executor::new();
            let (end, ends) = oneshot::channel::<()>();
            std::thread::scope(|scope| {
                let second = scope.spawn(|| smol::block_on(executor.run(ends)));
                (0..readers).for_each(|_| executor.spawn(reads()).detach());
                let took = smol::block_on(executor.run(executor.spawn(work)));
                drop(end);
                let _ = second.join();
                took
            })
        }
    };
    Run { lapses: space.stats().lapses, took }
}

/// Gives every other task of the executor a turn.
async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

struct ReadingThread {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl ReadingThread {
    fn start(device: Arc<Subscription<Timed>>) -> Self {
        let (stop, stopped) = channel();
        let thread = named("reader", move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(PAUSE) {
                block_on(device.read_begin());
            }
        });
        Self { stop, thread }
    }

    fn stop(self) {
        drop(self.stop);
        self.thread.join().unwrap();
    }
}

/// Who waits for every invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiters {
    /// Readers, each in `block_on` on a thread of its own.
    Threads(usize),
    /// Readers that are tasks of one other thread.
    Tasks(usize),
    /// Threads that are woken once for each invalidation, when it ends, and have nothing to do with
    /// the library: what waking so many threads takes in any case.
    Woken(usize),
}

/// What came out of invalidations that others wait for.
#[derive(Default)]
pub struct Waited {
    /// Processor time of the process, all threads; `None` where it cannot be asked for.
    pub processor: Option<Duration>,
    /// What the threads of the waiters have of it; the rest is the invalidating thread and the
    /// timer.
    pub of_waiters: Duration,
    /// The waits of readers that could not be answered at once.
    pub waits: u64,
    /// The polls of each of them, all readers together.
    pub polls: Vec<u64>,
    pub lapses: u64,
}

/// Invalidates while every waiter waits for each invalidation, one after the other.
///
/// Two ranges are invalidated in turns, so that one is always under invalidation: a reader whose
/// wait for one has ended begins to wait for the other at once. So it begins to wait once for each
/// invalidation, and is parked by the library and nothing else; it has no loop, timer or signal of
/// its own whose cost would be counted. An invalidation is started when the one before it in its
/// range has ended, and halfway through the one of the other range: one ends every half of a
/// [`PASS`].
///
/// What is counted is the processor time of the whole process from when all waiters wait until the
/// last of the invalidations ends: the invalidating thread, the timer thread that completes the
/// passes, and the waiters. The first two do the same whoever waits, none included.
pub fn waited_for(waiters: Waiters, invalidations: usize) -> Waited {
    let (space, timer) = (AddressSpace::new(), Timer::start());
    let ranges = [pages(0, 1), pages(10, 1)];
    let devices = Arc::new(ranges.map(|range| space.insert(range, Timed(timer.clone())).unwrap()));
    // It says how many invalidations have ended.
    let (stop, bell) = (Arc::new(AtomicBool::new(false)), Timeline::new());
    let used = Arc::new(AtomicU64::new(0));
    let waiter = |work: Box<dyn FnOnce() + Send>| {
        let used = used.clone();
        named("waiter", move || {
            let began = of_thread();
            work();
            used.fetch_add((of_thread() - began).as_nanos() as u64, Ordering::AcqRel);
        })
    };
    let (polls, began) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicU64::new(0)));
    let reads = || {
        let (devices, stop, polls) = (devices.clone(), stop.clone(), polls.clone());
        async move {
            let mut mine = Vec::with_capacity(invalidations + 2);
            for device in devices.iter().cycle() {
                let (mut read, mut polls) = (pin!(device.read_begin()), 0);
                poll_fn(|cx| {
                    polls += 1;
                    read.as_mut().poll(cx)
                })
                .await;
                mine.push(polls);
                if stop.load(Ordering::Acquire) {
                    break;
                }
            }
            polls.lock().unwrap().extend(mine);
        }
    };
    let (mut threads, mut first) = (Vec::new(), 0);
    let result = block_on(async {
        let mut current = space.invalidate(ranges[0], Event::Unmap).await;
        match waiters {
            Waiters::Threads(readers) => {
                first = readers as u64;
                threads.extend(
                    (0..readers)
                        .map(|_| reads())
                        .map(|reads| waiter(Box::new(move || block_on(reads)))),
                );
            }
            Waiters::Tasks(readers) => {
                first = readers as u64;
                let reads: FuturesUnordered<_> = (0..readers).map(|_| reads()).collect();
                threads.push(waiter(Box::new(move || block_on(reads.collect::<()>()))));
            }
            Waiters::Woken(woken) => threads.extend((0..woken).map(|_| {
                let (bell, stop, began) = (bell.clone(), stop.clone(), began.clone());
                waiter(Box::new(move || {
                    began.fetch_add(1, Ordering::AcqRel);
                    for end in 1.. {
                        block_on(bell.reached(end));
                        if stop.load(Ordering::Acquire) {
                            break;
                        }
                    }
                }))
            })),
        }
        while space.stats().waits < first
            || (first == 0 && began.load(Ordering::Acquire) < threads.len() as u64)
        {
            std::thread::yield_now();
        }
        // Polled once, its passes belong to the space. It is done already if the thread lost its
        // turn.
        let start = |range| Box::pin(maybe_done(space.invalidate(range, Event::Unmap)));
        let mut next = start(ranges[1]);
        poll_immediate(&mut next).await;
        timer.after(PASS / 2).await;
        let (waits, processor) = (space.stats().waits, of_process());
        for turn in 0..invalidations {
            drop(current);
            if waiters == Waiters::Woken(threads.len()) {
                bell.signal(bell.value() + 1);
            }
            let mut ends = std::mem::replace(&mut next, start(ranges[turn % 2]));
            poll_immediate(&mut next).await;
            ends.as_mut().await;
            current = ends.as_mut().take_output().expect("it has just ended");
        }
        let processor = of_process().zip(processor).map(|(after, before)| after - before);
        let result = Waited {
            processor,
            of_waiters: Duration::ZERO,
            waits: space.stats().waits - waits,
            polls: Vec::new(),
            lapses: space.stats().lapses,
        };
        stop.store(true, Ordering::Release);
        drop(current);
        bell.signal(bell.value() + 1);
        next.await;
        result
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let polls = std::mem::take(&mut *polls.lock().unwrap());
    Waited { polls, of_waiters: Duration::from_nanos(used.load(Ordering::Acquire)), ..result }
}

/// Who has polled the future that is in the way of a reader, and polls it no more.
#[derive(Clone, Copy, Debug)]
pub enum Abandoned {
    BySameTask,
    ByAnotherTask,
}

/// Returns how long a reader is kept waiting by an invalidation whose passes are done and whose
/// future is alive and not polled again.
pub fn abandoned(by: Abandoned) -> Duration {
    let (space, gate) = (AddressSpace::new(), Gate::default());
    let device = space.insert(pages(0, 1), Fenced(gate.clone())).unwrap();
    let mut invalidate = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
    let poll = |invalidate: &mut Pin<Box<_>>| {
        assert!(block_on(poll_immediate(invalidate)).is_none(), "its pass waits for the fence");
    };
    if let Abandoned::ByAnotherTask = by {
        std::thread::scope(|scope| _ = scope.spawn(|| poll(&mut invalidate)));
    }
    let took = block_on(async {
        if let Abandoned::BySameTask = by {
            assert!(
                poll_immediate(&mut invalidate).await.is_none(),
                "its pass waits for the fence"
            );
        }
        let began = Instant::now();
        gate.open();
        device.read_begin().await;
        began.elapsed()
    });
    drop(block_on(invalidate));
    took
}

/// A device whose passes wait for one fence.
struct Fenced(Gate);

impl IntervalNotifier for Fenced {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(Some(PassFuture::new(self.0.clone())))
    }
}
