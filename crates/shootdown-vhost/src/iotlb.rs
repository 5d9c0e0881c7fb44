//! The IOTLB of a device: the translations of its I/O virtual addresses, as long as the front-end
//! permits.
//!
//! Accesses in flight are drivers of an [`AddressSpace`](shootdown::AddressSpace) of I/O virtual
//! addresses: a [`Mapping`] is a notifier of its range, and its pass ends when the mapping is
//! dropped. So an INVALIDATE is an invalidation. It first removes translations from the table, then
//! waits for every mapping that overlaps, and for nothing else.
//!
//! A mapping registers its range *before* it searches the table. So a mapping that has found a
//! translation is registered when the translation is removed, and a mapping that registers later
//! does not find it.
#![forbid(unsafe_code)]

mod asked;
mod domain;
mod invalidated;
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
pub use domain::Domain;
use futures::task::AtomicWaker;
pub use invalidated::Invalidated;
use shootdown::{AddressRange, Event, Invalidate};
use smallvec::SmallVec;
use std::fmt;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use table::Table;
use vm_memory::Permissions;
pub use want::{MapError, Want};

/// Smallest unit that an IOMMU translates. Misses in one page share one question.
const PAGE: u64 = 0x1000;

/// Maximum number of translations that one look-up asks for.
const AHEAD: usize = 16;

/// The IOTLB of one device. This is a handle; clones share one IOTLB. `default` makes one in a
/// domain of its own.
///
/// A device [maps](Self::map) ranges. The session reports the front-end's messages
/// ([`update`](Self::update), [`invalidate`](Self::invalidate), [`forget_all`](Self::forget_all)).
#[derive(Clone)]
pub struct Iotlb(Arc<Inner>);

pub(crate) struct Inner {
    domain: Domain,
    /// Additions also need the lock of `asked`.
    table: Shared<Table>,
    asked: Lock<Asked>,
    /// Memory that the front-end shares.
    memory: Lock<MemoryTable>,
    /// Wakes the session, which sends questions.
    sender: AtomicWaker,
    counters: Counters,
}

