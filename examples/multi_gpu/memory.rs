//! The address spaces of the recorded program: what is mapped, and which invalidations each call causes.
//!
//! The events and their order are those of the Linux code that the calls run (`mm/mmap.c`, `mm/mprotect.c`, `mm/madvise.c`,
//! `kernel/fork.c`).

use crate::strace::{Call, Op};
use shootdown::{AddressRange, Event};
use std::collections::{BTreeMap, HashMap};

const PAGE: u64 = 4096;

/// What the simulation has to do for one call, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// A new mapping, which devices may mirror from now on.
    Mapped { space: usize, range: AddressRange },
    /// `range` is invalidated; afterwards the mappings in `gone` are no more.
    Invalidate { space: usize, range: AddressRange, event: Event, gone: Vec<AddressRange> },
    /// A new address space, empty or (after `fork`) with copies of these mappings.
    Created { space: usize, mappings: Vec<AddressRange> },
    /// The last task of the space has left it.
    Released { space: usize },
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Area {
    last: u64,
    writable: bool,
    private: bool,
}

#[derive(Clone, Debug, Default)]
struct Space {
    /// By start; they do not overlap.
    areas: BTreeMap<u64, Area>,
    brk: Option<u64>,
    /// Processes (not threads) that live in it.
    users: usize,
}

/// A process: its address space. Threads share the entry of their process.
#[derive(Clone, Copy, Debug)]
struct Task {
    process: u32,
}

/// All address spaces of a recording.
#[derive(Debug, Default)]
pub struct Program {
    spaces: Vec<Space>,
    tasks: HashMap<u32, Task>,
    /// The space of each process.
    processes: HashMap<u32, usize>,
}

impl Program {
    /// How many address spaces there have been.
    pub fn spaces(&self) -> usize {
        self.spaces.len()
    }

    fn create(&mut self, space: Space, actions: &mut Vec<Action>) -> usize {
        let mappings = space.areas.iter().filter_map(|(start, area)| AddressRange::try_from(*start..=area.last).ok()).collect();
        self.spaces.push(Space { users: 1, ..space });
        actions.push(Action::Created { space: self.spaces.len() - 1, mappings });
        self.spaces.len() - 1
    }

    /// The space of a task. One that the recording begins with is new.
    fn space_of(&mut self, pid: u32, actions: &mut Vec<Action>) -> usize {
        let process = self.tasks.entry(pid).or_insert(Task { process: pid }).process;
        if let Some(space) = self.processes.get(&process) {
            return *space;
        }
        let space = self.create(Space::default(), actions);
        self.processes.insert(process, space);
        space
    }

    fn leave(&mut self, space: usize, actions: &mut Vec<Action>) {
        self.spaces[space].users -= 1;
        if self.spaces[space].users == 0 {
            self.spaces[space].areas.clear();
            actions.push(Action::Released { space });
        }
    }

    /// Carries out one call.
    pub fn run(&mut self, call: &Call) -> Vec<Action> {
        let mut actions = Vec::new();
        if matches!(call.op, Op::Failed | Op::NoEffect) {
            return actions;
        }
        let id = self.space_of(call.pid, &mut actions);
        match call.op {
            Op::Clone { child, shares_memory, thread } => {
                let parent = self.tasks[&call.pid].process;
                if thread {
                    self.tasks.insert(child, Task { process: parent });
                    return actions;
                }
                self.tasks.insert(child, Task { process: child });
                let space = if shares_memory {
                    self.spaces[id].users += 1;
                    id
                } else {
                    // Copy-on-write: the parent's private writable pages become read-only.
                    let areas = self.spaces[id].areas.clone();
                    for (start, area) in areas.iter().filter(|(_, area)| area.private && area.writable) {
                        if let Ok(range) = AddressRange::try_from(*start..=area.last) {
                            actions.push(Action::Invalidate { space: id, range, event: Event::ProtectionPage, gone: Vec::new() });
                        }
                    }
                    let copy = self.spaces[id].clone();
                    self.create(copy, &mut actions)
                };
                self.processes.insert(child, space);
            }
            Op::Exec => {
                self.leave(id, &mut actions);
                // Whichever thread called it, it goes on as the process.
                let process = self.tasks[&call.pid].process;
                self.tasks.retain(|pid, task| task.process != process || *pid == process || *pid == call.pid);
                let space = self.create(Space::default(), &mut actions);
                self.processes.insert(process, space);
            }
            Op::Exit => {
                let process = self.tasks[&call.pid].process;
                self.tasks.retain(|_, task| task.process != process);
                if self.processes.remove(&process).is_some() {
                    self.leave(id, &mut actions);
                }
            }
            _ => self.spaces[id].change(id, &call.op, &mut actions),
        }
        actions
    }
}

