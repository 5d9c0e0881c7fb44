//! Userfaultfd's events on tokio:
//! `cargo run --release --features userfaultfd --example uffd_tokio`.
//!
//! The reader has a thread of its own, as a program that forks needs it (a thread inside `fork`
//! holds the allocator's locks and waits for the reader); the delivery is a task that waits for its
//! descriptor with `AsyncFd`.
#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr)]

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use shootdown::source::Uffd;
use shootdown::{
    AddressRange, AddressSpace, IntervalNotifier, Invalidation, PassFuture, Timeline, WouldBlock,
};
use std::error::Error;
use std::os::fd::AsFd;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;

const LEN: usize = 1 << 20;

/// Says what it is told; its device needs a millisecond.
///
/// The timer runs on the driver's runtime, and the pass waits for its end: a pass is polled on
/// whatever thread waits for it, and not every thread has a runtime.
struct Device(Handle);

impl IntervalNotifier for Device {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        println!("first pass: {} of {}", invalidation.event().name(), invalidation.range());
        invalidation.set_seq();
        let (number, flushed) = (1, Timeline::new());
        let pass = flushed.reached(number);
        self.0.spawn(async move {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            println!("the device has let go");
            flushed.signal(number);
        });
        Ok(Some(PassFuture::new(pass)))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space)?;
    let reading = std::thread::spawn(move || reader.run());
    let delivering = tokio::spawn(async move {
        // A copy of the descriptor to wait for, so that the handle stays free to be used.
        // SAFETY: the copy is open as long as the `AsyncFd` that owns it.
        let bell = unsafe { AsyncFd::register(deliveries.as_fd().try_clone_to_owned()?)? };
        while !deliveries.is_stopped() {
            // Also when it is time to look once more at what a `madvise` was to drop.
            let look = deliveries.next_look();
            tokio::select! {
                ready = bell.readable() => ready?.clear_ready(),
                () = tokio::time::sleep(look.unwrap_or_default()), if look.is_some() => {}
            }
            // A task of its own, so that what is read meanwhile is delivered while this one waits
            // for the device.
            tokio::spawn(deliveries.deliver());
        }
        Ok::<_, std::io::Error>(())
    });

    // SAFETY: a new mapping where the kernel chooses.
    let memory = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            LEN,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )?
    };
    let range = AddressRange::new(memory.addr() as u64, LEN as u64)?;
    let device = space.insert(range, Device(Handle::current()))?;
    // A driver that looks at the memory watches it after `read_begin`: `Uffd::mirror` does. This
    // one only listens.
    let _watch = uffd.watch(range)?;

    // SAFETY: nothing refers to the memory.
    unsafe { munmap(memory, LEN)? };
    println!("munmap has returned");
    device.read_begin().await;
    println!("a reader that began after it has waited for the device");

    uffd.stop();
    reading.join().expect("the reader does not panic")?;
    delivering.await??;
    Ok(())
}
