//! What one call does to one address space.

use super::area::{Area, Areas, Inherit, pages};
use super::{Access, Action, Change, PAGE};
use crate::recording::{Advice, Op, Prot, Remap};
use shootdown::{AddressRange, Event};

/// Linux unmaps folio by folio when it reclaims or moves memory. Which folios there are is not in a
/// recording: they are taken as pages, and as larger ones where a call would have more than these.
const MOST_FOLIOS: u64 = 256;
const HUGE: u64 = 2 << 20;

/// An address space.
#[derive(Clone, Debug, Default)]
pub(super) struct Space {
    pub(super) id: usize,
    /// Processes (not threads) that live in it.
    pub(super) users: usize,
    areas: Areas,
    brk: Option<u64>,
    /// How many mappings have been told apart.
    origins: u32,
}

impl Space {
    /// With a number of its own, and one process in it.
    pub(super) fn named(self, id: usize) -> Self {
        Self { id, users: 1, ..self }
    }

    pub(super) fn mappings(&self) -> Vec<(AddressRange, Access)> {
        self.areas.iter().map(|(range, area)| (range, area.access())).collect()
    }

    /// The last user has left; returns what was mapped.
    pub(super) fn clear(&mut self) -> Vec<AddressRange> {
        std::mem::take(&mut self.areas).iter().map(|(range, _)| range).collect()
    }

    /// `fork`: private memory that was written becomes read-only until it is written again, area by
    /// area. Returns what the child has.
    pub(super) fn fork(&mut self, actions: &mut Vec<Action>) -> Self {
        let mut child = Self { areas: Areas::default(), ..self.clone() };
        let mut protect = Vec::new();
        for (range, area) in self.areas.iter() {
            match area.inherit {
                Inherit::Nothing => continue,
                Inherit::Empty => {
                    child.areas.insert(range, Area { written: false, resident: false, ..*area })
                }
                Inherit::Copy => {
                    child.areas.insert(range, *area);
                    if area.private && area.written {
                        protect.push((range, *area));
                    }
                }
            }
        }
        for (range, area) in protect {
            // For huge pages the kernel says so in other words.
            let event = if area.huge { Event::Clear } else { Event::ProtectionPage };
            self.invalidate(range, event, Change::Protected(area.access()), actions);
        }
        child
    }

    pub(super) fn change(&mut self, op: &Op, actions: &mut Vec<Action>) {
        match *op {
            Op::Map { at, len, prot, kind } => {
                let (private, anonymous, huge, marks) =
                    (kind.private(), kind.anonymous(), kind.huge(), kind.marks);
                let origin = if anonymous && private { 0 } else { self.origin() };
                let written = prot.write && (anonymous || !private);
                let len =
                    if huge { len.checked_next_multiple_of(HUGE).unwrap_or(len) } else { len };
                self.map(
                    pages(at, len),
                    Area { private, anonymous, huge, marks, origin, written, ..Area::of(prot) },
                    actions,
                );
            }
            Op::Unmap { start, len } => self.unmap(pages(start, len), actions),
            Op::Remap(ref remap) => self.remap(**remap, actions),
            Op::Brk { result } => self.brk(result, actions),
            Op::Advise { start, len, advice, partial } => {
                self.advise(start, len, advice, partial, actions)
            }
            Op::Protect { start, len, prot, key, partial } => {
                if let Some(range) =
                    pages(start, len).filter(|range| !partial || self.has_hole(*range))
                {
                    self.protect(range, prot, key, partial, actions);
                }
            }
            Op::Mark { start, len, set, clear, .. } => {
                if let Some(range) = pages(start, len.min(u64::MAX - start)) {
                    self.areas.change(range, |area| area.marks = area.marks & !clear | set);
                }
            }
            Op::Bind { start, len } => {
                if let Some(range) = pages(start, len) {
                    self.move_all(range, actions);
                }
            }
            // Emulated since Linux 4.0: what is there is unmapped, and mapped again with another
            // offset.
            Op::MapAnew { start, len } => {
                let Some(range) = pages(start, len) else { return };
                let Some((_, area)) = self.areas.within(range).next() else { return };
                let origin = self.origin();
                self.map(Some(range), Area { origin, ..area }, actions);
            }
            Op::Attach { at, len, prot } => {
                let origin = self.origin();
                self.map(pages(at, len), Area { attached: at, origin, ..Area::of(prot) }, actions);
            }
            Op::Detach { at } => {
                let parts: Vec<AddressRange> = self
                    .areas
                    .iter()
                    .filter(|(_, area)| area.attached == at && at != 0)
                    .map(|(range, _)| range)
                    .collect();
                parts.into_iter().for_each(|part| self.unmap(Some(part), actions));
            }
            _ => {}
        }
    }

    fn origin(&mut self) -> u32 {
        self.origins = self.origins.saturating_add(1);
        self.origins
    }

    fn invalidate(
        &self,
        range: AddressRange,
        event: Event,
        then: Change,
        actions: &mut Vec<Action>,
    ) {
        actions.push(Action::Invalidate { space: self.id, range, event, then });
    }

