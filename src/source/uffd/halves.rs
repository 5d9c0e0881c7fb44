//! Dividing a range of which the kernel refuses a part.
#![forbid(unsafe_code)]

use crate::range::AddressRange;
use crate::source::sys::page_size;

/// Largest range, in bytes, that is tried page by page if necessary.
const PAGE_BY_PAGE: u64 = 1 << 20;

/// Calls `accept` with `range`, which returns whether all of it was accepted. A refused range is
/// halved: down to a page if it has at most [`PAGE_BY_PAGE`] bytes, otherwise down to about 64
/// pieces. Memory that is gone must not cost one call for each page. Does not allocate.
pub(super) fn in_halves(range: AddressRange, accept: &impl Fn(AddressRange) -> bool) {
    let least = range.len().map_or(u64::MAX, |len| {
        if len <= PAGE_BY_PAGE { page_size() as u64 } else { (len / 64).max(PAGE_BY_PAGE) }
    });
    halve(range, least, accept);
}

fn halve(range: AddressRange, least: u64, accept: &impl Fn(AddressRange) -> bool) {
    if accept(range) {
        return;
    }
    let Some(len) = range.len().filter(|len| *len > least) else { return };
    let half = (len / 2).next_multiple_of(page_size() as u64);
    let halves = [
        AddressRange::new(range.start(), half),
        AddressRange::new(range.start() + half, len - half),
    ];
    halves.into_iter().flatten().for_each(|part| halve(part, least, accept));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use alloc::vec::Vec;
    use core::cell::{Cell, RefCell};

    /// The parts of `range` that are accepted if everything that touches `refused` is refused, and
    /// the number of tries.
    fn tried(range: AddressRange, refused: AddressRange) -> (Vec<AddressRange>, u32) {
        let (accepted, tries) = (RefCell::new(Vec::new()), Cell::new(0));
        in_halves(range, &|part| {
            tries.set(tries.get() + 1);
            assert!(range.covers(part) && part.start().is_multiple_of(page_size() as u64));
            let accepts = !part.overlaps(refused);
            if accepts {
                accepted.borrow_mut().push(part);
            }
            accepts
        });
        (accepted.into_inner(), tries.get())
    }

    fn pages(start: u64, number: u64) -> AddressRange {
        let page = page_size() as u64;
        AddressRange::new(0x7000_0000_0000 + start * page, number * page).unwrap()
    }

    fn bytes(ranges: &[AddressRange]) -> u64 {
        ranges.iter().filter_map(|range| range.len()).sum()
    }

    #[test]
    fn a_range_that_is_accepted_is_tried_once() {
        assert_eq!(tried(pages(0, 7), pages(7, 1)), ([pages(0, 7)].to_vec(), 1));
    }

    #[test]
    fn of_a_small_range_all_pages_but_the_refused_are_accepted() {
        for number in [1, 2, 3, 7, 100, PAGE_BY_PAGE / page_size() as u64] {
            for refused in [0, number / 2, number - 1] {
                let (accepted, tries) = tried(pages(0, number), pages(refused, 1));
                let missing = pages(0, number).len().unwrap() - bytes(&accepted);
                assert_eq!(missing, page_size() as u64, "page {refused} of {number}");
                assert!(tries <= 2 * number.ilog2() + 3, "{tries} tries for {number} pages");
            }
        }
    }

    #[test]
    fn of_a_large_range_some_64_pieces_are_tried() {
        let number = (256 << 20) / page_size() as u64;
        let (accepted, tries) = tried(pages(0, number), pages(0, number));
        assert_eq!((accepted.len(), tries), (0, 2 * 64 - 1), "it is gone as a whole");
        let (accepted, _) = tried(pages(0, number), pages(number / 2, 1));
        assert_eq!(bytes(&accepted), (256 << 20) - (4 << 20), "all but the piece of the page");
    }

    #[test]
    fn pieces_of_a_range_that_is_barely_large_are_large() {
        let number = 4 * PAGE_BY_PAGE / page_size() as u64;
        assert_eq!(tried(pages(0, number), pages(0, number)).1, 2 * 4 - 1);
    }
}
