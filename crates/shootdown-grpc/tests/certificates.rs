//! Who may take part: what TLS and names let in, and that nobody else notices who they do not.
#![allow(missing_docs)]

mod support;

use shootdown_grpc::{Limits, ServerCounts};
use shootdown_lease::Host;
use std::time::Duration;
use support::certificates::{Authority, Identity};
use support::{Changing, Mirroring, Owned, TERM, Way, client, page, soon, terms, until};

/// One peer that must not get in, beside a mirror that is.
async fn refused(who: Mirroring, owner: &Owned, count: impl Fn(ServerCounts) -> u64) {
    until("it is refused, and again", || count(owner.tally.counts()) > 1).await;
    assert_eq!(owner.hub.members().iter().map(|member| member.0).collect::<Vec<_>>(), [Host(1)]);
    assert_eq!((who.connection.counts().links, who.leased.counts().joined), (0, 0));
    assert!(!who.leased.has_lease());
    until("it knows why", || who.connection.last_error().is_some()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_no_right_certificate_is_refused_and_nobody_else_notices() {
    let (authority, other) = (Authority::default(), Authority::default());
    let owner = Owned::begin(&authority).await;
    let healthy = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    soon("a mirror", healthy.leased.joined()).await;
    let changing = Changing::begin(&owner.space);
    let handshakes = |counts: ServerCounts| counts.handshakes;

    let mirror = |identity: &Identity| Mirroring::begin(owner.address, identity);
    refused(mirror(&other.issue("mirror-2.example").trusting(&authority)), &owner, handshakes)
        .await;
    let before = owner.tally.counts().handshakes;
    refused(mirror(&authority.issue_expired("mirror-2.example")), &owner, |counts| {
        counts.handshakes - before
    })
    .await;
    let before = owner.tally.counts().handshakes;
    let nobody = client(owner.address).tls(authority.without_certificate());
    refused(Mirroring::with(nobody), &owner, |counts| counts.handshakes - before).await;
    let before = owner.tally.counts().handshakes;
    let plain = client(owner.address).insecure_plaintext("mirror-2.example");
    refused(Mirroring::with(plain), &owner, |counts| counts.handshakes - before).await;
    refused(mirror(&authority.issue_nameless()), &owner, |counts| counts.nameless).await;
    refused(mirror(&authority.issue("stranger.example")), &owner, |counts| counts.not_admitted)
        .await;
    // The same answer for a space that is not here, so that nobody learns which there are.
    let elsewhere = shootdown_grpc::Client::builder("elsewhere")
        .owner(owner.address.to_string())
        .server_name("owner.example");
    let before = owner.tally.counts().not_admitted;
    let elsewhere = Mirroring::with(elsewhere.tls(authority.issue("mirror-2.example").client()));
    refused(elsewhere, &owner, |counts| counts.not_admitted - before).await;

    let longest = changing.end().await;
    assert!(longest < TERM, "a healthy mirror's invalidations took up to {longest:?}");
    assert_eq!((healthy.leased.counts().joined, healthy.connection.counts().links), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_takes_no_owner_whose_certificate_is_not_right() {
    let (authority, other) = (Authority::default(), Authority::default());
    let owner = Owned::begin(&authority).await;
    let of_others =
        Mirroring::begin(owner.address, &authority.issue("mirror-1.example").trusting(&other));
    let of_another_name = client(owner.address).server_name("somebody.example");
    let of_another_name =
        Mirroring::with(of_another_name.tls(authority.issue("mirror-2.example").client()));
    for mirror in [of_others, of_another_name] {
        until("it has tried", || mirror.connection.counts().failed > 1).await;
        assert_eq!(mirror.connection.counts().links, 0);
        let why = mirror.connection.last_error().unwrap();
        assert!(why.contains("certificate"), "{why}");
    }
    assert_eq!(owner.tally.counts().streams, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_names_of_one_host_are_one_and_two_hosts_are_nobody() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let both = authority.issue_for(&["mirror-1.example", "mirror-2.example"]);
    refused_alone(Mirroring::begin(owner.address, &both), &owner).await;
    let more = authority.issue_for(&["other.example", "mirror-3.example"]);
    let mirror = Mirroring::begin(owner.address, &more);
    soon("a mirror", mirror.leased.joined()).await;
    assert_eq!(owner.hub.members()[0].0, Host(3));
}

async fn refused_alone(who: Mirroring, owner: &Owned) {
    until("it is refused", || owner.tally.counts().not_admitted > 0).await;
    assert!(owner.hub.members().is_empty() && !who.leased.has_lease());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_ends_when_its_certificate_does() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let mirror =
        Mirroring::begin(owner.address, &authority.issue_for_seconds("mirror-1.example", 3));
    soon("a mirror", mirror.leased.joined()).await;
    until("the certificate has expired", || owner.tally.counts().handshakes > 0).await;
    until("the mirror has stopped", || !mirror.leased.has_lease()).await;
    let links = mirror.connection.counts().links;
    until("it tries again, in vain", || mirror.connection.counts().failed > 3).await;
    assert_eq!(mirror.connection.counts().links, links);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_tls_it_works_when_both_say_so() {
    let owner = Owned::with(Way::Plaintext, Limits::default(), terms(), "127.0.0.1:0").await;
    let mirror = Mirroring::with(client(owner.address).insecure_plaintext("mirror-4.example"));
    let held = soon("a copy", mirror.copy(page(2))).await;
    assert_eq!((held.read().await, owner.hub.members()[0].0), (Some(0), Host(4)));
    // A mirror that wants TLS does not talk to such a server.
    let authority = Authority::default();
    let wants = Mirroring::begin(owner.address, &authority.issue("mirror-5.example"));
    until("it has tried", || wants.connection.counts().failed > 0).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(wants.connection.counts().links, 0);
}
