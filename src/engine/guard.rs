//! The guard of an invalidation, and the handle of the space that it and its future hold.
#![forbid(unsafe_code)]

use crate::engine::scratch::Scratch;
use crate::engine::{After, Shared, State};
use crate::notifier::Sequence;
use crate::observe;
use crate::protocol::Id;
use crate::range::AddressRange;
use crate::sync::Arc;
use alloc::boxed::Box;
use core::fmt;
use core::mem::ManuallyDrop;
use core::ops::DerefMut;

/// A handle of the space, borrowed or owned. Borrowing costs nothing, where a reference count would be a third of a short invalidation.
pub(crate) enum Handle<'a> {
    Borrowed(&'a Shared),
    Owned(Arc<Shared>),
}

impl core::ops::Deref for Handle<'_> {
    type Target = Shared;

    #[inline(always)]
    fn deref(&self) -> &Shared {
        match self {
            Self::Borrowed(space) => space,
            Self::Owned(space) => space,
        }
    }
}

impl Clone for Handle<'_> {
    #[inline(always)]
    fn clone(&self) -> Self {
        match self {
            Self::Borrowed(space) => Self::Borrowed(space),
            Self::Owned(space) => Self::Owned(space.clone()),
        }
    }
}

impl Handle<'_> {
    pub(super) fn into_owned(self) -> Handle<'static> {
        Handle::Owned(match self {
            Self::Borrowed(space) => space.handle(),
            Self::Owned(space) => space,
        })
    }
}

/// An invalidation whose passes are all done: no device uses the old mapping. The range stays under invalidation, and its readers
/// wait, until the guard is dropped: change the memory in between.
///
/// Dropping it is the end of the invalidation (`mmu_notifier_invalidate_range_end`); it never waits. It may be held across
/// awaits, moved to another thread, and leaked: then the range stays under invalidation for ever.
#[must_use = "dropping the guard ends the invalidation: keep it until the memory has changed"]
pub struct InvalidationGuard<'a> {
    /// `None` once another guard has taken over. Dropped by hand, as is `scratch`, so that the end of a short invalidation is short.
    space: ManuallyDrop<Option<Handle<'a>>>,
    /// An [`Id`], in a whole word, so that no padding is copied.
    id: u64,
    scratch: ManuallyDrop<Option<Box<Scratch>>>,
}

impl<'a> InvalidationGuard<'a> {
    #[inline(always)]
    pub(super) fn new(space: Handle<'a>, id: Id, scratch: Option<Box<Scratch>>) -> Self {
        Self { space: ManuallyDrop::new(Some(space)), id: u64::from(id), scratch: ManuallyDrop::new(scratch) }
    }

    /// What is under invalidation.
    pub fn range(&self) -> AddressRange {
        self.space().with(|state, _| state.protocol.active().get(self.id()).map_or(AddressRange::ALL, |active| active.range))
    }

    /// The sequence that the passes got; odd if a notifier was hit.
    pub fn sequence(&self) -> Sequence {
        self.space().with(|state, _| Sequence(state.protocol.active().get(self.id()).map_or(0, |active| active.sequence)))
    }

    /// How many notifiers the invalidation hit.
    pub fn hits(&self) -> usize {
        self.scratch.as_ref().map_or(0, |scratch| scratch.hits.len())
    }

    /// The same guard with a handle of the space of its own, to be kept in a structure or sent to a task.
    pub fn into_owned(mut self) -> InvalidationGuard<'static> {
        InvalidationGuard {
            space: ManuallyDrop::new(self.space.take().map(Handle::into_owned)),
            scratch: ManuallyDrop::new(self.scratch.take()),
            id: self.id,
        }
    }

    #[inline(always)]
    fn id(&self) -> Id {
        self.id as Id
    }

    fn space(&self) -> &Shared {
        match &*self.space {
            Some(space) => space,
            None => unreachable!("the handle goes only in `into_owned` and in the drop"),
        }
    }
}

impl Drop for InvalidationGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        match &*self.space {
            // A borrowed handle is not dropped, so it stays where it is.
            Some(Handle::Borrowed(space)) => finish(space, self.id(), self.scratch.take()),
            Some(Handle::Owned(_)) => finish_owned(self.space.take(), self.id(), self.scratch.take()),
            None => {}
        }
    }
}

#[inline(never)]
fn finish_owned(space: Option<Handle<'_>>, id: Id, scratch: Option<Box<Scratch>>) {
    if let Some(space) = space {
        finish(&space, id, scratch);
    }
}

#[inline(always)]
fn finish(space: &Shared, id: Id, scratch: Option<Box<Scratch>>) {
    match scratch {
        Some(scratch) => end(space, id, scratch),
        None => end_without_hits(space, id),
    }
}

/// Ends an invalidation (S3, C2).
#[inline(never)]
pub(super) fn end(space: &Shared, id: Id, scratch: Box<Scratch>) {
    if observe::ON || scratch.timed {
        return end_slowly(space, id, Some(scratch));
    }
    // One hit is what most have that have any: without a loop, and with nothing behind it that is not somebody else's last word, no register is saved.
    // The hit is read ahead of the lock, so that it is not waited for behind it.
    let only = if let [only] = scratch.hits[..] { Some(only) } else { None };
    let Some(mut state) = space.state.try_lock() else {
        return end_slowly(space, id, Some(scratch));
    };
    if let Some(only) = only
        && let Some(extra) = state.protocol.end_plainly(id, only)
    {
        extra.recycle(scratch);
        return;
    }
    end_locked(state, id, scratch);
}

/// The same for any number of hits, when the lock is taken.
#[cold]
#[inline(never)]
fn end_locked(mut state: impl DerefMut<Target = State>, id: Id, scratch: Box<Scratch>) {
    match state.protocol.end(id, &scratch.hits) {
        (false, extra) => extra.recycle(scratch),
        (true, _) => tell(state, id, scratch),
    }
}

/// Wakes whoever waited for the end of an invalidation.
#[cold]
#[inline(never)]
fn tell(mut state: impl DerefMut<Target = State>, id: Id, scratch: Box<Scratch>) {
    let mut after = After::default();
    state.tell(id, Some(scratch), &mut after);
    drop(state);
    after.run();
}

/// The same for one that hit nothing.
#[inline(never)]
fn end_without_hits(space: &Shared, id: Id) {
    let ended = space.clock.is_none() && space.state.try_lock().is_some_and(|mut state| state.protocol.end_without_hits(id));
    if !ended {
        end_slowly(space, id, None);
    }
}

/// The same for one that is timed or traced, under which notifiers were inserted, or that finds the lock taken.
#[cold]
fn end_slowly(space: &Shared, id: Id, mut scratch: Option<Box<Scratch>>) {
    let timed = space.clock.is_some() || scratch.as_ref().is_some_and(|scratch| scratch.timed);
    let now = if timed { space.now() } else { None };
    // Closed when the lock is free.
    let _trace = scratch.as_mut().map(|scratch| core::mem::take(&mut scratch.passes().trace));
    space.with(|state, after| state.end(id, scratch, now, after));
}

impl fmt::Debug for InvalidationGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InvalidationGuard")
            .field("range", &self.range())
            .field("sequence", &self.sequence())
            .field("hits", &self.hits())
            .finish()
    }
}
