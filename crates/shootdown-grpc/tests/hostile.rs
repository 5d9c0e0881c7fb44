//! Peers that may take part and misbehave, and bytes that are no messages.
#![allow(missing_docs)]

mod support;

use shootdown::Event;
use shootdown_grpc::Limits;
use shootdown_lease::Host;
use std::time::{Duration, Instant};
use support::certificates::Authority;
use support::raw::proto::from_mirror::Message;
use support::raw::proto::{
    Ack, Epoch, Fetch, FromMirror, Inv, Join, Left, Range, Renew, from_owner,
};
use support::raw::{self, Raw, open};
use support::{Changing, Mirroring, Owned, TERM, Way, page, soon, terms, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

/// Short times for those who say nothing.
fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.handshake = Duration::from_millis(300);
    limits.open = Duration::from_millis(300);
    limits
}

async fn owner(authority: &Authority, limits: Limits) -> Owned {
    Owned::with(Way::Tls(authority.server("owner.example")), limits, terms(), "127.0.0.1:0").await
}

/// A healthy mirror, and changes of memory that it lets go of.
struct Healthy {
    mirror: Mirroring,
    changing: Changing,
}

impl Healthy {
    async fn begin(owner: &Owned, authority: &Authority) -> Self {
        let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
        soon("a mirror", mirror.leased.joined()).await;
        Self { mirror, changing: Changing::begin(&owner.space) }
    }