/// Result of a look-up.
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
    /// Makes an empty IOTLB in `domain`. It can ask for translations once a
    /// [`Session`](crate::Session) has it.
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

    /// Returns the domain of the device.
    pub fn domain(&self) -> &Domain {
        &self.0.domain
    }

    /// Returns the memory that the front-end shares. Empty before the front-end has sent it.
    pub fn memory(&self) -> MemoryTable {
        self.0.memory.lock().clone()
    }

    pub(crate) fn set_memory(&self, memory: MemoryTable) {
        // Dropped after the guard: it may be the last reference to the former memory.
        let _former = std::mem::replace(&mut *self.0.memory.lock(), memory);
    }

    /// Returns the counters of the IOTLB.
    pub fn stats(&self) -> IotlbStats {
        self.0.counters.read()
    }

    /// Returns the number of known translations.
    pub fn len(&self) -> usize {
        self.0.table.read().len()
    }

    /// Returns `true` if no translation is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Maps a range if all of it is known and permits the access. Does not ask the front-end.
    pub fn try_map(&self, want: Want) -> Option<Mapping> {
        let (mut mapping, range) = self.register(want).ok()?;
        let found = self.0.table.read().look_up(range, want.access, mapping.parts_mut());
        found.is_ok().then_some(mapping)
    }

    /// Maps a range. Asks the front-end for missing translations, and waits for them.
    ///
    /// It holds nothing while it waits, so it never delays the answer to an INVALIDATE (V2).
    /// [`map_wait`](Self::map_wait) blocks a thread instead.
    ///
    /// # Errors
    /// [`MapError`]. A later call may succeed: the guest may map the address at any time.
    ///
    /// # Cancel safety
    /// The future may be dropped at any moment. Its questions stay for other waiters.
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

    /// Maps a range like [`map`](Self::map), and blocks the thread until the front-end has
    /// answered. Not for the thread that drives the session.
    ///
    /// # Errors
    /// As for [`map`](Self::map).
    pub fn map_wait(&self, want: Want) -> Result<Mapping, MapError> {
        block_on(self.map(want))
    }

    /// Maps all ranges at once, in order, or none (V2). It holds no mapping while it asks for
    /// another one.
    ///
    /// A request with several buffers needs this. If it held the first buffer while it waits for
    /// the second, the front-end, which may be waiting for the first, could not send the second
    /// translation.
    ///
    /// # Errors
    /// As for [`map`](Self::map), of the first range that fails.
    ///
    /// # Cancel safety
    /// As for [`map`](Self::map).
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
    /// INVALIDATE takes that lock, so memory that it has removed is not in use when it goes on.
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

    /// Registers a mapping without memory.
    fn register(&self, want: Want) -> Result<(Mapping, AddressRange), MapError> {
        let range = want.range()?;
        let registered = self.0.domain.0.space.insert(range, InFlight::default());
        let registered = registered.map_err(|_| MapError::Nobody { iova: want.iova })?;
        Ok((Mapping::new(registered, want.access), range))
    }

    /// Looks up all ranges, which are registered already, and asks for those that are missing.
    fn look<'p>(
        &self,
        ranges: &[(AddressRange, Permissions)],
        parts: impl Iterator<Item = &'p mut Parts>,
    ) -> Result<Found, MapError> {
        let mut parts: SmallVec<[&mut Parts; 4]> = parts.collect();
        let known = self.0.table.read().has_all(ranges, parts.iter_mut().map(|parts| &mut **parts));
        if known { Ok(Found::All) } else { self.ask(ranges, parts) }
    }

    /// Looks up all ranges again and asks for those that are missing. Holds the lock of `asked`, so
    /// no addition comes between the look-up and the question.
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
            // The following pages are likely to be missing as well.
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

    /// Handles UPDATE: maps `range` to `place` of the front-end's memory, for this access.
    pub fn update(&self, range: AddressRange, place: Place, access: Permissions) {
        let mut asked = self.0.asked.lock();
        let full = self.0.table.write().insert(range, place, access);
        let over = asked.filled(range, access);
        drop(asked);
        count(&self.0.counters.updates, 1);
        count(&self.0.counters.overflows, u64::from(full));
        self.tell(over);
    }

    /// Handles INVALIDATE: removes `range` from all devices of the domain before it returns.
    ///
    /// The future resolves to the number of overlapping mappings, once they have been dropped. Poll
    /// it once before you handle the next message of the front-end.
    pub fn invalidate(&self, range: AddressRange) -> Invalidated {
        self.forget_in_domain(range);
        self.invalidate_in_flight(range)
    }

    /// Waits for the mappings that overlap `range`, and counts an INVALIDATE. Removes no
    /// translation.
    pub(crate) fn invalidate_in_flight(&self, range: AddressRange) -> Invalidated {
        count(&self.0.counters.invalidates, 1);
        Invalidated::new(self, range)
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

    /// Waits for the mappings that overlap `range`. Removes no translation.
    pub(crate) fn wait_for(&self, range: AddressRange) -> Invalidate<'static> {
        self.0.domain.0.space.invalidate(range, Event::Unmap).into_owned()
    }

    /// Removes all translations. Mappings in flight keep theirs.
    pub fn forget_all(&self) {
        self.0.table.write().forget_all();
    }

    /// Maps the guest's memory as it is, without an IOMMU. No questions are asked.
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

    /// Asks the front-end for misses, as with an IOMMU. `each`: it answers every miss. `keep`:
    /// known translations of an IOMMU stay (a fault for tests).
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

    /// Sends questions on a new channel.
    pub(crate) fn new_channel(&self) {
        let over = self.0.asked.lock().channel();
        self.tell(over);
    }

    /// Behaves as with a front-end that answers no misses. For models.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn ask_silently(&self) {
        self.with_iommu(false, false);
    }

    /// Ends all questions: everything that waits fails. Known translations stay.
    pub(crate) fn end(&self) {
        let over = self.0.asked.lock().end();
        self.tell(over);
    }

    /// Ends the session's use: removes all translations and the memory, and ends all questions.
    pub(crate) fn leave(&self) {
        self.set_memory(MemoryTable::default());
        self.clear();
    }

    /// Removes all translations and ends all questions.
    pub(crate) fn clear(&self) {
        let mut asked = self.0.asked.lock();
        self.0.table.write().clear(false);
        let over = asked.end();
        drop(asked);
        self.tell(over);
    }

    /// Returns the next question to send.
    pub(crate) fn poll_ask(&self, cx: &mut Context<'_>) -> Poll<(u64, Permissions)> {
        self.0.sender.register(cx.waker());
        let miss = self.0.asked.lock().next();
        let Some(miss) = miss else { return Poll::Pending };
        count(&self.0.counters.misses, 1);
        Poll::Ready((miss.iova, miss.access))
    }

    /// Records that the front-end has answered the first question that was sent. Returns `false` if
    /// there was none.
    pub(crate) fn answered(&self, ok: bool) -> bool {
        let over = self.0.asked.lock().answered();
        count(&self.0.counters.refused, u64::from(!ok));
        let known = over.is_ok();
        self.tell(over.ok().flatten());
        known
    }

    /// Wakes the waiters of `over`, and the session, which may send the next question.
    fn tell(&self, over: impl IntoIterator<Item = Arc<Miss>>) {
        over.into_iter().for_each(|miss| miss.over.signal(1));
        self.0.sender.wake();
    }
}

/// Limits the questions for a range that may need more translations than are kept.
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

/// Waits until the question is over. Only the answer counts: the translation may be gone again.
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
