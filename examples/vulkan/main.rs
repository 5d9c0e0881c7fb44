//! A program's own memory in Vulkan devices, while that memory is replaced: uploads without a copy that are never stale, and invalidations that wait
//! for several devices. See `--help`.
#![allow(missing_docs, unreachable_pub, clippy::print_stdout, clippy::print_stderr)]

mod gpu;
mod importer;
mod memory;
mod options;
mod passes;
mod plot;
mod problem;
mod report;
mod uploads;
mod vulkan;
mod waiting;

use clap::Parser;
use gpu::Gpu;
use options::{Options, Part};
use problem::Problem;
use report::Report;
use std::process::ExitCode;
use vulkan::{Card, Vulkan};

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(failures) if failures.is_empty() => ExitCode::SUCCESS,
        Ok(failures) => {
            failures.iter().for_each(|failure| eprintln!("error: {failure}"));
            ExitCode::FAILURE
        }
        Err(problem) => {
            eprintln!("error: {problem}");
            ExitCode::from(if matches!(problem, Problem::Missing(_)) { 3 } else { 2 })
        }
    }
}

/// Runs what was asked for, and prints it. Returns what is not as it should be.
fn run(options: &Options) -> Result<Vec<String>, Problem> {
    if options.plot.is_some() && !options.runs(Part::Passes) {
        return Err(Problem::Options("--plot: there is no picture without passes".into()));
    }
    let vulkan = Vulkan::open(options.validate)?;
    if options.validate && vulkan.messages().is_none() {
        eprintln!("the validation layer is not installed (Debian: apt-get install vulkan-validationlayers): nobody looks");
    }
    let cards = chosen(options, vulkan.cards()?)?;
    let uploads = options.runs(Part::Uploads).then(|| {
        let gpu = Gpu::open(&vulkan, &cards[0], uploads::buffer_len(options, cards[0].alignment), options.fence_fd)?;
        uploads::run(options, &gpu)
    });
    let uploads = uploads.transpose()?;
    let passes = options.runs(Part::Passes).then(|| passes::run(options, &vulkan, &cards)).transpose()?;
    // All devices have gone: whatever the layer has to say was said.
    let report = Report::new(options, &cards, vulkan.messages(), uploads, passes);
    if let (Some(path), Some(passes)) = (&options.plot, &report.passes) {
        plot::write(path, passes).map_err(|error| Problem::Options(format!("the picture {}: {error}", path.display())))?;
    }
    report::say(&if options.json { report.json()? } else { report.table() })?;
    Ok(report.failures)
}

fn chosen(options: &Options, cards: Vec<Card>) -> Result<Vec<Card>, Problem> {
    let names: Vec<String> = cards.iter().map(|card| card.name.clone()).collect();
    let chosen: Vec<Card> =
        cards.into_iter().filter(|card| options.device.as_ref().is_none_or(|name| card.name.contains(name.as_str()))).collect();
    if chosen.is_empty() {
        return Err(Problem::Options(format!("--device: there is none of this name, but: {}", names.join(", "))));
    }
    for card in chosen.iter().filter(|card| options.fence_fd && !card.has_fence_fd) {
        eprintln!("{} has no VK_KHR_external_fence_fd: its timeline semaphore is waited for", card.name);
    }
    Ok(chosen)
}
