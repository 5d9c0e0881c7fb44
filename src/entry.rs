//! A registered notifier in memory: the only module with `unsafe` code, except for the system calls
//! of `source`.
//!
//! An allocation holds an [`Entry`], which is what the library keeps of a notifier, and the
//! notifier itself. An [`EntryRef`] points to it without a reference count. With reference counts,
//! an invalidation of 256 notifiers would spend most of its time on them (`DESIGN.md`, "Entries
//! without reference counts").
//!
//! # Why an `EntryRef` may be dereferenced
//! An entry ends in one of two ways: [`EntryRef::free`] frees it, or a [`Spare`] receives its
//! memory. The caller of either has found, **under the space's lock**, that none of these reasons
//! to live holds any more ([`Entry::unused`]):
//!
//! 1. The entry is not `DETACHED`: it is in the index, or its [`EntryBox`] (the subscription)
//!    exists.
//! 2. An active invalidation covers it (`own.is_covered()`).
//! 3. It is held (`is_held()`), so that `name` can be called outside the lock.
//!
//! Each of the three changes only under the lock. An `EntryRef` is kept by the index (reason 1),
//! the subscription (1), the hits, newcomers and passes of an active invalidation (2), and a
//! list of names that is being made (3). So each `EntryRef` in use has a reason why its entry is
//! alive. The code that removes the last reason frees the entry, once.
//!
//! The notifier is moved out by [`EntryBox::take`] (`remove`), or dropped with the entry. Only an
//! invalidation in its first passes calls it. `remove` takes it when no invalidation is left that
//! could call it (`engine::registration`).
//!
//! # Why the functions of an entry fit its type
//! Only [`EntryBox::new`] makes an entry. It stores a notifier of type `N` and the [`VTable`] of
//! `N`. Neither changes its type later.
//!
//! # Who owns the memory of a former entry
//! The [`Spare`] owns it from [`Spare::put`] until [`Spare::take`] or [`Spare::clear`]. After that
//! the [`Room`] or the [`Vacant`] owns it. No other pointer to it is in use, because it was put
//! there instead of being freed. A removal whose future is leaked may have reserved the `Spare`. It
//! never fills it then, and the space works without a `Spare` from then on.
//!
//! What the attributes and the hand-made layouts of this module are worth is in
//! `docs/measurements.md`, "Attributes".

mod marks;
mod rare;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

use crate::foreign::{Callback, Inside, Losses};
use crate::index::{Indexed, Ordered, Position};
use crate::notifier::{IntervalNotifier, Invalidation, WouldBlock};
use crate::pass::PassFuture;
use crate::protocol::{Member, Own};
use crate::range::AddressRange;
use crate::sync::{AtomicPtr, AtomicU32, AtomicU64, OnceBox, Ordering};
use alloc::borrow::Cow;
use alloc::boxed::Box;
use core::alloc::Layout;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ops::Deref;
use core::pin::Pin;
use core::ptr::{self, NonNull};
use marks::TAKEN;
use rare::Rare;

/// What the library keeps of one notifier.
///
/// All fields but the word of `own` are written only under the space's lock, or while no other code
/// has the entry. They are atomics so that this needs no `unsafe`. They cost what plain fields
/// cost.
///
/// The fields that an invalidation loads come last, next to the notifier. Among many notifiers both
/// miss the caches, and this way they share a cache line. `repr(C)` keeps this order.
#[repr(C)]
pub(crate) struct Entry {
    pub(crate) range: AddressRange,
    /// The order among notifiers with the same start (O1).
    pub(crate) order: AtomicU64,
    /// Data that few notifiers need, allocated when it is needed first. Without it an entry is a
    /// sixth smaller, so that more entries fit the caches.
    rare: OnceBox<Rare>,
    /// The longest time, in microseconds, that an invalidation which hit the notifier was active.
    longest: AtomicU32,
    /// Number of pending passes of this notifier.
    pub(crate) pending: AtomicU32,
    /// The functions of the notifier's type.
    vtable: &'static VTable,
    /// The sequence and the covers. Marked as `WATCHED` while a future waits for this notifier, or
    /// while it is being removed. The end of an invalidation has more to do then.
    pub(crate) own: Own,
}

/// 256 entries, each with a driver of three words, fit an L1 cache of 32 KiB together with their
/// part of the index.
#[cfg(all(
    target_pointer_width = "64",
    not(any(loom, shuttle, debug_assertions, feature = "test-util"))
))]
const _: () = assert!(size_of::<Entry>() == 64);

