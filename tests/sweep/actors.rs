//! Foreign code of every kind: a driver, its passes, wakers, and an executor that polls what was
//! woken.

use crate::chaos::{Kind, point};
use crate::support::Gate;
use shootdown::{IntervalNotifier, Invalidation, PassFuture, WouldBlock};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};

/// What a driver does in its next first pass.
pub(crate) enum Act {
    Finish,
    Wait(Gate),
    Yield(u32),
    Refuse,
}

/// A driver that does as it is told.
pub(crate) struct Driver {
    name: &'static str,
    script: Mutex<VecDeque<Act>>,
    drops: Arc<AtomicUsize>,
}

impl Driver {
    pub(crate) fn new(
        name: &'static str,
        drops: &Arc<AtomicUsize>,
        script: impl IntoIterator<Item = Act>,
    ) -> Self {
        Self { name, script: Mutex::new(script.into_iter().collect()), drops: drops.clone() }
    }

    pub(crate) fn next(&self, act: Act) {
        self.script.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push_back(act);
    }
}

impl IntervalNotifier for Driver {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let act = self
            .script
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .pop_front()
            .unwrap_or(Act::Finish);
        invalidation.set_seq();
        point(Kind::FirstPass);
        match act {
            Act::Finish => Ok(None),
            Act::Wait(gate) => Ok(Some(PassFuture::new(Pass { gate: Some(gate), yields: 0 }))),
            Act::Yield(yields) => Ok(Some(PassFuture::new(Pass { gate: None, yields }))),
            Act::Refuse => Err(WouldBlock),
        }
    }

    fn name(&self) -> Cow<'static, str> {
        point(Kind::Name);
        Cow::Borrowed(self.name)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::SeqCst);
        point(Kind::NotifierDrop);
    }
}

/// A pass of it.
struct Pass {
    gate: Option<Gate>,
    yields: u32,
}

impl Future for Pass {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        point(Kind::PassPoll);
        if self.yields > 0 {
            self.yields -= 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        match &mut self.gate {
            Some(gate) => Pin::new(gate).poll(cx),
            None => Poll::Ready(()),
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        point(Kind::PassDrop);
    }
}

/// Whether a task was woken.
pub(crate) struct Flag(pub(crate) AtomicBool);

/// A waker whose clone, wake and drop are foreign code. Each does its work first.
pub(crate) fn waker(flag: &Arc<Flag>) -> Waker {
    const VTABLE: RawWakerVTable = RawWakerVTable::new(clone, wake, wake_by_ref, drop_waker);

    unsafe fn clone(data: *const ()) -> RawWaker {
        point(Kind::WakerClone);
        // SAFETY: `data` is of an `Arc<Flag>` that this waker has.
        unsafe { Arc::increment_strong_count(data.cast::<Flag>()) };
        RawWaker::new(data, &VTABLE)
    }

    unsafe fn wake(data: *const ()) {
        // SAFETY: the waker's own reference is consumed.
        let flag = unsafe { Arc::from_raw(data.cast::<Flag>()) };
        flag.0.store(true, Ordering::SeqCst);
        point(Kind::WakerWake);
    }

    unsafe fn wake_by_ref(data: *const ()) {
        // SAFETY: `data` is of an `Arc<Flag>` that this waker has.
        unsafe { &*data.cast::<Flag>() }.0.store(true, Ordering::SeqCst);
        point(Kind::WakerWake);
    }

    unsafe fn drop_waker(data: *const ()) {
        // SAFETY: the waker's own reference is consumed.
        drop(unsafe { Arc::from_raw(data.cast::<Flag>()) });
        point(Kind::WakerDrop);
    }

    // SAFETY: the functions above keep one reference for each waker.
    unsafe { Waker::from_raw(RawWaker::new(Arc::into_raw(flag.clone()).cast(), &VTABLE)) }
}

/// Who may see which failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Calls first passes and polls passes, whose panics are its own (C5).
    Invalidates,
    /// Drops a notifier of its own.
    DropsNotifier,
    /// Is polled with a waker of its own.
    Waits,
    /// Has to do with nothing foreign but what it calls itself.
    Bystander,
}

