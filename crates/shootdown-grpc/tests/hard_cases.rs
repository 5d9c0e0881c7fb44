//! What peers, limits at their ends and links that stall do to an owner and to each other.
#![allow(missing_docs)]

mod support;

use bytes::Bytes;
use futures::future::BoxFuture;
use shootdown::{AddressRange, AddressSpace, Event, Subscription};
use shootdown_grpc::{BootClock, Client, Contents, Limits, Server, Space, Tally, Unreadable};
use shootdown_lease::engine::{Hub, Mirrors};
use shootdown_lease::{Boot, Host, Memory, Owner, Terms};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::certificates::Authority;
use support::raw::proto::from_mirror::Message;
use support::raw::proto::{Ack, Fetch, Join, Range, from_owner};
use support::raw::{self, Raw, open};
use support::relay::{Mode, Relay};
use support::{BASE, LONG, Mirroring, Owned, TERM, Way, client, page, shared, soon, terms, until};
use tokio::task::JoinHandle;

/// Contents of which it is known how many bytes are in memory, and how often they were read.
#[derive(Clone, Default)]
struct Tracked {
    live: Arc<AtomicUsize>,
    reads: Arc<AtomicUsize>,
}

struct Piece(Vec<u8>, Arc<AtomicUsize>);

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.1.fetch_sub(self.0.len(), Ordering::SeqCst);
    }
}

impl Contents for Tracked {
    fn read(&self, range: AddressRange) -> BoxFuture<'_, Result<Bytes, Unreadable>> {
        let bytes = range.len_usize().unwrap();
        self.live.fetch_add(bytes, Ordering::SeqCst);
        self.reads.fetch_add(1, Ordering::SeqCst);
        let piece = Piece(vec![0; bytes], self.live.clone());
        Box::pin(async move { Ok(Bytes::from_owner(piece)) })
    }
}

impl Tracked {
    fn live(&self) -> usize {
        self.live.load(Ordering::SeqCst)
    }

    fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }
}

/// An owner whose contents are tracked, for `mirror-1` and `mirror-2`.
struct Tracking {
    contents: Tracked,
    hub: Hub,
    tally: Tally,
    address: SocketAddr,
    server: JoinHandle<()>,
    keeps: JoinHandle<()>,
    _mirrors: Subscription<Mirrors>,
}

impl Tracking {
    async fn begin(authority: &Authority, limits: Limits) -> Self {
        let contents = Tracked::default();
        let owner =
            Owner::new(Boot(1), Terms::new(LONG * 2), Memory::New, BootClock.now()).unwrap();
        let hub = Hub::new(owner, BootClock);
        let _mirrors = AddressSpace::new().insert(shared(), hub.mirrors()).unwrap();
        let offered = Space::new(hub.clone(), contents.clone());
        let offered = offered.admit("mirror-1.example", Host(1)).admit("mirror-2.example", Host(2));
        let server = Server::builder()
            .tls(authority.server("owner.example"))
            .limits(limits)
            .space("memory", offered);
        let server = server.bind("127.0.0.1:0").await.unwrap();
        let (tally, address, keep) = (server.tally(), server.local_addr(), hub.clone());
        let keeps = tokio::spawn(async move { keep.run(tokio::time::sleep).await });
        let server = tokio::spawn(async move { match server.run().await {} });
        Self { contents, hub, tally, address, server, keeps, _mirrors }
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        self.server.abort();
        self.keeps.abort();
    }
}

fn fetch(epoch: support::raw::proto::Epoch, nonce: u64, bytes: u64) -> Message {
    Message::Fetch(Fetch {
        epoch: Some(epoch),
        nonce,
        range: Some(Range { start: BASE, last: BASE + bytes - 1 }),
    })
}

