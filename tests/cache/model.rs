//! K1, K6 to K9 on random programs: callers that ask, are polled, give up and let go;
//! invalidations; a device that fails, panics, takes its time and does not vouch for what it has.
//!
//! The model is what the device has: from the moment it is asked to register until it has let go.

use crate::device::{Refused, throw};
use crate::support::{PAGE, Task, Yields, now, pages};
use proptest::prelude::*;
use shootdown::cache::{
    Builder, Device, GetError, Match, Overlap, Registration, RegistrationCache, StillRegistered,
};
use shootdown::{AddressRange, AddressSpace, Event};
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    Yes,
    Later,
    No,
    Panic,
}

#[derive(Default)]
struct Has {
    /// By key: from when it is asked to register until it has let go.
    inside: BTreeMap<u64, AddressRange>,
    next: u64,
    register: VecDeque<Answer>,
    deregister: VecDeque<Answer>,
    /// Handles that a panic has taken.
    lost: Vec<u64>,
    /// No two may overlap.
    exclusive: bool,
    most: u64,
}

#[derive(Clone, Default)]
struct Model(Arc<Mutex<Has>>);

impl Model {
    fn enter(&self, range: AddressRange) -> (u64, Answer) {
        let mut has = self.0.lock().unwrap();
        if has.exclusive {
            let other = has.inside.values().find(|inside| inside.overlaps(range));
            assert!(other.is_none(), "{range} beside {other:?}");
        }
        assert!(range.len().unwrap() <= has.most, "{range} is too large");
        has.next += 1;
        let key = has.next;
        has.inside.insert(key, range);
        (key, has.register.pop_front().unwrap_or(Answer::Yes))
    }

    fn leave(&self, key: u64) {
        self.0.lock().unwrap().inside.remove(&key).expect("it was registered");
    }
}

/// Is dropped with a future that is not finished: then nothing is mapped.
struct Entering(Model, Option<u64>);

impl Drop for Entering {
    fn drop(&mut self) {
        if let Some(key) = self.1 {
            self.0.leave(key);
        }
    }
}

impl Device for Model {
    type Handle = u64;
    type Error = Refused;

    fn register(&self, range: AddressRange) -> impl Future<Output = Result<u64, Refused>> + Send {
        let (key, answer) = self.enter(range);
        let entering = Entering(self.clone(), Some(key));
        async move {
            // As a whole: it is dropped with this future.
            let mut entering = entering;
            match answer {
                Answer::Yes => {}
                Answer::Later => Yields(3).await,
                Answer::No => return Err(Refused),
                Answer::Panic => throw("the model panics"),
            }
            entering.1 = None;
            Ok(key)
        }
    }

    async fn deregister(
        &self,
        range: AddressRange,
        key: u64,
    ) -> Result<(), StillRegistered<u64, Refused>> {
        let answer = self.0.lock().unwrap().deregister.pop_front().unwrap_or(Answer::Yes);
        match answer {
            Answer::Yes => {}
            Answer::Later => Yields(2).await,
            Answer::No => return Err(StillRegistered { handle: key, error: Refused }),
            // What is known by the range alone is the device's to find: here it is kept in mind.
            Answer::Panic => {
                self.0.lock().unwrap().inside.get(&key).expect("it was registered");
                self.0.lock().unwrap().lost.push(key);
                throw("the model panics")
            }
        }
        assert_eq!(self.0.lock().unwrap().inside.get(&key), Some(&range));
        self.leave(key);
        Ok(())
    }

    async fn deregister_lost(&self, range: AddressRange) -> Result<bool, Refused> {
        let mut has = self.0.lock().unwrap();
        // One whose handle a panic has taken.
        let lost = has
            .lost
            .iter()
            .position(|key| has.inside.get(key) == Some(&range))
            .expect("one was lost");
        let key = has.lost.swap_remove(lost);
        has.inside.remove(&key);
        Ok(true)
    }

    fn still_valid(&self, _: AddressRange, key: &u64) -> bool {
        // Every fifth is out of date once it is looked for again.
        !key.is_multiple_of(5)
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Pages, and whether in pieces.
    Ask(u64, u64, bool),
    Poll(usize),
    GiveUp(usize),
    LetGo(usize),
    Invalidate(u64, u64),
    FlushRange(u64, u64),
    Register(Answer),
    Deregister(Answer),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let answer = || prop_oneof![Just(Answer::Later), Just(Answer::No), Just(Answer::Panic)];
    let range = || (0..12_u64, 1..6_u64);
    let step = prop_oneof![
        4 => (range(), any::<bool>()).prop_map(|((first, count), all)| Step::Ask(first, count, all)),
        4 => any::<usize>().prop_map(Step::Poll),
        1 => any::<usize>().prop_map(Step::GiveUp),
        3 => any::<usize>().prop_map(Step::LetGo),
        1 => range().prop_map(|(first, count)| Step::Invalidate(first, count)),
        1 => range().prop_map(|(first, count)| Step::FlushRange(first, count)),
        1 => answer().prop_map(Step::Register),
        1 => answer().prop_map(Step::Deregister),
    ];
    prop::collection::vec(step, 1..60)
}

type Got = Result<Vec<Registration<Model>>, GetError<Refused>>;
type Asked<'a> = (AddressRange, Task<Pin<Box<dyn Future<Output = Got> + 'a>>>);

