//! What becomes of memory that nobody watches any more.

use crate::cache::flagged;
use crate::memory::{PAGE, Raw};
use crate::never_stale::read_during;
use crate::uffd::{eventually, is_readable, no_fork};
use futures::executor::block_on;
use rustix::mm::Advice;
use shootdown::source::{Deliveries, Fork, Reader, Uffd};
use shootdown::{AddressRange, AddressSpace};
use std::thread;

// In processes of their own: what they unmap must not be mapped by the threads of other tests.
crate::list![fn isolated_tests:
    what_was_dropped_during_a_change_is_given_up_after_it_by_who_delivers_by_hand,
    what_was_dropped_during_a_change_is_given_up_after_it_by_run,
    what_was_dropped_before_a_change_was_delivered_is_given_up_after_that,
    what_was_dropped_during_a_change_takes_no_room_from_what_is_watched_meanwhile,
    from_the_65th_range_on_the_memory_around_is_watched_too,
    r4_what_was_dropped_in_a_leased_space_is_given_up,
    what_was_dropped_is_given_up_whatever_mappings_it_consists_of,
    m8_what_the_program_has_mapped_where_it_was_watched_stays_as_it_is,
    m8_what_another_source_watches_where_it_was_watched_stays_as_it_is,
];

fn keeping() -> (Uffd, Reader, Deliveries) {
    Uffd::builder().fork(Fork::Keep).open(&AddressSpace::new()).unwrap()
}

/// Pages that the kernel watches, or leaves out of children.
fn kept(range: AddressRange) -> u64 {
    flagged(range, &["uw", "um", "dc"])
}

/// Drops the watch of one page while a thread that unmaps another waits for the reader; then
/// `meanwhile`.
fn dropped_during_a_change(uffd: &Uffd, reader: &mut Reader, meanwhile: impl FnOnce()) -> Raw {
    let memory = Raw::map(9);
    let (changed, other) = (memory.part(0, 1), memory.part(8, 1));
    let (_watch, watch) =
        (uffd.watch(changed.range()).unwrap(), uffd.watch(other.range()).unwrap());
    thread::scope(|scope| {
        let unmapping = scope.spawn(|| changed.unmap());
        eventually("the event is there", || is_readable(reader));
        drop(watch);
        let another = uffd.watch(memory.part(4, 1).range());
        let held = kept(other.range());
        meanwhile();
        eventually("it is read", || reader.read().unwrap() == 0 && unmapping.is_finished());
        assert!(another.is_ok());
        assert_eq!(held, 1, "if it is about to go, its marks are needed");
    });
    other
}

fn what_was_dropped_during_a_change_is_given_up_after_it_by_who_delivers_by_hand() {
    let _fork = no_fork();
    let (uffd, mut reader, mut deliveries) = keeping();
    let (mut told, mut pauses) = (false, false);
    let other = dropped_during_a_change(&uffd, &mut reader, || {
        told = is_readable(&deliveries);
        pauses = (0..1000).any(|_| {
            let delivered = block_on(deliveries.deliver());
            delivered.is_ok() && deliveries.next_look().is_some_and(|next| !next.is_zero())
        });
    });
    assert!(told, "who waits for the descriptor asks when to come again");
    assert!(pauses, "and is not told to come at once");
    eventually("no look is to come", || match deliveries.next_look() {
        Some(_) => block_on(deliveries.deliver()).is_err(),
        None => true,
    });
    assert_eq!(kept(other.range()), 0);
}

fn what_was_dropped_during_a_change_is_given_up_after_it_by_run() {
    let _fork = no_fork();
    let (uffd, mut reader, mut deliveries) = keeping();
    let delivering = thread::spawn(move || deliveries.run().unwrap());
    for _ in 0..10 {
        let other = dropped_during_a_change(&uffd, &mut reader, || {});
        eventually("it is given up", || kept(other.range()) == 0);
    }
    uffd.stop();
    delivering.join().unwrap();
}

fn what_was_dropped_before_a_change_was_delivered_is_given_up_after_that() {
    let _fork = no_fork();
    let (uffd, mut reader, mut deliveries) = keeping();
    let memory = Raw::map(9);
    let (changed, other) = (memory.part(0, 1), memory.part(8, 1));
    let (_watch, watch) =
        (uffd.watch(changed.range()).unwrap(), uffd.watch(other.range()).unwrap());
    read_during(&mut reader, || changed.unmap());
    drop(watch);
    assert_eq!(kept(other.range()), 1, "if the change is of it, its marks are needed");
    block_on(deliveries.deliver()).unwrap();
    eventually("it is given up", || {
        kept(other.range()) == 0 || block_on(deliveries.deliver()).is_err()
    });
}

