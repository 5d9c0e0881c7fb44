//! The rows of the registration cache and of userfaultfd.

use crate::Row;
use crate::curves::Curve;
use crate::devices::random;
use crate::harness::{Harness, middle};
use futures::FutureExt;
use futures::executor::block_on;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use shootdown::cache::{Device, RegistrationCache, StillRegistered};
use shootdown::source::Uffd;
use shootdown::{AddressRange, AddressSpace, Event};
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

    async fn deregister(
        &self,
        _range: AddressRange,
        _handle: u64,
    ) -> Result<(), StillRegistered<u64, std::io::Error>> {
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
    let mut add = |name: &str, goal_ns, measured_ns| {
        rows.push(Row::new(name.into(), None, goal_ns, goal_ns, measured_ns))
    };
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

    match changes(1, Change::Unmap) {
        Ok(cost) => add("munmap of a watched page, over one that is not", 15_000.0, cost.more),
        Err(error) => println!("left out: munmap of a watched page, because {error}"),
    }
    for (pages, more, wait) in [(1, 15_000.0, 60_000.0), (1000, 60_000.0, 120_000.0)] {
        match changes(pages, Change::Discard) {
            Ok(cost) => {
                add(
                    &format!(
                        "madvise(DONTNEED) of {pages} watched pages, over as many that are not"
                    ),
                    more,
                    cost.more,
                );
                add(
                    &format!("a reader right after madvise(DONTNEED) of {pages} pages waits"),
                    wait,
                    cost.wait,
                );
            }
            Err(error) => println!("left out: madvise of {pages} watched pages, because {error}"),
        }
    }
}

const LOOK_UP: &str = "cache: a look-up, by registrations";
const REGISTERING: &str = "cache: a miss and its end, beside others that register";
const LEAVING: &str = "cache: a miss and its end, beside others that were invalidated in use";

const OTHERS: [u64; 5] = [1, 16, 256, 4096, 16_000];

/// Registers at once what lies high, and what lies low never.
struct Stuck;

impl Device for Stuck {
    type Handle = u64;
    type Error = std::io::Error;

    async fn register(&self, range: AddressRange) -> std::io::Result<u64> {
        if range.start() < HIGH * PAGE { std::future::pending().await } else { Ok(range.start()) }
    }

    async fn deregister(
        &self,
        _range: AddressRange,
        _handle: u64,
    ) -> Result<(), StillRegistered<u64, std::io::Error>> {
        Ok(())
    }
}

const HIGH: u64 = 1 << 30;

/// A registration that comes, and goes by an invalidation: as many are left as before.
fn come_and_go<D: Device>(space: &AddressSpace, cache: &RegistrationCache<D>, times: u64) {
    block_on(async {
        for at in 0..times {
            let range = page(HIGH + at % 64);
            drop(black_box(cache.get(range).await.unwrap()));
            drop(space.invalidate(range, Event::Unmap).await);
        }
    });
}

/// K4: costs against what they must not depend on.
pub fn curves(harness: &mut Harness) -> Vec<Curve> {
    let curve = |name, x, points: Vec<(f64, f64)>| Curve { name, x, y: "ns", points };
    let look_up = OTHERS.map(|others| {
        let cache = RegistrationCache::new(&AddressSpace::new(), Nic);
        let mut next = random(3);
        let pages: Vec<_> = (0..crate::DRAWN).map(|_| page(next() % others)).collect();
        (0..others).for_each(|at| drop(block_on(cache.get(page(at))).unwrap()));
        let mut at = 0;
        let ns = harness.median(&format!("{LOOK_UP} {others}"), |times| {
            self::look_up(&cache, times, &pages, at);
            at += times as usize;
        });
        (others as f64, ns)
    });
    let registering = OTHERS.map(|others| {
        let space = AddressSpace::new();
        let cache = RegistrationCache::new(&space, Stuck);
        let mut gets: Vec<_> = (0..others).map(|at| Box::pin(cache.get(page(at)))).collect();
        gets.iter_mut().for_each(|get| assert!(get.as_mut().now_or_never().is_none()));
        let ns = harness
            .median(&format!("{REGISTERING} {others}"), |times| come_and_go(&space, &cache, times));
        (others as f64, ns)
    });
    let leaving = OTHERS.map(|others| {
        let space = AddressSpace::new();
        let cache = RegistrationCache::new(&space, Nic);
        let held: Vec<_> = (0..others).map(|at| block_on(cache.get(page(at))).unwrap()).collect();
        let all = AddressRange::new(0, HIGH * PAGE).unwrap();
        let mut unmap = Box::pin(space.invalidate(all, Event::Unmap));
        assert!(unmap.as_mut().now_or_never().is_none());
        let ns = harness
            .median(&format!("{LEAVING} {others}"), |times| come_and_go(&space, &cache, times));
        drop(held);
        (others as f64, ns)
    });
    vec![
        curve(LOOK_UP, "registrations", look_up.to_vec()),
        curve(REGISTERING, "registering", registering.to_vec()),
        curve(LEAVING, "leaving", leaving.to_vec()),
    ]
}

