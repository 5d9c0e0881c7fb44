//! Rows whose bound is a ratio, a count or a time that no calibration scales.

use serde::Serialize;

#[derive(Clone, Serialize)]
pub struct Bound {
    name: String,
    unit: &'static str,
    /// At most this.
    bound: f64,
    measured: f64,
    pub miss: bool,
}

impl Bound {
    pub fn new(name: impl Into<String>, unit: &'static str, bound: f64, measured: f64) -> Self {
        // What is no number misses.
        let keeps = measured <= bound;
        Self { name: name.into(), unit, bound, measured, miss: !keeps }
    }
}

pub fn print(title: &str, bounds: &[Bound]) {
    println!("\n{title:<72} {:>10} {:>10}", "bound", "measured");
    for Bound { name, unit, bound, measured, miss } in bounds {
        let mark = if *miss { "  MISS" } else { "" };
        println!("{name:<72} {bound:>10.2} {measured:>10.2} {unit}{mark}");
    }
}
