//! Random schedules of a session, its device and a front-end that does one thing after the other:
//! no deadlock, nothing stale, whatever the order.
//!
//! 2,000 schedules by default; `SHOOTDOWN_SCHEDULES=100000` asks for more, `SHOOTDOWN_SEED` for
//! one.
#![allow(missing_docs, unreachable_pub, dead_code, clippy::print_stdout, reason = "a test")]

mod device;
mod frontend;
mod guest;

use device::Hardware;
use frontend::{Frontend, Sent};
use futures::future::BoxFuture;
use futures::task::{ArcWake, waker};
use guest::{Guest, QUEUES};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::Timeline;
use shootdown_vhost::message::Channel;
use shootdown_vhost::{Fault, Iotlb, IotlbStats, Output, Session};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

/// Whether a task has been woken.
struct Flag(AtomicBool);

impl ArcWake for Flag {
    fn wake_by_ref(flag: &Arc<Self>) {
        flag.0.store(true, Ordering::SeqCst);
    }
}

impl Flag {
    fn new() -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(true)))
    }

    fn take(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

#[derive(Clone, Copy, Default)]
struct Options {
    fault: Option<Fault>,
    early_used: bool,
}

struct Run {
    random: SmallRng,
    guest: Guest,
    frontend: Frontend,
    session: Session<Hardware>,
    session_flag: Arc<Flag>,
    hardware: Arc<Hardware>,
    tasks: Vec<(BoxFuture<'static, ()>, Arc<Flag>)>,
    kicks: u64,
    budget: u32,
    resetting: bool,
    completed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Session,
    Task(usize),
    Send,
    Miss,
    Access(usize),
    Look,
    Guest,
}

impl Run {
    fn new(seed: u64, options: Options) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let event_idx = random.random_bool(0.5);
        let guest = Guest::new(&mut random, event_idx);
        let kicks = (0..QUEUES).map(|_| Timeline::new()).collect();
        let hardware =
            Arc::new(Hardware { kicks, early_used: options.early_used, ..Hardware::default() });
        let session = Session::new(hardware.clone(), Iotlb::default()).fault(options.fault);
        let backend = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let frontend = Frontend::new(&guest, random.random_bool(0.5), backend, event_idx);
        let budget = random.random_range(10..100);
        let (session_flag, tasks) = (Flag::new(), Vec::new());
        Self {
            random,
            guest,
            frontend,
            session,
            session_flag,
            hardware,
            tasks,
            kicks: 0,
            budget,
            resetting: false,
            completed: 0,
        }
    }

    fn give(&mut self, sent: Sent) -> Result<(), String> {
        let (channel, message) = match sent {
            Sent::Frontend(message) => (Channel::Frontend, message),
            Sent::Backend(message) => (Channel::Backend, message),
        };
        self.session.receive(channel, message).map_err(|error| error.to_string())?;
        // Its driver polls it after each message.
        self.poll_session()
    }

    fn poll_session(&mut self) -> Result<(), String> {
        self.session_flag.take();
        let waker = waker(self.session_flag.clone());
        let mut cx = Context::from_waker(&waker);
        while let Poll::Ready(output) = self.session.poll_output(&mut cx) {
            match output {
                Output::Open(_) | Output::Close => {}
                Output::Send(Channel::Backend, message) => self.frontend.asked(&message)?,
                Output::Send(Channel::Frontend, message) => {
                    let next =
                        self.frontend.receive(&message, &mut self.guest, &mut self.random)?;
                    self.guest.check()?;
                    if let Some(next) = next {
                        self.session_flag.0.store(true, Ordering::SeqCst);
                        self.give(next)?;
                    }
                }
            }
        }
        let rings = std::mem::take(&mut *self.hardware.started.lock().unwrap());
        for ring in rings {
            self.tasks.push((Box::pin(device::run(self.hardware.clone(), ring)), Flag::new()));
        }
        Ok(())
    }

    fn actions(&self) -> Vec<Action> {
        let mut all = Vec::new();
        if self.session_flag.is_set() {
            all.push(Action::Session);
        }
        all.extend((0..self.tasks.len()).filter(|at| self.tasks[*at].1.is_set()).map(Action::Task));
        if self.frontend.can_send() {
            all.push(Action::Send);
        }
        if self.frontend.is_idle() && self.frontend.has_misses() {
            all.push(Action::Miss);
        }
        all.extend((0..self.hardware.in_flight.lock().unwrap().len()).map(Action::Access));
        all
    }

    fn act(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Session => self.poll_session()?,
            Action::Task(at) => {
                let (task, flag) = &mut self.tasks[at];
                flag.take();
                let waker = waker(flag.clone());
                if task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                    drop(self.tasks.swap_remove(at));
                }
            }
            Action::Send => {
                if let Some(message) = self.frontend.send() {
                    self.give(Sent::Frontend(message))?;
                }
            }
            Action::Miss => {
                if let Some(sent) = self.frontend.serve_miss(&self.guest, &mut self.random) {
                    self.give(sent)?;
                }
            }
            Action::Access(at) => {
                let go = self.hardware.in_flight.lock().unwrap().swap_remove(at);
                let _ = go.send(());
            }
            Action::Look => {
                for queue in 0..QUEUES {
                    while let Some(request) = self.guest.completed(queue)? {
                        self.completed += 1;
                        if !request.orphaned {
                            self.frontend.unmap(request.pages, false);
                        }
                    }
                }
            }
            Action::Guest => self.guest_acts(),
        }
        self.guest.check()?;
        self.hardware.stale.lock().unwrap().take().map_or(Ok(()), Err)
    }

    fn guest_acts(&mut self) {
        self.budget -= 1;
        let broken = self.hardware.broken.swap(false, Ordering::SeqCst);
        match self.random.random_range(0..100) {
            _ if broken => self.reset(),
            0..65 => {
                let queue = self.random.random_range(0..QUEUES);
                if self.guest.submit(queue, &mut self.random) {
                    self.kicks += 1;
                    self.hardware.kicks[usize::from(queue)].signal(self.kicks);
                }
            }
            65..78 => {
                if let Some(pages) = self.guest.orphan(&mut self.random) {
                    self.frontend.unmap(pages, true);
                }
            }
            78..90 => self.frontend.flush(),
            90..94 => self.frontend.spurious(&mut self.random),
            94..96 => self.frontend.pause(&mut self.random),
            96..98 => self.frontend.new_memory(&self.guest),
            _ => self.reset(),
        }
    }

    fn reset(&mut self) {
        self.resetting = true;
        let disable = self.random.random_bool(0.5);
        self.frontend.reset(disable);
    }

    fn run(mut self) -> Result<(IotlbStats, u64), String> {
        loop {
            // A guest that resets its device waits for that.
            self.resetting &= !self.frontend.is_idle();
            let mut actions = self.actions();
            let quiet = actions.is_empty();
            if self.frontend.is_idle() && !self.resetting {
                actions.push(Action::Look);
                if self.budget > 0 {
                    actions.push(Action::Guest);
                }
            }
            if quiet && !self.frontend.is_idle() {
                return Err("a deadlock: the front-end waits for an answer, and nothing can go on"
                    .to_owned());
            }
            if quiet && self.budget == 0 {
                break;
            }
            let mut action = actions[self.random.random_range(0..actions.len())];
            if matches!(action, Action::Access(_)) {
                // The device takes its time.
                action = actions[self.random.random_range(0..actions.len())];
            }
            self.act(action)?;
        }
        self.act(Action::Look)?;
        // A ring that could not go on has lost what it had.
        let left: usize = self.guest.queues.iter().map(|queue| queue.requests.len()).sum();
        if left > 0
            && !self.hardware.broken.load(Ordering::SeqCst)
            && self.frontend.is_idle()
            && !self.frontend.has_misses()
        {
            return Err(format!("{left} requests are never completed"));
        }
        Ok((self.session.iotlb().stats(), self.completed))
    }
}

