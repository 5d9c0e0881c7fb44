//! What the features `tracing` and `metrics` tell, and that it is told without a lock of the
//! library being held.
#![cfg(not(any(loom, shuttle)))]
#![allow(missing_docs)]

mod support;

use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use shootdown::{AddressSpace, Event};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use support::{Act, Device, Gate, Log, Task, now, pages};
use tracing::field::{Field, Visit};
use tracing::span;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// One line for each thing that is told; `space` is asked each time, which would hang under its
/// lock.
#[derive(Clone)]
struct Lines(Arc<Mutex<Vec<String>>>, AddressSpace);

#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let value = if field.name() == "latency_ns" { &"…" } else { value };
        write!(self.0, " {}={value:?}", field.name()).unwrap();
    }
}

impl Lines {
    fn say(&self, line: String) {
        let _ = self.1.active();
        self.0.lock().unwrap().push(line);
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> tracing_subscriber::Layer<S> for Lines {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, _: &span::Id, _: Context<'_, S>) {
        let mut text = Text::default();
        attributes.record(&mut text);
        self.say(format!("span {}{}", attributes.metadata().name(), text.0));
    }

    fn on_event(&self, event: &tracing::Event<'_>, context: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let parent = context.event_span(event).map_or("nothing", |span| span.name());
        self.say(format!("in {parent}:{}", text.0));
    }

    fn on_close(&self, _: span::Id, _: Context<'_, S>) {
        self.say("close".into());
    }
}

#[test]
fn an_invalidation_is_a_span_with_an_event_for_each_first_pass_and_pass() {
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let _quick = space.insert(pages(0, 1), Device::new("quick", &log)).unwrap();
    let _slow =
        space.insert(pages(0, 2), Device::new("slow", &log).then(Act::pass(gate.clone()))).unwrap();
    let lines = Lines(Arc::default(), space.clone());
    let subscriber = tracing_subscriber::registry().with(lines.clone());
    tracing::subscriber::with_default(subscriber, || {
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        gate.open();
        let guard = invalidate.finish();
        lines.say("held".into());
        drop(guard);
        drop(now(space.invalidate(pages(9, 1), Event::Clear)));
    });
    let told = lines.0.lock().unwrap().join("\n");
    let expected = "\
span invalidate range=0x0..=0xfff event=\"unmap\" sequence=3 hits=2 blockable=true
in invalidate: message=first pass notifier=\"quick\" answer=\"done\" latency_ns=\"…\"
in invalidate: message=first pass notifier=\"slow\" answer=\"pass\" latency_ns=\"…\"
in invalidate: message=pass notifier=\"slow\" latency_ns=\"…\" panicked=false
held
close
span invalidate range=0x9000..=0x9fff event=\"clear\" sequence=4 hits=0 blockable=true
close";
    assert_eq!(told, expected);
}

#[test]
fn an_abandoned_invalidation_closes_its_span_when_its_passes_are_done() {
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let _slow =
        space.insert(pages(0, 2), Device::new("slow", &log).then(Act::pass(gate.clone()))).unwrap();
    let lines = Lines(Arc::default(), space.clone());
    tracing::subscriber::with_default(tracing_subscriber::registry().with(lines.clone()), || {
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        drop(invalidate);
        lines.say("dropped".into());
        gate.open();
        now(space.drain());
    });
    let told = lines.0.lock().unwrap();
    let at = |what: &str| {
        told.iter()
            .position(|line| line.starts_with(what))
            .unwrap_or_else(|| panic!("{what} in {told:?}"))
    };
    assert!(
        at("dropped") < at("in invalidate: message=pass")
            && at("in invalidate: message=pass") < at("close")
    );
}

#[test]
fn metrics_count_what_stats_count_and_time_the_passes() {
    let recorder = DebuggingRecorder::new();
    let told = recorder.snapshotter();
    let mut pending = Vec::new();
    metrics::with_local_recorder(&recorder, || {
        let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
        let device = space
            .insert(pages(0, 1), Device::new("device", &log).then(Act::pass(gate.clone())))
            .unwrap();
        let _ready = space
            .insert(pages(0, 1), Device::new("ready", &log).then(Act::pass(async {})))
            .unwrap();
        let began = now(device.read_begin());
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        let mut reader = Task::new(device.read_begin());
        reader.expect_pending();
        pending.push(values(&told)["shootdown_passes_pending"]);
        gate.open();
        drop(invalidate.finish());
        reader.finish();
        assert!(device.read_retry(began));
        let after = values(&told);
        pending.push(after["shootdown_passes_pending"]);
        assert_eq!(after["shootdown_invalidations_total event=unmap"], 1.0);
        assert_eq!(after["shootdown_hits_total"], 2.0);
        assert_eq!(after["shootdown_waits_total"], 1.0);
        assert_eq!(after["shootdown_collisions_total"], 1.0);
        for notifier in ["device", "ready"] {
            let timed = after[&format!("shootdown_pass_latency_seconds notifier={notifier}")];
            assert_eq!(timed, 1.0, "passes of {notifier} that were timed");
        }
        // A pass that nobody has polled when its invalidation is dropped.
        let space = AddressSpace::builder().pass_budget(1).build();
        let gates = [Gate::default(), Gate::default()];
        let _devices = gates.each_ref().map(|gate| {
            let device = Device::new("deferred", &log).then(Act::pass(gate.clone()));
            space.insert(pages(0, 1), device).unwrap()
        });
        let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        invalidate.expect_pending();
        drop(invalidate);
        // The second one is beyond the budget. When it is done, the first one is polled.
        gates[1].open();
        let mut drain = Task::new(space.drain());
        drain.expect_pending();
        pending.push(values(&told)["shootdown_passes_pending"]);
        gates[0].open();
        drain.finish();
        pending.push(values(&told)["shootdown_passes_pending"]);
    });
    assert_eq!(pending, [1.0, 0.0, 1.0, 0.0]);
}

#[test]
fn each_event_is_counted_under_its_name() {
    let recorder = DebuggingRecorder::new();
    let (told, owner) = (recorder.snapshotter(), None);
    let events = [
        Event::Unmap,
        Event::Clear,
        Event::ProtectionVma,
        Event::ProtectionPage,
        Event::SoftDirty,
        Event::Release,
        Event::Migrate { owner },
        Event::Exclusive { owner },
    ];
    metrics::with_local_recorder(&recorder, || {
        let space = AddressSpace::new();
        events.into_iter().for_each(|event| drop(now(space.invalidate(pages(0, 1), event))));
    });
    let mut counted: Vec<String> = Vec::new();
    for (key, _, _, value) in told.snapshot().into_vec() {
        if key.key().name() == "shootdown_invalidations_total" {
            assert_eq!(value, DebugValue::Counter(1));
            counted.extend(key.key().labels().map(|label| label.value().to_owned()));
        }
    }
    counted.sort_unstable();
    let mut names = events.map(Event::name);
    names.sort_unstable();
    assert_eq!(counted, names);
}

/// The value of each metric so far; of a histogram how many values it got.
fn values(told: &metrics_util::debugging::Snapshotter) -> BTreeMap<String, f64> {
    static SUMS: Mutex<BTreeMap<String, f64>> = Mutex::new(BTreeMap::new());
    // A snapshot takes what was counted since the last one.
    let mut sums = SUMS.lock().unwrap();
    for (key, _, _, value) in told.snapshot().into_vec() {
        let labels: String =
            key.key().labels().map(|label| format!(" {}={}", label.key(), label.value())).collect();
        let name = format!("{}{labels}", key.key().name());
        match value {
            DebugValue::Counter(count) => *sums.entry(name).or_default() += count as f64,
            DebugValue::Gauge(change) => *sums.entry(name).or_default() += change.0,
            DebugValue::Histogram(values) => *sums.entry(name).or_default() += values.len() as f64,
        }
    }
    sums.clone()
}

/// Panics in the call of this name, once.
#[derive(Clone)]
struct Fails(Arc<Mutex<Option<&'static str>>>);

impl Fails {
    fn told(&self, call: &'static str) {
        let fails = self.0.lock().unwrap().take_if(|next| *next == call).is_some();
        assert!(!fails, "the subscriber fails");
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> tracing_subscriber::Layer<S> for Fails {
    fn on_new_span(&self, _: &span::Attributes<'_>, _: &span::Id, _: Context<'_, S>) {
        self.told("new span");
    }

    fn on_enter(&self, _: &span::Id, _: Context<'_, S>) {
        self.told("enter");
    }

    fn on_exit(&self, _: &span::Id, _: Context<'_, S>) {
        self.told("exit");
    }

    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        self.told(if text.0.contains("first pass") { "first pass" } else { "pass" });
    }

    fn on_close(&self, _: span::Id, _: Context<'_, S>) {
        self.told("close");
    }
}

/// F1: right after the start, when the passes of an invalidation are in nobody's hands; while a
/// first pass leaves a pass; when a pass is done.
#[test]
fn f1_a_subscriber_that_panics_in_whatever_it_is_told_loses_no_pass() {
    for call in ["new span", "enter", "exit", "first pass", "pass", "close"] {
        let fails = Fails(Arc::new(Mutex::new(Some(call))));
        let subscriber = tracing_subscriber::registry().with(fails.clone());
        tracing::subscriber::with_default(subscriber, || {
            let (space, log) = (AddressSpace::new(), Log::default());
            let gates = [Gate::default(), Gate::default()];
            let devices =
                ["a", "b"].map(|name| space.insert(pages(0, 1), Device::new(name, &log)).unwrap());
            for (device, gate) in devices.iter().zip(&gates) {
                device.next(Act::pass(gate.clone()));
            }
            let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
            unmap.expect_pending();
            assert_eq!(space.active()[0].pending.len(), 2, "{call}: both passes are waited for");
            gates[0].open();
            unmap.expect_pending();
            gates[1].open();
            drop(unmap.finish());
            for device in &devices {
                now(device.read_begin());
            }
            assert!(fails.0.lock().unwrap().is_none(), "{call} was told");
            assert_eq!((space.active().len(), space.stats().lost_panics), (0, 1), "{call}");
        });
    }
}

/// F1: a name is asked for when a first pass and when a pass is told of.
#[test]
fn f1_a_name_that_panics_loses_no_pass() {
    struct BadName(Gate);
    impl shootdown::IntervalNotifier for BadName {
        fn invalidate(
            &self,
            invalidation: &shootdown::Invalidation<'_>,
        ) -> Result<Option<shootdown::PassFuture>, shootdown::WouldBlock> {
            invalidation.set_seq();
            Ok(Some(shootdown::PassFuture::new(self.0.clone())))
        }

        fn name(&self) -> std::borrow::Cow<'static, str> {
            panic!("a name fails");
        }
    }
    let (space, log) = (AddressSpace::new(), Log::default());
    let lines = Lines(Arc::default(), space.clone());
    let gates = [Gate::default(), Gate::default()];
    tracing::subscriber::with_default(tracing_subscriber::registry().with(lines.clone()), || {
        let _bad = space.insert(pages(0, 1), BadName(gates[0].clone())).map_err(drop).unwrap();
        let good = space
            .insert(pages(0, 1), Device::new("good", &log).then(Act::pass(gates[1].clone())))
            .unwrap();
        let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        unmap.expect_pending();
        gates[0].open();
        unmap.expect_pending();
        gates[1].open();
        drop(unmap.finish());
        now(good.read_begin());
    });
    let told = lines
        .0
        .lock()
        .unwrap()
        .iter()
        .filter(|line| line.contains("a notifier whose name() panics"))
        .count();
    assert_eq!(told, 2, "its first pass and its pass are told of all the same");
    assert!(space.stats().lost_panics >= 2);
}

/// F1: a recorder that fails when it is told that a pass is done.
#[test]
fn f1_a_recorder_that_panics_loses_no_pass() {
    struct Fails;
    impl metrics::Recorder for Fails {
        fn describe_counter(
            &self,
            _: metrics::KeyName,
            _: Option<metrics::Unit>,
            _: metrics::SharedString,
        ) {
        }
        fn describe_gauge(
            &self,
            _: metrics::KeyName,
            _: Option<metrics::Unit>,
            _: metrics::SharedString,
        ) {
        }
        fn describe_histogram(
            &self,
            _: metrics::KeyName,
            _: Option<metrics::Unit>,
            _: metrics::SharedString,
        ) {
        }
        fn register_counter(
            &self,
            _: &metrics::Key,
            _: &metrics::Metadata<'_>,
        ) -> metrics::Counter {
            panic!("no counter")
        }
        fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
            panic!("no gauge")
        }
        fn register_histogram(
            &self,
            _: &metrics::Key,
            _: &metrics::Metadata<'_>,
        ) -> metrics::Histogram {
            panic!("no histogram")
        }
    }
    metrics::with_local_recorder(&Fails, || {
        let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
        let device = space
            .insert(pages(0, 1), Device::new("device", &log).then(Act::pass(gate.clone())))
            .unwrap();
        let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
        unmap.expect_pending();
        let mut reader = Task::new(device.read_begin());
        reader.expect_pending();
        gate.open();
        drop(unmap.finish());
        reader.finish();
        assert!(space.active().is_empty() && space.stats().lost_panics > 3);
    });
}
