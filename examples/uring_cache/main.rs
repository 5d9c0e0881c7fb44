//! io_uring's fixed buffers through a registration cache, while the program unmaps and maps its
//! buffers: a cache that is not told of that reads into memory that is gone. See `--help`.
#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

mod memory;
mod ring;

use clap::Parser;
use futures::executor::block_on;
use memory::{Buffers, File, PAGE};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use ring::{Fixed, Ring};
use serde::Serialize;
use shootdown::AddressSpace;
use shootdown::cache::{Device, RegistrationCache};
use shootdown::source::Uffd;
use std::collections::HashMap;
use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

/// Reads a file through io_uring's fixed buffers while the program unmaps its buffers and maps new
/// memory at the same addresses. The kernel pins the pages of a fixed buffer, so a registration
/// from before writes to pages that nobody sees any more. Twice: with a plain cache of
/// registrations by address, and with `RegistrationCache`, which userfaultfd tells of each unmap.
#[derive(Parser)]
#[command(name = "uring_cache")]
struct Options {
    /// Reads in each run
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    reads: u32,
    /// Buffers that are read into
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    buffers: u16,
    /// One in so many reads is preceded by an unmap of its buffer
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    remap_one_in: u32,
    /// Seed of the order of buffers and unmaps
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Run {
    reads: u32,
    /// Reads after which the program saw something else in its buffer than what is in the file.
    wrong_reads: u32,
    remaps: u32,
    registrations: u64,
    hit_ns: f64,
    lookups_per_second: f64,
}

#[derive(Serialize)]
struct Report {
    plain: Run,
    cached: Run,
    register_every_time_ns: f64,
}

/// What both runs do; `read` reads a block of the file into a buffer.
fn run(
    options: &Options,
    file: &File,
    mut read: impl FnMut(&Buffers, usize, u64) -> Result<(), Box<dyn Error>>,
) -> Result<(u32, u32), Box<dyn Error>> {
    let buffers = Buffers::map(usize::from(options.buffers))?;
    let mut random = StdRng::seed_from_u64(options.seed);
    let (mut wrong, mut remaps) = (0, 0);
    for _ in 0..options.reads {
        let (buffer, block) = (
            random.random_range(0..usize::from(options.buffers)),
            random.random_range(0..file.blocks()),
        );
        if random.random_ratio(1, options.remap_one_in) {
            buffers.remap(buffer)?;
            remaps += 1;
        }
        read(&buffers, buffer, block)?;
        wrong += u32::from(buffers.first_word(buffer) != file.word(block));
    }
    Ok((wrong, remaps))
}

/// Nanoseconds for each of `times` calls; the median of 9.
fn nanoseconds(
    times: u32,
    mut call: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let mut samples = Vec::new();
    for _ in 0..9 {
        let began = Instant::now();
        for _ in 0..times {
            call()?;
        }
        samples.push(began.elapsed().as_nanos() as f64 / f64::from(times));
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples[4])
}

fn plain(options: &Options, file: &File) -> Result<Run, Box<dyn Error>> {
    let fixed = Fixed::new(Ring::new(usize::from(options.buffers))?);
    let mut known: HashMap<u64, u32> = HashMap::new();
    let (wrong_reads, remaps) = run(options, file, |buffers, buffer, block| {
        let range = buffers.range(buffer);
        let index = match known.get(&range.start()) {
            Some(index) => *index,
            None => *known.entry(range.start()).or_insert(block_on(fixed.register(range))?),
        };
        Ok(fixed.ring.read(file, block, index, range)?)
    })?;
    let address = known.keys().copied().next().unwrap_or(0);
    let hit_ns = nanoseconds(100_000, || {
        std::hint::black_box(known.get(std::hint::black_box(&address)));
        Ok(())
    })?;
    let registrations = known.len() as u64;
    Ok(Run {
        reads: options.reads,
        wrong_reads,
        remaps,
        registrations,
        hit_ns,
        lookups_per_second: 1e9 / hit_ns,
    })
}

fn cached(options: &Options, file: &File) -> Result<Run, Box<dyn Error>> {
    let space = AddressSpace::new();
    let (uffd, mut reader, mut deliveries) = Uffd::open(&space)?;
    let threads =
        [std::thread::spawn(move || reader.run()), std::thread::spawn(move || deliveries.run())];
    let fixed = Fixed::new(Ring::new(usize::from(options.buffers))?);
    let cache = RegistrationCache::<Fixed>::builder()
        .max_registrations(usize::from(options.buffers))
        .watch(uffd.clone())
        .build(&space, fixed);
    let (wrong_reads, remaps) = run(options, file, |buffers, buffer, block| {
        let range = buffers.range(buffer);
        let registration = cache.get(range).wait()?;
        // The registration is held until the device is done with the memory.
        Ok(cache.device().ring.read(file, block, *registration.handle(), range)?)
    })?;
    let buffers = Buffers::map(1)?;
    let range = buffers.range(0);
    drop(cache.get(range).wait()?);
    let hit_ns = nanoseconds(100_000, || {
        drop(cache.get(range).wait()?);
        Ok(())
    })?;
    let registrations = cache.stats().misses;
    cache.flush().wait();
    uffd.stop();
    for thread in threads {
        thread.join().map_err(|_| "a thread of the source has panicked")??;
    }
    Ok(Run {
        reads: options.reads,
        wrong_reads,
        remaps,
        registrations,
        hit_ns,
        lookups_per_second: 1e9 / hit_ns,
    })
}

fn report(options: &Options) -> Result<Report, Box<dyn Error>> {
    let file = File::new()?;
    let (plain, cached) = (plain(options, &file)?, cached(options, &file)?);
    let (fixed, buffers) = (Fixed::new(Ring::new(1)?), Buffers::map(1)?);
    let register_every_time_ns = nanoseconds(2000, || {
        let index = block_on(fixed.register(buffers.range(0)))?;
        Ok(block_on(fixed.deregister(buffers.range(0), index)).map_err(|still| still.error)?)
    })?;
    Ok(Report { plain, cached, register_every_time_ns })
}

fn main() -> ExitCode {
    let options = Options::parse();
    let report = match report(&options) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    if options.json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => println!("{text}"),
            Err(error) => eprintln!("error: {error}"),
        }
    } else {
        println!(
            "buffers of {PAGE} bytes, {} of them; each read compared with the file",
            options.buffers
        );
        println!("{:<24} {:>12} {:>12}", "", "plain", "with shootdown");
        let row = |name: &str, plain: String, cached: String| {
            println!("{name:<24} {plain:>12} {cached:>12}")
        };
        let (plain, cached) = (&report.plain, &report.cached);
        row("reads", plain.reads.to_string(), cached.reads.to_string());
        row("unmapped and mapped", plain.remaps.to_string(), cached.remaps.to_string());
        row("registrations", plain.registrations.to_string(), cached.registrations.to_string());
        row("wrong reads", plain.wrong_reads.to_string(), cached.wrong_reads.to_string());
        row("a look-up, ns", format!("{:.0}", plain.hit_ns), format!("{:.0}", cached.hit_ns));
        row(
            "look-ups a second",
            format!("{:.1e}", plain.lookups_per_second),
            format!("{:.1e}", cached.lookups_per_second),
        );
        println!("to register and deregister every time: {:.0} ns", report.register_every_time_ns);
    }
    if report.plain.wrong_reads == 0 {
        eprintln!(
            "error: the plain cache read nothing wrong, so nothing was shown: try more --reads or a smaller --remap-one-in"
        );
        return ExitCode::FAILURE;
    }
    if report.cached.wrong_reads > 0 {
        eprintln!("error: the registration cache let {} reads go wrong", report.cached.wrong_reads);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
