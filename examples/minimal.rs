//! The smallest complete driver: a device that mirrors pages, and a program that takes them away.
#![allow(missing_docs, clippy::print_stdout)]

use shootdown::{
    AddressRange, AddressSpace, DriverLock, Event, IntervalNotifier, Invalidation, PassFuture,
    RetryBudget, WouldBlock,
};
use std::collections::BTreeSet;
use std::time::Duration;

#[derive(Default)]
struct Gpu {
    page_table: DriverLock<BTreeSet<u64>>,
}

impl IntervalNotifier for Gpu {
    fn invalidate(
        &self,
        invalidation: &Invalidation<'_>,
    ) -> Result<Option<PassFuture>, WouldBlock> {
        let range = invalidation.range();
        // Sets the sequence, so that readers that began before this will start over.
        self.page_table.lock_for(invalidation).retain(|page| !range.contains(*page));
        // The device goes on using what its TLB holds until the flush is done: the guard is handed
        // out after that.
        Ok(Some(PassFuture::new(tlb_flush(range))))
    }
}

async fn tlb_flush(range: AddressRange) {
    println!("gpu: flushing {range}");
    smol::Timer::after(Duration::from_millis(2)).await;
    println!("gpu: flushed {range}");
}

/// Stands for the walk of the program's page table, which may have to wait for a page.
async fn fault_in(page: u64) -> Result<u64, std::io::Error> {
    smol::Timer::after(Duration::from_millis(1)).await;
    Ok(page)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    smol::block_on(async {
        let space = AddressSpace::new();
        let buffer = AddressRange::new(0x10_0000, 0x4000)?;
        let gpu = space.insert(buffer, Gpu::default())?;

        // The read side: look at the memory, then install unless an invalidation came in between.
        for page in (buffer.start()..=buffer.last()).step_by(0x1000) {
            let install = |table: &mut BTreeSet<u64>, page| table.insert(page);
            gpu.page_table
                .mirror(&gpu, RetryBudget::default(), |_| fault_in(page), install)
                .await?;
        }
        println!("gpu: {} pages mapped", gpu.page_table.lock().len());

        // The program unmaps the second half.
        let half = AddressRange::new(0x10_2000, 0x2000)?;
        let guard = space.invalidate(half, Event::Unmap).await;
        println!("program: no device uses {half}; unmapping it");
        drop(guard);

        println!("gpu: {} pages mapped", gpu.page_table.lock().len());
        gpu.remove().await;
        Ok(())
    })
}
