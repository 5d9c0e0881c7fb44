//! Userfaultfd's events on `async-io`, reader and delivery as two tasks of one thread:
//! `cargo run --release --features userfaultfd --example uffd_async_io`.
//!
//! Good for a program that does not fork, and whose other threads do not unmap watched memory while
//! they hold a lock that this thread needs; the example `uffd_tokio` shows the arrangement without
//! these conditions.
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr)]

use async_io::Async;
use futures::future::{self, Either};
use futures::stream::{FuturesUnordered, StreamExt};
use shootdown::source::{Deliveries, OwnedMapping, Reader, Uffd};
use shootdown::{AddressSpace, IntervalNotifier, Invalidation, PassFuture, WouldBlock};
use std::error::Error;
use std::io;
use std::os::fd::AsFd;
use std::pin::pin;

const LEN: usize = 1 << 20;

struct Device;

impl IntervalNotifier for Device {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        println!("first pass: {} of {}", invalidation.event().name(), invalidation.range());
        invalidation.set_seq();
        // A timer of async-io runs on a thread of its own, whoever polls it.
        Ok(Some(PassFuture::new(async {
            async_io::Timer::after(std::time::Duration::from_millis(1)).await;
            println!("the device has let go");
        })))
    }
}

/// Reads. Awaits nothing but the descriptor, so that it is there when somebody unmaps.
async fn read(mut reader: Reader) -> io::Result<()> {
    // A copy of the descriptor to wait for, so that the handle stays free to be used.
    let readable = Async::new_nonblocking(reader.as_fd().try_clone_to_owned()?)?;
    loop {
        readable.readable().await?;
        reader.read()?;
    }
}

/// Delivers; passes that are pending do not keep it from starting what is read meanwhile.
async fn deliver(mut deliveries: Deliveries) -> io::Result<()> {
    let readable = Async::new_nonblocking(deliveries.as_fd().try_clone_to_owned()?)?;
    let mut passes = FuturesUnordered::new();
    // One that never ends, so that there is always something to select.
    passes.push(Either::Left(future::pending()));
    while !deliveries.is_stopped() {
        // Also when it is time to look once more at what a `madvise` was to drop.
        let look =
            deliveries.next_look().map_or_else(async_io::Timer::never, async_io::Timer::after);
        let rings = pin!(readable.readable());
        match future::select(future::select(rings, look), passes.select_next_some()).await {
            Either::Left((Either::Left((rung, _)), _)) => rung?,
            Either::Left((Either::Right(_), _)) => {}
            Either::Right(_) => continue,
        }
        passes.push(Either::Right(deliveries.deliver()));
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let space = AddressSpace::new();
    let (uffd, reader, deliveries) = Uffd::open(&space)?;
    let memory = OwnedMapping::new(&AddressSpace::new(), LEN)?;
    let range = memory.range();
    let device = space.insert(range, Device)?;
    // A driver that looks at the memory watches it after `read_begin`: `Uffd::mirror` does. This
    // one only listens.
    let _watch = uffd.watch(range)?;

    // Another part of the program, which knows nothing of the space, gives the memory back.
    let unmapping = std::thread::spawn(move || {
        drop(memory);
        println!("munmap has returned");
    });
    let served = future::select(Box::pin(read(reader)), Box::pin(deliver(deliveries)));
    let waited = async {
        while !unmapping.is_finished() {
            async_io::Timer::after(std::time::Duration::from_millis(1)).await;
        }
        device.read_begin().await;
        println!("a reader that began after it has waited for the device");
    };
    match async_io::block_on(future::select(served, Box::pin(waited))) {
        Either::Left((Either::Left((ended, _)) | Either::Right((ended, _)), _)) => ended?,
        Either::Right(_) => {}
    }
    Ok(())
}
