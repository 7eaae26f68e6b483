//! Seconds by what they went into, and medians.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Seconds by what they went into.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seconds(BTreeMap<String, f64>);

impl Seconds {
    pub fn add(&mut self, part: &str, seconds: f64) {
        *self.0.entry(part.to_string()).or_default() += seconds;
    }

    /// Does `work` and adds what it took.
    pub fn time<T>(&mut self, part: &str, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = work();
        self.add(part, begin.elapsed().as_secs_f64());
        result
    }

    pub fn merge(&mut self, other: &Self) {
        for (part, seconds) in &other.0 {
            self.add(part, *seconds);
        }
    }

    pub fn sum(&self) -> f64 {
        self.0.values().sum()
    }

    pub fn parts(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(part, seconds)| (part.as_str(), *seconds))
    }
}

/// A median with how far the rounds lie apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub rounds: usize,
    /// Calls of one round, which the device runs without a pause; the numbers are for one of them.
    #[serde(default = "one")]
    pub calls: usize,
}

fn one() -> usize {
    1
}

impl Spread {
    /// Of the times of rounds of `calls` calls each, in `unit`s a second; none without a round.
    pub fn of(rounds: &[Duration], calls: usize, unit: f64) -> Option<Self> {
        let times: Vec<f64> = rounds.iter().map(|round| round.as_secs_f64() * unit / calls as f64).collect();
        Self::of_values(times, calls)
    }

    /// Of values; none without one.
    pub fn of_values(mut values: Vec<f64>, calls: usize) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        Some(Self { median: median(&values), min, max, rounds: values.len(), calls })
    }
}

/// The middle of ascending values, of which there is at least one.
fn median(values: &[f64]) -> f64 {
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}
