//! Hosts of a tree: a mirror above, an owner below.

use crate::support::*;
use futures::FutureExt;
use futures::executor::{LocalPool, block_on};
use futures::task::LocalSpawnExt;
use shootdown::{AddressSpace, Event};
use shootdown_lease::engine::Hub;
use shootdown_lease::{Boot, Host, Memory, MirrorSettings, Owner, Standing, Terms};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// The upper owner, an inner host, a leaf. The inner host's task that runs its lease gets no turn;
/// its hub does. Both leases are kept to the letter, and the leaf checks after each use.
#[test]
fn d1_a_leaf_of_a_tree_uses_nothing_that_the_upper_owner_has_changed() {
    let (mut pool, timer) = (LocalPool::new(), Timer::default());
    let spawner = pool.spawner();
    let upper_terms = Terms::new(Duration::from_secs(1));
    let upper = Hub::new(
        Owner::new(Boot(1), upper_terms, Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let space = AddressSpace::new();
    let _mirrors = space.insert(pages(0, 16), upper.mirrors()).unwrap();
    // The inner host gives those below as long as the guide says.
    let lower_terms = Terms::new(TERM);
    let mut settings = MirrorSettings::default();
    settings.time_to_stop = lower_terms.patience + lower_terms.owner_term();
    let inner = leased(&timer, 1, settings);
    let owner = Owner::new(Boot(1), lower_terms, Memory::New, timer.now()).unwrap();
    let lower = Hub::below(&inner, owner);
    let _below = inner.space().insert(pages(0, 16), lower.mirrors()).unwrap();
    let leaf = leased(&timer, 2, MirrorSettings::default());
    let copies = leaf.space().insert(pages(0, 4), Copies).unwrap();
    let starved = Rc::new(Cell::new(false));
    for hub in [upper.clone(), lower.clone()] {
        let sleep = timer.sleep();
        spawner.spawn_local(async move { hub.run(sleep).await }).unwrap();
    }
    let (runs, sleep) = (inner.clone(), timer.sleep());
    spawner.spawn_local(unless(starved.clone(), async move { runs.run(sleep).await })).unwrap();
    let (runs, sleep) = (leaf.clone(), timer.sleep());
    spawner.spawn_local(async move { runs.run(sleep).await }).unwrap();
    let (mut to_inner, mut to_leaf) = (upper.link(Host(1)), lower.link(Host(2)));
    let mut pass = |millis: u64| {
        for _ in 0..millis {
            carry(&upper, 1, &mut to_inner, &inner);
            carry(&lower, 2, &mut to_leaf, &leaf);
            timer.pass(&mut pool, 1);
        }
    };
    pass(5);
    assert!(matches!(leaf.standing(), Standing::Live(..)));
    let seen = block_on(copies.read_begin());
    starved.set(true);
    let mut invalidation = Box::pin(space.invalidate(pages(1, 1), Event::Unmap));
    let mut waited = 0;
    let changed = loop {
        if let Some(guard) = invalidation.as_mut().now_or_never() {
            break guard;
        }
        pass(1);
        waited += 1;
        assert!(waited < 2_000);
    };
    // The memory changes; the inner host has lost its lease, and knows: what it has is not valid.
    assert!(!inner.has_lease());
    drop(changed);
    assert!(copies.read_retry(seen), "after {waited} ms the leaf's copy is taken for good");
}

/// One pause of the inner host, shorter than the leaf's term, and one cut below it.
#[test]
fn d3_a_pause_of_an_inner_host_does_not_let_a_leaf_outlive_its_lease() {
    let timer = Timer::default();
    let (mut pool, sleeps) = (LocalPool::new(), timer.sleep());
    let lower_terms = Terms::new(TERM);
    let mut settings = MirrorSettings::default();
    settings.time_to_stop = lower_terms.patience + lower_terms.owner_term();
    let inner = leased(&timer, 1, settings);
    let owner = Owner::new(Boot(1), lower_terms, Memory::New, timer.now()).unwrap();
    let lower = Hub::below(&inner, owner);
    let _below = inner.space().insert(pages(0, 16), lower.mirrors()).unwrap();
    let leaf = leased(&timer, 2, MirrorSettings::default());
    let copies = leaf.space().insert(pages(0, 4), Copies).unwrap();
    let upper = Hub::new(
        Owner::new(Boot(1), Terms::new(Duration::from_secs(1)), Memory::New, timer.now()).unwrap(),
        timer.clock(),
    );
    let space = AddressSpace::new();
    let _mirrors = space.insert(pages(0, 16), upper.mirrors()).unwrap();
    let stopped = Rc::new(Cell::new(false));
    let runs = inner.clone();
    pool.spawner()
        .spawn_local(unless(stopped.clone(), async move { runs.run(sleeps).await }))
        .unwrap();
    let (runs, sleep) = (leaf.clone(), timer.sleep());
    pool.spawner().spawn_local(async move { runs.run(sleep).await }).unwrap();
    let (mut to_inner, mut to_leaf) = (upper.link(Host(1)), lower.link(Host(2)));
    for _ in 0..5 {
        carry(&upper, 1, &mut to_inner, &inner);
        carry(&lower, 2, &mut to_leaf, &leaf);
        timer.pass(&mut pool, 1);
    }
    let Standing::Live(_, stop) = inner.standing() else { panic!() };
    let mut invalidation = Box::pin(space.invalidate(pages(1, 1), Event::Unmap));
    assert!(invalidation.as_mut().now_or_never().is_none());
    // The way up is cut from now on; just before the inner host would stop it is stopped itself.
    while timer.now() + Duration::from_millis(2) < stop {
        carry(&lower, 2, &mut to_leaf, &leaf);
        timer.pass(&mut pool, 1);
    }
    assert!(matches!(inner.standing(), Standing::Live(..)));
    let seen = block_on(copies.read_begin());
    stopped.set(true);
    for _ in 0..75 {
        timer.pass(&mut pool, 1); // nothing is carried: the leaf's questions wait in a socket
    }
    // It goes on: messages first, or by another thread; then the way down is cut.
    carry(&lower, 2, &mut to_leaf, &leaf);
    stopped.set(false);
    let _changes = loop {
        upper.tick();
        if let Some(guard) = invalidation.as_mut().now_or_never() {
            break guard;
        }
        timer.pass(&mut pool, 1);
        assert!(timer.now() < ms(2_000));
    };
    assert!(
        copies.read_retry(seen),
        "the memory changes at {}, when the inner host's lease has ended",
        timer.now()
    );
}
