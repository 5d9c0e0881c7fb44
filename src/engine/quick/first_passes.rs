//! The first passes of an invalidation and the first polls of its passes, in one inlined piece.
#![forbid(unsafe_code)]

use crate::engine::host::Host;
use crate::engine::work::Work;
use crate::engine::work::first_passes::{Called, Reached, advance_from, call_from, go_on};
use crate::foreign::keep;
use crate::notifier::{Invalidation, Request};

/// Calls the first passes in order (O1), then polls each pass once, in order (O2, O3).
///
/// The plain form is [`advance_from`]. Leaves for it if there is a pass budget, and for its second
/// half ([`go_on`]) if a first pass panicked or refused, or a pass is pending or panicked.
#[inline(always)]
pub(super) fn advance(
    host: &Host,
    work: &mut Work,
    request: &Request<'_>,
    sequence: u64,
) -> Reached {
    if host.budget.is_some() {
        return advance_from(host, work, request, sequence, 0);
    }
    let mut at = 0;
    let (hits, passes) = work.split();
    let Some(first) = hits.first() else { return Reached::Plainly };
    let mut invalidation = Invalidation { request, sequence, own: &first.own };
    // One landing pad for all first passes.
    let called = keep(|inside| {
        call_from::<false>(inside, host, &mut invalidation, request, hits, passes, &mut at)
    });
    if matches!(called, Ok(Called::All)) {
        let plain = match passes.started() {
            0 => true,
            1 => passes.first_poll(host),
            _ => passes.first_polls(host, 0),
        };
        if plain {
            return Reached::Plainly;
        }
    }
    go_on(host, work, request, sequence, at, called)
}
