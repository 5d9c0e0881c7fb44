//! What one mirror of two costs when something happens to it.

use crate::processes::Process;
use crate::relay::{Mode, Relay};
use crate::world::{World, runtime};
use anyhow::{Result, ensure};
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Nothing,
    Kill,
    Stop,
    Partition,
    Cut,
    Restart,
}

const EVENTS: [(Event, &str); 6] = [
    (Event::Nothing, "nothing"),
    (Event::Kill, "kill -9"),
    (Event::Stop, "SIGSTOP"),
    (Event::Partition, "a partition: the relay holds everything"),
    (Event::Cut, "the link is cut, and comes back after 10 ms"),
    (Event::Restart, "kill -9, and a new process at once"),
];

pub(crate) fn run(term: Duration, rounds: u32) -> Result<()> {
    runtime()?.block_on(costs(term, rounds))
}

async fn costs(term: Duration, rounds: u32) -> Result<()> {
    let world = World::begin(term).await?;
    let bound = world.terms.patience + world.terms.owner_term();
    println!(
        "One of two mirrors, {rounds} times each. Terms of {term:?}; an invalidation takes up to {bound:?}.\n"
    );
    println!(
        "| what happens | the next invalidation, longest | the one after it, longest | until it has joined again, longest |"
    );
    println!("| --- | ---: | ---: | ---: |");
    let relay = Relay::begin(world.address).await;
    let near = ready(Process::mirror(1, world.address, world.folder.path(), &[])?).await?;
    let mut far = ready(Process::mirror(2, relay.address, world.folder.path(), &[])?).await?;
    for (event, name) in EVENTS {
        let (mut first, mut second, mut again) = <(Duration, Duration, Duration)>::default();
        for _ in 0..rounds {
            let mut next = None;
            match event {
                Event::Nothing => {}
                Event::Kill => far.signal(Signal::KILL),
                Event::Stop => far.signal(Signal::STOP),
                Event::Partition => relay.set(Mode::Hold),
                Event::Cut => {
                    relay.set(Mode::Cut);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    relay.set(Mode::Forward);
                }
                Event::Restart => {
                    far.signal(Signal::KILL);
                    next = Some(Process::mirror(2, relay.address, world.folder.path(), &[])?);
                }
            }
            first = first.max(world.change(0).await?);
            second = second.max(world.change(1).await?);
            let began = Instant::now();
            match event {
                Event::Kill => {
                    next = Some(Process::mirror(2, relay.address, world.folder.path(), &[])?)
                }
                Event::Stop => far.signal(Signal::CONT),
                Event::Partition => relay.set(Mode::Forward),
                Event::Nothing | Event::Cut | Event::Restart => {}
            }
            if let Some(next) = next {
                far = ready(next).await?;
            }
            while world.hub.members().len() < 2 {
                ensure!(began.elapsed() < Duration::from_secs(20), "it does not join again");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            again = again.max(began.elapsed());
            tokio::time::sleep(term).await;
        }
        println!("| {name} | {} | {} | {} |", millis(first), millis(second), millis(again));
        ensure!(first < bound + term, "{name}: {first:?} is longer than patience and term allow");
    }
    println!();
    drop((near, far));
    Ok(())
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

async fn ready(mut process: Process) -> Result<Process> {
    tokio::task::spawn_blocking(move || process.says("ready").map(|_| process)).await?
}
