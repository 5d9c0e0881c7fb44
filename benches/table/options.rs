//! Reads what the command line asks for, and finds out before measuring whether it can be done.

use clap::{CommandFactory, Parser, ValueEnum};
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The figures of the library beside their goals.
#[derive(Parser)]
#[command(name = "table", override_usage = "cargo bench --bench table -- [OPTIONS] [SECTION]...")]
pub struct Options {
    /// What is measured; all of it by default
    #[arg(value_name = "SECTION")]
    sections: Vec<Section>,
    /// Writes everything as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Writes the curves as SVG; by default to table.svg in Cargo's target directory
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Returns at once: it runs
    #[arg(long)]
    pub test: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Section {
    /// Rows beside the goals, scaled by calibration rows
    Goals,
    /// Rows of the registration cache and of userfaultfd (with the features cache and userfaultfd)
    Cache,
    /// Costs against what they must not depend on
    Curves,
    /// Costs after a burst, beside many others, and of N waits
    Costs,
    /// Invalidations beside readers
    Fairness,
    /// A thousand pages unmapped one by one, told of each and all at once (with the feature
    /// userfaultfd)
    Batches,
}

impl Options {
    pub fn parse() -> Self {
        Self::try_parse().unwrap_or_else(|error| {
            if error.use_stderr() {
                eprintln!("{error}\n{}", Self::command().render_help());
                std::process::exit(2);
            }
            error.exit()
        })
    }

    pub fn wants(&self, section: Section) -> bool {
        self.sections.is_empty() || self.sections.contains(&section)
    }

    pub fn picture(&self) -> PathBuf {
        self.plot.clone().unwrap_or_else(|| {
            // Cargo says where it was when it built this: `tmp` in its target directory.
            let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
            tmp.parent().unwrap_or(tmp).join("table.svg")
        })
    }

    /// Says which file cannot be written.
    pub fn check_files(&self) -> Result<(), String> {
        let has_curves = [Section::Cache, Section::Curves, Section::Costs]
            .into_iter()
            .any(|section| self.wants(section));
        let picture = has_curves.then(|| self.picture());
        if let (None, Some(_)) = (&picture, &self.plot) {
            return Err("--plot has nothing to draw: the sections have no curves".into());
        }
        self.json
            .iter()
            .chain(&picture)
            .try_for_each(|file| check(file).map_err(|error| cannot_be_written(file, &error)))
    }
}

pub fn cannot_be_written(file: &Path, error: &impl Display) -> String {
    format!("{} cannot be written: {error}", file.display())
}

/// Opens a file for writing and leaves everything as it was.
fn check(file: &Path) -> std::io::Result<()> {
    match OpenOptions::new().write(true).create_new(true).open(file) {
        Ok(_) => std::fs::remove_file(file),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            OpenOptions::new().write(true).open(file).map(drop)
        }
        Err(error) => Err(error),
    }
}
