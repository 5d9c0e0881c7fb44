//! The index against a plain list, step by step. The tests of its bounds are in `leaf/tests.rs`,
//! those of its hints in `hints/tests.rs`.

use super::node::{UNUSED, slack};
use super::*;
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::vec::Vec;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Id(pub(super) u64);

/// An [`Id`] with its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Value(AddressRange, Id);

std::thread_local! {
    /// The position of every other value. The rest store none, as the values of some users.
    static POSITIONS: RefCell<BTreeMap<u64, Position>> = const { RefCell::new(BTreeMap::new()) };
    /// The address of what was prefetched last.
    pub(super) static PREFETCHED: Cell<Option<usize>> = const { Cell::new(None) };
}

impl Ordered for Value {
    fn order(self) -> u64 {
        self.1.0
    }
}

impl Indexed for Value {
    fn range(self) -> AddressRange {
        self.0
    }

    fn position(self) -> Position {
        POSITIONS
            .with_borrow(|positions| positions.get(&self.1.0).copied().unwrap_or(Position::UNKNOWN))
    }

    fn set_position(self, position: Position) {
        if self.1.0.is_multiple_of(2) {
            POSITIONS.with_borrow_mut(|positions| positions.insert(self.1.0, position));
        }
    }

    fn prefetch<T>(memory: &T) -> bool {
        PREFETCHED.set(Some(core::ptr::from_ref(memory) as usize));
        false
    }
}

impl IntervalIndex<Value> {
    pub(super) fn put(&mut self, range: AddressRange, id: Id) {
        self.insert(Value(range, id));
    }

    pub(super) fn cut(&mut self, range: AddressRange, id: Id) -> bool {
        self.remove(Value(range, id))
    }

    /// Walks the whole tree and checks what each node stores about its parts.
    pub(super) fn check(&self) {
        if self.len == 0 {
            return;
        }
        let mut all = Vec::new();
        self.check_node(self.root, self.height, UNUSED, &mut all);
        assert_eq!(all.len(), self.len);
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "keys out of order");
    }

    /// Checks the subtree of `node`, after which the next node begins at `bound`. Returns its
    /// greatest `last`.
    fn check_node(&self, node: Node, height: usize, bound: u64, all: &mut Vec<(u64, u64)>) -> u64 {
        // A stored `last` may stem from a removed interval if that did not extend into other nodes.
        let fits = |believed: u64, greatest: u64, bound: u64| {
            believed == greatest || (greatest..bound).contains(&believed)
        };
        if height == 0 {
            let leaf = self.leaves.at(node);
            assert!(leaf.len >= 1, "an empty leaf was left");
            assert_eq!(leaf.live.count_ones(), leaf.len);
            assert!(leaf.starts.is_sorted(), "a gap out of order");
            let lasts = || (0..CAP).map(|at| leaf.last(at));
            assert!(leaf.slack >= slack(&leaf.starts, lasts()), "a leaf's slack is too small");
            for (at, value) in leaf.values.iter().enumerate() {
                assert_eq!(value.is_some(), leaf.live & (1 << at) != 0);
                let Some(Value(range, id)) = value else { continue };
                assert_eq!(leaf.starts[at], range.start());
                assert!(range.last() - range.start() <= leaf.longest, "longer than the longest");
                all.push((range.start(), id.0));
            }
            let ordered: Vec<_> = leaf.values.iter().flatten().map(|value| value.0).collect();
            let apart = ordered.windows(2).all(|pair| pair[0].last() < pair[1].start());
            assert!(
                leaf.slack != 0 || apart,
                "intervals overlap where the slack says that none do"
            );
            let greatest = lasts().max().unwrap();
            assert!(leaf.reach() <= self.reach, "a leaf reaches further into the next ones");
            assert!(
                leaf.bound <= bound && fits(leaf.max_last, greatest, leaf.bound),
                "a leaf's greatest `last`"
            );
            return greatest;
        }
        let inner = self.inners.at(node);
        assert!(inner.len >= 2, "an inner node with one child was left");
        assert!(
            inner.slack
                >= slack(&inner.starts[..inner.len], inner.max_lasts[..inner.len].iter().copied()),
            "an inner node's slack is too small"
        );
        assert!(inner.starts[inner.len..].iter().all(|start| *start == UNUSED));
        let mut greatest = 0;
        for at in 0..inner.len {
            let from = all.len();
            let bound = inner.starts[..inner.len].get(at + 1).map_or(bound, |start| *start);
            let below = self.check_node(inner.children[at], height - 1, bound, all);
            assert!(fits(inner.max_lasts[at], below, bound), "a child's greatest `last`");
            assert!(
                inner.max_lasts[at] >= self.max_last(height - 1, inner.children[at]),
                "a child knows of a greater `last`"
            );
            greatest = greatest.max(below);
            if height > 1 {
                let child = self.inners.at(inner.children[at]);
                assert_eq!(
                    (child.starts[0], child.orders[0]),
                    (inner.starts[at], inner.orders[at]),
                    "a child has another lower bound than its parent stores of it"
                );
            }
            let (first, last) = (all[from], all[all.len() - 1]);
            assert!(
                at == 0 || (inner.starts[at], inner.orders[at]) <= first,
                "a key below its bound"
            );
            assert!(
                at + 1 == inner.len || last < (inner.starts[at + 1], inner.orders[at + 1]),
                "a key above the next bound"
            );
        }
        greatest
    }

    pub(super) fn hits(&self, range: AddressRange) -> Vec<Id> {
        let mut hits = Vec::new();
        self.overlapping(range, |value| hits.push(value.1));
        // Twice: the first search may have a wrong hint, the second has the right one.
        for _ in 0..2 {
            if let Some((leaf, slots)) = self.only_leaf(range) {
                let in_leaf: Vec<_> = slots
                    .filter_map(|at| leaf.overlapping(at, range))
                    .map(|value| value.1)
                    .collect();
                assert_eq!(in_leaf, hits, "{range:?} overlaps what is in other leaves");
            }
        }
        hits
    }
}

