//! The command line.

use clap::Parser;
use std::path::PathBuf;
use std::time::Duration;

/// How long an invalidation takes that has to reach all GPUs of up to thousands of hosts, in
/// virtual time: the owner tells every host by itself, or a tree of hosts does. Each host has the
/// real ends of the lease protocol and a real address space; the network, the processors and the
/// GPUs are simulated.
#[derive(Parser)]
#[command(name = "many_hosts")]
pub struct Options {
    /// How many hosts, as a list
    #[arg(long, value_name = "H,H,…", value_delimiter = ',', default_value = "1,3,10,30,100,300,1000", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub hosts: Vec<u32>,

    /// GPUs of each host
    #[arg(long, value_name = "G", default_value_t = 8, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub gpus: u32,

    /// Round trip between two hosts, in µs
    #[arg(long, value_name = "µs", default_value = "50", value_parser = micros)]
    pub rtt: Duration,

    /// What a processor does for a message it sends or receives, in µs
    #[arg(long, value_name = "µs", default_value = "3", value_parser = micros)]
    pub message: Duration,

    /// A GPU's flush, in µs: the median of a log-normal distribution (σ = 0.5)
    #[arg(long, value_name = "µs", default_value = "200", value_parser = micros)]
    pub flush: Duration,

    /// The share of GPUs that take twenty times as long, in the column of stragglers
    #[arg(long, value_name = "0…1", default_value_t = 0.01, value_parser = share)]
    pub stragglers: f64,

    /// The share of messages that are lost, in the column of loss
    #[arg(long, value_name = "0…0.5", default_value_t = 0.001, value_parser = lost)]
    pub loss: f64,

    /// How many hosts each host of a tree tells
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=1_000))]
    pub fan_out: u32,

    /// The term of a mirror that tells nobody, in ms: how long a dead one is waited for
    #[arg(long, value_name = "ms", default_value = "100", value_parser = millis)]
    pub term: Duration,

    /// Invalidations of each measurement
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub invalidations: u32,

    /// Seed of all random numbers; the same seed gives the same output
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Print one JSON object instead of the table
    #[arg(long)]
    pub json: bool,

    /// Write a picture (SVG)
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

fn positive(text: &str, nanos: f64) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "is no number".to_owned())?;
    if !(number > 0.0 && number <= 1e9) {
        return Err("has to be above 0 and at most 1e9".into());
    }
    Ok(Duration::from_nanos((number * nanos) as u64))
}

fn micros(text: &str) -> Result<Duration, String> {
    positive(text, 1e3)
}

fn millis(text: &str) -> Result<Duration, String> {
    positive(text, 1e6)
}

fn lost(text: &str) -> Result<f64, String> {
    share(text).ok().filter(|share| *share <= 0.5).ok_or_else(|| "has to be from 0 to 0.5".into())
}

fn share(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "is no number".to_owned())?;
    if (0.0..=1.0).contains(&number) { Ok(number) } else { Err("has to be from 0 to 1".into()) }
}
