//! The rows of the registration cache and of userfaultfd.

use crate::Row;
use crate::devices::random;
use crate::harness::{Harness, middle};
use futures::executor::block_on;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use shootdown::cache::{Device, RegistrationCache};
use shootdown::source::Uffd;
use shootdown::{AddressRange, AddressSpace};
use std::hint::black_box;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const ENTRIES: u64 = 10_000;

/// Registers at once.
struct Nic;

impl Device for Nic {
    type Handle = u64;
    type Error = std::io::Error;

    async fn register(&self, range: AddressRange) -> std::io::Result<u64> {
        Ok(range.start())
    }

    async fn deregister(&self, _range: AddressRange, _handle: &u64) -> std::io::Result<()> {
        Ok(())
    }
}

fn page(at: u64) -> AddressRange {
    AddressRange::new((at * 2 + 1) * PAGE, PAGE).unwrap()
}

fn look_up(cache: &RegistrationCache<Nic>, times: u64, pages: &[AddressRange], from: usize) {
    block_on(async {
        for at in from..from + times as usize {
            drop(black_box(cache.get(pages[at & (pages.len() - 1)]).await.unwrap()));
        }
    });
}

pub fn measure(harness: &mut Harness, rows: &mut Vec<Row>) {
    // These goals are times, not ratios to a calibration on another machine.
    let mut add = |name: &str, goal_ns, measured_ns| rows.push(Row::new(name.into(), None, goal_ns, goal_ns, measured_ns));
    let space = AddressSpace::new();
    let cache = RegistrationCache::new(&space, Nic);
    let mut next = random(3);
    let pages: Vec<_> = (0..crate::DRAWN).map(|_| page(next() % ENTRIES)).collect();
    block_on(async {
        for at in 0..ENTRIES {
            drop(cache.get(page(at)).await.unwrap());
        }
    });
    let mut at = 0;
    let hit = harness.median("cache hit", |times| {
        look_up(&cache, times, &pages, at);
        at += times as usize;
    });
    add("cache: a hit among 10,000", 60.0, hit);

    // Both threads at once, each as often as one alone: what one look-up takes then.
    let beside = |threads: u64| {
        let times = 300_000;
        let samples = (0..7).map(|_| {
            let began = Instant::now();
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    let (cache, pages) = (&cache, &pages);
                    scope.spawn(move || look_up(cache, times, pages, thread as usize * 1000));
                }
            });
            began.elapsed().as_nanos() as f64 / times as f64
        });
        middle(samples.collect())
    };
    let (one, two) = (beside(1), beside(2));
    add("cache: a hit beside a second thread (1.5 times as long)", one * 1.5, two);

    // A thousand misses of a new cache, the time of its end left out; the median of 100.
    let misses = (0..100).map(|_| {
        let cache = RegistrationCache::new(&AddressSpace::new(), Nic);
        let began = Instant::now();
        block_on(async {
            for at in 0..1000 {
                drop(cache.get(page(at)).await.unwrap());
            }
        });
        began.elapsed().as_nanos() as f64 / 1000.0
    });
    let miss = middle(misses.collect());
    add("cache: a miss, beside the device's own registration", 1000.0, miss);

    match unmap() {
        Ok((watched, not)) => add("munmap of a watched page, over one that is not", 15_000.0, watched - not),
        Err(error) => println!("left out: munmap of a watched page, because {error}"),
    }
}

/// Nanoseconds until `munmap` has returned, watched and not.
fn unmap() -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space)?;
    let threads = [std::thread::spawn(move || reader.run()), std::thread::spawn(move || deliveries.run())];
    let time = |watch: bool, times: &mut Vec<f64>| -> Result<(), Box<dyn std::error::Error>> {
        for _ in 0..200 {
            // SAFETY: a new mapping where the kernel chooses.
            let at = unsafe {
                mmap_anonymous(std::ptr::null_mut(), PAGE as usize, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
            };
            let range = AddressRange::new(at.addr() as u64, PAGE)?;
            let _watch = watch.then(|| uffd.watch(range)).transpose()?;
            let device = space.insert(range, crate::devices::Device::new(crate::devices::Kind::Single))?;
            let began = Instant::now();
            // SAFETY: nothing refers to the memory.
            unsafe { munmap(at, PAGE as usize)? };
            times.push(began.elapsed().as_nanos() as f64);
            block_on(device.read_begin());
            // The threads of the source come to rest.
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    };
    // In turns, because the machine changes its speed.
    let (mut watched, mut not) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        time(true, &mut watched)?;
        time(false, &mut not)?;
    }
    let result = (middle(watched), middle(not));
    uffd.stop();
    for thread in threads {
        thread.join().map_err(|_| "a thread of the source has panicked")??;
    }
    Ok(result)
}
