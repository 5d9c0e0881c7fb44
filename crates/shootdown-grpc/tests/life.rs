//! The whole life of a mirror, over TLS.
#![allow(missing_docs)]

mod support;

use shootdown::{AddressRange, Event};
use shootdown_grpc::Limits;
use shootdown_lease::engine::Lost;
use shootdown_lease::{Host, Refusal};
use support::certificates::Authority;
use support::{BASE, Mirroring, Owned, SHARED, TERM, Way, page, soon, terms, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_joins_fetches_lets_go_and_leaves() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    owner.change(page(3), 7).await;
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    let held = soon("a copy", mirror.copy(page(3))).await;
    assert_eq!(held.read().await, Some(7));
    assert_eq!(owner.hub.members().iter().map(|member| member.0).collect::<Vec<_>>(), [Host(1)]);

    let guard = soon("an invalidation", owner.space.invalidate(page(3), Event::Clear)).await;
    assert_eq!(held.copy.lock().as_deref(), None, "it has let go before the memory changes");
    owner.memory.lock().unwrap()[0x3000] = 8;
    drop(guard);
    soon("a new copy", held.refill(&mirror.leased)).await;
    assert_eq!(held.read().await, Some(8));

    soon("leaving", mirror.leave()).await;
    until("the owner knows", || owner.hub.members().is_empty()).await;
    assert_eq!((owner.hub.counts().left, owner.hub.counts().expired), (1, 0));
    assert!(owner.change(page(3), 9).await < TERM / 2, "nobody is waited for");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contents_come_whole_however_long_they_are() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    for (number, byte) in owner.memory.lock().unwrap().iter_mut().enumerate() {
        *byte = (number / 251) as u8;
    }
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    let ranges = [(0, 1), (5, 64 * 1024), (1, 64 * 1024 + 1), (0, SHARED)];
    for (start, length) in ranges {
        let range = AddressRange::new(BASE + start, length).unwrap();
        let contents = soon("contents", mirror.leased.fetch(range)).await.unwrap();
        let expected =
            owner.memory.lock().unwrap()[start as usize..(start + length) as usize].to_vec();
        assert!(contents == expected, "{range}");
    }
    // Many at once.
    let fetches = (0..200).map(|number| mirror.leased.fetch(page(number)));
    let all = soon("all", futures::future::join_all(fetches)).await;
    for (number, contents) in all.into_iter().enumerate() {
        let start = number * 0x1000;
        assert!(
            contents.unwrap() == owner.memory.lock().unwrap()[start..start + 0x1000],
            "{number}"
        );
    }
    assert_eq!(mirror.connection.counts().malformed, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_shared_is_refused() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    let beside = AddressRange::new(BASE - 1, 2).unwrap();
    let refused = Err(Lost::Refused(Refusal::Contents));
    assert_eq!(soon("an answer", mirror.leased.fetch(beside)).await, refused);
    assert_eq!(soon("an answer", mirror.leased.fetch(AddressRange::ALL)).await, refused);
    // A range without a length in bytes never comes to be read.
    assert_eq!((owner.tally.counts().unreadable, owner.hub.counts().refused), (1, 1));
    assert_eq!(soon("an answer", mirror.leased.fetch(page(0))).await, Ok(vec![0; 0x1000]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_that_waits_for_an_invalidation_holds_nothing_up() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    let held = soon("a copy", mirror.copy(page(9))).await;
    let guard = soon("an invalidation", owner.space.invalidate(page(0), Event::Clear)).await;
    let leased = mirror.leased.clone();
    let waits = tokio::spawn(async move { leased.fetch(page(0)).await });
    until("the owner is about to read it", || owner.space.len() == 2).await;
    // One of another range is served meanwhile, and another invalidation ends.
    assert!(soon("another range", mirror.leased.fetch(page(1))).await.is_ok());
    soon("another invalidation", owner.change(page(9), 5)).await;
    assert_eq!(held.copy.lock().as_deref(), None);
    assert!(!waits.is_finished(), "the memory is being changed");
    owner.memory.lock().unwrap()[0] = 77;
    drop(guard);
    assert_eq!(soon("the first range", waits).await.unwrap().unwrap()[0], 77);
    assert_eq!(owner.hub.counts().expelled, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_of_too_many_bytes_is_refused_and_others_wait_for_room() {
    let authority = Authority::default();
    let mut limits = Limits::default();
    limits.fetch = 0x2000;
    let tls = authority.server("owner.example");
    let owner = Owned::with(Way::Tls(tls), limits, terms(), "127.0.0.1:0").await;
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    let most = AddressRange::new(BASE, 0x2000).unwrap();
    let fetches = futures::future::join_all((0..20).map(|_| mirror.leased.fetch(most)));
    for contents in soon("all", fetches).await {
        assert_eq!(contents.map(|contents| contents.len()), Ok(0x2000));
    }
    let more = AddressRange::new(BASE, 0x2001).unwrap();
    assert_eq!(
        soon("an answer", mirror.leased.fetch(more)).await,
        Err(Lost::Refused(Refusal::Contents))
    );
}
