//! The state machine against a naive model of the rules of the contract, with the quick forms and
//! without them.

use super::*;
use crate::index::{Ordered, Position};
use crate::range::RangeSet;
use proptest::prelude::*;
use std::boxed::Box;
use std::cell::Cell;
use std::vec;
use std::vec::Vec;

/// A notifier of the tests. It is leaked, so that it is `Copy`.
#[derive(Clone, Copy)]
struct Test(&'static (Own, u64, AddressRange));

impl PartialEq for Test {
    fn eq(&self, other: &Self) -> bool {
        core::ptr::eq(self.0, other.0)
    }
}

impl Ordered for Test {
    fn order(self) -> u64 {
        self.0.1
    }
}

impl Indexed for Test {
    fn range(self) -> AddressRange {
        LOOKS.set(LOOKS.get() + 1);
        self.0.2
    }

    fn position(self) -> Position {
        self.own().position()
    }

    fn set_position(self, position: Position) {
        self.own().set_position(position);
    }

    fn prefetch<T>(_memory: &T) -> bool {
        PREFETCHES.set(PREFETCHES.get() + 1);
        true
    }
}

std::thread_local! {
    static PREFETCHES: Cell<u32> = const { Cell::new(0) };
    /// Counts how often a range was asked for.
    static LOOKS: Cell<u32> = const { Cell::new(0) };
}

impl Member for Test {
    fn own(&self) -> &Own {
        &self.0.0
    }
}

/// One notifier as the contract describes it.
struct Model {
    range: AddressRange,
    member: Test,
    own: u64,
    /// Serials of the active invalidations that cover it.
    covered_by: Vec<u64>,
    registered: bool,
}

struct Running {
    id: Id,
    serial: u64,
    hits: Vec<Test>,
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u64, u64),
    Remove(prop::sample::Index),
    /// Starts an invalidation of one range or many. The bits say which hits set their sequence
    /// (S4).
    Start(Vec<(u64, u64)>, u8),
    End(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..30u64, 1..12u64).prop_map(|(start, len)| Op::Insert(start, len)),
        1 => any::<prop::sample::Index>().prop_map(Op::Remove),
        3 => (0..40u64, 1..12u64, any::<u8>())
            .prop_map(|(start, len, sets)| Op::Start(vec![(start, len)], sets | 0x33)),
        2 => (prop::collection::vec((0..42u64, 1..5u64), 2..12), any::<u8>())
            .prop_map(|(ranges, sets)| Op::Start(ranges, sets | 0x32)),
        4 => any::<prop::sample::Index>().prop_map(Op::End),
    ]
}

/// Compares what the protocol and the model say of each notifier.
fn compare(
    model: &[Model],
    protocol: &Protocol<Test, Vec<Test>>,
    sequence: u64,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(protocol.sequence(), sequence);
    for notifier in model {
        let own = notifier.member.own();
        prop_assert_eq!(own.sequence(), notifier.own);
        prop_assert_eq!(own.is_covered(), !notifier.covered_by.is_empty());
        // Removed notifiers were closed before.
        let stable = notifier.covered_by.is_empty() && notifier.registered;
        prop_assert_eq!(own.stable_sequence(), stable.then_some(notifier.own));
        prop_assert_eq!(own.is_past(notifier.own), !notifier.registered);
        prop_assert!(own.is_past(notifier.own.wrapping_add(2)));
    }
    Ok(())
}

fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("SHOOTDOWN_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(default);
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

/// Runs `ops` on the protocol and on the model, and compares them. With `quick` it uses the quick
/// forms where they apply, and without it only the plain functions, which are their specification.
fn run(first: u64, ops: &[Op], quick: bool) -> Result<(), TestCaseError> {
    let mut protocol = Protocol::<Test, Vec<Test>>::new(first);
    let mut sequence = first;
    let mut model: Vec<Model> = vec![];
    let mut running: Vec<Running> = vec![];
    let mut ranges: Vec<(u64, RangeSet, bool)> = vec![];
    for (order, op) in (1u64..).zip(ops.iter().cloned()) {
        match op {
            Op::Insert(start, len) => {
                let range = AddressRange::new(start, len).unwrap();
                let member = Test(Box::leak(Box::new((Own::new(), order, range))));
                // Every other notifier is watched. Every third has a mark that the protocol does
                // not interpret.
                member.own().mark(WATCHED, order % 2 == 0);
                member.own().mark(MARKS[order as usize % MARKS.len()], order % 3 == 0);
                protocol.insert(member);
                let covering = ranges.iter().filter(|(_, active, past)| {
                    !past && active.iter().any(|active| active.overlaps(range))
                });
                let covered_by: Vec<u64> = covering.map(|(serial, ..)| *serial).collect();
                // S5.
                let own = if covered_by.is_empty() {
                    sequence.wrapping_sub(if sequence.is_multiple_of(2) { 1 } else { 2 })
                } else {
                    sequence |= 1;
                    sequence
                };
                model.push(Model { range, member, own, covered_by, registered: true });
            }
            Op::Remove(at) => {
                let mut registered: Vec<_> =
                    model.iter_mut().filter(|notifier| notifier.registered).collect();
                if !registered.is_empty() {
                    let at = at.index(registered.len());
                    registered[at].registered = false;
                    let own = registered[at].member.own();
                    if !quick || !own.quick_close(0) {
                        own.close();
                    }
                    prop_assert!(protocol.remove(registered[at].member));
                }
            }
            Op::Start(of, sets) => {
                let set = RangeSet::new(
                    of.iter().map(|(start, len)| AddressRange::new(*start, *len).unwrap()),
                )
                .unwrap();
                let mut plain = None;
                let started = match set[..] {
                    // Some may be moved into the crowd, and some not.
                    [range] => {
                        if quick {
                            // The specification of `quick::cover`, undone before the start.
                            let mut hits = vec![];
                            let sequence =
                                cover(&protocol.index, protocol.sequence, range, &mut hits);
                            hits.iter().for_each(|member| _ = member.own().uncover());
                            plain = Some((sequence, hits));
                        }
                        protocol.start(range, |id| id.serial() % 3 != 0, |_, _| (), |hits| hits)
                    }
                    _ => protocol.start_set(&set, sets % 2 == 0, |_, _| (), |hits| hits),
                };
                let hits = core::mem::take(started.extra);
                prop_assert_eq!(started.hit, !hits.is_empty());
                if let Some((sequence, plain)) = plain {
                    prop_assert!(hits == plain, "the quick cover found other hits");
                    prop_assert!(!started.hit || started.sequence == sequence);
                }
                let started = (started.id, started.sequence);
                let serial = protocol.last_serial();
                let mut expected: Vec<_> = model
                    .iter_mut()
                    .filter(|notifier| {
                        notifier.registered
                            && set.iter().any(|range| range.overlaps(notifier.range))
                    })
                    .collect();
                // O1.
                expected.sort_by_key(|notifier| (notifier.range.start(), notifier.member.order()));
                let same = expected.iter().map(|notifier| notifier.member).eq(hits.iter().copied());
                prop_assert!(same, "hits out of order");
                if !expected.is_empty() {
                    // S6, then S2.
                    let separate = |notifier: &&mut Model| {
                        notifier.own == sequence && notifier.covered_by.is_empty()
                    };
                    if sequence % 2 == 1 && expected.iter().any(separate) {
                        sequence = sequence.wrapping_add(2);
                    }
                    sequence |= 1;
                    prop_assert_eq!(started.1, sequence);
                }
                for (at, notifier) in expected.iter_mut().enumerate() {
                    notifier.covered_by.push(serial);
                    // S4.
                    if sets >> (at % 8) & 1 == 1 {
                        notifier.member.own().set(sequence);
                        notifier.own = sequence;
                    }
                }
                let past = set.len() > 1 && sets % 2 == 0;
                ranges.push((serial, set, past));
                running.push(Running { id: started.0, serial, hits });
            }
            Op::End(at) => {
                if !running.is_empty() {
                    let ended = running.swap_remove(at.index(running.len()));
                    let mut uncovered = vec![];
                    let short = quick
                        && match ended.hits[..] {
                            [] => protocol.quick_end_none(ended.id),
                            [only] => protocol.quick_end_one(ended.id, only).is_some(),
                            _ => false,
                        };
                    let split = if quick && !short {
                        protocol.quick_end(ended.id, &ended.hits).map(|(tell, _)| tell)
                    } else {
                        None
                    };
                    match split {
                        Some(true) => {
                            let told = protocol
                                .tell(ended.id, &ended.hits, |member| uncovered.push(member));
                            prop_assert!(told.is_some());
                        }
                        Some(false) => {}
                        None if short => {}
                        None => {
                            let ended = protocol
                                .end(ended.id, &ended.hits, |member| uncovered.push(member));
                            prop_assert!(ended.is_some());
                        }
                    }
                    ranges.retain(|(serial, ..)| *serial != ended.serial);
                    let mut expected = 0;
                    for notifier in &mut model {
                        let before = notifier.covered_by.len();
                        notifier.covered_by.retain(|serial| *serial != ended.serial);
                        if before == 1 && notifier.covered_by.is_empty() {
                            let watched = notifier.member.order() % 2 == 0;
                            expected += usize::from(watched);
                            prop_assert_eq!(
                                uncovered.contains(&notifier.member),
                                watched,
                                "R1: the moment was not told of"
                            );
                            let marked = notifier
                                .member
                                .own()
                                .is_marked(MARKS[notifier.member.order() as usize % MARKS.len()]);
                            prop_assert_eq!(marked, notifier.member.order() % 3 == 0);
                        }
                    }
                    prop_assert_eq!(uncovered.len(), expected);
                    // S3.
                    if running.is_empty() && sequence % 2 == 1 {
                        sequence = sequence.wrapping_add(1);
                    }
                }
            }
        }
        compare(&model, &protocol, sequence)?;
        for at in (0..44).map(|start| AddressRange::new(start, 2).unwrap()) {
            let overlaps =
                |(_, set, _): &&(u64, RangeSet, bool)| set.iter().any(|range| range.overlaps(at));
            let mut found = vec![];
            protocol.active.any_overlapping(at, |id, _| {
                found.push(id.serial());
                false
            });
            found.sort_unstable();
            let mut expected: Vec<_> =
                ranges.iter().filter(overlaps).map(|(serial, ..)| *serial).collect();
            expected.sort_unstable();
            prop_assert_eq!(found, expected, "L2");
        }
        prop_assert_eq!(
            protocol.active.sets().len(),
            ranges.iter().filter(|(_, set, _)| set.len() > 1).count()
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(512))]
    #[test]
    fn does_what_the_contract_says(ops in prop::collection::vec(op(), 1..200)) {
        run(2, &ops, true)?;
        run(2, &ops, false)?;
    }

    #[test]
    fn does_it_around_the_end_of_the_numbers(ops in prop::collection::vec(op(), 1..120)) {
        run(u64::MAX - 11, &ops, true)?;
        run(u64::MAX - 11, &ops, false)?;
    }
}

#[test]
fn a_later_sequence_is_not_set_back_by_an_earlier_invalidation() {
    let own = Own::new();
    own.set(7);
    own.set(5);
    assert_eq!(own.sequence(), 7);
    own.set(u64::MAX);
    assert_eq!(own.sequence(), 7, "u64::MAX is before 7: sequences wrap");
}

#[test]
fn as_many_are_active_as_can_be_counted_and_one_more_is_refused_before_anything_has_changed() {
    let range = AddressRange::new(0, 1).unwrap();
    let mut protocol = Protocol::<Test, Vec<Test>>::new(2);
    protocol.active.most = PLACES as u32 + 3;
    let member = Test(Box::leak(Box::new((Own::new(), 1, range))));
    protocol.insert(member);
    let mut running: Vec<(Id, Vec<Test>)> = vec![];
    let start = |protocol: &mut Protocol<Test, Vec<Test>>| {
        let started = protocol.start(range, |_| true, |_, _| (), |hits| hits);
        (started.id, core::mem::take(started.extra))
    };
    for _ in 0..PLACES + 3 {
        running.push(start(&mut protocol));
    }
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| start(&mut protocol)));
    let panic = refused.map(drop).unwrap_err();
    assert!(
        panic
            .downcast_ref::<std::string::String>()
            .unwrap()
            .contains("invalidations are active at once")
    );
    assert_eq!(protocol.active.len(), PLACES + 3);
    for (id, hits) in running {
        assert!(protocol.end(id, &hits, |_| ()).is_some());
    }
    assert_eq!((protocol.active.len(), protocol.sequence()), (0, 4));
    assert!(member.own().stable_sequence().is_some() && protocol.active.crowd.is_empty());
    let (id, hits) = start(&mut protocol);
    assert!(protocol.quick_end(id, &hits).is_some());
}

