//! What the features `tracing` and `metrics` are told.
#![allow(missing_docs)]

mod support;

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use std::collections::BTreeMap;
use std::sync::Mutex;
use support::certificates::Authority;
use support::raw::Raw;
use support::raw::proto::Ack;
use support::raw::proto::from_mirror::Message;
use support::{Mirroring, Owned, page, soon, until};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Keeps the text of each event.
struct Lines(&'static Mutex<Vec<String>>);

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "shootdown_grpc"
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                self.0.push_str(&format!("{}={value:?} ", field.name()));
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// All metrics, by name and labels. A snapshot empties the counters, so the largest values are
/// kept.
#[derive(Default)]
struct Seen(BTreeMap<(String, String), f64>);

impl Seen {
    fn look(&mut self, snapshotter: &Snapshotter) {
        for (key, _, _, value) in snapshotter.snapshot().into_vec() {
            let labels: Vec<_> = key.key().labels().map(|label| label.value().to_owned()).collect();
            let seen = self.0.entry((key.key().name().to_owned(), labels.join(" "))).or_default();
            match value {
                DebugValue::Counter(count) => *seen = seen.max(count as f64),
                DebugValue::Gauge(value) => *seen = value.into_inner(),
                DebugValue::Histogram(_) => {}
            }
        }
    }

    fn get(&self, name: &str, labels: &str) -> f64 {
        self.0.get(&(name.to_owned(), labels.to_owned())).copied().unwrap_or(0.0)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_streams_and_refusals_are_told() {
    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());
    tracing::subscriber::set_global_default(Lines(&LINES)).unwrap();
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().unwrap();
    let said = |what: &str| LINES.lock().unwrap().iter().any(|line| line.contains(what));

    let authority = Authority::default();
    let owner = Owned::begin(&authority).await;
    let mirror = Mirroring::begin(owner.address, &authority.issue("mirror-1.example"));
    soon("a copy", mirror.copy(page(1))).await;
    owner.change(page(1), 1).await;
    until("the stream", || said("stream began") && said("link up")).await;
    let mut seen = Seen::default();
    let mut is = |name: &str, labels: &str, wanted: f64| {
        seen.look(&snapshotter);
        seen.get(name, labels) == wanted
    };
    until("a gauge", || is("shootdown_grpc_streams", "memory", 1.0)).await;

    let stranger = Mirroring::begin(owner.address, &authority.issue("stranger.example"));
    let (raw, epoch) = Raw::join(owner.address, &authority.issue("mirror-2.example"), 7).await;
    raw.say(Message::Ack(Ack { epoch: Some(epoch), invalidation: 99 })).await;
    until("refusals", || !is("shootdown_grpc_refused_total", "not admitted", 0.0)).await;
    until("members", || is("shootdown_mirrors_joins_total", "memory", 2.0)).await;
    until("what was not asked", || is("shootdown_mirrors_unasked_total", "memory", 1.0)).await;
    until("what was done", || is("shootdown_mirrors_invalidations_total", "memory", 1.0)).await;
    until("who was not heard of", || is("shootdown_mirrors_expired_total", "memory", 1.0)).await;
    until("who is left", || is("shootdown_mirrors", "memory", 1.0)).await;
    until("who was refused", || said("stranger.example") && said("no such space")).await;
    until("who was not heard of", || said("expired=1")).await;
    drop((stranger, mirror, raw));
    until("the streams end", || is("shootdown_grpc_streams", "memory", 0.0)).await;
    until("it is said", || said("stream ended")).await;
}
