//! Injects faults into drivers, for their tests.
//!
//! A driver's bugs are in its rare paths: a collision just before it installs, a device that is
//! slow, a refusal, a pass that panics.
//!
//! - [`Faulty`] wraps a notifier and makes its first passes and passes misbehave.
//! - [`Subscription::collide_on`](crate::Subscription::collide_on) makes the check of the
//!   collision-retry loop fail.
//!
//! Neither takes a lock of the driver, nor touches what it protects. A forced collision is an
//! answer of the check itself, under whichever lock the driver uses. So it works with any lock, and
//! every fault is one that can really happen.
//!
//! Needs feature `test-util`.
//!
//! ```
//! # use shootdown::*;
//! # #[derive(Default)]
//! # struct Gpu { page_table: DriverLock<Vec<u64>> }
//! # impl IntervalNotifier for Gpu {
//! #     fn invalidate(&self, i: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
//! #         self.page_table.lock_for(i).clear();
//! #         Ok(None)
//! #     }
//! # }
//! use shootdown::test_util::Faulty;
//!
//! # futures::executor::block_on(async {
//! let space = AddressSpace::new();
//! let range = AddressRange::new(0x1000, 0x1000)?;
//! let gpu = space.insert(range, Faulty::new(Gpu::default()))?;
//!
//! gpu.collide_on(1);
//! let sequence = gpu.read_begin().await;
//! assert_eq!(gpu.page_table.install(&gpu, sequence, |_| ()), Err(Collision));
//!
//! gpu.refuse_next();
//! assert!(space.try_invalidate(range, Event::Clear).is_err());
//!
//! let delay = gpu.delay_next();
//! let mut invalidate = space.invalidate(range, Event::Unmap);
//! assert!(futures::future::poll_immediate(&mut invalidate).await.is_none());
//! delay.end();
//! drop(invalidate.await);
//! # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
//! ```
#![forbid(unsafe_code)]

use crate::notifier::{IntervalNotifier, Invalidation, WouldBlock};
use crate::pass::PassFuture;
use crate::sync::{Arc, AtomicBool, Lock, Ordering};
use alloc::borrow::Cow;
use alloc::collections::VecDeque;
use core::fmt;
use core::future::poll_fn;
use core::ops::Deref;
use core::task::Poll;
use futures::task::AtomicWaker;

/// Wraps a notifier, which then fails on demand; dereferences to the notifier.
///
/// Each fault is for one call of the first pass, in the order in which the faults were requested. A
/// refusal is for the next non-blockable invalidation. Each other fault is for the next call that
/// is not refused. The [module](self) has an example.
pub struct Faulty<N> {
    notifier: N,
    /// The requested faults, in order. The lock is never held while the notifier runs.
    faults: Lock<VecDeque<Fault>>,
}

enum Fault {
    /// The call returns `WouldBlock`; the notifier is not called.
    Refuse,
    /// The pass waits for the gate. The [`Delay`] has its other handle.
    Delay(Arc<Gate>),
    PanicInFirstPass,
    PanicInPass,
}

/// Holds one pass up until `open` is set.
#[derive(Default)]
struct Gate {
    open: AtomicBool,
    waker: AtomicWaker,
}

/// Holds a pass up until it is [ended](Self::end) or dropped: made by [`Faulty::delay_next`].
#[must_use = "dropped, it holds nothing up"]
pub struct Delay(Arc<Gate>);

impl Delay {
    /// Lets the pass go on.
    pub fn end(self) {}
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.0.open.store(true, Ordering::Release);
        self.0.waker.wake();
    }
}

impl fmt::Debug for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delay").finish_non_exhaustive()
    }
}

impl<N> Faulty<N> {
    /// Wraps `notifier`, without any fault so far.
    pub fn new(notifier: N) -> Self {
        Self { notifier, faults: Lock::new(VecDeque::new()) }
    }

    /// Returns the notifier.
    pub fn into_inner(self) -> N {
        self.notifier
    }

    /// Makes the next non-blockable first pass refuse ([B2]). The notifier is not called.
    ///
    /// [B2]: crate::docs::contract#b-blocking-and-non-blocking
    pub fn refuse_next(&self) {
        self.faults.lock().push_back(Fault::Refuse);
    }

    /// Holds up the pass of the next call until the [`Delay`] is ended.
    ///
    /// The notifier is called. If it returns no pass, the call gets one that waits for the delay.
    pub fn delay_next(&self) -> Delay {
        let gate = Arc::new(Gate::default());
        self.faults.lock().push_back(Fault::Delay(gate.clone()));
        Delay(gate)
    }

    /// Makes the next first pass panic after it has called the notifier ([C5]).
    ///
    /// [C5]: crate::docs::contract#c-cancellation-panics-stalls
    pub fn panic_next_first_pass(&self) {
        self.faults.lock().push_back(Fault::PanicInFirstPass);
    }

    /// Makes the pass of the next call panic when it is polled ([C5]). The notifier is called.
    ///
    /// [C5]: crate::docs::contract#c-cancellation-panics-stalls
    pub fn panic_next_pass(&self) {
        self.faults.lock().push_back(Fault::PanicInPass);
    }

    /// Takes the first fault that fits this call.
    fn fault(&self, blockable: bool) -> Option<Fault> {
        let mut faults = self.faults.lock();
        let fits = |fault: &Fault| !(blockable && matches!(fault, Fault::Refuse));
        let at = faults.iter().position(fits)?;
        faults.remove(at)
    }
}

impl<N: IntervalNotifier> IntervalNotifier for Faulty<N> {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let fault = self.fault(invalidation.blockable());
        if let Some(Fault::Refuse) = fault {
            return Err(WouldBlock);
        }
        let pass = self.notifier.invalidate(invalidation)?;
        if pass.is_none() && matches!(fault, Some(Fault::PanicInPass | Fault::Delay(_))) {
            invalidation.is_not_the_devices();
        }
        match fault {
            Some(Fault::PanicInFirstPass) => {
                panic!("injected into the first pass of {}", self.name())
            }
            Some(Fault::PanicInPass) => {
                let name = self.name();
                Ok(Some(PassFuture::new(poll_fn(move |_| -> Poll<()> {
                    panic!("injected into a pass of {name}")
                }))))
            }
            Some(Fault::Delay(gate)) => Ok(Some(PassFuture::new(async move {
                poll_fn(|cx| {
                    gate.waker.register(cx.waker());
                    if gate.open.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
                if let Some(pass) = pass {
                    pass.await;
                }
            }))),
            Some(Fault::Refuse) | None => Ok(pass),
        }
    }

    fn name(&self) -> Cow<'static, str> {
        self.notifier.name()
    }
}

impl<N> Deref for Faulty<N> {
    type Target = N;

    fn deref(&self) -> &N {
        &self.notifier
    }
}

impl<N> fmt::Debug for Faulty<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faulty").field("faults", &self.faults.lock().len()).finish_non_exhaustive()
    }
}
