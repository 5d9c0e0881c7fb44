//! A registered notifier in memory: the only module with `unsafe` code.
//!
//! An [`Entry`] holds what the library keeps of a notifier and the notifier itself, in one allocation. [`EntryRef`] points to
//! it without counting: an invalidation of 256 notifiers would otherwise spend more on reference counts than on everything
//! else it does (`DESIGN.md`, "Entries without reference counts").
//!
//! # Why an `EntryRef` may be dereferenced
//! An entry is freed by [`EntryRef::free`] and nowhere else, by the one who finds, **under the space's lock**, that none of these
//! holds any more ([`Entry::unused`]):
//!
//! 1. `ATTACHED`: the entry is in the index, or its [`EntryBox`] (the subscription) exists;
//! 2. an active invalidation covers it (`own.is_covered()`);
//! 3. somebody holds it (`holds > 0`), to call `name` outside the lock.
//!
//! Each of the three changes only under the lock. The places that keep an `EntryRef` are the index (1), the subscription (1), the hits,
//! late members and passes of an active invalidation (2), and lists of names in the making (3). So whoever has one has a
//! reason why it is alive, and the last reason to go frees it, once.
//!
//! The notifier is moved out by [`EntryRef::take`] (`remove`), or dropped with the entry. It is called only by an invalidation in
//! its first passes, and `remove` takes it after there is none of those left that could (`engine::remove`).

use crate::index::Indexed;
use crate::notifier::IntervalNotifier;
use crate::protocol::{Member, Own};
use crate::range::AddressRange;
use crate::sync::{AtomicU32, Ordering};
use crate::tally::Tally;
use alloc::boxed::Box;
use core::mem::ManuallyDrop;
use core::ops::Deref;
use core::ptr::{self, NonNull};

/// No waiter: see [`Entry::first_waiter`].
pub(crate) const NO_WAITER: u32 = u32::MAX;

/// The subscription exists.
const ATTACHED: u32 = 1;
/// `remove` was called or the subscription dropped: new calls must not begin (L1).
const REMOVED: u32 = 2;
/// The notifier has been moved out.
const TAKEN: u32 = 4;

/// What the library keeps of one notifier. All of it but `own`'s word and `flags` is written only under the space's lock; these are
/// atomics so that this need not be argued with `unsafe`, and cost what plain fields cost.
pub(crate) struct Entry {
    pub(crate) own: Own,
    flags: AtomicU32,
    holds: AtomicU32,
    /// Head of the list of futures that wait for this notifier, a key of the space's waiters.
    pub(crate) first_waiter: AtomicU32,
    /// Passes of this notifier that are pending.
    pub(crate) pending: AtomicU32,
    pub(crate) tally: Tally,
    order: u64,
    pub(crate) range: AddressRange,
    /// Checks until one is forced to fail; 0 when none is.
    #[cfg(feature = "test-util")]
    pub(crate) collide_on: AtomicU32,
}

impl Entry {
    /// Whether a future waits for this notifier, or it is on its way out: then the end of an invalidation has more to do.
    #[inline]
    pub(crate) fn wants_attention(&self) -> bool {
        self.first_waiter.load(Ordering::Relaxed) != NO_WAITER || self.flags.load(Ordering::Relaxed) & ATTACHED == 0
    }

    /// Whether calls of the notifier that have not begun must not begin (L1).
    #[inline]
    pub(crate) fn is_removed(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & REMOVED != 0
    }

    pub(crate) fn set_removed(&self) {
        let flags = self.flags.load(Ordering::Relaxed);
        self.flags.store(flags | REMOVED, Ordering::Relaxed);
    }

    /// The subscription is gone.
    pub(crate) fn detach(&self) {
        let flags = self.flags.load(Ordering::Relaxed);
        self.flags.store(flags & !ATTACHED, Ordering::Relaxed);
    }