impl Entry {
    /// Records that an invalidation which hit the notifier was active for `micros`. The caller has
    /// the space's lock, so this needs no read-modify-write.
    #[inline]
    pub(crate) fn lasted(&self, micros: u32) {
        if self.longest.load(Ordering::Relaxed) < micros {
            self.longest.store(micros, Ordering::Relaxed);
        }
    }
}

/// An entry with its notifier. `repr(C)` makes the entry the first field, so that a pointer to it
/// is a pointer to the allocation.
#[repr(C)]
struct Allocation<N> {
    entry: Entry,
    notifier: ManuallyDrop<N>,
}

/// A pointer to an entry whose notifier's type is not known. The module documentation says why it
/// is valid.
///
/// It points to the first field of an `Allocation`, and its provenance covers the whole of it. It
/// has one word, where a pointer to `dyn` has two. The index and the lists of hits hold little
/// else.
#[derive(Clone, Copy)]
pub(crate) struct EntryRef(NonNull<Entry>);

/// The subscription's pointer to an entry. It has the notifier's type.
pub(crate) struct EntryBox<N>(NonNull<Allocation<N>>);

/// A one-element cache for the memory of a removed entry. The next insertion of the same size uses
/// it again: a removal is often followed by an insertion.
///
/// It is null, [`RESERVED`], or a pointer to the memory. Reserving ([`reserve`](Self::reserve)) and
/// taking need the space's lock. Filling is a plain store by the code that reserved it, without the
/// lock. There is no read-modify-write.
pub(crate) struct Spare(AtomicPtr<Entry>);

/// The memory of a former entry. Dropping it frees the memory.
pub(crate) struct Vacant(NonNull<Entry>);

/// Memory for an entry with a notifier `N`.
pub(crate) struct Room<N>(Box<MaybeUninit<Allocation<N>>>);

/// The value of a [`Spare`] that is reserved and not yet filled.
const RESERVED: *mut Entry = ptr::without_provenance_mut(1);

/// How a first pass answered.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Answer {
    /// The device is done.
    Done,
    /// The first pass left a pass, which is in `place` now.
    Pass,
    /// The first pass refused: it cannot start without waiting.
    WouldBlock,
}

/// The functions of a notifier's type, for an [`EntryRef`], which does not have the type.
struct VTable {
    /// The layout of the `Allocation`.
    layout: Layout,
    first_pass: unsafe fn(EntryRef, &Invalidation<'_>, Pin<&mut Option<PassFuture>>) -> Answer,
    name: unsafe fn(EntryRef) -> Cow<'static, str>,
    free: unsafe fn(EntryRef),
}

impl<N: IntervalNotifier> Allocation<N> {
    const LAYOUT: Layout = Layout::new::<Self>();
    const VTABLE: &'static VTable = &VTable {
        layout: Self::LAYOUT,
        first_pass: Self::first_pass,
        name: Self::name,
        free: Self::free,
    };

    /// Calls the notifier's first pass and stores the pass that it leaves in `place`.
    ///
    /// A `dyn` call would return the pass by copies. Here the compiler knows the driver's type, and
    /// writes the pass to `place` directly.
    ///
    /// # Safety
    /// `entry` is alive and the first field of an `Allocation<N>`. Its notifier was not taken.
    unsafe fn first_pass(
        entry: EntryRef,
        invalidation: &Invalidation<'_>,
        mut place: Pin<&mut Option<PassFuture>>,
    ) -> Answer {
        // SAFETY: by the contract of this function, and `EntryRef` may reach the whole allocation.
        let notifier = unsafe { &(*entry.0.cast::<Self>().as_ptr()).notifier };
        match notifier.invalidate(invalidation) {
            Ok(None) => Answer::Done,
            Ok(Some(pass)) => {
                place.set(Some(pass));
                Answer::Pass
            }
            Err(WouldBlock) => Answer::WouldBlock,
        }
    }

    /// Returns the notifier's name.
    ///
    /// # Safety
    /// As for `first_pass`.
    unsafe fn name(entry: EntryRef) -> Cow<'static, str> {
        // SAFETY: by the contract of this function, and `EntryRef` may reach the whole allocation.
        unsafe { &(*entry.0.cast::<Self>().as_ptr()).notifier }.name()
    }

    /// Frees the allocation. Drops the notifier unless it was taken.
    ///
    /// # Safety
    /// `entry` was made by `EntryBox::<N>::new`, and no other code uses it any more.
    unsafe fn free(entry: EntryRef) {
        let taken = entry.is_taken();
        // SAFETY: `EntryBox::new` made this box. By the contract of this function no other pointer
        // to it is in use.
        let mut allocation = unsafe { Box::from_raw(entry.0.cast::<Self>().as_ptr()) };
        if !taken {
            // SAFETY: the notifier is dropped once. The allocation is freed after it, also when the
            // drop panics.
            unsafe { ManuallyDrop::drop(&mut allocation.notifier) };
        }
    }
}