#[derive(Default)]
struct List(Vec<(AddressRange, Id)>);

impl List {
    fn hits(&self, range: AddressRange) -> Vec<Id> {
        let mut hits: Vec<_> = self.0.iter().filter(|(own, _)| own.overlaps(range)).collect();
        hits.sort_by_key(|(own, id)| (own.start(), id.0));
        hits.into_iter().map(|(_, id)| *id).collect()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert(AddressRange),
    Remove(prop::sample::Index),
    RemoveMany(u8),
    Query(AddressRange),
}

/// Draws ranges from the middle, a few of them long, some at either end of the address space, and
/// some from one end to the other.
fn range() -> impl Strategy<Value = AddressRange> {
    let between =
        |first: u64, last: u64| AddressRange::try_from(first.min(last)..=first.max(last)).unwrap();
    prop_oneof![
        12 => (0..400u64, 1..60u64).prop_map(|(start, len)| AddressRange::new(start, len).unwrap()),
        2 => (0..2u64, 1..60u64).prop_map(|(start, len)| AddressRange::new(start, len).unwrap()),
        2 => (0..30u64, 0..30u64).prop_map(move |(a, b)| between(u64::MAX - a, u64::MAX - b)),
        1 => (0..3u64, 0..3u64).prop_map(move |(a, b)| between(a, u64::MAX - b)),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        7 => range().prop_map(Op::Insert),
        3 => any::<prop::sample::Index>().prop_map(Op::Remove),
        1 => (0..40u8).prop_map(Op::RemoveMany),
        3 => range().prop_map(Op::Query),
    ]
}

/// Sets the number of random schedules: `SHOOTDOWN_CASES`, or `default`.
fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("SHOOTDOWN_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(default);
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(cases(256))]
    #[test]
    fn answers_as_a_plain_list_does(ops in prop::collection::vec(op(), 1..800)) {
        let (mut index, mut list) = (IntervalIndex::new(), List::default());
        for (order, op) in (0u64..).zip(ops) {
            match op {
                Op::Insert(range) => {
                    index.put(range, Id(order));
                    list.0.push((range, Id(order)));
                }
                Op::Remove(at) => {
                    if !list.0.is_empty() {
                        let (range, id) = list.0.swap_remove(at.index(list.0.len()));
                        prop_assert!(index.cut(range, id));
                        prop_assert!(!index.cut(range, id));
                    }
                }
                Op::RemoveMany(many) => {
                    for _ in 0..many {
                        let Some((range, id)) = list.0.pop() else { break };
                        prop_assert!(index.cut(range, id));
                    }
                }
                Op::Query(range) => prop_assert_eq!(index.hits(range), list.hits(range)),
            }
            prop_assert_eq!(index.len(), list.0.len());
            index.check();
        }
        prop_assert_eq!(index.hits(AddressRange::ALL), list.hits(AddressRange::ALL));
    }
}

