//! How long an invalidation takes, beside a plain TCP fan-out in the same run.

use crate::fanout::Fanout;
use crate::processes::Process;
use crate::world::{PAGES, World, percentile, runtime};
use anyhow::{Result, ensure};
use std::time::Duration;

pub(crate) fn run(term: Duration, rounds: u32, least: u64, most: u64) -> Result<()> {
    println!(
        "An invalidation of a page that k mirrors have copies of, which they fetch again within a millisecond;"
    );
    println!(
        "beside it 64 bytes to k processes and back over plain TCP. Microseconds, {rounds} of each.\n"
    );
    println!("| k | TCP p50 | p99 | invalidation p50 | p99 | times TCP |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: |");
    for mirrors in least..=most {
        runtime()?.block_on(row(term, rounds, mirrors))?;
    }
    println!();
    Ok(())
}

async fn row(term: Duration, rounds: u32, mirrors: u64) -> Result<()> {
    // Leases are long here: it is about what answers.
    let world = World::begin(term.max(Duration::from_secs(2))).await?;
    let begin = |number| Process::mirror(number, world.address, world.folder.path(), &[]);
    let mut processes = (1..=mirrors).map(begin).collect::<Result<Vec<_>>>()?;
    let ready = tokio::task::spawn_blocking(move || {
        processes.iter_mut().try_for_each(|process| process.says("ready").map(drop))?;
        Ok::<_, anyhow::Error>(processes)
    });
    let processes = ready.await??;
    let mut fanout = Fanout::begin(mirrors)?;
    let (mut tcp, mut took) = (Vec::new(), Vec::new());
    for round in 0..rounds + 100 {
        let (plain, lease) = (fanout.round()?, world.change(u64::from(round) % PAGES).await?);
        // The first ones are slower.
        if round >= 100 {
            tcp.push(plain);
            took.push(lease);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let counts = world.hub.counts();
    ensure!(counts.expelled == 0, "a mirror did not answer in time: {counts:?}");
    // More, where this thread got no processor for so long that an invalidation lapsed and began
    // anew (C4).
    ensure!(
        counts.acknowledged >= mirrors * u64::from(rounds + 100),
        "not all have answered: {counts:?}"
    );
    tcp.sort();
    took.sort();
    let micros =
        |times: &[Duration], of_hundred| percentile(times, of_hundred).as_nanos() as f64 / 1_000.0;
    let times = micros(&took, 50) / micros(&tcp, 50);
    println!(
        "| {mirrors} | {:.0} | {:.0} | {:.0} | {:.0} | {times:.1} |",
        micros(&tcp, 50),
        micros(&tcp, 99),
        micros(&took, 50),
        micros(&took, 99)
    );
    drop(processes);
    Ok(())
}
