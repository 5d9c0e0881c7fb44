//! A device that does as its test tells it to, and keeps its registrations beyond the cache, as a
//! network card's protection domain does.

use crate::support::{Gate, PAGE, Yields};
use shootdown::AddressRange;
use shootdown::cache::{Device, StillRegistered};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

/// What the device does when it is called.
#[derive(Clone, Copy, PartialEq)]
pub enum Act {
    Refuse,
    Panic,
    /// In the poll of its future.
    PanicLater,
    Succeed,
}

#[derive(Default)]
pub struct State {
    pub mapped: BTreeMap<u64, AddressRange>,
    /// What comes next; after that it succeeds.
    pub register: VecDeque<Act>,
    pub deregister: VecDeque<Act>,
    pub registered: u64,
    /// Whether what it has registered is still valid: what it answers next, and how often it was
    /// asked.
    pub valid: VecDeque<Act>,
    pub asked: u64,
    pub calls_of_deregister: u64,
    /// More than this it does not map.
    pub room: Option<usize>,
    /// More pages at once than this it refuses.
    pub largest: Option<u64>,
    /// It refuses what overlaps something mapped, as CUDA does.
    pub exclusive: bool,
    /// What a panic has left mapped stays so.
    pub never_resets: bool,
}

#[derive(Clone, Default)]
pub struct Card {
    pub state: Arc<Mutex<State>>,
    /// What registrations and deregistrations wait for.
    pub register_gate: Option<Gate>,
    pub deregister_gate: Option<Gate>,
    /// Taken by each call, as a vendor library's lock would be.
    pub lock: Arc<Mutex<()>>,
}

#[derive(Debug)]
pub struct Refused;

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("refused")
    }
}

impl std::error::Error for Refused {}

impl Card {
    pub fn mapped(&self) -> Vec<u64> {
        self.state.lock().unwrap().mapped.values().map(|range| range.start() / PAGE).collect()
    }

    pub fn next_register(&self, acts: &[Act]) {
        self.state.lock().unwrap().register.extend(acts);
    }

    pub fn next_deregister(&self, acts: &[Act]) {
        self.state.lock().unwrap().deregister.extend(acts);
    }
}

/// A panic that the hook does not print.
pub fn throw(message: &'static str) -> ! {
    std::panic::resume_unwind(Box::new(message))
}

async fn does(act: Act, gate: Option<Gate>) -> Result<(), Refused> {
    if let Some(gate) = gate {
        gate.await;
    }
    Yields(1).await;
    match act {
        Act::Refuse => Err(Refused),
        Act::PanicLater => throw("the card fails later"),
        Act::Succeed | Act::Panic => Ok(()),
    }
}

impl Device for Card {
    type Handle = u64;
    type Error = Refused;

    fn register(&self, range: AddressRange) -> impl Future<Output = Result<u64, Refused>> + Send {
        let act = self.state.lock().unwrap().register.pop_front().unwrap_or(Act::Succeed);
        if act == Act::Panic {
            throw("the card fails at once");
        }
        async move {
            does(act, self.register_gate.clone()).await?;
            let _lock = self.lock.lock().unwrap();
            let mut state = self.state.lock().unwrap();
            let full = state.room.is_some_and(|room| state.mapped.len() >= room);
            let overlaps =
                state.exclusive && state.mapped.values().any(|mapped| mapped.overlaps(range));
            let large =
                state.largest.is_some_and(|most| range.len().is_none_or(|len| len > most * PAGE));
            if full || overlaps || large {
                return Err(Refused);
            }
            state.registered += 1;
            let key = state.registered;
            state.mapped.insert(key, range);
            Ok(key)
        }
    }

    fn deregister(
        &self,
        range: AddressRange,
        key: u64,
    ) -> impl Future<Output = Result<(), StillRegistered<u64, Refused>>> + Send {
        let act = {
            let mut state = self.state.lock().unwrap();
            state.calls_of_deregister += 1;
            state.deregister.pop_front().unwrap_or(Act::Succeed)
        };
        if act == Act::Panic {
            throw("the card fails at once");
        }
        async move {
            if let Err(error) = does(act, self.deregister_gate.clone()).await {
                return Err(StillRegistered { handle: key, error });
            }
            let _lock = self.lock.lock().unwrap();
            assert_eq!(
                self.state.lock().unwrap().mapped.remove(&key),
                Some(range),
                "twice, or with another range"
            );
            Ok(())
        }
    }

    /// As by a reset of the device. What the panic left mapped is the oldest of the range.
    async fn deregister_lost(&self, range: AddressRange) -> Result<bool, Refused> {
        if self.state.lock().unwrap().never_resets {
            return Ok(false);
        }
        let act = self.state.lock().unwrap().deregister.pop_front().unwrap_or(Act::Succeed);
        if act == Act::Panic {
            throw("the card fails at once");
        }
        does(act, self.deregister_gate.clone()).await?;
        let mut state = self.state.lock().unwrap();
        let left = state
            .mapped
            .iter()
            .find(|(_, mapped)| **mapped == range)
            .map(|(key, _)| *key)
            .expect("it is mapped still");
        state.mapped.remove(&left);
        Ok(true)
    }

    fn still_valid(&self, range: AddressRange, key: &u64) -> bool {
        let asked = {
            let mut state = self.state.lock().unwrap();
            assert_eq!(state.mapped.get(key), Some(&range), "it is asked about what is registered");
            state.asked += 1;
            state.valid.pop_front().unwrap_or(Act::Succeed)
        };
        if asked == Act::Panic {
            throw("the card cannot say");
        }
        asked == Act::Succeed
    }
}
