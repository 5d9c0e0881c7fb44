//! The threads that change memory, and the one that only looks.

use crate::Counts;
use crate::episode::{Current, Episode, fill};
use crate::memory::PAGE;
use futures::executor::block_on;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mremap_fixed, munmap,
};
use shootdown::AddressRange;
use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Pages of a slot.
pub const PAGES: usize = 16;

const RIGHTS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Memory at one address, changed by one thread.
pub struct Slot {
    at: usize,
    /// The stamp that each page holds, as far as it was said.
    stamps: [AtomicU64; PAGES],
    /// Where pages are moved to.
    aside: usize,
}

fn pointer(at: usize) -> *mut c_void {
    ptr::with_exposed_provenance_mut(at)
}

fn map(at: usize, pages: usize, flags: MapFlags) -> usize {
    // SAFETY: new memory where the kernel chooses or in a slot, into which there are no references.
    unsafe { mmap_anonymous(pointer(at), pages * PAGE, RIGHTS, MapFlags::PRIVATE | flags) }
        .expect("mmap")
        .expose_provenance()
}

impl Slot {
    pub fn new(own: usize) -> Self {
        // Far below everything else: the kernel maps what asks for no address as high as it can,
        // and so never into a hole that is left here for a moment.
        let at = map(0x2000_0000_0000 + (own << 30), 2 * PAGES + 2, MapFlags::FIXED_NOREPLACE);
        // A page that nobody can map at, so that the slot and what is aside stay apart.
        for border in [at + PAGES * PAGE, at + (2 * PAGES + 1) * PAGE] {
            // SAFETY: ours.
            unsafe {
                rustix::mm::mprotect(pointer(border), PAGE, rustix::mm::MprotectFlags::empty())
            }
            .expect("mprotect");
        }
        let slot = Self { at, stamps: Default::default(), aside: at + (PAGES + 1) * PAGE };
        slot.write(0, PAGES, 1);
        slot
    }

    fn page(&self, page: usize) -> usize {
        self.at + page * PAGE
    }

    pub fn range(&self, from: usize, pages: usize) -> AddressRange {
        AddressRange::new(self.page(from) as u64, (pages * PAGE) as u64).expect("pages are a range")
    }

    /// Writes a stamp all over some pages, then says so.
    fn write(&self, from: usize, pages: usize, stamp: u64) {
        for page in from..from + pages {
            let words = pointer(self.page(page)).cast::<u64>();
            // SAFETY: mapped by the owner, who alone writes it.
            (0..PAGE / 8).for_each(|word| unsafe { words.add(word).write_volatile(stamp) });
            self.stamps[page].store(stamp, Ordering::SeqCst);
        }
    }

    fn said(&self, from: usize, pages: usize) -> Vec<u64> {
        self.stamps[from..from + pages].iter().map(|stamp| stamp.load(Ordering::SeqCst)).collect()
    }

    /// Changes some pages, as programs do.
    fn change(&self, random: &mut StdRng, from: usize, pages: usize) {
        let (at, len) = (self.page(from), pages * PAGE);
        // SAFETY: pages of this slot, which is this thread's; there are no references into it.
        unsafe {
            match kind(random) {
                0 => {
                    munmap(pointer(at), len).expect("munmap");
                    map(at, pages, MapFlags::FIXED);
                }
                1 => assert_ne!(map(at, pages, MapFlags::FIXED), 0),
                2 => madvise(pointer(at), len, Advice::LinuxDontNeed).expect("MADV_DONTNEED"),
                3 => {
                    // Freed pages may stay as they are, so they are discarded, too.
                    madvise(pointer(at), len, Advice::LinuxFree).expect("MADV_FREE");
                    madvise(pointer(at), len, Advice::LinuxDontNeed).expect("MADV_DONTNEED");
                }
                4 => {
                    // One by one: the kernel moves no range of several mappings.
                    let aside = self.aside + from * PAGE;
                    for offset in (0..pages).map(|page| page * PAGE) {
                        mremap_fixed(
                            pointer(at + offset),
                            PAGE,
                            PAGE,
                            MremapFlags::MAYMOVE,
                            pointer(aside + offset),
                        )
                        .expect("mremap");
                    }
                    map(at, pages, MapFlags::FIXED);
                    madvise(pointer(aside), len, Advice::LinuxDontNeed).expect("MADV_DONTNEED");
                }
                _ => (0..pages).for_each(|page| {
                    assert_ne!(map(self.page(from + page), 1, MapFlags::FIXED), 0)
                }),
            }
        }
    }
}

/// A kind of change; one alone with `SOAK_CHANGE`.
fn kind(random: &mut StdRng) -> u64 {
    let any = random.random_range(0..6);
    crate::number("SOAK_CHANGE", any)
}