    /// It has not noticed anything.
    async fn end(self, owner: &Owned) {
        let longest = self.changing.end().await;
        assert!(longest < TERM, "a healthy mirror's invalidations took up to {longest:?}");
        assert_eq!(
            (self.mirror.leased.counts().joined, self.mirror.connection.counts().links),
            (1, 1)
        );
        assert!(self.mirror.leased.counts().invalidated > 0 && self.mirror.leased.has_lease());
        assert_eq!((owner.hub.counts().expelled, owner.hub.counts().expired), (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_no_messages_end_their_connection_only() {
    let authority = Authority::default();
    let owner = owner(&authority, limits()).await;
    let healthy = Healthy::begin(&owner, &authority).await;
    let identity = authority.issue("mirror-2.example");
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..20 {
        let garbage: Vec<u8> = (0..random.usize(1..5_000)).map(|_| random.u8(..)).collect();
        let mut stream = TcpStream::connect(owner.address).await.unwrap();
        let _ = stream.write_all(&garbage).await;
        let _ = soon("the end", stream.read_to_end(&mut Vec::new())).await;
        // With a right certificate.
        let mut wire = raw::wire(owner.address, Some(&identity)).await.unwrap();
        let _ = wire.write_all(&garbage).await;
        let _ = soon("the end", wire.read_to_end(&mut Vec::new())).await;
    }
    until("they are counted", || {
        owner.tally.counts().handshakes == 20 && owner.tally.counts().without_stream == 20
    })
    .await;
    healthy.end(&owner).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_says_nothing_is_cut() {
    let authority = Authority::default();
    let owner = owner(&authority, limits()).await;
    let healthy = Healthy::begin(&owner, &authority).await;
    let identity = authority.issue("mirror-2.example");
    let mut silent = TcpStream::connect(owner.address).await.unwrap();
    let mut wire = raw::wire(owner.address, Some(&identity)).await.unwrap();
    let no_stream = raw::channel(owner.address, Some(&identity)).await;
    let no_open = Raw::begin(&no_stream, vec![]);
    assert_eq!(
        soon("no open", no_open).await.err().map(|status| status.code()),
        Some(Code::DeadlineExceeded)
    );
    let _ = soon("the end", silent.read_to_end(&mut Vec::new())).await;
    let _ = soon("the end", wire.read_to_end(&mut Vec::new())).await;
    until("they are counted", || {
        owner.tally.counts().handshakes == 1 && owner.tally.counts().not_opened == 1
    })
    .await;
    until("they are counted", || owner.tally.counts().without_stream == 1).await;
    healthy.end(&owner).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_decode_ends_its_stream_with_a_status() {
    let authority = Authority::default();
    let owner = owner(&authority, limits()).await;
    let healthy = Healthy::begin(&owner, &authority).await;
    let channel = raw::channel(owner.address, Some(&authority.issue("mirror-2.example"))).await;
    let epoch = Some(Epoch { boot: 1, number: 1 });
    let join = || FromMirror { message: Some(Message::Join(Join { incarnation: 1, nonce: 1 })) };

    let first = [
        vec![join()],
        vec![FromMirror { message: None }],
        vec![open("")],
        vec![open(&"x".repeat(300))],
    ];
    for (number, messages) in first.into_iter().enumerate() {
        let status = Raw::begin(&channel, messages).await.err().unwrap();
        assert_eq!(status.code(), Code::InvalidArgument, "{number}");
    }
    let later = [
        FromMirror { message: None },
        open("memory"),
        FromMirror { message: Some(Message::Renew(Renew { epoch: None, nonce: 1 })) },
        FromMirror { message: Some(Message::Fetch(Fetch { epoch, nonce: 1, range: None })) },
        FromMirror {
            message: Some(Message::Fetch(Fetch {
                epoch,
                nonce: 1,
                range: Some(Range { start: 2, last: 1 }),
            })),
        },
        FromMirror { message: Some(Message::Ack(Ack { epoch: None, invalidation: 1 })) },
        FromMirror { message: Some(Message::Left(Left { epoch: None })) },
    ];
    for (number, message) in later.into_iter().enumerate() {
        let mut raw = Raw::begin(&channel, vec![open("memory"), message]).await.unwrap();
        assert_eq!(raw.end().await, Code::InvalidArgument, "{number}");
    }
    assert_eq!((owner.tally.counts().malformed, owner.tally.counts().not_opened), (10, 1));

    // Longer than a message may be, before and after it is known for which space.
    let status = Raw::begin(&channel, vec![open(&"x".repeat(100_000))]).await.err().unwrap();
    assert_eq!(status.code(), Code::OutOfRange);
    let mut raw =
        Raw::begin(&channel, vec![open("memory"), open(&"x".repeat(3_000_000))]).await.unwrap();
    assert_eq!(raw.end().await, Code::OutOfRange);
    assert_eq!(owner.tally.counts().oversized, 2);
    assert_eq!(owner.hub.members().iter().map(|member| member.0).collect::<Vec<_>>(), [Host(1)]);
    healthy.end(&owner).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorded_messages_that_are_sent_again_do_nothing() {
    let authority = Authority::default();
    let owner = owner(&authority, Limits::default()).await;
    let healthy = Healthy::begin(&owner, &authority).await;
    let (second, third) =
        (authority.issue("mirror-2.example"), authority.issue("mirror-3.example"));

    // A member whose messages are recorded: it joins, acknowledges, leaves, and joins anew.
    let (mut raw, epoch) = Raw::join(owner.address, &second, 7).await;
    let inv = loop {
        if let Some(from_owner::Message::Inv(inv)) = raw.hear().await {
            break inv;
        }
    };
    let recorded = [
        Message::Join(Join { incarnation: 7, nonce: 1 }),
        Message::Renew(Renew { epoch: Some(epoch), nonce: 2 }),
        Message::Ack(Ack { epoch: Some(epoch), invalidation: inv.invalidation }),
        Message::Fetch(Fetch {
            epoch: Some(epoch),
            nonce: 3,
            range: Some(Range { start: 1, last: 2 }),
        }),
        Message::Left(Left { epoch: Some(epoch) }),
    ];
    for message in &recorded {
        raw.say(message.clone()).await;
    }
    raw.settle().await;
    raw.say(Message::Join(Join { incarnation: 7, nonce: 9 })).await;
    let live = loop {
        match raw.hear().await {
            Some(from_owner::Message::Welcome(welcome)) if welcome.nonce == 9 => {
                break welcome.epoch.unwrap();
            }
            _ => {}
        }
    };
    let acknowledges = tokio::spawn(acknowledge(raw, live));
    until("it acknowledges", || owner.hub.members().len() == 2).await;

    // Again by another host, and on a new stream of the same one.
    let before = owner.hub.counts();
    let mut other = Raw::open(owner.address, &third).await;
    for message in recorded[1..].iter().chain([&Message::Left(Left { epoch: Some(live) })]) {
        other.say(message.clone()).await;
    }
    other.say(Message::Renew(Renew { epoch: Some(live), nonce: 5 })).await;
    other.settle().await;
    let counts = owner.hub.counts();
    assert_eq!((counts.unasked - before.unasked, counts.left - before.left), (1, 0));
    assert!(counts.strangers - before.strangers >= 5, "{counts:?}");
    drop(other);
    acknowledges.abort();
    let mut again = Raw::open(owner.address, &second).await;
    for message in &recorded {
        again.say(message.clone()).await;
    }
    again.settle().await;
    let epochs: Vec<_> = owner
        .hub
        .members()
        .into_iter()
        .filter(|member| member.0 == Host(2))
        .map(|member| member.1.number)
        .collect();
    assert_eq!(epochs, [live.number], "an old join, renewal and leaving change nothing");
    soon(
        "leaving",
        again.sender.send(FromMirror { message: Some(Message::Left(Left { epoch: Some(live) })) }),
    )
    .await
    .unwrap();
    again.settle().await;
    let longest = healthy.changing.end().await;
    assert!(longest < TERM * 3, "{longest:?}");
}

/// Acknowledges what is asked, for ever.
async fn acknowledge(mut raw: Raw, epoch: Epoch) {
    while let Some(message) = raw.hear().await {
        if let from_owner::Message::Inv(Inv { invalidation, .. }) = message {
            raw.say(Message::Ack(Ack { epoch: Some(epoch), invalidation })).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_asked_cannot_be_acknowledged() {
    let authority = Authority::default();
    let owner = owner(&authority, Limits::default()).await;
    let (mut raw, epoch) = Raw::join(owner.address, &authority.issue("mirror-2.example"), 7).await;
    for invalidation in 0..1_000 {
        raw.say(Message::Ack(Ack { epoch: Some(epoch), invalidation })).await;
    }
    raw.settle().await;
    assert_eq!((owner.hub.counts().unasked, owner.hub.counts().acknowledged), (1_000, 0));
    // None of them counts for what is asked later.
    let began = Instant::now();
    let space = owner.space.clone();
    let change = tokio::spawn(async move { drop(space.invalidate(page(1), Event::Clear).await) });
    let Some(from_owner::Message::Inv(inv)) = raw.hear().await else { panic!("no `Inv`") };
    raw::a_while().await;
    assert!(!change.is_finished(), "it waits for the mirror");
    // By another epoch, another host, another number.
    let mut other = Raw::open(owner.address, &authority.issue("mirror-3.example")).await;
    other.say(Message::Ack(Ack { epoch: Some(epoch), invalidation: inv.invalidation })).await;
    other.settle().await;
    raw.say(Message::Ack(Ack { epoch: Some(epoch), invalidation: inv.invalidation + 1 })).await;
    let earlier = Epoch { boot: epoch.boot, number: epoch.number.wrapping_sub(1) };
    raw.say(Message::Ack(Ack { epoch: Some(earlier), invalidation: inv.invalidation })).await;
    raw.settle().await;
    assert!(!change.is_finished());
    assert_eq!(owner.hub.counts().unasked, 1_003);
    assert!(began.elapsed() < TERM, "too slow to say: the lease may have ended");
    raw.say(Message::Ack(Ack { epoch: Some(epoch), invalidation: inv.invalidation })).await;
    soon("the change", change).await.unwrap();
    assert_eq!(owner.hub.counts().acknowledged, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_sends_too_fast_is_read_later() {
    let authority = Authority::default();
    let mut limits = Limits::default();
    (limits.messages_a_second, limits.burst) = (1_000, 100);
    let owner = owner(&authority, limits).await;
    let healthy = Healthy::begin(&owner, &authority).await;
    let raw = Raw::open(owner.address, &authority.issue("mirror-2.example")).await;
    let (began, before) = (Instant::now(), owner.tally.counts().messages);
    let nobody = Some(Epoch { boot: 9, number: 9 });
    while began.elapsed() < Duration::from_millis(500) {
        let ack = Message::Ack(Ack { epoch: nobody, invalidation: 1 });
        let _ = tokio::time::timeout(Duration::from_millis(10), raw.say(ack)).await;
    }
    let (seconds, handled) = (began.elapsed().as_secs_f64(), owner.hub.counts().unasked);
    assert!(owner.tally.counts().throttled > 0 && owner.tally.counts().messages > before);
    assert!(handled as f64 <= 1_000.0 * seconds + 110.0, "{handled} in {seconds} s");
    healthy.end(&owner).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_stream_of_a_host_replaces_the_older_one() {
    let authority = Authority::default();
    let owner = owner(&authority, Limits::default()).await;
    let second = authority.issue("mirror-2.example");
    let (mut older, epoch) = Raw::join(owner.address, &second, 7).await;
    let mut newer = Raw::open(owner.address, &second).await;
    assert_eq!(older.end().await, Code::Aborted);
    newer.say(Message::Renew(Renew { epoch: Some(epoch), nonce: 5 })).await;
    assert!(
        matches!(newer.hear().await, Some(from_owner::Message::Renewed(renewed)) if renewed.nonce == 5),
        "the same epoch"
    );
    assert_eq!(owner.tally.counts().replaced, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_certificate_has_so_many_connections_and_all_have_so_many() {
    let authority = Authority::default();
    let mut limits = Limits::default();
    (limits.connections, limits.connections_of_a_name) = (6, 2);
    let owner = owner(&authority, limits).await;
    let healthy = Healthy::begin(&owner, &authority).await;
    let second = authority.issue("mirror-2.example");
    let mut wires = Vec::new();
    for _ in 0..3 {
        wires.push(raw::wire(owner.address, Some(&second)).await.unwrap());
        raw::a_while().await;
    }
    // The oldest is cut, not the newest.
    let _ = soon("the end", wires.remove(0).read_to_end(&mut Vec::new())).await;
    until("it is counted", || owner.tally.counts().full == 1).await;
    // More than all may have are closed at once.
    let mut plain = Vec::new();
    for _ in 0..6 {
        plain.push(TcpStream::connect(owner.address).await.unwrap());
    }
    until("they are counted", || owner.tally.counts().full > 1).await;
    let mut last = plain.pop().unwrap();
    let _ = soon("the end", last.read_to_end(&mut Vec::new())).await;
    healthy.end(&owner).await;
}
