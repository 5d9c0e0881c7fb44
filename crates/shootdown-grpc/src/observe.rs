//! What is counted, and what the features `tracing` and `metrics` are told of it.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a server counts.
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
    /// Why a peer was refused, for those counts that say so.
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

/// The counts of a server, while it runs and after. A handle: clones count the same.
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

    /// Counts a refusal, and says whose.
    pub(crate) fn refuse(&self, count: Count, who: impl fmt::Display, why: impl fmt::Display) {
        self.add(count);
        #[cfg(feature = "tracing")]
        tracing::warn!(target: "shootdown_grpc", %who, %why, kind = count.refusal().unwrap_or("dropped"), "refused");
        #[cfg(not(feature = "tracing"))]
        let _ = (who, why, count.refusal());
    }

    /// What was counted so far.
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

/// What a server has seen so far. What the protocol counts is in
/// [`Hub::counts`](shootdown_lease::engine::Hub::counts).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerCounts {
    /// Connections accepted from the socket, those that were refused then included.
    pub connections: u64,
    /// Connections closed because there were as many as may be, and the oldest of a certificate's
    /// when it had as many as it may have.
    pub full: u64,
    /// TLS handshakes that failed: no certificate, one of other roots, one that has expired or is
    /// revoked, none in time, or no TLS at all.
    pub handshakes: u64,
    /// Certificates without a usable name.
    pub nameless: u64,
    /// Streams for a space that is not here, or that the certificate's names may not join.
    pub not_admitted: u64,
    /// Streams that did not begin with `Open`, or not in time.
    pub not_opened: u64,
    /// Messages that do not decode, or say what cannot be.
    pub malformed: u64,
    /// Messages longer than 1 KiB.
    pub oversized: u64,
    /// Messages that came when this owner owned the memory no more.
    pub not_owner: u64,
    /// Streams opened.
    pub streams: u64,
    /// Streams that ended for a newer one of the same host and space.
    pub replaced: u64,
    /// Messages handed to a hub.
    pub messages: u64,
    /// Times that a stream sent faster than it may and was read later.
    pub throttled: u64,
    /// Fetches that were refused because too many of one stream waited.
    pub fetches_dropped: u64,
    /// Fetches that were refused because the contents are too long or could not be read.
    pub unreadable: u64,
    /// Connections that ended without ever having had a stream.
    pub without_stream: u64,
}

/// A stream of a mirror begins.
pub(crate) fn stream_began(space: &str, host: u64, who: &dyn fmt::Display) {
    #[cfg(feature = "metrics")]
    metrics::gauge!("shootdown_grpc_streams", "space" => space.to_owned()).increment(1.0);
    #[cfg(feature = "tracing")]
    tracing::info!(target: "shootdown_grpc", space, host, %who, "stream began");
    let _ = (space, host, who);
}

/// A stream of a mirror has ended. Its epoch goes on.
pub(crate) fn stream_ended(space: &str, host: u64) {
    #[cfg(feature = "metrics")]
    metrics::gauge!("shootdown_grpc_streams", "space" => space.to_owned()).decrement(1.0);
    #[cfg(feature = "tracing")]
    tracing::info!(target: "shootdown_grpc", space, host, "stream ended");
    let _ = (space, host);
}

/// The way to the owner changes.
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

/// What a space's hub counts, told now and then.
#[cfg(any(feature = "tracing", feature = "metrics"))]
pub(crate) mod books {
    use shootdown_lease::OwnerCounts;
    use shootdown_lease::engine::Hub;

    /// Tells what has changed since `before`.
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
