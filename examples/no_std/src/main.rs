//! The engine without `std`: a hand-written executor, an allocator over a static block of memory,
//! and no line of the standard library.
//!
//! Build it for a bare machine (`cargo build --target x86_64-unknown-none`), or run it on Linux,
//! where it enters at `_start` without a C library and ends with the system call `exit`:
//! `ci/no-std.sh` does both and checks with `cargo tree` that no dependency has `std` turned on.
#![no_std]
#![no_main]

extern crate alloc;

mod executor;
mod platform;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::future::poll_fn;
use core::task::Poll;
use executor::{Executor, yield_now};
use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture,
    RetryBudget, Subscription, WouldBlock,
};

type Mutex<T> = spin::mutex::SpinMutex<T>;

/// A device that takes so many turns of the executor to flush its TLB.
struct Device {
    turns: u32,
    page_table: DriverLock<Vec<u64>>,
}

impl IntervalNotifier for Device {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.page_table.lock_for(invalidation).retain(|page| !invalidation.range().contains(*page));
        let mut left = self.turns;
        Ok(Some(PassFuture::new(poll_fn(move |cx| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        }))))
    }
}

/// Mirrors a page as often as it can, until it is told to stop; returns how often that was.
async fn mirror(device: Arc<Subscription<Device>>, page: u64, stop: Arc<Mutex<bool>>) -> u32 {
    let mut mirrored = 0;
    while !*stop.lock() {
        let look = |_| async {
            yield_now().await; // faulting the page in takes time
            Ok::<u64, ()>(page)
        };
        let install = |table: &mut Vec<u64>, page| {
            if !table.contains(&page) {
                table.push(page);
            }
        };
        if device.page_table.mirror(&device, RetryBudget::retries(100), look, install).await.is_ok()
        {
            mirrored += 1;
        }
        yield_now().await;
    }
    mirrored
}

/// Runs it all; returns what went wrong.
fn run() -> Result<(), &'static str> {
    let space = AddressSpace::new();
    let range = AddressRange::new(0x10000, 0x4000).map_err(|_| "the range is not empty")?;
    let devices: Vec<_> = [1, 5, 3]
        .into_iter()
        .filter_map(|turns| {
            space.insert(range, Device { turns, page_table: DriverLock::new(Vec::new()) }).ok()
        })
        .map(Arc::new)
        .collect();
    let (stop, mirrored) = (Arc::new(Mutex::new(false)), Arc::new(Mutex::new(0)));
    let mut executor = Executor::new();
    for device in &devices {
        let (task, mirrored) = (mirror(device.clone(), 0x11000, stop.clone()), mirrored.clone());
        executor.spawn(async move { *mirrored.lock() += task.await });
    }
    let stale = Arc::new(Mutex::new(0));
    {
        let (space, devices, stop, stale) =
            (space.clone(), devices.clone(), stop.clone(), stale.clone());
        executor.spawn(async move {
            for _ in 0..1000 {
                let guard = space.invalidate(range, Event::Unmap).await;
                // No device has anything of it mapped now.
                *stale.lock() +=
                    devices.iter().map(|device| device.page_table.lock().len()).sum::<usize>();
                yield_now().await;
                *stale.lock() +=
                    devices.iter().map(|device| device.page_table.lock().len()).sum::<usize>();
                drop(guard);
                yield_now().await;
                yield_now().await;
            }
            *stop.lock() = true;
        });
    }
    executor.run().map_err(|_| "tasks wait, and nothing will wake them")?;
    let stats = space.stats();
    if stats.invalidations < 1000 || *mirrored.lock() < 100 || stats.waits == 0 {
        return Err("the readers and the invalidations did not meet");
    }
    if *stale.lock() != 0 {
        return Err("a device had a mapping under a guard");
    }
    Ok(())
}
