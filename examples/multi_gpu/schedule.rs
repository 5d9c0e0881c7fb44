//! What is to be replayed: the actions of each call, on which thread, and after which others.
//!
//! A recording does not say why a thread did what it did when it did it. So calls keep the order of
//! their thread, and the order of the recording where they touch the same pages (or a whole address
//! space: `fork`, `execve`, the end); everything else happens when the thread comes to it.

use crate::memory::{Action, Program};
use crate::recording::{Op, Recording};
use shootdown::AddressRange;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// One call.
pub struct Planned {
    /// When, if nothing takes time and no pause is longer than the longest.
    pub at: Duration,
    pub actions: Vec<Action>,
    /// Earlier calls of other threads that have to be over.
    pub after: Vec<usize>,
    /// The task that begins with this call.
    pub begins: Option<u32>,
}

pub struct Plan {
    pub calls: Vec<Planned>,
    /// The calls of each task.
    pub tasks: BTreeMap<u32, Vec<usize>>,
    /// Tasks that the recording begins with.
    pub first: Vec<u32>,
    /// What the recording did not end.
    pub rest: Vec<Action>,
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
        let first = self.0.range(..=range.start()).next_back().map_or(range.start(), |(start, _)| *start);
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
        overlapping.into_iter().filter(|(_, (_, by, _))| *by != task).map(|(_, (_, _, earlier))| earlier).collect()
    }
}

/// What an action touches: a range of a space, or all of it.
fn touches(action: &Action) -> (usize, AddressRange) {
    match *action {
        Action::Mapped { space, range, .. } | Action::Invalidate { space, range, .. } => (space, range),
        Action::Created { space, .. } | Action::Released { space } => (space, AddressRange::ALL),
    }
}

impl Plan {
    pub fn new(recording: &Recording, longest_pause: Duration) -> Self {
        let mut program = Program::default();
        let mut touched: BTreeMap<usize, Touched> = BTreeMap::new();
        let mut invalidations: BTreeMap<usize, usize> = BTreeMap::new();
        let mut plan = Self {
            calls: Vec::new(),
            tasks: BTreeMap::new(),
            first: Vec::new(),
            rest: Vec::new(),
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
            plan.calls.push(Planned { at, actions, after: after.into_iter().collect(), begins });
            plan.tasks.entry(task).or_default().push(index);
        }
        plan.rest = program.end();
        plan.spaces = program.spaces();
        // Of several the first.
        plan.followed = invalidations.iter().rev().max_by_key(|(_, count)| **count).map_or(0, |(space, _)| *space);
        plan.followed_process = first_in.get(&plan.followed).copied();
        plan
    }
}
