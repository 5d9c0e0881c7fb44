//! Patience with a future that could end its invalidation and is not polled (C4).
//!
//! A plain state machine. It is told the time and answers which invalidations lapse. The time since
//! the passes were done decides. The number of looks matters only where time alone would be unjust:
//! after a thread was held up, without a clock, or with a clock that stands still.
//!
//! No waiting future sleeps while an invalidation is not claimed. The library has no timer and no
//! thread of its own. So it could not wake a sleeper if the future that is awake were never polled
//! again. Each waiting future yields, to its executor and to the operating system. *One* of them,
//! the watchman, looks at the clock.
#![forbid(unsafe_code)]

use crate::engine::state::Ticket;
use crate::engine::wakers::Bell;
use crate::sync::Arc;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::time::Duration;

/// The patience with a future that has not lapsed before, unless the space has a setting for it.
const FIRST: Duration = Duration::from_millis(20);
/// The longest patience. It doubles with each lapse of the same future, up to this.
const MOST: Duration = Duration::from_secs(1);
/// How often in a row the watchman looks before a future lapses whose time is over. Other tasks
/// have a turn between two looks.
const LOOKS: u64 = if cfg!(loom) { 1 } else { 16 };
/// Without a clock, the patience of a first lapse is over after this many looks.
const TICKS: u32 = if cfg!(loom) { 1 } else { 64 };
/// A clock that shows the same time this often in a row is taken to stand still.
const STILL: u32 = 1024;
/// A gap between two looks of more than this part of the first patience means that the watchman was
/// held up, and maybe other tasks, too. After it the looks count anew, once for each invalidation.
/// So an invalidation lapses even if all looks are that far apart.
const HELD_UP: u32 = 4;
/// After this many yields in a row a waiting future lets others go first for one turn.
const IN_A_ROW: u32 = if cfg!(loom) { 1000 } else { 32 };
/// A waiting future becomes the watchman if it is polled this often without a look of the present
/// one.
const ABSENT: u32 = if cfg!(loom) { 2 } else { 64 };
/// After this many polls of a waiter with the future's own waker, it is certain that the future's
/// task was polled and did not poll the future. Doubles with each lapse.
const CERTAIN: u64 = if cfg!(loom) { 2 } else { 4 };

/// The clock of patience, and the unclaimed invalidations that futures wait for.
pub(crate) struct Patience {
    first: Duration,
    waiting: BTreeMap<Ticket, Entry>,
    /// The keys of `waiting` by the time at which patience ends.
    ends: BTreeSet<(Duration, Ticket)>,
    /// How many entries have no stamp.
    unstamped: usize,
    looks: u64,
    /// The time that the clock showed last.
    shown: Duration,
    /// How often in a row it has shown that.
    still: u32,
    /// Added to the time of the clock: ticks while there was no clock or it stood still, and each
    /// step back of the clock.
    skew: Duration,
    watchman: Option<u64>,
    /// Rises with each look, and with each change of the watchman.
    turns: u64,
    next_waiter: u64,
    /// Bells of futures that rest. The next future that takes the lock wakes them.
    resting: Vec<Arc<Bell>>,
}

/// An unclaimed invalidation that a future waits for.
struct Entry {
    until: Duration,
    /// The patience from the next look on, if it is not known when the passes were done.
    unstamped: Option<Duration>,
    /// Looks count from this one on.
    from: u64,
    /// A gap between two looks has made the looks count anew, which happens once.
    had_gap: bool,
}

/// A waiting future's part in the watch.
#[derive(Default)]
pub(crate) struct Watch {
    /// The number of the future; 0 before it has one.
    me: u64,
    /// The count of turns that it saw last.
    seen: u64,
    /// How often in a row it has seen that.
    unchanged: u32,
    /// How often it has yielded since it last rested.
    in_a_row: u32,
}

impl Patience {
    pub(crate) fn new(first: Option<Duration>) -> Self {
        Self {
            first: first.unwrap_or(FIRST),
            waiting: BTreeMap::new(),
            ends: BTreeSet::new(),
            unstamped: 0,
            looks: 0,
            shown: Duration::ZERO,
            still: 0,
            skew: Duration::ZERO,
            watchman: None,
            turns: 0,
            next_waiter: 1,
            resting: Vec::new(),
        }
    }

