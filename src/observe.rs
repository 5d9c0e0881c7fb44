//! Spans, events and metrics of the features `tracing` and `metrics`. Without them everything here
//! is empty and compiles to nothing.
//!
//! Subscribers and recorders are foreign code. So nothing here is called under the space's lock
//! (C8), and none of their panics leaves this module.
#![forbid(unsafe_code)]

#[cfg(any(feature = "tracing", feature = "metrics"))]
mod told {
    use crate::entry::{Answer, EntryRef};
    use crate::foreign::{Callback, Losses};
    use crate::notifier::Request;
    use crate::sync::Arc;
    use std::time::{Duration, Instant};

    /// Whether there may be a subscriber or a recorder.
    pub(crate) const ON: bool = true;

    /// Calls a subscriber or a recorder.
    fn tell<R>(losses: &Losses, what: impl FnOnce() -> R) -> Option<R> {
        losses.run(Callback::Observer, |_| what())
    }

    /// The begin of a first pass, if a subscriber or a recorder wants it.
    #[derive(Clone, Copy, Default)]
    pub(crate) struct Moment(Option<Instant>);

    impl Moment {
        #[inline]
        pub(crate) fn now(_losses: &Losses) -> Self {
            #[cfg(feature = "metrics")]
            let wanted = true;
            #[cfg(not(feature = "metrics"))]
            let wanted =
                tell(_losses, || tracing::enabled!(target: "shootdown", tracing::Level::TRACE))
                    .unwrap_or(false);
            Self(wanted.then(Instant::now))
        }

        fn elapsed(self) -> Duration {
            self.0.map_or(Duration::ZERO, |began| began.elapsed())
        }
    }

