//! What is printed.
#![forbid(unsafe_code)]

use crate::options::{Fault, Options};
use crate::passes::{Mode, Passes};
use crate::problem::Problem;
use crate::uploads::{Cache, Expected, Row, Uploads};
use crate::vulkan::Card;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;

/// So many messages of the validation layer are failures with a line of their own.
const SHOWN: usize = 5;

#[derive(Serialize)]
pub struct Report {
    cards: Vec<Named>,
    seed: u64,
    /// What was asked for: the name of devices, and a planted bug.
    device: Option<String>,
    fault: Option<Fault>,
    /// What the validation layer has said; nothing if it did not look.
    validation: Option<Vec<String>>,
    pub uploads: Option<Uploads>,
    pub passes: Option<Passes>,
    pub failures: Vec<String>,
    /// Why a part has no result.
    pub errors: Vec<String>,
}

#[derive(Serialize)]
struct Named {
    name: String,
    driver: String,
    /// A processor, and no card.
    processor: bool,
    alignment: u64,
    max_memory_allocation_count: u32,
    /// How finished jobs are heard of.
    heard_by: &'static str,
}

impl Report {
    pub fn new(
        options: &Options,
        cards: &[Card],
        validation: Option<Vec<String>>,
        uploads: Option<Uploads>,
        passes: Option<Passes>,
        problems: &[Problem],
    ) -> Self {
        let of = |card: &Card| Named {
            name: card.name.clone(),
            driver: card.driver.clone(),
            processor: card.is_processor,
            alignment: card.alignment,
            max_memory_allocation_count: card.allocations,
            heard_by: if options.fence_fd && card.has_fence_fd {
                "fence descriptors"
            } else {
                "timeline semaphore"
            },
        };
        let mut failures = uploads.as_ref().map(Uploads::failures).unwrap_or_default();
        failures.extend(passes.iter().flat_map(Passes::failures));
        let said = validation.as_deref().unwrap_or_default();
        failures.extend(complaints(said));
        let errors = problems.iter().map(ToString::to_string).collect();
        Self {
            cards: cards.iter().map(of).collect(),
            seed: options.seed,
            device: options.device.clone(),
            fault: options.fault,
            validation,
            uploads,
            passes,
            failures,
            errors,
        }
    }

    pub fn json(&self) -> Result<String, Problem> {
        Ok(serde_json::to_string(self).map_err(Problem::other)? + "\n")
    }

    pub fn table(&self) -> String {
        let mut out = String::new();
        for card in &self.cards {
            let _ = writeln!(
                out,
                "{}, {}: imports at {} bytes, {} at a time; {}",
                card.name,
                card.driver,
                card.alignment,
                card.max_memory_allocation_count,
                card.heard_by
            );
        }
        if let Some(messages) = &self.validation {
            let _ = writeln!(out, "validation layer: {} messages", messages.len());
        }
        if let Some(uploads) = &self.uploads {
            let _ = write!(out, "\n{}", uploads_table(uploads));
        }
        if let Some(passes) = &self.passes {
            let _ = write!(out, "\n{}", passes_table(passes));
        }
        out
    }
}

/// What the validation layer has said, as failures.
pub fn complaints(said: &[String]) -> Vec<String> {
    let mut failures: Vec<String> = said
        .iter()
        .take(SHOWN)
        .map(|message| format!("the validation layer says: {message}"))
        .collect();
    if said.len() > SHOWN {
        failures.push(format!(
            "the validation layer says {} things more (--json has them)",
            said.len() - SHOWN
        ));
    }
    failures
}

fn uploads_table(uploads: &Uploads) -> String {
    let mut out = format!(
        "Uploads from {} buffers of {} bytes, each compared byte by byte. ",
        uploads.buffers, uploads.bytes
    );
    out += if uploads.keeps_pages {
        "An import keeps the pages that it was made of.\n"
    } else {
        "An import reads whatever is at its address (--pages: it keeps pages).\n"
    };
    let _ = write!(out, "{:<26}", "");
    for cache in Cache::ALL {
        let _ = write!(out, " {:>13}", cache.name());
    }
    out.push('\n');
    for in_flight in [false, true] {
        out += if in_flight { "replaced while in flight\n" } else { "replaced while idle\n" };
        let mut line = |name: &str, value: &dyn Fn(&Row) -> String| {
            let _ = write!(out, "  {name:<24}");
            for cache in Cache::ALL {
                let _ = write!(
                    out,
                    " {:>13}",
                    uploads.row(cache, in_flight).map(value).unwrap_or_default()
                );
            }
            out.push('\n');
        };
        line("uploads", &|row| row.uploads.to_string());
        line("memory replaced", &|row| row.replaced.to_string());
        line("imports", &|row| row.imports.to_string());
        line("wrong uploads", &|row| {
            let open = row.expected == Expected::Open;
            format!("{}{}", row.wrong, if open { "*" } else { "" })
        });
        line("wrong words", &|row| row.wrong_words.to_string());
        if in_flight {
            line("changed before job's end", &|row| row.unfinished.to_string());
        }
    }
    if uploads.rows.iter().any(|row| row.expected == Expected::Open) {
        out += "* By address a plain cache finds new memory by itself; Uffd hears of a change after it, so a job in flight reads new memory.\n";
    }
    let _ = writeln!(out, "an import and its end      {:>10.0} ns", uploads.import_ns);
    let _ = writeln!(out, "a look-up, a map's         {:>10.0} ns", uploads.plain_hit_ns);
    let _ = writeln!(out, "a look-up, the cache's     {:>10.0} ns", uploads.hit_ns);
    out
}

/// Milliseconds, with three digits that count.
pub fn millis(ns: u64) -> String {
    let ms = ns as f64 / 1e6;
    match ms {
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 100.0 => format!("{ms:.1} ms"),
        ms => format!("{ms:.0} ms"),
    }
}

fn passes_table(passes: &Passes) -> String {
    let mut out = format!(
        "One invalidation; each device has {} × {} ms of work in flight until its first pass. Medians of {}.\n",
        passes.depth, passes.work_ms, passes.repeats
    );
    out += "         │    one after the other    │        all at once        │\n";
    out += " devices │      total   sum of waits │      total   slowest wait │ one / all\n";
    out += "─────────┼───────────────────────────┼───────────────────────────┼──────────\n";
    let mut counts: Vec<usize> = passes.rows.iter().map(|row| row.devices).collect();
    counts.dedup();
    for devices in counts {
        let both = passes.row(devices, Mode::OneByOne).zip(passes.row(devices, Mode::AllAtOnce));
        let Some((one, all)) = both else { continue };
        let _ = writeln!(
            out,
            "{devices:>8} │ {:>10} {:>14} │ {:>10} {:>14} │ {:>8.1}",
            millis(one.total_ns),
            millis(one.sum_ns),
            millis(all.total_ns),
            millis(all.slowest_ns),
            one.total_ns as f64 / all.total_ns.max(1) as f64
        );
    }
    let stale: u64 = passes.rows.iter().map(|row| row.stale_words).sum();
    let _ = writeln!(out, "words of changed memory that a device has read: {stale}");
    let unfinished: u64 = passes.rows.iter().map(|row| row.unfinished).sum();
    let _ = writeln!(out, "devices whose work was not done when the memory changed: {unfinished}");
    out
}

/// Prints a result. Who reads only its beginning has had enough.
pub fn say(text: &str) -> Result<(), Problem> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Problem::Options(format!("the result cannot be written: {error}")))
        }
        _ => Ok(()),
    }
}
