//! What a thousand unmappings cost a driver whose device takes 50 µs to flush: told of each by
//! itself, and told of many at once.

use crate::bounds::{self, Bound};
use crate::harness::middle;
use futures::channel::oneshot;
use futures::executor::block_on;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use serde::Serialize;
use shootdown::source::{Deliveries, Reader, Uffd};
use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture,
    RangeSet, Subscription, WouldBlock,
};
use std::collections::BTreeSet;
use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// Unmapped one by one: every other page of a mapping, so that no two of them are one range.
const PAGES: u64 = 1000;
/// What the device takes for a flush, of however many pages.
const FLUSH: Duration = Duration::from_micros(50);
const RUNS: usize = 15;

/// Flushes, one after the other. A thread that is done with each at its time: it yields until then,
/// because a sleep of 50 µs takes twice as long. It ends with the last sender.
fn device(commands: &Receiver<oneshot::Sender<()>>) {
    while let Ok(done) = commands.recv() {
        let began = Instant::now();
        while began.elapsed() < FLUSH {
            std::thread::yield_now();
        }
        // Whoever waited may be gone.
        let _: Result<(), ()> = done.send(());
    }
}

/// A driver with one notifier for all of the memory, as a GPU's for its address space.
struct Gpu {
    page_table: DriverLock<BTreeSet<u64>>,
    commands: Sender<oneshot::Sender<()>>,
    flushes: Arc<AtomicU64>,
}

impl IntervalNotifier for Gpu {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let mut page_table = self.page_table.lock_for(invalidation);
        let mut zapped = false;
        for range in invalidation.ranges() {
            let pages: Vec<u64> = page_table.range(range.start()..=range.last()).copied().collect();
            for page in pages {
                zapped |= page_table.remove(&page);
            }
        }
        if !zapped {
            return Ok(None);
        }
        // One command for all of them.
        self.flushes.fetch_add(1, Ordering::Relaxed);
        let (done, fence) = oneshot::channel();
        self.commands.send(done).expect("the device runs as long as it has a driver");
        Ok(Some(PassFuture::new(
            async move { fence.await.expect("the device answers every command") },
        )))
    }
}

/// Memory that a GPU has mapped.
struct Memory {
    space: AddressSpace,
    range: AddressRange,
    gpu: Subscription<Gpu>,
    flushes: Arc<AtomicU64>,
}

type Failure = Box<dyn Error + Send + Sync>;

impl Memory {
    fn new() -> Result<Self, Failure> {
        let len = PAGES * 2 * PAGE;
        // SAFETY: a new mapping where the kernel chooses.
        let at = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        // SAFETY: the new mapping, which nothing refers to.
        unsafe { at.cast::<u8>().write_bytes(1, len as usize) };
        let range = AddressRange::new(at.addr() as u64, len)?;
        let (space, flushes) = (AddressSpace::new(), Arc::new(AtomicU64::new(0)));
        let (commands, received) = channel();
        std::thread::spawn(move || device(&received));
        let page_table = (0..PAGES).map(|page| range.start() + page * 2 * PAGE).collect();
        let gpu =
            Gpu { page_table: DriverLock::new(page_table), commands, flushes: flushes.clone() };
        let gpu = space.insert(range, gpu)?;
        Ok(Self { space, range, gpu, flushes })
    }

    fn page(&self, number: u64) -> Result<AddressRange, Failure> {
        Ok(AddressRange::new(self.range.start() + number * 2 * PAGE, PAGE)?)
    }

    fn unmap(&self, number: u64) -> Result<(), Failure> {
        let at = std::ptr::without_provenance_mut(self.page(number)?.start() as usize);
        // SAFETY: a page of the mapping, which nothing refers to.
        unsafe { munmap(at, PAGE as usize)? };
        Ok(())
    }

