//! Links that break, stand still or are not read: none of that ends an epoch, and nobody else
//! waits.
#![allow(missing_docs)]

mod support;

use shootdown::Event;
use shootdown_lease::{Ending, Host};
use std::sync::atomic::Ordering;
use std::time::Instant;
use support::certificates::Authority;
use support::raw::Raw;
use support::raw::proto::Renew;
use support::raw::proto::from_mirror::Message;
use support::relay::{Mode, Relay};
use support::{Mirroring, Owned, TERM, client, page, soon, terms, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_breaks_and_comes_back_ends_no_epoch() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let relay = Relay::begin(owner.address).await;
    // If each break made the next wait longer, the lease would be lost after a few.
    let identity = authority.issue("mirror-1.example");
    let client = client(relay.address).tls(identity.client()).backoff(TERM / 40, TERM * 4);
    let mirror = Mirroring::with(client);
    let held = soon("a copy", mirror.copy(page(1))).await;
    let epoch = owner.hub.members()[0].1;
    for round in 0..8_u8 {
        tokio::time::sleep(TERM / 8).await;
        let links = mirror.connection.counts().links;
        relay.set(Mode::Cut);
        until("the link is down", || !mirror.connection.is_up()).await;
        assert!(mirror.leased.has_lease(), "it holds on meanwhile");
        // What begins now waits for the mirror: a broken link is no answer.
        let space = owner.space.clone();
        let change =
            tokio::spawn(async move { drop(space.invalidate(page(1), Event::Clear).await) });
        tokio::time::sleep(TERM / 20).await;
        assert!(!change.is_finished() && held.copy.lock().is_some(), "round {round}");
        relay.set(Mode::Forward);
        soon("the change", change).await.unwrap();
        assert_eq!(held.copy.lock().as_deref(), None);
        assert!(mirror.connection.counts().links > links);
        soon("a new copy", held.refill(&mirror.leased)).await;
        assert_eq!(owner.hub.members()[0].1, epoch, "round {round}");
    }
    assert_eq!((mirror.leased.counts().joined, mirror.leased.counts().lost), (1, 0));
    assert_eq!((owner.hub.counts().joins, owner.hub.counts().expired), (1, 0));
    assert_eq!(owner.hub.endings(Ending::Acknowledged), 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_is_cut_off_stops_before_the_owner_goes_on() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let relay = Relay::begin(owner.address).await;
    let far = Mirroring::begin(relay.address, &authority.issue("mirror-1.example"));
    let near = Mirroring::begin(owner.address, &authority.issue("mirror-2.example"));
    let held = soon("a copy", far.copy(page(1))).await;
    let near_held = soon("a copy", near.copy(page(1))).await;
    for mode in [Mode::Hold, Mode::HoldDown, Mode::Cut] {
        let epoch = owner.hub.members().iter().find(|member| member.0 == Host(1)).unwrap().1;
        relay.set(mode);
        let began = Instant::now();
        let (space, leased) = (owner.space.clone(), far.leased.clone());
        let change = tokio::spawn(async move {
            let guard = space.invalidate(page(1), Event::Clear).await;
            let held_on = leased.has_lease();
            drop(guard);
            (held_on, Instant::now())
        });
        until("the near one lets go at once", || near_held.copy.lock().is_none()).await;
        assert!(began.elapsed() < TERM / 2);
        assert!(!change.is_finished(), "{mode:?}: the far one is waited for");
        let (held_on, ended) = soon("the change", change).await.unwrap();
        assert!(!held_on, "{mode:?}: it has stopped before the owner goes on");
        let took = ended - began;
        assert!(took < terms().patience + terms().owner_term() * 2, "{mode:?}: {took:?}");
        // It may have asked to join anew, and not have heard the answer.
        assert!(!owner.hub.members().iter().any(|member| member.1 == epoch), "{mode:?}");
        relay.set(Mode::Forward);
        soon("it joins anew", held.refill(&far.leased)).await;
        soon("a new copy", near_held.refill(&near.leased)).await;
    }
    assert_eq!((far.leased.counts().lost, near.leased.counts().lost), (3, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_does_not_read_holds_nobody_else_up() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let healthy = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    let held = soon("a copy", healthy.copy(page(1))).await;
    // It joins, asks for more time for ever, and reads nothing.
    let (raw, epoch) = Raw::join(owner.address, &authority.issue("mirror-2.example"), 7).await;
    let (sender, renew) = (raw.sender.clone(), Renew { epoch: Some(epoch), nonce: 2 });
    let renews = tokio::spawn(async move {
        let message = support::raw::proto::FromMirror { message: Some(Message::Renew(renew)) };
        while sender.send(message.clone()).await.is_ok() {
            tokio::time::sleep(TERM / 10).await;
        }
    });
    let began = Instant::now();
    let mut changes = Vec::new();
    for _ in 0..300 {
        let space = owner.space.clone();
        changes
            .push(tokio::spawn(async move { drop(space.invalidate(page(1), Event::Clear).await) }));
    }
    until("the healthy one has let go", || held.copy.lock().is_none()).await;
    assert!(began.elapsed() < TERM / 2, "{:?}", began.elapsed());
    for change in changes {
        soon("a change", change).await.unwrap();
    }
    let bound = terms().patience + terms().owner_term() + TERM;
    assert!(began.elapsed() < bound, "{:?}", began.elapsed());
    assert_eq!(owner.hub.counts().expelled, 1);
    let took = owner.change(page(1), 3).await;
    assert!(took < TERM / 2, "and nobody waits for it any more: {took:?}");
    assert_eq!((healthy.leased.counts().lost, healthy.connection.counts().links), (0, 1));
    renews.abort();
    drop(raw);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_leaves_while_its_link_is_down_says_so_later() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let relay = Relay::begin(owner.address).await;
    let mut mirror = Mirroring::begin(relay.address, &authority.issue("mirror-1.example"));
    soon("a mirror", mirror.leased.joined()).await;
    relay.set(Mode::Cut);
    until("the link is down", || !mirror.connection.is_up()).await;
    soon("leaving", mirror.leased.leave()).await;
    relay.set(Mode::Forward);
    soon("the owner is told", mirror.connection.ended()).await;
    until("the owner knows", || owner.hub.members().is_empty()).await;
    assert_eq!((owner.hub.counts().left, owner.hub.counts().expired), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_owns_the_memory_no_more_grants_nothing() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    soon("a mirror", mirror.leased.joined()).await;
    owner.held.store(false, Ordering::Relaxed);
    until("the lease has ended", || !mirror.leased.has_lease()).await;
    let (renewals, streams) = (owner.hub.counts().renewals, owner.tally.counts().streams);
    until("it tries again", || mirror.connection.counts().failed > 3).await;
    assert_eq!((owner.hub.counts().renewals, owner.hub.counts().joins), (renewals, 1));
    assert_eq!(owner.tally.counts().streams, streams, "a stream was opened");
    assert!(owner.tally.counts().not_owner > 3);
    let why = mirror.connection.last_error().unwrap();
    assert!(why.contains("owns the space no more"), "{why}");
    owner.held.store(true, Ordering::Relaxed);
    soon("it joins anew", mirror.leased.joined()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_cuts_its_links_and_a_new_one_goes_on_in_the_same_epochs() {
    let authority = Authority::default();
    let mut owner = Owned::begin(&authority).await;
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    let held = soon("a copy", mirror.copy(page(1))).await;
    let epoch = owner.hub.members()[0].1;
    owner.close().await;
    until("the link is cut", || !mirror.connection.is_up()).await;
    assert!(mirror.leased.has_lease() && held.copy.lock().is_some(), "it holds on meanwhile");
    assert!(tokio::net::TcpStream::connect(owner.address).await.is_err(), "nobody listens");
    owner.open().await;
    until("the link is up", || mirror.connection.is_up()).await;
    soon("a change", owner.change(page(1), 5)).await;
    assert_eq!((held.copy.lock().as_deref(), owner.hub.members()[0].1), (None, epoch));
    assert_eq!(owner.hub.endings(Ending::Acknowledged), 1);
}
