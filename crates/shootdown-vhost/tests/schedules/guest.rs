//! The guest: memory, an IOMMU's page table, split rings, and what must be true of its buffers.

use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

pub const PAGE: u64 = 0x1000;
/// Pages of memory; those of the rings come first.
pub const PAGES: u64 = 40;
pub const QUEUES: u16 = 2;
/// Descriptors of a ring.
pub const SIZE: u16 = 8;
/// The front-end's address of the guest's memory.
pub const USER: u64 = 0x7f00_0000_0000;
/// The first I/O virtual address that is used.
const IOVA: u64 = 0xffff_0000;
/// What is in pages that no request has.
const FOREIGN: u64 = 0xfefe_fefe_fefe_fefe;

/// A request, as the guest knows it.
#[derive(Debug)]
pub struct Request {
    pub token: u64,
    pub head: u16,
    /// Pages by I/O virtual page: of the token, of the table, of the buffer.
    pub pages: Vec<(u64, u64)>,
    /// Those of the buffer.
    buffer: Vec<u64>,
    /// The length of the buffer in bytes.
    pub len: u64,
    /// Its pages were taken away while it was in flight.
    pub orphaned: bool,
}

#[derive(Debug, Default)]
pub struct Queue {
    pub requests: Vec<Request>,
    next_available: u16,
    next_used: u16,
}

pub struct Guest {
    pub file: OwnedFd,
    memory: MmapRegion,
    /// Which page of memory each I/O virtual page is.
    pub table: BTreeMap<u64, u64>,
    free: Vec<u64>,
    free_iovas: Vec<u64>,
    pub queues: Vec<Queue>,
    event_idx: bool,
    /// Without an IOMMU: addresses are those of memory.
    identity: bool,
}

/// Requests have different tokens in all guests.
static TOKENS: AtomicU64 = AtomicU64::new(1);

/// The I/O virtual address of a part of a ring: descriptors, available, used.
pub fn ring_iova(queue: u16, part: u64) -> u64 {
    0x10_0000 + (u64::from(queue) * 3 + part) * PAGE
}

