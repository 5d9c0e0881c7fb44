//! Counters, and their reports through the features `tracing` and `metrics`.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    Connections,
    Full,
    Handshakes,
    Nameless,
    NotAdmitted,
    NotOpened,
    Malformed,
    Oversized,
    NotOwner,
    Streams,
    Replaced,
    Messages,
    Throttled,
    FetchesDropped,
    Unreadable,
    WithoutStream,
}

const COUNTS: usize = Count::WithoutStream as usize + 1;

impl Count {
    /// Returns the reason of a refusal, if the counter is one of refusals.
    fn refusal(self) -> Option<&'static str> {
        Some(match self {
            Self::Full => "full",
            Self::Handshakes => "handshake",
            Self::Nameless => "nameless",
            Self::NotAdmitted => "not admitted",
            Self::NotOpened => "not opened",
            Self::Malformed => "malformed",
            Self::Oversized => "oversized",
            Self::NotOwner => "not owner",
            Self::WithoutStream => "without stream",
            _ => return None,
        })
    }

    #[cfg(feature = "metrics")]
    fn metric(self) -> &'static str {
        match self {
            Self::Connections => "shootdown_grpc_connections_total",
            Self::Streams => "shootdown_grpc_streams_total",
            Self::Replaced => "shootdown_grpc_streams_replaced_total",
            Self::Messages => "shootdown_grpc_messages_total",
            Self::Throttled => "shootdown_grpc_throttled_total",
            Self::FetchesDropped => "shootdown_grpc_fetches_dropped_total",
            Self::Unreadable => "shootdown_grpc_unreadable_total",
            _ => "shootdown_grpc_refused_total",
        }
    }
}

/// The counters of a server, also after its end. This is a handle; clones share the counters.
#[derive(Clone, Debug, Default)]
pub struct Tally(Arc<[AtomicU64; COUNTS]>);

impl Tally {
    pub(crate) fn add(&self, count: Count) {
        self.0[count as usize].fetch_add(1, Ordering::Relaxed);
        #[cfg(feature = "metrics")]
        match count.refusal() {
            Some(why) => {
                metrics::counter!("shootdown_grpc_refused_total", "why" => why).increment(1)
            }
            None => metrics::counter!(count.metric()).increment(1),
        }
    }

    /// Counts a refusal, and reports the peer.
    pub(crate) fn refuse(&self, count: Count, who: impl fmt::Display, why: impl fmt::Display) {
        self.add(count);
        #[cfg(feature = "tracing")]
        tracing::warn!(target: "shootdown_grpc", %who, %why, kind = count.refusal().unwrap_or("dropped"), "refused");
        #[cfg(not(feature = "tracing"))]
        let _ = (who, why, count.refusal());
    }

    /// Returns the counters.
    pub fn counts(&self) -> ServerCounts {
        let get = |count: Count| self.0[count as usize].load(Ordering::Relaxed);
        ServerCounts {
            connections: get(Count::Connections),
            full: get(Count::Full),
            handshakes: get(Count::Handshakes),
            nameless: get(Count::Nameless),
            not_admitted: get(Count::NotAdmitted),
            not_opened: get(Count::NotOpened),
            malformed: get(Count::Malformed),
            oversized: get(Count::Oversized),
            not_owner: get(Count::NotOwner),
            streams: get(Count::Streams),
            replaced: get(Count::Replaced),
            messages: get(Count::Messages),
            throttled: get(Count::Throttled),
            fetches_dropped: get(Count::FetchesDropped),
            unreadable: get(Count::Unreadable),
            without_stream: get(Count::WithoutStream),
        }
    }
}

/// Counters of a server. [`Hub::counts`](shootdown_lease::engine::Hub::counts) has those of the
/// protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerCounts {
    /// Connections accepted from the socket, including those that were then refused.
    pub connections: u64,
    /// Connections closed because of the limit, and the oldest one of a certificate at its limit.
    pub full: u64,
    /// Failed TLS handshakes: no certificate, one of other roots, an expired or revoked one, none
    /// in time, or no TLS.
    pub handshakes: u64,
    /// Certificates without a usable name.
    pub nameless: u64,
    /// Streams for an unknown space, or for one that the certificate's names may not join.
    pub not_admitted: u64,
    /// Streams that did not begin with `Open`, or not in time.
    pub not_opened: u64,
    /// Messages that do not decode or are impossible.
    pub malformed: u64,
    /// Messages longer than 1 KiB.
    pub oversized: u64,
    /// Messages received after this owner had lost the memory.
    pub not_owner: u64,
    /// Streams opened.
    pub streams: u64,
    /// Streams replaced by a newer one of the same host and space.
    pub replaced: u64,
    /// Messages handed to a hub.
    pub messages: u64,
    /// How often a stream sent too fast and was read later.
    pub throttled: u64,
    /// Fetches refused because too many of one stream were waiting.
    pub fetches_dropped: u64,
    /// Fetches refused because the contents were too long or could not be read.
    pub unreadable: u64,
    /// Connections that ended without any stream.
    pub without_stream: u64,
}

