//! A registered notifier in memory: the only module with `unsafe` code.
//!
//! An [`Entry`] holds what the library keeps of a notifier and the notifier itself, in one
//! allocation. [`EntryRef`] points to it without counting: an invalidation of 256 notifiers would
//! otherwise spend more on reference counts than on everything else it does (`DESIGN.md`, "Entries
//! without reference counts").
//!
//! # Why an `EntryRef` may be dereferenced
//! An entry is freed by [`EntryRef::free`] or given to a [`Spare`], and nothing else ends it: by
//! the one who finds, **under the space's lock**, that none of these holds any more
//! ([`Entry::unused`]):
//!
//! 1. it is not `DETACHED`: the entry is in the index, or its [`EntryBox`] (the subscription)
//!    exists;
//! 2. an active invalidation covers it (`own.is_covered()`);
//! 3. somebody holds it (`is_held()`), to call `name` outside the lock.
//!
//! Each of the three changes only under the lock. The places that keep an `EntryRef` are the index
//! (1), the subscription (1), the hits, late members and passes of an active invalidation (2), and
//! lists of names in the making (3). So whoever has one has a reason why it is alive, and the last
//! reason to go frees it, once.
//!
//! The notifier is moved out by [`EntryBox::take`] (`remove`), or dropped with the entry. It is
//! called only by an invalidation in its first passes, and `remove` takes it after there is none of
//! those left that could (`engine::registration`).
//!
//! # Why its functions fit its type
//! An entry is made by [`EntryBox::new`] and nowhere else, which stores [`Calls`] of the type `N`
//! that it stores beside it. They never change.
//!
//! # Who owns the memory of a former entry
//! Its [`Spare`], from [`Spare::put`] until [`Spare::take`] or [`Spare::clear`]; then the [`Room`]
//! or [`Vacant`]. Nobody else knows of it, because it was put there in place of being freed. A
//! removal whose future is leaked has reserved the `Spare` and never fills it: the space does
//! without from then on.

mod rare;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

use crate::foreign::{Callback, Inside, Losses};
use crate::index::{Indexed, Ordered, Place};
use crate::notifier::{IntervalNotifier, Invalidation, WouldBlock};
use crate::pass::PassFuture;
use crate::protocol::{MARKS, Member, Own, WATCHED};
use crate::range::AddressRange;
use crate::sync::{AtomicPtr, AtomicU32, AtomicU64, OnceBox, Ordering};
use alloc::borrow::Cow;
use alloc::boxed::Box;
use core::alloc::Layout;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ops::Deref;
use core::pin::Pin;
use core::ptr::{self, NonNull};
use rare::Rare;

/// The subscription is gone.
const DETACHED: u32 = MARKS[0];
/// The notifier has been moved out.
const TAKEN: u32 = MARKS[1];
/// Somebody holds the entry.
const HELD: u32 = MARKS[2];

/// What the library keeps of one notifier. All of it but `own`'s word is written only under the
/// space's lock, or by who has the entry alone; these are atomics so that this need not be argued
/// with `unsafe`, and cost what plain fields cost.
///
/// What an invalidation looks at stands at the end, where the notifier follows: among many
/// notifiers both miss the caches, and so together.
#[repr(C)]
pub(crate) struct Entry {
    pub(crate) range: AddressRange,
    /// The place among equals.
    pub(crate) order: AtomicU64,
    /// What few notifiers ever need, made when the first of it is needed: what all have is a sixth
    /// smaller without, and so more of them fit the caches.
    rare: OnceBox<Rare>,
    /// The longest that an invalidation which hit the notifier was active, in microseconds.
    longest: AtomicU32,
    /// Passes of this notifier that are pending.
    pub(crate) pending: AtomicU32,
    /// What can be done with the notifier.
    calls: &'static Calls,
    /// Marked as watched while a future waits for this notifier, or it is on its way out: then the
    /// end of an invalidation has more to do.
    pub(crate) own: Own,
}

/// 256 of them, with a driver of three words each and what the index has of them, fit a first cache
/// of 32 KiB.
#[cfg(all(
    target_pointer_width = "64",
    not(any(loom, shuttle, debug_assertions, feature = "test-util"))
))]
const _: () = assert!(size_of::<Entry>() == 64);

impl Entry {
    /// An invalidation that hit the notifier was active for `micros`. Only under the space's lock,
    /// so that no read-modify-write is needed.
    #[inline]
    pub(crate) fn lasted(&self, micros: u32) {
        if self.longest.load(Ordering::Relaxed) < micros {
            self.longest.store(micros, Ordering::Relaxed);
        }
    }

    /// The subscription is gone.
    #[inline]
    pub(crate) fn detach(&self) {
        self.own.mark(DETACHED | WATCHED, true);
    }

    /// Closes and detaches the notifier if nobody has any business with it; otherwise does nothing
    /// and says so. Under the lock.
    #[inline(always)]
    pub(crate) fn retire(&self) -> bool {
        self.own.quick_close(DETACHED | WATCHED)
    }

    pub(crate) fn is_held(&self) -> bool {
        self.own.is_marked(HELD)
    }

