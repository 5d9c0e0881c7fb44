//! One driver on three executors: tokio, smol, and `futures::executor`. The library needs none of
//! them in particular.
#![allow(missing_docs, clippy::print_stdout)]

use futures::channel::oneshot;
use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture,
    WouldBlock,
};
use std::thread;
use std::time::Duration;

/// A device whose completions come from a thread of its own, as interrupts would.
#[derive(Default)]
struct Nvme {
    mappings: DriverLock<Vec<u64>>,
}

impl IntervalNotifier for Nvme {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        self.mappings.lock_for(invalidation).clear();
        let (completed, completion) = oneshot::channel();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(3));
            // Nobody listens any more only when the whole space is gone.
            let _ = completed.send(());
        });
        Ok(Some(PassFuture::new(async {
            let _ = completion.await;
        })))
    }
}

/// Everything that a program does; the same for each executor.
async fn program(executor: &str) -> Result<(), Box<dyn std::error::Error>> {
    let space = AddressSpace::new();
    let buffer = AddressRange::new(0x10_0000, 0x4000)?;
    let mut engines = Vec::new();
    for _ in 0..4 {
        engines.push(space.insert(buffer, Nvme::default())?);
    }
    let guard = space.invalidate(buffer, Event::Unmap).await;
    println!("{executor}: {} engines have let go of {buffer}", guard.hits());
    drop(guard);
    for engine in engines {
        engine.remove().await;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tokio::runtime::Builder::new_current_thread().build()?.block_on(program("tokio"))?;
    smol::block_on(program("smol"))?;
    futures::executor::block_on(program("futures::executor"))
}
