//! How a notifier enters the space, and how its registration ends (L1, L3, L4).
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::state::State;
use crate::entry::{EntryBox, EntryRef, Room};
use crate::foreign::Callback;
use crate::notifier::IntervalNotifier;
use crate::range::AddressRange;
use crate::sync::{Arc, Ordering};

/// A registered notifier and the space that it is registered with. Dropping it ends the
/// registration without waiting.
pub(crate) struct Registered<N: IntervalNotifier> {
    pub(crate) space: Arc<Shared>,
    pub(crate) entry: EntryBox<N>,
    custody: Custody,
}

/// Who else needs the entry of a registration. One word wide, as the fields beside it: a narrower
/// store would stall the move of all three.
#[derive(Clone, Copy, PartialEq)]
#[repr(usize)]
pub(super) enum Custody {
    /// Others may keep the entry alive, too.
    Shared,
    /// The registration alone has the entry, and frees it.
    Alone,
    /// The registration alone has the entry, and gives its memory to [`Shared::spare`].
    Spare,
    /// The registration has ended, and the entry may be freed.
    Nothing,
}

impl<N: IntervalNotifier> Registered<N> {
    pub(crate) fn new(space: Arc<Shared>, entry: EntryBox<N>) -> Self {
        Self { space, entry, custody: Custody::Shared }
    }

    /// Closes the notifier. If nothing can call it any more (L1), moves it out and ends the
    /// registration.
    pub(crate) fn try_take(&mut self) -> Option<N> {
        let Self { space, entry, custody } = self;
        let erased = entry.erase();
        let (notifier, unused) = space.with(|state, _| {
            state.close(erased);
            if space.quiet(state, erased) != Quiet::Yes {
                return None;
            }
            // Nothing calls it again, also if an invalidation still covers it.
            let notifier = entry.take();
            *custody = Custody::Nothing;
            erased.detach();
            Some((notifier, erased.unused()))
        })?;
        if unused {
            // The notifier was moved out, so this runs no foreign code.
            space.host.losses.run(Callback::NotifierDrop, |inside| erased.free(inside));
        }
        Some(notifier)
    }

    /// Closes the notifier. If nothing else needs its entry, which is the common case, ends the
    /// registration and returns `true`.
    #[inline]
    pub(crate) fn detach(&mut self) -> bool {
        self.custody = self.space.detach(self.entry.erase());
        self.custody != Custody::Shared
    }
}

impl<N: IntervalNotifier> Drop for Registered<N> {
    #[inline]
    fn drop(&mut self) {
        let entry = self.entry.erase();
        match self.custody {
            Custody::Nothing => {}
            Custody::Shared => self.space.unregister(entry),
            Custody::Alone => self.space.free(entry),
            Custody::Spare if entry.is_taken() => self.space.spare.put(entry),
            Custody::Spare => {
                // The drop of the notifier may panic.
                self.space.spare.cancel();
                self.space.free(entry);
            }
        }
    }
}

impl Shared {
    /// Puts a notifier into the index, in new memory. Frees spare memory that does not fit.
    #[inline(never)]
    pub(super) fn register_plainly<N: IntervalNotifier>(
        &self,
        range: AddressRange,
        notifier: N,
    ) -> Result<EntryBox<N>, N> {
        let room = Room::new();
        // Declared before the lock, so freed after it.
        let _unfit;
        let mut state = self.state.lock();
        _unfit = self.spare.clear();
        if state.released {
            return Err(notifier);
        }
        let entry = EntryBox::new(room, range, notifier);
        state.attach(entry.erase());
        Ok(entry)
    }

    /// Frees an entry. A panic of the notifier's drop goes on in the caller.
    #[cold]
    #[inline(never)]
    fn free(&self, entry: EntryRef) {
        self.host.losses.run_for_caller(Callback::NotifierDrop, |inside| entry.free(inside));
    }

    /// Ends a registration without waiting.
    #[inline(never)]
    fn unregister(&self, entry: EntryRef) {
        let unused = self.with(|state, _| {
            state.close(entry);
            entry.detach();
            entry.unused()
        });
        if unused {
            self.free(entry);
        }
    }

    /// Closes a notifier, which may be covered, held or closed. If nothing but its subscription
    /// needs its entry, leaves the entry to the subscription.
    #[cold]
    #[inline(never)]
    pub(super) fn detach_plainly(&self, entry: EntryRef) -> Custody {
        let mut state = self.state.lock();
        state.close(entry);
        let alone = !entry.own.is_covered() && !entry.is_held();
        if !alone {
            return Custody::Shared;
        }
        entry.detach();
        Custody::Alone
    }
}

/// Whether a call of a notifier or a pass of it is under way.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Quiet {
    /// Neither is.
    Yes,
    /// A first pass runs on another thread. It wakes no one when it returns.
    Soon,
    /// A pass is pending, or the notifier is asked for its name. The end of that wakes the waiters.
    No,
}

impl Shared {
    /// Returns whether a call of the notifier or a pass of it is under way (L1). Guards do not
    /// matter.
    pub(crate) fn quiet(&self, state: &State, entry: EntryRef) -> Quiet {
        if entry.pending.load(Ordering::Relaxed) != 0 || entry.is_held() {
            return Quiet::No;
        }
        if !entry.own.is_covered() {
            return Quiet::Yes;
        }
        let calls = state
            .protocol
            .active()
            .any_overlapping(entry.range, |id, active| self.calls(id, active.extra.calls));
        if calls { Quiet::Soon } else { Quiet::Yes }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use crate::sync::Arc;
    use crate::{
        AddressRange, AddressSpace, AsyncIntervalNotifier, AsyncNotifier, InvalidationInfo,
    };
    use futures::FutureExt;

    struct Quiet;

    impl AsyncIntervalNotifier for Quiet {
        async fn invalidate(self: Arc<Self>, _: InvalidationInfo) {}
    }

    #[test]
    fn the_memory_of_a_notifier_that_was_taken_is_kept_for_the_next_one() {
        let space = AddressSpace::new();
        let remove =
            || space.insert(AddressRange::ALL, AsyncNotifier::new(Quiet)).unwrap().remove();
        let is_kept = || space.shared().spare.is_filled();
        drop(remove());
        assert!(!is_kept(), "the notifier was dropped in its place");
        let mut removal = remove();
        assert!((&mut removal).now_or_never().is_some() && !is_kept());
        drop(removal);
        assert!(is_kept());
        drop(remove());
        assert!(!is_kept());
    }
}
