//! Mirrors are stopped and killed at random, and every accepted read is checked.

use crate::processes::{Process, Reads};
use crate::world::{PAGES, World, runtime};
use anyhow::{Result, ensure};
use rustix::process::Signal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub(crate) fn run(term: Duration, seconds: u64, mirrors: u64, seed: u64) -> Result<()> {
    println!(
        "{mirrors} mirrors read as fast as they can; one after the other is stopped or killed at random."
    );
    println!("Terms of {term:?}.\n");
    println!(
        "| leases | seconds | accepted reads | stale | changes | longest wait | stops | kills |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    let on =
        runtime()?.block_on(chaos(term, Duration::from_secs(seconds), mirrors, seed, false))?;
    // In less time it may happen that whoever was stopped hears of the change before it reads on.
    let seconds = Duration::from_secs(seconds.div_ceil(6).max(10));
    let off = runtime()?.block_on(chaos(term, seconds, mirrors, seed, true))?;
    println!();
    ensure!(on.accepted > 0, "nothing was read");
    ensure!(on.stale == 0, "{} stale reads of {}", on.stale, on.accepted);
    ensure!(off.stale > 0, "without leases nothing was stale: does the check work?");
    Ok(())
}

async fn chaos(
    term: Duration,
    time: Duration,
    mirrors: u64,
    seed: u64,
    lease_off: bool,
) -> Result<Reads> {
    let world = World::begin(term).await?;
    let (folder, address) = (world.folder.path().to_owned(), world.address);
    let begin = move |number: u64| {
        let more: &[&str] = if lease_off { &["--reads", "--lease-off"] } else { &["--reads"] };
        Process::mirror(number + 1, address, &folder, more)
    };
    let over = std::sync::Arc::<AtomicBool>::default();
    let stop = over.clone();
    // Another thread, so that the owner does not wait for processes to begin.
    let disturb = std::thread::spawn(move || {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut processes = (0..mirrors).map(&begin).collect::<Result<Vec<_>>>()?;
        let (mut total, mut stops, mut kills) = (Reads::default(), 0_u64, 0_u64);
        std::thread::sleep(Duration::from_millis(500));
        let began = Instant::now();
        while began.elapsed() < time {
            let number = random.u64(..mirrors);
            let index = number as usize;
            if random.u8(..4) == 0 {
                total += std::mem::replace(&mut processes[index], begin(number)?).kill();
                kills += 1;
            } else {
                processes[index].signal(Signal::STOP);
                std::thread::sleep(term.mul_f64(random.f64() * 3.0));
                processes[index].signal(Signal::CONT);
                stops += 1;
            }
            std::thread::sleep(term.mul_f64(random.f64() * 2.0));
        }
        stop.store(true, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(100));
        for process in processes {
            total += process.kill();
        }
        Ok::<_, anyhow::Error>((total, stops, kills))
    });
    let (mut changes, mut longest) = (0_u64, Duration::ZERO);
    while !over.load(Ordering::Relaxed) && !disturb.is_finished() {
        longest = longest.max(world.change(changes % PAGES).await?);
        changes += 1;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let ended = tokio::task::spawn_blocking(move || disturb.join()).await?;
    let (reads, stops, kills) =
        ended.map_err(|_| anyhow::anyhow!("whoever stops and kills has panicked"))??;
    let Reads { accepted, stale } = reads;
    let (leases, seconds) = (if lease_off { "off" } else { "on" }, time.as_secs());
    println!(
        "| {leases} | {seconds} | {accepted} | {stale} | {changes} | {longest:.1?} | {stops} | {kills} |"
    );
    ensure!(world.tally.counts().malformed == 0 && changes > 0, "{:?}", world.tally.counts());
    Ok(reads)
}