    /// Whether the notifier was moved out.
    #[inline]
    pub(crate) fn is_taken(&self) -> bool {
        self.own.is_marked(TAKEN)
    }

    /// Whether nothing keeps the entry alive; under the lock.
    pub(crate) fn unused(&self) -> bool {
        self.own.is_marked(DETACHED) && !self.own.is_covered() && !self.is_held()
    }
}

#[repr(C)]
struct Allocation<N> {
    entry: Entry,
    notifier: ManuallyDrop<N>,
}

/// A pointer to an entry whose notifier's type is not known. See the module for why it is valid.
///
/// It may reach the whole `Allocation`, and points to its first field. One word and not the two of
/// a pointer to `dyn`: the index and the lists of hits hold little else.
#[derive(Clone, Copy)]
pub(crate) struct EntryRef(NonNull<Entry>);

/// The subscription's pointer to an entry, which knows the notifier's type.
pub(crate) struct EntryBox<N>(NonNull<Allocation<N>>);

/// Where the memory of a former entry waits for the next one: where a notifier goes another one
/// often comes.
///
/// There is room for one. Who will fill it is decided under the space's lock
/// ([`reserve`](Self::reserve)), as is who gets what is there; to fill it is one store, without the
/// lock, and there is no read-modify-write.
pub(crate) struct Spare(AtomicPtr<Entry>);

/// Memory in which an entry was, to be freed.
pub(crate) struct Vacant(NonNull<Entry>);

/// Memory for an entry with a notifier `N`.
pub(crate) struct Room<N>(Box<MaybeUninit<Allocation<N>>>);

/// In a [`Spare`] that somebody will fill.
const RESERVED: *mut Entry = ptr::without_provenance_mut(1);

/// How a first pass answered.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Answer {
    Done,
    /// It left a pass, which lies where it was asked to be put.
    Pass,
    WouldBlock,
}

/// What can be done with a notifier whose type is not known, as functions that know it.
struct Calls {
    /// What the entry and the notifier take together.
    layout: Layout,
    first_pass: unsafe fn(EntryRef, &Invalidation<'_>, Pin<&mut Option<PassFuture>>) -> Answer,
    name: unsafe fn(EntryRef) -> Cow<'static, str>,
    free: unsafe fn(EntryRef),
}

impl<N: IntervalNotifier> Allocation<N> {
    const LAYOUT: Layout = Layout::new::<Self>();
    const CALLS: &'static Calls = &Calls {
        layout: Self::LAYOUT,
        first_pass: Self::first_pass,
        name: Self::name,
        free: Self::free,
    };

    /// Calls the notifier's first pass and puts what it leaves into `place`. Not a `dyn` call whose
    /// answer is moved from hand to hand: here the compiler knows the driver, and where the answer
    /// belongs.
    ///
    /// # Safety
    /// `entry` is alive, is the first field of an `Allocation<N>`, and its notifier was not taken.
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