/// A member with windows that hold all there is, behind a relay that forwards nothing to it: what
/// the owner sends stays in its socket.
async fn stalled(owner: &Tracking, authority: &Authority, bytes: u64) -> (Raw, Relay) {
    let relay = Relay::begin(owner.address).await;
    let identity = authority.issue("mirror-1.example");
    let channel = raw::wide_channel(relay.address, Some(&identity)).await;
    let mut raw = Raw::begin(&channel, vec![open("memory")]).await.unwrap();
    raw.say(Message::Join(Join { incarnation: 7, nonce: 1 })).await;
    let Some(from_owner::Message::Welcome(welcome)) = raw.hear().await else {
        panic!("no welcome")
    };
    relay.set(Mode::HoldDown);
    for nonce in 2..6 {
        raw.say(fetch(welcome.epoch.unwrap(), nonce, bytes)).await;
    }
    until("some is read", || owner.contents.reads() > 0).await;
    (raw, relay)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_were_replaced_keep_no_contents() {
    let authority = Authority::default();
    let mut limits = Limits::default();
    limits.fetch = 4 << 20;
    let owner = Tracking::begin(&authority, limits).await;
    let channel = raw::channel(owner.address, Some(&authority.issue("mirror-1.example"))).await;
    let mut first = Raw::begin(&channel, vec![open("memory")]).await.unwrap();
    first.say(Message::Join(Join { incarnation: 7, nonce: 1 })).await;
    let Some(from_owner::Message::Welcome(welcome)) = first.hear().await else {
        panic!("no welcome")
    };
    let mut streams = vec![first];
    for number in 0..6 {
        let newest = streams.last().unwrap();
        newest.say(fetch(welcome.epoch.unwrap(), 10, 4 << 20)).await;
        newest.say(fetch(welcome.epoch.unwrap(), 11, 4 << 20)).await;
        // Nobody reads what is sent.
        until("it is read", || owner.contents.reads() == number * 2 + 2).await;
        streams.push(Raw::begin(&channel, vec![open("memory")]).await.unwrap());
    }
    assert_eq!(owner.tally.counts().replaced, 6);
    let most = 2 * (4 << 20);
    until("what older streams had read is gone", || owner.contents.live() <= most).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_dropped_cuts_whoever_does_not_read() {
    let authority = Authority::default();
    let mut limits = Limits::default();
    (limits.keep_alive, limits.keep_alive_timeout) = (Duration::from_secs(1), LONG * 10);
    let owner = Tracking::begin(&authority, limits).await;
    let (_raw, _relay) = stalled(&owner, &authority, 16 << 20).await;
    // Until the owner's own question whether the peer is there waits for the socket.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(owner.contents.live() > 0, "it is sent to nobody");
    owner.server.abort();
    until("nothing of it is left", || owner.contents.live() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_certificate_has_so_many_connections_that_are_not_read() {
    let authority = Authority::default();
    let mut limits = Limits::default();
    (limits.keep_alive, limits.keep_alive_timeout) = (Duration::from_secs(1), LONG * 10);
    limits.connections_of_a_name = 1;
    let owner = Tracking::begin(&authority, limits).await;
    let (_raw, _relay) = stalled(&owner, &authority, 16 << 20).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(owner.contents.live() > 0, "it is sent to nobody");
    let _newer =
        raw::wire(owner.address, Some(&authority.issue("mirror-1.example"))).await.unwrap();
    until("the oldest is counted", || owner.tally.counts().full == 1).await;
    until("and cut", || owner.contents.live() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_reads_nothing_for_long_is_cut() {
    let authority = Authority::default();
    let mut limits = Limits::default();
    (limits.keep_alive, limits.keep_alive_timeout) =
        (Duration::from_secs(1), Duration::from_millis(500));
    limits.connections = 1;
    let owner = Tracking::begin(&authority, limits).await;
    let (_raw, _relay) = stalled(&owner, &authority, 16 << 20).await;
    until("nothing of it is left", || owner.contents.live() == 0).await;
    let next = Mirroring::begin(owner.address, &authority.issue("mirror-2.example"));
    soon("its place is free", next.leased.joined()).await;
    assert_eq!(owner.hub.members().len(), 2, "that ends no lease");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_fetches_of_one_mirror_cost_as_much_as_they_are() {
    const BYTES: u64 = 0x1_0000;
    let authority = Authority::default();
    let mut limits = Limits::default();
    limits.fetch = BYTES;
    let owner = Tracking::begin(&authority, limits).await;
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    soon("a mirror", mirror.leased.joined()).await;
    let range = AddressRange::new(BASE, BYTES).unwrap();
    let time = async |fetches: usize| {
        let began = Instant::now();
        for contents in
            futures::future::join_all((0..fetches).map(|_| mirror.leased.fetch(range))).await
        {
            assert_eq!(contents.unwrap().len() as u64, BYTES);
        }
        began.elapsed() / u32::try_from(fetches).unwrap()
    };
    time(32).await;
    let (few, many) = (time(32).await, time(1_000).await);
    assert!(many < few * 5, "{few:?} each of 32, {many:?} each of 1,000");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_host_mirrors_several_spaces_at_once() {
    let authority = Authority::default();
    let mut builder = Server::builder().tls(authority.server("owner.example"));
    let mut mirrored = Vec::new();
    for number in 0..8 {
        let owner = Owner::new(Boot(1), terms(), Memory::New, BootClock.now()).unwrap();
        let hub = Hub::new(owner, BootClock);
        let offered =
            Space::new(hub.clone(), Tracked::default()).admit("mirror-1.example", Host(1));
        builder = builder.space(format!("space-{number}"), offered);
        mirrored.push(AddressSpace::new().insert(shared(), hub.mirrors()).unwrap());
    }
    let server = builder.bind("127.0.0.1:0").await.unwrap();
    let (tally, address) = (server.tally(), server.local_addr());
    let server = tokio::spawn(async move { match server.run().await {} });
    let identity = authority.issue("mirror-1.example");
    let mirror = |number| {
        let client = Client::builder(format!("space-{number}"))
            .owner(address.to_string())
            .server_name("owner.example");
        Mirroring::with(client.tls(identity.client()))
    };
    let mirrors: Vec<_> = (0..8).map(mirror).collect();
    for mirror in &mirrors {
        soon("a mirror", mirror.leased.joined()).await;
    }
    tokio::time::sleep(TERM).await;
    assert_eq!(tally.counts().full, 0, "{:?}", tally.counts());
    assert!(mirrors.iter().all(|mirror| mirror.connection.counts().links == 1));
    server.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ended_says_that_the_owner_was_told() {
    let authority = Authority::default();
    let way = Way::Tls(authority.server("owner.example"));
    let owner = Owned::with(way, Limits::default(), Terms::new(LONG * 2), "127.0.0.1:0").await;
    let relay = Relay::begin(owner.address).await;
    let mut mirror = Mirroring::begin(relay.address, &authority.issue("mirror-1.example"));
    soon("a mirror", mirror.leased.joined()).await;
    relay.set(Mode::Hold);
    soon("leaving", mirror.leased.leave()).await;
    let ended = tokio::time::timeout(Duration::from_secs(4), mirror.connection.ended()).await;
    assert!(
        ended.is_err(),
        "the owner cannot have been told, and counts {} members",
        owner.hub.members().len()
    );
    relay.set(Mode::Forward);
    soon("the owner is told", mirror.connection.ended()).await;
    assert_eq!((owner.hub.members().len(), owner.hub.counts().left), (0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_breaks_while_a_mirror_says_goodbye_is_made_again() {
    let authority = Authority::default();
    let way = Way::Tls(authority.server("owner.example"));
    let owner = Owned::with(way, Limits::default(), Terms::new(LONG * 2), "127.0.0.1:0").await;
    let relay = Relay::begin(owner.address).await;
    let mut mirror = Mirroring::begin(relay.address, &authority.issue("mirror-1.example"));
    soon("a mirror", mirror.leased.joined()).await;
    relay.set(Mode::Hold);
    soon("leaving", mirror.leased.leave()).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    relay.set(Mode::Cut);
    until("the link is down", || !mirror.connection.is_up()).await;
    relay.set(Mode::Forward);
    soon("the end", mirror.connection.ended()).await;
    assert_eq!((owner.hub.members().len(), owner.hub.counts().left), (0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_at_their_ends_let_mirrors_in() {
    let authority = Authority::default();
    let mut limits = Limits::default();
    (limits.connections, limits.handshakes, limits.connections_of_a_name) =
        (usize::MAX, usize::MAX, usize::MAX);
    (limits.handshake, limits.open, limits.fetches) = (Duration::MAX, Duration::MAX, usize::MAX);
    (limits.keep_alive, limits.keep_alive_timeout) = (Duration::MAX, Duration::MAX);
    (limits.messages_a_second, limits.burst, limits.streams_of_a_connection) =
        (u32::MAX, u32::MAX, u32::MAX);
    (limits.fetch, limits.headers) = (u64::MAX, u32::MAX);
    let owner =
        Owned::with(Way::Tls(authority.server("owner.example")), limits, terms(), "127.0.0.1:0")
            .await;
    let identity = authority.issue("mirror-1.example");
    let client = client(owner.address).tls(identity.client());
    let mirror = Mirroring::with(
        client.connect_timeout(Duration::MAX).keep_alive(Duration::MAX, Duration::MAX),
    );
    let held = soon("a copy", mirror.copy(page(1))).await;
    soon("a change", owner.change(page(1), 7)).await;
    assert_eq!(held.copy.lock().as_deref(), None);
    assert_eq!(mirror.connection.counts().links, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_without_a_bound_before_the_next_try_does_not_panic() {
    let client = client("127.0.0.1:1").insecure_plaintext("mirror-1.example");
    let mut mirror = Mirroring::with(client.backoff(Duration::MAX, Duration::MAX));
    until("it has tried", || mirror.connection.counts().failed == 1).await;
    let ended = tokio::time::timeout(Duration::from_millis(100), mirror.connection.ended()).await;
    assert!(ended.is_err(), "it waits, and its task has not died");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_of_an_earlier_life_does_not_cut_the_link_of_the_next() {
    let authority = Authority::default();
    let way = Way::Tls(authority.server("owner.example"));
    let owner = Owned::with(way, Limits::default(), Terms::new(LONG), "127.0.0.1:0").await;
    let (first, second) =
        (authority.issue("mirror-1.example"), authority.issue("mirror-2.example"));
    let (mut old, epoch) = Raw::join(owner.address, &first, 7).await;
    let (mut slow, slow_epoch) = Raw::join(owner.address, &second, 8).await;
    let space = owner.space.clone();
    let change = tokio::spawn(async move { drop(space.invalidate(shared(), Event::Clear).await) });
    let Some(from_owner::Message::Inv(inv)) = old.hear().await else { panic!("no `Inv`") };
    old.say(Message::Ack(Ack { epoch: Some(epoch), invalidation: inv.invalidation })).await;
    // They wait for the change; then this life ends, and another one counts its nonces from 1, too.
    for nonce in 1..=20 {
        old.say(fetch(epoch, nonce, 0x2_0000)).await;
    }
    old.settle().await;
    drop(old);
    let mirror = Mirroring::begin(owner.address, &first);
    soon("a mirror", mirror.leased.joined()).await;
    let leased = mirror.leased.clone();
    let wanted = tokio::spawn(async move { leased.fetch(page(1)).await });
    raw::a_while().await;
    let Some(from_owner::Message::Inv(inv)) = slow.hear().await else { panic!("no `Inv`") };
    slow.say(Message::Ack(Ack { epoch: Some(slow_epoch), invalidation: inv.invalidation })).await;
    soon("the change", change).await.unwrap();
    assert_eq!(soon("contents", wanted).await.unwrap().map(|contents| contents.len()), Ok(0x1000));
    assert_eq!((mirror.connection.counts().malformed, mirror.connection.counts().links), (0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_are_opened_and_reset_again_and_again_disturb_nobody() {
    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let healthy = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    let held = soon("a copy", healthy.copy(page(1))).await;
    let channel = raw::channel(owner.address, Some(&authority.issue("mirror-2.example"))).await;
    for _ in 0..500 {
        let stream = Raw::begin(&channel, vec![open("memory")]);
        let _ = tokio::time::timeout(Duration::from_micros(fastrand::u64(..2_000)), stream).await;
    }
    assert!(soon("a change", owner.change(page(1), 9)).await < TERM);
    assert_eq!(held.copy.lock().as_deref(), None);
    assert_eq!((healthy.connection.counts().links, healthy.leased.counts().lost), (1, 0));
}

#[tokio::test]
async fn one_thread_carries_owner_and_mirror_over_ipv6() {
    let authority = Authority::default();
    let way = Way::Tls(authority.server("owner.example"));
    let owner = Owned::with(way, Limits::default(), terms(), "[::1]:0").await;
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    let held = soon("a copy", mirror.copy(shared())).await;
    soon("a change", owner.change(page(1), 7)).await;
    assert_eq!(held.copy.lock().as_deref(), None);
    soon("leaving", mirror.leave()).await;
    assert!(owner.hub.members().is_empty());
}
