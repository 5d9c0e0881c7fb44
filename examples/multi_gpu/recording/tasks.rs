//! Who made a call, where a line does not say so.

use super::call::Op;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// The tasks of a recording. strace writes their numbers only while there are several.
#[derive(Debug)]
pub(super) struct Tasks {
    /// The number that a line without one gets while nothing is known.
    own: u32,
    /// What `own` turned out to be.
    found: Option<u32>,
    live: BTreeSet<u32>,
    seen: HashSet<u32>,
    /// Processes that strace attached to, with how many threads have not been seen yet.
    attached: BTreeMap<u32, u32>,
    last: Option<u32>,
}

impl Tasks {
    pub(super) fn new(own: u32) -> Self {
        Self {
            own,
            found: None,
            live: BTreeSet::new(),
            seen: HashSet::new(),
            attached: BTreeMap::new(),
            last: None,
        }
    }

    /// The task of a line; and what it says of the task, if it is new.
    pub(super) fn of_line(&mut self, written: Option<u32>) -> (u32, Option<Op>) {
        match written {
            Some(pid) if self.last == Some(pid) => (pid, None),
            Some(pid) => {
                self.last = Some(pid);
                (pid, self.meet(pid))
            }
            None => {
                self.last = None;
                let pid = match self.live.first() {
                    // The last one left: strace stopped to write the number.
                    Some(pid) if self.live.len() == 1 => *pid,
                    _ => self.found.unwrap_or(self.own),
                };
                self.live.insert(pid);
                (pid, None)
            }
        }
    }

    fn meet(&mut self, pid: u32) -> Option<Op> {
        self.live.insert(pid);
        if !self.seen.insert(pid) {
            return None;
        }
        // A thread has a higher number than its process, most of the time.
        let of = self.attached.range(..pid).next_back().or_else(|| self.attached.first_key_value());
        if let Some((&process, &left)) = of {
            if left > 1 {
                self.attached.insert(process, left - 1);
            } else {
                self.attached.remove(&process);
            }
            return Some(Op::ThreadOf { process });
        }
        if self.found.is_none() && self.live.remove(&self.own) {
            self.found = Some(pid);
        }
        None
    }

    /// `strace: Process 7 attached`, `… with 3 threads`
    pub(super) fn attached(&mut self, pid: u32, threads: u32) {
        self.live.insert(pid);
        self.seen.insert(pid);
        if threads > 1 {
            self.attached.insert(pid, threads - 1);
        }
    }

    pub(super) fn born(&mut self, pid: u32) {
        self.live.insert(pid);
        self.seen.insert(pid);
    }

    pub(super) fn gone(&mut self, pid: u32) {
        self.live.remove(&pid);
        self.seen.remove(&pid);
        if self.last == Some(pid) {
            self.last = None;
        }
    }

    /// The number for lines without one, and the one that it turned out to be.
    pub(super) fn renamed(&self) -> Option<(u32, u32)> {
        self.found.map(|found| (self.own, found))
    }
}