/// What the curves promise, as rows: 16,000 times as many cost a miss at most four times as much,
/// and a look-up, which touches one of them at random, eight times (they no longer fit the nearest
/// cache).
pub fn bounds(curves: &[Curve]) -> Vec<Row> {
    let of = |curve: &Curve| match curve.points[..] {
        [first, .., last] => (first.1 * if curve.name == LOOK_UP { 8.0 } else { 4.0 }, last.1),
        _ => (0.0, f64::NAN),
    };
    let row = |curve| {
        let (bound, measured) = of(curve);
        Row::new(format!("{}: 16,000", curve.name), None, bound, bound, measured)
    };
    curves.iter().map(row).collect()
}

/// What a program does to memory.
#[derive(Clone, Copy)]
enum Change {
    Unmap,
    /// `madvise(DONTNEED)`, and then it is unmapped by the way.
    Discard,
}

/// What a change of watched memory costs, in nanoseconds.
struct Cost {
    /// Until the call has returned, over the same where nobody watches.
    more: f64,
    /// From then until a reader of the range has begun.
    wait: f64,
}

fn changes(pages: usize, change: Change) -> Result<Cost, Box<dyn std::error::Error>> {
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space)?;
    let threads =
        [std::thread::spawn(move || reader.run()), std::thread::spawn(move || deliveries.run())];
    let len = pages * PAGE as usize;
    let time = |watch: bool,
                times: &mut Vec<f64>,
                waits: &mut Vec<f64>|
     -> Result<(), Box<dyn std::error::Error>> {
        for _ in 0..200 / pages.isqrt() {
            // SAFETY: a new mapping where the kernel chooses.
            let at = unsafe {
                mmap_anonymous(
                    std::ptr::null_mut(),
                    len,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE,
                )?
            };
            // SAFETY: the new mapping, which nothing refers to.
            unsafe { at.cast::<u8>().write_bytes(1, len) };
            let range = AddressRange::new(at.addr() as u64, len as u64)?;
            let watched = watch.then(|| uffd.watch(range)).transpose()?;
            let device =
                space.insert(range, crate::devices::Device::new(crate::devices::Kind::Single))?;
            let began = Instant::now();
            // SAFETY: nothing refers to the memory.
            unsafe {
                match change {
                    Change::Unmap => munmap(at, len)?,
                    Change::Discard => madvise(at, len, Advice::LinuxDontNeed)?,
                }
            }
            let returned = Instant::now();
            block_on(device.read_begin());
            let waited = returned.elapsed();
            times.push(returned.duration_since(began).as_nanos() as f64);
            waits.push(waited.as_nanos() as f64);
            drop(watched);
            if let Change::Discard = change {
                // SAFETY: nothing refers to the memory.
                unsafe { munmap(at, len)? };
            }
            // The threads of the source come to rest.
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    };
    // In turns, because the machine changes its speed.
    let (mut watched, mut waits, mut not) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..20 {
        time(true, &mut watched, &mut waits)?;
        time(false, &mut not, &mut Vec::new())?;
    }
    let cost = Cost { more: middle(watched) - middle(not), wait: middle(waits) };
    uffd.stop();
    for thread in threads {
        thread.join().map_err(|_| "a thread of the source has panicked")??;
    }
    Ok(cost)
}
