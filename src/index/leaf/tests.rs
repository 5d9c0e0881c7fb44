//! The bounds that the nodes of the index keep (slack, reach, greatest `last`, length), and
//! merging.

use crate::index::node::LOW;
use crate::index::tests::{Id, Value};
use crate::index::{AddressRange, IntervalIndex};

#[test]
fn a_leaf_says_where_it_ends_and_where_a_search_of_its_end_begins() {
    let mut index = IntervalIndex::new();
    for at in 0..40 {
        index.put(AddressRange::new(at * 8192, 4096).unwrap(), Id(at));
    }
    let [lower, upper] = &index.leaves.nodes[..] else { panic!("two leaves") };
    assert_eq!(lower.extent(), Some((0, 32 * 8192 - 1)));
    assert_eq!(upper.extent(), None, "no leaf follows");
    // Of the twenty before, none reaches that far.
    let both = AddressRange::new(20 * 8192, 20 * 8192).unwrap();
    assert_eq!(lower.first_candidate(both), 20);
}

#[test]
fn what_reached_far_is_forgotten_when_it_goes() {
    let mut index = IntervalIndex::new();
    for at in 0..20 {
        index.put(AddressRange::new(at * 8192, 4096).unwrap(), Id(at));
    }
    let slack = |index: &IntervalIndex<Value>| index.leaves.nodes[index.root as usize].slack;
    // Over nine others. One value stores its position, the other does not.
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
    // After each of them, over nine others. After the last one of a leaf it extends into other
    // leaves only.
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
    // All of these values store their position.
    for at in 0..3200 {
        index.put(page(at), Id(2 * at));
    }
    // The last one of each leaf stays, which has its greatest `last`.
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
    // Ascending insertion fills two leaves. The second ends with a long interval. The first ends
    // with one that extends into the second.
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

#[test]
fn leaves_that_share_what_they_hold_note_what_reaches_from_one_into_the_other() {
    let mut index = IntervalIndex::new();
    let page = |at: u64| AddressRange::new(at * 8192, 4096).unwrap();
    // The twelfth interval of the second leaf extends over the next two.
    let long = AddressRange::new(43 * 8192, 3 * 8192).unwrap();
    for at in 0..64 {
        index.put(if at == 43 { long } else { page(at) }, Id(2 * at));
    }
    assert_eq!((index.height, index.leaves.nodes.len(), index.reach), (1, 2, 0));
    // Seven intervals of the first leaf stay. Twelve of the second move to them.
    for at in 0..25 {
        assert!(index.cut(page(at), Id(2 * at)));
    }
    assert_eq!((index.height, index.reach), (1, 2 * 8192));
    index.check();
    for at in [44, 45] {
        assert_eq!(index.hits(page(at)), [Id(86), Id(2 * at)]);
    }
}
