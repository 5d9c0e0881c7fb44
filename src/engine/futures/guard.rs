//! The guard of an invalidation, and the handle of the space that guard and future hold.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::quick::{Begun, ByHand, end};
use crate::engine::work::Work;
use crate::notifier::Sequence;
use crate::protocol::Id;
use crate::range::AddressRange;
use crate::sync::Arc;
use alloc::boxed::Box;
use core::fmt;

/// A handle of the space, borrowed or owned. A borrowed one saves two atomic changes of the
/// reference count (measured: docs/measurements.md).
pub(crate) enum Handle<'a> {
    Borrowed(&'a Shared),
    Owned(Arc<Shared>),
}

impl core::ops::Deref for Handle<'_> {
    type Target = Shared;

    #[inline]
    fn deref(&self) -> &Shared {
        match self {
            Self::Borrowed(space) => space,
            Self::Owned(space) => space,
        }
    }
}

impl Clone for Handle<'_> {
    #[inline]
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
/// invalidation, and its readers wait, until the guard is dropped. Change the memory before that.
///
/// Dropping the guard ends the invalidation (`mmu_notifier_invalidate_range_end`). It never waits.
/// The guard may be held across awaits and moved to another thread. If it is leaked, the range
/// stays under invalidation for ever.
#[must_use = "dropping the guard ends the invalidation: keep it until the memory has changed"]
pub struct InvalidationGuard<'a> {
    /// Empty once another guard has taken over.
    space: ByHand<Handle<'a>>,
    id: Id,
    /// Empty if the invalidation hit nothing.
    work: ByHand<Box<Work>>,
}

impl<'a> InvalidationGuard<'a> {
    #[inline]
    pub(super) fn new(space: Handle<'a>, begun: Begun) -> Self {
        let (id, work) = begun.into_held();
        Self { space: ByHand::full(space), id, work: work.into() }
    }

    /// Returns the range under invalidation, from the first address to the last one.
    pub fn range(&self) -> AddressRange {
        self.space().with(|state, _| {
            state.protocol.active().get(self.id).map_or(AddressRange::ALL, |active| active.range)
        })
    }

    /// Returns the sequence that the passes got; odd if a notifier was hit.
    pub fn sequence(&self) -> Sequence {
        self.space().with(|state, _| {
            Sequence(state.protocol.active().get(self.id).map_or(0, |active| active.sequence))
        })
    }

    /// Returns how many notifiers the invalidation hit.
    pub fn hits(&self) -> usize {
        self.work.get().map_or(0, |work| work.hits.len())
    }

    /// Gives the guard a handle of the space of its own, so that it can be kept in a structure or
    /// sent to a task.
    pub fn into_owned(mut self) -> InvalidationGuard<'static> {
        InvalidationGuard {
            space: self.space.take().map(Handle::into_owned).into(),
            work: self.work.take().into(),
            id: self.id,
        }
    }

    fn space(&self) -> &Shared {
        match self.space.get() {
            Some(space) => space,
            None => unreachable!("the handle goes only in `into_owned` and in the drop"),
        }
    }
}

impl Drop for InvalidationGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        match self.space.get() {
            // A borrowed handle is not dropped, so it stays where it is.
            Some(Handle::Borrowed(space)) => end(space, self.id, self.work.take()),
            Some(Handle::Owned(_)) => end_owned(self.space.take(), self.id, self.work.take()),
            None => {}
        }
    }
}

#[inline(never)]
fn end_owned(space: Option<Handle<'_>>, id: Id, work: Option<Box<Work>>) {
    if let Some(space) = space {
        end(&space, id, work);
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