    /// Returns the patience with a future that has lapsed `lapses` times.
    pub(crate) fn with(&self, lapses: u32) -> Duration {
        self.first.saturating_mul(2u32.saturating_pow(lapses)).min(MOST.max(self.first))
    }

    /// Returns how many polls make it certain that a task does not poll its future. More after each
    /// lapse.
    pub(crate) fn certain_after(lapses: u32) -> u64 {
        CERTAIN << lapses.min(8)
    }

    /// Begins to wait for the future of `ticket`. Its passes were done at `done`, if that is known.
    pub(crate) fn begin(&mut self, ticket: Ticket, done: Option<Duration>, lapses: u32) {
        let patience = self.with(lapses);
        if let Some(done) = done {
            self.go_back_to(done);
        }
        let until = match done {
            Some(done) => done.saturating_add(self.skew).saturating_add(patience),
            None => Duration::MAX,
        };
        let unstamped = done.is_none().then_some(patience);
        self.unstamped += usize::from(done.is_none());
        self.ends.insert((until, ticket));
        self.waiting.insert(ticket, Entry { until, unstamped, from: self.looks, had_gap: false });
    }

    /// Notes that the clock has gone back, if it has. Times that were over stay over, and what
    /// begins from now on is measured from the new time.
    fn go_back_to(&mut self, now: Duration) {
        if now < self.shown {
            self.skew = self.skew.saturating_add(self.shown - now);
            (self.shown, self.still) = (now, 0);
        }
    }

    /// Stops waiting for the future of `ticket`: it was claimed or has ended, or no future waits
    /// any more.
    pub(crate) fn end(&mut self, ticket: Ticket) {
        if let Some(entry) = self.waiting.remove(&ticket) {
            self.ends.remove(&(entry.until, ticket));
            self.unstamped -= usize::from(entry.unstamped.is_some());
        }
    }

    /// Returns whether the waiting future is the watchman, who looks at the clock. It becomes that
    /// if there is none, or if the present one has not looked for a while.
    pub(crate) fn is_watchman(&mut self, watch: &mut Watch) -> bool {
        if watch.me == 0 {
            watch.me = self.next_waiter;
            self.next_waiter += 1;
        }
        watch.unchanged = if watch.seen == self.turns { watch.unchanged + 1 } else { 0 };
        watch.seen = self.turns;
        if self.watchman.is_none() || watch.unchanged > ABSENT {
            self.watchman = Some(watch.me);
            self.turns += 1;
            (watch.seen, watch.unchanged) = (self.turns, 0);
        }
        self.watchman == Some(watch.me)
    }

    /// Decides how a waiting future yields. Returns whether it wakes itself.
    ///
    /// Now and then it rests instead, if another future `comes` at this moment, which will see it
    /// resting and wake it. Some executors poll a task that has woken itself again at once, and
    /// then no other task on that thread would have a turn.
    pub(crate) fn wakes_itself(
        &mut self,
        watch: &mut Watch,
        comes: bool,
        bell: &Arc<Bell>,
    ) -> bool {
        watch.in_a_row += 1;
        let rests = watch.in_a_row > IN_A_ROW && comes;
        if rests {
            watch.in_a_row = 0;
            self.resting.push(bell.clone());
        }
        !rests
    }

    /// Takes the bells of the futures that rest, to be rung.
    pub(crate) fn take_resting(&mut self) -> Vec<Arc<Bell>> {
        core::mem::take(&mut self.resting)
    }

    /// Gives the watch up, if the future has it: it goes, or has nothing to wait for.
    pub(crate) fn give_watch_up(&mut self, watch: &Watch) {
        if self.watchman == Some(watch.me) {
            self.watchman = None;
        }
    }