/// The whole pages of `len` bytes at `start`, as the kernel rounds them.
fn pages(start: u64, len: u64) -> Option<AddressRange> {
    let end = start.checked_add(len)?.checked_next_multiple_of(PAGE)?;
    AddressRange::try_from(start - start % PAGE..end).ok()
}

impl Space {
    /// The parts of areas that lie in `range`.
    fn within(&self, range: AddressRange) -> Vec<(AddressRange, Area)> {
        let first = self.areas.range(..=range.start()).next_back().map_or(range.start(), |(start, _)| *start);
        let overlapping = self.areas.range(first..=range.last());
        overlapping
            .filter_map(|(start, area)| {
                let of_area = AddressRange::try_from(*start..=area.last).ok()?;
                Some((of_area.intersection(range)?, *area))
            })
            .collect()
    }

    /// Cuts `range` out of the areas; returns what was there.
    fn cut(&mut self, range: AddressRange) -> Vec<AddressRange> {
        let cut = self.within(range);
        for (part, _) in &cut {
            self.split_at(part.start());
            if let Some(next) = part.last().checked_add(1) {
                self.split_at(next);
            }
            self.areas.remove(&part.start());
        }
        cut.into_iter().map(|(part, _)| part).collect()
    }

    /// Makes an area begin at `address`, if one lies there.
    fn split_at(&mut self, address: u64) {
        let Some((_, area)) = self.areas.range_mut(..address).next_back() else { return };
        if area.last >= address {
            let upper = *area;
            area.last = address - 1;
            self.areas.insert(address, upper);
        }
    }

    fn map(&mut self, id: usize, range: AddressRange, area: Area, actions: &mut Vec<Action>) {
        self.areas.insert(range.start(), Area { last: range.last(), ..area });
        actions.push(Action::Mapped { space: id, range });
    }

    fn unmap(&mut self, id: usize, range: AddressRange, actions: &mut Vec<Action>) {
        let gone = self.cut(range);
        if !gone.is_empty() {
            actions.push(Action::Invalidate { space: id, range, event: Event::Unmap, gone });
        }
    }

