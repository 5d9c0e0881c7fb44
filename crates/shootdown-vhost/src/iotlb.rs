//! The IOTLB of a device: what its I/O virtual addresses are, for as long as the front-end lets it
//! know.
//!
//! What is in flight is a driver of an [`AddressSpace`] of I/O virtual addresses: a
//! [`Mapping`] is a notifier of its range, whose pass ends when the mapping is dropped. So an
//! INVALIDATE is an invalidation: translations are taken out of the table first, then everything
//! that overlaps is waited for, and only that. A mapping registers its range *before* it looks into
//! the table. So whoever has found a translation is registered when that is taken out, and whoever
//! registers later does not find it.
#![forbid(unsafe_code)]

mod asked;
mod table;
mod want;

use crate::bell::block_on;
use crate::in_flight::InFlight;
use crate::mapping::Mapping;
use crate::memory::{MemoryTable, Place};
use crate::parts::Parts;
use crate::stats::{Counters, IotlbStats, count};
use crate::sync::{Lock, Shared};
use asked::{Answers, Asked, Miss};
use futures::task::AtomicWaker;
use shootdown::{AddressRange, AddressSpace, Event, Invalidate};
use smallvec::SmallVec;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Instant;
use table::Table;
use vm_memory::Permissions;
pub use want::{MapError, Want};

/// The least that an IOMMU translates. Those that miss addresses of one page ask together.
const PAGE: u64 = 0x1000;

/// As many translations one look asks for at most.
const AHEAD: usize = 16;

/// IOTLBs whose devices share an IOMMU domain: an INVALIDATE of one is an invalidation of all.
///
/// A guest's IOMMU driver that unmaps a range sends one INVALIDATE to each device of the domain,
/// one after the other, each after the answer to the one before. With one domain in this process
/// the first of them begins to wait for all devices at once, and the others find nothing left to
/// wait for.
#[derive(Clone, Default)]
pub struct Domain(Arc<Members>);

#[derive(Default)]
struct Members {
    space: AddressSpace,
    all: Lock<Vec<Weak<Inner>>>,
}

impl Domain {
    /// A domain without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// The I/O virtual addresses of all of its devices; its notifiers are what is in flight.
    pub fn space(&self) -> &AddressSpace {
        &self.0.space
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain({} in flight)", self.0.space.len())
    }
}

/// The IOTLB of one device. Clones are handles of the same. `default` is one in a domain of its
/// own.
///
/// A device [maps](Self::map). What the front-end says ([`update`](Self::update),
/// [`invalidate`](Self::invalidate), [`forget_all`](Self::forget_all)) is the session's to tell.
#[derive(Clone)]
pub struct Iotlb(Arc<Inner>);

pub(crate) struct Inner {
    domain: Domain,
    /// Changes under the lock of `asked` only when something is added.
    table: Shared<Table>,
    asked: Lock<Asked>,
    /// What the front-end shares.
    memory: Lock<MemoryTable>,
    /// The session, which sends what is asked for.
    sender: AtomicWaker,
    counters: Counters,
}

/// What a look has found.
enum Found {
    All,
    Asked(Arc<Miss>),
}

impl Default for Iotlb {
    fn default() -> Self {
        Self::new(&Domain::new())
    }
}

impl Iotlb {
    /// An empty one in `domain`. There is nobody to ask until a [`Session`](crate::Session) has it.
    pub fn new(domain: &Domain) -> Self {
        let (table, asked) = (Shared::new(Table::default()), Lock::new(Asked::default()));
        let (sender, counters, memory) =
            (AtomicWaker::new(), Counters::default(), Lock::new(MemoryTable::default()));
        let iotlb = Self(Arc::new(Inner {
            domain: domain.clone(),
            table,
            asked,
            memory,
            sender,
            counters,
        }));
        let mut all = domain.0.all.lock();
        all.retain(|member| member.strong_count() > 0);
        all.push(Arc::downgrade(&iotlb.0));
        drop(all);
        iotlb
    }

    /// The domain of the device.
    pub fn domain(&self) -> &Domain {
        &self.0.domain
    }

    /// The memory that the front-end shares now. Empty before it has said so.
    pub fn memory(&self) -> MemoryTable {
        self.0.memory.lock().clone()
    }

