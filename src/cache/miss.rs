//! The slow path of a `get`: it registers one range or several. Where the device must not hold
//! overlapping registrations, it does so in turns.
#![forbid(unsafe_code)]

use super::claim::Claim;
use super::core::{Core, Found, until_gone};
use super::device::Device;
use super::entry::{Entry, Live};
use super::error::GetError;
use super::life;
use super::phase::{Change, Outcome};
use super::settings::Overlap;
use super::task::Task;
use super::turns::{Placed, unless};
use super::way::{Place, Way};
use crate::engine::gate::Since;
use crate::event::Event;
use crate::foreign::{Callback, Losses};
use crate::range::AddressRange;
use crate::sync::{Arc, AtomicU64, Lock, Ordering};
use alloc::vec::Vec;
use core::future::Future;
use futures::FutureExt;

/// Number of times in a row that one change may end an attempt. After that, the device is taken to
/// cause the change itself.
const SAME_CHANGE: u32 = 8;

/// Counts the polls of `future`. An observation of an earlier poll may be outdated.
async fn counted<F: Future>(polls: &AtomicU64, future: F) -> F::Output {
    let mut future = core::pin::pin!(future);
    core::future::poll_fn(|cx| {
        polls.fetch_add(1, Ordering::Relaxed);
        future.as_mut().poll(cx)
    })
    .await
}

/// Registers `range` as one registration.
pub(super) async fn one<D: Device>(
    core: &Arc<Core<D>>,
    range: AddressRange,
) -> Result<Arc<Live<D>>, GetError<D::Error>> {
    let limits = &core.limits;
    if !limits.fits(limits.pages(range)) {
        return Err(GetError::TooLarge { max: limits.max_registration });
    }
    if limits.overlap == Overlap::Allowed {
        return miss(core, range, None).await;
    }
    // The range fits the limit, so it is one piece.
    Ok(all(core, range).await?.swap_remove(0))
}

/// Registers all pieces of `range` (K8). While it waits it only [keeps](Claim::keep) the pieces. It
/// takes all of them at once in the end.
pub(super) async fn all<D: Device>(
    core: &Arc<Core<D>>,
    range: AddressRange,
) -> Result<Vec<Arc<Live<D>>>, GetError<D::Error>> {
    if let Some(all) = core.hit_all(range) {
        return Ok(all);
    }
    let polls = AtomicU64::new(0);
    counted(&polls, keep_and_take(core, range, &polls)).await
}

async fn keep_and_take<D: Device>(
    core: &Arc<Core<D>>,
    range: AddressRange,
    polls: &AtomicU64,
) -> Result<Vec<Arc<Live<D>>>, GetError<D::Error>> {
    let most = core.limits.tries.max(1);
    let (mut tries, mut thefts, mut number) = (0, 0, None);
    while tries < most {
        let kept = match core.limits.overlap {
            Overlap::Allowed => keep(core, range, polls, None).await?,
            _ => in_turn(core, range, polls, &mut number, thefts).await?,
        };
        let taken = loop {
            open(core).await;
            let taken = take(core, range, &kept, polls.load(Ordering::Relaxed));
            if !matches!(taken, Taken::Gone) || !core.space.shared().is_shut() {
                break taken;
            }
        };
        match taken {
            Taken::All(all) => return Ok(all),
            Taken::Outdated => tries += 1,
            Taken::Gone
                if kept.is_empty() || kept.iter().any(|piece| piece.entry.ended_by().is_some()) =>
            {
                core.collisions.fetch_add(1, Ordering::Relaxed);
                tries += 1;
            }
            // The memory did not change; other callers took a piece. The next try goes ahead of
            // later callers.
            Taken::Gone => thefts += 1,
        }
    }
    Err(GetError::Invalidated { tries })
}

/// Result of taking all pieces at once.
enum Taken<D: Device> {
    /// All pieces, in order.
    All(Vec<Arc<Live<D>>>),
    /// Look-ups do not find one of the pieces.
    Gone,
    /// The device does not vouch for one of the pieces.
    Outdated,
}

/// Takes all pieces. Asks the device about every piece that was not vouched for in poll `now` (K9).
fn take<D: Device>(core: &Core<D>, range: AddressRange, kept: &[Piece<D>], now: u64) -> Taken<D> {
    let found = core.limits.pieces(range).map(|piece| core.look_up(piece, 0));
    let Some(found) = found.collect::<Option<Vec<_>>>() else { return Taken::Gone };
    for (at, live) in found.iter().enumerate() {
        let fresh = kept
            .get(at)
            .is_some_and(|piece| piece.vouched == now && Arc::ptr_eq(&piece.entry, &live.entry));
        if !fresh && !core.is_vouched_for(live) {
            return Taken::Outdated;
        }
    }
    Taken::All(found)
}