impl Guest {
    pub fn new(random: &mut SmallRng, event_idx: bool) -> Self {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, PAGES * PAGE).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap().into(), 0);
        let memory = MmapRegion::from_file(offset, (PAGES * PAGE) as usize).unwrap();
        let queues = (0..QUEUES).map(|_| Queue::default()).collect();
        let mut guest = Self {
            file,
            memory,
            table: BTreeMap::new(),
            free: Vec::new(),
            free_iovas: Vec::new(),
            queues,
            event_idx,
            identity: false,
        };
        guest.reset(random);
        guest
    }

    /// As after a reset of the device: nothing is in flight, all pages are somebody else's.
    pub fn reset(&mut self, random: &mut SmallRng) {
        self.table.clear();
        self.free = (u64::from(QUEUES) * 3..PAGES).collect();
        self.free_iovas = (0..24).map(|at| IOVA / PAGE + at).collect();
        for page in self.free.clone() {
            self.fill(page, FOREIGN);
        }
        for at in (1..self.free.len()).rev() {
            self.free.swap(at, random.random_range(0..=at));
        }
        for queue in 0..QUEUES {
            for part in 0..3 {
                let page = u64::from(queue) * 3 + part;
                self.fill(page, 0);
                self.table.insert(ring_iova(queue, part) / PAGE, page);
            }
            self.queues[usize::from(queue)] = Queue::default();
        }
    }

    /// From now on without an IOMMU.
    pub fn identity(&mut self) {
        self.identity = true;
        self.free.sort_unstable_by(|one, other| other.cmp(one));
    }

    fn fill(&self, page: u64, word: u64) {
        (0..PAGE / 8).step_by(64).for_each(|at| self.put(page * PAGE + at * 8, word));
        self.put(page * PAGE + PAGE - 8, word);
    }

    fn put(&self, at: u64, word: u64) {
        self.memory.as_volatile_slice().store(word, at as usize, Ordering::Relaxed).unwrap();
    }

    fn word(&self, at: u64) -> u64 {
        self.memory.as_volatile_slice().load(at as usize, Ordering::Relaxed).unwrap()
    }

    fn short(&self, at: u64) -> u16 {
        self.memory.as_volatile_slice().load(at as usize, Ordering::Acquire).unwrap()
    }

    fn put_short(&self, at: u64, value: u16) {
        self.memory.as_volatile_slice().store(value, at as usize, Ordering::Release).unwrap();
    }

    pub fn first_word(&self, page: u64) -> u64 {
        self.word(page * PAGE)
    }

    /// The first word of a page that is not `word`, among those that are looked at.
    fn differs(&self, page: u64, word: u64) -> Option<u64> {
        let looked = (0..PAGE / 8).step_by(64).chain([PAGE / 8 - 1]);
        looked.map(|at| self.word(page * PAGE + at * 8)).find(|found| *found != word)
    }

    /// Maps so many pages at contiguous I/O virtual addresses.
    fn map(&mut self, count: usize, word: u64) -> Option<Vec<(u64, u64)>> {
        let iovas = &mut self.free_iovas;
        let at = (0..iovas.len()).find(|at| {
            let run = &iovas[*at..];
            run.len() >= count && (1..count).all(|next| run[next] == run[0] + next as u64)
        })?;
        if self.free.len() < count {
            return None;
        }
        let iovas: Vec<_> = iovas.drain(at..at + count).collect();
        let mut pages: Vec<_> =
            iovas.into_iter().map(|iova| (iova, self.free.pop().unwrap())).collect();
        if self.identity {
            // Contiguous as long as nothing is given back out of order.
            pages.iter_mut().for_each(|(iova, page)| *iova = *page);
        }
        for (iova, page) in &pages {
            self.table.insert(*iova, *page);
            self.fill(*page, word);
        }
        Some(pages)
    }

    fn unmap_from_table(&mut self, pages: &[(u64, u64)]) {
        self.table.retain(|iova, _| !pages.iter().any(|(unmapped, _)| unmapped == iova));
    }

    /// The device cannot reach these any more: they become somebody else's. Addresses of an orphan
    /// are not used again before the device has read its descriptors.
    pub fn give_back(&mut self, pages: &[(u64, u64)]) {
        for (iova, page) in pages {
            self.fill(*page, FOREIGN);
            self.free.insert(0, *page);
            let orphans = self
                .queues
                .iter()
                .flat_map(|queue| &queue.requests)
                .filter(|request| request.orphaned);
            if !orphans.flat_map(|request| &request.pages).any(|(of_orphan, _)| of_orphan == iova) {
                self.give_address_back(*iova);
            }
        }
    }

    fn give_address_back(&mut self, iova: u64) {
        let at = self.free_iovas.partition_point(|free| *free < iova);
        self.free_iovas.insert(at, iova);
    }

    /// Makes a request available. Says whether there was room.
    pub fn submit(&mut self, queue: u16, random: &mut SmallRng) -> bool {
        let taken: Vec<_> =
            self.queues[usize::from(queue)].requests.iter().map(|request| request.head).collect();
        // Two descriptors for each.
        let Some(head) = (0..SIZE / 2).map(|at| at * 2).find(|head| !taken.contains(head)) else {
            return false;
        };
        let token = TOKENS.fetch_add(1, Ordering::Relaxed);
        let (count, indirect) = (random.random_range(1..=3), random.random_bool(0.3));
        let needed = count + 1 + usize::from(indirect);
        if self.free.len() < needed || self.free_iovas.len() < needed {
            return false;
        }
        let Some(buffer) = self.map(count, 0) else { return false };
        let mut pages = self.map(1 + usize::from(indirect), 0).unwrap_or_default();
        if pages.is_empty() {
            self.unmap_from_table(&buffer);
            self.give_back(&buffer);
            return false;
        }
        self.put(pages[0].1 * PAGE, token);
        let length = (count as u64 * PAGE) as u32;
        let descriptors = [(pages[0].0 * PAGE, 8, 1, 1), (buffer[0].0 * PAGE, length, 2, 0)];
        let ring = u64::from(queue) * 3 * PAGE;
        if indirect {
            let table = pages[1];
            for (at, (address, len, flags, next)) in (0..).zip(descriptors) {
                self.descriptor(table.1 * PAGE, at, address, len, flags, next);
            }
            self.descriptor(ring, u64::from(head), table.0 * PAGE, 32, 4, 0);
        } else {
            for (at, (address, len, flags, next)) in (0..).zip(descriptors) {
                self.descriptor(ring, u64::from(head) + at, address, len, flags, head + next);
            }
        }
        let available = ring + PAGE;
        let state = &mut self.queues[usize::from(queue)];
        let index = state.next_available;
        state.next_available = index.wrapping_add(1);
        let words = buffer.iter().map(|(_, page)| *page).collect();
        pages.extend(buffer);
        state.requests.push(Request {
            token,
            head,
            pages,
            buffer: words,
            len: u64::from(length),
            orphaned: false,
        });
        self.put_short(available + 4 + 2 * u64::from(index % SIZE), head);
        if self.event_idx {
            // Wants to be called at the next one.
            self.put_short(
                available + 4 + 2 * u64::from(SIZE),
                self.queues[usize::from(queue)].next_used,
            );
        }
        self.put_short(available + 2, index.wrapping_add(1));
        true
    }

    fn descriptor(&self, table: u64, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let base = table + at * 16;
        self.put(base, address);
        self.put(base + 8, u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48);
    }

    /// Takes a request that the device has completed, and checks its buffer. Its pages are not the
    /// device's any more.
    pub fn completed(&mut self, queue: u16) -> Result<Option<Request>, String> {
        let used = (u64::from(queue) * 3 + 2) * PAGE;
        let (index, next) = (self.short(used + 2), self.queues[usize::from(queue)].next_used);
        if index == next {
            return Ok(None);
        }
        let entry = self.word(used + 4 + 8 * u64::from(next % SIZE) - 4) >> 32;
        let state = &mut self.queues[usize::from(queue)];
        state.next_used = next.wrapping_add(1);
        let at = state.requests.iter().position(|request| u64::from(request.head) == entry);
        let request =
            state.requests.remove(at.ok_or(format!("completed: {entry}, which is not in flight"))?);
        if !request.orphaned {
            for page in &request.buffer {
                if let Some(found) = self.differs(*page, request.token) {
                    return Err(format!(
                        "request {} is complete, and its buffer has {found}",
                        request.token
                    ));
                }
            }
            self.unmap_from_table(&request.pages);
            // From now on the device must not touch them, whatever it remembers.
            request.pages.iter().for_each(|(_, page)| self.fill(*page, FOREIGN));
        }
        if request.orphaned {
            let still: Vec<_> = request.pages.iter().map(|(iova, _)| *iova).collect();
            still.into_iter().for_each(|iova| self.give_address_back(iova));
        }
        Ok(Some(request))
    }

    /// Takes the pages of a request away that is in flight, as a driver in user space may.
    pub fn orphan(&mut self, random: &mut SmallRng) -> Option<Vec<(u64, u64)>> {
        let queue = random.random_range(0..QUEUES);
        let requests = &mut self.queues[usize::from(queue)].requests;
        // The oldest: the device is likely to have it.
        let request =
            requests.iter_mut().find(|request| !request.orphaned && random.random_bool(0.7))?;
        request.orphaned = true;
        let pages = request.pages.clone();
        self.unmap_from_table(&pages);
        Some(pages)
    }

    /// No page that is nobody's may have changed.
    pub fn check(&self) -> Result<(), String> {
        for page in &self.free {
            if let Some(found) = self.differs(*page, FOREIGN) {
                return Err(format!("page {page} is nobody's, and has {found:#x}"));
            }
        }
        Ok(())
    }
}