    pub(crate) fn set_memory(&self, memory: MemoryTable) {
        // Dropped after the guard: it may be what keeps the former memory mapped.
        let _former = std::mem::replace(&mut *self.0.memory.lock(), memory);
    }

    /// What has happened so far.
    pub fn stats(&self) -> IotlbStats {
        self.0.counters.read()
    }

    /// How many translations are known.
    pub fn len(&self) -> usize {
        self.0.table.read().len()
    }

    /// Whether no translation is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A mapping of one range, if all of it is known and may be accessed so. Asks nobody.
    pub fn try_map(&self, want: Want) -> Option<Mapping> {
        let (mut mapping, range) = self.register(want).ok()?;
        let found = self.0.table.read().look_up(range, want.access, mapping.parts_mut());
        found.is_ok().then_some(mapping)
    }

    /// A mapping of one range. What is not known is asked for, and waited for.
    ///
    /// While it waits it holds nothing, so an INVALIDATE is never answered later for it. Dropped,
    /// it leaves what was asked for to others.
    ///
    /// # Errors
    /// [`MapError`]. It says nothing of later: the guest may map the address at any time.
    pub async fn map(&self, want: Want) -> Result<Mapping, MapError> {
        let patience = self.patience(&[want]);
        loop {
            let (mut mapping, range) = self.register(want)?;
            match self.look(&[(range, want.access)], std::iter::once(mapping.parts_mut()))? {
                Found::All => return Ok(mapping),
                Found::Asked(miss) => {
                    drop(mapping);
                    answer(&miss).await?;
                    patience.check(self, &miss)?;
                }
            }
        }
    }

    /// The same, for a thread: it blocks until the front-end has answered. Not for the thread that
    /// drives the session.
    ///
    /// # Errors
    /// As for [`map`](Self::map).
    pub fn map_wait(&self, want: Want) -> Result<Mapping, MapError> {
        block_on(self.map(want))
    }

    /// Mappings of all ranges at once, in order, or none: while one of them is asked for, no other
    /// is held. This is what a request needs that has several buffers: one that held the first of
    /// them while it waits for the second would keep the front-end, which may be waiting for the
    /// first, from telling of the second.
    ///
    /// # Errors
    /// As for [`map`](Self::map), of the first that fails.
    pub async fn map_all(&self, wants: &[Want]) -> Result<Vec<Mapping>, MapError> {
        let ranges = wants
            .iter()
            .map(|want| Ok((want.range()?, want.access)))
            .collect::<Result<Vec<_>, _>>()?;
        let patience = self.patience(wants);
        loop {
            let mappings = wants.iter().map(|want| Ok(self.register(*want)?.0));
            let mut mappings = mappings.collect::<Result<Vec<_>, _>>()?;
            match self.look(&ranges, mappings.iter_mut().map(Mapping::parts_mut))? {
                Found::All => return Ok(mappings),
                Found::Asked(miss) => {
                    drop(mappings);
                    answer(&miss).await?;
                    patience.check(self, &miss)?;
                }
            }
        }
    }

    /// Calls `f` with the memory of all `wants` under the lock of the table, once all is known. An
    /// INVALIDATE takes that lock: what has been told of it is not in use when it goes on.
    pub(crate) async fn peek<R, const N: usize>(
        &self,
        wants: &[Want; N],
        mut f: impl FnMut(&[Parts; N]) -> R,
    ) -> Result<R, MapError> {
        let mut ranges = [(AddressRange::ALL, Permissions::No); N];
        for (range, want) in ranges.iter_mut().zip(wants) {
            *range = (want.range()?, want.access);
        }
        let mut parts = [const { Parts::new() }; N];
        loop {
            {
                let table = self.0.table.read();
                if table.has_all(&ranges, &mut parts) {
                    return Ok(f(&parts));
                }
            }
            parts.iter_mut().for_each(Parts::clear);
            if let Found::Asked(miss) = self.ask(&ranges, &mut parts)? {
                parts.iter_mut().for_each(Parts::clear);
                answer(&miss).await?;
            }
        }
    }

    fn patience(&self, wants: &[Want]) -> Patience {
        let pages = wants.iter().fold(0, |pages: u64, want| {
            pages.saturating_add(want.iova.saturating_add(want.len) / PAGE - want.iova / PAGE + 1)
        });
        Patience { many: pages > table::MOST as u64 / 2, overflows: self.stats().overflows }
    }

