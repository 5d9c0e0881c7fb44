//! The step that calls drivers.
#![forbid(unsafe_code)]

use super::{Inner, ring, unregister, wait};
use crate::engine::Shared;
use crate::engine::futures::invalidate::Invalidate;
use crate::event::Event;
use crate::foreign::Callback;
use crate::range::AddressRange;
use crate::source::ring::Change;
use crate::sync::{Arc, Ordering};
use alloc::vec::Vec;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use futures::stream::{FuturesUnordered, StreamExt};
use rustix::fd::{AsFd, BorrowedFd};

/// Turns what was read into invalidations.
///
/// [`run`](Self::run) it on a thread, or wait for its descriptor ([`AsFd`]) to be readable and await [`deliver`](Self::deliver). Dropping it starts what
/// is left without waiting, and stops watching.
#[derive(Debug)]
pub struct Deliveries {
    pub(super) inner: Arc<Inner>,
}

impl Deliveries {
    /// Invalidates what was read so far, and waits until no device uses it. The invalidations start in the first poll; then the readers of the space
    /// go on. Resolves to how many there were.
    ///
    /// # Cancel safety
    /// May be dropped at any moment: before the first poll nothing has happened, after it the passes belong to the space.
    ///
    /// # Panics
    /// Resumes a panic of a driver's first pass or pass (C5), after all of them have been started.
    pub fn deliver(&mut self) -> impl Future<Output = usize> + Send + use<> {
        let inner = self.inner.clone();
        async move {
            let mut passes = FuturesUnordered::new();
            let mut started = 0;
            core::future::poll_fn(|cx| {
                started = inner.start(cx, |invalidation| passes.push(invalidation));
                Poll::Ready(())
            })
            .await;
            while passes.next().await.is_some() {}
            started
        }
    }

    /// Delivers on this thread until [`Uffd::stop`](crate::source::Uffd::stop). Passes that are pending do not keep it from starting what is read meanwhile.
    ///
    /// # Errors
    /// What `poll` returns.
    ///
    /// # Panics
    /// As [`deliver`](Self::deliver).
    pub fn run(&mut self) -> std::io::Result<()> {
        struct Bell(Arc<Inner>);
        impl alloc::task::Wake for Bell {
            fn wake(self: Arc<Self>) {
                ring(&self.0.bell);
            }
        }
        let waker = Waker::from(Arc::new(Bell(self.inner.clone())));
        let mut cx = Context::from_waker(&waker);
        let mut running = FuturesUnordered::new();
        loop {
            let [rung, stopped] = wait([self.inner.bell.as_fd(), self.inner.stop.as_fd()])?;
            if rung {
                self.clear();
                running.push(self.deliver());
                while let Poll::Ready(Some(_)) = running.poll_next_unpin(&mut cx) {}
            }
            if stopped {
                return Ok(());
            }
        }
    }

    /// Makes the descriptor unreadable until more is read. To be called before [`deliver`](Self::deliver) by who waits for the descriptor.
    pub fn clear(&mut self) {
        let _ = rustix::io::read(&self.inner.bell, &mut [0; 8]);
    }
}

impl AsFd for Deliveries {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.bell.as_fd()
    }
}

impl std::os::fd::AsRawFd for Deliveries {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.inner.bell)
    }
}

impl Drop for Deliveries {
    fn drop(&mut self) {
        self.inner.table().close();
        self.inner.orphaned.store(true, Ordering::Release);
        self.inner.open();
    }
}

/// Opens the gate when the invalidations have been started, or a driver has panicked.
struct Open<'a>(&'a Shared, usize);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open_gate(self.1);
    }
}

impl Inner {
    /// Starts an invalidation of everything that the events name; `pending` gets those whose passes are pending.
    fn start(&self, cx: &mut Context<'_>, mut pending: impl FnMut(Pin<alloc::boxed::Box<Invalidate<'static>>>)) -> usize {
        let open = Open(self.shared(), self.turns.swap(0, Ordering::AcqRel));
        let changes = self.changes();
        let started = changes.len();
        for (range, event) in changes {
            let mut invalidation = alloc::boxed::Box::pin(self.space.invalidate(range, event).into_owned());
            // A driver's panic has no caller here (C5).
            let polled = self.shared().host.losses.run(Callback::FirstPass, |_| invalidation.as_mut().poll(cx).map(drop));
            if let Some(Poll::Pending) = polled {
                pending(invalidation);
            }
        }
        drop(open);
        started
    }

    /// Without anybody who could wait: the passes are left to the space.
    pub(super) fn open(&self) {
        let _open = Open(self.shared(), self.turns.swap(0, Ordering::AcqRel));
        for (range, event) in self.changes() {
            // What cannot be waited for is abandoned, and whoever needs the range drives it.
            self.shared().host.losses.run(Callback::FirstPass, |_| self.space.try_invalidate(range, event).map(drop));
        }
    }

    /// What the events that were read name.
    fn changes(&self) -> Vec<(AddressRange, Event)> {
        let mut changes = Vec::new();
        let whole = |changes: &mut Vec<_>, event| {
            self.table().watches.for_each(|range| changes.push((range, event)));
        };
        if self.ring.take_overflow() {
            whole(&mut changes, Event::Unmap);
        }
        while let Some(change) = self.ring.take() {
            match change {
                Change::Unmap(start, end) => changes.extend(named(start, end.wrapping_sub(start), Event::Unmap)),
                Change::Remove(start, end) => changes.extend(named(start, end.wrapping_sub(start), Event::Clear)),
                Change::Remap(from, to, len) => {
                    changes.extend(named(from, len, Event::Unmap));
                    // The kernel goes on watching where the memory is now; nobody asked for that.
                    let table = self.table();
                    if let (Some(fd), Ok(moved)) = (&table.fd, AddressRange::new(to, len)) {
                        table.watches.unwatched(moved).into_iter().for_each(|range| unregister(fd, range));
                    }
                }
                Change::Fork => whole(&mut changes, Event::ProtectionPage),
            }
        }
        changes
    }
}

fn named(start: u64, len: u64, event: Event) -> Option<(AddressRange, Event)> {
    AddressRange::new(start, len).ok().map(|range| (range, event))
}
