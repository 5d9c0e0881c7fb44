//! What the features `tracing` and `metrics` tell; without them everything here is empty and compiles to nothing.
//!
//! Subscribers and recorders are foreign code: nothing here is called under the space's lock (C8).
#![forbid(unsafe_code)]

#[cfg(any(feature = "tracing", feature = "metrics"))]
mod told {
    use crate::entry::{Answer, EntryRef};
    use crate::notifier::Request;
    use std::time::{Duration, Instant};

    /// Somebody may want to know.
    pub(crate) const ON: bool = true;

    /// When something began, if anybody wants to know.
    #[derive(Clone, Copy, Default)]
    pub(crate) struct Moment(Option<Instant>);

    impl Moment {
        #[inline]
        pub(crate) fn now() -> Self {
            #[cfg(feature = "metrics")]
            let wanted = true;
            #[cfg(not(feature = "metrics"))]
            let wanted = tracing::enabled!(target: "shootdown", tracing::Level::TRACE);
            Self(wanted.then(Instant::now))
        }

        fn elapsed(self) -> Duration {
            self.0.map_or(Duration::ZERO, |began| began.elapsed())
        }
    }

    /// A key whose label is known when it is compiled allocates nothing.
    #[cfg(feature = "metrics")]
    fn count_event(event: &str) {
        macro_rules! count {
            ($($name:literal),*) => {
                match event {
                    $($name => metrics::counter!("shootdown_invalidations_total", "event" => $name).increment(1),)*
                    other => debug_assert!(false, "the event {other} is not counted"),
                }
            };
        }
        count!("unmap", "clear", "protection-vma", "protection-page", "soft-dirty", "release", "migrate", "exclusive");
    }

    /// The span of an invalidation; closed when dropped.
    #[derive(Default)]
    pub(crate) struct Trace {
        #[cfg(feature = "tracing")]
        span: Option<tracing::Span>,
    }

    /// Driver code that runs while this exists runs inside the span.
    pub(crate) struct Entered<'a> {
        #[cfg(feature = "tracing")]
        _entered: Option<tracing::span::Entered<'a>>,
        #[cfg(not(feature = "tracing"))]
        _entered: core::marker::PhantomData<&'a ()>,
    }

    impl Trace {
        #[inline]
        pub(crate) fn start(request: &Request, _sequence: u64, _hits: usize) -> Self {
            let event = request.event().name();
            #[cfg(feature = "metrics")]
            {
                count_event(event);
                metrics::counter!("shootdown_hits_total").increment(_hits as u64);
            }
            #[cfg(feature = "tracing")]
            {
                let (range, blockable) = (request.range, request.terms.blockable());
                let span = tracing::debug_span!(target: "shootdown", "invalidate", %range, event, sequence = _sequence, hits = _hits, blockable);
                Self { span: (!span.is_disabled()).then_some(span) }
            }
            #[cfg(not(feature = "tracing"))]
            {
                let _ = event;
                Self {}
            }
        }

        #[inline]
        pub(crate) fn enter(&self) -> Entered<'_> {
            #[cfg(feature = "tracing")]
            {
                Entered { _entered: self.span.as_ref().map(tracing::Span::enter) }
            }
            #[cfg(not(feature = "tracing"))]
            {
                Entered { _entered: core::marker::PhantomData }
            }
        }

        #[inline]
        pub(crate) fn first_pass(&self, _entry: EntryRef, _answer: Answer, _began: Moment) {
            #[cfg(feature = "tracing")]
            if let Some(span) = &self.span
                && tracing::enabled!(target: "shootdown", tracing::Level::TRACE)
            {
                let answer = match _answer {
                    Answer::Done => "done",
                    Answer::Pass => "pass",
                    Answer::WouldBlock => "would block",
                };
                let (notifier, latency_ns) = (_entry.name(), _began.elapsed().as_nanos() as u64);
                tracing::trace!(target: "shootdown", parent: span, notifier = &*notifier, answer, latency_ns, "first pass");
            }
        }

        /// A pass is done; `began` is when its first pass was called.
        #[inline]
        pub(crate) fn pass(&self, _entry: EntryRef, began: Moment, _panicked: bool) {
            let _latency = began.elapsed();
            #[cfg(feature = "metrics")]
            metrics::histogram!("shootdown_pass_latency_seconds").record(_latency.as_secs_f64());
            #[cfg(feature = "tracing")]
            if let Some(span) = &self.span
                && tracing::enabled!(target: "shootdown", tracing::Level::TRACE)
            {
                let (notifier, latency_ns) = (_entry.name(), _latency.as_nanos() as u64);
                tracing::trace!(target: "shootdown", parent: span, notifier = &*notifier, latency_ns, panicked = _panicked, "pass");
            }
        }
    }

    #[inline]
    pub(crate) fn pass_pends() {
        #[cfg(feature = "metrics")]
        metrics::gauge!("shootdown_passes_pending").increment(1);
    }

    #[inline]
    pub(crate) fn pass_pends_no_more() {
        #[cfg(feature = "metrics")]
        metrics::gauge!("shootdown_passes_pending").decrement(1);
    }

    pub(crate) fn collided() {
        #[cfg(feature = "metrics")]
        metrics::counter!("shootdown_collisions_total").increment(1);
    }

    pub(crate) fn retried() {
        #[cfg(feature = "metrics")]
        metrics::counter!("shootdown_retries_total").increment(1);
    }

    pub(crate) fn waited() {
        #[cfg(feature = "metrics")]
        metrics::counter!("shootdown_waits_total").increment(1);
    }

    pub(crate) fn lapsed() {
        #[cfg(feature = "metrics")]
        metrics::counter!("shootdown_lapses_total").increment(1);
    }
}

#[cfg(not(any(feature = "tracing", feature = "metrics")))]
mod told {
    use crate::entry::{Answer, EntryRef};
    use crate::notifier::Request;

    pub(crate) const ON: bool = false;

    #[derive(Clone, Copy, Default)]
    pub(crate) struct Moment;

    impl Moment {
        #[inline]
        pub(crate) fn now() -> Self {
            Self
        }
    }

    #[derive(Default)]
    pub(crate) struct Trace;

    pub(crate) struct Entered;

    impl Trace {
        #[inline]
        pub(crate) fn start(_request: &Request, _sequence: u64, _hits: usize) -> Self {
            Self
        }

        #[inline]
        pub(crate) fn enter(&self) -> Entered {
            Entered
        }

        #[inline]
        pub(crate) fn first_pass(&self, _entry: EntryRef, _answer: Answer, _began: Moment) {}

        #[inline]
        pub(crate) fn pass(&self, _entry: EntryRef, _began: Moment, _panicked: bool) {}
    }

    #[inline]
    pub(crate) fn pass_pends() {}
    #[inline]
    pub(crate) fn pass_pends_no_more() {}
    #[inline]
    pub(crate) fn collided() {}
    #[inline]
    pub(crate) fn retried() {}
    #[inline]
    pub(crate) fn waited() {}
    #[inline]
    pub(crate) fn lapsed() {}
}

pub(crate) use told::*;
