//! An executor for one thread: a queue of tasks, each with a flag that its waker sets.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::task::Wake;
use alloc::vec::Vec;
use core::future::{Future, poll_fn};
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Poll, Waker};

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    woken: Arc<Flag>,
    waker: Waker,
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Tasks wait, and none of them has been woken: on one thread nothing will.
pub struct Stuck;

#[derive(Default)]
pub struct Executor {
    tasks: Vec<Task>,
}

impl Executor {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn spawn(&mut self, future: impl Future<Output = ()> + 'static) {
        let woken = Arc::new(Flag(AtomicBool::new(true)));
        self.tasks.push(Task {
            future: Box::pin(future),
            waker: Waker::from(woken.clone()),
            woken,
        });
    }

    /// Runs all tasks to their end.
    pub fn run(&mut self) -> Result<(), Stuck> {
        while !self.tasks.is_empty() {
            let mut any = false;
            self.tasks.retain_mut(|task| {
                if !task.woken.0.swap(false, Ordering::AcqRel) {
                    return true;
                }
                any = true;
                task.future.as_mut().poll(&mut Context::from_waker(&task.waker)).is_pending()
            });
            if !any {
                return Err(Stuck);
            }
        }
        Ok(())
    }
}

/// Lets the other tasks run.
pub async fn yield_now() {
    let mut first = true;
    poll_fn(|cx| {
        cx.waker().wake_by_ref();
        if core::mem::take(&mut first) { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
}