    fn change(&mut self, id: usize, op: &Op, actions: &mut Vec<Action>) {
        match *op {
            Op::Map { at, len, writable, private, .. } => {
                let Some(range) = pages(at, len) else { return };
                // Only `MAP_FIXED` can find something there; if a recording says otherwise, what was there is gone too.
                self.unmap(id, range, actions);
                self.map(id, range, Area { last: range.last(), writable, private }, actions);
            }
            Op::Unmap { start, len } => {
                if let Some(range) = pages(start, len) {
                    self.unmap(id, range, actions);
                }
            }
            Op::Remap { old, old_len, new, new_len, keep_old } => {
                let Some(to) = pages(new, new_len) else { return };
                let from = pages(old, old_len);
                let area = from.and_then(|from| Some(self.within(from).first()?.1));
                let area = area.unwrap_or(Area { last: 0, writable: true, private: true });
                match from {
                    Some(from) if new == old => {
                        if let Some(tail) = to.last().checked_add(1).filter(|_| to.last() < from.last()) {
                            // Shrunk in place.
                            if let Ok(tail) = AddressRange::try_from(tail..=from.last()) {
                                self.unmap(id, tail, actions);
                            }
                        } else if to.last() > from.last() {
                            // Grown in place: only the new part is new to devices.
                            if let Ok(added) = AddressRange::try_from(from.last() + 1..=to.last()) {
                                self.unmap(id, added, actions);
                                self.map(id, added, area, actions);
                            }
                        }
                        return;
                    }
                    Some(from) if keep_old => {
                        // The pages move, the old area stays and is empty.
                        actions.push(Action::Invalidate { space: id, range: from, event: Event::Unmap, gone: Vec::new() });
                    }
                    Some(from) => self.unmap(id, from, actions),
                    // An old length of 0 makes a second mapping of shared pages: nothing goes away.
                    None => {}
                }
                self.unmap(id, to, actions);
                self.map(id, to, area, actions);
            }
            Op::Brk { result } => {
                let Some(old) = self.brk.replace(result) else { return };
                let (old, new) = (old.next_multiple_of(PAGE), result.next_multiple_of(PAGE));
                if new < old {
                    if let Ok(range) = AddressRange::try_from(new..old) {
                        self.unmap(id, range, actions);
                    }
                } else if let Ok(range) = AddressRange::try_from(old..new) {
                    self.unmap(id, range, actions);
                    self.map(id, range, Area { last: range.last(), writable: true, private: true }, actions);
                }
            }
            Op::Advise { start, len, ref advice } => {
                let discards =
                    ["MADV_DONTNEED", "MADV_DONTNEED_LOCKED", "MADV_FREE", "MADV_REMOVE", "MADV_PAGEOUT", "MADV_COLLAPSE"];
                if discards.contains(&advice.as_str()) {
                    self.touch(id, pages(start, len), Event::Clear, actions);
                }
            }
            Op::Protect { start, len, writable } => {
                let Some(range) = pages(start, len) else { return };
                let parts = self.within(range);
                // `mprotect_fixup` returns early where nothing changes. Only write permission is modelled.
                if parts.iter().all(|(_, area)| area.writable == writable) {
                    return;
                }
                for (part, area) in parts {
                    self.split_at(part.start());
                    if let Some(next) = part.last().checked_add(1) {
                        self.split_at(next);
                    }
                    self.areas.insert(part.start(), Area { last: part.last(), writable, ..area });
                }
                self.touch(id, Some(range), Event::ProtectionVma, actions);
            }
            Op::MovePages { start, len } => self.touch(id, pages(start, len), Event::Migrate { owner: None }, actions),
            _ => {}
        }
    }