#[test]
fn holds_many_intervals_with_one_start_in_order_of_insertion() {
    let mut index = IntervalIndex::new();
    let range = |id: u64| AddressRange::new(4096, 1 + id % 7).unwrap();
    for id in 0..5000 {
        index.put(range(id), Id(id));
    }
    index.check();
    assert_eq!(index.hits(AddressRange::ALL), (0..5000).map(Id).collect::<Vec<_>>());
    for id in (0..5000).step_by(2) {
        assert!(index.cut(range(id), Id(id)));
        if id % 500 == 0 {
            index.check();
        }
    }
    assert_eq!(index.hits(AddressRange::ALL), (1..5000).step_by(2).map(Id).collect::<Vec<_>>());
}

#[test]
fn finds_what_reaches_from_one_end_of_the_numbers_to_the_other() {
    let mut index = IntervalIndex::new();
    index.put(AddressRange::ALL, Id(0));
    index.put(AddressRange::new(0, 10).unwrap(), Id(1));
    index.put(AddressRange::new(20, 10).unwrap(), Id(2));
    let last = AddressRange::try_from(u64::MAX..=u64::MAX).unwrap();
    // The first extends 2^64 bytes into the second, which no `u64` can hold.
    assert_eq!(index.hits(last), [Id(0)]);
    assert!(index.cut(AddressRange::new(20, 10).unwrap(), Id(2)));
    assert_eq!(index.hits(last), [Id(0)]);
    index.put(last, Id(3));
    assert_eq!(index.hits(last), [Id(0), Id(3)]);
    index.check();
}

#[test]
fn finds_each_interval_at_its_last_address_and_nothing_behind_it() {
    let mut index = IntervalIndex::new();
    for id in 0..200 {
        index.put(AddressRange::new(id * 8192, 4096).unwrap(), Id(id));
    }
    // Some of them are the last ones of their leaves.
    for id in 0..200 {
        assert_eq!(index.hits(AddressRange::new(id * 8192 + 4095, 1).unwrap()), [Id(id)]);
        assert_eq!(index.hits(AddressRange::new(id * 8192 + 4096, 1).unwrap()), []);
    }
}

#[test]
fn the_span_says_what_lies_beside_all_intervals() {
    let mut index = IntervalIndex::new();
    let page = |at: u64| AddressRange::new(at * 4096, 4096).unwrap();
    assert!(!index.may_overlap(page(1)), "it is empty");
    for at in [5, 3, 9] {
        index.put(page(at), Id(at));
    }
    for at in 0..12 {
        assert_eq!(index.may_overlap(page(at)), (3..=9).contains(&at), "page {at}");
    }
}

#[test]
fn memory_for_nodes_grows_by_an_eighth() {
    let mut index = IntervalIndex::new();
    let mut capacities = std::vec![0];
    for id in 0..5000 {
        index.put(AddressRange::new(id * 8192, 4096).unwrap(), Id(id));
        let capacity = index.leaves.nodes.capacity();
        if capacities.last() != Some(&capacity) {
            capacities.push(capacity);
        }
    }
    for pair in capacities.windows(2) {
        assert_eq!(pair[1], pair[0] + pair[0] / 8 + 1, "{capacities:?}");
    }
}