/// What one was given covers what it asked for, in order, and the device has it.
fn check(model: &Model, exact: bool, range: AddressRange, got: &[Registration<Model>]) {
    let mut next = range.start();
    for one in got {
        assert!(one.range().contains(next), "{range}: {got:?}");
        assert_eq!(model.0.lock().unwrap().inside.get(one.handle()), Some(&one.range()));
        assert_eq!(one.offset_of(next), Some(next - one.range().start()));
        next = one.range().last() + 1;
    }
    assert!(next > range.last(), "{range}: {got:?}");
    if exact {
        let ends = (got[0].range().start(), next - 1);
        assert_eq!(ends, (range.start(), range.last()), "neither more nor less");
    }
}

fn run(
    build: impl FnOnce(Builder<Model>) -> Builder<Model>,
    exclusive: bool,
    exact: bool,
    most: u64,
    steps: &[Step],
) {
    let (space, model) = (AddressSpace::new(), Model::default());
    {
        let mut has = model.0.lock().unwrap();
        (has.exclusive, has.most) = (exclusive, most * PAGE);
    }
    let cache = build(RegistrationCache::builder()).build(&space, model.clone());
    let mut asked: Vec<Asked<'_>> = Vec::new();
    let (mut held, mut unmaps, mut flushes) = (Vec::new(), Vec::new(), Vec::new());
    let poll = |asked: &mut Vec<Asked<'_>>, held: &mut Vec<_>, at: usize| {
        let Poll::Ready(done) = asked[at].1.poll() else { return };
        let (range, _) = asked.remove(at);
        match done {
            Ok(got) => {
                check(&model, exact, range, &got);
                held.push(got);
            }
            Err(error) => {
                assert!(!matches!(error, GetError::Unwatched(_) | GetError::Lost { .. }), "{error}")
            }
        }
    };
    for step in steps {
        match step {
            Step::Ask(first, count, all) => {
                let (range, cache) = (pages(*first, *count), &cache);
                let future: Pin<Box<dyn Future<Output = Got>>> = if *all {
                    Box::pin(cache.get_all(range))
                } else {
                    Box::pin(async move { cache.get(range).await.map(|one| vec![one]) })
                };
                asked.push((range, Task::new(future)));
                let last = asked.len() - 1;
                poll(&mut asked, &mut held, last);
            }
            Step::Poll(at) if !asked.is_empty() => {
                let at = at % asked.len();
                poll(&mut asked, &mut held, at);
            }
            Step::GiveUp(at) if !asked.is_empty() => drop(asked.swap_remove(at % asked.len())),
            Step::LetGo(at) if !held.is_empty() => drop(held.swap_remove(at % held.len())),
            Step::Invalidate(first, count) => {
                let range = pages(*first, *count);
                let mut unmap = Task::new(space.invalidate(range, Event::Unmap));
                match unmap.poll() {
                    Poll::Ready(guard) => {
                        let inside = model
                            .0
                            .lock()
                            .unwrap()
                            .inside
                            .values()
                            .any(|inside| inside.overlaps(range));
                        assert!(!inside, "K1: the device has what is being unmapped");
                        drop(guard);
                    }
                    Poll::Pending => unmaps.push(unmap),
                }
            }
            Step::FlushRange(first, count) => {
                let mut flush = Task::new(cache.flush_range(pages(*first, *count)));
                if flush.poll().is_pending() {
                    flushes.push(flush);
                }
            }
            Step::Register(answer) => model.0.lock().unwrap().register.push_back(*answer),
            Step::Deregister(answer) => model.0.lock().unwrap().deregister.push_back(*answer),
            _ => {}
        }
    }
    // Once all have let go, all that was asked for ends: in whatever order it is polled.
    held.clear();
    let mut turns = 0;
    while !asked.is_empty() {
        turns += 1;
        assert!(turns < 5000, "{} wait for ever", asked.len());
        unmaps.retain_mut(|unmap: &mut Task<_>| unmap.poll().is_pending());
        let at = turns % asked.len();
        poll(&mut asked, &mut held, at);
        held.clear();
    }
    unmaps.iter_mut().for_each(|unmap| drop(unmap.run()));
    drop((unmaps, flushes, asked));
    now(cache.flush());
    assert_eq!((model.0.lock().unwrap().inside.len(), cache.stats().pinned_bytes), (0, 0));
    drop(cache);
    assert_eq!(space.len(), 0);
}

fn cases() -> ProptestConfig {
    let cases =
        std::env::var("SHOOTDOWN_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(256);
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn k7_no_two_registrations_in_the_device_ever_overlap(steps in steps(), merge in any::<bool>(), pieces in any::<bool>()) {
        let overlap = if merge { Overlap::Merge } else { Overlap::Wait };
        let most = if pieces { 2 } else { 1000 };
        run(|builder| builder.overlap(overlap).max_registration(most * PAGE), true, false, most, &steps);
    }

    #[test]
    fn k6_exact_callers_are_given_what_they_asked_for(steps in steps(), wait in any::<bool>(), limit in 1..20_usize) {
        let overlap = if wait { Overlap::Wait } else { Overlap::Allowed };
        let build = |builder: Builder<Model>| builder.matching(Match::Exact).overlap(overlap).max_registrations(limit);
        run(build, wait, true, 1000, &steps);
    }

    #[test]
    fn k8_pieces_are_no_larger_than_the_limit_and_cover_the_range(steps in steps(), most in 1..4_u64, limit in 1..20_usize) {
        run(|builder| builder.max_registration(most * PAGE).max_registrations(limit), false, false, most, &steps);
    }
}