    /// A new mapping. What was there is unmapped first: by `MAP_FIXED`, or by a call that the
    /// recording does not have.
    fn map(&mut self, range: Option<AddressRange>, area: Area, actions: &mut Vec<Action>) {
        let Some(range) = range else { return };
        self.unmap(Some(range), actions);
        self.areas.insert(range, area);
        actions.push(Action::Mapped { space: self.id, range, access: area.access() });
    }

    fn unmap(&mut self, range: Option<AddressRange>, actions: &mut Vec<Action>) {
        let Some(range) = range else { return };
        let gone = self.areas.cut(range);
        if !gone.is_empty() {
            self.invalidate(range, Event::Unmap, Change::Unmapped(gone), actions);
        }
    }

    fn remap(&mut self, remap: Remap, actions: &mut Vec<Action>) {
        let Some(to) = pages(remap.new, remap.new_len) else { return };
        let Some(from) = pages(remap.old, remap.old_len) else {
            // An old length of 0 makes a second mapping of shared pages: nothing goes away.
            let area = self.areas.within(to).next().map_or(Area::unknown(), |(_, area)| area);
            let of_old = pages(remap.old, 1).and_then(|old| self.areas.within(old).next());
            self.map(Some(to), of_old.map_or(area, |(_, area)| area), actions);
            return;
        };
        let area = self.areas.within(from).next().map_or(Area::unknown(), |(_, area)| area);
        if remap.fixed {
            self.unmap(Some(to), actions);
        }
        let tail = after(from, to.len()).filter(|_| to.len() < from.len());
        self.unmap(tail, actions);
        if to.start() == from.start() {
            // In place: only what is added is new to devices.
            let added = after(to, from.len()).filter(|_| to.len() > from.len());
            if added.is_some() {
                self.map(added, area, actions);
            }
            return;
        }
        let from = tail
            .and_then(|tail| AddressRange::try_from(from.start()..tail.start()).ok())
            .unwrap_or(from);
        // The page tables move. Then what is left, which is empty, is unmapped.
        self.invalidate(from, Event::Unmap, Change::Discarded, actions);
        if remap.keep_old {
            self.areas.change(from, |area| (area.written, area.resident) = (false, false));
        } else {
            self.unmap(Some(from), actions);
        }
        let origin = if area.written || !area.anonymous { self.origin() } else { area.origin };
        self.map(Some(to), Area { origin, ..area }, actions);
    }

    fn brk(&mut self, result: u64, actions: &mut Vec<Action>) {
        let up = |at: u64| at.checked_next_multiple_of(PAGE);
        let Some((old, new)) = self.brk.replace(result).and_then(up).zip(up(result)) else {
            return;
        };
        if new < old {
            self.unmap(AddressRange::try_from(new..old).ok(), actions);
        } else if let Ok(range) = AddressRange::try_from(old..new) {
            let prot = Prot { read: true, write: true, exec: false };
            self.map(
                Some(range),
                Area { private: true, anonymous: true, written: true, ..Area::of(prot) },
                actions,
            );
        }
    }

    pub(super) fn advise(
        &mut self,
        start: u64,
        len: u64,
        advice: Advice,
        partial: bool,
        actions: &mut Vec<Action>,
    ) {
        let Some(range) = pages(start, len).filter(|range| !partial || self.has_hole(*range))
        else {
            return;
        };
        let inherit = match advice {
            Advice::DontFork => Inherit::Nothing,
            Advice::WipeOnFork => Inherit::Empty,
            Advice::DoFork | Advice::KeepOnFork => Inherit::Copy,
            Advice::Discard | Advice::PageOut | Advice::Collapse => {
                let areas: Vec<_> = self.areas.within(range).collect();
                match advice {
                    Advice::Discard => {
                        areas.iter().for_each(|(part, _)| {
                            self.invalidate(*part, Event::Clear, Change::Discarded, actions)
                        });
                    }
                    Advice::PageOut => self.folios(&areas, PAGE, Event::Clear, actions),
                    _ => {
                        let huge =
                            areas.iter().filter_map(|(part, area)| Some((inner(*part)?, *area)));
                        self.folios(&huge.collect::<Vec<_>>(), HUGE, Event::Clear, actions);
                    }
                }
                if !partial {
                    self.learn(range, Area::unknown(), actions);
                }
                return;
            }
        };
        self.areas.change(range, |area| area.inherit = inherit);
    }

    /// Without a hole `ENOMEM` has another reason: too many mappings. What was done until then is
    /// not known.
    fn has_hole(&self, range: AddressRange) -> bool {
        !self.areas.holes(range).is_empty()
    }

    /// A call that succeeds on memory of which nothing is known says that there is a mapping: what
    /// `execve` mapped, or what was mapped before the recording began. Devices may have it from now
    /// on.
    fn learn(&mut self, range: AddressRange, area: Area, actions: &mut Vec<Action>) {
        for hole in self.areas.holes(range) {
            self.map(Some(hole), area, actions);
        }
    }