    /// Runs `unmap_all`, and waits until the device uses nothing of it any more.
    fn time(&self, unmap_all: impl FnOnce() -> Result<(), Failure>) -> Result<Run, Failure> {
        let before = self.flushes.load(Ordering::Relaxed);
        let began = Instant::now();
        unmap_all()?;
        block_on(self.gpu.read_begin());
        let took = began.elapsed();
        assert!(
            self.gpu.page_table.lock().is_empty(),
            "a page that was unmapped is in the page table"
        );
        Ok(Run { flushes: self.flushes.load(Ordering::Relaxed) - before, took })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // The pages in between are left. What was unmapped may be somebody else's by now.
        for page in 0..PAGES {
            let at = std::ptr::without_provenance_mut(
                (self.range.start() + (page * 2 + 1) * PAGE) as usize,
            );
            // SAFETY: a page of the mapping, which nothing refers to.
            let unmapped = unsafe { munmap(at, PAGE as usize) };
            unmapped.expect("a page that was mapped can be unmapped");
        }
    }
}

struct Run {
    flushes: u64,
    took: Duration,
}

/// How the driver hears of it.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// The program invalidates each page and unmaps it.
    EachByHand,
    /// The program invalidates all of them at once, and unmaps them.
    AllByHand,
    /// One thread reads an event and delivers it, in turns.
    InTurns,
    /// A thread reads, and another one awaits the delivery of what was read while the device
    /// flushed.
    WhileItFlushes,
    /// A thread reads, and another one is in `Deliveries::run`.
    Run,
}

/// Each with the number of threads that unmap.
const WAYS: [(Way, u64, &str); 7] = [
    (Way::EachByHand, 1, "by hand: each invalidated, then unmapped"),
    (Way::AllByHand, 1, "by hand: one invalidate_all, then each unmapped"),
    (Way::InTurns, 1, "Uffd, 1 thread unmaps: an event read, delivered, in turns"),
    (Way::WhileItFlushes, 1, "Uffd, 1 thread unmaps: Reader::run, and deliver() awaited"),
    (Way::Run, 1, "Uffd, 1 thread unmaps: Reader::run and Deliveries::run"),
    (Way::WhileItFlushes, 16, "Uffd, 16 threads unmap: Reader::run, and deliver() awaited"),
    (Way::Run, 16, "Uffd, 16 threads unmap: Reader::run and Deliveries::run"),
];

fn run(way: Way, unmapping: u64) -> Result<Run, Failure> {
    let memory = Memory::new()?;
    match way {
        Way::EachByHand => memory.time(|| {
            (0..PAGES).try_for_each(|page| {
                let guard = block_on(memory.space.invalidate(memory.page(page)?, Event::Unmap));
                let unmapped = memory.unmap(page);
                drop(guard);
                unmapped
            })
        }),
        Way::AllByHand => memory.time(|| {
            let pages = (0..PAGES).map(|page| memory.page(page)).collect::<Result<Vec<_>, _>>()?;
            let guard = block_on(memory.space.invalidate_all(RangeSet::new(pages)?, Event::Unmap));
            (0..PAGES).try_for_each(|page| memory.unmap(page))?;
            drop(guard);
            Ok(())
        }),
        Way::InTurns | Way::WhileItFlushes | Way::Run => by_uffd(way, unmapping, &memory),
    }
}

fn by_uffd(way: Way, unmapping: u64, memory: &Memory) -> Result<Run, Failure> {
    let (uffd, reader, deliveries) = Uffd::open(&memory.space)?;
    let watch = uffd.watch(memory.range)?;
    // All are running before the first page is unmapped.
    let ready = Barrier::new(if way == Way::InTurns { 2 } else { 3 });
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads = match way {
            Way::InTurns => vec![scope.spawn(|| in_turns(reader, deliveries, &ready, &stop))],
            _ => vec![
                scope.spawn(|| read(reader, &ready)),
                scope.spawn(|| deliver(way, deliveries, &ready, &stop)),
            ],
        };
        ready.wait();
        let run = memory.time(|| {
            std::thread::scope(|scope| {
                let unmap = |first| {
                    move || {
                        (first..PAGES)
                            .step_by(unmapping as usize)
                            .try_for_each(|page| memory.unmap(page))
                    }
                };
                let threads: Vec<_> =
                    (1..unmapping).map(|first| scope.spawn(unmap(first))).collect();
                unmap(0)()?;
                threads.into_iter().try_for_each(|thread| {
                    thread.join().map_err(|_| "a thread that unmaps has panicked")?
                })
            })
        });
        // What is left of the watch is told of by whoever still runs.
        drop(watch);
        stop.store(true, Ordering::Relaxed);
        uffd.stop();
        for thread in threads {
            thread.join().map_err(|_| "a thread of the source has panicked")??;
        }
        run
    })
}

