//! What a `get` does that finds nothing: it registers one range or several, in turns where the
//! device may have no two that overlap.
#![forbid(unsafe_code)]

use super::claim::Claim;
use super::core::{Core, Found, gone, until_gone};
use super::device::Device;
use super::entry::{Entry, Live};
use super::error::GetError;
use super::life::{self, yield_now};
use super::phase::{Change, Outcome};
use super::settings::Overlap;
use super::task::Task;
use super::turns::{Placed, unless};
use crate::engine::gate::Since;
use crate::foreign::{Callback, Losses};
use crate::range::AddressRange;
use crate::sync::{Arc, Lock, Ordering};
use alloc::vec::Vec;
use futures::future::join_all;

/// So often in a row the same change ends an attempt before the device is taken to raise it itself.
const SAME_CHANGE: u32 = 8;
/// So many turns of the other tasks a caller has to take what was registered for it, before the
/// next one that needs the place takes it away.
const TURNS: u32 = 64;

/// Registers what `range` takes, which is one registration.
pub(super) async fn one<D: Device>(core: &Arc<Core<D>>, range: AddressRange) -> Result<Arc<Live<D>>, GetError<D::Error>> {
    let limits = &core.limits;
    if !limits.fits(limits.pages(range)) {
        return Err(GetError::TooLarge { max: limits.max_registration });
    }
    if limits.overlap == Overlap::Allowed {
        return miss(core, range, None).await;
    }
    // One piece, because it fits.
    Ok(all(core, range).await?.swap_remove(0))
}

/// Registers what `range` takes. Holds nothing while it waits: what it has it only
/// [keeps](Claim::keep), and takes all of it at once in the end.
pub(super) async fn all<D: Device>(core: &Arc<Core<D>>, range: AddressRange) -> Result<Vec<Arc<Live<D>>>, GetError<D::Error>> {
    let tries = core.limits.tries.max(1);
    for _ in 0..tries {
        let kept = match core.limits.overlap {
            Overlap::Allowed => keep(core, range, |_| None).await?,
            _ => in_turn(core, range).await?,
        };
        loop {
            open(core).await;
            let found = core.limits.pieces(range).map(|piece| core.look_up(piece, 0));
            if let Some(found) = found.collect::<Option<Vec<_>>>() {
                return Ok(found);
            }
            if !core.space.shared().gate.is_closed() {
                break;
            }
        }
        core.collisions.fetch_add(1, Ordering::Relaxed);
        drop(kept);
    }
    Err(GetError::Invalidated { tries })
}

/// Waits until the gate is open, or has been since this began.
async fn open<D: Device>(core: &Core<D>) {
    if core.space.shared().gate.is_closed() {
        let mut since = Since::default();
        core::future::poll_fn(|cx| core.space.shared().poll_gate(&mut since, cx)).await;
    }
}

/// Finds or registers all pieces of `range`, and keeps them. In a turn, `target` is what may be
/// registered for a piece.
async fn keep<D: Device>(
    core: &Arc<Core<D>>,
    range: AddressRange,
    target: impl Fn(AddressRange) -> Option<AddressRange>,
) -> Kept<D> {
    let mut kept = Vec::new();
    for piece in core.limits.pieces(range) {
        let live = match core.hit(piece) {
            Some(live) => live,
            None => miss(core, piece, target(piece)).await?,
        };
        kept.extend(Claim::keep(live));
    }
    Ok(kept)
}

/// Claims on all pieces of a range, in order.
type Kept<D> = Result<Vec<Claim<D>>, GetError<<D as Device>::Error>>;

/// What a turn came to.
struct Answer<D: Device> {
    losses: Arc<Losses>,
    kept: Lock<Option<Kept<D>>>,
}

impl<D: Device> Drop for Answer<D> {
    fn drop(&mut self) {
        // It may hold the device's error.
        let kept = self.kept.get_mut().take();
        self.losses.run(Callback::Device, |_| drop(kept));
    }
}

/// Does the same in a turn: once no earlier caller needs what overlaps. The work belongs to nobody,
/// so that those behind need not wait for this caller to be polled.
async fn in_turn<D: Device>(core: &Arc<Core<D>>, range: AddressRange) -> Kept<D> {
    let pages = core.limits.pages(range);
    let single = core.limits.fits(pages);
    let union = if single { core.union(range) } else { pages };
    let losses = &core.device.losses;
    let answer = Arc::new(Answer { losses: losses.clone(), kept: Lock::new(None) });
    let turn = core.turns.enter(union, |number, cancelled| {
        let placed = Placed { turns: core.turns.clone(), number };
        let (core, answer) = (core.clone(), answer.clone());
        let work = async move {
            placed.turns.come(number).await;
            let kept = keep(&core, range, |piece| Some(if single { union } else { piece })).await;
            *answer.kept.lock() = Some(kept);
            drop(placed);
        };
        Task::new(losses, unless(cancelled, work))
    });
    turn.wait().await;
    let kept = answer.kept.lock().take();
    kept.unwrap_or(Ok(Vec::new()))
}