#[test]
fn ascending_insertion_fills_its_leaves() {
    let mut index = IntervalIndex::new();
    for id in 0..100_000 {
        index.put(AddressRange::new(id * 8192, 4096).unwrap(), Id(id));
    }
    index.check();
    let full = index.leaves.nodes.len() * CAP;
    assert!(full < 101_000, "{full} slots for 100000 intervals");
    // Nodes with all children but one: about a thirty-first, and again of these.
    let (leaves, inners) = (index.leaves.nodes.len(), index.inners.nodes.len());
    assert!(inners < leaves / 29, "{inners} nodes above {leaves} leaves");
    assert!(index.heap_bytes() > 0);
    for id in 0..100_000 {
        assert!(index.cut(AddressRange::new(id * 8192, 4096).unwrap(), Id(id)));
    }
    assert_eq!(index.len(), 0);
    assert!(index.hits(AddressRange::ALL).is_empty());
    index.put(AddressRange::ALL, Id(7));
    assert_eq!(index.hits(AddressRange::ALL), [Id(7)]);
}

#[test]
fn removal_finds_what_was_moved_since_it_was_put_somewhere() {
    let mut index = IntervalIndex::new();
    let range = |id: u64| AddressRange::new(id % 500 * 16, 8).unwrap();
    // From both ends to the middle, so that leaves are split and their intervals moved. The
    // removals come in the same order.
    let ids: Vec<u64> = (0..250).flat_map(|id| [id, 499 - id]).collect();
    for &id in &ids {
        index.put(range(id), Id(id));
    }
    let stays = |id: u64| {
        let value = Value(range(id), Id(id));
        let (leaf, at) = value.position().get();
        index.leaves.nodes.get(leaf).is_some_and(|leaf| leaf.values[at] == Some(value))
    };
    let evens = || ids.iter().copied().filter(|id| id.is_multiple_of(2));
    assert!(evens().any(stays) && !evens().all(stays), "both ways of a removal are tried");
    for &id in &ids {
        assert!(index.cut(range(id), Id(id)));
        assert!(!index.cut(range(id), Id(id)));
        index.check();
    }
    assert_eq!(index.len(), 0);
}

#[test]
fn what_comes_and_goes_does_not_make_the_index_grow() {
    let mut index = IntervalIndex::new();
    let page = |at: u64| AddressRange::new(at * 4096, 4096).unwrap();
    for at in 0..1000 {
        index.put(page(at * 2), Id(at));
    }
    for round in 0..10_000 {
        let at = round * 7919 % 999 * 2 + 1;
        let id = Id(1000 + round);
        index.put(page(at), id);
        assert_eq!(index.hits(page(at)), [id]);
        assert!(index.cut(page(at), id));
        assert!(index.hits(page(at)).is_empty());
    }
    index.check();
    // Insertion and removal in turn have not made the index grow.
    assert!(index.leaves.nodes.len() < 100, "{} leaves", index.leaves.nodes.len());
}

#[test]
fn what_comes_and_goes_in_a_tall_tree_is_found() {
    // Four levels. The removals merge nodes of all levels and take parts from their neighbours.
    let mut index = IntervalIndex::new();
    let range = |id: u64| AddressRange::new(id * 7919 % 40_009 * 16, 8).unwrap();
    for id in 0..40_009 {
        index.put(range(id), Id(id));
    }
    assert_eq!(index.height, 3);
    let by_start = (0..40_009).map(|at| at * 12_080 % 40_009);
    let mut gone = 0;
    for round in 0..8 {
        // From one end to the other, with some left over each time.
        for id in by_start.clone().filter(|id| id % 8 == round) {
            assert!(index.cut(range(id), Id(id)));
            gone += 1;
            if gone % 2_000 == 0 {
                index.check();
            }
        }
    }
    assert_eq!(index.len(), 0);
}
