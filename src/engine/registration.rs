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

/// What a registration has of its entry. As wide as the words beside it: a narrow store would be
/// waited for when they are moved.
#[derive(Clone, Copy, PartialEq)]
#[repr(usize)]
enum Custody {
    /// It is one of those who keep it alive.
    Shared,
    /// It is the only one who has it.
    Alone,
    /// The same, and the memory goes to [`Shared::spare`].
    Spare,
    /// The entry may be gone.
    Nothing,
}

impl<N: IntervalNotifier> Registered<N> {
    pub(crate) fn new(space: Arc<Shared>, entry: EntryBox<N>) -> Self {
        Self { space, entry, custody: Custody::Shared }
    }

    /// Closes the notifier; moves it out and ends the registration if nothing can call it any more
    /// (L1).
    pub(crate) fn try_take(&mut self) -> Option<N> {
        let Self { space, entry, custody } = self;
        let erased = entry.erase();
        let (notifier, unused) = space.with(|state, _| {
            state.close(erased);
            if space.quiet(state, erased) != Quiet::Yes {
                return None;
            }
            // Quiet and closed: nothing will call it again, also if an invalidation still covers
            // it.
            let notifier = entry.take();
            *custody = Custody::Nothing;
            erased.detach();
            Some((notifier, erased.unused()))
        })?;
        if unused {
            // Without its notifier: no foreign code is left in it.
            space.host.losses.run(Callback::NotifierDrop, |inside| erased.free(inside));
        }
        Some(notifier)
    }

    /// Closes the notifier; if nobody else has any business with its entry, which is mostly so,
    /// ends the registration and says so.
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
            Custody::Shared => self.space.leave(entry),
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
    /// Puts a notifier into the index, behind all others with its start; gives it back in a space
    /// that was released (L4).
    #[inline(always)]
    pub(crate) fn register<N: IntervalNotifier>(
        &self,
        range: AddressRange,
        notifier: N,
    ) -> Result<EntryBox<N>, N> {
        if !self.spare.is_filled() {
            return self.register_anew(range, notifier);
        }
        let mut state = self.state.lock();
        let (false, Some(room)) = (state.released, self.spare.take()) else {
            drop(state);
            return self.register_anew(range, notifier);
        };
        // What is written goes on while the index waits for its own loads; before the lock it would
        // be waited for.
        let entry = EntryBox::new(room, range, notifier);
        state.attach(entry.erase());
        Ok(entry)
    }

    /// The same in new memory; what was spare and does not fit makes room for what is used now.
    #[inline(never)]
    fn register_anew<N: IntervalNotifier>(
        &self,
        range: AddressRange,
        notifier: N,
    ) -> Result<EntryBox<N>, N> {
        let room = Room::new();
        // The lock is free before that is.
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

    /// Frees an entry whose notifier its own driver drops: a panic of that is the caller's.
    #[cold]
    #[inline(never)]
    fn free(&self, entry: EntryRef) {
        self.host.losses.run_for_caller(Callback::NotifierDrop, |inside| entry.free(inside));
    }

    /// Ends a registration without waiting.
    #[inline(never)]
    fn leave(&self, entry: EntryRef) {
        let unused = self.with(|state, _| {
            state.close(entry);
            entry.detach();
            entry.unused()
        });
        if unused {
            self.free(entry);
        }
    }

    /// Closes a notifier and, if nobody but its subscription has any business with it, leaves its
    /// entry to that.
    #[inline(never)]
    fn detach(&self, entry: EntryRef) -> Custody {
        let Some(mut state) = self.state.try_lock() else { return self.detach_slowly(entry) };
        // Without an invalidation that covers it there is neither a call nor a pass.
        let alone = entry.retire();
        if !alone {
            drop(state);
            return self.detach_slowly(entry);
        }
        let spare = self.spare.reserve();
        state.protocol.remove(entry);
        if spare { Custody::Spare } else { Custody::Alone }
    }

    /// The same for one that somebody has to do with or that is closed already, or with the lock
    /// taken.
    #[cold]
    #[inline(never)]
    fn detach_slowly(&self, entry: EntryRef) -> Custody {
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

/// Whether no call of a notifier and no pass of it is under way.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Quiet {
    Yes,
    /// A first pass runs on another thread and will not tell us.
    Soon,
    /// Somebody will tell us.
    No,
}

impl Shared {
    /// L1: whether no call of the notifier and no pass of it is under way. The guards that others
    /// hold do not matter.
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
