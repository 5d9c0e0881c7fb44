//! An owner, two mirrors that hold one range, and a network: what can happen next in each state.

use shootdown::{AddressRange, RangeSet};
use shootdown_lease::{
    Boot, Decision, Ending, Epoch, Host, Incarnation, InvalidationId, Memory, Mirror,
    MirrorDecision, MirrorSettings, Owner, Rule, Terms, Time, ToMirror, ToOwner,
};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

/// Half a term. A mirror may ask once in each.
const UNIT: u64 = 1_000_000;

/// Bounds of an exploration; times are in units.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// 1 or 2.
    pub mirrors: usize,
    /// Whether both mirrors hold the range at the start; else nobody has joined.
    pub joined: bool,
    /// The last moment.
    pub horizon: u64,
    /// How many messages are on their way at most, each way; what is sent beyond that is lost.
    pub in_flight: usize,
    pub invalidations: u8,
    pub fetches: u8,
    pub lost: u8,
    pub doubled: u8,
    /// Crashes of the owner; the memory survives.
    pub restarts: u8,
    /// One of so many states is tried for a way to the end.
    pub tried: usize,
    pub without: Option<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Side {
    mirror: Mirror,
    /// What it holds: by which epoch, and which version of the memory.
    held: Option<(Epoch, u64)>,
    fetching: bool,
    /// The version that comes with the reply that is handled now.
    arrived: u64,
    flushing: Vec<(Epoch, InvalidationId)>,
    stopping: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    now: u64,
    owner: Owner,
    sides: [Side; 2],
    /// To the owner, from whom; unordered.
    asked: Vec<(usize, ToOwner)>,
    /// To a mirror, with the version that was read for it; unordered.
    told: Vec<(usize, ToMirror, u64)>,
    version: u64,
    running: Vec<InvalidationId>,
    to_write: Vec<InvalidationId>,
    to_end: Vec<InvalidationId>,
    left: [u8; 5],
    /// An invalidation was done for one who had not let go.
    early: bool,
}

const INVALIDATIONS: usize = 0;
const FETCHES: usize = 1;
const LOST: usize = 2;
const DOUBLED: usize = 3;
const RESTARTS: usize = 4;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Time goes on, whoever has something to do: code may stand still.
    Unit,
    TickOwner,
    TickMirror(usize),
    /// Handled, and on its way once more if `again`.
    ToOwner {
        at: usize,
        again: bool,
    },
    ToMirror {
        at: usize,
        again: bool,
    },
    LoseToOwner(usize),
    LoseToMirror(usize),
    Fetch(usize),
    Flushed(usize),
    Stopped(usize),
    Invalidate,
    Write,
    End,
    Restart,
}

fn range() -> AddressRange {
    AddressRange::new(0x1000, 0x1000).unwrap()
}

fn terms() -> Terms {
    let mut terms = Terms::new(Duration::from_nanos(2 * UNIT));
    (terms.drift_ppm, terms.patience, terms.resend) =
        (0, Duration::from_nanos(UNIT), Duration::from_nanos(UNIT));
    terms
}

impl State {
    fn new(bounds: &Bounds) -> Self {
        let now = Time::from_nanos(0);
        let mut settings = MirrorSettings::default();
        settings.retry = Duration::from_nanos(UNIT);
        let side = |life| {
            let mut mirror = Mirror::new(Incarnation(life), settings.clone(), now);
            bounds.without.into_iter().for_each(|rule| mirror.leave_out(rule));
            Side {
                mirror,
                held: None,
                fetching: false,
                arrived: 0,
                flushing: Vec::new(),
                stopping: false,
            }
        };
        let mut owner = Owner::new(Boot(1), terms(), Memory::New, now).unwrap();
        bounds.without.into_iter().for_each(|rule| owner.leave_out(rule));
        let mut state = Self {
            now: 0,
            owner,
            sides: [side(1), side(2)],
            asked: Vec::new(),
            told: Vec::new(),
            version: 0,
            running: Vec::new(),
            to_write: Vec::new(),
            to_end: Vec::new(),
            left: [
                bounds.invalidations,
                bounds.fetches,
                bounds.lost,
                bounds.doubled,
                bounds.restarts,
            ],
            early: false,
        };
        if bounds.joined {
            for side in 0..bounds.mirrors {
                state.act(&Action::TickMirror(side), bounds);
                state.quiet(bounds);
                state.act(&Action::Fetch(side), bounds);
                state.quiet(bounds);
            }
            state.left[FETCHES] = bounds.fetches;
            assert!(state.sides[..bounds.mirrors].iter().all(|side| side.held.is_some()));
        }
        state
    }