/// A moment after which a loop looks whether it is to stop.
const MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

fn in_turns(
    mut reader: Reader,
    mut deliveries: Deliveries,
    ready: &Barrier,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    ready.wait();
    while !stop.load(Ordering::Relaxed) {
        if poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&MOMENT))? > 0 {
            reader.read()?;
            block_on(deliveries.deliver())?;
        }
    }
    Ok(())
}

fn read(mut reader: Reader, ready: &Barrier) -> Result<(), Failure> {
    ready.wait();
    Ok(reader.run()?)
}

fn deliver(
    way: Way,
    mut deliveries: Deliveries,
    ready: &Barrier,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    ready.wait();
    if way == Way::Run {
        return Ok(deliveries.run()?);
    }
    while !stop.load(Ordering::Relaxed) {
        if poll(&mut [PollFd::new(&deliveries, PollFlags::IN)], Some(&MOMENT))? > 0 {
            block_on(deliveries.deliver())?;
        }
    }
    Ok(())
}

/// Medians of the runs.
#[derive(Serialize)]
struct Told {
    way: &'static str,
    flushes: f64,
    /// From the first unmapping until all have returned and the device uses none of the pages.
    ms: f64,
}

#[derive(Default, Serialize)]
pub struct Batches {
    ways: Vec<Told>,
    pub rows: Vec<Bound>,
}

/// Without rows where userfaultfd cannot be used.
pub fn measure() -> Batches {
    let mut runs: [Vec<Run>; WAYS.len()] = Default::default();
    // In turns, because the machine changes its speed.
    for _ in 0..RUNS {
        for (runs, (way, unmapping, name)) in runs.iter_mut().zip(WAYS) {
            match run(way, unmapping) {
                Ok(run) => runs.push(run),
                Err(error) => {
                    println!("left out: a thousand unmappings, because of {name}: {error}");
                    return Batches::default();
                }
            }
        }
    }
    let ways = runs.into_iter().zip(WAYS).map(|(runs, (.., way))| Told {
        way,
        flushes: middle(runs.iter().map(|run| run.flushes as f64).collect()),
        ms: middle(runs.iter().map(|run| run.took.as_secs_f64() * 1e3).collect()),
    });
    let ways: Vec<Told> = ways.collect();
    let flushes = |of: (Way, u64)| {
        let flushes = ways
            .iter()
            .zip(WAYS)
            .find(|(_, (way, unmapping, _))| (*way, *unmapping) == of)
            .map(|(told, _)| told.flushes);
        flushes.unwrap_or(f64::NAN)
    };
    let rows = vec![
        Bound::new(
            "flushes for 1,000 unmappings by one invalidate_all",
            "",
            1.0,
            flushes((Way::AllByHand, 1)),
        ),
        Bound::new(
            "… of 16 threads that userfaultfd reports, Deliveries::run",
            "",
            250.0,
            flushes((Way::Run, 16)),
        ),
    ];
    Batches { ways, rows }
}

impl Batches {
    pub fn print(&self) {
        println!("\n{:<58} {:>9} {:>9}", "1,000 pages unmapped, flush of 50 µs", "flushes", "ms");
        for Told { way, flushes, ms } in &self.ways {
            println!("{way:<58} {flushes:>9.0} {ms:>9.1}");
        }
        bounds::print("batches", &self.rows);
    }
}
