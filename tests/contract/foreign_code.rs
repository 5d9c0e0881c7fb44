//! F1 to F3, A5: one test for each defect that foreign code once caused; `tests/sweep.rs` looks for
//! their kind.

use crate::support::*;
use futures::StreamExt;
use futures::task::ArcWake;
use shootdown::*;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

/// Runs something that may fail where the library has no caller to tell.
fn quietly<R>(code: impl FnOnce() -> R) -> Option<R> {
    catch_unwind(AssertUnwindSafe(code)).ok()
}

/// Nothing is left: everybody can be read, nothing is active.
#[track_caller]
fn nothing_is_lost(space: &AddressSpace, readers: &[&Subscription<Device>]) {
    for reader in readers {
        assert!(
            Task::new(reader.read_begin()).run().is_ready(),
            "a reader waits for ever: {:?}",
            space.active()
        );
    }
    now(space.drain());
    assert!(space.active().is_empty(), "{:?}", space.active());
    assert_eq!(space.sequence().get() % 2, 0);
}

/// Runs one test of this binary in a process of its own, with the variable set that makes it do
/// what may abort.
fn in_a_process(test: &str, child: impl FnOnce()) {
    const CHILD: &str = "SHOOTDOWN_CHILD";
    if std::env::var_os(CHILD).is_some() {
        child();
        std::process::exit(0);
    }
    let test = format!("foreign_code::{test}");
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([&test, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{:?}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

struct Bomb(Gate);

impl IntervalNotifier for Bomb {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        invalidation.set_seq();
        Ok(Some(PassFuture::new(self.0.clone())))
    }
}

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("the drop of a driver fails");
    }
}

#[test]
fn f1_a_notifier_whose_drop_panics_while_a_reader_helps_costs_no_other_invalidation_its_passes() {
    let (space, log) = (AddressSpace::new(), Log::default());
    let (first, second) = (Gate::default(), Gate::default());
    let bomb = space.insert(pages(0, 1), Bomb(first.clone())).unwrap();
    let other = space
        .insert(pages(1, 1), Device::new("other", &log).then(Act::pass(second.clone())))
        .unwrap();
    let wide = space.insert(pages(0, 2), Device::new("wide", &log)).unwrap();
    for page in 0..2 {
        Task::new(space.invalidate(pages(page, 1), Event::Unmap)).expect_pending();
    }
    // It is freed when its invalidation ends, which is when the reader has driven it.
    drop(bomb);
    first.open();
    second.open();
    now(wide.read_begin());
    assert_eq!(space.stats().lost_panics, 1, "the reader has nothing to do with it");
    nothing_is_lost(&space, &[&other, &wide]);
}

/// A waker whose drop panics while `armed`.
struct BadDrop(Arc<AtomicBool>);

impl Wake for BadDrop {
    fn wake(self: Arc<Self>) {}
    fn wake_by_ref(self: &Arc<Self>) {}
}

impl Drop for BadDrop {
    fn drop(&mut self) {
        if self.0.swap(false, Ordering::SeqCst) {
            panic!("the drop of a waker fails");
        }
    }
}

/// Where a future is polled with another waker the one before is dropped: with the passes, or with
/// the whole invalidation, just taken out of the state.
#[test]
fn f1_a_waker_whose_drop_panics_when_it_is_replaced_loses_no_passes() {
    for done in [false, true] {
        let (space, device, _log) = one_device();
        let gate = Gate::default();
        device.next(Act::pass(gate.clone()));
        let armed = Arc::new(AtomicBool::new(false));
        let mut invalidate = Box::pin(space.invalidate(pages(0, 1), Event::Unmap));
        let bad = Waker::from(Arc::new(BadDrop(armed.clone())));
        assert!(invalidate.as_mut().poll(&mut Context::from_waker(&bad)).is_pending());
        // The library has the last one.
        drop(bad);
        armed.store(true, Ordering::SeqCst);
        if done {
            gate.open();
        }
        let mut invalidate = Task::new(invalidate);
        let polled = quietly(|| invalidate.poll().is_ready());
        assert_eq!(
            polled,
            Some(done),
            "the future has nothing to do with the waker of another task"
        );
        drop(invalidate);
        gate.open();
        nothing_is_lost(&space, &[&device]);
        assert_eq!(space.stats().lost_panics, 1);
    }
}

