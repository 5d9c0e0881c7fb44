//! Each setting of a cache alone; counters of many threads; and what the public types say of
//! themselves.

use crate::device::{Act, Card, Refused};
use crate::support::formats::{debug, display, expect};
use crate::support::{PAGE, Task, now, pages};
use shootdown::cache::{
    Builder, CacheStats, Failure, GetError, Match, Merge, Operation, Overlap, RegistrationCache,
    StillRegistered, Unwatched,
};
use shootdown::{AddressRange, AddressSpace, Event};
use std::error::Error;
use std::sync::{Arc, Barrier};
use std::thread;

fn cache(set: impl FnOnce(Builder<Card>) -> Builder<Card>) -> (Card, RegistrationCache<Card>) {
    let card = Card::default();
    (card.clone(), set(RegistrationCache::builder()).build(&AddressSpace::new(), card))
}

/// Registers single pages one after the other, and keeps none in use. Returns what is left.
fn left_of(numbers: &[u64], set: impl FnOnce(Builder<Card>) -> Builder<Card>) -> Vec<u64> {
    let (card, cache) = cache(set);
    for number in numbers {
        drop(now(cache.get(pages(*number, 1))).unwrap());
    }
    card.mapped()
}

#[test]
fn k3_each_limit_alone_has_its_effect() {
    assert_eq!(left_of(&[1, 3, 5, 7], |all| all), [1, 3, 5, 7], "no limit by default");
    assert_eq!(left_of(&[1, 3, 5, 7], |all| all.max_registrations(2)), [5, 7]);
    assert_eq!(left_of(&[1, 3, 5, 7], |all| all.max_bytes(3 * PAGE)), [3, 5, 7]);
    assert_eq!(left_of(&[1, 3, 5, 7], |all| all.max_bytes(3 * PAGE - 1)), [5, 7]);
    let both = |all: Builder<Card>| all.max_bytes(3 * PAGE).max_registrations(1);
    assert_eq!(left_of(&[1, 3, 5, 7], both), [7]);
}

#[test]
fn each_setting_of_what_is_registered_alone_has_its_effect() {
    let byte = |at: u64| AddressRange::new(at, 1).unwrap();
    let of = |set: fn(Builder<Card>) -> Builder<Card>, range: AddressRange| {
        now(cache(set).1.get(range)).unwrap().range()
    };
    assert_eq!(of(|all| all, byte(0x1_2345)), pages(0x12, 1), "a page of 4,096 bytes by default");
    let large = AddressRange::new(0x1_0000, 0x1_0000).unwrap();
    assert_eq!(of(|all| all.page(0x1_0000), byte(0x1_2345)), large);
    assert_eq!(of(|all| all.matching(Match::Exact), byte(0x1_2345)), byte(0x1_2345));
    let exact = |all: Builder<Card>| all.matching(Match::Exact).page(0x1_0000);
    assert_eq!(of(exact, byte(0x1_2345)), large);

    let (_, largest) = cache(|all| all.max_registration(2 * PAGE + 1));
    drop(now(largest.get(pages(1, 2))).unwrap());
    let refused = now(largest.get(pages(1, 3))).unwrap_err();
    assert!(matches!(refused, GetError::TooLarge { max } if max == 2 * PAGE), "{refused:?}");

    let (card, merging) = cache(|all| all.merge(Merge::Touching));
    drop(now(merging.get(pages(1, 1))).unwrap());
    assert_eq!(now(merging.get(pages(2, 1))).unwrap().range(), pages(1, 2));
    drop(now(merging.get(pages(9, 1))).unwrap());
    assert_eq!(card.mapped(), [1, 9]);

    let (card, waiting) = cache(|all| all.overlap(Overlap::Wait));
    card.state.lock().unwrap().exclusive = true;
    drop(now(waiting.get(pages(1, 2))).unwrap());
    assert_eq!(now(waiting.get(pages(2, 2))).unwrap().range(), pages(2, 2));
    assert_eq!(card.mapped(), [2]);
}

