//! A watchdog that names the driver whose device hangs.
//!
//! `AddressSpace::active` lists what is under invalidation, for how long, and whose passes are pending; a thread or task of the program's own
//! looks at it now and then. Here one of three GPUs takes far too long.
#![allow(missing_docs, clippy::print_stdout)]

use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture, Phase, Timeline, WouldBlock,
};
use std::borrow::Cow;
use std::time::Duration;
use tokio::runtime::Handle;

struct Gpu {
    name: &'static str,
    takes: Duration,
    state: DriverLock<State>,
    flushed: Timeline,
    /// Where its timers run: a pass may be polled on any thread.
    runtime: Handle,
}

#[derive(Default)]
struct State {
    page_table: Vec<u64>,
    submitted: u64,
}

impl IntervalNotifier for Gpu {
    fn invalidate(&self, invalidation: &Invalidation<'_>) -> Result<Option<PassFuture>, WouldBlock> {
        let number = {
            let mut state = self.state.lock_for(invalidation);
            state.page_table.clear();
            state.submitted += 1;
            state.submitted
        };
        let (takes, flushed) = (self.takes, self.flushed.clone());
        self.runtime.spawn(async move {
            tokio::time::sleep(takes).await;
            flushed.signal(number);
        });
        Ok(Some(PassFuture::new(self.flushed.reached(number))))
    }

    fn name(&self) -> Cow<'static, str> {
        self.name.into()
    }
}

/// Looks every `interval`, and says what has been active for longer than `limit`, each time that it looks.
async fn watchdog(space: AddressSpace, limit: Duration, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        for stuck in space.active().iter().filter(|active| active.age.is_some_and(|age| age >= limit)) {
            let (range, event, age) = (stuck.range, stuck.event.name(), stuck.age.unwrap_or_default());
            match stuck.phase {
                Phase::Passes => println!("{event} of {range} has been waiting for {} for {age:.0?}", stuck.pending.join(", ")),
                Phase::Held => println!("{event} of {range}: all devices are done, and its guard has been held for {age:.0?}"),
                phase => println!("{event} of {range}: {phase:?} for {age:.0?}"),
            }
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (space, range) = (AddressSpace::new(), AddressRange::new(0x7f00_0000_0000, 0x20_0000)?);
    let gpu = |name, millis| Gpu {
        name,
        takes: Duration::from_millis(millis),
        state: DriverLock::default(),
        flushed: Timeline::new(),
        runtime: Handle::current(),
    };
    let _gpus =
        [space.insert(range, gpu("gpu0", 1))?, space.insert(range, gpu("gpu1", 350))?, space.insert(range, gpu("gpu2", 2))?];
    let watchdog = tokio::spawn(watchdog(space.clone(), Duration::from_millis(100), Duration::from_millis(100)));

    drop(space.invalidate(range, Event::Unmap).await);
    watchdog.abort();
    let stats = space.stats();
    println!("{} invalidations, the longest took {:.0?}", stats.invalidations, stats.longest.unwrap_or_default());
    for gpu in &_gpus {
        println!("{}: an invalidation that hit it was active for {:.0?} at most", gpu.name, gpu.stats().longest);
    }
    Ok(())
}
