//! The life of an entry and of its memory, for Miri (`ci/miri.sh`): each is freed once, as what it
//! was allocated as.

use super::*;
use crate::foreign::keep;
use alloc::string::String;
use alloc::sync::Arc;
use core::sync::atomic::AtomicUsize;

/// A notifier of `WORDS` words that counts its drops, and has memory of its own.
struct Counts<const WORDS: usize> {
    drops: Arc<AtomicUsize>,
    text: String,
    words: [u64; WORDS],
}

impl<const WORDS: usize> Counts<WORDS> {
    fn new(drops: &Arc<AtomicUsize>) -> Self {
        Self { drops: drops.clone(), text: "text".into(), words: [7; WORDS] }
    }
}

impl<const WORDS: usize> IntervalNotifier for Counts<WORDS> {
    fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        Ok(None)
    }

    fn name(&self) -> Cow<'static, str> {
        self.text.clone().into()
    }
}

impl<const WORDS: usize> Drop for Counts<WORDS> {
    fn drop(&mut self) {
        assert_eq!(self.words, [7; WORDS]);
        self.drops.fetch_add(1, Ordering::SeqCst);
    }
}

fn insert<const WORDS: usize>(
    room: Option<Room<Counts<WORDS>>>,
    drops: &Arc<AtomicUsize>,
) -> EntryBox<Counts<WORDS>> {
    EntryBox::new(room.unwrap_or_else(Room::new), AddressRange::ALL, Counts::new(drops))
}

fn address<N>(entry: &EntryBox<N>) -> usize {
    entry.0.as_ptr().addr()
}

/// Moves the notifier out and gives the memory to `spare`.
fn put<const WORDS: usize>(spare: &Spare, entry: &EntryBox<Counts<WORDS>>) {
    assert!(spare.reserve());
    drop(entry.take());
    spare.put(entry.erase());
}

#[test]
fn a_notifier_is_dropped_once_with_its_entry_or_by_who_took_it() {
    let drops = Arc::default();
    let losses = Losses::new(None);
    let (kept, taken) = (insert::<0>(None, &drops), insert::<3>(None, &drops));
    assert_eq!(kept.erase().name(&losses), "text");
    // What is made when it is first needed goes with the entry.
    kept.hold();
    kept.unhold();
    assert!(keep(|inside| kept.erase().free(inside)).is_ok());
    assert_eq!(drops.load(Ordering::SeqCst), 1);
    let notifier = taken.take();
    assert!(taken.erase().is_taken());
    assert!(keep(|inside| taken.erase().free(inside)).is_ok());
    assert_eq!((drops.load(Ordering::SeqCst), &*notifier.text), (1, "text"));
    drop(notifier);
    assert_eq!(drops.load(Ordering::SeqCst), 2);
}

#[cfg(feature = "std")]
#[test]
fn an_entry_whose_notifiers_drop_panics_is_freed() {
    struct Bomb(#[expect(dead_code, reason = "memory that is lost if it is not dropped")] String);
    impl IntervalNotifier for Bomb {
        fn invalidate(&self, _: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
            Ok(None)
        }
    }
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("the drop of a notifier fails");
        }
    }
    let entry = EntryBox::new(Room::new(), AddressRange::ALL, Bomb("text".into()));
    assert!(keep(|inside| entry.erase().free(inside)).is_err());
}

#[test]
fn spare_memory_goes_to_the_next_entry_of_its_layout_and_to_no_other() {
    let (spare, drops) = (Spare::new(), Arc::default());
    assert!(!spare.is_filled() && spare.take::<Counts<3>>().is_none());
    let first = insert::<3>(None, &drops);
    // One that is needed once more, so that its memory is not the entry's own.
    first.tally().lapsed();
    let memory = address(&first);
    put(&spare, &first);
    assert!(spare.is_filled() && !spare.reserve(), "there is room for one");
    assert!(spare.take::<Counts<4>>().is_none(), "it is too small");
    assert!(spare.take::<Counts<2>>().is_none(), "it is of another size");
    let second = insert(spare.take::<Counts<3>>(), &drops);
    assert_eq!(address(&second), memory);
    assert!(!spare.is_filled() && !second.is_held() && second.first_waiter().is_none());
    // A reservation that is taken back, and one that is filled and cleared.
    assert!(spare.reserve() && !spare.reserve() && !spare.is_filled());
    spare.cancel();
    put(&spare, &second);
    drop(spare.clear());
    assert!(!spare.is_filled() && spare.clear().is_none());
    // What is there is freed with it, and what was taken and is not used by itself.
    let third = insert::<3>(None, &drops);
    put(&spare, &third);
    drop(spare.take::<Counts<3>>());
    let fourth = insert::<5>(None, &drops);
    put(&spare, &fourth);
    drop(spare);
    assert_eq!(drops.load(Ordering::SeqCst), 4);
}

#[test]
fn an_entry_that_is_retired_is_closed_and_unused() {
    let (drops, losses) = (Arc::default(), Losses::new(None));
    let (free, held) = (insert::<0>(None, &drops), insert::<0>(None, &drops));
    assert!(!free.unused() && free.retire());
    assert!(free.unused() && free.own.is_closed() && free.own.stable_sequence().is_none());
    held.hold();
    assert!(!held.retire() && !held.own.is_closed(), "its name is asked for");
    held.unhold();
    assert!(held.retire());
    for entry in [free, held] {
        losses.run(Callback::NotifierDrop, |inside| entry.erase().free(inside));
    }
    assert_eq!(drops.load(Ordering::SeqCst), 2);
}