/// Waits until the gate is open, or was open at some moment since the call.
async fn open<D: Device>(core: &Core<D>) {
    if core.space.shared().is_shut() {
        let mut since = Since::default();
        core::future::poll_fn(|cx| core.space.shared().poll_gate(&mut since, cx)).await;
    }
}

/// Finds or registers all pieces of `range`, and claims them. Several pieces are kept. A single one
/// is not, so limits may evict it like any idle registration.
async fn keep<D: Device>(
    core: &Arc<Core<D>>,
    range: AddressRange,
    polls: &AtomicU64,
    place: Option<Place>,
) -> Kept<D> {
    let several = !core.limits.fits(core.limits.pages(range));
    let mut kept = Vec::new();
    for piece in core.limits.pieces(range) {
        let live = match core.hit(piece) {
            Some(live) => live,
            None => miss(core, piece, place.map(|place| Way::new(core, piece, place))).await?,
        };
        let entry = live.entry.clone();
        entry.thefts.store(place.map_or(0, |place| place.thefts), Ordering::Relaxed);
        let claim = if several { Claim::keep(live) } else { Claim::new(&entry) };
        kept.push(Piece { entry, vouched: polls.load(Ordering::Relaxed), _claim: claim });
    }
    Ok(kept)
}

/// One claimed piece of a range.
struct Piece<D: Device> {
    entry: Arc<Entry<D>>,
    /// Number of the poll in which the piece was known to be valid; 0 for none that counts.
    vouched: u64,
    /// `None` if the registration was leaving already.
    _claim: Option<Claim<D>>,
}

/// All pieces of a range in order, or the error of the first that failed.
type Kept<D> = Result<Vec<Piece<D>>, GetError<<D as Device>::Error>>;

/// Result of a turn.
struct Answer<D: Device> {
    losses: Arc<Losses>,
    kept: Lock<Option<Kept<D>>>,
    /// Number of polls of the turn.
    polls: AtomicU64,
}

impl<D: Device> Drop for Answer<D> {
    fn drop(&mut self) {
        // The result may hold an error of the device, so its drop is guarded.
        let kept = self.kept.get_mut().take();
        self.losses.run(Callback::Device, |_| drop(kept));
    }
}

/// Keeps all pieces of `range` in a turn, once no earlier caller needs an overlapping range.
///
/// The work is a task without an owner, so later callers do not depend on this caller's polls (K7).
/// `number` is the caller's place; it stays the same from try to try.
async fn in_turn<D: Device>(
    core: &Arc<Core<D>>,
    range: AddressRange,
    polls: &AtomicU64,
    number: &mut Option<u64>,
    thefts: u32,
) -> Kept<D> {
    let pages = core.limits.pages(range);
    let merges = core.limits.overlap == Overlap::Merge && core.limits.fits(pages);
    // An estimate: the final union is known only in the turn.
    let union = if merges { core.united(pages) } else { pages };
    let union = if core.limits.allow(union, pages) { union } else { pages };
    let losses = &core.device.losses;
    let answer = Arc::new(Answer {
        losses: losses.clone(),
        kept: Lock::new(None),
        polls: AtomicU64::new(0),
    });
    let turn = core.turns.enter(*number, union, |number, cancelled| {
        let placed = Placed { turns: core.turns.clone(), number };
        let (core, answer) = (core.clone(), answer.clone());
        let work = async move {
            placed.turns.come(number).await;
            let kept =
                keep(&core, range, &answer.polls, Some(Place { number, range: union, thefts }));
            let kept = counted(&answer.polls, kept).await;
            *answer.kept.lock() = Some(kept);
            drop(placed);
        };
        Task::new(losses, unless(cancelled, work))
    });
    *number = Some(turn.number());
    let (mut waiter, mut early) = (turn.wait(), false);
    core::future::poll_fn(|cx| {
        early = answer.kept.lock().is_some();
        waiter.poll_unpin(cx)
    })
    .await;
    let kept = answer.kept.lock().take();
    let mut kept = kept.unwrap_or(Ok(Vec::new()))?;
    let last = answer.polls.load(Ordering::Relaxed);
    for piece in &mut kept {
        let fresh = !early && piece.vouched == last;
        piece.vouched = if fresh { polls.load(Ordering::Relaxed) } else { 0 };
    }
    Ok(kept)
}

/// State of a caller's tries to register its range.
struct Tries<D: Device> {
    made: u32,
    /// The entry of the last try, if the device registered it but a look-up did not find it.
    registered: Option<Arc<Entry<D>>>,
    last: Option<Change>,
    same: u32,
    made_room: bool,
    /// Register without the neighbours, because the union was refused.
    alone: bool,
    /// A registration of an earlier try was evicted to make room for others. The next one is taken
    /// without waiting.
    hurried: bool,
}

