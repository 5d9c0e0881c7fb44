//! Details of rules that no other test looks at: a change of one line in the library goes unnoticed
//! without them.

use crate::support::{Task, now, pages};
use crate::turns::exclusive;
use shootdown::cache::Overlap;

/// What a turn needs grows when an earlier one has registered something.
#[test]
fn k7_a_get_inside_what_an_earlier_turn_has_grown_to_comes_after_it() {
    let (_space, _card, cache) = exclusive(Overlap::Merge);
    let held = now(cache.get(pages(0, 2))).unwrap();
    let mut first = Task::new(cache.get(pages(1, 3)));
    first.expect_pending();
    let mut second = Task::new(cache.get(pages(3, 3)));
    second.expect_pending();
    drop(held);
    let first = first.finish().unwrap();
    assert_eq!(first.range(), pages(0, 4));
    // It takes away what the first has, for the union of both.
    second.expect_pending();
    let mut third = Task::new(cache.get(pages(0, 1)));
    third.expect_pending();
    drop(first);
    // Those behind do what the second has to do, although it is not polled.
    assert_eq!(third.finish().unwrap().range(), pages(0, 6));
    assert_eq!(second.finish().unwrap().range(), pages(0, 6));
}
