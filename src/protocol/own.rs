//! What the protocol keeps of each notifier: its own sequence and who covers it.
#![forbid(unsafe_code)]

use crate::index::Place;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// A notifier's own sequence, how many active invalidations cover it, and what the owner of the
/// protocol marks it with.
///
/// Own sequences are always odd (S5, S2), so the lowest bit is free to say whether the notifier is
/// covered: a reader learns in one load what its sequence is and whether it has to wait (R3). These
/// are atomics because readers look at them without a lock; they are *written* only by the owner of
/// the protocol (`&mut Protocol`) and by `set_seq` in a first pass, during which the notifier is
/// covered and the protocol leaves the word alone. So the protocol needs no read-modify-write;
/// `set_seq`, which may run in two first passes at the same time, does.
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
///   order of that lock, has set the word; a later one removes what the reader installs (R2, S4).
#[derive(Debug)]
pub(crate) struct Own {
    /// The sequence while no active invalidation covers the notifier; the sequence less one while
    /// one does, or when the notifier is [`CLOSED`]: then a reader has to look more closely.
    word: AtomicU64,
    /// How many active invalidations cover the notifier, in steps of [`COVER`], and below that the
    /// marks. In one word, so that the end of an invalidation sees in one comparison that there is
    /// nothing to be told.
    covering: AtomicU32,
    /// Where the index has put the notifier. Read and written by the owner of the protocol only.
    place: AtomicU32,
    /// Which driver lock the sequence was set under; 0 before, [`SEVERAL`] once it was under
    /// another one, too. For the check that readers take one that the first pass takes.
    #[cfg(debug_assertions)]
    driver_lock: AtomicU32,
    /// Checks until one is forced to fail; 0 when none is. Nothing to the protocol; it stands here
    /// because there is room.
    #[cfg(feature = "test-util")]
    pub(crate) collide_on: AtomicU32,
}

const UNCOVERED: u64 = 1;

/// One active invalidation in [`Own::covering`].
const COVER: u32 = 32;
/// As many invalidations as may be active at once: with one more, [`Own::covering`] could wrap.
pub(super) const MOST_ACTIVE: u32 = u32::MAX / COVER - 1;
/// A mark of a notifier: the end of an invalidation is to tell when nothing covers it any more.
pub(crate) const WATCHED: u32 = 1;
/// A mark of a notifier: no sequence of it is good for anything any more.
const CLOSED: u32 = 2;
/// Marks whose meaning is the owner's.
pub(crate) const MARKS: [u32; 3] = [4, 8, 16];

/// In [`Own::driver_lock`]: the first pass takes more than one.
#[cfg(debug_assertions)]
const SEVERAL: u32 = 1;

/// Enough of an address to tell two locks apart; neither 0 nor [`SEVERAL`].
#[cfg(debug_assertions)]
fn short(address: usize) -> u32 {
    (address >> 2) as u32 | 1 << 31
}

impl Own {
    pub(crate) fn new() -> Self {
        Self {
            word: AtomicU64::new(UNCOVERED),
            covering: AtomicU32::new(0),
            place: AtomicU32::new(Place::UNKNOWN.raw()),
            #[cfg(debug_assertions)]
            driver_lock: AtomicU32::new(0),
            #[cfg(feature = "test-util")]
            collide_on: AtomicU32::new(0),
        }
    }

