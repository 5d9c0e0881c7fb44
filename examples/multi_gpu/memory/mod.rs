//! The memory of the recorded program: its address spaces, what is mapped in them, and which
//! invalidations each call causes.
//!
//! The events, their ranges and their order are those of Linux 6.12 (`mm/mmap.c`, `mm/vma.c`,
//! `mm/mprotect.c`, `mm/mremap.c`, `mm/madvise.c`, `mm/migrate.c`, `kernel/fork.c`). The page
//! `recording` of the guide says what a recording cannot know, and the rule that is used instead.
//!
//! ```text
//! Program (mod)   tasks, processes, address spaces; fork, execve, exit
//!  └ Space (change)   what one call does to one address space
//!     └ Areas (area)   the mappings, as Linux keeps and merges them
//! ```

mod area;
mod change;

use crate::recording::{Call, Op, Prot};
use change::Space;
use shootdown::{AddressRange, Event};
use std::collections::{HashMap, HashSet};

const PAGE: u64 = 4096;

/// What a device may do with a mapping. HMM refuses one that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    None,
    Read,
    Write,
}

impl From<Prot> for Access {
    fn from(prot: Prot) -> Self {
        match prot {
            Prot { read: false, .. } => Self::None,
            Prot { write: false, .. } => Self::Read,
            _ => Self::Write,
        }
    }
}

/// What happens to the memory while the guard is held.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The pages are given up, replaced or moved; the mapping stays.
    Discarded,
    /// These mappings are no more.
    Unmapped(Vec<AddressRange>),
    /// The pages stay. From now on the mapping has this access.
    Protected(Access),
}

/// What the simulation has to do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// A new address space: empty, or after `fork` with what the child has.
    Created { space: usize, mappings: Vec<(AddressRange, Access)> },
    /// A new mapping. Devices may mirror it from now on.
    Mapped { space: usize, range: AddressRange, access: Access },
    /// `range` is invalidated; while the guard is held, the memory changes.
    Invalidate { space: usize, range: AddressRange, event: Event, then: Change },
    /// The last task has left the space. What Linux sends afterwards follows: an `Invalidate` of
    /// everything, as `Unmap`.
    Released { space: usize },
}

/// All address spaces of a recording.
#[derive(Debug, Default)]
pub struct Program {
    spaces: Vec<Space>,
    /// The process of each task.
    tasks: HashMap<u32, u32>,
    /// The space of each process.
    processes: HashMap<u32, usize>,
    /// Tasks whose process has ended. What is recorded of them afterwards has no effect.
    ended: HashSet<u32>,
}

impl Program {
    /// How many address spaces there have been.
    pub fn spaces(&self) -> usize {
        self.spaces.len()
    }

    /// The address space that a task is in.
    pub fn space_of(&self, pid: u32) -> Option<usize> {
        self.processes.get(self.tasks.get(&pid)?).copied()
    }

