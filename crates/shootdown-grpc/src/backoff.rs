//! Waits between tries.
#![forbid(unsafe_code)]

use std::time::Duration;

/// A wait that doubles each time. Up to half of it is left out at random.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
    last: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first, last: Duration::ZERO }
    }

    /// Returns the upper bound of the last wait. A connection that has lasted longer counts as a
    /// success.
    pub(crate) fn last(&self) -> Duration {
        self.last
    }

    /// Records a success: the next wait is the first one again.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }

    /// Makes the next wait the longest one.
    pub(crate) fn slow_down(&mut self) {
        self.next = self.longest;
    }

    pub(crate) fn next(&mut self) -> Duration {
        let whole = self.next;
        self.last = whole;
        self.next = whole.saturating_mul(2).min(self.longest);
        whole.mul_f64(1.0 - fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_the_longest_and_varies_by_half() {
        let (first, longest) = (Duration::from_millis(10), Duration::from_millis(35));
        for _ in 0..1_000 {
            let mut backoff = Backoff::new(first, longest);
            for whole in [10, 20, 35, 35].map(Duration::from_millis) {
                let next = backoff.next();
                assert!(whole / 2 <= next && next <= whole, "{next:?} of {whole:?}");
            }
            backoff.reset();
            assert!(backoff.next() <= first);
            backoff.slow_down();
            assert!(backoff.next() >= longest / 2);
        }
    }
}
