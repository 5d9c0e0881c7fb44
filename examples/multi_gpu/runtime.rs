//! Where the simulation runs: in virtual time, or in real time on tokio.
//!
//! There are tasks, which are futures (the devices), and threads, which block (the program that was
//! recorded, and the kernel's own work). The virtual one is a discrete-event simulator: one of all
//! of them runs at a time, and when none can, time jumps to the next timer. A thread is a thread of
//! the operating system that waits for its turn, so that a driver may block anywhere in it, as
//! drivers in a kernel do. Whoever has the turn and blocks runs the tasks, until it is a thread's
//! turn. Everything is ordered: the same seed gives the same run.

use futures::FutureExt;
use shootdown::Timeline;
use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

type BoxFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A handle on what runs it all: the time, timers, new tasks and threads.
#[derive(Clone)]
pub enum Runtime {
    Virtual(Arc<Core>),
    Real { began: Instant, tokio: tokio::runtime::Handle },
}

/// The virtual one.
pub struct Core {
    state: Mutex<State>,
    /// Of the thread that has the turn when no other one can have it: at the end of a thread, and
    /// when one blocks where it may not run tasks.
    scheduler: Arc<Turn>,
}

impl Core {
    /// For who has the turn: runs tasks until it is `me`'s turn again, or until `over`.
    ///
    /// # Panics
    /// When nothing can go on any more.
    fn run(self: &Arc<Self>, me: &Arc<Turn>, over: impl Fn() -> bool) {
        while !over() {
            let next = {
                let mut state = self.state.lock().unwrap();
                for future in std::mem::take(&mut state.spawned) {
                    let task = state.free.pop().unwrap_or(state.tasks.len());
                    let waker = Waker::from(Arc::new(TaskWaker { core: self.clone(), task }));
                    if task == state.tasks.len() {
                        state.tasks.push(None);
                    }
                    state.tasks[task] = Some((future, waker));
                    state.ready.push_back(Ready::Task(task));
                }
                state.ready.pop_front()
            };
            match next {
                Some(Ready::Task(task)) => self.poll(task),
                Some(Ready::Thread(turn)) if turn.over.load(Ordering::SeqCst) => {}
                Some(Ready::Thread(turn)) if Arc::ptr_eq(&turn, me) => return,
                Some(Ready::Thread(turn)) => {
                    turn.give();
                    return me.wait();
                }
                None => {
                    let mut state = self.state.lock().unwrap();
                    let Some(Reverse(timer)) = state.timers.pop() else {
                        panic!("the simulation is stuck: nobody is ready and no timer is set");
                    };
                    state.now = timer.at;
                    drop(state);
                    timer.waker.wake();
                }
            }
        }
    }

    fn poll(&self, task: usize) {
        let taken = {
            let mut state = self.state.lock().unwrap();
            (state.polled, state.again) = (Some(task), false);
            // It may have been woken more than once, or have ended since.
            state.tasks[task].take()
        };
        let polled = taken.map(|(mut future, waker)| {
            let _here = Aside(HERE.take());
            let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
            (done, (future, waker))
        });
        let mut state = self.state.lock().unwrap();
        state.polled = None;
        match polled {
            Some((false, task_again)) => state.tasks[task] = Some(task_again),
            Some((true, ended)) => {
                state.free.push(task);
                drop(state);
                drop(ended);
            }
            None => {}
        }
    }
}

#[derive(Default)]
struct State {
    now: Duration,
    timers: BinaryHeap<Reverse<Timer>>,
    /// Rises with each timer, so that those of one moment fire in order.
    timer: u64,
    spawned: Vec<BoxFuture>,
    ready: VecDeque<Ready>,
    tasks: Vec<Option<(BoxFuture, Waker)>>,
    /// Places of `tasks` that are empty.
    free: Vec<usize>,
    /// The task that is being polled.
    polled: Option<usize>,
    /// It has woken itself.
    again: bool,
}

/// What it takes at least until a task that has woken itself has its next turn. Otherwise one that
/// waits in turns, as the library's waiters do while they are patient, would stop the time.
const TURN: Duration = Duration::from_micros(1);

impl State {
    fn timer(&mut self, at: Duration, waker: Waker) {
        self.timer += 1;
        let order = self.timer;
        self.timers.push(Reverse(Timer { at, order, waker }));
    }
}

enum Ready {
    Task(usize),
    Thread(Arc<Turn>),
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

/// Wakes a task of the virtual executor.
struct TaskWaker {
    core: Arc<Core>,
    task: usize,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let mut state = self.core.state.lock().unwrap();
        if state.polled == Some(self.task) {
            if !std::mem::replace(&mut state.again, true) {
                let at = state.now + TURN;
                state.timer(at, Waker::from(self.clone()));
            }
        } else {
            state.ready.push_back(Ready::Task(self.task));
        }
    }
}

