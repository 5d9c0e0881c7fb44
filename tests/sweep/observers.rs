//! A subscriber of `tracing` and a recorder of `metrics`, each call of which is a call of foreign
//! code.

#[cfg(feature = "tracing")]
mod subscriber {
    use crate::chaos::{Kind, point};
    use std::sync::atomic::{AtomicU64, Ordering};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata, Subscriber};

    #[derive(Default)]
    pub(crate) struct Chaotic(AtomicU64);

    impl Subscriber for Chaotic {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            point(Kind::Observer);
            true
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            point(Kind::Observer);
            Id::from_u64(1 + self.0.fetch_add(1, Ordering::Relaxed))
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, _: &Event<'_>) {
            point(Kind::Observer);
        }

        fn enter(&self, _: &Id) {
            point(Kind::Observer);
        }

        fn exit(&self, _: &Id) {
            point(Kind::Observer);
        }

        fn try_close(&self, _: Id) -> bool {
            point(Kind::Observer);
            true
        }
    }
}

#[cfg(feature = "metrics")]
mod recorder {
    use crate::chaos::{Kind, point};
    use metrics::{
        Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    };

    pub(crate) struct Chaotic;

    impl Recorder for Chaotic {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
            point(Kind::Observer);
            Counter::noop()
        }

        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            point(Kind::Observer);
            Gauge::noop()
        }

        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            point(Kind::Observer);
            Histogram::noop()
        }
    }
}

/// Runs `code` with them, as far as the features are on.
pub(crate) fn with<R>(code: impl FnOnce() -> R) -> R {
    #[cfg(feature = "metrics")]
    let code = || metrics::with_local_recorder(&recorder::Chaotic, code);
    #[cfg(feature = "tracing")]
    return tracing::subscriber::with_default(subscriber::Chaotic::default(), code);
    #[cfg(not(feature = "tracing"))]
    code()
}
