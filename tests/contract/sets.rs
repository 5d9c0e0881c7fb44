//! G: several ranges, mirrored at once.
use crate::support::*;
use shootdown::{
    AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, MirrorError, PassFuture,
    RetryBudget, Subscription, WouldBlock,
};
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::sync::Arc;

/// All buffers of one GPU, under one lock: which pages it maps, each with the generation that it
/// saw.
#[derive(Clone, Default)]
struct Gpu(Arc<DriverLock<Vec<(usize, u64)>>>);

impl IntervalNotifier for Gpu {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let range = invalidation.range();
        self.0.lock_for(invalidation).retain(|(at, _)| !range.overlaps(pages(*at as u64 * 2, 1)));
        Ok(None)
    }
}

/// Memory of `N` buffers that changes now and then, by a clock that counts steps of preparation.
struct Busy<const N: usize> {
    space: AddressSpace,
    gpu: Gpu,
    buffers: [Subscription<Gpu>; N],
    generations: RefCell<[u64; N]>,
    /// Every so many steps one of the buffers changes, in turn.
    every: u64,
    steps: Cell<u64>,
}

impl<const N: usize> Busy<N> {
    fn new(every: u64) -> Self {
        let (space, gpu) = (AddressSpace::new(), Gpu::default());
        let buffers =
            std::array::from_fn(|at| space.insert(pages(at as u64 * 2, 1), gpu.clone()).unwrap());
        Self { space, gpu, buffers, generations: RefCell::new([0; N]), every, steps: Cell::new(0) }
    }

    fn change(&self, at: usize) {
        let guard = now(self.space.invalidate(pages(at as u64 * 2, 1), Event::Unmap));
        self.generations.borrow_mut()[at] += 1;
        drop(guard);
    }

    /// Looks at a buffer, which takes a step.
    async fn prepare(&self, at: usize) -> Result<(usize, u64), Infallible> {
        let found = (at, self.generations.borrow()[at]);
        Yields(1).await;
        let step = self.steps.get() + 1;
        self.steps.set(step);
        if step.is_multiple_of(self.every) {
            self.change((step / self.every) as usize % N);
        }
        Ok(found)
    }

    fn check(&self) {
        let generations = self.generations.borrow();
        let mapped = self.gpu.0.lock();
        assert!(mapped.iter().all(|(at, generation)| generations[*at] == *generation), "stale");
    }
}

const MANY: RetryBudget = RetryBudget::retries(10_000);

#[test]
fn g1_all_are_installed_under_one_lock_or_none() {
    let busy = Busy::<3>::new(2);
    let buffers = busy.buffers.each_ref();
    let rounds = Cell::new(0);
    let mirrored = now(busy.gpu.0.mirror_all(
        &buffers,
        MANY,
        |at, _| {
            rounds.set(rounds.get() + 1);
            assert!(busy.gpu.0.lock().is_empty(), "some are installed before the others");
            busy.prepare(at)
        },
        |mapped, found| {
            mapped.extend(&found);
            found
        },
    ));
    assert_eq!(mirrored.unwrap().iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(rounds.get() > 3, "something collided");
    busy.check();
    assert_eq!(busy.gpu.0.lock().len(), 3);
}

/// Mirrors one buffer after the other, and all of them again when one has changed meanwhile.
async fn one_by_one<const N: usize>(busy: &Busy<N>, rounds: usize) -> bool {
    for _ in 0..rounds {
        for (at, buffer) in busy.buffers.iter().enumerate() {
            let install = |mapped: &mut Vec<(usize, u64)>, found| {
                mapped.retain(|(of, _)| *of != at);
                mapped.push(found);
            };
            busy.gpu.0.mirror(buffer, MANY, |_| busy.prepare(at), install).await.unwrap();
        }
        if busy.gpu.0.lock().len() == N {
            return true;
        }
    }
    false
}

#[test]
fn g2_a_set_ends_where_single_loops_starve() {
    const BUFFERS: usize = 16;
    // One of them changes after every third look.
    let busy = Busy::<BUFFERS>::new(3);
    assert!(!now(one_by_one(&busy, 1000)), "in no round were all of them mapped");
    let busy = Busy::<BUFFERS>::new(3);
    let calls = Cell::new(0);
    let prepare = |at, _| {
        calls.set(calls.get() + 1);
        busy.prepare(at)
    };
    now(busy
        .gpu
        .0
        .mirror_all(&busy.buffers.each_ref(), MANY, prepare, |mapped, found| mapped.extend(found)))
    .unwrap();
    assert_eq!(busy.gpu.0.lock().len(), BUFFERS);
    busy.check();
    let collisions: u32 = busy.buffers.iter().map(|buffer| buffer.stats().collisions).sum();
    assert_eq!(calls.get(), BUFFERS as u32 + collisions, "only what was hit is prepared again");
    assert!(calls.get() < 2 * BUFFERS as u32, "{} looks", calls.get());
}

#[test]
fn g3_what_ends_it_without_an_installation() {
    let busy = Busy::<2>::new(u64::MAX);
    let buffers = busy.buffers.each_ref();
    let installs = Cell::new(0);
    let install = |_: &mut Vec<_>, _: Vec<()>| installs.set(installs.get() + 1);
    // The error of one ends the others.
    let prepare = async |at: usize| {
        if at == 1 {
            return Err("no memory");
        }
        std::future::pending().await
    };
    let failed = now(busy.gpu.0.mirror_all(&buffers, MANY, |at, _| prepare(at), install));
    assert_eq!(failed, Err(MirrorError::Prepare("no memory")));
    // Each round is a retry, however many collide in it.
    let prepare = async || {
        (0..2).for_each(|at| busy.change(at));
        Ok::<_, Infallible>(())
    };
    let failed =
        now(busy.gpu.0.mirror_all(&buffers, RetryBudget::retries(3), |_, _| prepare(), install));
    assert!(matches!(failed, Err(MirrorError::RetriesExhausted { retries: 3, .. })), "{failed:?}");
    now(busy.buffers[1].close());
    let failed = now(busy.gpu.0.mirror_all(
        &buffers,
        MANY,
        |_, _| async { Ok::<_, Infallible>(()) },
        install,
    ));
    assert_eq!(failed, Err(MirrorError::Closed));
    assert_eq!(installs.get(), 0);
    let none: [&Subscription<Gpu>; 0] = [];
    let prepare = |_, _| async { Ok::<(), Infallible>(()) };
    assert_eq!(now(busy.gpu.0.mirror_all(&none, MANY, prepare, install)), Ok(()));
    assert_eq!(installs.get(), 1);
}

#[test]
fn g1_what_was_prepared_and_is_stale_is_dropped_without_the_lock() {
    struct Locks(Gpu);
    impl Drop for Locks {
        fn drop(&mut self) {
            drop(self.0.0.lock());
        }
    }
    let busy = Busy::<2>::new(2);
    let prepare = |at, _| {
        let found = busy.prepare(at);
        async {
            found.await?;
            Ok::<_, Infallible>(Locks(busy.gpu.clone()))
        }
    };
    let found =
        now(busy.gpu.0.mirror_all(&busy.buffers.each_ref(), MANY, prepare, |_, found| found));
    assert_eq!(found.unwrap().len(), 2);
}
