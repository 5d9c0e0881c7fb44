//! The waker that foreign code gets in place of that of a task.

use super::*;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Counts how often it is woken.
#[derive(Default)]
struct Counts(AtomicUsize);

impl Wake for Counts {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_task_is_woken_by_reference_and_by_value() {
    let counts = Arc::new(Counts::default());
    let task = TaskWaker::new(&Waker::from(counts.clone()), &Arc::new(Losses::new(None)));
    let waker = Waker::from(task);
    waker.wake_by_ref();
    waker.wake();
    assert_eq!(counts.0.load(Ordering::SeqCst), 2);
    assert_eq!(Arc::strong_count(&counts), 1, "and then forgotten");
}
