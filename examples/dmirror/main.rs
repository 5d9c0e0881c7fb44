//! A simulated process and a device that mirrors its memory, as Linux's `dmirror` does: a tour of
//! the commands, then random ones against a model of what the memory must hold, while other devices
//! read. `device.rs` is the driver to copy from.
#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

mod command;
mod device;
mod engine;
mod frame;
mod memory;
mod vma;

use clap::Parser;
use command::{CommandError, Outcome};
use device::{Device, Mirror};
use frame::{File, PAGE, REUSED, WORDS};
use memory::{PageState, Process, Residence};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use shootdown::{AddressRange, Event, Owner, RetryBudget};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vma::{BIG, Backing, Protection};

/// A device mirrors the memory of a simulated process: a tour of its commands, then random changes
/// of the memory, each of them checked through the device.
#[derive(Parser)]
#[command(
    name = "dmirror",
    after_long_help = "The tests of the driver are the kernel's own: cargo test --test hmm"
)]
struct Options {
    /// Random steps after the tour
    #[arg(long, value_name = "N", default_value_t = 2000)]
    steps: u64,

    /// Seed of the random steps
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Devices that read all the time beside the one that is checked
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=64))]
    readers: u16,

    /// Print one JSON object instead
    #[arg(long)]
    json: bool,
}

/// What happened in the random steps.
#[derive(Default, Serialize)]
struct Report {
    seed: u64,
    steps: u64,
    checked_words: u64,
    wrong_words: u64,
    faults: u64,
    retries: u64,
    reader_commands: u64,
    reader_junk: u64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let tokio = match tokio::runtime::Builder::new_multi_thread().enable_time().build() {
        Ok(tokio) => tokio,
        Err(error) => {
            eprintln!("no runtime could be started: {error}");
            return ExitCode::from(2);
        }
    };
    let run = async {
        if !options.json {
            tour().await?;
        }
        random(&options).await
    };
    let report = match tokio.block_on(run) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("a command failed that should not have: {error}");
            return ExitCode::from(1);
        }
    };
    if options.json {
        println!("{}", serde_json::to_string(&report).expect("numbers can be written as JSON"));
    } else {
        println!(
            "\n{} random steps (seed {}): {} words checked through the device, {} wrong; {} faults, {} retries\n{} reads of {} other devices \
             meanwhile, {} words of them were somebody else's",
            report.steps,
            report.seed,
            report.checked_words,
            report.wrong_words,
            report.faults,
            report.retries,
            report.reader_commands,
            options.readers,
            report.reader_junk
        );
    }
    if report.wrong_words + report.reader_junk == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn open(process: &Process, coherent: bool) -> Result<Mirror, CommandError> {
    Mirror::open(process, Device { owner: Owner::new(), coherent })
}

fn say(command: &str, outcome: &Outcome) {
    println!("{command:<44} {} pages, {} faults", outcome.pages, outcome.faults);
}

async fn tour() -> Result<(), CommandError> {
    const PAGES: u64 = 64;
    let process = Process::new();
    let mirror = open(&process, false)?;
    let range = process.map(PAGES, Protection::WRITE, Backing::Private);
    let numbers: Vec<u64> = (0..PAGES * WORDS as u64).collect();
    process.write(range.start(), &numbers).await?;

    say("READ", &mirror.read(range).await?);
    say("READ again: it is mapped", &mirror.read(range).await?);
    process.protect(range, Protection::READ).await;
    let refused = mirror.write(range.start(), &numbers).await.expect_err("the memory is read-only");
    println!("{:<44} {refused}", "WRITE after mprotect(PROT_READ)");
    process.protect(range, Protection::WRITE).await;
    say("WRITE after mprotect(PROT_WRITE)", &mirror.write(range.start(), &numbers).await?);
    say("MIGRATE_TO_DEV", &mirror.migrate_to_device(range).await?);
    process.read(range.start(), (PAGES * WORDS as u64 / 2) as usize).await?;
    let states = mirror.snapshot(range).await?;
    let local = states
        .iter()
        .filter(|state| matches!(state, PageState::Present { residence: Residence::Local, .. }))
        .count();
    println!(
        "{:<44} {local} of {PAGES} pages are the device's",
        "SNAPSHOT, the processor has read half of it"
    );
    say("MIGRATE_TO_SYS", &mirror.migrate_to_system(range).await?);
    say("EXCLUSIVE", &mirror.exclusive(range).await?);
    process.write(range.start(), &[7]).await?;
    let still = mirror.check_not_exclusive(AddressRange::new(range.start(), PAGE).expect("a page"));
    println!("{:<44} {still:?}", "CHECK_EXCLUSIVE, the processor has written");
    let child = process.fork().await;
    let its_mirror = open(&child, false)?;
    say("WRITE in a child: copies", &its_mirror.write(range.start(), &numbers).await?);
    println!("{:<44} {:?}", "the parent's first word", process.read(range.start(), 1).await?);
    its_mirror.close().await;
    child.exit().await;
    println!("{:<44} {} pages", "RELEASE", mirror.release().await?);
    let moved = process.remap(range, range.last() + 1, false).await;
    say("READ after mremap", &mirror.read(moved).await?);
    let block = process.map(BIG, Protection::WRITE, Backing::Private);
    process.advise_big(block);
    say(
        "WRITE of memory with big entries",
        &mirror.write(block.start(), &vec![1; BIG as usize * WORDS]).await?,
    );
    process.unmap(AddressRange::new(block.start(), PAGE).expect("a page")).await;
    let states = mirror.snapshot(block).await?;
    let big =
        states.iter().filter(|state| matches!(state, PageState::Present { big: true, .. })).count();
    println!("{:<44} {big} pages are in a big entry", "SNAPSHOT after munmap of one page of it");
    let file = Arc::new(File::default());
    file.write(&[1, 2, 3]);
    let mapped = process.map(1, Protection::WRITE, Backing::Shared(file.clone(), 0));
    let first = mirror.read(mapped).await?.words[..3].to_vec();
    mirror.write(mapped.start(), &[7; WORDS]).await?;
    println!("{:<44} {first:?}, then {:?}", "READ and WRITE of a mapped file", file.read(3));
    process.unmap(moved).await;
    let gone = mirror.read(moved).await.expect_err("nothing is mapped there");
    println!("{:<44} {gone}", "READ after munmap");
    let mut events: Vec<_> = mirror.take_events().into_iter().map(Event::name).collect();
    events.dedup();
    println!("{:<44} {}", "what invalidations told the driver", events.join(", "));
    mirror.close().await;
    Ok(())
}

