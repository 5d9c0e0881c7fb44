//! [`Own`]: what the protocol keeps of each notifier, its own sequence and its covers.
#![forbid(unsafe_code)]

use crate::index::Position;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// A notifier's own sequence, the number of active invalidations that cover it, and its marks.
///
/// Own sequences are always odd (S5, S2). So the lowest bit is free to say whether the notifier is
/// covered, and one load tells a reader its sequence and whether it has to wait (R3).
///
/// The fields are atomics because readers load them without a lock. They have two writers:
///
/// - The owner of the protocol (`&mut Protocol`, so under the space's lock). It needs no
///   read-modify-write.
/// - `set_seq` in a first pass. The notifier is covered then, and the protocol does not write the
///   word of a covered notifier. `set_seq` may run in two first passes at the same time, so it is a
///   read-modify-write.
///
/// # Memory orders
/// One pair of accesses publishes: the store that uncovers the notifier is a release, and the load
/// of [`stable_sequence`](Self::stable_sequence) is an acquire. So a reader that takes no lock sees
/// the memory as the end of the invalidation left it (R1). All other accesses are relaxed:
/// - A word that says "covered" or "closed" publishes nothing. A reader that sees it takes the
///   space's lock, or starts over.
/// - The first word of a new notifier is read through its subscription. Whatever handed that to the
///   reader orders the two.
/// - A check ([`is_stable_at`](Self::is_stable_at)) needs the newest word that the reader's lock
///   lets it see, and nothing that was written before it. A first pass before the check, in the
///   order of that lock, has set the word; a later one removes what the reader installs (R2, S4). A
///   reader without a lock, which looks at memory first and checks afterwards, needs two fences of
///   its own: a release after `set_seq`, and an acquire before the check (`read_unchanged` in
///   `crates/shootdown-lease`).
#[derive(Debug)]
pub(crate) struct Own {
    /// The own sequence while no active invalidation covers the notifier. The own sequence less one
    /// while one does, or if the notifier is [`CLOSED`]. A reader then takes its slow path.
    pub(super) word: AtomicU64,
    /// The number of active invalidations that cover the notifier, in steps of [`COVER`], and the
    /// marks below that. One word, so that the end of an invalidation needs one comparison to see
    /// that there is nothing to notify.
    pub(super) covering: AtomicU32,
    /// Where the index has put the notifier. Read and written by the owner of the protocol only.
    position: AtomicU32,
    /// The driver lock under which the sequence was set. 0 before the first time, [`SEVERAL`] after
    /// a second lock. Used to check that readers take a lock that the first pass takes.
    #[cfg(debug_assertions)]
    driver_lock: AtomicU32,
    /// Checks until one is forced to fail; 0 when none is. The protocol does not use it. It is here
    /// because this struct has room for it.
    #[cfg(feature = "test-util")]
    pub(crate) collide_on: AtomicU32,
}

/// In [`Own::word`]: the notifier is neither covered nor closed.
pub(super) const UNCOVERED: u64 = 1;

/// One active invalidation in [`Own::covering`].
pub(super) const COVER: u32 = 32;
/// Largest number of active invalidations. With one more, [`Own::covering`] could wrap.
pub(super) const MOST_ACTIVE: u32 = u32::MAX / COVER - 1;
const _: () =
    assert!((MOST_ACTIVE as u64 + 1) * COVER as u64 + (COVER as u64 - 1) == u32::MAX as u64);
/// Mark: the end of an invalidation reports the notifier when nothing covers it any more (R1).
pub(crate) const WATCHED: u32 = 1;
/// Mark: the notifier is closed. `read_retry` is `true` for every sequence of it.
pub(super) const CLOSED: u32 = 2;
/// Marks whose meaning the owner of the protocol defines.
pub(crate) const MARKS: [u32; 3] = [4, 8, 16];

/// In [`Own::driver_lock`]: the first pass takes more than one lock.
#[cfg(debug_assertions)]
const SEVERAL: u32 = 1;

/// Returns enough bits of an address to tell two locks apart. The result is neither 0 nor
/// [`SEVERAL`].
#[cfg(debug_assertions)]
fn short(address: usize) -> u32 {
    (address >> 2) as u32 | 1 << 31
}

impl Own {
    /// Creates the state of a notifier that has not been inserted.
    pub(crate) fn new() -> Self {
        Self {
            word: AtomicU64::new(UNCOVERED),
            covering: AtomicU32::new(0),
            position: AtomicU32::new(Position::UNKNOWN.raw()),
            #[cfg(debug_assertions)]
            driver_lock: AtomicU32::new(0),
            #[cfg(feature = "test-util")]
            collide_on: AtomicU32::new(0),
        }
    }

    /// Returns where the index has put the notifier.
    #[inline]
    pub(crate) fn position(&self) -> Position {
        Position::from_raw(self.position.load(Ordering::Relaxed))
    }

    /// Stores where the index has put the notifier.
    #[inline]
    pub(crate) fn set_position(&self, position: Position) {
        self.position.store(position.raw(), Ordering::Relaxed);
    }

    /// Stores the address of the lock under which the first pass set the sequence. Does nothing in
    /// release builds.
    #[inline]
    pub(crate) fn note_driver_lock(&self, _address: usize) {
        #[cfg(debug_assertions)]
        {
            let noted = self.driver_lock.load(Ordering::Relaxed);
            let now =
                if noted == 0 || noted == short(_address) { short(_address) } else { SEVERAL };
            self.driver_lock.store(now, Ordering::Relaxed);
        }
    }