    /// Puts a mapping without memory in flight.
    fn register(&self, want: Want) -> Result<(Mapping, AddressRange), MapError> {
        let range = want.range()?;
        let registered = self.0.domain.0.space.insert(range, InFlight::default());
        let registered = registered.map_err(|_| MapError::Nobody { iova: want.iova })?;
        Ok((Mapping::new(registered, want.access), range))
    }

    /// Looks for all ranges, which are in flight already, and asks for what is missing.
    fn look<'p>(
        &self,
        ranges: &[(AddressRange, Permissions)],
        parts: impl Iterator<Item = &'p mut Parts>,
    ) -> Result<Found, MapError> {
        let mut parts: SmallVec<[&mut Parts; 4]> = parts.collect();
        let known = self.0.table.read().has_all(ranges, parts.iter_mut().map(|parts| &mut **parts));
        if known { Ok(Found::All) } else { self.ask(ranges, parts) }
    }

    /// The same, where something was missing: nothing comes in between that look and the question.
    fn ask<'p>(
        &self,
        ranges: &[(AddressRange, Permissions)],
        parts: impl IntoIterator<Item = &'p mut Parts>,
    ) -> Result<Found, MapError> {
        let mut asked = self.0.asked.lock();
        let table = self.0.table.read();
        let (mut first, mut left) = (None, AHEAD);
        for ((range, access), parts) in ranges.iter().zip(parts) {
            let Err(mut gap) = table.look_up(*range, *access, parts) else { continue };
            if asked.answers == Answers::Nobody {
                return Err(MapError::Nobody { iova: gap });
            }
            // The pages after it are likely to be missing, too.
            while left > 0 {
                left -= 1;
                let miss = asked.ask(gap, *access);
                first.get_or_insert(miss);
                let next = (gap | (PAGE - 1)).checked_add(1).filter(|next| *next <= range.last());
                let Some(next) = next.and_then(|next| table.next_gap(next, range.last(), *access))
                else {
                    break;
                };
                gap = next;
            }
        }
        drop((table, asked));
        let Some(miss) = first else { return Ok(Found::All) };
        self.0.sender.wake();
        Ok(Found::Asked(miss))
    }

    /// UPDATE: `range` is at `place` of the front-end's memory, for this access.
    pub fn update(&self, range: AddressRange, place: Place, access: Permissions) {
        let mut asked = self.0.asked.lock();
        let full = self.0.table.write().insert(range, place, access);
        let over = asked.filled(range, access);
        drop(asked);
        count(&self.0.counters.updates, 1);
        count(&self.0.counters.overflows, u64::from(full));
        self.tell(over);
    }

    /// INVALIDATE: all devices of the domain forget `range` before this returns. The future
    /// resolves when whatever overlaps it has let go, to how many mappings that were. Poll it once
    /// before the front-end is heard again.
    pub fn invalidate(&self, range: AddressRange) -> Invalidated {
        self.forget_in_domain(range);
        self.invalidate_in_flight(range)
    }

    /// The same, and forgets nothing.
    pub(crate) fn invalidate_in_flight(&self, range: AddressRange) -> Invalidated {
        count(&self.0.counters.invalidates, 1);
        Invalidated { future: self.wait_for(range), iotlb: self.clone(), began: Instant::now() }
    }

    fn forget_in_domain(&self, range: AddressRange) {
        let members: Vec<_> = self.0.domain.0.all.lock().iter().filter_map(Weak::upgrade).collect();
        for member in members {
            let mut asked = member.asked.lock();
            member.table.write().invalidate(range);
            let over = asked.invalidated(range);
            drop(asked);
            Iotlb(member).tell(over);
        }
    }

    /// Waits for what is in flight in `range`, and forgets nothing.
    pub(crate) fn wait_for(&self, range: AddressRange) -> Invalidate<'static> {
        self.0.domain.0.space.invalidate(range, Event::Unmap).into_owned()
    }

    /// Forgets all translations. What is in flight keeps its own.
    pub fn forget_all(&self) {
        self.0.table.write().forget_all();
    }

    /// The guest's memory as it is, without an IOMMU: there is nobody to ask.
    pub(crate) fn without_iommu(&self) {
        let memory = self.memory();
        let mut asked = self.0.asked.lock();
        let over = asked.end();
        let mut table = self.0.table.write();
        table.clear(true);
        for region in memory.regions() {
            if let Ok(range) = AddressRange::new(region.guest(), region.len() as u64) {
                table.insert(
                    range,
                    Place { region: region.clone(), offset: 0 },
                    Permissions::ReadWrite,
                );
            }
        }
        drop((table, asked));
        self.tell(over);
    }

    /// With an IOMMU: misses are asked for, and each has an answer if `each` is set. `keep`: a
    /// fault, what is known from an IOMMU is not forgotten.
    pub(crate) fn with_iommu(&self, each: bool, keep: bool) {
        let mut asked = self.0.asked.lock();
        if !keep || asked.answers == Answers::Nobody {
            self.0.table.write().clear(false);
        }
        asked.answers = if each { Answers::Each } else { Answers::Silent };
        let over = asked.anew();
        drop(asked);
        self.tell(over);
    }

    /// The channel on which misses are asked for is another one.
    pub(crate) fn new_channel(&self) {
        let over = self.0.asked.lock().channel();
        self.tell(over);
    }

    /// As with a front-end that answers no misses, for models.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn ask_silently(&self) {
        self.with_iommu(false, false);
    }

    /// There is nobody to ask any more: all that waits fails. What is known stays.
    pub(crate) fn end(&self) {
        let over = self.0.asked.lock().end();
        self.tell(over);
    }

    /// Its session is over: nothing is known any more, of memory neither, and there is nobody to
    /// ask.
    pub(crate) fn leave(&self) {
        self.set_memory(MemoryTable::default());
        self.clear();
    }

    /// No translation is known any more, and there is nobody to ask.
    pub(crate) fn clear(&self) {
        let mut asked = self.0.asked.lock();
        self.0.table.write().clear(false);
        let over = asked.end();
        drop(asked);
        self.tell(over);
    }

    /// What is to be asked for next.
    pub(crate) fn poll_ask(&self, cx: &mut Context<'_>) -> Poll<(u64, Permissions)> {
        self.0.sender.register(cx.waker());
        let miss = self.0.asked.lock().next();
        let Some(miss) = miss else { return Poll::Pending };
        count(&self.0.counters.misses, 1);
        Poll::Ready((miss.iova, miss.access))
    }

    /// The front-end has answered what was asked for first. `false`: nothing was.
    pub(crate) fn answered(&self, ok: bool) -> bool {
        let over = self.0.asked.lock().answered();
        count(&self.0.counters.refused, u64::from(!ok));
        let known = over.is_ok();
        self.tell(over.ok().flatten());
        known
    }

    /// Lets who waits for them look again; the next may be sent.
    fn tell(&self, over: impl IntoIterator<Item = Arc<Miss>>) {
        over.into_iter().for_each(|miss| miss.over.signal(1));
        self.0.sender.wake();
    }
}