impl Role {
    pub(crate) fn may_see(self, kind: Kind) -> bool {
        match kind {
            Kind::FirstPass | Kind::PassPoll | Kind::PassDrop => self == Self::Invalidates,
            Kind::NotifierDrop => self == Self::DropsNotifier,
            Kind::WakerClone => self != Self::Bystander,
            _ => false,
        }
    }
}

struct Task {
    name: &'static str,
    role: Role,
    flag: Arc<Flag>,
    /// Gone while it is polled.
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

/// Polls tasks that were woken, and drops those that are ready or have panicked.
#[derive(Clone, Default)]
pub(crate) struct Executor(Rc<RefCell<Vec<Rc<RefCell<Task>>>>>, Rc<RefCell<Vec<String>>>);

impl Executor {
    pub(crate) fn spawn(
        &self,
        name: &'static str,
        role: Role,
        future: impl Future<Output = ()> + 'static,
    ) {
        let flag = Arc::new(Flag(AtomicBool::new(true)));
        self.0.borrow_mut().push(Rc::new(RefCell::new(Task {
            name,
            role,
            flag,
            future: Some(Box::pin(future)),
        })));
    }

    /// Polls as long as somebody is woken.
    pub(crate) fn run(&self) {
        for _ in 0..60 {
            if !self.run_one() {
                return;
            }
        }
    }

    /// Polls one that was woken and is not being polled. Returns whether there was one.
    pub(crate) fn run_one(&self) -> bool {
        let ready = |task: &&Rc<RefCell<Task>>| {
            task.try_borrow()
                .is_ok_and(|task| task.future.is_some() && task.flag.0.load(Ordering::SeqCst))
        };
        // The one that was polled last goes to the back.
        let Some(task) = self.0.borrow().iter().find(ready).cloned() else { return false };
        let (name, role, flag) = {
            let task = task.borrow();
            (task.name, task.role, task.flag.clone())
        };
        let Some(mut future) = task.borrow_mut().future.take() else { return false };
        flag.0.store(false, Ordering::SeqCst);
        // The executor's own wakers are foreign code, too, but not code that the library calls.
        let waker = std::mem::ManuallyDrop::new(waker(&flag));
        let polled = catch_unwind(AssertUnwindSafe(|| {
            future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready()
        }));
        let panicked = self.note(name, role, &polled);
        let done = panicked || matches!(polled, Ok(true));
        if let Err(panic) = polled {
            forget(panic);
        }
        self.0.borrow_mut().retain(|other| !Rc::ptr_eq(other, &task));
        if done {
            let dropped = catch_unwind(AssertUnwindSafe(|| drop(future)));
            self.note(name, Role::Bystander, &dropped);
        } else {
            task.borrow_mut().future = Some(future);
            self.0.borrow_mut().push(task);
        }
        true
    }

    /// Notes a panic that is none of the caller's business.
    fn note<T>(&self, name: &str, role: Role, result: &std::thread::Result<T>) -> bool {
        if result.is_err() {
            let kind = crate::chaos::fired();
            if !kind.is_some_and(|kind| crate::chaos::panics() && role.may_see(kind)) {
                self.1
                    .borrow_mut()
                    .push(format!("{name} ({role:?}) has seen a failure of {kind:?}"));
            }
        }
        result.is_err()
    }

    /// Runs one step of the scenario. A panic of it is noted unless it may see what has failed.
    pub(crate) fn step<R>(&self, name: &str, role: Role, step: impl FnOnce() -> R) -> Option<R> {
        let result = catch_unwind(AssertUnwindSafe(step));
        self.note(name, role, &result);
        match result {
            Ok(result) => Some(result),
            Err(panic) => {
                forget(panic);
                None
            }
        }
    }

    pub(crate) fn waiting(&self) -> Vec<&'static str> {
        self.0.borrow().iter().map(|task| task.borrow().name).collect()
    }

    pub(crate) fn complaints(&self) -> Vec<String> {
        self.1.borrow().clone()
    }

    /// Drops all tasks that are left.
    pub(crate) fn clear(&self) {
        let tasks = std::mem::take(&mut *self.0.borrow_mut());
        drop(tasks);
    }
}

/// The payload may be one whose drop panics.
pub(crate) fn forget(panic: Box<dyn std::any::Any + Send>) {
    if panic.is::<&str>() || panic.is::<String>() {
        drop(panic);
    } else {
        std::mem::forget(panic);
    }
}
