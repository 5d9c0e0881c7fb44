//! A program's own memory in Vulkan devices, while that memory is replaced: uploads without a copy
//! that are never stale, and invalidations that wait for several devices. See `--help`.
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
    let Ended { failures, problems } = run(&options);
    let errors = failures.into_iter().chain(problems.iter().map(ToString::to_string));
    let errors: Vec<String> = errors.inspect(|error| eprintln!("error: {error}")).collect();
    ExitCode::from(match problems.as_slice() {
        [] => u8::from(!errors.is_empty()),
        problems if problems.iter().all(|problem| matches!(problem, Problem::Missing(_))) => 3,
        _ => 2,
    })
}

/// What is not as it should be, and what could not be done.
#[derive(Default)]
struct Ended {
    failures: Vec<String>,
    problems: Vec<Problem>,
}

impl Ended {
    /// What there is, or else the reason is noted.
    fn note<T>(&mut self, result: Result<T, Problem>) -> Option<T> {
        result.map_err(|problem| self.problems.push(problem)).ok()
    }
}

/// Runs what was asked for, and prints it. A part that fails leaves the other one its result.
fn run(options: &Options) -> Ended {
    let mut ended = Ended::default();
    if options.plot.is_some() && !options.runs(Part::Passes) {
        ended.problems.push(Problem::Options("--plot: there is no picture without passes".into()));
        return ended;
    }
    let Some(vulkan) = ended.note(Vulkan::open(options.validate)) else { return ended };
    if options.validate && vulkan.messages().is_none() {
        eprintln!(
            "the validation layer is not installed (Debian: apt-get install vulkan-validationlayers): nobody looks"
        );
    }
    let Some(cards) = ended.note(vulkan.cards().and_then(|cards| chosen(options, cards))) else {
        ended.failures.extend(report::complaints(&vulkan.messages().unwrap_or_default()));
        return ended;
    };
    let uploads = options.runs(Part::Uploads).then(|| {
        let gpu = Gpu::open(
            &vulkan,
            &cards[0],
            uploads::buffer_len(options, cards[0].alignment),
            options.fence_fd,
        )?;
        uploads::run(options, &gpu)
    });
    let uploads = uploads.and_then(|uploads| ended.note(uploads));
    let passes = options.runs(Part::Passes).then(|| passes::run(options, &vulkan, &cards));
    let passes = passes.and_then(|passes| ended.note(passes));
    // All devices have gone: whatever the layer has to say was said.
    let report = Report::new(options, &cards, vulkan.messages(), uploads, passes, &ended.problems);
    let text = if options.json { report.json() } else { Ok(report.table()) };
    ended.note(text.and_then(|text| report::say(&text)));
    if let (Some(path), Some(passes)) = (&options.plot, &report.passes) {
        let written = plot::write(path, passes);
        ended.note(
            written.map_err(|error| {
                Problem::Options(format!("the picture {}: {error}", path.display()))
            }),
        );
    }
    ended.failures.extend(report.failures);
    ended
}

fn chosen(options: &Options, cards: Vec<Card>) -> Result<Vec<Card>, Problem> {
    let names: Vec<String> = cards.iter().map(|card| card.name.clone()).collect();
    let chosen: Vec<Card> = cards
        .into_iter()
        .filter(|card| options.device.as_ref().is_none_or(|name| card.name.contains(name.as_str())))
        .collect();
    if chosen.is_empty() {
        return Err(Problem::Options(format!(
            "--device: there is none of this name, but: {}",
            names.join(", ")
        )));
    }
    for card in chosen.iter().filter(|card| options.fence_fd && !card.has_fence_fd) {
        eprintln!(
            "{} has no VK_KHR_external_fence_fd: its timeline semaphore is waited for",
            card.name
        );
    }
    Ok(chosen)
}