fn schedules() -> u64 {
    std::env::var("SHOOTDOWN_SCHEDULES")
        .map_or(2_000, |count| count.parse().expect("SHOOTDOWN_SCHEDULES is a number"))
}

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("SHOOTDOWN_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("SHOOTDOWN_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..schedules(),
    }
}

#[test]
fn no_schedule_deadlocks_or_sees_anything_stale() {
    let (mut total, mut completed) = (IotlbStats::default(), 0);
    for seed in seeds() {
        let (stats, done) = Run::new(seed, Options::default())
            .run()
            .unwrap_or_else(|error| panic!("SHOOTDOWN_SEED={seed}: {error}"));
        total.updates += stats.updates;
        total.misses += stats.misses;
        total.refused += stats.refused;
        total.invalidates += stats.invalidates;
        total.met_in_flight += stats.met_in_flight;
        completed += done;
    }
    println!("{completed} requests, {total:?}");
    if seeds().end - seeds().start > 1000 {
        let (all, met) = (seeds().end, total.met_in_flight);
        assert!(
            completed > 3 * all && met > all / 2 && total.refused > all / 20,
            "{completed}, {total:?}: they show too little"
        );
    }
}

/// How many schedules of 500 show a fault.
fn seen(options: Options) -> usize {
    (0..500).filter(|seed| Run::new(*seed, options).run().is_err()).count()
}

#[test]
fn an_invalidate_that_is_answered_early_is_seen() {
    let seen = seen(Options { fault: Some(Fault::AnswerEarly), ..Options::default() });
    assert!(seen > 50, "{seen} of 500");
}

#[test]
fn translations_that_are_kept_are_seen() {
    let seen = seen(Options { fault: Some(Fault::KeepTranslations), ..Options::default() });
    assert!(seen > 50, "{seen} of 500");
}

#[test]
fn a_used_ring_that_is_told_early_is_seen() {
    let seen = seen(Options { early_used: true, ..Options::default() });
    assert!(seen > 50, "{seen} of 500");
}