/// Reports that a mirror's stream has begun.
pub(crate) fn stream_began(space: &str, host: u64, who: &dyn fmt::Display) {
    #[cfg(feature = "metrics")]
    metrics::gauge!("shootdown_grpc_streams", "space" => space.to_owned()).increment(1.0);
    #[cfg(feature = "tracing")]
    tracing::info!(target: "shootdown_grpc", space, host, %who, "stream began");
    let _ = (space, host, who);
}

/// Reports that a mirror's stream has ended. Its epoch continues.
pub(crate) fn stream_ended(space: &str, host: u64) {
    #[cfg(feature = "metrics")]
    metrics::gauge!("shootdown_grpc_streams", "space" => space.to_owned()).decrement(1.0);
    #[cfg(feature = "tracing")]
    tracing::info!(target: "shootdown_grpc", space, host, "stream ended");
    let _ = (space, host);
}

/// Reports a change of the link to the owner.
pub(crate) fn link(space: &str, what: &dyn fmt::Display, up: bool) {
    #[cfg(feature = "metrics")]
    metrics::gauge!("shootdown_grpc_link_up", "space" => space.to_owned()).set(if up {
        1.0
    } else {
        0.0
    });
    #[cfg(feature = "tracing")]
    if up {
        tracing::info!(target: "shootdown_grpc", space, owner = %what, "link up");
    } else {
        tracing::info!(target: "shootdown_grpc", space, why = %what, "link down");
    }
    let _ = (space, what, up);
}

/// The counters of a space's hub, reported from time to time.
#[cfg(any(feature = "tracing", feature = "metrics"))]
pub(crate) mod books {
    use shootdown_lease::OwnerCounts;
    use shootdown_lease::engine::Hub;

    /// Reports the changes since `before`.
    pub(crate) fn tell(space: &str, hub: &Hub, before: &mut OwnerCounts) {
        let now = hub.counts();
        #[cfg(feature = "metrics")]
        {
            let counts = [
                ("shootdown_mirrors_joins_total", now.joins),
                ("shootdown_mirrors_refused_total", now.refused),
                ("shootdown_mirrors_renewals_total", now.renewals),
                ("shootdown_mirrors_expelled_total", now.expelled),
                ("shootdown_mirrors_expired_total", now.expired),
                ("shootdown_mirrors_left_total", now.left),
                ("shootdown_mirrors_inv_sent_total", now.sent),
                ("shootdown_mirrors_inv_resent_total", now.resent),
                ("shootdown_mirrors_acknowledged_total", now.acknowledged),
                ("shootdown_mirrors_unasked_total", now.unasked),
                ("shootdown_mirrors_strangers_total", now.strangers),
                ("shootdown_mirrors_invalidations_total", now.done),
                ("shootdown_mirrors_dropped_total", hub.dropped()),
            ];
            for (name, count) in counts {
                metrics::counter!(name, "space" => space.to_owned()).absolute(count);
            }
            #[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
            {
                metrics::gauge!("shootdown_mirrors", "space" => space.to_owned())
                    .set(hub.members().len() as f64);
                metrics::gauge!("shootdown_mirrors_waiting", "space" => space.to_owned())
                    .set(hub.waiting() as f64);
            }
        }
        #[cfg(feature = "tracing")]
        {
            let (joins, left) = (now.joins - before.joins, now.left - before.left);
            let (expelled, expired) =
                (now.expelled - before.expelled, now.expired - before.expired);
            if expelled + expired > 0 {
                tracing::warn!(target: "shootdown_grpc", space, expelled, expired, "mirrors were not heard of");
            }
            if joins + left > 0 {
                tracing::info!(target: "shootdown_grpc", space, joins, left, "mirrors have come or gone");
            }
            let unasked = now.unasked - before.unasked;
            if unasked > 0 {
                tracing::debug!(target: "shootdown_grpc", space, unasked, "acknowledgements that nobody asked for");
            }
        }
        *before = now;
    }
}
