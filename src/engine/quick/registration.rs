//! A notifier enters and leaves while nothing is active around it.
#![forbid(unsafe_code)]

use crate::engine::Shared;
use crate::engine::registration::Custody;
use crate::entry::{EntryBox, EntryRef};
use crate::notifier::IntervalNotifier;
use crate::range::AddressRange;

impl Shared {
    /// Puts a notifier into the index, behind all others with its start. In a space that was
    /// released, gives the notifier back (L4).
    ///
    /// The plain form is [`register_plainly`](Self::register_plainly). Leaves for it if no memory
    /// of a former entry is there that fits.
    #[inline(always)]
    pub(crate) fn register<N: IntervalNotifier>(
        &self,
        range: AddressRange,
        notifier: N,
    ) -> Result<EntryBox<N>, N> {
        // With `Builder::plain_only` there is never such memory: only `detach` leaves it.
        if !self.spare.is_filled() {
            return self.register_plainly(range, notifier);
        }
        let mut state = self.state.lock();
        let (false, Some(room)) = (state.released, self.spare.take()) else {
            drop(state);
            return self.register_plainly(range, notifier);
        };
        // Behind the lock: the stores go on while the index waits for its own loads. Before the
        // lock they would be waited for.
        let entry = EntryBox::new(room, range, notifier);
        state.attach(entry.erase());
        Ok(entry)
    }

    /// Closes a notifier. If nothing but its subscription needs its entry, leaves the entry to the
    /// subscription.
    ///
    /// The plain form is [`detach_plainly`](Self::detach_plainly). With `Builder::plain_only` the
    /// notifier is only closed, and [`Remove`](crate::Remove) waits until it is quiet.
    #[inline(never)]
    pub(in crate::engine) fn detach(&self, entry: EntryRef) -> Custody {
        if self.host.is_plain_only() {
            self.with(|state, _| state.close(entry));
            return Custody::Shared;
        }
        let Some(mut state) = self.state.try_lock() else { return self.detach_plainly(entry) };
        // No invalidation covers it, so there is neither a call nor a pass.
        let alone = entry.retire();
        if !alone {
            drop(state);
            return self.detach_plainly(entry);
        }
        let spare = self.spare.reserve();
        state.protocol.remove(entry);
        if spare { Custody::Spare } else { Custody::Alone }
    }
}
