//! The rules of the protocol by name, so that a test can leave one out.

/// A rule of the protocol. A build with the feature `test-util` can leave one out
/// ([`Owner::leave_out`](crate::Owner::leave_out),
/// [`Mirror::leave_out`](crate::Mirror::leave_out)), to check that a simulation notices. Every
/// other build keeps all rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    not(feature = "test-util"),
    allow(dead_code, unreachable_pub, reason = "named where they are kept")
)]
pub enum Rule {
    /// The owner books a member before it sends the welcome (D2).
    BookedBeforeWelcome,
    /// A lease counts from when the mirror asked (D3).
    CountedFromAsking,
    /// A mirror stops by itself before its lease ends (D3).
    StopsByItself,
    /// The owner waits longer than the term, by the drift of the clocks (D3).
    DriftMargin,
    /// Whatever reaches the memory by itself is fenced before its epoch is closed by time (D6).
    Fenced,
    /// A new incarnation of a host does not close the epoch of another one (D1).
    OtherIncarnationsStay,
    /// An owner over memory that survived waits until the leases of earlier boots have ended (D2).
    Quarantine,
    /// A fetch that collided with an invalidation is not installed.
    CollidedFetches,
    /// A fetch of a range under invalidation waits until the memory has changed.
    ParkedFetches,
    /// A mirror acknowledges only after its mappings are flushed.
    AcknowledgedAfterFlush,
    /// A reply counts only for the question with its nonce.
    Nonces,
    /// An acknowledgement counts only for the epoch in which it was requested.
    EpochsOfAcknowledgements,
    /// A mirror leaves an epoch only after its devices have stopped.
    LeftAfterStop,
    /// A mirror enters only the epoch of its newest join.
    NewestWelcome,
}

/// The rule that is left out, if any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Rules {
    #[cfg(feature = "test-util")]
    left_out: Option<Rule>,
}

impl Rules {
    #[cfg(feature = "test-util")]
    pub(crate) fn without(rule: Rule) -> Self {
        Self { left_out: Some(rule) }
    }

    /// Returns `true` unless the rule is left out.
    #[cfg_attr(not(feature = "test-util"), expect(clippy::unused_self, reason = "all are kept"))]
    pub(crate) fn keep(self, rule: Rule) -> bool {
        #[cfg(feature = "test-util")]
        return self.left_out != Some(rule);
        #[cfg(not(feature = "test-util"))]
        {
            let _ = rule;
            true
        }
    }
}
