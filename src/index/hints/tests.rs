//! The hints: the leaf where a search looks first.

use crate::index::tests::{Id, PREFETCHED, Value};
use crate::index::{AddressRange, IntervalIndex};
use std::vec::Vec;

/// Inserts a few thousand pages in an order that goes back and forth, so that leaves are split
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

/// Returns how many of the `pages` are in the leaf where a search looks first.
fn foreseen(index: &IntervalIndex<Value>, pages: &[AddressRange]) -> usize {
    let starts = |page: &AddressRange| {
        index.leaves.at(index.likely_leaf(page.last())).starts.contains(&page.start())
    };
    pages.iter().filter(|page| starts(page)).count()
}

#[test]
fn a_search_is_mostly_told_in_which_leaf_it_ends() {
    let (index, pages) = scattered(|at| at * 8192);
    // The insertions have set most hints. A unit that spans two leaves has the hint of only one.
    let known = foreseen(&index, &pages);
    assert!(known > 4300, "{known} of 5000 after the insertions");
    // Each search with a wrong hint corrects it.
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
    // The wide leaves have more units than the table has slots. The narrow ones keep theirs.
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
fn two_leaves_are_told_apart_wherever_they_are() {
    // The smallest table. The units of these regions are scattered over all of it.
    for region in 0..64 {
        let mut index = IntervalIndex::new();
        let page = |at: u64| AddressRange::new((region * 64 + at) * 8192, 4096).unwrap();
        let pages: Vec<_> = (0..64).map(page).collect();
        for (id, page) in (0..).zip(&pages) {
            index.put(*page, Id(id));
        }
        assert_eq!(index.leaves.nodes.len(), 2);
        for page in &pages {
            index.only_leaf(*page).unwrap();
        }
        assert_eq!(foreseen(&index, &pages), 64, "in region {region}");
    }
}

#[test]
fn the_table_is_made_anew_when_there_are_half_as_many_leaves_more() {
    let mut index = IntervalIndex::new();
    let mut made_for = Vec::new();
    for id in 0..5000 {
        index.put(AddressRange::new(id * 8192, 4096).unwrap(), Id(id));
        if !made_for.contains(&index.hints.fits) {
            made_for.push(index.hints.fits);
        }
    }
    assert_eq!(made_for, [0, 2, 4, 7, 11, 17, 26, 40, 61, 92, 139]);
}

#[test]
fn a_search_of_a_large_index_prefetches_its_leaf_and_one_of_a_small_index_nothing() {
    let mut index = IntervalIndex::new();
    let page = |at: u64| AddressRange::new(at * 8192, 4096).unwrap();
    // Descending insertion leaves half of each node free, so the tree is soon high.
    let mut at = 20_000;
    while index.height < 3 {
        index.put(page(at), Id(2 * at + 1));
        index.expect(page(at).last());
        let _ = index.hits(page(at));
        at -= 1;
        assert_eq!(PREFETCHED.take().is_some(), index.height == 3);
    }
    let holds = |leaf: Option<usize>, page: AddressRange| {
        let at = |leaf| core::ptr::from_ref(leaf) as usize;
        let of = index.leaves.nodes.iter().find(|of| leaf == Some(at(*of))).expect("a leaf");
        of.starts.contains(&page.start())
    };
    for page in (at + 1..20_000).step_by(97).map(page) {
        index.overlapping(page, |_| ());
        assert!(holds(PREFETCHED.take(), page));
        index.only_leaf(page).unwrap();
        PREFETCHED.take();
        index.expect(page.last());
        assert!(holds(PREFETCHED.take(), page), "the search before has set the hint");
    }
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
fn a_leaf_is_not_believed_to_hold_what_begins_at_its_end() {
    let mut index = IntervalIndex::new();
    let page = |at: u64| AddressRange::new(at * 4096, 4096).unwrap();
    for at in 0..64 {
        index.put(page(at), Id(at));
    }
    assert_eq!((index.height, index.leaves.nodes.len()), (1, 2));
    let (end, lower) = (page(32).start(), index.likely_leaf(0));
    assert_eq!(index.leaves.at(lower).bound, end);
    for start in [end - 1, end] {
        // A unit of the addresses may belong to two leaves, so the hint may be of the other one.
        index.hints.set(end, lower);
        let hits = index.hits(AddressRange::try_from(start..=end).unwrap());
        assert_eq!(hits.last(), Some(&Id(32)));
    }
}