    /// Counts an invalidation. A key whose label is a literal allocates nothing.
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
        count!(
            "unmap",
            "clear",
            "protection-vma",
            "protection-page",
            "soft-dirty",
            "release",
            "migrate",
            "exclusive"
        );
    }

    /// The span of an invalidation. Its drop closes it.
    #[derive(Default)]
    pub(crate) struct Trace {
        #[cfg(feature = "tracing")]
        span: Option<(tracing::Span, Arc<Losses>)>,
    }

    /// Driver code that runs while this exists runs inside the span.
    pub(crate) struct Entered<'a> {
        #[cfg(feature = "tracing")]
        entered: Option<(tracing::span::Entered<'a>, &'a Losses)>,
        #[cfg(not(feature = "tracing"))]
        _entered: core::marker::PhantomData<&'a ()>,
    }

    #[cfg(feature = "tracing")]
    impl Drop for Entered<'_> {
        fn drop(&mut self) {
            if let Some((entered, losses)) = self.entered.take() {
                tell(losses, || drop(entered));
            }
        }
    }

    #[cfg(feature = "tracing")]
    impl Drop for Trace {
        fn drop(&mut self) {
            if let Some((span, losses)) = self.span.take() {
                tell(&losses, || drop(span));
            }
        }
    }

    impl Trace {
        pub(crate) fn start(
            losses: &Arc<Losses>,
            request: &Request<'_>,
            _sequence: u64,
            _hits: usize,
        ) -> Self {
            let event = request.event().name();
            #[cfg(feature = "metrics")]
            tell(losses, || {
                count_event(event);
                metrics::counter!("shootdown_hits_total").increment(_hits as u64);
            });
            #[cfg(feature = "tracing")]
            {
                let (range, blockable) = (request.range, request.terms.blockable());
                let span = tell(losses, || {
                    let span = tracing::debug_span!(
                        target: "shootdown", "invalidate", %range, event, sequence = _sequence, hits = _hits, blockable
                    );
                    (!span.is_disabled()).then_some(span)
                });
                Self { span: span.flatten().map(|span| (span, losses.clone())) }
            }
            #[cfg(not(feature = "tracing"))]
            {
                let _ = (event, losses);
                Self {}
            }
        }

        #[inline]
        pub(crate) fn enter(&self) -> Entered<'_> {
            #[cfg(feature = "tracing")]
            {
                let entered = match &self.span {
                    Some((span, losses)) => {
                        tell(losses, || span.enter()).map(|entered| (entered, &**losses))
                    }
                    None => None,
                };
                Entered { entered }
            }
            #[cfg(not(feature = "tracing"))]
            {
                Entered { _entered: core::marker::PhantomData }
            }
        }

        #[inline]
        pub(crate) fn first_pass(&self, _entry: EntryRef, _answer: Answer, _began: Moment) {
            #[cfg(feature = "tracing")]
            if let Some((span, losses)) = &self.span {
                tell(losses, || {
                    if !tracing::enabled!(target: "shootdown", tracing::Level::TRACE) {
                        return;
                    }
                    let answer = match _answer {
                        Answer::Done => "done",
                        Answer::Pass => "pass",
                        Answer::WouldBlock => "would block",
                    };
                    let (notifier, latency_ns) =
                        (_entry.name(losses), _began.elapsed().as_nanos() as u64);
                    tracing::trace!(target: "shootdown", parent: span, notifier = &*notifier, answer, latency_ns, "first pass");
                });
            }
        }

        /// Tells that a pass is done. Its first pass was called at `began`.
        #[inline]
        pub(crate) fn pass(
            &self,
            _losses: &Losses,
            _entry: EntryRef,
            began: Moment,
            _panicked: bool,
        ) {
            let _latency = began.elapsed();
            #[cfg(feature = "metrics")]
            {
                let name = _entry.name(_losses);
                tell(_losses, || {
                    metrics::histogram!("shootdown_pass_latency_seconds", "notifier" => name)
                        .record(_latency.as_secs_f64());
                });
            }
            #[cfg(feature = "tracing")]
            if let Some((span, losses)) = &self.span {
                tell(losses, || {
                    if !tracing::enabled!(target: "shootdown", tracing::Level::TRACE) {
                        return;
                    }
                    let (notifier, latency_ns) = (_entry.name(losses), _latency.as_nanos() as u64);
                    tracing::trace!(
                        target: "shootdown", parent: span, notifier = &*notifier, latency_ns, panicked = _panicked, "pass"
                    );
                });
            }
        }
    }

    #[inline]
    pub(crate) fn pass_pends(_losses: &Losses) {
        #[cfg(feature = "metrics")]
        tell(_losses, || metrics::gauge!("shootdown_passes_pending").increment(1));
    }

    #[inline]
    pub(crate) fn pass_pends_no_more(_losses: &Losses) {
        #[cfg(feature = "metrics")]
        tell(_losses, || metrics::gauge!("shootdown_passes_pending").decrement(1));
    }

    pub(crate) fn collided(_losses: &Losses) {
        #[cfg(feature = "metrics")]
        tell(_losses, || metrics::counter!("shootdown_collisions_total").increment(1));
    }

    pub(crate) fn retried(_losses: &Losses) {
        #[cfg(feature = "metrics")]
        tell(_losses, || metrics::counter!("shootdown_retries_total").increment(1));
    }

    pub(crate) fn waited(_losses: &Losses) {
        #[cfg(feature = "metrics")]
        tell(_losses, || metrics::counter!("shootdown_waits_total").increment(1));
    }

    pub(crate) fn lapsed(_losses: &Losses) {
        #[cfg(feature = "metrics")]
        tell(_losses, || metrics::counter!("shootdown_lapses_total").increment(1));
    }
}

#[cfg(not(any(feature = "tracing", feature = "metrics")))]
mod told {
    use crate::entry::{Answer, EntryRef};
    use crate::foreign::Losses;
    use crate::notifier::Request;
    use crate::sync::Arc;

    pub(crate) const ON: bool = false;

    #[derive(Clone, Copy, Default)]
    pub(crate) struct Moment;

    impl Moment {
        pub(crate) fn now(_losses: &Losses) -> Self {
            Self
        }
    }

    #[derive(Default)]
    pub(crate) struct Trace;

    pub(crate) struct Entered;

    impl Trace {
        pub(crate) fn start(
            _losses: &Arc<Losses>,
            _request: &Request<'_>,
            _sequence: u64,
            _hits: usize,
        ) -> Self {
            Self
        }

        pub(crate) fn enter(&self) -> Entered {
            Entered
        }

        pub(crate) fn first_pass(&self, _entry: EntryRef, _answer: Answer, _began: Moment) {}

        pub(crate) fn pass(
            &self,
            _losses: &Losses,
            _entry: EntryRef,
            _began: Moment,
            _panicked: bool,
        ) {
        }
    }

    pub(crate) fn pass_pends(_losses: &Losses) {}
    pub(crate) fn pass_pends_no_more(_losses: &Losses) {}
    pub(crate) fn collided(_losses: &Losses) {}
    pub(crate) fn retried(_losses: &Losses) {}
    pub(crate) fn waited(_losses: &Losses) {}
    pub(crate) fn lapsed(_losses: &Losses) {}
}

pub(crate) use told::*;