    /// Delivers all that is on its way, and does all that is to be done at once.
    fn quiet(&mut self, bounds: &Bounds) {
        loop {
            let side = |of: fn(&Side) -> bool| self.sides.iter().position(of);
            let action = if !self.asked.is_empty() {
                Action::ToOwner { at: 0, again: false }
            } else if !self.told.is_empty() {
                Action::ToMirror { at: 0, again: false }
            } else if let Some(side) = side(|side| !side.flushing.is_empty()) {
                Action::Flushed(side)
            } else if let Some(side) = side(|side| side.stopping) {
                Action::Stopped(side)
            } else if !self.to_write.is_empty() {
                Action::Write
            } else if !self.to_end.is_empty() {
                Action::End
            } else {
                return;
            };
            self.act(&action, bounds);
        }
    }

    /// Whether everything ends if nothing goes wrong any more, what is on its way being lost or
    /// not.
    fn can_end(&self, bounds: &Bounds, lost: bool) -> bool {
        let mut state = self.clone();
        let bounds = Bounds { in_flight: 100, ..bounds.clone() };
        if lost {
            state.asked.clear();
            state.told.clear();
        }
        for _ in 0..200 {
            state.quiet(&bounds);
            let joined =
                |side: &Side| side.mirror.epoch().is_some_and(|epoch| state.owner.is_live(epoch));
            if state.running.is_empty() && state.sides[..bounds.mirrors].iter().all(joined) {
                return true;
            }
            state.act(&Action::Unit, &bounds);
            state.act(&Action::TickOwner, &bounds);
            for side in 0..bounds.mirrors {
                state.act(&Action::TickMirror(side), &bounds);
            }
        }
        false
    }

    /// Somebody may use, and take for good, what is not current.
    fn is_stale(&self) -> bool {
        let now = Time::from_nanos(self.now);
        self.sides.iter().any(|side| {
            side.mirror.is_valid(now)
                && side.held.is_some_and(|(_, version)| version < self.version)
        })
    }

    fn act(&mut self, action: &Action, bounds: &Bounds) {
        let now = Time::from_nanos(self.now);
        match action {
            Action::Unit => self.now += UNIT,
            Action::TickOwner => self.owner.tick(now),
            Action::TickMirror(side) => self.sides[*side].mirror.tick(now),
            Action::ToOwner { at, again } => {
                let (side, message) =
                    if *again { self.asked[*at].clone() } else { self.asked.remove(*at) };
                self.left[DOUBLED] -= u8::from(*again);
                self.owner.handle(Host(side as u64), message, now);
            }
            Action::ToMirror { at, again } => {
                let (side, message, version) =
                    if *again { self.told[*at].clone() } else { self.told.remove(*at) };
                self.left[DOUBLED] -= u8::from(*again);
                self.sides[side].arrived = version;
                self.sides[side].mirror.handle(message, now);
            }
            Action::LoseToOwner(at) => {
                self.asked.remove(*at);
                self.left[LOST] -= 1;
            }
            Action::LoseToMirror(at) => {
                self.told.remove(*at);
                self.left[LOST] -= 1;
            }
            Action::Fetch(side) => {
                self.left[FETCHES] = self.left[FETCHES].saturating_sub(1);
                let side = &mut self.sides[*side];
                side.fetching = side.mirror.fetch(range(), now).is_ok();
            }
            Action::Flushed(side) => {
                let side = &mut self.sides[*side];
                let (epoch, invalidation) = side.flushing.remove(0);
                side.held = side.held.filter(|(of, _)| *of != epoch);
                side.mirror.invalidated(epoch, invalidation, now);
            }
            Action::Stopped(side) => {
                let side = &mut self.sides[*side];
                (side.held, side.stopping) = (None, false);
                side.mirror.stopped(now);
            }
            Action::Invalidate => {
                self.left[INVALIDATIONS] -= 1;
                let id = self.owner.invalidate(RangeSet::from(range()), now);
                self.running.push(id);
            }
            Action::Write => {
                self.to_end.push(self.to_write.remove(0));
                self.version += 1;
            }
            Action::End => {
                let id = self.to_end.remove(0);
                self.running.retain(|of| *of != id);
                self.owner.end(id, now).unwrap();
            }
            Action::Restart => {
                self.left[RESTARTS] -= 1;
                let boot = Boot(self.owner.boot().0 + 1);
                self.owner = Owner::new(boot, terms(), Memory::Survived, now).unwrap();
                bounds.without.into_iter().for_each(|rule| self.owner.leave_out(rule));
                for list in [&mut self.running, &mut self.to_write, &mut self.to_end] {
                    list.clear();
                }
            }
        }
        self.settle(bounds);
    }