/// The first word of each page of a range, read through the page table as a device does.
pub fn first_words(range: AddressRange) -> io::Result<Vec<u64>> {
    let pages = range.len().unwrap_or(0) as usize / PAGE;
    let mut words = vec![0_u64; pages];
    for (page, word) in words.iter_mut().enumerate() {
        let local = libc::iovec { iov_base: ptr::from_mut(word).cast(), iov_len: 8 };
        let remote =
            libc::iovec { iov_base: pointer(range.start() as usize + page * PAGE), iov_len: 8 };
        // SAFETY: `local` names eight bytes of ours; the kernel checks `remote`.
        if unsafe {
            libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
        } != 8
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(words)
}

/// Compares what was found with what had been said before it was asked for. No stamp at all is new
/// memory that was not written yet.
fn compare(counts: &Counts, of: &str, said: &[u64], found: &[u64]) {
    for (page, (said, found)) in said.iter().zip(found).enumerate() {
        if *found != 0 && found < said {
            counts.stale(format!(
                "{of} has stamp {found} of page {page}, which held {said} before it was asked"
            ));
        }
    }
}

fn some_pages(random: &mut StdRng) -> (usize, usize) {
    let from = random.random_range(0..PAGES);
    (from, random.random_range(1..=(PAGES - from).min(4)))
}

fn look_up(episode: &Episode, slot: &Slot, (from, pages): (usize, usize), counts: &Counts) {
    let said = slot.said(from, pages);
    match block_on(episode.cache.get(slot.range(from, pages))) {
        Ok(found) => {
            let skip =
                ((slot.range(from, pages).start() - found.range().start()) / PAGE as u64) as usize;
            compare(counts, "the cache", &said, &found.handle()[skip..]);
            counts.look_ups.fetch_add(1, Ordering::Relaxed);
        }
        Err(_) => drop(counts.refused.fetch_add(1, Ordering::Relaxed)),
    }
}

/// Changes and looks up, for ever.
pub fn own(own: usize, seed: u64, slot: &Slot, current: &Current, counts: &Counts) {
    let mut random = StdRng::seed_from_u64(seed.wrapping_mul(31).wrapping_add(own as u64));
    let mut stamp = 1;
    let mut heap: Vec<Vec<u64>> = Vec::new();
    loop {
        let episode = current.get();
        let mirror = episode.mirror(slot);
        while Arc::ptr_eq(&episode, &current.get()) {
            counts.progress[own].fetch_add(1, Ordering::Relaxed);
            let (from, pages) = some_pages(&mut random);
            slot.change(&mut random, from, pages);
            stamp += 1;
            counts.changes.fetch_add(1, Ordering::Relaxed);
            if random.random_ratio(1, 2) {
                // Looked up before anything is written: whatever it holds is gone.
                look_up(&episode, slot, (from, pages), counts);
            }
            slot.write(from, pages, stamp);
            look_up(&episode, slot, some_pages(&mut random), counts);
            let said = slot.said(0, PAGES);
            let _ = fill(&episode.uffd, &mirror);
            let sequence = block_on(mirror.read_begin());
            let found = mirror
                .0
                .install(&mirror, sequence, |copy| copy.as_ref().map(|(words, _)| words.clone()));
            if let Ok(Some(found)) = found {
                compare(counts, "the mirror", &said, &found);
                counts.mirrored.fetch_add(1, Ordering::Relaxed);
            }
            read_into_heap(&episode, &mut random, &mut heap, counts);
        }
    }
}

/// Reads a file through a fixed buffer of a ring into memory of the allocator, which comes and
/// goes, and looks at every byte.
fn read_into_heap(
    episode: &Episode,
    random: &mut StdRng,
    heap: &mut Vec<Vec<u64>>,
    counts: &Counts,
) {
    let Some(rings) = &episode.rings else { return };
    if heap.len() > 8 || random.random_ratio(1, 4) && !heap.is_empty() {
        heap.swap_remove(random.random_range(0..heap.len()));
    }
    let words = random.random_range(2..40) * PAGE / 8;
    heap.push(vec![0; words]);
    let at = random.random_range(0..heap.len());
    let buffer = &mut heap[at];
    // A whole page of it, wherever that begins.
    let skip = buffer.as_ptr().addr().next_multiple_of(PAGE) - buffer.as_ptr().addr();
    let page = &mut buffer[skip / 8..][..PAGE / 8];
    page.fill(0);
    let Ok(range) = AddressRange::new(page.as_mut_ptr().expose_provenance() as u64, PAGE as u64)
    else {
        return;
    };
    let Ok(registration) = block_on(rings.cache.get(range)) else {
        counts.refused.fetch_add(1, Ordering::Relaxed);
        return;
    };
    let block = random.random_range(0..rings.file.blocks());
    // The registration is of the page that is there: nobody has given the buffer back meanwhile,
    // and it stays while it is held.
    if rings.cache.device().ring.read(&rings.file, block, *registration.handle(), range).is_err() {
        counts.refused.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let word = rings.file.word(block);
    // SAFETY: the kernel has written the page; each word is read as it is now.
    let wrong =
        page.iter().position(|found| unsafe { ptr::from_ref(found).read_volatile() } != word);
    if let Some(wrong) = wrong {
        counts.stale(format!(
            "a read through a fixed buffer went elsewhere: word {wrong} of the page is {:#x}, not {word:#x}",
            page[wrong]
        ));
    }
    counts.ring_reads.fetch_add(1, Ordering::Relaxed);
}

/// Looks at everybody's memory, for ever.
pub fn look(seed: u64, slots: &[Arc<Slot>], current: &Current, counts: &Counts) {
    let mut random = StdRng::seed_from_u64(seed ^ 0x5eed);
    loop {
        let slot = &slots[random.random_range(0..slots.len())];
        look_up(&current.get(), slot, some_pages(&mut random), counts);
        if let Some(progress) = counts.progress.last() {
            progress.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Forks a child that drops what it has of the source and goes.
pub fn fork(episode: &Arc<Episode>, counts: &Counts) {
    let mut handles = Some((episode.uffd.clone(), episode.cache.clone()));
    // SAFETY: the child calls nothing but drops that do nothing there, and `_exit`.
    let process = unsafe { libc::fork() };
    if process == 0 {
        drop(handles.take());
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    let (began, mut status) = (Instant::now(), 0);
    // SAFETY: a child of ours, and a number of ours.
    while unsafe { libc::waitpid(process, &raw mut status, libc::WNOHANG) } == 0 {
        if began.elapsed() > Duration::from_secs(20) {
            counts.stale(String::from("a child of a fork hangs when it drops its handles"));
            return;
        }
        std::thread::yield_now();
    }
    counts.forks.fetch_add(1, Ordering::Relaxed);
}