// SAFETY: an `EntryRef` gives shared access to an `Entry`, which is `Sync`, and to the notifier,
// which is `Send + Sync` by the bounds of `IntervalNotifier`; `free` may drop the notifier on
// another thread, which `Send` allows.
unsafe impl Send for EntryRef {}
// SAFETY: as above.
unsafe impl Sync for EntryRef {}
// SAFETY: an `EntryBox` gives shared access to `N` and lets it be moved out, as a `Box<N>` does;
// `N: IntervalNotifier` is `Send + Sync`.
unsafe impl<N: Send + Sync> Send for EntryBox<N> {}
// SAFETY: as above.
unsafe impl<N: Send + Sync> Sync for EntryBox<N> {}

impl<N: IntervalNotifier> EntryBox<N> {
    /// Makes an entry: attached, with its order not set yet.
    #[inline]
    pub(crate) fn new(room: Room<N>, range: AddressRange, notifier: N) -> Self {
        let entry = Entry {
            range,
            order: AtomicU64::new(0),
            rare: OnceBox::new(),
            longest: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            vtable: Allocation::<N>::VTABLE,
            own: Own::new(),
        };
        let allocation =
            Box::write(room.0, Allocation { entry, notifier: ManuallyDrop::new(notifier) });
        Self(NonNull::from(Box::leak(allocation)))
    }

    /// Returns a pointer to the entry without the notifier's type.
    #[inline]
    pub(crate) fn erase(&self) -> EntryRef {
        EntryRef(self.0.cast())
    }

    /// Returns the notifier.
    #[inline]
    pub(crate) fn notifier(&self) -> &N {
        // SAFETY: the entry is alive by reason 1, and `take` consumes the `EntryBox`.
        unsafe { &(*self.0.as_ptr()).notifier }
    }

    /// Moves the notifier out. Call it once, when no invalidation can call the notifier any more:
    /// under the space's lock, or if no other code has the entry. Do not call `notifier` after it.
    #[inline]
    pub(crate) fn take(&self) -> N {
        let allocation = self.0.as_ptr();
        self.own.mark(TAKEN, true);
        // SAFETY: alive by reason 1. Only the field `notifier` is borrowed, so this does not alias
        // borrows of `entry`. The notifier is not called any more, and `TAKEN` keeps `free` from
        // dropping it again.
        unsafe { ptr::read(&*(*allocation).notifier) }
    }
}

impl Spare {
    /// Makes an empty cache.
    pub(crate) fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// Reserves the cache if it is empty and not reserved, and returns whether it did. The caller
    /// then calls [`put`](Self::put) or [`cancel`](Self::cancel). Under the space's lock.
    #[inline]
    pub(crate) fn reserve(&self) -> bool {
        let empty = self.0.load(Ordering::Relaxed).is_null();
        if empty {
            // An empty cache changes only under the lock, which the caller has.
            self.0.store(RESERVED, Ordering::Relaxed);
        }
        empty
    }

    /// Ends the reservation without filling the cache.
    pub(crate) fn cancel(&self) {
        self.0.store(ptr::null_mut(), Ordering::Relaxed);
    }

    /// Ends an entry and keeps its memory. Call it once, after reserving the cache, seeing
    /// `unused()` under the lock, and moving the notifier out.
    #[inline]
    pub(crate) fn put(&self, entry: EntryRef) {
        debug_assert!(entry.is_taken() && self.0.load(Ordering::Relaxed) == RESERVED);
        // SAFETY: no other code uses the entry, and `rare` is not accessed again. `vtable` stays as
        // it is.
        unsafe { ptr::drop_in_place(&raw mut (*entry.0.as_ptr()).rare) };
        self.0.store(entry.0.as_ptr(), Ordering::Release);
    }

    /// Returns whether the cache is filled at this moment.
    #[inline]
    pub(crate) fn is_filled(&self) -> bool {
        self.0.load(Ordering::Relaxed).addr() > RESERVED.addr()
    }

    /// Returns the memory in the cache, if it is filled.
    #[inline]
    fn memory(&self) -> Option<NonNull<Entry>> {
        NonNull::new(self.0.load(Ordering::Acquire)).filter(|memory| memory.as_ptr() != RESERVED)
    }