    /// Returns whether the own sequence is `sequence` or a later one: a first pass has set it.
    #[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
    pub(crate) fn has_reached(&self, sequence: u64) -> bool {
        (sequence.wrapping_sub(self.sequence())).cast_signed() <= 0
    }

    /// Returns whether a reader that holds the lock at `_address` excludes the first pass, as far
    /// as is known. Always `true` in release builds.
    #[inline]
    pub(crate) fn is_driver_lock(&self, _address: usize) -> bool {
        #[cfg(debug_assertions)]
        {
            let noted = self.driver_lock.load(Ordering::Relaxed);
            noted == 0 || noted == SEVERAL || noted == short(_address)
        }
        #[cfg(not(debug_assertions))]
        true
    }

    /// Returns the notifier's own sequence (R2).
    #[inline]
    pub(crate) fn sequence(&self) -> u64 {
        self.word.load(Ordering::Relaxed) | UNCOVERED
    }

    /// Returns the own sequence if no active invalidation covers the notifier at this moment (R1,
    /// R3) and it is not closed.
    #[inline]
    pub(crate) fn stable_sequence(&self) -> Option<u64> {
        let word = self.word.load(Ordering::Acquire);
        (word & UNCOVERED != 0).then_some(word)
    }

    /// Returns whether the own sequence is `sequence`, the notifier is not closed, and no active
    /// invalidation covers it.
    #[inline]
    pub(crate) fn is_stable_at(&self, sequence: u64) -> bool {
        self.word.load(Ordering::Relaxed) == sequence
    }

    /// Returns whether a reader that began with `sequence` has to start over (R2): the own sequence
    /// has changed, or the notifier is closed.
    pub(crate) fn is_past(&self, sequence: u64) -> bool {
        self.sequence() != sequence || self.is_closed()
    }

    /// Closes the notifier: readers start over from now on, whatever sequence they have. Only the
    /// owner of the protocol calls this. A second call has no effect.
    pub(crate) fn close(&self) {
        self.mark(CLOSED, true);
        if !self.is_covered() {
            // While the notifier is covered, a first pass may store the word, and its lowest bit is
            // clear already.
            self.word.store(self.word.load(Ordering::Relaxed) & !UNCOVERED, Ordering::Relaxed);
        }
    }

    /// Returns whether the notifier is closed.
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.is_marked(CLOSED)
    }

    /// Sets the own sequence in a first pass (S4).
    ///
    /// The sequence never goes back. If the first passes of two invalidations reach a notifier in
    /// the reverse order of their starts, the later sequence stays. Otherwise a third invalidation
    /// could give the later sequence out again (S6).
    ///
    /// This is a read-modify-write. Two first passes of one notifier may run at the same time, and
    /// the driver need not hold the same lock in both.
    #[inline]
    pub(crate) fn set(&self, sequence: u64) {
        let mut word = self.word.load(Ordering::Relaxed);
        while (sequence.wrapping_sub(word | UNCOVERED)).cast_signed() > 0 {
            match self.word.compare_exchange_weak(
                word,
                sequence & !UNCOVERED,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(other) => word = other,
            }
        }
    }

    /// Returns whether an active invalidation covers the notifier.
    pub(crate) fn is_covered(&self) -> bool {
        self.covering.load(Ordering::Relaxed) >= COVER
    }

    /// Returns whether any of `marks` is set.
    #[inline]
    pub(crate) fn is_marked(&self, marks: u32) -> bool {
        self.covering.load(Ordering::Relaxed) & marks != 0
    }

    /// Sets or clears `marks`. Only the owner of the protocol calls this.
    #[inline]
    pub(crate) fn mark(&self, marks: u32, set: bool) {
        debug_assert!(marks < COVER);
        let before = self.covering.load(Ordering::Relaxed);
        self.covering.store(if set { before | marks } else { before & !marks }, Ordering::Relaxed);
    }

    /// Stores the first word of a notifier that is being inserted (S5): its own sequence, less one
    /// if it is covered already.
    #[inline]
    pub(super) fn begin(&self, word: u64) {
        debug_assert_eq!(word & UNCOVERED == 0, self.is_covered());
        self.word.store(word, Ordering::Relaxed);
    }

    /// Adds one cover. Returns the own sequence if it is the first cover.
    #[inline]
    pub(super) fn cover(&self) -> Option<u64> {
        let covering = self.covering.load(Ordering::Relaxed);
        self.covering.store(covering + COVER, Ordering::Relaxed);
        (covering < COVER).then(|| {
            let word = self.word.load(Ordering::Relaxed);
            self.word.store(word & !UNCOVERED, Ordering::Relaxed);
            word | UNCOVERED
        })
    }

    /// Removes one cover. If it was the last one, returns the marks: nothing covers the notifier at
    /// this moment, which a waiter may have to be notified of (R1). Otherwise returns 0.
    #[inline(always)]
    pub(super) fn uncover(&self) -> u32 {
        let covering = self.covering.load(Ordering::Relaxed) - COVER;
        self.covering.store(covering, Ordering::Relaxed);
        if covering == 0 {
            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);
        } else if covering < COVER {
            return self.uncover_marked(covering);
        }
        0
    }

    /// Ends the last cover of a notifier that has `marks`. The word of a closed one stays as it is.
    #[cold]
    #[inline(never)]
    fn uncover_marked(&self, marks: u32) -> u32 {
        if marks & CLOSED == 0 {
            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);
        }
        marks
    }
}