/// Says when a range that may have more translations than are kept is not to be asked for any more.
struct Patience {
    many: bool,
    overflows: u64,
}

impl Patience {
    fn check(&self, iotlb: &Iotlb, miss: &Miss) -> Result<(), MapError> {
        let again = self.many && iotlb.stats().overflows - self.overflows > 1;
        if again { Err(MapError::TooMany { iova: miss.iova }) } else { Ok(()) }
    }
}

/// Waits until it is over. The answer counts, not the translation: that may have gone by now.
async fn answer(miss: &Miss) -> Result<(), MapError> {
    miss.over.reached(1).await;
    miss.outcome()
}

impl fmt::Debug for Iotlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iotlb")
            .field("translations", &self.len())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// The future of [`Iotlb::invalidate`].
#[must_use = "the answer to an INVALIDATE is sent when this has resolved"]
pub struct Invalidated {
    future: Invalidate<'static>,
    iotlb: Iotlb,
    began: Instant,
}

impl Future for Invalidated {
    type Output = u64;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<u64> {
        let guard = ready!(Pin::new(&mut self.future).poll(cx));
        let met = guard.hits() as u64;
        drop(guard);
        self.iotlb.0.counters.answered(self.began.elapsed(), met);
        Poll::Ready(met)
    }
}

impl fmt::Debug for Invalidated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Invalidated(since {:?})", self.began.elapsed())
    }
}
