use crate::support::*;
use shootdown::{
    AddressSpace, AsyncIntervalNotifier, AsyncNotifier, Close, Delivery, Drain, DriverLock, Event,
    Inbox, Invalidate, InvalidationGuard, InvalidationInfo, Reached, ReadBegin, Recv, Release,
    Remove, RetryBudget, Subscription, Timeline,
};
use std::sync::Arc;

fn send<T: Send>() {}
fn sync<T: Sync>() {}

#[test]
fn x2_everything_public_is_send_and_sync() {
    fn both<T: Send + Sync>() {
        send::<T>();
        sync::<T>();
    }
    both::<AddressSpace>();
    both::<Subscription<Device>>();
    both::<Invalidate<'_>>();
    both::<InvalidationGuard<'_>>();
    both::<ReadBegin<'_>>();
    both::<Remove<Device>>();
    both::<Close<'_>>();
    both::<Release<'_>>();
    both::<Drain<'_>>();
    both::<DriverLock<Vec<u64>>>();
    both::<Inbox<Vec<u64>>>();
    both::<Delivery>();
    both::<Recv<'_, Vec<u64>>>();
    both::<Timeline>();
    both::<Reached>();
    let (_space, device, _log) = one_device();
    let lock = DriverLock::new(0);
    let mirror = lock.mirror(
        &device,
        RetryBudget::default(),
        |_| std::future::ready(Ok::<_, ()>(1)),
        |value, one| *value = one,
    );
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    assert_eq!(now(is_send(mirror)), Ok(()));
    send::<shootdown::PassFuture>();
}

#[test]
fn x1_a_pass_may_be_completed_from_any_thread() {
    let (space, device, _log) = one_device();
    for _ in 0..100 {
        let gate = Gate::default();
        device.next(Act::pass(gate.clone()));
        let device = std::thread::spawn(move || gate.open());
        drop(futures::executor::block_on(space.invalidate(pages(0, 1), Event::Unmap)));
        device.join().unwrap();
    }
}

#[derive(Default)]
struct Gpu {
    page_table: DriverLock<Vec<u64>>,
    fence: Gate,
}

impl AsyncIntervalNotifier for Gpu {
    async fn invalidate(self: Arc<Self>, invalidation: InvalidationInfo) {
        self.page_table.lock().retain(|page| !invalidation.range.contains(*page));
        self.fence.clone().await;
    }
}

#[test]
fn an_async_notifiers_first_poll_is_the_first_pass_and_the_rest_the_pass() {
    let space = AddressSpace::new();
    let gpu = space.insert(pages(0, 1), AsyncNotifier::new(Gpu::default())).unwrap();
    let sequence = now(gpu.read_begin());
    gpu.page_table.install(&gpu, sequence, |pages| pages.push(7)).unwrap();
    let mut invalidate = Task::new(space.invalidate(pages(0, 1), Event::Unmap));
    assert!(invalidate.poll().is_pending());
    assert!(gpu.page_table.lock().is_empty() && gpu.read_retry(sequence));
    gpu.fence.open();
    drop(invalidate.finish());
}