/// Whether it is a thread's turn.
struct Turn {
    thread: Thread,
    mine: AtomicBool,
    /// The thread has ended; it may have been woken since it last asked.
    over: AtomicBool,
}

impl Turn {
    fn of(thread: Thread) -> Arc<Self> {
        Arc::new(Self { thread, mine: AtomicBool::new(false), over: AtomicBool::new(false) })
    }

    fn give(&self) {
        self.mine.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }

    fn wait(&self) {
        while !self.mine.swap(false, Ordering::SeqCst) {
            std::thread::park();
        }
    }
}

/// Wakes a thread out of one `block_on`; each has its own, because they nest.
struct Parker {
    /// `None` in real time.
    of: Option<(Arc<Core>, Arc<Turn>)>,
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Parker {
    fn wake(self: Arc<Self>) {
        if self.woken.swap(true, Ordering::SeqCst) {
            return;
        }
        match &self.of {
            Some((core, turn)) => {
                core.state.lock().unwrap().ready.push_back(Ready::Thread(turn.clone()))
            }
            None => self.thread.unpark(),
        }
    }
}

/// What a thread of the simulation is told of itself.
#[derive(Clone)]
struct Here {
    turn: Arc<Turn>,
    /// In virtual time.
    core: Option<Arc<Core>>,
}

thread_local! {
    static HERE: RefCell<Option<Here>> = const { RefCell::new(None) };
    /// Code runs here that other code cannot be run in the middle of.
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// A task is polled, on whatever thread: what it runs is no part of the thread.
struct Aside(Option<Here>);

impl Drop for Aside {
    fn drop(&mut self) {
        HERE.set(self.0.take());
    }
}

fn here() -> Option<Here> {
    HERE.with_borrow(Clone::clone)
}

/// Happens once, and can be waited for: the end of a thread, a fence of a device.
#[derive(Clone, Default)]
pub struct Flag(Arc<Timeline>);

impl Flag {
    pub fn set(&self) {
        self.0.signal(1);
    }

    /// Whether it is the same one.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub fn is_set(&self) -> bool {
        self.0.value() == 1
    }

    pub async fn wait(&self) {
        self.0.reached(1).await;
    }
}

/// Lets the others go on first.
pub async fn yield_now() {
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

/// Says at the end of a thread, also by a panic, that it has ended.
struct SaysEnd(Flag, Here);

impl Drop for SaysEnd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Its message has been printed. The others wait for it, and a result without it would
            // be none.
            std::process::exit(101);
        }
        self.1.turn.over.store(true, Ordering::SeqCst);
        self.0.set();
        if let Some(core) = &self.1.core {
            core.scheduler.give();
        }
    }
}

impl Runtime {
    /// The time since the run began.
    pub fn now(&self) -> Duration {
        match self {
            Self::Virtual(core) => core.state.lock().unwrap().now,
            Self::Real { began, .. } => began.elapsed(),
        }
    }

