//! What is to be replayed: the actions of each call, on which thread, and after which others.
//!
//! A recording does not say why a thread did what it did when it did it. So calls keep the order of
//! their thread, and the order of the recording where they touch the same pages (or a whole address
//! space: `fork`, `execve`, the end); everything else happens when the thread comes to it.

use crate::memory::{Action, Program};
use crate::recording::{Op, Recording};
use shootdown::{AddressRange, Event};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// One call.
pub struct Planned {
    pub task: u32,
    /// When, if nothing takes time and no pause is longer than the longest.
    pub at: Duration,
    pub actions: Vec<Action>,
    /// Earlier calls of other threads that have to be over.
    pub after: BTreeSet<usize>,
    /// The task that begins with this call.
    pub begins: Option<u32>,
}

pub struct Plan {
    pub calls: Vec<Planned>,
    /// The calls of each task.
    pub tasks: BTreeMap<u32, Vec<usize>>,
    /// Tasks that the recording begins with, in the order of their first calls.
    pub first: Vec<u32>,
    /// What the recording did not end.
    pub rest: Vec<Action>,
    /// So many changes of the memory are invalidated at once, at most.
    pub batch: usize,
    pub spaces: usize,
    /// The address space in which the most is invalidated: the one that GPUs follow, unless they
    /// follow all.
    pub followed: usize,
    /// The process that was the first in it.
    pub followed_process: Option<u32>,
}

/// Earlier calls by what they touched, as far as later ones have to know of them: the last address
/// of each part by its first one, who touched it last, and with which call. Parts do not overlap.
#[derive(Default)]
struct Touched(BTreeMap<u64, (u64, u32, usize)>);

impl Touched {
    /// Notes that a call touches `range`; returns those of other tasks that it has to come after.
    fn touch(&mut self, range: AddressRange, task: u32, call: usize) -> Vec<usize> {
        let first =
            self.0.range(..=range.start()).next_back().map_or(range.start(), |(start, _)| *start);
        let overlapping: Vec<(u64, (u64, u32, usize))> = self
            .0
            .range(first..=range.last())
            .filter(|(_, (last, ..))| *last >= range.start())
            .map(|(start, part)| (*start, *part))
            .collect();
        for (start, (last, by, earlier)) in &overlapping {
            // What lies beside the range stays that call's.
            self.0.remove(start);
            if *start < range.start() {
                self.0.insert(*start, (range.start() - 1, *by, *earlier));
            }
            if *last > range.last() {
                self.0.insert(range.last() + 1, (*last, *by, *earlier));
            }
        }
        // Whoever comes after this one comes after these.
        self.0.insert(range.start(), (range.last(), task, call));
        overlapping
            .into_iter()
            .filter(|(_, (_, by, _))| *by != task)
            .map(|(_, (_, _, earlier))| earlier)
            .collect()
    }
}

/// What an action touches: a range of a space, or all of it.
fn touches(action: &Action) -> (usize, AddressRange) {
    match *action {
        Action::Mapped { space, range, .. } | Action::Invalidate { space, range, .. } => {
            (space, range)
        }
        Action::Created { space, .. } | Action::Released { space } => (space, AddressRange::ALL),
    }
}

/// What is told of with a change: it may be invalidated at once with those of which the same is.
fn kind(action: &Action) -> Option<(usize, Event)> {
    match *action {
        Action::Invalidate { space, event, .. } => Some((space, event)),
        _ => None,
    }
}

/// Actions as they are carried out: up to `batch` changes of one kind that follow one another are
/// one invalidation, everything else is alone.
pub fn at_once(actions: &[Action], batch: usize) -> impl Iterator<Item = &[Action]> {
    let together = |a: &Action, b: &Action| kind(a).is_some() && kind(a) == kind(b);
    actions.chunk_by(together).flat_map(move |changes| changes.chunks(batch))
}

/// Calls of a task that follow one another, each nothing but changes of one kind.
struct Gathered {
    number: usize,
    kind: (usize, Event),
    changes: usize,
}

