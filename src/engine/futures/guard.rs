//! The guard of an invalidation, and the handle of the space that it and its future hold.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::quick::end;
use crate::engine::work::Work;
use crate::notifier::Sequence;
use crate::protocol::Id;
use crate::range::AddressRange;
use crate::sync::Arc;
use alloc::boxed::Box;
use core::fmt;
use core::mem::ManuallyDrop;

/// A handle of the space, borrowed or owned. Borrowing costs nothing, where a reference count would
/// be a third of a short invalidation.
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
    pub(crate) fn into_owned(self) -> Handle<'static> {
        Handle::Owned(match self {
            Self::Borrowed(space) => space.handle(),
            Self::Owned(space) => space,
        })
    }
}

/// An invalidation whose passes are all done: no device uses the old mapping. The range stays under
/// invalidation, and its readers wait, until the guard is dropped: change the memory in between.
///
/// Dropping it is the end of the invalidation (`mmu_notifier_invalidate_range_end`); it never
/// waits. It may be held across awaits, moved to another thread, and leaked: then the range stays
/// under invalidation for ever.
#[must_use = "dropping the guard ends the invalidation: keep it until the memory has changed"]
pub struct InvalidationGuard<'a> {
    /// `None` once another guard has taken over. Dropped by hand, as is `work`, so that the end of
    /// a short invalidation is short.
    space: ManuallyDrop<Option<Handle<'a>>>,
    id: Id,
    work: ManuallyDrop<Option<Box<Work>>>,
}

impl<'a> InvalidationGuard<'a> {
    #[inline(always)]
    pub(super) fn new(space: Handle<'a>, id: Id, work: Option<Box<Work>>) -> Self {
        Self { space: ManuallyDrop::new(Some(space)), id, work: ManuallyDrop::new(work) }
    }

    /// What is under invalidation, from the first address to the last one.
    pub fn range(&self) -> AddressRange {
        self.space().with(|state, _| {
            state.protocol.active().get(self.id).map_or(AddressRange::ALL, |active| active.range)
        })
    }

    /// The sequence that the passes got; odd if a notifier was hit.
    pub fn sequence(&self) -> Sequence {
        self.space().with(|state, _| {
            Sequence(state.protocol.active().get(self.id).map_or(0, |active| active.sequence))
        })
    }

    /// How many notifiers the invalidation hit.
    pub fn hits(&self) -> usize {
        self.work.as_ref().map_or(0, |work| work.hits.len())
    }

    /// The same guard with a handle of the space of its own, to be kept in a structure or sent to a
    /// task.
    pub fn into_owned(mut self) -> InvalidationGuard<'static> {
        InvalidationGuard {
            space: ManuallyDrop::new(self.space.take().map(Handle::into_owned)),
            work: ManuallyDrop::new(self.work.take()),
            id: self.id,
        }
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
            Some(Handle::Borrowed(space)) => finish(space, self.id, self.work.take()),
            Some(Handle::Owned(_)) => finish_owned(self.space.take(), self.id, self.work.take()),
            None => {}
        }
    }
}

#[inline(never)]
fn finish_owned(space: Option<Handle<'_>>, id: Id, work: Option<Box<Work>>) {
    if let Some(space) = space {
        finish(&space, id, work);
    }
}

#[inline(always)]
fn finish(space: &Shared, id: Id, work: Option<Box<Work>>) {
    match work {
        Some(work) => end(space, id, work),
        None => space.end_without_hits(id),
    }
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