    fn protect(
        &mut self,
        range: AddressRange,
        prot: Prot,
        key: Option<u8>,
        partial: bool,
        actions: &mut Vec<Action>,
    ) {
        let mut next = Some(range.start());
        for (part, area) in self.areas.within(range).collect::<Vec<_>>() {
            // It stops at a hole. If the call succeeded there was none.
            if partial && next != Some(part.start()) {
                break;
            }
            next = part.last().checked_add(1);
            let key = key.unwrap_or(area.key);
            if (area.prot, area.key) == (prot, key) {
                continue;
            }
            // Who takes away the right to write has written: a loader, after relocation.
            if area.prot.write && !prot.write {
                self.areas.change_whole(part.start(), |area| area.written = true);
            }
            self.areas.change(part, |area| {
                area.written |= prot.write && (area.anonymous || !area.private);
                area.resident |= prot != Prot::default();
                (area.prot, area.key) = (prot, key);
            });
            self.invalidate(part, Event::ProtectionVma, Change::Protected(prot.into()), actions);
        }
        if !partial {
            self.learn(range, Area { prot, key: key.unwrap_or(0), ..Area::unknown() }, actions);
        }
    }

    /// Folios that are reclaimed or moved are unmapped one after the other.
    fn folios(
        &self,
        parts: &[(AddressRange, Area)],
        least: u64,
        event: Event,
        actions: &mut Vec<Action>,
    ) {
        let bytes = |range: AddressRange| range.len().unwrap_or(u64::MAX);
        let resident = || parts.iter().filter(|(_, area)| area.resident);
        let all: u64 = resident().map(|(part, _)| bytes(*part)).fold(0, u64::saturating_add);
        let size =
            all.div_ceil(MOST_FOLIOS).checked_next_power_of_two().unwrap_or(1 << 63).max(least);
        for (part, area) in resident() {
            let size = if area.huge { size.max(HUGE) } else { size };
            let mut start = part.start();
            loop {
                let last = (start | (size - 1)).min(part.last());
                let Ok(folio) = AddressRange::try_from(start..=last) else { break };
                let then = if event == Event::Clear {
                    Change::Discarded
                } else {
                    Change::Protected(area.access())
                };
                self.invalidate(folio, event, then, actions);
                match last.checked_add(1) {
                    Some(next) if last < part.last() => start = next,
                    _ => break,
                }
            }
        }
    }

    /// All folios in `range` move to another node.
    pub(super) fn move_all(&self, range: AddressRange, actions: &mut Vec<Action>) {
        self.folios(&self.areas.within(range).collect::<Vec<_>>(), PAGE, Event::Clear, actions);
    }

    pub(super) fn move_page(&self, page: u64, actions: &mut Vec<Action>) {
        if let Some(range) = pages(page, 1) {
            self.move_all(range, actions);
        }
    }

    /// Writes back what is dirty of shared files, and says what: files by number.
    pub(super) fn sync(
        &self,
        start: u64,
        len: u64,
        actions: &mut Vec<Action>,
    ) -> Vec<(u32, AddressRange)> {
        let Some(range) = pages(start, len) else { return Vec::new() };
        let dirty =
            |area: &Area| !area.private && !area.anonymous && area.attached == 0 && area.written;
        let parts: Vec<_> = self.areas.within(range).filter(|(_, area)| dirty(area)).collect();
        self.folios(&parts, PAGE, Event::ProtectionPage, actions);
        parts.into_iter().map(|(part, area)| (area.origin, part)).collect()
    }

    /// Another space has written back these parts of files.
    pub(super) fn written_back(&self, parts: &[(u32, AddressRange)], actions: &mut Vec<Action>) {
        for (origin, range) in parts {
            let here = |area: &Area| !area.private && area.origin == *origin && area.written;
            let parts: Vec<_> = self.areas.within(*range).filter(|(_, area)| here(area)).collect();
            self.folios(&parts, PAGE, Event::ProtectionPage, actions);
        }
    }
}

impl Area {
    /// A shared mapping of a file with this protection.
    fn of(prot: Prot) -> Self {
        Self { prot, written: prot.write, resident: prot != Prot::default(), ..Self::default() }
    }

    /// A mapping of which a recording says nothing: private memory that has been written.
    fn unknown() -> Self {
        let prot = Prot { read: true, write: true, exec: false };
        Self { private: true, anonymous: true, ..Self::of(prot) }
    }
}

/// What follows the first `len` bytes of `range`, to its end.
fn after(range: AddressRange, len: Option<u64>) -> Option<AddressRange> {
    AddressRange::try_from(range.start().checked_add(len?)?..=range.last()).ok()
}

/// The aligned 2 MiB inside.
fn inner(range: AddressRange) -> Option<AddressRange> {
    let start = range.start().checked_next_multiple_of(HUGE)?;
    let end = range.last().checked_add(1).unwrap_or(range.last()) / HUGE * HUGE;
    AddressRange::try_from(start..end).ok()
}