fn what_was_dropped_during_a_change_takes_no_room_from_what_is_watched_meanwhile() {
    let _fork = no_fork();
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let most: usize = most.trim().parse().unwrap();
    if most > 1 << 17 {
        println!("left out: more pages than a test should map");
        return;
    }
    // Each watch of a page is a range of its own, and there is room for an eighth of the mappings.
    let (uffd, mut reader, _deliveries) =
        Uffd::builder().fork(Fork::Ignore).granule(PAGE as u64).open(&AddressSpace::new()).unwrap();
    let number = most / 16 + 64;
    let (changed, arena) = (Raw::map(1), Raw::map(4 * number));
    let watch = |at: usize| uffd.watch(arena.part(2 * at, 1).range());
    let _watch = uffd.watch(changed.range()).unwrap();
    let before: Vec<_> = (0..number).map(|at| watch(at).unwrap()).collect();
    let meanwhile: Result<Vec<_>, _> = thread::scope(|scope| {
        let unmapping = scope.spawn(|| changed.unmap());
        eventually("the event is there", || is_readable(&reader));
        drop(before);
        let meanwhile = (number..2 * number).map(watch).collect();
        eventually("it is read", || reader.read().unwrap() == 0 && unmapping.is_finished());
        meanwhile
    });
    assert!(meanwhile.is_ok(), "{:?}", meanwhile.err());
}

fn from_the_65th_range_on_the_memory_around_is_watched_too() {
    let _fork = no_fork();
    let (uffd, _reader, _deliveries) = keeping();
    let arena = Raw::map(2 * 64);
    let _watches: Vec<_> =
        (0..63).map(|at| uffd.watch(arena.part(2 * at, 1).range()).unwrap()).collect();
    // Each has the size and the place of a granule.
    let memory = [Raw::map_huge(), Raw::map_huge()];
    let _last = memory.map(|memory| uffd.watch(memory.part(1, 1).range()).unwrap());
    assert_eq!(memory.map(|memory| kept(memory.range())), [1, 512]);
}

/// R4: with feature `lease`; a lease that is valid closes no gate for the source.
fn r4_what_was_dropped_in_a_leased_space_is_given_up() {
    let _fork = no_fork();
    #[cfg(feature = "lease")]
    let space = AddressSpace::builder().valid_while(|| true).build();
    #[cfg(not(feature = "lease"))]
    let space = AddressSpace::new();
    let (uffd, _reader, mut deliveries) = Uffd::builder().fork(Fork::Keep).open(&space).unwrap();
    let delivering = thread::spawn(move || deliveries.run().unwrap());
    let memory = Raw::map(1);
    drop(uffd.watch(memory.range()).unwrap());
    eventually("it is given up", || kept(memory.range()) == 0);
    uffd.stop();
    delivering.join().unwrap();
}

fn what_was_dropped_is_given_up_whatever_mappings_it_consists_of() {
    let _fork = no_fork();
    let (uffd, _reader, _deliveries) = keeping();
    let memory = Raw::map(3);
    // The kernel has three mappings now.
    memory.part(1, 1).discard(Advice::LinuxDontDump);
    let watch = uffd.watch(memory.range()).unwrap();
    assert_eq!(kept(memory.range()), 3);
    drop(watch);
    assert_eq!(kept(memory.range()), 0);
}

/// Memory of which the first page is watched as far as `uffd` knows, and which has been mapped
/// anew.
fn mapped_anew(
    uffd: &Uffd,
    reader: &mut Reader,
    deliveries: &mut Deliveries,
) -> (Raw, shootdown::source::Watch) {
    loop {
        let memory = Raw::map(64);
        let watch = uffd.watch(memory.part(0, 1).range()).unwrap();
        read_during(reader, || memory.unmap());
        block_on(deliveries.deliver()).unwrap();
        // Another thread may have taken the address.
        if memory.map_again() {
            return (memory, watch);
        }
    }
}

fn m8_what_the_program_has_mapped_where_it_was_watched_stays_as_it_is() {
    let _fork = no_fork();
    let (uffd, mut reader, mut deliveries) = keeping();
    let (memory, watch) = mapped_anew(&uffd, &mut reader, &mut deliveries);
    memory.discard(Advice::LinuxDontFork);
    drop(watch);
    assert_eq!(flagged(memory.range(), &["dc"]), 64, "the program has left it out of its children");
}

fn m8_what_another_source_watches_where_it_was_watched_stays_as_it_is() {
    let _fork = no_fork();
    let (uffd, mut reader, mut deliveries) = keeping();
    let (another, _reader, _deliveries) = keeping();
    let (memory, watch) = mapped_anew(&uffd, &mut reader, &mut deliveries);
    let anew = another.watch(memory.range()).unwrap();
    drop(watch);
    assert_eq!(flagged(memory.range(), &["dc"]), 64);
    assert!(anew.is_armed());
}