/// Invalidations of many ranges are in the crowd from the beginning, and an older one leaves its
/// place for the crowd later: the serials in the crowd do not rise.
#[test]
fn what_enters_the_crowd_in_any_order_leaves_it() {
    let mut protocol: Protocol<Test, Vec<Test>> = Protocol::new(2);
    let range = AddressRange::new(0x1000, 0x1000).unwrap();
    let set = RangeSet::new([range, AddressRange::new(0x4000, 0x1000).unwrap()]).unwrap();
    let mut ids = Vec::new();
    for round in 0..3 * PLACES {
        ids.push(protocol.start(range, |_| true, |_, _| (), |hits| hits).id);
        if round % 3 == 0 {
            ids.push(protocol.start_set(&set, false, |_, _| (), |hits| hits).id);
        }
    }
    let in_crowd = protocol.active.crowd.len();
    assert_eq!((protocol.active.indexed(), in_crowd), (ids.len() - PLACES, ids.len() - PLACES));
    let (last, others) = ids.split_last().unwrap();
    for id in others {
        let id = protocol.active().located(*id);
        assert!(protocol.end(id, &[], |_| ()).is_some());
    }
    // The index is made anew only when the crowd is empty.
    let in_crowd = protocol.active.crowd.len();
    assert_eq!(protocol.active.indexed(), in_crowd, "left in the index");
    let last = protocol.active().located(*last);
    assert!(protocol.end(last, &[], |_| ()).is_some());
    assert_eq!(protocol.active.len(), 0);
}