/// Changes of the memory at random; the device must see what the model says, whatever it had mapped
/// before.
async fn random(options: &Options) -> Result<Report, CommandError> {
    const PAGES: u64 = 32;
    let (process, mut random) = (Process::new(), StdRng::seed_from_u64(options.seed));
    let mirror = open(&process, false)?;
    let range = process.map(PAGES, Protection::WRITE, Backing::Private);
    let shared =
        process.map(PAGES, Protection::WRITE, Backing::Shared(Arc::new(File::default()), 0));
    let (stop, junk) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let readers: Vec<_> = (0..options.readers)
        .map(|number| {
            // Half of them coherent.
            let reader =
                open(&process, number % 2 == 0)?.with_budget(RetryBudget::retries(100_000));
            let (stop, junk) = (stop.clone(), junk.clone());
            Ok(tokio::spawn(async move {
                let mut commands = 0;
                while !stop.load(Ordering::Acquire) {
                    for range in [range, shared] {
                        let words =
                            reader.read(range).await.map(|read| read.words).unwrap_or_default();
                        junk.fetch_add(
                            words.iter().filter(|word| **word == REUSED).count() as u64,
                            Ordering::Relaxed,
                        );
                        commands += 1;
                    }
                    tokio::task::yield_now().await;
                }
                commands
            }))
        })
        .collect::<Result<_, CommandError>>()?;

    let mut report = Report { seed: options.seed, steps: options.steps, ..Report::default() };
    // Each page is written whole, with one value.
    let mut model = [[0_u64; PAGES as usize]; 2];
    for step in 0..options.steps {
        let area = random.random_range(0..2);
        let base = [range, shared][area];
        let first = random.random_range(0..PAGES);
        let count = random.random_range(1..=PAGES - first);
        let part =
            AddressRange::new(base.start() + first * PAGE, count * PAGE).expect("at least a page");
        let changed = &mut model[area][first as usize..(first + count) as usize];
        let words = vec![step + 1; count as usize * WORDS];
        match random.random_range(0..9) {
            0 | 1 => {
                process.write(part.start(), &words).await?;
                changed.fill(step + 1);
            }
            2 | 3 => {
                report.faults += u64::from(mirror.write(part.start(), &words).await?.faults);
                changed.fill(step + 1);
            }
            4 => {
                process.discard(part).await;
                if area == 0 {
                    changed.fill(0);
                }
            }
            5 => {
                let protection =
                    if random.random_bool(0.5) { Protection::NONE } else { Protection::READ };
                process.protect(part, protection).await;
                if mirror.write(part.start(), &words).await.is_ok() {
                    report.wrong_words += words.len() as u64;
                }
                process.protect(part, Protection::WRITE).await;
            }
            6 => {
                let child = process.fork().await;
                process.write(part.start(), &words).await?;
                child.exit().await;
                changed.fill(step + 1);
            }
            // Others may take pages back meanwhile, and shared memory stays where it is: neither is
            // an error here.
            7 => drop(mirror.migrate_to_device(part).await),
            _ => drop(mirror.exclusive(part).await),
        }
        let read = mirror.read(base).await?;
        report.faults += u64::from(read.faults);
        report.checked_words += read.words.len() as u64;
        let expected = model[area].iter().flat_map(|value| std::iter::repeat_n(*value, WORDS));
        report.wrong_words += read
            .words
            .iter()
            .zip(expected)
            .filter(|(found, expected)| **found != *expected)
            .count() as u64;
    }
    stop.store(true, Ordering::Release);
    for reader in readers {
        report.reader_commands += reader.await.unwrap_or(0);
    }
    report.retries = mirror.retries();
    report.reader_junk = junk.load(Ordering::Relaxed);
    process.exit().await;
    Ok(report)
}