    /// # Safety
    /// As for `first_pass`.
    unsafe fn name(entry: EntryRef) -> Cow<'static, str> {
        // SAFETY: by the contract of this function, and `EntryRef` may reach the whole allocation.
        unsafe { &(*entry.0.cast::<Self>().as_ptr()).notifier }.name()
    }

    /// # Safety
    /// `entry` was made by `EntryBox::<N>::new`, and nobody uses it any more.
    unsafe fn free(entry: EntryRef) {
        let taken = entry.is_taken();
        // SAFETY: `EntryBox::new` made this box, and by the contract of this function nobody else
        // points to it.
        let mut allocation = unsafe { Box::from_raw(entry.0.cast::<Self>().as_ptr()) };
        if !taken {
            // SAFETY: dropped once: the allocation goes away with it, also when the drop panics.
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
    /// A new entry, attached, with no place among equals yet.
    #[inline]
    pub(crate) fn new(room: Room<N>, range: AddressRange, notifier: N) -> Self {
        let entry = Entry {
            range,
            order: AtomicU64::new(0),
            rare: OnceBox::new(),
            longest: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            calls: Allocation::<N>::CALLS,
            own: Own::new(),
        };
        let allocation =
            Box::write(room.0, Allocation { entry, notifier: ManuallyDrop::new(notifier) });
        Self(NonNull::from(Box::leak(allocation)))
    }

    /// The same entry without its notifier's type.
    #[inline]
    pub(crate) fn erase(&self) -> EntryRef {
        EntryRef(self.0.cast())
    }

    /// The notifier.
    #[inline]
    pub(crate) fn notifier(&self) -> &N {
        // SAFETY: the entry is alive by reason 1, and `take` consumes the `EntryBox`.
        unsafe { &(*self.0.as_ptr()).notifier }
    }

    /// Moves the notifier out. To be called once, when nothing can call it any more, under the lock
    /// or by the one who has the entry alone; then `notifier` must not be called again.
    #[inline]
    pub(crate) fn take(&self) -> N {
        let allocation = self.0.as_ptr();
        self.own.mark(TAKEN, true);
        // SAFETY: alive by reason 1. Only the field is borrowed, so that the borrows of `entry` by
        // others do not matter. The notifier is not called any more, and `TAKEN` keeps `free` from
        // dropping it again.
        unsafe { ptr::read(&*(*allocation).notifier) }
    }
}

impl Spare {
    pub(crate) fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// Whether there is room, and nobody else who will fill it: then the caller has to
    /// [`put`](Self::put) something there, or to [`cancel`](Self::cancel). Under the space's lock.
    #[inline]
    pub(crate) fn reserve(&self) -> bool {
        let empty = self.0.load(Ordering::Relaxed).is_null();
        if empty {
            // Nothing else changes an empty one.
            self.0.store(RESERVED, Ordering::Relaxed);
        }
        empty
    }

    /// Takes the reservation back.
    pub(crate) fn cancel(&self) {
        self.0.store(ptr::null_mut(), Ordering::Relaxed);
    }

    /// Ends an entry and keeps its memory. To be called once, by the one who has reserved this, saw
    /// `unused()` under the lock, and moved the notifier out.
    #[inline]
    pub(crate) fn put(&self, entry: EntryRef) {
        debug_assert!(entry.is_taken() && self.0.load(Ordering::Relaxed) == RESERVED);
        // SAFETY: nobody else uses the entry, and its memory is not looked at as an entry again.
        // `calls` stays as it is.
        unsafe { ptr::drop_in_place(&raw mut (*entry.0.as_ptr()).rare) };
        self.0.store(entry.0.as_ptr(), Ordering::Release);
    }

    /// Whether there is something at this moment.
    #[inline]
    pub(crate) fn is_filled(&self) -> bool {
        self.0.load(Ordering::Relaxed).addr() > RESERVED.addr()
    }

    #[inline]
    fn memory(&self) -> Option<NonNull<Entry>> {
        NonNull::new(self.0.load(Ordering::Acquire)).filter(|memory| memory.as_ptr() != RESERVED)
    }

    /// What is there, for an entry with an `N`, if it fits. Under the space's lock.
    #[inline]
    pub(crate) fn take<N: IntervalNotifier>(&self) -> Option<Room<N>> {
        let memory = self.memory()?;
        // Before the question, whose answer takes longer to come (1 ns).
        self.0.store(ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: nobody else has the memory any more; an entry was there, whose `calls` still are.
        if unsafe { (*memory.as_ptr()).calls.layout } != Allocation::<N>::LAYOUT {
            self.0.store(memory.as_ptr(), Ordering::Relaxed);
            return None;
        }
        // SAFETY: a `Room` of this layout was allocated there, and nobody else has the memory any
        // more.
        Some(Room(unsafe { Box::from_raw(memory.cast().as_ptr()) }))
    }

    /// What is there, to be freed when the lock is free. Under the space's lock.
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
        // SAFETY: nobody else has the memory. An entry was there, whose `calls` still are; it was
        // allocated as a `Room` of this layout.
        unsafe { alloc::alloc::dealloc(self.0.as_ptr().cast(), (*self.0.as_ptr()).calls.layout) };
    }
}

impl<N> Room<N> {
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
    /// Calls the notifier's first pass; what it leaves to be waited for is put into `place`.
    #[inline]
    pub(crate) fn first_pass(
        self,
        _: Inside,
        invalidation: &Invalidation<'_>,
        place: Pin<&mut Option<PassFuture>>,
    ) -> Answer {
        // SAFETY: alive (module documentation), with the functions of its own type; not taken while
        // an invalidation in its first passes may call it.
        unsafe { (self.calls.first_pass)(self, invalidation, place) }
    }

    /// What the notifier is called. Runs driver code, so not under the lock.
    pub(crate) fn name(self, losses: &Losses) -> Cow<'static, str> {
        // SAFETY: alive (module documentation), with the functions of its own type; not taken while
        // an invalidation in its first passes, a pending pass or a hold keeps it.
        let name = losses.run(Callback::Name, |_| unsafe { (self.calls.name)(self) });
        name.unwrap_or(Cow::Borrowed("a notifier whose name() panics"))
    }

    /// Frees the entry, and drops the notifier unless it was taken. Runs driver code, so not under
    /// the lock.
    ///
    /// To be called once, by the one who saw `unused()` under the lock.
    #[inline]
    pub(crate) fn free(self, _: Inside) {
        // SAFETY: `unused()` was seen under the lock: none of the three reasons holds, so no other
        // `EntryRef` or `EntryBox` is used any more.
        unsafe { (self.calls.free)(self) }
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
    fn place(self) -> Place {
        self.own.place()
    }

    #[inline]
    fn set_place(self, place: Place) {
        self.own.set_place(place);
    }

    /// Here and not in the index because the instruction counts as `unsafe`.
    #[inline(always)]
    fn prefetch<T>(memory: &T) -> bool {
        #[cfg(all(target_arch = "x86_64", target_feature = "sse", not(miri)))]
        for line in (0..size_of::<T>()).step_by(64) {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: the processor has the instruction (`target_feature`). It neither reads nor
            // writes for the program, and no address is wrong for it.
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