struct BadWaker(AtomicBool);

impl Wake for BadWaker {
    fn wake(self: Arc<Self>) {
        if self.0.load(Ordering::SeqCst) {
            panic!("a waker fails");
        }
    }
}

#[test]
fn f1_a_waker_that_panics_when_an_invalidation_is_handed_over_leaves_no_orphan() {
    let (space, device, _log) = one_device();
    let gate = Gate::default();
    device.next(Act::Finish);
    device.next(Act::pass(gate.clone()));
    let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
    let bad = Arc::new(BadWaker(AtomicBool::new(false)));
    let mut read = Box::pin(device.read_begin());
    assert!(read.as_mut().poll(&mut Context::from_waker(&Waker::from(bad.clone()))).is_pending());
    bad.0.store(true, Ordering::SeqCst);
    // It is handed over, and tells the reader that there is something to help with.
    let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    assert_eq!(quietly(|| unmap.run().is_ready()), Some(false));
    assert_eq!(space.stats().lost_panics, 1);
    drop((unmap, read));
    gate.open();
    drop(guard);
    nothing_is_lost(&space, &[&device]);
}

/// A panic whose payload panics when it is dropped.
struct BadPayload;

impl Drop for BadPayload {
    fn drop(&mut self) {
        panic!("the drop of a payload fails");
    }
}