/// What a task of the program does if it gathers its changes, up to `batch` of one kind: it makes
/// one call where the last of several was.
///
/// It has to make it before another task does what comes after one of them: memory that is still to
/// be unmapped cannot be mapped again. So no call waits for a later one, and no two tasks wait for
/// each other.
fn gather(calls: Vec<Planned>, batch: usize) -> Vec<Planned> {
    let mut open: BTreeMap<u32, Gathered> = BTreeMap::new();
    // In which call each is made, and the last one that is made in it.
    let (mut numbers, mut lasts) = (Vec::with_capacity(calls.len()), Vec::new());
    for (index, call) in calls.iter().enumerate() {
        for earlier in &call.after {
            let by = calls[*earlier].task;
            if open.get(&by).is_some_and(|gathered| gathered.number == numbers[*earlier]) {
                open.remove(&by);
            }
        }
        let (changes, first) = (call.actions.len(), call.actions.first().and_then(kind));
        let gathers =
            call.begins.is_none() && call.actions.iter().all(|action| kind(action) == first);
        let joins = open
            .get_mut(&call.task)
            .filter(|open| gathers && Some(open.kind) == first && open.changes + changes <= batch);
        if let Some(gathered) = joins {
            gathered.changes += changes;
            lasts[gathered.number] = index;
            numbers.push(gathered.number);
            continue;
        }
        let number = lasts.len();
        match first.filter(|_| gathers) {
            Some(kind) => open.insert(call.task, Gathered { number, kind, changes }),
            None => open.remove(&call.task),
        };
        lasts.push(index);
        numbers.push(number);
    }
    let mut made = Vec::with_capacity(lasts.len());
    let mut places = vec![0; lasts.len()];
    let mut begun: BTreeMap<usize, Planned> = BTreeMap::new();
    for (index, mut call) in calls.into_iter().enumerate() {
        let number = numbers[index];
        if let Some(mut before) = begun.remove(&number) {
            before.at = call.at;
            before.actions.append(&mut call.actions);
            before.after.append(&mut call.after);
            call = before;
        }
        if index < lasts[number] {
            begun.insert(number, call);
            continue;
        }
        call.after = call.after.iter().map(|earlier| places[numbers[*earlier]]).collect();
        places[number] = made.len();
        made.push(call);
    }
    made
}

impl Plan {
    /// With a `batch` of 1 each change of the memory is invalidated alone.
    pub fn new(recording: &Recording, longest_pause: Duration, batch: usize) -> Self {
        let mut program = Program::default();
        let mut touched: BTreeMap<usize, Touched> = BTreeMap::new();
        let mut invalidations: BTreeMap<usize, usize> = BTreeMap::new();
        let mut plan = Self {
            calls: Vec::new(),
            tasks: BTreeMap::new(),
            first: Vec::new(),
            rest: Vec::new(),
            batch,
            spaces: 0,
            followed: 0,
            followed_process: None,
        };
        let mut begun = BTreeSet::new();
        let mut first_in: BTreeMap<usize, u32> = BTreeMap::new();
        let (mut at, mut last_ns) = (Duration::ZERO, 0);
        for call in &recording.calls {
            at += Duration::from_nanos(call.at_ns.saturating_sub(last_ns)).min(longest_pause);
            last_ns = last_ns.max(call.at_ns);
            let task = call.pid;
            if begun.insert(task) {
                plan.first.push(task);
            }
            let begins = match call.op {
                Op::Clone { child, .. } if begun.insert(child) => Some(child),
                _ => None,
            };
            let actions = program.run(call);
            if actions.is_empty() && begins.is_none() {
                continue;
            }
            let index = plan.calls.len();
            let mut after = BTreeSet::new();
            for action in &actions {
                let (space, range) = touches(action);
                first_in.entry(space).or_insert(match (action, begins) {
                    (Action::Created { .. }, Some(child)) => child,
                    _ => task,
                });
                after.extend(touched.entry(space).or_default().touch(range, task, index));
                if let Action::Invalidate { space, .. } = action {
                    *invalidations.entry(*space).or_default() += 1;
                }
            }
            plan.calls.push(Planned { task, at, actions, after, begins });
        }
        plan.calls = gather(plan.calls, batch);
        for (index, call) in plan.calls.iter().enumerate() {
            plan.tasks.entry(call.task).or_default().push(index);
        }
        // Each waits for the call before its own first one.
        plan.first
            .sort_by_key(|task| plan.tasks.get(task).and_then(|calls| calls.first().copied()));
        plan.rest = program.end();
        plan.spaces = program.spaces();
        // Of several the first.
        plan.followed = invalidations
            .iter()
            .rev()
            .max_by_key(|(_, count)| **count)
            .map_or(0, |(space, _)| *space);
        plan.followed_process = first_in.get(&plan.followed).copied();
        plan
    }
}