    /// Notes a look of the watchman; the clock shows `now`, if there is one. Returns the
    /// invalidations whose time is over.
    pub(crate) fn look(&mut self, now: Option<Duration>) -> Vec<Ticket> {
        self.looks += 1;
        self.turns += 1;
        let tick = (self.first / TICKS).clamp(Duration::from_nanos(1), MOST);
        let mut gap = false;
        match now {
            Some(now) if now > self.shown => {
                gap = now - self.shown > self.first / HELD_UP;
                (self.shown, self.still) = (now, 0);
            }
            Some(now) if now < self.shown => self.go_back_to(now),
            Some(_) if self.still < STILL => self.still += 1,
            None | Some(_) => self.skew = self.skew.saturating_add(tick),
        }
        let time = self.shown.saturating_add(self.skew);
        if gap || self.unstamped > 0 {
            self.revise(time, gap);
        }
        let Self { waiting, ends, looks, .. } = self;
        let over = ends.iter().take_while(|(until, _)| *until <= time && *until < Duration::MAX);
        let has_had_its_turns =
            |ticket: &Ticket| waiting.get(ticket).is_some_and(|entry| *looks >= entry.from + LOOKS);
        over.map(|(_, ticket)| *ticket).filter(has_had_its_turns).collect()
    }

    /// Gives a stamp to each entry that has none, and notes a gap in each.
    #[cold]
    fn revise(&mut self, time: Duration, gap: bool) {
        self.unstamped = 0;
        for (ticket, entry) in &mut self.waiting {
            if let Some(patience) = entry.unstamped.take() {
                self.ends.remove(&(entry.until, *ticket));
                entry.until = time.saturating_add(patience);
                self.ends.insert((entry.until, *ticket));
            }
            if gap && !core::mem::replace(&mut entry.had_gap, true) {
                entry.from = self.looks;
            }
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    fn ticket(serial: u64) -> Ticket {
        Ticket::from_raw(serial)
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn c4_patience_never_falls_however_often_a_future_lapses() {
        let patience = Patience::new(None);
        let with: Vec<Duration> =
            (0..100).chain([u32::MAX]).map(|lapses| patience.with(lapses)).collect();
        assert!(with.is_sorted(), "{with:?}");
        assert_eq!((with[0], with[1], with[100]), (ms(20), ms(40), ms(1000)));
        assert_eq!(Patience::new(Some(ms(3000))).with(7), ms(3000));
    }

    /// Looks every 100 µs until a time is over. Returns when.
    fn until_over(patience: &mut Patience, mut now: Duration) -> Duration {
        for _ in 0..1_000_000 {
            if !patience.look(Some(now)).is_empty() {
                return now;
            }
            now += Duration::from_micros(100);
        }
        panic!("nothing lapses");
    }

    #[test]
    fn c4_time_counts_since_the_passes_were_done() {
        for (lapses, expected) in [(0, 20), (1, 40), (6, 1000)] {
            let mut patience = Patience::new(None);
            patience.begin(ticket(1), Some(ms(500)), lapses);
            let over = until_over(&mut patience, ms(501));
            assert!(
                (ms(500 + expected)..ms(501 + expected)).contains(&over),
                "{lapses} lapses: {over:?}"
            );
        }
    }

    #[test]
    fn c4_after_a_gap_everybody_has_a_turn_first() {
        let mut patience = Patience::new(None);
        patience.begin(ticket(1), Some(ms(0)), 0);
        for _ in 0..100 {
            assert_eq!(patience.look(Some(ms(1))), []);
        }
        // The executor was held up for a second.
        for look in 0..LOOKS {
            assert_eq!(
                patience.look(Some(ms(1000) + Duration::from_micros(look))),
                [],
                "look {look}"
            );
        }
        assert_eq!(patience.look(Some(ms(1001))), [ticket(1)]);
    }

    #[test]
    fn c4_turns_that_are_far_apart_are_turns_too() {
        for (first, step) in [(20, 6), (20, 100), (1, 1), (0, 1)] {
            let mut patience = Patience::new(Some(ms(first)));
            patience.begin(ticket(1), Some(ms(0)), 0);
            let over = (1..1000).find(|look| !patience.look(Some(ms(look * step))).is_empty());
            assert!(
                over.is_some_and(|look| look <= 2 * LOOKS + first),
                "patience of {first} ms, a turn every {step} ms: {over:?}"
            );
        }
    }

    #[test]
    fn c4_a_clock_that_fails_or_jumps_makes_nobody_lapse_early() {
        // It failed when the passes were done, long after the last look.
        let mut patience = Patience::new(None);
        patience.look(Some(ms(1)));
        patience.begin(ticket(1), None, 0);
        assert_eq!(until_over(&mut patience, ms(5000)).as_millis(), 5020);
        // It was an hour ahead once.
        let mut patience = Patience::new(None);
        patience.look(Some(ms(3_600_000)));
        patience.look(Some(ms(10)));
        patience.begin(ticket(2), Some(ms(10)), 0);
        assert_eq!(until_over(&mut patience, ms(10)).as_millis(), 30);
    }

    #[test]
    fn c4_a_clock_that_goes_back_while_a_future_waits_adds_nothing_to_its_time() {
        let mut patience = Patience::new(None);
        patience.begin(ticket(1), Some(ms(1)), 0);
        assert_eq!(patience.look(Some(ms(10))), []);
        // 9 of 20 ms are over.
        assert_eq!(until_over(&mut patience, ms(4)).as_millis(), 15);
    }

    #[test]
    fn c4_the_longest_patience_never_ends() {
        let mut patience = Patience::new(Some(Duration::MAX));
        patience.begin(ticket(1), Some(ms(7)), 0);
        assert!((0..10_000).all(|_| patience.look(Some(ms(7))).is_empty()));
        patience.begin(ticket(2), None, 3);
        assert!((0..10_000).all(|_| patience.look(None).is_empty()));
    }

    #[test]
    fn c4_who_yields_often_rests_only_if_somebody_comes_who_will_see_it() {
        let (mut patience, bell) = (Patience::new(None), Arc::new(Bell::default()));
        let mut watch = Watch::default();
        for _ in 0..10 * IN_A_ROW {
            assert!(patience.wakes_itself(&mut watch, false, &bell), "alone");
        }
        assert!(!patience.wakes_itself(&mut watch, true, &bell));
        assert_eq!(patience.take_resting().len(), 1);
        for _ in 0..IN_A_ROW {
            assert!(patience.wakes_itself(&mut watch, true, &bell), "not at each turn");
        }
        assert!(!patience.wakes_itself(&mut watch, true, &bell));
    }

    #[test]
    fn c4_without_a_clock_and_with_one_that_stands_still_looks_count() {
        let looks = |now: Option<Duration>| {
            let mut patience = Patience::new(None);
            patience.begin(ticket(1), now, 0);
            (1..10_000).find(|_| !patience.look(now).is_empty())
        };
        assert_eq!(looks(None), Some(TICKS + 1));
        assert_eq!(looks(Some(ms(5))), Some(1 + STILL + TICKS));
    }

    #[test]
    fn c4_there_is_one_watchman_and_another_one_takes_over_if_it_stops_looking() {
        let mut patience = Patience::new(None);
        let [mut first, mut second] = [Watch::default(), Watch::default()];
        assert!(patience.is_watchman(&mut first));
        for _ in 0..1000 {
            patience.look(None);
            assert!(patience.is_watchman(&mut first) && !patience.is_watchman(&mut second));
        }
        let polls = (1..1000).find(|_| patience.is_watchman(&mut second));
        assert_eq!(polls, Some(ABSENT + 1));
        assert!(!patience.is_watchman(&mut first));
        patience.give_watch_up(&first);
        assert!(patience.is_watchman(&mut second));
        patience.give_watch_up(&second);
        assert!(patience.is_watchman(&mut first));
    }

    proptest! {
        /// No invalidation lapses before its time, and each that is still waited for lapses soon
        /// after it.
        #[test]
        fn c4_nobody_lapses_early_and_nobody_is_forgotten(
            waits in proptest::collection::vec((0..50u64, 0..3u32, any::<bool>()), 1..20),
            steps in proptest::collection::vec(1..9000u64, 400),
        ) {
            let mut patience = Patience::new(None);
            let mut expected = vec![];
            for (serial, (done, lapses, ended)) in (1..).zip(waits) {
                patience.begin(ticket(serial), Some(ms(done)), lapses);
                if ended {
                    patience.end(ticket(serial));
                } else {
                    expected.push((ms(done) + patience.with(lapses), ticket(serial)));
                }
            }
            let mut now = Duration::ZERO;
            for step in steps {
                now += Duration::from_micros(step);
                for over in patience.look(Some(now)) {
                    let at = expected.iter().position(|(_, ticket)| *ticket == over).expect("nobody waits for it");
                    let (until, _) = expected.swap_remove(at);
                    prop_assert!(until <= now);
                    patience.end(over);
                }
            }
            prop_assert!(expected.iter().all(|(until, _)| *until + ms(300) > now), "forgotten: {expected:?} at {now:?}");
        }
    }
}