/// The first panic goes on, or is reported; the payloads of the others are dropped, and may be as
/// bad.
#[test]
fn f1_panics_whose_payloads_panic_keep_nobody_asleep() {
    struct Terrible;
    impl ArcWake for Terrible {
        fn wake_by_ref(_: &Arc<Self>) {
            std::panic::panic_any(BadPayload);
        }
    }
    let (space, device, _log) = one_device();
    let guard = now(space.invalidate(pages(0, 1), Event::Unmap));
    let mut terrible: Vec<_> = (0..3).map(|_| Box::pin(device.read_begin())).collect();
    for read in &mut terrible {
        let waker = futures::task::waker(Arc::new(Terrible));
        assert!(read.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    }
    // Those that came first are woken last.
    let mut good: Vec<_> = (0..3).map(|_| Task::new(device.read_begin())).collect();
    good.iter_mut().for_each(Task::expect_pending);
    let mut more: Vec<_> = (0..3).map(|_| Box::pin(device.read_begin())).collect();
    for read in &mut more {
        let waker = futures::task::waker(Arc::new(Terrible));
        assert!(read.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    }
    assert!(quietly(|| drop(guard)).is_some());
    assert!(good.iter().all(Task::is_woken), "somebody sleeps on");
    assert_eq!(space.stats().lost_panics, 6);
    good.iter_mut().for_each(|read| _ = read.finish());
    drop((terrible, more));
    nothing_is_lost(&space, &[&device]);
}

#[test]
fn c5_what_has_no_caller_is_reported_with_its_kind_and_message() {
    let reports = Arc::new(Mutex::new(Vec::new()));
    let of_reporter = reports.clone();
    let space = AddressSpace::builder()
        .on_report(move |report| {
            of_reporter.lock().unwrap().push(format!("{report:?}"));
            panic!("the reporter fails, too");
        })
        .build();
    let gate = Gate::default();
    let fence = gate.clone();
    let pass = async move {
        fence.await;
        panic!("the pass of unit {}", 7);
    };
    let device = space
        .insert(pages(0, 1), Device::new("device", &Log::default()).then(Act::pass(pass)))
        .unwrap();
    Task::new(space.invalidate(pages(0, 1), Event::Unmap)).expect_pending();
    gate.open();
    now(space.drain());
    assert_eq!(
        *reports.lock().unwrap(),
        [r#"Panicked { callback: Pass, message: Some("the pass of unit 7") }"#]
    );
    assert_eq!(
        space.stats().lost_panics,
        2,
        "that of the reporter is counted, and not reported to it"
    );
    nothing_is_lost(&space, &[&device]);
}

#[test]
fn f2_a_first_pass_that_panics_while_the_thread_unwinds_does_not_abort() {
    struct UnmapOnDrop(AddressSpace, bool);
    impl Drop for UnmapOnDrop {
        fn drop(&mut self) {
            if self.1 {
                assert!(
                    self.0.try_invalidate(pages(0, 1), Event::Unmap).is_err(),
                    "its device may still use the memory"
                );
            } else {
                drop(now(self.0.invalidate(pages(0, 1), Event::Unmap)));
            }
        }
    }
    in_a_process("f2_a_first_pass_that_panics_while_the_thread_unwinds_does_not_abort", || {
        for non_blockable in [true, false] {
            let (space, device, _log) = one_device();
            device.next(Act::Panic);
            let unwound = quietly(|| {
                let _unmap = UnmapOnDrop(space.clone(), non_blockable);
                panic!("something else fails");
            });
            assert!(unwound.is_none());
            assert_eq!(space.stats().lost_panics, 1);
            nothing_is_lost(&space, &[&device]);
        }
    });
}

#[test]
fn f2_an_invalidation_in_the_destructor_of_a_thread_local_works() {
    struct OnExit(AddressSpace);
    impl Drop for OnExit {
        fn drop(&mut self) {
            drop(self.0.try_invalidate(pages(0, 1), Event::Unmap));
        }
    }
    thread_local!(static MAPPING: RefCell<Option<OnExit>> = const { RefCell::new(None) });
    in_a_process("f2_an_invalidation_in_the_destructor_of_a_thread_local_works", || {
        let (space, device, _log) = one_device();
        let of_thread = space.clone();
        let thread = std::thread::spawn(move || {
            // Initialized first, so destroyed last.
            MAPPING.set(Some(OnExit(of_thread.clone())));
            drop(now(of_thread.invalidate(pages(0, 1), Event::Unmap)));
        });
        thread.join().unwrap();
        assert_eq!(device.calls(), 2);
    });
}

/// Pending for ever, and its drop panics.
struct Stuck;

impl Future for Stuck {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        panic!("the drop of a pass fails");
    }
}

#[test]
fn f2_dropping_a_space_with_passes_whose_drops_panic_does_not_abort() {
    in_a_process("f2_dropping_a_space_with_passes_whose_drops_panic_does_not_abort", || {
        for unwinding in [false, true] {
            let reports = Arc::new(AtomicUsize::new(0));
            let count = reports.clone();
            let space = AddressSpace::builder()
                .on_report(move |_| _ = count.fetch_add(1, Ordering::SeqCst))
                .build();
            let log = Log::default();
            for page in 0..3 {
                let stuck = Device::new("stuck", &log).then(Act::pass(Stuck));
                let stuck = space.insert(pages(page, 1), stuck).unwrap();
                Task::new(space.invalidate(pages(page, 1), Event::Unmap)).expect_pending();
                drop(stuck);
            }
            let dropped = quietly(move || {
                let _last = space;
                assert!(!unwinding, "something else fails");
            });
            assert!(dropped.is_none(), "the first one goes on in whoever drops the last handle");
            assert_eq!(reports.load(Ordering::SeqCst), if unwinding { 3 } else { 2 });
        }
    });
}

/// A waker that runs code when it is dropped.
struct RunsWhenDropped(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Wake for RunsWhenDropped {
    fn wake(self: Arc<Self>) {}
}

impl Drop for RunsWhenDropped {
    fn drop(&mut self) {
        if let Some(run) = self.0.lock().unwrap().take() {
            run();
        }
    }
}

/// The former waker of a removal is dropped at a moment at which the removal has seen that nothing
/// calls its notifier, and has not taken it yet.
#[test]
fn l1_a_removal_that_meets_a_call_when_it_takes_its_notifier_looks_again() {
    let (space, device, log) = one_device();
    let removed = space.insert(pages(0, 1), Device::new("removed", &log)).unwrap();
    let guard = now(space.invalidate(pages(0, 1), Event::Clear));
    let [(begins, to_begin), (called, in_the_call), (leaves, to_leave)] =
        std::array::from_fn(|_| channel());
    let former = Waker::from(Arc::new(RunsWhenDropped(Mutex::new(Some(Box::new(move || {
        begins.send(()).unwrap();
        in_the_call.recv().unwrap();
    }))))));
    let removal = Arc::new(Mutex::new(Box::pin(removed.remove())));
    let inside = removal.clone();
    device.next(Act::Run(Box::new(move |_| {
        // It waits until the first passes are over.
        let polled = inside.lock().unwrap().as_mut().poll(&mut Context::from_waker(&former));
        assert!(polled.is_pending());
    })));
    device.next(Act::Run(Box::new(move |_| {
        called.send(()).unwrap();
        to_leave.recv().unwrap();
    })));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    let inside = space.clone();
    let caller = std::thread::spawn(move || {
        to_begin.recv().unwrap();
        drop(now(inside.invalidate(pages(0, 1), Event::Unmap)));
    });
    let mut removal = Task::new(Arc::into_inner(removal).unwrap().into_inner().unwrap());
    let polled = removal.poll();
    leaves.send(()).unwrap();
    assert!(polled.is_pending() && removal.is_woken());
    caller.join().unwrap();
    assert_eq!(removal.finish().name, "removed");
    drop(guard);
}

#[test]
fn f1_a_notifier_that_goes_with_its_space_panics_in_who_drops_the_last_handle() {
    let space = AddressSpace::new();
    let bomb = space.insert(pages(0, 1), Bomb(Gate::default())).unwrap();
    Task::new(space.invalidate(pages(0, 1), Event::Unmap)).expect_pending();
    drop(bomb);
    assert!(quietly(move || drop(space)).is_none());
}

/// A waker that polls its task inline, as some single-threaded executors do.
struct Inline(Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>, AtomicBool);

impl Inline {
    fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Arc<Self> {
        let task = Arc::new(Self(Mutex::new(Some(Box::pin(future))), AtomicBool::new(false)));
        Wake::wake_by_ref(&task);
        task
    }

    fn is_done(&self) -> bool {
        self.0.lock().unwrap().is_none()
    }
}

impl Wake for Inline {
    fn wake(self: Arc<Self>) {
        Wake::wake_by_ref(&self);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.1.store(true, Ordering::SeqCst);
        loop {
            let Ok(mut slot) = self.0.try_lock() else { return };
            if !self.1.swap(false, Ordering::SeqCst) {
                return;
            }
            if let Some(future) = &mut *slot {
                let waker = Waker::from(self.clone());
                if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                    *slot = None;
                }
            }
        }
    }
}

#[test]
fn f3_a_task_that_a_waker_polls_inline_in_a_first_pass_may_wait() {
    let space = AddressSpace::new();
    let inbox = Arc::new(space.inbox(pages(0, 1), ()).unwrap());
    let reads = Arc::new(AtomicUsize::new(0));
    let task = Inline::spawn({
        let (inbox, reads) = (inbox.clone(), reads.clone());
        async move {
            let mut stream = &*inbox;
            while let Some(delivery) = stream.next().await {
                delivery.done();
                inbox.read_begin().await;
                reads.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    assert_eq!(reads.load(Ordering::SeqCst), 1);
    now(space.release());
    assert!(task.is_done());
}

#[test]
fn f3_the_pass_of_an_async_notifier_may_wait_for_another_range() {
    struct Nested(AddressSpace, u64);
    impl AsyncIntervalNotifier for Nested {
        async fn invalidate(self: Arc<Self>, _: InvalidationInfo) {
            drop(self.0.invalidate(pages(self.1, 1), Event::Unmap).await);
        }
    }
    let (space, log, gate) = (AddressSpace::new(), Log::default(), Gate::default());
    let _other = space
        .insert(pages(5, 1), Device::new("other", &log).then(Act::pass(gate.clone())))
        .unwrap();
    let _nested = space.insert(pages(0, 1), AsyncNotifier::new(Nested(space.clone(), 5))).unwrap();
    let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    unmap.expect_pending();
    gate.open();
    drop(unmap.finish());
}

#[test]
fn f3_a_first_pass_may_wait_for_what_its_invalidation_does_not_cover() {
    let (space, device, log) = one_device();
    let (elsewhere, held) = (space.clone(), now(space.invalidate(pages(9, 1), Event::Unmap)));
    let far = Arc::new(space.insert(pages(9, 1), Device::new("far", &log)).unwrap());
    let (gate, reader) = (Gate::default(), far.clone());
    far.next(Act::pass(gate.clone()));
    device.next(Act::Run(Box::new(move |_| {
        // Polled again and again, as by who blocks on it; both wait for something that goes on
        // without this first pass.
        let mut read = Task::new(reader.read_begin());
        let mut unmap = Task::new(elsewhere.invalidate(pages(9, 1), Event::Unmap));
        for _ in 0..3 {
            assert!(read.poll().is_pending() && unmap.poll().is_pending());
        }
    })));
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    drop(held);
    gate.open();
    nothing_is_lost(&space, &[&device, &far]);
}

#[test]
fn f3_a_driver_may_have_two_driver_locks() {
    #[derive(Default)]
    struct Two(DriverLock<Vec<u64>>, DriverLock<Vec<u64>>);
    impl IntervalNotifier for Two {
        fn invalidate(
            &self,
            invalidation: &Invalidation<'_>,
        ) -> Result<Option<PassFuture>, WouldBlock> {
            self.0.lock_for(invalidation).clear();
            self.1.lock_for(invalidation).clear();
            Ok(None)
        }
    }
    let space = AddressSpace::new();
    let two = space.insert(pages(0, 1), Two::default()).unwrap();
    drop(now(space.invalidate(pages(0, 1), Event::Unmap)));
    let sequence = now(two.read_begin());
    two.0.install(&two, sequence, |a| a.push(1)).unwrap();
    two.1.install(&two, sequence, |b| b.push(1)).unwrap();
}

#[test]
fn a5_nothing_can_be_installed_after_the_stream_has_ended() {
    let space = AddressSpace::new();
    let mut inbox = space.inbox(pages(0, 1), Vec::<u64>::new()).unwrap();
    let before = now(inbox.read_begin());
    let mut release = Task::new(space.release());
    release.expect_pending();
    now(inbox.next()).unwrap().done();
    release.finish();
    assert!(!inbox.is_closed(), "the stream has not ended yet");
    assert!(now(inbox.next()).is_none());
    assert!(inbox.is_closed());
    for sequence in [before, now(inbox.read_begin())] {
        assert_eq!(inbox.install(sequence, |mappings| mappings.push(1)), Err(Collision));
    }
    let mirrored: Result<(), _> = now(inbox.mirror(
        RetryBudget::default(),
        |_| async { Ok::<_, ()>(1) },
        |mappings, page| mappings.push(page),
    ));
    assert_eq!(mirrored, Err(MirrorError::Closed));
    assert_eq!(inbox.with(|mappings| mappings.len()), 0);
}

/// Counts those that are alive.
struct Counted(Arc<AtomicUsize>);

impl Wake for Counted {
    fn wake(self: Arc<Self>) {}
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
fn a5_tasks_that_waited_for_the_stream_and_went_away_are_forgotten() {
    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 1), ()).unwrap();
    let alive = Arc::new(AtomicUsize::new(0));
    let wait_once = || {
        alive.fetch_add(1, Ordering::SeqCst);
        let waker = Waker::from(Arc::new(Counted(alive.clone())));
        let mut stream = &inbox;
        assert!(Pin::new(&mut stream.next()).poll(&mut Context::from_waker(&waker)).is_pending());
    };
    (0..10_000).for_each(|_| wait_once());
    assert!(alive.load(Ordering::SeqCst) <= 48, "{} are kept", alive.load(Ordering::SeqCst));
    // Those that stay are not forgotten, however many there are, and are woken no more often than
    // others come.
    let mut streams = vec![&inbox; 100];
    let mut stay: Vec<_> = streams.iter_mut().map(|stream| Task::new(stream.next())).collect();
    let mut polls = 0;
    for round in 0..50 {
        if round % 5 == 0 {
            wait_once();
        }
        while let Some(woken) = stay.iter_mut().find(|task| task.is_woken()) {
            assert!(woken.poll().is_pending());
            polls += 1;
            assert!(polls < 5_000, "they wake each other for ever");
        }
    }
    let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    unmap.expect_pending();
    assert!(stay.iter().all(Task::is_woken), "a delivery wakes all that wait");
    let mut delivered = 0;
    for task in &mut stay {
        if let Poll::Ready(Some(delivery)) = task.poll() {
            delivery.done();
            delivered += 1;
        }
    }
    assert_eq!(delivered, 1);
    drop(unmap.finish());
}

#[test]
fn a5_forty_tasks_that_wait_for_the_stream_and_stay_are_each_woken_once_at_most() {
    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 1), ()).unwrap();
    let mut tasks: Vec<_> = (0..40).map(|_| Task::new(inbox.recv())).collect();
    tasks.iter_mut().for_each(Task::expect_pending);
    // Eight wait. The other 32 were woken to come again if they are there.
    let woken: Vec<_> = tasks.iter().map(Task::is_woken).collect();
    assert_eq!(woken, [[true; 32].as_slice(), &[false; 8]].concat());
    for at in 0..32 {
        assert!(tasks[at].poll().is_pending());
        assert_eq!(tasks.iter().filter(|task| task.is_woken()).count(), 31 - at);
    }
}

#[test]
fn a5_of_more_tasks_than_are_known_more_may_wait_after_256_turns() {
    /// Counts its wake-ups.
    struct Woken(Arc<AtomicUsize>);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    let space = AddressSpace::new();
    let inbox = space.inbox(pages(0, 1), ()).unwrap();
    let woken = Arc::new(AtomicUsize::new(0));
    // Returns whether another task that waits was woken to make room for one more.
    let add = || {
        let before = woken.load(Ordering::SeqCst);
        let waker = Waker::from(Arc::new(Woken(woken.clone())));
        assert!(Pin::new(&mut inbox.recv()).poll(&mut Context::from_waker(&waker)).is_pending());
        woken.load(Ordering::SeqCst) != before
    };
    let mut adds = (0..100_000).map(|_| add());
    let mut turn = || {
        let room = adds.by_ref().take_while(|woke| !woke).count();
        (room, 1 + adds.by_ref().take_while(|woke| *woke).count())
    };
    // Eight wait, and 32 are known beside them. The one that finds room again ends the turn.
    assert_eq!(turn(), (8, 256 * (8 + 32) + 1));
    assert_eq!(turn(), (8 - 1, 256 * (16 + 32) + 1), "twice as many wait");
}

#[test]
fn done_inside_with_is_a_clear_panic_and_the_delivery_comes_back() {
    let space = AddressSpace::new();
    let mut inbox = space.inbox(pages(0, 1), ()).unwrap();
    let mut unmap = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    unmap.expect_pending();
    let delivery = now(inbox.next()).unwrap();
    let panic = catch_unwind(AssertUnwindSafe(|| inbox.with(|()| delivery.done()))).unwrap_err();
    assert!(panic.downcast_ref::<&str>().unwrap().contains("call it after `with`"));
    let nested =
        catch_unwind(AssertUnwindSafe(|| inbox.with(|()| inbox.with(|()| ())))).unwrap_err();
    assert!(nested.downcast_ref::<&str>().unwrap().contains("holds this driver lock already"));
    // Dropped there, also while the thread unwinds, it goes back to the queue.
    let again = now(inbox.next()).unwrap();
    assert_eq!(again.deliveries(), 2);
    assert!(
        quietly(|| inbox.with(|()| {
            let _dropped_here = again;
            panic!("the handler fails");
        }))
        .is_none()
    );
    now(inbox.next()).unwrap().done();
    drop(unmap.finish());
}

#[test]
fn s4_a_sequence_of_two_first_passes_at_the_same_time_is_the_later_one() {
    // What loom shows of every interleaving (`tests/loom.rs`), here with threads.
    let (space, device, _log) = one_device();
    let held = now(space.invalidate(pages(9, 1), Event::Clear));
    for _ in 0..200 {
        let sequences: Vec<u64> = std::thread::scope(|scope| {
            let unmap = || now(space.invalidate(pages(0, 1), Event::Unmap)).sequence().get();
            let threads: Vec<_> = (0..2).map(|_| scope.spawn(unmap)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(device.sequence().get(), *sequences.iter().max().unwrap());
    }
    drop(held);
}