impl<D: Device> Tries<D> {
    /// Records the change that ended a try. Returns `true` if the same change has come too often in
    /// a row. Changes of protection do not count, because each `fork` of the process causes one of
    /// the same range.
    fn collided(&mut self, by: Option<Change>) -> bool {
        let by =
            by.filter(|(event, _)| !matches!(event, Event::ProtectionPage | Event::ProtectionVma));
        self.same = if by.is_some() && by == self.last { self.same + 1 } else { 1 };
        self.last = by;
        by.is_some() && self.same >= SAME_CHANGE
    }

    /// Records that the registration of the last try was withdrawn before the caller had it.
    /// Returns `true` if the same change did so too often.
    fn overtaken(&mut self, core: &Core<D>, entry: &Entry<D>) -> bool {
        let Some(by) = entry.ended_by() else {
            // The memory did not change; other callers needed the room.
            self.made -= 1;
            self.hurried = true;
            return false;
        };
        core.collisions.fetch_add(1, Ordering::Relaxed);
        self.collided(Some(by))
    }
}

/// Finds or registers `range`. With `way`, does so once nothing is in its way.
async fn miss<D: Device>(
    core: &Arc<Core<D>>,
    range: AddressRange,
    mut way: Option<Way<'_, D>>,
) -> Result<Arc<Live<D>>, GetError<D::Error>> {
    core.misses.fetch_add(1, Ordering::Relaxed);
    let own = core.limits.pages(range);
    let mut tries = Tries {
        made: 0,
        registered: None,
        last: None,
        same: 0,
        made_room: false,
        alone: false,
        hurried: false,
    };
    loop {
        open(core).await;
        let target = match &mut way {
            Some(way) => Some(way.make(tries.alone).await?),
            None => tries.alone.then_some(own),
        };
        let (claim, now) = match core.find_or_begin(range, target)? {
            Found::Live(live) if core.is_vouched_for(&live) => return Ok(live),
            Found::Live(_) | Found::Blocked => continue,
            Found::Attempt(claim, now) => (claim, now),
        };
        let entry = claim.entry().clone();
        if way.as_mut().is_some_and(|way| way.has_changed(entry.range)) {
            continue;
        }
        // The entry was registered, and withdrawn before the gate opened or while the call waited
        // for room.
        let overtaken = tries.registered.take().is_some_and(|entry| tries.overtaken(core, &entry));
        if overtaken || tries.made >= core.limits.tries.max(1) {
            return Err(GetError::Invalidated { tries: tries.made });
        }
        tries.made += 1;
        // `true` if this poll made the registration. The device is not asked about it (K9).
        let mut fresh = false;
        let attempt = {
            let mut attempt = core::pin::pin!(life::attempt(&entry, now, || core
                .device
                .source
                .watch(entry.range)));
            core::future::poll_fn(|cx| {
                fresh = !entry.is_live();
                attempt.as_mut().poll(cx)
            })
            .await
        };
        // Takes the registration from the table, not from the attempt. Does so before the limits
        // are enforced, so that it counts as in use.
        let registration = core.look_up(range, now);
        drop(claim);
        let outdated =
            !fresh && registration.as_ref().is_some_and(|live| !core.is_vouched_for(live));
        let gone = core.tidy();
        if (gone.is_empty() || tries.hurried)
            && !outdated
            && let Some(registration) = registration
        {
            // Later calls look after `gone`.
            return Ok(registration);
        }
        // A `get` that is not polled must not hold a registration.
        drop(registration);
        until_gone(gone).await;
        if let Some(live) = core.vouched(range, now) {
            // The attempt may hold an error of the device, so its drop is guarded.
            core.device.losses.run(Callback::Device, |_| drop(attempt));
            return Ok(live);
        }
        let no_room = match attempt {
            Ok(Outcome::Live) => {
                tries.registered = (!outdated).then_some(entry);
                continue;
            }
            Ok(Outcome::Collided(None)) if entry.flushed.load(Ordering::Acquire) => {
                // The memory did not change. A flush came, and no earlier registration may be found
                // after it (K3).
                tries.made -= 1;
                continue;
            }
            Ok(Outcome::Collided(by)) => {
                core.collisions.fetch_add(1, Ordering::Relaxed);
                if tries.collided(by) {
                    return Err(GetError::Invalidated { tries: tries.made });
                }
                continue;
            }
            Ok(Outcome::Panicked(message)) => return Err(GetError::Panicked { message }),
            Ok(Outcome::Failed(error)) => GetError::Register(error),
            Err(why) if why.is_full() => GetError::Unwatched(why),
            Err(why) if entry.range == own => return Err(GetError::Unwatched(why)),
            Err(why) => GetError::Unwatched(why),
        };
        // The union may be too large, or its neighbours may be unmapped.
        if !tries.alone && entry.range != own {
            tries.alone = true;
        } else if core::mem::replace(&mut tries.made_room, true) || !core.make_room().await {
            return Err(no_room);
        } else {
            tries.alone = false;
        }
        // The error is the device's code, so its drop is guarded.
        core.device.losses.run(Callback::Device, |_| drop(no_room));
        tries.made -= 1;
    }
}
