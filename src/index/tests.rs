//! The index against a plain list, step by step.

use super::node::{UNUSED, slack};
use super::*;
use proptest::prelude::*;
use std::vec::Vec;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Id(u64);

impl Indexed for Id {
    fn order(self) -> u64 {
        self.0
    }
}

impl IntervalIndex<Id> {
    /// Walks the whole tree and checks what every node says of what is below it.
    fn check(&self) {
        if self.len == 0 {
            return;
        }
        let mut all = Vec::new();
        self.check_node(self.root, self.height, &mut all);
        assert_eq!(all.len(), self.len);
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "keys out of order");
    }

    fn check_node(&self, node: Node, height: usize, all: &mut Vec<(u64, u64)>) -> u64 {
        if height == 0 {
            let leaf = self.leaves.at(node);
            assert!(leaf.len >= 1, "an empty leaf was left");
            assert_eq!(leaf.live.count_ones(), leaf.len);
            assert!(leaf.starts.is_sorted(), "a gap out of order");
            assert!(leaf.slack >= slack(&leaf.starts, leaf.rests.iter().map(|rest| rest.last)), "a leaf's slack is too small");
            for (at, rest) in leaf.rests.iter().enumerate() {
                assert_eq!(rest.value.is_some(), leaf.live & (1 << at) != 0);
                assert!(rest.value.is_some() || rest.last == 0, "a gap reaches somewhere");
                all.extend(rest.value.map(|id| (leaf.starts[at], id.0)));
            }
            assert_eq!(leaf.max_last, leaf.rests.iter().map(|rest| rest.last).max().unwrap());
            return leaf.max_last;
        }
        let inner = self.inners.at(node);
        assert!(inner.len >= 2, "an inner node with one child was left");
        assert!(
            inner.slack >= slack(&inner.starts[..inner.len], inner.max_lasts[..inner.len].iter().copied()),
            "an inner node's slack is too small"
        );
        assert!(inner.starts[inner.len..].iter().all(|start| *start == UNUSED));
        for at in 0..inner.len {
            let from = all.len();
            assert_eq!(inner.max_lasts[at], self.check_node(inner.children[at], height - 1, all));
            let (first, last) = (all[from], all[all.len() - 1]);
            assert!(at == 0 || (inner.starts[at], inner.orders[at]) <= first, "a key below its bound");
            assert!(at + 1 == inner.len || last < (inner.starts[at + 1], inner.orders[at + 1]), "a key above the next bound");
        }
        inner.max_last()
    }

    fn hits(&self, range: AddressRange) -> Vec<Id> {
        let mut hits = Vec::new();
        self.overlapping(range, |id| hits.push(id));
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
    Insert(u64, u64),
    Remove(prop::sample::Index),
    RemoveMany(u8),
    Query(u64, u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..400u64, 1..60u64).prop_map(|(start, len)| Op::Insert(start, len)),
        1 => (0..2u64, 1..60u64).prop_map(|(start, len)| Op::Insert(start, len)),
        3 => any::<prop::sample::Index>().prop_map(Op::Remove),
        1 => (0..40u8).prop_map(Op::RemoveMany),
        3 => (0..420u64, 1..80u64).prop_map(|(start, len)| Op::Query(start, len)),
    ]
}

/// `SHOOTDOWN_CASES` sets how many random sequences are tried.
fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("SHOOTDOWN_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default);
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(cases(256))]
    #[test]
    fn answers_as_a_plain_list_does(ops in prop::collection::vec(op(), 1..800)) {
        let (mut index, mut list) = (IntervalIndex::new(), List::default());
        for (order, op) in (0u64..).zip(ops) {
            match op {
                Op::Insert(start, len) => {
                    let range = AddressRange::new(start, len).unwrap();
                    index.insert(range, Id(order));
                    list.0.push((range, Id(order)));
                }
                Op::Remove(at) => {
                    if !list.0.is_empty() {
                        let (range, id) = list.0.swap_remove(at.index(list.0.len()));
                        prop_assert!(index.remove(range, id));
                        prop_assert!(!index.remove(range, id));
                    }
                }
                Op::RemoveMany(many) => {
                    for _ in 0..many {
                        let Some((range, id)) = list.0.pop() else { break };
                        prop_assert!(index.remove(range, id));
                    }
                }
                Op::Query(start, len) => {
                    let range = AddressRange::new(start, len).unwrap();
                    prop_assert_eq!(index.hits(range), list.hits(range));
                }
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
        index.insert(range(id), Id(id));
    }
    index.check();
    assert_eq!(index.hits(AddressRange::ALL), (0..5000).map(Id).collect::<Vec<_>>());
    for id in (0..5000).step_by(2) {
        assert!(index.remove(range(id), Id(id)));
        if id % 500 == 0 {
            index.check();
        }
    }
    assert_eq!(index.hits(AddressRange::ALL), (1..5000).step_by(2).map(Id).collect::<Vec<_>>());
}

#[test]
fn ascending_insertion_fills_its_leaves() {
    let mut index = IntervalIndex::new();
    for id in 0..100_000 {
        index.insert(AddressRange::new(id * 8192, 4096).unwrap(), Id(id));
    }
    index.check();
    let full = index.leaves.nodes.len() * CAP;
    assert!(full < 101_000, "{full} places for 100000 intervals");
    assert!(index.heap_bytes() > 0);
    for id in 0..100_000 {
        assert!(index.remove(AddressRange::new(id * 8192, 4096).unwrap(), Id(id)));
    }
    assert_eq!(index.len(), 0);
    assert!(index.hits(AddressRange::ALL).is_empty());
    index.insert(AddressRange::ALL, Id(7));
    assert_eq!(index.hits(AddressRange::ALL), [Id(7)]);
}
