//! What the tests have in common.

use futures::FutureExt;
use futures::channel::oneshot;
use futures::executor::LocalPool;
use futures::future::BoxFuture;
use shootdown::{AddressRange, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
use shootdown_lease::engine::{Hub, Leased, Link, Outgoing};
use shootdown_lease::{
    Epoch, Host, Incarnation, Mirror, MirrorDecision, MirrorSettings, Owner, Time,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

pub(crate) const TERM: Duration = Duration::from_millis(100);
pub(crate) const MS: u64 = 1_000_000;

pub(crate) fn pages(first: u64, count: u64) -> AddressRange {
    AddressRange::new(first * 4096, count * 4096).unwrap()
}

pub(crate) fn ms(at: u64) -> Time {
    Time::from_nanos(at * MS)
}

type Sleeper = (u64, oneshot::Sender<()>);

/// Time that passes when the test says so.
#[derive(Clone, Default)]
pub(crate) struct Timer {
    pub(crate) now: Arc<AtomicU64>,
    pub(crate) sleepers: Rc<RefCell<Vec<Sleeper>>>,
}

impl Timer {
    pub(crate) fn now(&self) -> Time {
        Time::from_nanos(self.now.load(SeqCst))
    }

    pub(crate) fn clock(&self) -> impl Fn() -> Time + Send + Sync + 'static + use<> {
        let now = self.now.clone();
        move || Time::from_nanos(now.load(SeqCst))
    }

    pub(crate) fn sleep(&self) -> impl Fn(Duration) -> BoxFuture<'static, ()> + use<> {
        let timer = self.clone();
        move |time| {
            let (sender, woken) = oneshot::channel();
            let at = timer.now.load(SeqCst) + time.as_nanos() as u64;
            timer.sleepers.borrow_mut().push((at, sender));
            woken.map(drop).boxed()
        }
    }

    pub(crate) fn pass(&self, pool: &mut LocalPool, millis: u64) {
        for _ in 0..millis {
            let now = self.now.fetch_add(MS, SeqCst) + MS;
            let (due, later) =
                self.sleepers.borrow_mut().drain(..).partition::<Vec<_>, _>(|(at, _)| *at <= now);
            *self.sleepers.borrow_mut() = later;
            due.into_iter().for_each(|(_, sleeper)| _ = sleeper.send(()));
            pool.run_until_stalled();
        }
    }
}

/// A future of a process that can be stopped; goes on at the next poll after that.
pub(crate) async fn unless(stopped: Rc<Cell<bool>>, work: impl Future<Output = ()>) {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|cx| {
        if stopped.get() { std::task::Poll::Pending } else { work.as_mut().poll(cx) }
    })
    .await;
}

/// A driver without devices: copies that readers check.
pub(crate) struct Copies;

impl IntervalNotifier for Copies {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(None)
    }
}

pub(crate) fn leased(timer: &Timer, incarnation: u64, settings: MirrorSettings) -> Leased {
    Leased::new(Mirror::new(Incarnation(incarnation), settings, timer.now()), timer.clock())
}

/// Carries all that waits, both ways, answering fetches with what `read` says, if it says anything.
pub(crate) fn carry(hub: &Hub, host: u64, link: &mut Link, leased: &Leased) {
    loop {
        let mut quiet = true;
        while let Some(Some(message)) = leased.next_message().now_or_never() {
            hub.handle(Host(host), message);
            quiet = false;
        }
        while let Some(Some(outgoing)) = link.next().now_or_never() {
            match outgoing {
                Outgoing::Message(message) => leased.handle(message, None),
                Outgoing::Serve(serve) => leased
                    .handle(serve.message(), Some(vec![0; serve.range().len().unwrap() as usize])),
            }
            quiet = false;
        }
        if quiet {
            return;
        }
    }
}

pub(crate) fn joined(mirror: &mut Mirror, owner: &mut Owner, host: u64, now: Time) -> Epoch {
    mirror.tick(now);
    while let Some(message) = mirror.next_message() {
        owner.handle(Host(host), message, now);
    }
    while let Some((_, message)) = owner.next_message() {
        mirror.handle(message, now);
    }
    let Some(MirrorDecision::Joined { epoch }) = mirror.next_decision() else {
        panic!("{:?}", mirror.standing())
    };
    epoch
}