/// A thread has a counter of its own, as long as there are some; then all share one.
#[test]
fn k4_the_hits_of_more_threads_than_there_are_counters_are_all_counted() {
    const THREADS: u64 = 64;
    const HITS: u64 = 5_000;
    let (_, cache) = cache(|all| all);
    drop(now(cache.get(pages(1, 1))).unwrap());
    let together = Barrier::new(THREADS as usize);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                together.wait();
                for _ in 0..HITS {
                    drop(now(cache.get(pages(1, 1))).unwrap());
                }
            });
        }
    });
    assert_eq!((cache.stats().hits, cache.stats().misses), (THREADS * HITS, 1));
}

/// A limit does not wait for a device that refuses: it is tried three times, and later again.
#[test]
fn k2_a_deregistration_is_tried_three_times_at_once() {
    let (card, cache) = cache(|all| all.max_registrations(1));
    drop(now(cache.get(pages(1, 1))).unwrap());
    card.next_deregister(&[Act::Refuse; 100]);
    drop(now(cache.get(pages(3, 1))).unwrap());
    assert_eq!((card.mapped(), cache.stats().deregister_failures), (vec![1, 3], 3));
}

/// More of one start than a leaf of an index holds: each is found, and each is given up.
#[test]
fn k4_hundreds_of_registrations_of_one_start_are_all_found_and_all_given_up() {
    const MANY: u64 = 200;
    for overlap in [Overlap::Allowed, Overlap::Merge] {
        let space = AddressSpace::new();
        let card = Card::default();
        let cache = RegistrationCache::builder().overlap(overlap).build(&space, card.clone());
        let mut held = Vec::new();
        for size in 1..=MANY {
            let registration = now(cache.get(pages(1, size))).unwrap();
            if overlap == Overlap::Allowed {
                held.push(registration);
            }
        }
        if overlap == Overlap::Allowed {
            assert_eq!(cache.stats().registrations, MANY);
            for size in 1..=MANY {
                let found = now(cache.get(pages(1, size))).unwrap();
                assert!(found.range().covers(pages(1, size)));
            }
            assert_eq!(cache.stats().misses, MANY);
        }
        held.clear();
        // 7 and 200 have no common factor: the ends come in no order.
        for at in 0..MANY {
            drop(now(space.invalidate(pages(1 + at * 7 % MANY, 1), Event::Unmap)));
        }
        assert_eq!((card.mapped().len(), cache.stats().registrations, space.len()), (0, 0, 0));
    }
}

#[test]
fn debug_names_the_type_and_what_it_is_of() {
    let builder = RegistrationCache::<Card>::builder().max_bytes(5).max_registrations(6);
    debug(&builder.max_registration(7), &["Builder", "max_bytes: 5", "6", "7", "Never", "Allowed"]);
    let (_, cache) = cache(|all| all);
    let registration = now(cache.get(pages(1, 1))).unwrap();
    debug(&cache, &["RegistrationCache", "hits: 0", "misses: 1", "registrations: 1"]);
    debug(&registration, &["Registration", "0x1000..=0x1fff"]);
    debug(&CacheStats::default(), &["CacheStats", "hits: 0", "pinned_bytes: 0"]);
    debug(&Merge::Touching, &["Touching"]);
    debug(&Match::Exact, &["Exact"]);
    debug(&Overlap::Wait, &["Wait"]);
    debug(&Operation::Register, &["Register"]);
    debug(&Unwatched::Released, &["Released"]);
    debug(&StillRegistered { handle: 5, error: Refused }, &["StillRegistered", "5", "Refused"]);
    debug(&GetError::<Refused>::TooLarge { max: 9 }, &["TooLarge", "9"]);
    let told = Arc::new(std::sync::Mutex::new(String::new()));
    let noted = told.clone();
    let note = move |failure: &Failure<'_>| *noted.lock().unwrap() = format!("{failure:?}");
    let (card, cache) = self::cache(|all| all.on_failure(note));
    card.next_register(&[Act::Refuse]);
    assert!(now(cache.get(pages(1, 1))).is_err());
    expect(&told.lock().unwrap(), &["Failure", "0x1000..=0x1fff", "Register", "Refused", "false"]);
}