fn test(order: u64, range: AddressRange) -> Test {
    Test(Box::leak(Box::new((Own::new(), order, range))))
}

#[test]
fn each_quick_form_does_its_common_case_and_leaves_the_others_to_the_plain_one() {
    let [here, there] = [0, 0x4000].map(|start| AddressRange::new(start, 0x1000).unwrap());
    let mut protocol: Protocol<Test, Vec<Test>> = Protocol::new(2);
    let [only, other, watched] = [1, 2, 3].map(|order| test(order, here));
    watched.own().mark(WATCHED, true);
    let start = |protocol: &mut Protocol<Test, Vec<Test>>, range| {
        let started = protocol.start(range, |_| true, |_, _| (), |hits| hits);
        (started.id, core::mem::take(started.extra))
    };
    let (none, hits) = start(&mut protocol, there);
    assert!(hits.is_empty() && protocol.quick_end_none(none) && !protocol.quick_end_none(none));
    protocol.insert(only);
    // Covered twice, then once.
    for id in [(); 2].map(|()| start(&mut protocol, here).0) {
        assert!(protocol.quick_end_one(id, only).is_some());
    }
    protocol.insert(other);
    let (id, hits) = start(&mut protocol, here);
    let (tell, _) = protocol.quick_end(id, &hits).expect("it has a place");
    assert!(hits.len() == 2 && !tell, "nobody waits");
    protocol.insert(watched);
    let (id, hits) = start(&mut protocol, here);
    assert!(protocol.quick_end_one(id, watched).is_none());
    assert!(protocol.quick_end(id, &hits).expect("it has a place").0, "R1");
    assert!(!only.own().is_covered() && protocol.active.len() == 0);
}

#[test]
fn what_is_many_does_not_make_a_search_of_what_is_few_long() {
    let looks = |members: Vec<Test>, ranges: &[AddressRange]| {
        let mut protocol: Protocol<Test, Vec<Test>> = Protocol::new(2);
        members.iter().for_each(|member| protocol.insert(*member));
        let set = RangeSet::new(ranges.iter().copied()).unwrap();
        LOOKS.set(0);
        protocol.start_set(&set, false, |_, _| (), |hits| hits);
        LOOKS.get()
    };
    let at = |start, len| AddressRange::new(start, len).unwrap();
    let between = (1..1000).map(|order| test(order, at(order * 16, 1))).collect();
    assert!(looks(between, &[at(0, 1), at(1 << 20, 1)]) < 100, "notifiers in a gap");
    let ranges: Vec<_> = (0..1000).map(|number| at(number * 16, 1)).collect();
    assert!(looks(vec![test(0, at(0, 1 << 20))], &ranges) < 100, "ranges of one notifier");
}

#[test]
fn memory_for_many_newcomers_is_given_back_and_for_few_is_kept() {
    let range = AddressRange::new(0, 1).unwrap();
    for (newcomers, kept) in [(1, true), (MOST_NEWCOMERS, true), (MOST_NEWCOMERS + 1, false)] {
        let mut protocol: Protocol<Test, Vec<Test>> = Protocol::new(2);
        let id = protocol.start(range, |_| true, |_, _| (), |hits| hits).id;
        (0..newcomers as u64).for_each(|order| protocol.insert(test(order, range)));
        assert!(protocol.end(id, &[], |_| ()).is_some());
        let capacity = protocol.active.places[0].newcomers.capacity();
        assert_eq!(capacity >= newcomers, kept, "{newcomers} newcomers");
        assert!(kept || capacity == 0);
    }
}

#[test]
fn a_notifier_knows_where_it_is_and_what_an_invalidation_needs_is_prefetched() {
    let mut protocol: Protocol<Test, Vec<Test>> = Protocol::new(2);
    // Descending, so that the index soon has many leaves.
    for order in 0..9000 {
        let member = test(order, AddressRange::new(100_000 - order, 1).unwrap());
        protocol.insert(member);
        // One that splits a leaf does not.
        assert!(order >= 32 || member.own().position() != Position::UNKNOWN);
    }
    PREFETCHES.set(0);
    protocol.expect(AddressRange::new(95_000, 1).unwrap());
    assert_eq!(PREFETCHES.get(), 1);
}

#[cfg(debug_assertions)]
#[test]
fn r2_locks_are_told_apart_wherever_they_are() {
    for far in (0..4u64).map(|high| (high << 33) as usize) {
        let own = Own::new();
        own.note_driver_lock(far);
        assert!(own.is_driver_lock(far));
        // The next one, and one that is two gigabytes away.
        assert!(!own.is_driver_lock(far + 8) && !own.is_driver_lock(far + (1 << 31)), "{far:x}");
    }
}
