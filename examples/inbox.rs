//! A driver that is a task: it takes invalidations from a stream, one after the other or several at
//! a time.
#![allow(missing_docs, clippy::print_stdout)]

use futures::StreamExt;
use shootdown::{AddressRange, AddressSpace, Event};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let space = AddressSpace::new();
    let buffer = AddressRange::new(0x10_0000, 0x4000)?;
    let inbox = Arc::new(space.named_inbox(buffer, BTreeSet::<u64>::new(), "nic0")?);

    let driver = tokio::spawn({
        let inbox = inbox.clone();
        async move {
            let mut invalidations = &*inbox;
            while let Some(invalidation) = invalidations.next().await {
                let range = invalidation.range();
                if invalidation.deliveries() > 1 {
                    println!("nic0: {range} again: the last attempt was cancelled");
                }
                inbox.with(|mappings| mappings.retain(|page| !range.contains(*page)));
                // If this task were cancelled here, the invalidation would be delivered again.
                tokio::time::sleep(Duration::from_millis(2)).await;
                println!("nic0: {} of {range} done", invalidation.event().name());
                invalidation.done();
            }
            println!("nic0: the address space is gone");
        }
    });

    let sequence = inbox.read_begin().await;
    inbox.install(sequence, |mappings| mappings.insert(0x10_1000))?;

    let guard = space.invalidate(AddressRange::new(0x10_1000, 0x1000)?, Event::Clear).await;
    println!("program: the page may be replaced now");
    drop(guard);

    space.release().await;
    driver.await?;
    Ok(())
}
