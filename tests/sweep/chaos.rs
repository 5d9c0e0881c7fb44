//! The n-th call of foreign code misbehaves.

use crate::scenario::Bag;
use std::cell::{Cell, RefCell};

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    FirstPass,
    PassPoll,
    PassDrop,
    NotifierDrop,
    Name,
    WakerClone,
    WakerWake,
    WakerDrop,
    Reporter,
    Clock,
    #[cfg_attr(not(feature = "tracing"), allow(dead_code, reason = "there is none then"))]
    Observer,
}

impl Kind {
    pub(crate) const COUNT: usize = 11;
}

/// What the call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misbehaviour {
    Panic,
    /// A panic whose payload panics when it is dropped, with a payload that does so, too.
    PanicWithBomb,
    Insert,
    Invalidate,
    TryInvalidate,
    ReadBegin,
    DropLastHandle,
    DropSubscription,
    PollAnotherTask,
}

impl Misbehaviour {
    pub(crate) const ALL: [Self; 9] = [
        Self::Panic,
        Self::PanicWithBomb,
        Self::Insert,
        Self::Invalidate,
        Self::TryInvalidate,
        Self::ReadBegin,
        Self::DropLastHandle,
        Self::DropSubscription,
        Self::PollAnotherTask,
    ];

    pub(crate) fn panics(self) -> bool {
        matches!(self, Self::Panic | Self::PanicWithBomb)
    }
}

thread_local! {
    static ARMED: Cell<bool> = const { Cell::new(false) };
    static CALLS: Cell<u64> = const { Cell::new(0) };
    static AT: Cell<u64> = const { Cell::new(0) };
    static WHAT: Cell<Misbehaviour> = const { Cell::new(Misbehaviour::Panic) };
    static FIRED: Cell<Option<Kind>> = const { Cell::new(None) };
    /// What the call can call back with.
    pub(crate) static BAG: RefCell<Option<Bag>> = const { RefCell::new(None) };
}

pub(crate) fn arm(at: u64, what: Misbehaviour) {
    CALLS.set(0);
    AT.set(at);
    WHAT.set(what);
    FIRED.set(None);
    ARMED.set(true);
}

/// Returns how many calls there were, and which one misbehaved.
pub(crate) fn disarm() -> (u64, Option<Kind>) {
    ARMED.set(false);
    (CALLS.get(), FIRED.get())
}

pub(crate) fn fired() -> Option<Kind> {
    FIRED.get()
}

/// Whether what misbehaves panics. A call back may be seen by nobody.
pub(crate) fn panics() -> bool {
    WHAT.get().panics()
}

/// Every piece of foreign code calls this.
pub(crate) fn point(kind: Kind) {
    // Thread-locals may be gone in a destructor that runs late.
    if !ARMED.try_with(Cell::get).unwrap_or(false) {
        return;
    }
    CALLS.set(CALLS.get() + 1);
    if CALLS.get() != AT.get() {
        return;
    }
    FIRED.set(Some(kind));
    ARMED.set(false);
    match WHAT.get() {
        Misbehaviour::Panic => throw("foreign code fails"),
        Misbehaviour::PanicWithBomb => std::panic::resume_unwind(Box::new(Bomb(3))),
        what => {
            let bag = BAG.with_borrow(Bag::clone_of);
            if let Some(bag) = bag {
                bag.call_back(what);
            }
            ARMED.set(true);
        }
    }
}

/// A panic that the hook does not print.
pub(crate) fn throw(message: &'static str) -> ! {
    std::panic::resume_unwind(Box::new(message))
}

/// A payload whose drop panics, this often.
struct Bomb(u32);

impl Drop for Bomb {
    fn drop(&mut self) {
        if self.0 > 0 {
            std::panic::resume_unwind(Box::new(Bomb(self.0 - 1)));
        }
    }
}
