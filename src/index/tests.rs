//! The index against a plain list, step by step.

use super::node::{UNUSED, slack};
use super::*;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::vec::Vec;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Id(u64);

/// An [`Id`] with its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Value(AddressRange, Id);

std::thread_local! {
    /// Where every other value was put; the rest, as those of some users, remember nothing.
    static PLACES: RefCell<BTreeMap<u64, Place>> = const { RefCell::new(BTreeMap::new()) };
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

    fn place(self) -> Place {
        PLACES.with_borrow(|places| places.get(&self.1.0).copied().unwrap_or(Place::UNKNOWN))
    }

    fn set_place(self, place: Place) {
        if self.1.0.is_multiple_of(2) {
            PLACES.with_borrow_mut(|places| places.insert(self.1.0, place));
        }
    }
}

impl IntervalIndex<Value> {
    fn put(&mut self, range: AddressRange, id: Id) {
        self.insert(Value(range, id));
    }

    fn cut(&mut self, range: AddressRange, id: Id) -> bool {
        self.remove(Value(range, id))
    }

    /// Walks the whole tree and checks what every node says of what is below it.
    fn check(&self) {
        if self.len == 0 {
            return;
        }
        let mut all = Vec::new();
        self.check_node(self.root, self.height, UNUSED, &mut all);
        assert_eq!(all.len(), self.len);
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "keys out of order");
    }

    /// The greatest `last` below a node, behind which the next one begins at `bound`.
    fn check_node(&self, node: Node, height: usize, bound: u64, all: &mut Vec<(u64, u64)>) -> u64 {
        // What a node believes may be the `last` of what has gone, if that is of no account to
        // others.
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

    fn hits(&self, range: AddressRange) -> Vec<Id> {
        let mut hits = Vec::new();
        self.overlapping(range, |value| hits.push(value.1));
        // Twice: the first may have to look for the leaf, the second has a hint.
        for _ in 0..2 {
            if let Some((leaf, places)) = self.only_leaf(range) {
                let in_leaf: Vec<_> = places
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

/// Ranges from the middle, a few of them long; some at either end of the numbers, and some from one
/// end to the other.
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

/// `SHOOTDOWN_CASES` sets how many random sequences are tried.
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
    // How far the first reaches into the second is one more than a number can say.
    assert_eq!(index.hits(last), [Id(0)]);
    assert!(index.cut(AddressRange::new(20, 10).unwrap(), Id(2)));
    assert_eq!(index.hits(last), [Id(0)]);
    index.put(last, Id(3));
    assert_eq!(index.hits(last), [Id(0), Id(3)]);
    index.check();
}

#[test]
fn ascending_insertion_fills_its_leaves() {
    let mut index = IntervalIndex::new();
    for id in 0..100_000 {
        index.put(AddressRange::new(id * 8192, 4096).unwrap(), Id(id));
    }
    index.check();
    let full = index.leaves.nodes.len() * CAP;
    assert!(full < 101_000, "{full} places for 100000 intervals");
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
    // From both ends to the middle, so that leaves are split and their intervals moved, then back
    // again.
    let ids: Vec<u64> = (0..250).flat_map(|id| [id, 499 - id]).collect();
    for &id in &ids {
        index.put(range(id), Id(id));
    }
    let stays = |id: u64| {
        let value = Value(range(id), Id(id));
        let (leaf, at) = value.place().get();
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
    // It has not grown by what came and went.
    assert!(index.leaves.nodes.len() < 100, "{} leaves", index.leaves.nodes.len());
}

#[test]
fn what_reached_far_is_forgotten_when_it_goes() {
    let mut index = IntervalIndex::new();
    for at in 0..20 {
        index.put(AddressRange::new(at * 8192, 4096).unwrap(), Id(at));
    }
    let slack = |index: &IntervalIndex<Value>| index.leaves.nodes[index.root as usize].slack;
    // Over nine others. One remembers where it was put, the other does not.
    let long = AddressRange::new(3 * 8192 + 4096, 9 * 8192).unwrap();
    for id in [Id(100), Id(101)] {
        assert_eq!(slack(&index), 0);
        index.put(long, id);
        assert_eq!(slack(&index), 9 * 8192 - 4096);
        assert!(index.cut(long, id));
    }
    assert_eq!(slack(&index), 0, "queries would look at ten intervals where one can overlap");
    let longest = index.leaves.nodes[index.root as usize].longest;
    assert_eq!(
        longest, 4095,
        "queries would ask the interval before a gap whether it reaches into it"
    );
}

#[test]
fn what_reached_into_other_leaves_is_forgotten_when_it_goes() {
    let mut index = IntervalIndex::new();
    for at in 0..200 {
        index.put(AddressRange::new(at * 8192, 4096).unwrap(), Id(2 * at));
    }
    assert_eq!(index.height, 1, "several leaves");
    // Behind each of them, over nine others. Behind the last one of a leaf nothing in that leaf is
    // reached.
    for at in 0..190 {
        for id in [Id(1000), Id(1001)] {
            let long = AddressRange::new(at * 8192 + 4096, 9 * 8192).unwrap();
            index.put(long, id);
            assert!(index.cut(long, id));
            index.check();
            let root = &index.inners.nodes[index.root as usize];
            assert_eq!(root.slack, 0, "queries would look at two leaves where one is enough");
        }
    }
}

#[test]
fn leaves_that_become_small_are_merged() {
    let mut index = IntervalIndex::new();
    let page = |at: u64| AddressRange::new(at * 4096, 4096).unwrap();
    // All of them remember where they were put.
    for at in 0..3200 {
        index.put(page(at), Id(2 * at));
    }
    // What stays is the last of each leaf, which reaches furthest there.
    for at in (0..3200).filter(|at| at % 32 != 31) {
        assert!(index.cut(page(at), Id(2 * at)));
    }
    index.check();
    let leaves = index.leaves.nodes.len() - index.leaves.free.len();
    assert!(leaves <= 100 / LOW + 1, "{leaves} leaves for 100 intervals");
}

#[test]
fn merged_leaves_know_what_is_long_and_what_reached_from_one_into_the_other() {
    let page = |at: u64| AddressRange::new(at * 8192, 4096).unwrap();
    let long = AddressRange::new(64 * 8192, 1 << 20).unwrap();
    // Ascending insertion fills two leaves; the second ends with something long, and the first with
    // something that reaches into the second.
    let across = AddressRange::new(31 * 8192, 3 * 8192).unwrap();
    for across in [None, Some(across)] {
        let mut index = IntervalIndex::new();
        let at_31 = across.unwrap_or(page(31));
        for at in 0..63 {
            index.put(if at == 31 { at_31 } else { page(at) }, Id(2 * at));
        }
        index.put(long, Id(2 * 63));
        assert_eq!((index.height, index.leaves.nodes.len()), (1, 2));
        for at in (0..31).chain(40..63) {
            assert!(index.cut(page(at), Id(2 * at)));
            index.check();
        }
        assert_eq!(index.height, 0, "they were merged");
        assert_eq!(index.hits(AddressRange::new(long.last(), 1).unwrap()), [Id(2 * 63)]);
        let end = AddressRange::new(at_31.last(), 1).unwrap();
        assert_eq!(index.hits(end)[0], Id(2 * 31));
    }
}

/// A few thousand pages, put in an order that goes back and forth, so that leaves are split
/// everywhere.
fn scattered(stride: impl Fn(u64) -> u64) -> (IntervalIndex<Value>, Vec<AddressRange>) {
    let mut index = IntervalIndex::new();
    let pages: Vec<_> = (0..5000).map(|at| AddressRange::new(stride(at), 4096).unwrap()).collect();
    for id in 0..5000 {
        index.put(pages[id as usize * 1009 % 5000], Id(id));
    }
    index.check();
    (index, pages)
}

/// How many of the `pages` are in the leaf where a search is told to look first.
fn foreseen(index: &IntervalIndex<Value>, pages: &[AddressRange]) -> usize {
    let starts = |page: &AddressRange| {
        index.leaves.at(index.likely_leaf(page.last())).starts.contains(&page.start())
    };
    pages.iter().filter(|page| starts(page)).count()
}

#[test]
fn a_search_is_mostly_told_in_which_leaf_it_ends() {
    let (index, pages) = scattered(|at| at * 8192);
    // Known from the insertions already, but for leaves of which a quarter is told apart.
    let known = foreseen(&index, &pages);
    assert!(known > 4300, "{known} of 5000 after the insertions");
    // Each search that was told wrong says where it ended.
    for page in &pages {
        index.only_leaf(*page).unwrap();
        assert_eq!(foreseen(&index, &[*page]), 1, "{page:?} is looked for in vain twice");
    }
}

#[test]
fn a_search_is_told_where_to_look_beside_leaves_a_thousand_times_wider() {
    let (index, pages) = scattered(|at| if at < 2500 { at * 8192 } else { (at - 2400) << 23 });
    for at in 0..15_000 {
        index.only_leaf(pages[at * 1009 % 5000]).unwrap();
    }
    // The wide ones have more parts than there are places, and leave the narrow ones theirs.
    let known = foreseen(&index, &pages[..2500]);
    assert!(known > 2000, "{known} of 2500 in the narrow ones");
}

#[test]
fn a_search_is_told_where_to_look_in_regions_that_begin_at_multiples_of_great_powers_of_two() {
    let (index, pages) = scattered(|at| ((at % 16) << 40) + at / 16 * 8192);
    let known = foreseen(&index, &pages);
    assert!(known > 3000, "{known} of 5000 after the insertions");
}

#[test]
fn what_reaches_out_of_its_leaf_sends_searches_the_long_way_until_the_index_is_empty() {
    let (mut index, pages) = scattered(|at| at * 8192);
    assert_eq!(index.reach, 0);
    let long = AddressRange::new(4096 * 2 + 8192 * 100, 8192 * 1000).unwrap();
    index.put(long, Id(9999));
    assert!(index.reach > 8192 * 900);
    index.check();
    assert_eq!(index.hits(AddressRange::new(long.last(), 1).unwrap()), [Id(9999)]);
    assert!(index.cut(long, Id(9999)));
    for (id, at) in (0..5000).map(|id| (id, id as usize * 1009 % 5000)) {
        assert!(index.cut(pages[at], Id(id)));
    }
    assert_eq!((index.len(), index.reach), (0, 0));
    index.put(pages[7], Id(10_000));
    assert_eq!(index.hits(pages[7]), [Id(10_000)]);
}

#[test]
fn leaves_that_share_what_they_hold_note_what_reaches_from_one_into_the_other() {
    let mut index = IntervalIndex::new();
    let page = |at: u64| AddressRange::new(at * 8192, 4096).unwrap();
    // The twelfth interval of the second leaf reaches over the two behind it.
    let long = AddressRange::new(43 * 8192, 3 * 8192).unwrap();
    for at in 0..64 {
        index.put(if at == 43 { long } else { page(at) }, Id(2 * at));
    }
    assert_eq!((index.height, index.leaves.nodes.len(), index.reach), (1, 2, 0));
    // Seven of the first stay and get twelve of the second.
    for at in 0..25 {
        assert!(index.cut(page(at), Id(2 * at)));
    }
    assert_eq!((index.height, index.reach), (1, 2 * 8192));
    index.check();
    for at in [44, 45] {
        assert_eq!(index.hits(page(at)), [Id(86), Id(2 * at)]);
    }
}