/// Waits until nothing of the device overlaps `target`, or something will do for `range`. In a turn
/// only: nobody else begins anything there.
async fn make_way<D: Device>(core: &Core<D>, target: AddressRange, range: AddressRange) -> Result<(), GetError<D::Error>> {
    let mut patience = TURNS;
    while let Some(way) = core.in_the_way(target, range).filter(|way| !way.is_empty()) {
        if let Some(lost) = way.iter().find(|entry| entry.is_lost()) {
            return Err(GetError::Lost { range: lost.range });
        }
        // What its caller has left is finished first.
        let registering: Vec<_> = way.iter().filter_map(|entry| entry.registering()).collect();
        if !registering.is_empty() {
            drop(way);
            join_all(registering).await;
        } else if patience > 0 && way.iter().any(|entry| entry.is_kept()) {
            patience -= 1;
            drop(way);
            yield_now().await;
        } else {
            way.iter().for_each(|entry| core.give_way(entry));
            if way.iter().all(|entry| entry.leaving().is_none()) {
                yield_now().await;
            }
            gone(way, Entry::is_lost).await;
        }
    }
    Ok(())
}

/// How often a caller has tried to have its range registered.
struct Tries<D: Device> {
    made: u32,
    /// What the device has registered at the last try, if it was not found then.
    registered: Option<Arc<Entry<D>>>,
    last: Option<Change>,
    same: u32,
    made_room: bool,
    /// Its neighbours were too much, so it is registered without them.
    alone: bool,
    /// What was registered at an earlier try was given up to make room for others: the next is
    /// taken at once.
    hurried: bool,
    /// How often the device did not vouch for what was found.
    outdated: u32,
}

impl<D: Device> Tries<D> {
    /// Whether the same change has come too often in a row.
    fn collided(&mut self, by: Option<Change>) -> bool {
        self.same = if by.is_some() && by == self.last { self.same + 1 } else { 1 };
        self.last = by;
        by.is_some() && self.same >= SAME_CHANGE
    }

    /// What was registered at the last try was taken away before the caller had it. Whether the same
    /// change has done so too often.
    fn overtaken(&mut self, core: &Core<D>, entry: &Entry<D>) -> bool {
        let Some(by) = entry.ended_by() else {
            // Nothing has changed: others needed room.
            self.made -= 1;
            self.hurried = true;
            return false;
        };
        core.collisions.fetch_add(1, Ordering::Relaxed);
        self.collided(Some(by))
    }
}

/// Has `range` registered, or finds it. In a turn, `target` is what may be registered for it once
/// nothing overlaps that.
async fn miss<D: Device>(
    core: &Arc<Core<D>>,
    range: AddressRange,
    target: Option<AddressRange>,
) -> Result<Arc<Live<D>>, GetError<D::Error>> {
    core.misses.fetch_add(1, Ordering::Relaxed);
    let mut tries =
        Tries { made: 0, registered: None, last: None, same: 0, made_room: false, alone: false, hurried: false, outdated: 0 };
    loop {
        open(core).await;
        let own = tries.alone.then(|| core.limits.pages(range));
        if let Some(target) = target {
            make_way(core, own.unwrap_or(target), range).await?;
        }
        let (claim, now) = match core.find_or_begin(range, own.or(target))? {
            Found::Live(live) if core.device.still_valid(live.range, live.handle()) => return Ok(live),
            Found::Live(live) => {
                core.outdate(live);
                tries.outdated += 1;
                if tries.outdated >= core.limits.tries.max(1) {
                    return Err(GetError::Invalidated { tries: tries.made });
                }
                continue;
            }
            Found::Attempt(claim, now) => (claim, now),
        };
        // Registered, and then taken away before the gate had opened, or while there was waited for room.
        let overtaken = tries.registered.take().is_some_and(|entry| tries.overtaken(core, &entry));
        if overtaken || tries.made >= core.limits.tries.max(1) {
            return Err(GetError::Invalidated { tries: tries.made });
        }
        tries.made += 1;
        let entry = claim.entry().clone();
        let attempt = life::attempt(&entry, now, || core.device.source.watch(entry.range)).await;
        // From the table, not from the attempt. Before the limits are looked at, so that it is in use.
        let registration = core.look_up(range, now);
        drop(claim);
        let gone = core.tidy();
        if (gone.is_empty() || tries.hurried)
            && let Some(registration) = registration
        {
            // Those who come later look after what is to go.
            return Ok(registration);
        }
        // A `get` that is not polled must not hold a registration.
        drop(registration);
        until_gone(gone).await;
        if let Some(live) = core.look_up(range, now) {
            return Ok(live);
        }
        let no_room = match attempt {
            Ok(Outcome::Live) => {
                tries.registered = Some(entry);
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
            Err(why) => return Err(GetError::Unwatched(why)),
        };
        if !core.make_room().await || core::mem::replace(&mut tries.made_room, true) {
            // Its neighbours may be what is too much.
            if tries.alone || entry.range == core.limits.pages(range) {
                return Err(no_room);
            }
            tries.alone = true;
        }
        // The device's error is the device's code.
        core.device.losses.run(Callback::Device, |_| drop(no_room));
        tries.made -= 1;
    }
}