    pub(crate) fn hold(&self) {
        self.holds.store(self.holds.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    pub(crate) fn is_held(&self) -> bool {
        self.holds.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn unhold(&self) {
        self.holds.store(self.holds.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
    }

    /// Whether nothing keeps the entry alive; under the lock.
    pub(crate) fn unused(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & ATTACHED == 0 && !self.own.is_covered() && !self.is_held()
    }
}

#[repr(C)]
struct Allocation<N: ?Sized> {
    entry: Entry,
    notifier: ManuallyDrop<N>,
}

/// A pointer to an entry whose notifier's type is not known. See the module for why it is valid.
#[derive(Clone, Copy)]
pub(crate) struct EntryRef(NonNull<Allocation<dyn IntervalNotifier>>);

/// The subscription's pointer to an entry, which knows the notifier's type.
pub(crate) struct EntryBox<N>(NonNull<Allocation<N>>);

// SAFETY: an `EntryRef` gives shared access to an `Entry`, which is `Sync`, and to the notifier, which is `Send + Sync` by
// the bounds of `IntervalNotifier`; `free` may drop the notifier on another thread, which `Send` allows.
unsafe impl Send for EntryRef {}
// SAFETY: as above.
unsafe impl Sync for EntryRef {}
// SAFETY: an `EntryBox` gives shared access to `N` and lets it be moved out, as a `Box<N>` does; `N: IntervalNotifier` is `Send + Sync`.
unsafe impl<N: Send + Sync> Send for EntryBox<N> {}
// SAFETY: as above.
unsafe impl<N: Send + Sync> Sync for EntryBox<N> {}

impl<N: IntervalNotifier> EntryBox<N> {
    /// A new entry, attached, whose place among equals is `order`.
    pub(crate) fn new(range: AddressRange, notifier: N) -> Self {
        let entry = Entry {
            own: Own::new(),
            flags: AtomicU32::new(ATTACHED),
            holds: AtomicU32::new(0),
            first_waiter: AtomicU32::new(NO_WAITER),
            pending: AtomicU32::new(0),
            tally: Tally::new(),
            order: 0,
            range,
            #[cfg(feature = "test-util")]
            collide_on: AtomicU32::new(0),
        };
        let allocation = Box::new(Allocation { entry, notifier: ManuallyDrop::new(notifier) });
        Self(NonNull::from(Box::leak(allocation)))
    }

    /// Names the entry's place among equals; before it is shared.
    pub(crate) fn set_order(&mut self, order: u64) {
        // SAFETY: `&mut self` of an entry that was not shared yet: nothing else points to it.
        unsafe { self.0.as_mut() }.entry.order = order;
    }

    /// The same entry without its notifier's type.
    #[inline]
    pub(crate) fn erase(&self) -> EntryRef {
        EntryRef(self.0 as NonNull<Allocation<dyn IntervalNotifier>>)
    }

    /// Undoes `new` for an entry that was never shared.
    pub(crate) fn into_notifier(self) -> N {
        // SAFETY: `new` leaked this box; it was never shared, so nothing else points to it.
        let allocation = unsafe { Box::from_raw(self.0.as_ptr()) };
        ManuallyDrop::into_inner(allocation.notifier)
    }

    /// The notifier.
    #[inline]
    pub(crate) fn notifier(&self) -> &N {
        // SAFETY: the entry is alive by reason 1, and `take` consumes the `EntryBox`.
        unsafe { &(*self.0.as_ptr()).notifier }
    }

    /// Moves the notifier out. To be called once, when nothing can call it any more; then `notifier` must not be called again.
    pub(crate) fn take(&self) -> N {
        let allocation = self.0.as_ptr();
        // SAFETY: alive by reason 1. Only fields are borrowed, so that the borrows of `entry` by others do not matter. The notifier
        // is not called any more, and `TAKEN` keeps `free` from dropping it again.
        unsafe {
            let flags = &(*allocation).entry.flags;
            flags.store(flags.load(Ordering::Relaxed) | TAKEN, Ordering::Relaxed);
            ptr::read(&*(*allocation).notifier)
        }
    }
}

impl<N> Deref for EntryBox<N> {
    type Target = Entry;

    #[inline]
    fn deref(&self) -> &Entry {
        // SAFETY: alive by reason 1. Only the `entry` field is borrowed.
        unsafe { &(*self.0.as_ptr()).entry }
    }
}

impl EntryRef {
    /// The notifier, to be called.
    #[inline]
    pub(crate) fn notifier(&self) -> &dyn IntervalNotifier {
        // SAFETY: alive (module documentation); not taken while an invalidation in its first passes, or a hold, may call it.
        let notifier = unsafe { &(*self.0.as_ptr()).notifier };
        &**notifier
    }

    /// Whether `take` has moved the notifier out.
    pub(crate) fn is_taken(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & TAKEN != 0
    }

    /// Frees the entry, and drops the notifier unless it was taken. Runs driver code, so not under the lock.
    ///
    /// To be called once, by the one who saw `unused()` under the lock.
    pub(crate) fn free(self) {
        let taken = self.is_taken();
        // SAFETY: `unused()` was seen under the lock: none of the three reasons holds, so no other `EntryRef` or `EntryBox` is used
        // any more, and `EntryBox::new` made this box.
        let mut allocation = unsafe { Box::from_raw(self.0.as_ptr()) };
        if !taken {
            // SAFETY: dropped once: the allocation goes away with it, also when the drop panics.
            unsafe { ManuallyDrop::drop(&mut allocation.notifier) };
        }
    }
}

impl Deref for EntryRef {
    type Target = Entry;

    #[inline]
    fn deref(&self) -> &Entry {
        // SAFETY: alive (module documentation). Only the `entry` field is borrowed.
        unsafe { &(*self.0.as_ptr()).entry }
    }
}

impl PartialEq for EntryRef {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        ptr::addr_eq(self.0.as_ptr(), other.0.as_ptr())
    }
}

impl Indexed for EntryRef {
    #[inline]
    fn order(self) -> u64 {
        self.order
    }
}

impl Member for EntryRef {
    #[inline]
    fn own(&self) -> &Own {
        &self.own
    }
}