    /// Takes what the state machines say, and puts it in an order that does not tell of the past.
    fn settle(&mut self, bounds: &Bounds) {
        while let Some((to, message)) = self.owner.next_message() {
            self.told.push((to.0 as usize, message, 0));
        }
        while let Some(decision) = self.owner.next_decision() {
            match decision {
                Decision::Done { invalidation, endings } => {
                    let held = |of: Epoch| {
                        self.sides
                            .iter()
                            .any(|side| side.held.is_some_and(|(epoch, _)| epoch == of))
                    };
                    self.early |= endings
                        .iter()
                        .any(|(epoch, ending)| *ending != Ending::Expired && held(*epoch));
                    self.to_write.push(invalidation);
                }
                Decision::Serve { to, epoch, nonce, version, .. } => {
                    self.told.push((
                        to.0 as usize,
                        Owner::fetched(epoch, nonce, version),
                        self.version,
                    ));
                }
                other => unreachable!("{other:?}"),
            }
        }
        for (number, side) in self.sides.iter_mut().enumerate() {
            while let Some(message) = side.mirror.next_message() {
                self.asked.push((number, message));
            }
            while let Some(decision) = side.mirror.next_decision() {
                match decision {
                    MirrorDecision::Invalidate { epoch, invalidation, .. } => {
                        side.flushing.push((epoch, invalidation))
                    }
                    MirrorDecision::Stop { .. } => (side.stopping, side.fetching) = (true, false),
                    MirrorDecision::Install { .. } => {
                        side.fetching = false;
                        side.held = side.mirror.epoch().map(|epoch| (epoch, side.arrived));
                    }
                    MirrorDecision::Collided { .. } => side.fetching = false,
                    _ => {}
                }
            }
            side.arrived = 0;
            side.mirror.forget_counts();
        }
        self.owner.forget_counts();
        self.asked.truncate(bounds.in_flight);
        self.told.truncate(bounds.in_flight);
        self.asked.sort_by_cached_key(hash);
        self.told.sort_by_cached_key(hash);
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Where a list has something new: equal messages are one choice.
fn choices<T: PartialEq>(list: &[T]) -> impl Iterator<Item = usize> + '_ {
    (0..list.len()).filter(|at| *at == 0 || list[*at] != list[at - 1])
}

impl State {
    fn actions(&self, bounds: &Bounds) -> Vec<Action> {
        let (state, mut actions) = (self, Vec::new());
        let due = |deadline: Option<Time>| {
            deadline.is_some_and(|deadline| deadline.as_nanos() <= state.now)
        };
        if state.now < bounds.horizon * UNIT {
            actions.push(Action::Unit);
        }
        if due(state.owner.deadline()) {
            actions.push(Action::TickOwner);
        }
        for at in choices(&state.asked) {
            actions.push(Action::ToOwner { at, again: false });
            actions
                .extend((state.left[DOUBLED] > 0).then_some(Action::ToOwner { at, again: true }));
            actions.extend((state.left[LOST] > 0).then_some(Action::LoseToOwner(at)));
        }
        for at in choices(&state.told) {
            actions.push(Action::ToMirror { at, again: false });
            actions
                .extend((state.left[DOUBLED] > 0).then_some(Action::ToMirror { at, again: true }));
            actions.extend((state.left[LOST] > 0).then_some(Action::LoseToMirror(at)));
        }
        for (number, side) in state.sides[..bounds.mirrors].iter().enumerate() {
            let wants = side.held.is_none() && !side.fetching && side.mirror.epoch().is_some();
            actions.extend(due(side.mirror.deadline()).then_some(Action::TickMirror(number)));
            actions.extend((wants && state.left[FETCHES] > 0).then_some(Action::Fetch(number)));
            actions.extend((!side.flushing.is_empty()).then_some(Action::Flushed(number)));
            actions.extend(side.stopping.then_some(Action::Stopped(number)));
        }
        actions.extend((state.left[INVALIDATIONS] > 0).then_some(Action::Invalidate));
        actions.extend((!state.to_write.is_empty()).then_some(Action::Write));
        actions.extend((!state.to_end.is_empty()).then_some(Action::End));
        actions.extend((state.left[RESTARTS] > 0).then_some(Action::Restart));
        actions
    }
}

/// What an exploration has found.
#[derive(Debug, Default)]
pub struct Found {
    pub states: usize,
    /// What went wrong, and how it came to it.
    pub wrong: Option<(&'static str, Vec<Action>)>,
    /// States with something to be waited for: an invalidation that has ended, a mirror that holds
    /// what is not current and may not use it, one that has fetched what has changed.
    pub ended: usize,
    pub outlived: usize,
    pub fetched: usize,
    /// From how many a way to the end was tried.
    pub tried: usize,
}

impl Found {
    fn look(&mut self, state: &State, bounds: &Bounds) -> Option<&'static str> {
        self.states += 1;
        let holds = |of: fn(u64, u64) -> bool| {
            state
                .sides
                .iter()
                .any(|side| side.held.is_some_and(|(_, held)| of(held, state.version)))
        };
        self.ended += usize::from(state.version > 0);
        self.outlived += usize::from(holds(|held, current| held < current));
        self.fetched += usize::from(holds(|held, _| held > 0));
        if state.is_stale() {
            return Some("something stale may be used");
        }
        if state.early {
            return Some("who was waited for has not let go");
        }
        if self.states.is_multiple_of(bounds.tried) {
            self.tried += 1;
            if !(state.can_end(bounds, false) && state.can_end(bounds, true)) {
                return Some("there is no way to the end");
            }
        }
        None
    }
}

/// All states up to the bounds, depth first, until something is wrong. Two states are one if their
/// hashes of 64 bits are.
pub fn explore(bounds: &Bounds) -> Found {
    let mut found = Found::default();
    let first = State::new(bounds);
    // How each was come to: from which, by the how manieth action.
    let mut open = vec![(hash(&first), first)];
    let mut ways: HashMap<u64, (u64, u16)> = HashMap::from([(open[0].0, (0, 0))]);
    while let Some((from, state)) = open.pop() {
        if let Some(wrong) = found.look(&state, bounds) {
            found.wrong = Some((wrong, way_to(from, &ways, bounds)));
            break;
        }
        for (number, action) in state.actions(bounds).iter().enumerate() {
            let mut next = state.clone();
            next.act(action, bounds);
            let hash = hash(&next);
            if let Entry::Vacant(way) = ways.entry(hash) {
                way.insert((from, number as u16));
                open.push((hash, next));
            }
        }
    }
    found
}

fn way_to(mut at: u64, ways: &HashMap<u64, (u64, u16)>, bounds: &Bounds) -> Vec<Action> {
    let mut numbers = Vec::new();
    let mut state = State::new(bounds);
    while at != hash(&state) {
        let (from, number) = ways[&at];
        numbers.push(number);
        at = from;
    }
    let mut take = |number: u16| {
        let action = state.actions(bounds).swap_remove(usize::from(number));
        state.act(&action, bounds);
        action
    };
    numbers.into_iter().rev().map(&mut take).collect()
}