    pub async fn sleep_until(&self, at: Duration) {
        match self {
            Self::Virtual(core) => {
                let mut set = false;
                poll_fn(|cx| {
                    let mut state = core.state.lock().unwrap();
                    if state.now >= at {
                        return Poll::Ready(());
                    }
                    if !std::mem::replace(&mut set, true) {
                        state.timer(at, cx.waker().clone());
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

    /// Runs a task beside the others. In virtual time it begins when whoever spawned it pauses.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        match self {
            Self::Virtual(core) => core.state.lock().unwrap().spawned.push(Box::pin(task)),
            Self::Real { tokio, .. } => {
                let task = std::panic::AssertUnwindSafe(task).catch_unwind();
                drop(
                    tokio
                        .spawn(task.map(|ended| ended.unwrap_or_else(|_| std::process::exit(101)))),
                );
            }
        }
    }

    /// Starts a thread; in virtual time it begins when whoever started it pauses. Returns its end.
    pub fn thread(&self, run: impl FnOnce() + Send + 'static) -> Flag {
        let ended = Flag::default();
        self.start(run, ended.clone());
        ended
    }

    fn start(&self, run: impl FnOnce() + Send + 'static, ended: Flag) -> JoinHandle<()> {
        let (core, tokio) = match self {
            Self::Virtual(core) => (Some(core.clone()), None),
            Self::Real { tokio, .. } => (None, Some(tokio.clone())),
        };
        let (tell, told) = std::sync::mpsc::sync_channel::<Here>(1);
        let started = std::thread::spawn(move || {
            let Ok(here) = told.recv() else { return };
            let _tokio = tokio.as_ref().map(tokio::runtime::Handle::enter);
            if here.core.is_some() {
                here.turn.wait();
            }
            let _says = SaysEnd(ended, here.clone());
            HERE.set(Some(here));
            run();
        });
        let turn = Turn::of(started.thread().clone());
        let _ = tell.send(Here { turn: turn.clone(), core });
        if let Self::Virtual(core) = self {
            core.state.lock().unwrap().ready.push_back(Ready::Thread(turn));
        }
        started
    }

    /// Runs a first pass, which the library knows by its thread: others of the simulation that run
    /// while it blocks run on other threads.
    pub fn alone<T>(&self, run: impl FnOnce() -> T) -> T {
        let before = ALONE.replace(true);
        let output = run();
        ALONE.set(before);
        output
    }

    /// Whether this may block: on a thread of the simulation, not in a task.
    pub fn may_block(&self) -> bool {
        here().is_some()
    }

    /// Blocks the calling thread until the future is ready. May be called inside of a future that
    /// the same thread blocks on. Each time that the thread had to be woken costs `wake`.
    pub fn block_on<T>(&self, future: impl Future<Output = T>, wake: Duration) -> T {
        let here = here().expect("only threads of the simulation block");
        let of = match self {
            Self::Virtual(core) => Some((core.clone(), here.turn.clone())),
            Self::Real { .. } => None,
        };
        let parker =
            Arc::new(Parker { of, thread: std::thread::current(), woken: AtomicBool::new(false) });
        let waker = Waker::from(parker.clone());
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return output;
            }
            let mut slept = false;
            while !parker.woken.swap(false, Ordering::SeqCst) {
                slept = true;
                match &here.core {
                    // The others' turn.
                    Some(core) if ALONE.get() => {
                        core.scheduler.give();
                        here.turn.wait();
                    }
                    Some(core) => core.run(&here.turn, || false),
                    None => std::thread::park(),
                }
            }
            if slept {
                self.work(wake);
            }
        }
    }

    /// What `work` of the calling thread takes of the time.
    pub fn charged(&self, time: Duration) -> Duration {
        if matches!(self, Self::Virtual(_)) && self.may_block() { time } else { Duration::ZERO }
    }

    /// Takes this much of the processor's time on the calling thread; in a task, which has none,
    /// and in real time, where what is done takes what it takes, nothing.
    pub fn work(&self, time: Duration) {
        let Self::Virtual(core) = self else { return };
        if time.is_zero() || !self.may_block() {
            return;
        }
        let at = {
            let mut state = core.state.lock().unwrap();
            let at = state.now + time;
            // Nobody else has anything to do until then.
            let alone = state.ready.is_empty() && state.spawned.is_empty();
            if alone && state.timers.peek().is_none_or(|Reverse(timer)| timer.at > at) {
                state.now = at;
                return;
            }
            at
        };
        self.block_on(self.sleep_until(at), Duration::ZERO);
    }
}

/// Runs `main`, which is a thread, to its end in virtual time; tasks that are left are dropped
/// then. A panic of a thread ends the process with exit code 101, so does it when nothing can go
/// on.
pub fn run_virtual<T: Send + 'static>(main: impl FnOnce(Runtime) -> T + Send + 'static) -> T {
    let scheduler = Turn::of(std::thread::current());
    let core = Arc::new(Core { state: Mutex::default(), scheduler: scheduler.clone() });
    let runtime = Runtime::Virtual(core.clone());
    let (output, ended) = (Arc::new(Mutex::new(None)), Flag::default());
    let (result, of_main) = (output.clone(), runtime.clone());
    let main = runtime.start(
        move || {
            let done = main(of_main);
            *result.lock().unwrap() = Some(done);
        },
        ended.clone(),
    );
    while !ended.is_set() {
        core.run(&scheduler, || ended.is_set());
    }
    main.join().expect("a thread that panics ends the process");
    // Tasks hold the simulator's state and it holds wakers of tasks: both go now.
    let (timers, tasks) = {
        let mut state = core.state.lock().unwrap();
        (std::mem::take(&mut state.timers), std::mem::take(&mut state.tasks))
    };
    drop((timers, tasks));
    output.lock().unwrap().take().expect("main has ended without a panic")
}

/// Runs `main`, which is a thread, to its end in real time, with the devices on two threads of
/// tokio. A panic of a thread or a device ends the process with exit code 101.
pub fn run_real<T: Send + 'static>(
    main: impl FnOnce(Runtime) -> T + Send + 'static,
) -> std::io::Result<T> {
    let tokio =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build()?;
    let runtime = Runtime::Real { began: Instant::now(), tokio: tokio.handle().clone() };
    let output = Arc::new(Mutex::new(None));
    let (result, of_main) = (output.clone(), runtime.clone());
    let main = runtime.start(
        move || {
            let done = main(of_main);
            *result.lock().unwrap() = Some(done);
        },
        Flag::default(),
    );
    main.join().expect("a thread that panics ends the process");
    tokio.shutdown_background();
    Ok(output.lock().unwrap().take().expect("main has ended without a panic"))
}
