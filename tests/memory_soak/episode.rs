//! A source with what uses it, from its beginning to its end.

use crate::memory::File;
use crate::owner::{PAGES, Slot};
use crate::ring::{Fixed, Ring};
use futures::executor::block_on;
use shootdown::cache::{Device, RegistrationCache, StillRegistered};
use shootdown::source::{Uffd, UffdBuilder, Unwatched, Watch};
use shootdown::{
    AddressRange, AddressSpace, DriverLock, IntervalNotifier, Invalidation, MirrorError,
    PassFuture, RetryBudget, Subscription, WouldBlock,
};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

/// Registers what is there: the first word of each page, read as a device reads, through the page
/// table.
pub struct Stamps;

impl Device for Stamps {
    type Handle = Vec<u64>;
    type Error = io::Error;

    async fn register(&self, range: AddressRange) -> io::Result<Vec<u64>> {
        crate::owner::first_words(range)
    }

    async fn deregister(
        &self,
        _: AddressRange,
        _: Vec<u64>,
    ) -> Result<(), StillRegistered<Vec<u64>, std::io::Error>> {
        Ok(())
    }
}

/// A driver that mirrors by hand: the same words, and the watch that they were read under.
#[derive(Default)]
pub struct Mirror(pub DriverLock<Option<(Vec<u64>, Watch)>>);

impl IntervalNotifier for Mirror {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        drop(self.0.lock_for(invalidation).take());
        Ok(None)
    }
}

/// The fixed buffers of a ring, and the file that is read through them.
pub struct Rings {
    pub cache: RegistrationCache<Fixed>,
    pub file: File,
}

pub struct Episode {
    pub uffd: Uffd,
    pub cache: RegistrationCache<Stamps>,
    /// `None` where io_uring is not permitted.
    pub rings: Option<Rings>,
    threads: Mutex<Option<(JoinHandle<()>, JoinHandle<()>)>>,
}

fn settings() -> UffdBuilder {
    let builder = Uffd::builder();
    // To see that the soak notices: without it, discards leave stale pages.
    if std::env::var_os("SOAK_NO_SETTLE").is_some() {
        builder.settle(Duration::ZERO)
    } else {
        builder
    }
}

impl Episode {
    pub fn begin(seed: u64) -> Arc<Self> {
        let space = AddressSpace::new();
        let (uffd, mut reader, mut deliveries) =
            settings().open(&space).expect("it was permitted before");
        // Each ends on its own thread, at once or when the other has: nobody else must wait for
        // that who changes watched memory meanwhile.
        let (reader_first, gone) =
            ((seed >> 1).is_multiple_of(2), Arc::new(AtomicBool::new(false)));
        let other = gone.clone();
        let reading = std::thread::spawn(move || {
            reader.run().expect("the reader fails");
            while !reader_first && !other.load(Ordering::Acquire) {
                reader.read().expect("the reader fails");
                std::thread::yield_now();
            }
            drop(reader);
            other.store(true, Ordering::Release);
        });
        let delivering = std::thread::spawn(move || {
            deliveries.run().expect("the deliveries fail");
            while reader_first && !gone.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            drop(deliveries);
            gone.store(true, Ordering::Release);
        });
        let limited = RegistrationCache::<Stamps>::builder()
            .max_registrations(if seed.is_multiple_of(2) { 8 } else { 1000 });
        let cache = limited.watch(uffd.clone()).build(&space, Stamps);
        let ring = Ring::new(64).ok().and_then(|ring| Some((ring, File::new().ok()?)));
        let rings = ring.map(|(ring, file)| {
            let builder = RegistrationCache::<Fixed>::builder().max_registrations(48);
            Rings { cache: builder.watch(uffd.clone()).build(&space, Fixed::new(ring)), file }
        });
        Arc::new(Self { uffd, cache, rings, threads: Mutex::new(Some((reading, delivering))) })
    }

    pub fn mirror(&self, slot: &Slot) -> Subscription<Mirror> {
        self.uffd
            .space()
            .insert(slot.range(0, PAGES), Mirror::default())
            .expect("the space is not released")
    }

    /// Ends the source.
    pub fn end(&self) {
        let (reading, delivering) = self.threads.lock().unwrap().take().expect("it ends once");
        self.uffd.stop();
        reading.join().expect("the reader panics");
        delivering.join().expect("the deliveries panic");
    }
}

/// Fills the mirror if it is empty.
pub fn fill(
    uffd: &Uffd,
    mirror: &Subscription<Mirror>,
) -> Result<(), MirrorError<Unwatched<String>>> {
    if mirror.0.lock().is_some() {
        return Ok(());
    }
    let range = mirror.range();
    let prepare =
        |_| async move { crate::owner::first_words(range).map_err(|error| error.to_string()) };
    let install = |copy: &mut Option<(Vec<u64>, Watch)>, words, watch| *copy = Some((words, watch));
    block_on(uffd.mirror(mirror, &mirror.0, range, RetryBudget::retries(1000), prepare, install))
}

impl std::fmt::Debug for Episode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rings = self.rings.as_ref().map(|rings| rings.cache.stats());
        f.debug_struct("Episode")
            .field("active", &self.uffd.space().active())
            .field("source", &self.uffd.stats())
            .field("cache", &self.cache.stats())
            .field("rings", &rings)
            .finish()
    }
}

/// The episode that is on.
pub struct Current(RwLock<Arc<Episode>>);

impl Current {
    pub fn new(episode: Arc<Episode>) -> Self {
        Self(RwLock::new(episode))
    }

    pub fn get(&self) -> Arc<Episode> {
        self.0.read().unwrap().clone()
    }

    pub fn set(&self, episode: Arc<Episode>) {
        let old = std::mem::replace(&mut *self.0.write().unwrap(), episode);
        drop(old);
    }
}