    #[inline]
    pub(crate) fn place(&self) -> Place {
        Place::from_raw(self.place.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn set_place(&self, place: Place) {
        self.place.store(place.raw(), Ordering::Relaxed);
    }

    /// Notes under which lock the first pass set the sequence (debug builds).
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

    /// Whether a first pass of an invalidation with `sequence`, or a later one, has set it.
    #[cfg(all(feature = "std", debug_assertions, not(any(loom, shuttle))))]
    pub(crate) fn has_reached(&self, sequence: u64) -> bool {
        (sequence.wrapping_sub(self.sequence())).cast_signed() <= 0
    }

    /// Whether a reader that holds the lock at `_address` is safe from the first pass; always
    /// `true` in release builds.
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

    /// The notifier's own sequence (R2).
    #[inline]
    pub(crate) fn sequence(&self) -> u64 {
        self.word.load(Ordering::Relaxed) | UNCOVERED
    }

    /// The own sequence if no active invalidation covers the notifier at this moment (R1, R3), and
    /// it is not closed.
    #[inline]
    pub(crate) fn stable_sequence(&self) -> Option<u64> {
        let word = self.word.load(Ordering::Acquire);
        (word & UNCOVERED != 0).then_some(word)
    }

    /// Whether the notifier has this own sequence, is not closed, and no active invalidation covers
    /// it.
    #[inline]
    pub(crate) fn is_stable_at(&self, sequence: u64) -> bool {
        self.word.load(Ordering::Relaxed) == sequence
    }

    /// Whether a reader that began with `sequence` has to start over (R2): the notifier has another
    /// one by now, or is closed.
    pub(crate) fn is_past(&self, sequence: u64) -> bool {
        self.sequence() != sequence || self.is_closed()
    }

    /// From now on readers of the notifier start over whatever sequence they have. Only the owner
    /// of the protocol; may be called again.
    pub(crate) fn close(&self) {
        self.mark(CLOSED, true);
        if !self.is_covered() {
            // While it is covered a first pass may set the sequence, and the word says already what
            // it is to say.
            self.word.store(self.word.load(Ordering::Relaxed) & !UNCOVERED, Ordering::Relaxed);
        }
    }

    /// Quick form of [`close`](Self::close), with these marks, for a notifier that no active
    /// invalidation covers and that has no mark; otherwise does nothing and returns `false`.
    #[inline(always)]
    pub(crate) fn quick_close(&self, marks: u32) -> bool {
        let plain = self.covering.load(Ordering::Relaxed) == 0;
        if plain {
            self.covering.store(CLOSED | marks, Ordering::Relaxed);
            self.word.store(self.word.load(Ordering::Relaxed) & !UNCOVERED, Ordering::Relaxed);
        }
        plain
    }

    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.is_marked(CLOSED)
    }

    /// S4: called in a first pass.
    ///
    /// Never goes back: of two invalidations whose first passes reach a notifier in the other order
    /// than they started, the later sequence stays. Otherwise a third invalidation could give the
    /// later one out again (S6).
    ///
    /// A read-modify-write, because two first passes of one notifier may run at the same time and
    /// their driver need not hold the same lock in both: a load and a store could each come between
    /// those of the other.
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

    pub(crate) fn is_covered(&self) -> bool {
        self.covering.load(Ordering::Relaxed) >= COVER
    }

    /// Whether any of `marks` is set.
    #[inline]
    pub(crate) fn is_marked(&self, marks: u32) -> bool {
        self.covering.load(Ordering::Relaxed) & marks != 0
    }

    /// Sets or takes away `marks`; only the owner of the protocol.
    #[inline]
    pub(crate) fn mark(&self, marks: u32, set: bool) {
        debug_assert!(marks < COVER);
        let before = self.covering.load(Ordering::Relaxed);
        self.covering.store(if set { before | marks } else { before & !marks }, Ordering::Relaxed);
    }

    /// The first word of a notifier that has just been inserted (S5): its sequence, less one if it
    /// is covered already.
    #[inline]
    pub(super) fn begin(&self, word: u64) {
        debug_assert_eq!(word & UNCOVERED == 0, self.is_covered());
        self.word.store(word, Ordering::Relaxed);
    }

    /// One more invalidation covers the notifier. Returns the own sequence if it is the first.
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

    /// One less covers it. If it was the last, returns the marks: somebody may have to be told of a
    /// moment at which nothing covers the notifier (R1).
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

    /// Quick form of [`uncover`](Self::uncover) for a notifier without marks; otherwise does
    /// nothing and returns `false`.
    #[inline(always)]
    pub(super) fn quick_uncover(&self) -> bool {
        let covering = self.covering.load(Ordering::Relaxed) - COVER;
        if !covering.is_multiple_of(COVER) {
            return false;
        }
        self.covering.store(covering, Ordering::Relaxed);
        if covering == 0 {
            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);
        }
        true
    }

    #[cold]
    #[inline(never)]
    fn uncover_marked(&self, marks: u32) -> u32 {
        if marks & CLOSED == 0 {
            self.word.store(self.word.load(Ordering::Relaxed) | UNCOVERED, Ordering::Release);
        }
        marks
    }
}