    /// Carries out one call.
    pub fn run(&mut self, call: &Call) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.ended.contains(&call.pid) {
            if matches!(call.op, Op::Ended | Op::Killed) {
                self.ended.remove(&call.pid);
            }
            return actions;
        }
        match call.op {
            Op::Ended => self.end_task(call.pid, &mut actions),
            Op::Killed => {
                self.end_process(call.pid, &mut actions);
                self.ended.remove(&call.pid);
            }
            Op::ThreadOf { process } => {
                self.enter(process, &mut actions);
                let process = self.tasks[&process];
                self.tasks.entry(call.pid).or_insert(process);
            }
            _ => {
                let space = self.enter(call.pid, &mut actions);
                self.change(call, space, &mut actions);
            }
        }
        actions
    }

    /// What the recording did not end.
    pub fn end(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        for space in 0..self.spaces.len() {
            if self.spaces[space].users > 0 {
                self.spaces[space].users = 1;
                self.leave(space, &mut actions);
            }
        }
        self.tasks.clear();
        self.processes.clear();
        actions
    }

    fn change(&mut self, call: &Call, space: usize, actions: &mut Vec<Action>) {
        match &call.op {
            Op::Clone { child, shares_memory, thread } => {
                self.clone_task(call.pid, *child, *shares_memory, *thread, actions)
            }
            Op::Exec => self.exec(call.pid, actions),
            Op::Exit => self.end_process(call.pid, actions),
            Op::AdviseMany(of) => {
                let Some(space) = self.space_or(of.process, space) else { return };
                for (start, len) in &of.ranges {
                    self.spaces[space].advise(*start, *len, of.advice, false, actions);
                }
            }
            Op::MovePages(of) => {
                let (process, pages) = &**of;
                let Some(space) = self.space_or(*process, space) else { return };
                pages.iter().for_each(|page| self.spaces[space].move_page(*page, actions));
            }
            Op::MigratePages { process } => {
                let Some(space) = self.space_or(*process, space) else { return };
                self.spaces[space].move_all(AddressRange::ALL, actions);
            }
            Op::Sync { start, len } => {
                let shared = self.spaces[space].sync(*start, *len, actions);
                self.elsewhere(space, &shared, actions);
            }
            op => self.spaces[space].change(op, actions),
        }
    }

    /// The file folios that have been written back are write-protected in every space that shares
    /// them: in those that `fork` made.
    fn elsewhere(&self, here: usize, shared: &[(u32, AddressRange)], actions: &mut Vec<Action>) {
        if shared.is_empty() {
            return;
        }
        for (id, space) in
            self.spaces.iter().enumerate().filter(|(id, space)| *id != here && space.users > 0)
        {
            debug_assert_eq!(id, space.id);
            space.written_back(shared, actions);
        }
    }

    /// The space of another process that a call names, or of the caller.
    fn space_or(&self, process: Option<u32>, own: usize) -> Option<usize> {
        match process {
            None => Some(own),
            Some(pid) => self.space_of(pid),
        }
    }

    /// The space of a task. One that the recording begins with is new.
    fn enter(&mut self, pid: u32, actions: &mut Vec<Action>) -> usize {
        let process = *self.tasks.entry(pid).or_insert(pid);
        if let Some(space) = self.processes.get(&process) {
            return *space;
        }
        let space = self.create(Space::default(), actions);
        self.processes.insert(process, space);
        space
    }

    fn create(&mut self, space: Space, actions: &mut Vec<Action>) -> usize {
        let id = self.spaces.len();
        actions.push(Action::Created { space: id, mappings: space.mappings() });
        self.spaces.push(space.named(id));
        id
    }

    fn clone_task(
        &mut self,
        parent: u32,
        child: u32,
        shares_memory: bool,
        thread: bool,
        actions: &mut Vec<Action>,
    ) {
        let process = self.tasks[&parent];
        // A number that was in use: the task it belonged to has ended, and nobody said so.
        if self.tasks.contains_key(&child) && child != parent {
            if self.processes.contains_key(&child) {
                self.end_process(child, actions)
            } else {
                self.end_task(child, actions)
            }
        }
        self.ended.remove(&child);
        let Some(space) = self.processes.get(&process).copied() else { return };
        if thread {
            self.tasks.insert(child, process);
            return;
        }
        let space = if shares_memory {
            self.spaces[space].users += 1;
            space
        } else {
            let copy = self.spaces[space].fork(actions);
            self.create(copy, actions)
        };
        self.tasks.insert(child, child);
        self.processes.insert(child, space);
    }

    /// Whichever thread calls it, the process goes on with that one task, under the process's own
    /// number.
    fn exec(&mut self, pid: u32, actions: &mut Vec<Action>) {
        let process = self.tasks[&pid];
        self.end_tasks(process);
        self.ended.remove(&process);
        self.ended.remove(&pid);
        self.tasks.insert(process, process);
        if let Some(space) = self.processes.remove(&process) {
            self.leave(space, actions);
        }
        let space = self.create(Space::default(), actions);
        self.processes.insert(process, space);
    }

    /// All tasks of a process end; they are heard of no more.
    fn end_tasks(&mut self, process: u32) {
        let ended = &mut self.ended;
        self.tasks.retain(|pid, of| {
            let stays = *of != process;
            if !stays {
                ended.insert(*pid);
            }
            stays
        });
    }

    fn end_process(&mut self, pid: u32, actions: &mut Vec<Action>) {
        let Some(process) = self.tasks.get(&pid).copied() else { return };
        self.end_tasks(process);
        if let Some(space) = self.processes.remove(&process) {
            self.leave(space, actions);
        }
    }

    /// One task ends; with the last one its process.
    fn end_task(&mut self, pid: u32, actions: &mut Vec<Action>) {
        let Some(process) = self.tasks.remove(&pid) else { return };
        if self.tasks.values().any(|of| *of == process) {
            return;
        }
        if let Some(space) = self.processes.remove(&process) {
            self.leave(space, actions);
        }
    }

    fn leave(&mut self, space: usize, actions: &mut Vec<Action>) {
        let users = &mut self.spaces[space].users;
        *users = users.saturating_sub(1);
        if *users == 0 {
            actions.push(Action::Released { space });
            let all = self.spaces[space].clear();
            let then = Change::Unmapped(all);
            actions.push(Action::Invalidate {
                space,
                range: AddressRange::ALL,
                event: Event::Unmap,
                then,
            });
        }
    }
}