    /// Takes the memory for an entry with an `N`, if its layout fits. Under the space's lock.
    #[inline]
    pub(crate) fn take<N: IntervalNotifier>(&self) -> Option<Room<N>> {
        let memory = self.memory()?;
        // The store comes before the load of the layout, which may miss the caches (measured:
        // docs/measurements.md).
        self.0.store(ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: no other code has the memory. An entry was there, and its `vtable` is intact.
        if unsafe { (*memory.as_ptr()).vtable.layout } != Allocation::<N>::LAYOUT {
            self.0.store(memory.as_ptr(), Ordering::Relaxed);
            return None;
        }
        // SAFETY: the memory was allocated as a `Room` of this layout, and no other code has it.
        Some(Room(unsafe { Box::from_raw(memory.cast().as_ptr()) }))
    }

    /// Takes the memory, to be freed after the lock is released. Under the space's lock.
    #[inline]
    pub(crate) fn clear(&self) -> Option<Vacant> {
        let memory = self.memory()?;
        self.0.store(ptr::null_mut(), Ordering::Relaxed);
        Some(Vacant(memory))
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Drop for Vacant {
    fn drop(&mut self) {
        // SAFETY: no other code has the memory. An entry was there, and its `vtable` is intact. It
        // was allocated as a `Room` of this layout.
        unsafe { alloc::alloc::dealloc(self.0.as_ptr().cast(), (*self.0.as_ptr()).vtable.layout) };
    }
}

impl<N> Room<N> {
    /// Allocates the memory.
    pub(crate) fn new() -> Self {
        Self(Box::new_uninit())
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
    /// Calls the notifier's first pass. The pass that it leaves is stored in `place`.
    #[inline]
    pub(crate) fn first_pass(
        self,
        _: Inside,
        invalidation: &Invalidation<'_>,
        place: Pin<&mut Option<PassFuture>>,
    ) -> Answer {
        // SAFETY: alive (module documentation), with the functions of its own type. It is not taken
        // while an invalidation in its first passes may call it.
        unsafe { (self.vtable.first_pass)(self, invalidation, place) }
    }

    /// Returns the notifier's name. Runs driver code, so call it without the space's lock.
    pub(crate) fn name(self, losses: &Losses) -> Cow<'static, str> {
        // SAFETY: alive (module documentation), with the functions of its own type. It is not taken
        // while an invalidation in its first passes, a pending pass or a hold keeps it.
        let name = losses.run(Callback::Name, |_| unsafe { (self.vtable.name)(self) });
        name.unwrap_or(Cow::Borrowed("a notifier whose name() panics"))
    }

    /// Frees the entry, and drops the notifier unless it was taken. Runs driver code, so call it
    /// without the space's lock.
    ///
    /// Call it once, after seeing `unused()` under the lock.
    #[inline]
    pub(crate) fn free(self, _: Inside) {
        // SAFETY: the caller saw `unused()` under the lock. None of the three reasons holds, so no
        // other `EntryRef` or `EntryBox` of this entry is used any more.
        unsafe { (self.vtable.free)(self) }
    }
}

impl Deref for EntryRef {
    type Target = Entry;

    #[inline]
    fn deref(&self) -> &Entry {
        // SAFETY: alive (module documentation). Only the `entry` field is borrowed.
        unsafe { self.0.as_ref() }
    }
}

impl PartialEq for EntryRef {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Ordered for EntryRef {
    #[inline]
    fn order(self) -> u64 {
        self.order.load(Ordering::Relaxed)
    }
}

impl Indexed for EntryRef {
    #[inline]
    fn range(self) -> AddressRange {
        self.range
    }

    #[inline]
    fn position(self) -> Position {
        self.own.position()
    }

    #[inline]
    fn set_position(self, position: Position) {
        self.own.set_position(position);
    }

    /// Prefetches the cache lines of `memory`, where the target has an instruction for it. This
    /// function is here and not in the index because the intrinsic is `unsafe`.
    #[inline]
    fn prefetch<T>(memory: &T) -> bool {
        #[cfg(all(target_arch = "x86_64", target_feature = "sse", not(miri)))]
        for line in (0..size_of::<T>()).step_by(64) {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: the processor has the instruction (`target_feature`). It neither reads nor
            // writes memory of the program, and every address is valid for it.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(ptr::from_ref(memory).cast::<i8>().wrapping_add(line))
            };
        }
        let _ = memory;
        cfg!(all(target_arch = "x86_64", target_feature = "sse", not(miri)))
    }
}

impl Member for EntryRef {
    #[inline]
    fn own(&self) -> &Own {
        &self.own
    }
}
