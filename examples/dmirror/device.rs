//! The driver of a device with a page table of its own, which reads and writes the memory of a
//! process through pages that it mirrors: Linux's `dmirror` (`lib/test_hmm.c`) as a user of this
//! library would write it.

use crate::command::{CommandError, Outcome};
use crate::engine::{Engine, pause};
use crate::frame::{Frame, PAGE, WORDS};
use crate::memory::{Fault, PageState, Process, Seen, addresses, pages};
use futures::future::{OptionFuture, ready};
use futures::lock::Mutex as AsyncMutex;
use shootdown::{
    AddressRange, DriverLock, Event, IntervalNotifier, Invalidation, Owner, PassFuture,
    RetryBudget, Subscription, WouldBlock,
};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Pages that are faulted in at once.
const CHUNK: u64 = 64;

/// A device, which may mirror several processes.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    pub owner: Owner,
    /// The processor can use its memory; otherwise it gets a page back when it touches it.
    pub coherent: bool,
}

/// A mirror of one process on one device: `/dev/hmm_dmirror0`, opened.
pub struct Mirror {
    process: Process,
    device: Device,
    subscription: Subscription<Shadow>,
    budget: RetryBudget,
    /// Commands that install mappings, one after the other: a migration's own notifier is left
    /// alone (S4), so no other command may have looked at the pages before it and install them
    /// after it.
    commands: AsyncMutex<()>,
}

/// What invalidations reach: the device's page table.
pub struct Shadow {
    owner: Owner,
    table: DriverLock<Table>,
    /// The events of the invalidations that zapped, in order.
    events: Mutex<Vec<Event>>,
    retries: AtomicU64,
}

#[derive(Clone)]
struct Mapping {
    frame: Arc<Frame>,
    writable: bool,
    exclusive: bool,
}

struct Table {
    mappings: BTreeMap<u64, Mapping>,
    engine: Engine,
}

impl Table {
    fn zap(&mut self, pages: Range<u64>) {
        let gone: Vec<u64> = self.mappings.range(pages).map(|(page, _)| *page).collect();
        gone.iter().for_each(|page| drop(self.mappings.remove(page)));
    }

    fn map(&mut self, page: u64, (frame, writable): Seen, exclusive: bool) {
        self.mappings.insert(page, Mapping { frame, writable, exclusive });
    }
}

impl IntervalNotifier for Shadow {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        if invalidation.owner() == Some(self.owner) {
            return Ok(None); // our own migration: it has stopped the device itself
        }
        self.events.lock().unwrap().push(invalidation.event());
        let mut table = self.table.lock_for(invalidation);
        table.zap(pages(invalidation.range()));
        Ok(table.engine.drained().map(PassFuture::new))
    }
}

impl Mirror {
    pub fn open(process: &Process, device: Device) -> Result<Self, CommandError> {
        let table = DriverLock::new(Table { mappings: BTreeMap::new(), engine: Engine::new() });
        let shadow = Shadow {
            owner: device.owner,
            table,
            events: Mutex::default(),
            retries: AtomicU64::new(0),
        };
        let subscription =
            process.space().insert(AddressRange::ALL, shadow).map_err(|_| CommandError::Closed)?;
        let (budget, commands) = (RetryBudget::default(), AsyncMutex::new(()));
        Ok(Self { process: process.clone(), device, subscription, budget, commands })
    }

    pub fn with_budget(mut self, budget: RetryBudget) -> Self {
        self.budget = budget;
        self
    }

    /// Ends the mirror and waits until the device uses nothing of the process any more.
    pub async fn close(self) {
        self.stop(0..u64::MAX).await;
        self.subscription.remove().await;
    }

    /// READ.
    pub async fn read(&self, range: AddressRange) -> Result<Outcome, CommandError> {
        let mut words = Vec::new();
        let (pages, faults) =
            self.through(range, false, |frame, word, _| words.push(frame.load(word))).await?;
        Ok(Outcome { words, pages, faults })
    }

    /// WRITE, as many pages as `words` fill.
    pub async fn write(&self, start: u64, words: &[u64]) -> Result<Outcome, CommandError> {
        let range = AddressRange::new(start, words.len() as u64 * 8)
            .map_err(|_| CommandError::Page(start / PAGE))?;
        let (pages, faults) =
            self.through(range, true, |frame, word, at| frame.store(word, words[at])).await?;
        Ok(Outcome { words: Vec::new(), pages, faults })
    }

    /// Goes through whole pages, faulting in what the device has not mapped.
    async fn through(
        &self,
        range: AddressRange,
        write: bool,
        mut each: impl FnMut(&Frame, usize, usize) + Send,
    ) -> Result<(u64, u32), CommandError> {
        let Range { start, end } = pages(range);
        let (mut next, mut faults) = (start, 0);
        while next < end {
            next = self.transfer(start, next..end, write, &mut each).await;
            if next < end {
                if faults > self.budget.retries {
                    return Err(CommandError::Busy { retries: faults });
                }
                self.fault(next..end, write).await?;
                faults += 1;
            }
        }
        Ok((end - start, faults))
    }

