use super::*;
use crate::foreign::Losses;
use proptest::prelude::*;

fn pages(first: u64, count: u64) -> AddressRange {
    AddressRange::new(first * 4096, count * 4096).unwrap()
}

fn task() -> Task<()> {
    Task::new(&Arc::new(Losses::new(None)), async {})
}

#[test]
fn k7_who_waits_polls_the_place_that_went_ahead_of_the_one_before_it() {
    let (turns, task) = (Turns::default(), task());
    let mut state = turns.0.lock();
    state.enter(2, pages(0, 2), task.downgrade());
    state.enter(3, pages(1, 2), task.downgrade());
    assert_eq!(state.root(3), 2);
    state.enter(1, pages(0, 1), task.downgrade());
    assert_eq!((state.root(2), state.root(3)), (1, 1));
    state.leave(1);
    assert_eq!((state.root(2), state.root(3)), (2, 2));
}

/// A place without anything that is noted about others.
#[derive(Clone, Copy)]
struct Plain {
    number: u64,
    range: AddressRange,
    begun: bool,
}

impl Plain {
    fn waits_for(self, other: Self) -> bool {
        let earlier = other.begun || other.number < self.number;
        self.number != other.number && !self.begun && earlier && self.range.overlaps(other.range)
    }
}

/// Compares all that is noted with what the places say.
fn check(state: &mut State, plain: &[Plain]) {
    for one in plain {
        let before = plain.iter().filter(|other| one.waits_for(**other)).count();
        assert_eq!(state.places[&one.number].before, before, "number {}", one.number);
        let root = state.root(one.number);
        let root = *plain.iter().find(|place| place.number == root).unwrap();
        assert!(!plain.iter().any(|other| root.waits_for(*other)), "the root waits");
        let mut waited_for = alloc::vec![*one];
        while let Some(place) = waited_for.pop().filter(|place| place.number != root.number) {
            waited_for.extend(plain.iter().filter(|other| place.waits_for(**other)));
            assert!(!waited_for.is_empty(), "it does not wait for its root");
        }
    }
}

proptest! {
    #[test]
    fn k7_places_wait_for_what_overlaps_them_and_came_before_or_has_begun(
        steps in proptest::collection::vec((0..5u8, any::<usize>(), 0..12u64, 1..5u64), 1..60),
    ) {
        let (turns, task) = (Turns::default(), task());
        let mut state = turns.0.lock();
        let (mut plain, mut former, mut last) = (Vec::<Plain>::new(), Vec::new(), 0);
        for (step, which, first, count) in steps {
            let range = pages(first, count);
            let at = which.checked_rem(plain.len());
            match (step, at) {
                (0 | 1, _) => {
                    let known = (step == 1).then(|| former.pop()).flatten();
                    let number = known.unwrap_or_else(|| {
                        last += 1;
                        last
                    });
                    state.enter(number, range, task.downgrade());
                    plain.push(Plain { number, range, begun: false });
                }
                (2, Some(at)) => {
                    let one = plain[at];
                    if !plain.iter().any(|other| one.waits_for(*other)) {
                        state.places.get_mut(&one.number).unwrap().begun = true;
                        plain[at].begun = true;
                    }
                }
                (3, Some(at)) if plain[at].begun => {
                    let own = plain[at].range;
                    let (start, last) = (own.start().min(range.start()), own.last().max(range.last()));
                    plain[at].range = AddressRange::try_from(start..=last).unwrap();
                    state.widen(plain[at].number, plain[at].range);
                }
                (_, Some(at)) => {
                    let left = plain.swap_remove(at);
                    former.push(left.number);
                    let free = |one: &&Plain| {
                        one.waits_for(left) && !plain.iter().any(|other| one.waits_for(*other))
                    };
                    let expected = plain.iter().filter(free).count();
                    prop_assert_eq!(state.leave(left.number).len(), expected);
                }
                _ => {}
            }
            check(&mut state, &plain);
        }
    }
}
