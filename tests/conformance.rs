//! The library against recordings of the kernel's own code (`tests/conformance/`, 300 scenarios).
//!
//! `exact.jsonl` must be reproduced in every value; for `overlap.jsonl`, where the kernel defers
//! work that the library does at once, the three rules of `tests/conformance/README.md` hold.
//! `CONFORMANCE_DIR` names another directory with the two files.
#![allow(missing_docs)]

use futures::executor::{LocalPool, LocalSpawner, block_on};
use futures::task::LocalSpawnExt;
use serde::Deserialize;
use shootdown::{
    AddressRange, AddressSpace, Event, IntervalNotifier, Invalidation, InvalidationGuard,
    PassFuture, Sequence, Subscription, WouldBlock,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Debug;
use std::io::Write;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

#[derive(Deserialize)]
struct Scenario {
    scenario: u64,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    #[serde(flatten)]
    op: Op,
    #[serde(default)]
    unblocked: Vec<Unblocked>,
    space_seq: u64,
    active: usize,
    seqs: BTreeMap<u64, u64>,
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Op {
    Insert {
        id: u64,
        start: u64,
        len: u64,
        passes: u64,
        refuses_nonblocking: bool,
        result: String,
    },
    InvalidateStart {
        h: u64,
        start: u64,
        end: u64,
        blockable: bool,
        event: u8,
        calls: Vec<Call>,
        result: String,
    },
    InvalidateEnd {
        h: u64,
    },
    Release {
        calls: Vec<Call>,
    },
    ReadBegin {
        id: u64,
        seq: Option<u64>,
        blocked: Option<u64>,
    },
    ReadRetry {
        id: u64,
        of: usize,
        seq: u64,
        retry: bool,
    },
    Remove {
        id: u64,
        result: Option<String>,
        blocked: Option<u64>,
    },
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
struct Call {
    call: Kind,
    id: u64,
    n: u64,
    seq: u64,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Start,
    Pass,
    Refuse,
}

#[derive(Deserialize)]
struct Unblocked {
    wait: u64,
    id: u64,
    seq: Option<u64>,
}

type Calls = Arc<Mutex<Vec<Call>>>;

/// The notifier of the recordings.
struct Recorder {
    id: u64,
    passes: u64,
    refuses_nonblocking: bool,
    calls: Calls,
}

impl IntervalNotifier for Recorder {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let seq = invalidation.sequence().get();
        let call = |call| self.calls.lock().unwrap().push(Call { call, id: self.id, n: 0, seq });
        if self.refuses_nonblocking && !invalidation.blockable() {
            call(Kind::Refuse);
            return Err(WouldBlock);
        }
        call(Kind::Start);
        invalidation.set_seq();
        let pass = Passes {
            id: self.id,
            polled: 0,
            ready_at: self.passes,
            seq,
            calls: self.calls.clone(),
        };
        Ok((self.passes > 0).then(|| PassFuture::new(pass)))
    }
}

/// Ready at its `ready_at`-th poll; wakes itself before that.
struct Passes {
    id: u64,
    polled: u64,
    ready_at: u64,
    seq: u64,
    calls: Calls,
}

impl Future for Passes {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.polled += 1;
        let call = Call { call: Kind::Pass, id: self.id, n: self.polled, seq: self.seq };
        self.calls.lock().unwrap().push(call);
        if self.polled == self.ready_at {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// What a wait of ours came to.
#[derive(Clone, Copy, Debug)]
enum Done {
    Read(Sequence),
    Removed,
}

impl Done {
    /// The sequence that a `read_begin` returned, as the recordings write it.
    fn seq(self) -> Option<u64> {
        match self {
            Self::Read(sequence) => Some(sequence.get()),
            Self::Removed => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Family {
    Exact,
    Overlap,
}

struct Run {
    family: Family,
    scenario: u64,
    step: usize,
    space: AddressSpace,
    calls: Calls,
    pool: LocalPool,
    spawner: LocalSpawner,
    subscriptions: HashMap<u64, Arc<Subscription<Recorder>>>,
    starts: HashMap<u64, u64>,
    guards: HashMap<u64, InvalidationGuard<'static>>,
    /// What our waits came to, by the step that began them.
    done: Rc<RefCell<HashMap<usize, Done>>>,
    /// The kernel's name of a wait, and the step that began it.
    waits: HashMap<u64, usize>,
    /// Notifiers whose `remove` waits in the kernel.
    removing: HashSet<u64>,
    /// Notifiers inserted since nothing was active.
    recent: HashSet<u64>,
    /// A later step inserts a notifier.
    inserts_later: bool,
}

impl Run {
    fn new(family: Family, scenario: u64) -> Self {
        let pool = LocalPool::new();
        Self {
            family,
            scenario,
            step: 0,
            space: AddressSpace::new(),
            calls: Calls::default(),
            spawner: pool.spawner(),
            pool,
            subscriptions: HashMap::new(),
            starts: HashMap::new(),
            guards: HashMap::new(),
            done: Rc::default(),
            waits: HashMap::new(),
            removing: HashSet::new(),
            recent: HashSet::new(),
            inserts_later: false,
        }
    }

    #[track_caller]
    fn compare<T: PartialEq + Debug>(&self, what: &str, ours: T, kernel: T) {
        let family = if self.family == Family::Exact { "exact" } else { "overlap" };
        assert!(
            ours == kernel,
            "{family} scenario {} step {}: {what}: expected {kernel:?}, got {ours:?}",
            self.scenario,
            self.step
        );
    }

    /// Begins a wait; its result comes when the pool has run.
    fn wait(&mut self, task: impl Future<Output = Done> + 'static) {
        let (done, step) = (self.done.clone(), self.step);
        let task = async move {
            let result = task.await;
            done.borrow_mut().insert(step, result);
        };
        self.spawner.spawn_local(task).unwrap();
    }

    /// Runs one step. `false` when the rest of the scenario is not to be compared.
    fn step(&mut self, step: &Step) -> bool {
        self.calls.lock().unwrap().clear();
        let mut compared = true;
        match &step.op {
            Op::Insert { id, start, len, passes, refuses_nonblocking, result } => {
                let notifier = Recorder {
                    id: *id,
                    passes: *passes,
                    refuses_nonblocking: *refuses_nonblocking,
                    calls: self.calls.clone(),
                };
                let ours = AddressRange::new(*start, *len)
                    .map(|range| self.space.insert(range, notifier).unwrap());
                self.compare(
                    "insert",
                    if ours.is_ok() { "ok" } else { "EOVERFLOW" },
                    result.as_str(),
                );
                if let Ok(subscription) = ours {
                    self.subscriptions.insert(*id, Arc::new(subscription));
                    self.starts.insert(*id, *start);
                    self.recent.insert(*id);
                }
            }
            Op::InvalidateStart { h, start, end, blockable, event, calls, result } => {
                let range = AddressRange::try_from(*start..*end).unwrap();
                let event = event_of(*event);
                let space = self.space.clone();
                let ours = if *blockable {
                    Ok(block_on(space.invalidate(range, event)).into_owned())
                } else {
                    space.try_invalidate(range, event).map(InvalidationGuard::into_owned)
                };
                self.pool.run_until_stalled();
                let same = self.compare_calls(calls);
                let outcome = if ours.is_ok() { "ok" } else { "EAGAIN" };
                if self.family == Family::Overlap && !blockable && !same && outcome != result {
                    compared = false;
                } else {
                    self.compare("invalidate_start", outcome, result.as_str());
                }
                if let Ok(guard) = ours {
                    self.guards.insert(*h, guard);
                }
            }
            Op::InvalidateEnd { h } => drop(self.guards.remove(h).unwrap()),
            Op::Release { calls } => {
                if self.inserts_later {
                    // The kernel's code takes an insert after the release, the library refuses it
                    // (L4): the same calls without the refusal.
                    drop(block_on(self.space.invalidate(AddressRange::ALL, Event::Release)));
                } else {
                    block_on(self.space.release());
                }
                self.compare_calls(calls);
            }
            Op::ReadBegin { id, seq, blocked } => {
                let subscription = self.subscriptions[id].clone();
                self.wait(async move { Done::Read(subscription.read_begin().await) });
                self.pool.run_until_stalled();
                self.compare_wait("read_begin", seq.map(Some), *blocked);
            }
            Op::ReadRetry { id, of, seq, retry } => {
                let Some(Done::Read(began)) = self.done.borrow().get(of).copied() else {
                    panic!(
                        "scenario {} step {}: the read of step {of} has not come back",
                        self.scenario, self.step
                    );
                };
                if self.family == Family::Exact {
                    self.compare("sequence to check", began.get(), *seq);
                }
                let ours = self.subscriptions[id].read_retry(began);
                if self.family == Family::Exact || *retry {
                    self.compare("read_retry", ours, *retry);
                }
            }
            Op::Remove { id, result, blocked } => {
                let subscription = self.subscriptions.remove(id).unwrap();
                // A `remove` takes the subscription, which readers that wait still borrow; `close`
                // is the same wait without that.
                self.wait(async move {
                    match Arc::try_unwrap(subscription) {
                        Ok(subscription) => drop(subscription.remove().await),
                        Err(shared) => shared.close().await,
                    }
                    Done::Removed
                });
                self.pool.run_until_stalled();
                if blocked.is_some() {
                    self.removing.insert(*id);
                }
                self.compare_wait("remove", result.as_ref().map(|_| None), *blocked);
            }
        }
        self.pool.run_until_stalled();
        self.compare_unblocked(&step.unblocked);
        if compared && self.family == Family::Exact {
            self.compare("space_seq", self.space.sequence().get(), step.space_seq);
            self.compare("active", self.space.active().len(), step.active);
            let seqs: BTreeMap<u64, u64> =
                self.subscriptions.iter().map(|(id, of)| (*id, of.sequence().get())).collect();
            self.compare("seqs", &seqs, &step.seqs);
        }
        if step.active == 0 {
            self.recent.clear();
        }
        self.step += 1;
        compared
    }

    /// Says whether the calls were the same.
    fn compare_calls(&self, kernel: &[Call]) -> bool {
        let ours = self.calls.lock().unwrap();
        if self.family == Family::Exact {
            self.compare("calls", &ours[..], kernel);
            return true;
        }
        // Rule 3; sequences differ where S6 asks for it.
        let key = |call: &Call| (call.call, call.id, call.n);
        let (made, asked): (HashSet<_>, HashSet<_>) =
            (ours.iter().map(key).collect(), kernel.iter().map(key).collect());
        let allowed_less = |id| self.removing.contains(&id);
        let missing: Vec<_> =
            asked.difference(&made).filter(|(_, id, _)| !allowed_less(*id)).collect();
        let more: Vec<_> =
            made.difference(&asked).filter(|(_, id, _)| !self.recent.contains(id)).collect();
        let refusal = |calls: &[Call]| {
            calls.iter().find(|call| call.call == Kind::Refuse).map(|call| call.id)
        };
        // A refusal by a notifier that only one side calls cuts off what comes behind it on that
        // side.
        if refusal(&ours) == refusal(kernel) {
            self.compare("calls that only the kernel made", missing, Vec::new());
            self.compare("calls that only the library made", more, Vec::new());
        }
        let starts: Vec<_> = ours
            .iter()
            .filter(|call| call.call == Kind::Start)
            .map(|call| self.starts[&call.id])
            .collect();
        assert!(
            starts.is_sorted(),
            "scenario {} step {}: first passes out of order",
            self.scenario,
            self.step
        );
        made == asked
    }

    /// `kernel` is what the kernel's wait came to at once: the sequence, for a `read_begin`.
    fn compare_wait(&mut self, what: &str, kernel: Option<Option<u64>>, blocked: Option<u64>) {
        if let Some(wait) = blocked {
            self.waits.insert(wait, self.step);
        }
        let ours = self.done.borrow().get(&self.step).map(|done| done.seq());
        match self.family {
            Family::Exact => self.compare(what, ours, kernel),
            Family::Overlap if kernel.is_some() => self.compare(what, ours.is_some(), true),
            Family::Overlap => {}
        }
    }

    fn compare_unblocked(&mut self, kernel: &[Unblocked]) {
        for Unblocked { wait, id, seq } in kernel {
            let began = self.waits.remove(wait).unwrap();
            self.removing.remove(id);
            let ours = self.done.borrow().get(&began).map(|done| done.seq());
            if self.family == Family::Exact {
                self.compare("unblocked", ours, Some(*seq));
            } else {
                self.compare("unblocked", ours.is_some(), true);
            }
        }
        if self.family == Family::Exact {
            for began in self.waits.values() {
                self.compare("done too early", self.done.borrow().contains_key(began), false);
            }
        }
    }
}

fn event_of(number: u8) -> Event {
    match number {
        0 => Event::Unmap,
        1 => Event::Clear,
        2 => Event::ProtectionVma,
        3 => Event::ProtectionPage,
        4 => Event::SoftDirty,
        5 => Event::Release,
        6 => Event::Migrate { owner: None },
        7 => Event::Exclusive { owner: None },
        other => panic!("the recordings know no event {other}"),
    }
}

fn run(file: &str, family: Family) {
    let dir = std::env::var_os("CONFORMANCE_DIR").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/conformance")),
        PathBuf::from,
    );
    let path = dir.join(file);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (mut scenarios, mut steps, mut not_compared) = (0, 0, 0);
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let scenario: Scenario = serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("{} line {}: {error}", path.display(), number + 1));
        let mut run = Run::new(family, scenario.scenario);
        let mut of_this = scenario.steps.iter();
        while let Some(step) = of_this.next() {
            steps += 1;
            let inserts =
                |step: &Step| matches!(&step.op, Op::Insert { result, .. } if result == "ok");
            run.inserts_later = of_this.as_slice().iter().any(inserts);
            if !run.step(step) {
                break;
            }
        }
        not_compared += of_this.len();
        scenarios += 1;
    }
    assert!(scenarios > 0, "{} holds no scenario", path.display());
    // Past the capture of the test harness: how much was compared is worth knowing of every run.
    let report = format!(
        "{file}: {scenarios} scenarios, {steps} steps compared, {not_compared} left out by rule 3\n"
    );
    std::io::stdout().write_all(report.as_bytes()).unwrap();
}

#[test]
fn every_value_is_the_kernels_where_the_kernel_does_not_defer() {
    run("exact.jsonl", Family::Exact);
}

#[test]
fn nothing_is_later_or_laxer_where_the_kernel_defers() {
    run("overlap.jsonl", Family::Overlap);
}