#[test]
fn display_says_what_happened_and_what_to_do() {
    display(&GetError::Register(Arc::new(Refused)), &["refused to register", ": refused"]);
    let message = Some("the link is down".into());
    let panicked = GetError::<Refused>::Panicked { message };
    display(&panicked, &["not registered", "panicked", "the link is down"]);
    display(&GetError::<Refused>::Panicked { message: None }, &["the device panicked"]);
    display(&GetError::<Refused>::Invalidated { tries: 8 }, &["invalidated", "8"]);
    let unwatched = GetError::<Refused>::Unwatched(Unwatched::Released);
    display(&unwatched, &["not registered", "released"]);
    display(&GetError::<Refused>::TooLarge { max: 8192 }, &["8192 bytes", "get_all"]);
    display(&GetError::<Refused>::Lost { range: pages(1, 1) }, &["panicked", "0x1000..=0x1fff"]);
    display(&Unwatched::Released, &["the space was released"]);
    display(&Unwatched::Forked, &["forked", "make another one"]);
    #[cfg(all(feature = "userfaultfd", target_os = "linux"))]
    {
        let closed = shootdown::source::UffdError::Closed;
        display(&Unwatched::Source(closed.clone()), &[&closed.to_string()]);
    }
}

#[test]
fn source_is_the_error_of_the_device_and_nothing_else() {
    let source = |error: &dyn Error| error.source().map(ToString::to_string);
    let refused = GetError::Register(Arc::new(Refused));
    assert_eq!(source(&refused), Some("refused".to_owned()));
    let none: [&dyn Error; 7] = [
        &GetError::<Refused>::Panicked { message: None },
        &GetError::<Refused>::Invalidated { tries: 8 },
        &GetError::<Refused>::Unwatched(Unwatched::Released),
        &GetError::<Refused>::TooLarge { max: 1 },
        &GetError::<Refused>::Lost { range: pages(1, 1) },
        &Unwatched::Released,
        &Unwatched::Forked,
    ];
    for error in none {
        assert_eq!(source(error), None, "{error}");
    }
    // What `on_failure` is told of a panic.
    let told = Arc::new(std::sync::Mutex::new(None));
    let noted = told.clone();
    let note = move |failure: &Failure<'_>| {
        let error = failure.error;
        *noted.lock().unwrap() = Some((error.to_string(), error.source().is_none()));
    };
    let (card, cache) = cache(|all| all.on_failure(note));
    card.next_register(&[Act::Panic]);
    assert!(now(cache.get(pages(1, 1))).is_err());
    let told = told.lock().unwrap().take();
    assert_eq!(told, Some(("the device panicked: the card fails at once".into(), true)));
}

/// A flush polls what others have given up once each time that it is polled.
#[test]
fn k2_a_deregistration_is_tried_again_less_and_less_often_and_at_least_every_64_yields() {
    let (card, cache) = cache(|all| all);
    drop(now(cache.get(pages(1, 1))).unwrap());
    card.next_deregister(&[Act::Refuse; 100]);
    Task::new(cache.flush()).poll_again();
    let mut flush = Task::new(cache.flush());
    let tries = || card.state.lock().unwrap().calls_of_deregister;
    let mut polled_for = |tries_more: u64| {
        let (before, mut polls) = (tries(), 0_u32);
        while tries() < before + tries_more {
            assert!(flush.poll().is_pending());
            polls += 1;
        }
        polls
    };
    let before = tries();
    polled_for(3 - before);
    // The device itself yields once.
    let yields: Vec<_> = (0..9).map(|_| polled_for(1) - 1).collect();
    assert_eq!(yields, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
}