    /// Invalidates what is mapped in `range`, which stays mapped.
    fn touch(&self, id: usize, range: Option<AddressRange>, event: Event, actions: &mut Vec<Action>) {
        if let Some(range) = range.filter(|range| !self.within(*range).is_empty()) {
            actions.push(Action::Invalidate { space: id, range, event, gone: Vec::new() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strace::parse;

    fn range(start: u64, end: u64) -> AddressRange {
        AddressRange::try_from(start..end).unwrap()
    }

    /// What the last line causes.
    fn last(lines: &[&str]) -> Vec<Action> {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let mut program = Program::default();
        parse(&text, false).unwrap().calls.iter().map(|call| program.run(call)).last().unwrap()
    }

    fn unmapped(start: u64, end: u64, gone: &[(u64, u64)]) -> Action {
        let gone = gone.iter().map(|(start, end)| range(*start, *end)).collect();
        Action::Invalidate { space: 0, range: range(start, end), event: Event::Unmap, gone }
    }

    const MAP: &str = "1 1.000000 mmap(NULL, 16384, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x10000";

    #[test]
    fn munmap_of_parts_leaves_the_rest() {
        assert_eq!(last(&[MAP, "1 1.000001 munmap(0x11000, 4096) = 0"]), [unmapped(0x11000, 0x12000, &[(0x11000, 0x12000)])]);
        let again = last(&[MAP, "1 1.000001 munmap(0x11000, 4096) = 0", "1 1.000002 munmap(0x10000, 16384) = 0"]);
        assert_eq!(again, [unmapped(0x10000, 0x14000, &[(0x10000, 0x11000), (0x12000, 0x14000)])]);
        assert_eq!(last(&[MAP, "1 1.000001 munmap(0x90000, 4096) = 0"]), [], "nothing was there");
    }

    #[test]
    fn map_fixed_over_an_existing_mapping_unmaps_it_first() {
        let over = "1 1.000001 mmap(0x12000, 8192, PROT_READ, MAP_PRIVATE|MAP_FIXED, 3, 0) = 0x12000";
        let mapped = Action::Mapped { space: 0, range: range(0x12000, 0x14000) };
        assert_eq!(last(&[MAP, over]), [unmapped(0x12000, 0x14000, &[(0x12000, 0x14000)]), mapped]);
    }

    #[test]
    fn mremap_moves_shrinks_and_grows() {
        let moved = "1 1.000001 mremap(0x10000, 16384, 32768, MREMAP_MAYMOVE) = 0x50000";
        let mapped = Action::Mapped { space: 0, range: range(0x50000, 0x58000) };
        assert_eq!(last(&[MAP, moved]), [unmapped(0x10000, 0x14000, &[(0x10000, 0x14000)]), mapped]);
        let shrunk = "1 1.000001 mremap(0x10000, 16384, 4096, 0) = 0x10000";
        assert_eq!(last(&[MAP, shrunk]), [unmapped(0x11000, 0x14000, &[(0x11000, 0x14000)])]);
        let grown = "1 1.000001 mremap(0x10000, 16384, 20480, 0) = 0x10000";
        assert_eq!(last(&[MAP, grown]), [Action::Mapped { space: 0, range: range(0x14000, 0x15000) }]);
    }

    #[test]
    fn brk_goes_both_ways() {
        let began = "1 1.000000 brk(NULL) = 0x5000";
        let up = "1 1.000001 brk(0x8000) = 0x8000";
        assert_eq!(last(&[began, up]), [Action::Mapped { space: 0, range: range(0x5000, 0x8000) }]);
        assert_eq!(last(&[began, up, "1 1.000002 brk(0x6000) = 0x6000"]), [unmapped(0x6000, 0x8000, &[(0x6000, 0x8000)])]);
        assert_eq!(last(&[began, up, "1 1.000002 brk(0xff0000000) = 0x8000"]), [], "refused: the break stays");
    }

    #[test]
    fn madvise_counts_by_advice_and_mprotect_where_it_changes_something() {
        let clear = |event| Action::Invalidate { space: 0, range: range(0x10000, 0x11000), event, gone: vec![] };
        assert_eq!(last(&[MAP, "1 1.000001 madvise(0x10000, 4096, MADV_DONTNEED) = 0"]), [clear(Event::Clear)]);
        assert_eq!(last(&[MAP, "1 1.000001 madvise(0x10000, 4096, MADV_HUGEPAGE) = 0"]), []);
        assert_eq!(last(&[MAP, "1 1.000001 mprotect(0x10000, 4096, PROT_READ) = 0"]), [clear(Event::ProtectionVma)]);
        assert_eq!(last(&[MAP, "1 1.000001 mprotect(0x10000, 4096, PROT_READ|PROT_WRITE) = 0"]), []);
    }

    #[test]
    fn threads_share_an_address_space_and_processes_do_not() {
        let thread = "1 1.000001 clone3({flags=CLONE_VM|CLONE_THREAD, exit_signal=0}, 88) = 2";
        assert_eq!(
            last(&[MAP, thread, "2 1.000002 munmap(0x10000, 16384) = 0"]),
            [unmapped(0x10000, 0x14000, &[(0x10000, 0x14000)])]
        );
        let fork = "1 1.000001 clone(child_stack=NULL, flags=SIGCHLD) = 3";
        let made = last(&[MAP, fork]);
        assert!(matches!(made[0], Action::Invalidate { space: 0, event: Event::ProtectionPage, .. }), "{made:?}");
        assert_eq!(made[1], Action::Created { space: 1, mappings: vec![range(0x10000, 0x14000)] });
        let of_child = last(&[MAP, fork, "3 1.000002 munmap(0x10000, 16384) = 0"]);
        assert!(matches!(of_child[..], [Action::Invalidate { space: 1, .. }]));
    }

    #[test]
    fn exit_and_execve_release_the_space_of_the_last_process_in_it() {
        assert_eq!(last(&[MAP, "1 1.000001 exit_group(0) = ?"]), [Action::Released { space: 0 }]);
        let exec = "1 1.000001 execve(\"a\", [], 0x7f /* 1 var */) = 0";
        assert_eq!(last(&[MAP, exec]), [Action::Released { space: 0 }, Action::Created { space: 1, mappings: vec![] }]);
        let vfork = "1 1.000001 vfork() = 4";
        let child_execs = "4 1.000002 execve(\"a\", [], 0x7f /* 1 var */) = 0";
        assert_eq!(
            last(&[MAP, vfork, child_execs]),
            [Action::Created { space: 1, mappings: vec![] }],
            "the parent lives on in the space that it lent"
        );
    }
}