    /// The device at work, on what it has mapped. Returns the first page that it has not.
    async fn transfer(
        &self,
        first: u64,
        pages: Range<u64>,
        write: bool,
        each: &mut (impl FnMut(&Frame, usize, usize) + Send),
    ) -> u64 {
        for page in pages.clone() {
            let begun = {
                let table = self.subscription.table.lock();
                let mapping =
                    table.mappings.get(&page).filter(|mapping| mapping.writable || !write);
                mapping.map(|mapping| (mapping.frame.clone(), table.engine.begin()))
            };
            let Some((frame, _access)) = begun else { return page };
            for word in 0..WORDS {
                each(&frame, word, (page - first) as usize * WORDS + word);
                if word == WORDS / 2 && page % 16 == 15 {
                    pause().await; // in the middle of a page: whoever takes it away has to wait for the rest
                }
            }
        }
        pages.end
    }

    /// The collision-retry loop: what the process may do, the device may do afterwards.
    async fn fault(&self, pages: Range<u64>, write: bool) -> Result<(), CommandError> {
        let _one = self.commands.lock().await;
        let shadow = &*self.subscription;
        for first in pages.clone().step_by(CHUNK as usize) {
            let chunk = first..pages.end.min(first + CHUNK);
            let mut looks = 0_u64;
            let look = |_| {
                looks += 1;
                self.process.range_fault(chunk.clone(), write, self.device.owner)
            };
            let install = |table: &mut Table, seen: Vec<Seen>| {
                chunk.clone().zip(seen).for_each(|(page, seen)| table.map(page, seen, false))
            };
            let mirrored =
                shadow.table.mirror(&self.subscription, self.budget, look, install).await;
            shadow.retries.fetch_add(looks.saturating_sub(1), Ordering::Relaxed);
            mirrored?;
        }
        Ok(())
    }

    /// Stops the device from using these pages, on the driver's own account.
    async fn stop(&self, pages: Range<u64>) {
        let drained = {
            let mut table = self.subscription.table.lock();
            table.zap(pages);
            table.engine.drained()
        };
        OptionFuture::from(drained).await;
    }

    /// MIGRATE_TO_DEV: moves private memory to the device, which then reads it there.
    pub async fn migrate_to_device(&self, range: AddressRange) -> Result<Outcome, CommandError> {
        {
            let _one = self.commands.lock().await;
            let migration = self
                .process
                .begin(pages(range), Event::Migrate { owner: Some(self.device.owner) })
                .await?;
            self.stop(pages(range)).await;
            let moved = migration.to_device(self.device.coherent);
            let mut table = self.subscription.table.lock();
            moved.into_iter().for_each(|(page, seen)| table.map(page, seen, false));
        }
        self.read_mapped(range).await
    }

    /// MIGRATE_TO_SYS: moves what is in the device's memory back.
    pub async fn migrate_to_system(&self, range: AddressRange) -> Result<Outcome, CommandError> {
        let _one = self.commands.lock().await;
        let migration = self
            .process
            .begin(pages(range), Event::Migrate { owner: Some(self.device.owner) })
            .await?;
        self.stop(pages(range)).await;
        Ok(Outcome { pages: migration.to_system() as u64, ..Outcome::default() })
    }

    /// RELEASE: the device gives all of its memory back.
    pub async fn release(&self) -> Result<u64, CommandError> {
        let mut moved = 0;
        for page in self.process.resident(self.device.owner) {
            moved += self.migrate_to_system(addresses(page..page + 1)).await?.pages;
        }
        Ok(moved)
    }

    /// EXCLUSIVE: nobody else may use these pages until somebody tries.
    pub async fn exclusive(&self, range: AddressRange) -> Result<Outcome, CommandError> {
        {
            let _one = self.commands.lock().await;
            self.process.range_fault(pages(range), true, self.device.owner).await?;
            let change = self
                .process
                .begin(pages(range), Event::Exclusive { owner: Some(self.device.owner) })
                .await?;
            let given = change.exclusive();
            if let Some(page) =
                pages(range).find(|page| !given.iter().any(|(given, _)| given == page))
            {
                return Err(CommandError::Page(page)); // somebody was quicker, or it cannot be given
            }
            let mut table = self.subscription.table.lock();
            given.into_iter().for_each(|(page, seen)| table.map(page, seen, true));
        }
        self.read_mapped(range).await
    }

    /// CHECK_EXCLUSIVE: an error if the device still has one of these pages exclusively.
    pub fn check_not_exclusive(&self, range: AddressRange) -> Result<(), CommandError> {
        let table = self.subscription.table.lock();
        let found = table
            .mappings
            .range(pages(range))
            .find(|(_, mapping)| mapping.exclusive)
            .map(|(page, _)| *page);
        found.map_or(Ok(()), |page| Err(CommandError::Page(page)))
    }

    /// SNAPSHOT: what the device would see, without faulting anything in.
    pub async fn snapshot(&self, range: AddressRange) -> Result<Vec<PageState>, CommandError> {
        let look =
            |_| ready(Ok::<_, Fault>(self.process.snapshot(pages(range), self.device.owner)));
        Ok(self
            .subscription
            .table
            .mirror(&self.subscription, self.budget, look, |_, states| states)
            .await?)
    }

    async fn read_mapped(&self, range: AddressRange) -> Result<Outcome, CommandError> {
        let (mut words, pages) = (Vec::new(), pages(range));
        let next = self
            .transfer(pages.start, pages.clone(), false, &mut |frame, word, _| {
                words.push(frame.load(word))
            })
            .await;
        if next < pages.end {
            return Err(CommandError::Page(next));
        }
        Ok(Outcome { words, pages: pages.end - pages.start, faults: 0 })
    }

    /// The events that made the device zap, since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.subscription.events.lock().unwrap())
    }

    /// Retries that invalidations caused.
    pub fn retries(&self) -> u64 {
        self.subscription.retries.load(Ordering::Relaxed)
    }
}
