//! Where the simulation runs: in virtual time, on an executor of its own, or on tokio in real time.
//!
//! The virtual one is a discrete-event simulator in a hundred lines: when no task is ready, time jumps to the next timer. It runs on one
//! thread and everything in it is ordered, so that the same seed gives the same run.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

type BoxFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A handle on the executor: the time, timers and new tasks.
#[derive(Clone)]
pub enum Runtime {
    Virtual(Arc<Mutex<Core>>),
    Real { began: Instant, tokio: tokio::runtime::Handle },
}

/// The state of the virtual executor.
#[derive(Default)]
pub struct Core {
    now: Duration,
    timers: BinaryHeap<Reverse<Timer>>,
    /// Rises with each timer, so that those of one moment fire in order.
    timer: u64,
    spawned: Vec<BoxFuture>,
    ready: VecDeque<usize>,
}

struct Timer {
    at: Duration,
    order: u64,
    waker: Waker,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// Wakes task `task` of the virtual executor.
struct TaskWaker {
    core: Arc<Mutex<Core>>,
    task: usize,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.core.lock().unwrap().ready.push_back(self.task);
    }
}

impl Runtime {
    /// The time since the run began.
    pub fn now(&self) -> Duration {
        match self {
            Self::Virtual(core) => core.lock().unwrap().now,
            Self::Real { began, .. } => began.elapsed(),
        }
    }

    pub async fn sleep_until(&self, at: Duration) {
        match self {
            Self::Virtual(core) => {
                let mut set = false;
                poll_fn(|cx| {
                    let mut core = core.lock().unwrap();
                    if core.now >= at {
                        return Poll::Ready(());
                    }
                    if !std::mem::replace(&mut set, true) {
                        core.timer += 1;
                        let order = core.timer;
                        core.timers.push(Reverse(Timer { at, order, waker: cx.waker().clone() }));
                    }
                    Poll::Pending
                })
                .await;
            }
            Self::Real { began, .. } => tokio::time::sleep_until((*began + at).into()).await,
        }
    }

    pub async fn sleep(&self, time: Duration) {
        self.sleep_until(self.now() + time).await;
    }

    /// Runs a task beside the others. In virtual time it begins when the one that spawned it pauses.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        match self {
            Self::Virtual(core) => core.lock().unwrap().spawned.push(Box::pin(task)),
            Self::Real { tokio, .. } => drop(tokio.spawn(task)),
        }
    }
}

/// Runs `main` to its end in virtual time; what it spawned is dropped then.
pub fn run_virtual<T: Send + 'static>(main: impl FnOnce(Runtime) -> Pin<Box<dyn Future<Output = T> + Send>>) -> T {
    let core = Arc::new(Mutex::new(Core::default()));
    let output = Arc::new(Mutex::new(None));
    let (main, result) = (main(Runtime::Virtual(core.clone())), output.clone());
    let mut tasks: Vec<Option<(BoxFuture, Waker)>> = Vec::new();
    let mut free = Vec::new();
    core.lock().unwrap().spawned.push(Box::pin(async move {
        let done = main.await;
        *result.lock().unwrap() = Some(done);
    }));
    loop {
        let (spawned, next) = {
            let mut core = core.lock().unwrap();
            (std::mem::take(&mut core.spawned), core.ready.pop_front())
        };
        for future in spawned {
            let task = free.pop().unwrap_or(tasks.len());
            let waker = Waker::from(Arc::new(TaskWaker { core: core.clone(), task }));
            let new = Some((future, waker));
            if task == tasks.len() {
                tasks.push(new)
            } else {
                tasks[task] = new
            }
            core.lock().unwrap().ready.push_back(task);
        }
        if let Some(task) = next {
            // A task may have been woken more than once, or have ended since.
            if let Some((future, waker)) = &mut tasks[task] {
                let done = future.as_mut().poll(&mut Context::from_waker(&waker.clone())).is_ready();
                if done {
                    tasks[task] = None;
                    free.push(task);
                }
            }
            if let Some(output) = output.lock().unwrap().take() {
                // Tasks hold the executor's state and it holds wakers of tasks: both go now.
                core.lock().unwrap().timers.clear();
                return output;
            }
            continue;
        }
        let timer = {
            let mut core = core.lock().unwrap();
            if !core.ready.is_empty() || !core.spawned.is_empty() {
                continue;
            }
            let Some(Reverse(timer)) = core.timers.pop() else {
                panic!("the simulation is stuck: no task is ready and no timer is set");
            };
            core.now = timer.at;
            timer
        };
        timer.waker.wake();
    }
}

/// Runs `main` to its end on tokio, on two worker threads.
pub fn run_real<T: Send + 'static>(main: impl FnOnce(Runtime) -> Pin<Box<dyn Future<Output = T> + Send>>) -> std::io::Result<T> {
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build()?;
    let runtime = Runtime::Real { began: Instant::now(), tokio: tokio.handle().clone() };
    let output = tokio.block_on(main(runtime));
    tokio.shutdown_background();
    Ok(output)
}
